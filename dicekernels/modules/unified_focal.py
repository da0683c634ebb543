"""Module of the asymmetric unified focal loss. Conventions: ``dicekernels.modules``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.modules.loss import _Loss

from .. import checks, functional
from ..arguments import documented
from ..functional.unified_focal import Half, two_halves_loss
from ..overrides import remember
from .loss import Loss, same

HALVES = {"focal": "asy_focal_loss", "tversky": "asy_focal_tversky_loss"}
NUMBERS = ("gamma", "delta", "epsilon")


class _HalfSettings(_Loss):
    """The numbers of one half under MONAI's names; it has no forward of its own."""

    def __init__(self, gamma: float, delta: float) -> None:
        super().__init__(reduction="mean")
        self.to_onehot_y = False
        self.delta = delta
        self.gamma = gamma
        self.epsilon = 1e-7
        self.ignore_index: int | None = None

    def numbers(self, name: str) -> Half:
        """The numbers, for the loss.

        Raises:
            ValueError: an option was changed that only gamma, delta and epsilon may be.
            NotImplementedError: its forward was overridden.
        """
        if type(self).forward is not _Loss.forward or "forward" in self.__dict__ or checks.hooked(self):
            raise NotImplementedError(
                f"{name}: got a forward or hooks of its own, which the loss does not call, so that they "
                "would change nothing; derive from MONAI's class"
            )
        if self.to_onehot_y or self.ignore_index is not None or self.reduction != "mean":
            raise ValueError(
                f"{name}: got to_onehot_y={self.to_onehot_y}, ignore_index={self.ignore_index}, "
                f"reduction={self.reduction!r}, expected them as constructed; set them on the whole loss"
            )
        return Half(*(checks.constant(key, getattr(self, key)) for key in NUMBERS))


@documented(functional.asymmetric_unified_focal_loss)
@remember("forward")
class AsymmetricUnifiedFocalLoss(Loss):
    """Asymmetric focal + focal Tversky loss of two classes: ``monai.losses.AsymmetricUnifiedFocalLoss``.

    Formula and source: :func:`dicekernels.functional.asymmetric_unified_focal_loss`. As in MONAI, ``gamma``
    and ``delta`` of the two halves are those of ``asy_focal_loss`` and ``asy_focal_tversky_loss`` (with
    ``epsilon``): changing them there takes effect, on this module not.

    Raises:
        ValueError: an unknown reduction.
    """

    _FUNCTION: ClassVar = two_halves_loss
    _OPTIONS: ClassVar = {"": same("to_onehot_y", "num_classes", "weight", "reduction", "ignore_index")}
    PARTS: ClassVar = dict.fromkeys(HALVES.values(), _HalfSettings)
    PLACES: ClassVar = {
        name: tuple(f"{half}.{name}" for half in HALVES.values()) for name in ("gamma", "delta")
    }
    BESIDE: ClassVar = {half: {"epsilon": 1e-7} for half in HALVES.values()}
    _SCRIPTED: ClassVar = {
        option: f"[{', '.join(f'float(self.{half}.{name})' for name in NUMBERS)}]"
        for option, half in HALVES.items()
    }
    asy_focal_loss: _HalfSettings
    asy_focal_tversky_loss: _HalfSettings

    def __init__(
        self,
        to_onehot_y: bool = False,
        num_classes: int = 2,
        weight: float = 0.5,
        gamma: float = 0.5,
        delta: float = 0.7,
        reduction: Literal["mean", "sum", "none"] = "mean",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self._hold(locals())
        self.gamma = gamma
        self.delta = delta
        self.asy_focal_loss = _HalfSettings(gamma, delta)
        self.asy_focal_tversky_loss = _HalfSettings(gamma, delta)

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        for option, name in HALVES.items():
            half = getattr(self, name)
            if not isinstance(half, _HalfSettings):
                raise NotImplementedError(
                    f"{name}: got a {type(half).__name__}, expected that of the constructor, "
                    "whose gamma, delta and epsilon count; for another half derive from MONAI's class"
                )
            options[option] = half.numbers(name)
        return options

    def forward(self, y_pred: Tensor, y_true: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.asymmetric_unified_focal_loss`` with the options of this module."""
        return two_halves_loss(y_pred, y_true, mask=mask, **self._options())
