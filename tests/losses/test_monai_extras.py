"""What MONAI has not (docs/semantics.md, "Extras"), in the modules of every backend against the oracle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_monai_modules import F32, F64, NAMES, make, run
from torch import Tensor

import dicekernels
from dicekernels import functional, reference
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

pytestmark = pytest.mark.usefixtures("backend")

FRACTIONS = torch.rand((2, 1, 5, 7), generator=torch.Generator().manual_seed(7)) * 2
FRACTIONS[0, 0, 0], FRACTIONS[1, 0, 2] = 0, 1
SOFT = torch.rand((2, 3, 5, 7), generator=torch.Generator().manual_seed(8))
IGNORED = {"ignore_index": 255}
FOCAL = ("FocalLoss", "DiceFocalLoss", "GeneralizedDiceFocalLoss")
LOSSES = (*NAMES, "MCCLoss", *FOCAL)
every_loss = pytest.mark.parametrize("name", LOSSES)


def takes(name: str, options: dict[str, Any]) -> bool:
    """Whether the constructor, or forward with its mask, has all of these options."""
    return set(options) <= {"mask", *inspect.signature(getattr(dicekernels, name)).parameters}


EXTRAS: list[tuple[str, dict[str, Any], str]] = [
    (name, extra, target)
    for name in LOSSES
    for extra, target in (
        ({"ignore_index": 255}, "labels"),
        ({"ignore_index": 1}, "labels"),
        ({"ignore_index": 1}, "soft"),
        ({"ignore_index": 255}, "soft"),
        ({"mask": FRACTIONS}, "labels"),
        ({"mask": FRACTIONS, "batch": True, "include_background": False}, "labels"),
        ({"mask": FRACTIONS}, "soft"),
        ({"mask": FRACTIONS.round(), "ignore_index": 255}, "labels"),
        ({"mask": FRACTIONS, "ignore_index": 255}, "labels"),
        ({"mask": FRACTIONS[:1]}, "labels"),
        ({"mask": FRACTIONS, "soft_label": True}, "soft"),
        ({"soft_label": True, "ignore_index": 2}, "soft"),
        ({"use_softmax": True, "include_background": False, "alpha": [0.3, 0.7]}, "labels"),
        ({"use_softmax": True, "mask": FRACTIONS, "alpha": 0.3, "reduction": "sum"}, "labels"),
        ({"alpha": 0.3, "weight": [1.0, 0.5, 2.0], "ignore_index": 1, "gamma": 0.5}, "soft"),
        ({"use_softmax": False, "alpha": [0.3, 0.7, 0.9], "mask": FRACTIONS}, "labels"),
    )
    if takes(name, extra)
] + [
    ("DiceLoss", {"log_loss": True}, "labels"),
    ("DiceLoss", {"log_loss": True, "jaccard": True, "weight": [1.0, 0.5, 2.0], "mask": FRACTIONS}, "soft"),
    ("DiceLoss", {"log_loss": True, "batch": True, "reduction": "none"}, "labels"),
    ("DiceLoss", {"weight": (1.0, 0.0, 2.0)}, "labels"),
    ("TverskyLoss", {"gamma": 0.75, "alpha": 0.3, "beta": 0.7}, "labels"),
    ("TverskyLoss", {"gamma": 2.0, "reduction": "none"}, "soft"),
    ("TverskyLoss", {"gamma": 1.5, "batch": True, "reduction": "none", "mask": FRACTIONS}, "labels"),
    ("DiceCELoss", {"weight": [1.0, 0.5, 2.0]}, "labels"),
    ("DiceCELoss", {"weight": (1.0, 0.5, 2.0), "include_background": False}, "soft"),
    ("DiceCELoss", {"ce_include_background": False}, "labels"),
    ("DiceCELoss", {"ce_include_background": False, "weight": [1.0, 0.5, 2.0], **IGNORED}, "labels"),
    ("DiceCELoss", {"ce_include_background": False, "label_smoothing": 0.2}, "soft"),
    ("DiceCELoss", {"label_smoothing": 0.2, "weight": [1.0, 0.5, 2.0], **IGNORED}, "labels"),
    ("DiceCELoss", {"label_smoothing": 0.2, "mask": FRACTIONS, "reduction": "sum"}, "labels"),
    ("DiceCELoss", {"soft_label": True, "jaccard": True, "lambda_ce": 0.5}, "soft"),
]
ORACLES: dict[str, Callable[..., Tensor]] = {
    "DiceLoss": reference.dice_loss,
    "GeneralizedDiceLoss": reference.generalized_dice_loss,
    "TverskyLoss": reference.tversky_loss,
    "DiceCELoss": reference.dice_ce_loss,
    "MCCLoss": reference.mcc_loss,
    "FocalLoss": reference.focal_loss,
    "DiceFocalLoss": reference.dice_focal_loss,
    "GeneralizedDiceFocalLoss": reference.generalized_dice_focal_loss,
}


def assert_is_the_oracle(name: str, options: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    logits, labels = make(dtype)
    if options.get("ignore_index") == 255:
        labels[0, 0, 1], labels[1, 0, :, 3] = 255, 255
    target = labels if kind == "labels" else SOFT * (labels != 255)
    options = {"to_onehot_y": kind == "labels", **options}
    if takes(name, {"softmax": True}):
        options["softmax"] = True
    inner = F64 if dtype == F64 else F32
    oracle = partial(ORACLES[name], **options)
    truth, honest = run(oracle, logits.double(), target), run(oracle, logits.to(inner), target)
    mask = options.pop("mask", None)
    value, gradient = run(getattr(dicekernels, name)(**options), logits, target, mask=mask)
    # The focal half is a float32 number.
    assert_close_to_truth(value, truth[0], honest[0], F32 if name in FOCAL else inner, "loss")
    assert gradient.dtype == dtype
    assert_gradient_close(gradient, truth[1], honest[1].to(dtype), dtype, "gradient")


@pytest.mark.parametrize(
    ("name", "options", "kind"), EXTRAS, ids=lambda x: str(list(x)) if isinstance(x, dict) else x
)
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_extras_are_the_oracles(name: str, options: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    assert_is_the_oracle(name, options, kind, dtype)


@every_loss
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_voxel_weights_beside_an_ignored_class_of_fractions(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    """The mask is linear, the ignored class is not: no single mask of a kernel is both."""
    options = {"mask": FRACTIONS, "ignore_index": 1}
    if backend != "eager":
        with pytest.raises(RuntimeError, match="forced.*ignored class of fractions"):
            assert_is_the_oracle(name, options, "soft", dtype)
        return
    assert_is_the_oracle(name, options, "soft", dtype)


@every_loss
def test_the_mask_of_a_single_channel(name: str) -> None:
    logits, _ = make(classes=1)
    target = (logits > 0.2).float()
    options = {"sigmoid": True} if takes(name, {"sigmoid": True}) else {}
    oracle = partial(ORACLES[name], mask=FRACTIONS, **options)
    truth, honest = run(oracle, logits.double(), target), run(oracle, logits, target)
    got = run(getattr(dicekernels, name)(**options), logits, target, mask=FRACTIONS)
    assert_close_to_truth(got[0], truth[0], honest[0], F32, "loss")
    assert_gradient_close(got[1], truth[1], honest[1], F32, "gradient")


@pytest.mark.parametrize("by", ["soft target", "mask"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_matthews_correlation_of_a_saturated_prediction(by: str, dtype: torch.dtype) -> None:
    """Nothing is left of tn, which no difference of large sums would give."""
    logits = torch.full((2, 3, 5, 7), 40.0, dtype=dtype)
    target = SOFT.to(dtype) if by == "soft target" else (SOFT > 0.5).to(dtype)
    mask = FRACTIONS if by == "mask" else None
    for sign in (1, -1):
        loss = partial(functional.mcc_loss, sigmoid=True, mask=mask)
        value, gradient = run(loss, sign * logits, target)
        truth = reference.mcc_loss((sign * logits).double(), target.double(), sigmoid=True, mask=mask)
        assert_close_to_truth(value, truth, truth, F32, "loss")
        assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"squared_pred": True}, {"soft_label": True}], ids=str)
@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_nothing_leaks_out_of_a_masked_voxel_of_masked_dice(
    options: dict[str, Any], kind: str, dtype: torch.dtype
) -> None:
    logits, labels = make(dtype)
    target = labels if kind == "labels" else SOFT
    loss = partial(functional.masked_dice_loss, to_onehot_y=kind == "labels", softmax=True, **options)
    for mask in (FRACTIONS.clamp(max=1), FRACTIONS > 0):
        clean = run(loss, logits, target, mask=mask)
        poisoned = torch.where(mask == 0, torch.nan, logits)
        poisoned[0, 1, 0] = torch.inf
        got = run(loss, poisoned, target, mask=mask)
        assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])


@pytest.mark.parametrize("name", ["dice_loss", "dice_ce_loss", "mcc_loss", "dice_focal_loss"])
def test_the_slope_in_a_mask_is_that_of_the_values_under_it(name: str, backend: str) -> None:
    logits, labels = make(F64)
    slopes = []
    if backend != "eager":
        with pytest.raises(RuntimeError, match="forced, but mask requires a gradient"):
            getattr(functional, name)(
                logits, labels, to_onehot_y=True, mask=FRACTIONS.clone().requires_grad_()
            )
        return
    for loss in (getattr(functional, name), getattr(reference, name)):
        mask = FRACTIONS.double().requires_grad_()
        value = loss(logits, labels, to_onehot_y=True, softmax=True, mask=mask)
        slopes.append(torch.autograd.grad(value.double(), mask)[0])
    assert slopes[1][FRACTIONS == 0].abs().min() > 0
    assert_gradient_close(slopes[0], slopes[1], slopes[1], F32 if "focal" in name else F64, "slope")
