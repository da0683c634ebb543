"""Losses that are others in disguise: each formula against another one, on random problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.losses.unified_focal_loss import AsymmetricFocalLoss, AsymmetricFocalTverskyLoss
from property_cases import (
    F32,
    F64,
    HOT,
    LABEL_LOSSES,
    PROPERTY,
    SIGMOIDS,
    Labelled,
    Loss,
    assert_equal_losses,
    problems,
)
from torch import Tensor
from torch.nn import functional as F

import dicekernels
from dicekernels import functional, reference, region_sums
from dicekernels.testing import assert_close_to_truth

smoothing = st.sampled_from([0.0, 1e-5, 0.1, 1.0])
factors = st.just(0.0) | st.floats(0.001, 3)
on_backends = pytest.mark.usefixtures("backend")


def one_hot(problem: Labelled) -> Tensor:
    return F.one_hot(problem.labels[:, 0].long(), problem.classes).movedim(-1, 1).float()


def unreduced(loss: str, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    function = getattr(functional, loss)
    value: Tensor = function(logits, target, reduction="none", **options)
    return value.flatten()


def assert_same(
    ours: Tensor,
    truth: Tensor,
    honest: Tensor | None = None,
    dtype: torch.dtype = F64,
    what: str = "identity",
) -> None:
    """Ours is a truth that was computed in float64; without a peer within the rounding of ``dtype``."""
    assert_close_to_truth(ours, truth.double(), truth if honest is None else honest, dtype, what)


@on_backends
@PROPERTY
@given(problems(), smoothing, smoothing, st.sampled_from([HOT, SIGMOIDS]), st.booleans())
def test_half_tversky_is_dice_with_doubled_smoothing(
    problem: Labelled, nr: float, dr: float, options: dict[str, Any], batch: bool
) -> None:
    z, y = problem.logits.double(), problem.labels
    common = options | {"batch": batch}
    tversky = unreduced("tversky_loss", z, y, alpha=0.5, beta=0.5, smooth_nr=nr, smooth_dr=dr, **common)
    doubled = {"smooth_nr": 2 * nr, "smooth_dr": 2 * dr}
    honest = reference.dice_loss(z, y, reduction="none", **common, **doubled).flatten()
    assert_same(tversky, unreduced("dice_loss", z, y, **common, **doubled), honest)


@on_backends
@PROPERTY
@given(problems(), smoothing)
def test_whole_tversky_is_jaccard_with_halved_smoothing(problem: Labelled, smooth: float) -> None:
    z, y = problem.logits.double(), problem.labels
    tversky = unreduced("tversky_loss", z, y, alpha=1.0, beta=1.0, smooth_nr=smooth, smooth_dr=smooth, **HOT)
    doubled = {"smooth_nr": 2 * smooth, "smooth_dr": 2 * smooth, "jaccard": True}
    honest = reference.dice_loss(z, y, reduction="none", **HOT, **doubled).flatten()
    assert_same(tversky, unreduced("dice_loss", z, y, **HOT, **doubled), honest)


@on_backends
@PROPERTY
@given(problems())
def test_jaccard_of_hard_inputs_is_dice_over_two_minus_dice(problem: Labelled) -> None:
    p = F.one_hot(problem.logits.argmax(1), problem.classes).movedim(-1, 1).double()
    options = {"smooth_nr": 0.0, "smooth_dr": 0.0}
    dice = 1 - unreduced("dice_loss", p, one_hot(problem), **options)
    jaccard = 1 - unreduced("dice_loss", p, one_hot(problem), jaccard=True, **options)
    union = ((p + one_hot(problem)) > 0).flatten(2).sum(2).flatten()
    both = (p * one_hot(problem)).flatten(2).sum(2).flatten()
    assert_same(dice / (2 - dice), both / union, dtype=F64)
    assert_same(jaccard, both / union, dtype=F64)


@on_backends
@PROPERTY
@given(problems(), st.booleans())
def test_prediction_and_target_may_change_places(problem: Labelled, hard: bool) -> None:
    p, g = problem.logits.double().sigmoid(), problem.uniform(*problem.logits.shape).double()
    if hard:
        p, g = p.round(), g.round()
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("dice_loss", {}, {}),
        ("dice_loss", {"jaccard": True}, {"jaccard": True}),
        ("dice_loss", {"soft_label": True}, {"soft_label": True}),
        ("dice_loss", {"squared_pred": True}, {"squared_pred": True}),
        ("generalized_dice_loss", {"w_type": "uniform"}, {"w_type": "uniform"}),
        ("tversky_loss", {"alpha": 0.3, "beta": 0.7}, {"alpha": 0.7, "beta": 0.3}),
        ("mcc_loss", {}, {}),
    ]
    for name, one, other in cases:
        oracle = getattr(reference, name)
        honest = oracle(p, g, reduction="none", **one).flatten()
        assert_same(unreduced(name, p, g, **one), unreduced(name, g, p, **other), honest, what=name)


@on_backends
@PROPERTY
@given(problems(classes=2), smoothing)
def test_mcc_does_not_know_which_of_two_classes_is_positive(problem: Labelled, smooth: float) -> None:
    z, g = problem.logits[:, :1].double(), one_hot(problem)[:, :1].double()
    options = {"sigmoid": True, "smooth_nr": smooth, "smooth_dr": 1e-5 + smooth}
    honest = reference.mcc_loss(-z, 1 - g, reduction="none", **options).flatten()
    assert_same(unreduced("mcc_loss", -z, 1 - g, **options), unreduced("mcc_loss", z, g, **options), honest)
    both = functional.mcc_loss(problem.logits.double(), problem.labels, reduction="none", **HOT)
    honest = reference.mcc_loss(problem.logits.double(), problem.labels, reduction="none", **HOT)
    assert_same(both[:, 0], both[:, 1], honest[:, 0])


@on_backends
@PROPERTY
@given(problems(), factors, factors, st.sampled_from(["mean", "sum"]), st.booleans())
def test_dice_ce_is_linear_in_its_lambdas(
    problem: Labelled, a: float, b: float, reduction: str, smoothed: bool
) -> None:
    z, y = problem.logits.double(), problem.labels
    options = HOT | {"weight": problem.weights(), "label_smoothing": 0.2 * smoothed, "reduction": reduction}

    def loss(a: float, b: float) -> Tensor:
        return functional.dice_ce_loss(z, y, lambda_dice=a, lambda_ce=b, **options)

    assert_same(loss(a, b), a * loss(1.0, 0.0) + b * loss(0.0, 1.0))
    alone = {k: v for k, v in options.items() if k != "label_smoothing"}
    assert_same(loss(1.0, 0.0), functional.dice_loss(z, y, **alone))


@on_backends
@PROPERTY
@given(problems(), factors, factors, st.booleans(), st.sampled_from(["mean", "sum"]))
def test_the_focal_losses_are_their_halves(
    problem: Labelled, a: float, b: float, softmax: bool, reduction: str
) -> None:
    z, y, weight = problem.logits.double(), problem.labels, problem.weights()
    focal_options = {"gamma": 1.5, "weight": weight, "reduction": reduction, "include_background": False}
    focal_options["weight"] = weight[1:]
    if problem.classes == 2:  # one class is left: its weight is a number
        focal_options["weight"] = 0.7
    # Without background the halves' softmax runs over all classes.
    alone = {"to_onehot_y": True, "use_softmax": softmax, "softmax_over_all": True, **focal_options}
    focal = functional.focal_loss(z, y, **alone).double()
    options = HOT | {"include_background": False, "reduction": reduction}
    dice = functional.dice_loss(z, y, weight=focal_options["weight"], **options)
    both = functional.dice_focal_loss(
        z, y, lambda_dice=a, lambda_focal=b, use_softmax=softmax, **options | focal_options
    )
    assert abs(both - (a * dice + b * focal)) <= 1e-7 * (a * dice + b * focal)
    generalized = functional.generalized_dice_loss(z, y, **options)
    both = functional.generalized_dice_focal_loss(
        z, y, lambda_gdl=a, lambda_focal=b, use_softmax=softmax, **options | focal_options
    )
    assert abs(both - (a * generalized + b * focal)) <= 1e-7 * (a * generalized + b * focal)


@on_backends
@PROPERTY
@given(problems(), st.sampled_from(["mean", "sum"]))
def test_focal_loss_of_gamma_zero_is_cross_entropy(problem: Labelled, reduction: str) -> None:
    z, y = problem.logits, problem.labels
    bce = F.binary_cross_entropy_with_logits(z.double(), one_hot(problem).double())
    ce = F.cross_entropy(z.double(), y[:, 0].long()) / problem.classes
    # "mean" is over samples, classes and voxels, "sum" adds up the means over the voxels.
    terms = 1 if reduction == "mean" else len(z) * problem.classes
    for softmax, truth in ((False, bce * terms), (True, ce * terms)):
        options = {"to_onehot_y": True, "gamma": 0.0, "use_softmax": softmax, "reduction": reduction}
        honest = reference.focal_loss(z, y, **options)
        assert_same(functional.focal_loss(z, y, **options), truth, honest, F32, f"softmax {softmax}")


@PROPERTY
@given(problems(), st.floats(0, 1))
def test_unified_focal_is_the_mix_of_its_halves(problem: Labelled, weight: float) -> None:
    p, g = problem.logits[:, :2].flatten(2)[..., None].double().softmax(1), one_hot(problem)
    g = torch.stack([g[:, 0], 1 - g[:, 0]], 1).flatten(2)[..., None].double()
    options = {"gamma": 0.4, "delta": 0.6}

    def loss(weight: float) -> Tensor:
        return functional.asymmetric_unified_focal_loss(p, g, weight=weight, **options)

    focal, tversky = AsymmetricFocalLoss(**options)(p, g), AsymmetricFocalTverskyLoss(**options)(p, g)
    assert_same(loss(1.0), focal)
    assert_same(loss(0.0), tversky)
    assert_same(loss(weight), weight * loss(1.0) + (1 - weight) * loss(0.0))


@PROPERTY
@given(problems(), smoothing)
def test_wasserstein_of_equal_distances_is_a_ratio_of_overlap_sums(problem: Labelled, smooth: float) -> None:
    """With M = 1 - identity a voxel's distance is 1 - p of its class: TP = sum of I, E = sum of FN."""
    z, y = problem.logits.double(), problem.labels
    sums = region_sums(z, y)
    foreground, missed = sums.I[:, 1:].sum(1), sums.FN.sum(1)
    truth = 1 - (2 * foreground + smooth) / (2 * foreground + missed + smooth)
    distances = 1 - torch.eye(problem.classes, dtype=F64)
    options = {"dist_matrix": distances, "reduction": "none", "smooth_nr": smooth, "smooth_dr": smooth}
    honest = reference.generalized_wasserstein_dice_loss(z, y, **options)
    assert_same(functional.generalized_wasserstein_dice_loss(z, y, **options), truth, honest)


