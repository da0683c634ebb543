"""Dice loss of a region: prediction and target multiplied by a spatial mask."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks, dispatch, reference, terms
from ..arguments import documented
from ..autograd import total_sums
from ..call import Call
from ..prepare import OtherAct, kernel_dtype, like_input, plain, prepare
from ..spec import FN, Activation, G, Overlap, SumsSpec, row_index
from .loss import loss
from .overlap import dice_loss


@documented()
def masked_dice_loss(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: OtherAct = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: checks.Weight = None,
    soft_label: bool = False,
) -> Tensor:
    """Dice loss of p m and g m, as ``monai.losses.MaskedDiceLoss``: p the activated logits, m the mask.

    With ``to_onehot_y`` MONAI multiplies the label map, before it becomes one-hot: a voxel of mask 0 is
    background in the target, and so one more voxel that class 0 misses. ``dice_loss(mask=...)`` leaves such
    voxels out instead.

    Args:
        mask: (B, 1, *S) or (1, 1, *S), of any real dtype and sign; None warns and masks nothing. What
            broadcasts over the space is taken with a warning, as in MONAI.

    Returns:
        As :func:`dice_loss`; the dtype of the mask is promoted with.

    Raises:
        ValueError: another batch size, or more than one channel of mask; an option, as the arguments say.
        RuntimeError: a mask that does not broadcast to (B, 1, *S).
        TypeError: what is no tensor, or no activation.
        AssertionError: a target whose shape does not fit.
        LabelRangeError: a label times mask outside [0, C) (on a GPU in a later call).
    """
    options: dict[str, Any] = {
        "include_background": include_background,
        "to_onehot_y": to_onehot_y,
        "sigmoid": sigmoid,
        "softmax": softmax,
        "other_act": other_act,
        "squared_pred": squared_pred,
        "jaccard": jaccard,
        "reduction": reduction,
        "smooth_nr": smooth_nr,
        "smooth_dr": smooth_dr,
        "batch": batch,
        "weight": weight,
        "soft_label": soft_label,
    }
    if mask is None:
        if not torch.compiler.is_compiling():
            warnings.warn("No mask value specified for the MaskedLoss.", UserWarning, stacklevel=3)
        return dice_loss(logits, target, **options)
    checks.tensors(logits, target, mask)
    return like_input(_masked(logits, target, mask=_fitted(mask, logits, target), **options), mask)


def _fitted(mask: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """The mask as (B, 1, *S), after MONAI's checks."""
    shapes = []
    if logits.dim() != mask.dim():
        shapes.append(f"Dim of input ({logits.shape}) is different from mask ({mask.shape}).")
    if logits.shape[0] != mask.shape[0] and mask.shape[0] != 1:
        raise ValueError(f"Batch size of mask ({mask.shape}) must be one or equal to input ({logits.shape}).")
    if target.dim() > 1:
        if mask.shape[1] != 1:
            raise ValueError(
                f"Mask ({mask.shape}) must have only one channel. A map (B, *S) wants mask[:, None]."
            )
        if logits.shape[2:] != mask.shape[2:]:
            shapes.append(f"Spatial size of input ({logits.shape}) is different from mask ({mask.shape}).")
    for message in shapes:
        if not torch.compiler.is_compiling():
            warnings.warn(message, UserWarning, stacklevel=4)
    expected = (logits.shape[0], 1, *logits.shape[2:])
    if tuple(mask.shape) == expected:
        return mask
    try:
        return mask.expand(expected)
    except RuntimeError:
        raise RuntimeError(
            f"mask: got shape {tuple(mask.shape)}, expected {expected} or what broadcasts to it"
        ) from None


@loss(reference.masked_dice_loss, planned=False)
def _masked(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor,
    include_background: bool,
    to_onehot_y: bool,
    sigmoid: bool,
    softmax: bool,
    other_act: OtherAct,
    squared_pred: bool,
    jaccard: bool,
    reduction: str,
    smooth_nr: float,
    smooth_dr: float,
    batch: bool,
    weight: checks.Weight,
    soft_label: bool,
) -> Call:
    labels = to_onehot_y and logits.shape[1] > 1
    raw_target, m = kernel_dtype(plain(target)), kernel_dtype(plain(mask))
    if labels:
        # Fractions: 0.5 * 3 is label 1 after MONAI's truncation.
        channel = raw_target[:, None] if raw_target.ndim == logits.ndim - 1 else raw_target
        if channel.shape == m.shape:
            raw_target = channel * m
            if raw_target.is_floating_point():
                raw_target.masked_fill_(m == 0, 0)  # NaN is no label, also not of a masked voxel
    act = (sigmoid, softmax, other_act)
    inputs = prepare(logits, raw_target, m, act, include_background, to_onehot_y, None, signed_mask=True)
    if not labels:
        inputs.product_mask = True
    inputs.dtype = torch.promote_types(inputs.dtype, m.dtype)
    overlap = terms.overlap_of(soft_label, squared_pred)
    if labels and (m.requires_grad or (overlap != Overlap.PRODUCT and m.dtype != torch.bool)):
        # Not linear in a fractional mask: p m is made, and read as it is.
        working = torch.promote_types(inputs.logits.dtype, torch.float32)
        quiet = reference.rows.quiet(inputs.logits.to(working), m)
        inputs.logits = reference.rows.quiet(_activated(quiet, inputs.activation), m) * m
        inputs.activation, inputs.mask = Activation.NONE, None
        inputs.notes += ("p times the mask is made in PyTorch and kept for backward",)
    if labels:
        inputs.notes += ("the label map times the mask is made once and kept for backward",)
    weight = checks.as_weight(weight, device=logits.device)
    weight = checks.class_weight(weight, inputs.classes, inputs.skipped)
    term = terms.dice(inputs, squared_pred, jaccard, smooth_nr, smooth_dr, batch, weight, soft_label)
    call = terms.call_of(inputs, [term], reduction, trailing_ones=True)
    if labels and inputs.mask is not None:
        call.between = _with_missed
        call.aside = "one over the label map"
    return call


def _activated(logits: Tensor, activation: Activation) -> Tensor:
    if activation == Activation.SOFTMAX:
        return torch.softmax(logits, 1)
    return torch.sigmoid(logits) if activation == Activation.SIGMOID else logits


def _with_missed(call: Call, totals: Tensor) -> Tensor:
    """What FN lacks where g is not masked: the sums of (1 - m) g for the one-hot g of the label map."""
    mask, rows = call.mask, call.spec.sums.rows
    assert mask is not None
    # g alone is summed: the logits are a single zero, seen with their shape.
    zero = call.logits.new_zeros(()).expand(call.logits.shape)
    working = torch.promote_types(torch.promote_types(mask.dtype, zero.dtype), torch.float32)
    rest = ~mask if mask.dtype == torch.bool else 1 - mask.detach().to(working)
    spec = SumsSpec(dense=False, activation=Activation.NONE, rows=G)
    missed = total_sums(zero, call.target, rest, spec, dispatch.choose(call.logits).namespace)
    return totals + missed * (torch.arange(totals.shape[-1], device=totals.device) == row_index(rows, FN))
