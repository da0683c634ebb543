"""Twin of the focal loss."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import rows
from .twin import Twin


class Focal(Twin):
    """``FocalLoss``."""

    if TYPE_CHECKING:
        include_background: bool
        to_onehot_y: bool
        gamma: float
        alpha: float | Tensor | None
        use_softmax: bool
        ignore_index: int | None
        mean_over_classes: bool
        softmax_over_all: bool
        reduction: str
        class_weight: Tensor | None

    @classmethod
    def of(cls, loss: nn.Module, **changed: Any) -> Focal:
        alpha: Any = loss.alpha
        return super().of(loss, alpha=float(alpha) if isinstance(alpha, int) else alpha, **changed)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``FocalLoss.forward``."""
        rows.warn_single_channel(input.shape[1], False, self.to_onehot_y, self.include_background)
        return self.loss(input, target, mask, self.to_onehot_y and input.shape[1] > 1).float()

    def loss(self, input: Tensor, target: Tensor, mask: Tensor | None, one_hot: bool) -> Tensor:
        """In working precision, without the warnings about one channel."""
        z, g, valid, weight = rows.inputs(input, target, mask, one_hot, self.ignore_index)
        first = 0 if self.include_background or z.shape[1] == 1 else 1
        if not (self.use_softmax and self.softmax_over_all):
            z, g, first = z[:, first:], g[:, first:], 0
        m = rows.both(valid, weight)
        terms = rows.quiet(self.balanced(rows.times(valid, z), rows.times(valid, g), one_hot, first), m)
        loss = rows.times(m, terms)
        if self.class_weight is not None:
            loss = loss * rows.per_class(focal_weight(self.class_weight, loss.shape[1]).to(loss), loss.ndim)
        if self.reduction == "none":
            return loss
        if self.reduction != "mean" and self.reduction != "sum":
            raise ValueError(f"reduction: got {self.reduction}, expected 'mean', 'sum' or 'none'")
        if m is None:
            m = torch.ones_like(z[:, :1])
        m = m.expand_as(z[:, :1])
        if self.reduction == "sum" and z.ndim > 2:
            return rows.quotient(rows.voxel_sum(loss), rows.voxel_sum(m)).sum()
        total, count = rows.voxel_sum(loss).sum(), rows.voxel_sum(m).sum()
        if mask is None and self.ignore_index is None:
            return total / (count * loss.shape[1])  # NaN of an empty batch, as a mean
        by_voxels = self.ignore_index is not None and not self.mean_over_classes
        return rows.quotient(total, count * (1 if by_voxels else loss.shape[1]))

    def balanced(self, z: Tensor, g: Tensor, one_hot: bool, first: int) -> Tensor:
        """The focal terms of the classes from ``first`` on times what alpha makes of them; an infinite logit
        beside a label has its limit."""
        gamma = float(self.gamma)
        if self.use_softmax:
            log_p, g = F.log_softmax(z, 1)[:, first:], g[:, first:]
            if one_hot:
                log_p = torch.where(g == 0, 0, log_p)
            missed = -torch.expm1(log_p)
            # The slope of missed**gamma at 0 is infinite for gamma < 1.
            powered = torch.where(missed == 0, 1, missed) ** gamma
            loss = torch.where(missed == 0, 0, g * powered * -log_p)
        else:
            signed = z * (2 * g - 1)
            entropy = -F.logsigmoid(signed) if one_hot else z - z * g - F.logsigmoid(z)
            loss = entropy if gamma == 0.0 else torch.exp(gamma * F.logsigmoid(-signed)) * entropy
        if self.alpha is not None:
            if isinstance(self.alpha, float) and self.use_softmax and not self.include_background:
                warnings.warn(
                    "`include_background=False`, scalar `alpha` ignored when using softmax.", stacklevel=2
                )
            elif isinstance(self.alpha, float):
                # TorchScript's torch.tensor rounds a number to float32 first.
                loss = loss * self.balance(z.new_full([], self.alpha), g)
            else:
                loss = loss * self.balance(self.alpha.to(z), g)
        return loss

    def balance(self, a: Tensor, g: Tensor) -> Tensor:
        classes = g.shape[1]
        if a.ndim > 0:
            if a.shape[0] != classes:
                raise ValueError(
                    f"The length of alpha ({a.shape[0]}) must match the number of classes ({classes})."
                )
            factors = rows.per_class(a, g.ndim)
            return factors if self.use_softmax else torch.where(g == 1, factors, 1)
        if self.use_softmax:
            background = torch.arange(classes, device=g.device) == 0
            return rows.per_class(torch.where(background, 1 - a, a), g.ndim)
        return g * a + (1 - g) * (1 - a)


def focal_weight(weight: Tensor, classes: int) -> Tensor:
    """The factors of the focal terms, checked.

    Raises:
        ValueError: several for one class, wrong length, or a value that is negative or not finite.
    """
    if weight.ndim > 0 and classes == 1:
        raise ValueError("Per-class class_weight is not supported for single-channel outputs.")
    if weight.ndim > 0 and weight.numel() != classes:
        raise ValueError(
            f"The number of class_weight ({weight.numel()}) must match the number of output "
            f"channels ({classes})."
        )
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError("class_weight values must be non-negative. weight: expected finite values")
    return weight.expand(classes)
