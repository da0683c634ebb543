"""The oracle: numbers worked by hand, misquoted facts, MONAI 1.6.1, extras, then autograd."""

from __future__ import annotations

import math
import random
import warnings
from functools import partial
from math import log

import monai.losses
import pytest
import torch

from dicekernels.reference import (
    dice_ce_loss,
    dice_loss,
    generalized_dice_loss,
    region_sums,
    tversky_loss,
)
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

F64 = torch.float64


def tensor(values):
    return torch.tensor(values, dtype=F64)


def same(got, expected):
    """Equal to the number worked by hand, up to 8 eps of float64."""
    expected = torch.as_tensor(expected, dtype=F64)
    assert_close_to_truth(got, expected, expected, F64, "by hand")


# --- Worked by hand. Two classes on four voxels, given as probabilities -------------------------
#
#   p0 = 3/4 1/2 1/4 0     p1 = 1/4 1/2 3/4 1     labels 0 0 1 1
#   class 0: I = 3/4 + 1/2 = 5/4   FP = 1/4         FN = 1/4 + 1/2 = 3/4   G = 2
#   class 1: I = 3/4 + 1   = 7/4   FP = 1/4 + 1/2   FN = 1/4               G = 2

P = tensor([[[0.75, 0.5, 0.25, 0.0], [0.25, 0.5, 0.75, 1.0]]])
HALVES = torch.tensor([[[0, 0, 1, 1]]])
# labels 0 0 0 1: class 0 I = 3/2, P = 3/2, G = 3; class 1 I = 1, P = 5/2, G = 1
UNEVEN = torch.tensor([[[0, 0, 0, 1]]])
PLAIN = {"to_onehot_y": True, "smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": "none"}


def test_rows():
    rows = region_sums(P, HALVES, activation=None, to_onehot_y=True)
    assert sorted(rows) == ["FN", "FP", "G", "I", "N"]
    same(rows["I"], [[1.25, 1.75]])
    same(rows["FP"], [[0.25, 0.75]])
    same(rows["FN"], [[0.75, 0.25]])
    same(rows["G"], [[2, 2]])
    same(rows["N"], [[4, 4]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 1 - 2 I / (2 I + FP + FN): 1 - 2.5/3.5 = 2/7 and 1 - 3.5/4.5 = 2/9
        ({}, [2 / 7, 2 / 9]),
        # FP and FN twice: 2 / (2.5 + 2) and 2 / (3.5 + 2)
        ({"jaccard": True}, [4 / 9, 4 / 11]),
        # sum p^2 = 7/8 and 15/8, sum g^2 = 2: 1 - 2.5/2.875 and 1 - 3.5/3.875
        ({"squared_pred": True}, [3 / 23, 3 / 31]),
        # hard targets: min(p, g) = p g
        ({"soft_label": True}, [2 / 7, 2 / 9]),
        # 1 - (2.5 + 1) / (3.5 + 2) and 1 - (3.5 + 1) / (4.5 + 2)
        ({"smooth_nr": 1.0, "smooth_dr": 2.0}, [4 / 11, 4 / 13]),
        ({"weight": [2.0, 3.0]}, [4 / 7, 6 / 9]),
        ({"weight": 2.0}, [4 / 7, 4 / 9]),
        # scores 5/7 and 7/9
        ({"log_loss": True}, [log(7 / 5), log(9 / 7)]),
        ({"include_background": False}, [2 / 9]),
        # one channel left: its weight is ignored
        ({"include_background": False, "weight": [5.0]}, [2 / 9]),
    ],
)
def test_dice(options, expected):
    same(dice_loss(P, HALVES, **{**PLAIN, **options}), [[[f] for f in expected]])


def test_dice_reductions():
    # mean of w f, not divided by the sum of w: (4/7 + 6/9) / 2
    options = {**PLAIN, "weight": [2.0, 3.0]}
    same(dice_loss(P, HALVES, **{**options, "reduction": "mean"}), (4 / 7 + 6 / 9) / 2)
    same(dice_loss(P, HALVES, **{**options, "reduction": "sum"}), 4 / 7 + 6 / 9)


def test_batch_adds_the_samples_before_the_ratio():
    # second sample all right: I = 2, FP = FN = 0 in both classes
    p = torch.cat([P, tensor([[[1, 1, 0, 0], [0, 0, 1, 1]]])])
    labels = HALVES.expand(2, 1, 4)
    same(dice_loss(p, labels, **PLAIN), [[[2 / 7], [2 / 9]], [[0], [0]]])
    # (FP + FN) / (2 I + FP + FN) = 1 / (2 * 3.25 + 1) and 1 / (2 * 3.75 + 1)
    same(dice_loss(p, labels, **PLAIN, batch=True), [[2 / 15], [2 / 17]])


