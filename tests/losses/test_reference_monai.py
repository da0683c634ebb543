"""The oracle against MONAI 1.6.1 in float64 on random problems: values and gradients."""

from __future__ import annotations

import contextlib
import random
import warnings
from functools import partial
from unittest import mock

import monai.losses
import pytest
import torch
from reference_cases import F64

from dicekernels.reference import (
    dice_ce_loss,
    dice_focal_loss,
    dice_loss,
    focal_loss,
    generalized_dice_focal_loss,
    generalized_dice_loss,
    ignore_mask,
    masked_dice_loss,
    mcc_loss,
    region_sums,
    tversky_loss,
)
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

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


def run_against_monai(ours, module, z, target, options, extra, dtype=F64, wide=False):
    """Both round, and nothing is more exact than float64 to tell by how much.

    So the honest error is what MONAI itself makes of inputs that differ in their last bits, the
    largest of three. ``wide``: with its casts to float32 taken as casts to float64.
    """
    name = f"{module.__name__} {tuple(z.shape)} {target.dtype} {options} {extra}"
    with warnings.catch_warnings(), widened() if wide else contextlib.nullcontext():
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


def widened():
    """MONAI's focal losses cast everything to float32; here they stay in float64, and are exact."""
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


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


@pytest.mark.parametrize("group", range(3))
def test_mcc_is_monais(group):
    rng = random.Random(40 + group)
    for seed in range(30):
        z, target, options = random_problem(rng, seed, ignore=False)
        options["smooth_dr"] = rng.choice([1e-2, 0.25])  # a class may be absent: the root is that of dr
        extra = {"reduction": rng.choice(["mean", "sum", "none"])}
        run_against_monai(mcc_loss, monai.losses.MCCLoss, z, target, options, extra)


@pytest.mark.parametrize("group", range(3))
def test_masked_dice_is_monais(group):
    rng = random.Random(50 + group)
    for seed in range(30):
        z, target, options = random_problem(rng, seed, ignore=False)
        mask = torch.rand(rng.choice([1, z.shape[0]]), 1, *z.shape[2:], dtype=F64)
        mask = rng.choice([mask, mask.round(), mask > 0.3, (2 * mask).to(torch.uint8), None])
        left = z.shape[1] - (z.shape[1] > 1 and not options["include_background"])
        extra = {
            "squared_pred": rng.random() < 0.3,
            "jaccard": rng.random() < 0.3,
            # |p - g| has a kink where both are masked: no slope to compare
            "soft_label": rng.random() < 0.3 and mask is None,
            "reduction": rng.choice(["mean", "sum", "none"]),
            "weight": rng.choice([None, 0.7, [0.5 + i for i in range(left)]]),
        }

        def ours(z, target, mask=mask, **options):
            return masked_dice_loss(z, target, mask, **options)

        def theirs(mask=mask, **options):
            return partial(monai.losses.MaskedDiceLoss(**options), mask=mask)

        theirs.__name__ = f"MaskedDiceLoss {mask}"
        run_against_monai(ours, theirs, z, target, options, extra, squared_dtype(options, extra))


def focal_options(rng, z, options, kinds):
    """alpha, gamma, weight and reduction; a weight for each class is refused where one is left."""
    left = z.shape[1] - (z.shape[1] > 1 and not options["include_background"])
    extra = {
        # 0^(gamma - 1) log 1 is no slope of a softmax over one channel
        "gamma": rng.choice([0.0, 1.0, 2.0, *([0.5, 1.7] if left > 1 else [])]),
        "weight": rng.choice([None, 2.5, *([[0.5 + i for i in range(left)]] if left > 1 else [])]),
        "reduction": rng.choice(["mean", "sum", "none"]),
    }
    alpha = rng.choice([None, 0.25, torch.tensor(0.5), torch.arange(1, 1 + left) / 8])
    return extra | (
        {"alpha": alpha} if kinds == "any" else {"alpha": rng.choice([None, 0.25])} if kinds else {}
    )


@pytest.mark.parametrize("group", range(4))
def test_focal_is_monais(group):
    rng = random.Random(60 + group)
    for seed in range(40):
        z, target, options = random_problem(rng, seed, acts=("none",))
        options = {
            k: options[k] for k in options if k in ("include_background", "to_onehot_y", "ignore_index")
        }
        if (
            "ignore_index" in options
            and ignore_mask(target, options["ignore_index"]).flatten(1).sum(1).min() == 0
        ):
            target = target.detach()  # MONAI's 0 / eps of a sample without a voxel: the slope is 1 / eps
        extra = focal_options(rng, z, options, "any") | {"use_softmax": rng.random() < 0.5}
        run_against_monai(focal_loss, monai.losses.FocalLoss, z, target, options, extra, wide=True)


@pytest.mark.parametrize("group", range(3))
def test_dice_focal_is_monais(group):
    rng = random.Random(70 + group)
    for seed in range(30):
        z, target, options = random_problem(rng, seed, ignore=False)
        extra = focal_options(rng, z, options, "number") | {
            "squared_pred": rng.random() < 0.3,
            "jaccard": rng.random() < 0.3,
            "lambda_dice": rng.choice([0.0, 1.0, 0.3]),
            "lambda_focal": rng.choice([0.0, 1.0, 2.5]),
        }
        dtype = squared_dtype(options, extra)
        module = monai.losses.DiceFocalLoss
        run_against_monai(dice_focal_loss, module, z, target, options, extra, dtype, wide=True)


@pytest.mark.parametrize("group", range(3))
def test_generalized_dice_focal_is_monais(group):
    rng = random.Random(80 + group)
    for seed in range(30):
        z, target, options = random_problem(rng, seed, ignore=False)
        options["batch"] |= z.ndim == 2  # MONAI raises IndexError otherwise
        extra = focal_options(rng, z, options, "") | {
            "w_type": rng.choice(["square", "simple", "uniform"]),
            "lambda_gdl": rng.choice([0.0, 1.0, 0.3]),
            "lambda_focal": rng.choice([0.0, 1.0, 2.5]),
        }
        if extra["w_type"] != "uniform":
            target = target.detach()  # MONAI's in-place weights have no gradient
        module = monai.losses.GeneralizedDiceFocalLoss
        run_against_monai(generalized_dice_focal_loss, module, z, target, options, extra, wide=True)


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
