"""The kernel of ``finish`` on small sums, and what its result may be off by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dicekernels import finish as formulas
from dicekernels.backends.triton import support
from dicekernels.backends.triton.finish import finish
from dicekernels.spec import BAD, LS, NEG, OVERLAP_ROWS, POS, TN, FinishSpec, G, N, Weights

F64 = torch.float64
EPS = torch.finfo(F64).eps
ALL_ROWS = OVERLAP_ROWS | G | POS | NEG | LS | N | BAD | TN
DEVICE = "cpu" if support.interpreted() else "cuda"

runs = pytest.mark.skipif(
    not support.interpreted() and not torch.cuda.is_available(),
    reason="no GPU and no interpreter: run again with TRITON_INTERPRET=1",
)
compiles = pytest.mark.skipif(
    support.interpreted(), reason="TRITON_INTERPRET is set, nothing is compiled: run again without it"
)
# The interpreter's NumPy tells of the quotients 0/0 that the kernel selects away.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def run(
    slots: Tensor,
    rows: int,
    spec: FinishSpec,
    empty: bool = False,
    dtype: torch.dtype = F64,
    **weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(loss, coef) on the CPU; ``weights`` by name, on any device, the others None."""
    loss, coef = finish(slots.to(DEVICE), Weights(**weights), rows, spec, empty, dtype)
    return loss.cpu(), coef.cpu()


def roundings(slots: Tensor) -> int:
    """How many eps the result may be off by.

    A sum of n numbers of one sign is within n eps, whatever the order. The formulas after it are some 16
    operations without cancellation, on either side.
    """
    samples, chunks, classes, _ = slots.shape
    return 32 + chunks + samples + classes


def assert_equal(ours: Tensor, truth: Tensor, slots: Tensor, name: str, dtype: torch.dtype = F64) -> None:
    """To ``roundings`` eps of the largest finite value; values that are not finite match."""
    assert (ours.shape, ours.dtype) == (truth.shape, dtype), name
    truth = truth.to(dtype)
    finite = truth.isfinite()
    assert torch.equal(ours.isnan(), truth.isnan()), f"{name}: {ours} {truth}"
    assert torch.equal(ours[truth.isinf()], truth[truth.isinf()]), f"{name}: {ours} {truth}"
    if finite.any():
        error = (ours.double() - truth.double())[finite].abs().max()
        scale = truth[finite].double().abs().max()
        # Where float64 falls on another side of a tie, the shorter dtype is off by one unit.
        allowed = roundings(slots) * EPS + (torch.finfo(dtype).eps if dtype != F64 else 0)
        assert error <= allowed * scale, f"{name}: {error / (EPS * scale)} eps\n{ours}\n{truth}"


def check(slots: Tensor, rows: int, spec: FinishSpec, empty: bool = False, **weights: Tensor | None) -> None:
    """Loss and slopes against the formulas in PyTorch."""
    loss, coef = run(slots, rows, spec, empty, **weights)
    arguments = (slots.sum(1), Weights(**weights), rows, spec, empty)
    name = f"{tuple(slots.shape)} {spec} {sorted(weights)}"
    assert_equal(loss, formulas.finish(*arguments), slots, f"loss {name}")
    assert_equal(coef, formulas.coef(*arguments), slots, f"slopes {name}")
