"""What no pass over the volume expresses: the oracle's dense PyTorch behind the same functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

from .. import checks
from ..evaluate import record, record_dense
from ..prepare import like_input, plain

_F = TypeVar("_F", bound=Callable[..., Tensor])


def _dense_reason(logits: Tensor, target: Tensor, options: dict[str, Any]) -> str:
    """Why the kernels cannot run a problem that the oracle can, or ""."""
    if not all(isinstance(tensor, Tensor) for tensor in (logits, target)):
        return ""  # the checks name it
    if logits.ndim == 2:
        return "the logits have no spatial dimensions"
    index, labels = options.get("ignore_index"), options.get("to_onehot_y")
    if options.get("mask") is None or index is None or labels or not target.is_floating_point():
        return ""
    if target.ndim > 1 and 0 <= index < target.shape[1] != 1:
        return "a mask weighs linearly and an ignored class of fractions does not: no pass does both"
    return ""


def or_dense(oracle: Callable[..., Tensor]) -> Callable[[_F], _F]:
    """Hands the oracle what has no kernel: logits (B, C), where MONAI takes one sum over B and C, and
    voxel weights beside an ignored class of a soft target. It runs in float64, so no bit is lost."""

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
            reason = _dense_reason(logits, target, options)
            if not reason:
                return function(logits, target, **options)
            # The checks, warnings and dtype of the usual path, on a volume of at least one dimension.
            inputs, checked_options = [logits, target], {**options, "reduction": "mean"}
            if logits.ndim == 2:
                inputs = [x[..., None] for x in inputs]
                mask = options.get("mask")
                checked_options["mask"] = None if mask is None else mask[..., None]
            with record():  # the call for the checks is not the evaluation that explain() tells of
                checked = function(*inputs, **checked_options)
            checks.option("reduction", options.get("reduction", "mean"), ("mean", "sum", "none"))
            record_dense(reason)
            dense = oracle(plain(logits).double(), plain(target), **options)
            return like_input(dense.to(checked.dtype), logits, target)

        return cast(_F, loss)

    return decorate
