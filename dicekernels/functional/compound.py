"""Losses of two halves, an overlap and a voxel term, from one pass."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks, reference
from ..arguments import documented
from ..evaluate import Call
from ..prepare import Inputs, OtherAct, like_input, prepare, warn_single_channel
from ..spec import Denominator, LossSpec
from ..terms import ce_term, dice_finish, focal_term, generalized_finish, overlap_call, overlap_of
from .dense import ignores_fractions, or_dense
from .focal import Alpha, focal_dense_reason, focal_factors, focal_loss, void_alpha, warn_constant
from .overlap import dice_loss, generalized_dice_loss


@documented()
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

    As ``monai.losses.DiceCELoss``, with the options from ``ignore_index`` on. The value is the sum of the two
    halves, each rounded to the dtype of the loss, to the last bit; docs/semantics.md.

    Args:
        include_background: False leaves class 0 out of the Dice term, after the activation. The cross entropy
            keeps it: see ``ce_include_background``. Ignored, with a warning, for one channel.
        sigmoid: take the sigmoid of the logits, in the Dice term; the other term takes the raw logits. At
            most one of the three activations, else ValueError.
        softmax: take the softmax of the logits over dimension 1, in the Dice term; the other term takes the
            raw logits. Ignored, with a warning, for one channel.
        other_act: an activation of your own, in the Dice term: a function of the whole tensor (B, C, *S),
            else TypeError. It runs in PyTorch, which keeps its result for backward, and makes it two passes.
        reduction: "mean" or "sum" of the Dice terms, one for each sample and class, or for each class with
            ``batch``, and of the cross entropy over voxels; with labels and weights "mean" divides the latter
            by the weights of the labels. MONAI's LossReduction is taken too. Else ValueError.
        weight: a number of at least 0 for each of the C classes, the background included, as a sequence or
            tensor (else ValueError; one number for several channels or several for one: RuntimeError). Class
            weights of the cross entropy, and factors of the Dice terms, there without the background if that
            is left out. For one channel the ``pos_weight`` of the BCE.
        lambda_dice: factor of the Dice term: a number of at least 0, else ValueError, or a tensor of one
            value. One that requires a gradient gets it, from PyTorch. A tensor may change its value every
            step and recompiles nothing.
        lambda_ce: factor of the cross entropy, as ``lambda_dice``.
        label_smoothing: of the cross entropy, from 0 to 1, else RuntimeError: the part of the target that is
            spread over all classes. Without effect on one channel.
        ignore_index: as in :func:`dice_loss`, in both terms; the mean of the cross entropy is over the voxels
            that count, 0 if there are none. None: every voxel counts.
        ce_include_background: False gives the background weight 0 in the cross entropy; with labels its mean
            is then over the other voxels. Without effect on one channel.
        dice_weight: factors of the Dice terms where they are not ``weight``: as in :func:`dice_loss`, None
            for none. "weight": those of ``weight``.

    Returns:
        (), in the dtype that torch's promotion makes of logits, values and, beside values, ``weight``; labels
        count as float32.

    Raises:
        TypeError, ValueError: as the arguments say; what is no tensor, on another device, a mask of another
            shape, or a target with another number of dimensions or channels.
        AssertionError: a target whose shape does not fit, such as labels with ``to_onehot_y=False``.
        LabelRangeError: a label outside [0, C) that is not ``ignore_index`` (on a GPU in a later call).
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
    if other_act is not None or logits.ndim == 2 or ignores_fractions(logits, target, options):
        return True
    return bool(focal_dense_reason(logits, target, options))


def _unrounded(logits: Tensor, reduction: str) -> Tensor:
    """Beside a float32 map, or without a space, an overlap of half precision logits keeps its digits."""
    beside = reduction == "none" or logits.ndim == 2
    return logits.float() if beside and logits.dtype in (torch.float16, torch.bfloat16) else logits


def _scaled(factor: Tensor | None, half: Tensor) -> Tensor:
    """In the dtype of the half, as by a number, which torch takes as float32 beside all but float64."""
    if factor is None:
        return half
    if half.dtype != torch.float64:
        factor = factor.float()
    return (factor * half).to(half.dtype)


def _added(overlap: Tensor, voxel: Tensor) -> Tensor:
    """In the wider dtype: a 0-dim half would not widen a map."""
    dtype = torch.promote_types(overlap.dtype, voxel.dtype)
    return overlap.to(dtype) + voxel.to(dtype)


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


@documented(like=dice_ce_loss)
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

    As ``monai.losses.DiceFocalLoss``, with ``use_softmax`` and the options after it. The value is the sum of
    the two halves, each rounded to the dtype of the loss, to the last bit; docs/semantics.md.

    Args:
        include_background: False leaves class 0 out of both terms. Ignored, with a warning, for one channel.
        reduction: "mean" or "sum" of each term, as in :func:`dice_loss` and :func:`focal_loss`; "none": the
            Dice terms beside the focal map, made in PyTorch. MONAI's LossReduction is taken too. Else
            ValueError.
        weight: factor of each class in both terms: one number, or one for each class (without the background
            if that is left out) as a sequence or tensor. At least 0, finite and of that length, else
            ValueError; for a single class one number, which the Dice term ignores.
        use_softmax: True: the focal term is one of a softmax; False: of sigmoids, as MONAI's, also beside a
            Dice term with softmax (MONAI#8242).
        lambda_focal: factor of the focal term, as that of the Dice term.
        ignore_index: as in :func:`dice_loss`, in both terms. None: every voxel counts.

    Returns:
        () for reduction "mean" and "sum"; for "none" (B, K, *S), the Dice terms beside the focal map of the K
        classes. float32, or float64 if the logits or the values are.
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
        return _added(_scaled(region_lambda, dice), _scaled(voxel_lambda, voxel))
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


@documented(like=dice_focal_loss)
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

    As ``monai.losses.GeneralizedDiceFocalLoss``, with ``alpha`` and the options after it. The value is the
    sum of the two halves, each rounded to the dtype of the loss, to the last bit; docs/semantics.md.

    Args:
        smooth_nr: nr, added to the numerator of the generalized Dice term of each sample.
        smooth_dr: dr, added to its denominator.
        w_type: the weight of a class of volume G in the generalized Dice term: "square" 1 / G^2, "simple" 1 /
            G, "uniform" 1, as in :func:`generalized_dice_loss`. Else ValueError.
        batch: True: sums run over the batch as well, and there is one generalized Dice loss. False: one for
            each sample.
        weight: factor of each class in the focal term alone: one number, or one for each class (without the
            background if that is left out) as a sequence or tensor. At least 0, finite and of that length,
            else ValueError; for a single class one number.
        lambda_gdl: factor of the generalized Dice term: a number of at least 0, else ValueError, or a tensor
            of one value. One that requires a gradient gets it, from PyTorch. A tensor may change its value
            every step and recompiles nothing.
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
        return _added(_scaled(region_lambda, gdl), _scaled(voxel_lambda, voxel))
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
