"""``torch.jit.script`` of the losses: saved and loaded they are the unscripted ones, values and gradients."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks import convert_to_torchscript
from processes import captured
from test_monai_modules import F32, F64, make, run
from torch import Tensor, nn

import dicekernels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript itself
BF16 = torch.bfloat16
WEIGHTS = torch.rand((2, 1, 5, 7), generator=torch.Generator().manual_seed(7)) * 2
WEIGHTS[0, 0, 0], WEIGHTS[1, 0, 2] = 0, 1
SOFT = torch.rand((2, 3, 5, 7), generator=torch.Generator().manual_seed(8))
MATRIX = torch.tensor([[0.0, 1.0, 0.8], [1.0, 0.0, 0.5], [1.0, 0.5, 0.0]])
SIGNED = {"other_act": torch.tanh}
LOSSES = dicekernels.modules.__all__


def saved_and_loaded(loss: nn.Module) -> Callable[..., Tensor]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(loss), file)
    file.seek(0)
    return torch.jit.load(file)


def data(kind: str, options: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and target: three classes, but one for "single"; probabilities of two for "probabilities"."""
    if kind == "probabilities":
        logits, labels = make(dtype, classes=2)
        return torch.sigmoid(logits), labels
    if kind == "single":
        logits, _ = make(dtype, classes=1)
        return logits, (logits.float().roll(1, -1) > 0.3).float()
    logits, labels = make(dtype, space=() if kind == "flat" else (5, 7))
    if options.get("ignore_index") == 255 and kind != "flat":
        labels[0, 0, 1], labels[1, 0, :, 3] = 255, 255
    if kind == "hot":
        target = torch.zeros(logits.shape, dtype=F32).scatter_(1, labels.where(labels != 255, 0), 1.0)
        return logits, target * (labels != 255)
    return logits, SOFT * (labels != 255) if kind == "soft" else labels


def assert_scripted_is_the_loss(
    loss: Callable[..., Tensor],
    scripted: Callable[..., Tensor],
    *tensors: Tensor,
    calls: int = 3,
    **more: Any,
) -> None:
    """To the last bit. ``calls``: TorchScript compiles anew for what it has seen in the first two."""
    expected = run(loss, *tensors, **more)
    for _ in range(calls):
        for got, value in zip(run(scripted, *tensors, **more), expected, strict=True):
            torch.testing.assert_close(got, value, rtol=0, atol=0, equal_nan=True)


