"""Modules of the losses of overlap sums alone. Conventions: ``dicekernels.modules``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import checks, functional
from ..arguments import documented
from ..overrides import overridden, remember
from ..prepare import OtherAct
from ..scripting import scriptable
from .base import Loss


class _OverlapLoss(Loss):
    """What Dice, generalized Dice and Tversky share: activation, one-hot, background, smoothing."""

    def __init__(
        self,
        include_background: bool,
        to_onehot_y: bool,
        sigmoid: bool,
        softmax: bool,
        other_act: OtherAct,
        reduction: str,
        smooth_nr: float,
        smooth_dr: float,
        batch: bool,
        soft_label: bool,
        ignore_index: int | None,
    ) -> None:
        checks.activation_options(sigmoid, softmax, other_act)
        super().__init__(reduction=checks.option("reduction", reduction, ("mean", "sum", "none")))
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.smooth_nr = checks.constant("smooth_nr", smooth_nr)
        self.smooth_dr = checks.constant("smooth_dr", smooth_dr)
        self.batch = batch
        self.soft_label = soft_label
        self.ignore_index = ignore_index

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this module."""
        return scriptable(self)

    def _options(self) -> dict[str, Any]:
        return {
            "include_background": self.include_background,
            "to_onehot_y": self.to_onehot_y,
            "sigmoid": self.sigmoid,
            "softmax": self.softmax,
            "other_act": self.other_act,
            "reduction": self.reduction,
            "smooth_nr": self.smooth_nr,
            "smooth_dr": self.smooth_dr,
            "batch": self.batch,
            "soft_label": self.soft_label,
            "ignore_index": self.ignore_index,
        }


@documented(functional.dice_loss)
@remember("forward")
class DiceLoss(_OverlapLoss):
    """1 - Dice score of each (sample, class): ``monai.losses.DiceLoss``, with ``log_loss``.

    Formula and source: :func:`dicekernels.functional.dice_loss`. state_dict: ``class_weight`` if a weight is
    given.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    PLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight": ("class_weight",)}

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
        super().__init__(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
            soft_label,
            ignore_index,
        )
        self.squared_pred = squared_pred
        self.jaccard = jaccard
        self.log_loss = log_loss
        self.register_buffer("class_weight", checks.as_weight(weight))
        self.class_weight: Tensor | None  # not in the class: TorchScript would read it there

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.dice_loss`` with the options of this module."""
        return functional.dice_loss(
            input,
            target,
            squared_pred=self.squared_pred,
            jaccard=self.jaccard,
            weight=self.class_weight,
            log_loss=self.log_loss,
            mask=mask,
            **self._options(),
        )


@documented(functional.generalized_dice_loss)
@remember("forward", "w_func")
class GeneralizedDiceLoss(_OverlapLoss):
    """Generalized Dice loss of each sample: ``monai.losses.GeneralizedDiceLoss``, with ``ignore_index``.

    Formula and source: :func:`dicekernels.functional.generalized_dice_loss`. A subclass may override
    ``w_func``.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

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
        super().__init__(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
            soft_label,
            ignore_index,
        )
        self.w_type: Literal["square", "simple", "uniform"] = checks.option(
            "w_type", w_type, ("square", "simple", "uniform")
        )

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.generalized_dice_loss`` with the options of this module."""
        w_func = self.w_func if "w_func" in overridden(self, GeneralizedDiceLoss) else None
        return functional.generalized_dice_loss(
            input, target, w_type=self.w_type, w_func=w_func, mask=mask, **self._options()
        )

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
class TverskyLoss(_OverlapLoss):
    """Tversky loss of each (sample, class): ``monai.losses.TverskyLoss``, with ``gamma``.

    Formula and source: :func:`dicekernels.functional.tversky_loss`.

    Args:
        gamma: exponent of the focal Tversky loss, max(1 - score, 0)**gamma of each term before the reduction;
            above 0, else the call is a ValueError. 1 is the plain Tversky loss.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

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
        super().__init__(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
            soft_label,
            ignore_index,
        )
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.tversky_loss`` with the options of this module."""
        return functional.tversky_loss(
            input,
            target,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            mask=mask,
            **self._options(),
        )


@documented(functional.mcc_loss)
@remember("forward")
class MCCLoss(Loss):
    """1 - Matthews' correlation coefficient: ``monai.losses.MCCLoss``, with ``ignore_index``.

    Formula and source: :func:`dicekernels.functional.mcc_loss`.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

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
        checks.activation_options(sigmoid, softmax, other_act)
        super().__init__(reduction=checks.option("reduction", reduction, ("mean", "sum", "none")))
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.smooth_nr = checks.constant("smooth_nr", smooth_nr)
        self.smooth_dr = checks.constant("smooth_dr", smooth_dr)
        self.batch = batch
        self.ignore_index = ignore_index

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this module."""
        return scriptable(self)

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.mcc_loss`` with the options of this module."""
        return functional.mcc_loss(
            input,
            target,
            include_background=self.include_background,
            to_onehot_y=self.to_onehot_y,
            sigmoid=self.sigmoid,
            softmax=self.softmax,
            other_act=self.other_act,
            reduction=self.reduction,
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
            batch=self.batch,
            ignore_index=self.ignore_index,
            mask=mask,
        )
