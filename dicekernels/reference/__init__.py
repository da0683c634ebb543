"""The oracle: every loss of the package as textbook PyTorch on dense one-hot tensors.

Slow, memory hungry and plain on purpose. It works in the dtype of ``logits`` (float64 for truth),
returns that dtype, and is differentiable twice with respect to logits, target and mask.
The losses follow MONAI 1.6.1; ``docs/semantics.md`` lists the extras and the deliberate deviations.
Arguments are not validated here.

Shapes: B batch, C channels, ``*S`` any number of spatial dims (also none), K channels left after
the background is removed.
"""

from .compound import dice_ce_loss, dice_focal_loss, generalized_dice_focal_loss
from .focal import focal_loss
from .masked import masked_dice_loss
from .overlap import dice_loss, generalized_dice_loss, mcc_loss, tversky_loss
from .rows import dense_target, ignore_mask, overlap_terms, region_sums, voxel_terms
from .unified_focal import asymmetric_unified_focal_loss
from .wasserstein import generalized_wasserstein_dice_loss

__all__ = [
    "asymmetric_unified_focal_loss",
    "dense_target",
    "dice_ce_loss",
    "dice_focal_loss",
    "dice_loss",
    "focal_loss",
    "generalized_dice_focal_loss",
    "generalized_dice_loss",
    "generalized_wasserstein_dice_loss",
    "ignore_mask",
    "masked_dice_loss",
    "mcc_loss",
    "overlap_terms",
    "region_sums",
    "tversky_loss",
    "voxel_terms",
]