def test_log_dice_of_a_zero_score_is_bounded():
    # class 1 absent from p, present in g: score 0, clamped to 1e-7
    p, g = tensor([[[0.0, 0.0]]]), tensor([[[1.0, 0.0]]])
    same(dice_loss(p, g, smooth_nr=0.0, log_loss=True), -log(1e-7))


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma", "expected"),
    [
        # alpha FP + beta FN = .0625 + .5625 = 5/8 of 5/4 + 5/8; .1875 + .1875 = 3/8 of 7/4 + 3/8
        (0.25, 0.75, 1.0, [1 / 3, 3 / 17]),
        (0.25, 0.75, 2.0, [1 / 9, 9 / 289]),
        (0.25, 0.75, 0.5, [math.sqrt(1 / 3), math.sqrt(3 / 17)]),
        (0.5, 0.5, 1.0, [2 / 7, 2 / 9]),
        (1.0, 1.0, 1.0, [4 / 9, 4 / 11]),
    ],
)
def test_tversky(alpha, beta, gamma, expected):
    loss = tversky_loss(P, HALVES, **PLAIN, alpha=alpha, beta=beta, gamma=gamma)
    same(loss, [expected])


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_tversky_is_flat_where_the_loss_is_not_positive(gamma):
    # a perfect prediction with nr > dr: f = (dr - nr) / (I + dr) < 0
    p = tensor([[[1.0, 0.0]]]).requires_grad_()
    options = {"smooth_nr": 0.5, "smooth_dr": 0.25}
    loss = tversky_loss(p, tensor([[[1.0, 0.0]]]), gamma=gamma, **options)
    (gradient,) = torch.autograd.grad(loss, p)
    same(loss, 0.0)
    same(gradient, [[[0.0, 0.0]]])
    # gamma = 1 is MONAI's loss, negative and all: -1/4 / (1 + 1/4)
    same(tversky_loss(p, tensor([[[1.0, 0.0]]]), **options), -0.2)


@pytest.mark.parametrize(
    ("w_type", "expected"),
    [
        # w = 1/9, 1: 1 - 2 (1.5/9 + 1) / (4.5/9 + 3.5) = 1 - (7/3) / 4
        ("square", 5 / 12),
        # w = 1/3, 1: 1 - 2 (1.5/3 + 1) / (4.5/3 + 3.5) = 1 - 3 / 5
        ("simple", 2 / 5),
        # w = 1: 1 - 2 * 2.5 / 8
        ("uniform", 3 / 8),
    ],
)
def test_generalized_dice(w_type, expected):
    same(generalized_dice_loss(P, UNEVEN, **PLAIN, w_type=w_type), [[[expected]]])


def test_generalized_dice_gives_an_absent_class_the_largest_finite_weight():
    # all background: w0 = 1/16 and w1 = infinite -> 1/16: 1 - 2 * 1.5 / (1.5 + 4 + 2.5)
    same(generalized_dice_loss(P, torch.zeros_like(HALVES), **PLAIN), [[[5 / 8]]])


def test_generalized_dice_of_absent_classes_only_is_0_and_flat():
    p = P.clone().requires_grad_()
    options = {"to_onehot_y": True, "include_background": False}
    loss = generalized_dice_loss(p, torch.zeros_like(HALVES), **options)
    same(loss, 0.0)
    same(torch.autograd.grad(loss, p)[0], torch.zeros(1, 2, 4))


def test_generalized_weight_is_infinite_where_float32_says_so():
    # G = 1e-20: G^2 = 1e-40 is a float32 denormal and its inverse overflows, though not in double
    g = torch.tensor([[[1e-20, 0.0], [0.0, 1.0]]], dtype=F64)
    p = tensor([[[1.0, 0.0], [0.5, 0.5]]])
    # w = 1, 1: 1 - 2 (1e-20 + .5) / (1 + 1e-20 + 2) = 2/3
    same(generalized_dice_loss(p, g, smooth_nr=0.0, smooth_dr=0.0), 2 / 3)


