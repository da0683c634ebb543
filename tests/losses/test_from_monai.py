"""from_monai: the same value, gradient and state_dict as the MONAI object."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import monai
import monai.losses
import monai.losses.unified_focal_loss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dicekernels
from dicekernels import from_monai
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

F32, F64 = torch.float32, torch.float64
HOT = {"to_onehot_y": True, "softmax": True}
WEIGHT = torch.tensor([0.5, 1.0, 3.0])
MATRIX = np.array([[0, 1, 2], [1, 0, 3], [2, 3, 0]], dtype=np.float32)
Changes = dict[str, Any]
CASES: list[tuple[str, dict[str, Any], Changes]] = [
    ("DiceLoss", HOT, {}),
    ("DiceLoss", HOT | {"weight": WEIGHT, "jaccard": True, "ignore_index": 2}, {}),
    (
        "DiceLoss",
        HOT,
        {"squared_pred": True, "batch": True, "smooth_nr": 0.5, "smooth_dr": 1, "softmax": False},
    ),
    ("DiceLoss", HOT, {"softmax": False, "other_act": torch.sigmoid, "reduction": "sum"}),
    (
        "DiceLoss",
        HOT | {"weight": [1.0, 2, 3]},
        {"class_weight": torch.tensor([3.0, 0, 1]), "ignore_index": 1},
    ),
    ("DiceLoss", HOT | {"weight": 2.0}, {"include_background": False}),
    ("DiceLoss", {"softmax": True}, {"soft_label": True}),
    ("GeneralizedDiceLoss", HOT, {}),
    ("GeneralizedDiceLoss", HOT | {"w_type": "simple"}, {"batch": True, "include_background": False}),
    ("GeneralizedDiceLoss", HOT, {"w_type": "uniform", "softmax": False, "sigmoid": True}),
    ("TverskyLoss", HOT | {"alpha": 0.3, "beta": 0.7}, {}),
    ("TverskyLoss", HOT, {"alpha": 0.1, "beta": 0.9, "ignore_index": 0, "reduction": "none"}),
    ("MCCLoss", HOT, {}),
    ("MCCLoss", HOT | {"include_background": False}, {"batch": True, "smooth_nr": 1e-3, "smooth_dr": 1e-2}),
    ("FocalLoss", {"to_onehot_y": True}, {}),
    ("FocalLoss", {"to_onehot_y": True, "alpha": [0.1, 0.2, 0.7], "weight": WEIGHT, "gamma": 1.3}, {}),
    (
        "FocalLoss",
        {"to_onehot_y": True},
        {"alpha": 0.3, "gamma": 0.5, "use_softmax": True, "reduction": "sum"},
    ),
    (
        "FocalLoss",
        {"to_onehot_y": True, "weight": 2.0},
        {"alpha": torch.tensor([0.5, 0.6, 0.7]), "ignore_index": 255},
    ),
    ("FocalLoss", {"to_onehot_y": True}, {"include_background": False, "reduction": "none"}),
    ("GeneralizedWassersteinDiceLoss", {"dist_matrix": MATRIX}, {}),
    ("GeneralizedWassersteinDiceLoss", {"dist_matrix": MATRIX, "weighting_mode": "GDL"}, {"smooth_nr": 0.1}),
    (
        "GeneralizedWassersteinDiceLoss",
        {"dist_matrix": torch.from_numpy(MATRIX), "reduction": "none"},
        {"alpha_mode": "GDL", "m": torch.from_numpy(MATRIX / 4), "reduction": "sum"},
    ),
    ("DiceCELoss", HOT, {}),
    (
        "DiceCELoss",
        HOT | {"weight": WEIGHT, "include_background": False, "lambda_dice": 0.3, "label_smoothing": 0.1},
        {},
    ),
    ("DiceCELoss", HOT, {"lambda_dice": 0.2, "lambda_ce": 3, "cross_entropy.label_smoothing": 0.2}),
    ("DiceCELoss", HOT, {"cross_entropy.weight": WEIGHT, "dice.squared_pred": True}),
    (
        "DiceCELoss",
        HOT | {"weight": WEIGHT},
        {
            "dice.class_weight": torch.tensor([9.0, 1, 0]),
            "dice.reduction": "sum",
            "cross_entropy.reduction": "sum",
        },
    ),
    ("DiceCELoss", HOT, {"cross_entropy.ignore_index": 1, "dice.ignore_index": 1}),
    ("DiceCELoss", HOT, {"dice.include_background": False, "cross_entropy.reduction": "sum"}),
    (
        "DiceCELoss",
        {"sigmoid": True, "weight": torch.tensor([3.0])},
        {"binary_cross_entropy.pos_weight": WEIGHT[2]},
    ),
    ("DiceFocalLoss", HOT, {}),
    ("DiceFocalLoss", HOT | {"weight": WEIGHT, "alpha": 0.3, "gamma": 1.5, "lambda_focal": 0.2}, {}),
    (
        "DiceFocalLoss",
        HOT,
        {"focal.gamma": 3.0, "focal.alpha": 0.8, "lambda_dice": 0.1, "dice.jaccard": True},
    ),
    (
        "DiceFocalLoss",
        HOT,
        {"focal.use_softmax": True, "focal.class_weight": WEIGHT, "focal.ignore_index": 1},
    ),
    ("DiceFocalLoss", HOT, {"dice.include_background": False, "focal.reduction": "sum"}),
    ("DiceFocalLoss", {"softmax": True}, {"to_onehot_y": True, "dice.batch": True}),
    ("GeneralizedDiceFocalLoss", HOT, {}),
    (
        "GeneralizedDiceFocalLoss",
        HOT | {"weight": [1.0, 2, 3], "w_type": "simple"},
        {"lambda_gdl": 0, "focal.alpha": 0.7},
    ),
    ("GeneralizedDiceFocalLoss", HOT, {"generalized_dice.w_type": "uniform", "focal.class_weight": WEIGHT}),
    ("MaskedDiceLoss", HOT | {"weight": WEIGHT}, {}),
    ("MaskedDiceLoss", HOT, {"pre_softmax": False, "pre_sigmoid": True, "jaccard": True}),
    ("AsymmetricUnifiedFocalLoss", {"weight": 0.3, "gamma": 0.4, "delta": 0.6}, {}),
    (
        "AsymmetricUnifiedFocalLoss",
        {},
        {"weight": 0.2, "gamma": 9, "asy_focal_loss.gamma": 1.5, "asy_focal_tversky_loss.delta": 0.2},
    ),
]


def changed(loss: nn.Module, changes: Changes) -> nn.Module:
    for path, value in changes.items():
        owner, _, name = path.rpartition(".")
        setattr(loss.get_submodule(owner), name, value)
    return loss


def data(loss: nn.Module) -> tuple[Tensor, ...]:
    """Logits and what goes with them, as the loss takes them."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((2, 3, 5, 6), generator=generator)
    target = torch.randint(0, 3, (2, 1, 5, 6), generator=generator)
    name = type(loss).__name__
    if name == "AsymmetricUnifiedFocalLoss":
        return logits[:, :1].sigmoid(), target.clamp(max=1)
    if name == "DiceCELoss" and loss.dice.sigmoid:
        return logits[:, :1], target.clamp(max=1)
    if name == "MaskedDiceLoss":
        return logits, target, (torch.rand((2, 1, 5, 6), generator=generator) > 0.3).float()
    if name == "DiceLoss" and loss.soft_label:
        return logits, torch.rand((2, 3, 5, 6), generator=generator)
    return logits, target


