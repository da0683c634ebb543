"""Module of the masked Dice loss. Conventions: ``dicekernels.modules``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from .. import checks, functional
from ..arguments import documented
from ..overrides import refuse, remember
from .overlap import ACTIVATION, DICE, DiceLoss

# Options of DiceLoss that MaskedDiceLoss has not, and their values.
_FIXED = {"sigmoid": False, "softmax": False, "other_act": None, "ignore_index": None, "log_loss": False}


@documented(functional.masked_dice_loss)
@remember("forward")
class MaskedDiceLoss(DiceLoss):
    """Dice loss of prediction times mask and target times mask: ``monai.losses.MaskedDiceLoss``.

    As in MONAI the activation comes before the mask and lives in ``pre_sigmoid``, ``pre_softmax`` and
    ``pre_other_act``, and a label map is masked before it becomes one-hot: masked voxels are background.
    ``DiceLoss()(input, target, mask=mask)`` leaves them out instead.

    Formula: :func:`dicekernels.functional.masked_dice_loss`. state_dict: ``class_weight`` if one is given.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    _FUNCTION: ClassVar[Any] = functional.masked_dice_loss
    _OPTIONS: ClassVar = {
        "": DICE | {"weight": "class_weight"} | {name: f"pre_{name}" for name in ACTIVATION}
    }
    BESIDE: ClassVar = {"": {"ignore_index": None, "log_loss": False}}

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: Literal["mean", "sum", "none"] = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: checks.Weight = None,
        soft_label: bool = False,
    ) -> None:
        super().__init__()
        self._hold(locals())
        for name, value in _FIXED.items():
            setattr(self, name, value)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """``functional.masked_dice_loss`` with the options of this module.

        Raises:
            NotImplementedError: MONAI's ``spatial_weighted`` was set.
            ValueError: an option of ``DiceLoss`` was set that this loss has not.
        """
        refuse(self, ("spatial_weighted",), "wrap a DiceLoss in a MaskedLoss of your own")
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"MaskedDiceLoss.{name}: got {getattr(self, name)!r}, expected {value!r}; the activation "
                    "is that of pre_sigmoid, pre_softmax and pre_other_act, the rest is DiceLoss's alone"
                )
        return functional.masked_dice_loss(input, target, mask, **self._options())
