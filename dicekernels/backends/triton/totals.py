"""What the kernel of ``finish`` reads and writes: chunks, weights, rows of the totals, slopes and losses.

And the ticket by which the programs of one launch find out which of them ends last.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .codes import GENERALIZED, NONE
from .formulas import double


@triton.jit
def as_double(x):
    """float64 of any dtype; bfloat16 by way of float32, as the interpreter has no other cast of it."""
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def factor(pointer, value):
    """A lambda: read on the device if there is one, else the argument."""
    if pointer is not None:
        return as_double(tl.load(pointer))
    else:
        return double(value)


@triton.jit
def class_values(weights, c, valid):
    """Weights of the classes in ``c``, 1 if there are none, 0 outside of ``valid``."""
    if weights is not None:
        return as_double(tl.load(weights + c, mask=valid, other=0))
    else:
        return tl.where(valid, tl.full(c.shape, 1.0, tl.float64), 0.0)


@triton.jit
def add_chunks(sums, totals, chunks, width, columns, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr):
    """Totals of BLOCK_W columns, columns of all samples counted through."""
    column = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    inside = column < columns
    first = sums + (column // width).to(tl.int64) * chunks * width + column % width
    total = tl.zeros((BLOCK_K, BLOCK_W), tl.float64)
    for start in range(0, chunks, BLOCK_K):
        chunk = start + tl.arange(0, BLOCK_K)[:, None]
        total += tl.load(first + chunk.to(tl.int64) * width, mask=inside & (chunk < chunks), other=0.0)
    tl.store(totals + column, tl.sum(total, 0, keep_dims=True), mask=inside)


@triton.jit
def load_row(totals, at, mask, PLACE: tl.constexpr):
    """A row of the totals, zeros if it is off. From the L2 cache (.cg), where the other programs have written
    it: a multiprocessor's L1 cache does not see what others write."""
    if PLACE >= 0:
        return tl.load(totals + at + PLACE, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        return tl.zeros(mask.shape, tl.float64)


@triton.jit
def store_slopes(coef, at, slope, mask, spoilt, PLACE: tl.constexpr):
    """A row of the slopes if it is on; zeros in a batch with labels out of range."""
    if PLACE >= 0:
        tl.store(coef + at + PLACE, tl.where(spoilt, 0.0, slope), mask=mask)


@triton.jit
def rounded(value, loss):
    """Float64 in the dtype of ``loss`` as ``Tensor.to`` rounds: half precision by way of float32."""
    dtype: tl.constexpr = loss.dtype.element_ty
    if dtype == tl.float16 or dtype == tl.bfloat16:
        value = value.to(tl.float32)
    if dtype == tl.bfloat16:
        # To the nearest, ties to even, in integers: the interpreter's cast cuts off what does not fit.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def finish_half(value, factor, loss):
    """A half as it is alone, times its lambda, which torch takes as float32 beside all but float64."""
    if loss.dtype.element_ty != tl.float64:
        factor = factor.to(tl.float32).to(tl.float64)
    return as_double(rounded(as_double(rounded(value, loss)) * factor, loss))


@triton.jit
def store_loss(loss, at, value, mask):
    tl.store(loss + at, rounded(value, loss), mask=mask)


@triton.jit
def add_terms(
    region,
    loss,
    value,
    weight,
    factor,
    place,
    spoilt,
    FORMULA: tl.constexpr,
    SKIPPED: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Terms of the overlap loss: times ``factor`` to their places if there is no reduction, else times
    ``weight`` to those before. ``place``: group, class, mask, and how many outputs a group has."""
    group, c, mask, outputs = place
    if FORMULA == GENERALIZED:
        mask = mask & (c == 0)
        at = tl.where(mask, group, 0)
    else:
        mask = mask & (c >= SKIPPED)
        at = tl.where(mask, group * outputs + c - SKIPPED, 0)
    if REDUCTION == NONE:
        value = finish_half(weight * value, factor, loss)
        store_loss(loss, at, tl.where(spoilt, float("nan"), value), mask)
    else:
        region += tl.where(mask, weight * value, 0.0)
    return region


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def ticket(device: torch.device) -> Tensor:
    """(1,) int32 at 0 that no launch at the same time uses; each launch has to leave it at 0.

    One for each stream of a GPU, since launches of one stream do not overlap. A graph may be replayed on any
    stream, so a captured launch gets one of its own, cleared by the graph.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return ticket(device)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, driver.active.get_current_stream(device.index))
    found = _tickets.get(key)
    if found is None:
        stream = torch.cuda.current_stream(device)
        # A thread of its own allocates from no memory pool that this one has chosen: the warm-up before the
        # capture of a compiled graph chooses one, and refuses tensors that outlive it there.
        with ThreadPoolExecutor(max_workers=1) as pool:
            found = _tickets.setdefault(key, pool.submit(_make, device, stream).result())
    return found


def _make(device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    with torch.cuda.device(device):
        made = torch.zeros(1, dtype=torch.int32, device=device)
        stream.wait_stream(torch.cuda.current_stream(device))
    return made
