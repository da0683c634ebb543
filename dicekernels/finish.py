"""The formulas over sums, in PyTorch: the eager backend's, and the check of ``csrc/common/finish.h``.

Differentiable with respect to the sums, the weights and the lambdas. Formulas: docs/semantics.md.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .spec import (
    BAD,
    FN,
    FP,
    LS,
    NEG,
    POS,
    Denominator,
    FinishSpec,
    Formula,
    G,
    GdlWeight,
    I,
    N,
    Reduction,
    Transform,
    row_index,
)

# The smallest score whose logarithm is taken (segmentation_models_pytorch's eps).
LOWEST_SCORE = 1e-7


def finish(
    totals: Tensor,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    region_lambda: Tensor | None,
    voxel_lambda: Tensor | None,
    rows: int,
    spec: FinishSpec,
    batch_voxels: int,
) -> Tensor:
    """The loss from the sums of a whole volume.

    Args:
        totals: (B, C, R) float64, the rows that ``rows`` switches on.
        class_weight: (C - skipped,) factors of the overlap terms.
        pos_weight: (C,) factors of the POS and LS rows.
        neg_weight: (C,) factors of the NEG row.
        region_lambda, voxel_lambda: 0-dim factors of the overlap loss and of the voxel term.
        batch_voxels: B * V of the problem.

    Returns:
        float64 of shape ``spec.loss_shape(B, C)``.
    """
    row = {
        bit: totals[..., row_index(rows, bit)] for bit in (I, FP, FN, G, POS, NEG, LS, N, BAD) if rows & bit
    }
    loss = totals.new_zeros(())
    if spec.formula != Formula.NONE:
        overlap = {
            bit: row[bit].sum(0, keepdim=True) if spec.batch else row[bit]
            for bit in (I, FP, FN, G)
            if bit in row
        }
        overlap = {bit: value[:, spec.skipped :] for bit, value in overlap.items()}
        terms = (
            finish_generalized(overlap, spec)
            if spec.formula == Formula.GENERALIZED
            else finish_ratio(overlap, spec)
        )
        if class_weight is not None and spec.formula == Formula.RATIO:
            terms = terms * class_weight.to(terms)
        if region_lambda is not None:
            terms = terms * region_lambda.to(terms)
        loss = terms
        if spec.reduction != Reduction.NONE:
            loss = terms.mean() if spec.reduction == Reduction.MEAN else terms.sum()
    if POS in row:
        voxel = finish_voxel(row, pos_weight, neg_weight, spec, batch_voxels)
        loss = loss + (voxel if voxel_lambda is None else voxel * voxel_lambda.to(voxel))
    if BAD in row:
        # Weights survive a batch with labels out of range: the loss shows it, the gradient is zero.
        # Only NaN is selected, so nothing of a bad batch flows back.
        loss = torch.where(row[BAD].sum() > 0, torch.full_like(loss, float("nan")), loss)
    return loss


def finish_ratio(row: dict[int, Tensor], spec: FinishSpec) -> Tensor:
    """Dice, Jaccard and Tversky terms (groups, classes)."""
    errors = spec.alpha * row[FP] + spec.beta * row[FN]
    if spec.transform == Transform.LOG:
        hits = spec.kappa * row[I]
        score = (hits + spec.smooth_nr) / (hits + errors + spec.smooth_dr)
        return -torch.log(score.clamp_min(LOWEST_SCORE))
    miss = one_minus_ratio(spec.kappa * row[I], errors, spec)
    if spec.transform == Transform.POWER:
        perfect = miss <= 0  # -inf is, NaN is not
        return torch.where(perfect, 0.0, torch.where(perfect, 1.0, miss) ** spec.exponent)
    return miss


def one_minus_ratio(hits: Tensor, errors: Tensor, spec: FinishSpec) -> Tensor:
    """1 - (hits + nr) / (hits + errors + dr)."""
    return cast(Tensor, _Miss.apply(hits, errors, spec.smooth_nr, spec.smooth_dr))  # type: ignore[no-untyped-call]


class _Miss(torch.autograd.Function):
    """miss = (errors + dr - nr) / (hits + errors + dr), with the slopes -miss / bottom and score / bottom: neither
    the value of a nearly perfect prediction nor the slope of a wholly wrong one is a small difference."""

    @staticmethod
    def forward(ctx: Any, hits: Tensor, errors: Tensor, nr: float, dr: float) -> Tensor:
        ctx.save_for_backward(hits, errors)
        ctx.smooth = nr, dr
        return (errors + dr - nr) / (hits + errors + dr)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hits, errors = ctx.saved_tensors
        nr, dr = ctx.smooth
        bottom = hits + errors + dr
        miss, score = (errors + dr - nr) / bottom, (hits + nr) / bottom
        return -grad * miss / bottom, grad * score / bottom, None, None


def finish_generalized(row: dict[int, Tensor], spec: FinishSpec) -> Tensor:
    """Generalized Dice terms (groups, 1); infinite class weights become the largest finite one."""
    weight = gdl_class_weight(row[G], spec.gdl_weight)
    miss = row[FP] + row[FN]
    hits = (weight * 2 * row[I]).sum(1, keepdim=True)
    return one_minus_ratio(hits, (weight * miss).sum(1, keepdim=True), spec)


def gdl_class_weight(volume: Tensor, kind: GdlWeight) -> Tensor:
    """Weights (groups, classes) from volumes; which are infinite follows MONAI's fp32 arithmetic."""
    if kind == GdlWeight.UNIFORM:
        return torch.ones_like(volume)
    single = volume.detach().float()
    infinite = torch.isinf(1 / (single * single if kind == GdlWeight.SQUARE else single))
    finite = torch.where(infinite, 1.0, volume)
    weight = torch.where(infinite, 0.0, 1 / (finite * finite if kind == GdlWeight.SQUARE else finite))
    if weight.shape[1] == 0:
        return weight
    return torch.where(infinite, weight.max(1, keepdim=True).values, weight)


def finish_voxel(
    row: dict[int, Tensor],
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    spec: FinishSpec,
    batch_voxels: int,
) -> Tensor:
    """Cross entropy, BCE or focal loss of the whole batch, a scalar."""
    classes = row[POS].shape[1]
    ones = row[POS].new_ones(classes)
    pos = (ones if pos_weight is None else pos_weight.reshape(-1).to(ones)).clone()
    neg = (ones if neg_weight is None else neg_weight.reshape(-1).to(ones)).clone()
    pos[: spec.voxel_skipped] = 0
    neg[: spec.voxel_skipped] = 0
    total = (1 - spec.label_smoothing) * (row[POS] * pos).sum()
    if LS in row:
        total = total + spec.label_smoothing / classes * (row[LS] * pos).sum()
    if NEG in row:
        total = total + (row[NEG] * neg).sum()
    voxels = row[N][:, 0].sum()
    denominator = torch.ones_like(voxels)
    if spec.denominator == Denominator.VOXELS:
        denominator = voxels
    elif spec.denominator == Denominator.WEIGHTS:
        denominator = (row[G] * pos).sum()
    elif spec.denominator == Denominator.ELEMENTS:
        denominator = voxels * (classes - spec.voxel_skipped)
    if batch_voxels == 0:
        return total / denominator
    # Nothing to learn from (all voxels ignored, or only classes of weight 0): 0, not 0/0.
    nothing = denominator == 0
    return torch.where(nothing, 0.0 * total, total / torch.where(nothing, 1.0, denominator))
