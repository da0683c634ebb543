"""START HERE: the losses as functions of (logits, target).

Shapes: logits (B, C, *S), raw unless no activation is asked for; target a label map (B, 1, *S) or
(B, *S) of any dtype that holds integers with ``to_onehot_y=True``, else values (B, C, *S); mask
(B, 1, *S) voxel weights that enter every sum linearly, in addition to the other options.

One call makes one pass over the volume forward and one backward and keeps nothing of its size but
the caller's own tensors. Formulas: docs/semantics.md; they are MONAI 1.6.1's unless said otherwise.
All functions raise AssertionError, TypeError or ValueError, as MONAI, for arguments that do not fit,
and LabelRangeError for a label outside [0, C) that is not ``ignore_index`` (CPU).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import checks, reference
from .evaluate import Call, record, record_dense
from .prepare import OtherAct, like_input, plain, prepare
from .spec import (
    Denominator,
    FinishSpec,
    Formula,
    GdlWeight,
    LossSpec,
    Reduction,
    Transform,
)
from .sums import RegionSums, region_sums
from .terms import ce_term, ones_shape, overlap_call, overlap_of, reduction_of, terms_shape

__all__ = [
    "RegionSums",
    "dice_ce_loss",
    "dice_loss",
    "generalized_dice_loss",
    "region_sums",
    "tversky_loss",
]

_GDL_WEIGHTS = {
    "square": GdlWeight.SQUARE,
    "simple": GdlWeight.SIMPLE,
    "uniform": GdlWeight.UNIFORM,
}
_F = TypeVar("_F", bound=Callable[..., Tensor])


def _dense_reason(logits: Tensor, target: Tensor, options: dict[str, Any]) -> str:
    """Why the kernels cannot run a problem that the oracle can, or ""."""
    if not all(isinstance(tensor, Tensor) for tensor in (logits, target)):
        return ""  # the checks name it
    if logits.ndim == 2:
        return "the logits have no spatial dimensions"
    index, labels = options.get("ignore_index"), options.get("to_onehot_y")
    if options.get("mask") is None or index is None or labels or not target.is_floating_point():
        return ""
    if target.ndim > 1 and 0 <= index < target.shape[1] != 1:
        return "a mask weighs linearly and an ignored class of fractions does not: no pass does both"
    return ""


def _or_dense(oracle: Callable[..., Tensor]) -> Callable[[_F], _F]:
    """Hands the oracle what has no kernel: logits (B, C), where MONAI takes one sum over B and C, and
    voxel weights beside an ignored class of a soft target. It runs in float64, so no bit is lost."""

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
            reason = _dense_reason(logits, target, options)
            if not reason:
                return function(logits, target, **options)
            # The checks, warnings and dtype of the usual path, on a volume of at least one dimension.
            inputs, checked_options = [logits, target], {**options, "reduction": "mean"}
            if logits.ndim == 2:
                inputs = [x[..., None] for x in inputs]
                mask = options.get("mask")
                checked_options["mask"] = None if mask is None else mask[..., None]
            with record():  # the call for the checks is not the evaluation that explain() tells of
                checked = function(*inputs, **checked_options)
            checks.option("reduction", options.get("reduction", "mean"), ("mean", "sum", "none"))
            record_dense(reason)
            dense = oracle(plain(logits).double(), plain(target), **options)
            return like_input(dense.to(checked.dtype), logits, target)

        return cast(_F, loss)

    return decorate


@_or_dense(reference.dice_loss)
def dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: OtherAct = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: checks.Weight = None,
    soft_label: bool = False,
    ignore_index: int | None = None,
    log_loss: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Dice loss 1 - (2I + nr) / (P + G + dr) of each (sample, class), or of each class with ``batch``.

    Options as ``monai.losses.DiceLoss``; ``log_loss`` takes -log of the score instead (as
    ``segmentation_models_pytorch``), ``mask`` weighs voxels.

    Returns:
        () for reduction "mean" and "sum"; for "none" (B, K, 1, ..) or, with ``batch``, (K, 1, ..).
    """
    inputs = prepare(
        logits,
        target,
        mask,
        include_background,
        to_onehot_y,
        sigmoid,
        softmax,
        other_act,
        ignore_index,
    )
    finish = FinishSpec(
        Formula.RATIO,
        alpha=2.0 if jaccard else 1.0,
        beta=2.0 if jaccard else 1.0,
        smooth_nr=checks.constant("smooth_nr", smooth_nr),
        smooth_dr=checks.constant("smooth_dr", smooth_dr),
        transform=Transform.LOG if log_loss else Transform.LINEAR,
        skipped=inputs.skipped,
        batch=batch,
        reduction=reduction_of(reduction),
    )
    call = overlap_call(inputs, overlap_of(squared_pred, soft_label), finish)
    call.class_weight = checks.class_weight(checks.as_weight(weight), inputs.classes)
    if finish.reduction == Reduction.NONE:
        call.shape = (*terms_shape(inputs, batch), *ones_shape(inputs))
    return like_input(call.run(), logits, target)


