"""Wrappers of other losses: several resolutions of one output, and a mask on the loss's arguments.

Conventions: ``dicekernels.modules``. The wrapped loss may be any callable, of this package or not.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, hints
from ..arguments import documented
from ..overrides import overridden, remember
from ..prepare import kernel_dtype, like_input, plain
from ..scripting import register_step
from ..tensors import tensor
from .compound import DiceCELoss
from .focal import DiceFocalLoss, FocalLoss, GeneralizedDiceFocalLoss
from .halves import TwoHalves
from .loss import Loss
from .overlap import DiceLoss, GeneralizedDiceLoss, MCCLoss, TverskyLoss

# Losses whose kernels read half precision and add up in float32.
READS_HALF: tuple[type[nn.Module], ...] = (
    DiceLoss,
    GeneralizedDiceLoss,
    TverskyLoss,
    MCCLoss,
    FocalLoss,
    DiceCELoss,
    DiceFocalLoss,
    GeneralizedDiceFocalLoss,
)
HALVES = (torch.float16, torch.bfloat16)
# Modes of torch's interpolate that pick voxels and compute nothing.
PICKS = ("nearest-exact", "nearest")


@documented()
@remember("forward", "get_loss", "get_weights")
class DeepSupervisionLoss(Loss):
    """Sum over the levels of a network of weight times loss: ``monai.losses.DeepSupervisionLoss``.

    Level l is an output (B, C, *S_l); the target (B, 1 or C, *S), or labels (B, *S), is resized to S_l
    by ``interp_mode``, an attribute. Labels of every integer dtype and bool are resized, by torch's own
    choice of voxels.

    Outputs go to the loss in float32. Half precision outputs are not copied for that if the loss is one of
    this package's whose kernels add up in float32. The result of a list is a float32 scalar.

    state_dict: that of the loss, under ``loss.``.

    Args:
        loss: a loss of one output and its target, of this package or not, with a scalar result.
        weight_mode: factors of the levels, finest first: "same" 1, "two" 1 and then 1/2, "exp" 1, 1/2, 1/4,
            1/8 and then 1/16. As in MONAI another word is taken as "same".
        weights: factors of the levels in place of ``weight_mode``, which counts where they are fewer than the
            levels. None: ``weight_mode``.
    """

    BESIDE: ClassVar = {"": {"interp_mode": "nearest-exact"}}
    weights: Sequence[float] | None

    def __init__(
        self,
        loss: Callable[..., Tensor],
        weight_mode: Literal["same", "exp", "two"] = "exp",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(loss, type) or not callable(loss):
            got = f"the class {loss.__name__}" if isinstance(loss, type) else repr(loss)
            raise TypeError(f"loss: got {got}, expected a loss: an instance of its class, or a function")
        if isinstance(weights, str):
            raise TypeError(
                f"weights: got {weights!r}, expected a number for each level; pass it as weight_mode"
            )
        self.loss = loss
        self.weight_mode = weight_mode
        self.weights = weights
        self.interp_mode = "nearest-exact"

    def get_weights(self, levels: int = 1) -> Sequence[float]:
        """The factor of each level, finest first; at least one."""
        return level_weights(levels, self.weight_mode, self.weights)

    def get_loss(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss of one level, target and mask resized to it; a subclass may override it."""
        target, mask = at_level(input, target, mask, self.interp_mode)
        return self.loss(input, target) if mask is None else self.loss(input, target, mask=mask)

    def forward(
        self, input: Tensor | Sequence[Tensor] | None, target: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """The weighted sum.

        Args:
            input: the outputs, finest first, each (B, C, *S_l), or one output, which goes to the loss with
                the target as it is.
            target: (B, 1 or C, *S) or labels (B, *S), of any resolution.
            mask: voxel weights (B, 1, *S) or (1, 1, *S), for a loss that has the keyword ``mask``. A coarse
                level takes the weight of each voxel whose label it takes. None: the loss gets no ``mask``.

        Returns:
            (), float32; for one output what the loss returns.

        Raises:
            ValueError: ``input`` is None.
            TypeError: it is no tensor, list or tuple, or the loss takes no ``mask``.
            RuntimeError: the loss of a level is not one number.
        """
        if input is None:
            raise ValueError("input shouldn't be None. Pass the list of outputs, or one tensor.")
        extra = {} if mask is None else {"mask": mask}
        if isinstance(input, Tensor):
            return self.loss(_for_loss(self.loss, input, target), target, **extra)
        if not isinstance(input, (list, tuple)):
            raise TypeError(f"input: got {type(input).__name__}, expected a list of tensors or one tensor")
        _check_levels(input, target, mask)
        total = torch.zeros((), device=target.device)
        weights = self.get_weights(len(input))
        for level, output in enumerate(input):
            value = self.get_loss(_for_loss(self.loss, output, target), target, **extra)
            if isinstance(value, Tensor) and value.ndim:
                raise RuntimeError(
                    f"loss: gave shape {tuple(value.shape)} on level {level}, expected one number; "
                    "give the loss the reduction 'mean' or 'sum'"
                )
            total = total + weights[level] * value
        return total.float()


@documented()
@remember("forward")
class MaskedLoss(Loss):
    """The loss of ``input * mask`` and ``target * mask``: ``monai.losses.MaskedLoss``.

    A logit times 0 is 0 and not absent: its softmax or sigmoid counts. To leave voxels out, or to weigh
    them, pass ``mask`` to a loss of this package itself, which also saves the two products.

    state_dict: that of the loss, under ``loss.``.

    Args:
        loss: a loss, of this package or not, or its class, which is called with the arguments that follow.
        loss_args: arguments of the class.
        loss_kwargs: arguments of the class by keyword.

    Raises:
        ValueError: the loss is not callable.
    """

    def __init__(self, loss: Callable[..., Any], *loss_args: Any, **loss_kwargs: Any) -> None:
        super().__init__()
        made: Any = loss(*loss_args, **loss_kwargs) if inspect.isclass(loss) else loss
        self.loss: Callable[..., Tensor] = made
        if not callable(self.loss):
            raise ValueError(
                f"The loss function is not callable. loss: got {type(self.loss).__name__}, "
                "expected a function, a loss or its class."
            )

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of the products; without a mask that of the arguments, with a warning.

        Args:
            input: (B, C, *S), as the loss takes it.
            target: as the loss takes it, (B, 1 or C, *S).
            mask: (B, 1, *S) or (1, 1, *S). Another number of dimensions or space is warned of and left to
                broadcasting. None: nothing is masked, with a warning.

        Returns:
            What the loss returns.

        Raises:
            ValueError: the batch of the mask is neither 1 nor B, or it has more than one channel.
        """
        if mask is None:
            _warn("No mask value specified for the MaskedLoss.")
            return self.loss(input, target)
        return self.loss(*masked(input, target, mask))


def level_weights(levels: int, mode: str, weights: Sequence[float] | None) -> Sequence[float]:
    """The factor of each level, finest first; at least one."""
    levels = max(1, levels)
    if weights is not None and len(weights) >= levels:
        return weights[:levels]
    if mode == "exp":
        return [max(0.5**level, 0.0625) for level in range(levels)]
    return [1.0] + [0.5 if mode == "two" else 1.0] * (levels - 1)


def at_level(output: Tensor, target: Tensor, mask: Tensor | None, mode: str) -> tuple[Tensor, Tensor | None]:
    """Target and mask in the space of one output.

    Raises:
        ValueError: a target of another number of dimensions, or a mask of another shape.
    """
    space = output.shape[2:]
    if target.ndim not in (output.ndim - 1, output.ndim):
        raise ValueError(hints.of_target(output, target, False))
    if target.ndim == output.ndim - 1:
        target = _resized(target[:, None], space, mode)[:, 0]
    else:
        target = _resized(target, space, mode)
    if mask is None:
        return target, None
    if mask.ndim != output.ndim:
        checks.mask_shape(mask, output)
    return target, _resized(mask, space, mode if mode in PICKS else PICKS[0])


def masked(input: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both times the mask, after MONAI's checks."""
    tensor("input", input)
    tensor("target", target)
    if input.ndim != mask.ndim:
        _warn(f"Dim of input ({input.shape}) is different from mask ({mask.shape}).")
    if mask.shape[0] not in (1, input.shape[0]):
        raise ValueError(f"Batch size of mask ({mask.shape}) must be one or equal to input ({input.shape}).")
    if target.ndim > 1:
        if mask.shape[1] != 1:
            raise ValueError(
                f"Mask ({mask.shape}) must have only one channel. A map (B, *S) wants mask[:, None]."
            )
        if input.shape[2:] != mask.shape[2:]:
            _warn(f"Spatial size of input ({input.shape}) is different from mask ({mask.shape}).")
    return _masked("input", input, mask), _masked("target", target, mask)


def _warn(text: str) -> None:
    if not torch.compiler.is_compiling():  # a warning cannot be part of a graph
        warnings.warn(text, UserWarning, stacklevel=3)


def _masked(name: str, values: Tensor, mask: Tensor) -> Tensor:
    try:
        return values * mask
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}. mask: got shape {tuple(mask.shape)} on {mask.device}, expected (B, 1, *S) beside the "
            f"{name} of shape {tuple(values.shape)} on {values.device}"
        ) from error


