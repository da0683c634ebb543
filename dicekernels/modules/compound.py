"""Losses of two halves from one pass: the modules that add a voxel term to an overlap loss.

Conventions: ``dicekernels.modules``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from .. import checks, functional
from ..arguments import documented
from ..call import record_step
from ..overrides import overridden, remember
from .halves import TwoHalves, bent
from .overlap import DiceLoss

for _half in (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss):
    remember("forward")(_half)


@documented(functional.dice_ce_loss)
@remember("forward", "ce", "bce")
class DiceCELoss(TwoHalves):
    """Dice loss + cross entropy from one pass over the logits: ``monai.losses.DiceCELoss``.

    Formula: :func:`dicekernels.functional.dice_ce_loss`. The options of the halves live where MONAI has them,
    in ``dice``, ``cross_entropy`` and ``binary_cross_entropy``; state_dict keys follow. What the one pass
    cannot express (another module in their place, hooks on them, an overridden ``ce``, ``bce`` or ``forward``
    of a half, reductions that differ, an ``ignore_index`` of one half) makes it the sum of the two halves, as
    in MONAI; ``explain`` says so.

    Args:
        lambda_dice: factor of the Dice term: a number of at least 0, else ValueError, a tensor of one value
            or a Parameter, which get their gradient from PyTorch. A plain attribute, no buffer: setting it or
            changing its value every step recompiles nothing, and a CUDA graph reads a tensor of its device
            anew at each replay.
        lambda_ce: factor of the cross entropy, as ``lambda_dice``.

    Raises:
        TypeError, ValueError: options that do not fit together, as the arguments say and as in MONAI.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ("lambda_dice", "lambda_ce")
    PLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "reduction": ("dice.reduction", "cross_entropy.reduction", "binary_cross_entropy.reduction"),
        "weight": ("cross_entropy.weight", "binary_cross_entropy.pos_weight", "dice.class_weight"),
        "ignore_index": ("ignore_index", "dice.ignore_index"),
    }
    BESIDE: ClassVar[Mapping[str, Any]] = {
        "dice.log_loss": False,
        "cross_entropy.ignore_index": -100,
        "binary_cross_entropy.weight": None,
    }
    PARTS: ClassVar[Mapping[str, type[nn.Module]]] = {
        "dice": DiceLoss,
        "cross_entropy": nn.CrossEntropyLoss,
        "binary_cross_entropy": nn.BCEWithLogitsLoss,
    }
    lambda_dice: float | Tensor
    lambda_ce: float | Tensor

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: checks.Weight = None,
        lambda_dice: float | Tensor = 1.0,
        lambda_ce: float | Tensor = 1.0,
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
        self.ignore_index = ignore_index
        self.ce_include_background = ce_include_background
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce

    def ce(self, input: Tensor, target: Tensor) -> Tensor:
        """The cross entropy half alone, in PyTorch; a subclass may override it."""
        if input.shape[1] != target.shape[1] and target.shape[1] == 1:
            target = target.squeeze(1).long()
        elif not target.is_floating_point():
            target = target.to(input.dtype)
        loss: Tensor = self.cross_entropy(input, target)
        return loss

    def bce(self, input: Tensor, target: Tensor) -> Tensor:
        """The binary half for one channel alone, in PyTorch; a subclass may override it."""
        if not target.is_floating_point():
            target = target.to(input.dtype)
        loss: Tensor = self.binary_cross_entropy(input, target)
        return loss

    def apart_reason(self, binary: bool) -> str:
        halves = (
            (self.dice, DiceLoss),
            (self.cross_entropy, nn.CrossEntropyLoss),
            (self.binary_cross_entropy, nn.BCEWithLogitsLoss),
        )
        for half, kind in halves:
            reason = bent(half, kind)
            if reason:
                return reason
        for name in overridden(self, DiceCELoss):
            if name != "forward":
                return f"{name} is overridden"
        voxel: nn.CrossEntropyLoss | nn.BCEWithLogitsLoss = (
            self.binary_cross_entropy if binary else self.cross_entropy
        )
        if self.dice.reduction != voxel.reduction:
            return "the reductions of the halves differ"
        if self.dice.ignore_index != self.ignore_index or self.dice.log_loss:
            return "the Dice half has an option of its own"
        if binary and self.binary_cross_entropy.weight is not None:
            return "the binary half has a weight of its own"
        if not binary and self.cross_entropy.ignore_index != -100:
            return "the cross entropy half has an ignore_index of its own"
        return ""

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.dice_ce_loss`` with the options of this module."""
        binary = checks.single_channel(input)
        reason = self.apart_reason(binary)
        if reason:
            return self._apart(input, target, mask, binary, reason)
        dice = self.dice
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
            reduction=checks.option("reduction", dice.reduction, ("mean", "sum")),
            smooth_nr=dice.smooth_nr,
            smooth_dr=dice.smooth_dr,
            batch=dice.batch,
            weight=self.binary_cross_entropy.pos_weight if binary else self.cross_entropy.weight,
            dice_weight=dice.class_weight,
            lambda_dice=self.factor("lambda_dice"),
            lambda_ce=self.factor("lambda_ce"),
            label_smoothing=self.cross_entropy.label_smoothing,
            ignore_index=self.ignore_index,
            soft_label=dice.soft_label,
            ce_include_background=self.ce_include_background,
            mask=mask,
        )

    def _apart(self, input: Tensor, target: Tensor, mask: Tensor | None, binary: bool, reason: str) -> Tensor:
        if mask is not None or self.ignore_index is not None or not self.ce_include_background:
            raise RuntimeError(
                f"DiceCELoss: {reason}, so its halves run apart; mask, ignore_index and "
                "ce_include_background need them in one pass. Undo the change or drop the option"
            )
        checks.tensors(input, target, mask)
        checks.dice_ce_shapes(input, target)
        record_step(f"two passes, the cross entropy in PyTorch: {reason}", "eager", reason, whole=True)
        voxel = self.bce(input, target) if binary else self.ce(input, target)
        total: Tensor = self.lambda_dice * self.dice(input, target) + self.lambda_ce * voxel
        return total