@_or_dense(reference.generalized_dice_loss)
def generalized_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: OtherAct = None,
    w_type: str = "square",
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Generalized Dice loss 1 - (2 sum_c w_c I_c + nr) / (sum_c w_c (P_c + G_c) + dr), w_c = 1/G_c^2.

    Options as ``monai.losses.GeneralizedDiceLoss``; ``ignore_index`` as in :func:`dice_loss`,
    ``mask`` weighs voxels. A class without a voxel gets the largest finite weight of the sample.

    Returns:
        () for reduction "mean" and "sum"; for "none" (B, 1, 1, ..) or, with ``batch``, (1, 1, ..).
    """
    inputs = prepare(
        logits,
        target,
        mask,
        include_background,
        to_onehot_y,
        sigmoid,
        softmax,
        other_act,
        ignore_index,
    )
    finish = FinishSpec(
        Formula.GENERALIZED,
        smooth_nr=checks.constant("smooth_nr", smooth_nr),
        smooth_dr=checks.constant("smooth_dr", smooth_dr),
        gdl_weight=_GDL_WEIGHTS[checks.option("w_type", w_type, tuple(_GDL_WEIGHTS))],
        skipped=inputs.skipped,
        batch=batch,
        reduction=reduction_of(reduction),
    )
    call = overlap_call(inputs, overlap_of(False, soft_label), finish)
    call.dtype = torch.promote_types(call.dtype, torch.float32)  # MONAI's weights are float32
    if finish.reduction == Reduction.NONE:
        call.shape = (1, *ones_shape(inputs)) if batch else (logits.shape[0], 1, *ones_shape(inputs))
    return like_input(call.run(), logits, target)


@_or_dense(reference.tversky_loss)
def tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: OtherAct = None,
    alpha: float = 0.5,
    beta: float = 0.5,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    gamma: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Tversky loss 1 - (I + nr) / (I + alpha FP + beta FN + dr) of each (sample, class).

    Options as ``monai.losses.TverskyLoss``. ``gamma`` is the exponent of the focal Tversky loss,
    max(1 - score, 0)**gamma of each term before the reduction; ``mask`` weighs voxels.

    Returns:
        () for reduction "mean" and "sum"; for "none" (B, K) or, with ``batch``, (K,).
    """
    inputs = prepare(
        logits,
        target,
        mask,
        include_background,
        to_onehot_y,
        sigmoid,
        softmax,
        other_act,
        ignore_index,
    )
    if gamma <= 0:
        raise ValueError(f"gamma: got {gamma}, expected a positive exponent (1 is the plain Tversky loss)")
    finish = FinishSpec(
        Formula.RATIO,
        kappa=1.0,
        alpha=checks.constant("alpha", alpha),
        beta=checks.constant("beta", beta),
        smooth_nr=checks.constant("smooth_nr", smooth_nr),
        smooth_dr=checks.constant("smooth_dr", smooth_dr),
        transform=Transform.LINEAR if gamma == 1 else Transform.POWER,
        exponent=float(gamma),
        skipped=inputs.skipped,
        batch=batch,
        reduction=reduction_of(reduction),
    )
    call = overlap_call(inputs, overlap_of(False, soft_label), finish)
    if finish.reduction == Reduction.NONE:
        call.shape = terms_shape(inputs, batch)
    return like_input(call.run(), logits, target)


