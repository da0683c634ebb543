"""The op between the two passes in one launch: chunks added up, then the formulas over all of the sums.

Every program adds up the chunks of a few columns (sample, class and row in one index) in float64. The one
that ends last evaluates loss and slopes from the totals of all of them. No program waits for another, and the
order of every addition follows from the shapes alone.

What is a number in the constructor of a loss is an argument of the kernel, not a constant: a schedule of
alpha or lambda must not compile a kernel per step. Triton passes Python floats as float32 unless annotated.
"""

from __future__ import annotations

import functools
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import FinishSpec, Weights
from .codes import (
    ELEMENTS,
    GENERALIZED,
    MEAN,
    NONE,
    ONE,
    RATIO,
    ROW_BAD,
    ROW_FN,
    ROW_FP,
    ROW_G,
    ROW_I,
    ROW_LS,
    ROW_N,
    ROW_NEG,
    ROW_POS,
    ROW_TN,
    SAMPLES,
    WEIGHTS,
)
from .formulas import double, region_terms
from .launch import Launch, launch
from .problem import places
from .support import compiles_ptx
from .totals import (
    add_chunks,
    add_terms,
    class_values,
    factor,
    finish_half,
    load_row,
    store_loss,
    store_slopes,
    ticket,
)

# Elements of the tiles: 16 and 2 doubles a thread.
CHUNK_TILE, CLASS_TILE = 4096, 512
# Totals and slopes have int32 offsets.
MAX_COLUMNS = 2**31 - CHUNK_TILE
# One program evaluates, so registers are free: left alone, ptxas spills to fit a third one beside it.
# An option of NVIDIA's compiler.
REGISTERS = {"maxnreg": 255} if compiles_ptx() else {}


