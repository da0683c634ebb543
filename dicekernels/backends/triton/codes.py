"""The numbers of dicekernels/spec.py and of its formulas, for the kernel of ``finish``.

Kernels import them by name: as globals of theirs they are part of the key under which Triton keeps compiled
kernels on disk, so a number that changes compiles them anew.
"""

from __future__ import annotations

import triton.language as tl

from ... import finish as twin
from ... import spec
from .voxel_math import ROW_BAD, ROW_FN, ROW_FP, ROW_G, ROW_I, ROW_LS, ROW_N, ROW_NEG, ROW_POS, ROW_TN

NONE = tl.constexpr(int(spec.Formula.NONE))
RATIO = tl.constexpr(int(spec.Formula.RATIO))
GENERALIZED = tl.constexpr(int(spec.Formula.GENERALIZED))
MCC = tl.constexpr(int(spec.Formula.MCC))
LOG = tl.constexpr(int(spec.Transform.LOG))
POWER = tl.constexpr(int(spec.Transform.POWER))
SQUARE = tl.constexpr(int(spec.GdlWeight.SQUARE))
UNIFORM = tl.constexpr(int(spec.GdlWeight.UNIFORM))
LOWEST_SCORE = tl.constexpr(twin.LOWEST_SCORE)
# float32 numbers near 2^-128 are 2^-149 apart, and 2^-128 is the largest whose reciprocal is infinite. What
# is at most this is rounded to it or less (a tie to 2^-128, which is even).
INFINITE_BELOW = tl.constexpr(2.0**-128 + 2.0**-150)
REDUCE_NONE = tl.constexpr(int(spec.Reduction.NONE))
REDUCE_MEAN = tl.constexpr(int(spec.Reduction.MEAN))
ONE = tl.constexpr(int(spec.Denominator.ONE))
WEIGHTS = tl.constexpr(int(spec.Denominator.WEIGHTS))
ELEMENTS = tl.constexpr(int(spec.Denominator.ELEMENTS))
SAMPLES = tl.constexpr(int(spec.Denominator.SAMPLES))

__all__ = [
    "ELEMENTS",
    "GENERALIZED",
    "INFINITE_BELOW",
    "LOG",
    "LOWEST_SCORE",
    "MCC",
    "NONE",
    "ONE",
    "POWER",
    "RATIO",
    "REDUCE_MEAN",
    "REDUCE_NONE",
    "ROW_BAD",
    "ROW_FN",
    "ROW_FP",
    "ROW_G",
    "ROW_I",
    "ROW_LS",
    "ROW_N",
    "ROW_NEG",
    "ROW_POS",
    "ROW_TN",
    "SAMPLES",
    "SQUARE",
    "UNIFORM",
    "WEIGHTS",
]
