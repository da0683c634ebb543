"""``explain``: which backend a loss takes on given tensors, why not the others, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import dispatch
from .arguments import documented
from .backends import native
from .call import Call, Step, observed
from .spec import chunk_count, row_names
from .tensors import is_flat

# What a kernel keeps beside its sums: weights and lambdas, a few for each class.
FEW_BYTES = 4096


@documented()
def explain(loss: Callable[..., Any], logits: Tensor | Sequence[Tensor], target: Tensor, **more: Any) -> str:
    """Builds ``loss(logits, target, **more)`` and tells how it runs, in a sentence and then in detail.

    The kernels do not run: in place of a loss of theirs stand zeros, with zero gradient, and labels out of
    range are not found. What PyTorch computes (``other_act``, maps, gradients of targets) does run, so that
    the memory that it keeps can be measured.

    Args:
        loss: a loss module or function of this package, or a callable that uses them.
        logits: as the loss takes them, (B, C, *S); or those of several resolutions, finest first. Let them
            require a gradient to be told of the backward pass too.
        target: as the loss takes it.
        more: further arguments of the loss by keyword, such as ``mask`` or the options of a function.

    Returns:
        First one sentence: how many passes over the volume, where, and the memory that is kept for backward
        (measured, but for the sums of the kernels: what the loss's graph holds beside the tensors given here
        and those of the module). Then for each call its backend, the reasons against the others, the sums,
        and notes on whatever happens outside the kernels.

    Raises:
        ValueError: the callable used no loss of this package.
        Whatever the loss raises on these tensors.
    """
    ran: list[Step | Told] = []
    with observed(lambda call: ran.append(call if isinstance(call, Step) else told(call))):
        value = loss(logits, target, **more)
    if not ran:
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
    lines = [_sentence(ran, graph, _kept(values, given) if values or not wanted else None, size)]
    lines += [one.line for one in ran]
    if not wanted:
        lines.append("note: no gradient is recorded for these logits; backward was not considered")
    return "\n".join(lines)


@dataclass(frozen=True)
class Told(Step):
    """How a Call runs; its reason is why no kernel runs it.

    Attributes:
        kept: bytes of the sums that are kept for backward.
        aside, notes: as in :class:`Call`.
    """

    kept: int = 0
    aside: str = ""
    notes: tuple[str, ...] = ()


def told(call: Call) -> Told:
    """Which backend runs a call here and now and why, and what it costs."""
    logits, target, reason = call.logits, call.target, call.eager_reason()
    chosen = "eager" if reason else dispatch.choose(logits).name
    samples, classes = logits.shape[:2]
    chunks, rows = chunk_count(logits.shape[2:].numel()), row_names(call.spec.sums.rows)
    kept = samples * classes * len(rows) * 8
    lines = [f"backend: {chosen}" + (f" ({reason})" if reason else "")]
    forced = dispatch.forced_backend()
    other = "not the first choice" if forced is None else f"{forced!r} is forced"
    for name, refusal in dispatch.refusals(logits).items():
        if name != chosen:
            lines.append(f"  not {name}: {refusal or reason or other}")
    lines += [
        f"logits: {tuple(logits.shape)} {logits.dtype} on {logits.device}, "
        f"{logits.numel() * logits.element_size() / 1e6:.1f} MB; target: {tuple(target.shape)} "
        f"{target.dtype}, {'values' if call.spec.sums.dense else 'labels'}",
        f"sums: {', '.join(rows)} in {chunks} chunks a sample, {kept * chunks / 1e6:.3f} MB; "
        f"kept for backward: {kept / 1e6:.3f} MB beside the inputs",
    ]
    for name, tensor in (("logits", logits), ("target", target), ("mask", call.mask)):
        if tensor is not None and not is_flat(tensor, 2 if tensor.ndim == logits.ndim else 1):
            lines.append(f"note: the space of {name} has no single stride, so it is copied in each pass")
    lines += [f"note: {note}" for note in call.notes]
    why = reason or dispatch.no_kernel(logits)
    return Told("\n".join(lines), chosen, why, bool(reason), kept, call.aside, call.notes)


def _sentence(calls: Sequence[Step], graph: bool, kept: int | None, size: int) -> str:
    """The whole in plain words.

    Args:
        kept: bytes beside the given tensors, None if there was no result to measure them at.
        size: bytes of the logits.
    """
    remarks = [one.reason for one in calls if not one.backend]
    ran = [one for one in calls if one.backend]
    eager = [one for one in ran if one.backend == "eager"]
    kernels = sorted({one.backend for one in ran if one.backend != "eager"})
    passes = "one pass forward and one backward" if graph else "one pass forward"
    passes += next((f" (and {one.aside})" for one in ran if isinstance(one, Told) and one.aside), "")
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
    return f"{how}; {_memory(calls, graph, kept, size)}."


def _names(backends: Sequence[str]) -> str:
    names = []
    for name in backends:
        if name == "cpu" and native.is_loaded("cpu"):
            names.append(f"the cpu kernels ({native.instruction_set()})")
        else:
            names.append(f"the {name} kernels")
    return " and ".join(names)


def _memory(calls: Sequence[Step], graph: bool, kept: int | None, size: int) -> str:
    if kept is None:
        return "what is kept for backward was not measured, since no tensor was returned"
    if not graph:
        return "no gradient is recorded, so nothing is kept for backward"
    aside = any(one.whole or not one.backend or (isinstance(one, Told) and one.notes) for one in calls)
    sums = sum(one.kept for one in calls if isinstance(one, Told))
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
