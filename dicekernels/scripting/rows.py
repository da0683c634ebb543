"""The rows of ``dicekernels.reference.rows`` as functions that TorchScript compiles.

Shapes: logits and dense target (B, C, *S), masks (B or 1, 1, *S), rows (B, C). Rows are float64, so that the
finish loses nothing.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import hints


def warn_single_channel(channels: int, softmax: bool, to_onehot_y: bool, include_background: bool) -> None:
    """MONAI's warnings about options that one channel makes void."""
    if channels == 1:
        if softmax:
            warnings.warn("single channel prediction, `softmax=True` ignored.", stacklevel=2)
        if to_onehot_y:
            warnings.warn("single channel prediction, `to_onehot_y=True` ignored.", stacklevel=2)
        if not include_background:
            warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=2)


def inputs(
    logits: Tensor, target: Tensor, mask: Tensor | None, one_hot: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Logits, dense target, ignore mask, voxel weights: in float32, or in float64 if the data has it.

    What voxels of mask 0 hold is made finite. ``one_hot``: the target is a label map.

    Raises:
        AssertionError, ValueError: shapes that do not fit.
        RuntimeError: a label outside [0, C) that is not masked, by torch's ``scatter_``.
    """
    check_shapes(logits, target, mask, one_hot)
    dtype = torch.promote_types(torch.float32, logits.dtype if logits.is_floating_point() else torch.float32)
    if not one_hot and target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
    if logits.ndim == 2:
        dtype = torch.float64  # as the losses themselves: nothing to save where there is no space
    z = logits.to(dtype)
    values = target if target.is_floating_point() else target.long()
    if one_hot and values.ndim < logits.ndim:
        values = values.unsqueeze(1)
    valid: Tensor | None = None
    if ignore_index is not None:
        valid = ignore_mask(values, ignore_index, dtype)
    weight: Tensor | None = None
    if mask is not None:
        weight = mask.to(dtype)
    m = both(valid, weight)
    if one_hot:
        if m is not None:
            values = torch.where(m == 0, 0, values)
        g = torch.zeros_like(z).scatter_(1, values.long(), 1.0)
    else:
        g = quiet(values.to(dtype), m)
    return quiet(z, m), g, valid, weight


def check_shapes(logits: Tensor, target: Tensor, mask: Tensor | None, one_hot: bool) -> None:
    """The shape checks of ``dicekernels.prepare``."""
    space = logits.shape[2:]
    if one_hot:
        if target.ndim == logits.ndim and target.shape[1] != 1:
            raise AssertionError(
                "labels should have a channel with length equal to one. "
                + hints.of_target(logits, target, True)
            )
        labels = target.squeeze(1) if target.ndim == logits.ndim else target
        if labels.shape[0] != logits.shape[0] or labels.shape[1:] != space:
            raise AssertionError(hints.of_different_shapes(logits, target, True))
    elif target.shape != logits.shape:
        raise AssertionError(hints.of_different_shapes(logits, target, False))
    if mask is not None:
        check_mask(mask, logits)


def check_mask(mask: Tensor, logits: Tensor) -> None:
    """Raises ValueError unless the mask is (B, 1, *S) or (1, 1, *S) and, on the CPU, nowhere below 0."""
    samples = mask.shape[0] == 1 or mask.shape[0] == logits.shape[0]
    if mask.ndim != logits.ndim or not samples or mask.shape[1] != 1 or mask.shape[2:] != logits.shape[2:]:
        raise ValueError(
            f"mask: got shape {mask.shape}, expected one weight a voxel, (B, 1, *S), for {logits.shape}"
        )
    if mask.device.type == "cpu" and bool((mask < 0).any()):
        raise ValueError(
            f"mask: got a voxel weight of {mask.min().item()}, expected none below 0; 0 leaves a voxel out"
        )


def ignore_mask(values: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """MONAI's ``create_ignore_mask`` of a target as it came."""
    if values.shape[1] == 1:
        return (values != ignore_index).to(dtype)
    if ignore_index >= 0 and ignore_index < values.shape[1]:
        return 1 - values[:, ignore_index : ignore_index + 1].to(dtype)
    return (values.sum(1, keepdim=True) > 0).to(dtype)


def both(valid: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """The product of the two masks."""
    if valid is None:
        return weight
    if weight is None:
        return valid
    return valid * weight


def quiet(x: Tensor, m: Tensor | None) -> Tensor:
    """Zero for the non-finite values of masked-out voxels, which 0 * x would turn into NaN."""
    if m is None:
        return x
    return torch.where((m == 0) & ~x.isfinite(), 0, x)


def times(m: Tensor | None, x: Tensor) -> Tensor:
    return x if m is None else m * x


def voxel_sum(x: Tensor) -> Tensor:
    """(B, C, *S) to (B, C) in float64; along the last dim in the dtype of x: backward then copies nothing."""
    if x.ndim > 2:
        x = x.sum(-1)
    return x.double().flatten(2).sum(-1) if x.ndim > 2 else x.double()


def overlap_rows(
    p: Tensor, g: Tensor, valid: Tensor | None, weight: Tensor | None, overlap: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """I, FP, FN of the overlap kind, and G; ``valid`` multiplies p and g, ``weight`` the terms."""
    p, g = times(valid, quiet(p, both(valid, weight))), times(valid, g)
    if overlap == "squared":
        tp, fp, fn = p * g, p * (p - g), g * (g - p)
    elif overlap == "min":
        # In double: where p and g differ in sign the three cancel.
        p, g = p.double(), g.double()
        difference = (p - g).abs()
        tp = (p.abs() + g.abs() - difference) / 2
        fp = (p.abs() - g.abs() + difference) / 2
        fn = (g.abs() - p.abs() + difference) / 2
    else:
        # p - p g is p (1 - g), exact for a g of 0 or 1, and autograd keeps nothing of a difference.
        tp = p * g
        fp, fn = p - tp, g - tp
    return (
        voxel_sum(times(weight, tp)),
        voxel_sum(times(weight, fp)),
        voxel_sum(times(weight, fn)),
        voxel_sum(times(weight, g)),
    )


def kept(row: Tensor, include_background: bool, batch: bool, flat: bool) -> Tensor:
    """A row without the background, summed over the batch when asked.

    ``flat``: without spatial dims MONAI sums over everything.
    """
    if not include_background and row.shape[1] > 1:
        row = row[:, 1:]
    if batch:
        return row.sum(0)
    return row.sum() if flat else row


def loss_dtype(logits: Tensor, target: Tensor, one_hot: bool, ignore_index: int | None) -> torch.dtype:
    """The dtype of an overlap loss, by torch's promotion in MONAI's formula."""
    dtype = logits.dtype if logits.is_floating_point() else torch.float32
    if one_hot:
        return torch.promote_types(dtype, torch.float32)
    dtype = torch.promote_types(dtype, target.dtype)
    if ignore_index is not None:
        channels = target.shape[1]
        by_class = ignore_index >= 0 and ignore_index < channels and channels != 1
        floating = by_class and target.is_floating_point()
        dtype = torch.promote_types(dtype, target.dtype if floating else torch.float32)
    return dtype


def one_minus_ratio(hit: Tensor, wrong: Tensor, smooth_nr: float, smooth_dr: float) -> Tensor:
    """1 - (hit + nr) / (hit + wrong + dr), without the subtraction's cancellation."""
    return (wrong + (smooth_dr - smooth_nr)) / (hit + wrong + smooth_dr)


def quotient(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 where nothing is counted."""
    return torch.where(count == 0, 0, total / torch.where(count == 0, 1, count))


def class_weight(weight: Tensor, classes: int, skipped: int) -> Tensor:
    """The factors of the overlap terms, checked.

    Raises:
        ValueError: wrong length, or a value that is negative or not finite.
    """
    if weight.ndim > 0 and weight.shape[0] != classes:
        raise ValueError(
            "The length of the `weight` sequence should be the same as the number of classes. "
            + hints.of_weight_length(weight.shape[0], classes, skipped, None)
        )
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError("the value/values of the `weight` should be no less than 0, and finite.")
    return weight.expand(classes)


def reduce(loss: Tensor, reduction: str, trailing: int) -> Tensor:
    """``trailing``: singleton dims that "none" appends."""
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    if reduction != "none":
        raise ValueError(f"reduction: got {reduction}, expected 'mean', 'sum' or 'none'")
    for _ in range(trailing):
        loss = loss.unsqueeze(-1)
    return loss


def ce_weight(weight: Tensor, classes: int) -> Tensor:
    """Raises RuntimeError for a wrong length, as torch's cross entropy."""
    if weight.numel() != classes:
        raise RuntimeError(f"weight: got {weight.numel()} values, expected {classes}, background included")
    return weight


def per_class(values: Tensor, ndim: int) -> Tensor:
    """K values beside the channels of (B, K, *S)."""
    for _ in range(ndim - 2):
        values = values.unsqueeze(-1)
    return values


def check_two_halves(logits: Tensor, target: Tensor) -> None:
    """MONAI's first checks of the losses of two halves; labels (B, *S) are taken, too.

    Raises:
        ValueError: another number of dimensions or of channels.
    """
    if target.ndim == logits.ndim - 1 and target.shape[1:] == logits.shape[2:]:
        return
    if target.ndim != logits.ndim:
        raise ValueError(
            "the number of dimensions for input and target should be the same, got shape "
            f"{logits.shape} and {target.shape}. " + hints.of_target(logits, target, False)
        )
    if target.shape[1] != 1 and target.shape[1] != logits.shape[1]:
        raise ValueError(
            "number of channels for target is neither 1 (without one-hot encoding) nor the same as input, "
            f"got shape {logits.shape} and {target.shape}. " + hints.of_target(logits, target, False)
        )


def fitted_mask(mask: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """The mask of a masked loss as (B, 1, *S), after MONAI's checks.

    Raises:
        ValueError: another batch size, or more than one channel.
        RuntimeError: it does not broadcast to (B, 1, *S).
    """
    check_spatial_mask(mask, logits, target)
    return mask.expand_as(logits[:, :1])


def check_spatial_mask(mask: Tensor, logits: Tensor, target: Tensor) -> None:
    """MONAI's checks of the mask of ``MaskedLoss``."""
    if logits.ndim != mask.ndim:
        warnings.warn(f"Dim of input ({logits.shape}) is different from mask ({mask.shape}).", stacklevel=2)
    if logits.shape[0] != mask.shape[0] and mask.shape[0] != 1:
        raise ValueError(f"Batch size of mask ({mask.shape}) must be one or equal to input ({logits.shape}).")
    if target.ndim > 1:
        if mask.shape[1] != 1:
            raise ValueError(f"Mask ({mask.shape}) must have only one channel.")
        if logits.shape[2:] != mask.shape[2:]:
            warnings.warn(
                f"Spatial size of input ({logits.shape}) is different from mask ({mask.shape}).", stacklevel=2
            )
