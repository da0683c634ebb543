"""``region_sums``: the sums themselves, differentiable, for a loss of one's own."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..arguments import documented
from ..autograd import is_transformed, total_sums
from ..call import is_observed, record_step, stand_in
from ..ops import eager_totals
from ..prepare import kernel_dtype, plain
from ..spec import (
    LS,
    Activation,
    Formula,
    G,
    N,
    Overlap,
    SumsSpec,
    VoxelTerm,
    needed_rows,
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


@documented()
def region_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Literal["softmax", "sigmoid"] | None = "softmax",
    overlap: Literal["product", "min", "squared", "voxel_squared"] = "product",
    voxel_term: Literal["ce", "bce", "focal_sigmoid", "focal_softmax"] | None = None,
    mask: Tensor | None = None,
    mask_mode: Literal["weight", "product"] = "weight",
    ignore_index: int | None = None,
    gamma: float = 2.0,
    first_class: int = 0,
) -> RegionSums:
    """Every sum that an overlap loss is made of, from one pass; backward is one pass, too.

    A loss of one's own in three lines, the F2 score of each class::

        sums = region_sums(logits, labels)
        score = 5 * sums.I / (5 * sums.I + sums.FP + 4 * sums.FN)
        loss = 1 - score.mean()

    The rows and kinds: docs/semantics.md, section 1.

    Args:
        logits: (B, C, *S) floating, with at least one spatial dimension.
        target: labels (B, 1, *S) or (B, *S); or values of the shape of the logits (for C = 1 always values).
        activation: "softmax", "sigmoid" or None (the logits are probabilities), of I, FP and FN.
        overlap: what one voxel adds to I, FP and FN: "product" p g, p (1 - g), (1 - p) g; "min" with min(p,
            g) in place of p g; "squared" p g, p (p - g), g (g - p); "voxel_squared" p^2 g, p^2 (1 - g), (1 -
            p)^2 g.
        voxel_term: of POS, NEG and LS: None, "ce", "bce", "focal_sigmoid" or "focal_softmax", of the raw
            logits.
        mask: voxel weights (B, 1, *S) or (1, 1, *S), at least 0, of any real dtype. None: each voxel counts
            once.
        mask_mode: "weight": every sum is linear in ``mask``; "product": it multiplies p and g before the
            products.
        ignore_index: label whose voxels are left out, of label maps alone (ValueError for values). None:
            every voxel counts.
        gamma: exponent of the focal terms, 0 or more.
        first_class: the softmax of "focal_softmax" runs over the classes from here on, 0 to C - 1.

    Returns:
        :class:`RegionSums`, each (B, C) float64, None for what was not asked for.

    Raises:
        ValueError, TypeError: arguments that do not fit.
        LabelRangeError: a label outside [0, C) that is not ``ignore_index`` (on a GPU in a later call).
    """
    checks.tensors(logits, target, mask)
    checks.voxel_weights(None if mask is None else plain(mask), logits)
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
    rows = needed_rows(dense=dense, formula=Formula.RATIO, voxel_term=term) | G | N
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
        dispatch.refuse_forced(
            f"{others[0]} requires a gradient, and the kernels differentiate the logits alone",
            "detach it or force 'eager'",
        )
        reason = f"{others[0]} requires a gradient"
        record_step(f"backend: eager ({reason}); region_sums", "eager", reason, whole=True)
        totals = eager_totals(logits, target, mask, spec)
    else:
        backend = dispatch.choose(logits)
        named_rows = ", ".join(row_names(rows))
        line = f"backend: {backend.name}; region_sums of {named_rows}"
        record_step(line, backend.name, dispatch.no_kernel(logits))
        if is_observed() and not is_transformed():
            totals = stand_in((*logits.shape[:2], rows.bit_count()), torch.float64, logits, target, mask)
        else:
            totals = total_sums(logits, target, mask, spec, backend.namespace)
    named = dict(zip(row_names(rows), totals.unbind(-1), strict=True))
    named.pop("BAD", None)
    return RegionSums(**named)
