"""What an error says of weights: of the classes, and of the voxels, where no value may be negative."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import monai.losses
import pytest
import torch
from cases import DEVICE
from test_messages import FUNCTIONS, ONE_HOT, C, G, M, Y, Z, every_loss, forms, message
from torch.utils._python_dispatch import TorchDispatchMode

import dicekernels
from dicekernels import functional
from dicekernels.testing import assert_close_to_truth


def weighted(name: str, weight: Any, background: bool = True) -> list[Callable[[], Any]]:
    """The function and the module with a weight; the mask of MaskedDiceLoss is all ones."""
    masked = name == "MaskedDiceLoss"
    options = {"to_onehot_y": True, "include_background": background, "weight": weight}
    function = functional.masked_dice_loss if masked else FUNCTIONS[name]
    more = (torch.ones_like(M),) if masked else ()
    return [
        lambda: function(Z, Y, *more, **options),
        lambda: getattr(dicekernels, name)(**options)(Z, Y, *more),
    ]


NAMES = ["DiceLoss", "MaskedDiceLoss", "DiceCELoss", "FocalLoss", "DiceFocalLoss", "GeneralizedDiceFocalLoss"]


@pytest.mark.parametrize(
    ("count", "background"), [(C - 1, True), (C - 1, False), (C + 1, True), (C + 1, False), (C - 2, False)]
)
def test_the_weight_of_dice_ce_counts_the_background(count: int, background: bool) -> None:
    for weight in ([1.0] * count, torch.ones(count)):
        for call in weighted("DiceCELoss", weight, background):
            text = message(call, error=ValueError)
            assert "The length of the `weight` sequence should be the same as the number of classes" in text
            assert f"Got {count}, expected {C}: the weight of DiceCELoss" in text
            assert "background included, also with include_background=False" in text


def test_one_number_as_weight_of_dice_ce() -> None:
    for call in (call for weight in (2.0, torch.tensor(2.0)) for call in weighted("DiceCELoss", weight)):
        text = message(call, error=RuntimeError)
        assert "weight: got 1 values, expected 4" in text and "[w] * 4" in text


@pytest.mark.parametrize("name", [name for name in NAMES if name != "DiceCELoss"])
@pytest.mark.parametrize(
    ("count", "background", "expected", "part"),
    [
        (C - 1, True, C, "one for every class, the background included"),
        (C + 1, True, C, "one for every class, the background included"),
        (C, False, C - 1, "should not include the background category class 0"),
        (C, False, C - 1, "leave out that of the background, weight[1:]"),
        (C - 2, False, C - 1, "should not include the background category class 0"),
    ],
)
def test_the_weight_of_the_others_goes_with_include_background(
    name: str, count: int, background: bool, expected: int, part: str
) -> None:
    for call in weighted(name, [1.0] * count, background):
        text = message(call, error=ValueError)
        assert f"Got {count}, expected {expected}" in text and part in text, text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("weight", "error"),
    [
        ("auto", TypeError),
        ({0: 1.0}, RuntimeError),
        ([1.0, None, 2.0, 3.0], RuntimeError),
        ([[1.0, 2.0], [3.0]], ValueError),
        (["a", "b"], ValueError),
    ],
    ids=str,
)
def test_what_is_no_weight(name: str, weight: Any, error: type[Exception]) -> None:
    """The types are MONAI's."""
    with pytest.raises(error):
        monai.losses.DiceLoss(weight=weight)
    for call in weighted(name, weight):
        text = message(call, error=error)
        expected = "None, a number, or a number for each class as a list, an array or a tensor"
        assert text == f"weight: got {weight!r}, expected {expected}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [-2.0, -math.inf, math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_values_that_are_no_weights(name: str, bad: float, at: int) -> None:
    values = [1.0] * C
    values[at] = bad
    for weight in (values, torch.tensor(values, dtype=torch.float64)):
        for call in weighted(name, weight):
            text = message(call, error=ValueError)
            assert f"weight: got {bad}" in text and "0 leaves" in text, text
    if name == "DiceCELoss":  # the background's value is that of the cross entropy alone
        for call in weighted(name, values, background=False):
            assert f"weight: got {bad}" in message(call, error=ValueError)


