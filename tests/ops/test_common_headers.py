"""csrc/common/voxel_math.h and csrc/cuda/device_math.h by themselves, on numbers of every size.

The formulas are written out here in float64 once more; slopes are those of autograd. Bounds are counts of
roundings, derived beside each function.
"""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch
from common_headers import load, pointer
from torch import Tensor
from torch.nn.functional import logsigmoid

from dicekernels.spec import Overlap

F64 = torch.float64
SIGMOID, SIGMOID_FOCAL, HARD_FOCAL, SOFTMAX_FOCAL, EXP, LOG1P, LOG_SUM, LOG2_SUM = range(4, 12)
VARIANTS = [(family, dtype) for family in ("scalar", "device") for dtype in (torch.float32, F64)]
variants = pytest.mark.parametrize(("family", "dtype"), VARIANTS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(tmp_path_factory)


class Evaluated:
    """A function on numbers of ``dtype``: what it gives, and the same numbers in float64."""

    def __init__(self, library, family, dtype, function, a, b=None, parameters=()):
        a = a.to(dtype).contiguous()
        b = (a if b is None else b).to(dtype).contiguous()
        given = torch.tensor([*parameters, 0.0], dtype=dtype)
        out = torch.full((5, a.numel()), math.nan, dtype=dtype)
        name = {torch.float32: "float", F64: "double"}[dtype]
        entry = getattr(library, f"{family}_voxel_math_{name}")
        entry(function, ctypes.c_int64(a.numel()), pointer(a), pointer(b), pointer(given), pointer(out))
        self.rows, self.a, self.b, self.parameters = out.to(F64), a.to(F64), b.to(F64), given.to(F64)
        self.eps, self.tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny


def assert_within(got: Tensor, truth: Tensor, bound: Tensor, *where: Tensor) -> None:
    """|got - truth| <= bound, element by element."""
    wrong = ~((got - truth).abs() <= bound)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        place = [float(x[at]) for x in where]
        raise AssertionError(
            f"{int(wrong.sum())} of {len(got)} are out, first at {place}: got {got[at].item()!r}, "
            f"truth {truth[at].item()!r}, bound {bound[at].item()!r}"
        )


def crossed(*axes: list[float]) -> tuple[Tensor, ...]:
    return tuple(
        x.flatten() for x in torch.meshgrid(*(torch.tensor(a, dtype=F64) for a in axes), indexing="ij")
    )


# Both signs, 0, what lies just beside 0 and 1, and values of a target that are no probabilities.
P = [-2.5, -1.0, -1e-3, 0.0, 1e-30, 1e-7, 0.1, 0.25, 0.5, 0.9, 1 - 2.0**-20, 1.0, 1.5, 3.0]
Z = [
    0.0,
    *(sign * x for x in (1e-8, 1e-3, 0.1, 0.7, 1, 2.5, 5, 10, 17, 30, 60, 87, 88.5, 100) for sign in (1, -1)),
]
GAMMAS = [0.0, 0.5, 1.0, 2.0, 2.5, 3.0]

TERMS = {
    Overlap.PRODUCT: lambda p, g: (p * g, p - p * g, g - p * g),
    Overlap.MIN: lambda p, g: (smaller(p, g), p.abs() - smaller(p, g), g.abs() - smaller(p, g)),
    Overlap.SQUARED: lambda p, g: (p * g, p**2 - p * g, g**2 - p * g),
    Overlap.VOXEL_SQUARED: lambda p, g: (p**2 * g, p**2 * (1 - g), (1 - p) ** 2 * g),
}


def smaller(p: Tensor, g: Tensor) -> Tensor:
    return (p.abs() + g.abs() - (p - g).abs()) / 2


@variants
@pytest.mark.parametrize("overlap", Overlap)
def test_overlap_terms_and_their_slopes(library, overlap, family, dtype):
    p, g = crossed(P, P)
    for parameters in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (-1.75, 0.625, 2.5)):
        got = Evaluated(library, family, dtype, int(overlap), p, g, parameters)
        leaf = got.a.clone().requires_grad_()
        truth = TERMS[overlap](leaf, got.b)
        # Every term is a polynomial of degree 3: at most four operations, of numbers up to this size. The
        # truth of a double has as many roundings as ours.
        size = (1 + got.a.abs()) ** 2 * (1 + got.b.abs()) ** 2
        for row, term in enumerate(truth):
            assert_within(got.rows[row], term.detach(), 8 * got.eps * size, got.a, got.b)
        mixed = sum(a * term.sum() for a, term in zip(parameters, truth, strict=True))
        slope = torch.autograd.grad(mixed, leaf)[0]
        assert_within(got.rows[3], slope, 16 * sum(map(abs, parameters)) * got.eps * size, got.a, got.b)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_overlap_terms_by_hand(library, dtype):
    # p = 3/4, g = 1/2: tp, fp, fn and d(2 tp + 3 fp + 5 fn)/dp
    quarters = {
        Overlap.PRODUCT: [3 / 8, 3 / 8, 1 / 8, (2 - 5) / 2 + 3 / 2],
        Overlap.MIN: [1 / 2, 1 / 4, 0, 3],
        Overlap.SQUARED: [3 / 8, 3 / 16, -1 / 8, (2 - 5) / 2 + 3 * (3 / 2 - 1 / 2)],
        Overlap.VOXEL_SQUARED: [9 / 32, 9 / 32, 1 / 32, 2 * (2 * 3 / 8 + 3 * 3 / 8 - 5 / 8)],
    }
    for overlap, expected in quarters.items():
        got = Evaluated(
            library, "scalar", dtype, int(overlap), torch.tensor([0.75]), torch.tensor([0.5]), (2, 3, 5)
        )
        assert got.rows[:4, 0].tolist() == expected, overlap


