"""Modules of the focal loss, alone and beside an overlap loss. Conventions: ``dicekernels.modules``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor

from .. import checks, functional
from ..arguments import documented
from ..overrides import remember
from ..prepare import dense_labels
from ..terms import Alpha
from .halves import TwoHalves
from .loss import Loss, part_of, same
from .overlap import DICE, SUMS, DiceLoss, GeneralizedDiceLoss

_FOCAL = same("gamma", "alpha", "use_softmax", "mean_over_classes", "softmax_over_all")
# What the focal half of a compound loss has on, without an argument.
_ON = {"mean_over_classes": True, "softmax_over_all": True}


@documented(functional.focal_loss)
@remember("forward")
class FocalLoss(Loss):
    """Focal loss of each voxel and class, in float32 for every dtype: ``monai.losses.FocalLoss``.

    Formula and source: :func:`dicekernels.functional.focal_loss`. state_dict: ``class_weight`` if a weight is
    given.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    FUNCTION: ClassVar = functional.focal_loss
    OPTIONS: ClassVar = {
        "": _FOCAL
        | same("include_background", "to_onehot_y", "reduction", "ignore_index")
        | {"weight": "class_weight"}
    }

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: float = 2.0,
        alpha: Alpha = None,
        weight: checks.Weight = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        use_softmax: bool = False,
        ignore_index: int | None = None,
        *,
        mean_over_classes: bool = False,
        softmax_over_all: bool = False,
    ) -> None:
        super().__init__()
        if alpha is not None:
            alpha = float(alpha) if isinstance(alpha, (float, int)) else checks.as_weight(alpha, "alpha")
        self._hold(locals())
        self.weight = weight

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.focal_loss`` with the options of this module."""
        if (loss := self._planned(input, target, mask)) is not None:
            return loss
        return functional.focal_loss(input, target, mask=mask, **self._options())


class _OverlapFocal(TwoHalves):
    """An overlap half, then a focal half."""

    def _apart(self, input: Tensor, target: Tensor, mask: Tensor | None, reason: str) -> Tensor:
        self._begin_apart(input, target, mask, reason)
        overlap, focal = (getattr(self, name) for name in self.PARTS)
        if "to_onehot_y" in self.OPTIONS[""] and self.to_onehot_y:
            target = dense_labels(target, input, getattr(overlap, "ignore_index", None))
        factors = [getattr(self, name) for name in self.FACTORS]
        more = {} if mask is None else {"mask": mask}
        total: Tensor = factors[0] * overlap(input, target, **more)
        total = total + factors[1] * focal(input, target, **more)
        return total


@documented(functional.dice_focal_loss)
@remember("forward")
class DiceFocalLoss(_OverlapFocal):
    """Dice loss + focal loss from one pass over the logits: ``monai.losses.DiceFocalLoss``.

    Formula: :func:`dicekernels.functional.dice_focal_loss`. The options live in ``dice`` and ``focal``,
    state_dict keys follow; ``focal`` has ``mean_over_classes`` and ``softmax_over_all`` on. Halves that were
    replaced, hooked, overridden or reconfigured apart run one after the other; ``explain`` says so.

    Args:
        lambda_dice: factor of the Dice term: a number of at least 0, else ValueError, a tensor of one value
            or a Parameter, which get their gradient from PyTorch. A plain attribute, no buffer: setting it or
            changing its value every step recompiles nothing, and a CUDA graph reads a tensor of its device
            anew at each replay.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    FUNCTION: ClassVar = functional.dice_focal_loss
    FACTORS = ("lambda_dice", "lambda_focal")
    PARTS: ClassVar = {"dice": DiceLoss, "focal": FocalLoss}
    OPTIONS: ClassVar = {
        "dice": DICE | {"ignore_index": "ignore_index", "dice_weight": "class_weight"},
        "focal": _FOCAL | {"weight": "class_weight"},
        "": same("to_onehot_y"),
    }
    ALIKE: ClassVar = dict.fromkeys(("include_background", "reduction", "ignore_index"), ("dice", "focal"))
    PLACES: ClassVar = {"weight": ("focal.class_weight", "dice.class_weight")}
    FIXED: ClassVar = {"dice": {"to_onehot_y": False, "log_loss": False}, "focal": {"to_onehot_y": False}}
    BESIDE: ClassVar = {"focal": _ON}
    lambda_dice: float | Tensor
    lambda_focal: float | Tensor

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
        gamma: float = 2.0,
        weight: checks.Weight = None,
        lambda_dice: float | Tensor = 1.0,
        lambda_focal: float | Tensor = 1.0,
        alpha: Alpha = None,
        *,
        use_softmax: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.dice: DiceLoss = part_of(DiceLoss, locals(), to_onehot_y=False)
        self.focal: FocalLoss = part_of(FocalLoss, locals(), to_onehot_y=False, **_ON)
        self.lambda_dice = lambda_dice
        self.lambda_focal = lambda_focal
        self.to_onehot_y = to_onehot_y

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.dice_focal_loss`` with the options of this module."""
        if (loss := self._planned(input, target, mask)) is not None:
            return loss
        reason, _ = self.bent()
        if reason:
            return self._apart(input, target, mask, reason)
        return functional.dice_focal_loss(input, target, mask=mask, **self._options())


@documented(functional.generalized_dice_focal_loss)
@remember("forward")
class GeneralizedDiceFocalLoss(_OverlapFocal):
    """Generalized Dice loss + focal loss from one pass: ``monai.losses.GeneralizedDiceFocalLoss``.

    Formula: :func:`dicekernels.functional.generalized_dice_focal_loss`. As ``DiceFocalLoss``, with the halves
    ``generalized_dice`` and ``focal``.

    Args:
        lambda_gdl: factor of the generalized Dice term: a number of at least 0, else ValueError, a tensor of
            one value or a Parameter, which get their gradient from PyTorch. A plain attribute, no buffer:
            setting it or changing its value every step recompiles nothing, and a CUDA graph reads a tensor of
            its device anew at each replay.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    FUNCTION: ClassVar = functional.generalized_dice_focal_loss
    FACTORS = ("lambda_gdl", "lambda_focal")
    PARTS: ClassVar = {"generalized_dice": GeneralizedDiceLoss, "focal": FocalLoss}
    OPTIONS: ClassVar = {
        "generalized_dice": SUMS | same("w_type", "soft_label", "ignore_index"),
        "focal": _FOCAL | {"weight": "class_weight"},
        "": {},
    }
    ALIKE: ClassVar = dict.fromkeys(
        ("include_background", "to_onehot_y", "reduction", "ignore_index"), ("generalized_dice", "focal")
    )
    BESIDE: ClassVar = {"focal": _ON}
    lambda_gdl: float | Tensor
    lambda_focal: float | Tensor

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        w_type: Literal["square", "simple", "uniform"] = "square",
        reduction: Literal["mean", "sum", "none"] = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: checks.Weight = None,
        lambda_gdl: float | Tensor = 1.0,
        lambda_focal: float | Tensor = 1.0,
        *,
        alpha: Alpha = None,
        use_softmax: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.generalized_dice: GeneralizedDiceLoss = part_of(GeneralizedDiceLoss, locals())
        self.focal: FocalLoss = part_of(FocalLoss, locals(), **_ON)
        self.lambda_gdl = lambda_gdl
        self.lambda_focal = lambda_focal

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.generalized_dice_focal_loss`` with the options of this module."""
        if (loss := self._planned(input, target, mask)) is not None:
            return loss
        reason, _ = self.bent()
        if reason:
            return self._apart(input, target, mask, reason)
        return functional.generalized_dice_focal_loss(input, target, mask=mask, **self._options())
