"""Problems whose kernels bench/static/aot.py compiles: a loss, its tensors on ``meta``, the plan of an op."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import dicekernels
import dicekernels.functional as losses
from bench.cases import torch_dtype
from dicekernels.call import Call, observed
from dicekernels.spec import LossSpec, SumsSpec, chunk_count

OPS = ("forward", "backward", "finish")
LAYOUTS = ("contiguous", "channels_last")


def _labels(classes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return (torch.arange(8) % max(classes, 2)).reshape(1, 1, 2, 2, 2).to(dtype)


def _dice_ce(logits: Tensor) -> Tensor:
    return losses.dice_ce_loss(logits, _labels(logits.shape[1]), to_onehot_y=True, softmax=True)


def _dice_ce_int64(logits: Tensor) -> Tensor:
    labels = _labels(logits.shape[1], torch.int64)
    return losses.dice_ce_loss(logits, labels, to_onehot_y=True, softmax=True)


def _dice_ce_soft(logits: Tensor) -> Tensor:
    return losses.dice_ce_loss(logits, torch.rand(logits.shape).softmax(1), softmax=True)


def _dice_ce_masked(logits: Tensor) -> Tensor:
    mask = torch.ones(1, 1, 2, 2, 2)
    labels = _labels(logits.shape[1])
    return losses.dice_ce_loss(logits, labels, to_onehot_y=True, softmax=True, ignore_index=255, mask=mask)


def _dice_squared(logits: Tensor) -> Tensor:
    labels = _labels(logits.shape[1])
    return losses.dice_loss(logits, labels, to_onehot_y=True, softmax=True, squared_pred=True)


def _tversky(logits: Tensor) -> Tensor:
    return losses.tversky_loss(logits, _labels(logits.shape[1]), to_onehot_y=True, softmax=True)


def _gdl(logits: Tensor) -> Tensor:
    return losses.generalized_dice_loss(logits, _labels(logits.shape[1]), to_onehot_y=True, softmax=True)


def _dice_focal(logits: Tensor) -> Tensor:
    return losses.dice_focal_loss(logits, _labels(logits.shape[1]), to_onehot_y=True, sigmoid=True)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "dice_ce": _dice_ce,
    "dice_squared": _dice_squared,
    "tversky": _tversky,
    "gdl": _gdl,
    "dice_focal": _dice_focal,
    "dice_ce_soft": _dice_ce_soft,
    "dice_ce_masked": _dice_ce_masked,
    "dice_ce_int64": _dice_ce_int64,
}


@cache
def prepared(loss: str, classes: int) -> Call:
    """What the functional layer makes of the loss, on eight voxels of one sample."""
    calls: list[Any] = []
    with dicekernels.use_backend("eager"), observed(calls.append), warnings.catch_warnings():
        # MONAI's warnings about a single channel, which the matrix holds on purpose.
        warnings.simplefilter("ignore")
        LOSSES[loss](torch.zeros(1, classes, 2, 2, 2))
    (call,) = calls
    assert isinstance(call, Call), call
    return call


@dataclass(frozen=True)
class Problem:
    """A loss on logits (B, C, *S): dtype and layout as in bench/cases.py."""

    loss: str
    classes: int
    dtype: str = "float32"
    layout: str = "contiguous"
    samples: int = 2
    space: tuple[int, ...] = (128, 128, 128)

    def __post_init__(self) -> None:
        for name, value, known in (("loss", self.loss, LOSSES), ("layout", self.layout, LAYOUTS)):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {tuple(known)}")

    @property
    def voxels(self) -> int:
        return math.prod(self.space)

    @property
    def itemsize(self) -> int:
        return torch_dtype(self.dtype).itemsize

    @property
    def spec(self) -> LossSpec:
        return prepared(self.loss, self.classes).spec

    def tensors(self, device: str = "meta") -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits, target, mask), not initialised."""
        call = prepared(self.loss, self.classes)

        def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            # Of the small problem's shape, the space alone is another one.
            shape = (self.samples, *tensor.shape[1:-3], *self.space)
            return torch.empty(shape, dtype=dtype, device=device)

        logits = like(call.logits, torch_dtype(self.dtype))
        if self.layout == "channels_last":
            formats = {2: torch.channels_last, 3: torch.channels_last_3d}
            logits = logits.contiguous(memory_format=formats[len(self.space)])
        mask = None if call.mask is None else like(call.mask, call.mask.dtype)
        return logits, like(call.target, call.target.dtype), mask

    def plan(self, op: str, device: str = "meta") -> Any:
        """The ``Launch`` of an op on this problem, on tensors that are not initialised."""
        spec = self.spec
        logits, target, mask = self.tensors(device)
        sums: SumsSpec = spec.sums
        width = sums.rows.bit_count()
        slots_shape = (self.samples, chunk_count(self.voxels), self.classes, width)
        slots = torch.empty(slots_shape, dtype=torch.float64, device=device)
        coef = slots.new_empty((self.samples, self.classes, width))
        if op == "forward":
            from dicekernels.backends.triton.sums import plan_sums

            return plan_sums(logits, target, mask, slots, sums)
        if op == "backward":
            from dicekernels.backends.triton.sums_backward import plan_sums_backward

            grad_loss = torch.empty((), device=device)
            return plan_sums_backward(grad_loss, logits, target, mask, coef, torch.empty_like(logits), sums)
        if op == "finish":
            from dicekernels.backends.triton.finish import plan_finish

            call = prepared(self.loss, self.classes)
            shape = spec.finish.loss_shape(self.samples, self.classes)
            loss = torch.empty(shape, dtype=call.dtype, device=device)
            return plan_finish(loss, coef, slots, call.weights, sums.rows, spec.finish, False)
        raise ValueError(f"op: got {op!r}, expected one of {OPS}")
