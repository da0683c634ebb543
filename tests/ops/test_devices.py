"""Nothing is made on the default device, and tensors of several devices are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dicekernels
from dicekernels import functional, ops, region_sums
from dicekernels.spec import OVERLAP_ROWS, Activation, FinishSpec, Formula, SumsSpec

F32, F64 = torch.float32, torch.float64
HOT = {"to_onehot_y": True, "softmax": True}
DISTANCES = [[0.0, 1.0, 0.5], [1.0, 0.0, 0.7], [0.5, 0.7, 0.0]]


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    labels = torch.randint(3, (2, 1, 4, 5, 6), generator=generator)
    return logits, labels, torch.rand(labels.shape, generator=generator)


@pytest.fixture
def default_device() -> Iterator[None]:
    """The default device is set after the data is made, and unset after the test."""
    yield
    torch.set_default_device(None)


CALLS: dict[str, Any] = {
    "dice": lambda z, y, m: functional.dice_loss(z, y, **HOT, weight=[1.0, 2.0, 3.0], mask=m),
    "log dice": lambda z, y, m: functional.dice_loss(z, y, **HOT, log_loss=True, batch=True),
    "gdl": lambda z, y, m: functional.generalized_dice_loss(z, y, **HOT, ignore_index=1),
    "gdl w_func": lambda z, y, m: functional.generalized_dice_loss(z, y, **HOT, w_func=torch.reciprocal),
    "tversky": lambda z, y, m: functional.tversky_loss(z, y, **HOT, gamma=0.75),
    "mcc": lambda z, y, m: functional.mcc_loss(z, y, **HOT),
    "dice_ce": lambda z, y, m: functional.dice_ce_loss(z, y, **HOT, lambda_ce=0.5, weight=[1.0, 2.0, 3.0]),
    "dice_ce other_act": lambda z, y, m: functional.dice_ce_loss(
        z, y, to_onehot_y=True, other_act=torch.tanh, lambda_dice=0.3, label_smoothing=0.1
    ),
    "focal": lambda z, y, m: functional.focal_loss(z, y, to_onehot_y=True, alpha=[0.1, 0.2, 0.3], weight=2.0),
    "focal map": lambda z, y, m: functional.focal_loss(z, y, to_onehot_y=True, alpha=0.3, reduction="none"),
    "dice_focal": lambda z, y, m: functional.dice_focal_loss(
        z, y, **HOT, lambda_dice=0.2, use_softmax=True, alpha=0.3
    ),
    "gdl_focal": lambda z, y, m: functional.generalized_dice_focal_loss(
        z, y, **HOT, lambda_gdl=2.0, lambda_focal=0.1
    ),
    "masked": lambda z, y, m: functional.masked_dice_loss(z, y, (m > 0.5).float(), **HOT),
    "wasserstein": lambda z, y, m: functional.generalized_wasserstein_dice_loss(z, y, DISTANCES),
    "unified": lambda z, y, m: functional.asymmetric_unified_focal_loss(
        z.sigmoid(), y, to_onehot_y=True, num_classes=3
    ),
    "without space": lambda z, y, m: functional.dice_ce_loss(
        z[:, :, 0, 0, 0], y[:, :, 0, 0, 0], **HOT, weight=[1.0, 2.0, 3.0], lambda_ce=0.5
    ),
    "region_sums": lambda z, y, m: region_sums(z, y, voxel_term="ce", mask=m).POS,
    "module": lambda z, y, m: dicekernels.DiceFocalLoss(**HOT, lambda_focal=0.3)(z, y),
    "supervision": lambda z, y, m: dicekernels.DeepSupervisionLoss(dicekernels.DiceCELoss(**HOT))(
        [z, z[..., ::2]], y
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_changes_no_bit(name, data, default_device):
    logits, labels, mask = data

    def run() -> tuple[Tensor, Tensor]:
        z = logits.detach().requires_grad_()
        value = CALLS[name](z, labels, mask)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient

    truth = run()
    torch.set_default_device("meta")
    for got, expected in zip(run(), truth, strict=True):
        assert got.device == expected.device
        assert torch.equal(got, expected)


def test_the_default_device_of_a_backend(backend, data, default_device):
    logits, labels, _ = data
    truth = functional.dice_ce_loss(logits, labels, **HOT, lambda_ce=0.5)
    torch.set_default_device("meta")
    assert torch.equal(functional.dice_ce_loss(logits, labels, **HOT, lambda_ce=0.5), truth)


def meta(shape: tuple[int, ...] = (), dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("name", ["target", "mask", "weight", "lambda_ce", "lambda_dice"])
def test_a_loss_refuses_another_device_by_name(name, data):
    logits, labels, mask = data
    given = {"target": labels, "mask": mask, "weight": torch.ones(3), "lambda_ce": 1.0, "lambda_dice": 1.0}
    shape = given[name].shape if isinstance(given[name], Tensor) else ()
    given[name] = meta(tuple(shape), labels.dtype if name == "target" else F32)
    with pytest.raises(
        ValueError, match=rf"{name}: got a tensor on meta, expected it on cpu as the logits; move it"
    ):
        functional.dice_ce_loss(logits, given.pop("target"), **HOT, **given)


@pytest.mark.parametrize("kind", ["alpha", "weight"])
def test_the_focal_loss_refuses_another_device_by_name(kind, data):
    logits, labels, _ = data
    with pytest.raises(ValueError, match=f"{kind}: got a tensor on meta"):
        functional.focal_loss(logits, labels, to_onehot_y=True, **{kind: meta((3,))})


def test_a_module_whose_weights_stayed_elsewhere_is_refused(data):
    logits, labels, _ = data
    with torch.device("meta"):
        loss = dicekernels.DiceCELoss(**HOT, weight=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="weight: got a tensor on meta, expected it on cpu"):
        loss(logits, labels)


def op_arguments(op: str, namespace: str) -> dict[str, Any]:
    """Every tensor of a call of an op by name, then its numbers, that the CPU can run."""
    spec = SumsSpec(False, Activation.SOFTMAX, rows=OVERLAP_ROWS)
    finish = FinishSpec(Formula.RATIO)
    logits, target = torch.zeros(2, 3, 8), torch.zeros(2, 1, 8, dtype=torch.uint8)
    volume = {"logits": logits, "target": target, "mask": torch.ones(2, 1, 8)}
    weights = dict.fromkeys(("class_weight", "pos_weight", "neg_weight"), torch.ones(3, dtype=F64))
    weights |= dict.fromkeys(("region_lambda", "voxel_lambda"), torch.ones((), dtype=F64))
    numbers = (*finish.args(False), F32)
    return {
        "sums": (volume, spec.args()),
        "totals": (volume, spec.args()),
        "finish": ({"sums": torch.zeros(2, 1, 3, 3, dtype=F64), **weights}, (spec.rows, *numbers)),
        "sums_backward": (
            {"grad_loss": torch.ones(()), **volume, "coef": torch.zeros(2, 3, 3, dtype=F64)},
            spec.args(),
        ),
        "loss": ({**volume, **weights}, (*spec.args(), *numbers)),
    }[op]


OPS = ("sums", "finish", "sums_backward", "loss", "totals")


@pytest.mark.parametrize("namespace", ops.NAMESPACES)
@pytest.mark.parametrize("op", OPS)
def test_every_op_refuses_tensors_of_several_devices(op, namespace):
    if namespace == "dicekernels_triton":
        pytest.importorskip("triton")
    tensors, numbers = op_arguments(op, namespace)
    call = getattr(getattr(torch.ops, namespace), op)
    first = "sums" if op == "finish" else "logits"
    for name, tensor in tensors.items():
        mixed = {**tensors, name: tensor.to("meta")}
        odd = next(key for key in tensors if key != first) if name == first else name
        with pytest.raises(
            (ValueError, RuntimeError), match=rf"{odd}: got a tensor on .*, expected it on .* as the {first}"
        ):
            call(*mixed.values(), *numbers)


def test_a_lambda_of_the_cpu_is_taken_by_value():
    tensors, numbers = op_arguments("finish", "dicekernels")
    fake = {name: x if name.endswith("lambda") else x.to("meta") for name, x in tensors.items()}
    loss, coef = torch.ops.dicekernels.finish(*fake.values(), *numbers)
    assert loss.shape == () and coef.shape == (2, 3, 3)
    fake["region_lambda"] = torch.ones(1, dtype=F64)
    with pytest.raises(ValueError, match="region_lambda: got a tensor on cpu"):
        torch.ops.dicekernels.finish(*fake.values(), *numbers)
