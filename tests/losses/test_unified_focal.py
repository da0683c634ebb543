"""The asymmetric unified focal loss: by hand, against the oracle in float64, against MONAI."""

from __future__ import annotations

import copy
import math
import pickle
import random
import warnings

import pytest
import torch
from cases import generator, laid_out, make_labels, make_mask
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from bench.measure import profiled_memory
from dicekernels import AsymmetricUnifiedFocalLoss, LabelRangeError, functional, reference, streamed
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

SHAPE = (2, 2, 4, 5, 6)
HALVES = (torch.float16, torch.bfloat16)
E = 1e-7


@pytest.fixture
def monai():
    return pytest.importorskip("monai.losses").AsymmetricUnifiedFocalLoss


def probabilities(shape=SHAPE, dtype=torch.float32, seed=0):
    uniform = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
    return (0.02 + 0.96 * uniform).to(dtype)


def data(shape=SHAPE, dtype=torch.float32, seed=0):
    return probabilities(shape, dtype, seed), make_labels((shape[0], 1, *shape[2:]), 2, torch.uint8, seed)


def value_and_gradient(loss, p, *rest):
    leaf = p.detach().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = loss(leaf, *rest)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def oracle(**options):
    return lambda p, g: reference.asymmetric_unified_focal_loss(p, g, **options)


# Two voxels, foreground p = (0.8, 0.4), g = (1, 0); delta 0.7, gamma 1/2.
#   focal: back = 0.3 (1 - 0.6)^(1/2) (-log 0.6) in the second, fore = 0.7 (-log 0.8) in the first, over 4
#   background: tp 0.6, fn 0.4, fp 0.2; foreground: tp 0.8, fn 0.2, fp 0.4
FOCAL = (0.3 * math.sqrt(0.4) * -math.log(0.6) + 0.7 * -math.log(0.8)) / 4
TVERSKY = (0.34 / (0.94 + E) + math.sqrt(0.26 / (1.06 + E))) / 2


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", ["single", "values", "labels"])
def test_by_hand(weight, form):
    fore = torch.tensor([[[[0.8, 0.4]]]], dtype=torch.float64)
    target = torch.tensor([[[[1, 0]]]])
    p = fore if form == "single" else torch.cat([1 - fore, fore], 1)
    g = torch.cat([1 - target, target], 1) if form == "values" else target
    options = {"weight": weight, "to_onehot_y": form == "labels"}
    expected = pytest.approx(weight * FOCAL + (1 - weight) * TVERSKY, rel=1e-14)
    assert AsymmetricUnifiedFocalLoss(**options)(p, g).item() == expected
    assert reference.asymmetric_unified_focal_loss(p, g, **options).item() == expected


def test_ignored_voxels_by_hand():
    # A third voxel, ignored: a false positive of 1e-7 in either class, and a voxel more in the mean.
    fore = torch.tensor([[[[0.8, 0.4, 0.9]]]], dtype=torch.float64)
    target = torch.tensor([[[[1, 0, 255]]]])
    back = (0.34 + 0.3 * E) / (0.94 + 1.3 * E)
    tversky = (back + math.sqrt((0.26 + 0.3 * E) / (1.06 + 1.3 * E))) / 2
    loss = AsymmetricUnifiedFocalLoss(to_onehot_y=True, ignore_index=255)
    value = loss(torch.cat([1 - fore, fore], 1), target)
    assert value.item() == pytest.approx((FOCAL * 2 / 3 + tversky) / 2, rel=1e-14)


