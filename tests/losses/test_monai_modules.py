"""The modules as MONAI's: state_dict, attributes that change, copies, shapes, MetaTensor, half precision."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import monai.losses
import pytest
import torch
from monai.data import MetaTensor
from monai.utils import LossReduction, Weight
from torch import Tensor, nn

import dicekernels
from dicekernels import functional
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

pytestmark = pytest.mark.usefixtures("backend")
F32, F64 = torch.float32, torch.float64
NAMES = ("DiceLoss", "GeneralizedDiceLoss", "TverskyLoss", "DiceCELoss")
LABELS = {"to_onehot_y": True, "softmax": True}
every_loss = pytest.mark.parametrize("name", NAMES)


def make(
    dtype: torch.dtype = F32, space: tuple[int, ...] = (5, 7), classes: int = 3
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn((2, classes, *space), dtype=F64, generator=generator).to(dtype)
    return logits, torch.randint(0, classes, (2, 1, *space), generator=generator)


def run(loss: Callable[..., Tensor], logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, *args, **options)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def assert_is_monais(ours: nn.Module, theirs: nn.Module, logits: Tensor, target: Tensor) -> None:
    got, honest = run(ours, logits, target), run(theirs, logits, target)
    truth = run(copy.deepcopy(theirs).double(), logits.double(), target)
    # MONAI's one-hot and its generalized Dice weights stay float32 in float64, too.
    assert_close_to_truth(got[0], truth[0].double(), honest[0], F32, "loss")
    assert_gradient_close(got[1], truth[1], honest[1], F32, "gradient")


STATES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DiceLoss", {}, {}),
    ("DiceLoss", {"weight": [1.0, 2.0, 3.0]}, {"weight": [3.0, 1.0, 0.5]}),
    ("GeneralizedDiceLoss", {}, {}),
    ("TverskyLoss", {}, {}),
    ("DiceCELoss", {}, {}),
    ("DiceCELoss", {"weight": torch.tensor([1.0, 2.0, 3.0])}, {"weight": torch.tensor([3.0, 1.0, 0.5])}),
    (
        "DiceCELoss",
        {"weight": torch.tensor([1.0, 2.0, 3.0]), "include_background": False},
        {"weight": torch.tensor([3.0, 1.0, 0.5]), "include_background": False},
    ),
]


@pytest.mark.parametrize(("name", "options", "others"), STATES)
def test_state_dicts_go_both_ways(name: str, options: dict[str, Any], others: dict[str, Any]) -> None:
    ours = getattr(dicekernels, name)(**LABELS, **copy.deepcopy(options))
    theirs = getattr(monai.losses, name)(**LABELS, **copy.deepcopy(others))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    assert_is_monais(ours, theirs, *make())
    theirs.load_state_dict(before)
    assert all(torch.equal(theirs.state_dict()[key], before[key]) for key in before)
    assert_is_monais(getattr(dicekernels, name)(**LABELS, **options), theirs, *make())


MODULES: list[tuple[str, dict[str, Any]]] = [
    ("DiceLoss", {"weight": [1.0, 2.0, 3.0], "log_loss": True}),
    ("GeneralizedDiceLoss", {"w_type": "simple", "ignore_index": 1}),
    ("TverskyLoss", {"alpha": 0.3, "gamma": 0.75}),
    ("DiceCELoss", {"weight": [1.0, 2.0, 3.0], "lambda_dice": 0.3, "lambda_ce": 0.7, "label_smoothing": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), MODULES)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_give_the_same_bits(name: str, options: dict[str, Any], copied: Callable[[Any], Any]) -> None:
    loss = getattr(dicekernels, name)(**LABELS, **options)
    logits, labels = make()
    for one, other in zip(run(loss, logits, labels), run(copied(loss), logits, labels), strict=True):
        assert torch.equal(one, other)


def test_a_deep_copy_is_apart() -> None:
    loss = dicekernels.DiceCELoss(**LABELS, lambda_dice=0.3)
    other = copy.deepcopy(loss)
    other.lambda_dice = 2.0
    assert loss.lambda_dice == 0.3 and other.lambda_dice == 2.0


@pytest.mark.parametrize(
    "move",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda m: m.to(torch.float16).to("cpu").float(),
        lambda m: nn.Sequential(m).half()[0],
    ],
)
def test_the_lambdas_stay_exact_in_other_dtypes(move: Callable[[nn.Module], nn.Module]) -> None:
    # 0.1 is 0.0999755859375 in float16: off by 2e-4
    loss = dicekernels.DiceCELoss(**LABELS, lambda_dice=0.1, lambda_ce=0.7)
    logits, labels = make(F64)
    before = run(loss, logits, labels)
    moved = move(loss)
    assert (moved.lambda_dice, moved.lambda_ce) == (0.1, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(run(moved, logits, labels), before, strict=True))


def set_to(path: str, value: Any) -> Callable[[nn.Module], None]:
    def change(loss: nn.Module) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            loss = getattr(loss, owner)
        setattr(loss, name, value)

    return change


CHANGES: list[tuple[str, dict[str, Any], str, Any]] = [
    ("DiceLoss", {}, "smooth_nr", 0.5),
    ("DiceLoss", {}, "smooth_dr", 0.5),
    ("DiceLoss", {}, "batch", True),
    ("DiceLoss", {}, "jaccard", True),
    ("DiceLoss", {}, "squared_pred", True),
    ("DiceLoss", {}, "soft_label", True),
    ("DiceLoss", {}, "include_background", False),
    ("DiceLoss", {}, "reduction", "sum"),
    ("DiceLoss", {}, "ignore_index", 1),
    ("DiceLoss", {"weight": [1.0, 2.0, 3.0]}, "class_weight", torch.tensor([3.0, 0.0, 1.0])),
    ("DiceLoss", {"weight": [1.0, 2.0, 3.0]}, "class_weight", None),
    ("GeneralizedDiceLoss", {}, "w_type", "uniform"),
    ("GeneralizedDiceLoss", {}, "smooth_nr", 0.5),
    ("TverskyLoss", {}, "alpha", 0.9),
    ("TverskyLoss", {}, "beta", 0.9),
    ("TverskyLoss", {}, "ignore_index", 2),
    ("DiceCELoss", {}, "lambda_dice", 0.25),
    ("DiceCELoss", {}, "lambda_ce", 0.0),
    ("DiceCELoss", {}, "cross_entropy.label_smoothing", 0.3),
    ("DiceCELoss", {}, "cross_entropy.weight", torch.tensor([1.0, 0.5, 2.0])),
    ("DiceCELoss", {}, "dice.smooth_nr", 0.5),
    ("DiceCELoss", {}, "dice.squared_pred", True),
    ("DiceCELoss", {"weight": torch.ones(3)}, "dice.class_weight", torch.tensor([1.0, 0.5, 2.0])),
]


@pytest.mark.parametrize(("name", "options", "path", "value"), CHANGES)
def test_changed_attributes_take_effect_as_in_monai(
    name: str, options: dict[str, Any], path: str, value: Any
) -> None:
    libraries = (dicekernels, monai.losses)
    ours, theirs = (getattr(lib, name)(**LABELS, **copy.deepcopy(options)) for lib in libraries)
    logits, labels = make()
    before = ours(logits, labels)
    for loss in (ours, theirs):
        set_to(path, copy.deepcopy(value))(loss)
    if path not in ("soft_label", "dice.soft_label"):  # the same for targets of zeros and ones
        assert not torch.equal(ours(logits, labels), before)
    assert_is_monais(ours, theirs, logits, labels)


def test_a_weight_changed_in_place_is_checked_again() -> None:
    loss = dicekernels.DiceLoss(**LABELS, weight=[1.0, 2.0, 3.0])
    logits, labels = make()
    loss(logits, labels)
    loss.class_weight[1] = -1.0
    with pytest.raises(ValueError, match="-1.0"):
        loss(logits, labels)


def test_positive_weight_and_lambdas_of_one_channel() -> None:
    logits, _ = make(classes=1)
    target = (logits > 0.3).float()
    ours, theirs = (
        library.DiceCELoss(sigmoid=True, weight=torch.tensor([3.0]))
        for library in (dicekernels, monai.losses)
    )
    assert_is_monais(ours, theirs, logits, target)
    for loss in (ours, theirs):
        loss.binary_cross_entropy.pos_weight = torch.tensor([0.5])
        loss.lambda_ce = 2.0
    assert_is_monais(ours, theirs, logits, target)


def test_a_lambda_below_zero_is_refused_at_any_time() -> None:
    with pytest.raises(ValueError, match="lambda_ce should be no less than 0"):
        dicekernels.DiceCELoss(lambda_ce=-1.0)
    loss = dicekernels.DiceCELoss(lambda_ce=0.5)
    with pytest.raises(ValueError, match="lambda_ce should be no less than 0"):
        loss.lambda_ce = -0.5
    assert loss.lambda_ce == 0.5


@pytest.mark.parametrize("space", [(6,), (2, 3), (2, 3, 4), (1, 2, 3, 2)])
@pytest.mark.parametrize("batch", [False, True])
def test_shapes_without_reduction(space: tuple[int, ...], batch: bool) -> None:
    logits, labels = make(space=space)
    ones = (1,) * len(space)
    options: dict[str, Any] = LABELS | {"reduction": "none", "batch": batch, "include_background": False}
    expected = {
        "DiceLoss": (2, *ones) if batch else (2, 2, *ones),
        "GeneralizedDiceLoss": (1, *ones) if batch else (2, 1, *ones),
        "TverskyLoss": (2,) if batch else (2, 2),
    }
    for name, shape in expected.items():
        assert getattr(monai.losses, name)(**options)(logits, labels).shape == shape
        assert getattr(dicekernels, name)(**options)(logits, labels).shape == shape


def test_enums_of_monai_are_options() -> None:
    logits, labels = make()
    options = {"reduction": LossReduction.SUM, "w_type": Weight.SIMPLE}
    ours, theirs = (lib.GeneralizedDiceLoss(**LABELS, **options) for lib in (dicekernels, monai.losses))
    assert_is_monais(ours, theirs, logits, labels)


@every_loss
@pytest.mark.parametrize("which", ["logits", "target", "both", "neither"])
def test_a_metatensor_in_is_a_metatensor_out(name: str, which: str) -> None:
    logits, labels = make()
    pair = [MetaTensor(x) if which in (n, "both") else x for n, x in (("logits", logits), ("target", labels))]
    ours, theirs = (getattr(lib, name)(**LABELS) for lib in (dicekernels, monai.losses))
    got, expected = ours(*pair), theirs(*pair)
    assert type(got) is type(expected)
    assert torch.equal(got.as_subclass(Tensor), ours(logits, labels))


@every_loss
def test_labels_without_a_channel(name: str) -> None:
    logits, labels = make()
    loss = getattr(dicekernels, name)(**LABELS)
    for one, other in zip(run(loss, logits, labels[:, 0]), run(loss, logits, labels), strict=True):
        assert torch.equal(one, other)


def test_generalized_dice_of_no_foreground_is_0_and_flat() -> None:
    logits, labels = make()
    options = LABELS | {"include_background": False}
    for library in (dicekernels, monai.losses):
        value, gradient = run(library.GeneralizedDiceLoss(**options), logits, torch.zeros_like(labels))
        assert value == 0 and not gradient.any()


def test_warnings_point_at_the_caller() -> None:
    logits = torch.rand(2, 1, 5)
    for call in (
        partial(dicekernels.DiceLoss(softmax=True), logits, logits.round()),
        partial(functional.dice_loss, logits, logits.round(), softmax=True),
    ):
        with pytest.warns(UserWarning, match="single channel prediction, `softmax=True` ignored.") as caught:
            call()
        assert len(caught) == 1


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        # MONAI: 1.0 for the background, whose probabilities add up beyond 65504
        ("DiceLoss", {}, False),
        ("DiceLoss", {"jaccard": True}, False),
        ("DiceLoss", {"squared_pred": True}, False),  # MONAI: NaN
        ("GeneralizedDiceLoss", {}, False),
        ("DiceCELoss", {}, False),
        ("DiceLoss", {}, True),  # MONAI: NaN
        ("GeneralizedDiceLoss", {}, True),  # MONAI: NaN
    ],
)
def test_sums_beyond_float16_where_monai_is_wrong(name: str, options: dict[str, Any], values: bool) -> None:
    """110,592 voxels, one in a thousand foreground."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(1, 1, 48, 48, 48, generator=generator) < 0.001).long()
    logits = torch.randn(1, 2, 48, 48, 48, generator=generator)
    logits[:, 0] += 5
    logits = logits.half()
    options = {"softmax": True, "to_onehot_y": not values, **options}
    target = torch.cat([1 - labels, labels], 1).half() if values else labels
    ours, theirs = (getattr(library, name)(**options) for library in (dicekernels, monai.losses))
    got = run(ours, logits, target)
    wide = target.double() if values else target
    truth, honest = run(theirs, logits.double(), wide), run(theirs, logits.float(), wide.float())
    wrong = theirs(logits, target)
    kind = wrong.dtype
    assert got[0].dtype == kind
    assert_close_to_truth(got[0], truth[0].double(), honest[0].to(kind), kind, "loss")
    assert_gradient_close(got[1], truth[1], honest[1].half(), torch.float16, "gradient")
    assert not (wrong.double() - truth[0]).abs() < 1e-3, "MONAI has mended this: drop the deviation"
