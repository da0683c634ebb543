"""What an error says: the argument, what was got, what was expected, what to do; for every loss.

A row is a mistake that people make. ``{z}`` and ``{y}`` are the loss's names of logits and target.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import monai.losses
import pytest
import torch
from torch import Tensor

import dicekernels
from dicekernels import LabelRangeError, functional, region_sums

# No two sizes alike: a batch dimension that is missing cannot fit by accident.
B, C, SPACE = 2, 4, (5, 6, 7)
GENERATOR = torch.Generator().manual_seed(0)
Z = torch.randn(B, C, *SPACE, generator=GENERATOR)
Y = torch.randint(C, (B, 1, *SPACE), generator=GENERATOR)
G = torch.nn.functional.one_hot(Y[:, 0], C).movedim(-1, 1).float()
M = torch.rand(B, 1, *SPACE, generator=GENERATOR)
DISTANCES = 1 - torch.eye(C)

Loss = Callable[..., Any]
SOFTMAX: dict[str, Any] = {"softmax": True}
ONE_HOT: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("DiceLoss", "GeneralizedDiceLoss", "TverskyLoss", "MCCLoss", "DiceCELoss"), SOFTMAX),
    **dict.fromkeys(("DiceFocalLoss", "GeneralizedDiceFocalLoss"), SOFTMAX),
    "FocalLoss": {},
    "AsymmetricUnifiedFocalLoss": {"num_classes": C},
}
FUNCTIONS = {
    "DiceLoss": functional.dice_loss,
    "GeneralizedDiceLoss": functional.generalized_dice_loss,
    "TverskyLoss": functional.tversky_loss,
    "MCCLoss": functional.mcc_loss,
    "DiceCELoss": functional.dice_ce_loss,
    "DiceFocalLoss": functional.dice_focal_loss,
    "GeneralizedDiceFocalLoss": functional.generalized_dice_focal_loss,
    "FocalLoss": functional.focal_loss,
    "AsymmetricUnifiedFocalLoss": functional.asymmetric_unified_focal_loss,
}
TWO_HALVES = ("DiceCELoss", "DiceFocalLoss", "GeneralizedDiceFocalLoss")
EVERY = [*ONE_HOT, "GeneralizedWassersteinDiceLoss", "region_sums"]
every_loss = pytest.mark.parametrize("name", EVERY)


def forms(name: str, labels: bool = True) -> list[Loss]:
    """The function and the module of a loss."""
    if name == "region_sums":
        return [region_sums]
    if name == "GeneralizedWassersteinDiceLoss":
        module = dicekernels.GeneralizedWassersteinDiceLoss(DISTANCES)
        return [
            lambda z, y, **more: functional.generalized_wasserstein_dice_loss(z, y, DISTANCES, **more),
            module,
        ]
    options: dict[str, Any] = {**ONE_HOT[name], "to_onehot_y": labels}
    return [
        lambda z, y, **more: FUNCTIONS[name](z, y, **options, **more),
        getattr(dicekernels, name)(**options),
    ]


def message(call: Loss, *args: Any, error: type[Exception], **options: Any) -> str:
    with pytest.raises(error) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(*args, **options)
    assert type(caught.value) is error
    return str(caught.value)


# Flaw, logits, target, to_onehot_y, what was expected, what to do.
VALUES, LABELS = "expected (2, 4, 5, 6, 7) (one-hot", "expected labels (2, 1, 5, 6, 7)"
SHAPES: list[tuple[str, Tensor, Tensor, bool, str, str]] = [
    ("no background", Z, G[:, 1:], False, VALUES, "each of the 4 classes, the background"),
    ("fewer classes", Z, G[:, :2], False, VALUES, "one-hot of 4 classes, or give the network 2 output"),
    ("labels as values", Z, Y, False, VALUES, "pass to_onehot_y=True for a label map"),
    ("labels (B, *S) as values", Z, Y[:, 0], False, VALUES, "pass to_onehot_y=True for a label map"),
    ("values as labels", Z, G, True, LABELS, "a one-hot target goes with to_onehot_y=False"),
    ("another space", Z, Y[..., :3], True, LABELS, "crop, pad or resample the space"),
    ("values of another space", Z, G[..., :3], False, VALUES, "crop, pad or resample the space"),
    ("other samples", Z, Y[:1], True, LABELS, "take {z} and {y} of the same 2 samples"),
    ("swapped", Y.float(), Z, False, "expected (2, 1, 5, 6, 7)", "look swapped: their order is ({z}, {y})"),
    ("no batch, labels (*S)", Z[0], Y[0, 0], True, "expected", "{z}[None], {y}[None]"),
    ("no batch, labels (1, *S)", Z[0], Y[0], True, "expected", "{z}[None], {y}[None]"),
    ("target without batch", Z[:1], Y[0, 0], True, "expected", "no batch dimension: use {y}[None]"),
    ("logits without batch", Z[0], Y[:1], True, "expected", "no batch dimension: use {z}[None]"),
    ("classes last", Z, G.movedim(1, -1), False, VALUES, "{y}.movedim(-1, 1)"),
    ("logits: classes last", Z.movedim(1, -1), Y, True, "expected", "{z}.movedim(-1, 1)"),
]


@every_loss
@pytest.mark.parametrize("case", SHAPES, ids=[c[0] for c in SHAPES])
def test_a_target_of_another_shape(name: str, case: tuple[str, Tensor, Tensor, bool, str, str]) -> None:
    """The types are MONAI's."""
    flaw, z, y, labels, expected, remedy = case
    names = {"z": "logits", "y": "target"}
    got = f"target: got shape {tuple(y.shape)}"
    error: type[Exception] = ValueError
    if name == "region_sums":
        if z is Z and y.shape in ((B, 1, *SPACE), (B, *SPACE), Z.shape):
            pytest.skip("takes labels and values")
        expected = "expected"  # either
    elif name == "GeneralizedWassersteinDiceLoss":
        if flaw.startswith("labels") and flaw.endswith("as values"):
            pytest.skip("labels are what it takes")
        error, expected = RuntimeError, LABELS if z is Z else expected
        if z.shape[1] != C:
            got, expected = f"logits: got {z.shape[1]} channels", "expected 4 as dist_matrix has classes"
        elif flaw == "values as labels":
            remedy = "a one-hot target wants target.argmax(1)"
        elif not labels:
            remedy = ""
    elif flaw == "labels (B, *S) as values" and name in TWO_HALVES:
        error = AssertionError  # that of (B, 1, *S); MONAI takes neither
    else:
        if name == "AsymmetricUnifiedFocalLoss":
            names, got = {"z": "y_pred", "y": "y_true"}, got.replace("target", "y_true")
        with pytest.raises((AssertionError, ValueError)) as theirs:
            getattr(monai.losses, name)(**ONE_HOT[name], to_onehot_y=labels)(z, y)
        error = type(theirs.value)
    for form in forms(name, labels):
        text = message(form, z, y, error=error)
        assert got in text and expected in text and remedy.format(**names) in text, text


