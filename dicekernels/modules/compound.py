"""Losses of two halves from one pass: the modules that add a voxel term to an overlap loss.

Conventions: ``dicekernels.modules``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor, nn

from .. import checks, functional
from ..arguments import documented
from ..overrides import remember
from .halves import TwoHalves
from .loss import part_of, same
from .overlap import DICE, DiceLoss

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

    FUNCTION: ClassVar = functional.dice_ce_loss
    FACTORS = ("lambda_dice", "lambda_ce")
    PARTS: ClassVar = {
        "dice": DiceLoss,
        "cross_entropy": nn.CrossEntropyLoss,
        "binary_cross_entropy": nn.BCEWithLogitsLoss,
    }
    OPTIONS: ClassVar = {
        "dice": DICE | {"dice_weight": "class_weight"},
        "cross_entropy": same("weight", "label_smoothing"),
        "": same("ignore_index", "ce_include_background"),
    }
    ALIKE: ClassVar = {
        "reduction": ("dice", "cross_entropy", "binary_cross_entropy"),
        "ignore_index": ("", "dice"),
    }
    PLACES: ClassVar = {
        "weight": ("cross_entropy.weight", "binary_cross_entropy.pos_weight", "dice.class_weight")
    }
    FIXED: ClassVar = {
        "dice": {"log_loss": False},
        "cross_entropy": {"ignore_index": -100},
        "binary_cross_entropy": {"weight": None},
    }
    SCRIPTED: ClassVar = {
        "weight": "self.binary_cross_entropy.pos_weight if input.shape[1] == 1 else self.cross_entropy.weight"
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
        self.dice: DiceLoss = part_of(DiceLoss, locals(), weight=dice_weight)
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

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.dice_ce_loss`` with the options of this module."""
        if (loss := self._planned(input, target, mask)) is not None:
            return loss
        binary = checks.single_channel(input)
        reason, _ = self.bent("cross_entropy" if binary else "binary_cross_entropy")
        if reason:
            return self._apart(input, target, mask, binary, reason)
        options = self._options()
        checks.option("reduction", options["reduction"], ("mean", "sum"))
        if binary:
            options["weight"] = self.binary_cross_entropy.pos_weight
        return functional.dice_ce_loss(input, target, mask=mask, **options)

    def _apart(self, input: Tensor, target: Tensor, mask: Tensor | None, binary: bool, reason: str) -> Tensor:
        if mask is not None or self.ignore_index is not None or not self.ce_include_background:
            raise RuntimeError(
                f"DiceCELoss: {reason}, so its halves run apart; mask, ignore_index and "
                "ce_include_background need them in one pass. Undo the change or drop the option"
            )
        self._begin_apart(input, target, mask, reason, pytorch=True)
        voxel = self.bce(input, target) if binary else self.ce(input, target)
        total: Tensor = self.lambda_dice * self.dice(input, target) + self.lambda_ce * voxel
        return total