@on_backends
@PROPERTY
@given(problems(), st.sampled_from(LABEL_LOSSES))
def test_wrappers_of_nothing_change_nothing(problem: Labelled, loss: Loss) -> None:
    z, y = problem.logits, problem.labels
    expected = loss(z, y)
    assert torch.equal(dicekernels.DeepSupervisionLoss(loss)(z, y), expected)
    assert torch.equal(dicekernels.DeepSupervisionLoss(loss)([z], y), expected)
    ones = torch.ones_like(y, dtype=F32)
    assert torch.equal(dicekernels.MaskedLoss(loss)(z, y.long(), ones), expected)
    masked = dicekernels.MaskedDiceLoss(**HOT)
    dice = Loss("dice_loss", HOT)
    assert_same(masked(z, y, ones), dice(z.double(), y), dice.oracle(z, y), F32)


@PROPERTY
@given(problems(), st.sampled_from(["default", "GDL"]))
def test_the_order_of_classes_and_distances_does_not_matter(problem: Labelled, mode: str) -> None:
    order = torch.randperm(problem.classes, generator=problem.generator)
    if mode == "default":  # which gives class 0 no weight: it stays where it is
        order = torch.cat([torch.tensor([0]), order[order != 0]])
    distances = problem.uniform(problem.classes, problem.classes)
    distances = (distances + distances.T).fill_diagonal_(0)
    names = {"weighting_mode": mode, "dist_matrix": distances}
    after = names | {"dist_matrix": distances[order][:, order]}
    assert_equal_losses(
        Loss("generalized_wasserstein_dice_loss"),
        problem.dtype,
        (problem.logits[:, order], torch.argsort(order)[problem.labels.long()], after),
        (problem.logits, problem.labels, names),
        lambda gradient: gradient[:, order],
    )


@PROPERTY
@given(problems())
def test_wasserstein_bounds_and_perfect_prediction(problem: Labelled) -> None:
    distances = (problem.uniform(problem.classes, problem.classes) + 0.1).fill_diagonal_(0)
    z = problem.logits.to(problem.dtype)
    hot = torch.nn.functional.one_hot(problem.labels[:, 0].long(), problem.classes).movedim(-1, 1)
    for mode in ("default", "GDL"):

        def loss(logits: Tensor, mode: str = mode) -> Tensor:
            return functional.generalized_wasserstein_dice_loss(
                logits, problem.labels, dist_matrix=distances, weighting_mode=mode, reduction="none"
            )

        assert ((loss(z) >= 0) & (loss(z) <= 1)).all()
        assert not loss((800.0 * (2 * hot - 1)).to(problem.dtype)).any()
