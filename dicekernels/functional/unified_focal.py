"""The asymmetric unified focal loss: terms of clamped probabilities, so no row of the kernels."""

from __future__ import annotations

import functools
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import checks, hints
from ..arguments import documented
from ..backends import eager
from ..labels import check_labels
from ..prepare import kernel_dtype, like_input, plain
from ..streamed import record_streamed, streamed_sums, voxel_sums
from ..tensors import traced

NAMES = ("y_pred", "y_true")


class Half(NamedTuple):
    """The numbers of one of the two halves, which MONAI keeps in modules of their own."""

    gamma: float
    delta: float
    epsilon: float = 1e-7


class _Problem(NamedTuple):
    """What the pieces need to know beside their voxels.

    Attributes:
        classes: of a label map that becomes one-hot; 0 for a target of values.
    """

    classes: int
    ignore_index: int | None
    focal: Half
    tversky: Half


@documented()
def asymmetric_unified_focal_loss(
    y_pred: Tensor,
    y_true: Tensor,
    *,
    to_onehot_y: bool = False,
    num_classes: int = 2,
    weight: float = 0.5,
    gamma: float = 0.5,
    delta: float = 0.7,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """weight * asymmetric focal + (1 - weight) * asymmetric focal Tversky, for two classes.

    As ``monai.losses.AsymmetricUnifiedFocalLoss``, with ``mask``; formulas: Yeung et al. 2022,
    arXiv:2102.04525, docs/semantics.md. ``y_pred`` holds PROBABILITIES, no activation is taken.

    Args:
        y_pred: (B, 1, *S) of the foreground or (B, C, *S), with two or three spatial dimensions, else
            ValueError; of more channels than two, only the first two count. Half precision is computed in
            float32.
        y_true: values of the shape of ``y_pred``, or labels (B, 1, *S) or (B, *S) with ``to_onehot_y``.
        to_onehot_y: True: ``y_true`` holds labels and is read as one-hot. Ignored, with a warning, for one
            channel.
        num_classes: channels of the one-hot labels, those of ``y_pred``; values above ``num_classes`` - 1 are
            a ValueError (CPU, not when compiled, only without ``ignore_index``).
        weight: share of the focal half, a number; the Tversky half has the rest.
        gamma: exponent of both halves: (1 - p)^gamma of the background in the focal half, (1 - D)^(1 - gamma)
            of the foreground in the Tversky half.
        delta: weight of the foreground in the focal half, and of the false negatives in the Tversky half,
            where the false positives have 1 - delta.
        reduction: "mean", "sum" or "none": a scalar for each of them, as MONAI. Else ValueError.
        ignore_index: label or class whose voxels get p = g = 0. As in MONAI they still count as voxels
            in the denominators, and as a false positive of 1e-7. None: every voxel counts.
        mask: voxel weights (B, 1, *S) or (1, 1, *S), at least 0, in which every sum is linear, the count of
            voxels too. None: each voxel counts once.

    Returns:
        (), in the dtype that torch's promotion makes of ``y_pred`` and ``y_true``; labels count as float32.

    Raises:
        ValueError: not 4 or 5 dimensions, shapes or values that do not fit, an unknown reduction.
        TypeError: what is no tensor; a number that requires a gradient.
        AssertionError: labels with more than one channel.
        LabelRangeError: a label outside [0, num_classes) with ``to_onehot_y`` (on a GPU in a later call;
            there and when compiled the loss is NaN with zero gradient).
    """
    half = Half(checks.constant("gamma", gamma), checks.constant("delta", delta))
    return two_halves_loss(
        y_pred,
        y_true,
        to_onehot_y=to_onehot_y,
        num_classes=num_classes,
        weight=weight,
        focal=half,
        tversky=half,
        reduction=reduction,
        ignore_index=ignore_index,
        mask=mask,
    )


def two_halves_loss(
    y_pred: Tensor,
    y_true: Tensor,
    *,
    to_onehot_y: bool,
    num_classes: int,
    weight: float,
    focal: Half,
    tversky: Half,
    reduction: str,
    ignore_index: int | None,
    mask: Tensor | None,
) -> Tensor:
    """:func:`asymmetric_unified_focal_loss` with the numbers of each half apart."""
    checks.option("reduction", reduction, ("mean", "sum", "none"))
    weight = checks.constant("weight", weight)
    ignore_index = checks.index(ignore_index)
    checks.tensors(y_pred, y_true, mask, NAMES)
    if y_pred.ndim not in (4, 5):
        raise ValueError(
            f"input shape must be 4 or 5, but got {y_pred.shape}: y_pred is (B, C, *S), S of 2 or 3 sizes"
        )
    one_hot = to_onehot_y and y_pred.shape[1] != 1
    if y_pred.shape[1] == 1 and not traced():
        if to_onehot_y:
            warnings.warn("single channel prediction, `to_onehot_y=True` ignored.", UserWarning, stacklevel=3)
        if ignore_index is not None:
            warnings.warn(
                "single channel prediction, `ignore_index` is applied to label-encoded targets.",
                UserWarning,
                stacklevel=3,
            )
    p, g = plain(y_pred), _target(plain(y_pred), kernel_dtype(plain(y_true)), one_hot, num_classes)
    m = None if mask is None else kernel_dtype(plain(mask))
    checks.voxel_weights(m, p)
    if ignore_index is None and not one_hot:
        _check_values(g, num_classes, y_pred.shape[1] == 1)
    dtype = _loss_dtype(p, g, one_hot, ignore_index)
    # Beside a float64 target MONAI's products are float64: so is the whole computation here.
    working = torch.float64 if torch.float64 in (p.dtype, dtype) else torch.float32
    record_streamed("asymmetric_unified_focal_loss", p, (g, m))
    problem = _Problem(num_classes if one_hot else 0, ignore_index, focal, tversky)
    p = p if p.is_floating_point() else p.float()
    sums = streamed_sums(functools.partial(_terms, problem, working), p, g, m)
    bad = sums[:, -1:]
    if one_hot:
        check_labels(bad, g, None if m is None else m.expand_as(g), num_classes, ignore_index)
    loss = weight * _focal(sums, focal.delta) + (1 - weight) * _tversky(sums, tversky)
    loss = torch.where(bad.sum() > 0, torch.nan, loss)
    return like_input(loss.to(dtype), y_pred, y_true)


def _target(p: Tensor, g: Tensor, one_hot: bool, num_classes: int) -> Tensor:
    """Labels (B, 1, *S), or values of the shape of p."""
    if not one_hot:
        if g.shape != p.shape:
            raise ValueError(hints.of_different_shapes(p, g, False, NAMES))
        return g
    if g.shape == (p.shape[0], *p.shape[2:]):
        g = g[:, None]
    if g.ndim < 2 or g.shape[1] != 1:
        raise AssertionError(
            "labels should have a channel with length equal to one. " + hints.of_target(p, g, True, NAMES)
        )
    if g.shape != (p.shape[0], 1, *p.shape[2:]):
        raise ValueError(hints.of_different_shapes(p, g, True, NAMES))
    if num_classes != p.shape[1]:
        raise ValueError(
            f"ground truth has different shape: one-hot of num_classes={num_classes}, "
            f"but the input has {p.shape[1]} channels"
        )
    return g


def _check_values(g: Tensor, num_classes: int, single: bool) -> None:
    """MONAI's check of the largest value; it reads the target, so on the CPU alone."""
    if g.device.type != "cpu" or traced() or g.numel() == 0:
        return
    lowest, highest = g.detach().aminmax()
    if bool(highest > num_classes - 1) or (single and bool(1 - lowest.double() > num_classes - 1)):
        raise ValueError(
            f"Invalid class index found. Maximum class should be {num_classes - 1}. y_true: got values from "
            f"{lowest.item()} to {highest.item()}; remap them, or pass ignore_index to leave a label out"
        )


def _loss_dtype(p: Tensor, g: Tensor, one_hot: bool, ignore_index: int | None) -> torch.dtype:
    """The dtype that torch's promotion rules give MONAI's loss."""
    dtype = torch.promote_types(p.dtype, torch.float32 if one_hot else g.dtype)
    if ignore_index is not None:
        by_class = not one_hot and 0 <= ignore_index < g.shape[1] != 1 and g.is_floating_point()
        dtype = torch.promote_types(dtype, g.dtype if by_class else torch.float32)
    return dtype if dtype.is_floating_point else torch.float32


def _terms(problem: _Problem, working: torch.dtype, z: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 10): the focal sum of each class; tp, fn, fp of each class; sum m; labels out of range."""
    ignored = problem.ignore_index
    p = z.to(working)
    m = torch.ones_like(p[:, :1]) if mask is None else mask.to(working).expand_as(p[:, :1])
    bad = torch.zeros_like(m, dtype=torch.bool)
    keep: Tensor | None = None
    if ignored is not None and y.shape[1] == 1:
        keep = (~eager.ignored_labels(y, ignored)).to(working)
    if problem.classes:
        labels = y.long()
        known = (labels >= 0) & (labels < problem.classes)
        bad = ~known & (m != 0)
        bad = bad if keep is None else bad & (keep != 0)
        g = (labels == torch.arange(problem.classes, device=y.device).view(1, -1, 1)).to(working)
    else:
        g = y.to(working)
        if p.shape[1] == 1:
            p, g = torch.cat([1 - p, p], 1), torch.cat([1 - g, g], 1)
        elif ignored is not None and 0 <= ignored < g.shape[1]:
            keep = 1 - g[:, ignored : ignored + 1]
        elif ignored is not None:
            keep = (g.sum(1, keepdim=True) > 0).to(working)
    p, g = p[:, :2], g[:, :2]
    if mask is not None or keep is not None:
        inside = m != 0 if keep is None else (m != 0) & (keep != 0)
        p, g = torch.where(inside, p, 0.0), torch.where(inside, g, 0.0)
    if keep is not None:
        p, g = p * keep, g * keep
    focal, tversky = problem.focal, problem.tversky
    q = p.clamp(focal.epsilon, 1 - focal.epsilon)
    cross_entropy = -g * torch.log(q)
    back = (1 - q[:, :1]) ** focal.gamma * cross_entropy[:, :1]
    q = p.clamp(tversky.epsilon, 1 - tversky.epsilon) if tversky.epsilon != focal.epsilon else q
    terms = (back, cross_entropy[:, 1:], g * q, g * (1 - q), (1 - g) * q)
    sums = [voxel_sums(x if mask is None else m * x) for x in (*terms, torch.ones_like(m))]
    return torch.cat([*sums, bad.sum(2, dtype=torch.float64)], 1)


def _focal(sums: Tensor, delta: float) -> Tensor:
    """The mean over voxels and both classes; 0 if no voxel has a weight."""
    total = sums.sum(0)
    voxels = total[8]
    return ((1 - delta) * total[0] + delta * total[1]) / torch.where(voxels == 0, 1.0, 2 * voxels)


def _tversky(sums: Tensor, half: Half) -> Tensor:
    """The mean over samples and both classes."""
    tp, fn, fp = sums[:, 2:4], sums[:, 4:6], sums[:, 6:8]
    wrong = half.delta * fn + (1 - half.delta) * fp
    # Not wrong / (..), whose slope cancels where a class is absent: 1 / D - wrong / D^2.
    missed = 1 - (tp + half.epsilon) / (tp + wrong + half.epsilon)
    back, fore = missed[:, 0], missed[:, 1]
    # 0, which the clamp leaves to samples without a weight, has an infinite slope.
    nothing = fore == 0
    powered = torch.where(nothing, 1.0, fore) ** (1 - half.gamma)
    fore = torch.where(nothing, torch.zeros_like(fore) ** (1 - half.gamma), powered)
    return torch.stack([back, fore], 1).mean()