def random_problem(seed):
    rng = random.Random(seed)
    form = rng.choice(["single", "labels", "values", "three"])
    channels = {"single": 1, "three": 3}.get(form, 2)
    space = rng.choice([(4, 5), (3, 4, 5), (1, 7), (1, 1, 2), (40, 50)])
    samples = rng.choice([1, 2, 3])
    dtype = rng.choice([torch.float32] * 3 + [torch.float64, *HALVES])
    p = probabilities((samples, channels, *space), dtype, seed)
    target = make_labels((samples, 1, *space), 2, torch.int64, seed)
    ignore = rng.choice([None, None, 0, 1, 255, -1])
    if form in ("values", "three"):
        target = F.one_hot(target[:, 0], channels).movedim(-1, 1)
        if ignore in (255, -1):
            target[:, :, 0] = 0
    elif ignore in (255, -1):
        target[:, :, 0] = ignore
    target = target.to(rng.choice([torch.float32, torch.int64, torch.int32, torch.float64]))
    if (
        form in ("values", "three")
        and target.is_floating_point()
        and rng.random() < 0.5
        and ignore in (None, 0, 1)
    ):
        target = 0.1 + 0.8 * target
    options = {
        "to_onehot_y": form == "labels",
        "num_classes": 2,
        "weight": rng.choice([0.5, 0.2, 1.0, 0.0]),
        "gamma": rng.choice([0.5, 0.2, 1.0, 1.5]),
        "delta": rng.choice([0.7, 0.4]),
        "reduction": rng.choice(["mean", "sum", "none"]),
        "ignore_index": ignore,
    }
    return p, target, options


