"""Scripted losses as modules: state, parents, activations, subclasses, errors, wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import monai.losses
import pytest
import torch
import torch.nn.functional as F
from monai.utils import LossReduction, Weight
from test_monai_modules import F32, F64, make, run
from test_scripting import (
    LOSSES,
    MATRIX,
    SOFT,
    WEIGHTS,
    assert_scripted_is_the_loss,
    build,
    data,
    saved_and_loaded,
)
from torch import Tensor, nn

import dicekernels
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript itself


@pytest.mark.parametrize(
    ("name", "options", "others"),
    [
        ("DiceLoss", {"weight": [1.0, 2.0, 3.0]}, {"weight": [3.0, 1.0, 0.5]}),
        ("FocalLoss", {"weight": [1.0, 2.0, 3.0]}, {"weight": [3.0, 1.0, 0.5]}),
        ("DiceFocalLoss", {"weight": [1.0, 2.0, 3.0]}, {"weight": [3.0, 1.0, 0.5]}),
        (
            "DiceCELoss",
            {"weight": torch.tensor([1.0, 2.0, 3.0]), "lambda_ce": 0.3},
            {"weight": torch.tensor([3.0, 1.0, 0.5]), "lambda_ce": 0.3},
        ),
        ("DiceCELoss", {}, {}),
        ("GeneralizedDiceLoss", {}, {}),
    ],
)
def test_the_state_dict_is_monais(name: str, options: dict[str, Any], others: dict[str, Any]) -> None:
    theirs = getattr(monai.losses, name)(to_onehot_y=True, **others)
    scripted = saved_and_loaded(getattr(dicekernels, name)(to_onehot_y=True, **options))
    assert list(scripted.state_dict()) == list(theirs.state_dict())
    scripted.load_state_dict(theirs.state_dict())
    assert_scripted_is_the_loss(
        getattr(dicekernels, name)(to_onehot_y=True, **others), scripted, *make(), calls=1
    )


def test_attributes_can_be_set_on_the_scripted_loss() -> None:
    loss = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True)
    scripted = saved_and_loaded(loss)
    for module in (loss, scripted):
        module.lambda_dice, module.dice.smooth_nr, module.dice.jaccard = 0.3, 0.5, True
    assert_scripted_is_the_loss(loss, scripted, *make())


def test_options_of_other_types_that_python_takes() -> None:
    loss = dicekernels.GeneralizedDiceLoss(
        1, 1, softmax=1, w_type=Weight.SIMPLE, reduction=LossReduction.SUM, batch=0, ignore_index=255.0
    )
    loss.smooth_nr, loss.reduction = 1, LossReduction.MEAN
    assert_scripted_is_the_loss(loss, saved_and_loaded(loss), *data("labels", {"ignore_index": 255}, F32))
    tversky = dicekernels.TverskyLoss(to_onehot_y=True, softmax=True, alpha=1, beta=torch.tensor(2), gamma=2)
    assert_scripted_is_the_loss(tversky, saved_and_loaded(tversky), *make())
    focal = dicekernels.FocalLoss(to_onehot_y=True, gamma=2, alpha=1, weight=2)
    assert_scripted_is_the_loss(focal, saved_and_loaded(focal), *make())


def test_train_and_eval_are_kept() -> None:
    loss = dicekernels.DiceLoss()
    assert torch.jit.script(loss).training
    assert not torch.jit.script(loss.eval()).training


class Training(nn.Module):
    """A model and its loss in one module, as some training codes script them."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return self.loss(self.scale * x, target, mask=mask)


@pytest.mark.parametrize(
    "loss",
    [
        dicekernels.DiceLoss(to_onehot_y=True, softmax=True, weight=[1.0, 0.5, 2.0]),
        dicekernels.DiceCELoss(to_onehot_y=True, softmax=True, lambda_ce=0.3, weight=[1.0, 0.5, 2.0]),
        dicekernels.DiceFocalLoss(to_onehot_y=True, softmax=True, weight=[1.0, 0.5, 2.0]),
        dicekernels.DeepSupervisionLoss(dicekernels.TverskyLoss(to_onehot_y=True, softmax=True)),
    ],
)
def test_a_parent_scripts_and_still_runs_the_kernels(loss: nn.Module) -> None:
    parent = Training(loss)
    logits, labels = make()
    before = run(parent, logits, labels, WEIGHTS)
    scripted = saved_and_loaded(parent)
    assert_scripted_is_the_loss(parent, scripted, logits, labels, mask=WEIGHTS)
    # torch has put the twin into the parent. Bits, not bounds: outside of TorchScript it is the loss.
    after = run(parent, logits, labels, WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for name, value in loss.state_dict().items():
        assert parent.loss.state_dict()[name] is not None and torch.equal(
            parent.loss.state_dict()[name], value
        )


def test_what_is_done_to_the_twin_reaches_the_loss() -> None:
    loss = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True, weight=[1.0, 0.5, 2.0])
    parent = Training(loss)
    torch.jit.script(parent)
    logits, labels = make()
    parent.loss.lambda_dice = 0.3
    parent.loss.dice.smooth_nr = 0.5
    parent.double().eval()
    assert loss.lambda_dice == 0.3 and loss.dice.smooth_nr == 0.5
    assert loss.cross_entropy.weight.dtype == loss.dice.class_weight.dtype == F64
    assert not loss.dice.training
    fresh = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True, weight=[1.0, 0.5, 2.0], lambda_dice=0.3)
    fresh.dice.smooth_nr = 0.5
    assert torch.equal(parent.loss(logits.double(), labels), fresh(logits.double(), labels))
    # And the next scripting starts from the loss as it is now.
    assert_scripted_is_the_loss(fresh, torch.jit.script(parent).loss, logits, labels)


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def test_activations_that_torchscript_compiles() -> None:
    logits, labels = make()
    for act in (torch.tanh, doubled, F.softplus, nn.Softmax(dim=1), torch.jit.script(doubled)):
        options: dict[str, Any] = {"to_onehot_y": True, "other_act": act}
        loss = dicekernels.DiceLoss(**options)
        assert_scripted_is_the_loss(loss, saved_and_loaded(loss), logits, labels)
        masked = dicekernels.MaskedDiceLoss(**options)
        scripted = saved_and_loaded(masked)
        assert_scripted_is_the_loss(masked, scripted, logits, labels, mask=WEIGHTS / 2)


