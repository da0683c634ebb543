"""csrc/common/finish.h by itself, by one thread and by teams of parts x threads.

A team adds in another order and shares the work; nothing else may change. Numbers worked by hand, then every
formula against ``dicekernels.finish`` and its autograd.
"""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch
from common_headers import load, pointer
from test_finish import DIFFERENTIABLE, assert_equal, random_slots, table
from torch import Tensor

from dicekernels import finish as formulas
from dicekernels.spec import (
    BAD,
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
    N,
    Reduction,
    Transform,
    Weights,
    row_index,
    row_names,
)

F64 = torch.float64
TEAMS = [(0, 0), (1, 1), (3, 2), (2, 4)]
NAMES = ("class_weight", "pos_weight", "neg_weight", "region_lambda", "voxel_lambda")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(tmp_path_factory)


def run(library, totals, rows, spec, empty=False, team=(0, 0), **weights) -> tuple[Tensor, Tensor]:
    """(loss, coef) of totals (B, C, R)."""
    samples, classes, _ = totals.shape
    given = [weights[n].to(F64).contiguous() if n in weights else None for n in NAMES[:3]]
    lambdas = [ctypes.c_double(float(weights.get(n, 1.0))) for n in NAMES[3:]]
    loss = torch.full(spec.loss_shape(samples, classes), math.nan, dtype=F64)
    # A value that is no slope: what is not written shows.
    coef = torch.full_like(totals, 12345.0)
    totals = totals.contiguous()
    numbers = [
        ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(int(x)) for x in spec.args(empty)
    ]
    sizes = [ctypes.c_int64(x) for x in (*team, samples, classes)]
    weights_at = [pointer(x) for x in given]
    library.finish_test.restype = ctypes.c_int64
    stored = library.finish_test(
        *sizes,
        pointer(totals),
        *weights_at,
        *lambdas,
        ctypes.c_int64(rows),
        *numbers,
        pointer(loss),
        pointer(coef),
    )
    assert stored == loss.numel(), "each loss is stored once"
    return loss, coef


def near(got: Tensor, expected: list | float) -> None:
    assert_equal(got, torch.tensor(expected, dtype=F64), "by hand")


ROWS_G = OVERLAP_ROWS | G
PLAIN = {"smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": Reduction.NONE}
teams = pytest.mark.parametrize("team", TEAMS, ids=["one thread", "1x1", "3x2", "2x4"])


@teams
@pytest.mark.parametrize(
    ("options", "sums", "expected", "slopes"),
    [
        # Concentric squares of 100^2 and 90^2 pixels: Dice 16200/18100 = 0.8950
        (
            {},
            [8100, 1900, 0],
            1 - 0.8950276243093923,
            [-2 * 1900 / 18100**2, 16200 / 18100**2, 16200 / 18100**2],
        ),
        # Jaccard of them: 8100/10000; d/dI = -1900/10000^2, d/dFP = d/dFN = 8100/10000^2
        ({"kappa": 1.0}, [8100, 1900, 0], 0.19, [-1.9e-5, 8.1e-5, 8.1e-5]),
        # Tversky, I = 2, FP = 5, FN = 10, 0.2 FP + 0.1 FN = 2: 1 - 2/4; -2/16, 2/16 of each factor
        ({"kappa": 1.0, "alpha": 0.2, "beta": 0.1}, [2, 5, 10], 0.5, [-0.125, 0.025, 0.0125]),
        # Smoothing, nothing there: (dr - nr)/dr = 3/4; d/dI = -2 3/4 / 4, d/dFP = 1/4 / 4
        ({"smooth_nr": 1.0, "smooth_dr": 4.0}, [0, 0, 0], 0.75, [-0.375, 0.0625, 0.0625]),
        # Score 2/4 = 1/2: -log; 1/s times -2 2/16 and 2/16
        ({"transform": Transform.LOG}, [1, 1, 1], math.log(2), [-0.5, 0.25, 0.25]),
        # Focal Tversky: miss 2/8 to the power 3/2 = 1/8, d = 3/2 1/2 = 3/4 of -2 2/64 and 6/64
        ({"transform": Transform.POWER, "exponent": 1.5}, [3, 1, 1], 0.125, [-3 / 64, 9 / 128, 9 / 128]),
        # Score below 1e-7: -log(1e-7), and flat
        ({"transform": Transform.LOG}, [0, 1, 1], 7 * math.log(10), [0, 0, 0]),
        # Score above 1: the power of a negative miss is 0, and flat
        ({"smooth_nr": 9.0, "transform": Transform.POWER, "exponent": 0.5}, [3, 1, 1], 0, [0, 0, 0]),
    ],
)
def test_ratio_by_hand(library, team, options, sums, expected, slopes):
    totals = torch.tensor([[sums]], dtype=F64)
    spec = FinishSpec(Formula.RATIO, **PLAIN | options)
    loss, coef = run(library, totals, OVERLAP_ROWS, spec, team=team)
    near(loss, [[expected]])
    near(coef, [[slopes]])


