"""What no pass over the volume expresses: the oracle's dense PyTorch behind the same functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .. import checks
from ..evaluate import record, record_dense
from ..prepare import like_input, plain

_F = TypeVar("_F", bound=Callable[..., Tensor])
Reason = Callable[[Tensor, Tensor, dict[str, Any]], str]


def _dense_reason(logits: Tensor, target: Tensor, options: dict[str, Any]) -> str:
    """Why the kernels cannot run a problem that the oracle can, or ""."""
    if logits.ndim == 2:
        return "the logits have no spatial dimensions"
    if options.get("mask") is not None and ignores_fractions(logits, target, options):
        return "a mask weighs linearly and an ignored class of fractions does not: no pass does both"
    return ""


def ignores_fractions(logits: Tensor, target: Tensor, options: dict[str, Any]) -> bool:
    """Whether ``ignore_index`` is a class of a floating dense target, so that its mask may hold fractions."""
    index = options.get("ignore_index")
    labels = options.get("to_onehot_y", False) and logits.shape[1] > 1
    if index is None or labels or not target.is_floating_point():
        return False
    return target.ndim > 1 and 0 <= index < target.shape[1] != 1


def in_range(labels: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Labels outside [0, classes) as 0, but for ``ignore_index``: a one-hot of them would end the process
    off the CPU, where the fused check of the same labels has made the loss NaN."""
    bad = (labels.long() < 0) | (labels.long() >= classes)
    return labels.masked_fill(bad if ignore_index is None else bad & (labels != ignore_index), 0)


def or_dense(oracle: Callable[..., Tensor], more: Reason | None = None) -> Callable[[_F], _F]:
    """Hands the oracle what has no kernel.

    Logits (B, C), where MONAI takes one sum over B and C, and voxel weights beside an ignored class of a
    soft target run in float64, so no bit is lost. ``more`` names reasons of this loss alone; those run in
    the precision of the kernels.
    """

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
            if not all(isinstance(tensor, Tensor) and not tensor.is_nested for tensor in (logits, target)):
                return function(logits, target, **options)  # the checks name it
            reason = _dense_reason(logits, target, options)
            exact = bool(reason)
            if not reason and more is not None:
                reason = more(logits, target, options)
            if not reason:
                return function(logits, target, **options)
            record_dense(reason)
            # The checks, warnings and dtype of the usual path, on a volume of at least one dimension.
            inputs, checked_options = [logits, target], {**options, "reduction": "mean"}
            if logits.ndim == 2:
                inputs = [x[..., None] for x in inputs]
                mask = options.get("mask")
                checked_options["mask"] = None if mask is None else mask[..., None]
            with record():  # the call for the checks is not the evaluation that explain() tells of
                checked = function(*inputs, **checked_options)
            checks.option("reduction", options.get("reduction", "mean"), ("mean", "sum", "none"))
            values = plain(target)
            labels = bool(options.get("to_onehot_y")) and logits.shape[1] > 1
            if labels and values.device.type != "cpu":
                values = in_range(values, logits.shape[1], options.get("ignore_index"))
            dtype = torch.float64 if exact else torch.promote_types(logits.dtype, torch.float32)
            dense = oracle(plain(logits).to(dtype), values, **options).to(checked.dtype)
            if labels and values.device.type != "cpu":
                dense = torch.where(checked.detach().isnan(), torch.nan, dense)
            return like_input(dense, logits, target)

        return cast(_F, loss)

    return decorate
