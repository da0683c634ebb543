"""The op ``finish`` of the Triton backend against numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from test_finish import ROWS_G, SUMS, random_slots, table
from torch import Tensor
from triton_finish_cases import ALL_ROWS, EPS, F64, assert_equal, quiet, run, runs

pytest.importorskip("triton")

from dicekernels.spec import (
    BAD,
    LS,
    OVERLAP_ROWS,
    POS,
    TN,
    Denominator,
    FinishSpec,
    Formula,
    GdlWeight,
    N,
    Reduction,
    Transform,
    row_index,
)

pytestmark = quiet


#
# By hand. Two classes: I = 3 1, FP = 1 1, FN = 0 2, so P = 4 2 and G = 3 3.


def near(got: Tensor, expected: list | float) -> None:
    truth = torch.tensor(expected, dtype=F64)
    assert_equal(got, truth, SUMS, "by hand")


PLAIN = {"smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": Reduction.NONE}


@runs
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 1 - 2I / (2I + FP + FN): 1 - 6/7, 1 - 2/5
        ({}, [1 / 7, 3 / 5]),
        # Neither 0.1 nor 0.3 is a float32 number: 1 - (2I + 0.1) / (2I + FP + FN + 0.3)
        ({"smooth_nr": 0.1, "smooth_dr": 0.3}, [1.2 / 7.3, 3.2 / 5.3]),
        ({"kappa": 1.0, "alpha": 0.3, "beta": 0.7}, [0.3 / 3.3, 1.7 / 2.7]),
        ({"transform": Transform.LOG}, [math.log(7 / 6), math.log(5 / 2)]),
        ({"transform": Transform.POWER, "exponent": 0.1}, [(1 / 7) ** 0.1, 0.6**0.1]),
        ({"smooth_nr": 9.0, "transform": Transform.POWER, "exponent": 0.5}, [0, 0]),  # score above 1
        ({"skipped": 1}, [3 / 5]),
    ],
)
def test_ratio_by_hand(options: dict, expected: list[float]) -> None:
    near(run(SUMS, ROWS_G, FinishSpec(Formula.RATIO, **PLAIN | options))[0], [expected])


@runs
def test_the_floor_under_the_score_is_a_float64_number() -> None:
    # -log(1e-7) where I = 0 and no slope there; float32(1e-7) is 1.2e-8 of it above.
    slots = table(ROWS_G, 2, I=[0, 1], FP=[1, 1], FN=[0, 2], G=[3, 3])
    loss, coef = run(slots, ROWS_G, FinishSpec(Formula.RATIO, **PLAIN, transform=Transform.LOG))
    near(loss, [[7 * math.log(10), math.log(5 / 2)]])
    near(coef[..., :3], [[[0, 0, 0], [-3 / 5, 1 / 5, 1 / 5]]])
    # s = 1.00000000584e-7 lies between 1e-7 and float32(1e-7): I = 1, FP = 2/s - 2
    score = 1.00000000584e-7
    slots = table(ROWS_G, 2, I=[1, 1], FP=[2 / score - 2, 1], FN=[0, 2], G=[3, 3])
    loss, coef = run(slots, ROWS_G, FinishSpec(Formula.RATIO, **PLAIN, transform=Transform.LOG))
    near(loss, [[-math.log(score), math.log(5 / 2)]])
    assert coef[0, 0, 0] < 0


@runs
@pytest.mark.parametrize("exponent", [0.1, 0.75, 1.0, 2.0, 3.5])
def test_powers(exponent: float) -> None:
    # miss = FP / (2I + FP) from 1e-40 to 1; the error of log and product is |exponent log miss| eps.
    misses = [10.0**-k for k in range(40, 0, -1)]
    slots = table(ROWS_G, 40, I=[0.5 * (1 - m) for m in misses], FP=misses, FN=[0] * 40, G=[1] * 40)
    spec = FinishSpec(Formula.RATIO, **PLAIN, transform=Transform.POWER, exponent=exponent)
    loss, _ = run(slots, ROWS_G, spec)
    for got, miss in zip(loss[0].tolist(), misses, strict=True):
        bound = (8 + 2 * abs(exponent * math.log(miss))) * EPS
        assert abs(got - miss**exponent) <= bound * miss**exponent


@runs
@pytest.mark.parametrize(
    ("kind", "volumes", "expected"),
    [
        # FP + FN = 1 and 3, 2I + FP + FN = 7 and 5
        (GdlWeight.UNIFORM, [3, 3], 4 / 12),
        (GdlWeight.SIMPLE, [1, 2], (1 + 1.5) / (7 + 2.5)),
        (GdlWeight.SQUARE, [1, 2], (1 + 0.75) / (7 + 1.25)),
        (GdlWeight.SQUARE, [0, 2], (0.25 * 4) / (0.25 * 12)),  # an absent class takes the largest weight
    ],
)
def test_generalized_dice_by_hand(kind: GdlWeight, volumes: list[float], expected: float) -> None:
    slots = table(ROWS_G, 2, I=[3, 1], FP=[1, 1], FN=[0, 2], G=volumes)
    near(run(slots, ROWS_G, FinishSpec(Formula.GENERALIZED, **PLAIN, gdl_weight=kind))[0], [[expected]])


def _around(number: float) -> Iterator[float]:
    """Doubles beside a number, some of them float32 numbers."""
    for power in (-52, -30, -24, -23, -22, -21, -20):
        yield from (number * (1 - 2.0**power), number * (1 + 2.0**power))
    yield number


@runs
@pytest.mark.parametrize(("kind", "edge"), [(GdlWeight.SIMPLE, 2.0**-128), (GdlWeight.SQUARE, 2.0**-64)])
def test_which_weights_are_infinite_is_the_answer_of_float32(kind: GdlWeight, edge: float) -> None:
    volumes = list(_around(edge))
    single = torch.tensor(volumes, dtype=torch.float32)
    infinite = (1 / (single * single if kind == GdlWeight.SQUARE else single)).isinf()
    assert 0 < infinite.sum() < len(volumes)  # the edge is met from both sides
    # With FP = 1 in the first class, all that a weight scales, and I = 1/2 in the second, whose weight is 1:
    # the loss is 1/2 where the first takes the weight of the second, else very nearly 1.
    for volume, is_infinite in zip(volumes, infinite.tolist(), strict=True):
        slots = table(ROWS_G, 2, I=[0, 0.5], FP=[1, 0], FN=[0, 0], G=[volume, 1])
        loss, _ = run(slots, ROWS_G, FinishSpec(Formula.GENERALIZED, **PLAIN, gdl_weight=kind))
        near(loss, [[0.5 if is_infinite else 1.0]])


@runs
def test_voxel_terms_by_hand() -> None:
    # POS = 2 3 | 4 1, N = 10 | 5: each sample by itself 5/10 + 5/5; a sample without a voxel adds nothing
    rows = POS | N
    slots = torch.cat([table(rows, 2, POS=p, N=[n, n]) for p, n in (([2, 3], 10), ([4, 1], 5), ([0, 0], 0))])
    spec = FinishSpec(Formula.NONE, reduction=Reduction.SUM, denominator=Denominator.SAMPLES)
    loss, coef = run(slots, rows, spec)
    near(loss, 1.5)
    near(coef[..., 0], [[0.1, 0.1], [0.2, 0.2], [0, 0]])
    assert torch.equal(coef[..., 1], torch.zeros(3, 2, dtype=F64))
    # 3/4 (2 + 3) + 1/4/2 (5 + 7) over 10 voxels
    rows = POS | LS | N
    slots = table(rows, 2, POS=[2, 3], LS=[5, 7], N=[10, 10])
    spec = FinishSpec(Formula.NONE, label_smoothing=0.25, denominator=Denominator.VOXELS)
    near(run(slots, rows, spec)[0], (3.75 + 1.5) / 10)


@runs
def test_matthews_correlation_by_hand() -> None:
    # tp fp fn tn = 3 1 1 7: 1 - (3 7 - 1 1) / sqrt(4 4 8 8); then 6 0 0 6, nothing wrong
    rows = OVERLAP_ROWS | TN
    slots = table(rows, 2, I=[3, 6], FP=[1, 0], FN=[1, 0], TN=[7, 6])
    loss, coef = run(slots, rows, FinishSpec(Formula.MCC, **PLAIN))
    near(loss, [[12 / 32, 0]])
    near(coef, [[[-1 / 16, 19 / 128, 19 / 128, -1 / 64], [0, 0, 0, 0]]])


@runs
def test_ignored_voxels_with_logits_that_are_not_finite() -> None:
    # Nothing counts: the voxel term is 0, whatever stands in its sums (docs/semantics.md).
    rows = POS | N
    slots = table(rows, 2, POS=[math.nan, math.inf], N=[0, 0])
    loss, coef = run(slots, rows, FinishSpec(Formula.NONE, denominator=Denominator.VOXELS))
    near(loss, 0.0)
    assert torch.equal(coef, torch.zeros_like(coef))


@runs
@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("batch", [False, True])
def test_a_bad_label_gives_nan_and_no_slope(reduction: Reduction, batch: bool) -> None:
    rows = ROWS_G | BAD
    slots = torch.cat([random_slots(rows, 1, 2, 3, "random", seed) for seed in range(3)])
    slots[1, 1, 0, row_index(rows, BAD)] = 1
    loss, coef = run(slots, rows, FinishSpec(Formula.RATIO, reduction=reduction, batch=batch))
    assert loss.isnan().all()
    assert torch.equal(coef, torch.zeros_like(coef))


@runs
@pytest.mark.parametrize("formula", Formula)
def test_nan_sums_give_a_nan_loss(formula: Formula) -> None:
    rows = ALL_ROWS
    slots = random_slots(rows, 2, 2, 3, "random", seed=6)
    slots[1, 0, 1, [row_index(rows, bit) for bit in (OVERLAP_ROWS & -OVERLAP_ROWS, POS)]] = math.nan
    loss, _ = run(slots, rows, FinishSpec(formula, denominator=Denominator.VOXELS))
    assert loss.isnan()
