"""The numbers that Python and C++ share, read from the headers; chunk sizes worked by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dicekernels import finish, spec
from dicekernels.spec import (
    BAD,
    FN,
    FP,
    LS,
    POS,
    ROWS,
    Activation,
    Denominator,
    FinishSpec,
    Formula,
    G,
    I,
    LossSpec,
    N,
    OverlapHalf,
    Reduction,
    SumsSpec,
    VoxelHalf,
    VoxelTerm,
    chunk_count,
    chunk_voxels,
    row_index,
    row_names,
)

COMMON = Path(__file__).parents[2] / "csrc" / "common"


def header(name: str) -> str:
    return (COMMON / name).read_text()


def cpp_enum(text: str, name: str) -> dict[str, int]:
    body = re.search(rf"enum class {name} : int64_t \{{([^}}]*)\}}", text)
    assert body, f"no enum class {name}"
    pairs = re.findall(r"(\w+) = (\d+)", body[1])
    return {key.upper(): int(value) for key, value in pairs}


def cpp_constant(text: str, name: str) -> float:
    found = re.search(rf"constexpr \w+ {name} = ([\d.e+-]+);", text)
    assert found, f"no constant {name}"
    return float(found[1])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("problem.h", "Activation"),
        ("problem.h", "Overlap"),
        ("problem.h", "VoxelTerm"),
        ("finish.h", "Formula"),
        ("finish.h", "Transform"),
        ("finish.h", "GdlWeight"),
        ("finish.h", "Reduction"),
        ("finish.h", "Denominator"),
    ],
)
def test_enums_have_the_numbers_of_the_header(file, name):
    ours = {member.name: int(member) for member in getattr(spec, name)}
    assert cpp_enum(header(file), name) == ours


def test_rows_stand_in_the_order_of_the_header():
    names = re.search(r"enum Row : int \{([^}]*)\}", header("problem.h"))[1].split(",")
    names = [name.split("=")[0].strip().removeprefix("k").upper() for name in names]
    assert names == [*ROWS, "ROWCOUNT"]


def test_constants_of_the_header():
    assert cpp_constant(header("problem.h"), "kRunVoxels") == spec.RUN_VOXELS == 4096
    assert cpp_constant(header("problem.h"), "kMaxChunks") == spec.MAX_CHUNKS == 2048
    assert cpp_constant(header("finish.h"), "kLowestScore") == finish.LOWEST_SCORE == 1e-7


# 4096 voxels to a chunk until 2048 chunks are full (2^23 = 8388608 voxels), then 8192, and so on.
# 512 x 512 x 300 = 78643200 = 9.375 * 2^23: 10 runs a chunk, 78643200 / 40960 = 1920 chunks.
@pytest.mark.parametrize(
    ("voxels", "size", "count"),
    [
        (0, 4096, 1),
        (1, 4096, 1),
        (4095, 4096, 1),
        (4096, 4096, 1),
        (4097, 4096, 2),
        (96**3, 4096, 216),
        (128**3, 4096, 512),
        (2**23, 4096, 2048),
        (2**23 + 1, 8192, 1025),
        (2**24, 8192, 2048),
        (512 * 512 * 300, 40960, 1920),
        (2**31 + 1, 257 * 4096, 2041),
    ],
)
def test_chunks_worked_by_hand(voxels, size, count):
    assert chunk_voxels(voxels) == size
    assert chunk_count(voxels) == count
    assert (count - 1) * size < max(voxels, 1) <= count * size


def test_rows_are_bits_in_order():
    assert [1 << i for i in range(10)] == [I, FP, FN, G, POS, spec.NEG, LS, N, BAD, spec.TN]
    rows = I | FN | N | BAD
    assert row_names(rows) == ("I", "FN", "N", "BAD")
    assert [row_index(rows, bit) for bit in (I, FN, N, BAD)] == [0, 1, 2, 3]


def test_arguments_come_back_in_the_order_of_the_schema():
    sums = SumsSpec(
        True,
        Activation.SIGMOID,
        overlap=spec.Overlap.MIN,
        voxel_term=VoxelTerm.BCE,
        rows=7,
        ignore_index=-100,
        product_mask=True,
        focal_gamma=1.5,
        first_class=3,
    )
    assert SumsSpec.of_args(sums.args()) == sums
    formula = FinishSpec(
        Formula.GENERALIZED,
        kappa=1.0,
        alpha=0.3,
        beta=0.7,
        smooth_nr=0.1,
        smooth_dr=0.2,
        transform=spec.Transform.POWER,
        exponent=0.75,
        gdl_weight=spec.GdlWeight.SIMPLE,
        skipped=1,
        batch=True,
        reduction=Reduction.SUM,
        label_smoothing=0.05,
        denominator=Denominator.ELEMENTS,
        voxel_skipped=1,
    )
    assert FinishSpec.of_args(formula.args(True)[:-1]) == formula
    assert formula.args(True)[-1] is True


def test_schemas_are_those_of_the_libraries():
    # A field that moves or changes its kind is another op to a binary and to a saved graph.
    assert SumsSpec.schema() == (
        "bool dense, int activation, int overlap, int voxel_term, int rows, int? ignore_index, "
        "bool product_mask, float focal_gamma, int first_class"
    )
    assert FinishSpec.schema() == (
        "int formula, float kappa, float alpha, float beta, float smooth_nr, float smooth_dr, "
        "int transform, float exponent, int gdl_weight, int skipped, bool batch, int reduction, "
        "float label_smoothing, int denominator, int voxel_skipped"
    )


@pytest.mark.parametrize(
    ("reduction", "formula", "skipped", "batch", "shape"),
    [
        (Reduction.MEAN, Formula.RATIO, 1, False, ()),
        (Reduction.SUM, Formula.GENERALIZED, 0, True, ()),
        (Reduction.NONE, Formula.RATIO, 0, False, (2, 5)),
        (Reduction.NONE, Formula.RATIO, 1, False, (2, 4)),
        (Reduction.NONE, Formula.RATIO, 1, True, (1, 4)),
        (Reduction.NONE, Formula.GENERALIZED, 1, False, (2, 1)),
        (Reduction.NONE, Formula.GENERALIZED, 0, True, (1, 1)),
    ],
)
def test_loss_shape(reduction, formula, skipped, batch, shape):
    finish_spec = FinishSpec(formula, skipped=skipped, batch=batch, reduction=reduction)
    assert finish_spec.loss_shape(2, 5) == shape


@pytest.mark.parametrize(
    ("rows", "term", "options", "missing"),
    [
        (I | FP, VoxelTerm.NONE, {}, r"\('FN',\)"),
        (0, VoxelTerm.NONE, {}, r"\('I', 'FP', 'FN'\)"),
        (I | FP | FN, VoxelTerm.NONE, {"formula": Formula.GENERALIZED}, r"\('G',\)"),
        (I | FP | FN | N | POS, VoxelTerm.CE, {"denominator": Denominator.WEIGHTS}, r"\('G',\)"),
        (I | FP | FN, VoxelTerm.CE, {}, r"\('POS', 'N'\)"),
        (I | FP | FN | N | POS, VoxelTerm.CE, {"label_smoothing": 0.1}, r"\('LS',\)"),
    ],
)
def test_a_formula_without_its_rows_is_refused(rows, term, options, missing):
    sums = SumsSpec(False, Activation.SOFTMAX, rows=rows, voxel_term=term)
    with pytest.raises(ValueError, match=f"rows: got .* expected also {missing}; switch on"):
        LossSpec(sums, FinishSpec(**{"formula": Formula.RATIO} | options))


def test_unreduced_losses_take_no_voxel_term():
    sums = SumsSpec(False, Activation.SOFTMAX, rows=I | FP | FN | POS | N, voxel_term=VoxelTerm.CE)
    with pytest.raises(ValueError, match='reduction: got "none" together with a voxel term'):
        LossSpec(sums, FinishSpec(Formula.RATIO, reduction=Reduction.NONE))


def test_specs_are_frozen_and_hashable():
    one, two = (SumsSpec(False, Activation.SOFTMAX, rows=I | FP | FN) for _ in range(2))
    assert one == two
    assert len({one, two}) == 1
    with pytest.raises(AttributeError):
        one.rows = 0


def test_a_loss_of_two_halves_has_their_rows_and_numbers():
    overlap = OverlapHalf(Formula.GENERALIZED, Activation.SOFTMAX, smooth_nr=0.5, skipped=1, batch=True)
    voxel = VoxelHalf(
        VoxelTerm.FOCAL_SIGMOID, denominator=Denominator.ELEMENTS, voxel_skipped=1, focal_gamma=1.5
    )
    loss = LossSpec.of(overlap, voxel, reduction=Reduction.SUM, dense=False, ignore_index=7)
    assert loss.sums == SumsSpec(
        False,
        Activation.SOFTMAX,
        rows=I | FP | FN | G | POS | spec.NEG | N | BAD,
        voxel_term=VoxelTerm.FOCAL_SIGMOID,
        ignore_index=7,
        focal_gamma=1.5,
    )
    assert loss.finish == FinishSpec(
        Formula.GENERALIZED,
        smooth_nr=0.5,
        skipped=1,
        batch=True,
        reduction=Reduction.SUM,
        denominator=Denominator.ELEMENTS,
        voxel_skipped=1,
    )


@pytest.mark.parametrize(
    ("half", "rows"),
    [
        (OverlapHalf(Formula.RATIO, Activation.SIGMOID), I | FP | FN | BAD),
        (OverlapHalf(Formula.MCC, Activation.SIGMOID), I | FP | FN | spec.TN | BAD),
        (VoxelHalf(VoxelTerm.CE), POS | N | BAD),
        (VoxelHalf(VoxelTerm.CE, label_smoothing=0.1), POS | LS | N | BAD),
        (VoxelHalf(VoxelTerm.CE, denominator=Denominator.WEIGHTS), POS | G | N | BAD),
        (VoxelHalf(VoxelTerm.BCE), POS | spec.NEG | N | BAD),
        (VoxelHalf(VoxelTerm.FOCAL_SOFTMAX), POS | N | BAD),
    ],
)
def test_a_loss_of_one_half_has_its_rows(half, rows):
    halves = (half, None) if isinstance(half, OverlapHalf) else (None, half)
    for dense in (False, True):
        loss = LossSpec.of(*halves, reduction=Reduction.MEAN, dense=dense)
        assert loss.sums.rows == rows & ~(BAD if dense else 0)
