"""Oracle of the focal loss: MONAI 1.6.1's ``focal_loss.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .overlap import dropped, masked_inputs
from .rows import ClassWeight, quiet, voxel_terms

Alpha = float | Sequence[float] | Tensor | None


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    gamma: float = 2.0,
    alpha: Alpha = None,
    weight: ClassWeight = None,
    reduction: str = "mean",
    use_softmax: bool = False,
    ignore_index: int | None = None,
    mean_over_classes: bool = False,
    softmax_over_all: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """L = (1 - p_t)^gamma BCE per channel, or with ``use_softmax`` (1 - p)^gamma (-log p) g.

    The background is removed before the activation: the softmax runs over the K channels left; with
    ``softmax_over_all`` after it. The ignore mask v multiplies logits and target before the activation, and
    L after it; ``mask`` m only L.

    ``weight``: a factor per class (K of them) or one for all. ``alpha``: see ``balanced``.

    Returns:
        "none": the map v m L ``(B, K, *S)``. "mean": sum / (K sum m), or sum / sum(v m) with
        ``ignore_index``, K times as much, unless ``mean_over_classes``. "sum": sum / sum(v m) of each
        (sample, class), added up; without spatial dims MONAI averages over everything, and "sum" is "mean".
        Where no voxel has a weight the quotient is 0.
    """
    z, g, valid, voxel_weight = masked_inputs(logits, target, to_onehot_y, ignore_index, mask)
    first = dropped(logits, include_background)
    z, g, m = z * valid, g * valid, valid * voxel_weight
    if not (use_softmax and softmax_over_all):
        z, g, first = z[:, first:], g[:, first:], 0

    if use_softmax and not include_background and isinstance(alpha, float | int):
        alpha = None
    loss = m * quiet(balanced(z, g, gamma, alpha, use_softmax, first), m)
    if weight is not None:
        loss = loss * per_class(torch.as_tensor(weight, device=loss.device).to(loss), loss)

    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    plain = ignore_index is None and mask is None
    if reduction == "sum" and logits.ndim > 2:
        space = tuple(range(2, loss.ndim))
        return quotient(loss.sum(space), m.sum(space)).sum()
    if plain:
        return loss.mean()
    by_voxels = ignore_index is not None and not mean_over_classes
    return quotient(loss.sum(), m.sum() * (1 if by_voxels else loss.shape[1]))


def balanced(z: Tensor, g: Tensor, gamma: float, alpha: Alpha, use_softmax: bool, first: int = 0) -> Tensor:
    """The focal term of every voxel ``(B, K, *S)``, classes from ``first`` on, times what alpha makes of it.

    sigmoid: one number a gives g a + (1 - g) (1 - a), a sequence a_c where g is 1 and 1 elsewhere.
    softmax: one number a gives 1 - a in the first channel and a in the others, a sequence a_c.
    """
    terms = voxel_terms(z, g, "focal_softmax" if use_softmax else "focal_sigmoid", gamma, first_class=0)
    terms, g = {row: values[:, first:] for row, values in terms.items()}, g[:, first:]
    loss = terms["POS"] if use_softmax else terms["POS"] + terms["NEG"]
    if alpha is None:
        return loss
    a = (
        loss.new_tensor(alpha)
        if isinstance(alpha, float | int)
        else torch.as_tensor(alpha, device=loss.device).to(loss)
    )
    if use_softmax:
        a = torch.stack([1 - a] + [a] * (loss.shape[1] - 1)) if a.ndim == 0 else a
        return per_class(a, loss) * loss
    if a.ndim == 0:
        return a * terms["POS"] + (1 - a) * terms["NEG"]
    return torch.where(g == 1, per_class(a, loss), 1) * loss


def per_class(values: Tensor, loss: Tensor) -> Tensor:
    """K values as ``(K, 1, ..)``, beside the channels of ``(B, K, *S)``; one value as it is."""
    return values.view(-1, *[1] * (loss.ndim - 2)) if values.ndim else values


def quotient(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 where nothing is counted."""
    return torch.where(count == 0, 0, total / torch.where(count == 0, 1, count))
