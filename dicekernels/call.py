"""A loss on its tensors as data (:class:`Call`), and the one place that runs it (:func:`run`).

Between its sums and its formula stands ``Call.between``: there enters what changes the (B, C, R) sums of a
volume before they become a loss.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dispatch
from .autograd import fused_loss, is_transformed, total_sums
from .finish import VolumeWeight, finish
from .ops import eager_totals
from .spec import LossSpec, SumsSpec, Weights

_T = TypeVar("_T", Tensor, Tensor | None)
_NONE = Weights()
# The tensors beside the logits as messages name them: target, mask and Weights.
_NAMES = (
    "target",
    "mask",
    "weight",
    "pos_weight",
    "neg_weight",
    "the lambda of the overlap term",
    "the lambda of the voxel term",
)


@dataclass(frozen=True)
class Step:
    """What runs without a Call, for ``explain``.

    Attributes:
        line: what is told of it.
        backend: that runs it; "" for a remark on the calls and steps that follow.
        reason: why there is no Call, for people.
        whole: PyTorch's autograd keeps what it makes of the whole volume.
    """

    line: str
    backend: str = ""
    reason: str = ""
    whole: bool = False


@dataclass
class Call:
    """A loss on its tensors, after every check.

    Attributes:
        dtype: of the loss.
        shape: of the loss; None keeps the shape of the op.
        between: makes of the call and its (B, C, R) sums those that the formula gets.
        volume_weight: class weights of the generalized Dice loss that a user's function makes of the volumes.
        notes: what happens outside the kernels (an activation of the user's, a copy), for ``explain``.
        aside: passes beside the one over the volume, for ``explain``.
    """

    logits: Tensor
    target: Tensor
    mask: Tensor | None
    spec: LossSpec
    dtype: torch.dtype
    weights: Weights = _NONE
    shape: tuple[int, ...] | None = None
    between: Callable[[Call, Tensor], Tensor] | None = None
    volume_weight: VolumeWeight | None = None
    notes: tuple[str, ...] = ()
    aside: str = ""

    def eager_reason(self) -> str:
        """Why only the differentiable eager backend can run it, or ""."""
        if not torch.is_grad_enabled():
            return ""
        for name, tensor in zip(_NAMES, (self.target, self.mask, *self.weights), strict=True):
            if tensor is not None and tensor.requires_grad:
                return f"{name} requires a gradient, and the kernels differentiate the logits alone"
        return ""


# Who is told of the Calls and Steps of a thread, in place of running the kernels: see ``observed``.
_observers = threading.local()


def _observer() -> Callable[[Call | Step], None] | None:
    return getattr(_observers, "by", None)


@contextmanager
def observed(by: Callable[[Call | Step], None]) -> Iterator[None]:
    """Inside the block losses are built and not run: ``by`` gets the Calls and Steps, a loss is zeros.

    What needs PyTorch's own autograd runs, since only then is known what it keeps.
    """
    before, _observers.by = _observer(), by
    try:
        yield
    finally:
        _observers.by = before


def is_observed() -> bool:
    """Whether losses of this thread are built and not run."""
    return _observer() is not None


def record_step(line: str, backend: str = "", reason: str = "", whole: bool = False) -> None:
    """Notes what a function of this package does without a Call: see :class:`Step`."""
    if (by := _observer()) is not None:
        by(Step(line, backend, reason, whole))


def record_dense(reason: str) -> None:
    """Notes a loss that dense PyTorch computes."""
    dispatch.refuse_forced(reason, "force 'eager' or none")
    record_step(f"backend: eager (dense PyTorch: {reason})", "eager", reason, whole=True)


def run(call: Call) -> Tensor:
    """The loss.

    Raises:
        RuntimeError: a backend was forced that cannot run it.
        LabelRangeError: a label is out of range, on a GPU in an earlier call.
    """
    reason = call.eager_reason()
    if reason:
        dispatch.refuse_forced(reason, "detach it or force 'eager'")
    if not torch.compiler.is_compiling() and (by := _observer()) is not None:
        by(call)
        if not reason and not is_transformed():
            shape = call.spec.finish.loss_shape(*call.logits.shape[:2])
            loss = stand_in(shape, call.dtype, call.logits, call.target, call.mask)
            return loss if call.shape is None else loss.reshape(call.shape)
    target, mask = call.target, call.mask
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and call.logits.requires_grad:
        target, mask = _saveable(target), _saveable(mask)
    if reason or call.between is not None or call.volume_weight is not None:
        totals = _totals(call.logits, target, mask, call.spec.sums, eager=bool(reason))
        if call.between is not None:
            totals = call.between(call, totals)
        empty = call.logits.numel() == 0
        rows, custom = call.spec.sums.rows, call.volume_weight
        loss = finish(totals, call.weights, rows, call.spec.finish, empty, call.dtype, custom)
    else:
        tensors: tuple[Tensor | None, ...] = (call.logits, target, mask, *call.weights)
        if torch.compiler.is_compiling():
            tensors = _distinct(tensors)
        loss = fused_loss(tensors, call.spec, dispatch.choose(call.logits).namespace, call.dtype)
    return loss if call.shape is None else loss.reshape(call.shape)


class StandIn(torch.autograd.Function):
    """Zeros in the place of a loss, and in its backward; what the loss keeps of its inputs is kept."""

    @staticmethod
    def forward(
        ctx: Any, shape: tuple[int, ...], dtype: torch.dtype, logits: Tensor, *others: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(logits, *others)
        return logits.new_zeros(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, *others = ctx.saved_tensors
        zeros = grad.sum() * torch.zeros_like(logits)  # in the graph of a second derivative
        return None, None, zeros, *(None for _ in others)


def stand_in(shape: tuple[int, ...], dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
    """:class:`StandIn` of (logits, target, mask)."""
    zeros: Tensor = StandIn.apply(shape, dtype, *tensors)  # type: ignore[no-untyped-call]  # torch's
    return zeros


def _totals(logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec, *, eager: bool) -> Tensor:
    if eager:
        return eager_totals(logits, target, mask, spec)
    return total_sums(logits, target, mask, spec, dispatch.choose(logits).namespace)


def _saveable(tensor: _T) -> _T:
    """A copy of what was made under inference_mode (pseudo-labels): it cannot be saved for backward."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _distinct(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """A view for each repetition (a weight of both terms): Dynamo traces no Function of one tensor twice."""
    seen: list[Tensor] = []
    result: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is not None:
            again = any(tensor is other for other in seen)
            seen.append(tensor)
            tensor = tensor.view_as(tensor) if again else tensor
        result.append(tensor)
    return tuple(result)
