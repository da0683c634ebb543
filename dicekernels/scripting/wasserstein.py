"""Twin of the generalized Wasserstein Dice loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import hints
from . import rows
from .twin import Twin


class Wasserstein(Twin):
    """``GeneralizedWassersteinDiceLoss``."""

    if TYPE_CHECKING:
        m: Tensor
        alpha_mode: str
        reduction: str
        smooth_nr: float
        smooth_dr: float
        ignore_index: int | None

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``GeneralizedWassersteinDiceLoss.forward``."""
        samples, classes = input.shape[0], input.shape[1]
        if not input.is_floating_point():
            raise NotImplementedError("logits: expected a floating dtype; use logits.float()")
        if classes != self.m.shape[0]:
            raise RuntimeError(
                f"logits: got {classes} channels, expected {self.m.shape[0]} as dist_matrix has classes"
                + hints.target_remedy(
                    list(input.shape), list(target.shape), True, hints.swapped(input, target)
                )
            )
        if target.ndim == 0 or target.shape[0] != samples or target.numel() * classes != input.numel():
            raise RuntimeError(hints.of_target(input, target, True))
        flat = input.flatten(2) if input.ndim > 2 else input.unsqueeze(2)
        labels = target.reshape(samples, 1, flat.shape[2])
        weights: Tensor | None = None
        if mask is not None:
            rows.check_mask(mask, input)
            weights = mask.reshape(mask.shape[0], 1, flat.shape[2])
        z, g, valid, weight = rows.inputs(flat, labels, weights, True, self.ignore_index)
        m = rows.both(valid, weight)
        g = rows.times(m, g)
        # Of every voxel and class, the distance of the voxel's label to it.
        table = self.m.to(z).t().expand(samples, -1, -1).gather(2, g.argmax(1, keepdim=True).expand_as(z))
        distance = (torch.softmax(z, 1) * table).sum(1, keepdim=True)
        wrong, volume = rows.voxel_sum(g * distance), rows.voxel_sum(g)
        if self.alpha_mode == "GDL":
            alpha = 1 / (volume + 1)
            error = (alpha * wrong).sum(1)
        else:
            alpha = (torch.arange(classes, device=volume.device) != 0).to(volume)  # not the background
            error = wrong.sum(1)
        overlap = 2 * (alpha * (volume - wrong)).sum(1)
        loss = rows.reduce(
            rows.one_minus_ratio(overlap, error, self.smooth_nr, self.smooth_dr), self.reduction, 0
        )
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.m.dtype), torch.float32)
        return loss.to(dtype)
