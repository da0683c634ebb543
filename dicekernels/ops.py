"""The ops ``sums``, ``finish`` and ``sums_backward`` of each namespace in NAMESPACES, and their autograd.

Shapes: logits (B, C, *S) floating; target labels (B, 1, *S) or (B, *S), or values (B, C, *S); mask (B, 1, *S)
voxel weights; sums (B, K, C, R) float64, K = chunk_count(V), R = rows that are on; coef (B, C, R)
float64 = dLoss/dsums for the rows that depend on the logits, 0 for G, N and BAD;
loss () or (groups, outputs), float64 rounded to `dtype`; gradient as the logits in shape, dtype and strides.

Every namespace has the same schemas: ``dicekernels`` is filled by the binary (CPU), ``dicekernels_triton``
by Triton kernels, ``dicekernels_eager`` by PyTorch code. They are opaque to torch.compile and have fakes;
autograd is in the Functions below.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, deferred
from . import finish as formulas
from .backends import eager, native
from .backends.eager import LabelRangeError
from .derivatives import Gradient
from .spec import (
    BAD,
    FinishSpec,
    LossSpec,
    SumsSpec,
    chunk_count,
    row_index,
)
from .tensors import readable

SUMS_ARGS = SumsSpec.schema()
FINISH_ARGS = f"int rows, {FinishSpec.schema()}, bool empty, ScalarType dtype"
SCHEMAS = {
    "sums": f"sums(Tensor logits, Tensor target, Tensor? mask, {SUMS_ARGS}) -> Tensor",
    "finish": (
        "finish(Tensor sums, Tensor? class_weight, Tensor? pos_weight, Tensor? neg_weight, "
        "Tensor? region_lambda, Tensor? voxel_lambda, "
        f"{FINISH_ARGS}) -> (Tensor, Tensor)"
    ),
    "sums_backward": (
        "sums_backward(Tensor? grad_loss, Tensor logits, Tensor target, Tensor? mask, Tensor coef, "
        f"{SUMS_ARGS}) -> Tensor"
    ),
}
NAMESPACES = ("dicekernels", "dicekernels_triton", "dicekernels_eager")

libraries: dict[str, torch.library.Library] = {}


sums_spec = functools.lru_cache(SumsSpec.of_args)
finish_spec = FinishSpec.of_args


def _eager_sums(logits: Tensor, target: Tensor, mask: Tensor | None, *args: Any) -> Tensor:
    spec = sums_spec(args)
    return _checked(eager.sums(logits, target, mask, spec), logits, target, mask, spec)


def _checked(slots: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec) -> Tensor:
    """The slots; raises LabelRangeError where reading the count of bad labels costs no synchronisation.

    Elsewhere only with DICEKERNELS_CHECK=1; `finish` makes the loss NaN, and a later ``call_sums`` raises.
    """
    if spec.rows & BAD and deferred.reads_at_once(logits.device):
        eager.check_labels(slots, target, mask, logits.shape[1], spec)
    return slots


def _count(slots: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec) -> None:
    """Raises LabelRangeError, or sends the count on its way to a later call."""
    if not spec.rows & BAD or deferred.reads_at_once(logits.device):
        _checked(slots, logits, target, mask, spec)
        return
    # Of a chunk the count stands in the first class.
    deferred.count_later(slots[:, :, 0, row_index(spec.rows, BAD)], target, logits.shape[1])


def _eager_finish(
    sums: Tensor,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    region_lambda: Tensor | None,
    voxel_lambda: Tensor | None,
    rows: int,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    arguments = (sums.sum(1), class_weight, pos_weight, neg_weight, region_lambda, voxel_lambda, rows)
    spec, (empty, dtype) = finish_spec(args[:-2]), args[-2:]
    return formulas.finish(*arguments, spec, empty, dtype), formulas.coef(*arguments, spec, empty)


def _eager_sums_backward(
    grad_loss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    coef: Tensor,
    *args: Any,
) -> Tensor:
    return eager.sums_backward(grad_loss, logits, target, mask, coef, sums_spec(args))


def _fake_sums(logits: Tensor, target: Tensor, mask: Tensor | None, *args: Any) -> Tensor:
    voxels = 1
    for size in logits.shape[2:]:
        voxels = voxels * size
    samples, classes = logits.shape[:2]
    rows: int = args[4]
    return logits.new_empty((samples, chunk_count(voxels), classes, rows.bit_count()), dtype=torch.float64)


def _fake_finish(
    sums: Tensor,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    region_lambda: Tensor | None,
    voxel_lambda: Tensor | None,
    rows: int,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    samples, _, classes, width = sums.shape
    shape = finish_spec(args[:-2]).loss_shape(samples, classes)
    return sums.new_empty(shape, dtype=args[-1]), sums.new_empty((samples, classes, width))


def _fake_sums_backward(
    grad_loss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    coef: Tensor,
    *args: Any,
) -> Tensor:
    return torch.empty_like(logits)


@functools.cache
def _triton_kernels() -> Any:
    """Triton is imported by the first op to run: it costs `import dicekernels` more than all of ours."""
    from .backends.triton import kernels

    return kernels


def _triton_sums(logits: Tensor, target: Tensor, mask: Tensor | None, *args: Any) -> Tensor:
    spec = sums_spec(args)
    return _checked(_triton_kernels().sums(logits, target, mask, spec), logits, target, mask, spec)


def _triton_finish(*args: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _triton_kernels().finish(*args)
    return result


def _triton_sums_backward(
    grad_loss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    coef: Tensor,
    *args: Any,
) -> Tensor:
    spec = sums_spec(args)
    gradient: Tensor = _triton_kernels().sums_backward(grad_loss, logits, target, mask, coef, spec)
    return gradient


def on_one_device(schema: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """``body`` of an op after the check that its tensors are on one device.

    The dispatcher goes by all of the tensors of a call: one on "meta" makes it take the fake, one on a GPU
    the kernels of that GPU, whatever the others are. A 0-dim lambda of the CPU is taken by value.
    """
    names = re.findall(r"Tensor\?? (\w+)", schema.split(")")[0])
    first = "logits" if "logits" in names else "sums"
    at = names.index(first)
    by_value = [name for name in names if name.endswith("_lambda")]

    @functools.wraps(body)
    def checked(*args: Any) -> Any:
        checks.one_device(names, args[: len(names)], first, args[at].device, by_value)
        return body(*args)

    return checked


FAKES: dict[str, Callable[..., Any]] = {
    "sums": _fake_sums,
    "finish": _fake_finish,
    "sums_backward": _fake_sums_backward,
}
BODIES: dict[str, dict[str, Callable[..., Any]]] = {
    "dicekernels_eager": {
        "sums": _eager_sums,
        "finish": _eager_finish,
        "sums_backward": _eager_sums_backward,
    },
    "dicekernels_triton": {
        "sums": _triton_sums,
        "finish": _triton_finish,
        "sums_backward": _triton_sums_backward,
    },
}


def define(namespace: str) -> None:
    """Schemas and fakes of the three ops in a namespace; their bodies come from elsewhere."""
    library = libraries[namespace] = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(schema)
        fake = on_one_device(schema, FAKES[name])
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)


def _register() -> None:
    for namespace in NAMESPACES:
        define(namespace)
    for namespace, functions in BODIES.items():
        for name, body in functions.items():
            checked = on_one_device(SCHEMAS[name], body)
            libraries[namespace].impl(name, checked, "CompositeExplicitAutograd")
    native.load_error("cpu")
    if torch.version.cuda is not None:
        native.load_error("cuda")


_register()


def call_sums(namespace: str, logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec) -> Tensor:
    """The op ``sums``; a label out of range raises LabelRangeError, here or in a later call (deferred.py)."""
    op = getattr(torch.ops, namespace).sums
    if torch.compiler.is_compiling():
        result: Tensor = op(logits, target, mask, *spec.args())
        return result
    deferred.raise_earlier(logits.device)
    try:
        slots: Tensor = op(logits, target, mask, *spec.args())
        # The kernels of a GPU count such labels; whoever launches them decides whether to wait for the count.
        # Those of the CPU and what is in BODIES have raised by themselves where that costs no wait.
        counted = namespace not in BODIES and (namespace != "dicekernels" or logits.device.type != "cpu")
        if counted or not deferred.reads_at_once(logits.device):
            _count(slots, logits, target, mask, spec)
        return slots
    except LabelRangeError:
        raise
    except RuntimeError as error:
        # The binary can only raise RuntimeError; the message is one line before torch's own trailer.
        message = str(error)
        if "hold a label outside [0, " not in message:
            raise
        raise LabelRangeError(message[message.index("target:") :].splitlines()[0]) from None


def eager_totals(logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec) -> Tensor:
    """Sums (B, C, R) in PyTorch, differentiable in every tensor; labels out of range as in ``call_sums``."""
    slots = eager.sums(logits, target, mask, spec)
    if spec.rows & BAD and readable(slots):
        deferred.raise_earlier(logits.device)
        mask = None if mask is None else mask.detach()
        _count(slots.detach(), logits, target.detach(), mask, spec)
    return slots.sum(1)


class RegionSums(torch.autograd.Function):
    """Sums (B, C, R) of the whole volume, differentiable in the logits."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec, namespace: str
    ) -> Tensor:
        return call_sums(namespace, logits, target, mask, spec).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, target, mask, ctx.spec, ctx.namespace = inputs
        ctx.save_for_backward(logits, target, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, target, mask = ctx.saved_tensors
        if _wants_graph():
            rest = (*(None,) * 5, ctx.spec, ctx.namespace, grad.dtype)
            gradient = Gradient.apply(grad, None, logits, target, mask, *rest)  # type: ignore[no-untyped-call]  # torch's apply
        else:
            op = getattr(torch.ops, ctx.namespace).sums_backward
            gradient = op(None, logits, target, mask, grad, *ctx.spec.args())
        return gradient, None, None, None, None


class FusedLoss(torch.autograd.Function):
    """Loss and coef, differentiable in the logits; between forward and backward only coef is kept."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        class_weight: Tensor | None,
        pos_weight: Tensor | None,
        neg_weight: Tensor | None,
        region_lambda: Tensor | None,
        voxel_lambda: Tensor | None,
        spec: LossSpec,
        namespace: str,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        slots = call_sums(namespace, logits, target, mask, spec.sums)
        empty = logits.numel() == 0
        loss, coef = getattr(torch.ops, namespace).finish(
            slots,
            class_weight,
            pos_weight,
            neg_weight,
            region_lambda,
            voxel_lambda,
            spec.sums.rows,
            *spec.finish.args(empty),
            dtype,
        )
        return loss, coef

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, target, mask, *weights, ctx.spec, ctx.namespace, ctx.dtype = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, mask, output[1], *weights)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> Any:
        logits, target, mask, coef, *weights = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * 11
        if _wants_graph():
            rest = (*weights, ctx.spec, ctx.namespace, ctx.dtype)
            gradient = Gradient.apply(grad_loss, coef, logits, target, mask, *rest)  # type: ignore[no-untyped-call]  # torch's apply
        else:
            op = getattr(torch.ops, ctx.namespace).sums_backward
            gradient = op(grad_loss, logits, target, mask, coef, *ctx.spec.sums.args())
        return gradient, *(None,) * 10


def _wants_graph() -> bool:
    """True in a backward with create_graph=True, or under a transform of torch.func."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


__all__ = [
    "SCHEMAS",
    "FusedLoss",
    "LabelRangeError",
    "RegionSums",
    "call_sums",
]
