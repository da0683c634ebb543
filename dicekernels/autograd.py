"""Derivatives of the two passes: a Function in eager, another for Dynamo, an op for torch.export.

``fused_loss`` and ``total_sums`` are the only doors to them. A graph of torch.export keeps no Function, so
there each namespace has the ops ``loss`` and ``totals`` with an autograd of their own: an exported program
trains.

The kernels give losses and first derivatives. A second derivative and forward mode recompute on the
eager backend with ``torch.func``, which works outside its transforms as well as inside; vmap calls
the kernels once for each of its elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import eager
from .ops import NAMESPACES, direct, handles, libraries, loss_args, run_loss, run_totals
from .spec import LossSpec, SumsSpec, Weights

Tensors = tuple[Tensor | None, ...]

_TEN_NONES = (None,) * 10


def fused_loss(tensors: Tensors, spec: LossSpec, namespace: str, dtype: torch.dtype) -> Tensor:
    """The loss of (logits, target, mask, *Weights), differentiable in the logits."""
    result: Tensor
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            numbers = (*spec.sums.args(), *spec.finish.args(False))
            result, _ = handles[namespace].loss(*tensors, *numbers, dtype)
        else:
            result, _ = TracedLoss.apply(*tensors, spec, namespace, dtype)  # type: ignore[no-untyped-call]  # torch's
    elif _is_transformed():
        result, _ = TransformableLoss.apply(*tensors, spec, namespace, dtype)  # type: ignore[no-untyped-call]  # torch's
    else:
        logits, *others = tensors
        result = DirectLoss.apply(logits, (*others, spec, namespace, dtype))  # type: ignore[no-untyped-call]  # torch's
    return result


def _is_transformed() -> bool:
    """Whether torch.func, forward mode or torch.jit.trace ask for more than a loss and its gradient."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def total_sums(logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec, namespace: str) -> Tensor:
    """Sums (B, C, R) of the whole volume, differentiable in the logits."""
    if torch.compiler.is_exporting():
        totals = handles[namespace].totals(logits, target, mask, *spec.args())
    else:
        function = TracedSums if torch.compiler.is_compiling() else TransformableSums
        totals = function.apply(logits, target, mask, spec, namespace)  # type: ignore[no-untyped-call]  # torch's
    result: Tensor = totals
    return result


