"""One evaluation of a loss: what a call has become, which backend runs it, and the call itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from . import dispatch
from .autograd import fused_loss, total_sums
from .finish import VolumeWeight, finish
from .ops import eager_totals
from .spec import FN, LossSpec, Weights, chunk_count, row_index, row_names

# What explain() collects; None outside it.
_recorder: list[Call | Step] | None = None


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


@dataclass(frozen=True)
class Told:
    """How a Call runs.

    Attributes:
        backend, reason, whole: as in :class:`Step`; the reason is why no kernel runs it.
        lines: the details.
        kept: bytes of the sums that are kept for backward.
        labels_again: there was one more pass, over target and mask alone.
    """

    backend: str
    reason: str
    whole: bool
    lines: str
    kept: int
    labels_again: bool


@contextmanager
def record() -> Iterator[list[Call | Step]]:
    """Collects the calls that run inside the block, and a step for each loss that runs without one."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


def record_step(line: str, backend: str = "", reason: str = "", whole: bool = False) -> None:
    """Notes what a function of this package does without a Call: see :class:`Step`."""
    if _recorder is not None:
        _recorder.append(Step(line, backend, reason, whole))


def record_dense(reason: str) -> None:
    """Notes a loss that dense PyTorch computes."""
    forced = dispatch.forced_backend()
    if forced not in (None, "eager"):
        raise RuntimeError(f"backend {forced!r} was forced, but {reason}; force 'eager' or none")
    record_step(f"backend: eager (dense PyTorch: {reason})", "eager", reason, whole=True)


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


