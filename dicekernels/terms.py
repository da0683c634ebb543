"""The terms of a loss from a user's options, and the Call that one or two of them make of prepared inputs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .call import Call
from .prepare import Inputs
from .spec import (
    Denominator,
    Formula,
    GdlWeight,
    LossSpec,
    Overlap,
    OverlapHalf,
    Reduction,
    Transform,
    VoxelHalf,
    VoxelTerm,
    Weights,
)

Alpha = float | Sequence[float] | Tensor | None
_GDL_WEIGHTS = {kind.name.lower(): kind for kind in GdlWeight}
_REDUCTIONS = {kind.name.lower(): kind for kind in Reduction}


class Term(NamedTuple):
    """A half of a loss, the factors of its classes, and the dtype that it has alone."""

    half: OverlapHalf | VoxelHalf
    dtype: torch.dtype
    weights: Weights = Weights()


def call_of(
    inputs: Inputs,
    terms: Sequence[Term],
    reduction: str,
    region_lambda: Tensor | None = None,
    voxel_lambda: Tensor | None = None,
    *,
    trailing_ones: bool = False,
) -> Call:
    """The sum of one or two terms, each times its lambda.

    Args:
        trailing_ones: for reduction "none" MONAI views the terms in as many dimensions as the logits have.
    """
    overlap, voxel, weights, dtype = None, None, Weights(None, None, None, region_lambda, voxel_lambda), None
    for half, its_dtype, own in terms:
        dtype = its_dtype if dtype is None else torch.promote_types(dtype, its_dtype)
        if isinstance(half, OverlapHalf):
            overlap, weights = half, weights._replace(class_weight=own.class_weight)
        else:
            voxel, weights = half, weights._replace(pos_weight=own.pos_weight, neg_weight=own.neg_weight)
    assert dtype is not None
    spec = LossSpec.of(
        overlap,
        voxel,
        reduction=_REDUCTIONS[checks.option("reduction", reduction, ("mean", "sum", "none"))],
        dense=inputs.dense,
        ignore_index=inputs.ignore_index,
        product_mask=inputs.product_mask,
    )
    shape = None
    if spec.finish.reduction == Reduction.NONE:
        shape = spec.finish.loss_shape(*inputs.logits.shape[:2])
        if spec.finish.batch:
            shape = shape[1:]
        if trailing_ones:
            shape += (1,) * (inputs.logits.ndim - 2)
    return Call(
        inputs.logits, inputs.target, inputs.mask, spec, dtype, weights, shape=shape, notes=inputs.notes
    )


def overlap_half(
    inputs: Inputs,
    formula: Formula,
    smooth_nr: float,
    smooth_dr: float,
    batch: bool,
    overlap: Overlap = Overlap.PRODUCT,
    *,
    kappa: float = 2.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    transform: Transform = Transform.LINEAR,
    exponent: float = 1.0,
    gdl_weight: GdlWeight = GdlWeight.SQUARE,
) -> OverlapHalf:
    """An overlap half over the classes and with the activation of prepared inputs."""
    return OverlapHalf(
        formula,
        inputs.activation,
        overlap=overlap,
        kappa=kappa,
        alpha=alpha,
        beta=beta,
        smooth_nr=checks.constant("smooth_nr", smooth_nr),
        smooth_dr=checks.constant("smooth_dr", smooth_dr),
        transform=transform,
        exponent=exponent,
        gdl_weight=gdl_weight,
        skipped=inputs.skipped,
        batch=batch,
    )


def overlap_of(soft_label: bool, squared_pred: bool = False) -> Overlap:
    """squared_pred wins over soft_label, as in MONAI."""
    return Overlap.SQUARED if squared_pred else Overlap.MIN if soft_label else Overlap.PRODUCT


def dice(
    inputs: Inputs,
    squared_pred: bool,
    jaccard: bool,
    smooth_nr: float,
    smooth_dr: float,
    batch: bool,
    class_weight: Tensor | None,
    soft_label: bool,
    log_loss: bool = False,
) -> Term:
    """The Dice ratio; ``jaccard`` counts every error twice."""
    errors, transform = 2.0 if jaccard else 1.0, Transform.LOG if log_loss else Transform.LINEAR
    overlap = overlap_of(soft_label, squared_pred)
    half = overlap_half(
        inputs,
        Formula.RATIO,
        smooth_nr,
        smooth_dr,
        batch,
        overlap,
        alpha=errors,
        beta=errors,
        transform=transform,
    )
    return Term(half, inputs.dtype, Weights(class_weight))


def generalized(
    inputs: Inputs, w_type: str, smooth_nr: float, smooth_dr: float, batch: bool, soft_label: bool
) -> Term:
    """The generalized Dice ratio."""
    weight = _GDL_WEIGHTS[checks.option("w_type", w_type, tuple(_GDL_WEIGHTS))]
    overlap = overlap_of(soft_label)
    half = overlap_half(inputs, Formula.GENERALIZED, smooth_nr, smooth_dr, batch, overlap, gdl_weight=weight)
    return Term(half, torch.promote_types(inputs.dtype, torch.float32))  # MONAI's weights are float32


def cross_entropy(
    inputs: Inputs,
    reduction: str,
    weight: Tensor | None,
    label_smoothing: float,
    include_background: bool,
) -> Term:
    """MONAI's cross entropy half: index mode, probability mode, or BCE for one channel."""
    checks.label_smoothing(label_smoothing)
    binary = inputs.raw_logits.shape[1] == 1
    skipped = 0 if include_background or binary else 1
    denominator = Denominator.VOXELS if reduction == "mean" else Denominator.ONE
    if reduction == "mean" and not inputs.dense and (weight is not None or skipped):
        denominator = Denominator.WEIGHTS
    half = VoxelHalf(
        VoxelTerm.BCE if binary else VoxelTerm.CE,
        label_smoothing=0.0 if binary else float(label_smoothing),
        denominator=denominator,
        voxel_skipped=skipped,
    )
    dtype = inputs.raw_logits.dtype
    if inputs.dense and weight is not None and not binary:
        dtype = torch.promote_types(dtype, weight.dtype)  # as torch's product with it
    return Term(half, dtype, Weights(pos_weight=weight))


