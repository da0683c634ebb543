"""Oracle of the generalized Wasserstein Dice loss: MONAI 1.6.1's ``dice.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .overlap import reduce


def generalized_wasserstein_dice_loss(
    logits: Tensor,
    target: Tensor,
    dist_matrix: Any,
    *,
    weighting_mode: str = "default",
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """1 - (2 TP + nr) / (2 TP + E + dr) per sample, of the distance W_v = sum_c M[t_v, c] p_vc.

    M is ``dist_matrix`` over its largest entry, p the softmax, t the label.
    "default" (Fidon et al. 2017, arXiv:1707.00478): TP = sum_v a_v (1 - W_v) with a = 0 for the
    background and 1 for the rest, E = sum_v W_v.
    "GDL" (Tilborghs et al. 2020, arXiv:2007.15546, appendix): a = 1 / (1 + voxels of the class) in TP and
    E = sum_v a_v W_v.

    Logits (B, C, *S), target any shape of B x V labels, mask (B, 1, *S). ``reduction="none"``: (B,).
    """
    matrix = torch.as_tensor(dist_matrix, device=logits.device)
    matrix = (matrix / matrix.max()).to(logits)
    samples, classes = logits.shape[:2]
    z = logits.reshape(samples, classes, -1)
    labels = target.reshape(samples, -1)
    weight = torch.ones_like(z[:, 0])
    if mask is not None:
        weight = weight * mask.expand(samples, *mask.shape[1:]).reshape(samples, -1)
    if ignore_index is not None:
        weight = torch.where(labels == ignore_index, 0, weight)
    inside = weight != 0
    labels = torch.where(inside, labels.long(), 0)
    p = torch.softmax(torch.where(inside[:, None], z, 0), 1)
    distance = torch.einsum("bvc,bcv->bv", matrix[labels], p)
    one_hot = torch.nn.functional.one_hot(labels, classes).to(weight)
    volume = torch.einsum("bvc,bv->bc", one_hot, weight)
    if weighting_mode == "GDL":
        alpha = (1 / (volume + 1)).gather(1, labels)
        error = (weight * alpha * distance).sum(1)
    else:
        alpha = (labels != 0).to(weight)
        error = (weight * distance).sum(1)
    true_positive = (weight * alpha * (1 - distance)).sum(1)
    score = (2 * true_positive + smooth_nr) / (2 * true_positive + error + smooth_dr)
    return reduce(1 - score, reduction, trailing=None)
