"""Arguments that do not fit and values that poison: a clear error or the right number, on every backend.

Never a crash, never a wrong number. Messages name the argument, what was got, what was expected and
what to do; what MONAI answers, ours answers in kind.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import monai.losses
import pytest
import torch
from cases import swept
from torch import Tensor

import dicekernels
from dicekernels import LabelRangeError, functional, reference, region_sums
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

pytestmark = pytest.mark.usefixtures("backend")
F32, F64 = torch.float32, torch.float64
LOSSES: dict[str, Callable[..., Tensor]] = {
    "DiceLoss": functional.dice_loss,
    "GeneralizedDiceLoss": functional.generalized_dice_loss,
    "TverskyLoss": functional.tversky_loss,
    "DiceCELoss": functional.dice_ce_loss,
    "MCCLoss": functional.mcc_loss,
    "DiceFocalLoss": functional.dice_focal_loss,
    "GeneralizedDiceFocalLoss": functional.generalized_dice_focal_loss,
}
FOCAL = ("DiceFocalLoss", "GeneralizedDiceFocalLoss")
every_loss = pytest.mark.parametrize("name", LOSSES)
# Three runs of 4096 voxels, the last of them short.
CHUNKED = 3 * 4096 - 50


def make(
    samples: int = 2, classes: int = 3, space: tuple[int, ...] = (4, 5), dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor]:
    """Random logits (B, C, *S) and labels (B, 1, *S)."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((samples, classes, *space), dtype=F64, generator=generator).to(dtype)
    return logits, torch.randint(0, classes, (samples, 1, *space), generator=generator)


def value_and_gradient(
    loss: Callable[..., Tensor], logits: Tensor, *args: Any, **options: Any
) -> list[Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, *args, **options)
    (gradient,) = torch.autograd.grad(value.sum(), logits, materialize_grads=True)
    return [value.detach(), gradient]


Z, Y = make()
ONE_HOT = torch.nn.functional.one_hot(Y[:, 0], 3).movedim(-1, 1)
HOT = {"to_onehot_y": True, "softmax": True}
REFUSED: list[tuple[str, Any, Any, dict[str, Any], type[Exception], list[str]]] = [
    ("logits of one dimension", Z[0, 0, 0], Y, HOT, IndexError, ["logits", "(5,)", "(B, C, *spatial)"]),
    ("complex logits", Z.cfloat(), Y, HOT, TypeError, ["logits", "complex64", "real", "logits.real"]),
    ("no logits", None, Y, HOT, TypeError, ["logits", "NoneType", "torch.Tensor"]),
    ("integer logits", Z.long(), Y, HOT, NotImplementedError, ["logits", "int64", "logits.float()"]),
    ("a list of labels", Z, Y.tolist(), HOT, TypeError, ["target", "list", "torch.as_tensor"]),
    ("labels elsewhere", Z, Y.to("meta"), HOT, ValueError, ["target", "meta", "cpu", ".to("]),
    ("logits elsewhere", Z.to("meta"), Y, HOT, ValueError, ["target", "cpu", "meta", ".to("]),
    ("a mask elsewhere", Z, Y, HOT | {"mask": Y.to("meta")}, ValueError, ["mask", "meta", "cpu", ".to("]),
    ("another space", Z, Y[..., :4], HOT, AssertionError, ["[2, 1, 4, 4]", "[2, 3, 4, 5]"]),
    ("other samples", Z, Y[:1], HOT, AssertionError, ["[1, 1, 4, 5]", "[2, 3, 4, 5]"]),
    ("values as labels", Z, ONE_HOT, HOT, AssertionError, ["target", "(2, 3, 4, 5)", "to_onehot_y=False"]),
    ("labels as values", Z, Y, {"softmax": True}, AssertionError, ["[2, 1, 4, 5]", "to_onehot_y=True"]),
    ("values of another space", Z, ONE_HOT[..., :4], {}, AssertionError, ["[2, 3, 4, 4]", "[2, 3, 4, 5]"]),
    ("mask of every class", Z, Y, HOT | {"mask": Z}, ValueError, ["mask", "(2, 3, 4, 5)", "(2, 1, 4, 5)"]),
    (
        "no channel",
        Z,
        Y,
        HOT | {"mask": Z[:, 0]},
        ValueError,
        ["mask", "(2, 4, 5)", "(2, 1, 4, 5)", "mask[:, None]"],
    ),
    ("a mask of more", Z, Y, HOT | {"mask": torch.ones(3, 1, 4, 5)}, ValueError, ["mask", "(3, 1"]),
    ("two activations", Z, Y, HOT | {"sigmoid": True}, ValueError, ["sigmoid", "softmax", "keep one"]),
    ("no callable", Z, Y, {"to_onehot_y": True, "other_act": 3}, TypeError, ["other_act", "callable", "int"]),
    ("an unknown reduction", Z, Y, HOT | {"reduction": "avg"}, ValueError, ["reduction", "'avg'", "'sum'"]),
    ("no reduction", Z, Y, HOT | {"reduction": None}, ValueError, ["reduction", "None", "'mean'"]),
]


