"""Losses of overlap sums alone: Dice, generalized Dice, Tversky, Matthews' correlation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import checks, reference, terms
from ..arguments import documented
from ..call import Call
from ..finish import VolumeWeight
from ..prepare import OtherAct, prepare
from ..spec import Formula, Transform
from .loss import loss


@documented()
@loss(reference.dice_loss)
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
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: checks.Weight = None,
    soft_label: bool = False,
    ignore_index: int | None = None,
    log_loss: bool = False,
    mask: Tensor | None = None,
) -> Call:
    """Dice loss 1 - (2 I + nr) / (P + G + dr) of each (sample, class), or of each class with ``batch``.

    As ``monai.losses.DiceLoss`` (Milletari et al., 2016), with ``log_loss`` and ``mask``; docs/semantics.md.

    Args:
        log_loss: True: -log(max(score, 1e-7)) in place of 1 - score, as ``segmentation_models_pytorch``.

    Returns:
        () for reduction "mean" and "sum"; for "none" (B, K, 1, ..) or, with ``batch``, (K, 1, ..), of K
        classes. In the dtype that torch's promotion makes of logits and values; labels count as float32.

    Raises:
        TypeError, ValueError: as the arguments say; what is no tensor, on another device, or a mask of
            another shape.
        AssertionError: a target whose shape does not fit.
        LabelRangeError: a label outside [0, C) that is not ``ignore_index`` (on a GPU in a later call).
    """
    act = (sigmoid, softmax, other_act)
    inputs = prepare(logits, target, mask, act, include_background, to_onehot_y, ignore_index)
    weight = checks.as_weight(weight, device=logits.device)
    weight = checks.class_weight(weight, inputs.classes, inputs.skipped)
    term = terms.dice(
        inputs, squared_pred, jaccard, smooth_nr, smooth_dr, batch, weight, soft_label, log_loss
    )
    return terms.call_of(inputs, [term], reduction, trailing_ones=True)


@documented()
@loss(reference.generalized_dice_loss)
def generalized_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: OtherAct = None,
    w_type: Literal["square", "simple", "uniform"] = "square",
    w_func: VolumeWeight | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> Call:
    """Generalized Dice loss 1 - (2 sum_c w_c I_c + nr) / (sum_c w_c (P_c + G_c) + dr), w_c = 1/G_c^2.

    As ``monai.losses.GeneralizedDiceLoss`` (Sudre et al., 2017), with ``ignore_index`` and ``mask``;
    docs/semantics.md.

    Args:
        w_type: the weight of a class of volume G: "square" 1 / G^2, "simple" 1 / G, "uniform" 1; MONAI's
            Weight is taken too. A class without a voxel gets the largest finite weight of the sample, with
            ``batch`` of the batch; if no class has a voxel, all weights are 0. Else ValueError.
        w_func: a function in place of ``w_type``, from volumes, float32 (B, K) or, with ``batch``, (K,), to
            as many weights, else ValueError. An infinite one becomes the largest finite one. None:
            ``w_type``.
        reduction: "mean" or "sum" of the losses of the samples (of the one of the batch with ``batch``);
            "none": these losses. MONAI's LossReduction is taken too. Else ValueError.
        batch: True: sums run over the batch as well, and there is one loss. False: one for each sample.
        smooth_nr: nr, added to the numerator of each loss.
        smooth_dr: dr, added to the denominator of each loss, which is 1 - nr / dr where no class has a voxel.

    Returns:
        () for reduction "mean" and "sum"; for "none" (B, 1, 1, ..) or, with ``batch``, (1, 1, ..). float32,
        or float64 if the logits or the values are.

    Raises:
        TypeError, ValueError: as the arguments say; what is no tensor, on another device, or a mask of
            another shape.
        AssertionError: a target whose shape does not fit.
        LabelRangeError: a label outside [0, C) that is not ``ignore_index`` (on a GPU in a later call).
    """
    act = (sigmoid, softmax, other_act)
    inputs = prepare(logits, target, mask, act, include_background, to_onehot_y, ignore_index)
    term = terms.generalized(inputs, w_type, smooth_nr, smooth_dr, batch, soft_label)
    call = terms.call_of(inputs, [term], reduction, trailing_ones=True)
    call.volume_weight = w_func
    return call


@documented()
@loss(reference.tversky_loss)
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
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    gamma: float = 1.0,
    mask: Tensor | None = None,
) -> Call:
    """Tversky loss 1 - (I + nr) / (I + alpha FP + beta FN + dr) of each (sample, class).

    As ``monai.losses.TverskyLoss`` (Salehi et al., 2017), with ``gamma`` and ``mask``; docs/semantics.md.

    Args:
        alpha: weight of the false positives, a number (TypeError for a tensor that requires a gradient).
        beta: weight of the false negatives, a number, as ``alpha``.
        gamma: exponent of the focal Tversky loss, max(1 - score, 0)**gamma of each term before the reduction;
            above 0, else ValueError. 1 is the plain Tversky loss.

    Returns:
        () for reduction "mean" and "sum"; for "none" (B, K) or, with ``batch``, (K,), of K classes. In the
        dtype that torch's promotion makes of logits and values; labels count as float32.

    Raises:
        TypeError, ValueError: as the arguments say; what is no tensor, on another device, or a mask of
            another shape.
        AssertionError: a target whose shape does not fit.
        LabelRangeError: a label outside [0, C) that is not ``ignore_index`` (on a GPU in a later call).
    """
    act = (sigmoid, softmax, other_act)
    inputs = prepare(logits, target, mask, act, include_background, to_onehot_y, ignore_index)
    if gamma <= 0:
        raise ValueError(f"gamma: got {gamma}, expected a positive exponent (1 is the plain Tversky loss)")
    half = terms.overlap_half(
        inputs,
        Formula.RATIO,
        smooth_nr,
        smooth_dr,
        batch,
        terms.overlap_of(soft_label),
        kappa=1.0,
        alpha=checks.constant("alpha", alpha),
        beta=checks.constant("beta", beta),
        transform=Transform.LINEAR if gamma == 1 else Transform.POWER,
        exponent=float(gamma),
    )
    return terms.call_of(inputs, [terms.Term(half, inputs.dtype)], reduction)


@documented()
@loss(reference.mcc_loss)
def mcc_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: OtherAct = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> Call:
    """1 - Matthews' correlation coefficient of each (sample, class) (Abhishek and Hamarneh, 2021).

    (tp tn - fp fn + nr) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn) + dr); the loss is 0 where fp = fn = 0.
    As ``monai.losses.MCCLoss``, with ``ignore_index`` and ``mask``; docs/semantics.md.

    Args:
        smooth_dr: dr, added below the root of each term's denominator.

    Returns:
        () for reduction "mean" and "sum"; for "none" (B, K) or, with ``batch``, (K,), of K classes. In the
        dtype that torch's promotion makes of logits and values; labels and integers count as float32.

    Raises:
        TypeError, ValueError: as the arguments say; what is no tensor, on another device, or a mask of
            another shape.
        AssertionError: a target whose shape does not fit.
        LabelRangeError: a label outside [0, C) that is not ``ignore_index`` (on a GPU in a later call).
    """
    act = (sigmoid, softmax, other_act)
    inputs = prepare(logits, target, mask, act, include_background, to_onehot_y, ignore_index)
    # An ignored voxel is no true negative either: p m = g m = 0 would make it one.
    inputs.product_mask = False
    dtype = inputs.dtype
    if inputs.dense and not target.is_floating_point():
        dtype = torch.promote_types(dtype, torch.float32)  # MONAI's 1.0 - g is one
    half = terms.overlap_half(inputs, Formula.MCC, smooth_nr, smooth_dr, batch)
    return terms.call_of(inputs, [terms.Term(half, dtype)], reduction)
