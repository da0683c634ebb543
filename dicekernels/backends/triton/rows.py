"""What one tile adds to each row of the sums; docs/semantics.md has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import PRODUCT, SIGMOID, SOFTMAX
from .loads import exponential, exponents, logarithm, natural
from .tile import add_where, all_voxels, class_sum, per_voxel, tile_sums
from .voxel_math import binary_term, hard_term, overlap_terms, reciprocal, sigmoid, softmax_term


@triton.jit
def weighted(x, inside, m, MASKED: tl.constexpr, SHAPE: tl.constexpr):
    """A term times the voxel weight; what stands where no voxel counts is dropped."""
    if MASKED:
        return x * per_voxel(m, SHAPE)
    else:
        return tl.where(per_voxel(inside, SHAPE), x, 0.0)


@triton.jit
def probabilities(z, e, sum_e, inside, ACTIVATION: tl.constexpr, ASM: tl.constexpr, SHAPE: tl.constexpr):
    """p of a tile, 0 where no voxel counts; e and its sum over the classes are those of a softmax."""
    if ACTIVATION == SOFTMAX:
        return e * per_voxel(tl.where(inside, reciprocal(sum_e, ASM), 0.0), SHAPE)
    elif ACTIVATION == SIGMOID:
        p, _ = sigmoid(z, ASM)
        return tl.where(per_voxel(inside, SHAPE), p, 0.0)
    else:
        return tl.where(per_voxel(inside, SHAPE), z, 0.0)


@triton.jit
def add_overlap_rows(
    i,
    fp,
    fn,
    p,
    g,
    hit,
    m,
    DENSE: tl.constexpr,
    OVERLAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRODUCT_MASK: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """The rows I, FP and FN with a tile added."""
    if OVERLAP == PRODUCT and not DENSE and not (MASKED and PRODUCT_MASK):
        one = 1.0
        if MASKED:
            one = per_voxel(m, SHAPE)
            p = p * one
        miss = hit == 0
        return add_where(i, p, hit, SHAPE), add_where(fp, p, miss, SHAPE), add_where(fn, one - p, hit, SHAPE)
    else:
        if not DENSE:
            g = tl.where(hit, 1.0, 0.0).to(p.dtype)
        if MASKED and PRODUCT_MASK:
            p = p * per_voxel(m, SHAPE)
            g = g * per_voxel(m, SHAPE)
        tp_, fp_, fn_ = overlap_terms(p, g, OVERLAP)
        if MASKED and not PRODUCT_MASK:
            tp_ = tp_ * per_voxel(m, SHAPE)
            fp_ = fp_ * per_voxel(m, SHAPE)
            fn_ = fn_ * per_voxel(m, SHAPE)
        return i + tile_sums(tp_, SHAPE), fp + tile_sums(fp_, SHAPE), fn + tile_sums(fn_, SHAPE)


@triton.jit
def add_volume(volume, g, hit, m, DENSE: tl.constexpr, MASKED: tl.constexpr, SHAPE: tl.constexpr):
    """The row G, the sum of m g, with a tile added."""
    if DENSE:
        if MASKED:
            g = g * per_voxel(m, SHAPE)
        return volume + tile_sums(g, SHAPE)
    else:
        one = tl.full(hit.shape, 1.0, volume.dtype)
        if MASKED:
            one = one * per_voxel(m, SHAPE)
        return add_where(volume, one, hit, SHAPE)


@triton.jit
def add_negatives(tn, p, g, hit, inside, m, DENSE: tl.constexpr, MASKED: tl.constexpr, SHAPE: tl.constexpr):
    """The row TN, the sum of m (1 - p) (1 - g), with a tile added."""
    if DENSE:
        x = (1 - p) * (1 - g)
    else:
        x = tl.where(hit, 0.0, 1 - p)
    return tn + tile_sums(weighted(x, inside, m, MASKED, SHAPE), SHAPE)


@triton.jit
def add_ce(pos, nll, g, hit, inside, m, DENSE: tl.constexpr, MASKED: tl.constexpr, SHAPE: tl.constexpr):
    """The row POS of the cross entropy, the sum of m g (-log p), with a tile added."""
    if DENSE:
        return pos + tile_sums(weighted(g * nll, inside, m, MASKED, SHAPE), SHAPE)
    else:
        # Selected, not multiplied by 0 or 1: -log p of an impossible class is infinite.
        if MASKED:
            nll = nll * per_voxel(m, SHAPE)
        return add_where(pos, nll, hit, SHAPE)


@triton.jit
def binary_rows(
    z,
    g,
    hit,
    inside,
    m,
    DENSE: tl.constexpr,
    VOXEL_TERM: tl.constexpr,
    FLOATS: tl.constexpr,
    MASKED: tl.constexpr,
    ASM: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """(POS, NEG) of a binary term."""
    if DENSE:
        positive, negative, _ = binary_term(z, g, g, 1 - g, VOXEL_TERM, FLOATS, ASM)
        positive = g * positive
        negative = (1 - g) * negative
    else:
        loss, _ = hard_term(tl.where(hit, z, -z), VOXEL_TERM, FLOATS, ASM)
        positive = tl.where(hit, loss, 0.0)
        negative = tl.where(hit, 0.0, loss)
    return weighted(positive, inside, m, MASKED, SHAPE), weighted(negative, inside, m, MASKED, SHAPE)


@triton.jit
def shifted_log_p(z, c, within, FIRST_CLASS: tl.constexpr, SHAPE: tl.constexpr, EVEN: tl.constexpr):
    """log of the softmax over the classes from FIRST_CLASS on."""
    t = exponents(tl.where(c >= FIRST_CLASS, z, float("-inf")), within, True, SHAPE, EVEN)
    return natural(t - per_voxel(logarithm(class_sum(exponential(t), SHAPE)), SHAPE))


@triton.jit
def softmax_row(
    log_p,
    c,
    g,
    hit,
    inside,
    m,
    DENSE: tl.constexpr,
    VOXEL_TERM: tl.constexpr,
    FLOATS: tl.constexpr,
    FIRST_CLASS: tl.constexpr,
    MASKED: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """POS of a softmax term of the classes from FIRST_CLASS on."""
    loss, _ = softmax_term(log_p, VOXEL_TERM, FLOATS)
    if DENSE:
        x = tl.where(c >= FIRST_CLASS, g * loss, 0.0)
    else:
        x = tl.where(hit & (c >= FIRST_CLASS), loss, 0.0)
    return weighted(x, inside, m, MASKED, SHAPE)


@triton.jit
def add_run(totals0, totals1, sums0, sums1, PLACE0: tl.constexpr, PLACE1: tl.constexpr, SHAPE: tl.constexpr):
    """The float64 sums of a chunk after one more run. Two rows at a time: half the barriers."""
    if PLACE0 >= 0 and PLACE1 >= 0:
        run0, run1 = tl.split(all_voxels(tl.join(sums0, sums1), SHAPE))
        return totals0 + run0, totals1 + run1
    elif PLACE0 >= 0:
        return totals0 + all_voxels(sums0, SHAPE), totals1
    elif PLACE1 >= 0:
        return totals0, totals1 + all_voxels(sums1, SHAPE)
    else:
        return totals0, totals1


@triton.jit
def store_row(slot, c, totals, C: tl.constexpr, WIDTH: tl.constexpr, PLACE: tl.constexpr):
    """One row of a slot (C, WIDTH); PLACE is the row's among those that are on, -1 if it is off."""
    if PLACE >= 0:
        tl.store(slot + c * WIDTH + PLACE, totals, mask=c < C)
