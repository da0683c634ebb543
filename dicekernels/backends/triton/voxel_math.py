"""The maths of one voxel and one class; names and formulas of ``csrc/common/voxel_math.h``.

p: probability, g: target, z: logit. float32 tiles take base-2 exponentials, one instruction each, and the
approximate reciprocal; float64 tiles take exact functions. ASM: PTX may be written inline (NVIDIA, and not
in the interpreter).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import BCE, FOCAL_GAMMA, FOCAL_SOFTMAX, PRODUCT, SQUARED, VOXEL_SQUARED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def reciprocal(x, ASM: tl.constexpr):
    if ASM and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1]."""
    if x.dtype == tl.float64:
        # log(y) x / (y - 1) for y = 1 + x rounded: the rounding of y cancels.
        y = 1.0 + x
        return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))
    else:
        # x times a polynomial of degree 8 in x - 1/2, as csrc/cpu/simd.h: relative error 1.6e-7 in all.
        t = x - 0.5
        y = 5.23262378e-3 * t + -8.57446156e-3
        y = y * t + 1.15865115e-2
        y = y * t + -2.02282462e-2
        y = y * t + 3.66338529e-2
        y = y * t + -6.77114502e-2
        y = y * t + 1.32609084e-1
        y = y * t + -2.88526654e-1
        y = y * t + 8.10930192e-1
        return x * y