# log-probabilities as logits; p_y of labels 0 0 0 1 is 3/4 1/2 1/4 1/2, of the other class
# 1/4 1/2 3/4 1/2. The product of p_y is 3/64 and of p_0 3/64, of p_1 3/64.
Q = tensor([[[0.75, 0.5, 0.25, 0.5], [0.25, 0.5, 0.75, 0.5]]])
CE = {"lambda_dice": 0.0, "softmax": True}
ONE_HOT = tensor([[[1, 1, 1, 0], [0, 0, 0, 1]]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, log(64 / 3) / 4),
        ({"reduction": "sum"}, log(64 / 3)),
        # weights 1, 3: (-ln(3/4 1/2 1/4) - 3 ln(1/2)) / (1 + 1 + 1 + 3)
        ({"weight": torch.tensor([1.0, 3.0])}, (log(32 / 3) + 3 * log(2)) / 6),
        ({"weight": [1.0, 3.0]}, (log(32 / 3) + 3 * log(2)) / 6),
        # only the foreground voxel
        ({"ce_include_background": False}, log(2)),
        # .8 CE + .2/2 * (sum over both classes of -ln p) / 4
        ({"label_smoothing": 0.2}, (0.8 * log(64 / 3) + 0.1 * 2 * log(64 / 3)) / 4),
        # smoothing is weighted, and divided by the weights of the labels
        (
            {"label_smoothing": 0.2, "weight": torch.tensor([1.0, 3.0])},
            (0.8 * (log(32 / 3) + 3 * log(2)) + 0.1 * (1 + 3) * log(64 / 3)) / 6,
        ),
        ({"ignore_index": 1}, log(32 / 3) / 3),
        ({"mask": tensor([[[2, 1, 1, 0]]])}, (2 * log(4 / 3) + log(2) + log(4)) / 4),
        ({"lambda_ce": 0.5}, log(64 / 3) / 8),
    ],
)
def test_cross_entropy_of_labels(options, expected):
    same(dice_ce_loss(Q.log(), UNEVEN, to_onehot_y=True, **{**CE, **options}), expected)


def test_cross_entropy_of_probabilities_divides_by_the_voxels():
    weight = torch.tensor([1.0, 3.0])
    loss = dice_ce_loss(Q.log(), ONE_HOT, weight=weight, **CE)
    same(loss, (log(32 / 3) + 3 * log(2)) / 4)
    # 3/4 of the label and 1/4 of the other class in the last voxel, both of p = 1/2
    soft = tensor([[[1, 1, 1, 0.25], [0, 0, 0, 0.75]]])
    loss = dice_ce_loss(Q.log(), soft, weight=weight, **CE)
    same(loss, (log(32 / 3) + (0.25 + 3 * 0.75) * log(2)) / 4)


def test_single_channel_is_binary_cross_entropy_with_positive_weight():
    # sigmoid(ln 3) = 3/4 on a positive, sigmoid(0) = 1/2 on a negative; smoothing is ignored
    z, y = tensor([[[log(3), 0.0]]]), torch.tensor([[[1, 0]]])
    options = {"lambda_dice": 0.0, "sigmoid": True, "label_smoothing": 0.3}
    same(dice_ce_loss(z, y, **options), (log(4 / 3) + log(2)) / 2)
    loss = dice_ce_loss(z, y, weight=torch.tensor([2.0]), **options)
    same(loss, (2 * log(4 / 3) + log(2)) / 2)
    same(dice_ce_loss(z, y, reduction="sum", **options), log(4 / 3) + log(2))


def test_voxel_rows():
    # softmax CE of Q, labels 0 0 0 1
    rows = region_sums(Q.log(), UNEVEN, to_onehot_y=True, voxel_term="ce")
    same(rows["POS"], [[log(32 / 3), log(2)]])
    same(rows["LS"], [[log(64 / 3), log(64 / 3)]])
    # sigmoid(ln 3) = 3/4: positive -ln(3/4), negative -ln(1/4); focal times (1/4)^2 and (3/4)^2
    z, g = tensor([[[log(3), log(3)]]]), tensor([[[1.0, 0.0]]])
    rows = region_sums(z, g, activation="sigmoid", voxel_term="bce")
    same(rows["POS"], [[log(4 / 3)]])
    same(rows["NEG"], [[log(4)]])
    rows = region_sums(z, g, activation="sigmoid", voxel_term="focal_sigmoid", gamma=2.0)
    same(rows["POS"], [[log(4 / 3) / 16]])
    same(rows["NEG"], [[log(4) * 9 / 16]])
    # background cut before the softmax: p = 3/4, 1/4 whatever channel 0 holds
    z = tensor([[[9.0, -9.0], [log(3), log(3)], [0.0, 0.0]]])
    options = {"to_onehot_y": True, "voxel_term": "focal_softmax", "gamma": 2.0}
    rows = region_sums(z, torch.tensor([[[1, 2]]]), first_class=1, **options)
    same(rows["POS"], [[0.0, log(4 / 3) / 16, log(4) * 9 / 16]])


