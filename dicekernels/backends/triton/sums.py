"""Forward: one pass over the voxels, every row of every class summed. A program is a chunk of a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import RUN_VOXELS, SumsSpec, chunk_count, chunk_voxels
from .codes import (
    CE,
    NONE,
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
    SOFTMAX,
)
from .launch import Launch, launch
from .loads import exponential, exponents, load_inputs, logarithm
from .problem import NUMBERS, Problem, flat_inputs
from .rows import (
    add_ce,
    add_negatives,
    add_overlap_rows,
    add_run,
    add_volume,
    binary_rows,
    probabilities,
    shifted_log_p,
    softmax_row,
    store_row,
    weighted,
)
from .tile import all_voxels, class_index, class_offset, class_sum, per_voxel, tile_sums, zero_sums
from .voxel_math import LN2


@triton.jit(do_not_specialize=["chunks", "runs", *NUMBERS])
def sums_kernel(
    logits,  # (B, C, V)
    target,  # (B, C, V) values or (B, V) labels
    mask,  # (B, V); read if MASKED
    slots,  # (B, chunks, C, WIDTH) float64
    chunks,
    runs,  # of RUN voxels in a chunk
    voxels,  # over VOXEL_UNIT
    logits_batch,
    logits_channel,
    logits_voxel,
    target_batch,
    target_channel,
    target_voxel,
    mask_batch,
    mask_voxel,
    ignore_index,
    one,
    C: tl.constexpr,
    DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
    VOXEL_TERM: tl.constexpr,
    BINARY: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    PRODUCT_MASK: tl.constexpr,
    FLOATS: tl.constexpr,
    FIRST_CLASS: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    VOXEL_UNIT: tl.constexpr,
    LOGITS: tl.constexpr,
    TARGET: tl.constexpr,
    ASM: tl.constexpr,
    SHAPE: tl.constexpr,
    SCATTERED: tl.constexpr,
    RUN: tl.constexpr,
    ONE_RUN: tl.constexpr,
    PLACES: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    SELECT: tl.constexpr = MASKED or HAS_IGNORE
    SOFTMAX_TERM: tl.constexpr = VOXEL_TERM != NONE and VOXEL_TERM != CE and not BINARY
    NEEDS_SOFTMAX: tl.constexpr = ACTIVATION == SOFTMAX or VOXEL_TERM == CE
    PAD: tl.constexpr = float("-inf") if NEEDS_SOFTMAX or SOFTMAX_TERM else 0.0
    BLOCK_N: tl.constexpr = SHAPE[1]
    OVERLAPS: tl.constexpr = PLACES[ROW_I] >= 0 or PLACES[ROW_FP] >= 0 or PLACES[ROW_FN] >= 0
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    chunk = program % chunks
    voxels = voxels * VOXEL_UNIT
    c = class_index(SHAPE)
    # Rows in int64: classes times voxels pass 2^31 inside of one sample.
    logits_row = (
        logits + sample * logits_batch * LOGITS[0] + class_offset(c, logits_channel, one, LOGITS, SCATTERED)
    )
    labels = target + sample * target_batch * TARGET[0]
    target_row = labels
    if DENSE:
        target_row += class_offset(c, target_channel, one, TARGET, SCATTERED)
    mask_row = mask
    if MASKED:
        mask_row = mask + sample * mask_batch

    i_totals = all_voxels(zero_sums(SHAPE, ACC), SHAPE)
    fp_totals = i_totals
    fn_totals = i_totals
    tn_totals = i_totals
    g_totals = i_totals
    pos_totals = i_totals
    neg_totals = i_totals
    ls_totals = i_totals
    n_total = tl.zeros((), tl.float64)
    bad_total = tl.zeros((), tl.float64)
    for run in range(1 if ONE_RUN else runs):
        i = zero_sums(SHAPE, ACC)
        fp = i
        fn = i
        tn = i
        volume = i
        pos = i
        neg = i
        ls = i
        n = tl.zeros((BLOCK_N,), ACC)
        wrong = tl.zeros((BLOCK_N,), tl.int32)
        first = (chunk * runs + run) * RUN
        left = tl.maximum(0, tl.minimum(RUN, voxels - first))
        for start in range(0, left, BLOCK_N):
            v = first + start + tl.arange(0, BLOCK_N)
            within = v < voxels
            # 1. Load.
            z, g, hit, inside, m, bad = load_inputs(
                logits_row,
                labels,
                target_row,
                mask_row,
                c,
                v,
                within,
                logits_voxel,
                target_voxel,
                mask_voxel,
                ignore_index,
                PAD,
                ACC,
                C,
                DENSE,
                HAS_IGNORE,
                MASKED,
                LOGITS,
                TARGET,
                SHAPE,
                EVEN,
            )
            if PLACES[ROW_N] >= 0 and MASKED:
                n += m
            elif PLACES[ROW_N] >= 0 and (SELECT or DENSE):
                n = tl.where(inside, n + 1, n)
            if not DENSE:
                wrong = tl.where(bad, wrong + 1, wrong)

            # 2. Softmax.
            t = z
            e = z
            sum_e = z
            if NEEDS_SOFTMAX:
                t = exponents(z, within, VOXEL_TERM == CE, SHAPE, EVEN)
                e = exponential(t)
                sum_e = class_sum(e, SHAPE)
            # 3. Rows.
            if OVERLAPS or PLACES[ROW_TN] >= 0:
                p = probabilities(z, e, sum_e, inside, ACTIVATION, ASM, SHAPE)
                if OVERLAPS:
                    i, fp, fn = add_overlap_rows(
                        i, fp, fn, p, g, hit, m, DENSE, OVERLAP, MASKED, PRODUCT_MASK, SHAPE
                    )
                if PLACES[ROW_TN] >= 0:
                    tn = add_negatives(tn, p, g, hit, inside, m, DENSE, MASKED, SHAPE)
            if PLACES[ROW_G] >= 0:
                volume = add_volume(volume, g, hit, m, DENSE, MASKED, SHAPE)
            if VOXEL_TERM == CE:
                nll = per_voxel(logarithm(sum_e), SHAPE) - t
                pos = add_ce(pos, nll, g, hit, inside, m, DENSE, MASKED, SHAPE)
                if PLACES[ROW_LS] >= 0:
                    ls += tile_sums(weighted(nll, inside, m, MASKED, SHAPE), SHAPE)
            elif BINARY:
                positive, negative = binary_rows(
                    z, g, hit, inside, m, DENSE, VOXEL_TERM, FLOATS, MASKED, ASM, SHAPE
                )
                pos += tile_sums(positive, SHAPE)
                neg += tile_sums(negative, SHAPE)
            elif SOFTMAX_TERM:
                log_p = shifted_log_p(z, c, within, FIRST_CLASS, SHAPE, EVEN)
                x = softmax_row(
                    log_p, c, g, hit, inside, m, DENSE, VOXEL_TERM, FLOATS, FIRST_CLASS, MASKED, SHAPE
                )
                pos += tile_sums(x, SHAPE)
        # 4. Add the run to the chunk.
        i_totals, fp_totals = add_run(i_totals, fp_totals, i, fp, PLACES[ROW_I], PLACES[ROW_FP], SHAPE)
        fn_totals, pos_totals = add_run(
            fn_totals, pos_totals, fn, pos, PLACES[ROW_FN], PLACES[ROW_POS], SHAPE
        )
        g_totals, neg_totals = add_run(
            g_totals, neg_totals, volume, neg, PLACES[ROW_G], PLACES[ROW_NEG], SHAPE
        )
        ls_totals, tn_totals = add_run(ls_totals, tn_totals, ls, tn, PLACES[ROW_LS], PLACES[ROW_TN], SHAPE)
        if PLACES[ROW_BAD] >= 0:
            bad_total += tl.sum(wrong, 0)
        if PLACES[ROW_N] >= 0 and (SELECT or DENSE):
            n_total += tl.sum(n, 0)
        elif PLACES[ROW_N] >= 0:
            n_total += left - tl.sum(wrong, 0)

    if VOXEL_TERM == CE and ACC == tl.float32:
        pos_totals = pos_totals * LN2
        ls_totals = ls_totals * LN2
    # 5. Store.
    WIDTH: tl.constexpr = PLACES[10]  # behind the places of the ten rows
    slot = slots + program.to(tl.int64) * (C * WIDTH)
    store_row(slot, c, i_totals, C, WIDTH, PLACES[ROW_I])
    store_row(slot, c, fp_totals, C, WIDTH, PLACES[ROW_FP])
    store_row(slot, c, fn_totals, C, WIDTH, PLACES[ROW_FN])
    store_row(slot, c, g_totals, C, WIDTH, PLACES[ROW_G])
    store_row(slot, c, pos_totals, C, WIDTH, PLACES[ROW_POS])
    store_row(slot, c, neg_totals, C, WIDTH, PLACES[ROW_NEG])
    store_row(slot, c, ls_totals, C, WIDTH, PLACES[ROW_LS])
    store_row(slot, c, n_total + tl.zeros_like(i_totals), C, WIDTH, PLACES[ROW_N])
    store_row(slot, c, tl.where(c == 0, bad_total, 0.0), C, WIDTH, PLACES[ROW_BAD])
    store_row(slot, c, tn_totals, C, WIDTH, PLACES[ROW_TN])


def plan_sums(logits: Tensor, target: Tensor, mask: Tensor | None, slots: Tensor, spec: SumsSpec) -> Launch:
    """The launch that fills ``slots`` (B, K, C, R) float64."""
    seen = Problem.of(logits, target, mask, spec)
    runs = chunk_voxels(seen.voxels) // RUN_VOXELS
    args = (*seen.tensors(), slots, slots.shape[1], runs, *seen.numbers())
    meta = seen.constants() | {"RUN": RUN_VOXELS, "ONE_RUN": runs == 1}
    return Launch(sums_kernel, (slots.shape[0] * slots.shape[1],), args, meta)


def sums(logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec) -> Tensor:
    """(B, K, C, R) float64: see dicekernels/ops.py."""
    samples, classes = logits.shape[:2]
    voxels = logits.shape[2:].numel()
    slots = torch.empty(
        (samples, chunk_count(voxels), classes, spec.rows.bit_count()),
        dtype=torch.float64,
        device=logits.device,
    )
    if logits.numel() == 0:
        return slots.zero_()
    logits, target, mask = flat_inputs(logits, target, mask)
    launch(
        lambda: plan_sums(logits, target, mask, slots, spec),
        (logits, target, logits if mask is None else mask, slots),
        (),
        ("sums", spec, mask is None),
    )
    return slots
