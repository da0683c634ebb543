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


REFUSED: dict[type[Exception], dict[str, tuple[Callable[[], Any], str]]] = {
    TypeError: {
        "hausdorff": (losses.HausdorffDTLoss, "HausdorffDTLoss has no counterpart here: keep it"),
        "cldice": (losses.SoftclDiceLoss, "SoftclDiceLoss has no counterpart"),
        "nacl": (lambda: losses.NACLLoss(3, 2), "NACLLoss has no counterpart"),
        "half alone": (AsymmetricFocalLoss, "AsymmetricFocalLoss has no counterpart"),
        "multi-scale": (
            lambda: losses.MultiScaleLoss(losses.DiceLoss()),
            "MultiScaleLoss has no counterpart",
        ),
        "subclass": (Overridden, "Overridden is a subclass of MONAI's DiceLoss.*dicekernels.DiceLoss"),
        "subclass of another": (Haus, "Haus is a subclass of MONAI's HausdorffDTLoss.*Keep it"),
        "torch": (
            nn.CrossEntropyLoss,
            r"torch.nn.modules.loss.CrossEntropyLoss, expected one of.*DiceCELoss",
        ),
        "class": (lambda: losses.DiceLoss, "expected an instance"),
        "none": (lambda: None, "got None, expected an instance of a MONAI loss"),
        "function": (lambda: F.mse_loss, "expected an instance of a MONAI loss"),
        "compiled": (lambda: torch.compile(losses.DiceLoss()), "OptimizedModule, expected one of"),
        "inner function": (
            lambda: losses.DeepSupervisionLoss(F.mse_loss),
            "DeepSupervisionLoss.loss: got <function mse_loss",
        ),
        "inner torch": (
            lambda: losses.DeepSupervisionLoss(nn.MSELoss()),
            "DeepSupervisionLoss.loss: got torch.*MSELoss.*A wrapper of this package takes any callable",
        ),
        "inner hausdorff": (
            lambda: losses.MaskedLoss(losses.HausdorffDTLoss),
            "MaskedLoss.loss: MONAI's HausdorffDTLoss has no counterpart",
        ),
        "parametrised": (parametrised, "ParametrizedDiceLoss is a subclass of MONAI's DiceLoss"),
    },
    ValueError: {
        "compiled in place": (compiled_in_place, "DiceLoss: has '_compiled_call_impl'"),
        "forward hook": (lambda: hooked("register_forward_hook"), "DiceCELoss: has hooks .*_forward_hooks"),
        "pre hook": (lambda: hooked("register_forward_pre_hook", "dice"), "DiceCELoss.dice: has hooks"),
        "backward hook": (
            lambda: hooked("register_full_backward_hook", "cross_entropy"),
            "DiceCELoss.cross_entropy: has hooks",
        ),
        "state hook": (lambda: hooked("register_state_dict_post_hook"), "has hooks .*_state_dict_hooks"),
        "parameter": (
            lambda: having("class_weight", nn.Parameter(WEIGHT.clone()), "dice"),
            "DiceCELoss.dice: 'class_weight' is a parameter",
        ),
        "lambda parameter": (
            lambda: having("gain", nn.Parameter(torch.ones(()))),
            "DiceCELoss: 'gain' is a parameter",
        ),
        "gradient": (
            lambda: having("class_weight", WEIGHT.clone().requires_grad_(), "dice"),
            "DiceCELoss.dice: weight requires a gradient",
        ),
        "buffer": (with_buffer, "DiceLoss: has 'seen', which MONAI's DiceLoss does not"),
        "attribute": (
            lambda: having("ignore_index", 255),
            "DiceCELoss: has 'ignore_index', which MONAI's DiceCELoss does not",
        ),
        "method": (lambda: having("ce", lambda z, y: z.sum()), "DiceCELoss: has 'ce'"),
        "forward": (lambda: having("forward", lambda z, y: z.sum(), "dice"), "dice: has 'forward'"),
        "module": (lambda: having("extra", nn.Identity()), "DiceCELoss: has 'extra'"),
        "half": (
            lambda: having("cross_entropy", nn.NLLLoss()),
            "DiceCELoss.cross_entropy: was replaced by torch.nn.modules.loss.NLLLoss",
        ),
        "monai half": (
            lambda: having("dice", losses.GeneralizedDiceLoss()),
            "DiceCELoss.dice: was replaced by monai.losses.dice.GeneralizedDiceLoss",
        ),
        "our half": (
            lambda: having("dice", dicekernels.DiceLoss()),
            "DiceCELoss.dice: was replaced by dicekernels",
        ),
        "two activations": (lambda: having("sigmoid", True, "dice"), "DiceCELoss.dice: Incompatible values"),
        "negative lambda": (lambda: having("lambda_ce", -1.0), "DiceCELoss: lambda_ce"),
        "reduction": (
            lambda: having("reduction", "median", "", losses.TverskyLoss()),
            "TverskyLoss: reduction: got 'median'",
        ),
        "masked activation": (lambda: masked_dice(softmax=True), "MaskedDiceLoss: softmax was set to True"),
        "masked ignore": (lambda: masked_dice(ignore_index=1), "MaskedDiceLoss: ignore_index was set to 1"),
        "masked copy": (lambda: copy.copy(masked_dice()), "spatial_weighted: wraps something else"),
        "masked method": (
            lambda: having("loss", F.mse_loss, "spatial_weighted", masked_dice()),
            "MaskedDiceLoss.spatial_weighted: wraps something else",
        ),
        "unified half": (
            lambda: unified("asy_focal_loss", "reduction", "sum"),
            "AsymmetricUnifiedFocalLoss.asy_focal_loss: reduction was set to 'sum'",
        ),
        "unified one-hot": (
            lambda: unified("asy_focal_tversky_loss", "to_onehot_y", True),
            "asy_focal_tversky_loss: to_onehot_y was set to True",
        ),
    },
}


@pytest.mark.parametrize(("error", "case"), [(error, case) for error in REFUSED for case in REFUSED[error]])
def test_what_is_not_carried_is_refused_by_name(error: type[Exception], case: str) -> None:
    make, text = REFUSED[error][case]
    loss = make()
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