@teams
def test_other_formulas_by_hand(library, team):
    # Generalized Dice without a class: (dr - nr)/dr
    totals = table(ROWS_G, 1, I=[3], FP=[1], FN=[1], G=[4])[:, 0]
    spec = FinishSpec(Formula.GENERALIZED, smooth_nr=1.0, smooth_dr=4.0, skipped=1)
    loss, coef = run(library, totals, ROWS_G, spec, team=team)
    near(loss, 0.75)
    assert not coef.any()
    # Weights 1/16 and, absent, the largest: (2/16 + 3/16) / (2/16 (3 + 0) + 5/16)
    totals = table(ROWS_G, 2, I=[3, 0], FP=[1, 3], FN=[1, 0], G=[4, 0])[:, 0]
    loss, coef = run(library, totals, ROWS_G, FinishSpec(Formula.GENERALIZED, **PLAIN), team=team)
    near(loss, [[5 / 11]])
    # d/dI = -2 w 5/11 / (11/16), d/dFP = w 6/16 / (11/16)^2
    near(coef[0, :, :3], [[-10 / 121, 6 / 121, 6 / 121]] * 2)
    # Matthews: tp fp fn tn = 3 1 1 7: 1 - 20/32
    rows = OVERLAP_ROWS | TN
    totals = table(rows, 1, I=[3], FP=[1], FN=[1], TN=[7])[:, 0]
    loss, coef = run(library, totals, rows, FinishSpec(Formula.MCC, **PLAIN), team=team)
    near(loss, [[12 / 32]])
    near(coef, [[[-1 / 16, 19 / 128, 19 / 128, -1 / 64]]])
    # Weighted cross entropy, w = 1 3: (1 2 + 3 1) / (1 4 + 3 2) = 1/2, twice by lambda
    rows = G | POS | N
    totals = table(rows, 2, POS=[2, 1], G=[4, 2], N=[6, 6])[:, 0]
    spec = FinishSpec(Formula.NONE, denominator=Denominator.WEIGHTS)
    weights = {"pos_weight": torch.tensor([1.0, 3.0]), "voxel_lambda": 2.0}
    loss, coef = run(library, totals, rows, spec, team=team, **weights)
    near(loss, 1.0)
    near(coef[0, :, row_index(rows, POS)], [0.2, 0.6])
    # The batch is added up first: I = 1 + 3, FP = 2, FN = 4: 6/14; both samples have the slopes of the sum
    totals = torch.tensor([[[1, 2, 1]], [[3, 0, 3]]], dtype=F64)
    spec = FinishSpec(Formula.RATIO, **PLAIN | {"batch": True})
    loss, coef = run(library, totals, OVERLAP_ROWS, spec, team=team)
    near(loss, [[6 / 14]])
    near(coef, [[[-12 / 196, 8 / 196, 8 / 196]]] * 2)
    # A label out of range
    rows = ROWS_G | BAD
    totals = table(rows, 2, I=[3, 1], FP=[1, 1], FN=[0, 2], G=[3, 3], BAD=[1, 0])[:, 0]
    loss, coef = run(library, totals, rows, FinishSpec(Formula.RATIO), team=team)
    assert loss.isnan()
    assert not coef.any()


