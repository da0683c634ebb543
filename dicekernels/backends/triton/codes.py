"""The numbers of dicekernels/spec.py as constants of kernels.

Kernels import them by name: as globals of theirs they are part of the key under which Triton keeps compiled
kernels on disk, so a number that changes compiles them anew.
"""

from __future__ import annotations

import triton.language as tl

from ... import finish as twin
from ... import spec

SIGMOID = tl.constexpr(int(spec.Activation.SIGMOID))
SOFTMAX = tl.constexpr(int(spec.Activation.SOFTMAX))
PRODUCT = tl.constexpr(int(spec.Overlap.PRODUCT))
SQUARED = tl.constexpr(int(spec.Overlap.SQUARED))
VOXEL_SQUARED = tl.constexpr(int(spec.Overlap.VOXEL_SQUARED))
CE = tl.constexpr(int(spec.VoxelTerm.CE))
BCE = tl.constexpr(int(spec.VoxelTerm.BCE))
FOCAL_SIGMOID = tl.constexpr(int(spec.VoxelTerm.FOCAL_SIGMOID))
FOCAL_SOFTMAX = tl.constexpr(int(spec.VoxelTerm.FOCAL_SOFTMAX))
ROW_I = tl.constexpr(spec.ROWS.index("I"))
ROW_FP = tl.constexpr(spec.ROWS.index("FP"))
ROW_FN = tl.constexpr(spec.ROWS.index("FN"))
ROW_G = tl.constexpr(spec.ROWS.index("G"))
ROW_POS = tl.constexpr(spec.ROWS.index("POS"))
ROW_NEG = tl.constexpr(spec.ROWS.index("NEG"))
ROW_LS = tl.constexpr(spec.ROWS.index("LS"))
ROW_N = tl.constexpr(spec.ROWS.index("N"))
ROW_BAD = tl.constexpr(spec.ROWS.index("BAD"))
ROW_TN = tl.constexpr(spec.ROWS.index("TN"))
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