def eager_result(spec: LossSpec | SumsSpec, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Loss or sums (B, C, R) of their tensors, differentiable in each of them and to any order."""

    def result(logits: Tensor, target: Tensor, mask: Tensor | None, *weights: Tensor | None) -> Tensor:
        if isinstance(spec, SumsSpec):
            return eager.sums(logits, target, mask, spec).sum(1)
        return eager.loss(logits, target, mask, Weights(*weights), spec, dtype)

    return result


def _of(
    function: Callable[..., Tensor], tensors: Tensors, positions: list[int]
) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """Result and pullback of the function as one of the tensors at these positions alone."""

    def partial(*values: Tensor) -> Tensor:
        given = dict(zip(positions, values, strict=True))
        return function(*(given.get(i, tensor) for i, tensor in enumerate(tensors)))

    return torch.func.vjp(partial, *(tensors[i] for i in positions))  # type: ignore[return-value]  # torch's union with has_aux


def vjp_of(
    function: Callable[..., Tensor], tensors: Tensors, needed: tuple[bool, ...], grad: Tensor
) -> Tensors:
    """Gradients of the tensors that need one from that of function(*tensors), None for the others."""
    positions = [i for i, need in enumerate(needed) if need]
    _, pull = _of(function, tensors, positions)
    gradients = dict(zip(positions, pull(grad), strict=True))
    return tuple(gradients.get(i) for i in range(len(tensors)))


def jvp_of(function: Callable[..., Tensor], tensors: Tensors, tangents: Tensors) -> Tensor:
    """Derivative of function(*tensors) along those tangents that are not None.

    By two reverse passes, u -> J^T u being linear with the transpose J: torch nests no forward mode.
    """
    moved = [i for i, tangent in enumerate(tangents) if tangent is not None]
    result, pull = _of(function, tensors, moved)
    directions = tuple(tangents[i] for i in moved)
    derivative: Tensor = torch.func.vjp(pull, torch.zeros_like(result))[1](directions)[0]
    return derivative


def vmap_of(function: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """``function.apply`` of every element of a vmap, in order."""
    return [
        function.apply(
            *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]


def _wants_graph() -> bool:
    """True in a backward with create_graph=True, or under a transform of torch.func."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class TracedSums(torch.autograd.Function):
    """Sums (B, C, R) of the whole volume as Dynamo takes them, without a jvp."""

    forward = staticmethod(run_totals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.spec, ctx.namespace = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, target, mask = ctx.saved_tensors
        if _wants_graph():
            weights = (None,) * len(Weights._fields)
            rest = (*weights, ctx.spec, ctx.namespace, grad.dtype)
            gradient = LogitsGradient.apply(grad, None, logits, target, mask, *rest)  # type: ignore[no-untyped-call]  # torch's
        else:
            op = handles[ctx.namespace].sums_backward
            gradient = op(None, logits, target, mask, grad, *ctx.spec.args())
        return gradient, None, None, None, None


class TransformableSums(TracedSums):
    """The same for eager and the transforms of torch.func."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        TracedSums.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:-2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = TracedSums.backward(ctx, grad)
        needed = (False, *ctx.needs_input_grad[1:-2])
        if not any(needed):
            return gradients
        others = vjp_of(eager_result(ctx.spec, torch.float64), ctx.saved_tensors, needed, grad)
        return gradients[0], *others[1:], None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tensors = ctx.saved_tensors
        return jvp_of(eager_result(ctx.spec, torch.float64), tensors, tangents[: len(tensors)])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.stack(vmap_of(TransformableSums, info, in_dims, args)), 0


class TracedLoss(torch.autograd.Function):
    """Loss and coef as Dynamo takes them, without a jvp; for backward only coef is kept beside the inputs."""

    forward = staticmethod(run_loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.spec, ctx.namespace, ctx.dtype = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], *tensors)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> Any:
        coef, logits, target, mask, *weights = ctx.saved_tensors
        if grad_loss is None:
            return None, *_TEN_NONES
        if _wants_graph():
            rest = (*weights, ctx.spec, ctx.namespace, ctx.dtype)
            gradient = LogitsGradient.apply(grad_loss, coef, logits, target, mask, *rest)  # type: ignore[no-untyped-call]  # torch's
        else:
            op = handles[ctx.namespace].sums_backward
            gradient = op(grad_loss, logits, target, mask, coef, *ctx.spec.sums.args())
        return gradient, *_TEN_NONES


class TransformableLoss(TracedLoss):
    """The same for the transforms of torch.func, forward mode and torch.jit.trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        TracedLoss.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:-3])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> Any:
        gradients = TracedLoss.backward(ctx, grad_loss, None)
        # Callers see what requires a gradient in the innermost transform alone.
        needed = (False, *ctx.needs_input_grad[1:-3])
        if grad_loss is None or not any(needed):
            return gradients
        others = vjp_of(eager_result(ctx.spec, ctx.dtype), ctx.saved_tensors[1:], needed, grad_loss)
        return gradients[0], *others[1:], None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        tensors = ctx.saved_tensors
        return jvp_of(eager_result(ctx.spec, ctx.dtype), tensors, tangents[: len(tensors)]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        losses, coefs = zip(*vmap_of(TransformableLoss, info, in_dims, args), strict=True)
        return (torch.stack(losses), torch.stack(coefs)), (0, 0)


class DirectLoss(torch.autograd.Function):
    """The loss alone in plain eager, of (logits, what else ``run_loss`` takes).

    Without what setup_context, an output that nobody reads and a dozen arguments cost.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rest: tuple[Any, ...]) -> Tensor:
        loss, coef = run_loss(logits, *rest)
        *tensors, ctx.spec, ctx.namespace, ctx.dtype = rest
        ctx.save_for_backward(coef, logits, *tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return TracedLoss.backward(ctx, grad_loss, None)[0], None
        coef, logits, target, mask, *_ = ctx.saved_tensors
        op = direct[ctx.namespace].sums_backward
        return op(grad_loss, logits, target, mask, coef, *ctx.spec.sums.args()), None


class LogitsGradient(torch.autograd.Function):
    """Gradient of the logits from that of a loss or of the sums; differentiable in each of its tensors."""

    @staticmethod
    def forward(grad: Tensor, coef: Tensor | None, *rest: Any) -> Tensor:
        logits, target, mask, *_, spec, namespace, _ = rest
        op = handles[namespace].sums_backward
        if isinstance(spec, LossSpec):
            gradient: Tensor = op(grad, logits, target, mask, coef, *spec.sums.args())
        else:
            gradient = op(None, logits, target, mask, grad, *spec.args())
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, _, *tensors, ctx.spec, _, ctx.dtype = inputs
        ctx.save_for_backward(grad, *tensors)
        ctx.save_for_forward(grad, *tensors)

    @staticmethod
    def _again(ctx: Any) -> Callable[..., Tensor]:
        """The same of (grad, logits, target, ..), on the eager backend."""
        result = eager_result(ctx.spec, ctx.dtype)

        def gradient(grad: Tensor, logits: Tensor, *others: Tensor | None) -> Tensor:
            pull = torch.func.vjp(lambda z: result(z, *others), logits)[1]
            of_logits: Tensor = pull(grad)[0]
            return of_logits

        return gradient

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        tensors = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2 : 1 + len(tensors)])
        of_grad, *others = vjp_of(LogitsGradient._again(ctx), tensors, needed, cotangent)
        return of_grad, None, *others, None, None, None

    @staticmethod
    def jvp(ctx: Any, of_grad: Tensor | None, _: Any, *tangents: Any) -> Tensor:
        tensors = ctx.saved_tensors
        return jvp_of(LogitsGradient._again(ctx), tensors, (of_grad, *tangents[: len(tensors) - 1]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.stack(vmap_of(LogitsGradient, info, in_dims, args)), 0


def define(namespace: str) -> None:
    """Autograd of the ops ``loss`` and ``totals`` of a namespace that ``ops.define`` has made."""

    def save_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, spec, dtype = loss_args(inputs)
        TracedLoss.setup_context(ctx, (*tensors, spec, namespace, dtype), output)

    def save_totals(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        spec = SumsSpec.of_args(inputs[3:])
        TracedSums.setup_context(ctx, (*inputs[:3], spec, namespace), output)

    def backward_of(function: type[TracedLoss] | type[TracedSums]) -> Callable[..., Any]:
        def backward(ctx: Any, *grads: Any) -> Any:
            return function.backward(ctx, *grads)[0], *(None,) * (len(ctx.needs_input_grad) - 1)

        return backward

    for name, function, save in (
        ("loss", TracedLoss, save_loss),
        ("totals", TracedSums, save_totals),
    ):
        torch.library.register_autograd(
            f"{namespace}::{name}", backward_of(function), setup_context=save, lib=libraries[namespace]
        )


for _namespace in NAMESPACES:
    define(_namespace)
