"""``explain``: which backend a loss takes on given tensors, why not the others, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .evaluate import record


def explain(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> str:
    """Evaluates ``loss(logits, target)`` once and tells how it ran.

    Args:
        loss: a loss module or function of this package, or a callable that uses them.
        logits, target: as the loss takes them.

    Returns:
        A few lines: the backend of each pass, the reasons against the others, the sums and their
        memory, and whatever happens outside the kernels.

    Raises:
        ValueError: the callable used no loss of this package.
        Whatever the loss raises on these tensors.
    """
    with record() as calls:
        loss(logits, target)
    if not calls:
        name = type(loss).__name__
        raise ValueError(f"loss: {name} made no call into dicekernels, expected one of its losses")
    needs_graph = torch.is_grad_enabled() and logits.requires_grad
    lines = [call if isinstance(call, str) else call.explain() for call in calls]
    if not needs_graph:
        lines.append("note: no gradient is recorded for these logits; backward was not considered")
    return "\n".join(lines)
