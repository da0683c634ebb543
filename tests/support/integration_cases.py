"""Every loss module with options and data that it takes, for the tests of how torch uses modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import make_labels, make_logits, make_mask
from torch import Tensor, nn

HOT = {"to_onehot_y": True, "softmax": True}
DISTANCES = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.75], [0.5, 0.75, 0.0]])
SPACE = (4, 6, 8)

# Name of the class -> the module of ``dicekernels`` or ``monai.losses`` with these class weights.
LOSSES: dict[str, Callable[[Any, Tensor], nn.Module]] = {
    "DiceLoss": lambda lib, w: lib.DiceLoss(**HOT, include_background=False, weight=w[1:]),
    "GeneralizedDiceLoss": lambda lib, w: lib.GeneralizedDiceLoss(**HOT),
    "TverskyLoss": lambda lib, w: lib.TverskyLoss(**HOT, alpha=0.3, beta=0.7),
    "DiceCELoss": lambda lib, w: lib.DiceCELoss(**HOT, weight=w, lambda_ce=0.5),
    "FocalLoss": lambda lib, w: lib.FocalLoss(to_onehot_y=True, use_softmax=True, weight=w),
    "DiceFocalLoss": lambda lib, w: lib.DiceFocalLoss(**HOT, weight=w, lambda_focal=0.5),
    "GeneralizedDiceFocalLoss": lambda lib, w: lib.GeneralizedDiceFocalLoss(**HOT, weight=w),
    "MCCLoss": lambda lib, w: lib.MCCLoss(**HOT),
    "MaskedDiceLoss": lambda lib, w: lib.MaskedDiceLoss(**HOT, weight=w),
    "GeneralizedWassersteinDiceLoss": lambda lib, w: lib.GeneralizedWassersteinDiceLoss(DISTANCES),
    "AsymmetricUnifiedFocalLoss": lambda lib, w: lib.AsymmetricUnifiedFocalLoss(to_onehot_y=True),
    "DeepSupervisionLoss": lambda lib, w: lib.DeepSupervisionLoss(lib.DiceLoss(**HOT)),
    "MaskedLoss": lambda lib, w: lib.MaskedLoss(lib.DiceLoss, **HOT),
}
# These have no kernel: their formula runs in PyTorch, piece by piece.
STREAMED = ("GeneralizedWassersteinDiceLoss", "AsymmetricUnifiedFocalLoss")
KERNELS = tuple(name for name in LOSSES if name not in STREAMED)


class Step(nn.Module):
    """A loss as a training step calls it: behind an optional layer, with what it needs for input."""

    def __init__(self, name: str, library: Any, layer: nn.Module | None = None, factor: float = 1.0) -> None:
        super().__init__()
        self.name = name
        self.layer = nn.Identity() if layer is None else layer
        self.loss = LOSSES[name](library, factor * torch.tensor([0.2, 0.3, 0.5]))

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        logits = self.layer(logits)
        if self.name == "AsymmetricUnifiedFocalLoss":  # takes probabilities
            wide = torch.promote_types(logits.dtype, torch.float32)
            return self.loss(torch.softmax(logits, 1, dtype=wide), target)
        if self.name == "DeepSupervisionLoss":
            return self.loss([logits, logits[..., ::2, ::2, ::2]], target)
        if self.name.startswith("Masked"):
            return self.loss(logits, target, mask)
        return self.loss(logits, target)


def channels(name: str) -> int:
    return 2 if name == "AsymmetricUnifiedFocalLoss" else 3


def data(
    name: str, dtype: torch.dtype = torch.float32, space: tuple[int, ...] = SPACE, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels, mask of zeros and ones) for ``Step``."""
    logits = make_logits((2, channels(name), *space), dtype, seed=seed)
    labels = make_labels((2, 1, *space), channels(name), seed=seed).to(torch.uint8)
    return logits, labels, make_mask("binary", tuple(logits.shape), seed=seed)


def layer(name: str) -> nn.Module:
    """A small network with as many channels out as in."""
    torch.manual_seed(0)
    return nn.Conv3d(channels(name), channels(name), 1)