@every_loss
@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "parts"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_arguments_that_do_not_fit(
    name: str, logits: Any, target: Any, options: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        LOSSES[name](logits, target, **options)
    message = str(caught.value)
    assert all(part in message for part in parts), message


OWN: list[tuple[str, dict[str, Any], type[Exception], list[str]]] = [
    ("DiceLoss", {"weight": [1.0, 2.0]}, ValueError, ["`weight`", "Got 2", "expected 3"]),
    ("DiceLoss", {"weight": [1.0, -2.0, 1.0]}, ValueError, ["`weight`", "no less than 0", "-2.0"]),
    (
        "DiceLoss",
        {"weight": [1.0, 2.0, 3.0], "include_background": False},
        ValueError,
        ["`weight`", "Got 3", "expected 2", "include_background=False"],
    ),
    ("GeneralizedDiceLoss", {"w_type": "cube"}, ValueError, ["w_type", "'cube'", "'square'", "'uniform'"]),
    ("TverskyLoss", {"gamma": 0.0}, ValueError, ["gamma", "0.0", "positive"]),
    ("DiceCELoss", {"weight": [1.0, 2.0]}, ValueError, ["`weight`", "Got 2", "expected 3"]),
    ("DiceCELoss", {"weight": [1.0, -2.0, 1.0]}, ValueError, ["`weight`", "-2.0"]),
    ("DiceCELoss", {"reduction": "none"}, ValueError, ["reduction", "'none'", "'mean', 'sum'"]),
    ("DiceCELoss", {"lambda_dice": -1.0}, ValueError, ["lambda_dice", "no less than 0", "-1.0"]),
    ("DiceCELoss", {"lambda_ce": torch.ones(2)}, ValueError, ["lambda_ce", "2 values", "one number"]),
    ("DiceFocalLoss", {"weight": [1.0, 2.0]}, ValueError, ["`weight`", "Got 2", "expected 3"]),
    ("DiceFocalLoss", {"alpha": [0.5, 0.5]}, ValueError, ["alpha (2)", "classes (3)"]),
    ("GeneralizedDiceFocalLoss", {"weight": [1.0, 2.0]}, ValueError, ["class_weight (2)", "channels (3)"]),
    ("GeneralizedDiceFocalLoss", {"weight": [1.0, -2.0, 1.0]}, ValueError, ["class_weight", "-2.0"]),
    ("GeneralizedDiceFocalLoss", {"lambda_gdl": -1.0}, ValueError, ["lambda_gdl", "no less than 0", "-1.0"]),
    ("DiceCELoss", {"label_smoothing": 1.5}, RuntimeError, ["label_smoothing", "1.5", "between 0.0 and 1.0"]),
]


@pytest.mark.parametrize(("name", "options", "error", "parts"), OWN, ids=lambda x: str(x)[:40])
def test_options_that_do_not_fit(
    name: str, options: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        LOSSES[name](Z, Y, **HOT, **options)
    message = str(caught.value)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sigmoid": True, "softmax": True}, ValueError),
        ({"other_act": torch.tanh, "softmax": True}, ValueError),
        ({"other_act": "tanh"}, TypeError),
        ({"reduction": "avg"}, ValueError),
        ({"reduction": None}, ValueError),
    ],
)
def test_constructors_refuse_as_monais(name: str, options: dict[str, Any], error: type[Exception]) -> None:
    for library in (monai.losses, dicekernels):
        with pytest.raises(error):
            getattr(library, name)(**options)


REGION: list[tuple[dict[str, Any], list[str]]] = [
    ({"activation": "tanh"}, ["activation", "'tanh'", "'softmax', 'sigmoid'"]),
    ({"overlap": "max"}, ["overlap", "'max'", "'product'"]),
    ({"voxel_term": "mse"}, ["voxel_term", "'mse'", "'ce'"]),
    ({"mask_mode": "add"}, ["mask_mode", "'add'", "'product'"]),
    ({"first_class": 3}, ["first_class", "3", "of the 3"]),
    ({"mask": torch.ones(2, 3, 4, 5)}, ["mask", "(2, 3, 4, 5)", "(2, 1, 4, 5)"]),
    ({"target": Y[..., :2]}, ["target", "(2, 1, 4, 2)", "(2, 3, 4, 5)"]),
    ({"target": ONE_HOT, "ignore_index": 0}, ["ignore_index", "label map", "mask="]),
]


