"""``region_sums``: the sums themselves, differentiable, for a loss of one's own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch
from .autograd import total_sums
from .backends import eager
from .evaluate import record_line
from .prepare import kernel_dtype, plain
from .spec import (
    BAD,
    LS,
    NEG,
    OVERLAP_ROWS,
    POS,
    Activation,
    G,
    N,
    Overlap,
    SumsSpec,
    VoxelTerm,
    row_names,
)

_ACTIVATIONS = {"softmax": Activation.SOFTMAX, "sigmoid": Activation.SIGMOID, None: Activation.NONE}
_OVERLAPS = {overlap.name.lower(): overlap for overlap in Overlap}
_VOXEL_TERMS = {None: VoxelTerm.NONE} | {
    term.name.lower(): term for term in VoxelTerm if term != VoxelTerm.NONE
}


class RegionSums(NamedTuple):
    """Sums over the voxels of each (sample, class), (B, C) float64; None where not asked for.

    I, FP, FN: of tp, fp, fn under the overlap kind (so P = I + FP and G = I + FN for "product",
    sum p^2 = I + FP and sum g^2 = I + FN for "squared"). G: sum m g. N: sum m.
    POS, NEG, LS: the voxel term (docs/semantics.md, "Rows").
    """

    I: Tensor  # the field's letter for the intersection
    FP: Tensor
    FN: Tensor
    G: Tensor
    N: Tensor
    POS: Tensor | None = None
    NEG: Tensor | None = None
    LS: Tensor | None = None


def region_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str | None = "softmax",
    overlap: str = "product",
    voxel_term: str | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "weight",
    ignore_index: int | None = None,
    gamma: float = 2.0,
    first_class: int = 0,
) -> RegionSums:
    """Every sum that an overlap loss is made of, from one pass; backward is one pass, too.

    A loss of one's own in three lines, the F2 score of each class::

        sums = region_sums(logits, labels)
        score = 5 * sums.I / (5 * sums.I + sums.FP + 4 * sums.FN)
        loss = 1 - score.mean()

    Args:
        logits: (B, C, *S) floating.
        target: labels (B, 1, *S) or (B, *S); or values of the shape of the logits (for C = 1 always values).
        activation: "softmax", "sigmoid" or None (the logits are probabilities), of I, FP and FN.
        overlap: "product", "min", "squared" or "voxel_squared".
        voxel_term: None, "ce", "bce", "focal_sigmoid" or "focal_softmax", from the raw logits.
        mask: voxel weights (B, 1, *S); with ``mask_mode`` "weight" every sum is linear in them, with
            "product" they multiply p and g before the products.
        ignore_index: label whose voxels are left out (label maps).
        gamma: exponent of the focal terms.
        first_class: the softmax of "focal_softmax" runs over the classes from here on.

    Raises:
        ValueError, TypeError: arguments that do not fit.
        LabelRangeError: a label outside [0, C) that is not ``ignore_index`` (on a GPU in a later call).
    """
    checks.tensors(logits, target, mask)
    checks.mask_shape(mask, logits)
    checks.region_options(logits, target, activation, overlap, voxel_term, mask_mode, gamma, first_class)
    ignore_index = checks.index(ignore_index)
    logits, target = plain(logits), kernel_dtype(plain(target))
    if logits.shape[1] == 1 and target.ndim == logits.ndim - 1:
        target = target[:, None]
    dense = target.shape == logits.shape
    if dense and ignore_index is not None:
        raise ValueError("ignore_index: got it with a target of values, expected a label map; pass mask=")
    if mask is not None:
        mask = kernel_dtype(plain(mask)).expand(logits.shape[0], *mask.shape[1:])
    term = _VOXEL_TERMS[voxel_term]
    rows = OVERLAP_ROWS | G | N | (0 if dense else BAD)
    if term != VoxelTerm.NONE:
        rows |= POS
    if term in (VoxelTerm.BCE, VoxelTerm.FOCAL_SIGMOID):
        rows |= NEG
    if term == VoxelTerm.CE:
        rows |= LS
    spec = SumsSpec(
        dense=dense,
        activation=_ACTIVATIONS[activation],
        rows=rows,
        overlap=_OVERLAPS[overlap],
        voxel_term=term,
        ignore_index=ignore_index,
        product_mask=mask_mode == "product",
        focal_gamma=float(gamma),
        first_class=first_class,
    )
    others = [n for n, x in (("target", target), ("mask", mask)) if x is not None and x.requires_grad]
    if others and torch.is_grad_enabled():
        forced = dispatch.forced_backend()
        if forced not in (None, "eager"):
            raise RuntimeError(
                f"backend {forced!r} was forced, but {others[0]} requires a gradient, and the kernels "
                "differentiate the logits alone; detach it or force 'eager'"
            )
        record_line(f"backend: eager ({others[0]} requires a gradient); region_sums")
        totals = eager.sums(logits, target, mask, spec).sum(1)
    else:
        backend = dispatch.choose(logits)
        record_line(f"backend: {backend.name}; region_sums of {', '.join(row_names(rows))}")
        totals = total_sums(logits, target, mask, spec, backend.namespace)
    named = dict(zip(row_names(rows), totals.unbind(-1), strict=True))
    named.pop("BAD", None)
    return RegionSums(**named)
