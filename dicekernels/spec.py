"""What a loss means, as plain frozen data: validated once, passed through the ops as integers and floats.

The numbers of the enums, the order of :data:`ROWS` and :func:`chunk_voxels` are shared with
``csrc/common/problem.h`` and ``csrc/common/finish.h``. Formulas: docs/semantics.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, TypeVar, get_type_hints

from torch import Tensor


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


# Of z and g of each class by itself; the other terms are of log p of a softmax.
BINARY_TERMS = (VoxelTerm.BCE, VoxelTerm.FOCAL_SIGMOID)


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


def needed_rows(
    *,
    dense: bool,
    formula: Formula = Formula.NONE,
    voxel_term: VoxelTerm = VoxelTerm.NONE,
    denominator: Denominator = Denominator.ONE,
    label_smoothing: float = 0.0,
) -> int:
    """The rows that a loss of this kind sums: what its formulas read, and of labels the count of bad ones."""
    rows = 0 if dense else BAD
    if formula != Formula.NONE:
        rows |= OVERLAP_ROWS
    if formula == Formula.GENERALIZED or denominator == Denominator.WEIGHTS:
        rows |= G
    if formula == Formula.MCC:
        rows |= TN
    if voxel_term != VoxelTerm.NONE:
        rows |= POS | N
    if voxel_term in BINARY_TERMS:
        rows |= NEG
    if label_smoothing != 0.0:
        rows |= LS
    return rows


class Weights(NamedTuple):
    """Factors of a loss; None for 1.

    Attributes:
        class_weight: (C - skipped,) of the overlap terms.
        pos_weight: (C,) of the POS and LS rows.
        neg_weight: (C,) of the NEG row.
        region_lambda, voxel_lambda: 0-dim, of the overlap loss and of the voxel term.
    """

    class_weight: Tensor | None = None
    pos_weight: Tensor | None = None
    neg_weight: Tensor | None = None
    region_lambda: Tensor | None = None
    voxel_lambda: Tensor | None = None


_N = TypeVar("_N", bound="Numbers")


class Numbers:
    """A frozen dataclass of numbers: its fields, in their order, are arguments of an op."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    # Made at the first call of ``_numbers``.
    _args: tuple[Any, ...] | None = None

    def _numbers(self) -> tuple[Any, ...]:
        args = self._args
        if args is None:
            values = [getattr(self, name) for name in self.__dataclass_fields__]
            args = tuple(int(value) if isinstance(value, IntEnum) else value for value in values)
            object.__setattr__(self, "_args", args)
        return args

    @classmethod
    @functools.cache
    def kinds(cls) -> dict[str, Any]:
        """Type of each field."""
        hints = get_type_hints(cls)
        return {member.name: hints[member.name] for member in fields(cls)}

    @classmethod
    def schema(cls) -> str:
        """The arguments as torch's schemas spell them."""
        names = {bool: "bool", float: "float", int | None: "int?"}
        return ", ".join(f"{names.get(kind, 'int')} {name}" for name, kind in cls.kinds().items())

    @classmethod
    def of_args(cls: type[_N], args: Sequence[Any]) -> _N:
        """From the arguments of an op that :meth:`schema` names."""
        values = {}
        for (name, kind), value in zip(cls.kinds().items(), args, strict=True):
            values[name] = kind(value) if isinstance(kind, type) and issubclass(kind, IntEnum) else value
        return cls(**values)


@dataclass(frozen=True)
class SumsSpec(Numbers):
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
    _: KW_ONLY
    overlap: Overlap = Overlap.PRODUCT
    voxel_term: VoxelTerm = VoxelTerm.NONE
    rows: int
    ignore_index: int | None = None
    product_mask: bool = False
    focal_gamma: float = 2.0
    first_class: int = 0

    def args(self) -> tuple[Any, ...]:
        """The trailing arguments of the ops ``sums`` and ``sums_backward``."""
        return self._numbers()


@dataclass(frozen=True)
class FinishSpec(Numbers):
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

    def args(self, empty: bool) -> tuple[Any, ...]:
        """The trailing arguments of the op ``finish`` after ``rows``."""
        return (*self._numbers(), empty)

    def loss_shape(self, samples: int, classes: int) -> tuple[int, ...]:
        """Shape of the op's loss: () when reduced, else (groups, outputs)."""
        if self.reduction != Reduction.NONE:
            return ()
        outputs = 1 if self.formula == Formula.GENERALIZED else classes - self.skipped
        return (1 if self.batch else samples, outputs)


@dataclass(frozen=True)
class OverlapHalf:
    """The overlap term of a loss, fields as in :class:`SumsSpec` and :class:`FinishSpec`."""

    formula: Formula
    activation: Activation
    _: KW_ONLY
    overlap: Overlap = Overlap.PRODUCT
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


@dataclass(frozen=True)
class VoxelHalf:
    """The voxel term of a loss, fields as in :class:`SumsSpec` and :class:`FinishSpec`."""

    voxel_term: VoxelTerm
    _: KW_ONLY
    label_smoothing: float = 0.0
    denominator: Denominator = Denominator.ONE
    voxel_skipped: int = 0
    focal_gamma: float = 2.0
    first_class: int = 0


@dataclass(frozen=True)
class LossSpec:
    """A loss: the sums that it needs and the formula over them."""

    sums: SumsSpec
    finish: FinishSpec

    @staticmethod
    def of(
        overlap: OverlapHalf | None,
        voxel: VoxelHalf | None,
        *,
        reduction: Reduction,
        dense: bool,
        ignore_index: int | None = None,
        product_mask: bool = False,
    ) -> LossSpec:
        """The sum of the halves that are there, with the rows that it needs."""
        values: dict[str, Any] = {
            "formula": Formula.NONE,
            "activation": Activation.NONE,
            "reduction": reduction,
            "dense": dense,
            "ignore_index": ignore_index,
            "product_mask": product_mask,
        }
        for half in (overlap, voxel):
            if half is not None:
                values |= {name: getattr(half, name) for name in half.__dataclass_fields__}
        finish = FinishSpec(**{k: v for k, v in values.items() if k in FinishSpec.__dataclass_fields__})
        rows = needed_rows(
            dense=dense,
            formula=finish.formula,
            voxel_term=values.get("voxel_term", VoxelTerm.NONE),
            denominator=finish.denominator,
            label_smoothing=finish.label_smoothing,
        )
        sums = {k: v for k, v in values.items() if k in SumsSpec.__dataclass_fields__}
        return LossSpec(SumsSpec(rows=rows, **sums), finish)

    def __post_init__(self) -> None:
        sums, finish = self.sums, self.finish
        needed = needed_rows(
            dense=sums.dense,
            formula=finish.formula,
            voxel_term=sums.voxel_term,
            denominator=finish.denominator,
            label_smoothing=finish.label_smoothing,
        )
        missing = needed & ~(BAD | NEG | sums.rows)
        if missing:
            raise ValueError(
                f"rows: got {row_names(sums.rows)}, expected also {row_names(missing)}; "
                "switch on every row that the formula reads"
            )
        if sums.voxel_term != VoxelTerm.NONE and finish.reduction == Reduction.NONE:
            raise ValueError(
                'reduction: got "none" together with a voxel term, expected "mean" or "sum"; '
                "evaluate the two terms apart"
            )
