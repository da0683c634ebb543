"""The oracle of the losses with a focal half, against numbers worked by hand.

Two classes on two voxels, labels 0 1. With sigmoid and gamma = 2 a voxel adds (1 - p_t)^2 (-log p_t):

    channel 0: z = ln 3, ln 3   g = 1, 0   p_t = 3/4, 1/4   A = ln(4/3) / 16 and B = 9/16 ln 4
    channel 1: z = 0, -ln 3     g = 0, 1   p_t = 1/2, 1/4   C = ln(2) / 4    and B
"""

from __future__ import annotations

from math import log, sqrt

import monai.losses
import pytest
import torch
from reference_cases import ONE_HOT, UNEVEN, Q, same, tensor

from dicekernels.reference import dice_focal_loss, focal_loss, generalized_dice_focal_loss
from dicekernels.testing import assert_close_to_truth

Z = tensor([[[log(3), log(3)], [0.0, -log(3)]]])
LABELS = torch.tensor([[[0, 1]]])
A, B, C = log(4 / 3) / 16, 9 / 16 * log(4), log(2) / 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[A, B], [C, B]]),
        # no focusing: -log p_t
        ({"gamma": 0.0}, [[log(4 / 3), log(4)], [log(2), log(4)]]),
        (
            {"gamma": 0.5},
            [[log(4 / 3) / 2, log(4) * sqrt(3 / 4)], [log(2) * sqrt(0.5), log(4) * sqrt(3 / 4)]],
        ),
        # one number: alpha where g is 1, 1 - alpha where it is 0
        ({"alpha": 0.25}, [[A / 4, B * 3 / 4], [C * 3 / 4, B / 4]]),
        ({"alpha": torch.tensor(0.25)}, [[A / 4, B * 3 / 4], [C * 3 / 4, B / 4]]),
        # a sequence: only where g is 1
        ({"alpha": [0.25, 0.5]}, [[A / 4, B], [C, B / 2]]),
        ({"weight": 3}, [[3 * A, 3 * B], [3 * C, 3 * B]]),
        ({"weight": [2.0, 3.0]}, [[2 * A, 2 * B], [3 * C, 3 * B]]),
        ({"include_background": False}, [[C, B]]),
        ({"include_background": False, "alpha": 0.25}, [[C * 3 / 4, B / 4]]),
        ({"ignore_index": 1}, [[A, 0], [C, 0]]),
        ({"mask": tensor([[[1, 3]]])}, [[A, 3 * B], [C, 3 * B]]),
    ],
)
def test_focal_map(options, expected):
    same(focal_loss(Z, LABELS, to_onehot_y=True, reduction="none", **options), [expected])


@pytest.mark.parametrize(
    ("options", "mean", "total"),
    [
        # the mean over class and voxel; "sum" adds the means over the voxels of each class
        ({}, (A + 2 * B + C) / 4, (A + B) / 2 + (C + B) / 2),
        ({"include_background": False}, (C + B) / 2, (C + B) / 2),
        # the mean with an ignored voxel is over voxels alone: K times as much
        ({"ignore_index": 1}, A + C, A + C),
        ({"ignore_index": 255}, (A + 2 * B + C) / 2, (A + 2 * B + C) / 2),
        ({"mask": tensor([[[1, 3]]])}, (A + C + 6 * B) / 8, (A + 3 * B) / 4 + (C + 3 * B) / 4),
        ({"mask": tensor([[[3, 1]]]), "ignore_index": 1}, A + C, A + C),
    ],
)
def test_focal_reductions(options, mean, total):
    same(focal_loss(Z, LABELS, to_onehot_y=True, **options), mean)
    same(focal_loss(Z, LABELS, to_onehot_y=True, reduction="sum", **options), total)


def test_focal_sum_takes_each_sample_by_its_own_voxels():
    # sample 0 has one valid voxel, sample 1 has both
    labels = torch.tensor([[[0, 255]], [[0, 1]]])
    options = {"to_onehot_y": True, "ignore_index": 255}
    z = Z.expand(2, 2, 2)
    same(focal_loss(z, labels, reduction="sum", **options), (A + C) + (A + B) / 2 + (C + B) / 2)
    same(focal_loss(z, labels, **options), (2 * A + 2 * C + 2 * B) / 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (A + 2 * B + C) / 4),
        ({"ignore_index": 1}, A + C),
        ({"mask": tensor([[1], [3]])}, (A + C + 6 * B) / 8),
    ],
)
def test_focal_sum_without_spatial_dims_is_the_mean(options, expected):
    # the two voxels as two samples
    z, labels = Z[0].T, LABELS[0].T
    for reduction in ("mean", "sum"):
        same(focal_loss(z, labels, to_onehot_y=True, reduction=reduction, **options), expected)


