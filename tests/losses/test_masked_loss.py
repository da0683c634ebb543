"""MaskedLoss against MONAI's, around MONAI's losses, ours and functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import monai.losses
import pytest
import torch
from pyramids import F32, F64, HOT, SPACES, labels, outputs, run, voxel_weights
from torch import Tensor, nn

import dicekernels
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

MADE: dict[str, Callable[[Any], nn.Module]] = {
    "class": lambda library: library.MaskedLoss(library.DiceLoss, True, to_onehot_y=False, sigmoid=True),
    "instance": lambda library: library.MaskedLoss(library.DiceCELoss(softmax=True)),
    "labels": lambda library: library.MaskedLoss(library.TverskyLoss(**HOT)),
    "torch": lambda library: library.MaskedLoss(nn.MSELoss),
    "function": lambda library: library.MaskedLoss(loss=lambda z, y: (z - y).square().mean()),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", MADE)
def test_masked_values_and_gradients_are_monais(name: str, samples: int, dtype: torch.dtype) -> None:
    logits = outputs(SPACES[3], dtype)[:1]
    target = labels(SPACES[3][0]) if name == "labels" else outputs(SPACES[3])[0].flip(1).softmax(1)
    mask = voxel_weights(samples, SPACES[3][0])

    def first(library: Any) -> Callable[..., Tensor]:
        loss = MADE[name](library)
        return lambda levels, *rest: loss(levels[0], *rest)

    got, honest = (run(first(library), logits, target, mask) for library in (dicekernels, monai.losses))
    truth = run(first(monai.losses), [logits[0].double()], target, mask.double())
    assert got[0].dtype == honest[0].dtype
    assert_close_to_truth(got[0], truth[0].double(), honest[0], F32, "loss")
    assert_gradient_close(got[1], truth[1], honest[1], F32, "gradient")


def told(call: Callable[[], Any]) -> tuple[list[str], str, str]:
    """Warnings, type and text of the error."""
    error: Exception | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as raised:
            error = raised
    return [str(w.message) for w in caught], type(error).__name__, str(error)


MASKS = {
    "none": None,
    "dims": torch.ones(1, 4, 4),
    "batch": torch.ones(3, 1, 4, 4),
    "channels": torch.ones(2, 3, 4, 4),
    "space": torch.ones(2, 1, 1, 4),
    "bad space": torch.ones(2, 1, 2, 4),
    "fits": torch.ones(2, 1, 4, 4),
}


@pytest.mark.parametrize("case", MASKS)
def test_masked_warnings_and_errors_are_monais(case: str) -> None:
    logits, target = outputs([(4, 4)])[0], outputs([(4, 4)])[0].softmax(1)
    results = []
    for library in (dicekernels, monai.losses):
        loss = library.MaskedLoss(nn.MSELoss())
        results.append(told(lambda loss=loss: loss(logits, target, MASKS[case])))
    assert results[0][:2] == results[1][:2]
    assert results[0][2].startswith(results[1][2])
    assert bool(results[0][0]) == (case in ("none", "dims", "space", "bad space"))


def test_masked_loss_of_something_else() -> None:
    for library in (dicekernels, monai.losses):
        with pytest.raises(ValueError, match="The loss function is not callable"):
            library.MaskedLoss(3)
    with pytest.raises(ValueError, match="loss: got str"):
        dicekernels.MaskedLoss("DiceLoss")
    weighted = [
        library.MaskedLoss(library.DiceLoss, weight=[1.0, 2.0]) for library in (dicekernels, monai.losses)
    ]
    assert [list(loss.state_dict()) for loss in weighted] == [["loss.class_weight"]] * 2
