"""What every test module shares: the backends of this machine, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dicekernels
from dicekernels.backends.triton.support import interpreted

# Tests run beside each other: threads that wait for a core cost more than they compute.
torch.set_num_threads(1)


# The tests make their tensors on the CPU, where Triton only runs in its interpreter. That takes a process
# of its own (tests/test_triton_interpreter.py), which is for "triton" alone.
BACKENDS = ["triton"] if interpreted() else ["cpu", "eager"]

if interpreted():
    import triton_interpreter

    triton_interpreter.prepare()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one backend for the test and gives its name; skips with the reason if it is not here."""
    name: str = request.param
    reason = dicekernels.available_backends()[name]
    if reason:
        pytest.skip(f"backend {name!r}: {reason}")
    with dicekernels.use_backend(name):
        yield name
