"""START HERE: the losses as functions of (logits, target).

Shapes: logits (B, C, *S), raw unless no activation is asked for; target a label map (B, 1, *S) or
(B, *S) of any dtype that holds integers with ``to_onehot_y=True``, else values (B, C, *S); mask
(B, 1, *S) voxel weights that enter every sum linearly, in addition to the other options (but for
:func:`masked_dice_loss`, where it multiplies prediction and target).

One call makes one pass over the volume forward and one backward and keeps nothing of its size but
the caller's own tensors. ``explain`` names what does not: an ``other_act``, maps, the two losses without
kernels (:func:`generalized_wasserstein_dice_loss`, :func:`asymmetric_unified_focal_loss`).

``help()`` of a function explains each of its arguments; those that several share: ``dicekernels.arguments``.
Formulas: docs/semantics.md; they are MONAI 1.6.1's unless said otherwise.
All functions raise AssertionError, TypeError or ValueError, as MONAI, for arguments that do not fit,
and LabelRangeError for a label outside [0, C) that is not ``ignore_index``. On a GPU that comes in a later
call, and the loss is NaN with zero gradient (docs/backends.md, "Labels out of range on a GPU").
"""

from __future__ import annotations

from .compound import dice_ce_loss, dice_focal_loss, generalized_dice_focal_loss
from .focal import focal_loss
from .masked import masked_dice_loss
from .overlap import dice_loss, generalized_dice_loss, mcc_loss, tversky_loss
from .regions import RegionSums, region_sums
from .unified_focal import asymmetric_unified_focal_loss
from .wasserstein import generalized_wasserstein_dice_loss

__all__ = [
    "RegionSums",
    "asymmetric_unified_focal_loss",
    "dice_ce_loss",
    "dice_focal_loss",
    "dice_loss",
    "focal_loss",
    "generalized_dice_focal_loss",
    "generalized_dice_loss",
    "generalized_wasserstein_dice_loss",
    "masked_dice_loss",
    "mcc_loss",
    "region_sums",
    "tversky_loss",
]
