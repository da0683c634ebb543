"""``explain``: which backend a loss takes on given tensors, why not the others, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .arguments import documented
from .backends import native
from .evaluate import Call, Step, Told, record

# What a kernel keeps beside its sums: weights and lambdas, a few for each class.
FEW_BYTES = 4096


@documented()
def explain(loss: Callable[..., Any], logits: Tensor | Sequence[Tensor], target: Tensor, **more: Any) -> str:
    """Evaluates ``loss(logits, target, **more)`` once and tells how it ran, in a sentence and then in detail.

    Args:
        loss: a loss module or function of this package, or a callable that uses them.
        logits: as the loss takes them, (B, C, *S); or those of several resolutions, finest first. Let them
            require a gradient to be told of the backward pass too.
        target: as the loss takes it.
        more: further arguments of the loss by keyword, such as ``mask`` or the options of a function.

    Returns:
        First one sentence: how many passes over the volume, where, and the memory that is kept for backward
        (measured: what the loss's graph holds beside the tensors given here and those of the module). Then
        for each call its backend, the reasons against the others, the sums, and notes on whatever happens
        outside the kernels.

    Raises:
        ValueError: the callable used no loss of this package.
        Whatever the loss raises on these tensors.
    """
    with record() as calls:
        value = loss(logits, target, **more)
    if not calls:
        name = type(loss).__name__
        raise ValueError(f"loss: {name} made no call into dicekernels, expected one of its losses")
    outputs = [logits] if isinstance(logits, Tensor) else logits
    given = [*outputs, target, *(x for x in more.values() if isinstance(x, Tensor))]
    if isinstance(loss, nn.Module):
        given += [*loss.parameters(), *loss.buffers()]
    values = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    size = sum(output.numel() * output.element_size() for output in outputs)
    wanted = torch.is_grad_enabled() and any(output.requires_grad for output in outputs)
    graph = any(x.requires_grad for x in values) if values else wanted
    lines = [_sentence(calls, graph, _kept(values, given) if values or not wanted else None, size)]
    lines += [call.line if isinstance(call, Step) else _told(call).lines for call in calls]
    if not wanted:
        lines.append("note: no gradient is recorded for these logits; backward was not considered")
    return "\n".join(lines)


def _told(call: Call) -> Told:
    assert call.told is not None  # it ran in a record
    return call.told


def _sentence(calls: Sequence[Call | Step], graph: bool, kept: int | None, size: int) -> str:
    """The whole in plain words.

    Args:
        kept: bytes beside the given tensors, None if there was no result to measure them at.
        size: bytes of the logits.
    """
    remarks = [call.reason for call in calls if isinstance(call, Step) and not call.backend]
    ran = [call if isinstance(call, Step) else _told(call) for call in calls]
    ran = [one for one in ran if one.backend]
    eager = [one for one in ran if one.backend == "eager"]
    kernels = sorted({one.backend for one in ran if one.backend != "eager"})
    passes = "one pass forward and one backward" if graph else "one pass forward"
    if any(isinstance(one, Told) and one.labels_again for one in ran):
        passes += " (and one over the label map)"
    reasons = "; ".join(dict.fromkeys(remarks + [one.reason for one in eager if one.reason]))
    if not ran or len(ran) < 2 * len(remarks):
        how = f"Runs in part outside of dicekernels ({reasons})"
        if ran:
            how += f", its own share in {passes} on {_names(kernels) if kernels else 'PyTorch (eager)'}"
    elif not eager:
        count = f"{passes} on" if len(ran) == 1 else f"{len(ran)} calls, each {passes}, on"
        how = f"Runs in {count} {_names(kernels)}" + (f" ({reasons})" if reasons else "")
    elif not kernels:
        pieces = "" if any(one.whole for one in eager) else ", piece by piece"
        how = f"Runs in PyTorch (eager){pieces}: {reasons}"
    else:
        others = "the other is" if len(ran) - len(eager) == 1 else "the others are each"
        how = (
            f"Runs in {len(ran)} calls, {len(eager)} of them in PyTorch (eager): {reasons}; "
            f"{others} {passes} on {_names(kernels)}"
        )
    return f"{how}; {_memory(calls, ran, graph, kept, size)}."


def _names(backends: Sequence[str]) -> str:
    names = []
    for name in backends:
        if name == "cpu" and native.is_loaded("cpu"):
            names.append(f"the cpu kernels ({native.instruction_set()})")
        else:
            names.append(f"the {name} kernels")
    return " and ".join(names)


def _memory(
    calls: Sequence[Call | Step], ran: Sequence[Step | Told], graph: bool, kept: int | None, size: int
) -> str:
    if kept is None:
        return "what is kept for backward was not measured, since no tensor was returned"
    if not graph:
        return "no gradient is recorded, so nothing is kept for backward"
    aside = any(one.backend == "" or (one.backend == "eager" and one.whole) for one in ran) or any(
        isinstance(call, Call) and call.notes for call in calls
    )
    sums = sum(one.kept for one in ran if isinstance(one, Told))
    if not aside and kept <= sums + max(FEW_BYTES, size // 10):
        return "nothing of the logits' size is kept for backward"
    times = f" ({kept / size:.1f} times the logits)" if size else ""
    return f"kept for backward beside the given tensors: {_size(kept)}{times}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _kept(values: Sequence[Tensor], given: Sequence[Tensor]) -> int:
    """Bytes that the graph of ``values`` holds in memory that is not that of ``given``."""
    storages: dict[int, int] = {}
    nodes: list[Any] = [value.grad_fn for value in values]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    for tensor in given:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _saved(node: Any) -> Iterator[Tensor]:
    """The tensors that one node of a graph has saved."""
    for name in dir(node):
        if name == "saved_tensors" or name.startswith("_saved_"):
            try:
                saved = getattr(node, name)
            except RuntimeError:  # freed by a backward inside of the callable
                continue
            yield from (x for x in (saved if isinstance(saved, tuple) else (saved,)) if isinstance(x, Tensor))
