"""Module of the generalized Wasserstein Dice loss. Conventions: ``dicekernels.modules``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import checks, functional
from ..arguments import documented
from ..functional.wasserstein import MODES, normalised, normalised_wasserstein_dice_loss
from ..overrides import refuse, remember
from ..scripting import scriptable
from .base import Loss

# MONAI's steps of the dense formula.
_STEPS = (
    "wasserstein_distance_map",
    "_compute_alpha_generalized_true_positives",
    "_compute_denominator",
    "_compute_generalized_true_positive",
)


@documented(functional.generalized_wasserstein_dice_loss)
@remember("forward")
class GeneralizedWassersteinDiceLoss(Loss):
    """Dice loss of distances between classes: ``monai.losses.GeneralizedWassersteinDiceLoss``.

    Formula and source: :func:`dicekernels.functional.generalized_wasserstein_dice_loss`. The attribute ``m``
    holds the distances, divided by the largest; as in MONAI it is no buffer and keeps its dtype: distances in
    float64 (NumPy's default) make a float64 loss. ``alpha_mode`` is the ``weighting_mode``.

    Raises:
        ValueError: as MONAI, for a matrix that is not square or an unknown option.
    """

    PLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "dist_matrix": ("m",),
        "weighting_mode": ("alpha_mode",),
    }

    def __init__(
        self,
        dist_matrix: Any,
        weighting_mode: Literal["default", "GDL"] = "default",
        reduction: Literal["mean", "sum", "none"] = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        *,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction=checks.option("reduction", reduction, ("mean", "sum", "none")))
        matrix = normalised(dist_matrix)
        self.alpha_mode = checks.option("weighting_mode", weighting_mode, MODES)
        # A matrix that is normalised already is kept itself: integers stay integers.
        given = dist_matrix if isinstance(dist_matrix, Tensor) else torch.as_tensor(dist_matrix, device="cpu")
        self.m = given if bool(given.max() == 1) else matrix
        self.num_classes = self.m.size(0)
        self.smooth_nr = checks.constant("smooth_nr", smooth_nr)
        self.smooth_dr = checks.constant("smooth_dr", smooth_dr)
        self.ignore_index = ignore_index

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this module."""
        return scriptable(self)

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.generalized_wasserstein_dice_loss`` with the options of this module.

        Raises:
            NotImplementedError: one of MONAI's steps of the formula was overridden.
        """
        refuse(self, _STEPS, "change dist_matrix, or derive from MONAI's class")
        return normalised_wasserstein_dice_loss(
            input,
            target,
            self.m,
            weighting_mode=self.alpha_mode,
            reduction=self.reduction,
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
            ignore_index=self.ignore_index,
            mask=mask,
        )
