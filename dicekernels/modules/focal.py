"""Modules of the focal loss, alone and beside an overlap loss. Conventions: ``dicekernels.modules``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from .. import checks, functional
from ..arguments import documented
from ..call import record_step
from ..overrides import remember
from ..prepare import dense_labels
from ..scripting import scriptable
from ..terms import Alpha
from .base import Loss
from .halves import TwoHalves, bent
from .overlap import DiceLoss, GeneralizedDiceLoss


@documented(functional.focal_loss)
@remember("forward")
class FocalLoss(Loss):
    """Focal loss of each voxel and class, in float32 for every dtype: ``monai.losses.FocalLoss``.

    Formula and source: :func:`dicekernels.functional.focal_loss`. state_dict: ``class_weight`` if a weight is
    given.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    PLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight": ("class_weight",)}

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
        super().__init__(reduction=checks.option("reduction", reduction, ("mean", "sum", "none")))
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.gamma = gamma
        self.weight = weight
        self.use_softmax = use_softmax
        self.alpha: float | Tensor | None = None
        if alpha is not None:
            self.alpha = float(alpha) if isinstance(alpha, (float, int)) else checks.as_weight(alpha, "alpha")
        self.register_buffer("class_weight", checks.as_weight(weight))
        self.class_weight: Tensor | None  # not in the class: TorchScript would read it there
        self.ignore_index = ignore_index
        self.mean_over_classes = mean_over_classes
        self.softmax_over_all = softmax_over_all

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this module."""
        return scriptable(self)

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.focal_loss`` with the options of this module."""
        return functional.focal_loss(
            input,
            target,
            include_background=self.include_background,
            to_onehot_y=self.to_onehot_y,
            gamma=self.gamma,
            alpha=self.alpha,
            weight=self.class_weight,
            reduction=self.reduction,
            use_softmax=self.use_softmax,
            ignore_index=self.ignore_index,
            mean_over_classes=self.mean_over_classes,
            softmax_over_all=self.softmax_over_all,
            mask=mask,
        )


def _apart_reason(overlap: DiceLoss | GeneralizedDiceLoss, kind: type[nn.Module], focal: FocalLoss) -> str:
    """Why the halves cannot share one pass, or ""."""
    reason = bent(overlap, kind) or bent(focal, FocalLoss)
    if reason:
        return reason
    if overlap.reduction != focal.reduction:
        return "the reductions of the halves differ"
    for name in ("include_background", "to_onehot_y", "ignore_index"):
        if getattr(overlap, name) != getattr(focal, name):
            return f"{name} of the halves differs"
    if isinstance(overlap, DiceLoss) and overlap.log_loss:
        return "the Dice half has an option of its own"
    return ""