def test_one_channel_beside_a_one_hot_target_of_two() -> None:
    text = message(functional.dice_loss, Z[:, :1], G[:, :2], error=AssertionError)
    assert "target: got shape (2, 2, 5, 6, 7), expected (2, 1, 5, 6, 7) as logits" in text
    assert "look swapped" in text and "the foreground alone, target[:, 1:]" in text


@every_loss
@pytest.mark.parametrize(("bad", "shown"), [(3.5, None), (4.5, "4.5"), (-1.5, "-1.5"), (math.nan, "nan")])
def test_labels_of_a_floating_dtype(name: str, bad: float, shown: str | None) -> None:
    """Truncated as in MONAI; what is no label then is named as it is."""
    labels = Y.float()
    labels[1, 0, 2, 3, 4] = bad
    for form in forms(name):
        if shown is None:
            values = [
                torch.stack(tuple(form(Z, y)[:3])) if name == "region_sums" else form(Z, y)
                for y in (labels, labels.long())
            ]
            assert torch.equal(*values)
            continue
        text = message(form, Z, labels, error=LabelRangeError)
        assert f"target: 1 of 420 voxels hold a label outside [0, 4), the first is {shown}" in text
        assert "leave these voxels out by a mask" in text


@every_loss
def test_integer_logits_may_be_a_swapped_target(name: str) -> None:
    error: type[Exception] = TypeError if name == "region_sums" else NotImplementedError
    if name in ("FocalLoss", "AsymmetricUnifiedFocalLoss"):
        pytest.skip("takes integers, as MONAI")
    for call in forms(name, False):
        text = message(call, G.long(), Z, error=error)
        assert "logits: got torch.int64, expected a floating dtype" in text
        assert "use logits.float(), or swap the arguments: (logits, target)" in text
        text = message(
            call, Z.long(), Y if name == "GeneralizedWassersteinDiceLoss" else G.long(), error=error
        )
        assert text.endswith("use logits.float()")


