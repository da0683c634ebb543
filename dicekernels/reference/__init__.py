"""The oracle: every loss of the package as textbook PyTorch on dense one-hot tensors.

Slow, memory hungry and plain on purpose. It works in the dtype of ``logits`` (float64 for truth),
returns that dtype, and is differentiable twice with respect to logits, target and mask.
The losses follow MONAI 1.6.1; ``docs/semantics.md`` lists the extras and the deliberate deviations.
Arguments are not validated here.

Shapes: B batch, C channels, ``*S`` any number of spatial dims (also none), K channels left after
the background is removed.
"""

from .compound import dice_ce_loss
from .overlap import dice_loss, generalized_dice_loss, tversky_loss
from .rows import dense_target, ignore_mask, overlap_terms, region_sums, voxel_terms

__all__ = [
    "dense_target",
    "dice_ce_loss",
    "dice_loss",
    "generalized_dice_loss",
    "ignore_mask",
    "overlap_terms",
    "region_sums",
    "tversky_loss",
    "voxel_terms",
]