@pytest.mark.parametrize("block", range(8))
def test_monai_on_random_problems(monai, block, monkeypatch):
    monkeypatch.setattr(streamed, "CPU_PIECE_ELEMENTS", 1)
    for seed in range(100 * block, 100 * block + 100):
        p, target, options = random_problem(seed)
        theirs, ours = monai(**options), AsymmetricUnifiedFocalLoss(**options)
        # MONAI's clamp and sums are void in half precision: the honest number is that of float32.
        value, gradient = value_and_gradient(ours, p, target)
        assert value.dtype == value_and_gradient(theirs, p, target)[0].dtype, seed
        assert value.shape == ()
        truth, truth_gradient = value_and_gradient(oracle(**options), p.double(), target)
        honest, honest_gradient = value_and_gradient(
            theirs,
            p.float() if p.dtype in HALVES else p,
            target.to(torch.promote_types(target.dtype, torch.int8)),
        )
        assert_close_to_truth(value, truth, honest.to(value.dtype), value.dtype, f"value {seed}")
        assert_gradient_close(
            gradient, truth_gradient, honest_gradient.to(p.dtype), p.dtype, f"gradient {seed}"
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_computed_in_float32(dtype):
    # In float16 1 - 1e-7 is 1: MONAI's upper clamp is void. Here p = 1 is clamped as in float32.
    p, target = data(dtype=dtype)
    p[0, 0], p[0, 1] = 1, 0
    loss = AsymmetricUnifiedFocalLoss(to_onehot_y=True)
    ours, gradient = value_and_gradient(loss, p, target)
    single, single_gradient = value_and_gradient(loss, p.float(), target)
    assert torch.equal(ours, single)
    assert torch.equal(gradient, single_gradient.to(dtype))


def test_certain_and_right_has_a_finite_gradient(monai):
    # The slope of (1 - D)^(1 - gamma) is infinite where 1 - D rounds to 0: NaN in MONAI.
    target = make_labels((1, 1, 8, 8), 2, torch.int64)
    p = F.one_hot(target[:, 0], 2).movedim(-1, 1).float()
    value, gradient = value_and_gradient(AsymmetricUnifiedFocalLoss(to_onehot_y=True), p, target)
    truth, _ = value_and_gradient(oracle(to_onehot_y=True), p, target)
    honest, _ = value_and_gradient(monai(to_onehot_y=True), p, target)
    assert_close_to_truth(value, truth.double(), honest, torch.float32, "value")
    assert torch.equal(gradient.isfinite(), torch.ones_like(p, dtype=torch.bool))


@pytest.mark.parametrize("form", ["single", "labels", "values"])
def test_nothing_leaks_from_ignored_voxels(form):
    p, target = data(SHAPE if form != "single" else (2, 1, 4, 5, 6), torch.float64)
    options = {"to_onehot_y": form == "labels", "ignore_index": 255}
    if form == "values":
        target = F.one_hot(target[:, 0].long(), 2).movedim(-1, 1).double()
        target[:, :, 1] = 0
    else:
        target[:, :, 1] = 255
    loss = AsymmetricUnifiedFocalLoss(**options)
    expected, expected_gradient = value_and_gradient(loss, p, target)
    p[:, :, 1] = torch.nan
    value, gradient = value_and_gradient(loss, p, target)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    assert not gradient[:, :, 1].any()


@pytest.mark.parametrize("form", ["single", "labels", "values"])
def test_voxel_weights(form):
    p, target = data(SHAPE if form != "single" else (2, 1, 4, 5, 6), torch.float64)
    options = {"to_onehot_y": form == "labels"}
    if form == "values":
        target = F.one_hot(target[:, 0].long(), 2).movedim(-1, 1)
    loss = AsymmetricUnifiedFocalLoss(**options)
    mask = make_mask("fraction", SHAPE)
    truth, truth_gradient = value_and_gradient(oracle(**options, mask=mask), p, target)
    value, gradient = value_and_gradient(lambda p, g: loss(p, g, mask=mask), p, target)
    assert_close_to_truth(value, truth, truth, torch.float64, "value")
    assert_gradient_close(gradient, truth_gradient, truth_gradient, torch.float64, "gradient")
    # Weight 2 is the voxel twice, weight 0 is its deletion, whatever it holds.
    mask = torch.ones(1, 1, 4, 5, 6)
    mask[:, :, 1], mask[:, :, 3] = 2, 0
    order = [0, 1, 1, 2]
    expected = value_and_gradient(loss, p[:, :, order], target[:, :, order])[0]
    p[:, :, 3] = torch.nan
    if form == "labels":
        target[:, :, 3] = 77
    value, gradient = value_and_gradient(lambda p, g: loss(p, g, mask=mask), p, target)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    assert not gradient[:, :, 3].any()
    # A sample without a weight, and no weight at all: nothing to learn, no NaN.
    value, gradient = value_and_gradient(lambda p, g: loss(p, g, mask=0 * mask), p, target)
    assert value == 0
    assert not gradient.any()


def test_gradients_of_both_orders():
    p, target = data((2, 2, 3, 4), torch.float64)
    p.requires_grad_()
    loss = AsymmetricUnifiedFocalLoss(to_onehot_y=True, gamma=0.4)
    assert gradcheck(lambda p: loss(p, target), p)
    assert gradgradcheck(lambda p: loss(p, target), p)
    soft = torch.rand_like(p).requires_grad_()
    assert gradcheck(AsymmetricUnifiedFocalLoss(), (p, soft))


def test_the_halves_have_their_own_numbers(monai):
    p, target = data(dtype=torch.float64)
    ours, theirs = AsymmetricUnifiedFocalLoss(to_onehot_y=True), monai(to_onehot_y=True)
    for loss in (ours, theirs):
        loss.weight = 0.3
        loss.gamma, loss.delta = 3.0, 0.1  # no effect, as in MONAI
        loss.asy_focal_loss.gamma, loss.asy_focal_tversky_loss.delta = 2.0, 0.2
        loss.asy_focal_loss.epsilon, loss.asy_focal_tversky_loss.epsilon = 0.1, 0.05
    torch.testing.assert_close(ours(p, target), theirs(p, target), rtol=1e-14, atol=0)
    names = ("to_onehot_y", "num_classes", "gamma", "delta", "weight", "reduction", "ignore_index")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in names)
    assert ours.state_dict() == theirs.state_dict() == {}
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert torch.equal(again(p, target), ours(p, target))
    ours.asy_focal_loss.reduction = "sum"
    with pytest.raises(ValueError, match="asy_focal_loss: got .*reduction='sum'"):
        ours(p, target)


def errors():
    p, target = data()
    hot = F.one_hot(target[:, 0].long(), 2).movedim(-1, 1)
    yield {}, p[0, 0], hot[0, 0], ValueError, "input shape must be 4 or 5"
    yield {}, p[..., None, None], hot[..., None, None], ValueError, "input shape must be 4 or 5"
    yield {}, p, target, ValueError, "ground truth has different shape"
    yield {}, p[:, :1], hot, ValueError, "ground truth has different shape"
    yield {}, p, hot[:1], ValueError, "ground truth has different shape"
    yield (
        {"to_onehot_y": True},
        p,
        hot,
        AssertionError,
        "labels should have a channel with length equal to one",
    )
    yield {"to_onehot_y": True, "num_classes": 3}, p, target, ValueError, "ground truth has different shape"
    yield {"to_onehot_y": True, "num_classes": 1}, p, 0 * target, ValueError, "class index|different shape"
    yield {"to_onehot_y": True}, p, target + 1, RuntimeError, "out of bounds|outside"
    yield {}, p, 2 * hot, ValueError, "Invalid class index found. Maximum class should be 1"
    yield {}, p[:, :1], 2 * target.long(), ValueError, "Invalid class index found. Maximum class should be 1"
    yield {}, p[:, :1], -target.long(), ValueError, "Invalid class index found. Maximum class should be 1"


