"""What torch asks of the Functions in ``ops`` beyond a first backward: second order, jvp and vmap.

The kernels give losses and first derivatives. A second derivative and forward mode recompute on the
eager backend with ``torch.func``, which works outside its transforms as well as inside; vmap calls
the kernels once for each of its elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import eager
from .spec import LossSpec, SumsSpec

Tensors = tuple[Tensor | None, ...]


def eager_result(spec: LossSpec | SumsSpec, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Loss or sums (B, C, R) of their tensors, differentiable in each of them and to any order."""

    def result(
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        class_weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        neg_weight: Tensor | None = None,
        region_lambda: Tensor | None = None,
        voxel_lambda: Tensor | None = None,
    ) -> Tensor:
        if isinstance(spec, SumsSpec):
            return eager.sums(logits, target, mask, spec).sum(1)
        weights = (class_weight, pos_weight, neg_weight, region_lambda, voxel_lambda)
        return eager.loss(logits, target, mask, *weights, spec, dtype)

    return result


def _of(
    function: Callable[..., Tensor], tensors: Tensors, positions: list[int]
) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """Result and pullback of the function as one of the tensors at these positions alone."""

    def partial(*values: Tensor) -> Tensor:
        given = dict(zip(positions, values, strict=True))
        return function(*(given.get(i, tensor) for i, tensor in enumerate(tensors)))

    return torch.func.vjp(partial, *(tensors[i] for i in positions))  # type: ignore[return-value]  # torch's union with has_aux


def pulled(
    function: Callable[..., Tensor], tensors: Tensors, needed: tuple[bool, ...], grad: Tensor
) -> Tensors:
    """Gradients of the tensors that need one from that of function(*tensors), None for the others."""
    positions = [i for i, need in enumerate(needed) if need]
    _, pull = _of(function, tensors, positions)
    gradients = dict(zip(positions, pull(grad), strict=True))
    return tuple(gradients.get(i) for i in range(len(tensors)))


def pushed(function: Callable[..., Tensor], tensors: Tensors, tangents: Tensors) -> Tensor:
    """Derivative of function(*tensors) along those tangents that are not None.

    By two reverse passes, u -> J^T u being linear with the transpose J: torch nests no forward mode.
    """
    moved = [i for i, tangent in enumerate(tangents) if tangent is not None]
    result, pull = _of(function, tensors, moved)
    directions = tuple(tangents[i] for i in moved)
    derivative: Tensor = torch.func.vjp(pull, torch.zeros_like(result))[1](directions)[0]
    return derivative


def each(function: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """``function.apply`` of every element of a vmap, in order."""
    return [
        function.apply(
            *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]


class Gradient(torch.autograd.Function):
    """Gradient of the logits from that of a loss or of the sums; differentiable in each of its tensors."""

    @staticmethod
    def forward(
        grad: Tensor,
        coef: Tensor | None,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        class_weight: Tensor | None,
        pos_weight: Tensor | None,
        neg_weight: Tensor | None,
        region_lambda: Tensor | None,
        voxel_lambda: Tensor | None,
        spec: LossSpec | SumsSpec,
        namespace: str,
        dtype: torch.dtype,
    ) -> Tensor:
        op = getattr(torch.ops, namespace).sums_backward
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
        of_grad, *others = pulled(Gradient._again(ctx), tensors, needed, cotangent)
        return of_grad, None, *others, None, None, None

    @staticmethod
    def jvp(ctx: Any, of_grad: Tensor | None, _: Any, *tangents: Any) -> Tensor:
        tensors = ctx.saved_tensors
        return pushed(Gradient._again(ctx), tensors, (of_grad, *tangents[: len(tensors) - 1]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.stack(each(Gradient, info, in_dims, args)), 0