@triton.jit(
    do_not_specialize=["samples", "chunks", "classes"],
    do_not_specialize_on_alignment=list(Weights._fields),
)
def finish_kernel(
    sums,  # (B, chunks, C, WIDTH) float64
    totals,  # (B, C, WIDTH) float64, room for the sums over the chunks
    tickets,  # (1,) int32, 0
    loss,  # () or (groups, outputs)
    coef,  # (B, C, WIDTH) float64
    class_weight,  # (C - SKIPPED,)
    pos_weight,  # (C,)
    neg_weight,  # (C,)
    region_lambda,  # (); None: region_value
    voxel_lambda,  # (); None: voxel_value
    region_value: tl.float64,
    voxel_value: tl.float64,
    kappa: tl.float64,
    alpha: tl.float64,
    beta: tl.float64,
    smooth_nr: tl.float64,
    smooth_dr: tl.float64,
    exponent: tl.float64,
    label_smoothing: tl.float64,
    samples,
    chunks,
    classes,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    FORMULA: tl.constexpr,
    TRANSFORM: tl.constexpr,
    GDL_WEIGHT: tl.constexpr,
    SKIPPED: tl.constexpr,
    BATCH: tl.constexpr,
    REDUCTION: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    VOXEL_SKIPPED: tl.constexpr,
    EMPTY: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    HAS_VOXEL_TERM: tl.constexpr = PLACES[ROW_POS] >= 0
    add_chunks(sums, totals, chunks, classes * WIDTH, samples * classes * WIDTH, BLOCK_W, BLOCK_K)
    # The barrier puts the stores of all threads before the one thread's release; who takes the last ticket
    # has acquired those of all programs.
    tl.debug_barrier()
    if tl.atomic_add(tickets, 1, sem="acq_rel") != tl.num_programs(0) - 1:
        return
    tl.store(tickets, 0)  # for the next launch

    # From here on one program, with BLOCK_B samples and all of their classes at a time.
    c = tl.arange(0, BLOCK_C)[None, :]
    b = tl.arange(0, BLOCK_B)[:, None]
    zeros = tl.zeros((BLOCK_B, BLOCK_C), tl.float64)
    overlaps = (c < classes) & (c >= SKIPPED)
    weighted = (c < classes) & (c >= VOXEL_SKIPPED)
    pos = class_values(pos_weight, c, weighted)
    neg = class_values(neg_weight, c, weighted)
    numbers = (
        double(kappa),
        double(alpha),
        double(beta),
        double(smooth_nr),
        double(smooth_dr),
        double(exponent),
    )
    smoothing = double(label_smoothing)

    # What every sample's slopes depend on: sums over the batch.
    bad, count, i, fp, fn, g, tn = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, samples, BLOCK_B):
        at = ((start + b) * classes + c) * WIDTH
        valid = (start + b < samples) & (c < classes)
        bad += load_row(totals, at, valid, PLACES[ROW_BAD])
        if HAS_VOXEL_TERM:
            if DENOMINATOR == WEIGHTS:
                count += pos * load_row(totals, at, valid, PLACES[ROW_G])
            elif DENOMINATOR != ONE and DENOMINATOR != SAMPLES:
                count += load_row(totals, at, valid & (c == 0), PLACES[ROW_N])
        if BATCH:
            i += load_row(totals, at, valid, PLACES[ROW_I])
            fp += load_row(totals, at, valid, PLACES[ROW_FP])
            fn += load_row(totals, at, valid, PLACES[ROW_FN])
            g += load_row(totals, at, valid, PLACES[ROW_G])
            tn += load_row(totals, at, valid, PLACES[ROW_TN])
    spoilt = tl.sum(bad) > 0

    outputs = 1 if FORMULA == GENERALIZED else classes - SKIPPED
    terms = outputs if BATCH else samples * outputs
    region_factor = factor(region_lambda, region_value)
    weight = zeros + 1
    if REDUCTION == MEAN:
        weight = weight / double(terms)
    if FORMULA == RATIO and class_weight is not None:
        weight = weight * class_values(class_weight, c - SKIPPED, overlaps)
    share = region_factor * weight
    region, d_i, d_fp, d_fn, d_tn = zeros, zeros, zeros, zeros, zeros
    if BATCH and FORMULA != NONE:
        i, fp, fn = tl.sum(i, 0, keep_dims=True), tl.sum(fp, 0, keep_dims=True), tl.sum(fn, 0, keep_dims=True)
        g, tn = tl.sum(g, 0, keep_dims=True), tl.sum(tn, 0, keep_dims=True)
        value, d_i, d_fp, d_fn, d_tn = region_terms(
            i, fp, fn, g, tn, overlaps, numbers, FORMULA, TRANSFORM, GDL_WEIGHT
        )
        mask = (b == 0) & (c < classes)
        at_terms = (b, c, mask, outputs)
        region = add_terms(
            region, loss, value, weight, region_factor, at_terms, spoilt, FORMULA, SKIPPED, REDUCTION
        )

    voxel_factor = factor(voxel_lambda, voxel_value)
    denominator = double(1.0)
    if DENOMINATOR != ONE:
        denominator = tl.sum(count)
    if DENOMINATOR == ELEMENTS:
        denominator = denominator * (classes - VOXEL_SKIPPED)
    voxel = zeros
    for start in range(0, samples, BLOCK_B):
        sample = start + b
        at = (sample * classes + c) * WIDTH
        valid = (sample < samples) & (c < classes)
        if FORMULA != NONE and not BATCH:
            i = load_row(totals, at, valid, PLACES[ROW_I])
            fp = load_row(totals, at, valid, PLACES[ROW_FP])
            fn = load_row(totals, at, valid, PLACES[ROW_FN])
            g = load_row(totals, at, valid, PLACES[ROW_G])
            tn = load_row(totals, at, valid, PLACES[ROW_TN])
            value, d_i, d_fp, d_fn, d_tn = region_terms(
                i, fp, fn, g, tn, overlaps & valid, numbers, FORMULA, TRANSFORM, GDL_WEIGHT
            )
            at_terms = (sample, c, valid, outputs)
            region = add_terms(
                region, loss, value, weight, region_factor, at_terms, spoilt, FORMULA, SKIPPED, REDUCTION
            )
        store_slopes(coef, at, tl.where(overlaps, share * d_i, zeros), valid, spoilt, PLACES[ROW_I])
        store_slopes(coef, at, tl.where(overlaps, share * d_fp, zeros), valid, spoilt, PLACES[ROW_FP])
        store_slopes(coef, at, tl.where(overlaps, share * d_fn, zeros), valid, spoilt, PLACES[ROW_FN])
        store_slopes(coef, at, tl.where(overlaps, share * d_tn, zeros), valid, spoilt, PLACES[ROW_TN])
        store_slopes(coef, at, zeros, valid, spoilt, PLACES[ROW_G])
        store_slopes(coef, at, zeros, valid, spoilt, PLACES[ROW_N])
        store_slopes(coef, at, zeros, valid, spoilt, PLACES[ROW_BAD])
        if HAS_VOXEL_TERM:
            divisor = denominator
            if DENOMINATOR == SAMPLES:
                divisor = load_row(totals, sample * classes * WIDTH, sample < samples, PLACES[ROW_N])
            inverse = 1 / divisor
            if not EMPTY:
                # Nothing to learn from (all voxels ignored, or only classes of weight 0): 0, not 0/0.
                inverse = tl.where(divisor == 0, 0.0, inverse)
            scale = voxel_factor * inverse
            by_pos = zeros + pos * (1 - smoothing)
            by_ls = zeros + pos * (smoothing / classes)
            by_neg = zeros + neg
            term = by_pos * load_row(totals, at, valid, PLACES[ROW_POS])
            term += by_ls * load_row(totals, at, valid, PLACES[ROW_LS])
            term += by_neg * load_row(totals, at, valid, PLACES[ROW_NEG])
            term = term * inverse
            if not EMPTY:
                term = tl.where(divisor == 0, 0.0, term)
            voxel += tl.where(valid, term, 0.0)
            store_slopes(coef, at, scale * by_pos, valid, spoilt, PLACES[ROW_POS])
            store_slopes(coef, at, scale * by_ls, valid, spoilt, PLACES[ROW_LS])
            store_slopes(coef, at, scale * by_neg, valid, spoilt, PLACES[ROW_NEG])

    if REDUCTION != NONE:
        total = finish_half(tl.sum(region), region_factor, loss)
        # As torch: the mean of nothing and the quotient of two sums over no sample.
        if FORMULA != NONE and REDUCTION == MEAN:
            total = tl.where(terms == 0, float("nan"), total)
        total += finish_half(tl.sum(voxel), voxel_factor, loss)
        if HAS_VOXEL_TERM and DENOMINATOR != ONE and DENOMINATOR != SAMPLES:
            total = tl.where(samples == 0, float("nan"), total)
        store_loss(loss, 0, tl.where(spoilt, float("nan"), total), None)