UINT8 = torch.quantize_per_tensor(Y.float(), 1.0, 0, torch.quint8)
KINDS: list[tuple[str, Any, list[str]]] = [
    ("a list", [Y, Y], ["got a list of 2, expected a torch.Tensor", "torch.stack(", "DeepSupervisionLoss"]),
    ("numbers", Y.tolist(), ["got list, expected a torch.Tensor; wrap it in torch.as_tensor("]),
    ("NumPy", Y.numpy(), ["got ndarray, expected a torch.Tensor; wrap it in torch.as_tensor("]),
    ("COO", Y.to_sparse(), ["got the layout torch.sparse_coo, expected torch.strided; use", ".to_dense()"]),
    ("nested", torch.nested.nested_tensor([Y[0], Y[1]]), ["got a nested tensor", "pad or crop", "stack"]),
    ("quantized", UINT8, ["got the quantized torch.quint8, expected a plain dtype; use", ".dequantize()"]),
    ("complex", Y.cfloat(), ["got torch.complex64, expected a real dtype", ".real or"]),
]


@every_loss
@pytest.mark.parametrize("case", KINDS, ids=[c[0] for c in KINDS])
@pytest.mark.parametrize("place", ["logits", "target", "mask"])
def test_what_is_no_dense_tensor(name: str, case: tuple[Any, ...], place: str) -> None:
    _, value, parts = case
    unified = name == "AsymmetricUnifiedFocalLoss"
    shown = {"logits": "y_pred", "target": "y_true"}.get(place, place) if unified else place
    arguments: dict[str, Any] = {"logits": Z, "target": Y, "mask": M} | {place: value}
    for call in forms(name):
        text = message(
            call, arguments["logits"], arguments["target"], mask=arguments["mask"], error=TypeError
        )
        assert text.startswith(f"{shown}: ") and all(part in text for part in parts), text


@every_loss
def test_another_device(name: str) -> None:
    unified = name == "AsymmetricUnifiedFocalLoss"
    z, y = ("y_pred", "y_true") if unified else ("logits", "target")
    for call in forms(name):
        text = message(call, Z, Y.to("meta"), error=ValueError)
        assert text.startswith(f"{y}: got a tensor on meta, expected it on cpu"), text
        assert f"{y}.to({z}.device)" in text
        text = message(call, Z, Y, mask=M.to("meta"), error=ValueError)
        assert text.startswith("mask: got a tensor on meta, expected it on cpu"), text


