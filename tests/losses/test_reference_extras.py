"""The oracle where MONAI has no say: extras, deliberate deviations, and the derivatives."""

from __future__ import annotations

import math
from functools import partial
from math import log

import pytest
import torch
from reference_cases import F64, assert_derivatives, same, tensor

from dicekernels.reference import (
    dice_ce_loss,
    dice_focal_loss,
    dice_loss,
    focal_loss,
    generalized_dice_focal_loss,
    generalized_dice_loss,
    masked_dice_loss,
    mcc_loss,
    region_sums,
    tversky_loss,
)


def focal(logits, target, softmax=True, soft_label=False, **options):
    """The focal loss has no activation to choose but its own, and no overlap."""
    return focal_loss(logits, target, **options)


def mcc(logits, target, soft_label=False, **options):
    return mcc_loss(logits, target, **options)


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
    "mcc": mcc,
    # "sum": the mean of an ignored voxel's loss is K times that of the others (MONAI)
    "focal": partial(focal, reduction="sum", alpha=[0.5, 0.25, 1.0], weight=[1.0, 2.0, 0.5]),
    "focal softmax": partial(focal, reduction="sum", use_softmax=True, alpha=0.3, gamma=1.5),
    "dice focal": partial(dice_focal_loss, reduction="sum", alpha=0.3, gamma=0.5),
    "generalized dice focal": partial(generalized_dice_focal_loss, reduction="sum", use_softmax=True),
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
    assert loss(z, y, softmax=True, to_onehot_y=True, reduction="mean").isnan()


def test_soft_label_takes_the_minimum_in_dice_ce():
    # p, g = .7, .4 and .3, .6 in one voxel: I = .4 and .3, FP = .3 and 0, FN = 0 and .3;
    # Dice (.3 / 1.1 + .3 / .9) / 2, cross entropy -.4 ln .7 - .6 ln .3
    p, g = tensor([[[0.7], [0.3]]]), tensor([[[0.4], [0.6]]])
    options = {"softmax": True, "smooth_nr": 0.0, "smooth_dr": 0.0}
    loss = dice_ce_loss(p.log(), g, soft_label=True, **options)
    same(loss, (0.3 / 1.1 + 0.3 / 0.9) / 2 - 0.4 * log(0.7) - 0.6 * log(0.3))


@pytest.mark.parametrize("use_softmax", [False, True])
def test_a_mask_multiplies_the_focal_map(use_softmax):
    z, y = labelled()
    mask = torch.arange(12, dtype=F64).reshape(2, 1, 6) / 4
    options = {"to_onehot_y": True, "use_softmax": use_softmax, "reduction": "none"}
    same(focal_loss(z, y, mask=mask, **options), mask * focal_loss(z, y, **options))


def test_labels_without_a_channel():
    z, y = labelled()
    mask = torch.rand(2, 1, 6, generator=torch.Generator().manual_seed(1)).round()
    y[0, 0, :2] = 255
    options = {"to_onehot_y": True, "ignore_index": 255}
    for loss in (focal_loss, dice_focal_loss, generalized_dice_focal_loss, mcc_loss):
        same(loss(z, y[:, 0], **options), loss(z, y, **options))
    y = y.clamp(max=2)
    same(
        masked_dice_loss(z, y[:, 0], mask, to_onehot_y=True, softmax=True),
        masked_dice_loss(z, y, mask, to_onehot_y=True, softmax=True),
    )


def test_nothing_leaks_from_the_masked_voxels_of_masked_dice():
    z, y = labelled()
    mask = torch.ones(2, 1, 6, dtype=F64)
    mask[..., 4:] = 0
    poisoned, bad = z.clone(), y.double()
    poisoned[:, 0, 4], poisoned[:, 1, 4], poisoned[:, 2, 5] = math.nan, math.inf, -math.inf
    bad[..., 4], bad[..., 5] = math.nan, 255
    options = {"to_onehot_y": True, "softmax": True}
    gradients = []
    for logits, labels in ((z.requires_grad_(), y), (poisoned.requires_grad_(), bad)):
        value = masked_dice_loss(logits, labels, mask, **options)
        gradients.append(torch.autograd.grad(value, logits)[0])
        same(value, masked_dice_loss(z, y, mask, **options).detach())
    same(gradients[1], gradients[0])
    same(gradients[1][..., 4:], torch.zeros(2, 3, 2))


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


@pytest.mark.parametrize("soft_label", [False, True])
def test_derivatives_of_masked_dice(soft_label):
    z, _ = labelled((2, 3, 2))
    torch.manual_seed(1)
    g, m = torch.rand(2, 3, 2, dtype=F64), torch.rand(2, 1, 2, dtype=F64)
    m[0, 0, 0] = 0
    inputs = [x.requires_grad_() for x in (z, g)]
    options = {"softmax": True, "soft_label": soft_label, "weight": [1.0, 2.0, 0.5]}
    assert_derivatives(lambda logits, target: masked_dice_loss(logits, target, m, **options), inputs)


@pytest.mark.parametrize("alpha", [None, 0.3, [0.5, 0.25, 1.0]], ids=["none", "number", "sequence"])
@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_of_the_focal_loss(alpha, use_softmax, reduction):
    z, _ = labelled((2, 3, 2))
    torch.manual_seed(1)
    g, m = torch.rand(2, 3, 2, dtype=F64), torch.rand(2, 1, 2, dtype=F64)
    inputs = [x.requires_grad_() for x in (z, g, m)]
    options = {"alpha": alpha, "use_softmax": use_softmax, "reduction": reduction, "gamma": 1.5}

    def run(logits, target, mask):
        return focal_loss(logits, target, mask=mask, ignore_index=1, weight=[1.0, 2.0, 0.5], **options)

    assert_derivatives(run, inputs)