# Fields of the spec that are arguments of the kernel, in its order, and those that are its constants.
_VALUES = tuple(name for name, kind in FinishSpec.kinds().items() if kind is float)
_CHOICES = tuple(name for name, kind in FinishSpec.kinds().items() if kind is not float)


@functools.lru_cache(maxsize=256)
def _meta(columns: int, classes: int, rows: int, empty: bool, choices: tuple[int, ...]) -> dict[str, Any]:
    """Constants of the kernel."""
    block_w = 4 if columns <= 512 else 16 if columns <= 8192 else 64
    block_c = triton.next_power_of_2(max(1, classes))
    return {
        "WIDTH": rows.bit_count(),
        "PLACES": places(rows),
        **{name.upper(): int(choice) for name, choice in zip(_CHOICES, choices, strict=True)},
        "EMPTY": empty,
        "BLOCK_W": block_w,
        "BLOCK_K": CHUNK_TILE // block_w,
        "BLOCK_B": max(1, CLASS_TILE // block_c),
        "BLOCK_C": block_c,
        "num_warps": 8,
        **REGISTERS,
    }


class _Inputs(NamedTuple):
    """The first parameters of the kernel: ``tensors`` to region_value, ``values`` to label_smoothing."""

    tensors: tuple[Tensor | None, ...]
    values: tuple[float, ...]


def _inputs(
    loss: Tensor, coef: Tensor, sums: Tensor, weights: Weights, rows: int, spec: FinishSpec
) -> _Inputs:
    _, _, classes, width = sums.shape
    if width != rows.bit_count():
        raise RuntimeError(f"sums: got {width} rows, expected {rows.bit_count()}")
    device = sums.device
    region, region_value = _factor("region_lambda", weights.region_lambda, device)
    voxel, voxel_value = _factor("voxel_lambda", weights.voxel_lambda, device)
    tensors = (
        sums.contiguous(),
        torch.empty_like(coef),
        ticket(device),
        loss,
        coef,
        _values("class_weight", weights.class_weight, classes - spec.skipped, device),
        _values("pos_weight", weights.pos_weight, classes, device),
        _values("neg_weight", weights.neg_weight, classes, device),
        region,
        voxel,
    )
    return _Inputs(tensors, (region_value, voxel_value, *attrgetter(*_VALUES)(spec)))


def _values(name: str, tensor: Tensor | None, expected: int, device: torch.device) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.numel() != expected:
        raise RuntimeError(f"{name}: got {tensor.numel()} values, expected {expected}")
    return tensor.to(device).contiguous()


def _factor(name: str, tensor: Tensor | None, device: torch.device) -> tuple[Tensor | None, float]:
    """A lambda as (tensor on the device, value): one of the two counts. Numbers on the CPU are at hand."""
    if tensor is not None and tensor.ndim == 0 and tensor.is_cpu:
        return None, float(tensor)
    return _values(name, tensor, 1, device), 1.0


def plan_finish(
    loss: Tensor,
    coef: Tensor,
    sums: Tensor,
    weights: Weights,
    rows: int,
    spec: FinishSpec,
    empty: bool,
) -> Launch:
    """The launch that fills ``loss`` and ``coef``; the rest are the arguments of :func:`finish`."""
    inputs = _inputs(loss, coef, sums, weights, rows, spec)
    return _plan(inputs, rows, empty, attrgetter(*_CHOICES)(spec))


def _plan(inputs: _Inputs, rows: int, empty: bool, choices: tuple[int, ...]) -> Launch:
    sums = inputs.tensors[0]
    assert sums is not None
    samples, chunks, classes, width = sums.shape
    columns = samples * classes * width
    if columns > MAX_COLUMNS:
        raise RuntimeError(
            f"sums: got {columns} totals (samples x classes x rows), expected at most {MAX_COLUMNS}; "
            "split the batch"
        )
    meta = _meta(columns, classes, rows, empty, choices)
    programs = max(1, triton.cdiv(columns, meta["BLOCK_W"]))
    return Launch(
        finish_kernel, (programs,), (*inputs.tensors, *inputs.values, samples, chunks, classes), meta
    )


def finish(
    sums: Tensor, weights: Weights, rows: int, spec: FinishSpec, empty: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The op ``finish``: (loss of this dtype, coef (B, C, R) float64), in one launch.

    Raises:
        RuntimeError: weights or sums of another length than classes and rows ask for.
    """
    samples, _, classes, width = sums.shape
    loss = sums.new_empty(spec.loss_shape(samples, classes), dtype=dtype)
    coef = sums.new_empty((samples, classes, width))
    inputs, choices = _inputs(loss, coef, sums, weights, rows, spec), attrgetter(*_CHOICES)(spec)
    launch(lambda: _plan(inputs, rows, empty, choices), *inputs, ("finish", rows, empty, choices))
    return loss, coef
