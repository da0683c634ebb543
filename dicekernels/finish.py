"""The formulas over sums, in PyTorch: the eager backend's, and the check of ``csrc/common/finish.h``.

Differentiable with respect to the sums, the weights and the lambdas. Formulas: docs/semantics.md.
"""

from __future__ import annotations

import functools
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
    ROWS,
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
    Weights,
    row_index,
)
from .tensors import dense_tensor

# A tensor for each row that is on, or for each that a formula depends on.
Rows = dict[int, Tensor]
# Class weights of the generalized Dice loss from volumes, float32 (B, K) or, with ``batch``, (K,).
VolumeWeight = Callable[[Tensor], Tensor]

# The smallest score whose logarithm is taken (segmentation_models_pytorch's eps).
LOWEST_SCORE = 1e-7


def finish(
    totals: Tensor,
    weights: Weights,
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
        empty: the problem has no sample or no voxel.
        dtype: of the loss, floating.
        volume_weight: in place of that of ``spec.gdl_weight``.

    Returns:
        ``dtype`` of shape ``spec.loss_shape(B, C)``.
    """
    row = _rows(totals, rows)
    loss = totals.new_zeros(())
    if spec.formula != Formula.NONE:
        region = finish_region(row, weights.class_weight, spec, volume_weight)
        loss = finish_half(region, weights.region_lambda, dtype)
    if POS in row:
        loss = loss + finish_half(finish_voxel(row, weights, spec, empty), weights.voxel_lambda, dtype)
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


def finish_region(
    row: Rows, class_weight: Tensor | None, spec: FinishSpec, volume_weight: VolumeWeight | None
) -> Tensor:
    """The overlap terms (groups, outputs), or their mean or sum."""
    overlap = _overlap_rows(row, spec)
    if volume_weight is None:
        terms, _ = _FORMULAS[spec.formula](overlap, spec)
    else:
        weight = custom_class_weight(overlap[G], volume_weight, spec.batch)
        terms, _ = _generalized(overlap, spec, weight)
    if class_weight is not None and spec.formula == Formula.RATIO:
        terms = terms * class_weight.to(terms)
    if spec.reduction == Reduction.NONE:
        return terms
    return terms.mean() if spec.reduction == Reduction.MEAN else terms.sum()


def finish_ratio(row: Rows, spec: FinishSpec) -> tuple[Tensor, Rows]:
    """Dice, Jaccard and Tversky terms (groups, classes), and their slopes in I, FP and FN."""
    score, miss, bottom = _ratio(spec.kappa * row[I], spec.alpha * row[FP] + spec.beta * row[FN], spec)
    value, outer = miss, torch.ones_like(miss)  # outer = d value / d miss
    if spec.transform == Transform.LOG:
        value = -torch.log(score.clamp_min(LOWEST_SCORE))
        outer = torch.where(score < LOWEST_SCORE, 0.0, 1 / score)
    elif spec.transform == Transform.POWER:
        perfect = miss <= 0  # -inf is, NaN is not
        value = torch.where(perfect, 0.0, torch.where(perfect, 1.0, miss) ** spec.exponent)
        outer = torch.where(perfect, 0.0, spec.exponent * miss ** (spec.exponent - 1))
    by_error = outer * score / bottom
    slopes = {I: -outer * spec.kappa * miss / bottom, FP: spec.alpha * by_error, FN: spec.beta * by_error}
    return value, slopes


def finish_generalized(row: Rows, spec: FinishSpec) -> tuple[Tensor, Rows]:
    """Generalized Dice terms (groups, 1), and their slopes in I, FP and FN, the weights being constants.

    Infinite class weights become the largest finite one.
    """
    return _generalized(row, spec, gdl_class_weight(row[G], spec.gdl_weight))


def _generalized(row: Rows, spec: FinishSpec, weight: Tensor) -> tuple[Tensor, Rows]:
    hits, errors = 2 * weight * row[I], weight * (row[FP] + row[FN])
    score, miss, bottom = _ratio(hits.sum(1, keepdim=True), errors.sum(1, keepdim=True), spec)
    by_error = weight * score / bottom
    return miss, {I: -2 * weight * miss / bottom, FP: by_error, FN: by_error}


def finish_mcc(row: Rows, spec: FinishSpec) -> tuple[Tensor, Rows]:
    """1 - Matthews' correlation coefficient (groups, classes), and its slopes in I, FP, FN and TN.

    All are 0 where nothing is wrong.
    """
    tp, fp, fn, tn = (row[bit] for bit in (I, FP, FN, TN))
    perfect = (fp == 0) & (fn == 0)
    top = tp * tn - fp * fn + spec.smooth_nr
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + spec.smooth_dr
    square = torch.where(perfect, 1.0, square)
    root, half = square.sqrt(), top / (2 * square)

    def slope(of_top: Tensor, of_square: Tensor) -> Tensor:
        return torch.where(perfect, 0.0, (half * of_square - of_top) / root)

    return torch.where(perfect, 0.0, 1 - top / root), {
        I: slope(tn, (tn + fp) * (tn + fn) * (2 * tp + fp + fn)),
        FP: slope(-fn, (tp + fn) * (tn + fn) * (2 * fp + tp + tn)),
        FN: slope(-fp, (tp + fp) * (tn + fp) * (2 * fn + tp + tn)),
        TN: slope(tp, (tp + fp) * (tp + fn) * (2 * tn + fp + fn)),
    }


# Each gives the terms and their slopes.
_FORMULAS = {
    Formula.RATIO: finish_ratio,
    Formula.GENERALIZED: finish_generalized,
    Formula.MCC: finish_mcc,
}


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


def finish_voxel(row: Rows, weights: Weights, spec: FinishSpec, empty: bool) -> Tensor:
    """Cross entropy, BCE or focal loss of the whole batch, a scalar."""
    factors, denominator = _voxel_factors(row, weights, spec)
    shares = (number * (row[bit] * weight).sum(1, keepdim=True) for bit, (number, weight) in factors.items())
    total = functools.reduce(torch.add, shares)
    if spec.denominator != Denominator.SAMPLES:
        total = total.sum()
    if empty:
        return (total / denominator).sum()
    # Nothing to learn from (all voxels ignored, or only classes of weight 0): 0, not 0/0.
    nothing = denominator == 0
    return torch.where(nothing, 0.0 * total, total / torch.where(nothing, 1.0, denominator)).sum()


def _voxel_factors(
    row: Rows, weights: Weights, spec: FinishSpec
) -> tuple[dict[int, tuple[float, Tensor]], Tensor]:
    """What each row of the voxel term counts, a number times (C,), and what their sum is divided by.

    The divisor is () or, for SAMPLES, (B, 1).
    """
    classes = row[POS].shape[1]
    pos, neg = (_voxel_weight(weight, row, spec) for weight in (weights.pos_weight, weights.neg_weight))
    smoothing = spec.label_smoothing
    factors = {POS: (1 - smoothing, pos), LS: (smoothing / classes, pos), NEG: (1.0, neg)}
    if spec.denominator == Denominator.SAMPLES:
        denominator = row[N][:, :1]
    elif spec.denominator == Denominator.WEIGHTS:
        denominator = (row[G] * pos).sum()
    else:
        denominator = row[N][:, 0].sum()
        if spec.denominator == Denominator.ONE:
            denominator = torch.ones_like(denominator)
        elif spec.denominator == Denominator.ELEMENTS:
            denominator = denominator * (classes - spec.voxel_skipped)
    return {bit: factor for bit, factor in factors.items() if bit in row}, denominator


def coef(totals: Tensor, weights: Weights, rows: int, spec: FinishSpec, empty: bool) -> Tensor:
    """dLoss/dtotals (B, C, R) in closed form; arguments as :func:`finish`.

    For reduction "none" the slope of the one loss that a sum belongs to.
    """
    row = _rows(totals, rows)
    out = torch.zeros_like(totals)
    if spec.formula != Formula.NONE:
        terms, slopes = _FORMULAS[spec.formula](_overlap_rows(row, spec), spec)
        count = max(1, terms.numel())  # an empty batch has none
        scale = totals.new_tensor(1 / count if spec.reduction == Reduction.MEAN else 1.0)
        if weights.region_lambda is not None:
            scale = scale * weights.region_lambda.to(totals)
        if weights.class_weight is not None and spec.formula == Formula.RATIO:
            scale = scale * weights.class_weight.to(totals)
        for bit, slope in slopes.items():
            out[:, spec.skipped :, row_index(rows, bit)] = scale * slope
    if POS in row:
        factors, denominator = _voxel_factors(row, weights, spec)
        factor = weights.voxel_lambda
        scale = (1 if factor is None else factor.to(totals)) / denominator
        if not empty:
            scale = torch.where(denominator == 0, 0.0, scale)
        for bit, (number, weight) in factors.items():
            out[..., row_index(rows, bit)] = scale * number * weight
    return torch.where(row[BAD].sum() > 0, 0.0, out) if BAD in row else out


def _rows(totals: Tensor, rows: int) -> Rows:
    bits = (1 << place for place in range(len(ROWS)))
    return {bit: totals[..., row_index(rows, bit)] for bit in bits if rows & bit}


def _overlap_rows(row: Rows, spec: FinishSpec) -> Rows:
    """(groups, K): added up over the batch if asked for, without the skipped classes."""
    return {
        bit: (row[bit].sum(0, keepdim=True) if spec.batch else row[bit])[:, spec.skipped :]
        for bit in (I, FP, FN, G, TN)
        if bit in row
    }


def _voxel_weight(weight: Tensor | None, row: Rows, spec: FinishSpec) -> Tensor:
    ones = row[POS].new_ones(row[POS].shape[1])
    used = ones if weight is None else weight.reshape(-1).to(ones).clone()
    used[: spec.voxel_skipped] = 0
    return used
