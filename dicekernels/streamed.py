"""``streamed_sums``: sums over the voxels of a formula that is not among the kernels' rows.

The formula is plain PyTorch on a piece of the space. It runs piece by piece, forward and backward, on
any device, so a piece's temporaries are all the memory that it takes beside the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .backends import eager
from .call import record_step
from .tensors import traced

# Called with the pieces (B, C, v), (B or 1, K, v), ...; None stays None.
Terms = Callable[..., Tensor]

# On the CPU a piece and its temporaries stay in the cache; elsewhere a launch must be worth its price.
CPU_PIECE_ELEMENTS = 1 << 18
# What a sum in float32 covers at most.
RUN_VOXELS = 1024


def streamed_sums(
    terms: Terms, logits: Tensor, *others: Tensor | None, closed_over: Sequence[Tensor] = ()
) -> Tensor:
    """The sums of ``terms`` over all voxels, with no tensor of the volume's size but the gradient.

    Args:
        terms: gets a piece of the flattened space of every tensor: the logits (B, C, v) in float32, in
            float64 for float64 logits, the others as they are. Returns the piece's sums, float64 of one
            shape for every piece. It must be a sum over voxels, change nothing in place and be
            differentiable twice in PyTorch.
        logits: (B, C, *S) floating, differentiable to any order. Its gradient has its dtype; what
            arrives from above is multiplied in float32 or float64 before the cast.
        others: targets, voxel weights: (B or 1, K, *S) with the same space, or None.
        closed_over: tensors that ``terms`` holds itself and that may require a gradient.

    Pieces depend on the shape and the kind of device alone and are added in order: same bits on
    every run. Double backward, a gradient for ``others`` or ``closed_over``, and torch.compile run
    ``terms`` once on the whole volume with PyTorch's own autograd, in PyTorch's memory.
    """
    if _whole_reason(others, closed_over) or traced():
        return _whole(terms, logits, others)
    if torch.is_grad_enabled() and logits.requires_grad:
        # What was made under inference_mode cannot be saved for backward.
        others = tuple(x.clone() if x is not None and x.is_inference() else x for x in others)
    sums: Tensor = _StreamedSums.apply(terms, logits, *others)  # type: ignore[no-untyped-call]  # torch's
    return sums


def voxel_sums(x: Tensor) -> Tensor:
    """Float64 sums over the last dimension: runs of a thousand voxels in the dtype of x, then float64."""
    whole = x.shape[-1] // RUN_VOXELS * RUN_VOXELS
    runs: Tensor = x[..., :whole].reshape(*x.shape[:-1], whole // RUN_VOXELS, RUN_VOXELS).sum(-1)
    return runs.sum(-1, dtype=torch.float64) + x[..., whole:].sum(-1, dtype=torch.float64)


def sums_by_label(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(B, classes) float64 sums of x (B, 1, v) over the voxels of each label (B, 1, v) int64."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        sums = torch.zeros(x.shape[0], classes, dtype=torch.float64, device=x.device)
        return sums.scatter_add(1, labels[:, 0], x[:, 0].double())  # in the order of the voxels
    # Elsewhere a scatter adds in any order.
    of_class = labels == torch.arange(classes, device=labels.device).view(1, -1, 1)
    return voxel_sums(torch.where(of_class, x, 0.0))


def record_streamed(
    name: str, logits: Tensor, others: Sequence[Tensor | None], closed_over: Sequence[Tensor] = ()
) -> None:
    """Notes a loss on :func:`streamed_sums` for ``explain``.

    Raises:
        RuntimeError: another backend than eager was forced.
    """
    if torch.compiler.is_compiling():
        return
    dispatch.refuse_forced(f"no kernel has the sums of {name}", "force 'eager' or none")
    reason = _whole_reason(others, closed_over)
    if reason:
        record_step(f"backend: eager ({name} on the whole volume at once: {reason})", "eager", reason, True)
        return
    pieces = -(-logits.shape[2:].numel() // _piece_voxels(logits))
    record_step(
        f"backend: eager ({name} has no kernel: PyTorch piece by piece, pieces of the space: {pieces}; "
        "kept for backward: nothing beside the inputs)",
        "eager",
        f"{name} has no kernel",
    )


def _whole_reason(others: Sequence[Tensor | None], closed_over: Sequence[Tensor]) -> str:
    """Why the pieces cannot serve, or ""."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*others, *closed_over)):
        return "another tensor than the logits requires a gradient"
    return ""


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _flat(x: Tensor) -> Tensor:
    """(B, C, V): a view where the strides allow it."""
    return x.reshape(*x.shape[:2], x.shape[2:].numel())


def _piece_voxels(logits: Tensor) -> int:
    elements = CPU_PIECE_ELEMENTS if logits.device.type == "cpu" else eager.PIECE_ELEMENTS
    return RUN_VOXELS * max(1, elements // max(1, logits.shape[0] * logits.shape[1] * RUN_VOXELS))


def _windows(logits: Tensor) -> Iterator[slice]:
    """The pieces in order, one empty one for an empty space."""
    voxels, step = logits.shape[2:].numel(), _piece_voxels(logits)
    for first in range(0, max(voxels, 1), step):
        yield slice(first, min(first + step, voxels))


def _whole(terms: Terms, logits: Tensor, others: Sequence[Tensor | None]) -> Tensor:
    return terms(_flat(logits).to(_compute_dtype(logits)), *(None if x is None else _flat(x) for x in others))


class _StreamedSums(torch.autograd.Function):
    """The pieces, differentiable in the logits."""

    @staticmethod
    def forward(terms: Terms, logits: Tensor, *others: Tensor | None) -> Tensor:
        flat = [None if x is None else _flat(x) for x in (logits, *others)]
        total: Tensor | None = None
        for window in _windows(logits):
            z, *rest = (None if x is None else x[:, :, window] for x in flat)
            assert z is not None
            part = terms(z.to(_compute_dtype(logits)), *rest)
            total = part if total is None else total + part
        assert total is not None
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.terms, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        logits, *others = ctx.saved_tensors
        nothing = (None,) * len(others)
        if grad is None:
            return None, None, *nothing
        if torch.is_grad_enabled():  # create_graph=True
            again = _whole(ctx.terms, logits, others)
            (gradient,) = torch.autograd.grad(again, logits, grad, create_graph=True)
            return None, gradient, *nothing
        gradient = torch.empty_like(logits)
        out = _flat(gradient)
        shared = out.data_ptr() == gradient.data_ptr()
        flat, *rest = (None if x is None else _flat(x) for x in (logits, *others))
        assert flat is not None
        for window in _windows(logits):
            z = flat[:, :, window].detach().to(_compute_dtype(logits)).requires_grad_()
            with torch.enable_grad():
                part = ctx.terms(z, *(None if x is None else x[:, :, window] for x in rest))
            (out[:, :, window],) = torch.autograd.grad(part, z, grad)
        if not shared:
            gradient.copy_(out.view(gradient.shape))
        return None, gradient, *nothing
