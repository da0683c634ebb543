"""What every loss obeys whatever its formula: permutations, batches, deletion, repetition, shifts, bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_cases import (
    F32,
    LABEL_LOSSES,
    PROPERTY,
    SOFTMAX,
    Labelled,
    Loss,
    assert_equal_losses,
    problems,
    value_and_gradient,
)
from torch import Tensor

from dicekernels.testing import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("backend")
any_loss = st.sampled_from(LABEL_LOSSES)
# The mean of FocalLoss with ignore_index divides by the voxels and not by voxels times classes: sums compare.
FOCAL = ("focal_loss", "dice_focal_loss", "generalized_dice_focal_loss")


def reduced(loss: Loss) -> str:
    """Terms where the kernels have them: halves have none, and those of a focal loss are a map of voxels."""
    return "sum" if loss.name in ("dice_ce_loss", *FOCAL) else "none"


@PROPERTY
@given(any_loss, problems())
def test_the_order_of_voxels_does_not_matter(loss: Loss, problem: Labelled) -> None:
    z, y = problem.flat()
    order = torch.randperm(problem.voxels, generator=problem.generator)
    mask = problem.uniform(len(z), 1, problem.voxels) + 0.1
    assert_equal_losses(
        loss,
        problem.dtype,
        (z[..., order], y[..., order], {"mask": mask[..., order]}),
        (z, y, {"mask": mask}),
        lambda gradient: gradient[..., order],
    )


@PROPERTY
@given(any_loss, problems(), st.booleans())
def test_the_order_of_classes_does_not_matter(loss: Loss, problem: Labelled, weighted: bool) -> None:
    order = torch.randperm(problem.classes, generator=problem.generator)
    labels = torch.argsort(order)[problem.labels.long()]  # class order[i] becomes class i
    before: dict[str, Any] = {}
    if weighted and loss.name not in ("generalized_dice_loss", "tversky_loss", "mcc_loss"):
        before = {"weight": problem.weights()}
    after = {name: weight[order] for name, weight in before.items()}
    assert_equal_losses(
        loss,
        problem.dtype,
        (problem.logits[:, order], labels, after),
        (problem.logits, problem.labels, before),
        lambda gradient: gradient[:, order],
    )


@PROPERTY
@given(any_loss, problems())
def test_a_batch_is_its_samples(backend: str, loss: Loss, problem: Labelled) -> None:
    """With batch=False no sample sees another; the kernels give the same bits, whatever lies beside."""
    z, y = problem.logits.to(problem.dtype), problem.labels
    options = {} if loss.name == "focal_loss" else {"batch": False}
    options |= {"reduction": reduced(loss)}

    def parts(z: Tensor) -> list[Tensor]:
        return [loss(z[i : i + 1], y[i : i + 1], **options) for i in range(len(z))]

    def together(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if options["reduction"] == "none" else torch.stack(parts).sum(0)

    whole, truth = loss(z, y, **options), together([x.double() for x in parts(z.double())])
    if backend == "cpu" and options["reduction"] == "none":
        assert torch.equal(whole, together(parts(z)))
    of_value = F32 if loss.float32_value else problem.dtype
    assert_close_to_truth(whole, truth, loss.oracle(z, y, **options), of_value, "samples")


def of_kept(problem: Labelled) -> Tensor:
    """Voxels to keep in every sample; the last ones, which hold every class, among them."""
    kept = problem.uniform(problem.voxels) > 0.4
    kept[-problem.classes :] = True
    return kept


def scattered(gradient: Tensor, kept: Tensor) -> Tensor:
    """The gradient of the kept voxels among zeros."""
    whole = gradient.new_zeros((*gradient.shape[:2], len(kept)))
    whole[..., kept] = gradient
    return whole


@PROPERTY
@given(any_loss, problems(), st.sampled_from([255, -100]))
def test_ignored_voxels_might_as_well_not_be_there(loss: Loss, problem: Labelled, index: int) -> None:
    kept, (z, y) = of_kept(problem), problem.flat()
    reduction = {"reduction": "sum"} if loss.name in FOCAL else {}
    ignoring = torch.where(kept, y.long(), index)
    assert_equal_losses(
        loss,
        problem.dtype,
        (z, ignoring, {"ignore_index": index} | reduction),
        (z[..., kept], y[..., kept], reduction),
        lambda gradient: scattered(gradient, kept),
    )


@PROPERTY
@given(any_loss, problems())
def test_voxels_of_mask_zero_might_as_well_not_be_there(loss: Loss, problem: Labelled) -> None:
    kept, (z, y) = of_kept(problem), problem.flat()
    mask = kept.float().expand(len(z), 1, -1)
    assert_equal_losses(
        loss,
        problem.dtype,
        (z, y, {"mask": mask}),
        (z[..., kept], y[..., kept], {}),
        lambda gradient: scattered(gradient, kept),
    )


@PROPERTY
@given(any_loss, problems())
def test_what_ignored_voxels_hold_does_not_matter(loss: Loss, problem: Labelled) -> None:
    kept, (z, y) = of_kept(problem), problem.flat()
    z = z.to(problem.dtype)
    rubbish = torch.where(kept, z, float("nan"))
    labels = torch.where(kept, y.long(), 77)
    for clean, dirty in (
        ({"mask": kept.expand(len(z), 1, -1)},) * 2,
        ({"ignore_index": 77}, {"ignore_index": 77}),
    ):
        expected = value_and_gradient(loss, z, labels if "mask" not in clean else y, problem.dtype, clean)
        got = value_and_gradient(loss, rubbish, labels, problem.dtype, dirty)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@PROPERTY
@given(any_loss, problems())
def test_a_voxel_of_weight_n_counts_as_n_voxels(loss: Loss, problem: Labelled) -> None:
    z, y = problem.flat()
    times = torch.randint(0, 4, (problem.voxels,), generator=problem.generator)
    times[-problem.classes :] += 1
    several = torch.arange(problem.voxels).repeat_interleave(times)
    mask = times.expand(len(z), 1, -1)

    def gathered(gradient: Tensor) -> Tensor:
        return torch.zeros_like(z, dtype=gradient.dtype).index_add(2, several, gradient)

    assert_equal_losses(
        loss, problem.dtype, (z, y, {"mask": mask.float()}), (z[..., several], y[..., several], {}), gathered
    )


@PROPERTY
@given(st.sampled_from(SOFTMAX), problems())
def test_softmax_losses_do_not_see_a_shift(loss: Loss, problem: Labelled) -> None:
    z, y, dtype = problem.logits, problem.labels, problem.dtype
    _, gradient = value_and_gradient(loss, z, y, dtype, {})
    # A class's gradient rounds once for each term it is made of, in units of the largest one.
    scale = gradient.abs().amax(1)
    assert (gradient.sum(1).abs() <= 16 * torch.finfo(dtype).eps * scale.amax()).all()
    # Halves of integers leave the differences of the logits as they are.
    z = (4 * z).round() / 4
    shift = (8 * problem.uniform(len(z), 1, *z.shape[2:])).round()
    assert_equal_losses(loss, dtype, (z + shift, y, {}), (z, y, {}))


BOUNDS = {"dice_loss": 1.0, "generalized_dice_loss": 1.0, "tversky_loss": 1.0, "mcc_loss": 2.0}


@PROPERTY
@given(st.sampled_from([x for x in LABEL_LOSSES if not x.options.get("log_loss")]), problems())
def test_bounds(loss: Loss, problem: Labelled) -> None:
    z = 3 * problem.logits.to(problem.dtype)
    options = {"smooth_nr": 0.0, "smooth_dr": 1e-5} if loss.name == "mcc_loss" else {}
    value = loss(z, problem.labels, reduction=reduced(loss), **options)
    assert (value >= 0).all()
    if loss.name in BOUNDS:
        assert (value <= BOUNDS[loss.name] * (1 + 8 * torch.finfo(problem.dtype).eps)).all()


@PROPERTY
@given(any_loss, problems())
def test_a_perfect_prediction_costs_nothing(loss: Loss, problem: Labelled) -> None:
    hot = torch.nn.functional.one_hot(problem.labels[:, 0].long(), problem.classes).movedim(-1, 1)
    # exp(-400) is 0 in float32, and exp(-1600) in float64: probabilities of exactly 0 and 1.
    z = (800.0 * (2 * hot - 1)).to(problem.dtype)
    options = {"label_smoothing": 0.0} if loss.name == "dice_ce_loss" else {}
    if loss.name == "mcc_loss":
        options = {"smooth_nr": 0.0}
    value, gradient = value_and_gradient(loss, z, problem.labels, problem.dtype, options)
    assert value == 0
    assert gradient.abs().max() <= torch.finfo(problem.dtype).eps  # the rounding of p - g
    # One wrong voxel is not perfect.
    wrong = (problem.labels.long() + 1) % problem.classes
    wrong = torch.where(
        torch.arange(wrong[0].numel()).view(wrong[0].shape) == 0, wrong, problem.labels.long()
    )
    assert loss(z, wrong, **options) > 0
