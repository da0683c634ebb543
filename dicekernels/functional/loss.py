"""How the losses of this folder run: a function says what there is to compute, its decorator computes it."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

from .. import checks, plans
from ..call import Call, record_dense, run
from ..labels import check_labels, out_of_range
from ..prepare import kernel_dtype, like_input, plain
from ..tensors import readable

P = ParamSpec("P")
# One pass, the sum of several, or what other losses have computed.
Built = Call | Sequence[Call] | Tensor
Reason = Callable[[Tensor, Tensor, dict[str, Any]], str]


def loss(
    oracle: Callable[..., Tensor] | None = None, more: Reason | None = None, *, planned: bool = True
) -> Callable[[Callable[P, Built]], Callable[P, Tensor]]:
    """Decorator: makes of a function that builds a Call the loss itself.

    Args:
        oracle: computes in dense PyTorch what has no kernel: logits (B, C), where MONAI takes one sum over B
            and C, and voxel weights beside an ignored class of a soft target. Both run in float64, so no bit
            is lost.
        more: names reasons of this loss alone; those run in the precision of the kernels.
        planned: a second call of its like is taken from the first one's plan.
    """

    def decorate(build: Callable[P, Built]) -> Callable[P, Tensor]:
        builder = cast(Callable[..., Built], build)

        @functools.wraps(build)
        def computed(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
            key = plan = None
            if planned and not torch.compiler.is_compiling():
                key, plan = plans.find(what(build, options), logits, target, options)
            if plan is not None and plan.takes(target, options):
                return plan.run(logits, target, options)
            if oracle is not None:
                reason, exact = _dense_reason(logits, target, options, more)
                if reason:
                    record_dense(reason)
                    inputs, usual = _as_volume(logits, target, options)
                    built = builder(*inputs, **usual)
                    return _dense(oracle, built, logits, target, options, exact)
            built = builder(logits, target, **options)
            if isinstance(built, Call):
                value = run(built)
                if key is not None:
                    plans.keep(key, built, logits, target, options)
                built = value
            elif not isinstance(built, Tensor):
                built = functools.reduce(operator.add, map(run, built))
            return like_input(built, logits, target)

        signature = inspect.signature(build).replace(return_annotation="Tensor")
        computed.__signature__ = signature  # type: ignore[attr-defined]  # what inspect looks for
        return cast(Callable[P, Tensor], computed)

    return decorate


def what(build: Callable[..., Built], options: dict[str, Any]) -> plans.Key:
    """A loss and its options, as far as a plan is for them alone."""
    fixed = ((name, value) for name, value in options.items() if name not in plans.VARYING)
    return build, *fixed, *(name for name in plans.LAMBDAS if name in options)


def ignores_fractions(logits: Tensor, target: Tensor, options: dict[str, Any]) -> bool:
    """Whether ``ignore_index`` is a class of a floating dense target, so that its mask may hold fractions."""
    index = options.get("ignore_index")
    labels = options.get("to_onehot_y", False) and logits.shape[1] > 1
    if index is None or labels or not target.is_floating_point():
        return False
    return target.ndim > 1 and 0 <= index < target.shape[1] != 1


def _dense_reason(
    logits: Tensor, target: Tensor, options: dict[str, Any], more: Reason | None
) -> tuple[str, bool]:
    """Why the kernels cannot run a problem that the oracle can, or "", and whether that takes float64."""
    if not all(isinstance(tensor, Tensor) and not tensor.is_nested for tensor in (logits, target)):
        return "", False  # the checks name it
    if logits.ndim == 2:
        return "the logits have no spatial dimensions", True
    if options.get("mask") is not None and ignores_fractions(logits, target, options):
        return "a mask weighs linearly and an ignored class of fractions does not: no pass does both", True
    return "" if more is None else more(logits, target, options), False


def _as_volume(
    logits: Tensor, target: Tensor, options: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """What has the checks, warnings and dtype of the usual way: a volume of at least one dimension."""
    usual = {**options, "reduction": "mean"}
    if logits.ndim > 2:
        return (logits, target), usual
    if options.get("mask") is not None:
        usual["mask"] = options["mask"][..., None]
    return (logits[..., None], target[..., None]), usual


def _dense(
    oracle: Callable[..., Tensor],
    built: Built,
    logits: Tensor,
    target: Tensor,
    options: dict[str, Any],
    exact: bool,
) -> Tensor:
    call = built if isinstance(built, Call) else built[0]
    assert isinstance(call, Call)
    checks.option("reduction", options.get("reduction", "mean"), ("mean", "sum", "none"))
    values, wrong = kernel_dtype(plain(target)), None
    if not call.spec.sums.dense:
        classes, ignored = logits.shape[1], call.spec.sums.ignore_index
        wrong = out_of_range(
            call.target.reshape(logits.shape[0], 1, *call.logits.shape[2:]), classes, ignored
        )
        counted = wrong if call.mask is None else wrong & (call.mask != 0)
        if readable(values):
            check_labels(counted.flatten(1).sum(1), call.target, call.mask, classes, ignored)
        # A one-hot of such a label would end the process off the CPU.
        values, wrong = values.masked_fill(wrong.view(values.shape), 0), counted
    dtype = torch.float64 if exact else torch.promote_types(logits.dtype, torch.float32)
    dense = oracle(plain(logits).to(dtype), values, **options).to(call.dtype)
    if wrong is not None:
        dense = torch.where(wrong.any(), torch.nan, dense)
    return like_input(dense, logits, target)
