"""Oracle of the losses with an overlap half and a voxel half: MONAI 1.6.1's ``dice.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .focal import focal_loss
from .overlap import dice_loss, generalized_dice_loss
from .rows import ClassWeight, region_sums


def dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    reduction: str = "mean",
    weight: ClassWeight = None,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    ce_include_background: bool = True,
    dice_weight: ClassWeight | str = "weight",
    to_onehot_y: bool = False,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
    **dice_options: Any,
) -> Tensor:
    """lambda_dice * Dice + lambda_ce * (softmax CE, or BCE for one channel) of the raw logits.

    ``weight`` has one entry per class, background included; the Dice half drops the first entry
    when the background is excluded, or takes ``dice_weight``. For one channel it is the
    BCE's positive weight. ``dice_options``: the other options of ``dice_loss``.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
    w = None if weight is None else torch.as_tensor(weight, device=logits.device)
    if isinstance(dice_weight, str):
        dice_weight = w if w is None or w.ndim == 0 or include_background else w[1:]
    both: dict[str, Any] = {"to_onehot_y": to_onehot_y, "ignore_index": ignore_index, "mask": mask}
    overlap: dict[str, Any] = {"weight": dice_weight, "include_background": include_background}
    dice = dice_loss(logits, target, reduction=reduction, **overlap, **both, **dice_options)
    term = "bce" if logits.shape[1] == 1 else "ce"
    rows = region_sums(logits, target, activation=None, voxel_term=term, **both)
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
    weight: ClassWeight = None,
    dice_weight: ClassWeight | str = "weight",
    lambda_dice: float = 1.0,
    **options: Any,
) -> Tensor:
    """lambda_dice * Dice + lambda_focal * focal loss of the raw logits, sigmoid unless ``use_softmax``.

    ``weight``: K factors or one, of both halves unless ``dice_weight`` says otherwise. With
    ``reduction="none"`` the Dice terms are broadcast over the focal map ``(B, K, *S)``.
    ``options``: those of ``dice_loss`` and ``focal_loss``, and ``lambda_focal``.
    """
    own = weight if isinstance(dice_weight, str) else dice_weight
    return _beside_focal(dice_loss, lambda_dice, {"weight": own}, logits, target, weight, **options)


def generalized_dice_focal_loss(
    logits: Tensor, target: Tensor, *, weight: ClassWeight = None, lambda_gdl: float = 1.0, **options: Any
) -> Tensor:
    """lambda_gdl * generalized Dice + lambda_focal * focal loss of the raw logits.

    ``weight``: K factors or one, of the focal half alone. ``reduction="none"`` as ``dice_focal_loss``.
    ``options``: those of ``generalized_dice_loss`` and ``focal_loss``, and ``lambda_focal``.
    """
    return _beside_focal(generalized_dice_loss, lambda_gdl, {}, logits, target, weight, **options)


def _beside_focal(
    overlap_loss: Callable[..., Tensor],
    factor: float,
    own: dict[str, Any],
    logits: Tensor,
    target: Tensor,
    weight: ClassWeight,
    *,
    lambda_focal: float = 1.0,
    mean_over_classes: bool = True,
    softmax_over_all: bool = True,
    **options: Any,
) -> Tensor:
    """The sum of the halves, the options of both handed to each."""
    focal: dict[str, Any] = {"weight": weight}
    focal |= {"mean_over_classes": mean_over_classes, "softmax_over_all": softmax_over_all}
    focal |= {name: options.pop(name) for name in ("gamma", "alpha", "use_softmax") if name in options}
    shared = ("include_background", "to_onehot_y", "reduction", "ignore_index", "mask")
    focal |= {name: options[name] for name in shared if name in options}
    overlap = overlap_loss(logits, target, **own, **options)
    return factor * overlap + lambda_focal * focal_loss(logits, target, **focal)
