"""The oracle: every loss of the package as textbook PyTorch on dense one-hot tensors.

Slow, memory hungry and plain on purpose. It works in the dtype of ``logits`` (float64 for truth),
returns that dtype, and is differentiable twice with respect to logits, target and mask.
The losses follow MONAI 1.6.1 (``monai/losses/dice.py``, ``tversky.py``); ``docs/semantics.md``
lists the extras and the deliberate deviations. Arguments are not validated here.

Shapes: B batch, C channels, ``*S`` any number of spatial dims (also none), K channels left after
the background is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    labels = _channel_of_labels(logits, target, to_onehot_y)
    ones = torch.ones_like(logits[:, :1])
    product = ones if ignore_index is None else ignore_mask(labels, ignore_index).to(logits.dtype)
    weight = ones
    if mask is not None and mask_mode == "product":
        product = product * mask.to(logits.dtype)
    elif mask is not None:
        weight = weight * mask.to(logits.dtype)
    m = product * weight

    if to_onehot_y:
        labels = torch.where(m == 0, 0, labels)
    z = _quiet(logits, m)
    g = _quiet(dense_target(logits, labels, to_onehot_y), m)
    p = _quiet(_activate(z, activation), m)

    tp, fp, fn = overlap_terms(p * product, g * product, overlap)
    rows = {
        "I": _voxel_sum(weight * tp),
        "FP": _voxel_sum(weight * fp),
        "FN": _voxel_sum(weight * fn),
        "G": _voxel_sum(m * g),
        "N": _voxel_sum(m.expand_as(z)),
    }
    for name, term in voxel_terms(z, g, voxel_term, gamma, first_class).items():
        rows[name] = _voxel_sum(m * _quiet(term, m))
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


def dice_loss(
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
    soft_label: bool = False,
    ignore_index: int | None = None,
    log_loss: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """1 - (2 I + nr) / (2 I + FP + FN + dr) per (sample, class), or per class with ``batch``.

    ``jaccard`` counts FP and FN twice; ``log_loss`` gives -log(max(score, 1e-7)) instead.
    A class weight is ignored when a single channel is left. ``reduction="none"`` returns
    ``(B, K, 1, ..)``, or ``(K, 1, ..)`` with ``batch``.
    """
    hit, fp, fn, _ = _overlap_sums(
        logits,
        target,
        include_background,
        batch,
        activation=_choose_activation(logits, sigmoid, softmax, other_act),
        overlap="squared" if squared_pred else "min" if soft_label else "product",
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
        mask=mask,
    )
    channels = logits.shape[1] - _dropped(logits, include_background)
    wrong = (2 if jaccard else 1) * (fp + fn)
    if log_loss:
        loss = -torch.log(((2 * hit + smooth_nr) / (2 * hit + wrong + smooth_dr)).clamp(min=1e-7))
    else:
        loss = _one_minus_ratio(2 * hit, wrong, smooth_nr, smooth_dr)
    if weight is not None and channels != 1:
        loss = loss * torch.as_tensor(weight).to(loss).expand(channels)
    return _reduce(loss, reduction, trailing=logits.ndim - 2)


def generalized_dice_loss(
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
    soft_label: bool = False,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """1 - (2 sum_c w I + nr) / (sum_c w (2 I + FP + FN) + dr) per sample, or once with ``batch``.

    w is 1/G^2, 1/G or 1 ("square", "simple", "uniform"). A weight that is infinite in float32 is
    replaced by the largest finite one of its sample (of the batch with ``batch``), or 0 if there
    is none. ``reduction="none"`` returns ``(B, 1, 1, ..)``, or ``(1, 1, ..)`` with ``batch``.
    IndexError for inputs without spatial dims unless ``batch``, as in MONAI.
    """
    hit, fp, fn, volume = _overlap_sums(
        logits,
        target,
        include_background,
        batch,
        activation=_choose_activation(logits, sigmoid, softmax, other_act),
        overlap="min" if soft_label else "product",
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
        mask=mask,
    )
    w = _generalized_weight(volume, w_type, batch)
    classes = 0 if batch else 1
    hit = (w * 2 * hit).sum(classes, keepdim=True)
    wrong = (w * (fp + fn)).sum(classes, keepdim=True)
    loss = _one_minus_ratio(hit, wrong, smooth_nr, smooth_dr)
    return _reduce(loss, reduction, trailing=logits.ndim - 2)


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Activation | None = None,
    alpha: float = 0.5,
    beta: float = 0.5,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    gamma: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """f = 1 - (I + nr) / (I + alpha FP + beta FN + dr), then max(f, 0)**gamma unless gamma is 1.

    ``reduction="none"`` returns ``(B, K)``, or ``(K,)`` with ``batch``. Where f <= 0 a gamma other
    than 1 gives value and gradient 0 (the slope of f**gamma at 0 is infinite for gamma < 1).
    """
    hit, fp, fn, _ = _overlap_sums(
        logits,
        target,
        include_background,
        batch,
        activation=_choose_activation(logits, sigmoid, softmax, other_act),
        overlap="min" if soft_label else "product",
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
        mask=mask,
    )
    loss = _one_minus_ratio(hit, alpha * fp + beta * fn, smooth_nr, smooth_dr)
    if gamma != 1:
        powered = torch.where(loss <= 0, 1, loss) ** gamma
        loss = torch.where(loss <= 0, 0, powered)
    return _reduce(loss, reduction, trailing=None)


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
    w = None if weight is None else torch.as_tensor(weight)
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
    w = torch.ones(()).to(logits) if w is None else w.to(logits)
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


def _channel_of_labels(logits: Tensor, target: Tensor, to_onehot_y: bool) -> Tensor:
    """Give a label map ``(B, *S)`` its channel dimension."""
    return target[:, None] if to_onehot_y and target.ndim == logits.ndim - 1 else target


def _choose_activation(
    logits: Tensor, sigmoid: bool, softmax: bool, other_act: Activation | None
) -> str | Activation | None:
    """MONAI ignores softmax over a single channel; sigmoid it applies."""
    if softmax and logits.shape[1] == 1:
        return None
    return "sigmoid" if sigmoid else "softmax" if softmax else other_act


def _activate(z: Tensor, activation: str | Activation | None) -> Tensor:
    if activation is None:
        return z
    if callable(activation):
        return activation(z)
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"activation: got {activation!r}, expected 'softmax', 'sigmoid' or None")
    return torch.softmax(z, 1) if activation == "softmax" else torch.sigmoid(z)


def _quiet(x: Tensor, m: Tensor) -> Tensor:
    """Zero for the non-finite values of masked-out voxels, which 0 * x would turn into NaN.

    Finite ones stay: the gradient with respect to the mask needs them.
    """
    return torch.where((m == 0) & ~x.isfinite(), 0, x)


def _voxel_sum(x: Tensor) -> Tensor:
    """Sum over the spatial dims: ``(B, C, *S)`` to ``(B, C)``."""
    return x.sum(tuple(range(2, x.ndim))) if x.ndim > 2 else x


def _dropped(logits: Tensor, include_background: bool) -> int:
    """Channels removed as background: never the only one."""
    return 0 if include_background or logits.shape[1] == 1 else 1


def _overlap_sums(
    logits: Tensor, target: Tensor, include_background: bool, batch: bool, **region: Any
) -> list[Tensor]:
    """I, FP, FN, G without the background, summed over the batch when asked.

    Inputs without spatial dims and ``batch=False`` sum to one scalar: MONAI reduces with
    ``torch.sum(x, dim=[])``, where no dimension means every one.
    """
    rows = region_sums(logits, target, **region)
    kept = [rows[r][:, _dropped(logits, include_background) :] for r in ("I", "FP", "FN", "G")]
    if batch:
        return [row.sum(0) for row in kept]
    return [row.sum() for row in kept] if logits.ndim == 2 else kept


def _one_minus_ratio(hit: Tensor, wrong: Tensor, smooth_nr: float, smooth_dr: float) -> Tensor:
    """1 - (hit + nr) / (hit + wrong + dr), without the subtraction's cancellation."""
    return (wrong + (smooth_dr - smooth_nr)) / (hit + wrong + smooth_dr)


def _generalized_weight(volume: Tensor, w_type: str, batch: bool) -> Tensor:
    """Weights in the working precision; float32 decides which are infinite, as in MONAI."""
    if w_type == "uniform":
        return torch.ones_like(volume)
    if w_type not in ("square", "simple"):
        raise ValueError(f"w_type: got {w_type!r}, expected 'square', 'simple' or 'uniform'")
    power = 2 if w_type == "square" else 1
    volume32 = volume.detach().float()
    infinite = torch.isinf(1 / (volume32 * volume32 if power == 2 else volume32))
    w = torch.where(infinite, 0, 1 / torch.where(infinite, 1, volume) ** power)
    largest = torch.max(w) if batch else torch.max(w, dim=1, keepdim=True)[0]
    return torch.where(infinite, largest, w)


def _reduce(loss: Tensor, reduction: str, trailing: int | None) -> Tensor:
    """``trailing``: singleton dims that "none" appends to the first two, None to keep the shape."""
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    if reduction != "none":
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    return loss if trailing is None else loss.view([*loss.shape[:2], *[1] * trailing])
