"""Triton without a GPU: a driver that names a target and does nothing else.

``with target(90): launch.compile()`` builds what a launch on a GPU of that capability builds, from tensors
on ``meta``. With a ``launcher`` a launch runs down to it, in the place of the C function that packs the
arguments and calls cuLaunchKernelEx. No real driver is asked for anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

# Makes a launcher from the source and the metadata of a kernel; that is called as (*grid, stream, ...).
Launcher = Callable[[Any, Any], Callable[..., None]]

# Shared memory that one block can have: the most of any target, so that nothing is refused here.
_SHARED = 227 << 10
# Triton keeps compiled kernels by device. No two blocks share one, nor what their launchers left there.
_devices = itertools.count(1000)


def no_launcher(source: Any, metadata: Any) -> Callable[..., None]:
    """The default of ``target``."""
    raise RuntimeError(
        f"{metadata.name} was launched where nothing runs; expected Launch.compile() or target(.., launcher)"
    )


def idle_launcher(source: Any, metadata: Any) -> Callable[..., None]:
    """Launches return at once."""
    return lambda *args: None


class _Utils:
    """What ``CompiledKernel._init_handles`` asks of the driver before a first launch."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """(module, function, registers, spills, most threads of a block)"""
        return 1, 1, 0, 0, 1024


class Driver:
    """The part of ``triton.backends.driver.DriverBase`` that compiling and launching use."""

    def __init__(self, capability: int, launcher: Launcher) -> None:
        self.capability, self.launcher_cls = capability, launcher
        self.device = next(_devices)
        self.utils = _Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def target(capability: int, launcher: Launcher = no_launcher) -> Iterator[None]:
    """Inside the block Triton's active driver is one of this capability (90: sm_90).

    Raises:
        RuntimeError: Triton interprets its kernels in this process (TRITON_INTERPRET=1).
    """
    from triton.runtime import driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled then; unset it and start again")
    before = dict(vars(driver))
    driver.set_active(Driver(capability, launcher))
    try:
        yield
    finally:
        vars(driver).clear()
        vars(driver).update(before)
