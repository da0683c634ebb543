"""The names of ``monai.losses`` (1.6.1) that this version replaces, aliases included."""

from ..modules import (
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
from .from_monai import from_monai

Dice = DiceLoss
dice_ce = DiceCELoss
dice_focal = DiceFocalLoss
ds_loss = DeepSupervisionLoss
generalized_dice = GeneralizedDiceLoss
generalized_dice_focal = GeneralizedDiceFocalLoss
generalized_wasserstein_dice = GeneralizedWassersteinDiceLoss

__all__ = [
    "AsymmetricUnifiedFocalLoss",
    "DeepSupervisionLoss",
    "Dice",
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
    "dice_ce",
    "dice_focal",
    "ds_loss",
    "from_monai",
    "generalized_dice",
    "generalized_dice_focal",
    "generalized_wasserstein_dice",
]