def run(loss: Callable[..., Tensor], logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, *args)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def assert_same(ours: nn.Module, theirs: nn.Module, logits: Tensor, *args: Any) -> None:
    got, honest = run(ours, logits, *args), run(theirs, logits, *args)
    truth = run(copy.deepcopy(theirs).double(), logits.double(), *args)
    assert got[0].shape == honest[0].shape and got[0].dtype == honest[0].dtype
    assert_close_to_truth(got[0], truth[0].double(), honest[0], F32, "loss")
    assert_gradient_close(got[1], truth[1].double(), honest[1], F32, "gradient")


@pytest.mark.parametrize(("name", "options", "changes"), CASES)
def test_value_gradient_and_state_are_monais(name: str, options: dict[str, Any], changes: Changes) -> None:
    theirs = changed(getattr(monai.losses, name)(**copy.deepcopy(options)), copy.deepcopy(changes))
    ours = from_monai(theirs)
    assert type(ours) is getattr(dicekernels, name)
    state, others = ours.state_dict(keep_vars=True), theirs.state_dict(keep_vars=True)
    assert list(state) == list(others)
    assert all(state[key] is others[key] for key in state)
    assert_same(ours, theirs, *data(theirs))


@pytest.mark.parametrize(("name", "options", "changes"), [case for case in CASES if case[2]])
def test_every_change_is_readable(name: str, options: dict[str, Any], changes: Changes) -> None:
    ours = from_monai(changed(getattr(monai.losses, name)(**copy.deepcopy(options)), changes))
    for path, value in changes.items():
        owner, _, attribute = path.rpartition(".")
        got = getattr(ours.get_submodule(owner), attribute)
        assert got is value or got == value