def test_a_weight_that_was_good_is_read_again_after_a_change() -> None:
    loss = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True, weight=torch.ones(C))
    assert loss(Z, Y).isfinite()
    loss.cross_entropy.weight[3] = math.nan
    assert "weight: got nan" in message(loss, Z, Y, error=ValueError)


def test_other_options_of_a_number_for_each_class() -> None:
    assert "alpha: got 'auto', expected None, a number" in message(
        dicekernels.FocalLoss, alpha="auto", error=TypeError
    )
    text = message(functional.focal_loss, Z, Y, to_onehot_y=True, alpha={1: 0.5}, error=RuntimeError)
    assert "alpha: got {1: 0.5}, expected None, a number" in text
    text = message(
        functional.focal_loss,
        Z,
        Y,
        to_onehot_y=True,
        alpha=[0.5] * C,
        include_background=False,
        error=ValueError,
    )
    assert "alpha (4) must match the number of classes (3): one value for the classes without" in text
    for function in (functional.dice_ce_loss, functional.dice_focal_loss):
        text = message(function, Z, Y, to_onehot_y=True, dice_weight="auto", error=ValueError)
        assert "dice_weight: got 'auto', expected one of 'weight'" in text


def test_the_text_of_a_scripted_weight() -> None:
    options = {"to_onehot_y": True, "softmax": True, "include_background": False}
    for weight, loss, part in (
        ([1.0] * (C - 1), dicekernels.DiceCELoss, "Got 3, expected 4: the weight of DiceCELoss has one"),
        ([1.0] * C, dicekernels.DiceLoss, "Got 4, expected 3; leave out that of the background, weight[1:]"),
        ([1.0, math.nan, 1.0], dicekernels.DiceLoss, "weight: got nan, expected finite values"),
    ):
        with pytest.raises(torch.jit.Error) as caught:
            torch.jit.script(loss(weight=weight, **options))(Z, Y)
        assert part in str(caught.value)


def test_a_matrix_of_distances_that_is_none() -> None:
    text = message(dicekernels.GeneralizedWassersteinDiceLoss, "auto", error=TypeError)
    assert "dist_matrix: got 'auto', expected a C x C" in text


def negative(name: str) -> list[Callable[..., Any]]:
    """Every entry that takes voxel weights, called with a mask."""
    return [lambda mask, call=call: call(Z, Y, mask=mask) for call in forms(name)]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8])
def test_a_negative_voxel_weight(name: str, dtype: torch.dtype) -> None:
    mask = torch.ones_like(M).to(dtype)
    mask[1, 0, 4, 5, 6] = -2
    for call in negative(name):
        for bad in (mask, mask[1:], torch.nn.Parameter(mask, requires_grad=dtype.is_floating_point)):
            text = message(call, bad, error=ValueError)
            assert text.startswith("mask: got a voxel weight of -2"), text
            assert "expected none below 0; 0 leaves a voxel out" in text and "clamp(min=0)" in text


