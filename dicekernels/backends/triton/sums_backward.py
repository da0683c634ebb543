"""Backward: one pass over the voxels, the gradient of every logit written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import SumsSpec
from ...tensors import is_flat
from .codes import (
    CE,
    NONE,
    ROW_FN,
    ROW_FP,
    ROW_I,
    ROW_LS,
    ROW_NEG,
    ROW_POS,
    ROW_TN,
    SIGMOID,
    SOFTMAX,
)
from .launch import Launch, launch
from .loads import exponential, exponents, load_inputs, voxel_offset
from .problem import NUMBERS, Problem, flat_inputs
from .rows import probabilities, shifted_log_p
from .slopes import binary_gradient, ce_pull, load_slope, overlap_slopes, softmax_gradient
from .tile import class_index, class_offset, class_sum, per_voxel

# Voxels of a program: enough to load the slopes once for many tiles, few enough to fill a GPU.
SPAN = 4096


@triton.jit
def load_grad(grad_loss, sample, c, grad_batch, grad_class, skipped, C: tl.constexpr, GRAD: tl.constexpr):
    """The incoming gradient of each class, float64. GRAD: its number of dimensions, -1 for none."""
    if GRAD < 0:
        return 1.0
    elif GRAD == 0:
        return tl.load(grad_loss).to(tl.float64)
    else:
        output = tl.maximum(c - skipped, 0)
        at = grad_loss + sample * grad_batch + output.to(tl.int64) * grad_class
        # Classes without overlap term have no output of their own.
        return tl.load(at, mask=(c >= skipped) & (c < C), other=0.0).to(tl.float64)


_OWN = (
    "grad_batch",
    "grad_class",
    "skipped",
    "gradient_batch",
    "gradient_channel",
    "gradient_voxel",
    "spans",
)


@triton.jit(do_not_specialize=[*_OWN, *NUMBERS])
def sums_backward_kernel(
    logits,  # (B, C, V)
    target,  # (B, C, V) values or (B, V) labels
    mask,  # (B, V); read if MASKED
    coef,  # (B, C, WIDTH) float64
    grad_loss,  # () or (groups, outputs); read if GRAD >= 0
    gradient,  # (B, C, V)
    spans,  # of SPAN voxels in a sample
    grad_batch,
    grad_class,
    skipped,
    gradient_batch,
    gradient_channel,
    gradient_voxel,
    voxels,
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
    PLACES: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    PRODUCT_MASK: tl.constexpr,
    FLOATS: tl.constexpr,
    FIRST_CLASS: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    VOXEL_UNIT: tl.constexpr,
    LOGITS: tl.constexpr,
    TARGET: tl.constexpr,
    OUT: tl.constexpr,
    ASM: tl.constexpr,
    SHAPE: tl.constexpr,
    SCATTERED: tl.constexpr,
    SPAN: tl.constexpr,
    GRAD: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    SOFTMAX_TERM: tl.constexpr = VOXEL_TERM != NONE and VOXEL_TERM != CE and not BINARY
    NEEDS_SOFTMAX: tl.constexpr = ACTIVATION == SOFTMAX or VOXEL_TERM == CE
    PAD: tl.constexpr = float("-inf") if NEEDS_SOFTMAX or SOFTMAX_TERM else 0.0
    BLOCK_N: tl.constexpr = SHAPE[1]
    OVERLAPS: tl.constexpr = PLACES[ROW_I] >= 0 or PLACES[ROW_FP] >= 0 or PLACES[ROW_FN] >= 0
    WIDTH: tl.constexpr = PLACES[10]  # behind the places of the ten rows
    program = tl.program_id(0)
    sample = (program // spans).to(tl.int64)
    first = program % spans * SPAN
    voxels = voxels * VOXEL_UNIT
    c = class_index(SHAPE)
    logits_row = (
        logits + sample * logits_batch * LOGITS[0] + class_offset(c, logits_channel, one, LOGITS, SCATTERED)
    )
    gradient_row = (
        gradient + sample * gradient_batch * OUT[0] + class_offset(c, gradient_channel, one, OUT, SCATTERED)
    )
    labels = target + sample * target_batch * TARGET[0]
    target_row = labels
    if DENSE:
        target_row += class_offset(c, target_channel, one, TARGET, SCATTERED)
    mask_row = mask
    if MASKED:
        mask_row = mask + sample * mask_batch
    slopes = coef + sample * (C * WIDTH)
    grad = load_grad(grad_loss, sample, c, grad_batch, grad_class, skipped, C, GRAD)
    a_i = load_slope(slopes, grad, c, ACC, C, WIDTH, PLACES[ROW_I])
    a_fp = load_slope(slopes, grad, c, ACC, C, WIDTH, PLACES[ROW_FP])
    a_fn = load_slope(slopes, grad, c, ACC, C, WIDTH, PLACES[ROW_FN])
    a_pos = load_slope(slopes, grad, c, ACC, C, WIDTH, PLACES[ROW_POS])
    a_neg = load_slope(slopes, grad, c, ACC, C, WIDTH, PLACES[ROW_NEG])
    a_ls = load_slope(slopes, grad, c, ACC, C, WIDTH, PLACES[ROW_LS])
    if PLACES[ROW_TN] >= 0:
        # (1 - p)(1 - g) of TN falls where p (1 - g) of FP rises.
        a_fp -= load_slope(slopes, grad, c, ACC, C, WIDTH, PLACES[ROW_TN])

    for start in range(0, tl.minimum(SPAN, voxels - first), BLOCK_N):
        v = first + start + tl.arange(0, BLOCK_N)
        within = v < voxels
        # 1. Load.
        z, g, hit, inside, m, _ = load_inputs(
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

        # 2. Softmax.
        p = z
        pull = z
        result = tl.zeros_like(z)
        if NEEDS_SOFTMAX:
            e = exponential(exponents(z, within, False, SHAPE, EVEN))
            p = probabilities(z, e, class_sum(e, SHAPE), inside, SOFTMAX, ASM, SHAPE)
        # 3. Rows.
        if VOXEL_TERM == CE:
            pull = ce_pull(g, hit, a_pos, a_ls, DENSE, PLACES[ROW_LS] >= 0)
        if OVERLAPS:
            if ACTIVATION == SOFTMAX:
                slope = overlap_slopes(
                    p, g, hit, m, a_i, a_fp, a_fn, DENSE, OVERLAP, MASKED, PRODUCT_MASK, SHAPE
                )
                by_class = p * slope
                if VOXEL_TERM == CE:
                    by_class -= pull
                result = p * (slope - per_voxel(class_sum(by_class, SHAPE), SHAPE))
            else:
                s = probabilities(z, z, inside, inside, ACTIVATION, ASM, SHAPE)
                result = overlap_slopes(
                    s, g, hit, m, a_i, a_fp, a_fn, DENSE, OVERLAP, MASKED, PRODUCT_MASK, SHAPE
                )
                if ACTIVATION == SIGMOID:
                    # 1 - s of a large logit has no digits.
                    result *= s * probabilities(-z, z, inside, inside, ACTIVATION, ASM, SHAPE)
        if VOXEL_TERM == CE:
            if not OVERLAPS or ACTIVATION != SOFTMAX:
                result += p * per_voxel(class_sum(pull, SHAPE), SHAPE)
            result -= pull
        elif BINARY:
            result += binary_gradient(z, g, hit, a_pos, a_neg, DENSE, VOXEL_TERM, FLOATS, ASM)
        elif SOFTMAX_TERM:
            log_p = shifted_log_p(z, c, within, FIRST_CLASS, SHAPE, EVEN)
            result += softmax_gradient(
                log_p, c, g, hit, a_pos, C, DENSE, VOXEL_TERM, FLOATS, FIRST_CLASS, SHAPE
            )
        # 4. Store.
        if MASKED:
            result *= per_voxel(m, SHAPE)
        if MASKED or HAS_IGNORE or not DENSE:
            result = tl.where(per_voxel(inside, SHAPE), result, 0.0)
        out = gradient_row + per_voxel(voxel_offset(v, gradient_voxel, OUT), SHAPE)
        result = result.to(gradient.dtype.element_ty)
        if EVEN and SHAPE[0] == C:
            tl.store(out, result)
        else:
            tl.store(out, result, mask=(c < C) & per_voxel(within, SHAPE))


def plan_sums_backward(
    grad_loss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    coef: Tensor,
    gradient: Tensor,
    spec: SumsSpec,
) -> Launch:
    """The launch that fills ``gradient``, which has one voxel stride."""
    seen = Problem.of(logits, target, mask, spec, gradient)
    samples = logits.shape[0]
    spans = -(-seen.voxels // SPAN)
    grad_batch = grad_class = skipped = 0
    if grad_loss is not None and grad_loss.ndim == 2:
        groups, outputs = grad_loss.shape
        grad_batch = grad_loss.stride(0) if groups > 1 else 0
        grad_class = grad_loss.stride(1) if outputs > 1 else 0
        skipped = seen.classes - outputs if outputs > 1 else 0
    args = (
        *seen.tensors(),
        coef.contiguous(),
        coef if grad_loss is None else grad_loss,
        gradient,
        spans,
        grad_batch,
        grad_class,
        skipped,
        *seen.out.strides(seen.elements),
        *seen.numbers(),
    )
    meta = seen.constants() | {
        "OUT": seen.out.layout(seen.elements),
        "SPAN": SPAN,
        "GRAD": -1 if grad_loss is None else grad_loss.ndim,
    }
    return Launch(sums_backward_kernel, (samples * spans,), args, meta)


def sums_backward(
    grad_loss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    coef: Tensor,
    spec: SumsSpec,
) -> Tensor:
    """The gradient of the logits: see dicekernels/ops.py."""
    gradient = torch.empty_like(logits)
    if logits.numel() == 0:
        return gradient
    # A layout without one voxel stride is written by way of a contiguous one.
    flat = is_flat(gradient, 2)
    written = gradient if flat else gradient.new_empty(gradient.shape)
    logits, target, mask = flat_inputs(logits, target, mask)
    coef = coef.contiguous()
    launch(
        lambda: plan_sums_backward(grad_loss, logits, target, mask, coef, written, spec),
        (
            logits,
            target,
            logits if mask is None else mask,
            coef,
            coef if grad_loss is None else grad_loss,
            written,
        ),
        (),
        ("sums_backward", spec, mask is None, grad_loss is None),
    )
    return gradient if flat else gradient.copy_(written)
