"""One kernel launch as data: what runs, what is compiled ahead of time, and what tests look at.

Making a Launch and taking it through ``JITFunction.run`` costs the host more than the rest of a step, and
the outcome is the same for all tensors of the same layout. So ``launch`` remembers it and goes on from the
compiled kernel with the tensors of the call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ..gpus import capturing
from .support import compiles_ptx

# Layouts whose launches are remembered, the oldest forgotten first: patches may differ in size without end.
LIMIT = 1024
# The interpreter compiles nothing; compilers for AMD and Intel look at more of a tensor than ``launch`` does.
REPLAYS = compiles_ptx()


class CaptureError(RuntimeError):
    """A kernel would be loaded while a CUDA graph is captured."""


class Launch(NamedTuple):
    """A kernel with its grid and arguments.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: number of programs.
        args: the run-time arguments, in the order of the kernel's parameters.
        meta: constexpr parameters by name, ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    def run(self, device: torch.device) -> Any:
        """Launches on the current stream of ``device``; nothing synchronises. Returns the compiled kernel.

        Raises:
            CaptureError: the stream is captured in a graph, and the kernel was never launched on the device.
        """
        with _current(device):
            # The first launch loads a module, which the driver forbids while a stream is captured.
            if capturing(device) and getattr(self.compile(), "module", None) is None:
                raise CaptureError(
                    f"{self.kernel.__name__}: got its first launch for tensors of this kind on {device} "
                    "while a CUDA graph is captured, expected one before: it loads the kernel, which the "
                    "driver forbids in a capture. Run one step on tensors of the same shapes, dtypes and "
                    "layouts before the capture, as torch.cuda.make_graphed_callables does"
                )
            return self.kernel[self.grid](*self.args, **self.meta)

    def compile(self) -> Any:
        """What a launch with these arguments compiles, without launching it."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.meta)


class _Replay(NamedTuple):
    """A Launch that ran, without its tensors: ``start(*tensors, *values, *rest, stream=...)`` runs it again.

    ``hooks``: the kernel's list of what is called before a launch.
    """

    start: Callable[..., None]
    rest: tuple[Any, ...]
    hooks: list[Any]


remembered: dict[Hashable, _Replay] = {}
_lock = threading.Lock()


def launch(
    plan: Callable[[], Launch],
    tensors: tuple[Tensor | None, ...],
    values: tuple[float, ...],
    key: Hashable,
) -> None:
    """Launches ``plan()`` on the current stream of the first tensor's device; nothing synchronises.

    Args:
        plan: not called where a Launch with this key and tensors of these layouts is remembered.
        tensors, values: the first arguments of the kernel, pointers and float64. A Launch depends on none of
            the values, and of the tensors on their layouts alone (shape, strides, dtype, 16-byte alignment).
            One that holds other tensors, a copy that the plan made, is not remembered.
        key: the kernel, and all else that the plan depends on.
    """
    first = tensors[0]
    assert first is not None
    if not REPLAYS:
        plan().run(first.device)
        return
    if first.get_device() in (driver.active.get_current_device(), -1):
        _launch_here(plan, tensors, values, key)
    else:
        with _current(first.device):
            _launch_here(plan, tensors, values, key)


def _launch_here(
    plan: Callable[[], Launch],
    tensors: tuple[Tensor | None, ...],
    values: tuple[float, ...],
    key: Hashable,
) -> None:
    """``launch`` on the current device."""
    active = driver.active
    current = active.get_current_device()
    # Everything that a plan and Triton's choice of a kernel see of a tensor.
    facts = [
        None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)
        for tensor in tensors
    ]
    full_key = (key, current, *facts)
    found = remembered.get(full_key)
    if found is not None and _as_usual(found):
        found.start(*tensors, *values, *found.rest, stream=active.get_current_stream(current))
        return
    first = tensors[0]
    assert first is not None
    planned = plan()
    compiled = planned.run(first.device)
    made = _replay(planned, compiled, tensors, values)
    if made is not None and _as_usual(made):
        with _lock:
            while len(remembered) >= LIMIT:
                del remembered[next(iter(remembered))]
            remembered[full_key] = made


def _replay(
    planned: Launch, compiled: Any, tensors: tuple[Tensor | None, ...], values: tuple[float, ...]
) -> _Replay | None:
    """What starts ``compiled`` with other tensors and values, None if ``planned`` depends on those given."""
    kernel, (programs,), args, meta = planned
    split = len(tensors) + len(values)
    handed_on = all(arg is tensor for arg, tensor in zip(args, tensors, strict=False))
    if not (isinstance(compiled, CompiledKernel) and handed_on and args[len(tensors) : split] == values):
        return None
    # A compiled kernel takes every parameter, the constants too.
    constants = (meta[name] for name in kernel.arg_names[len(args) :])
    return _Replay(compiled[(programs, 1, 1)], (*args[split:], *constants), kernel.pre_run_hooks)


def _as_usual(replay: _Replay) -> bool:
    """False where ``JITFunction.run`` would do something else: hooks before a launch, debugging of kernels.

    Hooks around a launch (profilers) are called by the compiled kernel.
    """
    runtime = knobs.runtime
    return not (
        runtime.debug
        or replay.hooks
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(knobs.compilation, "instrumentation_mode", "")
    )


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device of torch, which need not be that of the tensors."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu" and device.index != torch.xpu.current_device():
        return torch.xpu.device(device)
    return contextlib.nullcontext()
