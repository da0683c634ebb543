"""A call that was seen before takes a shorter way: whatever changed since, it is that of a fresh object."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicekernels
from dicekernels import deferred, functional, plans

HOT = {"to_onehot_y": True, "softmax": True}
LABELS = (torch.arange(2 * 6 * 6 * 6) % 7 % 3).to(torch.uint8).view(2, 1, 6, 6, 6)
MASK = (torch.arange(2 * 6 * 6 * 6) % 5).float().view(2, 1, 6, 6, 6) / 4
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "DiceLoss": lambda: dicekernels.DiceLoss(**HOT, weight=[1.0, 2.0, 3.0]),
    "DiceCELoss": lambda: dicekernels.DiceCELoss(**HOT, weight=torch.tensor([1.0, 2.0, 3.0]), lambda_ce=0.5),
    "DiceFocalLoss": lambda: dicekernels.DiceFocalLoss(**HOT, lambda_dice=torch.tensor(2.0)),
    "FocalLoss": lambda: dicekernels.FocalLoss(to_onehot_y=True),
    "GeneralizedDiceLoss": lambda: dicekernels.GeneralizedDiceLoss(**HOT),
    "GeneralizedDiceFocalLoss": lambda: dicekernels.GeneralizedDiceFocalLoss(**HOT),
    "MCCLoss": lambda: dicekernels.MCCLoss(**HOT),
    "TverskyLoss": lambda: dicekernels.TverskyLoss(**HOT),
}
# Another value for each attribute, wherever it lives.
ON = "sigmoid squared_pred jaccard batch soft_label log_loss use_softmax mean_over_classes softmax_over_all"
OFF = "include_background to_onehot_y softmax ce_include_background"
OTHERS: dict[str, Any] = dict.fromkeys(ON.split(), True) | dict.fromkeys(OFF.split(), False)
OTHERS |= {"other_act": torch.sigmoid, "reduction": "sum", "w_type": "uniform", "ignore_index": 1}
OTHERS |= {
    "smooth_nr": 0.25,
    "smooth_dr": 0.5,
    "alpha": 0.2,
    "beta": 0.9,
    "gamma": 1.5,
    "label_smoothing": 0.1,
}
OTHERS |= {"lambda_dice": 0.25, "lambda_ce": torch.tensor(3.0), "lambda_gdl": 0.25}
OTHERS |= {"lambda_focal": nn.Parameter(torch.tensor(0.3))}
OTHERS |= dict.fromkeys(("class_weight", "weight"), torch.tensor([2.0, 0.5, 1.0]))
# Of no effect on these problems: hard labels, three channels, no focal softmax, nothing ignored, large sums;
# attributes that MONAI's losses leave unread.
INERT = {"sigmoid", "soft_label", "binary_cross_entropy", "softmax_over_all", "mean_over_classes"}
UNREAD = {(loss, "", "reduction") for loss in ("DiceCELoss", "DiceFocalLoss", "GeneralizedDiceFocalLoss")}
UNREAD |= {(loss, "focal", "weight") for loss in ("DiceFocalLoss", "GeneralizedDiceFocalLoss")}
UNREAD |= {("DiceFocalLoss", half, "to_onehot_y") for half in ("dice", "focal")}
UNREAD |= {("FocalLoss", "", "weight"), ("MCCLoss", "", "smooth_dr")}


def logits() -> Tensor:
    return (torch.arange(2 * 3 * 6 * 6 * 6).view(2, 3, 6, 6, 6) * 0.37).sin().mul_(3)


def run(loss: Callable[..., Tensor], z: Tensor, target: Tensor = LABELS, **more: Any) -> Any:
    """Loss and gradient, or the error."""
    z = z.detach().requires_grad_()
    try:
        value = loss(z, target, **more)
        (gradient,) = torch.autograd.grad(value.sum(), z)
    except Exception as error:  # which one is part of what is compared
        return type(error).__name__, str(error)
    return value.detach(), gradient


def assert_fresh(loss: Any, *args: Any, **more: Any) -> None:
    """The next call is that of a copy for which nothing is kept."""
    got = run(loss, *args, **more)
    plans._plans.clear()
    expected = run(copy.deepcopy(loss), *args, **more)
    if isinstance(expected[0], str):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def seen(loss: Any, *args: Any, **more: Any) -> None:
    """Calls it until a plan of the call is kept."""
    plans._plans.clear()
    for _ in range(2):
        run(loss, *args, **more)
    assert plans._plans


CHANGES = [
    (name, part, attribute)
    for name, loss in {name: make() for name, make in LOSSES.items()}.items()
    for part, module in (("", loss), *loss.named_children())
    for attribute in OTHERS
    if hasattr(module, attribute)
]


@pytest.mark.parametrize(("name", "part", "attribute"), CHANGES)
def test_every_attribute(name: str, part: str, attribute: str, backend: str) -> None:
    loss: Any = LOSSES[name]()
    run(loss, logits())
    before = run(loss, logits())
    owner = getattr(loss, part) if part else loss
    setattr(owner, attribute, OTHERS[attribute])
    assert_fresh(loss, logits())
    after = run(loss, logits())
    inert = {part, attribute} & INERT or (name, part, attribute) in UNREAD
    if not inert and not isinstance(after[0], str):
        same = map(torch.equal, before, after)
        assert not all(same), "the change has no effect, so nothing was tested"


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_call_takes_the_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LOSSES[name]()
    seen(loss, logits())
    monkeypatch.setattr("dicekernels.prepare.prepare", None)
    for module in ("overlap", "focal", "compound"):
        monkeypatch.setattr(f"dicekernels.functional.{module}.prepare", None)
    assert isinstance(run(loss, logits())[0], Tensor)
    assert isinstance(run(loss, logits()[:1], LABELS[:1])[0], str)  # that one would have to prepare


def test_weights_and_lambdas_that_change_in_place(backend: str) -> None:
    loss: Any = LOSSES["DiceCELoss"]()
    loss.lambda_dice = torch.tensor(1.0)
    seen(loss, logits())
    for tensor in (loss.cross_entropy.weight, loss.lambda_dice):
        tensor.mul_(2)
        assert_fresh(loss, logits())
    seen(loss, logits())
    loss.cross_entropy.weight[1] = -1
    assert run(loss, logits())[0] == "ValueError"


def test_weights_of_both_halves_are_not_mixed_up() -> None:
    loss: Any = LOSSES["DiceCELoss"]()
    assert loss.dice.class_weight is loss.cross_entropy.weight
    seen(loss, logits())
    loss.dice.class_weight = torch.tensor([5.0, 1.0, 1.0])
    assert_fresh(loss, logits())


def test_overrides_of_object_class_and_half(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DiceCELoss", "DiceFocalLoss"):
        loss: Any = LOSSES[name]()
        seen(loss, logits())
        loss.dice.forward = lambda z, y, **_: z.square().mean()
        got = run(loss, logits())
        assert not isinstance(got[0], str)
        del loss.dice.forward
        assert_fresh(loss, logits())
    gdl: Any = LOSSES["GeneralizedDiceLoss"]()
    seen(gdl, logits())
    plain = run(gdl, logits())[0]
    monkeypatch.setattr(dicekernels.GeneralizedDiceLoss, "w_func", lambda self, g: g.square())
    assert not torch.equal(run(gdl, logits())[0], plain)


def test_forced_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LOSSES["DiceCELoss"]()
    seen(loss, logits())
    calls, op = [], dicekernels.backends.eager.sums
    monkeypatch.setattr("dicekernels.backends.eager.sums", lambda *args: calls.append(1) or op(*args))
    with dicekernels.use_backend("eager"):
        run(loss, logits())
        run(loss, logits())
    assert len(calls) == 2
    run(loss, logits())
    assert len(calls) == 2 or "cpu" not in dicekernels.available_backends()


def test_environment_and_values(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    loss = dicekernels.DiceCELoss(**HOT)
    bad = LABELS.clone()
    bad[0, 0, 0, 0, 0] = 9
    seen(loss, logits())
    assert run(loss, logits(), bad)[0] == "LabelRangeError"
    assert isinstance(run(loss, logits())[0], Tensor)
    negative = MASK.clone()
    seen(loss, logits(), mask=negative)
    negative[0, 0, 0, 0, 0] = -1
    assert run(loss, logits(), mask=negative)[0] == "ValueError"
    if backend != "eager":
        return
    # As where a read of the count would wait for the device.
    asked = "DICEKERNELS_CHECK"
    monkeypatch.setattr(deferred, "reads_at_once", lambda device: os.environ.get(asked) == "1")
    assert run(loss, logits(), bad)[0].isnan()
    monkeypatch.setenv(asked, "1")
    assert run(loss, logits(), bad)[0] == "LabelRangeError"


def test_strides(backend: str) -> None:
    loss = LOSSES["DiceCELoss"]()
    wide = torch.stack([logits(), logits()], -1)
    others = [
        logits().to(memory_format=torch.channels_last_3d),
        wide[..., 1],
        torch.cat([logits()] * 2, 2)[:, :, ::2],
        logits().transpose(2, 4),
        logits()[:1].expand(2, -1, -1, -1, -1),
    ]
    seen(loss, logits(), mask=MASK)
    for z in others:
        assert_fresh(loss, z, mask=MASK)
        assert_fresh(loss, logits(), LABELS.transpose(2, 4), mask=MASK.transpose(3, 4))


def test_gradients_modes_and_kinds_of_tensors(backend: str) -> None:
    loss = dicekernels.DiceLoss(softmax=True)
    target = torch.softmax(logits() * 2, 1)
    seen(loss, logits(), target)
    with torch.inference_mode():
        made_there = target.clone()
    with torch.no_grad():
        assert not loss(logits().requires_grad_(), target).requires_grad
    assert_fresh(loss, logits(), made_there)
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        assert_fresh(loss, logits().to(kind), target)
        assert_fresh(loss, logits(), target.to(kind))
    with torch.autocast("cpu", torch.bfloat16):
        half = logits().bfloat16()
        seen(loss, half, target.bfloat16())
        inside = run(loss, half, target.bfloat16())[0]
    assert inside.dtype != run(loss, half, target.bfloat16())[0].dtype
    if backend == "eager":
        learned = target.clone().requires_grad_()
        loss(logits(), learned).backward()
        assert learned.grad.abs().sum() > 0


def test_warnings_come_with_every_call() -> None:
    z, one = logits()[:, :1], (LABELS > 0).float()
    for make, options in (
        (dicekernels.DiceLoss, {"include_background": False, "sigmoid": True}),
        (dicekernels.FocalLoss, {"include_background": False}),
    ):
        for _ in range(3):
            with pytest.warns(UserWarning, match="single channel"):
                make(**options)(z, one)
    two = dicekernels.FocalLoss(include_background=False, to_onehot_y=True, use_softmax=True)
    for _ in range(3):
        with pytest.warns(UserWarning, match="softmax over one of them"):
            two(logits()[:, :2], LABELS.clamp(max=1))


def test_lists_callables_and_subclasses_have_no_plan() -> None:
    plans._plans.clear()
    run(lambda z, y: functional.dice_loss(z, y, **HOT, weight=[1.0, 2.0, 3.0]), logits())
    run(lambda z, y: functional.dice_loss(z, y, to_onehot_y=True, other_act=torch.sigmoid), logits())
    run(lambda z, y: functional.dice_loss(nn.Parameter(z.detach()), y, **HOT).sum() + z.sum(), logits())
    run(lambda z, y: functional.masked_dice_loss(z, y, MASK, **HOT), logits())
    assert not plans._plans


def test_the_number_of_plans_is_bounded_and_threads_may_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LIMIT", 3)
    plans._plans.clear()

    def value(smooth: float) -> float:
        return float(functional.dice_loss(logits(), LABELS, **HOT, smooth_nr=smooth))

    numbers = [0.1 * (i % 7) for i in range(140)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(value, numbers))
    assert len(plans._plans) <= 3 + 4  # one of each thread may come between the look and the entry
    plans._plans.clear()
    assert got == [value(number) for number in numbers]


def test_no_tensor_is_kept_alive() -> None:
    loss = LOSSES["DiceCELoss"]()
    seen(loss, logits(), mask=MASK)
    leaves: list[Any] = [*plans._plans.items()]
    while leaves:
        leaf = leaves.pop()
        assert not isinstance(leaf, Tensor)
        if isinstance(leaf, tuple):
            leaves += leaf


FACTORS = [
    (functional.dice_ce_loss, "lambda_dice"),
    (functional.dice_ce_loss, "lambda_ce"),
    (functional.dice_focal_loss, "lambda_focal"),
    (functional.generalized_dice_focal_loss, "lambda_gdl"),
]


@pytest.mark.parametrize(("function", "name"), FACTORS)
def test_a_lambda_that_was_not_given_before(function: Callable[..., Tensor], name: str) -> None:
    values: dict[bool, Any] = {}
    for first in (True, False):
        plans._plans.clear()
        for given in (first, not first):
            value = function(logits(), LABELS, **HOT, **({name: 0.3} if given else {}))
            assert values.setdefault(given, value) == value
    assert values[True] != values[False]
    learned: Any = {name: nn.Parameter(torch.tensor(0.3))}
    assert torch.autograd.grad(function(logits(), LABELS, **HOT, **learned), learned[name])[0] != 0
    scripted = torch.jit.script(dicekernels.DiceCELoss(**HOT))
    assert scripted(logits(), LABELS) == dicekernels.DiceCELoss(**HOT)(logits(), LABELS)
    scripted.lambda_ce = 0.3
    assert scripted(logits(), LABELS) == dicekernels.DiceCELoss(**HOT, lambda_ce=0.3)(logits(), LABELS)


def test_a_tensor_among_the_lambdas_is_not_read() -> None:
    loss: Any = dicekernels.DiceCELoss(**HOT)
    for _ in range(3):
        loss(logits(), LABELS)
    for value in (torch.ones(2), torch.empty(0)):
        loss.lambda_dice = value
        with pytest.raises(ValueError, match="expected one number"):
            loss(logits(), LABELS)


def test_signed_masks_and_threads_and_halves_that_are_gone() -> None:
    values = torch.softmax(logits() * 2, 1)
    for mask in (MASK, MASK - 0.5):
        assert functional.masked_dice_loss(logits(), values, mask, softmax=True).isfinite()
    loss: Any = LOSSES["DiceCELoss"]()
    seen(loss, logits())
    got: list[Tensor] = []
    with ThreadPoolExecutor(1) as pool:
        there = lambda z, y: got.append(pool.submit(loss, z, y).result()) or loss(z, y)  # noqa: E731
        assert "one pass" in dicekernels.explain(there, logits(), LABELS) and got[0] > 0
    loss.__dict__["dice"] = lambda z, y: z.mean() * 0 + 7
    assert loss(logits(), LABELS) > 6
    del loss.__dict__["dice"], loss.dice
    with pytest.raises(AttributeError, match="dice"):
        loss(logits(), LABELS)
