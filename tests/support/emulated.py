"""The CUDA kernels on the CPU: their text compiled by g++ over tests/cpp/emulator.h, one more backend.

The library is built by ``make build-tests`` and stands in tests/cpp, outside of the package; what registers
its ops, and for a test the backend "emulated" behind the others, is here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dicekernels import autograd, dispatch, ops

NAMESPACE = "dicekernels_emulated"
# Another build of it, with sanitizers (`make test-sanitize`).
VARIABLE = "DICEKERNELS_EMULATED_LIBRARY"
LIBRARY = Path(os.environ.get(VARIABLE, Path(__file__).parents[1] / "cpp/libdicekernels_emulated.so"))


def _can_run(device: str, dtype: torch.dtype, classes: int) -> str:
    if device != "cpu":
        return f"the logits are on {device}, the emulated kernels take tensors on cpu"
    return dispatch.cuda_takes(dtype, classes)


@functools.cache
def unavailable() -> str:
    """ "" or the reason why the emulated kernels cannot run here. Defines their ops."""
    ops.define(NAMESPACE)
    autograd.define(NAMESPACE)
    if not LIBRARY.is_file():
        return f"{LIBRARY} not found; run `make build-tests`"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY} does not load: {error}"
    return ""


@contextmanager
def registered() -> Iterator[None]:
    """The backend is one of dispatch's for as long as this lasts."""
    reason = unavailable()
    dispatch.BACKENDS["emulated"] = dispatch.Backend("emulated", NAMESPACE, lambda: reason, _can_run)
    dispatch._unavailable["emulated"] = reason
    try:
        yield
    finally:
        del dispatch.BACKENDS["emulated"], dispatch._unavailable["emulated"]