@variants
def test_nan_stays_nan(library, family, dtype):
    nan, one = torch.tensor([math.nan]), torch.tensor([0.5])
    for overlap in Overlap:
        got = Evaluated(library, family, dtype, int(overlap), nan, one, (1.0, 2.0, 3.0))
        assert got.rows[:2].isnan().all(), overlap
    for function in (SIGMOID, SIGMOID_FOCAL, HARD_FOCAL, SOFTMAX_FOCAL):
        assert Evaluated(library, family, dtype, function, nan, one, (2.0,)).rows[:2].isnan().all(), function


def drift(got: Evaluated, family: str, z: Tensor) -> Tensor:
    """Relative error of exp(z) in eps: the device multiplies by log2 e first, off by 1.3 eps / 2 of |z|."""
    return 1 + (z.abs() if family == "device" else torch.zeros_like(z))


@variants
def test_sigmoid(library, family, dtype):
    got = Evaluated(library, family, dtype, SIGMOID, torch.tensor(Z, dtype=F64))
    z = got.a
    truth = (torch.sigmoid(z), torch.sigmoid(-z), -logsigmoid(-z), -logsigmoid(z))
    # exp, sum, quotient, product, a polynomial of 1.34 eps and a sum; the truth has five roundings.
    for row, expected in enumerate(truth):
        assert_within(
            got.rows[row], expected, (10 + drift(got, family, z)) * got.eps * expected + got.tiny, z
        )
    assert not got.rows[4].any()  # the same probabilities without the logarithms


def bce(z: Tensor, g: Tensor) -> Tensor:
    return -g * logsigmoid(z) - (1 - g) * logsigmoid(-z)


@variants
@pytest.mark.parametrize("gamma", GAMMAS)
def test_sigmoid_focal(library, gamma, family, dtype):
    z, g = crossed(Z, [0.0, 0.1, 0.5, 0.75, 1.0])
    got = Evaluated(library, family, dtype, SIGMOID_FOCAL, z, g, (gamma,))
    leaf, g = got.a.clone().requires_grad_(), got.b
    sign = 2 * g - 1
    modulation = torch.exp(gamma * logsigmoid(-leaf * sign))
    loss = modulation * bce(leaf, g)
    slope = torch.autograd.grad(loss.sum(), leaf)[0]
    # The logarithm of the modulation is off by some eps of itself, and the cross entropy, a difference of
    # numbers of size |z|, by some eps of that.
    z, modulation = got.a, modulation.detach()
    exponent = gamma * (z.abs() + 1)
    relative = (16 + 4 * drift(got, family, z) + (8 + drift(got, family, z)) * exponent) * got.eps
    size = modulation * (z.abs() + 1)
    floor = got.tiny * (1 + z.abs())
    assert_within(got.rows[0], loss.detach(), relative * size + floor, z, g)
    assert_within(got.rows[1], slope, relative * (modulation * 2 + gamma * size) + (1 + gamma) * floor, z, g)


@variants
@pytest.mark.parametrize("gamma", GAMMAS)
def test_hard_focal(library, gamma, family, dtype):
    got = Evaluated(library, family, dtype, HARD_FOCAL, torch.tensor(Z, dtype=F64), None, (gamma,))
    leaf = got.a.clone().requires_grad_()
    loss = -torch.exp(gamma * logsigmoid(-leaf)) * logsigmoid(leaf)
    slope = torch.autograd.grad(loss.sum(), leaf)[0]
    # Products of positive numbers alone: each factor is off by its own eps, whatever its size.
    s = got.a
    relative = (24 + 3 * drift(got, family, s) * (1 + gamma) + 12 * gamma * (s.abs() + 1)) * got.eps
    floor = (1 + gamma) * got.tiny * (1 + s.abs())
    assert_within(got.rows[0], loss.detach(), relative * loss.detach() + floor, s)
    assert_within(got.rows[1], slope, relative * slope.abs() + floor, s)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_hard_and_sigmoid_focal_agree_on_hard_targets(library, dtype):
    z = torch.tensor(Z, dtype=F64)
    for gamma, g in itertools.product(GAMMAS, (0.0, 1.0)):
        soft = Evaluated(library, "scalar", dtype, SIGMOID_FOCAL, z, torch.full_like(z, g), (gamma,))
        hard = Evaluated(library, "scalar", dtype, HARD_FOCAL, z if g else -z, None, (gamma,))
        exponent, floor = gamma * (z.abs() + 1), soft.tiny * (1 + z.abs()) * (1 + gamma)
        bound = (64 + 16 * exponent) * soft.eps * (1 + gamma) * (z.abs() + 1) + floor
        assert_within(hard.rows[0], soft.rows[0], bound, z)
        assert_within((2 * g - 1) * hard.rows[1], soft.rows[1], bound, z)