ALL_FORMULAS = [
    *((Formula.RATIO, {"transform": transform}) for transform in Transform),
    *((Formula.GENERALIZED, {"gdl_weight": weight}) for weight in GdlWeight),
    (Formula.MCC, {}),
    (Formula.NONE, {}),
]
KINDS = ["random", "absent", "no volume", "zero"]


def product():
    """(rows, spec, samples, classes, kind): formula x reduction x denominator x batch x skipped x sums."""
    axes = itertools.product(ALL_FORMULAS, Reduction, Denominator, [False, True], [0, 1], KINDS)
    for turn, ((formula, chosen), reduction, denominator, batch, skipped, kind) in enumerate(axes):
        voxel = reduction != Reduction.NONE
        if not voxel and (formula == Formula.NONE or denominator != Denominator.ONE):
            continue
        term = (POS | N, POS | NEG | N, POS | LS | N)[turn % 3] if voxel else N
        rows = ROWS_G | term | (TN if formula == Formula.MCC else 0) | (BAD if turn % 2 else 0)
        spec = FinishSpec(
            formula,
            **chosen,
            kappa=(1.0, 2.0)[turn % 2],
            alpha=(0.3, 1.0)[turn % 2],
            beta=(0.7, 2.0)[turn % 2],
            smooth_nr=(1e-5, 0.0, 1.0)[turn % 3],
            smooth_dr=(1e-5, 1e-3)[turn // 3 % 2],
            exponent=(0.5, 0.75, 1.0, 2.0)[turn % 4],
            skipped=skipped,
            batch=batch,
            reduction=reduction,
            label_smoothing=0.1 if term & LS else 0.0,
            denominator=denominator if voxel else Denominator.ONE,
            voxel_skipped=skipped * (turn % 2),
        )
        yield turn, rows, spec, 1 + turn % 3, 2 + turn % 4, kind


@pytest.mark.parametrize("block", range(4))
def test_every_formula_equals_its_twin_and_the_twins_autograd(library, block):
    checked = 0
    for turn, rows, spec, samples, classes, kind in itertools.islice(product(), block, None, 4):
        totals = random_slots(rows, samples, 1, classes, kind, turn)[:, 0].requires_grad_()
        sizes = {"class_weight": classes - spec.skipped, "pos_weight": classes, "neg_weight": classes}
        drawn = torch.Generator().manual_seed(turn)
        weights = {n: torch.rand(size, generator=drawn, dtype=F64) for n, size in sizes.items()}
        weights |= {n: torch.rand((), generator=drawn, dtype=F64) for n in NAMES[3:]}
        weights = {n: w for at, (n, w) in enumerate(weights.items()) if (turn >> at) & 1}
        truth = formulas.finish(totals, Weights(**weights), rows, spec, False)
        loss, coef = run(library, totals.detach(), rows, spec, team=TEAMS[turn % 4], **weights)
        name = f"{spec} {kind} {(samples, classes)} {sorted(weights)}"
        assert_equal(loss, truth.detach(), f"loss {name}")
        (slope,) = torch.autograd.grad(truth.sum(), totals, allow_unused=True)
        # As in test_finish.py: autograd takes a slope as the difference of two terms of this size.
        floor = 1e-14 * torch.nan_to_num(coef, posinf=0.0, neginf=0.0).abs().max().item()
        floor += 1e-15 / spec.smooth_dr
        for bit in (1 << at for at in range(len(ROWS)) if rows >> at & 1):
            own = coef[..., row_index(rows, bit)]
            if bit & DIFFERENTIABLE:
                assert_equal(own, slope[..., row_index(rows, bit)], f"slope {row_names(bit)} {name}", floor)
            else:
                assert not own.any(), f"{row_names(bit)} {name}"
        checked += 1
    assert checked > 100