AS_TENSOR = "torch.as_tensor"
A_LIST = ["target: got a list of 2, expected one tensor", "resized", "target[0]"]
NO_CHANNEL = ["mask: got shape (2, 5, 6, 7), expected (2, 1, 5, 6, 7)", "mask[:, None]"]
NO_BATCH = ["target: got shape (5, 6, 7)", "target[None]"]
DEEP: list[tuple[str, Any, Any, Any, type[Exception], list[str]]] = [
    ("a target for each output", [Z, Z], [Y, Y], None, TypeError, A_LIST),
    ("a target as array", [Z, Z], Y.numpy(), None, TypeError, ["target: got ndarray", AS_TENSOR]),
    ("outputs as arrays", [Z, Z.numpy()], Y, None, TypeError, ["input[1]: got ndarray", AS_TENSOR]),
    ("no batch dimension", [Z[:1], Z[:1, ..., ::2]], Y[0, 0], None, ValueError, NO_BATCH),
    ("a mask without channel", [Z, Z[..., ::2]], Y, M[:, 0], ValueError, NO_CHANNEL),
    ("a mask as array", [Z, Z], Y, M.numpy(), TypeError, ["mask: got ndarray", AS_TENSOR]),
    ("one half precision output, a list of targets", Z.half(), [Y], None, TypeError, ["target: got a list"]),
]


@pytest.mark.parametrize("case", DEEP, ids=[c[0] for c in DEEP])
def test_deep_supervision(case: tuple[Any, ...]) -> None:
    _, outputs, target, mask, error, parts = case
    loss = dicekernels.DeepSupervisionLoss(dicekernels.DiceCELoss(to_onehot_y=True, softmax=True))
    text = message(loss, outputs, target, error=error, **({} if mask is None else {"mask": mask}))
    assert all(part in text for part in parts), text


def test_masked_loss() -> None:
    loss = dicekernels.MaskedLoss(dicekernels.DiceLoss(to_onehot_y=True, softmax=True))
    assert "target: got ndarray" in message(loss, Z, Y.numpy(), M, error=TypeError)
    assert "input: got a list of 2" in message(loss, [Z, Z], Y, M, error=TypeError)
    text = message(loss, Z, Y, M[..., :3], error=RuntimeError)
    assert "mask: got shape (2, 1, 5, 6, 3)" in text and "the input of shape (2, 4, 5, 6, 7)" in text
    text = message(loss, Z, Y[..., :3], M, error=RuntimeError)
    assert "mask: got shape (2, 1, 5, 6, 7)" in text and "the target of shape (2, 1, 5, 6, 3)" in text
    for masked in (loss, dicekernels.MaskedDiceLoss(to_onehot_y=True, softmax=True)):
        assert "mask[:, None]" in message(masked, Z, Y, M[:, 0], error=ValueError)


SCRIPTED: list[tuple[Any, Any, Any, list[str]]] = [
    (Z, G, None, ["target: got shape (2, 4, 5, 6, 7), expected labels (2, 1, 5, 6, 7)"]),
    (Z, Y[..., :3], None, ["target: got shape (2, 1, 5, 6, 3)", "crop, pad or resample"]),
    (Z[0], Y[0], None, ["logits[None], target[None]"]),
    (Z, Y, -M, ["mask: got a voxel weight of -", "expected none below 0"]),
]


@pytest.mark.parametrize(
    "name", ["DiceLoss", "DiceCELoss", "FocalLoss", "DiceFocalLoss", "GeneralizedWassersteinDiceLoss"]
)
def test_the_text_of_a_scripted_loss(name: str) -> None:
    twin = torch.jit.script(forms(name)[1])
    for z, y, mask, parts in SCRIPTED:
        if name == "GeneralizedWassersteinDiceLoss":
            parts = parts[-1:] if z is not Z or mask is not None else ["target: got shape"]
        with pytest.raises(torch.jit.Error) as caught:
            twin(z, y, mask)
        assert all(part in str(caught.value) for part in parts), caught.value


