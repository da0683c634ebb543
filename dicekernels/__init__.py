"""Fused Dice-family losses for 3-D segmentation: exact, one pass forward, one pass backward.

Drop-in: ``from dicekernels import DiceCELoss`` in place of ``from monai.losses import DiceCELoss``.
Functions: ``dicekernels.functional``. What runs where: ``python -m dicekernels.env``, ``explain``.
"""

from ._version import __version__
from .backends.eager import LabelRangeError
from .dispatch import available_backends, unavailable_backends, use_backend
from .dropin.monai import from_monai
from .explain import explain
from .functional import region_sums
from .modules import (
    AsymmetricUnifiedFocalLoss,
    DeepSupervisionLoss,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceFocalLoss,
    GeneralizedDiceLoss,
    GeneralizedWassersteinDiceLoss,
    MaskedDiceLoss,
    MaskedLoss,
    MCCLoss,
    TverskyLoss,
)

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
    "LabelRangeError",
    "MCCLoss",
    "MaskedDiceLoss",
    "MaskedLoss",
    "TverskyLoss",
    "__version__",
    "available_backends",
    "explain",
    "from_monai",
    "region_sums",
    "unavailable_backends",
    "use_backend",
]
