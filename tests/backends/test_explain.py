"""The sentence that ``explain`` opens with: passes, place, reason, and measured memory."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import dicekernels
from dicekernels import (
    AsymmetricUnifiedFocalLoss,
    DeepSupervisionLoss,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedWassersteinDiceLoss,
    MaskedDiceLoss,
    MaskedLoss,
    dispatch,
    explain,
    region_sums,
    use_backend,
)

HOT = {"to_onehot_y": True, "softmax": True}
SPACE = (24, 32, 32)
LOGITS = torch.linspace(-2, 2, 4 * 24 * 32 * 32).sin().view(1, 4, *SPACE).requires_grad_()
LABELS = (torch.arange(24 * 32 * 32) % 4).to(torch.uint8).view(1, 1, *SPACE)
VALUES = torch.full((1, 4, *SPACE), 0.25)
MASK = torch.ones(1, 1, *SPACE)
CPU = r"on the cpu kernels \((AVX-512|AVX2|default|baseline)\)"
ONCE = f"Runs in one pass forward and one backward {CPU}"
NOTHING = "; nothing of the logits' size is kept for backward."

pytestmark = pytest.mark.skipif(
    "cpu" not in dicekernels.available_backends(), reason="the library is not built"
)


def sentence(loss, logits=LOGITS, target=LABELS, **more):
    return explain(loss, logits, target, **more).splitlines()[0]


def kept(reason: str, low: float, high: float, told: str) -> None:
    """The sentence says ``reason`` and a memory between ``low`` and ``high`` times the logits."""
    found = re.search(
        r"kept for backward beside the given tensors: .* \((\d+\.\d) times the logits\)\.$", told
    )
    assert reason in told and found, told
    assert low <= float(found[1]) <= high, told


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        (DiceCELoss(**HOT), {}),
        (DiceCELoss(**HOT, weight=[1.0, 2.0, 3.0, 4.0], lambda_ce=0.5), {"mask": MASK}),
        (FocalLoss(to_onehot_y=True), {}),
        (dicekernels.functional.dice_loss, HOT),
        (lambda z, y: region_sums(z, y).I.sum(), {}),
        (region_sums, {}),
    ],
)
def test_the_kernels_keep_nothing(loss, more):
    assert re.fullmatch(ONCE + NOTHING, sentence(loss, **more))


def test_without_a_gradient_no_backward_is_promised():
    told = sentence(DiceCELoss(**HOT), LOGITS.detach())
    assert re.fullmatch(
        f"Runs in one pass forward {CPU}; no gradient is recorded, so nothing is kept for backward.", told
    )
    with torch.no_grad():
        assert sentence(DiceCELoss(**HOT)) == told


def test_an_activation_of_ones_own_is_kept():
    told = sentence(DiceLoss(to_onehot_y=True, other_act=torch.tanh))
    assert re.match(ONCE, told)
    kept("", 1.0, 1.0, told)
    told = sentence(DiceCELoss(to_onehot_y=True, other_act=torch.tanh))
    assert re.match(f"Runs in 2 calls, each one pass forward and one backward, {CPU}; kept", told)


def test_what_runs_around_the_loss_is_measured():
    told = sentence(MaskedLoss(DiceLoss(sigmoid=True)), target=VALUES, mask=MASK)
    kept("one pass forward and one backward", 2.0, 2.0, told)  # logits and target times the mask
    kept("", 1.0, 1.0, sentence(lambda z, y: DiceLoss(**HOT)(z, y) + z.exp().mean()))


def test_eager_by_force_or_for_want_of_a_kernel(monkeypatch):
    start = "Runs in PyTorch (eager), piece by piece: "
    with use_backend("eager"):
        assert sentence(DiceCELoss(**HOT)) == start + "'eager' is forced" + NOTHING
        assert sentence(region_sums) == start + "'eager' is forced" + NOTHING
    monkeypatch.setitem(dispatch._unavailable, "cpu", "the library is not there\nand more")
    assert sentence(DiceCELoss(**HOT)) == start + "cpu: the library is not there" + NOTHING
    monkeypatch.undo()
    told = sentence(GeneralizedWassersteinDiceLoss(1 - torch.eye(4)))
    assert told == start + "generalized_wasserstein_dice_loss has no kernel" + NOTHING
    p = VALUES[:, :2].clone().requires_grad_()
    told = sentence(AsymmetricUnifiedFocalLoss(), p, VALUES[:, :2].round())
    assert told == start + "asymmetric_unified_focal_loss has no kernel" + NOTHING


def test_eager_on_the_whole_volume_says_how_much_it_keeps():
    start = "Runs in PyTorch (eager): "
    told = sentence(DiceLoss(softmax=True), target=VALUES.clone().requires_grad_())
    kept(f"{start}target requires a gradient", 2.0, 12.0, told)
    told = sentence(FocalLoss(to_onehot_y=True, reduction="none"))
    kept(f'{start}reduction="none" of the focal loss is a map', 2.0, 12.0, told)
    told = sentence(DiceLoss(softmax=True), LOGITS[..., 0, 0, 0], VALUES[..., 0, 0, 0])
    kept(f"{start}the logits have no spatial dimensions", 1.0, 20.0, told)
    mask = MASK.clone().requires_grad_()
    told = sentence(GeneralizedWassersteinDiceLoss(1 - torch.eye(4)), mask=mask)
    kept(f"{start}another tensor than the logits requires a gradient", 1.0, 12.0, told)
    kept(f"{start}mask requires a gradient", 1.0, 12.0, sentence(region_sums, mask=mask))


def test_the_memory_is_what_autograd_saves():
    packed = {}

    def pack(x):
        packed[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x

    target = VALUES.clone().requires_grad_()
    loss = DiceLoss(softmax=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = loss(LOGITS, target)
    for given in (LOGITS, target):
        packed.pop(given.untyped_storage().data_ptr(), None)
    times = sum(size for size, _ in packed.values()) / (LOGITS.numel() * 4)
    told = sentence(loss, target=target)
    assert value.requires_grad and f"({times:.1f} times the logits)" in told


def test_two_halves_apart():
    hooked = DiceFocalLoss(**HOT)
    hooked.dice.register_forward_hook(lambda *_: None)
    told = sentence(hooked)
    each = f"Runs in 2 calls, each one pass forward and one backward, {CPU} "
    assert re.match(each + r"\(a half has hooks\); kept", told)
    kept("", 1.0, 1.0, told)  # the labels as float32 one-hot, for both
    apart = DiceCELoss(**HOT)
    apart.dice.register_forward_hook(lambda *_: None)
    told = sentence(apart)
    other = f"the other is one pass forward and one backward {CPU}; kept"
    start = r"Runs in 2 calls, 1 of them in PyTorch \(eager\): a half has hooks; "
    assert re.match(start + other, told)

    class Elsewhere(nn.Module):
        reduction, ignore_index = "mean", None

        def forward(self, input, target):
            return input.softmax(1).mean()

    hooked.dice = Elsewhere()
    told = sentence(hooked, target=LABELS)
    assert told.startswith(
        "Runs in part outside of dicekernels (a half is another module), its own share in one"
    )


def test_several_calls():
    levels = [LOGITS, LOGITS[..., ::2, ::2, ::2].detach().contiguous().requires_grad_()]
    told = sentence(DeepSupervisionLoss(DiceCELoss(**HOT)), levels)
    assert re.fullmatch(f"Runs in 2 calls, each one pass forward and one backward, {CPU}" + NOTHING, told)
    told = sentence(MaskedDiceLoss(**HOT), mask=MASK)
    assert re.match(
        rf"Runs in one pass forward and one backward \(and one over the label map\) {CPU}; kept", told
    )


def test_the_choice_is_told_as_it_was_inside_the_callable():
    def forced(z, y):
        with use_backend("eager"):
            return DiceLoss(**HOT)(z, y)

    lines = explain(forced, LOGITS, LABELS).splitlines()
    assert lines[0] == "Runs in PyTorch (eager), piece by piece: 'eager' is forced" + NOTHING
    assert lines[1] == "backend: eager"

    def stepped(z, y):
        value = DiceLoss(**HOT)(z, y)
        value.backward()
        return value

    assert re.match(ONCE, sentence(stepped, LOGITS.detach().requires_grad_()))


def test_results_in_lists_and_no_results():
    loss = DiceCELoss(**HOT)
    assert sentence(lambda z, y: {"loss": [loss(z, y)]}) == sentence(loss)
    told = sentence(lambda z, y: loss(z, y).backward())
    assert told.endswith("what is kept for backward was not measured, since no tensor was returned.")
    LOGITS.grad = None
