"""Focal loss, the voxel term of MONAI's focal family."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import checks, reference, terms
from ..arguments import documented
from ..call import Call
from ..prepare import prepare
from ..terms import Alpha
from .loss import ignores_fractions, loss


def focal_dense_reason(logits: Tensor, target: Tensor, options: dict[str, Any]) -> str:
    """Why the focal loss has no sums for these options, or ""."""
    if getattr(options.get("reduction"), "value", options.get("reduction")) == "none":
        return 'reduction="none" of the focal loss is a map of the size of the logits'
    alpha = options.get("alpha")
    soft = target.is_floating_point() and (logits.shape[1] == 1 or not options.get("to_onehot_y"))
    if alpha is None or options.get("use_softmax") or not soft or np.ndim(alpha) == 0:
        return ""
    return "an alpha of each class acts only where a soft target is 1, which no sum over the voxels tells"


@documented()
@loss(reference.focal_loss, focal_dense_reason)
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
) -> Call:
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
    act = (False, False, None)
    inputs = prepare(logits, target, mask, act, include_background, to_onehot_y, ignore_index, ValueError)
    dtype = torch.float32
    if inputs.mask is not None and ignores_fractions(
        logits, target, {"ignore_index": ignore_index, "to_onehot_y": to_onehot_y}
    ):
        dtype = torch.promote_types(dtype, target.dtype)  # that of MONAI's mask
        # MONAI multiplies the logits by this mask: no matter for zeros and ones.
        inputs.logits, inputs.target = inputs.logits * inputs.mask, inputs.target * inputs.mask
        inputs.notes += ("logits and target are multiplied by the fractions of the ignored class",)
    over_classes = ignore_index is None or mean_over_classes
    term = terms.focal(
        inputs, reduction, gamma, alpha, weight, use_softmax, over_classes, softmax_over_all, dtype
    )
    return terms.call_of(inputs, [term], reduction)
