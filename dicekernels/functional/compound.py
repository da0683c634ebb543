"""Losses of two halves, an overlap and a voxel term, from one pass."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks, reference
from ..evaluate import Call
from ..prepare import Inputs, OtherAct, like_input, prepare, warn_single_channel
from ..spec import Denominator, LossSpec
from ..terms import ce_term, dice_finish, focal_term, generalized_finish, overlap_call, overlap_of
from .dense import ignores_fractions, or_dense
from .focal import Alpha, focal_dense_reason, focal_factors, focal_loss, void_alpha, warn_constant
from .overlap import dice_loss, generalized_dice_loss


@or_dense(reference.dice_ce_loss)
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
    reduction: Literal["mean", "sum"] = "mean",
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
    dice_weight: checks.Weight | Literal["weight"] = "weight",
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
    voxel_weight = checks.as_weight(weight, device=logits.device)
    if isinstance(dice_weight, str):
        checks.option("dice_weight", dice_weight, ("weight",))
        dice_weight = voxel_weight
        if voxel_weight is not None and voxel_weight.ndim > 0:
            dice_weight = voxel_weight[inputs.skipped :]
    class_weight = checks.class_weight(
        checks.as_weight(dice_weight, "dice_weight", logits.device),
        inputs.classes,
        inputs.skipped,
        voxel_weight,
    )
    voxel_weight = checks.ce_weight(voxel_weight, logits.shape[1])
    term = ce_term(inputs, reduction, voxel_weight is not None, label_smoothing, ce_include_background)
    finish = dataclasses.replace(
        dice_finish(inputs, jaccard, smooth_nr, smooth_dr, batch, reduction),
        label_smoothing=term.finish.label_smoothing,
        denominator=term.finish.denominator,
        voxel_skipped=term.finish.voxel_skipped,
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


def _two_passes(logits: Tensor, target: Tensor, other_act: OtherAct, options: dict[str, Any]) -> bool:
    """Whether an overlap half and a focal half need a pass each: they read other values, or one is a map."""
    if other_act is not None or ignores_fractions(logits, target, options):
        return True
    return bool(focal_dense_reason(logits, target, options))


def _unrounded(logits: Tensor, reduction: str) -> Tensor:
    """Beside a float32 map the terms of an overlap of half precision logits are not rounded to half."""
    half = reduction == "none" and logits.dtype in (torch.float16, torch.bfloat16)
    return logits.float() if half else logits


def _scaled(factor: Tensor | None, half: Tensor) -> Tensor:
    """In the dtype of the half, as by a number: a 0-dim tensor would promote it."""
    return half if factor is None else (factor * half).to(half.dtype)


def _with_focal(
    overlap: Call,
    inputs: Inputs,
    reduction: str,
    gamma: float,
    alpha: Alpha,
    weight: checks.Weight,
    use_softmax: bool,
    by_voxels: bool,
    softmax_over_all: bool,
) -> Call:
    """The focal half added to the pass of the overlap half."""
    warn_constant(inputs.logits.shape[1], inputs.skipped, use_softmax, softmax_over_all)
    if void_alpha(alpha, not inputs.skipped, use_softmax):
        alpha = None
    term = focal_term(inputs, reduction, gamma, use_softmax, by_voxels, softmax_over_all)
    sums = dataclasses.replace(
        overlap.spec.sums,
        rows=overlap.spec.sums.rows | term.sums.rows,
        voxel_term=term.sums.voxel_term,
        focal_gamma=term.sums.focal_gamma,
        first_class=term.sums.first_class,
    )
    finish = dataclasses.replace(
        overlap.spec.finish, denominator=term.finish.denominator, voxel_skipped=term.finish.voxel_skipped
    )
    overlap.spec = LossSpec(sums, finish)
    device = inputs.logits.device
    balance = checks.focal_alpha(alpha, inputs.classes, inputs.skipped, device)
    weight = checks.as_weight(weight, device=device)
    factor = checks.focal_weight(weight, inputs.classes, inputs.skipped)
    overlap.pos_weight, overlap.neg_weight = focal_factors(balance, factor, inputs, use_softmax)
    overlap.dtype = torch.promote_types(overlap.dtype, torch.float32)  # MONAI's focal half is float32
    return overlap


@or_dense(reference.dice_focal_loss)
def dice_focal_loss(
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
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    gamma: float = 2.0,
    weight: checks.Weight = None,
    lambda_dice: float | Tensor = 1.0,
    lambda_focal: float | Tensor = 1.0,
    alpha: Alpha = None,
    use_softmax: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    mean_over_classes: bool = True,
    softmax_over_all: bool = True,
    mask: Tensor | None = None,
    dice_weight: checks.Weight | Literal["weight"] = "weight",
) -> Tensor:
    """lambda_dice x Dice loss + lambda_focal x focal loss, from one pass.

    Options as ``monai.losses.DiceFocalLoss``: the focal half is that of sigmoids, also beside a Dice half
    with softmax, unless ``use_softmax``. ``weight`` goes to both halves unless ``dice_weight`` says
    otherwise (None: no weight). ``soft_label``, ``ignore_index``, ``mean_over_classes``, ``softmax_over_all``
    and ``mask`` as in :func:`dice_loss` and :func:`focal_loss`; a lambda as in :func:`dice_ce_loss`. The
    value is the sum of the two halves, each rounded to the dtype of the loss, to the last bit.

    Returns:
        () for reduction "mean" and "sum"; for "none" the Dice terms beside the focal map (B, K, *S).
    """
    reduction = checks.option("reduction", reduction, ("mean", "sum", "none"))
    checks.tensors(logits, target, mask)
    checks.dice_ce_shapes(logits, target)
    region_lambda = checks.factor("lambda_dice", lambda_dice, logits)
    voxel_lambda = checks.factor("lambda_focal", lambda_focal, logits)
    if isinstance(dice_weight, str):
        checks.option("dice_weight", dice_weight, ("weight",))
        dice_weight = weight
    focal: dict[str, Any] = {
        "include_background": include_background,
        "to_onehot_y": to_onehot_y,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "mask": mask,
    }
    balance: dict[str, Any] = {
        "alpha": alpha,
        "use_softmax": use_softmax,
        "mean_over_classes": mean_over_classes,
        "softmax_over_all": softmax_over_all,
    }
    if _two_passes(logits, target, other_act, focal | balance):
        if to_onehot_y and logits.shape[1] == 1:
            warn_single_channel("to_onehot_y=True")
            focal["to_onehot_y"] = False
        dice = dice_loss(
            _unrounded(logits, reduction),
            target,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=dice_weight,
            soft_label=soft_label,
            **focal,
        )
        voxel = focal_loss(logits, target, gamma=gamma, weight=weight, **focal, **balance)
        return _scaled(region_lambda, dice) + _scaled(voxel_lambda, voxel)
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
    if not include_background and logits.shape[1] == 1:
        warn_single_channel("include_background=False")  # MONAI's halves both warn
    finish = dice_finish(inputs, jaccard, smooth_nr, smooth_dr, batch, reduction)
    call = overlap_call(inputs, overlap_of(squared_pred, soft_label), finish)
    dice_weight = checks.as_weight(dice_weight, device=logits.device)
    call.class_weight = checks.class_weight(dice_weight, inputs.classes, inputs.skipped)
    by_voxels = ignore_index is not None and not mean_over_classes
    call = _with_focal(
        call, inputs, reduction, gamma, alpha, weight, use_softmax, by_voxels, softmax_over_all
    )
    call.region_lambda, call.voxel_lambda = region_lambda, voxel_lambda
    return like_input(call.run(), logits, target)


@or_dense(reference.generalized_dice_focal_loss)
def generalized_dice_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: OtherAct = None,
    w_type: Literal["square", "simple", "uniform"] = "square",
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    gamma: float = 2.0,
    weight: checks.Weight = None,
    lambda_gdl: float | Tensor = 1.0,
    lambda_focal: float | Tensor = 1.0,
    alpha: Alpha = None,
    use_softmax: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    mean_over_classes: bool = True,
    softmax_over_all: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """lambda_gdl x generalized Dice loss + lambda_focal x focal loss, from one pass.

    Options as ``monai.losses.GeneralizedDiceFocalLoss``, whose ``weight`` is that of the focal half alone;
    the others as in :func:`generalized_dice_loss` and :func:`dice_focal_loss`.

    Returns:
        () for reduction "mean" and "sum"; for "none" the Dice terms beside the focal map (B, K, *S).
    """
    reduction = checks.option("reduction", reduction, ("mean", "sum", "none"))
    checks.tensors(logits, target, mask)
    checks.dice_ce_shapes(logits, target)
    region_lambda = checks.factor("lambda_gdl", lambda_gdl, logits)
    voxel_lambda = checks.factor("lambda_focal", lambda_focal, logits)
    focal: dict[str, Any] = {
        "include_background": include_background,
        "to_onehot_y": to_onehot_y,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "mask": mask,
    }
    balance: dict[str, Any] = {
        "alpha": alpha,
        "use_softmax": use_softmax,
        "mean_over_classes": mean_over_classes,
        "softmax_over_all": softmax_over_all,
    }
    if _two_passes(logits, target, other_act, focal | balance):
        gdl = generalized_dice_loss(
            _unrounded(logits, reduction),
            target,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            w_type=w_type,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            **focal,
        )
        voxel = focal_loss(logits, target, gamma=gamma, weight=weight, **focal, **balance)
        return _scaled(region_lambda, gdl) + _scaled(voxel_lambda, voxel)
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
    if logits.shape[1] == 1:  # MONAI's halves both warn
        if to_onehot_y:
            warn_single_channel("to_onehot_y=True")
        if not include_background:
            warn_single_channel("include_background=False")
    finish = generalized_finish(inputs, w_type, smooth_nr, smooth_dr, batch, reduction)
    call = overlap_call(inputs, overlap_of(False, soft_label), finish)
    by_voxels = ignore_index is not None and not mean_over_classes
    call = _with_focal(
        call, inputs, reduction, gamma, alpha, weight, use_softmax, by_voxels, softmax_over_all
    )
    call.region_lambda, call.voxel_lambda = region_lambda, voxel_lambda
    return like_input(call.run(), logits, target)
