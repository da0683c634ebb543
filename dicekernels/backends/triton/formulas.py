"""From sums to values and slopes in float64: the formulas of ``csrc/common/finish.h``, by the same names.

Tiles are (groups, classes), a group being a sample or the whole batch. ``valid`` marks the classes with an
overlap term; what stands elsewhere may be NaN, and callers select.

A number written out in a comparison or handed to a function is float32 first, whatever it meets: such are
only numbers that float32 has, the others come from ``tl.full``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import INFINITE_BELOW, LOG, LOWEST_SCORE, MCC, POWER, RATIO, SQUARE, UNIFORM


@triton.jit
def double(x):
    """A scalar as float64; the interpreter leaves arguments of a kernel Python floats."""
    return tl.full((), x, tl.float64)


@triton.jit
def power(x, exponent):
    """x^exponent for x > 0, to |exponent log x| eps: 1e-13 or better while the power is above 1e-190.

    Triton has no pow of its own, and the interpreter no libdevice.
    """
    return tl.exp(exponent * tl.log(x))


@triton.jit
def finish_ratio(i, fp, fn, kappa, alpha, beta, smooth_nr, smooth_dr, exponent, TRANSFORM: tl.constexpr):
    """Dice, Jaccard and Tversky: (value, slopes in i, fp and fn)."""
    errors = alpha * fp + beta * fn
    denominator = kappa * i + errors + smooth_dr
    score = (kappa * i + smooth_nr) / denominator
    # 1 - score without the cancellation of a nearly perfect prediction.
    miss = (errors + smooth_dr - smooth_nr) / denominator
    value = miss
    by_hit, by_error = miss, score  # times d value / d miss
    if TRANSFORM == LOG:
        lowest = tl.full((), LOWEST_SCORE, tl.float64)
        clamped = score < lowest
        value = -tl.log(tl.where(clamped, lowest, score))
        outer = tl.where(clamped, 0.0, 1.0 / tl.where(clamped, 1.0, score))
        by_hit, by_error = outer * miss, outer * score
    elif TRANSFORM == POWER:
        clamped = miss <= 0
        positive = tl.where(clamped, 1.0, miss)
        value = tl.where(clamped, 0.0, power(positive, exponent))
        outer = tl.where(clamped, 0.0, exponent * power(positive, exponent - 1))
        by_hit, by_error = outer * miss, outer * score
    by_hit, by_error = by_hit / denominator, by_error / denominator
    return value, -kappa * by_hit, alpha * by_error, beta * by_error


@triton.jit
def mcc_slope(of_top, of_square, half, root):
    return (half * of_square - of_top) / root


@triton.jit
def finish_mcc(tp, fp, fn, tn, smooth_nr, smooth_dr):
    """1 - Matthews' correlation coefficient: (value, slopes in tp, fp, fn, tn); all 0 if nothing is wrong."""
    perfect = (fp == 0) & (fn == 0)
    top = tp * tn - fp * fn + smooth_nr
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + smooth_dr
    square = tl.where(perfect, 1.0, square)
    root = tl.sqrt(square)
    half = top / (2 * square)
    d_tp = mcc_slope(tn, (tn + fp) * (tn + fn) * (2 * tp + fp + fn), half, root)
    d_fp = mcc_slope(-fn, (tp + fn) * (tn + fn) * (2 * fp + tp + tn), half, root)
    d_fn = mcc_slope(-fp, (tp + fp) * (tn + fp) * (2 * fn + tp + tn), half, root)
    d_tn = mcc_slope(tp, (tp + fp) * (tp + fn) * (2 * tn + fp + fn), half, root)
    return (
        tl.where(perfect, 0.0, 1 - top / root),
        tl.where(perfect, 0.0, d_tp),
        tl.where(perfect, 0.0, d_fp),
        tl.where(perfect, 0.0, d_fn),
        tl.where(perfect, 0.0, d_tn),
    )


@triton.jit
def gdl_class_weight(volume, valid, GDL_WEIGHT: tl.constexpr):
    """Weights of the classes of each group, 0 where there is no term.

    Which are infinite follows MONAI's float32 arithmetic: here what float32 would round is compared before
    it is rounded, so neither flushed subnormals nor an approximate division can change the answer.
    """
    if GDL_WEIGHT == UNIFORM:
        return tl.where(valid, 1.0, tl.zeros_like(volume))
    else:
        seen, divisor = volume, volume
        if GDL_WEIGHT == SQUARE:
            single = volume.to(tl.float32).to(tl.float64)
            seen, divisor = single * single, volume * volume
        infinite = seen <= tl.full((), INFINITE_BELOW, tl.float64)
        weight = tl.where(infinite | (valid == 0), 0.0, 1.0 / tl.where(infinite, 1.0, divisor))
        largest = tl.max(weight, 1, keep_dims=True)
        return tl.where(infinite & valid, largest, weight)


@triton.jit
def finish_generalized(i, fp, fn, g, valid, smooth_nr, smooth_dr, GDL_WEIGHT: tl.constexpr):
    """Generalized Dice: (value of the group, slopes in i and in the errors of each class)."""
    weight = gdl_class_weight(g, valid, GDL_WEIGHT)
    hits = tl.sum(tl.where(valid, 2 * weight * i, 0.0), 1, keep_dims=True)
    errors = tl.sum(tl.where(valid, weight * (fp + fn), 0.0), 1, keep_dims=True)
    bottom = hits + errors + smooth_dr
    score = (hits + smooth_nr) / bottom
    miss = (errors + smooth_dr - smooth_nr) / bottom
    return miss, -2 * weight * miss / bottom, weight * score / bottom


@triton.jit
def region_terms(
    i,
    fp,
    fn,
    g,
    tn,
    valid,
    numbers,
    FORMULA: tl.constexpr,
    TRANSFORM: tl.constexpr,
    GDL_WEIGHT: tl.constexpr,
):
    """(value, slopes in I, FP, FN and TN) of a tile (groups, classes); GENERALIZED has a value per group.

    ``numbers``: kappa, alpha, beta, smooth_nr, smooth_dr, exponent.
    """
    kappa, alpha, beta, smooth_nr, smooth_dr, exponent = numbers
    d_tn = tl.zeros_like(i)
    if FORMULA == RATIO:
        value, d_i, d_fp, d_fn = finish_ratio(
            i, fp, fn, kappa, alpha, beta, smooth_nr, smooth_dr, exponent, TRANSFORM
        )
    elif FORMULA == MCC:
        value, d_i, d_fp, d_fn, d_tn = finish_mcc(i, fp, fn, tn, smooth_nr, smooth_dr)
    else:
        value, d_i, d_fp = finish_generalized(i, fp, fn, g, valid, smooth_nr, smooth_dr, GDL_WEIGHT)
        d_fn = d_fp
    return value, d_i, d_fp, d_fn, d_tn
