"""The ops of csrc/cuda as the losses call them: on the backend "emulated" and, on a GPU, "cuda".

``region_sums`` asks cross entropy for the row LS, which the general kernels alone have; the losses do not.
"""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, oracle_rows
from conftest import BACKENDS as HERE
from torch import Tensor

from dicekernels.dispatch import BACKENDS
from dicekernels.spec import (
    BAD,
    NEG,
    OVERLAP_ROWS,
    POS,
    Activation,
    G,
    N,
    SumsSpec,
    VoxelTerm,
    chunk_count,
    row_names,
)
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

# The modules' mark. Other backends have other kernels.
on_cuda_kernels = pytest.mark.parametrize(
    "backend", [name for name in ("emulated", "cuda") if name in HERE], indirect=True
)
F64 = torch.float64
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = {
    None: (VoxelTerm.NONE, 0),
    "ce": (VoxelTerm.CE, POS),
    "focal_sigmoid": (VoxelTerm.FOCAL_SIGMOID, POS | NEG),
}
COUNTS = OVERLAP_ROWS | G | N | BAD


def spec_of(term: str | None, rows: int = 0, ignore_index: int | None = None) -> SumsSpec:
    kind, more = KINDS[term]
    rows = rows or COUNTS | more
    return SumsSpec(False, Activation.SOFTMAX, rows=rows, voxel_term=kind, ignore_index=ignore_index)


def ops_of(backend: str):
    return getattr(torch.ops, BACKENDS[backend].namespace)


def make_coef(samples: int, classes: int, rows: int, seed: int = 4) -> Tensor:
    drawn = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(samples, classes, rows.bit_count(), generator=drawn, dtype=F64, device="cpu").to(
        DEVICE
    )


def both(backend, logits, labels, mask=None, *, term="ce", coef=None, **options) -> tuple[Tensor, Tensor]:
    """Slots and gradient."""
    spec, ops = spec_of(term, **options), ops_of(backend)
    coef = make_coef(*logits.shape[:2], spec.rows) if coef is None else coef
    slots = ops.sums(logits, labels, mask, *spec.args())
    return slots, ops.sums_backward(None, logits, labels, mask, coef, *spec.args())


def check(backend, logits, labels, name="", *, term=None, mask=None, ignore_index=None) -> None:
    """Rows, and the gradient of a random combination of them, against the oracle on the same values."""
    name = f"{name} {tuple(logits.shape)} {term}"
    spec = spec_of(term, ignore_index=ignore_index)
    coef = make_coef(*logits.shape[:2], spec.rows)
    slots, got = both(backend, logits, labels, mask, term=term, ignore_index=ignore_index, coef=coef)
    # Torch compares uint8 labels with ignore_index modulo 256.
    wide = labels if labels.is_floating_point() else labels.long()
    results = []
    for dtype in (F64, torch.float32):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        options = {"voxel_term": term, "mask": mask, "ignore_index": ignore_index}
        rows = oracle_rows(leaf, wide, dtype, **options)
        rows["BAD"] = torch.zeros_like(rows["N"])
        mixed = sum((coef[..., at] * rows[row]).sum() for at, row in enumerate(row_names(spec.rows)))
        results += [rows, torch.autograd.grad(mixed, leaf)[0]]
    truth, expected, honest, plain = results
    assert slots.shape[1] == chunk_count(labels[0].numel()), name
    for row, total in zip(row_names(spec.rows), slots.sum(1).unbind(-1), strict=True):
        assert_close_to_truth(total, truth[row], honest[row].to(F64), torch.float32, f"{row} {name}")
        if row == "BAD" or (mask is None and row in ("G", "N")):
            assert torch.equal(total, truth[row]), f"{row} {name}"
    assert (got.dtype, got.stride()) == (logits.dtype, torch.empty_like(logits).stride()), name
    assert_gradient_close(got, expected, plain.to(logits.dtype), logits.dtype, f"gradient {name}")


def tile_of(dtype: torch.dtype) -> tuple[int, int]:
    """Voxels of a tile and of a thread in it: 16 bytes a thread and class."""
    group = 16 // dtype.itemsize
    return 32 * group, group


# Every register plan, filled and with a register that no class has.
CLASSES = [*range(2, 18), 24, 25, 32, 33, 48, 64, 96, 100, 117, 127, 128, 129]
FOCAL_CLASSES = [*range(2, 10), 16, 17, 33, 64, 65, 117, 128]

#
# One plan of each form: 4 and 14 classes in a warp, 33 and 117 shared by warps; the same of the focal term.

PLANS = [(4, "ce"), (14, None), (33, "ce"), (117, "ce")]
PLANS += [(3, "focal_sigmoid"), (7, "focal_sigmoid"), (33, "focal_sigmoid")]
plans = pytest.mark.parametrize(("classes", "term"), PLANS, ids=[f"{c}-{term}" for c, term in PLANS])