# The first problems of a name are MONAI's own kinds of tests, the later ones our extras.
PROBLEMS: list[tuple[str, dict[str, Any], str]] = [
    ("DiceLoss", {}, "labels"),
    ("DiceLoss", {"include_background": False, "weight": [1.0, 0.5], "reduction": "none"}, "labels"),
    ("DiceLoss", {"jaccard": True, "batch": True, "reduction": "none"}, "soft"),
    ("DiceLoss", {"squared_pred": True, "reduction": "sum", "weight": 2.0}, "soft"),
    ("DiceLoss", {"soft_label": True, "softmax": False, "sigmoid": True, "smooth_nr": 0.5}, "soft"),
    ("DiceLoss", {"ignore_index": 255}, "labels"),
    ("DiceLoss", {"ignore_index": 1, "mask": WEIGHTS}, "labels"),
    ("DiceLoss", {"ignore_index": 1, "mask": WEIGHTS}, "soft"),
    ("DiceLoss", {"ignore_index": 255, "mask": WEIGHTS[:1]}, "hot"),
    ("DiceLoss", {"log_loss": True, "mask": WEIGHTS}, "labels"),
    ("DiceLoss", {"softmax": False, **SIGNED}, "hot"),
    ("DiceLoss", {"softmax": False, "other_act": nn.Sigmoid()}, "labels"),
    ("DiceLoss", {"sigmoid": True, "softmax": False}, "single"),
    ("DiceLoss", {"weight": [1.0, 0.5, 2.0], "batch": True}, "flat"),
    ("DiceLoss", {}, "flat"),
    ("GeneralizedDiceLoss", {}, "labels"),
    ("GeneralizedDiceLoss", {"w_type": "simple", "batch": True, "reduction": "none"}, "labels"),
    ("GeneralizedDiceLoss", {"w_type": "uniform", "soft_label": True, "mask": WEIGHTS}, "soft"),
    ("GeneralizedDiceLoss", {"include_background": False, "ignore_index": 2}, "labels"),
    ("TverskyLoss", {}, "labels"),
    ("TverskyLoss", {"alpha": 1, "beta": 0, "gamma": 0.75, "mask": WEIGHTS}, "labels"),
    ("TverskyLoss", {"reduction": "none", "batch": True, "soft_label": True}, "soft"),
    ("MCCLoss", {}, "labels"),
    ("MCCLoss", {"reduction": "none", "include_background": False, "ignore_index": 255}, "labels"),
    ("MCCLoss", {"batch": True, "mask": WEIGHTS}, "soft"),
    ("MaskedDiceLoss", {"mask": WEIGHTS.round().bool()}, "labels"),
    ("MaskedDiceLoss", {"mask": WEIGHTS, "squared_pred": True}, "soft"),
    ("MaskedDiceLoss", {"mask": WEIGHTS[1:], "softmax": False, **SIGNED}, "hot"),
    ("FocalLoss", {}, "labels"),
    ("FocalLoss", {"alpha": 0.25, "gamma": 3, "reduction": "none"}, "labels"),
    ("FocalLoss", {"alpha": [0.2, 0.5], "include_background": False, "reduction": "sum"}, "labels"),
    ("FocalLoss", {"use_softmax": True, "alpha": 0.3, "weight": [1.0, 0.5, 2.0]}, "hot"),
    ("FocalLoss", {"ignore_index": 255, "mask": WEIGHTS}, "labels"),
    ("FocalLoss", {"use_softmax": True, "ignore_index": 1, "reduction": "sum"}, "labels"),
    ("FocalLoss", {"weight": 2.0}, "single"),
    ("DiceCELoss", {}, "labels"),
    ("DiceCELoss", {"weight": [1.0, 0.5, 2.0], "include_background": False, "lambda_ce": 0.3}, "labels"),
    ("DiceCELoss", {"label_smoothing": 0.2, "reduction": "sum", "mask": WEIGHTS}, "labels"),
    ("DiceCELoss", {"weight": [1.0, 0.5, 2.0], "label_smoothing": 0.1, "soft_label": True}, "soft"),
    ("DiceCELoss", {"ignore_index": 255, "ce_include_background": False}, "labels"),
    ("DiceCELoss", {"sigmoid": True, "softmax": False, "weight": [3.0], "lambda_dice": 2}, "single"),
    ("DiceCELoss", {"softmax": False, **SIGNED}, "labels"),
    ("DiceFocalLoss", {}, "labels"),
    ("DiceFocalLoss", {"include_background": False, "weight": [0.5, 2.0], "lambda_focal": 0.3}, "labels"),
    ("DiceFocalLoss", {"use_softmax": True, "alpha": 0.3, "gamma": 1.5, "mask": WEIGHTS}, "hot"),
    ("DiceFocalLoss", {"ignore_index": 255, "squared_pred": True}, "labels"),
    ("DiceFocalLoss", {"sigmoid": True, "softmax": False, "reduction": "sum"}, "single"),
    ("GeneralizedDiceFocalLoss", {}, "labels"),
    ("GeneralizedDiceFocalLoss", {"w_type": "simple", "weight": 0.5, "lambda_gdl": 0.5}, "hot"),
    ("GeneralizedDiceFocalLoss", {"ignore_index": 255, "use_softmax": True, "mask": WEIGHTS}, "labels"),
    ("GeneralizedWassersteinDiceLoss", {"dist_matrix": MATRIX}, "labels"),
    ("GeneralizedWassersteinDiceLoss", {"dist_matrix": MATRIX.numpy(), "reduction": "none"}, "labels"),
    (
        "GeneralizedWassersteinDiceLoss",
        {"dist_matrix": MATRIX, "weighting_mode": "GDL", "ignore_index": 255, "mask": WEIGHTS},
        "labels",
    ),
    ("AsymmetricUnifiedFocalLoss", {}, "probabilities"),
    ("AsymmetricUnifiedFocalLoss", {"gamma": 0.3, "weight": 0.2, "mask": WEIGHTS}, "probabilities"),
    ("AsymmetricUnifiedFocalLoss", {"ignore_index": 0, "reduction": "sum"}, "probabilities"),
]
NO_ACTIVATION = ("FocalLoss", "GeneralizedWassersteinDiceLoss", "AsymmetricUnifiedFocalLoss")