def _check_levels(outputs: Sequence[Tensor], target: Any, mask: Any) -> None:
    """Raises TypeError or ValueError for what cannot be resized to every output."""
    for level, output in enumerate(outputs):
        tensor(f"input[{level}]", output)
    if isinstance(target, (list, tuple)):
        raise TypeError(
            f"target: got a {type(target).__name__} of {len(target)}, expected one tensor, which is "
            "resized to the space of each output here; pass the finest, target[0]"
        )
    tensor("target", target)
    if mask is not None:
        tensor("mask", mask)


def _for_loss(loss: Callable[..., Tensor], output: Tensor, target: Tensor) -> Tensor:
    """The output in float32, or as it is where the loss computes the same from it."""
    if (
        output.dtype in HALVES
        and isinstance(target, Tensor)
        and _reads_half(loss, output)
        and _result_is_float32(output, target)
    ):
        return output
    return output.float()


def _reads_half(loss: Callable[..., Tensor], output: Tensor) -> bool:
    if type(loss) not in READS_HALF or output.ndim < 3:
        return False
    assert isinstance(loss, nn.Module)
    if isinstance(loss, TwoHalves) and loss.bent()[0]:
        return False
    # An override, an activation or hooks of the user's see the output itself.
    if overridden(loss, type(loss)):
        return False
    return not any(
        getattr(module, "other_act", None) is not None or checks.hooked(module) for module in loss.modules()
    )


