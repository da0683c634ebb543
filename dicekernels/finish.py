"""The formulas over sums, in PyTorch: the eager backend's, and the check of ``csrc/common/finish.h``.

Differentiable with respect to the sums, the weights and the lambdas. Formulas: docs/semantics.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .spec import (
    BAD,
    FN,
    FP,
    LS,
    NEG,
    POS,
    TN,
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
from .tensors import dense_tensor

# Class weights of the generalized Dice loss from volumes, float32 (B, K) or, with ``batch``, (K,).
VolumeWeight = Callable[[Tensor], Tensor]

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
    empty: bool,
    dtype: torch.dtype = torch.float64,
    volume_weight: VolumeWeight | None = None,
) -> Tensor:
    """The loss from the sums of a whole volume.

    A loss of two halves is the sum of these halves to the last bit: each is rounded to ``dtype`` before and
    after its lambda. Gradients know nothing of the rounding.

    Args:
        totals: (B, C, R) float64, the rows that ``rows`` switches on.
        class_weight: (C - skipped,) factors of the overlap terms.
        pos_weight: (C,) factors of the POS and LS rows.
        neg_weight: (C,) factors of the NEG row.
        region_lambda, voxel_lambda: 0-dim factors of the overlap loss and of the voxel term.
        empty: the problem has no sample or no voxel.
        dtype: of the loss, floating.
        volume_weight: in place of that of ``spec.gdl_weight``.

    Returns:
        ``dtype`` of shape ``spec.loss_shape(B, C)``.
    """
    row = _rows(totals, rows)
    loss = totals.new_zeros(())
    if spec.formula != Formula.NONE:
        overlap = _overlap_rows(row, spec)
        if volume_weight is None:
            terms = _TERMS[spec.formula](overlap, spec)
        else:
            terms = _generalized(overlap, spec, custom_class_weight(overlap[G], volume_weight, spec.batch))
        if class_weight is not None and spec.formula == Formula.RATIO:
            terms = terms * class_weight.to(terms)
        if spec.reduction != Reduction.NONE:
            terms = terms.mean() if spec.reduction == Reduction.MEAN else terms.sum()
        loss = finish_half(terms, region_lambda, dtype)
    if POS in row:
        voxel = finish_voxel(row, pos_weight, neg_weight, spec, empty)
        loss = loss + finish_half(voxel, voxel_lambda, dtype)
    if BAD in row:
        # Weights survive a batch with labels out of range: the loss shows it, the gradient is zero.
        # Only NaN is selected, so nothing of a bad batch flows back.
        loss = torch.where(row[BAD].sum() > 0, torch.full_like(loss, float("nan")), loss)
    return loss.to(dtype)


def finish_half(value: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A half as it is alone, times its lambda, which torch takes as float32 beside all but float64."""
    value = _rounded(value, dtype)
    if factor is None:
        return value
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    return _rounded(value * _rounded(factor.to(value), narrow), dtype)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 values that ``dtype`` holds; the slope is 1."""
    if dtype == torch.float64:
        return value
    exact = value.detach()
    rounded = exact.to(dtype).to(exact.dtype)
    return value + torch.where(rounded == exact, 0.0, rounded - exact)  # no inf - inf


def finish_ratio(row: dict[int, Tensor], spec: FinishSpec) -> Tensor:
    """Dice, Jaccard and Tversky terms (groups, classes)."""
    score, miss, _ = _ratio(spec.kappa * row[I], spec.alpha * row[FP] + spec.beta * row[FN], spec)
    if spec.transform == Transform.LOG:
        return -torch.log(score.clamp_min(LOWEST_SCORE))
    if spec.transform == Transform.POWER:
        perfect = miss <= 0  # -inf is, NaN is not
        return torch.where(perfect, 0.0, torch.where(perfect, 1.0, miss) ** spec.exponent)
    return miss


def finish_generalized(row: dict[int, Tensor], spec: FinishSpec) -> Tensor:
    """Generalized Dice terms (groups, 1); infinite class weights become the largest finite one."""
    return _generalized(row, spec, gdl_class_weight(row[G], spec.gdl_weight))


def _generalized(row: dict[int, Tensor], spec: FinishSpec, weight: Tensor) -> Tensor:
    hits, errors = 2 * weight * row[I], weight * (row[FP] + row[FN])
    return _ratio(hits.sum(1, keepdim=True), errors.sum(1, keepdim=True), spec)[1]


def finish_mcc(row: dict[int, Tensor], spec: FinishSpec) -> Tensor:
    """1 - Matthews' correlation coefficient (groups, classes); 0 where nothing is wrong."""
    perfect, top, square = _mcc(row, spec)
    return torch.where(perfect, 0.0, 1 - top / torch.where(perfect, 1.0, square).sqrt())


