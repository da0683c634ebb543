"""Oracle of the masked Dice loss: MONAI 1.6.1's ``MaskedDiceLoss`` and ``MaskedLoss``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .overlap import choose_activation, dice_loss
from .rows import Activation, activate, channel_of_labels, quiet


def masked_dice_loss(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Activation | None = None,
    **options: Any,
) -> Tensor:
    """``dice_loss`` of m p and m g: probabilities and target are multiplied by the mask, then they meet.

    With ``to_onehot_y`` it is the label map that is multiplied, in the types of labels and mask: masked
    voxels become class 0, and a fraction of a label is truncated to another one.

    Args:
        mask: ``(B, 1, *S)`` or ``(1, 1, *S)`` of any dtype, or None.
        options: those of ``dice_loss``.
    """
    labels = channel_of_labels(logits, target, to_onehot_y)
    activation = choose_activation(logits, sigmoid, softmax, other_act)
    if mask is None:
        return dice_loss(activate(logits, activation), labels, to_onehot_y=to_onehot_y, **options)
    m = mask.to(logits.dtype)
    p = quiet(activate(quiet(logits, m), activation), m) * m
    masked = torch.where((m == 0) & ~labels.isfinite(), 0, labels) * mask
    return dice_loss(p, masked, to_onehot_y=to_onehot_y, **options)
