"""``torch.jit.script`` of the losses: dense PyTorch that TorchScript can compile, save and load anywhere.

TorchScript compiles neither the kernels' ops nor keyword-only arguments with defaults. So
``__prepare_scriptable__`` of a loss hands it a twin: a module with the attributes, buffers and submodules
of the loss and a ``forward`` in plain PyTorch, the formulas of ``dicekernels.reference`` again. Values,
shapes and dtypes are the loss's; memory and time are those of dense one-hot tensors. A saved twin needs
torch alone.

In a scripted loss ``mask`` may also be the third positional argument, and errors are ``torch.jit.Error``
with the type and text of the original in the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..overrides import overridden
from . import compound, focal, masked, overlap, unified_focal, wasserstein, wrappers
from .twin import Twin, refuse

TWINS: dict[str, type[Twin]] = {
    "AsymmetricUnifiedFocalLoss": unified_focal.UnifiedFocal,
    "DeepSupervisionLoss": wrappers.DeepSupervision,
    "DiceCELoss": compound.DiceCE,
    "DiceFocalLoss": compound.DiceFocal,
    "DiceLoss": overlap.Dice,
    "FocalLoss": focal.Focal,
    "GeneralizedDiceFocalLoss": compound.GeneralizedDiceFocal,
    "GeneralizedDiceLoss": overlap.GeneralizedDice,
    "GeneralizedWassersteinDiceLoss": wasserstein.Wasserstein,
    "MCCLoss": overlap.MCC,
    "MaskedDiceLoss": masked.MaskedDice,
    "MaskedLoss": wrappers.Masked,
    "TverskyLoss": overlap.Tversky,
}


def scriptable(loss: nn.Module) -> nn.Module:
    """What ``__prepare_scriptable__`` of a loss returns: its twin.

    A subclass with a ``forward`` of its own is returned as it is: TorchScript compiles that ``forward``, or
    says what in it it cannot compile.

    Raises:
        RuntimeError: a subclass overrides another method that takes part, or the loss was changed in a way
            that its twin does not follow.
    """
    ours: Iterator[Any] = (
        base for base in type(loss).__mro__ if base.__module__.startswith("dicekernels.modules.")
    )
    kind = next(base for base in ours if base.__name__ in TWINS)
    if type(loss).forward is not kind.forward and "forward" not in vars(loss):
        return loss
    for name in overridden(loss, kind):
        refuse(loss, f"it overrides {name}, which {kind.__name__} calls in Python alone")
    return TWINS[kind.__name__].of(loss)
