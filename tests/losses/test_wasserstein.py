"""The generalized Wasserstein Dice loss: by hand, against the oracle in float64, against MONAI."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from cases import laid_out, make_labels, make_logits, make_mask
from torch.autograd import gradcheck, gradgradcheck

import dicekernels.dropin.monai
from bench.measure import profiled_memory
from dicekernels import GeneralizedWassersteinDiceLoss, LabelRangeError, functional, reference, streamed
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

THREE = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.5], [1.0, 0.5, 0.0]]
SHAPE = (2, 3, 4, 5, 6)
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def monai():
    return pytest.importorskip("monai.losses").GeneralizedWassersteinDiceLoss


def data(shape=SHAPE, dtype=torch.float32, seed=0, labels=torch.uint8):
    return make_logits(shape, dtype, seed), make_labels((shape[0], 1, *shape[2:]), shape[1], labels, seed + 1)


def value_and_gradient(loss, logits, *rest):
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, *rest)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


# Two voxels, p = (1/2, 1/4, 1/4) with label 1 and (1/4, 1/4, 1/2) with label 0:
#   W = M[1].p = 1/2 + 1/8 = 5/8 and M[0].p = 1/4 + 1/2 = 3/4
# default: TP = 1 - 5/8 = 3/8, E = 11/8,              1 - 2TP / (2TP + E) = 1 - 6/17 = 11/17
# GDL: a = 1/(1 + 1), TP = (3/8 + 1/4)/2 = 5/16, sum a (2 - W) = 21/16,     1 - 10/21 = 11/21
@pytest.mark.parametrize(("mode", "expected"), [("default", 11 / 17), ("GDL", 11 / 21)])
def test_by_hand(mode, expected):
    p = torch.tensor([[[0.5, 0.25], [0.25, 0.25], [0.25, 0.5]]], dtype=torch.float64)
    target = torch.tensor([[1, 0]])
    loss = GeneralizedWassersteinDiceLoss(THREE, mode, smooth_nr=0, smooth_dr=0)
    assert loss(p.log(), target).item() == pytest.approx(expected, rel=1e-14)
    oracle = reference.generalized_wasserstein_dice_loss(
        p.log(), target, THREE, weighting_mode=mode, smooth_nr=0, smooth_dr=0
    )
    assert oracle.item() == pytest.approx(expected, rel=1e-14)


def test_mistaking_a_near_class_costs_less():
    # All mass on the wrong foreground class: W = 1/2, TP = 1/2, E = 1/2, loss 1/3. On the background: 1.
    target = torch.tensor([[[1]]])
    loss = GeneralizedWassersteinDiceLoss(THREE, smooth_nr=0, smooth_dr=0)
    near = loss(torch.tensor([[[-1e3], [-1e3], [1e3]]]).double(), target)
    far = loss(torch.tensor([[[1e3], [-1e3], [-1e3]]]).double(), target)
    perfect = loss(torch.tensor([[[-1e3], [1e3], [-1e3]]]).double(), target)
    assert (near.item(), far.item(), perfect.item()) == (pytest.approx(1 / 3, rel=1e-14), 1.0, 0.0)


def random_problem(seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    classes, samples = rng.choice([2, 3, 3, 4, 7, 20]), rng.choice([1, 2, 3])
    space = rng.choice([(19,), (4, 5), (3, 4, 5), (3, 3, 1, 4), (70, 60)])
    dtype = rng.choice([torch.float32] * 3 + [torch.float64, *HALVES])
    matrix = torch.rand(classes, classes, generator=generator, dtype=torch.float64)
    matrix = rng.choice([1, 1, 3]) * (matrix + matrix.T)
    matrix.fill_diagonal_(0)
    kind = rng.choice(["float64 array", "float32 array", "float32", "integers"])
    if kind == "integers":
        matrix = 1 - torch.eye(classes, dtype=torch.int64)
    elif kind == "float64 array":
        matrix = matrix.numpy()
    else:
        matrix = matrix.float() if kind == "float32" else matrix.float().numpy()
    logits = make_logits((samples, classes, *space), dtype, seed)
    shape = rng.choice([(samples, 1, *space), (samples, *space)])
    target = make_labels(shape, classes, rng.choice([torch.uint8, torch.int64, torch.float32]), seed)
    options = {
        "weighting_mode": rng.choice(["default", "GDL"]),
        "reduction": rng.choice(["mean", "sum", "none"]),
    }
    # A smoothing that brings the loss near 0 leaves nothing but rounding to compare.
    options["smooth_nr"], options["smooth_dr"] = rng.choice([(1e-5, 1e-5), (0.0, 1e-3), (0.1, 0.6)])
    return matrix, logits, target, options


@pytest.mark.parametrize("block", range(8))
def test_monai_on_random_problems(monai, block, monkeypatch):
    monkeypatch.setattr(streamed, "CPU_PIECE_ELEMENTS", 1)
    for seed in range(100 * block, 100 * block + 100):
        matrix, logits, target, options = random_problem(seed)
        theirs, ours = monai(matrix, **options), GeneralizedWassersteinDiceLoss(matrix, **options)
        assert torch.equal(theirs.m, ours.m)
        # MONAI sums half precision in half precision: the honest number is that of float32.
        honest, honest_gradient = value_and_gradient(
            theirs, logits.float() if logits.dtype in HALVES else logits, target
        )
        value, gradient = value_and_gradient(ours, logits, target)
        assert value.dtype == theirs(logits, target).dtype, seed
        assert gradient.dtype == logits.dtype
        truth, truth_gradient = value_and_gradient(
            lambda z, y, matrix=ours.m, options=options: reference.generalized_wasserstein_dice_loss(
                z, y, matrix, **options
            ),
            logits.double(),
            target,
        )
        working = torch.float64 if logits.dtype == torch.float64 else torch.float32
        assert_close_to_truth(value, truth, honest, working, f"value {seed}")
        assert_gradient_close(
            gradient, truth_gradient, honest_gradient.to(logits.dtype), logits.dtype, f"gradient {seed}"
        )


@pytest.mark.parametrize("mode", ["default", "GDL"])
@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [((2, 3), (2,)), ((2, 3), (2, 1)), ((2, 3, 1), (2,)), ((2, 3, 4, 1), (2, 2, 2))],
)
def test_shapes_that_monai_takes(monai, mode, shape, target_shape):
    logits, target = make_logits(shape, torch.float64), make_labels(target_shape, 3)
    for reduction in ("none", "mean"):
        matrix = torch.tensor(THREE, dtype=torch.float64)
        theirs = value_and_gradient(monai(matrix, mode, reduction), logits, target)
        ours = value_and_gradient(GeneralizedWassersteinDiceLoss(matrix, mode, reduction), logits, target)
        for a, b in zip(ours, theirs, strict=True):
            # MONAI's volumes and their weights are float32.
            assert_close_to_truth(a, b, b, torch.float32 if mode == "GDL" else torch.float64, mode)


@pytest.mark.parametrize("mode", ["default", "GDL"])
@pytest.mark.parametrize("extra", ["ignore", "mask", "both"])
def test_extras_against_the_oracle(mode, extra):
    logits, target = data()
    options = {"weighting_mode": mode, "reduction": "none"}
    if extra != "mask":
        target[:, :, 1] = 255
        options["ignore_index"] = 255
    if extra != "ignore":
        options["mask"] = make_mask("fraction", SHAPE)
    truth, truth_gradient = value_and_gradient(
        lambda z, y: reference.generalized_wasserstein_dice_loss(z, y, THREE, **options),
        logits.double(),
        target,
    )
    honest, honest_gradient = value_and_gradient(
        lambda z, y: reference.generalized_wasserstein_dice_loss(z, y, THREE, **options), logits, target
    )
    value, gradient = value_and_gradient(
        lambda z, y: functional.generalized_wasserstein_dice_loss(z, y, THREE, **options), logits, target
    )
    assert_close_to_truth(value, truth, honest, torch.float32, "value")
    assert_gradient_close(gradient, truth_gradient, honest_gradient, torch.float32, "gradient")


@pytest.mark.parametrize("mode", ["default", "GDL"])
def test_ignored_voxels_are_as_deleted(mode):
    logits, target = data(dtype=torch.float64)
    logits[:, :, 2:], target[:, :, 2:] = torch.nan, 200
    loss = GeneralizedWassersteinDiceLoss(THREE, mode, ignore_index=200)
    value, gradient = value_and_gradient(loss, logits, target)
    kept, kept_gradient = value_and_gradient(
        GeneralizedWassersteinDiceLoss(THREE, mode), logits[:, :, :2], target[:, :, :2]
    )
    torch.testing.assert_close(value, kept, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient[:, :, :2], kept_gradient, rtol=1e-13, atol=0)
    assert not gradient[:, :, 2:].any()
    # A mask of 0 does the same, whatever the labels are.
    mask = torch.ones_like(target, dtype=torch.float64)
    mask[:, :, 2:] = 0
    masked = GeneralizedWassersteinDiceLoss(THREE, mode)(logits, target, mask=mask)
    torch.testing.assert_close(masked, kept, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", ["default", "GDL"])
def test_a_weight_of_two_is_the_voxel_twice(mode):
    logits, target = data(dtype=torch.float64)
    mask = torch.ones(1, 1, *SHAPE[2:])
    mask[:, :, 1] = 2
    loss = GeneralizedWassersteinDiceLoss(THREE, mode, reduction="none")
    twice = loss(torch.cat([logits, logits[:, :, 1:2]], 2), torch.cat([target, target[:, :, 1:2]], 2))
    torch.testing.assert_close(loss(logits, target, mask=mask), twice, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", ["default", "GDL"])
def test_gradients_of_both_orders(mode):
    logits, target = data((2, 3, 2, 3), torch.float64)
    logits.requires_grad_()
    loss = GeneralizedWassersteinDiceLoss(THREE, mode, reduction="none")
    assert gradcheck(lambda z: loss(z, target), logits)
    assert gradgradcheck(lambda z: loss(z, target), logits)


def test_an_empty_batch_is_the_mean_of_nothing():
    logits, target = torch.randn(0, 3, 4, requires_grad=True), torch.zeros(0, 4)
    assert GeneralizedWassersteinDiceLoss(THREE, reduction="sum")(logits, target) == 0
    assert GeneralizedWassersteinDiceLoss(THREE)(logits, target).isnan()


def test_gradient_of_the_matrix(monai):
    logits, target = data((2, 3, 2, 3), torch.float64)
    results = []
    for constructor in (monai, GeneralizedWassersteinDiceLoss):
        matrix = torch.tensor(THREE, dtype=torch.float64).mul(2).requires_grad_()
        results.append(torch.autograd.grad(constructor(matrix)(logits, target), matrix)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-16)


def test_attributes_and_errors_of_the_constructor(monai):
    matrix = 4 * np.array(THREE)
    for constructor in (monai, GeneralizedWassersteinDiceLoss):
        loss = constructor(matrix, "GDL", "sum", 1, 2)
        assert torch.equal(loss.m, torch.tensor(THREE, dtype=torch.float64))
        assert (loss.alpha_mode, loss.reduction, loss.num_classes) == ("GDL", "sum", 3)
        assert (loss.smooth_nr, loss.smooth_dr) == (1.0, 2.0)
        assert not loss.state_dict()
        assert constructor(1 - torch.eye(2, dtype=torch.int64)).m.dtype == torch.int64
        with pytest.raises(ValueError, match="dist_matrix must be C x C, got 2 x 3"):
            constructor(np.ones((2, 3)))
        with pytest.raises(ValueError, match="weighting_mode"):
            constructor(matrix, "gdl")
        with pytest.raises(ValueError, match="reduction|LossReduction"):
            constructor(matrix, reduction="max")


def test_attributes_take_effect():
    logits, target = data()
    loss = GeneralizedWassersteinDiceLoss(THREE)
    loss.alpha_mode, loss.reduction, loss.smooth_nr = "GDL", "sum", 0.5
    loss.m = loss.m**2
    expected = GeneralizedWassersteinDiceLoss(np.square(THREE), "GDL", "sum", 0.5)(logits, target)
    assert loss(logits, target).item() == pytest.approx(expected.item(), rel=1e-6)
    again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(again(logits, target), loss(logits, target))


def test_errors_of_the_data(monai):
    logits, target = data()
    loss = GeneralizedWassersteinDiceLoss(THREE)
    for constructor in (monai, GeneralizedWassersteinDiceLoss):
        with pytest.raises(RuntimeError):  # MONAI: out of bounds
            constructor(THREE if constructor is not monai else torch.tensor(THREE))(logits, target + 5)
        with pytest.raises(RuntimeError):
            constructor(torch.tensor(THREE))(torch.randn(2, 4, 4, 5, 6), target)
        with pytest.raises(RuntimeError):
            constructor(torch.tensor(THREE))(logits, target[:, :, :2])
        with pytest.raises(NotImplementedError):
            constructor(torch.tensor(THREE))(logits.long(), target)
    target[1, 0, 0, 0, 2] = 7
    with pytest.raises(LabelRangeError, match=r"1 of 240 voxels .* the first is 7 \(sample 1, voxel 2\)"):
        loss(logits, target)
    with pytest.raises(ValueError, match="mask: got shape"):
        loss(logits, target.clamp(max=2), mask=torch.ones(2, 3, 4, 5, 6))
    with pytest.raises(TypeError, match="target: got list"):
        loss(logits, [0])


@pytest.mark.parametrize("layout", ["channels_last_3d", "class_slice", "crop"])
def test_layouts_have_the_same_bits(layout):
    logits, target = data()
    loss = GeneralizedWassersteinDiceLoss(THREE, "GDL")
    for ours, expected in zip(
        value_and_gradient(loss, laid_out(logits, layout), target),
        value_and_gradient(loss, logits, target),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_same_bits_on_any_number_of_threads():
    logits, target = data((2, 3, 40, 40, 40))
    loss, before, seen = GeneralizedWassersteinDiceLoss(THREE, "GDL"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            seen.append(value_and_gradient(loss, logits, target))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_memory():
    logits, target = data((1, 4, 96, 96, 96))
    logits.requires_grad_()
    loss = GeneralizedWassersteinDiceLoss(1 - np.eye(4), "GDL")
    memory = profiled_memory(lambda: loss(logits, target), lambda v: torch.autograd.grad(v, logits))
    size, piece = logits.numel() * 4, streamed.CPU_PIECE_ELEMENTS * 4
    assert memory.forward_peak < 6 * piece < 0.7 * size
    assert memory.kept / size < 0.001
    assert 0 <= memory.backward_peak - size < 6 * piece


def test_compiled_in_one_graph():
    logits, target = data()
    loss = GeneralizedWassersteinDiceLoss(THREE, "GDL", ignore_index=1)
    torch.compiler.reset()
    fast = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    value, gradient = value_and_gradient(fast, logits, target)
    eager, eager_gradient = value_and_gradient(loss, logits, target)
    truth, truth_gradient = value_and_gradient(loss, logits.double(), target)
    assert_close_to_truth(value, truth, eager, torch.float32, "value")
    assert_gradient_close(gradient, truth_gradient, eager_gradient, torch.float32, "gradient")
    # No graph reads a count: a label out of range is NaN, and weights survive.
    target[0, 0, 0, 0, 0] = 9
    value, gradient = value_and_gradient(fast, logits, target)
    assert value.isnan()
    assert not gradient.any()


def test_metatensor_in_metatensor_out():
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
    logits, target = data()
    loss = GeneralizedWassersteinDiceLoss(THREE)
    ours = loss(MetaTensor(logits), MetaTensor(target))
    assert isinstance(ours, MetaTensor)
    assert torch.equal(ours.as_tensor(), loss(logits, target))
    assert dicekernels.dropin.monai.generalized_wasserstein_dice is GeneralizedWassersteinDiceLoss
