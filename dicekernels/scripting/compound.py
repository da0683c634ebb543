"""Twins of the losses of two halves: each half with the options it has, then the weighted sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..overrides import overridden
from . import rows
from .focal import Focal
from .overlap import Dice, GeneralizedDice
from .twin import Twin, refuse

T = TypeVar("T", bound="Halves")
DICE, FOCAL = "dicekernels.modules.overlap.DiceLoss", "dicekernels.modules.focal.FocalLoss"


class Halves(Twin):
    """A twin whose lambdas are numbers.

    Attributes:
        KINDS: name of a half -> the only class that it may have.
    """

    KINDS: ClassVar[dict[str, str]] = {}

    @classmethod
    def of(cls: type[T], loss: nn.Module, **changed: Any) -> T:
        factors: Any = loss.FACTORS
        for name in factors:
            value = getattr(loss, name)
            learned = isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.requires_grad)
            refuse(loss, f"{name} requires a gradient" if learned else "")
            changed[name] = float(value)
        for name, kind in cls.KINDS.items():
            half = getattr(loss, name)
            other = f"{type(half).__module__}.{type(half).__qualname__}"
            refuse(loss, f"its {name} is {other}" if other != kind else "")
            refuse(loss, f"its {name} has hooks" if checks.hooked(half) else "")
            for method in overridden(half, type(half)):
                refuse(loss, f"{method} of its {name} is overridden")
        return super().of(loss, **changed)


class DiceCE(Halves):
    """``DiceCELoss``."""

    KINDS: ClassVar[dict[str, str]] = {
        "dice": DICE,
        "cross_entropy": "torch.nn.modules.loss.CrossEntropyLoss",
        "binary_cross_entropy": "torch.nn.modules.loss.BCEWithLogitsLoss",
    }

    if TYPE_CHECKING:
        dice: Dice
        cross_entropy: nn.CrossEntropyLoss
        binary_cross_entropy: nn.BCEWithLogitsLoss
        ignore_index: int | None
        ce_include_background: bool
        lambda_dice: float
        lambda_ce: float

    @classmethod
    def of(cls, loss: nn.Module, **changed: Any) -> DiceCE:
        twin = super().of(loss, **changed)
        own = twin.cross_entropy.ignore_index != -100 or twin.binary_cross_entropy.weight is not None
        refuse(loss, "its cross entropy has an option that the loss has not" if own else "")
        return twin

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``DiceCELoss.forward``."""
        rows.check_two_halves(input, target)
        if self.cross_entropy.weight is not None and input.shape[1] > 1:
            rows.ce_weight(self.cross_entropy.weight, input.shape[1])
        acted = self.dice.acted(input)
        one_hot = self.dice.one_hot(input, acted, self.dice.to_onehot_y)
        dice = self.dice.loss(acted, target, mask, one_hot)
        total = self.lambda_dice * dice + self.lambda_ce * self.voxels(input, target, mask, one_hot)
        dtype = torch.promote_types(self.dice.rounded(dice, acted, target, one_hot).dtype, input.dtype)
        weight = self.cross_entropy.weight
        if weight is not None and not one_hot and input.shape[1] > 1:
            dtype = torch.promote_types(dtype, weight.dtype)  # as torch's product with it
        return total.to(dtype)

    def voxels(self, input: Tensor, target: Tensor, mask: Tensor | None, one_hot: bool) -> Tensor:
        """The cross entropy, or of one channel the binary one."""
        z, g, valid, weight = rows.inputs(input, target, mask, one_hot, self.ignore_index)
        m = rows.both(valid, weight)
        ones = torch.ones_like(z[:, :1])
        voxels = rows.voxel_sum(ones if m is None else m.expand_as(ones)).sum()
        if z.shape[1] == 1:
            pos, neg = rows.times(m, g * -F.logsigmoid(z)), rows.times(m, (1 - g) * -F.logsigmoid(-z))
            total, pos_weight = rows.voxel_sum(pos).sum(), self.binary_cross_entropy.pos_weight
            if pos_weight is not None:
                total = total * pos_weight.to(total).reshape(())
            return self.mean_of(
                total + rows.voxel_sum(neg).sum(), voxels, self.binary_cross_entropy.reduction
            )
        surprise = rows.quiet(-F.log_softmax(z, 1), m)
        # A logit of minus infinity rules its class out: 0, and not 0 times infinity, in the voxels of others.
        picked = torch.where(g == 0, 0, surprise) if one_hot else surprise
        pos = rows.voxel_sum(rows.times(m, g * picked)).sum(0)
        w = torch.ones_like(pos)
        if self.cross_entropy.weight is not None:
            w = rows.ce_weight(self.cross_entropy.weight, z.shape[1]).to(w)
        if not self.ce_include_background:
            w = torch.where(torch.arange(w.shape[0], device=w.device) == 0, 0, w)
        smoothing = float(self.cross_entropy.label_smoothing)
        total = (1 - smoothing) * (w * pos).sum()
        if smoothing != 0.0:
            spread = rows.voxel_sum(rows.times(m, surprise)).sum(0)
            total = total + smoothing / z.shape[1] * (w * spread).sum()
        # torch divides by the class weights for label maps, by the voxels for probabilities.
        count = (w * rows.voxel_sum(rows.times(m, g)).sum(0)).sum() if one_hot else voxels
        return self.mean_of(total, count, self.cross_entropy.reduction)

    def mean_of(self, total: Tensor, count: Tensor, reduction: str) -> Tensor:
        if reduction == "mean":
            return rows.quotient(total, count)
        if reduction != "sum":
            raise ValueError(f"reduction: got {reduction}, expected 'mean' or 'sum'")
        return total


