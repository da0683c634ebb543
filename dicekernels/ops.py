"""The ops ``sums``, ``finish`` and ``sums_backward`` of each namespace in NAMESPACES, and two made of them.

Shapes: logits (B, C, *S) floating; target labels (B, 1, *S) or (B, *S), or values (B, C, *S); mask (B, 1, *S)
voxel weights; sums (B, K, C, R) float64, K = chunk_count(V), R = rows that are on; coef (B, C, R)
float64 = dLoss/dsums for the rows that depend on the logits, 0 for G, N and BAD;
loss () or (groups, outputs), float64 rounded to `dtype`; gradient as the logits in shape, dtype and strides.

Every namespace has the same schemas: ``dicekernels`` is filled by the binary (CPU), ``dicekernels_triton``
by Triton kernels, ``dicekernels_eager`` by PyTorch code. They are opaque to torch.compile and have fakes.
``loss`` and ``totals`` are for graphs of torch.export: the chunks of ``sums`` stay inside of them, so that a
program takes volumes of every size. Derivatives: autograd.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, deferred
from .backends import eager, native, triton
from .backends.eager import LabelRangeError
from .spec import BAD, FinishSpec, LossSpec, SumsSpec, Weights, chunk_count, row_index
from .tensors import readable

WEIGHTS = len(Weights._fields)
NAMESPACES = ("dicekernels", "dicekernels_triton", "dicekernels_eager")


class Handles(NamedTuple):
    """The ops of a namespace."""

    sums: Any
    finish: Any
    sums_backward: Any
    loss: Any
    totals: Any


# By namespace, filled by ``define``: what a trace can follow, and the same without Python's share of a call.
handles: dict[str, Handles] = {}
direct: dict[str, Handles] = {}
libraries: dict[str, torch.library.Library] = {}


# Where Python fills the three ops: what has functions of their names.
PYTHON: dict[str, Callable[[], Any]] = {
    "dicekernels_triton": triton.kernels,
    "dicekernels_eager": lambda: eager,
}

# Specs of the calls that run. Numbers of fakes and graphs may be symbols, which have no hash.
_sums_spec = functools.lru_cache(SumsSpec.of_args)
_finish_spec = functools.lru_cache(FinishSpec.of_args)


def loss_args(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], LossSpec, torch.dtype]:
    """Arguments of the op ``loss``: its tensors, the spec and the dtype of the loss."""
    tensors, sums = 3 + WEIGHTS, len(SumsSpec.__dataclass_fields__)
    *finish, _, dtype = args[tensors + sums :]
    spec = LossSpec(SumsSpec.of_args(args[tensors : tensors + sums]), FinishSpec.of_args(finish))
    return args[:tensors], spec, dtype


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


def _sums(namespace: str, logits: Tensor, target: Tensor, mask: Tensor | None, *args: Any) -> Tensor:
    spec = _sums_spec(args)
    return _checked(PYTHON[namespace]().sums(logits, target, mask, spec), logits, target, mask, spec)


def _fake_sums(logits: Tensor, target: Tensor, mask: Tensor | None, *args: Any) -> Tensor:
    voxels = 1
    for size in logits.shape[2:]:
        voxels = voxels * size
    samples, classes = logits.shape[:2]
    width = SumsSpec.of_args(args).rows.bit_count()
    return logits.new_empty((samples, chunk_count(voxels), classes, width), dtype=torch.float64)


def _finish(namespace: str, sums: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weights, (rows, *numbers, empty, dtype) = args[:WEIGHTS], args[WEIGHTS:]
    spec = _finish_spec(tuple(numbers))
    result: tuple[Tensor, Tensor] = PYTHON[namespace]().finish(
        sums, Weights(*weights), rows, spec, empty, dtype
    )
    return result


def _fake_finish(sums: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _, *numbers, _, dtype = args[WEIGHTS:]
    samples, _, classes, width = sums.shape
    shape = FinishSpec.of_args(numbers).loss_shape(samples, classes)
    return sums.new_empty(shape, dtype=dtype), sums.new_empty((samples, classes, width))


def _sums_backward(namespace: str, *args: Any) -> Tensor:
    tensors, numbers = args[:5], args[5:]
    gradient: Tensor = PYTHON[namespace]().sums_backward(*tensors, _sums_spec(numbers))
    return gradient


def _fake_sums_backward(grad_loss: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _loss(namespace: str, *args: Any) -> tuple[Tensor, Tensor]:
    tensors, spec, dtype = loss_args(args)
    return run_loss(*(*tensors, spec, namespace, dtype))


def _fake_loss(*args: Any) -> tuple[Tensor, Tensor]:
    (logits, *_), spec, dtype = loss_args(args)
    samples, classes = logits.shape[:2]
    loss = logits.new_empty(spec.finish.loss_shape(samples, classes), dtype=dtype)
    return loss, logits.new_empty((samples, classes, spec.sums.rows.bit_count()), dtype=torch.float64)


def _totals(namespace: str, logits: Tensor, target: Tensor, mask: Tensor | None, *args: Any) -> Tensor:
    return run_totals(logits, target, mask, SumsSpec.of_args(args), namespace)


def _fake_totals(logits: Tensor, target: Tensor, mask: Tensor | None, *args: Any) -> Tensor:
    rows = SumsSpec.of_args(args).rows
    return logits.new_empty((*logits.shape[:2], rows.bit_count()), dtype=torch.float64)


class Op(NamedTuple):
    """An op of every namespace.

    Attributes:
        fake: shapes and dtypes of its results.
        body: of the namespace and the arguments.
        compiled: the namespaces that are not in PYTHON have a body of their own.
    """

    schema: str
    fake: Callable[..., Any]
    body: Callable[..., Any]
    compiled: bool = True


_VOLUME = "Tensor logits, Tensor target, Tensor? mask"
_WEIGHTS = ", ".join(f"Tensor? {name}" for name in Weights._fields)
_FINISH = f"{FinishSpec.schema()}, bool empty, ScalarType dtype"
OPS = {
    "sums": Op(f"({_VOLUME}, {SumsSpec.schema()}) -> Tensor", _fake_sums, _sums),
    "finish": Op(
        f"(Tensor sums, {_WEIGHTS}, int rows, {_FINISH}) -> (Tensor, Tensor)", _fake_finish, _finish
    ),
    "sums_backward": Op(
        f"(Tensor? grad_loss, {_VOLUME}, Tensor coef, {SumsSpec.schema()}) -> Tensor",
        _fake_sums_backward,
        _sums_backward,
    ),
    "loss": Op(
        f"({_VOLUME}, {_WEIGHTS}, {SumsSpec.schema()}, {_FINISH}) -> (Tensor, Tensor)",
        _fake_loss,
        _loss,
        compiled=False,
    ),
    "totals": Op(f"({_VOLUME}, {SumsSpec.schema()}) -> Tensor", _fake_totals, _totals, compiled=False),
}


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


def define(namespace: str) -> None:
    """The ops of a namespace with their fakes; the bodies of a compiled library come from there."""
    library = libraries[namespace] = torch.library.Library(namespace, "DEF")
    for name, op in OPS.items():
        library.define(name + op.schema)
        fake = on_one_device(op.schema, op.fake)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        if namespace in PYTHON or not op.compiled:
            body = functools.wraps(op.body)(functools.partial(op.body, namespace))
            library.impl(name, on_one_device(op.schema, body), "CompositeExplicitAutograd")
    overloads = [getattr(getattr(torch.ops, namespace), name).default for name in OPS]
    handles[namespace], direct[namespace] = Handles(*overloads), Handles(*(op._op for op in overloads))


for _namespace in NAMESPACES:
    define(_namespace)
native.load_error("cpu")
if torch.version.cuda is not None:
    native.load_error("cuda")


def call_sums(namespace: str, logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec) -> Tensor:
    """The op ``sums``; a label out of range raises LabelRangeError, here or in a later call (deferred.py)."""
    if torch.compiler.is_compiling():
        result: Tensor = handles[namespace].sums(logits, target, mask, *spec.args())
        return result
    # The kernels of the CPU raise by themselves, as what is in PYTHON where that costs no wait. Those of a
    # GPU count such labels; whoever launches them decides whether to wait for the count.
    raises = namespace == "dicekernels" and logits.is_cpu
    if not raises:
        deferred.raise_earlier(logits.device)
    try:
        slots: Tensor = direct[namespace].sums(logits, target, mask, *spec.args())
        if not raises and (namespace not in PYTHON or not deferred.reads_at_once(logits.device)):
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


def run_totals(logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec, namespace: str) -> Tensor:
    """Sums (B, C, R) of the whole volume, without derivatives."""
    return call_sums(namespace, logits, target, mask, spec).sum(1)


def run_loss(
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
    """Loss and coef, without derivatives."""
    weights = (class_weight, pos_weight, neg_weight, region_lambda, voxel_lambda)
    slots = call_sums(namespace, logits, target, mask, spec.sums)
    numbers = spec.finish.args(logits.numel() == 0)
    finish = (handles if torch.compiler.is_compiling() else direct)[namespace].finish
    result: tuple[Tensor, Tensor] = finish(slots, *weights, spec.sums.rows, *numbers, dtype)
    return result


def eager_totals(logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec) -> Tensor:
    """Sums (B, C, R) in PyTorch, differentiable in every tensor; labels out of range as in ``call_sums``."""
    slots = eager.sums(logits, target, mask, spec)
    if spec.rows & BAD and readable(slots):
        deferred.raise_earlier(logits.device)
        mask = None if mask is None else mask.detach()
        _count(slots.detach(), logits, target.detach(), mask, spec)
    return slots.sum(1)