def test_overlap_kinds_of_soft_targets():
    # two voxels p, g = .7, .4 and .2, .5
    p, g = tensor([[[0.7, 0.2]]]), tensor([[[0.4, 0.5]]])
    sums = {k: region_sums(p, g, activation=None, overlap=k) for k in ("product", "min", "squared")}
    same(sums["product"]["I"], [[0.28 + 0.1]])
    same(sums["product"]["FP"], [[0.7 * 0.6 + 0.2 * 0.5]])
    same(sums["product"]["FN"], [[0.3 * 0.4 + 0.8 * 0.5]])
    same(sums["min"]["I"], [[0.4 + 0.2]])
    same(sums["min"]["FP"], [[0.3]])
    same(sums["min"]["FN"], [[0.3]])
    same(sums["squared"]["I"], [[0.38]])
    same(sums["squared"]["FP"], [[0.7 * 0.3 + 0.2 * -0.3]])
    same(sums["squared"]["FN"], [[0.4 * -0.3 + 0.5 * 0.3]])


def test_mask_modes():
    # p = 1/2, g = 1, m = 1/2. weight: m p g. product: (m p) (m g), (m p) (1 - m g), (1 - m p) m g
    p, g, m = tensor([[[0.5]]]), tensor([[[1.0]]]), tensor([[[0.5]]])
    options = {"activation": None, "mask": m}
    for mode, expected in [("weight", (0.25, 0.0, 0.25)), ("product", (0.125, 0.125, 0.375))]:
        rows = region_sums(p, g, mask_mode=mode, **options)
        for row, value in zip(("I", "FP", "FN", "G", "N"), (*expected, 0.5, 0.5), strict=True):
            same(rows[row], [[value]])


DENSE = tensor([[[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 0, 0]]])


@pytest.mark.parametrize(
    ("target", "options", "valid"),
    [
        (torch.tensor([[[0, 1, 2, 1]]]), {"to_onehot_y": True, "ignore_index": 2}, [1, 1, 0, 1]),
        (torch.tensor([[[0, 9, 1, 9]]]), {"to_onehot_y": True, "ignore_index": 9}, [1, 0, 1, 0]),
        (torch.tensor([[0, -1, 1, 2]]), {"to_onehot_y": True, "ignore_index": -1}, [1, 0, 1, 1]),
        # 0.7 is label 0 to the one-hot, but not the 0 to be ignored
        (tensor([[[0.7, 0, 1, 2]]]), {"to_onehot_y": True, "ignore_index": 0}, [1, 0, 1, 1]),
        # dense: a class masks by its own channel, a sentinel by voxels without any class
        (DENSE, {"ignore_index": 0}, [0, 1, 1, 0.5]),
        (DENSE, {"ignore_index": 9}, [1, 1, 0, 1]),
    ],
)
def test_ignored_voxels(target, options, valid):
    p = tensor([[[0.5, 0.25, 1, 0.5]] * 3])
    rows = region_sums(p, target, activation=None, **options)
    same(rows["N"], [[sum(valid)] * 3])
    volume = 0.5 * valid[0] + 0.25 * valid[1] + valid[2] + 0.5 * valid[3]
    same(rows["I"] + rows["FP"], [[volume] * 3])


# --- Facts that widely copied texts get wrong ----------------------------------------------------


def test_concentric_squares_of_100_and_90_pixels_have_dice_0_8950():
    # 2 * 90^2 / (100^2 + 90^2) = 16200 / 18100; the number going round is 0.9121
    outer, inner = torch.zeros(2, 1, 1, 120, 120, dtype=F64)
    outer[..., 10:110, 10:110] = 1
    inner[..., 15:105, 15:105] = 1
    score = 1 - dice_loss(outer, inner, smooth_nr=0.0, smooth_dr=0.0)
    same(score, 162 / 181)
    assert round(score.item(), 4) == 0.8950