def test_another_activation_is_refused_with_torchs_words() -> None:
    with pytest.raises(RuntimeError, match="failed to compile it to a TorchScript function"):
        torch.jit.script(dicekernels.DiceLoss(other_act=lambda x: next(iter(x))))


class Doubled(dicekernels.DiceLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * (input - target).abs().mean() + self.smooth_nr


class Clamped(dicekernels.DiceLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.clamp(-5, 5), target)


class OtherCE(dicekernels.DiceCELoss):
    def ce(self, input: Tensor, target: Tensor) -> Tensor:
        return super().ce(2 * input, target)


class Named(dicekernels.DiceLoss):
    """Nothing of the loss is overridden."""

    def describe(self) -> str:
        return "Dice"


def test_an_overridden_forward_is_never_replaced() -> None:
    logits, _ = make()
    loss = Doubled(smooth_nr=0.5)
    assert torch.jit.script(loss)(logits, SOFT) == loss(logits, SOFT)
    with pytest.raises(RuntimeError, match="super"):
        torch.jit.script(Clamped())


def test_other_subclasses() -> None:
    logits, labels = make()
    loss = Named(to_onehot_y=True, softmax=True)
    assert_scripted_is_the_loss(loss, saved_and_loaded(loss), logits, labels)
    with pytest.raises(RuntimeError, match="OtherCE: it overrides ce"):
        torch.jit.script(OtherCE())


def test_a_loss_that_its_twin_would_not_follow_is_refused() -> None:
    loss = dicekernels.DiceCELoss()
    loss.cross_entropy.ignore_index = 2
    with pytest.raises(RuntimeError, match="its cross entropy has an option"):
        torch.jit.script(loss)
    loss = dicekernels.DiceFocalLoss()
    loss.focal = nn.Identity()
    with pytest.raises(RuntimeError, match="its focal is torch.nn.*Identity"):
        torch.jit.script(loss)
    loss = dicekernels.DiceCELoss()
    loss.dice = monai.losses.DiceLoss()
    with pytest.raises(RuntimeError, match="its dice is monai.losses.dice.DiceLoss"):
        torch.jit.script(loss)
    loss = dicekernels.GeneralizedDiceFocalLoss()
    loss.focal.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="its focal has hooks"):
        torch.jit.script(loss)
    loss = dicekernels.DiceCELoss()
    loss.lambda_dice = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="lambda_dice requires a gradient"):
        torch.jit.script(loss)


@pytest.mark.parametrize("name", ["DiceLoss", "GeneralizedDiceLoss", "DiceCELoss", "FocalLoss"])
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_raises(name: str, label: int) -> None:
    scripted = saved_and_loaded(getattr(dicekernels, name)(to_onehot_y=True))
    logits, labels = make()
    labels[0, 0, 0, 0] = label
    with pytest.raises(torch.jit.Error, match=rf"LabelRangeError.* outside \[0, 3\), the first is {label} "):
        scripted(logits, labels)


@pytest.mark.parametrize(
    ("options", "target", "mask", "message"),
    [
        ({}, SOFT[:, :, :4], None, "ground truth has different shape"),
        ({"to_onehot_y": True}, SOFT, None, "labels should have a channel with length equal to one"),
        ({}, SOFT, WEIGHTS[:, :, :4], "mask: got shape"),
        ({"weight": [1.0, 2.0]}, SOFT, None, "length of the `weight` sequence"),
        ({"weight": [1.0, 2.0, -1.0]}, SOFT, None, "no less than 0"),
    ],
)
def test_the_checks_of_the_loss(
    options: dict[str, Any], target: Tensor, mask: Tensor | None, message: str
) -> None:
    loss = dicekernels.DiceLoss(**options)
    logits, _ = make()
    for module in (loss, saved_and_loaded(loss)):
        with pytest.raises(Exception, match=message):
            module(logits, target, mask=mask)


