"""What a call need not find out again: options, shapes, dtypes and device seen before lead to the op.

A plan holds no value of a tensor. What values decide (a weight below 0, a label out of range) is looked at in
every call, strides are the kernels' to read, and attributes of modules are options of the function that they
call: a change of any of them makes another key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, dispatch
from .autograd import fused_loss
from .call import Call, is_observed
from .spec import LossSpec, Weights

# A training run makes a handful; one that makes more than this starts anew.
LIMIT = 256
# Options of another value in every call, which are in no key: with the field of Weights that they become.
LAMBDAS = {
    "lambda_dice": "region_lambda",
    "lambda_gdl": "region_lambda",
    "lambda_ce": "voxel_lambda",
    "lambda_focal": "voxel_lambda",
}
# Options that may be tensors: of these a key has the shape.
TENSORS = ("mask", "weight", "dice_weight")
VARYING = {*TENSORS, *LAMBDAS}
# Where the factors of the classes come from; the first of these options that is a tensor.
_WEIGHTS = {"class_weight": ("dice_weight", "weight"), "pos_weight": ("weight",), "neg_weight": ()}
_DEVICES = ("cpu", "cuda", "xpu")

Key = tuple[Any, ...]


class Plan(NamedTuple):
    """A Call without its tensors.

    Attributes:
        watched: options that were tensors, and lambdas, which may be.
        weights: (field of Weights, the option that it is).
        lambdas: (field of Weights, the option that it is made of).
    """

    spec: LossSpec
    namespace: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None
    watched: tuple[str, ...]
    weights: tuple[tuple[str, str], ...]
    lambdas: tuple[tuple[str, str], ...]

    def takes(self, target: Tensor, options: dict[str, Any]) -> bool:
        """Whether the kernels can differentiate this call, and what they are given can be saved."""
        if not torch.is_grad_enabled():
            return True
        if target.requires_grad or target.is_inference():
            return False
        for name in self.watched:
            value = options[name]
            if isinstance(value, Tensor) and (value.requires_grad or value.is_inference()):
                return False
        return True

    def run(self, logits: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
        """The loss of these tensors."""
        mask: Tensor | None = options.get("mask")
        if mask is not None:
            checks.voxel_weights(mask, logits)
        made: dict[str, Tensor | None] = {}
        for field, name in self.lambdas:
            value = options[name]
            if isinstance(value, Tensor) or value != 1.0:
                made[field] = checks.factor(name, value, logits)
        for field, name in self.weights:
            made[field] = options[name]
            checks.counts(options[name])
        weights = Weights(**made) if made else _NO_WEIGHTS
        loss = fused_loss((logits, target, mask, *weights), self.spec, self.namespace, self.dtype)
        return loss if self.shape is None else loss.reshape(self.shape)


_NO_WEIGHTS = Weights()
_plans: dict[Key, Plan] = {}
# How often a module asked for a plan in vain.
_missed: dict[Key, int] = {}


def find(
    what: Key, logits: Tensor, target: Tensor, options: dict[str, Any]
) -> tuple[Key | None, Plan | None]:
    """The key of a call, None where there is no plan for its like, and the plan that was kept under it.

    Args:
        what: the loss, those of its options that are not VARYING, and which lambdas there are.
        options: with the others.
    """
    if type(logits) is not Tensor or type(target) is not Tensor or logits.is_nested or target.is_nested:
        return None, None
    if is_observed() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return None, None
    device = logits.device
    if device.type not in _DEVICES:
        return None, None
    facts: list[Any] = [what, dispatch.forced_backend(), torch.is_autocast_enabled(device.type)]
    facts += (logits.shape, logits.dtype, device, logits.layout)
    facts += (target.shape, target.dtype, target.device, target.layout)
    for name in TENSORS:
        value = options.get(name)
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.is_nested:
                return None, None
            facts += (name, value.shape, value.dtype, value.device, value.layout)
        elif value is not None:
            facts += (name, value)
    key = tuple(facts)
    try:
        return key, _plans.get(key)
    except TypeError:  # a list among the options
        return None, None


def put(key: Key, plan: Plan | None) -> None:
    """Keeps a plan under a key, or that there was none once and once more."""
    if len(_plans) + len(_missed) >= LIMIT:
        _plans.clear()
        _missed.clear()
    if plan is None:
        _missed[key] = _missed.get(key, 0) + 1
    else:
        _plans[key] = plan


def is_hopeless(key: Key) -> bool:
    """Whether a second call had no plan either: its like has none."""
    return _missed.get(key, 0) > 1


def keep(key: Key, call: Call, logits: Tensor, target: Tensor, options: dict[str, Any]) -> None:
    """Keeps the plan of a call whose tensors are the caller's own, and that warned of nothing."""
    single, without = logits.shape[1] == 1, not options.get("include_background", True)
    warns = single and (without or options.get("softmax") or options.get("to_onehot_y"))
    warns = warns or (options.get("use_softmax") and (without or single))
    own = call.logits is logits and call.target is target and call.mask is options.get("mask")
    if warns or not own or call.between is not None or call.volume_weight is not None or call.notes:
        return
    tensors = {name for name, x in options.items() if isinstance(x, Tensor) and name not in LAMBDAS}
    if not tensors <= set(TENSORS):
        return
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
    lambdas = tuple((field, name) for name, field in LAMBDAS.items() if name in options)
    watched = (*tensors, *(name for _, name in lambdas))
    namespace = dispatch.choose(logits).namespace
    plan = Plan(call.spec, namespace, call.dtype, call.shape, watched, tuple(weights), lambdas)
    put(key, plan)
