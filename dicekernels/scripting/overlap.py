"""Twins of the losses of overlap sums alone.

Dice and generalized Dice have a method ``loss`` beside ``forward``, for the compound twins: those decide on
the one-hot target, and round the result to its dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import rows
from .twin import Twin


class OverlapTwin(Twin):
    """Activation and sums of the twins below."""

    if TYPE_CHECKING:
        include_background: bool
        to_onehot_y: bool
        sigmoid: bool
        softmax: bool
        reduction: str
        smooth_nr: float
        smooth_dr: float
        batch: bool
        ignore_index: int | None

        def other_act(self, x: Tensor) -> Tensor: ...

    def acted(self, input: Tensor) -> Tensor:
        """The logits as ``other_act`` leaves them; it sees them in their own dtype."""
        if self.has_act:
            return self.other_act(input)
        return input

    def one_hot(self, input: Tensor, acted: Tensor, to_onehot_y: bool) -> bool:
        """Whether the target is to become one-hot, after the checks and warnings of the options."""
        return self.checked_one_hot(input, acted, self.softmax, to_onehot_y)

    def checked_one_hot(self, input: Tensor, acted: Tensor, softmax: bool, to_onehot_y: bool) -> bool:
        channels = input.shape[1]
        rows.warn_single_channel(channels, softmax, to_onehot_y, self.include_background)
        if softmax and channels > 1 and not input.is_floating_point():
            raise NotImplementedError(
                "logits: expected a floating dtype for softmax=True; use logits.float()"
            )
        if to_onehot_y and channels > 1 and acted.shape[1] != channels:
            raise AssertionError("ground truth has different shape: other_act changes the number of channels")
        return to_onehot_y and channels > 1

    def probabilities(self, z: Tensor) -> Tensor:
        if self.sigmoid:
            return torch.sigmoid(z)
        if self.softmax and z.shape[1] > 1:
            return torch.softmax(z, 1)
        return z

    def sums(
        self, acted: Tensor, target: Tensor, mask: Tensor | None, one_hot: bool, overlap: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """I, FP, FN, G of every channel, (B, C)."""
        z, g, valid, weight = rows.inputs(acted, target, mask, one_hot, self.ignore_index)
        return rows.overlap_rows(self.probabilities(z), g, valid, weight, overlap)

    def kept(self, row: Tensor, acted: Tensor) -> Tensor:
        """A row without the background, summed over what ``batch`` says."""
        return rows.kept(row, self.include_background, self.batch, acted.ndim == 2)

    def rounded(self, loss: Tensor, acted: Tensor, target: Tensor, one_hot: bool) -> Tensor:
        """In the dtype that torch's promotion gives MONAI's formula."""
        return loss.to(rows.loss_dtype(acted, target, one_hot, self.ignore_index))


class Dice(OverlapTwin):
    """``DiceLoss``."""

    if TYPE_CHECKING:
        squared_pred: bool
        jaccard: bool
        soft_label: bool
        log_loss: bool
        class_weight: Tensor | None

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``DiceLoss.forward``."""
        acted = self.acted(input)
        one_hot = self.one_hot(input, acted, self.to_onehot_y)
        return self.rounded(self.loss(acted, target, mask, one_hot), acted, target, one_hot)

    def loss(self, acted: Tensor, target: Tensor, mask: Tensor | None, one_hot: bool) -> Tensor:
        """In float64."""
        overlap = "squared" if self.squared_pred else "min" if self.soft_label else "product"
        return self.finished(self.sums(acted, target, mask, one_hot, overlap), acted)

    def finished(self, sums: tuple[Tensor, Tensor, Tensor, Tensor], acted: Tensor) -> Tensor:
        """From I, FP, FN, G (B, C) to the loss."""
        hit, fp, fn = self.kept(sums[0], acted), self.kept(sums[1], acted), self.kept(sums[2], acted)
        wrong = (2.0 if self.jaccard else 1.0) * (fp + fn)
        if self.log_loss:
            score = (2 * hit + self.smooth_nr) / (2 * hit + wrong + self.smooth_dr)
            loss = -torch.log(score.clamp(min=1e-7))
        else:
            loss = rows.one_minus_ratio(2 * hit, wrong, self.smooth_nr, self.smooth_dr)
        classes = acted.shape[1] - (0 if self.include_background or acted.shape[1] == 1 else 1)
        if self.class_weight is not None and classes != 1:
            loss = loss * rows.class_weight(self.class_weight, classes, acted.shape[1] - classes).to(loss)
        return rows.reduce(loss, self.reduction, acted.ndim - 2)


