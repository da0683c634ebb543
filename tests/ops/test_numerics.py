"""Where plain float sums fail: many voxels, half precision, extreme logits, offsets beyond 2^31."""

from __future__ import annotations

import tempfile

import pytest
import torch
from cases import generator, gradient, make_labels, make_logits, oracle_rows

import dicekernels
from dicekernels import functional, reference, region_sums
from dicekernels.spec import OVERLAP_ROWS, FinishSpec, Formula, G
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

F64 = torch.float64
HOT = {"to_onehot_y": True, "softmax": True}
CT_VOXELS = 512 * 512 * 300  # 78643200 > 4 * 2^24


#
# One random slice seen 300 times, so that the truth is 300 times its sums. As the slices have no
# common voxel stride, the kernels take a copy of 629 MB.


def slices_of_a_ct():
    logits = make_logits((1, 2, 1, 512, 512))
    labels = (torch.rand(1, 1, 1, 512, 512, generator=generator(1)) < 0.98).to(torch.uint8)
    return logits, labels


def stacked(x):
    return x.expand(*x.shape[:2], 300, *x.shape[3:])


def test_79_million_voxels():
    # One fp32 accumulator stops at 2^24 = 16777216: adding 1 to it changes nothing.
    assert torch.tensor(2.0**24).add(1).item() == 2.0**24
    logits, labels = slices_of_a_ct()
    sums = region_sums(stacked(logits), stacked(labels), voxel_term="ce")
    truth, honest = (oracle_rows(logits, labels, dtype, voxel_term="ce") for dtype in (F64, torch.float32))
    assert sums.N.tolist() == [[CT_VOXELS, CT_VOXELS]]
    assert torch.equal(sums.G, 300 * truth["G"])
    assert sums.G[0, 1] > 77e6
    for row in truth:
        assert_close_to_truth(
            getattr(sums, row), 300 * truth[row], 300 * honest[row].double(), torch.float32, row
        )


@pytest.mark.parametrize("name", ["dice_loss", "generalized_dice_loss", "tversky_loss", "dice_ce_loss"])
def test_losses_of_79_million_voxels(name):
    logits, labels = slices_of_a_ct()
    ours = getattr(functional, name)(stacked(logits), stacked(labels), **HOT)
    # The oracle on one slice: its smoothing shrinks with the sums; those of GDL, divided by G^2, grow.
    smooth = 1e-5 * 300 if name == "generalized_dice_loss" else 1e-5 / 300
    truth = getattr(reference, name)(logits.double(), labels, smooth_nr=smooth, smooth_dr=smooth, **HOT)
    assert abs(ours.double() - truth) / truth < 1e-6


@pytest.mark.parametrize("p", [0.99999, 0.9, 0.7, 0.11])
def test_a_uniform_background(p, backend):
    # Air: voxels of one value round alike at every addition, so errors add up instead of cancelling.
    values = torch.full((1, 1, 4096), p)
    sums = region_sums(values, torch.zeros(1, 1, 4096), activation=None)
    honest = values.sum().view(1, 1).double()
    assert_close_to_truth(sums.FP, 4096 * values[..., 0].double(), honest, torch.float32, f"p = {p}")


def test_generalized_dice_weights_below_float32():
    # 1/G^2 of 7.9e7 voxels is 1.6e-16: nothing beside an fp32 sum of 1, all there is here.
    rows = {"I": 6e7, "FP": 5e5, "FN": 1.8e7, "G": float(CT_VOXELS)}
    slots = torch.tensor([[[list(rows.values())]]], dtype=F64)
    spec = FinishSpec(Formula.GENERALIZED, smooth_nr=0.0, smooth_dr=0.0)
    loss, _ = torch.ops.dicekernels.finish(slots, *[None] * 5, OVERLAP_ROWS | G, *spec.args(False), F64)
    wrong = rows["FP"] + rows["FN"]
    expected = wrong / (2 * rows["I"] + wrong)
    assert abs(loss.item() - expected) <= 8 * torch.finfo(F64).eps * expected


