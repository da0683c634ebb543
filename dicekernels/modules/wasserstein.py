"""Module of the generalized Wasserstein Dice loss. Conventions: ``dicekernels.modules``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import functional
from ..arguments import documented
from ..functional.wasserstein import normalised, normalised_wasserstein_dice_loss
from ..overrides import refuse, remember
from .loss import Loss, same

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

    _FUNCTION: ClassVar = normalised_wasserstein_dice_loss
    _OPTIONS: ClassVar = {
        "": same("reduction", "smooth_nr", "smooth_dr", "ignore_index")
        | {"matrix": "m", "weighting_mode": "alpha_mode"}
    }
    PLACES: ClassVar = {"dist_matrix": ("m",)}

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
        super().__init__()
        matrix = normalised(dist_matrix)
        # A matrix that is normalised already is kept itself: integers stay integers.
        given = dist_matrix if isinstance(dist_matrix, Tensor) else torch.as_tensor(dist_matrix, device="cpu")
        matrix = given if bool(given.max() == 1) else matrix
        self._hold(locals())
        self.num_classes = matrix.size(0)

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``functional.generalized_wasserstein_dice_loss`` with the options of this module.

        Raises:
            NotImplementedError: one of MONAI's steps of the formula was overridden.
        """
        refuse(self, _STEPS, "change dist_matrix, or derive from MONAI's class")
        return normalised_wasserstein_dice_loss(input, target, mask=mask, **self._options())