MADE: dict[str, Callable[[], nn.Module]] = {
    **{name: getattr(monai.losses, name) for name, _, _ in CASES},
    "GeneralizedWassersteinDiceLoss": lambda: monai.losses.GeneralizedWassersteinDiceLoss(MATRIX),
    "DeepSupervisionLoss": lambda: monai.losses.DeepSupervisionLoss(monai.losses.DiceLoss()),
    "MaskedLoss": lambda: monai.losses.MaskedLoss(monai.losses.DiceLoss),
}
# A value that no constructor sets by itself.
OTHER: dict[str, Any] = {
    "other_act": torch.tanh,
    "pre_other_act": torch.tanh,
    "reduction": "sum",
    "ignore_index": 1,
    "w_type": "simple",
    "alpha_mode": "GDL",
    "weight_mode": "two",
    "weights": [2.0, 1.0],
    "interp_mode": "nearest",
    "m": torch.eye(3),
    "num_classes": 7,
}
REFUSED = {("MaskedDiceLoss", name) for name in ("sigmoid", "softmax", "other_act", "ignore_index")} | {
    ("AsymmetricUnifiedFocalLoss", f"{half}.{name}")
    for half in ("asy_focal_loss", "asy_focal_tversky_loss")
    for name in ("to_onehot_y", "ignore_index", "reduction")
}


@pytest.mark.parametrize("name", MADE)
def test_every_attribute_of_monais_objects_is_carried(name: str) -> None:
    plain = set(vars(nn.Module()))
    paths = []
    for owner, part in MADE[name]().named_modules():
        attributes = {*vars(part), *part._buffers} - plain - {"loss"}
        paths += [f"{owner}.{key}".lstrip(".") for key in sorted(attributes) if owner != "spatial_weighted"]
    assert paths
    for path in paths:
        theirs = MADE[name]()
        owner, _, key = path.rpartition(".")
        part = theirs.get_submodule(owner)
        before = getattr(part, key)
        value = not before if isinstance(before, bool) else OTHER.get(key, 0.375)
        value = WEIGHT if key in part._buffers else value
        theirs = changed(theirs, {path: value})
        if (name, path) in REFUSED:
            with pytest.raises(ValueError, match=f"{key} was set to .* after construction"):
                from_monai(theirs)
            continue
        got = getattr(from_monai(theirs).get_submodule(owner), key)
        assert got is value or got == value, path