def test_slope_of_dice_is_minus_2_q_minus_i_over_q_squared():
    # class 0 of P: I = 5/4, Q = P + G = 7/2. g = 1: -2 (Q - I) / Q^2 = -18/49, not -2 (Q - 2 I) /
    # Q^2 = -8/49. g = 0: 2 I / Q^2 = 10/49.
    p = P.clone().requires_grad_()
    loss = dice_loss(p, HALVES, **{**PLAIN, "reduction": "sum"})
    (gradient,) = torch.autograd.grad(loss, p)
    same(gradient[0, 0], [-18 / 49, -18 / 49, 10 / 49, 10 / 49])


def test_minus_100_crashes_the_one_hot_unless_it_is_ignored():
    z = torch.randn(1, 2, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[[0, 1, -100, 1]]])
    with pytest.raises(RuntimeError):
        monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)(z, labels)
    with pytest.raises(RuntimeError):
        dice_ce_loss(z, labels, to_onehot_y=True, softmax=True)
    kept = [0, 1, 3]
    cropped = dice_ce_loss(z[..., kept], labels[..., kept], to_onehot_y=True, softmax=True)
    same(dice_ce_loss(z, labels, to_onehot_y=True, softmax=True, ignore_index=-100), cropped)


def test_tversky_alpha_weights_false_positives_and_beta_false_negatives():
    half, full = tensor([[[1.0, 0.0]]]), tensor([[[1.0, 1.0]]])
    options = {"alpha": 0.25, "beta": 4.0, "smooth_nr": 0.0, "smooth_dr": 0.0}
    same(tversky_loss(full, half, **options), 0.25 / 1.25)  # I = 1, FP = 1
    same(tversky_loss(half, full, **options), 4 / 5)  # I = 1, FN = 1


# --- MONAI 1.6.1 in float64, values and gradients ------------------------------------------------

SHAPES = [(), (1,), (7,), (3, 4), (2, 3, 2), (2, 1, 3, 2)]


def unit(z):
    return 0.5 * torch.tanh(z) + 0.5


def negative(z):
    # far enough from 0 that no denominator of Dice comes near it
    return torch.tanh(z) - 3


def random_problem(rng, seed, *, ignore=True, acts=("none", "sigmoid", "softmax", unit)):
    """(logits, target, keywords that every loss shares) of a random problem."""
    torch.manual_seed(seed)
    b, c, space = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5]), rng.choice(SHAPES)
    act = rng.choice(acts)
    z = torch.randn(b, c, *space, dtype=F64)
    if act == "none" or (act == "softmax" and c == 1):
        z = z.sigmoid()
    options = {
        "include_background": rng.random() < 0.6,
        "to_onehot_y": rng.random() < 0.5,
        "batch": rng.random() < 0.4,
        "smooth_nr": rng.choice([1e-5, 0.0, 0.5]),
        "smooth_dr": rng.choice([1e-5, 0.25]),
        **({"other_act": act} if callable(act) else {act: True} if act != "none" else {}),
    }
    labels = torch.randint(0, max(c, 2), (b, 1, *space))
    if options["to_onehot_y"]:
        types = [torch.uint8, torch.int16, torch.int64, F64] if c > 1 else [F64]
        target = labels.to(rng.choice(types))
        target = target + 0.7 if target.is_floating_point() and c > 1 else target
    else:
        dense = torch.nn.functional.one_hot(labels[:, 0], max(c, 2)).movedim(-1, 1)[:, -c:].to(F64)
        target = rng.choice([dense, torch.rand_like(z).round(), torch.rand_like(z)])
        target = target.clone().requires_grad_()
    if ignore and rng.random() < 0.5:
        options["ignore_index"] = rng.choice([-1, 0, c - 1, 255])
        if options["ignore_index"] in (-1, 255):
            gone = torch.rand(b, 1, *space) < 0.3
            with torch.no_grad():
                value = options["ignore_index"] if options["to_onehot_y"] or c == 1 else 0
                if target.dtype == torch.uint8:
                    target = target.to(torch.int64)
                target = target.masked_fill(gone, value).requires_grad_(target.requires_grad)
    return z.requires_grad_(), target, options


def results(loss, z, target, cotangent):
    """The loss and the gradients with respect to those inputs that want one, a 1 beside each.

    The 1 sets the scale of the rounding: MONAI subtracts a ratio from 1, and two terms of that
    size in the gradient, so that what is left may be smaller than its error.
    """
    one = torch.ones(1, dtype=F64)
    value = loss(z, target)
    inputs = [x for x in (z, target) if x.requires_grad]
    slopes = torch.autograd.grad(value, inputs, cotangent.to(value), materialize_grads=True)
    return [torch.cat([x.detach().flatten().to(F64), one]) for x in (value, *slopes)]


