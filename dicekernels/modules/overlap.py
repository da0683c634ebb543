"""Modules of the losses of overlap sums alone. Conventions: ``dicekernels.modules``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import checks, functional
from ..arguments import documented
from ..overrides import overridden, remember
from .loss import Loss, same

ACTIVATION = same("sigmoid", "softmax", "other_act")
SUMS = same("include_background", "to_onehot_y", "reduction", "smooth_nr", "smooth_dr", "batch") | ACTIVATION
DICE = SUMS | same("squared_pred", "jaccard", "soft_label")


@documented(functional.dice_loss)
@remember("forward")
class DiceLoss(Loss):
    """1 - Dice score of each (sample, class): ``monai.losses.DiceLoss``, with ``log_loss``.

    Formula and source: :func:`dicekernels.functional.dice_loss`. state_dict: ``class_weight`` if a weight is
    given.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    FUNCTION: ClassVar[Any] = functional.dice_loss
    OPTIONS: ClassVar = {"": DICE | same("ignore_index", "log_loss") | {"weight": "class_weight"}}

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
        ignore_index: int | None = None,
        *,
        log_loss: bool = False,
    ) -> None:
        super().__init__()
        self._hold(locals())

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.dice_loss`` with the options of this module."""
        if (loss := self._planned(input, target, mask)) is not None:
            return loss
        return functional.dice_loss(input, target, mask=mask, **self._options())


@documented(functional.generalized_dice_loss)
@remember("forward", "w_func")
class GeneralizedDiceLoss(Loss):
    """Generalized Dice loss of each sample: ``monai.losses.GeneralizedDiceLoss``, with ``ignore_index``.

    Formula and source: :func:`dicekernels.functional.generalized_dice_loss`. A subclass may override
    ``w_func``.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    FUNCTION: ClassVar = functional.generalized_dice_loss
    OPTIONS: ClassVar = {"": SUMS | same("soft_label", "w_type", "ignore_index")}

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
        soft_label: bool = False,
        *,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self._hold(locals())

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.generalized_dice_loss`` with the options of this module."""
        if (loss := self._planned(input, target, mask)) is not None:
            return loss
        w_func = self.w_func if "w_func" in overridden(self, GeneralizedDiceLoss) else None
        return functional.generalized_dice_loss(input, target, w_func=w_func, mask=mask, **self._options())

    def w_func(self, grnd: Tensor) -> Tensor:
        """Class weights of the volumes sum g, float32 (B, K) or, with ``batch``, (K,).

        A subclass may override it, and only then it is called. An infinite weight becomes the largest finite
        one of its sample.
        """
        if self.w_type == "uniform":
            return torch.ones_like(grnd)
        return torch.reciprocal(grnd * grnd if self.w_type == "square" else grnd)


@documented(functional.tversky_loss)
@remember("forward")
class TverskyLoss(Loss):
    """Tversky loss of each (sample, class): ``monai.losses.TverskyLoss``, with ``gamma``.

    Formula and source: :func:`dicekernels.functional.tversky_loss`.

    Args:
        gamma: exponent of the focal Tversky loss, max(1 - score, 0)**gamma of each term before the reduction;
            above 0, else the call is a ValueError. 1 is the plain Tversky loss.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    FUNCTION: ClassVar = functional.tversky_loss
    OPTIONS: ClassVar = {"": SUMS | same("soft_label", "alpha", "beta", "gamma", "ignore_index")}

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: Literal["mean", "sum", "none"] = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
        *,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        self._hold(locals())

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.tversky_loss`` with the options of this module."""
        if (loss := self._planned(input, target, mask)) is not None:
            return loss
        return functional.tversky_loss(input, target, mask=mask, **self._options())


@documented(functional.mcc_loss)
@remember("forward")
class MCCLoss(Loss):
    """1 - Matthews' correlation coefficient: ``monai.losses.MCCLoss``, with ``ignore_index``.

    Formula and source: :func:`dicekernels.functional.mcc_loss`.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    FUNCTION: ClassVar = functional.mcc_loss
    OPTIONS: ClassVar = {"": SUMS | same("ignore_index")}

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        *,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self._hold(locals())

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.mcc_loss`` with the options of this module."""
        if (loss := self._planned(input, target, mask)) is not None:
            return loss
        return functional.mcc_loss(input, target, mask=mask, **self._options())
