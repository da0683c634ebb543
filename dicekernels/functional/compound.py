"""Losses of two halves, an overlap and a voxel term, from one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks, reference, terms
from ..arguments import documented
from ..call import Call
from ..prepare import OtherAct, prepare, warn_single_channel
from ..terms import Alpha
from .focal import focal_dense_reason, focal_loss
from .loss import ignores_fractions, loss
from .overlap import dice_loss, generalized_dice_loss


@documented()
@loss(reference.dice_ce_loss)
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
) -> Call | list[Call]:
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
    act = (sigmoid, softmax, other_act)
    inputs = prepare(logits, target, mask, act, include_background, to_onehot_y, ignore_index)
    voxel_weight = checks.as_weight(weight, device=logits.device)
    if isinstance(dice_weight, str):
        checks.option("dice_weight", dice_weight, ("weight",))
        dice_weight = voxel_weight
        if voxel_weight is not None and voxel_weight.ndim > 0 and inputs.skipped:
            dice_weight = voxel_weight[inputs.skipped :]
    dice_weight = checks.as_weight(dice_weight, "dice_weight", logits.device)
    class_weight = checks.class_weight(dice_weight, inputs.classes, inputs.skipped, voxel_weight)
    voxel_weight = checks.ce_weight(voxel_weight, logits.shape[1])
    voxel = terms.cross_entropy(inputs, reduction, voxel_weight, label_smoothing, ce_include_background)
    overlap = terms.dice(inputs, squared_pred, jaccard, smooth_nr, smooth_dr, batch, class_weight, soft_label)
    region_lambda = checks.factor("lambda_dice", lambda_dice, logits)
    voxel_lambda = checks.factor("lambda_ce", lambda_ce, logits)
    if other_act is None:
        return terms.call_of(inputs, [overlap, voxel], reduction, region_lambda, voxel_lambda)
    # The cross entropy wants the raw logits, the overlap what other_act made of them: two passes.
    dtype = torch.promote_types(overlap.dtype, voxel.dtype)
    overlap, voxel = overlap._replace(dtype=dtype), voxel._replace(dtype=dtype)
    raw = dataclasses.replace(inputs, logits=inputs.raw_logits, notes=())
    return [
        terms.call_of(inputs, [overlap], reduction, region_lambda),
        terms.call_of(raw, [voxel], reduction, None, voxel_lambda),
    ]


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


def _apart(
    overlap_loss: Callable[..., Tensor],
    logits: Tensor,
    target: Tensor,
    overlap: dict[str, Any],
    focal: dict[str, Any],
    both: dict[str, Any],
    region_lambda: Tensor | None,
    voxel_lambda: Tensor | None,
) -> Tensor:
    """The sum of an overlap loss and a focal loss with options of their own and of both."""
    region = overlap_loss(_unrounded(logits, both["reduction"]), target, **overlap, **both)
    voxel = focal_loss(logits, target, **focal, **both)
    region, voxel = _scaled(region_lambda, region), _scaled(voxel_lambda, voxel)
    # Without a space MONAI's overlap is one number too, and widens no map but that of float64 logits.
    as_torch = logits.ndim == 2 and logits.dtype != torch.float64
    return region + voxel if as_torch else _added(region, voxel)


@documented(like=dice_ce_loss)
@loss()
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
) -> Call | Tensor:
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
    act = (sigmoid, softmax, other_act)
    focal: dict[str, Any] = {
        "gamma": gamma,
        "alpha": alpha,
        "weight": weight,
        "use_softmax": use_softmax,
        "mean_over_classes": mean_over_classes,
        "softmax_over_all": softmax_over_all,
    }
    both: dict[str, Any] = {
        "include_background": include_background,
        "to_onehot_y": to_onehot_y,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "mask": mask,
    }
    if _two_passes(logits, target, other_act, focal | both):
        if to_onehot_y and logits.shape[1] == 1:
            warn_single_channel("to_onehot_y=True")
            both["to_onehot_y"] = False
        dice: dict[str, Any] = {
            "sigmoid": sigmoid,
            "softmax": softmax,
            "other_act": other_act,
            "squared_pred": squared_pred,
            "jaccard": jaccard,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "batch": batch,
            "weight": dice_weight,
            "soft_label": soft_label,
        }
        return _apart(dice_loss, logits, target, dice, focal, both, region_lambda, voxel_lambda)
    inputs = prepare(logits, target, mask, act, include_background, to_onehot_y, ignore_index)
    if not include_background and logits.shape[1] == 1:
        warn_single_channel("include_background=False")  # MONAI's halves both warn
    dice_weight = checks.as_weight(dice_weight, device=logits.device)
    class_weight = checks.class_weight(dice_weight, inputs.classes, inputs.skipped)
    overlap = terms.dice(inputs, squared_pred, jaccard, smooth_nr, smooth_dr, batch, class_weight, soft_label)
    over_classes = ignore_index is None or mean_over_classes
    voxel = terms.focal(inputs, reduction, gamma, alpha, weight, use_softmax, over_classes, softmax_over_all)
    return terms.call_of(inputs, [overlap, voxel], reduction, region_lambda, voxel_lambda)


@documented(like=dice_focal_loss)
@loss()
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
) -> Call | Tensor:
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
    act = (sigmoid, softmax, other_act)
    focal: dict[str, Any] = {
        "gamma": gamma,
        "alpha": alpha,
        "weight": weight,
        "use_softmax": use_softmax,
        "mean_over_classes": mean_over_classes,
        "softmax_over_all": softmax_over_all,
    }
    both: dict[str, Any] = {
        "include_background": include_background,
        "to_onehot_y": to_onehot_y,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "mask": mask,
    }
    if _two_passes(logits, target, other_act, focal | both):
        gdl: dict[str, Any] = {
            "sigmoid": sigmoid,
            "softmax": softmax,
            "other_act": other_act,
            "w_type": w_type,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "batch": batch,
            "soft_label": soft_label,
        }
        return _apart(generalized_dice_loss, logits, target, gdl, focal, both, region_lambda, voxel_lambda)
    inputs = prepare(logits, target, mask, act, include_background, to_onehot_y, ignore_index)
    if logits.shape[1] == 1:  # MONAI's halves both warn
        if to_onehot_y:
            warn_single_channel("to_onehot_y=True")
        if not include_background:
            warn_single_channel("include_background=False")
    overlap = terms.generalized(inputs, w_type, smooth_nr, smooth_dr, batch, soft_label)
    over_classes = ignore_index is None or mean_over_classes
    voxel = terms.focal(inputs, reduction, gamma, alpha, weight, use_softmax, over_classes, softmax_over_all)
    return terms.call_of(inputs, [overlap, voxel], reduction, region_lambda, voxel_lambda)