def test_deep_supervision_with_what_it_wraps() -> None:
    theirs = monai.losses.DeepSupervisionLoss(
        monai.losses.DiceCELoss(**HOT, weight=WEIGHT), weight_mode="two", weights=[3.0]
    )
    theirs.interp_mode = "nearest"
    theirs.loss.lambda_ce = 0.25
    ours = from_monai(theirs)
    assert type(ours) is dicekernels.DeepSupervisionLoss and type(ours.loss) is dicekernels.DiceCELoss
    assert (ours.interp_mode, ours.weight_mode, ours.weights) == ("nearest", "two", [3.0])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    logits, target = data(theirs.loss)
    levels = [logits, logits[:, :, ::2, ::2]]
    got, expected = ours(levels, target.float()), theirs(levels, target.float())
    truth = copy.deepcopy(theirs.loss).double()
    true = 1 * truth(logits.double(), target) + 0.5 * truth(
        levels[1].double(), F.interpolate(target.float(), size=(3, 3), mode="nearest")
    )
    assert_close_to_truth(got, true.double(), expected, F32, "loss")


def test_masked_loss_with_what_it_wraps() -> None:
    theirs = monai.losses.MaskedLoss(monai.losses.FocalLoss, to_onehot_y=True, gamma=1.0)
    ours = from_monai(theirs)
    assert type(ours) is dicekernels.MaskedLoss and type(ours.loss) is dicekernels.FocalLoss
    logits, target = data(theirs.loss)
    assert_same(ours, theirs, logits, target, torch.ones(1, 1, 5, 6).tril())


def test_wrappers_in_wrappers_and_ours_inside() -> None:
    inner = dicekernels.DiceLoss(**HOT)
    ours = from_monai(monai.losses.DeepSupervisionLoss(monai.losses.MaskedLoss(inner)))
    assert type(ours.loss) is dicekernels.MaskedLoss and ours.loss.loss is inner


@pytest.mark.parametrize("path", ["", "dice", "cross_entropy", "binary_cross_entropy"])
def test_training_flags(path: str) -> None:
    theirs = monai.losses.DiceCELoss(**HOT)
    theirs.get_submodule(path).training = False
    flags = {name: part.training for name, part in theirs.named_modules()}
    assert {name: part.training for name, part in from_monai(theirs).named_modules()} == flags


def test_buffers_are_shared_and_attributes_are_not() -> None:
    theirs = monai.losses.DiceLoss(**HOT, weight=WEIGHT.clone())
    ours = from_monai(theirs)
    theirs.class_weight[0] = 7
    theirs.batch = True
    assert ours.class_weight[0] == 7 and not ours.batch
    crossed = monai.losses.DiceCELoss(**HOT)
    ours = from_monai(crossed)
    crossed.cross_entropy.label_smoothing = 0.5
    assert ours.cross_entropy.label_smoothing == 0


def test_the_dtype_and_the_device_of_buffers() -> None:
    theirs = monai.losses.DiceCELoss(**HOT, weight=WEIGHT).double()
    assert from_monai(theirs).dice.class_weight.dtype == F64
    meta = from_monai(copy.deepcopy(theirs).to("meta"))
    assert {value.device.type for value in meta.state_dict().values()} == {"meta"}


def test_losses_of_this_package_are_returned() -> None:
    class Own(dicekernels.DiceLoss):
        pass

    for loss in (dicekernels.DiceLoss(), dicekernels.DeepSupervisionLoss(nn.MSELoss()), Own()):
        assert from_monai(loss) is loss


def test_a_trainable_lambda_stays_trainable() -> None:
    theirs = monai.losses.DiceCELoss(**HOT)
    theirs.lambda_ce = torch.tensor(0.5, requires_grad=True)
    from_monai(theirs)(*data(theirs)).backward()
    with torch.no_grad():
        expected = theirs.ce(*data(theirs))
    assert_close_to_truth(
        theirs.lambda_ce.grad,
        theirs.ce(data(theirs)[0].double(), data(theirs)[1]).detach(),
        expected,
        F32,
        "gradient of lambda_ce",
    )


def test_monai_is_not_imported() -> None:
    code = (
        "import sys, dicekernels.dropin.monai as d; assert 'monai' not in sys.modules; d.from_monai(d.Dice())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