@pytest.mark.slow
def test_a_real_volume_of_79_million_voxels():
    logits = torch.randn(1, 2, 512, 512, 300, generator=generator(0))
    labels = (torch.rand(1, 1, 512, 512, 300, generator=generator(1)) < 0.98).to(torch.uint8)
    ours = region_sums(logits, labels, voxel_term="ce")
    p = torch.sigmoid((logits[:, 1] - logits[:, 0]).double())
    inside = labels[:, 0].bool()
    hits = p[inside].sum()
    assert abs(ours.I[0, 1] - hits) / hits < 1e-7
    missed = (1 - p)[inside].sum()
    assert abs(ours.FN[0, 1] - missed) / missed < 1e-7
    assert ours.G[0, 1] == inside.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["dice_loss", "generalized_dice_loss", "tversky_loss", "dice_ce_loss"])
def test_more_voxels_than_a_half_can_count(name, dtype, backend):
    shape = (1, 2, 48, 48, 48)  # 110592 > 65504, the largest float16; bfloat16 counts to 256
    logits, labels = make_logits(shape, dtype), make_labels((1, 1, *shape[2:]), 2)
    function, oracle = getattr(functional, name), getattr(reference, name)
    ours = function(logits, labels, **HOT)
    truth = oracle(logits.double(), labels, **HOT)
    assert_close_to_truth(
        ours, truth, oracle(logits.float(), labels, **HOT).to(ours.dtype), ours.dtype, f"{name} {dtype}"
    )
    got = gradient(lambda z: function(z, labels, **HOT), logits)
    truth = gradient(lambda z: oracle(z, labels, **HOT), logits, F64)
    honest = gradient(lambda z: oracle(z, labels, **HOT), logits, torch.float32).to(dtype)
    assert_gradient_close(got, truth, honest, dtype, name)


def test_the_amp_scale_keeps_half_gradients_alive(backend):
    # A slope of Dice is about 1/V = 4e-6: below 6e-8 after p (1 - p) / C, so float16 flushes it.
    shape = (2, 4, 40, 40, 40)
    logits, labels = make_logits(shape, torch.float16), make_labels((2, 1, *shape[2:]), 4)
    plain = gradient(lambda z: functional.dice_ce_loss(z, labels, **HOT).float(), logits)
    scaled = gradient(lambda z: 65536.0 * functional.dice_ce_loss(z, labels, **HOT).float(), logits)
    truth = 65536.0 * gradient(lambda z: reference.dice_ce_loss(z, labels, **HOT), logits, F64)
    honest = 65536.0 * gradient(lambda z: reference.dice_ce_loss(z, labels, **HOT), logits, torch.float32)
    assert_gradient_close(scaled, truth, honest.half(), torch.float16, "scaled")
    nonzero = truth != 0
    assert (scaled[nonzero] == 0).double().mean() < 0.001
    # The scale enters before the rounding to half: the plain gradient has lost what this one has.
    assert (plain[nonzero] == 0).double().mean() > 0.01


def mixed(rows):
    """Every row that depends on the logits, each with another factor."""
    names = [name for name in ("I", "FP", "FN", "POS", "NEG", "LS") if rows.get(name) is not None]
    return sum((at + 1) * rows[name].sum() for at, name in enumerate(names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, F64])
@pytest.mark.parametrize("kind", ["large", "equal", "shifted"])
def test_extreme_logits(kind, dtype, backend):
    shape = (2, 3, 700)
    logits = {
        "large": 1e4 * torch.randint(-1, 2, shape, generator=generator(0)),
        "equal": torch.full(shape, 7.5),
        "shifted": make_logits(shape) + 3000,
    }[kind].to(dtype)
    labels = make_labels((2, 1, 700), 3)
    for options in ({"voxel_term": "ce"}, {"activation": "sigmoid", "voxel_term": "bce"}):
        single = torch.promote_types(dtype, torch.float32)
        ours = region_sums(logits, labels, **options)
        truth, honest = (oracle_rows(logits, labels, k, **options) for k in (F64, single))
        for row in truth:
            assert_close_to_truth(getattr(ours, row), truth[row], honest[row], single, f"{row} {kind}")
        got = gradient(lambda z, o=options: mixed(region_sums(z, labels, **o)._asdict()), logits)
        truth, honest = (
            gradient(lambda z, o=options, k=k: mixed(oracle_rows(z, labels, k, **o)), logits, k)
            for k in (F64, single)
        )
        assert_gradient_close(got, truth, honest.to(dtype), dtype, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64])
