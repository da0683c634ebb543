"""Voxels that are ignored, masked out or cropped away are the same to every loss that can ignore."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import dicekernels
from dicekernels import functional
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

monai_losses = pytest.importorskip("monai.losses")

F32, F64 = torch.float32, torch.float64
KEPT = 5  # voxels of the last dimension that are not ignored
HOT = {"to_onehot_y": True, "softmax": True}
LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("DiceLoss", HOT),
    ("DiceLoss", HOT | {"batch": True, "squared_pred": True, "include_background": False}),
    ("GeneralizedDiceLoss", HOT),
    ("TverskyLoss", HOT | {"alpha": 0.3, "beta": 0.7}),
    ("MCCLoss", HOT),
    ("DiceCELoss", HOT),
    ("DiceCELoss", HOT | {"weight": [1.0, 2.0, 3.0], "label_smoothing": 0.1}),
    ("DiceFocalLoss", HOT),
    ("DiceFocalLoss", HOT | {"use_softmax": True, "include_background": False}),
    ("DiceFocalLoss", {"to_onehot_y": True, "other_act": torch.sigmoid}),
    ("GeneralizedDiceFocalLoss", HOT),
    ("GeneralizedDiceFocalLoss", HOT | {"use_softmax": True, "weight": [1.0, 2.0, 3.0]}),
    ("FocalLoss", {"to_onehot_y": True, "mean_over_classes": True}),
    ("FocalLoss", {"to_onehot_y": True, "mean_over_classes": True, "use_softmax": True}),
    ("GeneralizedWassersteinDiceLoss", {"dist_matrix": [[0.0, 1.0, 0.5], [1.0, 0.0, 0.7], [0.5, 0.7, 0.0]]}),
]
every_loss = pytest.mark.parametrize(
    ("name", "options"), LOSSES, ids=lambda x: x if isinstance(x, str) else ""
)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 3, 4, 5, KEPT + 2, dtype=F64, generator=generator)
    return logits.to(F32), torch.randint(3, (2, 1, 4, 5, KEPT + 2), generator=generator)


def run(loss: Any, logits: Tensor, labels: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    z = logits.clone().requires_grad_()
    value = loss(z, labels, **more)
    return value.detach(), torch.autograd.grad(value, z)[0]


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_is_masked_is_cropped(backend, name, options, reduction):
    if name == "GeneralizedWassersteinDiceLoss" and backend != "eager":
        pytest.skip("no kernel has its sums")
    logits, labels = data()
    kind = getattr(dicekernels, name)
    plain, ignoring = (kind(**options, reduction=reduction, **more) for more in ({}, {"ignore_index": 255}))
    cropped = run(plain, logits[..., :KEPT], labels[..., :KEPT])
    wide = run(plain, logits[..., :KEPT].double(), labels[..., :KEPT])
    truth = wide[0].double(), wide[1]
    mask = torch.ones(labels.shape)
    mask[..., KEPT:] = 0
    ignored = labels.clone()
    ignored[..., KEPT:] = 255
    for got in (run(plain, logits, labels, mask=mask), run(ignoring, logits, ignored)):
        assert_close_to_truth(got[0], truth[0], cropped[0], F32, name)
        assert_gradient_close(got[1][..., :KEPT], truth[1], cropped[1], F32, name)
        assert not got[1][..., KEPT:].any()


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_index_that_no_label_has_changes_nothing(backend, name, options, reduction):
    if name == "GeneralizedWassersteinDiceLoss" and backend != "eager":
        pytest.skip("no kernel has its sums")
    logits, labels = data()
    kind = getattr(dicekernels, name)
    plain, ignoring = (kind(**options, reduction=reduction, **more) for more in ({}, {"ignore_index": 255}))
    truth, got = run(plain, logits, labels), run(ignoring, logits, labels)
    assert_close_to_truth(got[0], truth[0].double(), truth[0], F32, name)
    assert_gradient_close(got[1], truth[1].double(), truth[1], F32, name)


def test_fourteen_classes_of_which_nothing_is_ignored():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 14, 6, 6, 6, generator=generator)
    labels = torch.randint(14, (1, 1, 6, 6, 6), generator=generator)
    truth = monai_losses.DiceFocalLoss(**HOT)(logits, labels)
    ours = dicekernels.DiceFocalLoss(**HOT, ignore_index=255)(logits, labels)
    assert_close_to_truth(ours, truth.double(), truth, F32, "DiceFocalLoss")


def test_the_focal_loss_alone_keeps_monais_rule(backend):
    logits, labels = data()
    options = {"to_onehot_y": True, "ignore_index": 1}
    truth = monai_losses.FocalLoss(**options)(logits, labels)
    ours = dicekernels.FocalLoss(**options)(logits, labels)
    assert_close_to_truth(ours, truth.double(), truth, F32, "FocalLoss")


def two_classes() -> tuple[Tensor, Tensor]:
    logits, labels = data()
    return logits[:, :2].clone().requires_grad_(), labels.clamp(max=1)


@pytest.mark.parametrize("name", ["DiceFocalLoss", "GeneralizedDiceFocalLoss"])
def test_a_focal_softmax_of_two_classes_without_background_learns(backend, name):
    logits, labels = two_classes()
    options = {"include_background": False, "use_softmax": True, **HOT}
    loss = getattr(dicekernels, name)(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = loss(logits, labels)
    kind = dicekernels.DiceLoss if name == "DiceFocalLoss" else dicekernels.GeneralizedDiceLoss
    focal = value - kind(include_background=False, **HOT)(logits, labels)
    # (1 - p)^2 (-log p) of the foreground's voxels, over all voxels
    log_p = torch.log_softmax(logits.double(), 1)[:, 1:]
    by_hand = torch.where(labels == 1, (1 - log_p.exp()) ** 2 * -log_p, 0.0).mean()
    assert focal.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert torch.autograd.grad(value, logits, retain_graph=True)[0].abs().sum() > 0
    truth = torch.autograd.grad(by_hand, logits)[0]
    got = torch.autograd.grad(focal, logits)[0]
    assert_gradient_close(got, truth.double(), truth, F32, name)


def test_a_softmax_of_one_class_warns():
    logits, labels = two_classes()
    options = {"include_background": False, "use_softmax": True, "to_onehot_y": True}
    remedy = "got 2 channels of logits and a softmax over one of them.*softmax_over_all=True"
    with pytest.warns(UserWarning, match=remedy):
        assert dicekernels.FocalLoss(**options)(logits, labels) == 0
    with pytest.warns(UserWarning, match=remedy):
        functional.focal_loss(logits, labels, reduction="none", **options)
    with pytest.warns(UserWarning, match="got 1 channels of logits.*use a sigmoid"):
        dicekernels.DiceFocalLoss(sigmoid=True, use_softmax=True)(logits[:, :1], labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dicekernels.FocalLoss(**options, softmax_over_all=True)(logits, labels)