class GeneralizedDice(OverlapTwin):
    """``GeneralizedDiceLoss``."""

    if TYPE_CHECKING:
        soft_label: bool
        w_type: str

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``GeneralizedDiceLoss.forward``."""
        acted = self.acted(input)
        one_hot = self.one_hot(input, acted, self.to_onehot_y)
        loss = self.loss(acted, target, mask, one_hot)
        dtype = self.rounded(loss, acted, target, one_hot).dtype
        return loss.to(torch.promote_types(dtype, torch.float32))  # MONAI's weights are float32

    def loss(self, acted: Tensor, target: Tensor, mask: Tensor | None, one_hot: bool) -> Tensor:
        """In float64."""
        overlap = "min" if self.soft_label else "product"
        hit, fp, fn, volume = self.sums(acted, target, mask, one_hot, overlap)
        hit, fp, fn = self.kept(hit, acted), self.kept(fp, acted), self.kept(fn, acted)
        w = self.class_weights(self.kept(volume, acted))
        classes = 0 if self.batch else 1
        hit = (w * 2 * hit).sum(classes, keepdim=True)
        wrong = (w * (fp + fn)).sum(classes, keepdim=True)
        loss = rows.one_minus_ratio(hit, wrong, self.smooth_nr, self.smooth_dr)
        return rows.reduce(loss, self.reduction, acted.ndim - 2)

    def class_weights(self, volume: Tensor) -> Tensor:
        """Float32 decides which weights are infinite; they become the largest finite one."""
        if self.w_type == "uniform":
            return torch.ones_like(volume)
        power = 2 if self.w_type == "square" else 1
        volume32 = volume.detach().float()
        infinite = torch.isinf(1 / (volume32 * volume32 if power == 2 else volume32))
        w = torch.where(infinite, 0, 1 / torch.where(infinite, 1, volume) ** power)
        largest = w.max() if self.batch else w.max(1, keepdim=True)[0]
        return torch.where(infinite, largest, w)


class Tversky(OverlapTwin):
    """``TverskyLoss``."""

    if TYPE_CHECKING:
        soft_label: bool
        alpha: float
        beta: float
        gamma: float

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``TverskyLoss.forward``."""
        acted = self.acted(input)
        one_hot = self.one_hot(input, acted, self.to_onehot_y)
        overlap = "min" if self.soft_label else "product"
        hit, fp, fn, _ = self.sums(acted, target, mask, one_hot, overlap)
        hit, fp, fn = self.kept(hit, acted), self.kept(fp, acted), self.kept(fn, acted)
        wrong = float(self.alpha) * fp + float(self.beta) * fn
        loss = rows.one_minus_ratio(hit, wrong, self.smooth_nr, self.smooth_dr)
        gamma = float(self.gamma)
        if gamma != 1.0:
            # The slope of f**gamma at 0 is infinite for gamma < 1.
            powered = torch.where(loss <= 0, 1, loss) ** gamma
            loss = torch.where(loss <= 0, 0, powered)
        return self.rounded(rows.reduce(loss, self.reduction, 0), acted, target, one_hot)


class MCC(OverlapTwin):
    """``MCCLoss``."""

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``MCCLoss.forward``."""
        acted = self.acted(input)
        one_hot = self.one_hot(input, acted, self.to_onehot_y)
        z, g, valid, weight = rows.inputs(acted, target, mask, one_hot, self.ignore_index)
        p, m = self.probabilities(z), rows.both(valid, weight)
        # An ignored voxel is no true negative either: the ignore mask is a weight here.
        hit, fp, fn, _ = rows.overlap_rows(p, g, None, m, "product")
        rest = rows.voxel_sum(rows.times(m, (1 - rows.quiet(p, m)) * (1 - g)))
        hit, fp, fn = self.kept(hit, acted), self.kept(fp, acted), self.kept(fn, acted)
        rest = self.kept(rest, acted)
        perfect = (fp == 0) & (fn == 0)
        square = (hit + fp) * (hit + fn) * (rest + fp) * (rest + fn) + self.smooth_dr
        score = (hit * rest - fp * fn + self.smooth_nr) / torch.where(perfect, 1, square).sqrt()
        loss = rows.reduce(torch.where(perfect, 0, 1 - score), self.reduction, 0)
        return self.rounded(loss, acted, target, one_hot)
