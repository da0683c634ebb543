"""What the gradient of one tile takes from each term: derivatives in the logits, without the voxel weight."""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import PRODUCT
from .tile import class_sum, per_voxel
from .voxel_math import binary_term, hard_term, overlap_slope, softmax_term


@triton.jit
def load_slope(coef, grad, c, ACC: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, PLACE: tl.constexpr):
    """dLoss/dsums of one row for every class, 0 for a row that is off. Multiplied in float64, where no
    gradient scale of AMP underflows."""
    if PLACE >= 0:
        return (tl.load(coef + c * WIDTH + PLACE, mask=c < C, other=0.0) * grad).to(ACC)
    else:
        return tl.zeros(c.shape, ACC)


@triton.jit
def overlap_slopes(
    p,
    g,
    hit,
    m,
    a_i,
    a_fp,
    a_fn,
    DENSE: tl.constexpr,
    OVERLAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRODUCT_MASK: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """d(overlap rows)/dp of a tile."""
    if OVERLAP == PRODUCT and not DENSE and not (MASKED and PRODUCT_MASK):
        return tl.where(hit, a_i - a_fn, a_fp)
    else:
        if not DENSE:
            g = tl.where(hit, 1.0, 0.0).to(p.dtype)
        if MASKED and PRODUCT_MASK:
            p = p * per_voxel(m, SHAPE)
            g = g * per_voxel(m, SHAPE)
        return overlap_slope(p, g, a_i, a_fp, a_fn, OVERLAP)


@triton.jit
def ce_pull(g, hit, a_pos, a_ls, DENSE: tl.constexpr, SMOOTHED: tl.constexpr):
    """a_pos g + a_ls, what the cross entropy pulls each class by."""
    if DENSE:
        return a_pos * g + a_ls
    elif SMOOTHED:
        return tl.where(hit, a_pos + a_ls, a_ls)
    else:
        return tl.where(hit, a_pos, 0.0)


@triton.jit
def binary_gradient(
    z,
    g,
    hit,
    a_pos,
    a_neg,
    DENSE: tl.constexpr,
    VOXEL_TERM: tl.constexpr,
    FLOATS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Of a binary term."""
    if DENSE:
        _, _, slope = binary_term(z, g, a_pos * g, a_neg * (1 - g), VOXEL_TERM, FLOATS, ASM)
        return slope
    else:
        _, slope = hard_term(tl.where(hit, z, -z), VOXEL_TERM, FLOATS, ASM)
        return tl.where(hit, a_pos, -a_neg) * slope


@triton.jit
def softmax_gradient(
    log_p,
    c,
    g,
    hit,
    a_pos,
    C: tl.constexpr,
    DENSE: tl.constexpr,
    VOXEL_TERM: tl.constexpr,
    FLOATS: tl.constexpr,
    FIRST_CLASS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Of a softmax term over the classes from FIRST_CLASS on."""
    _, slope = softmax_term(log_p, VOXEL_TERM, FLOATS)
    if DENSE:
        # Beside the classes log p is -inf and the slope NaN.
        own = tl.where((c >= FIRST_CLASS) & (c < C), a_pos * g * slope, 0.0)
    else:
        own = tl.where(hit & (c >= FIRST_CLASS), a_pos * slope, 0.0)
    # log p of the classes before FIRST_CLASS is -inf, their p 0.
    return own - tl.exp(log_p) * per_voxel(class_sum(own, SHAPE), SHAPE)