def _mcc(row: dict[int, Tensor], spec: FinishSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Whether fp = fn = 0, the numerator of the coefficient and the square of its denominator."""
    tp, fp, fn, tn = (row[bit] for bit in (I, FP, FN, TN))
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + spec.smooth_dr
    return (fp == 0) & (fn == 0), tp * tn - fp * fn + spec.smooth_nr, square


def _ratio(hits: Tensor, errors: Tensor, spec: FinishSpec) -> tuple[Tensor, Tensor, Tensor]:
    """score = (hits + nr) / bottom, miss = 1 - score and bottom = hits + errors + dr.

    Neither the miss of a nearly perfect prediction nor the score of a wholly wrong one is taken as a
    small difference.
    """
    bottom = hits + errors + spec.smooth_dr
    return (hits + spec.smooth_nr) / bottom, (errors + spec.smooth_dr - spec.smooth_nr) / bottom, bottom


def gdl_class_weight(volume: Tensor, kind: GdlWeight) -> Tensor:
    """Weights (groups, classes) from volumes; which are infinite follows MONAI's fp32 arithmetic."""
    if kind == GdlWeight.UNIFORM:
        return torch.ones_like(volume)
    single = volume.detach().float()
    infinite = torch.isinf(1 / (single * single if kind == GdlWeight.SQUARE else single))
    finite = torch.where(infinite, 1.0, volume)
    return _largest_finite(1 / (finite * finite if kind == GdlWeight.SQUARE else finite), infinite)


def custom_class_weight(volume: Tensor, function: VolumeWeight, batch: bool) -> Tensor:
    """Weights (groups, classes) that a user's function makes of volumes in MONAI's shape and dtype.

    Raises:
        ValueError: it made another shape.
    """
    given = volume.detach().float()
    given = given[0] if batch else given
    weight = function(given)
    dense_tensor("the result of w_func", weight)
    if weight.shape != given.shape:
        raise ValueError(
            f"w_func: got weights of shape {tuple(weight.shape)}, expected one for each volume: "
            f"{tuple(given.shape)}"
        )
    weight = weight.reshape(volume.shape).to(volume)
    return _largest_finite(weight, weight.isinf())


def _largest_finite(weight: Tensor, infinite: Tensor) -> Tensor:
    """Weights (groups, classes); an infinite one becomes the largest of the others of its group, or 0."""
    finite = torch.where(infinite, 0.0, weight)
    if weight.shape[1] == 0:
        return finite
    return torch.where(infinite, finite.amax(1, keepdim=True), finite)


def finish_voxel(
    row: dict[int, Tensor],
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    spec: FinishSpec,
    empty: bool,
) -> Tensor:
    """Cross entropy, BCE or focal loss of the whole batch, a scalar."""
    classes = row[POS].shape[1]
    pos, neg = (_voxel_weight(weight, row, spec) for weight in (pos_weight, neg_weight))
    total = (1 - spec.label_smoothing) * (row[POS] * pos).sum(1, keepdim=True)
    if LS in row:
        total = total + spec.label_smoothing / classes * (row[LS] * pos).sum(1, keepdim=True)
    if NEG in row:
        total = total + (row[NEG] * neg).sum(1, keepdim=True)
    denominator = _denominator(row, pos, spec)
    if spec.denominator != Denominator.SAMPLES:
        total = total.sum()
    if empty:
        return (total / denominator).sum()
    # Nothing to learn from (all voxels ignored, or only classes of weight 0): 0, not 0/0.
    nothing = denominator == 0
    return torch.where(nothing, 0.0 * total, total / torch.where(nothing, 1.0, denominator)).sum()


def coef(
    totals: Tensor,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    region_lambda: Tensor | None,
    voxel_lambda: Tensor | None,
    rows: int,
    spec: FinishSpec,
    empty: bool,
) -> Tensor:
    """dLoss/dtotals (B, C, R) in closed form; arguments as :func:`finish`.

    For reduction "none" the slope of the one loss that a sum belongs to.
    """
    row = _rows(totals, rows)
    slopes: dict[int, Tensor] = {}
    if spec.formula != Formula.NONE:
        overlap = _overlap_rows(row, spec)
        generalized = spec.formula == Formula.GENERALIZED
        slopes = _SLOPES[spec.formula](overlap, spec)
        groups, classes = overlap[I].shape
        terms = max(1, groups * (1 if generalized else classes))  # an empty batch has none
        share = 1 / terms if spec.reduction == Reduction.MEAN else 1.0
        scale = totals.new_tensor(share)
        if region_lambda is not None:
            scale = scale * region_lambda.to(totals)
        if class_weight is not None and spec.formula == Formula.RATIO:
            scale = scale * class_weight.to(totals)
        slopes = {bit: scale * value for bit, value in slopes.items()}
    out = torch.zeros_like(totals)
    for bit, value in slopes.items():
        out[:, spec.skipped :, row_index(rows, bit)] = value
    if POS in row:
        classes = row[POS].shape[1]
        pos, neg = (_voxel_weight(weight, row, spec) for weight in (pos_weight, neg_weight))
        denominator = _denominator(row, pos, spec)
        scale = 1 / denominator if voxel_lambda is None else voxel_lambda.to(totals) / denominator
        if not empty:
            scale = torch.where(denominator == 0, 0.0, scale)
        out[..., row_index(rows, POS)] = scale * (1 - spec.label_smoothing) * pos
        if LS in row:
            out[..., row_index(rows, LS)] = scale * spec.label_smoothing / classes * pos
        if NEG in row:
            out[..., row_index(rows, NEG)] = scale * neg
    return torch.where(row[BAD].sum() > 0, 0.0, out) if BAD in row else out


def slopes_ratio(row: dict[int, Tensor], spec: FinishSpec) -> dict[int, Tensor]:
    """Slopes of :func:`finish_ratio` in I, FP and FN."""
    score, miss, bottom = _ratio(spec.kappa * row[I], spec.alpha * row[FP] + spec.beta * row[FN], spec)
    outer = torch.ones_like(miss)
    if spec.transform == Transform.LOG:
        outer = torch.where(score < LOWEST_SCORE, 0.0, 1 / score)
    elif spec.transform == Transform.POWER:
        outer = torch.where(miss <= 0, 0.0, spec.exponent * miss ** (spec.exponent - 1))
    by_error = outer * score / bottom
    return {I: -outer * spec.kappa * miss / bottom, FP: spec.alpha * by_error, FN: spec.beta * by_error}


def slopes_generalized(row: dict[int, Tensor], spec: FinishSpec) -> dict[int, Tensor]:
    """Slopes of :func:`finish_generalized` in I, FP and FN; the weights are constants."""
    weight = gdl_class_weight(row[G], spec.gdl_weight)
    hits, errors = 2 * weight * row[I], weight * (row[FP] + row[FN])
    score, miss, bottom = _ratio(hits.sum(1, keepdim=True), errors.sum(1, keepdim=True), spec)
    by_error = weight * score / bottom
    return {I: -2 * weight * miss / bottom, FP: by_error, FN: by_error}


def slopes_mcc(row: dict[int, Tensor], spec: FinishSpec) -> dict[int, Tensor]:
    """Slopes of :func:`finish_mcc` in I, FP, FN and TN."""
    perfect, top, square = _mcc(row, spec)
    tp, fp, fn, tn = (row[bit] for bit in (I, FP, FN, TN))
    square = torch.where(perfect, 1.0, square)
    root, half = square.sqrt(), top / (2 * square)

    def slope(of_top: Tensor, of_square: Tensor) -> Tensor:
        return torch.where(perfect, 0.0, (half * of_square - of_top) / root)

    return {
        I: slope(tn, (tn + fp) * (tn + fn) * (2 * tp + fp + fn)),
        FP: slope(-fn, (tp + fn) * (tn + fn) * (2 * fp + tp + tn)),
        FN: slope(-fp, (tp + fp) * (tn + fp) * (2 * fn + tp + tn)),
        TN: slope(tp, (tp + fp) * (tp + fn) * (2 * tn + fp + fn)),
    }


_TERMS = {
    Formula.RATIO: finish_ratio,
    Formula.GENERALIZED: finish_generalized,
    Formula.MCC: finish_mcc,
}
_SLOPES = {
    Formula.RATIO: slopes_ratio,
    Formula.GENERALIZED: slopes_generalized,
    Formula.MCC: slopes_mcc,
}


def _rows(totals: Tensor, rows: int) -> dict[int, Tensor]:
    bits = (I, FP, FN, G, POS, NEG, LS, N, BAD, TN)
    return {bit: totals[..., row_index(rows, bit)] for bit in bits if rows & bit}


def _overlap_rows(row: dict[int, Tensor], spec: FinishSpec) -> dict[int, Tensor]:
    """(groups, K): added up over the batch if asked for, without the skipped classes."""
    return {
        bit: (row[bit].sum(0, keepdim=True) if spec.batch else row[bit])[:, spec.skipped :]
        for bit in (I, FP, FN, G, TN)
        if bit in row
    }


def _voxel_weight(weight: Tensor | None, row: dict[int, Tensor], spec: FinishSpec) -> Tensor:
    ones = row[POS].new_ones(row[POS].shape[1])
    used = ones if weight is None else weight.reshape(-1).to(ones).clone()
    used[: spec.voxel_skipped] = 0
    return used


def _denominator(row: dict[int, Tensor], pos: Tensor, spec: FinishSpec) -> Tensor:
    """() or, for SAMPLES, (B, 1)."""
    if spec.denominator == Denominator.SAMPLES:
        return row[N][:, :1]
    voxels = row[N][:, 0].sum()
    if spec.denominator == Denominator.VOXELS:
        return voxels
    if spec.denominator == Denominator.WEIGHTS:
        return (row[G] * pos).sum()
    if spec.denominator == Denominator.ELEMENTS:
        return voxels * (row[N].shape[1] - spec.voxel_skipped)
    return torch.ones_like(voxels)
