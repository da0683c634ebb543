"""What a call need not find out again: options, shapes, dtypes and a device seen before lead straight to the ops.

A plan holds no value of a tensor. What is decided by values (a weight below 0, a label out of range) is looked at
in every call, strides are the kernels' to read, and attributes of modules are options of the function that they
call: a change of any of them makes another key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, dispatch
from .autograd import fused_loss
from .call import Call, is_observed
from .spec import LossSpec, Weights

# A training run makes a handful; one that makes more than this starts anew.
LIMIT = 256
# Options that may have another value in every call, and are in no key: with the field of Weights that they become.
_LAMBDAS = {
    "lambda_dice": "region_lambda",
    "lambda_gdl": "region_lambda",
    "lambda_ce": "voxel_lambda",
    "lambda_focal": "voxel_lambda",
}
# Where the factors of the classes come from; the first of these options that is a tensor.
_WEIGHTS = {"class_weight": ("dice_weight", "weight"), "pos_weight": ("weight",), "neg_weight": ()}
_DEVICES = ("cpu", "cuda", "xpu")

Key = tuple[Any, ...]


class Plan(NamedTuple):
    """A Call without its tensors.

    Attributes:
        tensors: options that are tensors, but for lambdas.
        weights: (field of Weights, the option that it is).
        lambdas: (field of Weights, the option that it is made of).
    """

    spec: LossSpec
    namespace: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None
    tensors: tuple[str, ...]
    weights: tuple[tuple[str, str], ...]
    lambdas: tuple[tuple[str, str], ...]

    def takes(self, target: Tensor, options: dict[str, Any]) -> bool:
        """Whether the kernels can differentiate this call, and what they are given can be saved."""
        if not torch.is_grad_enabled():
            return True
        names = (*self.tensors, *(option for _, option in self.lambdas))
        for value in (target, *(options[name] for name in names)):
            if isinstance(value, Tensor) and (value.requires_grad or value.is_inference()):
                return False
        return True

    def run(self, logits: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
        """The loss of these tensors."""
        weights = _NO_WEIGHTS
        if self.weights or self.lambdas:
            made = {field: checks.factor(name, options[name], logits) for field, name in self.lambdas}
            for field, name in self.weights:
                made[field] = options[name]
                checks.counts(options[name], "the value/values of the `weight` should be no less than 0.")
            weights = Weights(**made)
        mask: Tensor | None = options.get("mask")
        if mask is not None:
            checks.voxel_weights(mask, logits)
        loss = fused_loss((logits, target, mask, *weights), self.spec, self.namespace, self.dtype)
        return loss if self.shape is None else loss.reshape(self.shape)


_NO_WEIGHTS = Weights()
_plans: dict[Key, Plan] = {}


def key(function: Callable[..., Any], logits: Tensor, target: Tensor, options: dict[str, Any]) -> Key | None:
    """What a plan depends on; None for a call that has no plan."""
    if torch.compiler.is_compiling() or type(logits) is not Tensor or type(target) is not Tensor:
        return None
    if is_observed() or torch._C._are_functorch_transforms_active() or logits.is_nested or target.is_nested:
        return None
    device = logits.device
    if device.type not in _DEVICES:
        return None
    parts = [function, dispatch.forced_backend(), torch.is_autocast_enabled(device.type)]
    parts += [logits.shape, logits.dtype, device, logits.layout]
    parts += [target.shape, target.dtype, target.device, target.layout]
    for name, value in options.items():
        if name in _LAMBDAS:
            parts.append(name)
        elif isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.is_nested:
                return None
            parts += [name, value.shape, value.dtype, value.device, value.layout]
        else:
            parts += [name, value]
    return tuple(parts)


def find(key: Key) -> Plan | None:
    """The plan that was kept under a key."""
    try:
        return _plans.get(key)
    except TypeError:  # a list among the options
        return None


def keep(key: Key, call: Call, logits: Tensor, target: Tensor, options: dict[str, Any]) -> None:
    """Keeps the plan of a call whose tensors are the caller's own, and that warned of nothing."""
    warns = logits.shape[1] == 1 or (
        options.get("use_softmax") and not options.get("include_background", True)
    )
    own = call.logits is logits and call.target is target and call.mask is options.get("mask")
    if warns or not own or call.between is not None or call.volume_weight is not None or call.notes:
        return
    tensors = {name for name, x in options.items() if isinstance(x, Tensor) and name not in _LAMBDAS}
    weights = []
    for field, places in _WEIGHTS.items():
        weight = getattr(call.weights, field)
        name = next((name for name in places if name in tensors), None)
        if weight is not None:
            if name is None or options[name] is not weight:
                return
            weights.append((field, name))
    if tensors - {"mask"} != {name for _, name in weights}:
        return
    lambdas = ((field, name) for name, field in _LAMBDAS.items() if name in options)
    namespace = dispatch.choose(logits).namespace
    plan = Plan(call.spec, namespace, call.dtype, call.shape, tuple(tensors), tuple(weights), tuple(lambdas))
    if len(_plans) >= LIMIT:
        _plans.clear()
    try:
        _plans[key] = plan
    except TypeError:
        pass
