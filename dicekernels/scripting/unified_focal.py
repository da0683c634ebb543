"""Twin of the asymmetric unified focal loss."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import rows
from .twin import Twin


class Settings(nn.Module):
    """The numbers of one half."""

    if TYPE_CHECKING:
        gamma: float
        delta: float
        epsilon: float


class UnifiedFocal(Twin):
    """``AsymmetricUnifiedFocalLoss``."""

    if TYPE_CHECKING:
        asy_focal_loss: Settings
        asy_focal_tversky_loss: Settings
        to_onehot_y: bool
        num_classes: int
        weight: float
        reduction: str
        ignore_index: int | None

    @classmethod
    def of(cls, loss: nn.Module, **changed: Any) -> UnifiedFocal:
        for name in ("asy_focal_loss", "asy_focal_tversky_loss"):
            half: Any = getattr(loss, name)
            half.numbers(name)  # refuses what must stay as constructed
        return super().of(loss, **changed)

    def forward(self, y_pred: Tensor, y_true: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``AsymmetricUnifiedFocalLoss.forward``."""
        if y_pred.ndim != 4 and y_pred.ndim != 5:
            raise ValueError(
                f"input shape must be 4 or 5, but got {y_pred.shape}: y_pred is (B, C, *S), S of 2 or 3 sizes"
            )
        channels, ignored = y_pred.shape[1], self.ignore_index
        if channels == 1:
            rows.warn_single_channel(1, False, self.to_onehot_y, True)
            if ignored is not None:
                warnings.warn(
                    "single channel prediction, `ignore_index` is applied to label-encoded targets.",
                    stacklevel=2,
                )
        one_hot = self.to_onehot_y and channels > 1
        if one_hot and self.num_classes != channels:
            raise ValueError(f"num_classes: got {self.num_classes}, but the input has {channels} channels")
        p, g, valid, weight = rows.inputs(y_pred, y_true, mask, one_hot, ignored)
        if ignored is None and not one_hot and g.numel() > 0:
            top = g.max() if channels > 1 else torch.maximum(g.max(), (1 - g).max())
            if bool(top > self.num_classes - 1):
                raise ValueError(f"Invalid class index found. Maximum class should be {self.num_classes - 1}")
        if channels == 1:
            p, g = torch.cat([1 - p, p], 1), torch.cat([1 - g, g], 1)
        p, g = p[:, :2], g[:, :2]
        m = rows.both(valid, weight)
        if m is not None:
            p, g = torch.where(m != 0, p, 0), torch.where(m != 0, g, 0)
        p, g = rows.times(valid, p), rows.times(valid, g)
        m = torch.ones_like(p[:, :1]) if weight is None else weight.expand_as(p[:, :1])
        loss = self.weight * self.focal(p, g, m) + (1 - self.weight) * self.tversky(p, g, m)
        if self.reduction != "mean" and self.reduction != "sum" and self.reduction != "none":
            raise ValueError(f"reduction: got {self.reduction}, expected 'mean', 'sum' or 'none'")
        dtype = rows.loss_dtype(y_pred, y_true, one_hot, ignored)
        return loss.to(dtype)

    def focal(self, p: Tensor, g: Tensor, m: Tensor) -> Tensor:
        """The mean over voxels and both classes; 0 if no voxel has a weight."""
        gamma, delta, e = (
            float(self.asy_focal_loss.gamma),
            float(self.asy_focal_loss.delta),
            float(self.asy_focal_loss.epsilon),
        )
        p = p.clamp(e, 1 - e)
        entropy = -g * torch.log(p)
        back = rows.voxel_sum(m * (1 - p[:, :1]) ** gamma * entropy[:, :1]).sum()
        fore = rows.voxel_sum(m * entropy[:, 1:]).sum()
        return rows.quotient((1 - delta) * back + delta * fore, 2 * rows.voxel_sum(m).sum())

    def tversky(self, p: Tensor, g: Tensor, m: Tensor) -> Tensor:
        """The mean over samples and both classes."""
        gamma, delta, e = (
            float(self.asy_focal_tversky_loss.gamma),
            float(self.asy_focal_tversky_loss.delta),
            float(self.asy_focal_tversky_loss.epsilon),
        )
        p = p.clamp(e, 1 - e)
        hit, fn, fp = (
            rows.voxel_sum(m * g * p),
            rows.voxel_sum(m * g * (1 - p)),
            rows.voxel_sum(m * (1 - g) * p),
        )
        wrong = delta * fn + (1 - delta) * fp
        missed = wrong / (hit + wrong + e)
        back, fore = missed[:, 0], missed[:, 1]
        # 0, which the clamp leaves to samples without a weight, has an infinite slope.
        powered = torch.where(fore == 0, 1, fore) ** (1 - gamma)
        nothing = torch.zeros_like(fore) ** (1 - gamma)
        return torch.stack([back, torch.where(fore == 0, nothing, powered)], 1).mean()
