"""``repr`` of the losses: the call that makes the loss, with the options that are not the default."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import dicekernels
from dicekernels import (
    AsymmetricUnifiedFocalLoss,
    DeepSupervisionLoss,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceFocalLoss,
    GeneralizedDiceLoss,
    GeneralizedWassersteinDiceLoss,
    MaskedDiceLoss,
    MaskedLoss,
    MCCLoss,
    TverskyLoss,
)

HOT = {"to_onehot_y": True, "softmax": True}
SHOWN = "to_onehot_y=True, softmax=True"
FOUR = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (DiceLoss(), ""),
        (DiceLoss(**HOT, weight=FOUR, log_loss=True), f"{SHOWN}, weight=tensor(4 values), log_loss=True"),
        (GeneralizedDiceLoss(sigmoid=True, w_type="simple"), "sigmoid=True, w_type='simple'"),
        (TverskyLoss(alpha=0.3, beta=0.7), "alpha=0.3, beta=0.7"),
        (MCCLoss(smooth_nr=1e-5, ignore_index=255), "smooth_nr=1e-05, ignore_index=255"),
        (MaskedDiceLoss(softmax=True, weight=2.0), "softmax=True, weight=tensor(1 value)"),
        (FocalLoss(gamma=1.5, alpha=[0.1, 0.9]), "gamma=1.5, alpha=tensor(2 values)"),
        (FocalLoss(alpha=0.25, weight=FOUR), "alpha=0.25, weight=tensor(4 values)"),
        (DiceCELoss(**HOT, lambda_ce=0.5), f"{SHOWN}, lambda_ce=0.5"),
        (
            DiceCELoss(include_background=False, weight=FOUR, ignore_index=255, label_smoothing=0.1),
            "include_background=False, weight=tensor(4 values), label_smoothing=0.1, ignore_index=255",
        ),
        (DiceFocalLoss(**HOT, use_softmax=True, gamma=1.0), f"{SHOWN}, gamma=1.0, use_softmax=True"),
        (
            GeneralizedDiceFocalLoss(**HOT, lambda_gdl=2.0, reduction="sum", weight=FOUR),
            f"{SHOWN}, reduction='sum', weight=tensor(4 values), lambda_gdl=2.0",
        ),
        (
            GeneralizedWassersteinDiceLoss([[0.0, 1.0], [1.0, 0.0]], "GDL"),
            "dist_matrix=tensor(2 x 2 values), weighting_mode='GDL'",
        ),
        (AsymmetricUnifiedFocalLoss(True, gamma=1.0), "to_onehot_y=True, gamma=1.0"),
        (
            DeepSupervisionLoss(DiceLoss(softmax=True), "two", weights=FOUR),
            "loss=dicekernels.DiceLoss(softmax=True), weight_mode='two', weights=[1.0, 2.0, 3.0, 4.0]",
        ),
        (MaskedLoss(DiceLoss, softmax=True), "loss=dicekernels.DiceLoss(softmax=True)"),
        (MaskedLoss(nn.functional.mse_loss), "loss=mse_loss"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_not_the_default_is_shown(loss: nn.Module, shown: str) -> None:
    assert repr(loss) == f"dicekernels.{type(loss).__name__}({shown})"


def test_every_loss_is_covered_and_made_with_nothing_shows_nothing() -> None:
    needs = {"GeneralizedWassersteinDiceLoss", "DeepSupervisionLoss", "MaskedLoss"}
    for name in dicekernels.modules.__all__:
        if name not in needs:
            assert repr(getattr(dicekernels, name)()) == f"dicekernels.{name}()"


def test_options_set_later_are_shown_also_in_halves() -> None:
    loss = DiceCELoss(**HOT)
    loss.dice.batch = True
    loss.lambda_ce = 0.25
    assert repr(loss) == f"dicekernels.DiceCELoss({SHOWN}, batch=True, lambda_ce=0.25)"
    loss.cross_entropy.ignore_index = 3
    loss.dice.log_loss = True
    assert repr(loss).endswith("lambda_ce=0.25, dice.log_loss=True, cross_entropy.ignore_index=3)")
    focal = DiceFocalLoss(to_onehot_y=True)
    focal.focal.mean_over_classes = False
    assert repr(focal) == "dicekernels.DiceFocalLoss(to_onehot_y=True, focal.mean_over_classes=False)"
    levels = DeepSupervisionLoss(loss)
    levels.interp_mode = "nearest"
    assert repr(levels) == f"dicekernels.DeepSupervisionLoss(loss={loss!r}, interp_mode='nearest')"
    unified = AsymmetricUnifiedFocalLoss()
    unified.asy_focal_loss.epsilon = 1e-6
    unified.gamma = 3.0  # as in MONAI without effect
    assert repr(unified) == "dicekernels.AsymmetricUnifiedFocalLoss(asy_focal_loss.epsilon=1e-06)"


def test_halves_that_differ_are_named() -> None:
    loss = DiceCELoss(softmax=True)
    loss.cross_entropy.reduction = "sum"
    assert repr(loss) == "dicekernels.DiceCELoss(softmax=True, cross_entropy.reduction='sum')"
    weighted = DiceFocalLoss(softmax=True, weight=FOUR)
    weighted.dice.class_weight = None
    assert repr(weighted) == "dicekernels.DiceFocalLoss(softmax=True, focal.class_weight=tensor(4 values))"
    weighted.focal.include_background = False
    assert "focal.include_background=False" in repr(weighted)


def test_another_half_is_shown_as_a_whole() -> None:
    class Mine(DiceLoss):
        pass

    loss = DiceCELoss(**HOT)
    loss.dice = Mine(sigmoid=True)
    loss.projection = nn.Identity()
    assert repr(loss) == "dicekernels.DiceCELoss(dice=Mine(sigmoid=True), projection=Identity())"


def test_a_subclass_shows_its_own_name() -> None:
    class Warm(DiceCELoss):
        def __init__(self, step: int = 0) -> None:
            super().__init__(**HOT)
            self.step = step

    assert repr(Warm(3)) == f"Warm({SHOWN})"


def test_inside_a_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Identity()
            self.loss = DiceCELoss(**HOT)

    assert repr(Model()).splitlines() == [
        "Model(",
        "  (net): Identity()",
        f"  (loss): dicekernels.DiceCELoss({SHOWN})",
        ")",
    ]


def test_no_value_of_a_tensor_is_read() -> None:
    # A fake tensor, as one on a busy device, refuses to be read.
    with FakeTensorMode():
        factor, weight = torch.tensor(0.5, device="cuda"), torch.rand(4, device="cuda")
        loss = DiceCELoss(weight=weight, lambda_ce=factor)
        with pytest.raises(DataDependentOutputException):
            factor.item()
        shown = repr(loss)
    assert shown == (
        "dicekernels.DiceCELoss(weight=tensor(4 values, cuda:0), lambda_ce=tensor(1 value, cuda:0))"
    )
    trained = DiceCELoss(lambda_dice=nn.Parameter(torch.tensor(1.0)))
    assert repr(trained) == "dicekernels.DiceCELoss(lambda_dice=Parameter(1 value))"


def test_functions_enums_and_lists_are_short() -> None:
    assert repr(DiceLoss(other_act=torch.tanh)) == "dicekernels.DiceLoss(other_act=tanh)"
    partial = functools.partial(torch.softmax, dim=1)
    assert repr(DiceLoss(other_act=partial)) == "dicekernels.DiceLoss(other_act=partial(...))"
    assert repr(DiceLoss(other_act=nn.Softmax(1))) == "dicekernels.DiceLoss(other_act=Softmax(dim=1))"
    monai = pytest.importorskip("monai.utils")
    assert repr(DiceLoss(reduction=monai.LossReduction.SUM)) == "dicekernels.DiceLoss(reduction='sum')"
    many = DeepSupervisionLoss(DiceLoss(), weights=[torch.tensor(1.0)] * 99)
    assert repr(many).count("tensor(1 value)") == 8 and repr(many).endswith(", ...])")


def test_it_never_raises() -> None:
    class Broken(nn.Module):
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    loss = DiceCELoss(**HOT)
    loss.dice = Broken()
    del loss.cross_entropy, loss.lambda_ce
    assert repr(loss) == "dicekernels.DiceCELoss(dice=Broken(...))"
    bare = DiceLoss.__new__(DiceLoss)
    assert repr(bare) == "dicekernels.DiceLoss()"
    levels = DeepSupervisionLoss(DiceLoss())
    levels.loss = levels
    assert repr(levels) == "dicekernels.DeepSupervisionLoss(loss=...)"
    assert repr(nn.Sequential(DiceLoss(other_act=lambda x: x))).splitlines()[1] == (
        "  (0): dicekernels.DiceLoss(other_act=<lambda>)"
    )


def test_copies_say_the_same() -> None:
    loss = DiceFocalLoss(**HOT, lambda_focal=torch.tensor(2.0), weight=FOUR)
    for again in (copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.half()):
        assert repr(again) == repr(loss)
