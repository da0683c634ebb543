"""Focal loss, the voxel term of MONAI's focal family."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import checks, reference
from ..arguments import documented
from ..evaluate import Call
from ..prepare import Inputs, like_input, prepare
from ..terms import focal_term
from .dense import ignores_fractions, or_dense

Alpha = float | Sequence[float] | Tensor | None


def focal_dense_reason(logits: Tensor, target: Tensor, options: dict[str, Any]) -> str:
    """Why the focal loss has no sums for these options, or ""."""
    if getattr(options.get("reduction"), "value", options.get("reduction")) == "none":
        return 'reduction="none" of the focal loss is a map of the size of the logits'
    alpha = options.get("alpha")
    soft = target.is_floating_point() and (logits.shape[1] == 1 or not options.get("to_onehot_y"))
    if alpha is None or options.get("use_softmax") or not soft or np.ndim(alpha) == 0:
        return ""
    return "an alpha of each class acts only where a soft target is 1, which no sum over the voxels tells"


def focal_factors(
    alpha: Tensor | float | None, weight: Tensor | None, inputs: Inputs, use_softmax: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(C,) factors of the rows POS and NEG; None for 1. Those of a skipped background are never read."""
    if alpha is None and weight is None:
        return None, None
    ones = torch.ones(inputs.classes, dtype=torch.float64, device=inputs.logits.device)
    pos = neg = ones if weight is None else ones * weight.to(ones).reshape(-1)
    if alpha is not None:
        balance = alpha.to(ones) if isinstance(alpha, Tensor) else ones.new_full((), alpha)
        if balance.ndim > 0:
            pos = pos * balance
        elif use_softmax:
            background = torch.arange(inputs.classes, device=ones.device) == 0
            pos = pos * torch.where(background, 1 - balance, balance)
        else:
            pos, neg = pos * balance, neg * (1 - balance)
    skipped = ones.new_zeros(inputs.skipped)
    return torch.cat([skipped, pos]), torch.cat([skipped, neg])


def void_alpha(alpha: Alpha, include_background: bool, use_softmax: bool) -> bool:
    """Whether MONAI ignores a scalar alpha, with a warning: without background it has nothing to balance."""
    if not use_softmax or include_background or not isinstance(alpha, (float, int)):
        return False
    if not torch.compiler.is_compiling():
        warnings.warn(
            "`include_background=False`, scalar `alpha` ignored when using softmax.",
            UserWarning,
            stacklevel=4,
        )
    return True


def warn_constant(channels: int, skipped: int, use_softmax: bool, softmax_over_all: bool) -> None:
    """A warning about the softmax of a single class, which is 1 whatever the logits are."""
    left = channels - (0 if softmax_over_all else skipped)
    if use_softmax and left == 1 and not torch.compiler.is_compiling():
        remedy = "use a sigmoid (use_softmax=False)"
        if channels > 1:
            remedy = "pass softmax_over_all=True, which leaves out the background's term alone, or " + remedy
        warnings.warn(
            f"use_softmax=True: got {channels} channels of logits and a softmax over one of them, so the "
            f"focal term is 0 with zero gradient; {remedy}",
            UserWarning,
            stacklevel=4,
        )


@documented()
@or_dense(reference.focal_loss, focal_dense_reason)
def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    gamma: float = 2.0,
    alpha: Alpha = None,
    weight: checks.Weight = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    use_softmax: bool = False,
    ignore_index: int | None = None,
    mean_over_classes: bool = False,
    softmax_over_all: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Focal loss (1 - p_t)^gamma (-log p_t) of each voxel and class (Lin et al., 2017).

    As ``monai.losses.FocalLoss``, with ``mean_over_classes``, ``softmax_over_all`` and ``mask``;
    docs/semantics.md.

    Args:
        logits: raw, (B, C, *S), one spatial dimension or more, float32, float16, bfloat16 or float64, with
            any strides. Integers are copied to float32.
        include_background: False leaves class 0 out before the activation, as MONAI: see
            ``softmax_over_all``. Ignored, with a warning, for one channel.
        reduction: "mean" divides the sum over voxels and classes by the number of voxels (the sum of
            ``mask``) and of classes, but see ``mean_over_classes``; "sum" adds up the spatial means of each
            sample and class, as MONAI; "none" is the map of all terms, made in PyTorch. Else ValueError.
        weight: factor of each class: one number, or one for each class (without the background if that is
            left out) as a sequence or tensor. At least 0, finite and of that length, else ValueError; for a
            single class one number.

    Returns:
        float32 for every dtype of the logits, as MONAI (float64 where an ignored class is one of fractions
        in float64): (), or for "none" (B, K, *S), of K classes.

    Raises:
        TypeError, ValueError: as the arguments say; what is no tensor, on another device, a mask or target of
            another shape.
        AssertionError: labels of more than one channel.
        LabelRangeError: a label outside [0, C) that is not ``ignore_index`` (on a GPU in a later call).
    """
    checks.option("reduction", reduction, ("mean", "sum", "none"))
    inputs = prepare(
        logits,
        target,
        mask,
        include_background,
        to_onehot_y,
        False,
        False,
        None,
        ignore_index,
        ValueError,
    )
    if void_alpha(alpha, include_background, use_softmax):
        alpha = None
    dtype = torch.float32
    if inputs.mask is not None and ignores_fractions(
        logits, target, {"ignore_index": ignore_index, "to_onehot_y": to_onehot_y}
    ):
        dtype = torch.promote_types(dtype, target.dtype)  # that of MONAI's mask
        # MONAI multiplies the logits by this mask: no matter for zeros and ones.
        inputs.logits, inputs.target = inputs.logits * inputs.mask, inputs.target * inputs.mask
        inputs.notes += ("logits and target are multiplied by the fractions of the ignored class",)
    warn_constant(logits.shape[1], inputs.skipped, use_softmax, softmax_over_all)
    balance = checks.focal_alpha(alpha, inputs.classes, inputs.skipped, logits.device)
    by_voxels = ignore_index is not None and not mean_over_classes
    spec = focal_term(
        inputs, getattr(reduction, "value", reduction), gamma, use_softmax, by_voxels, softmax_over_all
    )
    call = Call(inputs.logits, inputs.target, inputs.mask, spec, dtype, notes=inputs.notes)
    weight = checks.as_weight(weight, device=logits.device)
    factor = checks.focal_weight(weight, inputs.classes, inputs.skipped)
    call.pos_weight, call.neg_weight = focal_factors(balance, factor, inputs, use_softmax)
    return like_input(call.run(), logits, target)