@pytest.mark.parametrize("use_softmax", [False, True])
def test_focal_of_ignored_voxels_only_is_0_and_flat(use_softmax):
    z = Z.clone().requires_grad_()
    options = {"to_onehot_y": True, "ignore_index": 255, "use_softmax": use_softmax}
    for reduction in ("mean", "sum"):
        loss = focal_loss(z, torch.full_like(LABELS, 255), reduction=reduction, **options)
        same(loss, 0.0)
        same(torch.autograd.grad(loss, z)[0], torch.zeros(1, 2, 2))


def test_a_fractional_ignore_mask_acts_before_the_activation():
    # class 0 is ignored and g = 1/2 of it: z' = ln 3, 0 and g' = 1/4, 1/4.
    # BCE = ln 3 * 3/4 + ln(4/3) and ln 2; sigmoid(-z' (2 g' - 1)) = sigmoid(ln(3) / 2) and 1/2
    z, g = tensor([[[2 * log(3)], [0.0]]]), tensor([[[0.5], [0.5]]])
    first = (0.75 * log(3) + log(4 / 3)) * (sqrt(3) / (1 + sqrt(3))) ** 2
    second = log(2) / 4
    same(focal_loss(z, g, ignore_index=0, reduction="none"), [[[first / 2], [second / 2]]])
    # the sum of the mask is 1/2
    same(focal_loss(z, g, ignore_index=0), first + second)


# softmax and gamma = 1, labels 0 0 0 1: (1 - p) (-log p) of p_y = 3/4 1/2 1/4 1/2
FIRST = log(4 / 3) / 4 + log(2) / 2 + log(4) * 3 / 4
LAST = log(2) / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (FIRST + LAST) / 8),
        ({"reduction": "sum"}, (FIRST + LAST) / 4),
        # one number: 1 - alpha for the background, alpha for the others
        ({"alpha": 0.25}, (0.75 * FIRST + 0.25 * LAST) / 8),
        ({"alpha": [0.25, 0.5]}, (0.25 * FIRST + 0.5 * LAST) / 8),
        ({"weight": [2.0, 3.0]}, (2 * FIRST + 3 * LAST) / 8),
        ({"ignore_index": 1}, FIRST / 3),
        ({"ignore_index": 1, "mean_over_classes": True}, FIRST / 6),
        ({"include_background": False}, 0.0),
        ({"include_background": False, "softmax_over_all": True}, LAST / 4),
        ({"include_background": False, "softmax_over_all": True, "alpha": [0.5]}, LAST / 8),
        ({"include_background": False, "softmax_over_all": True, "weight": [3.0]}, 3 * LAST / 4),
        ({"softmax_over_all": True}, (FIRST + LAST) / 8),
    ],
)
def test_focal_softmax(options, expected):
    options = {"to_onehot_y": True, "use_softmax": True, "gamma": 1.0, **options}
    same(focal_loss(Q.log(), UNEVEN, **options), expected)


def test_the_background_is_cut_before_the_softmax():
    # p = 3/4, 1/4 whatever channel 0 holds; mean over two classes. The background's voxel adds nothing.
    z = tensor([[[9.0, 9.0], [log(3), 1.0], [0.0, 2.0]]])
    options = {"to_onehot_y": True, "use_softmax": True, "include_background": False}
    labels = torch.tensor([[[1, 0]]])
    same(focal_loss(z, labels, **options), A / 4)
    # alpha as one number of Python is dropped there, as a 0-dim tensor it is 1 - alpha for channel 1
    same(focal_loss(z, labels, alpha=0.25, **options), A / 4)
    same(focal_loss(z, labels, alpha=torch.tensor(0.25), **options), A / 4 * 0.75)
    # a single class left has p = 1
    same(focal_loss(z[:, :2], labels, **options), 0.0)


# Dice of sigmoid(ln 3) = 3/4 on g = 1, 0: I, FP, FN = 3/4, 3/4, 1/4, so 1 / (3/2 + 1) = 2/5
ONE_CHANNEL = (tensor([[[log(3), log(3)]]]), tensor([[[1.0, 0.0]]]))
PLAIN = {"sigmoid": True, "smooth_nr": 0.0, "smooth_dr": 0.0}