@pytest.mark.parametrize(
    ("options", "parts"), REGION, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_region_sums_options_that_do_not_fit(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        region_sums(Z, **({"target": Y} | options))
    message = str(caught.value)
    assert all(part in message for part in parts), message


@every_loss
@pytest.mark.parametrize("bad", swept([-1, 3, 255], now=[3]))
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, F32])
@pytest.mark.parametrize("at", [[0], [5000], [CHUNKED - 1], [CHUNKED + 9000, 9, CHUNKED + 4]])
def test_labels_out_of_range(name: str, bad: int, dtype: torch.dtype, at: list[int]) -> None:
    """``at`` counts voxels through the batch: in the first run of a sample and in later ones."""
    logits, labels = make(space=(CHUNKED,))
    labels = labels.to(dtype)
    labels.flatten()[at] = bad
    first = min(at)
    with pytest.raises(LabelRangeError) as caught:
        LOSSES[name](logits, labels, **HOT)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, RuntimeError)
    message = str(caught.value)
    for part in (
        f"target: {len(at)} of {2 * CHUNKED} voxels",
        "outside [0, 3)",
        f"the first is {bad} ",
        f"sample {first // CHUNKED}, voxel {first % CHUNKED}",
        "labels 0 to 2",
        f"ignore_index={bad}",
    ):
        assert part in message, message


@every_loss
@pytest.mark.parametrize("bad", [-1, 3, 255])
@pytest.mark.parametrize("by", ["mask", "ignore_index"])
def test_labels_out_of_range_are_tolerated_where_they_do_not_count(name: str, bad: int, by: str) -> None:
    logits, labels = make(space=(CHUNKED,))
    gone = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)) < 0.3
    spoiled = labels.masked_fill(gone, bad)
    # The mean of a focal loss has another denominator with ignore_index, its sum has not.
    common = HOT | ({"reduction": "sum"} if name in FOCAL else {})
    clean = value_and_gradient(LOSSES[name], logits, labels, mask=~gone, **common)
    options = {"mask": ~gone} if by == "mask" else {"ignore_index": bad}
    got = value_and_gradient(LOSSES[name], logits, spoiled, **common, **options)
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])
    assert not got[1][gone.expand_as(logits)].any()


POISONS = [math.nan, math.inf, -math.inf]
ACTIVATIONS: list[dict[str, Any]] = [{"softmax": True}, {"sigmoid": True}, {}]


@every_loss
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", ["labels", "values"])
@pytest.mark.parametrize("dtype", swept([F32, F64, torch.float16], now=[F32]))
def test_nothing_leaks_out_of_a_masked_voxel(
    name: str, activation: dict[str, Any], kind: str, dtype: torch.dtype
) -> None:
    logits, labels = make(space=(4099,), dtype=dtype)
    if not activation:
        logits = logits.sigmoid()
    gone = torch.zeros(labels.shape, dtype=torch.bool)
    gone[0, 0, [0, 7, 4098]], gone[1, 0, 4096:] = True, True
    target = (
        labels if kind == "labels" else torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).to(F32)
    )
    options = activation | {"to_onehot_y": kind == "labels", "mask": ~gone}
    clean = value_and_gradient(LOSSES[name], logits, target, **options)
    poisoned, spoiled = logits.clone(), target.clone()
    poisons = itertools.cycle(POISONS)
    for sample, _, voxel in gone.nonzero().tolist():
        poisoned[sample, :, voxel] = torch.tensor([next(poisons) for _ in range(3)], dtype=dtype)
        spoiled[sample, :, voxel] = 200 if kind == "labels" else next(poisons)
    got = value_and_gradient(LOSSES[name], poisoned, spoiled, **options)
    assert clean[0].isfinite() and torch.equal(got[0], clean[0])
    assert torch.equal(got[1], clean[1])
    assert not got[1][gone.expand_as(logits)].any()


@every_loss
def test_nothing_leaks_out_of_an_ignored_voxel(name: str) -> None:
    logits, labels = make(space=(4099,))
    labels[..., [0, 4096, 4098]] = 255
    options = HOT | {"ignore_index": 255}
    clean = value_and_gradient(LOSSES[name], logits, labels, **options)
    poisoned = logits.clone()
    poisoned[..., 0], poisoned[:, 1, 4096], poisoned[0, :, 4098] = math.nan, math.inf, -math.inf
    got = value_and_gradient(LOSSES[name], poisoned, labels, **options)
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])
    assert not got[1][..., [0, 4096, 4098]].any()