@every_loss
def test_a_negative_voxel_weight_where_no_kernel_runs(name: str) -> None:
    """Dense PyTorch, two passes, other halves, several resolutions."""
    mask = -torch.ones_like(M)
    calls: list[Callable[[], Any]] = []
    if name in ("FocalLoss", "DiceFocalLoss", "GeneralizedDiceFocalLoss"):
        function = FUNCTIONS[name]
        calls.append(lambda: function(Z, Y, to_onehot_y=True, reduction="none", mask=mask))
    if name in ("DiceFocalLoss", "GeneralizedDiceFocalLoss"):
        apart = getattr(dicekernels, name)(to_onehot_y=True)
        apart.focal.register_forward_hook(lambda *_: None)
        calls.append(lambda: apart(Z, Y, mask=mask))
    if name in ONE_HOT and name != "AsymmetricUnifiedFocalLoss":
        function = FUNCTIONS[name]
        if name not in ("GeneralizedDiceLoss", "GeneralizedDiceFocalLoss"):
            calls.append(
                lambda: function(Z[..., 0, 0, 0], Y[..., 0, 0, 0], to_onehot_y=True, mask=mask[..., 0, 0, 0])
            )
        deep = dicekernels.DeepSupervisionLoss(getattr(dicekernels, name)(to_onehot_y=True))
        calls.append(lambda: deep([Z, Z[..., ::2]], Y, mask=mask))
    for call in calls:
        assert "mask: got a voxel weight of -1" in message(call, error=ValueError)
    assert calls or name in ("AsymmetricUnifiedFocalLoss", "GeneralizedWassersteinDiceLoss", "region_sums")


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "reads"), [(torch.bool, 0), (torch.uint8, 0), (torch.int16, 1), (torch.float32, 1)]
)
def test_only_a_mask_that_can_be_negative_is_read_and_once(dtype: torch.dtype, reads: int) -> None:
    with _Operators() as operators:
        functional.dice_ce_loss(Z, Y, to_onehot_y=True, softmax=True, mask=(M > 0.5).to(dtype))
    assert sum("amin" in name for name in operators.names) == reads, operators.names


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace tells of every branch
def test_nothing_is_read_where_a_value_is_hidden() -> None:
    """In a graph and under a transform: the numbers of the loss outside of them."""
    call = forms("DiceCELoss")[0]
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(Z, Y, mask=M), call(Z, Y, mask=M))
    masks = torch.stack([M, M * 2, M**2])
    mapped = torch.func.vmap(lambda mask: call(Z, Y, mask=mask))(masks)
    assert torch.equal(mapped, torch.stack([call(Z, Y, mask=mask) for mask in masks]))
    traced = torch.jit.trace(lambda z, m: call(z, Y, mask=m), (Z, M), check_trace=False)
    assert torch.equal(traced(Z, M), call(Z, Y, mask=M))


@pytest.mark.skipif(DEVICE == "cpu", reason="on the CPU masks are always read")
def test_off_the_cpu_a_mask_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y, mask = (x.to(DEVICE) for x in (Z, Y, -M))
    call = forms("DiceCELoss")[0]
    monkeypatch.delenv("DICEKERNELS_CHECK", raising=False)
    unread = call(z, y, mask=mask)
    monkeypatch.setenv("DICEKERNELS_CHECK", "1")
    assert "mask: got a voxel weight of -" in message(call, z, y, mask=mask, error=ValueError)
    assert unread.device.type == torch.device(DEVICE).type


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_voxel_weight_that_is_not_finite_makes_the_loss_nan(name: str, bad: float) -> None:
    mask = torch.ones_like(M)
    mask[0, 0, 0, 0, 0] = bad
    for call in negative(name):
        value = call(mask)
        sums = torch.cat([value.I, value.FP, value.FN]) if name == "region_sums" else value
        assert sums.isnan().any() or (bad == math.inf and sums.isinf().any())


@pytest.mark.parametrize("squared_pred", [False, True])
def test_masked_dice_loss_multiplies_by_negative_values_as_monai(squared_pred: bool) -> None:
    mask = M - 0.2
    options = {"softmax": True, "squared_pred": squared_pred}
    truth = monai.losses.MaskedDiceLoss(**options)(Z.double(), G.double(), mask.double())
    honest = monai.losses.MaskedDiceLoss(**options)(Z, G, mask)
    ours = dicekernels.MaskedDiceLoss(**options)(Z, G, mask)
    assert_close_to_truth(ours, truth, honest, torch.float32, "loss")
