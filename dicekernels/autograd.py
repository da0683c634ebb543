"""The two passes as torch wants them: a Function in eager, another for Dynamo, an op for torch.export.

``fused_loss`` and ``total_sums`` are the only doors to them. A graph of torch.export keeps no Function, so
there each namespace has the ops ``loss`` and ``totals`` with an autograd of their own: an exported program
trains. The chunks of ``sums`` stay inside of them, so that it takes volumes of every size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .derivatives import each, eager_result, pulled, pushed
from .spec import LossSpec, SumsSpec

_WEIGHTS = (
    "Tensor? class_weight, Tensor? pos_weight, Tensor? neg_weight, "
    "Tensor? region_lambda, Tensor? voxel_lambda"
)
SCHEMAS = {
    "loss": (
        f"loss(Tensor logits, Tensor target, Tensor? mask, {_WEIGHTS}, {ops.SUMS_ARGS}, "
        f"{ops.FINISH_ARGS.removeprefix('int rows, ')}) -> (Tensor, Tensor)"
    ),
    "totals": f"totals(Tensor logits, Tensor target, Tensor? mask, {ops.SUMS_ARGS}) -> Tensor",
}
# Tensors before the numbers in the schema of ``loss``, and numbers of ``sums`` among these.
TENSORS, SUMS_NUMBERS = 8, ops.SUMS_ARGS.count(",") + 1


def fused_loss(
    tensors: tuple[Tensor | None, ...], spec: LossSpec, namespace: str, dtype: torch.dtype
) -> Tensor:
    """The loss of (logits, target, mask, class, positive and negative weight, both lambdas)."""
    if torch.compiler.is_exporting():
        numbers = (*spec.sums.args(), *spec.finish.args(False))
        loss, _ = getattr(torch.ops, namespace).loss(*tensors, *numbers, dtype)
    else:
        function: type[torch.autograd.Function] = EagerLoss
        if torch.compiler.is_compiling():
            function = ops.FusedLoss
        elif torch._C._are_functorch_transforms_active():
            function = TransformableLoss
        loss, _ = function.apply(*tensors, spec, namespace, dtype)
    result: Tensor = loss
    return result


def total_sums(logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec, namespace: str) -> Tensor:
    """Sums (B, C, R) of the whole volume."""
    if torch.compiler.is_exporting():
        totals = getattr(torch.ops, namespace).totals(logits, target, mask, *spec.args())
    else:
        function = ops.RegionSums if torch.compiler.is_compiling() else TransformableSums
        totals = function.apply(logits, target, mask, spec, namespace)  # type: ignore[no-untyped-call]  # torch's
    result: Tensor = totals
    return result


class TransformableSums(ops.RegionSums):
    """RegionSums for the transforms of torch.func; Dynamo traces no Function that has a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ops.RegionSums.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:-2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = ops.RegionSums.backward(ctx, grad)
        needed = (False, *ctx.needs_input_grad[1:-2])
        if not any(needed):
            return gradients
        others = pulled(eager_result(ctx.spec, torch.float64), ctx.saved_tensors, needed, grad)
        return gradients[0], *others[1:], None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tensors = ctx.saved_tensors
        return pushed(eager_result(ctx.spec, torch.float64), tensors, tangents[: len(tensors)])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.stack(each(TransformableSums, info, in_dims, args)), 0


class TransformableLoss(ops.FusedLoss):
    """FusedLoss for the transforms of torch.func; Dynamo traces no Function that has a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ops.FusedLoss.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:-3])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> Any:
        gradients = ops.FusedLoss.backward(ctx, grad_loss, None)
        # Callers see what requires a gradient in the innermost transform alone.
        needed = (False, *ctx.needs_input_grad[1:-3])
        if grad_loss is None or not any(needed):
            return gradients
        logits, target, mask, _, *weights = ctx.saved_tensors
        tensors = (logits, target, mask, *weights)
        others = pulled(eager_result(ctx.spec, ctx.dtype), tensors, needed, grad_loss)
        return gradients[0], *others[1:], None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        tensors = ctx.saved_tensors
        return pushed(eager_result(ctx.spec, ctx.dtype), tensors, tangents[: len(tensors)]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        losses, coefs = zip(*each(TransformableLoss, info, in_dims, args), strict=True)
        return (torch.stack(losses), torch.stack(coefs)), (0, 0)


class EagerLoss(torch.autograd.Function):
    """TransformableLoss outside of torch.func, without the binding of signatures that setup_context costs."""

    backward = TransformableLoss.backward
    jvp = TransformableLoss.jvp

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = ops.FusedLoss.forward(*inputs)
        TransformableLoss.setup_context(ctx, inputs, output)
        return output


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], LossSpec, torch.dtype]:
    """Arguments of the op ``loss`` as (tensors, spec, dtype of the loss)."""
    sums, finish = args[TENSORS:][:SUMS_NUMBERS], args[TENSORS + SUMS_NUMBERS : -2]
    return args[:TENSORS], LossSpec(ops.sums_spec(sums), ops.finish_spec(finish)), args[-1]


def _fake_loss(*args: Any) -> tuple[Tensor, Tensor]:
    (logits, *_), spec, dtype = _split(args)
    samples, classes = logits.shape[:2]
    shape = spec.finish.loss_shape(samples, classes)
    width = spec.sums.rows.bit_count()
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(
        (samples, classes, width), dtype=torch.float64
    )


def _fake_totals(logits: Tensor, *args: Any) -> Tensor:
    rows = ops.sums_spec(args[2:]).rows
    return logits.new_empty((*logits.shape[:2], rows.bit_count()), dtype=torch.float64)


def define(namespace: str) -> None:
    """The ops ``loss`` and ``totals`` of a namespace that ``ops.define`` has made."""

    def loss(*args: Any) -> tuple[Tensor, Tensor]:
        tensors, spec, dtype = _split(args)
        return ops.FusedLoss.forward(*(*tensors, spec, namespace, dtype))

    def totals(logits: Tensor, target: Tensor, mask: Tensor | None, *args: Any) -> Tensor:
        return ops.RegionSums.forward(logits, target, mask, ops.sums_spec(args), namespace)

    def save_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, spec, dtype = _split(inputs)
        ops.FusedLoss.setup_context(ctx, (*tensors, spec, namespace, dtype), output)

    def save_totals(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, spec = inputs[:3], ops.sums_spec(inputs[3:])
        ops.RegionSums.setup_context(ctx, (*tensors, spec, namespace), output)

    def back_from_loss(ctx: Any, grad_loss: Tensor | None, _: Any) -> Any:
        gradient = ops.FusedLoss.backward(ctx, grad_loss, None)[0]
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)

    def back_from_totals(ctx: Any, grad: Tensor) -> Any:
        return ops.RegionSums.backward(ctx, grad)[0], *(None,) * (len(ctx.needs_input_grad) - 1)

    made: dict[str, tuple[Callable[..., Any], ...]] = {
        "loss": (loss, _fake_loss, save_loss, back_from_loss),
        "totals": (totals, _fake_totals, save_totals, back_from_totals),
    }
    library = ops.libraries[namespace]
    for name, (body, fake, save, back) in made.items():
        library.define(SCHEMAS[name])
        body, fake = (ops.on_one_device(SCHEMAS[name], function) for function in (body, fake))
        library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        torch.library.register_autograd(f"{namespace}::{name}", back, setup_context=save, lib=library)


for _namespace in ops.NAMESPACES:
    define(_namespace)
