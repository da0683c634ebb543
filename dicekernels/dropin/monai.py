"""The names of ``monai.losses`` (1.6.1) that this version replaces, aliases included."""

from ..modules import DiceCELoss, DiceLoss, GeneralizedDiceLoss, TverskyLoss

Dice = DiceLoss
dice_ce = DiceCELoss
generalized_dice = GeneralizedDiceLoss

__all__ = [
    "Dice",
    "DiceCELoss",
    "DiceLoss",
    "GeneralizedDiceLoss",
    "TverskyLoss",
    "dice_ce",
    "generalized_dice",
]
