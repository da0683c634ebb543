"""Oracle of the overlap losses: MONAI 1.6.1's ``dice.py``, ``tversky.py`` and ``mcc_loss.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .rows import (
    Activation,
    ClassWeight,
    activate,
    channel_of_labels,
    dense_target,
    ignore_mask,
    known_labels,
    quiet,
    region_sums,
    voxel_sum,
)


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
    hit, fp, fn, _ = overlap_sums(
        logits,
        target,
        include_background,
        batch,
        activation=choose_activation(logits, sigmoid, softmax, other_act),
        overlap="squared" if squared_pred else "min" if soft_label else "product",
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
        mask=mask,
    )
    channels = logits.shape[1] - dropped(logits, include_background)
    wrong = (2 if jaccard else 1) * (fp + fn)
    if log_loss:
        loss = -torch.log(((2 * hit + smooth_nr) / (2 * hit + wrong + smooth_dr)).clamp(min=1e-7))
    else:
        loss = one_minus_ratio(2 * hit, wrong, smooth_nr, smooth_dr)
    if weight is not None and channels != 1:
        loss = loss * torch.as_tensor(weight, device=loss.device).to(loss).expand(channels)
    return reduce(loss, reduction, trailing=logits.ndim - 2)


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
    w_func: Callable[[Tensor], Tensor] | None = None,
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
    is none. ``w_func``: MONAI's method, w of the float32 volumes (B, K), or (K,) with ``batch``.
    ``reduction="none"`` returns ``(B, 1, 1, ..)``, or ``(1, 1, ..)`` with ``batch``.
    IndexError for inputs without spatial dims unless ``batch``, as in MONAI.
    """
    hit, fp, fn, volume = overlap_sums(
        logits,
        target,
        include_background,
        batch,
        activation=choose_activation(logits, sigmoid, softmax, other_act),
        overlap="min" if soft_label else "product",
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
        mask=mask,
    )
    w = generalized_weight(volume, w_type) if w_func is None else w_func(volume.float()).to(volume)
    infinite = w.isinf()
    w = torch.where(infinite, 0, w)
    w = torch.where(infinite, w.max() if batch else w.amax(1, keepdim=True), w)
    classes = 0 if batch else 1
    hit = (w * 2 * hit).sum(classes, keepdim=True)
    wrong = (w * (fp + fn)).sum(classes, keepdim=True)
    loss = one_minus_ratio(hit, wrong, smooth_nr, smooth_dr)
    return reduce(loss, reduction, trailing=logits.ndim - 2)


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
    hit, fp, fn, _ = overlap_sums(
        logits,
        target,
        include_background,
        batch,
        activation=choose_activation(logits, sigmoid, softmax, other_act),
        overlap="min" if soft_label else "product",
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
        mask=mask,
    )
    loss = one_minus_ratio(hit, alpha * fp + beta * fn, smooth_nr, smooth_dr)
    if gamma != 1:
        powered = torch.where(loss <= 0, 1, loss) ** gamma
        loss = torch.where(loss <= 0, 0, powered)
    return reduce(loss, reduction, trailing=None)


def mcc_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Activation | None = None,
    reduction: str = "mean",
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """1 - (TP TN - FP FN + nr) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN) + dr), 0 if FP = FN = 0.

    The ignore mask weighs voxels, as ``mask``: with p m and g m an ignored voxel would be a true negative.
    ``reduction="none"`` returns ``(B, K)``, or ``(K,)`` with ``batch``.
    """
    z, g, valid, weight = masked_inputs(logits, target, to_onehot_y, ignore_index, mask)
    m = valid * weight
    p = quiet(activate(z, choose_activation(logits, sigmoid, softmax, other_act)), m)
    cells = [voxel_sum(m * cell) for cell in (p * g, p * (1 - g), (1 - p) * g, (1 - p) * (1 - g))]
    tp, fp, fn, tn = kept_sums(cells, logits, include_background, batch)

    perfect = (fp == 0) & (fn == 0)
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + smooth_dr
    score = (tp * tn - fp * fn + smooth_nr) / torch.where(perfect, 1, square).sqrt()
    return reduce(torch.where(perfect, 0, 1 - score), reduction, trailing=None)


def choose_activation(
    logits: Tensor, sigmoid: bool, softmax: bool, other_act: Activation | None
) -> str | Activation | None:
    """MONAI ignores softmax over a single channel; sigmoid it applies."""
    if softmax and logits.shape[1] == 1:
        return None
    return "sigmoid" if sigmoid else "softmax" if softmax else other_act


def dropped(logits: Tensor, include_background: bool) -> int:
    """Channels removed as background: never the only one."""
    return 0 if include_background or logits.shape[1] == 1 else 1


def overlap_sums(
    logits: Tensor, target: Tensor, include_background: bool, batch: bool, **region: Any
) -> list[Tensor]:
    """I, FP, FN, G as ``kept_sums`` gives them; ``region``: options of ``region_sums``."""
    rows = region_sums(logits, target, **region)
    return kept_sums([rows[r] for r in ("I", "FP", "FN", "G")], logits, include_background, batch)


def kept_sums(rows: list[Tensor], logits: Tensor, include_background: bool, batch: bool) -> list[Tensor]:
    """Rows ``(B, C)`` without the background, summed over the batch when asked.

    Inputs without spatial dims and ``batch=False`` sum to one scalar: MONAI reduces with
    ``torch.sum(x, dim=[])``, where no dimension means every one.
    """
    kept = [row[:, dropped(logits, include_background) :] for row in rows]
    if batch:
        return [row.sum(0) for row in kept]
    return [row.sum() for row in kept] if logits.ndim == 2 else kept


def masked_inputs(
    logits: Tensor, target: Tensor, to_onehot_y: bool, ignore_index: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and dense target ``(B, C, *S)``, quiet where masked, ignore mask and weights ``(B, 1, *S)``."""
    labels = channel_of_labels(logits, target, to_onehot_y)
    ones = torch.ones_like(logits[:, :1])
    valid = ones if ignore_index is None else ignore_mask(labels, ignore_index).to(logits.dtype)
    weight = ones if mask is None else ones * mask.to(logits.dtype)
    m = valid * weight
    if to_onehot_y:
        labels = known_labels(labels, m, logits.shape[1])
    return quiet(logits, m), quiet(dense_target(logits, labels, to_onehot_y), m), valid, weight


def one_minus_ratio(hit: Tensor, wrong: Tensor, smooth_nr: float, smooth_dr: float) -> Tensor:
    """1 - (hit + nr) / (hit + wrong + dr), without the subtraction's cancellation."""
    return (wrong + (smooth_dr - smooth_nr)) / (hit + wrong + smooth_dr)


def generalized_weight(volume: Tensor, w_type: str) -> Tensor:
    """Weights in the working precision; float32 decides which are infinite, as in MONAI."""
    if w_type == "uniform":
        return torch.ones_like(volume)
    if w_type not in ("square", "simple"):
        raise ValueError(f"w_type: got {w_type!r}, expected 'square', 'simple' or 'uniform'")
    power = 2 if w_type == "square" else 1
    volume32 = volume.detach().float()
    infinite = torch.isinf(1 / (volume32 * volume32 if power == 2 else volume32))
    return torch.where(infinite, torch.inf, 1 / torch.where(infinite, 1, volume) ** power)


def reduce(loss: Tensor, reduction: str, trailing: int | None) -> Tensor:
    """``trailing``: singleton dims that "none" appends to the first two, None to keep the shape."""
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    if reduction != "none":
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    return loss if trailing is None else loss.view([*loss.shape[:2], *[1] * trailing])