def test_a_class_that_is_ruled_out(dtype, backend):
    # -inf for a class that no voxel has: its p is 0, its gradient 0, the loss finite.
    logits, labels = make_logits((2, 4, 300), dtype), make_labels((2, 1, 300), 3)
    logits[:, 3] = -torch.inf
    for loss in (functional.dice_ce_loss, functional.generalized_dice_loss, functional.tversky_loss):
        oracle = getattr(reference, loss.__name__)
        ours = loss(logits, labels, **HOT)
        got = gradient(lambda z, f=loss: f(z, labels, **HOT), logits)
        assert torch.equal(got[:, 3], torch.zeros_like(got[:, 3]))
        # -1e4 underflows to p = 0 as well and is no infinity for the oracle's one-hot products.
        low = torch.where(logits.isinf(), -1e4, logits.double()).to(dtype)
        wide, single = (
            oracle(low.to(k), labels, **HOT) for k in (F64, torch.promote_types(dtype, torch.float32))
        )
        assert_close_to_truth(ours, wide, single.to(ours.dtype), ours.dtype, loss.__name__)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_focal_slope_of_a_certain_voxel_is_zero(gamma, backend):
    # (1 - p)^gamma has an infinite slope at p = 1 for gamma < 1; times -log p it tends to 0.
    logits, labels = torch.tensor([[[50.0, 0.3], [-50.0, 1.0]]]), torch.tensor([[[0, 1]]])
    got = gradient(
        lambda z: region_sums(z, labels, voxel_term="focal_softmax", gamma=gamma).POS.sum(), logits
    )
    assert torch.equal(got[..., 0], torch.zeros(1, 2))
    assert got[0, 1, 1] < -0.09


def test_nan_in_a_counted_voxel_gives_nan(backend):
    logits, labels = make_logits((2, 3, 50)), make_labels((2, 1, 50), 3)
    logits[1, 2, 7] = torch.nan
    terms = functional.dice_loss(logits, labels, reduction="none", **HOT)
    assert terms.isnan().flatten(1).all(1).tolist() == [False, True]
    assert functional.dice_ce_loss(logits, labels, **HOT).isnan()


def test_a_nearly_perfect_prediction_keeps_its_digits(backend):
    # 1 - score of float32 sums is 0 or 1e-7 in steps; the loss itself is 2e-9.
    labels = make_labels((1, 1, 5000), 2)
    logits = torch.where(labels == torch.arange(2).view(1, 2, 1), 10.0, -10.0)
    ours = functional.dice_loss(logits, labels, smooth_nr=0.0, smooth_dr=0.0, **HOT)
    truth, honest = (
        reference.dice_loss(logits.to(k), labels, smooth_nr=0.0, smooth_dr=0.0, **HOT)
        for k in (F64, torch.float32)
    )
    assert truth < 3e-9
    assert_close_to_truth(ours, truth, honest, torch.float32, "dice")


@pytest.mark.slow
def test_more_than_two_to_the_31_elements_in_space():
    voxels = 2**31 + 12345
    logits = torch.tensor([[[0.5]]]).expand(1, 1, voxels)
    values = torch.tensor([[[0.25]]]).expand(1, 1, voxels)
    sums = region_sums(logits, values, activation=None)
    assert sums.N.item() == voxels
    assert sums.I.item() == voxels * 0.125
    assert sums.FP.item() == voxels * 0.375


def test_offsets_beyond_two_to_the_31():
    # Real memory far apart: classes 2^30 elements away from each other, of a file that holds nothing else.
    stride = 2**30
    with tempfile.NamedTemporaryFile() as file:
        store = torch.from_file(file.name, shared=True, size=3 * stride + 100, dtype=torch.float16)
        logits = store.as_strided((1, 4, 100), (4 * stride, stride, 1))
        near = make_logits((1, 4, 100), torch.float16)
        logits.copy_(near)
        labels = make_labels((1, 1, 100), 4)
        far_sums = region_sums(logits, labels, voxel_term="ce")
        near_sums = region_sums(near, labels, voxel_term="ce")
        assert all(torch.equal(a, b) for a, b in zip(far_sums, near_sums, strict=True) if a is not None)
        grads = [gradient(lambda z: dicekernels.DiceCELoss(**HOT)(z, labels), z) for z in (logits, near)]
        assert torch.equal(*grads)