@pytest.mark.parametrize("case", range(12))
def test_errors_are_monais(monai, case):
    options, p, target, error, text = list(errors())[case]
    for constructor in (monai, AsymmetricUnifiedFocalLoss):
        with pytest.raises(error, match=text):
            constructor(**options)(p, target)


def test_errors_of_our_own():
    p, target = data()
    target[1, 0, 0, 0, 3] = 6
    with pytest.raises(LabelRangeError, match=r"1 of 240 voxels .* the first is 6 \(sample 1, voxel 3\)"):
        AsymmetricUnifiedFocalLoss(to_onehot_y=True)(p, target)
    with pytest.raises(ValueError, match="mask: got shape"):
        AsymmetricUnifiedFocalLoss(to_onehot_y=True)(p, target, mask=target[:, 0])
    with pytest.raises(ValueError, match="reduction"):
        AsymmetricUnifiedFocalLoss(reduction="max")


def test_warnings_are_monais(monai):
    p, target = data((1, 1, 4, 5))
    texts = []
    for constructor in (monai, AsymmetricUnifiedFocalLoss):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            constructor(to_onehot_y=True, ignore_index=255)(p, target)
        texts.append([(w.category, str(w.message)) for w in caught])
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def test_unsigned_values_do_not_wrap(monai):
    # MONAI's -y_true of uint8 is 255 for 1; here they are the numbers that they are.
    p, target = data()
    hot = F.one_hot(target[:, 0].long(), 2).movedim(-1, 1)
    loss = AsymmetricUnifiedFocalLoss()
    assert torch.equal(loss(p, hot.byte()), loss(p, hot.float()))
    assert monai()(p, hot.byte()) < 0 < monai()(p, hot.float())


@pytest.mark.parametrize("layout", ["channels_last_3d", "batch_strided", "crop"])
def test_layouts_have_the_same_bits(layout):
    p, target = data()
    loss = AsymmetricUnifiedFocalLoss(to_onehot_y=True)
    for ours, expected in zip(
        value_and_gradient(loss, laid_out(p, layout), target),
        value_and_gradient(loss, p, target[:, 0]),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_memory():
    p, target = data((2, 2, 112, 112, 112))
    p.requires_grad_()
    loss = AsymmetricUnifiedFocalLoss(to_onehot_y=True)
    memory = profiled_memory(lambda: loss(p, target), lambda value: torch.autograd.grad(value, p))
    size, piece = p.numel() * 4, streamed.CPU_PIECE_ELEMENTS * 4
    assert memory.forward_peak < 14 * piece < 0.7 * size
    assert memory.kept / size < 0.001
    assert 0 <= memory.backward_peak - size < 14 * piece


def test_compiled_in_one_graph():
    p, target = data()
    loss = AsymmetricUnifiedFocalLoss(to_onehot_y=True, ignore_index=255)
    torch.compiler.reset()
    fast = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    truth, truth_gradient = value_and_gradient(loss, p.double(), target)
    for ours, honest in zip(
        value_and_gradient(fast, p, target), value_and_gradient(loss, p, target), strict=True
    ):
        true = truth if ours.ndim == 0 else truth_gradient
        assert_close_to_truth(ours, true, honest, torch.float32, "compiled")


def test_metatensor_in_metatensor_out():
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
    p, target = data()
    ours = functional.asymmetric_unified_focal_loss(MetaTensor(p), MetaTensor(target), to_onehot_y=True)
    assert isinstance(ours, MetaTensor)
    plain = functional.asymmetric_unified_focal_loss(p, target, to_onehot_y=True)
    assert torch.equal(ours.as_tensor(), plain)
