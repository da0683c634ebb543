"""Oracle of the losses with an overlap half and a voxel half: MONAI 1.6.1's ``dice.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .focal import Alpha, focal_loss
from .overlap import dice_loss, generalized_dice_loss
from .rows import Activation, ClassWeight, region_sums


def dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Activation | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: ClassWeight = None,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    soft_label: bool = False,
    ce_include_background: bool = True,
    mask: Tensor | None = None,
    dice_weight: ClassWeight | str = "weight",
) -> Tensor:
    """lambda_dice * Dice + lambda_ce * (softmax CE, or BCE for one channel) of the raw logits.

    ``weight`` has one entry per class, background included; the Dice half drops the first entry
    when the background is excluded, or takes ``dice_weight``. For one channel it is the
    BCE's positive weight.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
    w = None if weight is None else torch.as_tensor(weight, device=logits.device)
    if isinstance(dice_weight, str):
        dice_weight = w if w is None or w.ndim == 0 or include_background else w[1:]
    dice = dice_loss(
        logits,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        squared_pred=squared_pred,
        jaccard=jaccard,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        batch=batch,
        weight=dice_weight,
        soft_label=soft_label,
        ignore_index=ignore_index,
        mask=mask,
    )
    rows = region_sums(
        logits,
        target,
        activation=None,
        voxel_term="bce" if logits.shape[1] == 1 else "ce",
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
        mask=mask,
    )
    w = logits.new_ones(()) if w is None else w.to(logits)
    if logits.shape[1] == 1:
        total = w.reshape(()) * rows["POS"].sum() + rows["NEG"].sum()
        count = rows["N"].sum()
    else:
        w = w.expand(logits.shape[1])
        if not ce_include_background:
            w = torch.cat([torch.zeros_like(w[:1]), w[1:]])
        smooth = label_smoothing / logits.shape[1]
        total = (1 - label_smoothing) * (w * rows["POS"]).sum() + smooth * (w * rows["LS"]).sum()
        # torch divides by the class weights for label maps, by the voxels for probabilities.
        count = (w * rows["G"]).sum() if to_onehot_y else rows["N"][:, 0].sum()
    if reduction == "mean":
        # No voxel with a weight: nothing to learn, where torch would divide 0 by 0.
        total = torch.where(count == 0, 0, total / torch.where(count == 0, 1, count))
    return lambda_dice * dice + lambda_ce * total


def dice_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Activation | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    gamma: float = 2.0,
    weight: ClassWeight = None,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    alpha: Alpha = None,
    use_softmax: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    mean_over_classes: bool = True,
    softmax_over_all: bool = True,
    mask: Tensor | None = None,
    dice_weight: ClassWeight | str = "weight",
) -> Tensor:
    """lambda_dice * Dice + lambda_focal * focal loss of the raw logits, sigmoid unless ``use_softmax``.

    ``weight``: K factors or one, of both halves unless ``dice_weight`` says otherwise. With
    ``reduction="none"`` the Dice terms are broadcast over the focal map ``(B, K, *S)``.
    """
    dice = dice_loss(
        logits,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        squared_pred=squared_pred,
        jaccard=jaccard,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        batch=batch,
        weight=weight if isinstance(dice_weight, str) else dice_weight,
        soft_label=soft_label,
        ignore_index=ignore_index,
        mask=mask,
    )
    focal = focal_loss(
        logits,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        gamma=gamma,
        alpha=alpha,
        weight=weight,
        reduction=reduction,
        use_softmax=use_softmax,
        ignore_index=ignore_index,
        mean_over_classes=mean_over_classes,
        softmax_over_all=softmax_over_all,
        mask=mask,
    )
    return lambda_dice * dice + lambda_focal * focal


def generalized_dice_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Activation | None = None,
    w_type: str = "square",
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    gamma: float = 2.0,
    weight: ClassWeight = None,
    lambda_gdl: float = 1.0,
    lambda_focal: float = 1.0,
    alpha: Alpha = None,
    use_softmax: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    mean_over_classes: bool = True,
    softmax_over_all: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """lambda_gdl * generalized Dice + lambda_focal * focal loss of the raw logits.

    ``weight``: K factors or one, of the focal half alone. ``reduction="none"`` as ``dice_focal_loss``.
    """
    gdl = generalized_dice_loss(
        logits,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        w_type=w_type,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        batch=batch,
        soft_label=soft_label,
        ignore_index=ignore_index,
        mask=mask,
    )
    focal = focal_loss(
        logits,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        gamma=gamma,
        alpha=alpha,
        weight=weight,
        reduction=reduction,
        use_softmax=use_softmax,
        ignore_index=ignore_index,
        mean_over_classes=mean_over_classes,
        softmax_over_all=softmax_over_all,
        mask=mask,
    )
    return lambda_gdl * gdl + lambda_focal * focal
