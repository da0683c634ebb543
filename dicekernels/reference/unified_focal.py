"""Oracle of the asymmetric unified focal loss: MONAI 1.6.1's ``unified_focal_loss.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import channel_of_labels, dense_target, ignore_mask

EPSILON = 1e-7


def asymmetric_unified_focal_loss(
    y_pred: Tensor,
    y_true: Tensor,
    *,
    to_onehot_y: bool = False,
    num_classes: int = 2,
    weight: float = 0.5,
    gamma: float = 0.5,
    delta: float = 0.7,
    reduction: str = "mean",
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """weight * focal + (1 - weight) * focal Tversky of probabilities, () for every reduction.

    p and g are [1 - p, p] and [1 - g, g] for a single channel; 0 is the background, 1 the foreground:
        focal = mean over voxels of [(1 - delta) (1 - p_0)^gamma (-g_0 log p_0), delta (-g_1 log p_1)]
        D = (tp + e) / (tp + delta fn + (1 - delta) fp + e)
        focal Tversky = mean over samples of [1 - D_0, (1 - D_1)^(1 - gamma)]
    with p clamped to [e, 1 - e], e = 1e-7. Source: Yeung et al. 2022, arXiv:2102.04525, as MONAI has it.
    Ignored voxels have p = g = 0 before the clamp and count in every mean. ``num_classes`` and
    ``reduction`` change no number.
    """
    one_hot = to_onehot_y and y_pred.shape[1] != 1
    y_true = channel_of_labels(y_pred, y_true, one_hot)
    keep = None if ignore_index is None else ignore_mask(y_true, ignore_index).to(y_pred)
    p = y_pred
    if y_pred.shape[1] == 1:
        g = y_true.to(y_pred)
        p, g = torch.cat([1 - p, p], 1), torch.cat([1 - g, g], 1)
    else:
        if one_hot and ignore_index is not None:
            y_true = torch.where(y_true == ignore_index, 0, y_true)
        g = dense_target(y_pred, y_true, one_hot)
    if keep is not None:
        p, g = torch.where(keep != 0, p, 0) * keep, torch.where(keep != 0, g, 0) * keep
    m = torch.ones_like(p[:, :1]) if mask is None else mask.to(p).expand_as(p[:, :1])
    p, g = torch.where(m != 0, p, 0)[:, :2].clamp(EPSILON, 1 - EPSILON), torch.where(m != 0, g, 0)[:, :2]
    cross_entropy = -g * torch.log(p)
    back = (1 - delta) * (1 - p[:, 0]) ** gamma * cross_entropy[:, 0]
    fore = delta * cross_entropy[:, 1]
    voxels = m.sum()
    focal = (m * torch.stack([back, fore], 1)).sum() / torch.where(voxels == 0, 1, 2 * voxels)
    space = list(range(2, p.ndim))
    tp, fn, fp = ((m * x).sum(space) for x in (g * p, g * (1 - p), (1 - g) * p))
    wrong = delta * fn + (1 - delta) * fp
    missed = wrong / (tp + wrong + EPSILON)
    tversky = torch.stack([missed[:, 0], missed[:, 1] ** (1 - gamma)], 1).mean()
    return weight * focal + (1 - weight) * tversky
