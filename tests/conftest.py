"""What every test module shares: the backends of this machine, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import emulated
import pytest
import torch
from cases import DEVICE

import dicekernels
from dicekernels import deferred
from dicekernels.backends.triton.support import interpreted

# Tests run beside each other: threads that wait for a core cost more than they compute.
torch.set_num_threads(1)


# The tests make their tensors on the CPU, unless on_device.py runs them on a GPU. On the CPU Triton only runs
# in its interpreter, which takes a process of its own (test_triton_interpreter.py), for "triton" alone.
if interpreted():
    import triton_interpreter

    BACKENDS = ["triton"]
    triton_interpreter.prepare()
elif DEVICE != "cpu":
    BACKENDS = ["cuda", "triton", "eager"]
else:
    BACKENDS = ["cpu", "eager", "emulated"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one backend for the test and gives its name; skips with the reason if it is not here."""
    name: str = request.param
    with emulated.registered() if name == "emulated" else nullcontext():
        reason = dicekernels.unavailable_backends().get(name)
        if reason:
            pytest.skip(f"backend {name!r}: {reason}")
        with dicekernels.use_backend(name):
            yield name


@pytest.fixture(autouse=True)
def no_labels_of_another_test() -> Iterator[None]:
    """Counts of labels out of range that are still on their way raise in no other test."""
    yield
    deferred.forget()
