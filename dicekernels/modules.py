"""The losses as modules: MONAI 1.6.1's constructors, attributes, state_dict keys and results.

Every argument after MONAI's last is an extra of ours, by keyword only. ``forward(input, target)`` is
MONAI's; its ``mask`` (B, 1, *S) of voxel weights is ours. Attributes may be changed at any time, the
next call follows them. Formulas and options: ``dicekernels.functional`` and docs/semantics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from . import checks, functional
from .prepare import OtherAct


def _moving_factor(name: str) -> property:
    """A float attribute that lives in a 0-dim buffer, so that a warm-up recompiles nothing."""

    def read(self: nn.Module) -> float:
        return float(self.get_buffer(f"_{name}"))

    def write(self: nn.Module, value: float) -> None:
        checks.non_negative(name, float(value))
        self.get_buffer(f"_{name}").fill_(value)

    return property(read, write, doc=f"Factor of its term; at least 0. Kept in the buffer ``_{name}``.")


class _OverlapLoss(_Loss):
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
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch
        self.soft_label = soft_label
        self.ignore_index = ignore_index

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


class DiceLoss(_OverlapLoss):
    """``monai.losses.DiceLoss``; ``log_loss`` is -log(score) in place of 1 - score.

    state_dict: ``class_weight`` if a weight is given.

    Raises:
        TypeError, ValueError: as MONAI, for options that do not fit together.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
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


class GeneralizedDiceLoss(_OverlapLoss):
    """``monai.losses.GeneralizedDiceLoss``, with ``ignore_index``.

    Raises:
        TypeError, ValueError: as MONAI, for options that do not fit together.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        w_type: str = "square",
        reduction: str = "mean",
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
        self.w_type = checks.option("w_type", w_type, ("square", "simple", "uniform"))

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.generalized_dice_loss`` with the options of this module."""
        return functional.generalized_dice_loss(
            input, target, w_type=self.w_type, mask=mask, **self._options()
        )


class TverskyLoss(_OverlapLoss):
    """``monai.losses.TverskyLoss``; ``gamma`` makes it the focal Tversky loss.

    ``alpha`` weighs false positives, ``beta`` false negatives.

    Raises:
        TypeError, ValueError: as MONAI, for options that do not fit together.
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
        reduction: str = "mean",
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


class DiceCELoss(_Loss):
    """``monai.losses.DiceCELoss`` from one pass over the logits.

    The options of its halves live where MONAI has them, in ``dice``, ``cross_entropy`` and
    ``binary_cross_entropy``; state_dict keys follow. ``lambda_dice`` and ``lambda_ce`` may change
    every step. Extras: ``ignore_index``, ``soft_label``, ``ce_include_background``
    (``functional.dice_ce_loss``), and ``weight`` as a sequence.

    Raises:
        TypeError, ValueError: as MONAI, for options that do not fit together.
    """

    lambda_dice = _moving_factor("lambda_dice")
    lambda_ce = _moving_factor("lambda_ce")

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: checks.Weight = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int | None = None,
        soft_label: bool = False,
        ce_include_background: bool = True,
    ) -> None:
        reduction = checks.option("reduction", reduction, ("mean", "sum"))
        super().__init__()
        ce_weight = checks.as_weight(weight)
        dice_weight = ce_weight
        if ce_weight is not None and ce_weight.ndim and not include_background:
            dice_weight = ce_weight[1:]
        self.dice = DiceLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=dice_weight,
            soft_label=soft_label,
            ignore_index=ignore_index,
        )
        self.cross_entropy = nn.CrossEntropyLoss(
            weight=ce_weight, reduction=reduction, label_smoothing=label_smoothing
        )
        self.binary_cross_entropy = nn.BCEWithLogitsLoss(pos_weight=ce_weight, reduction=reduction)
        self.ce_include_background = ce_include_background
        for name, value in (("lambda_dice", lambda_dice), ("lambda_ce", lambda_ce)):
            checks.non_negative(name, value)
            self.register_buffer(f"_{name}", torch.tensor(value, dtype=torch.float64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiceCELoss:
        """As in Module, but ``half()`` and its kin leave the factors in float64."""
        factors = {name: self.get_buffer(name).to("cpu") for name in ("_lambda_dice", "_lambda_ce")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in factors.items():
            self._buffers[name] = value.to(self.get_buffer(name).device)
        return self

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.dice_ce_loss`` with the options of this module."""
        dice = self.dice
        weight = self.cross_entropy.weight
        if isinstance(input, Tensor) and input.ndim > 1 and input.shape[1] == 1:
            weight = self.binary_cross_entropy.pos_weight
        return functional.dice_ce_loss(
            input,
            target,
            include_background=dice.include_background,
            to_onehot_y=dice.to_onehot_y,
            sigmoid=dice.sigmoid,
            softmax=dice.softmax,
            other_act=dice.other_act,
            squared_pred=dice.squared_pred,
            jaccard=dice.jaccard,
            reduction=dice.reduction,
            smooth_nr=dice.smooth_nr,
            smooth_dr=dice.smooth_dr,
            batch=dice.batch,
            weight=weight,
            dice_weight=dice.class_weight,
            lambda_dice=self.get_buffer("_lambda_dice"),
            lambda_ce=self.get_buffer("_lambda_ce"),
            label_smoothing=self.cross_entropy.label_smoothing,
            ignore_index=dice.ignore_index,
            soft_label=dice.soft_label,
            ce_include_background=self.ce_include_background,
            mask=mask,
        )
