"""From prepared inputs to the spec of a term: which rows it sums, which formula it takes, its shape."""

from __future__ import annotations

from . import checks
from .evaluate import Call
from .prepare import Inputs
from .spec import (
    BAD,
    LS,
    NEG,
    OVERLAP_ROWS,
    POS,
    TN,
    Activation,
    Denominator,
    FinishSpec,
    Formula,
    G,
    GdlWeight,
    LossSpec,
    N,
    Overlap,
    Reduction,
    SumsSpec,
    Transform,
    VoxelTerm,
)

_GDL_WEIGHTS = {
    "square": GdlWeight.SQUARE,
    "simple": GdlWeight.SIMPLE,
    "uniform": GdlWeight.UNIFORM,
}
_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def reduction_of(value: str) -> Reduction:
    return _REDUCTIONS[checks.option("reduction", value, ("mean", "sum", "none"))]


def overlap_of(squared_pred: bool, soft_label: bool) -> Overlap:
    """squared_pred wins over soft_label, as in MONAI."""
    return Overlap.SQUARED if squared_pred else Overlap.MIN if soft_label else Overlap.PRODUCT


def dice_finish(
    inputs: Inputs,
    jaccard: bool,
    smooth_nr: float,
    smooth_dr: float,
    batch: bool,
    reduction: str,
    transform: Transform = Transform.LINEAR,
) -> FinishSpec:
    """The Dice ratio; ``jaccard`` counts every error twice."""
    return FinishSpec(
        Formula.RATIO,
        alpha=2.0 if jaccard else 1.0,
        beta=2.0 if jaccard else 1.0,
        smooth_nr=checks.constant("smooth_nr", smooth_nr),
        smooth_dr=checks.constant("smooth_dr", smooth_dr),
        transform=transform,
        skipped=inputs.skipped,
        batch=batch,
        reduction=reduction_of(reduction),
    )


def generalized_finish(
    inputs: Inputs, w_type: str, smooth_nr: float, smooth_dr: float, batch: bool, reduction: str
) -> FinishSpec:
    """The generalized Dice ratio."""
    return FinishSpec(
        Formula.GENERALIZED,
        smooth_nr=checks.constant("smooth_nr", smooth_nr),
        smooth_dr=checks.constant("smooth_dr", smooth_dr),
        gdl_weight=_GDL_WEIGHTS[checks.option("w_type", w_type, tuple(_GDL_WEIGHTS))],
        skipped=inputs.skipped,
        batch=batch,
        reduction=reduction_of(reduction),
    )


def overlap_call(inputs: Inputs, overlap: Overlap, finish: FinishSpec) -> Call:
    rows = OVERLAP_ROWS | (0 if inputs.dense else BAD)
    if finish.formula == Formula.GENERALIZED or finish.denominator == Denominator.WEIGHTS:
        rows |= G
    if finish.formula == Formula.MCC:
        rows |= TN
    sums = SumsSpec(
        dense=inputs.dense,
        activation=inputs.activation,
        rows=rows | (LS if finish.label_smoothing else 0),
        overlap=overlap,
        ignore_index=inputs.ignore_index,
        product_mask=inputs.product_mask,
    )
    return Call(
        inputs.logits,
        inputs.target,
        inputs.mask,
        LossSpec(sums, finish),
        inputs.dtype,
        notes=inputs.notes,
    )


def ce_term(
    inputs: Inputs, reduction: str, weighted: bool, smoothing: float, include_background: bool
) -> LossSpec:
    """MONAI's cross entropy half alone: index mode, probability mode, or BCE for one channel."""
    checks.label_smoothing(smoothing)
    channels = inputs.raw_logits.shape[1]
    binary = channels == 1
    smoothing = 0.0 if binary else float(smoothing)
    skipped = 0 if include_background or binary else 1
    rows = POS | N | (LS if smoothing else 0) | (0 if inputs.dense else BAD) | (NEG if binary else 0)
    denominator = Denominator.VOXELS if reduction == "mean" else Denominator.ONE
    if reduction == "mean" and not inputs.dense and (weighted or skipped):
        denominator, rows = Denominator.WEIGHTS, rows | G
    sums = SumsSpec(
        dense=inputs.dense,
        activation=Activation.NONE,
        rows=rows,
        voxel_term=VoxelTerm.BCE if binary else VoxelTerm.CE,
        ignore_index=inputs.ignore_index,
        product_mask=inputs.product_mask,
    )
    finish = FinishSpec(
        Formula.NONE,
        reduction=reduction_of(reduction),
        label_smoothing=smoothing,
        denominator=denominator,
        voxel_skipped=skipped,
    )
    return LossSpec(sums, finish)


def focal_term(
    inputs: Inputs,
    reduction: str,
    gamma: float,
    use_softmax: bool,
    by_voxels: bool,
    softmax_over_all: bool,
) -> LossSpec:
    """The focal loss alone; ``by_voxels``: the mean is over voxels and not over voxels and classes."""
    rows = POS | N | (0 if inputs.dense else BAD) | (0 if use_softmax else NEG)
    sums = SumsSpec(
        dense=inputs.dense,
        activation=Activation.NONE,
        rows=rows,
        voxel_term=VoxelTerm.FOCAL_SOFTMAX if use_softmax else VoxelTerm.FOCAL_SIGMOID,
        ignore_index=inputs.ignore_index,
        product_mask=inputs.product_mask,
        focal_gamma=checks.constant("gamma", gamma),
        first_class=inputs.skipped if use_softmax and not softmax_over_all else 0,
    )
    mean = Denominator.VOXELS if by_voxels else Denominator.ELEMENTS
    finish = FinishSpec(
        Formula.NONE,
        reduction=reduction_of(reduction),
        denominator=mean if reduction == "mean" else Denominator.SAMPLES,
        voxel_skipped=inputs.skipped,
    )
    return LossSpec(sums, finish)


def terms_shape(inputs: Inputs, batch: bool) -> tuple[int, ...]:
    return (inputs.classes,) if batch else (inputs.logits.shape[0], inputs.classes)


def ones_shape(inputs: Inputs) -> tuple[int, ...]:
    """MONAI views its terms as (the first two sizes, 1, ..) in as many dimensions as it has."""
    return (1,) * (inputs.logits.ndim - 2)