@triton.jit
def log2(x):
    """log2 of a sum of exponentials, at least 1/2. The approximate instruction has no digits left near 1,
    where a confident voxel lies; this polynomial has a relative error of 1.4e-7 there."""
    exponent = (x.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23  # of the mantissa in [sqrt(1/2), sqrt(2))
    scale = (0x3F800000 - (exponent << 23)).to(tl.float32, bitcast=True)
    f = x * scale - 1.0  # NaN stays NaN
    y = 0.12583689391613007 * f + -0.20726968348026276
    y = y * f + 0.21571561694145203
    y = y * f + -0.23894482851028442
    y = y * f + 0.28791624307632446
    y = y * f + -0.3607036769390106
    y = y * f + 0.48091062903404236
    y = y * f + -0.7213473320007324
    y = y * f + 1.4426950216293335
    return y * f + exponent.to(tl.float32)


@triton.jit
def overlap_terms(p, g, OVERLAP: tl.constexpr):
    """(tp, fp, fn)"""
    if OVERLAP == PRODUCT:
        return p * g, p * (1 - g), (1 - p) * g
    elif OVERLAP == SQUARED:
        return p * g, p * (p - g), g * (g - p)
    elif OVERLAP == VOXEL_SQUARED:
        return p * p * g, p * p * (1 - g), (1 - p) * (1 - p) * g
    else:
        # (|p| + |g| - |p - g|) / 2 without its rounding: the smaller one where the signs agree, else 0.
        ap = tl.abs(p)
        ag = tl.abs(g)
        smaller = tl.where(ap < ag, ap, ag)
        product = p * g
        tp = tl.where(product > 0, smaller, tl.where(product != product, product, 0.0))
        return tp, ap - tp, ag - tp


@triton.jit
def signum(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # x itself keeps 0 and NaN


@triton.jit
def overlap_slope(p, g, a_i, a_fp, a_fn, OVERLAP: tl.constexpr):
    """d(a_i tp + a_fp fp + a_fn fn)/dp"""
    if OVERLAP == PRODUCT:
        return (a_i - a_fn) * g + a_fp * (1 - g)
    elif OVERLAP == SQUARED:
        return (a_i - a_fn) * g + a_fp * (2 * p - g)
    elif OVERLAP == VOXEL_SQUARED:
        return 2 * (a_i * p * g + a_fp * p * (1 - g) - a_fn * (1 - p) * g)
    else:
        # The subgradients of torch: sign(0) = 0 in both absolute values.
        sp = signum(p)
        d = (sp - signum(p - g)) * 0.5
        return (a_i - a_fn - a_fp) * d + a_fp * sp


@triton.jit
def sigmoid(z, ASM: tl.constexpr):
    """sigmoid(z) and 1 - sigmoid(z), each with full relative accuracy."""
    e = exp(-tl.abs(z))
    large = reciprocal(1 + e, ASM)
    small = e * large
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def softplus(z):
    """log(1 + exp(z)) = -log(1 - sigmoid(z))"""
    tail = log1p(exp(-tl.abs(z)))
    return tl.where(z >= 0, z + tail, tail)


@triton.jit
def sigmoid_focal(z, g, GAMMA: tl.constexpr, ASM: tl.constexpr):
    """MONAI's exp(gamma logsigmoid(a)) bce(z, g) with a = -z (2g - 1), and its derivative in z."""
    p, _ = sigmoid(z, ASM)
    sign = 2 * g - 1
    _, miss = sigmoid(-z * sign, ASM)
    bce = z * (1 - g) + softplus(-z)
    if GAMMA == 0:
        return bce, p - g
    else:
        modulation = exp(-GAMMA * softplus(z * sign))
        return modulation * bce, modulation * (p - g - GAMMA * sign * miss * bce)


@triton.jit
def hard_focal(s, GAMMA: tl.constexpr, ASM: tl.constexpr):
    """The same for a target of 0 or 1, where s = z (2g - 1) tells all; derivative in s."""
    p, q = sigmoid(s, ASM)
    surprise = softplus(-s)
    if GAMMA == 0:
        return surprise, -q
    elif GAMMA == 2:
        return q * q * surprise, -q * q * (2 * p * surprise + q)
    else:
        modulation = exp(-GAMMA * softplus(s))
        return modulation * surprise, -modulation * (GAMMA * p * surprise + q)


@triton.jit
def softmax_focal(log_p, GAMMA: tl.constexpr):
    """(1 - p)^gamma (-log p) and p times its derivative in p, from log p <= 0."""
    if GAMMA == 0:
        return -log_p, tl.zeros_like(log_p) - 1
    else:
        p = exp(log_p)
        rest = 1 - p
        certain = rest <= 0
        safe = tl.where(certain, 1.0, rest)
        if GAMMA == 2:
            power = rest * rest
        else:
            power = exp(GAMMA * tl.log(safe))
        loss = tl.where(certain, 0.0, -power * log_p)
        slope = power * (GAMMA * p * log_p / safe - 1)
        return loss, tl.where(certain, 0.0, slope)


# Voxel terms but the cross entropy, which shares the softmax of the overlap, are of two families: a new one
# is a branch in one of them, with loss and slope of a voxel and class.


@triton.jit
def softmax_term(log_p, VOXEL_TERM: tl.constexpr, FLOATS: tl.constexpr):
    """Loss of a voxel of this class, and its slope in log p."""
    tl.static_assert(VOXEL_TERM == FOCAL_SOFTMAX, "the softmax terms are listed here")
    return softmax_focal(log_p, FLOATS[FOCAL_GAMMA])


@triton.jit
def hard_term(s, VOXEL_TERM: tl.constexpr, FLOATS: tl.constexpr, ASM: tl.constexpr):
    """Of a target of 0 or 1: loss and slope in s = z (2g - 1)."""
    if VOXEL_TERM == BCE:
        return hard_focal(s, 0, ASM)
    else:
        return hard_focal(s, FLOATS[FOCAL_GAMMA], ASM)


@triton.jit
def binary_term(z, g, a, b, VOXEL_TERM: tl.constexpr, FLOATS: tl.constexpr, ASM: tl.constexpr):
    """Losses that the target weighs by g and by 1 - g, and the slope in z of a first + b second."""
    if VOXEL_TERM == BCE:
        p, q = sigmoid(z, ASM)
        return softplus(-z), softplus(z), b * p - a * q
    else:
        loss, slope = sigmoid_focal(z, g, FLOATS[FOCAL_GAMMA], ASM)
        return loss, loss, (a + b) * slope
