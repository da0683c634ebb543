"""Which backend runs: one predicate a backend, used for the choice, for a forced choice and for ``explain``.

The choice rests on static facts alone (device, dtype, class count, what is loaded), so torch.compile
neither breaks on it nor recompiles for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import documented
from .backends import gpus, native, refused
from .backends.triton import support as triton_support

MAX_CLASSES = 4096
MAX_CUDA_CLASSES = 512
BACKEND_VARIABLE = "DICEKERNELS_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A filling of the three ops.

    Attributes:
        namespace: of the ops, ``torch.ops.<namespace>.sums`` and so on.
        available: "" or the reason why it can run nothing here.
        can_run: "" or the reason why it does not take logits of (device type, dtype, classes).
    """

    name: str
    namespace: str
    available: Callable[[], str]
    can_run: Callable[[str, torch.dtype, int], str]


def _cpu_available() -> str:
    return native.load_error("cpu") or ""


def _cpu_can_run(device: str, dtype: torch.dtype, classes: int) -> str:
    if device != "cpu":
        return f"the logits are on {device}, it takes tensors on cpu"
    return refused(dtype, classes, MAX_CLASSES)


def cuda_takes(dtype: torch.dtype, classes: int) -> str:
    """ "" or the reason why the CUDA kernels do not take logits of these."""
    return refused(dtype, classes, MAX_CUDA_CLASSES)


def _cuda_available() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    error = native.load_error("cuda")
    if error:
        return error
    if torch.cuda.device_count() == 0:
        return "torch sees no GPU here"
    return str(torch.ops.dicekernels.cuda_obstacle())


def _cuda_can_run(device: str, dtype: torch.dtype, classes: int) -> str:
    if device != "cuda":
        return f"the logits are on {device}, it takes tensors on cuda"
    return cuda_takes(dtype, classes) or _unsupported_gpu()


_architectures: str | None = None


def _unsupported_gpu() -> str:
    """ "" or which GPU of this process the library has no code for: then it serves none of them."""
    global _architectures
    if _architectures is None:
        _architectures = str(torch.ops.dicekernels.cuda_architectures())
    for capability in gpus.capabilities():
        if not gpus.runs_on(_architectures, capability):
            return (
                f"a GPU here has compute capability {capability}, the library was compiled for "
                f"{_architectures}; rebuild it with TORCH_CUDA_ARCH_LIST"
            )
    return ""


# What torch.compiler.assume_constant_result does, without importing torch._dynamo.
_unsupported_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo's own mark


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", "dicekernels", _cuda_available, _cuda_can_run),
        Backend("cpu", "dicekernels", _cpu_available, _cpu_can_run),
        Backend("triton", "dicekernels_triton", triton_support.unavailable, triton_support.can_run),
        Backend("eager", "dicekernels_eager", lambda: "", lambda device, dtype, classes: ""),
    )
}

# What is available does not change in a process; asked once, so that a traced call reads a constant.
_unavailable = {name: backend.available() for name, backend in BACKENDS.items()}
_forced: str | None = None


def available_backends() -> tuple[str, ...]:
    """The backends that can run here, in the order in which they are tried.

    What one of them does not take goes to the next, at last to "eager", which takes everything.
    :func:`unavailable_backends` has the reasons of the others, ``explain`` those for given tensors.

    Returns:
        Names, such as ``("cpu", "eager")``; each fits :func:`use_backend`.
    """
    return tuple(name for name, reason in _unavailable.items() if not reason)


def unavailable_backends() -> dict[str, str]:
    """The backends of this version that cannot run here, each with the reason.

    Returns:
        Name -> reason, such as ``{"cuda": "torch sees no GPU here"}``; a name that is missing can run.
    """
    return {name: reason for name, reason in _unavailable.items() if reason}


def forced_backend() -> str | None:
    """The backend that ``use_backend`` or ``DICEKERNELS_BACKEND`` names, or None."""
    return _forced


def refuse_forced(reason: str, remedy: str) -> None:
    """Raises RuntimeError if another backend than "eager" is forced, which alone can run something."""
    if _forced not in (None, "eager"):
        raise RuntimeError(f"backend {_forced!r} was forced, but {reason}; {remedy}")


def force_backend(name: str | None) -> None:
    """Use one backend for every call from now on (None: choose again).

    Raises:
        ValueError: no backend has this name.
        RuntimeError: it is not available here; the message has the first cause.
    """
    global _forced
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"backend: got {name!r}, expected one of {sorted(BACKENDS)}")
        if _unavailable[name]:
            raise RuntimeError(f"backend {name!r} is not available: {_unavailable[name]}")
    _forced = name


@documented()
@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block; a problem that it does not take is then an error.

    It acts on the whole process, not on one thread, and goes before the variable ``DICEKERNELS_BACKEND``.

    Args:
        name: "cuda", "cpu", "triton" or "eager"; :func:`available_backends` lists those that can run here.

    Returns:
        A context manager; after the block the choice is as before it, after an error too.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: it is not available here; the message has the first cause.
    """
    before = _forced
    force_backend(name)
    try:
        yield
    finally:
        force_backend(before)


def refusals(logits: Tensor) -> dict[str, str]:
    """For every backend: "" if it takes these logits, else the reason why not."""
    facts = (logits.device.type, logits.dtype, logits.shape[1])
    return {name: _unavailable[name] or backend.can_run(*facts) for name, backend in BACKENDS.items()}


# Those with kernels for a kind of device; elsewhere Triton may have.
_KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def no_kernel(logits: Tensor) -> str:
    """Why the kernels for the device of these logits do not run them, in one line, or ""."""
    if _forced is not None:
        return "'eager' is forced" if _forced == "eager" else ""
    reasons = refusals(logits)
    del reasons["eager"]
    if not all(reasons.values()):
        return ""
    names = _KERNELS.get(logits.device.type, ("triton",))
    return "; ".join(f"{name}: {reasons[name].splitlines()[0]}" for name in names)


def choose(logits: Tensor) -> Backend:
    """The backend for these logits: the forced one, else the first that takes them.

    Raises:
        RuntimeError: the forced backend does not take them; the message says why.
    """
    facts = (logits.device.type, logits.dtype, logits.shape[1])
    if _forced is not None:
        reason = BACKENDS[_forced].can_run(*facts)
        if reason:
            raise RuntimeError(f"backend {_forced!r} was forced, but {reason}")
        return BACKENDS[_forced]
    for name, backend in BACKENDS.items():
        if not _unavailable[name] and not backend.can_run(*facts):
            return backend
    raise AssertionError("the eager backend takes everything")


if os.environ.get(BACKEND_VARIABLE):
    force_backend(os.environ[BACKEND_VARIABLE])
else:
    native.warn_of_missing_libraries()
