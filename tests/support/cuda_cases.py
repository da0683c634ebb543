"""What the tests on a GPU share: modules, problems, and the meter of waits."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import make_labels, make_logits, make_mask, make_values
from test_ops import HOT

import dicekernels
from dicekernels import (
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceFocalLoss,
    GeneralizedDiceLoss,
    MCCLoss,
    TverskyLoss,
    functional,
)
from dicekernels.backends.triton.support import interpreted
from dicekernels.dispatch import forced_backend

DEVICE = os.environ.get("DICEKERNELS_TEST_DEVICE", "cuda")


def backends_of_a_gpu() -> tuple[str, ...]:
    """The backends that every test runs on; only one if ``DICEKERNELS_BACKEND`` names it.

    With ``DICEKERNELS_TEST_DEVICE=cpu``, to try what needs no stream and no graph: the CUDA kernels in the
    emulator, or Triton's where ``TRITON_INTERPRET`` is set.
    """
    if DEVICE == "cpu":
        return ("triton",) if interpreted() else ("emulated",)
    forced = forced_backend()
    return (forced,) if forced in ("cuda", "triton") else ("cuda", "triton")


GPU_BACKENDS = backends_of_a_gpu()
HERE = [
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason=f"torch {torch.__version__} sees no CUDA device here; run bash bench/gpu.sh on a GPU node",
    ),
    pytest.mark.usefixtures("gpu_backend"),
]

SHAPE = (2, 5, 23, 29, 31)  # 20677 voxels: six chunks a sample, the last one a rest
MODULES = {
    "dice": lambda: DiceLoss(**HOT),
    "dice weight": lambda: DiceLoss(**HOT, weight=[0.1, 0.2, 0.3, 0.4, 0.5], log_loss=True),
    "generalized": lambda: GeneralizedDiceLoss(**HOT),
    "tversky": lambda: TverskyLoss(**HOT, alpha=0.3, beta=0.7),
    "dice_ce": lambda: DiceCELoss(**HOT),
    "dice_ce lambdas": lambda: DiceCELoss(**HOT, lambda_dice=0.3, lambda_ce=2.0, ignore_index=2),
    "dice_ce weight": lambda: DiceCELoss(**HOT, weight=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])),
    "focal": lambda: FocalLoss(to_onehot_y=True, alpha=0.3),
    "dice_focal": lambda: DiceFocalLoss(**HOT, lambda_focal=0.5),
    "generalized_focal": lambda: GeneralizedDiceFocalLoss(**HOT),
    "mcc": lambda: MCCLoss(**HOT),
}


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one backend for the test and gives its name; skips with the reason if it is not here."""
    name: str = request.param
    reason = dicekernels.unavailable_backends().get(name)
    if reason:
        pytest.skip(f"backend {name!r}: {reason}")
    with dicekernels.use_backend(name):
        yield name


@pytest.fixture
def memory_alone() -> Iterator[None]:
    """Tests that take most of a GPU's memory wait for each other, in whatever process they run."""
    with (Path(tempfile.gettempdir()) / "dicekernels-memory-of-the-gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@contextmanager
def no_wait() -> Iterator[None]:
    """An operation for which the host waits is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def problem(shape=SHAPE, dtype=torch.float32, seed=0):
    """Logits that require a gradient, and labels."""
    labels = make_labels((shape[0], 1, *shape[2:]), shape[1], seed=seed + 1)
    return make_logits(shape, dtype, seed).to(DEVICE).requires_grad_(), labels.to(DEVICE)


def inputs_of(kind):
    """(loss of logits and target, logits, target): "labels" of DiceCE, or "values and mask" of Tversky."""
    logits, labels = problem()
    if kind == "labels":
        return lambda z, y: functional.dice_ce_loss(z, y, **HOT), logits, labels
    values, mask = make_values(SHAPE).to(DEVICE), make_mask("fraction", SHAPE).to(DEVICE)
    return lambda z, y: functional.tversky_loss(z, y, sigmoid=True, mask=mask), logits, values


def bits(loss, logits, target):
    """Value and the gradient of the values' sum."""
    value = loss(logits, target)
    return value.detach(), torch.autograd.grad(value, logits, torch.ones_like(value))[0]


def assert_same(got, expected, what=""):
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs), what
