"""Rows of the oracle: the sums of docs/semantics.md, section 1, on dense one-hot tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
ClassWeight = Sequence[float] | float | Tensor | None
Rows = dict[str, Tensor]


def region_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str | Activation | None = "softmax",
    overlap: str = "product",
    voxel_term: str | None = None,
    to_onehot_y: bool = False,
    gamma: float = 2.0,
    first_class: int = 0,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "weight",
) -> Rows:
    """Sums over the voxels of each (sample, class), every one a ``(B, C)`` tensor.

    With p the activated logits, g the dense target, m the mask (1 without one):
        I, FP, FN   sums of the overlap's (tp, fp, fn), see ``overlap_terms``
        G           sum m g
        POS, NEG    the voxel term where the target is positive and negative
        LS          sum m (-log p_c), only for ``voxel_term="ce"`` (label smoothing)
        N           sum m, the same in every channel
    Rows that the voxel term lacks are absent from the dict; ``voxel_terms`` has their formulas.

    Args:
        logits: ``(B, C, *S)``.
        target: dense ``(B, C, *S)``; with ``to_onehot_y`` labels ``(B, 1, *S)`` or ``(B, *S)``.
        activation: "softmax" (also over a single channel), "sigmoid", None or a callable.
        overlap: "product", "min" or "squared".
        voxel_term: None, "ce", "bce", "focal_sigmoid" or "focal_softmax".
        gamma: focusing exponent of the focal terms.
        first_class: first channel of the softmax of "focal_softmax".
        ignore_index: voxels to leave out, by MONAI's rules (``ignore_mask``); its mask always acts
            in mode "product".
        mask: voxel weights ``(B, 1, *S)``.
        mask_mode: "weight" makes every sum linear in the mask; "product" multiplies p and g by it
            before they meet. Both agree for masks of zeros and ones. Voxel terms and N are linear
            in either mode.

    Voxels whose mask is zero never leak a NaN or infinity of the logits, the target or p.
    """
    labels = channel_of_labels(logits, target, to_onehot_y)
    ones = torch.ones_like(logits[:, :1])
    product = ones if ignore_index is None else ignore_mask(labels, ignore_index).to(logits.dtype)
    weight = ones
    if mask is not None and mask_mode == "product":
        product = product * mask.to(logits.dtype)
    elif mask is not None:
        weight = weight * mask.to(logits.dtype)
    m = product * weight

    if to_onehot_y:
        labels = known_labels(labels, m, logits.shape[1])
    z = quiet(logits, m)
    g = quiet(dense_target(logits, labels, to_onehot_y), m)
    p = quiet(activate(z, activation), m)

    tp, fp, fn = overlap_terms(p * product, g * product, overlap)
    rows = {
        "I": voxel_sum(weight * tp),
        "FP": voxel_sum(weight * fp),
        "FN": voxel_sum(weight * fn),
        "G": voxel_sum(m * g),
        "N": voxel_sum(m.expand_as(z)),
    }
    for name, term in voxel_terms(z, g, voxel_term, gamma, first_class).items():
        rows[name] = voxel_sum(m * quiet(term, m))
    return rows


def overlap_terms(p: Tensor, g: Tensor, overlap: str) -> tuple[Tensor, Tensor, Tensor]:
    """(tp, fp, fn) of every voxel; p = tp + fp and g = tp + fn (p and g squared or absolute).

    product: tp = p g. min: tp = (|p| + |g| - |p - g|) / 2, which is min(p, g) for p, g >= 0.
    squared: tp = p g with tp + fp = p^2 and tp + fn = g^2.
    """
    if overlap == "product":
        return p * g, p * (1 - g), (1 - p) * g
    if overlap == "squared":
        return p * g, p * (p - g), g * (g - p)
    if overlap == "min":
        difference = (p - g).abs()
        return (
            (p.abs() + g.abs() - difference) / 2,
            (p.abs() - g.abs() + difference) / 2,
            (g.abs() - p.abs() + difference) / 2,
        )
    raise ValueError(f"overlap: got {overlap!r}, expected 'product', 'min' or 'squared'")


def voxel_terms(z: Tensor, g: Tensor, kind: str | None, gamma: float, first_class: int) -> Rows:
    """The per-voxel terms ``(B, C, *S)`` of raw logits z and dense target g, by row name.

    ce:            POS = g (-log p), LS = -log p, p the softmax over all channels
    bce:           POS = g softplus(-z), NEG = (1 - g) softplus(z)
    focal_sigmoid: POS = g L, NEG = (1 - g) L with MONAI's
                   L = (z - z g - logsigmoid(z)) exp(gamma logsigmoid(-z (2 g - 1)))
    focal_softmax: POS = g (1 - p)^gamma (-log p), p the softmax over channels >= first_class;
                   0 in the channels before
    """
    if kind is None:
        return {}
    if kind == "ce":
        surprise = -F.log_softmax(z, 1)
        return {"POS": g * surprise, "LS": surprise}
    if kind == "bce":
        # -logsigmoid: torch's softplus turns linear at 20, which is off by 2e-9.
        return {"POS": g * -F.logsigmoid(z), "NEG": (1 - g) * -F.logsigmoid(-z)}
    if kind == "focal_sigmoid":
        entropy = z - z * g - F.logsigmoid(z)
        loss = torch.exp(gamma * F.logsigmoid(-z * (2 * g - 1))) * entropy
        return {"POS": g * loss, "NEG": (1 - g) * loss}
    if kind == "focal_softmax":
        log_p = F.log_softmax(z[:, first_class:], 1)
        loss = g[:, first_class:] * (1 - log_p.exp()) ** gamma * -log_p
        return {"POS": torch.cat([torch.zeros_like(z[:, :first_class]), loss], 1)}
    raise ValueError(
        f"voxel_term: got {kind!r}, expected None, 'ce', 'bce', 'focal_sigmoid' or 'focal_softmax'"
    )


def ignore_mask(target: Tensor, ignore_index: int) -> Tensor:
    """``(B, 1, *S)`` mask of MONAI's ``create_ignore_mask`` (``monai/metrics/utils.py``).

    One target channel: 1 where it differs from ``ignore_index``. More channels: a valid class
    index gives ``1 - target[:, index]``; any other value (a sentinel) gives 1 where some channel is
    set.
    """
    if target.shape[1] == 1:
        return (target != ignore_index).to(torch.float32)
    if 0 <= ignore_index < target.shape[1]:
        chosen = target[:, ignore_index : ignore_index + 1]
        return 1 - chosen.to(torch.float64)
    return (target.sum(1, keepdim=True) > 0).to(torch.float32)


def dense_target(logits: Tensor, target: Tensor, to_onehot_y: bool) -> Tensor:
    """Target as ``(B, C, *S)`` in the logits' dtype; float labels are truncated, as in MONAI.

    One channel is never expanded. RuntimeError for a label outside [0, C), ValueError for a shape
    that would broadcast.
    """
    if to_onehot_y and logits.shape[1] != 1:
        target = F.one_hot(target[:, 0].long(), logits.shape[1]).movedim(-1, 1)
    if target.shape != logits.shape:
        raise ValueError(f"target: got dense shape {tuple(target.shape)}, expected {tuple(logits.shape)}")
    return target.to(logits.dtype)


def known_labels(labels: Tensor, m: Tensor, classes: int) -> Tensor:
    """Masked-out labels outside [0, classes) as 0. Others stay: the slope in the mask is theirs."""
    unknown = (labels.long() < 0) | (labels.long() >= classes)
    return torch.where((m == 0) & unknown, 0, labels)


def channel_of_labels(logits: Tensor, target: Tensor, to_onehot_y: bool) -> Tensor:
    """Give a label map ``(B, *S)`` its channel dimension."""
    return target[:, None] if to_onehot_y and target.ndim == logits.ndim - 1 else target


def activate(z: Tensor, activation: str | Activation | None) -> Tensor:
    if activation is None:
        return z
    if callable(activation):
        return activation(z)
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"activation: got {activation!r}, expected 'softmax', 'sigmoid' or None")
    return torch.softmax(z, 1) if activation == "softmax" else torch.sigmoid(z)


def quiet(x: Tensor, m: Tensor) -> Tensor:
    """Zero for the non-finite values of masked-out voxels, which 0 * x would turn into NaN.

    Finite ones stay: the gradient with respect to the mask needs them.
    """
    return torch.where((m == 0) & ~x.isfinite(), 0, x)


def voxel_sum(x: Tensor) -> Tensor:
    """Sum over the spatial dims: ``(B, C, *S)`` to ``(B, C)``."""
    return x.sum(tuple(range(2, x.ndim))) if x.ndim > 2 else x
