"""The oracle against numbers worked by hand, and facts that widely copied texts get wrong.

Two classes on four voxels, given as probabilities:

    p0 = 3/4 1/2 1/4 0     p1 = 1/4 1/2 3/4 1     labels 0 0 1 1
    class 0: I = 3/4 + 1/2 = 5/4   FP = 1/4         FN = 1/4 + 1/2 = 3/4   G = 2
    class 1: I = 3/4 + 1   = 7/4   FP = 1/4 + 1/2   FN = 1/4               G = 2
"""

from __future__ import annotations

import math
from math import log, sqrt

import monai.losses
import pytest
import torch
from reference_cases import F64, HALVES, ONE_HOT, PLAIN, UNEVEN, P, Q, same, tensor

from dicekernels.reference import (
    dice_ce_loss,
    dice_loss,
    generalized_dice_loss,
    masked_dice_loss,
    mcc_loss,
    region_sums,
    tversky_loss,
)


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


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        # TN = 3/4 + 1 = 7/4 and 3/4 + 1/2 = 5/4. Both classes: 35/16 - 3/16 = 2, and 3/2 * 2 * 2 * 5/2 = 15
        (HALVES, {}, [1 - 2 / sqrt(15)] * 2),
        (HALVES, {"smooth_nr": 1.0, "smooth_dr": 1.0}, [1 - 3 / 4] * 2),
        (HALVES, {"include_background": False}, [1 - 2 / sqrt(15)]),
        # class 0: TP, TN, FP, FN = 3/2, 1, 0, 3/2: 3/2 over the root of 3/2 * 3 * 1 * 5/2 = 45/4
        (UNEVEN, {}, [1 - 1 / sqrt(5)] * 2),
        # class 0 without the last voxel: TN = 3/4: 15/16 - 3/16 over the root of 3/2 * 2 * 1 * 3/2 = 9/2
        (HALVES, {"mask": tensor([[[1, 1, 1, 0]]])}, [1 - sqrt(2) / 4] * 2),
        (torch.tensor([[[0, 0, 1, 255]]]), {"ignore_index": 255}, [1 - sqrt(2) / 4] * 2),
        # last voxel twice: TP, TN, FP, FN of class 0 = 5/4, 11/4, 1/4, 3/4: 55/16 - 3/16 = 13/4 over the
        # root of 3/2 * 2 * 3 * 7/2 = 63/2
        (HALVES, {"mask": tensor([[[1, 1, 1, 2]]])}, [1 - 13 / 4 / sqrt(63 / 2)] * 2),
    ],
)
def test_mcc(target, options, expected):
    same(mcc_loss(P, target, **{**PLAIN, **options}), [expected])


def test_mcc_adds_the_samples_before_the_ratio():
    # second sample all right: TP = TN = 2. Together 13/4 * 15/4 - 3/16 = 12, 7/2 * 4 * 4 * 9/2 = 252
    p = torch.cat([P, tensor([[[1, 1, 0, 0], [0, 0, 1, 1]]])])
    labels = HALVES.expand(2, 1, 4)
    same(mcc_loss(p, labels, **PLAIN), [[1 - 2 / sqrt(15)] * 2, [0, 0]])
    same(mcc_loss(p, labels, **PLAIN, batch=True), [1 - 2 / sqrt(7)] * 2)


@pytest.mark.parametrize("smooth_dr", [1e-5, 0.0])
def test_mcc_without_a_mistake_is_0_and_flat(smooth_dr):
    # class absent and not predicted: every product is 0, and 1 - 0 / root of dr would be 1
    p = tensor([[[0.0, 0.0]]]).requires_grad_()
    loss = mcc_loss(p, tensor([[[0.0, 0.0]]]), smooth_dr=smooth_dr)
    same(loss, 0.0)
    same(torch.autograd.grad(loss, p)[0], [[[0.0, 0.0]]])


def test_mcc_weighs_a_voxel_by_what_is_not_ignored_of_it():
    # class 0 is ignored, so m = 1/2 1. Class 0: TP, FP, FN, TN = 1/8 each, and 0 1/4 0 3/4 of voxel two:
    # 1/8 7/8 - 3/8 1/8 = 1/16 over the root of 1/2 1/4 5/4 1. Class 1 has TP and TN, FP and FN the other way.
    p = tensor([[[0.5, 0.25], [0.5, 0.75]]])
    g = tensor([[[0.5, 0.0], [0.5, 1.0]]])
    options = {**PLAIN, "to_onehot_y": False, "ignore_index": 0}
    same(mcc_loss(p, g, **options), [[1 - sqrt(32 / 5) / 16] * 2])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        # the masked voxel has label 0 and stays in G of class 0: I, FP, FN = 3/4, 1/4, 1/4 + 1
        ([1, 0, 1, 1], [1 / 2, 1 / 8]),
        # the masked voxel has label 1 and goes over to class 0: I, FP, FN = 5/4, 0, 3/4 + 1 and 1, 3/4, 0
        ([1, 1, 0, 1], [7 / 17, 3 / 11]),
        # m p = 3/8 1/4 1/8 0, but labels 0 0 0.5 0.5, truncated, are all 0: 1 - 2 * 3/4 / (3/4 + 4), and 1
        ([0.5, 0.5, 0.5, 0.5], [13 / 19, 1]),
    ],
)
def test_masked_dice_of_labels(mask, expected):
    loss = masked_dice_loss(P, HALVES, tensor([[mask]]), **PLAIN)
    same(loss, [[[f] for f in expected]])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        # class 0: I, FP, FN = 5/4, 0, 3/4; class 1: 1, 3/4, 0
        ([1, 1, 0, 1], [3 / 13, 3 / 11]),
        # I = 5/4 / 4 and 7/4 / 4, P + G = 7/2 / 2 and 9/2 / 2
        ([0.5, 0.5, 0.5, 0.5], [9 / 14, 11 / 18]),
    ],
)
def test_masked_dice_of_values(mask, expected):
    values = tensor([[[1, 1, 0, 0], [0, 0, 1, 1]]])
    loss = masked_dice_loss(P, values, tensor([[mask]]), **{**PLAIN, "to_onehot_y": False})
    same(loss, [[[f] for f in expected]])


def test_masked_dice_masks_after_the_activation():
    # p = 1/2 0, g = 1 0: 1 - 1 / (3/2), though sigmoid(0 * 0) is 1/2
    z, g = tensor([[[0.0, 0.0]]]), tensor([[[1.0, 1.0]]])
    options = {"sigmoid": True, "smooth_nr": 0.0, "smooth_dr": 0.0}
    same(masked_dice_loss(z, g, torch.tensor([[[True, False]]]), **options), 1 / 3)
    same(masked_dice_loss(z, g, **options), dice_loss(z, g, **options))


CE = {"lambda_dice": 0.0, "softmax": True}


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