def _result_is_float32(output: Tensor, target: Tensor) -> bool:
    """Whether the loss of half precision logits is not rounded to half precision."""
    if target.ndim < output.ndim or target.shape[1] != output.shape[1]:
        return True  # labels, which become float32
    return torch.promote_types(output.dtype, target.dtype) not in HALVES


def _resized(values: Tensor, space: torch.Size, mode: str) -> Tensor:
    """(B, C, *S) in another space; what torch cannot resize is indexed with the voxels torch would take."""
    if values.shape[2:] == space:
        return values
    torchs = values.is_floating_point() and values.ndim <= 5
    if mode not in PICKS or torchs or len(space) != values.ndim - 2:
        return F.interpolate(values, size=space, mode=mode)
    picked: list[Any] = [slice(None), slice(None)]
    for dim, (before, after) in enumerate(zip(values.shape[2:], space, strict=True)):
        positions = torch.arange(before, dtype=torch.float32, device=values.device)
        index = F.interpolate(positions[None, None], size=(after,), mode=mode)[0, 0].long()
        picked.append(index.reshape(-1, *[1] * (len(space) - dim - 1)))
    return like_input(kernel_dtype(plain(values))[tuple(picked)], values)


register_step("level_weights(int levels, str mode, float[]? weights) -> float[]", level_weights)
register_step("at_level(Tensor output, Tensor target, Tensor? mask, str mode) -> (Tensor, Tensor?)", at_level)
register_step("masked(Tensor input, Tensor target, Tensor mask) -> (Tensor, Tensor)", masked)
