"""The losses as modules: MONAI 1.6.1's constructors, attributes, state_dict keys and results.

Every argument after MONAI's last is an extra of ours, by keyword only. ``forward(input, target)`` is
MONAI's; its ``mask`` (B, 1, *S) of voxel weights is ours. Attributes may be changed at any time, the
next call follows them. ``help()`` of a loss and of its ``forward`` explains each argument; those that several
share stand in ``dicekernels.arguments``. Formulas: ``dicekernels.functional`` and docs/semantics.md.
"""

from .compound import DiceCELoss
from .focal import DiceFocalLoss, FocalLoss, GeneralizedDiceFocalLoss
from .masked import MaskedDiceLoss
from .overlap import DiceLoss, GeneralizedDiceLoss, MCCLoss, TverskyLoss
from .unified_focal import AsymmetricUnifiedFocalLoss
from .wasserstein import GeneralizedWassersteinDiceLoss
from .wrappers import DeepSupervisionLoss, MaskedLoss

__all__ = [
    "AsymmetricUnifiedFocalLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "GeneralizedWassersteinDiceLoss",
    "MCCLoss",
    "MaskedDiceLoss",
    "MaskedLoss",
    "TverskyLoss",
]