HOT = {"to_onehot_y": True, "softmax": True}
LEARNED = torch.ones(C, requires_grad=True)
WAYS: dict[str, Loss] = {
    "class weights that are learned": lambda z, y: functional.dice_ce_loss(z, y, **HOT, weight=LEARNED),
    "a lambda that is learned": lambda z, y: functional.dice_ce_loss(z, y, **HOT, lambda_ce=LEARNED[0]),
    "learned voxel weights": lambda z, y: functional.dice_loss(z, y, **HOT, mask=M.clone().requires_grad_()),
    "sums of learned voxel weights": lambda z, y: region_sums(z, y, mask=M.clone().requires_grad_()),
    "a masked label map": lambda z, y: functional.masked_dice_loss(z, y, M * 0 + 1, **HOT),
    "a learned mask": lambda z, y: functional.masked_dice_loss(z, y, (M * 0 + 1).requires_grad_(), **HOT),
    "weights of volumes": lambda z, y: functional.generalized_dice_loss(z, y, **HOT, w_func=torch.reciprocal),
    "a map": lambda z, y: functional.focal_loss(z, y, to_onehot_y=True, reduction="none"),
    "no space": lambda z, y: functional.dice_loss(z[..., 0, 0, 0], y[..., 0, 0, 0], **HOT),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_label_out_of_range_is_an_error_also_where_pytorch_computes(way: str) -> None:
    labels = Y.clone()
    labels[0, 0, 0, 0, 0] = 200
    with pytest.raises(
        LabelRangeError, match=r"1 of \d+ voxels hold a label outside \[0, 4\), the first is 200"
    ):
        WAYS[way](Z.clone().requires_grad_(), labels)


UNSIGNED = torch.full_like(Y, -1).to(torch.uint64)
# By what the error says, a regular expression.
MISTAKES: dict[type[Exception], dict[str, Loss]] = {
    ValueError: {
        "softmax: got 'softmax', expected True": lambda: dicekernels.DiceLoss(softmax="softmax"),
        "label_smoothing: got 'a', expected a number": lambda: dicekernels.DiceCELoss(
            **HOT, label_smoothing="a"
        )(Z, Y),
        "smooth_nr: got 'a', expected a number": lambda: dicekernels.DiceLoss(smooth_nr="a"),
        r"alpha: got shape \(4, 1\), expected 4 values in one dimension": lambda: dicekernels.FocalLoss(
            to_onehot_y=True, alpha=torch.rand(C, 1)
        )(Z, Y),
    },
    TypeError: {
        "sigmoid: got None, expected True": lambda: dicekernels.DiceLoss(sigmoid=None),
        "lambda_ce: got '0.5', expected a number": lambda: dicekernels.DiceCELoss(lambda_ce="0.5"),
        "lambda_ce: got None": lambda: functional.dice_ce_loss(Z, Y, **HOT, lambda_ce=None),
        "gamma: got None, expected a number": lambda: dicekernels.FocalLoss(to_onehot_y=True, gamma=None)(
            Z, Y
        ),
        r"alpha: got \[0.3, 0.7\], expected a number": lambda: dicekernels.TverskyLoss(
            **HOT, alpha=[0.3, 0.7]
        )(Z, Y),
        "the result of other_act: got a tuple": lambda: dicekernels.DiceLoss(
            to_onehot_y=True, other_act=lambda z: (z, z)
        )(Z, Y),
        "the result of w_func: got float": lambda: functional.generalized_dice_loss(
            Z, Y, **HOT, w_func=lambda g: 1.0
        ),
        "weights: got 'exp', expected a number for each level": lambda: dicekernels.DeepSupervisionLoss(
            dicekernels.DiceLoss(), weights="exp"
        ),
        "loss: got the class DiceLoss, expected a loss": lambda: dicekernels.DeepSupervisionLoss(
            dicekernels.DiceLoss
        ),
        "loss: got 'dice', expected a loss": lambda: dicekernels.DeepSupervisionLoss("dice"),
        r"logits: got torch.float8_e5m2, .* use logits.bfloat16\(\)": lambda: dicekernels.DiceLoss(**HOT)(
            Z.to(torch.float8_e5m2), Y
        ),
    },
    LabelRangeError: {
        "the first is 922337203685477580": lambda: dicekernels.DiceLoss(**HOT, ignore_index=-1)(Z, UNSIGNED)
    },
}


@pytest.mark.parametrize(("error", "text"), [(error, text) for error in MISTAKES for text in MISTAKES[error]])
def test_an_option_of_another_kind_is_named(error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MISTAKES[error][text]()
