"""What a user puts in place of a loss's parts is followed, or refused by name: never ignored."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dicekernels
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

monai_losses = pytest.importorskip("monai.losses")

F32, F64 = torch.float32, torch.float64
HOT = {"to_onehot_y": True, "softmax": True}


def data(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 4, 5, 6, dtype=F64, generator=generator).to(dtype)
    labels = torch.randint(3, (2, 1, 4, 5, 6), generator=generator)
    labels[1][labels[1] == 2] = 0  # a class without a voxel, whose weight is infinite
    return logits.requires_grad_(), labels


def value_and_gradient(loss: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(*tensors)
    return value.detach(), torch.autograd.grad(value.sum(), tensors[0])[0]


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], name: str) -> None:
    truth, got = (value_and_gradient(loss, *data()) for loss in (theirs, ours))
    assert_close_to_truth(got[0], truth[0].double(), truth[0], F32, name)
    assert_gradient_close(got[1], truth[1], truth[1], F32, name)


def root_weight(self: nn.Module, grnd: Tensor) -> Tensor:
    """Class weights that MONAI has not."""
    return torch.reciprocal(grnd.sqrt())


@pytest.mark.parametrize(
    "options", [{}, {"batch": True}, {"include_background": False}, {"reduction": "none"}], ids=str
)
@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_w_func_is_followed(backend, options, how):
    losses = []
    for library in (dicekernels, monai_losses):
        kind = library.GeneralizedDiceLoss
        if how == "subclass":
            loss = type("Root", (kind,), {"w_func": root_weight})(**HOT, **options)
        else:
            loss = kind(**HOT, **options)
            loss.w_func = functools.partial(root_weight, loss)
        losses.append(loss)
    assert_same(*losses, str(options))
    plain = dicekernels.GeneralizedDiceLoss(**HOT, **options)
    assert not torch.equal(losses[0](*data()), plain(*data()))
    again = type(
        "Same",
        (dicekernels.GeneralizedDiceLoss,),
        {"w_func": lambda self, g: super(type(self), self).w_func(g)},
    )
    assert_same(again(**HOT, **options), plain, "w_func that calls ours")


def test_w_func_of_the_wrong_shape_is_an_error():
    loss = dicekernels.GeneralizedDiceLoss(**HOT)
    loss.w_func = lambda grnd: grnd.sum(1)
    with pytest.raises(
        ValueError, match=r"w_func: got weights of shape \(2,\), expected one for each volume: \(2, 3\)"
    ):
        loss(*data())


def test_w_func_of_a_half_is_followed():
    losses = [library.GeneralizedDiceFocalLoss(**HOT) for library in (dicekernels, monai_losses)]
    for loss in losses:
        loss.generalized_dice.w_func = functools.partial(root_weight, loss)
    assert_same(*losses, "w_func of a half")
    assert "two passes: w_func of a half is overridden" in dicekernels.explain(losses[0], *data())


def tripled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: 3 * original(*args, **kwargs)


CASES = [
    ("DiceCELoss", "ce"),
    ("DiceCELoss", "dice.forward"),
    ("DiceCELoss", "cross_entropy.forward"),
    ("DiceFocalLoss", "dice.forward"),
    ("DiceFocalLoss", "focal.forward"),
    ("GeneralizedDiceFocalLoss", "generalized_dice.forward"),
    ("GeneralizedDiceFocalLoss", "focal.forward"),
    ("DeepSupervisionLoss", "get_loss"),
    ("DeepSupervisionLoss", "loss.forward"),
    ("GeneralizedDiceLoss", "forward"),
]


@pytest.mark.parametrize(("name", "path"), CASES)
def test_a_function_set_on_an_instance_is_followed(name, path):
    losses = []
    for library in (dicekernels, monai_losses):
        loss = (
            library.DeepSupervisionLoss(library.DiceLoss(**HOT))
            if name == "DeepSupervisionLoss"
            else getattr(library, name)(**HOT)
        )
        before = loss(*prepared(name)).item()
        *owner, method = path.split(".")
        part = loss.get_submodule(".".join(owner))
        setattr(part, method, tripled(getattr(part, method)))
        losses.append(loss)
        assert loss(*prepared(name)).item() != pytest.approx(before)
    ours, theirs = (loss(*prepared(name)) for loss in losses)
    assert_close_to_truth(ours.detach(), theirs.detach().double(), theirs.detach(), F32, path)


def prepared(name: str) -> tuple[list[Tensor] | Tensor, Tensor]:
    logits, labels = data()
    return ([logits], labels.double()) if name == "DeepSupervisionLoss" else (logits, labels)


def test_a_function_set_on_the_binary_half_is_followed():
    logits, target = data()[0][:, :1].detach().requires_grad_(), torch.ones(2, 1, 4, 5, 6, dtype=F64)
    for path in ("bce", "binary_cross_entropy.forward"):
        losses = [library.DiceCELoss(sigmoid=True) for library in (dicekernels, monai_losses)]
        for loss in losses:
            *owner, method = path.split(".")
            part = loss.get_submodule(".".join(owner))
            setattr(part, method, tripled(getattr(part, method)))
        ours, theirs = (loss(logits, target) for loss in losses)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("DiceCELoss", dicekernels.DiceCELoss, "ce"),
        ("DiceCELoss", dicekernels.DiceLoss, "forward"),
        ("DiceCELoss", nn.CrossEntropyLoss, "forward"),
        ("DiceFocalLoss", dicekernels.FocalLoss, "forward"),
        ("GeneralizedDiceFocalLoss", dicekernels.GeneralizedDiceLoss, "forward"),
        ("GeneralizedDiceFocalLoss", dicekernels.GeneralizedDiceLoss, "w_func"),
        ("GeneralizedDiceLoss", dicekernels.GeneralizedDiceLoss, "w_func"),
    ],
)
def test_a_function_set_on_the_class_is_followed(monkeypatch, name, kind, method):
    loss = getattr(dicekernels, name)(**HOT)
    before = loss(*data()).item()
    original, calls = getattr(kind, method), []

    def patched(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        calls.append(method)
        result: Tensor = original(self, *args, **kwargs)
        return result if method == "w_func" else 3 * result

    monkeypatch.setattr(kind, method, patched)
    after = loss(*data()).item()
    assert calls == [method]
    # MONAI's own w_func, called as a user's, rounds the weights to float32.
    assert (after == pytest.approx(before, rel=1e-6)) == (method == "w_func")


def test_a_module_under_the_name_of_a_method_is_refused():
    loss = dicekernels.DiceCELoss(**HOT)
    loss.ce = nn.CrossEntropyLoss()
    with pytest.raises(
        TypeError, match=r"DiceCELoss\.ce: got a module under the name of a method.*set a function"
    ):
        loss(*data())


STEPS = (
    "wasserstein_distance_map",
    "_compute_alpha_generalized_true_positives",
    "_compute_denominator",
    "_compute_generalized_true_positive",
)


@pytest.mark.parametrize("how", ["subclass", "instance"])
@pytest.mark.parametrize("method", STEPS)
def test_monais_steps_of_the_wasserstein_loss_are_refused_by_name(method, how):
    kind = dicekernels.GeneralizedWassersteinDiceLoss
    assert hasattr(monai_losses.GeneralizedWassersteinDiceLoss, method)
    matrix = 1 - torch.eye(3)
    if how == "subclass":
        loss = type("Mine", (kind,), {method: lambda self, p, y: p})(matrix)
    else:
        loss = kind(matrix)
        setattr(loss, method, lambda p, y: p)
    with pytest.raises(
        NotImplementedError, match=rf"\.{method}: got an override of MONAI's {method}.*derive from"
    ):
        loss(*data())


def test_what_masked_dice_has_not_is_refused_by_name():
    mask = torch.ones(2, 1, 4, 5, 6)
    loss = dicekernels.MaskedDiceLoss(**HOT)
    truth = loss(*data(), mask).item()
    for name, value in {"sigmoid": True, "softmax": True, "other_act": torch.tanh, "ignore_index": 1}.items():
        changed = copy.deepcopy(loss)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=rf"MaskedDiceLoss\.{name}: got .*pre_softmax"):
            changed(*data(), mask)
    changed = copy.deepcopy(loss)
    changed.spatial_weighted = lambda *args: args[0].sum()
    with pytest.raises(NotImplementedError, match="spatial_weighted: got an override"):
        changed(*data(), mask)
    assert loss(*data(), mask).item() == truth


def test_halves_of_the_unified_focal_loss_are_refused_by_name():
    p, y = torch.rand(2, 2, 4, 5), torch.randint(2, (2, 1, 4, 5))
    for name in ("asy_focal_loss", "asy_focal_tversky_loss"):
        loss = dicekernels.AsymmetricUnifiedFocalLoss(to_onehot_y=True)
        getattr(loss, name).forward = lambda p, y: p.sum()
        with pytest.raises(NotImplementedError, match=rf"{name}: got a forward or hooks of its own"):
            loss(p, y)
        loss = dicekernels.AsymmetricUnifiedFocalLoss(to_onehot_y=True)
        setattr(loss, name, nn.Identity())
        with pytest.raises(
            NotImplementedError, match=rf"{name}: got a Identity, expected that of the constructor"
        ):
            loss(p, y)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("DiceCELoss", "ce"),
        ("DiceCELoss", "forward"),
        ("DiceCELoss", "cross_entropy.forward"),
        ("DiceFocalLoss", "focal.forward"),
        ("GeneralizedDiceLoss", "w_func"),
    ],
)
def test_a_scripted_loss_refuses_what_it_would_ignore(name, path):
    loss = getattr(dicekernels, name)(**HOT)
    *owner, method = path.split(".")
    part = loss.get_submodule(".".join(owner))
    setattr(part, method, tripled(getattr(part, method)))
    with pytest.raises(RuntimeError, match=rf"torch\.jit\.script of {name}: .*{method}"):
        torch.jit.script(loss)


def test_overrides_are_followed_under_compile():
    loss = dicekernels.DiceCELoss(**HOT)
    loss.ce = tripled(loss.ce)
    gdl = type("Root", (dicekernels.GeneralizedDiceLoss,), {"w_func": root_weight})(**HOT)
    for module in (loss, gdl):
        fast = torch.compile(module, fullgraph=True, backend="eager")
        logits, labels = data()
        assert fast(logits, labels).item() == pytest.approx(module(logits, labels).item(), abs=1e-12)


@pytest.mark.parametrize("path", ["forward", "dice.forward", "ce"])
def test_an_override_sees_outputs_of_half_precision_in_float32(path):
    """DeepSupervisionLoss hands float32 to a loss; only kernels of ours read half precision as it is."""
    loss = dicekernels.DiceCELoss(**HOT)
    *owner, method = path.split(".")
    part = loss.get_submodule(".".join(owner))
    original, seen = getattr(part, method), []

    def spy(z: Tensor, y: Tensor) -> Tensor:
        seen.append(z.dtype)
        result: Tensor = original(z, y)
        return result

    setattr(part, method, spy)
    logits, labels = data()
    dicekernels.DeepSupervisionLoss(loss)([logits.half()], labels)
    assert seen == [F32]


def test_a_half_of_ones_own_needs_no_option_of_ours():
    class Overlap(nn.Module):
        def forward(self, z: Tensor, g: Tensor) -> Tensor:
            return (torch.softmax(z, 1) - g).abs().mean()

    losses = [library.DiceFocalLoss(**HOT) for library in (dicekernels, monai_losses)]
    for loss in losses:
        loss.dice = Overlap()
    assert_same(*losses, "another overlap")