_T = TypeVar("_T", Tensor, Tensor | None)
_Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _saveable(tensor: _T) -> _T:
    """A copy of what was made under inference_mode (pseudo-labels): it cannot be saved for backward."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _one_voxel_stride(tensor: Tensor, spatial_from: int) -> bool:
    """Whether the kernels see the space as one dimension, as ``flat_stride`` in csrc/common/check.h."""
    expected = None
    for size, stride in zip(
        reversed(tensor.shape[spatial_from:]), reversed(tensor.stride()[spatial_from:]), strict=True
    ):
        if size == 1:
            continue
        if expected not in (None, stride):
            return False
        expected = size * stride
    return True


@dataclass
class Call:
    """A loss on its tensors, after every check.

    Attributes:
        dtype: of the loss.
        shape: of the loss; None keeps the shape of the op.
        missed: (B, C) that FN has beside the pass (MONAI's masked label maps), a constant.
        volume_weight: class weights of the generalized Dice loss that a user's function makes of the volumes.
        notes: what happens outside the kernels (an activation of the user's, a copy), for ``explain``.
        told: what ``explain`` tells of it, once it has run in a :func:`record`.
    """

    logits: Tensor
    target: Tensor
    mask: Tensor | None
    spec: LossSpec
    dtype: torch.dtype
    class_weight: Tensor | None = None
    pos_weight: Tensor | None = None
    neg_weight: Tensor | None = None
    region_lambda: Tensor | None = None
    voxel_lambda: Tensor | None = None
    shape: tuple[int, ...] | None = None
    missed: Tensor | None = None
    volume_weight: VolumeWeight | None = None
    notes: tuple[str, ...] = ()
    told: Told | None = None

    def eager_reason(self) -> str:
        """Why only the differentiable eager backend can run it, or ""."""
        if not torch.is_grad_enabled():
            return ""
        inputs = {
            "target": self.target,
            "mask": self.mask,
            "weight": self.class_weight,
            "pos_weight": self.pos_weight,
            "neg_weight": self.neg_weight,
            "the lambda of the overlap term": self.region_lambda,
            "the lambda of the voxel term": self.voxel_lambda,
        }
        for name, tensor in inputs.items():
            if tensor is not None and tensor.requires_grad:
                return f"{name} requires a gradient, and the kernels differentiate the logits alone"
        return ""

    def run(self) -> Tensor:
        """The loss.

        Raises:
            RuntimeError: a backend was forced that cannot run it.
            LabelRangeError: a label is out of range, on a GPU in an earlier call.
        """
        if _recorder is not None:
            self.told = self.explain()
            _recorder.append(self)
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and self.logits.requires_grad:
            self.target, self.mask = _saveable(self.target), _saveable(self.mask)
        weights = (
            self.class_weight,
            self.pos_weight,
            self.neg_weight,
            self.region_lambda,
            self.voxel_lambda,
        )
        reason = self.eager_reason()
        if reason:
            forced = dispatch.forced_backend()
            if forced not in (None, "eager"):
                raise RuntimeError(f"backend {forced!r} was forced, but {reason}; detach it or force 'eager'")
        if reason or self.missed is not None or self.volume_weight is not None:
            loss = self._run_with_formula(weights, reason)
        else:
            namespace = dispatch.choose(self.logits).namespace
            tensors: tuple[Tensor | None, ...] = (self.logits, self.target, self.mask, *weights)
            if torch.compiler.is_compiling():
                tensors = _distinct(tensors)
            loss = fused_loss(tensors, self.spec, namespace, self.dtype)
        return loss if self.shape is None else loss.reshape(self.shape)

    def _run_with_formula(self, weights: _Weights, reason: str) -> Tensor:
        """The sums from the backend, the formula in PyTorch."""
        spec = self.spec
        if reason:
            totals = eager_totals(self.logits, self.target, self.mask, spec.sums)
        else:
            namespace = dispatch.choose(self.logits).namespace
            totals = total_sums(self.logits, self.target, self.mask, spec.sums, namespace)
        if self.missed is not None:
            row = torch.arange(totals.shape[-1], device=totals.device) == row_index(spec.sums.rows, FN)
            totals = totals + self.missed[..., None] * row
        empty = self.logits.numel() == 0
        rows, custom = spec.sums.rows, self.volume_weight
        return finish(totals, Weights(*weights), rows, spec.finish, empty, self.dtype, custom)

    def explain(self) -> Told:
        """Which backend runs it here and now and why, and what it costs."""
        reason = self.eager_reason()
        refusals = dispatch.refusals(self.logits)
        chosen = "eager" if reason else dispatch.choose(self.logits).name
        samples, classes = self.logits.shape[:2]
        voxels = self.logits.shape[2:].numel()
        rows = row_names(self.spec.sums.rows)
        slots = samples * chunk_count(voxels) * classes * len(rows) * 8
        logits_bytes = self.logits.numel() * self.logits.element_size()
        lines = [f"backend: {chosen}" + (f" ({reason})" if reason else "")]
        for name, refusal in refusals.items():
            if name != chosen:
                forced = dispatch.forced_backend()
                other = "not the first choice" if forced is None else f"{forced!r} is forced"
                lines.append(f"  not {name}: {refusal or reason or other}")
        lines.append(
            f"logits: {tuple(self.logits.shape)} {self.logits.dtype} on {self.logits.device}, "
            f"{logits_bytes / 1e6:.1f} MB; target: {tuple(self.target.shape)} {self.target.dtype}, "
            f"{'values' if self.spec.sums.dense else 'labels'}"
        )
        lines.append(
            f"sums: {', '.join(rows)} in {chunk_count(voxels)} chunks a sample, {slots / 1e6:.3f} MB; "
            f"kept for backward: {samples * classes * len(rows) * 8 / 1e6:.3f} MB beside the inputs"
        )
        for name, tensor in (("logits", self.logits), ("target", self.target), ("mask", self.mask)):
            if tensor is not None and not _one_voxel_stride(
                tensor, 2 if tensor.ndim == self.logits.ndim else 1
            ):
                lines.append(f"note: the space of {name} has no single stride, so it is copied in each pass")
        lines += [f"note: {note}" for note in self.notes]
        return Told(
            chosen,
            reason or dispatch.no_kernel(self.logits),
            bool(reason),
            "\n".join(lines),
            samples * classes * len(rows) * 8,
            self.missed is not None,
        )
