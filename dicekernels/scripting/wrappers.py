"""Twins of the wrappers. The wrapped loss, a module or a function of whatever origin, is scripted, too."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import hints
from . import rows
from .twin import Twin


class DeepSupervision(Twin):
    """``DeepSupervisionLoss``; ``input`` is a list of tensors or one tensor."""

    __constants__: ClassVar[tuple[str, ...]] = ("has_act", "takes_mask")

    if TYPE_CHECKING:
        takes_mask: bool
        weights: list[float] | None
        weight_mode: str
        interp_mode: str

        def loss(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor: ...

    @classmethod
    def of(cls, loss: nn.Module, **changed: Any) -> DeepSupervision:
        inner: Any = loss.loss
        weights: Any = loss.weights
        if weights is not None:
            weights = [float(weight) for weight in weights]
        called = inner.forward if isinstance(inner, nn.Module) else inner
        takes_mask = "mask" in inspect.signature(called).parameters
        return super().of(loss, weights=weights, takes_mask=takes_mask, **changed)

    def forward(self, input: Tensor | list[Tensor], target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``DeepSupervisionLoss.forward``."""
        if isinstance(input, Tensor):
            return self.of_level(input.float(), target, mask)
        total = torch.zeros((), device=target.device)
        for level, output in enumerate(input):
            space = list(output.shape[2:])
            if target.ndim != output.ndim and target.ndim != output.ndim - 1:
                raise ValueError(hints.of_target(output, target, False))
            if target.ndim == output.ndim - 1:
                resized = self.resized(target.unsqueeze(1), space, self.interp_mode).squeeze(1)
            else:
                resized = self.resized(target, space, self.interp_mode)
            weights: Tensor | None = None
            if mask is not None:
                picks = self.interp_mode == "nearest"
                weights = self.resized(mask, space, "nearest" if picks else "nearest-exact")
            value = self.of_level(output.float(), resized, weights)
            if value.ndim > 0:
                raise RuntimeError(
                    f"loss: gave shape {value.shape} on level {level}, expected one number; give the loss "
                    "the reduction 'mean' or 'sum'"
                )
            total = total + self.factor(level, len(input)) * value
        return total.float()

    def of_level(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return self.loss(output, target)
        if self.takes_mask:
            return self.loss(output, target, mask)
        raise TypeError("mask: the loss takes none")

    def factor(self, level: int, levels: int) -> float:
        if self.weights is not None and len(self.weights) >= levels:
            return self.weights[level]
        if level == 0:
            return 1.0
        if self.weight_mode == "exp":
            return max(0.5**level, 0.0625)
        return 0.5 if self.weight_mode == "two" else 1.0

    def resized(self, values: Tensor, space: list[int], mode: str) -> Tensor:
        """(B, C, *S) in another space; the modes that pick voxels do so for every dtype."""
        if list(values.shape[2:]) == space:
            return values
        if mode != "nearest-exact" and mode != "nearest":
            return F.interpolate(values, size=space, mode=mode)
        for dim, size in enumerate(space):
            positions = torch.arange(values.shape[dim + 2], dtype=torch.float32, device=values.device)
            index = F.interpolate(positions.view(1, 1, -1), size=[size], mode=mode)
            values = values.index_select(dim + 2, index.flatten().long())
        return values


class Masked(Twin):
    """``MaskedLoss``."""

    if TYPE_CHECKING:

        def loss(self, input: Tensor, target: Tensor) -> Tensor: ...

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``MaskedLoss.forward``."""
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=2)
            return self.loss(input, target)
        rows.check_spatial_mask(mask, input, target)
        return self.loss(input * mask, target * mask)