@every_loss
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=str)
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_voxel_that_counts_gives_monais_kind_of_number(
    name: str, activation: dict[str, Any], poison: float
) -> None:
    """-inf is a class ruled out, which softmax and sigmoid take; +inf only sigmoid; NaN none."""
    logits, labels = make(space=(300,))
    labels[0, 0, 9] = 0
    logits[0, 1, 9] = poison
    options: dict[str, Any] = activation | {"to_onehot_y": True}
    ours = value_and_gradient(LOSSES[name], logits, labels, **options)
    theirs = getattr(monai.losses, name)(**options)
    if name in FOCAL and poison == math.inf and "sigmoid" in activation:
        assert ours[0] == math.inf  # MONAI takes infinity from infinity
        return
    if name in FOCAL and poison == -math.inf:
        logits = logits.clamp(min=-300)  # ruled out by any means, where MONAI has NaN
    truth = value_and_gradient(theirs, logits.double(), labels)
    honest = value_and_gradient(theirs, logits, labels)
    assert_close_to_truth(ours[0], truth[0].double(), honest[0], F32, "loss")
    if truth[0].isfinite():
        assert_gradient_close(ours[1], truth[1], honest[1], F32, "gradient")


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 6), (2, 3, 0), (2, 3, 4, 0), (2, 1, 0)], ids=str)
def test_no_samples_and_no_voxels(
    name: str, reduction: str, batch: bool, shape: tuple[int, ...], backend: str
) -> None:
    logits = torch.zeros(shape)
    target = torch.zeros((shape[0], 1, *shape[2:]), dtype=torch.long)
    if shape[1] == 1:
        target = target.float()
    options = {"to_onehot_y": shape[1] > 1, "sigmoid": True, "reduction": reduction, "batch": batch}
    if name == "DiceCELoss" and reduction == "none":
        with pytest.raises(ValueError, match="reduction: got 'none'"):
            LOSSES[name](logits, target, **options)
        return
    if name in FOCAL and reduction == "none" and backend != "eager":
        with pytest.raises(RuntimeError, match="was forced.*map of the size of the logits"):
            LOSSES[name](logits, target, **options)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = value_and_gradient(getattr(monai.losses, name)(**options), logits, target)
    got = value_and_gradient(LOSSES[name], logits, target, **options)
    assert_close_to_truth(got[0], expected[0].double(), expected[0], F32, "loss")
    assert got[1].shape == expected[1].shape and got[0].dtype == expected[0].dtype


@every_loss
@pytest.mark.parametrize("smooth_dr", [1e-5, 2e-5])
@pytest.mark.parametrize("by", ["mask", "ignore_index"])
def test_no_voxel_that_counts(name: str, smooth_dr: float, by: str) -> None:
    """The overlap term is 1 - nr / dr as in MONAI (0 for MCC), the voxel term 0, nothing has a gradient."""
    logits, labels = make()
    options: dict[str, Any] = HOT | {"smooth_dr": smooth_dr}
    if by == "mask":
        options["mask"] = torch.zeros(2, 1, 4, 5)
    else:
        labels, options["ignore_index"] = torch.full_like(labels, 255), 255
    value, gradient = value_and_gradient(LOSSES[name], logits, labels, **options)
    expected = torch.tensor(0 if name == "MCCLoss" else 1 - 1e-5 / smooth_dr, dtype=F64)
    assert_close_to_truth(value, expected, expected, F32, "loss")
    assert not gradient.any()


@every_loss
def test_one_voxel(name: str) -> None:
    logits, labels = make(1, 2, (1,), F64)
    theirs = getattr(monai.losses, name)(**HOT)
    truth = value_and_gradient(theirs, logits, labels)
    got = value_and_gradient(LOSSES[name], logits, labels, **HOT)
    assert_close_to_truth(got[0], truth[0], truth[0], F32, "loss")
    assert_gradient_close(got[1], truth[1], truth[1], F32, "gradient")


def test_a_forced_backend_says_why_it_refuses(backend: str) -> None:
    """The eager backend takes what no kernel does, and gives the oracle's number."""
    soft = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    cases: list[tuple[str, Tensor, Tensor, dict[str, Any]]] = [
        ("no spatial dimensions", Z[..., 0, 0], Y[..., 0, 0], HOT),
        ("target requires a gradient", Z, soft.clone().requires_grad_(), {"softmax": True}),
        ("ignored class of fractions", Z, soft, {"softmax": True, "ignore_index": 1, "mask": soft[:, :1]}),
    ]
    for reason, logits, target, options in cases:
        if backend != "eager":
            with pytest.raises(RuntimeError, match=f"'{backend}' was forced.*{reason}"):
                functional.dice_loss(logits, target, **options)
            continue
        truth = reference.dice_loss(logits.double(), target, **options)
        honest = reference.dice_loss(logits, target, **options)
        assert_close_to_truth(functional.dice_loss(logits, target, **options), truth, honest, F32, reason)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'gpu', expected one of .*'cpu'"), dicekernels.use_backend("gpu"):
        pass
