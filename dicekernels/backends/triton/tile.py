"""What hides the shape of a tile from the kernels: classes and voxels, reductions, thread-local sums.

A tile holds BLOCK_C classes (a power of two, at least C) of BLOCK_N voxels, and SHAPE = (BLOCK_C, BLOCK_N,
LANES, FOLD, INNER) names one of three shapes:

* channel-first (INNER): [BLOCK_C, BLOCK_N]. FOLD neighbouring voxels lie in one thread, those of a 16-byte
  load, so summing over them needs no other thread; sums of a tile are [BLOCK_C, BLOCK_N / FOLD].
* channels-last: [BLOCK_C, BLOCK_N] too. FOLD neighbouring voxels lie in different threads and those that lie
  FOLD apart in one; sums of a tile are [BLOCK_C, FOLD].
* channels-last with many classes (LANES > 0): [BLOCK_N, BLOCK_C / LANES, LANES]. LANES threads of a warp read
  neighbouring classes; sums of a tile are [FOLD, BLOCK_C / LANES, LANES].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def class_index(SHAPE: tl.constexpr):
    """int32, in the tile's shape with one voxel."""
    BLOCK_C: tl.constexpr = SHAPE[0]
    LANES: tl.constexpr = SHAPE[2]
    if LANES > 0:
        return tl.arange(0, BLOCK_C // LANES)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    else:
        return tl.arange(0, BLOCK_C)[:, None]


@triton.jit
def class_offset(c, stride, one, LAYOUT: tl.constexpr, SCATTERED: tl.constexpr):
    """c times the stride of the classes, in int64 from the first product on; LAYOUT: View.layout.

    SCATTERED: times a 1 that the compiler does not know, or it would see contiguous classes and give them to
    the lanes of a warp.
    """
    if LAYOUT[4]:
        return c.to(tl.int64) * (one if SCATTERED else 1)
    else:
        return c.to(tl.int64) * stride * LAYOUT[1]


@triton.jit
def per_voxel(x, SHAPE: tl.constexpr):
    """[BLOCK_N] in the tile's shape with one class."""
    if SHAPE[2] > 0:
        return x[:, None, None]
    else:
        return x[None, :]


@triton.jit
def class_max(x, SHAPE: tl.constexpr):
    """[BLOCK_N]"""
    if SHAPE[2] > 0:
        return tl.max(tl.max(x, 2), 1)
    else:
        return tl.max(x, 0)


@triton.jit
def class_sum(x, SHAPE: tl.constexpr):
    """[BLOCK_N]"""
    if SHAPE[2] > 0:
        return tl.sum(tl.sum(x, 2), 1)
    else:
        return tl.sum(x, 0)


@triton.jit
def zero_sums(SHAPE: tl.constexpr, dtype: tl.constexpr):
    """Sums of a tile, to start with."""
    BLOCK_C: tl.constexpr = SHAPE[0]
    BLOCK_N: tl.constexpr = SHAPE[1]
    LANES: tl.constexpr = SHAPE[2]
    FOLD: tl.constexpr = SHAPE[3]
    if LANES > 0:
        return tl.zeros((FOLD, BLOCK_C // LANES, LANES), dtype)
    elif SHAPE[4]:
        return tl.zeros((BLOCK_C, BLOCK_N // FOLD), dtype)
    else:
        return tl.zeros((BLOCK_C, FOLD), dtype)


@triton.jit
def tile_sums(x, SHAPE: tl.constexpr):
    """Sum of a tile over the voxels that lie in one thread."""
    BLOCK_C: tl.constexpr = SHAPE[0]
    BLOCK_N: tl.constexpr = SHAPE[1]
    LANES: tl.constexpr = SHAPE[2]
    FOLD: tl.constexpr = SHAPE[3]
    if LANES > 0:
        return tl.sum(tl.reshape(x, (BLOCK_N // FOLD, FOLD, BLOCK_C // LANES, LANES)), 0)
    elif SHAPE[4]:
        return tl.sum(tl.reshape(x, (BLOCK_C, BLOCK_N // FOLD, FOLD)), 2)
    else:
        return tl.sum(tl.reshape(x, (BLOCK_C, BLOCK_N // FOLD, FOLD)), 1)


@triton.jit
def all_voxels(x, SHAPE: tl.constexpr):
    """Sums of a tile, or pairs of them in one more dimension, added up over the threads: float64, with the
    dimension of the voxels left at size 1."""
    return tl.sum(x, 0 if SHAPE[2] > 0 else 1, keep_dims=True).to(tl.float64)


@triton.jit
def add_where(sums, x, gate, SHAPE: tl.constexpr):
    """Sums of a tile with x added where the gate is open.

    Voxel by voxel into the same accumulators, selected after the addition: one predicated instruction each,
    where a select before a sum over voxels takes two.
    """
    BLOCK_C: tl.constexpr = SHAPE[0]
    LANES: tl.constexpr = SHAPE[2]
    FOLD: tl.constexpr = SHAPE[3]
    VOXELS: tl.constexpr = FOLD if SHAPE[4] else SHAPE[1] // FOLD
    if LANES > 0:
        apart: tl.constexpr = (VOXELS, FOLD, BLOCK_C // LANES, LANES)
        x = tl.permute(tl.reshape(x, apart), (1, 2, 3, 0))
        gate = tl.permute(tl.reshape(gate, apart), (1, 2, 3, 0))
    elif SHAPE[4]:
        x = tl.reshape(x, (BLOCK_C, SHAPE[1] // FOLD, VOXELS))
        gate = tl.reshape(gate, (BLOCK_C, SHAPE[1] // FOLD, VOXELS))
    else:
        x = tl.permute(tl.reshape(x, (BLOCK_C, VOXELS, FOLD)), (0, 2, 1))
        gate = tl.permute(tl.reshape(gate, (BLOCK_C, VOXELS, FOLD)), (0, 2, 1))
    if VOXELS == 1:
        return _add_one(sums, x, gate)
    elif VOXELS == 2:
        return _add_two(sums, x, gate)
    elif VOXELS == 4:
        return _add_four(sums, x, gate)
    elif VOXELS == 8:
        return _add_eight(sums, x, gate)
    else:
        tl.static_assert(VOXELS == 16, "a thread holds 1, 2, 4, 8 or 16 voxels of a class")
        x0, x1 = _halves(x)
        gate0, gate1 = _halves(gate)
        return _add_eight(_add_eight(sums, x0, gate0), x1, gate1)


# Not one function that calls itself: the hash of a kernel's source in triton 3.4 does not end then.
@triton.jit
def _add_one(sums, x, gate):
    return tl.where(tl.reshape(gate, sums.shape), sums + tl.reshape(x, sums.shape), sums)


@triton.jit
def _add_two(sums, x, gate):
    x0, x1 = _halves(x)
    gate0, gate1 = _halves(gate)
    return _add_one(_add_one(sums, x0, gate0), x1, gate1)


@triton.jit
def _add_four(sums, x, gate):
    x0, x1 = _halves(x)
    gate0, gate1 = _halves(gate)
    return _add_two(_add_two(sums, x0, gate0), x1, gate1)


@triton.jit
def _add_eight(sums, x, gate):
    x0, x1 = _halves(x)
    gate0, gate1 = _halves(gate)
    return _add_four(_add_four(sums, x0, gate0), x1, gate1)


@triton.jit
def _halves(x):
    """The even and the odd elements of the last dimension."""
    if len(x.shape) == 4:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2)))
    else:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
