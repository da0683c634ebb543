"""``explain``: which backend a loss takes on given tensors, why not the others, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .evaluate import record


def explain(
    loss: Callable[..., Tensor], logits: Tensor | Sequence[Tensor], target: Tensor, **more: Any
) -> str:
    """Evaluates ``loss(logits, target, **more)`` once and tells how it ran.

    Args:
        loss: a loss module or function of this package, or a callable that uses them.
        logits, target, more: as the loss takes them; the logits may be those of several resolutions.

    Returns:
        A few lines: the backend of each pass, the reasons against the others, the sums and their
        memory, and whatever happens outside the kernels.

    Raises:
        ValueError: the callable used no loss of this package.
        Whatever the loss raises on these tensors.
    """
    with record() as calls:
        loss(logits, target, **more)
    if not calls:
        name = type(loss).__name__
        raise ValueError(f"loss: {name} made no call into dicekernels, expected one of its losses")
    outputs = [logits] if isinstance(logits, Tensor) else logits
    needs_graph = torch.is_grad_enabled() and any(output.requires_grad for output in outputs)
    lines = [call if isinstance(call, str) else call.explain() for call in calls]
    if not needs_graph:
        lines.append("note: no gradient is recorded for these logits; backward was not considered")
    return "\n".join(lines)
