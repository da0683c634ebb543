"""The generalized Wasserstein Dice loss: a C x C table of distances, so no row of the kernels."""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import checks, hints
from ..arguments import documented
from ..backends import eager
from ..labels import check_labels
from ..prepare import kernel_dtype, like_input, plain
from ..streamed import record_streamed, streamed_sums, sums_by_label
from ..tensors import as_tensor

MODES = ("default", "GDL")


@documented()
def generalized_wasserstein_dice_loss(
    logits: Tensor,
    target: Tensor,
    dist_matrix: Any,
    *,
    weighting_mode: Literal["default", "GDL"] = "default",
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """1 - (2 TP + nr) / (2 TP + E + dr) per sample, of the distance W_v = sum_c M[t_v, c] p_vc.

    As ``monai.losses.GeneralizedWassersteinDiceLoss``, with ``ignore_index`` and ``mask``; formulas: Fidon et
    al. 2017 ("default") and Tilborghs et al. 2020, appendix ("GDL"), docs/semantics.md.

    Args:
        logits: (B, C, *S) floating, also without spatial dimensions; a softmax is always taken.
        target: B x V labels in any shape that begins with B, of any dtype (fractions are truncated).
        dist_matrix: (C, C) array, tensor or nested list of the distance of each label (row) to each
            class (column). It is divided by its largest entry. May require a gradient.
        weighting_mode: "default": every class but the first counts alike in TP; "GDL": a class counts
            1 / (volume + 1), in E too. Else ValueError.
        reduction: "mean" or "sum" of the losses of the samples; "none": these losses. MONAI's LossReduction
            is taken too. Else ValueError.
        smooth_nr: nr, added to the numerator of each sample's loss.
        smooth_dr: dr, added to its denominator.
        ignore_index: label whose voxels count nowhere. TypeError for what is no whole number. None: every
            voxel counts.
        mask: voxel weights (B, 1, *S) or (1, 1, *S), at least 0; volumes, TP and E are linear in them. None:
            each voxel counts once.

    Returns:
        (B,) for reduction "none", else (). float64 if the logits or the matrix are, else float32.

    Raises:
        ValueError: the matrix is not square, an unknown option, a mask of another shape.
        TypeError: what is no tensor.
        RuntimeError: C is not the matrix's, or the target has another number of voxels (torch's type).
        NotImplementedError: logits of integers (torch's type).
        LabelRangeError: a label outside [0, C) that is not ``ignore_index`` (on a GPU in a later call; there
            and when compiled the loss is NaN with zero gradient).
    """
    return normalised_wasserstein_dice_loss(
        logits,
        target,
        normalised(dist_matrix),
        weighting_mode=weighting_mode,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        ignore_index=ignore_index,
        mask=mask,
    )


def normalised(dist_matrix: Any) -> Tensor:
    """The distances over the largest of them, in their own dtype (integers: float32).

    Raises:
        ValueError: not a square matrix.
    """
    matrix = dist_matrix
    if isinstance(matrix, np.ndarray):
        matrix = torch.from_numpy(matrix)
    else:
        expected = "a C x C matrix as nested lists, an array or a tensor"
        matrix = as_tensor("dist_matrix", matrix, expected, "cpu")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        shape = " x ".join(map(str, matrix.shape)) or "a number"
        raise ValueError(f"dist_matrix must be C x C, got {shape}.")
    return matrix / matrix.max()


def normalised_wasserstein_dice_loss(
    logits: Tensor,
    target: Tensor,
    matrix: Tensor,
    *,
    weighting_mode: str,
    reduction: str,
    smooth_nr: float,
    smooth_dr: float,
    ignore_index: int | None,
    mask: Tensor | None,
) -> Tensor:
    """:func:`generalized_wasserstein_dice_loss` of distances that are used as they are."""
    gdl = checks.option("weighting_mode", weighting_mode, MODES) == "GDL"
    reduction = checks.option("reduction", reduction, ("mean", "sum", "none"))
    smooth_nr, smooth_dr = checks.constant("smooth_nr", smooth_nr), checks.constant("smooth_dr", smooth_dr)
    ignore_index = checks.index(ignore_index)
    checks.tensors(logits, target, mask)
    z, labels = plain(logits), _labels(logits, target, matrix)
    weights = None if mask is None else kernel_dtype(plain(mask))
    checks.voxel_weights(weights, z)
    classes = matrix.shape[0]
    dtype = torch.promote_types(torch.promote_types(z.dtype, matrix.dtype), torch.float32)
    record_streamed("generalized_wasserstein_dice_loss", z, (weights,), (matrix,))
    terms = functools.partial(_terms, matrix.to(z.device), ignore_index)
    sums = streamed_sums(terms, z, labels, weights, closed_over=(matrix,))
    wrong, volume, bad = sums[:, :classes], sums[:, classes:-1], sums[:, -1:]
    check_labels(bad, labels, None if weights is None else weights.expand_as(labels), classes, ignore_index)
    if gdl:
        alpha = 1 / (volume + 1)
        error = (alpha * wrong).sum(1)
    else:
        alpha = (torch.arange(classes, device=volume.device) != 0).to(volume)  # not the background
        error = wrong.sum(1)
    overlap = 2 * (alpha * (volume - wrong)).sum(1)
    # 1 - (overlap + nr) / (overlap + error + dr), without the subtraction's cancellation.
    loss = (error + (smooth_dr - smooth_nr)) / (overlap + error + smooth_dr)
    loss = torch.where(bad.sum() > 0, torch.nan, loss)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return like_input(loss.to(dtype), logits, target)


def _labels(logits: Tensor, target: Tensor, matrix: Tensor) -> Tensor:
    """(B, 1, *S), after the checks of type and shape."""
    if not logits.is_floating_point():
        raise NotImplementedError(hints.of_integer_logits(logits, target))
    shape, classes = tuple(logits.shape), matrix.shape[0]
    if shape[1] != classes:
        raise RuntimeError(
            f"logits: got {shape[1]} channels (shape {shape}), expected {classes} as dist_matrix has classes"
            + hints.target_remedy(list(shape), list(target.shape), True, hints.swapped(logits, target))
        )
    samples, space = shape[0], shape[2:]
    voxels = logits.shape[2:].numel()
    if target.ndim == 0 or target.shape[0] != samples or target.numel() != samples * voxels:
        text = hints.of_target(logits, target, True)
        if target.shape == logits.shape:
            text = text.partition(";")[0] + "; a one-hot target wants target.argmax(1)"
        raise RuntimeError(text)
    return kernel_dtype(plain(target)).detach().reshape(samples, 1, *space)


def _terms(
    matrix: Tensor, ignore_index: int | None, z: Tensor, labels: Tensor, mask: Tensor | None
) -> Tensor:
    """(B, 2 T + 1): sum m W and sum m of the voxels of each label, and the count of labels out of range."""
    classes = matrix.shape[0]
    ignored = eager.ignored_labels(labels, ignore_index)
    labels = labels.long()
    known = (labels >= 0) & (labels < classes)
    bad = ~known & ~ignored
    m = (known & ~ignored).to(z.dtype)
    labels = labels.clamp(0, classes - 1)
    if mask is not None:
        bad = bad & (mask != 0)
        m = torch.where(m != 0, mask.to(z.dtype), 0.0)
    if mask is not None or ignore_index is not None:
        z = torch.where(m != 0, z, 0.0)
    table = matrix.to(z.dtype).t().expand(z.shape[0], -1, -1)
    distance = (torch.softmax(z, 1) * table.gather(2, labels.expand_as(z))).sum(1, keepdim=True)
    wrong = sums_by_label(m * distance, labels, classes)
    volume = sums_by_label(m, labels, classes)
    return torch.cat([wrong, volume, bad.sum(2, dtype=torch.float64)], 1)
