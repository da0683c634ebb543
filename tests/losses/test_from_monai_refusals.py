"""from_monai: what it does not carry is refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import monai
import monai.losses
import monai.losses.unified_focal_loss
import pytest
import torch
import torch.nn.functional as F
from test_from_monai import F32, HOT, MATRIX, WEIGHT, changed, data
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dicekernels
from dicekernels import from_monai
from dicekernels.testing import assert_close_to_truth


class Overridden(monai.losses.DiceLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


class Haus(monai.losses.HausdorffDTLoss):
    pass


def hooked(kind: str, path: str = "") -> nn.Module:
    loss = monai.losses.DiceCELoss(**HOT)
    getattr(loss.get_submodule(path), kind)(lambda *_: None)
    return loss


def parametrised() -> nn.Module:
    loss = monai.losses.DiceLoss(**HOT)
    loss.class_weight = nn.Parameter(WEIGHT.clone())
    return parametrize.register_parametrization(loss, "class_weight", nn.Identity())


def with_attribute(name: str, value: Any, path: str = "", loss: nn.Module | None = None) -> nn.Module:
    loss = loss or monai.losses.DiceCELoss(**HOT)
    setattr(loss.get_submodule(path), name, value)
    return loss


def compiled_in_place() -> nn.Module:
    loss = monai.losses.DiceLoss()
    loss.compile()
    return loss


def with_buffer() -> nn.Module:
    loss = monai.losses.DiceLoss()
    loss.register_buffer("seen", torch.zeros(()))
    return loss


def masked_dice(**changes: Any) -> nn.Module:
    return changed(monai.losses.MaskedDiceLoss(**HOT), changes)


def unified(path: str, name: str, value: Any) -> nn.Module:
    return with_attribute(name, value, path, monai.losses.AsymmetricUnifiedFocalLoss())


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "hausdorff": (
        monai.losses.HausdorffDTLoss,
        TypeError,
        "HausdorffDTLoss has no counterpart here: keep it",
    ),
    "cldice": (monai.losses.SoftclDiceLoss, TypeError, "SoftclDiceLoss has no counterpart"),
    "nacl": (lambda: monai.losses.NACLLoss(3, 2), TypeError, "NACLLoss has no counterpart"),
    "half alone": (
        monai.losses.unified_focal_loss.AsymmetricFocalLoss,
        TypeError,
        "AsymmetricFocalLoss has no counterpart",
    ),
    "multi-scale": (
        lambda: monai.losses.MultiScaleLoss(monai.losses.DiceLoss()),
        TypeError,
        "MultiScaleLoss has no counterpart",
    ),
    "subclass": (Overridden, TypeError, "Overridden is a subclass of MONAI's DiceLoss.*dicekernels.DiceLoss"),
    "subclass of another": (Haus, TypeError, "Haus is a subclass of MONAI's HausdorffDTLoss.*Keep it"),
    "torch": (
        nn.CrossEntropyLoss,
        TypeError,
        r"torch.nn.modules.loss.CrossEntropyLoss, expected one of.*DiceCELoss",
    ),
    "class": (lambda: monai.losses.DiceLoss, TypeError, "expected an instance"),
    "none": (lambda: None, TypeError, "got None, expected an instance of a MONAI loss"),
    "function": (lambda: F.mse_loss, TypeError, "expected an instance of a MONAI loss"),
    "compiled": (
        lambda: torch.compile(monai.losses.DiceLoss()),
        TypeError,
        "OptimizedModule, expected one of",
    ),
    "compiled in place": (compiled_in_place, ValueError, "DiceLoss: has '_compiled_call_impl'"),
    "inner function": (
        lambda: monai.losses.DeepSupervisionLoss(F.mse_loss),
        TypeError,
        "DeepSupervisionLoss.loss: got <function mse_loss",
    ),
    "inner torch": (
        lambda: monai.losses.DeepSupervisionLoss(nn.MSELoss()),
        TypeError,
        "DeepSupervisionLoss.loss: got torch.*MSELoss.*A wrapper of this package takes any callable",
    ),
    "inner hausdorff": (
        lambda: monai.losses.MaskedLoss(monai.losses.HausdorffDTLoss),
        TypeError,
        "MaskedLoss.loss: MONAI's HausdorffDTLoss has no counterpart",
    ),
    "forward hook": (
        lambda: hooked("register_forward_hook"),
        ValueError,
        "DiceCELoss: has hooks .*_forward_hooks",
    ),
    "pre hook": (
        lambda: hooked("register_forward_pre_hook", "dice"),
        ValueError,
        "DiceCELoss.dice: has hooks",
    ),
    "backward hook": (
        lambda: hooked("register_full_backward_hook", "cross_entropy"),
        ValueError,
        "DiceCELoss.cross_entropy: has hooks",
    ),
    "state hook": (
        lambda: hooked("register_state_dict_post_hook"),
        ValueError,
        "has hooks .*_state_dict_hooks",
    ),
    "parameter": (
        lambda: with_attribute("class_weight", nn.Parameter(WEIGHT.clone()), "dice"),
        ValueError,
        "DiceCELoss.dice: 'class_weight' is a parameter",
    ),
    "lambda parameter": (
        lambda: with_attribute("gain", nn.Parameter(torch.ones(()))),
        ValueError,
        "DiceCELoss: 'gain' is a parameter",
    ),
    "parametrised": (parametrised, TypeError, "ParametrizedDiceLoss is a subclass of MONAI's DiceLoss"),
    "gradient": (
        lambda: with_attribute("class_weight", WEIGHT.clone().requires_grad_(), "dice"),
        ValueError,
        "DiceCELoss.dice: weight requires a gradient",
    ),
    "buffer": (with_buffer, ValueError, "DiceLoss: has 'seen', which MONAI's DiceLoss does not"),
    "attribute": (
        lambda: with_attribute("ignore_index", 255),
        ValueError,
        "DiceCELoss: has 'ignore_index', which MONAI's DiceCELoss does not",
    ),
    "method": (lambda: with_attribute("ce", lambda z, y: z.sum()), ValueError, "DiceCELoss: has 'ce'"),
    "forward": (
        lambda: with_attribute("forward", lambda z, y: z.sum(), "dice"),
        ValueError,
        "dice: has 'forward'",
    ),
    "module": (lambda: with_attribute("extra", nn.Identity()), ValueError, "DiceCELoss: has 'extra'"),
    "half": (
        lambda: with_attribute("cross_entropy", nn.NLLLoss()),
        ValueError,
        "DiceCELoss.cross_entropy: was replaced by torch.nn.modules.loss.NLLLoss",
    ),
    "monai half": (
        lambda: with_attribute("dice", monai.losses.GeneralizedDiceLoss()),
        ValueError,
        "DiceCELoss.dice: was replaced by monai.losses.dice.GeneralizedDiceLoss",
    ),
    "our half": (
        lambda: with_attribute("dice", dicekernels.DiceLoss()),
        ValueError,
        "DiceCELoss.dice: was replaced by dicekernels",
    ),
    "two activations": (
        lambda: with_attribute("sigmoid", True, "dice"),
        ValueError,
        "DiceCELoss.dice: Incompatible values",
    ),
    "negative lambda": (lambda: with_attribute("lambda_ce", -1.0), ValueError, "DiceCELoss: lambda_ce"),
    "reduction": (
        lambda: with_attribute("reduction", "median", "", monai.losses.TverskyLoss()),
        ValueError,
        "TverskyLoss: reduction: got 'median'",
    ),
    "masked activation": (
        lambda: masked_dice(softmax=True),
        ValueError,
        "MaskedDiceLoss: softmax was set to True",
    ),
    "masked ignore": (
        lambda: masked_dice(ignore_index=1),
        ValueError,
        "MaskedDiceLoss: ignore_index was set to 1",
    ),
    "masked copy": (lambda: copy.copy(masked_dice()), ValueError, "spatial_weighted: wraps something else"),
    "masked method": (
        lambda: with_attribute("loss", F.mse_loss, "spatial_weighted", masked_dice()),
        ValueError,
        "MaskedDiceLoss.spatial_weighted: wraps something else",
    ),
    "unified half": (
        lambda: unified("asy_focal_loss", "reduction", "sum"),
        ValueError,
        "AsymmetricUnifiedFocalLoss.asy_focal_loss: reduction was set to 'sum'",
    ),
    "unified one-hot": (
        lambda: unified("asy_focal_tversky_loss", "to_onehot_y", True),
        ValueError,
        "asy_focal_tversky_loss: to_onehot_y was set to True",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_carried_is_refused_by_name(case: str) -> None:
    make, error, text = REFUSED[case]
    loss = make()
    with pytest.raises(error, match=text):
        from_monai(loss)


def test_every_other_loss_of_monai_is_refused() -> None:
    kinds = {kind for kind in vars(monai.losses).values() if isinstance(kind, type)}
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
        from_monai(monai.losses.DeepSupervisionLoss(monai.losses.DiceLoss()))


@pytest.mark.parametrize("version", ["1.5.1", "1.7.0", "2.0", "0+unknown"])
def test_other_versions_are_warned_of(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monai, "__version__", version)
    with pytest.warns(UserWarning, match=f"MONAI {version.replace('+', '.')} is loaded") as caught:
        from_monai(monai.losses.DeepSupervisionLoss(monai.losses.DiceLoss()))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_losses_that_changed_in_1_6_are_refused_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monai, "__version__", "1.5.0")
    for loss in (
        monai.losses.MaskedDiceLoss(),
        monai.losses.GeneralizedWassersteinDiceLoss(MATRIX),
        monai.losses.AsymmetricUnifiedFocalLoss(),
        monai.losses.DeepSupervisionLoss(monai.losses.MaskedDiceLoss()),
    ):
        with pytest.raises(ValueError, match=r"of MONAI 1\.5\.0 computes other numbers"):
            from_monai(loss)


def test_options_that_an_older_monai_lacks_have_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = monai.losses.DiceLoss(**HOT)
    logits, target = data(theirs)
    honest, truth = theirs(logits, target), theirs(logits.double(), target)
    del theirs.soft_label, theirs.ignore_index
    monkeypatch.setattr(monai, "__version__", "1.3.2")
    with pytest.warns(UserWarning, match="is loaded"):
        ours = from_monai(theirs)
    assert_close_to_truth(ours(logits, target), truth, honest, F32, "loss")
