"""DiceCELoss as its users bend it: halves changed or replaced, factors learned or moved, odd contexts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dicekernels
from dicekernels import testing

monai_losses = pytest.importorskip("monai.losses")

HOT = {"to_onehot_y": True, "softmax": True}
WEIGHT = torch.tensor([0.1, 0.4, 0.2, 0.9])


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, 7, 5, generator=generator, dtype=dtype)
    return logits.requires_grad_(), torch.randint(4, (2, 1, 6, 7, 5), generator=generator)


def value_and_gradient(loss, logits, labels):
    value = loss(logits, labels)
    return value.detach(), torch.autograd.grad(value, logits)[0]


CHANGES = {
    "ignore_index of the cross entropy": lambda loss: setattr(loss.cross_entropy, "ignore_index", 1),
    "another cross entropy": lambda loss: setattr(
        loss, "cross_entropy", nn.CrossEntropyLoss(ignore_index=2, weight=WEIGHT.double())
    ),
    "sum in the cross entropy": lambda loss: setattr(loss.cross_entropy, "reduction", "sum"),
    "sum in the Dice half": lambda loss: setattr(loss.dice, "reduction", "sum"),
    "ignore_index of the Dice half": lambda loss: setattr(loss.dice, "ignore_index", 1),
    "another overlap loss": lambda loss: setattr(loss, "dice", monai_losses.TverskyLoss(**HOT)),
    "label smoothing": lambda loss: setattr(loss.cross_entropy, "label_smoothing", 0.2),
    "factors": lambda loss: (setattr(loss, "lambda_dice", 0.3), setattr(loss, "lambda_ce", 2.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_half_has_monais_result(change):
    logits, labels = problem()
    pair = [library.DiceCELoss(**HOT) for library in (monai_losses, dicekernels)]
    for loss in pair:
        CHANGES[change](loss)
    truth, ours = (value_and_gradient(loss, logits, labels) for loss in pair)
    testing.assert_close_to_truth(ours[0], truth[0], truth[0], torch.float64, change)
    testing.assert_gradient_close(ours[1], truth[1], truth[1], torch.float64, change)


def test_an_overridden_half_is_called_and_hooks_fire():
    logits, labels = problem()

    class Heavy(dicekernels.DiceCELoss):
        def ce(self, input, target):
            return 10 * super().ce(input, target)

    halves = dicekernels.DiceCELoss(**HOT)
    dice = halves.dice(logits, labels)
    ce = halves.ce(logits, labels)
    assert Heavy(**HOT)(logits, labels).item() == pytest.approx((dice + 10 * ce).item(), abs=1e-12)
    seen = []
    halves.dice.register_forward_hook(lambda *_: seen.append("dice"))
    assert halves(logits, labels).item() == pytest.approx((dice + ce).item(), abs=1e-12)
    assert seen == ["dice"]
    assert "a half has hooks" in dicekernels.explain(halves, logits, labels)


def test_an_option_that_needs_one_pass_is_refused_when_the_halves_run_apart():
    logits, labels = problem()
    loss = dicekernels.DiceCELoss(**HOT, ignore_index=255)
    loss.cross_entropy.reduction = "sum"
    with pytest.raises(RuntimeError, match="reductions of the halves differ.*drop the option"):
        loss(logits, labels)


def test_a_factor_may_change_between_forward_and_backward():
    logits, labels = problem()
    loss = dicekernels.DiceCELoss(**HOT)
    first = loss(logits, labels)
    loss.lambda_dice = 0.5
    gradient = torch.autograd.grad(first + loss(logits, labels), logits)[0]
    dice = torch.autograd.grad(loss.dice(logits, labels), logits)[0]
    ce = torch.autograd.grad(loss.ce(logits, labels), logits)[0]
    truth = 1.5 * dice + 2 * ce
    testing.assert_gradient_close(gradient, truth, truth, torch.float64, "two factors")


def test_learned_factors_get_their_gradient():
    logits, labels = problem()
    factor = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = dicekernels.DiceCELoss(lambda_dice=factor, **HOT)
    assert [name for name, _ in loss.named_parameters()] == ["lambda_dice"]
    loss(logits, labels).backward()
    dice = loss.dice(logits, labels).item()
    assert factor.grad.item() == pytest.approx(dice, abs=1e-12)

    loss = dicekernels.DiceCELoss(**HOT)
    for _ in range(2):
        loss.lambda_ce = torch.sigmoid(factor)
        loss(logits, labels).backward()
    slope = torch.sigmoid(factor) * torch.sigmoid(-factor)
    expected = dice + 2 * (slope * loss.ce(logits, labels)).item()
    assert factor.grad.item() == pytest.approx(expected, abs=1e-12)
    loss.lambda_ce = 2
    assert loss.lambda_ce == 2.0
    assert copy.deepcopy(loss).lambda_ce == 2.0
    assert list(loss.named_parameters()) == []
    assert list(loss.state_dict()) == []


def test_built_on_meta_or_in_inference_mode_it_trains():
    logits, labels = problem()
    truth = dicekernels.DiceCELoss(lambda_ce=0.25, **HOT)(logits, labels).item()
    with torch.device("meta"):
        loss = dicekernels.DiceCELoss(lambda_ce=0.25, **HOT)
    assert loss(logits, labels).item() == truth
    assert loss.to_empty(device="cpu")(logits, labels).item() == truth
    assert loss.half().lambda_ce == 0.25
    with torch.inference_mode():
        loss = dicekernels.DiceCELoss(lambda_ce=0.25, **HOT)
        pseudo = labels.clone()
    value = loss(logits, pseudo)
    assert value.item() == truth
    value.backward()
    assert logits.grad.abs().sum() > 0


def test_labels_of_the_wide_unsigned_dtypes():
    logits, labels = problem()
    loss = dicekernels.DiceCELoss(**HOT)
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))
