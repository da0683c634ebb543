"""What both passes read of a tile: logits, labels or values, voxel weights; and the softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import class_max, per_voxel
from .voxel_math import LN2, LOG2E, log2


@triton.jit
def voxel_offset(v, stride, LAYOUT: tl.constexpr):
    """v times the stride of the voxels; int32 if that is 1 (a sample has fewer than 2^31), else int64."""
    if LAYOUT[3]:
        return v
    else:
        return v.to(tl.int64) * stride * LAYOUT[2]


@triton.jit
def load_tile(pointer, c, within, other, C: tl.constexpr, SHAPE: tl.constexpr, EVEN: tl.constexpr):
    """A value for each class and voxel; `other` where no class or no voxel is."""
    if EVEN and SHAPE[0] == C:
        return tl.load(pointer)
    elif EVEN:
        return tl.load(pointer, mask=c < C, other=other)
    elif SHAPE[0] == C:
        return tl.load(pointer, mask=per_voxel(within, SHAPE), other=other)
    else:
        return tl.load(pointer, mask=(c < C) & per_voxel(within, SHAPE), other=other)


@triton.jit
def load_labels(pointer, within, ignore_index, C: tl.constexpr, HAS_IGNORE: tl.constexpr, EVEN: tl.constexpr):
    """(label, valid, bad) of each voxel: int32; in [0, C) and not ignored; neither one nor the other."""
    if EVEN:
        y = tl.load(pointer)
    else:
        y = tl.load(pointer, mask=within, other=0)
    if y.dtype.is_floating():
        # As MONAI's labels.long(), but of numbers alone that have such a value. Compared with ignore_index
        # before the truncation: 0.7 is not 0.
        y = y.to(tl.float64)
        ignored = y == ignore_index
        label = tl.where((y > -1) & (y < 1e9), y, -1.0).to(tl.int32)
        valid = (label >= 0) & (label < C)
    else:
        if y.dtype.primitive_bitwidth < 32:
            y = y.to(tl.int32)
        ignored = y == ignore_index
        valid = (y >= 0) & (y < C)
        if y.dtype.primitive_bitwidth > 32:
            y = tl.where(valid, y, -1)  # 2^32 + 1 is no label 1
        label = y.to(tl.int32)
    bad = valid == 0
    if HAS_IGNORE:
        valid = valid & (ignored == 0)
        bad = bad & (ignored == 0)
    if not EVEN:
        valid = valid & within
        bad = bad & within
    return label, valid, bad


@triton.jit
def load_voxels(
    labels,
    mask,
    v,
    mask_voxel,
    within,
    ignore_index,
    ACC: tl.constexpr,
    C: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(label, inside, m, bad) of each voxel: whether it counts, its weight, whether its label is an error.

    What lies beside the volume or is ruled out by a mask or an ignored label has label -1 and weight 0.
    """
    inside = within
    label = within
    bad = within
    m = within
    if MASKED:
        m = tl.load(mask + v.to(tl.int64) * mask_voxel, mask=within, other=0).to(ACC)
        inside = m != 0
    if not DENSE:
        label, valid, bad = load_labels(labels, within, ignore_index, C, HAS_IGNORE, EVEN)
        if MASKED:
            bad = bad & inside
            valid = valid & inside
            m = tl.where(valid, m, 0.0)
        inside = valid
        if MASKED or HAS_IGNORE or not EVEN:
            label = tl.where(inside, label, -1)
    return label, inside, m, bad


@triton.jit
def load_inputs(
    logits,
    labels,
    values,
    mask,
    c,
    v,
    within,
    logits_voxel,
    target_voxel,
    mask_voxel,
    ignore_index,
    PAD: tl.constexpr,
    ACC: tl.constexpr,
    C: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    MASKED: tl.constexpr,
    LOGITS: tl.constexpr,
    TARGET: tl.constexpr,
    SHAPE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(z, g, hit, inside, m, bad) of a tile: logits; values of a dense target or what a label selects; and
    ``load_voxels``. ``labels`` points to a sample, ``logits`` and ``values`` to its rows."""
    z = load_tile(
        logits + per_voxel(voxel_offset(v, logits_voxel, LOGITS), SHAPE), c, within, PAD, C, SHAPE, EVEN
    ).to(ACC)
    at = voxel_offset(v, target_voxel, TARGET)
    label, inside, m, bad = load_voxels(
        labels + at, mask, v, mask_voxel, within, ignore_index, ACC, C, DENSE, HAS_IGNORE, MASKED, EVEN
    )
    g = 0.0
    hit = within
    if MASKED or HAS_IGNORE:
        # Nothing of an ignored voxel goes further, not even NaN.
        z = tl.where(per_voxel(inside, SHAPE), z, 0.0)
    if DENSE:
        g = load_tile(values + per_voxel(at, SHAPE), c, within, 0, C, SHAPE, EVEN).to(ACC)
        if MASKED or HAS_IGNORE:
            g = tl.where(per_voxel(inside, SHAPE), g, 0.0)
    else:
        hit = per_voxel(label, SHAPE) == c
    return z, g, hit, inside, m, bad


@triton.jit
def exponents(z, within, LOGS: tl.constexpr, SHAPE: tl.constexpr, EVEN: tl.constexpr):
    """The logits minus the largest of their voxel, for float32 in units of log 2.

    Without LOGS in one multiply-add: what the product with log2(e) is rounded by is the same for all classes
    of a voxel and cancels in p. For logarithms the largest is taken off first: -log p of a perfect voxel is 0
    then, not a rounding of either sign.
    """
    largest = class_max(z, SHAPE)
    if not EVEN:
        largest = tl.where(within, largest, 0.0)  # no -inf - -inf beside the volume
    if z.dtype == tl.float64:
        return z - per_voxel(largest, SHAPE)
    elif LOGS:
        return (z - per_voxel(largest, SHAPE)) * LOG2E
    else:
        return tl.fma(z, LOG2E, per_voxel(-(largest * LOG2E), SHAPE))


@triton.jit
def exponential(t):
    """exp of ``exponents``."""
    if t.dtype == tl.float64:
        return tl.exp(t)
    else:
        return tl.exp2(t)


@triton.jit
def logarithm(x):
    """log in the unit of ``exponents``, of a sum of their powers."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        return log2(x)


@triton.jit
def natural(x):
    """From the unit of ``exponents`` to that of log."""
    if x.dtype == tl.float64:
        return x
    else:
        return x * LN2
