"""Twin of the masked Dice loss."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from . import rows
from .overlap import Dice


class MaskedDice(Dice):
    """``MaskedDiceLoss``: p and g times the mask, a label map before it becomes one-hot."""

    ACTIVATION: ClassVar[str] = "pre_other_act"

    if TYPE_CHECKING:
        pre_sigmoid: bool
        pre_softmax: bool

        def pre_other_act(self, x: Tensor) -> Tensor: ...

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``MaskedDiceLoss.forward``."""
        acted = self.pre_other_act(input) if self.has_act else input
        one_hot = self.checked_one_hot(input, acted, self.pre_softmax, self.to_onehot_y)
        overlap = "squared" if self.squared_pred else "min" if self.soft_label else "product"
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=2)
            z, g, _, _ = rows.inputs(acted, target, None, one_hot, None)
            sums = rows.overlap_rows(self.activated(z), g, None, None, overlap)
            return self.rounded(self.finished(sums, acted), acted, target, one_hot)
        mask = rows.fitted_mask(mask, input, target)
        if one_hot:
            labels = target.unsqueeze(1) if target.ndim == acted.ndim - 1 else target
            if labels.shape == mask.shape:
                target = torch.where(mask != 0, labels * mask, 0)
        z, g, _, _ = rows.inputs(acted, target, None, one_hot, None)
        m = mask.to(z.dtype)
        p = self.activated(rows.quiet(z, m))
        if one_hot:
            sums = rows.overlap_rows(rows.quiet(p, m) * m, g, None, None, overlap)
        else:
            sums = rows.overlap_rows(p, rows.quiet(g, m), m, None, overlap)
        dtype = self.rounded(sums[0], acted, target, one_hot).dtype
        return self.finished(sums, acted).to(torch.promote_types(dtype, mask.dtype))

    def activated(self, z: Tensor) -> Tensor:
        if self.pre_sigmoid:
            return torch.sigmoid(z)
        if self.pre_softmax and z.shape[1] > 1:
            return torch.softmax(z, 1)
        return z