@pytest.mark.parametrize(
    "name", sorted(set(LOSSES) - {"MaskedLoss", "DeepSupervisionLoss", "MaskedDiceLoss"})
)
def test_nothing_leaks_from_masked_voxels(name: str) -> None:
    kind = "probabilities" if name == "AsymmetricUnifiedFocalLoss" else "labels"
    options = {"dist_matrix": MATRIX} if name == "GeneralizedWassersteinDiceLoss" else {}
    loss, _ = build(name, options, kind)
    scripted = saved_and_loaded(loss)
    logits, labels = data(kind, {}, F32)
    dirty, wrong = logits.clone(), labels.clone()
    dirty[0, :, 0], dirty[0, 1, 0, 3], wrong[0, 0, 0] = float("nan"), float("inf"), 77
    truth = run(loss, logits.double(), labels, mask=WEIGHTS)
    clean = run(scripted, logits, labels, mask=WEIGHTS)
    got = run(scripted, dirty, wrong, mask=WEIGHTS)
    assert_close_to_truth(got[0], truth[0].double(), clean[0], F32, "loss")
    assert_gradient_close(got[1], truth[1], clean[1], F32, "gradient")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiceCELoss", {"softmax": True}),
        ("FocalLoss", {}),
        ("FocalLoss", {"use_softmax": True, "gamma": 0.5}),
        ("DiceFocalLoss", {"softmax": True, "gamma": 0.5, "use_softmax": True}),
    ],
)
def test_a_class_that_is_ruled_out(name: str, options: dict[str, Any]) -> None:
    """A logit of minus infinity, and with two classes ruled out a p of 1."""
    loss = getattr(dicekernels, name)(to_onehot_y=True, **options)
    logits, labels = make()
    labels[0, 0, 0], labels[1] = 2, labels[1].clamp(max=1)
    logits[0, :2, 0], logits[1, 2] = float("-inf"), float("-inf")
    assert run(loss, logits, labels)[1].isfinite().all()
    assert_scripted_is_the_loss(loss, saved_and_loaded(loss), logits, labels)


def test_warnings_of_a_single_channel() -> None:
    scripted = saved_and_loaded(
        dicekernels.DiceLoss(softmax=True, to_onehot_y=True, include_background=False)
    )
    logits, target = data("single", {}, F32)
    with pytest.warns(UserWarning) as caught:
        scripted(logits, target)
    assert [str(warning.message) for warning in caught] == [
        f"single channel prediction, `{option}` ignored."
        for option in ("softmax=True", "to_onehot_y=True", "include_background=False")
    ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, F32])
@pytest.mark.parametrize("options", [{}, {"weight_mode": "two"}, {"weights": [1, 0.3, 2]}])
def test_deep_supervision(dtype: torch.dtype, options: dict[str, Any]) -> None:
    loss = dicekernels.DeepSupervisionLoss(dicekernels.DiceCELoss(to_onehot_y=True, softmax=True), **options)
    scripted = saved_and_loaded(loss)
    logits, labels = make()
    labels = labels.to(dtype)

    def levels(module: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *args, **more: module([x, x[:, :, ::2, ::2], x[:, :, :2, 1:5]], *args, **more)

    for more in ({}, {"mask": WEIGHTS}):
        assert_scripted_is_the_loss(levels(loss), levels(scripted), logits, labels, calls=1, **more)
        assert_scripted_is_the_loss(loss, scripted, logits, labels, calls=1, **more)


def squared_error(input: Tensor, target: Tensor) -> Tensor:
    return (input - target).square().mean()


@pytest.mark.parametrize(
    "inner", [monai.losses.TverskyLoss(softmax=True), nn.MSELoss(), squared_error, F.l1_loss]
)
def test_wrappers_of_losses_of_others(inner: Callable[..., Tensor]) -> None:
    logits, _ = make()
    deep = dicekernels.DeepSupervisionLoss(inner)
    scripted = saved_and_loaded(deep)
    # Once: what TorchScript makes of the code of others after that has bits of its own.
    assert_scripted_is_the_loss(deep, scripted, logits, SOFT, calls=1)
    with pytest.raises(torch.jit.Error, match="mask: the loss takes none"):
        scripted([logits], SOFT, mask=WEIGHTS)
    masked = dicekernels.MaskedLoss(inner)
    assert_scripted_is_the_loss(masked, saved_and_loaded(masked), logits, SOFT, calls=1, mask=WEIGHTS)


def test_a_level_that_is_no_number_is_refused() -> None:
    scripted = saved_and_loaded(dicekernels.DeepSupervisionLoss(dicekernels.DiceLoss(reduction="none")))
    with pytest.raises(torch.jit.Error, match="expected one number"):
        scripted([make()[0]], SOFT)
