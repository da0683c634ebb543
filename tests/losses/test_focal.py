"""The focal losses: numbers worked by hand, the halves as users bend them, what they refuse."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import dicekernels
from dicekernels import functional, testing
from dicekernels.labels import out_of_range

monai_losses = pytest.importorskip("monai.losses")

F64 = torch.float64
HOT = {"to_onehot_y": True, "softmax": True}
WEIGHT = torch.tensor([0.1, 0.4, 0.2, 0.9])
PAIRS = {"DiceFocalLoss": "dice", "GeneralizedDiceFocalLoss": "generalized_dice"}
either = pytest.mark.parametrize("name", PAIRS)


def problem(dtype=torch.float32, classes=4):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 6, 7, 5, generator=generator, dtype=F64).to(dtype)
    return logits.requires_grad_(), torch.randint(classes, (2, 1, 6, 7, 5), generator=generator)


def value_and_gradient(loss, logits, labels, **options):
    value = loss(logits, labels, **options)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def assert_same(got, truth, name):
    testing.assert_close_to_truth(got[0], truth[0].double(), truth[0], torch.float32, name)
    testing.assert_gradient_close(got[1], truth[1].double(), truth[1], torch.float32, name)


# Two voxels, classes 0 and 1, labels 0 and 1. Logits are logs, so that with sigmoids p = x / (1 + x):
#   class 0: 3 1 -> p = 3/4 1/2, target 1 0     class 1: 1/3 3 -> p = 1/4 3/4, target 0 1
# 1 - p_t = 1/4 1/2 | 1/4 1/4 and -log p_t = log 4/3, log 2 | log 4/3, log 4/3.
LOGITS = torch.tensor([[[3.0, 1.0], [1 / 3, 3.0]]], dtype=F64).log()
LABELS = torch.tensor([[[0, 1]]])
A, B = math.log(4 / 3), math.log(2)
# By softmax: p of the label = 9/10 and 3/4.
TENTH, QUARTER = -math.log(0.9), A


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (3 * A / 16 + B / 4) / 4),
        ({"gamma": 0.0}, (3 * A + B) / 4),
        ({"gamma": 1.0}, (3 * A / 4 + B / 2) / 4),
        ({"alpha": 0.25}, (A / 16 / 4 + 3 / 4 * B / 4 + 3 / 4 * A / 16 + A / 16 / 4) / 4),
        ({"alpha": [0.5, 2.0]}, (0.5 * A / 16 + B / 4 + A / 16 + 2 * A / 16) / 4),
        ({"weight": [2.0, 3.0]}, (2 * (A / 16 + B / 4) + 3 * 2 * A / 16) / 4),
        ({"weight": 0.5}, (3 * A / 16 + B / 4) / 8),
        ({"include_background": False}, 2 * A / 16 / 2),
        ({"reduction": "sum"}, (3 * A / 16 + B / 4) / 2),  # the spatial means added up
        ({"ignore_index": 0}, 2 * A / 16 + (B / 4 - A / 16)),  # over one voxel and not over two channels
        ({"ignore_index": 0, "reduction": "sum"}, A / 16 + B / 4),
        ({"use_softmax": True}, (TENTH / 100 + QUARTER / 16) / 4),
        ({"use_softmax": True, "alpha": 0.25}, (3 / 4 * TENTH / 100 + QUARTER / 4 / 16) / 4),
        ({"use_softmax": True, "include_background": False}, 0.0),  # one channel is left
        ({"use_softmax": True, "include_background": False, "softmax_over_all": True}, QUARTER / 16 / 2),
        ({"ignore_index": 0, "mean_over_classes": True}, (2 * A / 16 + (B / 4 - A / 16)) / 2),
    ],
)
def test_focal_by_hand(backend, options, expected):
    loss = functional.focal_loss(LOGITS, LABELS, to_onehot_y=True, **options)
    assert loss.dtype == torch.float32
    truth = torch.tensor(expected, dtype=F64)
    testing.assert_close_to_truth(loss, truth, truth, torch.float32, str(options))


def test_voxel_weights_are_in_the_denominators(backend):
    mask = torch.tensor([[[3.0, 1.0]]])
    first, second = A / 16 + A / 16, B / 4 + A / 16  # by voxel, both classes
    for reduction, expected in (("mean", (3 * first + second) / 8), ("sum", (3 * first + second) / 4)):
        loss = functional.focal_loss(LOGITS, LABELS, to_onehot_y=True, reduction=reduction, mask=mask)
        truth = torch.tensor(expected, dtype=F64)
        testing.assert_close_to_truth(loss, truth, truth, torch.float32, reduction)


CHANGES = {
    "another focal loss": lambda loss: setattr(loss, "focal", monai_losses.FocalLoss(gamma=1.0)),
    "sum in the focal half": lambda loss: setattr(loss.focal, "reduction", "sum"),
    "gamma": lambda loss: setattr(loss.focal, "gamma", 0.5),
    "alpha": lambda loss: setattr(loss.focal, "alpha", 0.3),
    "softmax": lambda loss: setattr(loss.focal, "use_softmax", True),
    "weight": lambda loss: setattr(loss.focal, "class_weight", WEIGHT),
    "background of the focal half": lambda loss: setattr(loss.focal, "include_background", False),
    "factors": lambda loss: setattr(loss, "lambda_focal", 0.25),
}


@either
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_half_has_monais_result(name, change):
    logits, labels = problem()
    pair = [getattr(library, name)(**HOT) for library in (monai_losses, dicekernels)]
    for loss in pair:
        CHANGES[change](loss)
        if change == "another focal loss" and name == "GeneralizedDiceFocalLoss":
            loss.focal.to_onehot_y = True
    truth, ours = (value_and_gradient(loss, logits, labels) for loss in pair)
    assert_same(ours, truth, change)


@either
def test_hooks_of_a_half_fire(name):
    logits, labels = problem()
    loss = getattr(dicekernels, name)(**HOT)
    truth = value_and_gradient(loss, logits, labels)
    seen = []
    loss.focal.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same(value_and_gradient(loss, logits, labels), truth, name)
    assert len(seen) == 1
    assert "two passes: a half has hooks" in dicekernels.explain(loss, logits, labels)


def test_hooked_halves_ignore_and_check_labels_as_the_one_pass():
    logits, labels = problem()
    labels[0, 0, 0], labels[1, 0, :, 3] = 255, 255
    loss = dicekernels.DiceFocalLoss(**HOT, ignore_index=255)
    truth = value_and_gradient(loss, logits, labels)
    loss.focal.register_full_backward_pre_hook(lambda module, grads: None)
    assert_same(value_and_gradient(loss, logits, labels), truth, "hooked")
    with pytest.raises(AssertionError, match="different shape"):
        loss(logits, labels[..., :3])
    labels[1, 0, 2, 2, 2] = 9
    with pytest.raises(dicekernels.LabelRangeError, match="target: 1 of 420 .* first is 9 .sample 1"):
        loss(logits, labels)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("use_softmax", [False, True])
def test_a_class_that_is_ruled_out(backend, use_softmax, gamma):
    """A logit of -inf beside the label adds nothing; of the label itself it makes the loss infinite."""
    options = {"to_onehot_y": True, "use_softmax": use_softmax, "gamma": gamma}
    logits, labels = problem()
    labels[0, 0, 0, 0, 0] = 0
    limit, out = logits.detach().clone(), logits.detach().clone()
    limit[0, 1, 0, 0, 0], out[0, 1, 0, 0, 0] = -200.0, -math.inf
    got, truth = (
        value_and_gradient(functional.focal_loss, x.requires_grad_(), labels, **options) for x in (out, limit)
    )
    assert_same(got, truth, "ruled out")
    out = logits.detach().clone()
    out[0, 0, 0, 0, 0] = -math.inf
    assert functional.focal_loss(out, labels, **options) == math.inf


def test_lambdas_are_checked_beside_a_map():
    logits, labels = problem()
    for loss, name in (
        (functional.dice_focal_loss, "lambda_dice"),
        (functional.generalized_dice_focal_loss, "lambda_gdl"),
    ):
        for options in ({name: -1.0}, {"lambda_focal": -1.0}, {name: torch.ones(2)}):
            with pytest.raises(ValueError, match="lambda_"):
                loss(logits, labels, **HOT, reduction="none", **options)


def test_labels_out_of_range_are_tamed_where_a_one_hot_of_them_would_be_fatal():
    labels = torch.tensor([0, 2, 3, -1, 255])
    assert out_of_range(labels, 3, None).tolist() == [False, False, True, True, True]
    assert out_of_range(labels, 3, 255).tolist() == [False, False, True, True, False]


@either
@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"include_background": False}], ids=str)
def test_the_whole_is_the_sum_of_its_halves(backend, name, use_softmax, reduction, options):
    logits, labels = problem(F64)
    common = {"reduction": reduction, "to_onehot_y": True} | options
    loss = getattr(dicekernels, name)(**common, softmax=True, use_softmax=use_softmax, lambda_focal=0.7)
    kind = dicekernels.DiceLoss if name == "DiceFocalLoss" else dicekernels.GeneralizedDiceLoss
    mask = torch.rand(labels.shape, dtype=F64)
    for more in ({}, {"mask": mask}):
        whole = value_and_gradient(loss, logits, labels, **more)
        overlap = value_and_gradient(kind(**common, softmax=True), logits, labels, **more)
        focal = value_and_gradient(
            dicekernels.FocalLoss(
                **common, use_softmax=use_softmax, mean_over_classes=True, softmax_over_all=True
            ),
            logits,
            labels,
            **more,
        )
        halves = [a.double() + 0.7 * b.double() for a, b in zip(overlap, focal, strict=True)]
        # the focal half alone rounds its value to float32
        assert abs(whole[0] - halves[0]) <= 1e-7 * abs(halves[0])
        assert (whole[1] - halves[1]).norm() <= 1e-12 * halves[1].norm()


@either
def test_one_pass_unless_the_halves_read_other_values(name):
    logits, labels = problem()
    kind = getattr(dicekernels, name)

    def passes(loss, target=labels):
        return dicekernels.explain(loss, logits, target).count("logits:")

    assert passes(kind(**HOT, alpha=[0.1, 0.2, 0.3, 0.4], weight=WEIGHT)) == 1
    assert passes(kind(to_onehot_y=True, other_act=torch.tanh)) == 2
    soft = torch.rand(logits.shape)
    assert passes(kind(softmax=True, soft_label=True), soft) == 1
    assert passes(kind(softmax=True, ignore_index=2), soft) == 2
    explained = dicekernels.explain(kind(softmax=True, alpha=[0.1, 0.2, 0.3, 0.4]), logits, soft)
    assert "an alpha of each class acts only where a soft target is 1" in explained
    assert "map of the size of the logits" in dicekernels.explain(
        kind(**HOT, reduction="none"), logits, labels
    )


@either
def test_the_constructor_refuses_as_monais(name):
    factor = "lambda_dice" if name == "DiceFocalLoss" else "lambda_gdl"
    for options in (
        {factor: -1.0},
        {"lambda_focal": -0.5},
        {"reduction": "avg"},
        {"softmax": True, "sigmoid": True},
    ):
        for library in (monai_losses, dicekernels):
            with pytest.raises(ValueError):
                getattr(library, name)(**options)


@pytest.mark.parametrize("name", ["FocalLoss", *PAIRS])
def test_state_dict_is_monais(name):
    pair = [getattr(library, name)(weight=WEIGHT) for library in (monai_losses, dicekernels)]
    assert list(pair[0].state_dict()) == list(pair[1].state_dict())
    pair[0].load_state_dict(pair[1].state_dict())
    pair[1].load_state_dict(pair[0].state_dict())


def test_one_channel_warns_as_often_as_monai():
    logits, _ = problem(classes=1)
    target = (torch.rand(logits.shape) > 0.5).float()
    for name in PAIRS:
        counts = []
        for library in (monai_losses, dicekernels):
            loss = getattr(library, name)(include_background=False, **HOT)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loss(logits, target)
            counts.append(sorted(str(w.message) for w in caught))
        assert counts[0] == counts[1]


def test_several_weights_of_one_class_are_refused():
    logits, labels = problem(classes=2)
    for library in (monai_losses, dicekernels):
        loss = library.DiceFocalLoss(include_background=False, weight=[1.0, 2.0], **HOT)
        with pytest.raises(ValueError, match="single-channel"):
            loss(logits, labels)


def test_learned_parameters_get_their_gradient():
    logits, labels = problem(F64)
    factor = nn.Parameter(torch.tensor(0.5, dtype=F64))
    weight = torch.tensor([0.1, 0.4, 0.2, 0.9], dtype=F64, requires_grad=True)

    def value(z, scale, w):
        return functional.dice_focal_loss(
            z, labels, **HOT, lambda_focal=scale, weight=w, dice_weight=None
        ).double()

    whole = value(logits, factor, weight)
    slopes = torch.autograd.grad(whole, (factor, weight))
    focal = functional.focal_loss(logits, labels, to_onehot_y=True, weight=weight)
    truth = focal.detach().double(), 0.5 * torch.autograd.grad(focal, weight)[0]
    for got, expected in zip(slopes, truth, strict=True):
        testing.assert_close_to_truth(got, expected, expected, torch.float32, "slope")