def focal(
    inputs: Inputs,
    reduction: str,
    gamma: float,
    alpha: Alpha,
    weight: checks.Weight,
    use_softmax: bool,
    mean_over_classes: bool,
    softmax_over_all: bool,
    dtype: torch.dtype = torch.float32,
) -> Term:
    """The focal half; the mean is over voxels and classes, or over voxels alone."""
    _warn_constant(inputs.logits.shape[1], inputs.skipped, use_softmax, softmax_over_all)
    # Without background a number has nothing to balance.
    if use_softmax and inputs.without_background and isinstance(alpha, (float, int)):
        alpha = None
        if not torch.compiler.is_compiling():
            warnings.warn(
                "`include_background=False`, scalar `alpha` ignored when using softmax.",
                UserWarning,
                stacklevel=5,
            )
    device = inputs.logits.device
    balance = checks.focal_alpha(alpha, inputs.classes, inputs.skipped, device)
    mean = Denominator.ELEMENTS if mean_over_classes else Denominator.VOXELS
    half = VoxelHalf(
        VoxelTerm.FOCAL_SOFTMAX if use_softmax else VoxelTerm.FOCAL_SIGMOID,
        denominator=mean if reduction == "mean" else Denominator.SAMPLES,
        voxel_skipped=inputs.skipped,
        focal_gamma=checks.constant("gamma", gamma),
        first_class=inputs.skipped if use_softmax and not softmax_over_all else 0,
    )
    factor = checks.focal_weight(checks.as_weight(weight, device=device), inputs.classes, inputs.skipped)
    return Term(half, dtype, _focal_factors(balance, factor, inputs, use_softmax))


def _focal_factors(
    alpha: Tensor | float | None, weight: Tensor | None, inputs: Inputs, use_softmax: bool
) -> Weights:
    """(C,) factors of the rows POS and NEG; None for 1. Those of a skipped background are never read."""
    if alpha is None and weight is None:
        return Weights()
    ones = torch.ones(inputs.classes, dtype=torch.float64, device=inputs.logits.device)
    pos = neg = ones if weight is None else ones * weight.to(ones).reshape(-1)
    if alpha is not None:
        balance = alpha.to(ones) if isinstance(alpha, Tensor) else ones.new_full((), alpha)
        if balance.ndim > 0:
            pos = pos * balance
        elif use_softmax:
            background = torch.arange(inputs.classes, device=ones.device) == 0
            pos = pos * torch.where(background, 1 - balance, balance)
        else:
            pos, neg = pos * balance, neg * (1 - balance)
    skipped = ones.new_zeros(inputs.skipped)
    return Weights(pos_weight=torch.cat([skipped, pos]), neg_weight=torch.cat([skipped, neg]))


def _warn_constant(channels: int, skipped: int, use_softmax: bool, softmax_over_all: bool) -> None:
    """A warning about the softmax of a single class, which is 1 whatever the logits are."""
    left = channels - (0 if softmax_over_all else skipped)
    if use_softmax and left == 1 and not torch.compiler.is_compiling():
        remedy = "use a sigmoid (use_softmax=False)"
        if channels > 1:
            remedy = "pass softmax_over_all=True, which leaves out the background's term alone, or " + remedy
        warnings.warn(
            f"use_softmax=True: got {channels} channels of logits and a softmax over one of them, so the "
            f"focal term is 0 with zero gradient; {remedy}",
            UserWarning,
            stacklevel=5,
        )
