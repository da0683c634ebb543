"""What a loss means, as plain frozen data: validated once, passed through the ops as integers and floats.

The numbers of the enums, the order of :data:`ROWS` and :func:`chunk_voxels` are shared with
``csrc/common/problem.h`` and ``csrc/common/finish.h``. Formulas: docs/semantics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Activation(IntEnum):
    """What turns logits into the probabilities of the overlap rows."""

    NONE = 0
    SIGMOID = 1
    SOFTMAX = 2


class Overlap(IntEnum):
    """Which (tp, fp, fn) one voxel contributes: see docs/semantics.md, "Overlap kinds"."""

    PRODUCT = 0
    MIN = 1
    SQUARED = 2
    VOXEL_SQUARED = 3


class VoxelTerm(IntEnum):
    """The per-voxel loss summed in the POS, NEG and LS rows, always from the raw logits."""

    NONE = 0
    CE = 1
    BCE = 2
    FOCAL_SIGMOID = 3
    FOCAL_SOFTMAX = 4


class Formula(IntEnum):
    """How the overlap rows become a loss."""

    NONE = 0
    RATIO = 1
    GENERALIZED = 2
    MCC = 3


class Transform(IntEnum):
    """What happens to the score of one class: 1 - s, -log s, or (1 - s)^exponent."""

    LINEAR = 0
    LOG = 1
    POWER = 2


class GdlWeight(IntEnum):
    """Class weight of the generalized Dice loss: 1/G^2, 1/G or 1."""

    SQUARE = 0
    SIMPLE = 1
    UNIFORM = 2


class Reduction(IntEnum):
    """Over the (B, classes) or (classes,) terms of the overlap loss."""

    NONE = 0
    MEAN = 1
    SUM = 2


class Denominator(IntEnum):
    """Divisor of the voxel term: 1, sum m, sum w_c G_c, classes * sum m; of each sample its own sum m."""

    ONE = 0
    VOXELS = 1
    WEIGHTS = 2
    ELEMENTS = 3
    SAMPLES = 4


ROWS = ("I", "FP", "FN", "G", "POS", "NEG", "LS", "N", "BAD", "TN")
I, FP, FN, G, POS, NEG, LS, N, BAD, TN = (1 << index for index in range(len(ROWS)))
OVERLAP_ROWS = I | FP | FN

RUN_VOXELS = 4096
MAX_CHUNKS = 2048


def chunk_voxels(voxels: int) -> int:
    """Voxels of one chunk, from the voxels of a sample alone (one slot of sums each)."""
    span = RUN_VOXELS * MAX_CHUNKS
    return RUN_VOXELS * max(1, (voxels + span - 1) // span)


def chunk_count(voxels: int) -> int:
    """K of the sums (B, K, C, R): at least one, also for an empty sample."""
    chunk = chunk_voxels(voxels)
    return max(1, (voxels + chunk - 1) // chunk)


def row_names(rows: int) -> tuple[str, ...]:
    """Names of the rows that are on, in the order of the last dimension of the sums."""
    return tuple(name for index, name in enumerate(ROWS) if rows >> index & 1)


def row_index(rows: int, row: int) -> int:
    """Position of ``row`` (one of the bits) among the rows that are on."""
    return (rows & (row - 1)).bit_count()


@dataclass(frozen=True)
class SumsSpec:
    """What the two passes over the volume do.

    Attributes:
        dense: the target holds values (B, C, *S); else labels (B, 1, *S) or (B, *S).
        rows: bit mask of the rows that are summed.
        ignore_index: labels equal to it get voxel weight 0 (label maps only).
        product_mask: p*m and g*m before the products instead of sums linear in m.
        focal_gamma: exponent of the focal voxel terms.
        first_class: FOCAL_SOFTMAX runs its softmax over the classes from here on.
    """

    dense: bool
    activation: Activation
    rows: int
    overlap: Overlap = Overlap.PRODUCT
    voxel_term: VoxelTerm = VoxelTerm.NONE
    ignore_index: int | None = None
    product_mask: bool = False
    focal_gamma: float = 2.0
    first_class: int = 0

    def args(self) -> tuple[bool, int, int, int, int, int | None, bool, float, int]:
        """The trailing arguments of the ops ``sums`` and ``sums_backward``."""
        return (
            self.dense,
            int(self.activation),
            int(self.overlap),
            int(self.voxel_term),
            self.rows,
            self.ignore_index,
            self.product_mask,
            self.focal_gamma,
            self.first_class,
        )


@dataclass(frozen=True)
class FinishSpec:
    """How sums become a loss: score = (kappa I + nr) / (kappa I + alpha FP + beta FN + dr).

    Attributes:
        skipped: leading classes without overlap term (1 without background, else 0).
        batch: rows are added up over the batch before the formula.
        voxel_skipped: leading classes with weight 0 in the voxel term.
    """

    formula: Formula
    kappa: float = 2.0
    alpha: float = 1.0
    beta: float = 1.0
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    transform: Transform = Transform.LINEAR
    exponent: float = 1.0
    gdl_weight: GdlWeight = GdlWeight.SQUARE
    skipped: int = 0
    batch: bool = False
    reduction: Reduction = Reduction.MEAN
    label_smoothing: float = 0.0
    denominator: Denominator = Denominator.ONE
    voxel_skipped: int = 0

    def args(
        self, empty: bool
    ) -> tuple[
        int,
        float,
        float,
        float,
        float,
        float,
        int,
        float,
        int,
        int,
        bool,
        int,
        float,
        int,
        int,
        int,
    ]:
        """The trailing arguments of the op ``finish`` after ``rows``."""
        return (
            int(self.formula),
            self.kappa,
            self.alpha,
            self.beta,
            self.smooth_nr,
            self.smooth_dr,
            int(self.transform),
            self.exponent,
            int(self.gdl_weight),
            self.skipped,
            self.batch,
            int(self.reduction),
            self.label_smoothing,
            int(self.denominator),
            self.voxel_skipped,
            empty,
        )

    def loss_shape(self, samples: int, classes: int) -> tuple[int, ...]:
        """Shape of the op's loss: () when reduced, else (groups, outputs)."""
        if self.reduction != Reduction.NONE:
            return ()
        outputs = 1 if self.formula == Formula.GENERALIZED else classes - self.skipped
        return (1 if self.batch else samples, outputs)


@dataclass(frozen=True)
class LossSpec:
    """A loss: the sums that it needs and the formula over them."""

    sums: SumsSpec
    finish: FinishSpec

    def __post_init__(self) -> None:
        rows, finish = self.sums.rows, self.finish
        needed = 0
        if finish.formula != Formula.NONE:
            needed |= OVERLAP_ROWS
        if finish.formula == Formula.GENERALIZED or finish.denominator == Denominator.WEIGHTS:
            needed |= G
        if finish.formula == Formula.MCC:
            needed |= TN
        if self.sums.voxel_term != VoxelTerm.NONE:
            needed |= POS | N
        if finish.label_smoothing != 0.0:
            needed |= LS
        if needed & ~rows:
            raise ValueError(
                f"rows: got {row_names(rows)}, expected also {row_names(needed & ~rows)}; "
                "switch on every row that the formula reads"
            )
        if self.sums.voxel_term != VoxelTerm.NONE and finish.reduction == Reduction.NONE:
            raise ValueError(
                'reduction: got "none" together with a voxel term, expected "mean" or "sum"; '
                "evaluate the two terms apart"
            )