@variants
@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_focal(library, gamma, family, dtype):
    log_p = [0.0, *(-(10.0**k) for k in range(-9, 3)), -0.5, -2.0, -7.0, -30.0, -88.5]
    got = Evaluated(library, family, dtype, SOFTMAX_FOCAL, torch.tensor(log_p), None, (gamma,))
    x = got.a
    p, rest = x.exp(), -torch.expm1(x)
    loss, slope = rest**gamma * -x, -(rest**gamma) * (1 + gamma * p * -x / rest)
    # 1 - p is off by the error of p and a rounding; between its ends, loss and slope are monotone in it.
    off = (2 + drift(got, family, x)) * got.eps
    low, high = (rest - off).clamp_min(0), rest + off
    relative = (16 + 8 * gamma * (1 + rest.clamp_min(got.tiny).log().abs())) * got.eps
    for row, (truth, a, b) in enumerate(
        (
            (loss, low**gamma * -x, high**gamma * -x),
            (
                slope,
                -(low**gamma) * (1 + gamma * p * -x / high.clamp_min(got.tiny)),
                -(high**gamma) * (1 + gamma * p * -x / low.clamp_min(got.eps / 2)),
            ),
        )
    ):
        if gamma == 0:
            truth = (-x, -torch.ones_like(x))[row]
            assert torch.equal(got.rows[row], truth)
            continue
        # Where p rounds to 1, the voxel is certain: loss and slope are 0.
        certain = got.rows[1] == 0
        assert bool(certain[0])
        assert (rest[certain] <= off[certain]).all()
        assert not got.rows[0][certain].any()
        size = torch.maximum(a.abs(), b.abs())
        bound = (a - b).abs() + relative * size + (1 + gamma) * got.tiny
        truth = torch.where(certain, 0.0, truth)
        assert_within(got.rows[row], truth, bound, x)


@variants
def test_exponentials_and_logarithms(library, family, dtype):
    z = torch.cat([torch.linspace(-100, 87, 4001, dtype=F64), torch.linspace(-1, 1, 2001, dtype=F64)])
    got = Evaluated(library, family, dtype, EXP, z)
    bound = (1 + drift(got, family, got.a)) * got.eps * got.a.exp() + got.tiny
    assert_within(got.rows[0], got.a.exp(), bound, got.a)
    # log1p is asked of exp(-|z|) alone. The polynomial's 3e-8 and three roundings: 1.63e-7, 1.37 eps.
    x = torch.cat([torch.linspace(0, 1, 20001, dtype=F64), 2.0 ** -torch.arange(0, 100, dtype=F64)])
    got = Evaluated(library, family, dtype, LOG1P, x)
    assert_within(got.rows[0], got.a.log1p(), 1.4 * got.eps * got.a.log1p(), got.a)
    assert got.rows[0][0] == 0


def test_the_logarithm_of_a_sum_of_exponentials(library):
    steps = torch.arange(1, 4001, dtype=torch.int32)
    one = torch.tensor(1.0).view(torch.int32)
    beside = torch.cat([one + steps, one - steps]).view(torch.float32).to(F64)
    x = torch.cat([torch.logspace(-1, 9, 200001, base=2, dtype=F64), beside])  # sums of up to 512 classes
    got = Evaluated(library, "device", torch.float32, LOG2_SUM, x)
    truth = got.a.log2()
    # Between sqrt(1/2) and sqrt(2) by the polynomial alone, 1.4e-7 of the logarithm however small that is.
    # Elsewhere an integer is added, and rounded.
    alone = (got.a >= 0.70711) & (got.a < 1.41421)
    allowed = torch.where(alone, 1.4e-7, 1.6e-7) * truth.abs()
    assert_within(got.rows[0], truth, allowed, got.a)
    for function in (LOG2_SUM, LOG_SUM):
        exact = Evaluated(library, "device", torch.float32, function, torch.tensor([1.0]))
        assert exact.rows[0].tolist() == [0.0]
    powers = 2.0 ** torch.arange(-1, 10, dtype=F64)
    got = Evaluated(library, "device", torch.float32, LOG2_SUM, powers)
    assert torch.equal(got.rows[0], powers.log2())
    got = Evaluated(library, "device", torch.float32, LOG_SUM, x)
    # times log 2, a float number, and rounded
    assert_within(got.rows[0], got.a.log(), (1.6e-7 + got.eps) * got.a.log().abs(), got.a)
    assert Evaluated(library, "device", torch.float32, LOG2_SUM, torch.tensor([math.nan])).rows[0].isnan()