def nudged(x, generator):
    """x with every nonzero value moved by up to 4 units in the last place."""
    if not x.is_floating_point():
        return x
    ulps = torch.randint(-4, 5, x.shape, generator=generator)
    moved = x.detach() * (1 + ulps * torch.finfo(F64).eps)
    return moved.requires_grad_(x.requires_grad)


def run_against_monai(ours, module, z, target, options, extra, dtype=F64):
    """Both round, and nothing is more exact than float64 to tell by how much.

    So the honest error is what MONAI itself makes of inputs that differ in their last bits, the
    largest of three.
    """
    name = f"{module.__name__} {tuple(z.shape)} {target.dtype} {options} {extra}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of every option that it ignores
        monai_loss = module(**options, **extra)
        shape = monai_loss(z, target).shape
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.rand(shape, dtype=F64, generator=generator)
        truth = results(monai_loss, z, target, cotangent)
        honest = [x.clone() for x in truth]
        for _ in range(3):
            moved = results(monai_loss, nudged(z, generator), nudged(target, generator), cotangent)
            for most, exact, other in zip(honest, truth, moved, strict=True):
                most.copy_(exact + torch.maximum((most - exact).abs(), (other - exact).abs()))
    loss = partial(ours, **options, **extra)
    assert loss(z, target).shape == shape, name
    got = results(loss, z, target, cotangent)
    assert_close_to_truth(got[0], truth[0], honest[0], dtype, name)
    for slope in zip(got[1:], truth[1:], honest[1:], strict=True):
        assert_gradient_close(*slope, dtype, f"gradient of {name}")


def squared_dtype(options, extra):
    """MONAI's sum of g^2 is the square of a norm of its float32 one-hot: off by eps(float32)."""
    return torch.float32 if extra["squared_pred"] and options["to_onehot_y"] else F64


@pytest.mark.parametrize("group", range(5))
def test_dice_is_monais(group):
    rng = random.Random(group)
    for seed in range(30):
        acts = ("none", "sigmoid", "softmax", unit, negative)
        z, target, options = random_problem(rng, seed, acts=acts)
        left = z.shape[1] - (z.shape[1] > 1 and not options["include_background"])
        extra = {
            "squared_pred": rng.random() < 0.3,
            # P + G - I of negative p comes near 0
            "jaccard": rng.random() < 0.3 and options.get("other_act") is not negative,
            "soft_label": rng.random() < 0.3,
            "reduction": rng.choice(["mean", "sum", "none"]),
            "weight": rng.choice([None, 0.7, [0.5 + i for i in range(left)]]),
        }
        dtype = squared_dtype(options, extra)
        run_against_monai(dice_loss, monai.losses.DiceLoss, z, target, options, extra, dtype)


@pytest.mark.parametrize("group", range(3))
def test_tversky_is_monais(group):
    rng = random.Random(10 + group)
    for seed in range(30):
        z, target, options = random_problem(rng, seed)
        extra = {
            "alpha": rng.choice([0.5, 0.3, 1.0]),
            "beta": rng.choice([0.5, 0.7, 2.0]),
            "soft_label": rng.random() < 0.4,
            "reduction": rng.choice(["mean", "sum", "none"]),
        }
        run_against_monai(tversky_loss, monai.losses.TverskyLoss, z, target, options, extra)


@pytest.mark.parametrize("group", range(3))
def test_generalized_dice_is_monais_up_to_its_float32_weights(group):
    # MONAI's weights are float32: G, G * G and the inverse each round by eps/2, at most 2 eps
    # together, so numerator and denominator, and with them the loss, move by at most 4 eps.
    rng = random.Random(20 + group)
    for seed in range(30):
        z, target, options = random_problem(rng, seed, ignore=False)
        options["batch"] |= z.ndim == 2  # MONAI raises IndexError otherwise
        extra = {
            "w_type": rng.choice(["square", "simple", "uniform"]),
            "soft_label": rng.random() < 0.3,
            "reduction": rng.choice(["mean", "sum", "none"]),
        }
        if extra["w_type"] != "uniform":
            target = target.detach()  # MONAI's in-place weights have no gradient
        module = monai.losses.GeneralizedDiceLoss
        run_against_monai(generalized_dice_loss, module, z, target, options, extra, torch.float32)