@_or_dense(reference.dice_ce_loss)
def dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: OtherAct = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: checks.Weight = None,
    lambda_dice: float | Tensor = 1.0,
    lambda_ce: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    soft_label: bool = False,
    ce_include_background: bool = True,
    mask: Tensor | None = None,
    dice_weight: checks.Weight | str = "weight",
) -> Tensor:
    """lambda_dice x Dice loss + lambda_ce x cross entropy (BCE for one channel), from one pass.

    Options as ``monai.losses.DiceCELoss``. ``weight`` has one value for every class, the background
    included; the Dice term takes it without the background if that is excluded, unless ``dice_weight``
    (None: no weight) says otherwise. ``ignore_index`` leaves voxels out of both terms; the mean of the
    cross entropy is over the others (0 if there are none). ``soft_label`` is that of
    :func:`dice_loss`. ``ce_include_background=False`` gives the background weight 0 in the cross
    entropy. A lambda may be a 0-dim tensor: a warm-up then changes its value and recompiles nothing.

    Returns:
        ().
    """
    reduction = checks.option("reduction", reduction, ("mean", "sum"))
    checks.tensors(logits, target, mask)
    checks.dice_ce_shapes(logits, target)
    inputs = prepare(
        logits,
        target,
        mask,
        include_background,
        to_onehot_y,
        sigmoid,
        softmax,
        other_act,
        ignore_index,
    )
    voxel_weight = checks.as_weight(weight)
    if isinstance(dice_weight, str):
        dice_weight = voxel_weight
        if voxel_weight is not None and voxel_weight.ndim > 0:
            dice_weight = voxel_weight[inputs.skipped :]
    class_weight = checks.class_weight(checks.as_weight(dice_weight), inputs.classes)
    voxel_weight = checks.ce_weight(voxel_weight, logits.shape[1])
    term = ce_term(inputs, reduction, voxel_weight is not None, label_smoothing, ce_include_background)
    finish = dataclasses.replace(
        term.finish,
        formula=Formula.RATIO,
        alpha=2.0 if jaccard else 1.0,
        beta=2.0 if jaccard else 1.0,
        smooth_nr=checks.constant("smooth_nr", smooth_nr),
        smooth_dr=checks.constant("smooth_dr", smooth_dr),
        skipped=inputs.skipped,
        batch=batch,
    )
    call = overlap_call(inputs, overlap_of(squared_pred, soft_label), finish)
    call.class_weight = class_weight
    call.region_lambda = checks.factor("lambda_dice", lambda_dice, logits)
    voxel_lambda = checks.factor("lambda_ce", lambda_ce, logits)
    call.dtype = torch.promote_types(call.dtype, inputs.raw_logits.dtype)
    if inputs.dense and voxel_weight is not None and logits.shape[1] > 1:
        call.dtype = torch.promote_types(call.dtype, voxel_weight.dtype)  # as torch's product with it
    if other_act is None:
        sums = dataclasses.replace(
            call.spec.sums,
            rows=call.spec.sums.rows | term.sums.rows,
            voxel_term=term.sums.voxel_term,
        )
        call.spec = LossSpec(sums, finish)
        call.pos_weight, call.voxel_lambda = voxel_weight, voxel_lambda
        return like_input(call.run(), logits, target)
    # The cross entropy wants the raw logits, the overlap what other_act made of them: two passes.
    voxel = Call(inputs.raw_logits, inputs.target, inputs.mask, term, call.dtype)
    voxel.pos_weight, voxel.voxel_lambda = voxel_weight, voxel_lambda
    call.spec = LossSpec(
        call.spec.sums,
        dataclasses.replace(finish, label_smoothing=0.0, denominator=Denominator.ONE),
    )
    return like_input(call.run() + voxel.run(), logits, target)
