"""Losses of two halves, an overlap and a voxel term, from one pass."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import checks, reference
from ..evaluate import Call
from ..prepare import OtherAct, like_input, prepare
from ..spec import Denominator, Formula, LossSpec
from ..terms import ce_term, overlap_call, overlap_of
from .dense import or_dense


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
