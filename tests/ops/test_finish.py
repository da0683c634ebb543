"""The op ``finish``: numbers worked by hand, then C++ against ``dicekernels.finish`` and its autograd."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from dicekernels import finish as formulas
from dicekernels.dispatch import BACKENDS
from dicekernels.spec import (
    BAD,
    FN,
    FP,
    LS,
    NEG,
    OVERLAP_ROWS,
    POS,
    ROWS,
    TN,
    Denominator,
    FinishSpec,
    Formula,
    G,
    GdlWeight,
    I,
    N,
    Reduction,
    Transform,
    Weights,
    row_index,
    row_names,
)

F64 = torch.float64
# The rows that depend on the logits: the backward pass reads the slopes of these and of no other.
DIFFERENTIABLE = I | FP | FN | POS | NEG | LS | TN


def run(
    backend: str,
    slots: Tensor,
    rows: int,
    spec: FinishSpec,
    voxels: int = 1,
    dtype: torch.dtype = F64,
    **weights: Tensor | None,
):
    """(loss, coef) of the op; ``weights`` by name, the others None."""
    names = ("class_weight", "pos_weight", "neg_weight", "region_lambda", "voxel_lambda")
    op = getattr(torch.ops, BACKENDS[backend].namespace).finish
    return op(slots, *(weights.get(name) for name in names), rows, *spec.args(voxels == 0), dtype)


def table(rows: int, classes: int, **values: list[float]) -> Tensor:
    """Slots (1, 1, C, R) from the values of each row."""
    slots = torch.zeros(1, 1, classes, rows.bit_count(), dtype=F64)
    for name, numbers in values.items():
        slots[0, 0, :, row_index(rows, 1 << ROWS.index(name))] = torch.tensor(numbers, dtype=F64)
    return slots


def assert_equal(ours: Tensor, truth: Tensor, name: str, floor: float = 0.0) -> None:
    """To 1e-12 of the largest finite value: both are a few operations in double. Non-finite values match."""
    assert ours.shape == truth.shape, name
    assert ours.dtype == truth.dtype == F64
    assert torch.equal(ours.isnan(), truth.isnan()), f"{name}: {ours} {truth}"
    infinite = truth.isinf()
    assert torch.equal(ours[infinite], truth[infinite]), f"{name}: {ours} {truth}"
    finite = truth.isfinite()
    if finite.any():
        worst = (ours - truth)[finite].abs().max()
        assert worst <= 1e-12 * truth[finite].abs().max() + floor, f"{name}: {worst}\n{ours}\n{truth}"


def exactly(got: Tensor, expected: list[float] | float) -> None:
    assert_equal(got, torch.tensor(expected, dtype=F64), "by hand")


#
# Two classes: I = 3 1, FP = 1 1, FN = 0 2, so P = 4 2 and G = 3 3.

ROWS_G = OVERLAP_ROWS | G
SUMS = table(ROWS_G, 2, I=[3, 1], FP=[1, 1], FN=[0, 2], G=[3, 3])
PLAIN = {"smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": Reduction.NONE}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 1 - 2I / (2I + FP + FN): 1 - 6/7, 1 - 2/5
        ({}, [1 / 7, 3 / 5]),
        ({"smooth_nr": 1.0, "smooth_dr": 1.0}, [1 / 8, 3 / 6]),
        ({"smooth_nr": 1.0, "smooth_dr": 3.0}, [3 / 10, 5 / 8]),
        ({"alpha": 2.0, "beta": 2.0}, [2 / 8, 6 / 8]),  # Jaccard
        ({"kappa": 1.0, "alpha": 0.25, "beta": 0.75}, [0.25 / 3.25, 1.75 / 2.75]),  # Tversky
        ({"transform": Transform.LOG}, [math.log(7 / 6), math.log(5 / 2)]),
        ({"transform": Transform.POWER, "exponent": 2.0}, [1 / 49, 9 / 25]),
        ({"transform": Transform.POWER, "exponent": 0.5}, [1 / math.sqrt(7), math.sqrt(3 / 5)]),
        ({"smooth_nr": 9.0, "transform": Transform.POWER, "exponent": 0.5}, [0, 0]),  # score above 1
        ({"skipped": 1}, [3 / 5]),
    ],
)
def test_ratio_by_hand(backend, options, expected):
    loss, _ = run(backend, SUMS, ROWS_G, FinishSpec(Formula.RATIO, **PLAIN | options))
    exactly(loss, [expected])


def test_slopes_of_dice_by_hand(backend):
    # f = (FP + FN) / Q, Q = 2I + FP + FN: df/dI = -2 (FP + FN)/Q^2, df/dFP = 2I/Q^2; Q = 7 and 5
    _, coef = run(backend, SUMS, ROWS_G, FinishSpec(Formula.RATIO, **PLAIN))
    exactly(coef[..., :3], [[[-2 / 49, 6 / 49, 6 / 49], [-6 / 25, 2 / 25, 2 / 25]]])
    # A floor under the score: no slope. -log(1e-7) where I = 0.
    empty = table(ROWS_G, 2, I=[0, 1], FP=[1, 1], FN=[0, 2], G=[3, 3])
    loss, coef = run(backend, empty, ROWS_G, FinishSpec(Formula.RATIO, **PLAIN, transform=Transform.LOG))
    exactly(loss, [[7 * math.log(10), math.log(5 / 2)]])
    # Class 1 has s = 2/5, so dI = -6/25 / s = -3/5, dFP = 2/25 / s = 1/5.
    exactly(coef[..., :3], [[[0, 0, 0], [-3 / 5, 1 / 5, 1 / 5]]])


@pytest.mark.parametrize(
    ("kind", "volumes", "expected"),
    [
        # FP + FN = 1 and 3, 2I + FP + FN = 7 and 5
        (GdlWeight.UNIFORM, [3, 3], 4 / 12),
        (GdlWeight.SIMPLE, [1, 2], (1 + 1.5) / (7 + 2.5)),
        (GdlWeight.SQUARE, [1, 2], (1 + 0.75) / (7 + 1.25)),
        (GdlWeight.SQUARE, [0, 2], (0.25 * 4) / (0.25 * 12)),  # an absent class takes the largest weight
        # 1/(G G) is infinite in float32 already for G = 1e-20, while 1/G is not
        (GdlWeight.SQUARE, [1e-20, 2], (0.25 * 4) / (0.25 * 12)),
        (GdlWeight.SIMPLE, [1e-20, 2], (1e20 + 1.5) / (7e20 + 2.5)),
    ],
)
def test_generalized_dice_by_hand(backend, kind, volumes, expected):
    slots = table(ROWS_G, 2, I=[3, 1], FP=[1, 1], FN=[0, 2], G=volumes)
    loss, _ = run(backend, slots, ROWS_G, FinishSpec(Formula.GENERALIZED, **PLAIN, gdl_weight=kind))
    exactly(loss, [[expected]])


def test_generalized_dice_of_an_empty_target_is_flat(backend):
    slots = table(ROWS_G, 2, I=[0, 0], FP=[4, 2], FN=[0, 0], G=[0, 0])
    spec = FinishSpec(Formula.GENERALIZED, smooth_nr=1.0, smooth_dr=4.0)
    loss, coef = run(backend, slots, ROWS_G, spec)
    exactly(loss, 1 - 1 / 4)
    assert torch.equal(coef[..., :3], torch.zeros(1, 2, 3, dtype=F64))


@pytest.mark.parametrize(
    ("denominator", "options", "weights", "expected"),
    [
        # POS = 2 3, LS = 5 7, N = 10, G = 4 6
        (Denominator.ONE, {}, {}, 5),
        (Denominator.VOXELS, {}, {}, 5 / 10),
        (Denominator.ELEMENTS, {}, {}, 5 / 20),
        (Denominator.ELEMENTS, {"voxel_skipped": 1}, {}, 3 / 10),
        (Denominator.SAMPLES, {}, {}, 5 / 10),
        (Denominator.WEIGHTS, {}, {"pos_weight": [1.0, 3.0]}, 11 / 22),
        (Denominator.WEIGHTS, {"voxel_skipped": 1}, {"pos_weight": [1.0, 3.0]}, 9 / 18),
        (Denominator.WEIGHTS, {}, {"pos_weight": [0.0, 0.0]}, 0),  # nothing counts: 0, not 0/0
        # 3/4 (2 + 3) + 1/4/2 (5 + 7)
        (Denominator.VOXELS, {"label_smoothing": 0.25}, {}, (3.75 + 1.5) / 10),
        (Denominator.VOXELS, {}, {"voxel_lambda": 0.5}, 5 / 20),
    ],
)
def test_voxel_term_by_hand(backend, denominator, options, weights, expected):
    rows = G | POS | LS | N
    slots = table(rows, 2, G=[4, 6], POS=[2, 3], LS=[5, 7], N=[10, 10])
    weights = {name: torch.tensor(value) for name, value in weights.items()}
    spec = FinishSpec(Formula.NONE, denominator=denominator, **options)
    loss, _ = run(backend, slots, rows, spec, voxels=10, **weights)
    exactly(loss, expected)


def test_each_sample_has_a_denominator_of_its_own(backend):
    # POS = 2 3 | 4 1, N = 10 | 5: 5/10 + 5/5; a sample without a voxel adds nothing
    rows = POS | N
    slots = torch.cat([table(rows, 2, POS=p, N=[n, n]) for p, n in (([2, 3], 10), ([4, 1], 5), ([0, 0], 0))])
    spec = FinishSpec(Formula.NONE, reduction=Reduction.SUM, denominator=Denominator.SAMPLES)
    loss, coef = run(backend, slots, rows, spec, voxels=10)
    exactly(loss, 1.5)
    exactly(coef[..., 0], [[0.1, 0.1], [0.2, 0.2], [0, 0]])


def test_matthews_correlation_by_hand(backend):
    # tp fp fn tn = 3 1 1 7, then 6 0 0 6 (nothing wrong)
    rows = OVERLAP_ROWS | TN
    slots = table(rows, 2, I=[3, 6], FP=[1, 0], FN=[1, 0], TN=[7, 6])
    loss, coef = run(backend, slots, rows, FinishSpec(Formula.MCC, **PLAIN))
    # (3 7 - 1 1) / sqrt(4 4 8 8) = 20/32
    exactly(loss, [[12 / 32, 0]])
    # d(20/32): d top / 32 - 20 d square / (2 32^3), square = (tp+fp)(tp+fn)(tn+fp)(tn+fn) = 4 4 8 8.
    # tp: 7/32 - 20 (8 8 (4 + 4)) / (2 32^3) = 7/32 - 5/32; tn: 3/32 - 20 (4 4 (8 + 8)) / (2 32^3) = 1/64
    # fp and fn: -1/32 - 20 (4 8 (4 + 8)) / (2 32^3) = -19/128
    exactly(coef[0, 0], [-1 / 16, 19 / 128, 19 / 128, -1 / 64])
    exactly(coef[0, 1], [0, 0, 0, 0])


@pytest.mark.parametrize("reduction", Reduction)
def test_a_bad_label_gives_nan_and_no_slope(backend, reduction):
    rows = ROWS_G | BAD
    slots = table(rows, 2, I=[3, 1], FP=[1, 1], FN=[0, 2], G=[3, 3], BAD=[1, 0])
    loss, coef = run(backend, slots, rows, FinishSpec(Formula.RATIO, reduction=reduction))
    assert loss.isnan().all()
    assert torch.equal(coef, torch.zeros_like(coef))


def test_chunks_are_added_up(backend):
    slots = table(ROWS_G, 2, I=[3, 1], FP=[1, 1], FN=[0, 2], G=[3, 3])
    parts = torch.cat([slots / 4, slots / 2, slots / 4], 1)
    for reduction in Reduction:
        spec = FinishSpec(Formula.RATIO, reduction=reduction)
        whole, split = run(backend, slots, ROWS_G, spec), run(backend, parts, ROWS_G, spec)
        assert torch.equal(whole[0], split[0])  # powers of two: no rounding
        assert torch.equal(whole[1], split[1])


def test_wrong_lengths_are_refused():
    spec = FinishSpec(Formula.RATIO)
    with pytest.raises(RuntimeError, match="class_weight: got 3 values, expected 2"):
        run("cpu", SUMS, ROWS_G, spec, class_weight=torch.ones(3))
    with pytest.raises(RuntimeError, match="region_lambda: got 2 values, expected 1"):
        run("cpu", SUMS, ROWS_G, spec, region_lambda=torch.ones(2))
    with pytest.raises(RuntimeError, match="sums: got 4 rows, expected 3"):
        run("cpu", SUMS, OVERLAP_ROWS, spec)
    with pytest.raises(RuntimeError, match="dtype: expected float64, float32"):
        run("cpu", SUMS, ROWS_G, spec, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", Reduction)
def test_the_loss_is_rounded_at_the_end(backend, dtype, reduction):
    spec = FinishSpec(Formula.RATIO, reduction=reduction)
    exact, slopes = run(backend, SUMS, ROWS_G, spec)
    loss, coef = run(backend, SUMS, ROWS_G, spec, dtype=dtype)
    assert loss.dtype == dtype
    assert torch.equal(loss, exact.to(dtype))
    assert torch.equal(coef, slopes)  # float64 whatever the loss is


def random_slots(rows: int, samples: int, chunks: int, classes: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    slots = 1000 * torch.rand(samples, chunks, classes, rows.bit_count(), generator=generator, dtype=F64)
    names = row_names(rows)
    voxels = slots[:, :, :1].sum(-1, keepdim=True).expand(slots.shape)
    for name in {"N", "BAD"} & set(names):
        at = names.index(name)
        slots[..., at] = voxels[..., at] if name == "N" else 0
    gone = {"absent": slice(classes - 1, None), "no volume": slice(None), "zero": slice(None)}
    if kind in gone:
        for name in ["I", "FN", "G"] + (["FP", "N", "POS", "NEG", "LS"] if kind == "zero" else []):
            if name in names:
                slots[:, :, gone[kind], names.index(name)] = 0
    return slots


FORMULAS = [
    *({"formula": Formula.RATIO, "transform": t} for t in Transform),
    *({"formula": Formula.GENERALIZED, "gdl_weight": w} for w in GdlWeight),
    {"formula": Formula.MCC},
    {"formula": Formula.NONE},
]
KINDS = ["random", "absent", "no volume", "zero", "empty"]
TERMS = [0, POS | N, POS | NEG | N, POS | LS | N]
SMOOTHING = [(1e-5, 1e-5), (0.0, 1e-5), (1.0, 0.0), (0.0, 0.0), (2.0, 1.0)]
COMBINATIONS = list(itertools.product(range(len(FORMULAS)), KINDS, TERMS, Reduction))


def combination(index: int):
    """Formula x sums x voxel term x reduction in full; the other options drawn, with ``index`` as seed."""
    which, kind, term, reduction = COMBINATIONS[index]
    draw = random.Random(index)
    chosen = FORMULAS[which]
    samples, classes = (0 if kind == "empty" else draw.choice([1, 2, 3])), draw.choice([1, 2, 5])
    skipped = draw.choice([0, 1]) if classes > 1 else 0
    nr, dr = draw.choice(SMOOTHING)
    if chosen["formula"] == Formula.MCC:
        dr = dr or 1e-5  # without it an absent class is 0/0, NaN or infinite by the order of operations
    options = {
        "kappa": draw.choice([1.0, 2.0]),
        "alpha": draw.choice([0.3, 1.0, 2.0]),
        "beta": draw.choice([0.7, 1.0, 2.0]),
        "smooth_nr": nr,
        "smooth_dr": dr,
        "exponent": draw.choice([0.5, 0.75, 1.0, 2.0]),
        "skipped": skipped,
        "batch": draw.choice([False, True]),
        "reduction": reduction,
        "label_smoothing": draw.choice([0.1, 1.0]) if term & LS else 0.0,
        "denominator": draw.choice(list(Denominator)) if term else Denominator.ONE,
        "voxel_skipped": skipped if draw.random() < 0.5 else 0,
    }
    spec = FinishSpec(**chosen | options)
    rows = OVERLAP_ROWS | G | term | draw.choice([0, BAD]) | (TN if spec.formula == Formula.MCC else 0)
    length = {"class_weight": classes - skipped, "pos_weight": classes, "neg_weight": classes}
    dtype = draw.choice([torch.float32, F64])
    weights = {
        name: torch.rand(size, generator=torch.Generator().manual_seed(index + size), dtype=dtype)
        for name, size in (length | {"region_lambda": 1, "voxel_lambda": 1}).items()
        if draw.random() < 0.5
    }
    weights = {name: w.squeeze() if "lambda" in name else w for name, w in weights.items()}
    slots = random_slots(rows, samples, draw.choice([1, 3]), classes, kind, index)
    voxels = 0 if kind == "empty" else 1000
    return slots, rows, spec, voxels, weights


def relevant(index: int) -> bool:
    which, _, term, reduction = COMBINATIONS[index]
    formula = FORMULAS[which]["formula"]
    if formula == Formula.NONE and not term:
        return False
    return reduction != Reduction.NONE or (not term and formula != Formula.NONE)


@pytest.mark.parametrize("block", range(20))
def test_cpp_equals_its_twin_and_the_twins_autograd(block):
    checked = 0
    for index in filter(relevant, range(block, len(COMBINATIONS), 20)):
        slots, rows, spec, voxels, weights = combination(index)
        loss, coef = run("cpu", slots, rows, spec, voxels, **weights)
        totals = slots.sum(1).requires_grad_()
        truth = formulas.finish(totals, Weights(**weights), rows, spec, voxels == 0)
        label = f"{COMBINATIONS[index]} {spec} {sorted(weights)}"
        assert truth.shape == spec.loss_shape(*totals.shape[:2])
        assert_equal(loss, truth.detach(), f"loss {label}")
        (slope,) = torch.autograd.grad(truth.sum(), totals, allow_unused=True)
        # Autograd takes a slope as the difference of two terms of size 1 / denominator, which is that of
        # the largest slope, or 1 / dr where all sums are 0.
        largest = torch.nan_to_num(coef, posinf=0.0, neginf=0.0).abs().max().item() if coef.numel() else 0.0
        floor = 1e-14 * largest + (1e-15 / spec.smooth_dr if spec.smooth_dr else 0.0)
        for bit in (1 << at for at in range(len(ROWS))):
            if rows & bit & DIFFERENTIABLE:
                at = row_index(rows, bit)
                assert_equal(coef[..., at], slope[..., at], f"slope {row_names(bit)} {label}", floor)
        eager = run("eager", slots, rows, spec, voxels, **weights)
        assert_equal(eager[0], truth.detach(), f"eager loss {label}")
        assert_equal(eager[1], coef, f"eager slopes {label}")
        checked += 1
    assert checked >= 10


def test_the_twin_is_differentiable_in_weights_and_factors():
    rows = OVERLAP_ROWS | G | POS | N
    slots = random_slots(rows, 2, 1, 3, "random", 5)
    spec = FinishSpec(Formula.RATIO, denominator=Denominator.WEIGHTS)
    leaves = [torch.rand(size, dtype=F64, requires_grad=True) for size in (3, 3)]
    factors = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.7, 1.3)]
    assert torch.autograd.gradcheck(
        lambda sums, cw, pw, rl, vl: formulas.finish(sums, Weights(cw, pw, None, rl, vl), rows, spec, False),
        (slots.sum(1).requires_grad_(), *leaves, *factors),
    )
