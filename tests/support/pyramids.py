"""Outputs of several resolutions, their labels, and what the weighted sum over them is in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dicekernels.testing import assert_close_to_truth, assert_gradient_close

F16, F32, F64 = torch.float16, torch.float32, torch.float64
HOT = {"to_onehot_y": True, "softmax": True}
SPACES = {
    1: [(37,), (16,), (5,)],
    2: [(12, 14), (6, 7), (3, 3), (1, 2)],
    3: [(8, 10, 9), (4, 5, 5), (2, 3, 2)],
}


def outputs(spaces: list[tuple[int, ...]], dtype: torch.dtype = F32, classes: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn((2, classes, *space), dtype=F64, generator=generator).to(dtype) for space in spaces]


def labels(space: tuple[int, ...], dtype: torch.dtype = torch.uint8, classes: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randint(0, classes, (2, 1, *space), generator=generator).to(dtype)


def voxel_weights(samples: int, space: tuple[int, ...]) -> Tensor:
    """Some of them 0."""
    generator = torch.Generator().manual_seed(9)
    weights = torch.rand((samples, 1, *space), generator=generator)
    return weights * (weights > 0.3)


def run(loss: Callable[..., Tensor], levels: list[Tensor], *args: Any, **extra: Any) -> list[Tensor]:
    """The value, then the gradient of each level."""
    levels = [level.detach().requires_grad_() for level in levels]
    value = loss(levels, *args, **extra)
    return [value.detach(), *torch.autograd.grad(value, levels)]


def written_out(loss: Callable[..., Tensor], weights: list[float]) -> Callable[..., Tensor]:
    """The definition in float64: every level apart, the target resized as values of float32."""

    loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss

    def total(levels: list[Tensor], target: Tensor, **masks: Tensor) -> Tensor:
        terms = []
        for level, weight in zip(levels, weights, strict=True):
            space = level.shape[2:]
            resized = F.interpolate(target.float(), size=space, mode="nearest-exact")
            extra = {k: F.interpolate(m.double(), size=space, mode="nearest-exact") for k, m in masks.items()}
            terms.append(weight * loss(level.double(), resized.to(target.dtype), **extra))
        return sum(terms, torch.zeros((), dtype=F64))

    return total


def assert_all_close(
    got: list[Tensor], truth: list[Tensor], honest: list[Tensor], dtype: torch.dtype = F32
) -> None:
    assert got[0].dtype == F32
    assert_close_to_truth(got[0], truth[0].double(), honest[0], F32, "loss")
    for level, (ours, true, plain) in enumerate(zip(got[1:], truth[1:], honest[1:], strict=True)):
        assert ours.dtype == dtype
        assert_gradient_close(ours, true.double(), plain, dtype, f"gradient of level {level}")


INNER: dict[str, Callable[[Any], Callable[..., Tensor]]] = {
    "DiceLoss": lambda library: library.DiceLoss(**HOT, batch=True),
    "DiceCELoss": lambda library: library.DiceCELoss(**HOT, weight=torch.tensor([0.5, 1.0, 2.0])),
    "GeneralizedDiceLoss": lambda library: library.GeneralizedDiceLoss(**HOT, w_type="simple"),
    "TverskyLoss": lambda library: library.TverskyLoss(**HOT, alpha=0.3, beta=0.7, reduction="sum"),
    "MCCLoss": lambda library: library.MCCLoss(**HOT, include_background=False),
    "FocalLoss": lambda library: library.FocalLoss(to_onehot_y=True, alpha=[0.2, 0.3, 0.5]),
    "DiceFocalLoss": lambda library: library.DiceFocalLoss(**HOT, gamma=1.5),
    "GeneralizedDiceFocalLoss": lambda library: library.GeneralizedDiceFocalLoss(**HOT, weight=[1.0, 2, 3]),
}