@documented(functional.dice_focal_loss)
@remember("forward")
class DiceFocalLoss(TwoHalves):
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

    FACTORS: ClassVar[tuple[str, ...]] = ("lambda_dice", "lambda_focal")
    PLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "to_onehot_y": ("to_onehot_y",),
        "reduction": ("dice.reduction", "focal.reduction"),
        "weight": ("focal.class_weight", "dice.class_weight"),
    }
    BESIDE: ClassVar[Mapping[str, Any]] = {
        "dice.to_onehot_y": False,
        "dice.log_loss": False,
        "focal.to_onehot_y": False,
        "focal.mean_over_classes": True,
        "focal.softmax_over_all": True,
    }
    PARTS: ClassVar[Mapping[str, type[nn.Module]]] = {"dice": DiceLoss, "focal": FocalLoss}
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
        self.dice = DiceLoss(
            include_background=include_background,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            ignore_index=ignore_index,
        )
        self.focal = FocalLoss(
            include_background=include_background,
            gamma=gamma,
            alpha=alpha,
            weight=weight,
            reduction=reduction,
            use_softmax=use_softmax,
            ignore_index=ignore_index,
            mean_over_classes=True,
            softmax_over_all=True,
        )
        self.lambda_dice = lambda_dice
        self.lambda_focal = lambda_focal
        self.to_onehot_y = to_onehot_y

    def apart_reason(self, binary: bool) -> str:
        reason = _apart_reason(self.dice, DiceLoss, self.focal)
        return reason or ("a half has an option of its own" if self.dice.to_onehot_y else "")

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.dice_focal_loss`` with the options of this module."""
        dice, focal = self.dice, self.focal
        reason = self.apart_reason(False)
        if reason:
            checks.tensors(input, target, mask)
            checks.dice_ce_shapes(input, target)
            record_step(f"two passes: {reason}", reason=reason)
            if self.to_onehot_y:
                target = dense_labels(target, input, getattr(dice, "ignore_index", None))
            more = {} if mask is None else {"mask": mask}
            total: Tensor = self.lambda_dice * dice(input, target, **more)
            total = total + self.lambda_focal * focal(input, target, **more)
            return total
        return functional.dice_focal_loss(
            input,
            target,
            include_background=dice.include_background,
            to_onehot_y=self.to_onehot_y,
            sigmoid=dice.sigmoid,
            softmax=dice.softmax,
            other_act=dice.other_act,
            squared_pred=dice.squared_pred,
            jaccard=dice.jaccard,
            reduction=dice.reduction,
            smooth_nr=dice.smooth_nr,
            smooth_dr=dice.smooth_dr,
            batch=dice.batch,
            gamma=focal.gamma,
            weight=focal.class_weight,
            dice_weight=dice.class_weight,
            lambda_dice=self.factor("lambda_dice"),
            lambda_focal=self.factor("lambda_focal"),
            alpha=focal.alpha,
            use_softmax=focal.use_softmax,
            soft_label=dice.soft_label,
            ignore_index=dice.ignore_index,
            mean_over_classes=focal.mean_over_classes,
            softmax_over_all=focal.softmax_over_all,
            mask=mask,
        )


@documented(functional.generalized_dice_focal_loss)
@remember("forward")
class GeneralizedDiceFocalLoss(TwoHalves):
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

    FACTORS: ClassVar[tuple[str, ...]] = ("lambda_gdl", "lambda_focal")
    PLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "reduction": ("generalized_dice.reduction", "focal.reduction"),
        "weight": ("focal.class_weight",),
    }
    BESIDE: ClassVar[Mapping[str, Any]] = {"focal.mean_over_classes": True, "focal.softmax_over_all": True}
    PARTS: ClassVar[Mapping[str, type[nn.Module]]] = {
        "generalized_dice": GeneralizedDiceLoss,
        "focal": FocalLoss,
    }
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
        self.generalized_dice = GeneralizedDiceLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            w_type=w_type,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            ignore_index=ignore_index,
        )
        self.focal = FocalLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            gamma=gamma,
            alpha=alpha,
            weight=weight,
            reduction=reduction,
            use_softmax=use_softmax,
            ignore_index=ignore_index,
            mean_over_classes=True,
            softmax_over_all=True,
        )
        self.lambda_gdl = lambda_gdl
        self.lambda_focal = lambda_focal

    def apart_reason(self, binary: bool) -> str:
        return _apart_reason(self.generalized_dice, GeneralizedDiceLoss, self.focal)

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.generalized_dice_focal_loss`` with the options of this module."""
        gdl, focal = self.generalized_dice, self.focal
        reason = self.apart_reason(False)
        if reason:
            checks.tensors(input, target, mask)
            checks.dice_ce_shapes(input, target)
            record_step(f"two passes: {reason}", reason=reason)
            more = {} if mask is None else {"mask": mask}
            total: Tensor = self.lambda_gdl * gdl(input, target, **more)
            total = total + self.lambda_focal * focal(input, target, **more)
            return total
        return functional.generalized_dice_focal_loss(
            input,
            target,
            include_background=gdl.include_background,
            to_onehot_y=gdl.to_onehot_y,
            sigmoid=gdl.sigmoid,
            softmax=gdl.softmax,
            other_act=gdl.other_act,
            w_type=gdl.w_type,
            reduction=gdl.reduction,
            smooth_nr=gdl.smooth_nr,
            smooth_dr=gdl.smooth_dr,
            batch=gdl.batch,
            gamma=focal.gamma,
            weight=focal.class_weight,
            lambda_gdl=self.factor("lambda_gdl"),
            lambda_focal=self.factor("lambda_focal"),
            alpha=focal.alpha,
            use_softmax=focal.use_softmax,
            soft_label=gdl.soft_label,
            ignore_index=gdl.ignore_index,
            mean_over_classes=focal.mean_over_classes,
            softmax_over_all=focal.softmax_over_all,
            mask=mask,
        )