class DiceFocal(Halves):
    """``DiceFocalLoss``."""

    KINDS: ClassVar[dict[str, str]] = {"dice": DICE, "focal": FOCAL}

    if TYPE_CHECKING:
        dice: Dice
        focal: Focal
        to_onehot_y: bool
        lambda_dice: float
        lambda_focal: float

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``DiceFocalLoss.forward``."""
        rows.check_two_halves(input, target)
        acted = self.dice.acted(input)
        one_hot = self.dice.one_hot(input, acted, self.to_onehot_y)
        dice = self.dice.loss(acted, target, mask, one_hot)
        rows.warn_single_channel(input.shape[1], False, False, self.focal.include_background)
        total = self.lambda_dice * dice + self.lambda_focal * self.focal.loss(input, target, mask, one_hot)
        dtype = self.dice.rounded(dice, acted, target, one_hot).dtype
        return total.to(torch.promote_types(dtype, torch.float32))  # MONAI's focal half is float32


class GeneralizedDiceFocal(Halves):
    """``GeneralizedDiceFocalLoss``."""

    KINDS: ClassVar[dict[str, str]] = {
        "generalized_dice": "dicekernels.modules.overlap.GeneralizedDiceLoss",
        "focal": FOCAL,
    }

    if TYPE_CHECKING:
        generalized_dice: GeneralizedDice
        focal: Focal
        lambda_gdl: float
        lambda_focal: float

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``GeneralizedDiceFocalLoss.forward``."""
        rows.check_two_halves(input, target)
        overlap, focal, channels = self.generalized_dice, self.focal, input.shape[1]
        acted = overlap.acted(input)
        one_hot = overlap.one_hot(input, acted, overlap.to_onehot_y)
        gdl = overlap.loss(acted, target, mask, one_hot)
        rows.warn_single_channel(channels, False, focal.to_onehot_y, focal.include_background)
        voxel = focal.loss(input, target, mask, focal.to_onehot_y and channels > 1)
        total = self.lambda_gdl * gdl + self.lambda_focal * voxel
        dtype = overlap.rounded(gdl, acted, target, one_hot).dtype
        return total.to(torch.promote_types(dtype, torch.float32))  # MONAI's focal half is float32
