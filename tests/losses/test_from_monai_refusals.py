"""from_monai: what it does not carry is refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import monai
import pytest
import torch
import torch.nn.functional as F
from monai import losses
from monai.losses.unified_focal_loss import AsymmetricFocalLoss
from test_from_monai import F32, HOT, MATRIX, WEIGHT, changed, data
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dicekernels
from dicekernels import from_monai
from dicekernels.testing import assert_close_to_truth


class Overridden(losses.DiceLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


class Haus(losses.HausdorffDTLoss):
    pass


def hooked(kind: str, path: str = "") -> nn.Module:
    loss = losses.DiceCELoss(**HOT)
    getattr(loss.get_submodule(path), kind)(lambda *_: None)
    return loss


def parametrised() -> nn.Module:
    loss = losses.DiceLoss(**HOT)
    loss.class_weight = nn.Parameter(WEIGHT.clone())
    return parametrize.register_parametrization(loss, "class_weight", nn.Identity())


def having(name: str, value: Any, path: str = "", loss: nn.Module | None = None) -> nn.Module:
    loss = loss or losses.DiceCELoss(**HOT)
    setattr(loss.get_submodule(path), name, value)
    return loss


def compiled_in_place() -> nn.Module:
    loss = losses.DiceLoss()
    loss.compile()
    return loss


def with_buffer() -> nn.Module:
    loss = losses.DiceLoss()
    loss.register_buffer("seen", torch.zeros(()))
    return loss


def masked_dice(**changes: Any) -> nn.Module:
    return changed(losses.MaskedDiceLoss(**HOT), changes)


def unified(path: str, name: str, value: Any) -> nn.Module:
    return having(name, value, path, losses.AsymmetricUnifiedFocalLoss())


TAKES_ANY = "A wrapper of this package takes any callable"
# By what the error says, a regular expression.
REFUSED: dict[type[Exception], dict[str, Callable[[], Any]]] = {
    TypeError: {
        "HausdorffDTLoss has no counterpart here: keep it": losses.HausdorffDTLoss,
        "SoftclDiceLoss has no counterpart": losses.SoftclDiceLoss,
        "NACLLoss has no counterpart": lambda: losses.NACLLoss(3, 2),
        "AsymmetricFocalLoss has no counterpart": AsymmetricFocalLoss,
        "MultiScaleLoss has no counterpart": lambda: losses.MultiScaleLoss(losses.DiceLoss()),
        "Overridden is a subclass of MONAI's DiceLoss.*dicekernels.DiceLoss": Overridden,
        "Haus is a subclass of MONAI's HausdorffDTLoss.*Keep it": Haus,
        r"torch.nn.modules.loss.CrossEntropyLoss, expected one of.*DiceCELoss": nn.CrossEntropyLoss,
        "expected an instance": lambda: losses.DiceLoss,
        "got None, expected an instance of a MONAI loss": lambda: None,
        "expected an instance of a MONAI loss": lambda: F.mse_loss,
        "OptimizedModule, expected one of": lambda: torch.compile(losses.DiceLoss()),
        "DeepSupervisionLoss.loss: got <function mse_loss": lambda: losses.DeepSupervisionLoss(F.mse_loss),
        f"DeepSupervisionLoss.loss: got torch.*MSELoss.*{TAKES_ANY}": lambda: losses.DeepSupervisionLoss(
            nn.MSELoss()
        ),
        "MaskedLoss.loss: MONAI's HausdorffDTLoss has no counterpart": lambda: losses.MaskedLoss(
            losses.HausdorffDTLoss
        ),
        "ParametrizedDiceLoss is a subclass of MONAI's DiceLoss": parametrised,
    },
    ValueError: {
        "DiceLoss: has '_compiled_call_impl'": compiled_in_place,
        "DiceCELoss: has hooks .*_forward_hooks": lambda: hooked("register_forward_hook"),
        "DiceCELoss.dice: has hooks": lambda: hooked("register_forward_pre_hook", "dice"),
        "DiceCELoss.cross_entropy: has hooks": lambda: hooked("register_full_backward_hook", "cross_entropy"),
        "has hooks .*_state_dict_hooks": lambda: hooked("register_state_dict_post_hook"),
        "DiceCELoss.dice: 'class_weight' is a parameter": lambda: having(
            "class_weight", nn.Parameter(WEIGHT.clone()), "dice"
        ),
        "DiceCELoss: 'gain' is a parameter": lambda: having("gain", nn.Parameter(torch.ones(()))),
        "DiceCELoss.dice: weight requires a gradient": lambda: having(
            "class_weight", WEIGHT.clone().requires_grad_(), "dice"
        ),
        "DiceLoss: has 'seen', which MONAI's DiceLoss does not": with_buffer,
        "DiceCELoss: has 'ignore_index', which MONAI's DiceCELoss does not": lambda: having(
            "ignore_index", 255
        ),
        "DiceCELoss: has 'ce'": lambda: having("ce", lambda z, y: z.sum()),
        "dice: has 'forward'": lambda: having("forward", lambda z, y: z.sum(), "dice"),
        "DiceCELoss: has 'extra'": lambda: having("extra", nn.Identity()),
        "DiceCELoss.cross_entropy: was replaced by torch.nn.modules.loss.NLLLoss": lambda: having(
            "cross_entropy", nn.NLLLoss()
        ),
        "DiceCELoss.dice: was replaced by monai.losses.dice.GeneralizedDiceLoss": lambda: having(
            "dice", losses.GeneralizedDiceLoss()
        ),
        "DiceCELoss.dice: was replaced by dicekernels": lambda: having("dice", dicekernels.DiceLoss()),
        "DiceCELoss.dice: Incompatible values": lambda: having("sigmoid", True, "dice"),
        "DiceCELoss: lambda_ce": lambda: having("lambda_ce", -1.0),
        "TverskyLoss: reduction: got 'median'": lambda: having(
            "reduction", "median", "", losses.TverskyLoss()
        ),
        "MaskedDiceLoss: softmax was set to True": lambda: masked_dice(softmax=True),
        "MaskedDiceLoss: ignore_index was set to 1": lambda: masked_dice(ignore_index=1),
        "spatial_weighted: wraps something else": lambda: copy.copy(masked_dice()),
        "MaskedDiceLoss.spatial_weighted: wraps something else": lambda: having(
            "loss", F.mse_loss, "spatial_weighted", masked_dice()
        ),
        "AsymmetricUnifiedFocalLoss.asy_focal_loss: reduction was set to 'sum'": lambda: unified(
            "asy_focal_loss", "reduction", "sum"
        ),
        "asy_focal_tversky_loss: to_onehot_y was set to True": lambda: unified(
            "asy_focal_tversky_loss", "to_onehot_y", True
        ),
    },
}


@pytest.mark.parametrize(("error", "text"), [(error, text) for error in REFUSED for text in REFUSED[error]])
def test_what_is_not_carried_is_refused_by_name(error: type[Exception], text: str) -> None:
    loss = REFUSED[error][text]()
    with pytest.raises(error, match=text):
        from_monai(loss)


def test_every_other_loss_of_monai_is_refused() -> None:
    kinds = {kind for kind in vars(losses).values() if isinstance(kind, type)}
    others = {kind for kind in kinds if not hasattr(dicekernels, kind.__name__)}
    assert len(kinds - others) == 13
    for kind in others:
        with pytest.raises(TypeError, match=f"{kind.__name__} has no counterpart here: keep it"):
            from_monai(kind.__new__(kind))


@pytest.mark.parametrize("version", ["1.6.0", "1.6.1", "1.6.2+cu12", "1.6.dev2546"])
def test_no_warning_about_1_6(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monai, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_monai(losses.DeepSupervisionLoss(losses.DiceLoss()))


@pytest.mark.parametrize("version", ["1.5.1", "1.7.0", "2.0", "0+unknown"])
def test_other_versions_are_warned_of(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monai, "__version__", version)
    with pytest.warns(UserWarning, match=f"MONAI {version.replace('+', '.')} is loaded") as caught:
        from_monai(losses.DeepSupervisionLoss(losses.DiceLoss()))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_losses_that_changed_in_1_6_are_refused_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monai, "__version__", "1.5.0")
    for loss in (
        losses.MaskedDiceLoss(),
        losses.GeneralizedWassersteinDiceLoss(MATRIX),
        losses.AsymmetricUnifiedFocalLoss(),
        losses.DeepSupervisionLoss(losses.MaskedDiceLoss()),
    ):
        with pytest.raises(ValueError, match=r"of MONAI 1\.5\.0 computes other numbers"):
            from_monai(loss)


def test_options_that_an_older_monai_lacks_have_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = losses.DiceLoss(**HOT)
    logits, target = data(theirs)
    honest, truth = theirs(logits, target), theirs(logits.double(), target)
    del theirs.soft_label, theirs.ignore_index
    monkeypatch.setattr(monai, "__version__", "1.3.2")
    with pytest.warns(UserWarning, match="is loaded"):
        ours = from_monai(theirs)
    assert_close_to_truth(ours(logits, target), truth, honest, F32, "loss")