@pytest.mark.parametrize("group", range(4))
def test_dice_ce_is_monais(group):
    rng = random.Random(30 + group)
    for seed in range(30):
        z, target, options = random_problem(rng, seed, ignore=False)
        extra = {
            "squared_pred": rng.random() < 0.3,
            "jaccard": rng.random() < 0.3,
            "reduction": rng.choice(["mean", "sum"]),
            "weight": rng.choice([None, torch.rand(z.shape[1], dtype=F64) + 0.1]),
            "lambda_dice": rng.choice([0.0, 1.0, 0.3]),
            "lambda_ce": rng.choice([0.0, 1.0, 2.5]),
            "label_smoothing": rng.choice([0.0, 0.2]),
        }
        dtype = squared_dtype(options, extra)
        run_against_monai(dice_ce_loss, monai.losses.DiceCELoss, z, target, options, extra, dtype)


def test_product_mode_is_monais_masked_dice():
    torch.manual_seed(0)
    z, m = torch.randn(2, 3, 7, dtype=F64), torch.rand(2, 1, 7, dtype=F64)
    g = torch.rand(2, 3, 7, dtype=F64)
    rows = region_sums(z, g, mask=m, mask_mode="product")
    total = 2 * rows["I"] + rows["FP"] + rows["FN"]
    ours = 1 - (2 * rows["I"] + 1e-5) / (total + 1e-5)
    theirs = monai.losses.MaskedDiceLoss(softmax=True, reduction="none")(z, g, m)[..., 0]
    assert_close_to_truth(ours, theirs, theirs, F64, "MaskedDiceLoss")


@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
def test_focal_rows_are_monais_focal_loss(use_softmax, gamma):
    # MONAI casts to float32; its mean is over B * K * V with the background out.
    torch.manual_seed(0)
    z, g = torch.randn(2, 4, 3, 5, dtype=F64), torch.rand(2, 4, 3, 5, dtype=F64)
    kind = "focal_softmax" if use_softmax else "focal_sigmoid"
    rows = region_sums(z, g, voxel_term=kind, gamma=gamma, first_class=1)
    ours = sum(rows[r][:, 1:].sum() for r in ("POS", "NEG") if r in rows) / (2 * 3 * 15)
    focal = monai.losses.FocalLoss(include_background=False, gamma=gamma, use_softmax=use_softmax)
    assert_close_to_truth(focal(z, g), ours, ours, torch.float32, "FocalLoss")


# --- Extras, and deliberate deviations from MONAI ------------------------------------------------