def test_dice_focal_adds_its_halves():
    same(dice_focal_loss(*ONE_CHANNEL, **PLAIN), 2 / 5 + (A + B) / 2)
    lambdas = {"lambda_dice": 0.5, "lambda_focal": 3.0}
    same(dice_focal_loss(*ONE_CHANNEL, **PLAIN, **lambdas), 1 / 5 + 3 * (A + B) / 2)
    # "none" lays the Dice term under the map; the weight of a single class is the focal half's alone
    options = {**PLAIN, "reduction": "none"}
    same(dice_focal_loss(*ONE_CHANNEL, **options), [[[2 / 5 + A, 2 / 5 + B]]])
    same(dice_focal_loss(*ONE_CHANNEL, **options, batch=True), [[[2 / 5 + A, 2 / 5 + B]]])
    same(dice_focal_loss(*ONE_CHANNEL, **options, weight=2.0), [[[2 / 5 + 2 * A, 2 / 5 + 2 * B]]])


SOFTMAX = {"softmax": True, "smooth_nr": 0.0, "smooth_dr": 0.0, "use_softmax": True, "gamma": 1.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # I = 3/2 and 1/2, P = 2 and 2, G = 3 and 1: Dice 2/5 and 2/3
        ({}, (2 / 5 + 2 / 3) / 2 + (FIRST + LAST) / 8),
        ({"weight": [2.0, 3.0]}, (4 / 5 + 2) / 2 + (2 * FIRST + 3 * LAST) / 8),
        ({"weight": [2.0, 3.0], "dice_weight": None}, (2 / 5 + 2 / 3) / 2 + (2 * FIRST + 3 * LAST) / 8),
        ({"alpha": 0.25}, (2 / 5 + 2 / 3) / 2 + (0.75 * FIRST + 0.25 * LAST) / 8),
        # three voxels: I = 3/2, P = 3/2, G = 3 and 0, 3/2, 0
        ({"ignore_index": 1}, (1 / 3 + 1) / 2 + FIRST / 6),
        # MONAI's rule of the focal loss alone: over voxels, K times as much
        ({"ignore_index": 1, "mean_over_classes": False}, (1 / 3 + 1) / 2 + FIRST / 3),
        # without background: the softmax of both classes, the first one's term left out
        ({"include_background": False}, 2 / 3 + LAST / 4),
        ({"include_background": False, "softmax_over_all": False}, 2 / 3),
        # last voxel twice: I = 3/2 and 1, P = 5/2 and 5/2, G = 3 and 2
        ({"mask": tensor([[[1, 1, 1, 2]]])}, (5 / 11 + 5 / 9) / 2 + (FIRST + 2 * LAST) / 10),
    ],
)
def test_dice_focal_with_a_focal_softmax(options, expected):
    same(dice_focal_loss(Q.log(), UNEVEN, to_onehot_y=True, **SOFTMAX, **options), expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # w = 1: 1 - 2 (3/2 + 1/2) / (5 + 3)
        ({"w_type": "uniform"}, 1 / 2 + (FIRST + LAST) / 8),
        # w = 1/9, 1: 1 - 2 (1/6 + 1/2) / (5/9 + 3); weight is the focal half's alone
        ({"weight": [2.0, 3.0]}, 5 / 8 + (2 * FIRST + 3 * LAST) / 8),
        ({"w_type": "uniform", "lambda_gdl": 0.5, "lambda_focal": 3.0}, 1 / 4 + 3 * (FIRST + LAST) / 8),
        # three voxels: G = 3 and 0, the absent class has the weight of the other: 1 - 2 * 3/2 / (9/2 + 3/2)
        ({"ignore_index": 1}, 1 / 2 + FIRST / 6),
        ({"ignore_index": 1, "mean_over_classes": False}, 1 / 2 + FIRST / 3),
    ],
)
def test_generalized_dice_focal(options, expected):
    loss = generalized_dice_focal_loss(Q.log(), UNEVEN, to_onehot_y=True, **SOFTMAX, **options)
    same(loss, expected)


def test_generalized_dice_focal_map():
    options = {**SOFTMAX, "w_type": "uniform", "reduction": "none"}
    loss = generalized_dice_focal_loss(Q.log(), ONE_HOT, **options)
    focal = [[log(4 / 3) / 4, log(2) / 2, log(4) * 3 / 4, 0], [0, 0, 0, log(2) / 2]]
    same(loss, 1 / 2 + tensor([focal]))


def test_the_focal_half_of_monais_dice_focal_is_sigmoid_also_with_softmax():
    # The Dice half alone changes when softmax is asked for.
    z, y = Z, tensor([[[1, 0], [0, 1]]])
    options = {"softmax": True, "lambda_dice": 0.0}
    theirs = monai.losses.DiceFocalLoss(**options)(z.float(), y.float())
    sigmoid, softmax = (dice_focal_loss(z, y, use_softmax=kind, **options) for kind in (False, True))
    same(sigmoid, (A + 2 * B + C) / 4)
    assert_close_to_truth(theirs, sigmoid, sigmoid, torch.float32, "sigmoid")
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_close_to_truth(theirs, softmax, softmax, torch.float32, "softmax")