def build(name: str, options: dict[str, Any], kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """The loss, and the keywords of its call."""
    given = {} if name in NO_ACTIVATION else {"softmax": True}
    if name != "GeneralizedWassersteinDiceLoss":
        given["to_onehot_y"] = kind in ("labels", "flat", "probabilities")
    given |= options
    more = {"mask": given.pop("mask")} if "mask" in given else {}
    return getattr(dicekernels, name)(**given), more


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    PROBLEMS,
    ids=lambda x: "-".join(f"{k}" for k in x) if isinstance(x, dict) else x,
)
def test_a_scripted_loss_is_the_loss(name: str, options: dict[str, Any], kind: str) -> None:
    loss, more = build(name, options, kind)
    scripted = saved_and_loaded(loss)
    for dtype in (F32, F64, BF16):
        assert_scripted_is_the_loss(loss, scripted, *data(kind, options, dtype), **more)


@pytest.mark.parametrize("name", ["DiceLoss", "GeneralizedDiceLoss", "FocalLoss", "DiceFocalLoss"])
@pytest.mark.parametrize(
    ("dtype", "other"), [(BF16, BF16), (BF16, F32), (F32, BF16), (F32, F64), (F32, torch.bool)]
)
def test_the_dtype_of_a_dense_target(name: str, dtype: torch.dtype, other: torch.dtype) -> None:
    loss = getattr(dicekernels, name)(**({"ignore_index": 255} if name == "DiceLoss" else {}))
    logits, target = data("hot", {}, dtype)
    assert_scripted_is_the_loss(loss, saved_and_loaded(loss), logits, target.to(other))


@pytest.mark.parametrize("name", ["DiceCELoss", "GeneralizedDiceLoss", "DiceFocalLoss"])
def test_frozen_and_differentiated_twice(name: str) -> None:
    loss = getattr(dicekernels, name)(to_onehot_y=True, softmax=True)
    logits, labels = data("labels", {}, F64)
    frozen = torch.jit.freeze(torch.jit.script(loss).eval())
    results = []
    for each in (loss, frozen, saved_and_loaded(loss)):
        z = logits.clone().requires_grad_()
        (first,) = torch.autograd.grad(each(z, labels), z, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), z)))
    assert results[0][1].abs().max() > 0
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_monais_own_check_of_scripting(name: str, tmp_path: Path) -> None:
    """``convert_to_torchscript`` is what MONAI's test suite scripts, saves, loads and compares with."""
    options: dict[str, Any] = {}
    if name == "GeneralizedWassersteinDiceLoss":
        options = {"dist_matrix": MATRIX}
    if name in ("DeepSupervisionLoss", "MaskedLoss"):
        loss = getattr(dicekernels, name)(dicekernels.DiceLoss(to_onehot_y=True, softmax=True))
    else:
        loss, _ = build(name, options, "labels")
    logits, target = data("probabilities" if name == "AsymmetricUnifiedFocalLoss" else "labels", {}, F32)
    before = loss(logits, target)
    convert_to_torchscript(
        loss, filename_or_obj=str(tmp_path / "loss.ts"), verify=True, inputs=[logits, target]
    )
    assert torch.equal(loss(logits, target), before)


def test_saved_losses_need_dicekernels_alone(tmp_path: Path) -> None:
    """In a process that imports it, without MONAI; without the import torch names what is missing."""
    logits, labels = make()
    torch.save((logits, labels), tmp_path / "data.pt")
    expected = []
    for number, (name, options, kind) in enumerate(PROBLEMS):
        if kind == "labels" and "mask" not in options and options.get("reduction") != "none":
            loss, _ = build(name, options, kind)
            torch.jit.script(loss).save(tmp_path / f"loss{number}.ts")
            expected.append(loss(logits, labels).item())
    code = """
import sys
sys.modules["monai"] = None
from pathlib import Path
import torch
files = sorted(Path().glob("*.ts"), key=lambda file: int(file.stem[4:]))
for file in files:
    try:
        torch.jit.load(file)
    except RuntimeError as error:
        assert "Unknown builtin op: dicekernels_losses::" in str(error), error
    else:
        raise AssertionError(file)
import dicekernels
logits, labels = torch.load("data.pt")
for file in files:
    print(torch.jit.load(file)(logits, labels).item())
"""
    root = str(Path(dicekernels.__file__).parents[1])
    ran = captured(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    values = [float(line) for line in ran.stdout.split()]
    assert values == expected and len(expected) > 15  # the same kernels, so the same bits