LOSSES = {
    "dice": dice_loss,
    "jaccard": partial(dice_loss, jaccard=True),
    "squared": partial(dice_loss, squared_pred=True),
    "log": partial(dice_loss, log_loss=True),
    "generalized": generalized_dice_loss,
    "tversky": partial(tversky_loss, alpha=0.3, beta=0.7),
    "focal tversky": partial(tversky_loss, alpha=0.3, beta=0.7, gamma=0.75),
    "dice ce": partial(dice_ce_loss, weight=[1.0, 2.0, 0.5], label_smoothing=0.1),
    "foreground ce": partial(dice_ce_loss, ce_include_background=False),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def labelled(shape=(2, 3, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, dtype=F64, generator=generator)
    return z, torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=generator)


@every_loss
def test_ignored_voxels_are_as_if_cropped(loss):
    z, y = labelled()
    y[..., 4:] = 255
    options = {"softmax": True, "to_onehot_y": True}
    same(loss(z, y, ignore_index=255, **options), loss(z[..., :4], y[..., :4], **options))
    mask = (y != 255).to(F64)
    same(loss(z, y, mask=mask, **options), loss(z[..., :4], y[..., :4], **options))


@every_loss
def test_a_voxel_of_weight_two_counts_as_two_voxels(loss):
    z, y = labelled()
    mask = torch.ones(2, 1, 6, dtype=F64)
    mask[..., 1] = 2
    twice = [0, 1, 1, 2, 3, 4, 5]
    options = {"softmax": True, "to_onehot_y": True}
    same(loss(z, y, mask=mask, **options), loss(z[..., twice], y[..., twice], **options))


@every_loss
@pytest.mark.parametrize("by", ["ignore_index", "mask"])
def test_nothing_leaks_from_masked_out_voxels(loss, by):
    z, y = labelled()
    y[..., 4:] = 255
    options = {"softmax": True, "to_onehot_y": True}
    options |= {"ignore_index": 255} if by == "ignore_index" else {"mask": (y != 255).to(F64)}
    poisoned = z.clone()
    poisoned[:, 0, 4], poisoned[:, 1, 4], poisoned[:, 2, 5] = math.nan, math.inf, -math.inf
    gradients = []
    for logits in (z.requires_grad_(), poisoned.requires_grad_()):
        value = loss(logits, y, **options)
        gradients.append(torch.autograd.grad(value, logits)[0])
        same(value, loss(z, y, **options).detach())
    same(gradients[1], gradients[0])
    same(gradients[1][..., 4:], torch.zeros(2, 3, 2))


def test_without_any_valid_voxel_the_voxel_term_is_0_and_the_overlap_term_monais():
    # torch's cross entropy gives NaN; MONAI's Dice 1 - (0 + nr) / (0 + dr)
    z, y = labelled()
    z.requires_grad_()
    options = {"softmax": True, "to_onehot_y": True, "ignore_index": 255, "smooth_dr": 2e-5}
    loss = dice_ce_loss(z, torch.full_like(y, 255), **options)
    same(loss, 0.5)
    same(torch.autograd.grad(loss, z)[0], torch.zeros(2, 3, 6))


def test_without_any_weighted_voxel_the_voxel_term_is_0():
    # nothing but background, and a cross entropy over the foreground only
    z, y = labelled()
    options = {"softmax": True, "to_onehot_y": True, "ce_include_background": False}
    both = dice_ce_loss(z, torch.zeros_like(y), **options)
    same(both, dice_loss(z, torch.zeros_like(y), softmax=True, to_onehot_y=True))


@every_loss
def test_the_mean_over_an_empty_batch_is_nan_as_in_monai(loss):
    z, y = labelled((0, 3, 6))
    assert loss(z, y, softmax=True, to_onehot_y=True).isnan()


def test_soft_label_takes_the_minimum_in_dice_ce():
    # p, g = .7, .4 and .3, .6 in one voxel: I = .4 and .3, FP = .3 and 0, FN = 0 and .3;
    # Dice (.3 / 1.1 + .3 / .9) / 2, cross entropy -.4 ln .7 - .6 ln .3
    p, g = tensor([[[0.7], [0.3]]]), tensor([[[0.4], [0.6]]])
    options = {"softmax": True, "smooth_nr": 0.0, "smooth_dr": 0.0}
    loss = dice_ce_loss(p.log(), g, soft_label=True, **options)
    same(loss, (0.3 / 1.1 + 0.3 / 0.9) / 2 - 0.4 * log(0.7) - 0.6 * log(0.3))


# --- Derivatives ---------------------------------------------------------------------------------


def assert_derivatives(function, inputs):
    """First and second, against differences; fast_mode projects the Jacobian on random vectors."""
    torch.manual_seed(2)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@every_loss
@pytest.mark.parametrize("soft_label", [False, True])
def test_first_and_second_derivatives_in_logits_target_and_mask(loss, soft_label):
    z, _ = labelled((2, 3, 2))
    torch.manual_seed(1)
    g, m = torch.rand(2, 3, 2, dtype=F64), torch.rand(2, 1, 2, dtype=F64)
    m[0, 0, 0] = 0
    inputs = [x.requires_grad_() for x in (z, g, m)]

    def run(logits, target, mask):
        options = {} if loss is LOSSES["squared"] else {"soft_label": soft_label}
        return loss(logits, target, softmax=True, mask=mask, ignore_index=1, **options)

    assert_derivatives(run, inputs)


@pytest.mark.parametrize("term", ["ce", "bce", "focal_sigmoid", "focal_softmax"])
@pytest.mark.parametrize("mode", ["weight", "product"])
def test_derivatives_of_every_row(term, mode):
    z, _ = labelled((1, 3, 2))
    torch.manual_seed(1)
    g, m = torch.rand(1, 3, 2, dtype=F64), torch.rand(1, 1, 2, dtype=F64)
    inputs = [x.requires_grad_() for x in (z, g, m)]

    def run(logits, target, mask):
        options = {"voxel_term": term, "mask": mask, "mask_mode": mode, "first_class": 1}
        return tuple(region_sums(logits, target, **options).values())

    assert_derivatives(run, inputs)


@pytest.mark.parametrize("loss", [dice_ce_loss, partial(dice_loss, sigmoid=True)])
def test_derivatives_of_a_single_channel(loss):
    z, _ = labelled((2, 1, 3))
    torch.manual_seed(1)
    g = torch.rand(2, 1, 3, dtype=F64)
    inputs = [x.requires_grad_() for x in (z, g)]
    assert_derivatives(partial(loss, weight=[2.0]), inputs)
