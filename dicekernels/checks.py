"""Argument checks: type, then shape, then dtype, then device; messages name the argument and the remedy.

Error types are MONAI's where MONAI has one (docs/semantics.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import hints
from .tensors import as_tensor, dense_tensor, readable

Weight = float | Sequence[float] | Tensor | None
_Name = TypeVar("_Name", bound=str)


def activation_options(sigmoid: bool, softmax: bool, other_act: Callable[[Tensor], Tensor] | None) -> None:
    """At most one activation.

    Raises:
        TypeError: ``other_act`` is not callable.
        ValueError: more than one is asked for.
    """
    if other_act is not None and not callable(other_act):
        raise TypeError(f"other_act must be None or callable but is {type(other_act).__name__}.")
    if _flag("sigmoid", sigmoid) + _flag("softmax", softmax) + int(other_act is not None) > 1:
        raise ValueError(
            "Incompatible values: more than 1 of [sigmoid=True, softmax=True, other_act is not None]. "
            f"Got sigmoid={sigmoid}, softmax={softmax}, other_act={other_act}; keep one."
        )


def _flag(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: got {value!r}, expected True or False") from None


def option(name: str, value: Any, allowed: tuple[_Name, ...]) -> _Name:
    """A string option, or an enum (MONAI's ``LossReduction``, ``Weight``) that holds one.

    Raises:
        ValueError: it is none of ``allowed``.
    """
    text = getattr(value, "value", value)
    if not isinstance(text, str) or text not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return text


def tensors(logits: Any, target: Any, mask: Any, names: tuple[str, str] = ("logits", "target")) -> None:
    """Types and devices; ``names`` are those of logits and target in the loss.

    Raises:
        TypeError: one of them is not a tensor that the kernels read.
        ValueError: they are on different devices.
    """
    first = names[0]
    for name, value in ((first, logits), (names[1], target), ("mask", mask)):
        if value is None and name == "mask":
            continue
        dense_tensor(name, value)
        one_device((name,), (value,), first, logits.device)
    if logits.ndim < 2:
        raise IndexError(f"{first}: got shape {tuple(logits.shape)}, expected (B, C, *spatial)")
    if logits.shape[1] == 0:
        raise ValueError(
            f"{first}: got shape {tuple(logits.shape)} without a class, expected (B, C, *spatial)"
        )


def single_channel(logits: Any) -> bool:
    """Whether these are logits of one channel; False for what the checks refuse."""
    return isinstance(logits, Tensor) and not logits.is_nested and logits.ndim > 1 and logits.shape[1] == 1


def mask_shape(mask: Tensor | None, logits: Tensor) -> None:
    """Raises ValueError unless there is one value for each voxel, (B, 1, *S) or (1, 1, *S)."""
    expected = (logits.shape[0], 1, *logits.shape[2:])
    if mask is not None and tuple(mask.shape) != expected and tuple(mask.shape) != (1, *expected[1:]):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected {expected}: one weight a voxel, shared by the "
            "classes; a map (B, *S) wants mask[:, None], factors of classes go into `weight`"
        )


def voxel_weights(mask: Tensor | None, logits: Tensor) -> None:
    """A mask that weighs voxels: its shape, and that no weight is negative.

    The values are read on the CPU, elsewhere with DICEKERNELS_CHECK=1 alone: it would wait for the device.
    What torch.compile, torch.func or a fake tensor hides is not read. NaN passes, and makes the loss NaN.

    Raises:
        ValueError: another shape, or a weight below 0.
    """
    mask_shape(mask, logits)
    if mask is None or not readable(mask) or not (mask.is_floating_point() or mask.dtype.is_signed):
        return
    if mask.device.type != "cpu" and os.environ.get("DICEKERNELS_CHECK") != "1":
        return
    lowest = mask.detach().amin() if mask.numel() else 0
    if bool(lowest < 0):
        raise ValueError(
            f"mask: got a voxel weight of {float(lowest)}, expected none below 0; 0 leaves a voxel out: use "
            "mask.clamp(min=0), or mask != 0 if any other value marks a voxel that counts"
        )


def hooked(module: nn.Module) -> bool:
    """Whether calling a module would run somebody's hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def non_negative(name: str, value: float) -> None:
    """Raises ValueError for a factor below zero, TypeError for what is no number."""
    try:
        below = bool(value < 0.0)
    except TypeError:
        raise TypeError(
            f"{name}: got {value!r}, expected a number of at least 0, or a tensor of one"
        ) from None
    if below:
        raise ValueError(f"{name} should be no less than 0.0. Got {value}; 0 switches its term off.")


def as_weight(weight: Weight, name: str = "weight", device: torch.device | None = None) -> Tensor | None:
    """A weight given as number, sequence or tensor; a tensor is shared, and copied only to another device.

    Args:
        device: of the logits; weights of the CPU are copied to it.

    Raises:
        ValueError: a tensor of another device.
    """
    if weight is None:
        return None
    expected = "None, a number, or a number for each class as a list, an array or a tensor"
    return _placed(name, as_tensor(name, weight, expected, device), device)


def _placed(name: str, value: Tensor, device: torch.device | None) -> Tensor:
    if device is None:
        return value
    if value.device.type == "cpu":
        return value.to(device)
    one_device((name,), (value,), "logits", device)
    return value


def one_device(
    names: Sequence[str],
    tensors: Sequence[Tensor | None],
    first: str,
    device: torch.device,
    by_value: Sequence[str] = (),
) -> None:
    """Every tensor on ``device``, that of the tensor called ``first``.

    Args:
        by_value: names of those that may also be 0-dim on the CPU.

    Raises:
        ValueError: one is elsewhere.
    """
    for name, tensor in zip(names, tensors, strict=False):
        if tensor is None or tensor.device == device:
            continue
        if name in by_value and tensor.ndim == 0 and tensor.device.type == "cpu":
            continue
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}, expected it on {device} as the {first}; "
            f"move it with {name}.to({first}.device)"
        )


# By identity: the keys of a plain weak dictionary are compared with ==, which tensors answer elementwise.
_checked = WeakTensorKeyDictionary()


def class_weight(
    weight: Tensor | None, classes: int, skipped: int = 0, whole: Tensor | None = None
) -> Tensor | None:
    """The factors of the overlap terms, or None where MONAI ignores them (one class).

    A 0-dim weight is repeated. The check of the values reads the tensor, so off the CPU it
    runs once for each state of a tensor, and never inside a compiled graph.

    Args:
        skipped: 1 if ``classes`` are those without the background.
        whole: the weight of another half, with the background, that ``weight`` may be a part of.

    Raises:
        ValueError: wrong length, or a value that is negative or not finite.
    """
    if weight is None or classes == 1:
        return None
    dense_tensor("weight", weight)
    if weight.ndim > 1:
        shape, values = weight.shape, classes
        if whole is not None and whole.shape[1:] == shape[1:]:
            shape, values = whole.shape, classes + skipped
        raise ValueError(
            f"weight: got shape {tuple(shape)}, expected {values} values in one dimension, or one number"
        )
    if weight.ndim == 1 and weight.shape[0] != classes:
        raise ValueError(
            "The length of the `weight` sequence should be the same as the number of classes. "
            + hints.of_weight_length(
                weight.shape[0], classes, skipped, None if whole is None else whole.numel()
            )
        )
    counts(weight)
    return weight.expand(classes) if weight.ndim == 0 else weight


def counts(weight: Tensor, rule: str = "the value/values of the `weight` should be no less than 0.") -> None:
    """Raises ValueError for a value that is negative or not finite."""
    if not readable(weight):
        return
    # A tensor of inference mode counts no versions: it is read every time.
    version = None if weight.is_inference() else weight._version
    if version is None or _checked.get(weight) != version:
        good = (weight >= 0) & (weight < math.inf)
        if not bool(good.all()):
            value = weight[~good].flatten()[0].item()
            remedy = "; 0 leaves a class out."
            if not math.isfinite(value):
                remedy = ", expected finite values: 1 / voxels of an absent class is none; 0 leaves it out."
            raise ValueError(f"{rule} weight: got {value}{remedy}")
        _checked[weight] = version


def focal_weight(weight: Tensor | None, classes: int, skipped: int = 0) -> Tensor | None:
    """The factors of the focal term: 0-dim, or one for each of ``classes``.

    Raises:
        ValueError: several for one class, a wrong length, or a value that is negative or not finite.
    """
    if weight is None:
        return None
    dense_tensor("weight", weight)
    if weight.ndim > 0:
        if classes == 1:
            raise ValueError(
                "Per-class class_weight is not supported for single-channel outputs. weight: got "
                f"{weight.numel()} values, expected one number"
            )
        if weight.numel() != classes:
            raise ValueError(
                f"The number of class_weight ({weight.numel()}) must match the number of output channels "
                f"({classes}). `weight`: " + hints.of_weight_length(weight.numel(), classes, skipped, None)
            )
    counts(weight, "class_weight values must be non-negative.")
    return weight


def focal_alpha(
    alpha: float | Sequence[float] | Tensor | None, classes: int, skipped: int, device: torch.device
) -> Tensor | float | None:
    """The balance of the focal term: one number, or a tensor with one for each of ``classes``.

    Raises:
        ValueError: a wrong length.
    """
    if alpha is None or isinstance(alpha, (float, int)):
        return alpha
    alpha = as_weight(alpha, "alpha", device)
    assert alpha is not None
    if alpha.ndim > 1:
        raise ValueError(
            f"alpha: got shape {tuple(alpha.shape)}, expected {classes} values in one dimension, or one "
            "number; use alpha.flatten()"
        )
    if alpha.ndim > 0 and alpha.shape[0] != classes:
        which = "the classes without the background" if skipped else "every class, the background included"
        raise ValueError(
            f"The length of alpha ({alpha.shape[0]}) must match the number of classes ({classes}): "
            f"one value for {which}"
        )
    return alpha


def ce_weight(weight: Tensor | None, classes: int) -> Tensor | None:
    """The class weights of the cross entropy.

    Raises:
        RuntimeError: wrong length, as torch.nn.functional.cross_entropy.
        ValueError: a value for one of several classes that is negative or not finite.
    """
    if weight is None:
        return None
    dense_tensor("weight", weight)
    if weight.numel() != classes:
        remedy = f"; repeat one number, [w] * {classes}" if weight.ndim == 0 else ""
        raise RuntimeError(
            f"weight: got {weight.numel()} values, expected {classes}: the cross entropy has one for every "
            f"class, the background included{remedy}"
        )
    if classes > 1:
        counts(weight)
    return weight


def label_smoothing(value: float) -> None:
    """Raises RuntimeError outside [0, 1], as torch, and TypeError for what is no number."""
    if not 0.0 <= constant("label_smoothing", value) <= 1.0:
        raise RuntimeError(f"label_smoothing: got {value}, expected a value between 0.0 and 1.0")


def dice_ce_shapes(logits: Tensor, target: Tensor) -> None:
    """MONAI's first two checks of the losses with a cross entropy; labels (B, *S) are taken, too.

    Raises:
        ValueError: another number of dimensions or of channels.
    """
    if tuple(target.shape) == (logits.shape[0], *logits.shape[2:]):
        return
    if logits.dim() != target.dim():
        raise ValueError(
            "the number of dimensions for input and target should be the same, "
            f"got shape {logits.shape} (nb dims: {logits.dim()}) "
            f"and {target.shape} (nb dims: {target.dim()}). "
            "if target is not one-hot encoded, please provide a tensor with shape B1H[WD]. "
            + hints.of_target(logits, target, False)
        )
    if target.shape[1] != 1 and target.shape[1] != logits.shape[1]:
        raise ValueError(
            "number of channels for target is neither 1 (without one-hot encoding) nor the same as input, "
            f"got shape {logits.shape} and {target.shape}. " + hints.of_target(logits, target, False)
        )


def factor(name: str, value: float | Tensor, logits: Tensor) -> Tensor | None:
    """A lambda as 0-dim float64 tensor; None for 1.

    A tensor of the CPU stays there beside logits of another device: the backends read one value from where it
    is, and a copy would wait for the device.

    Raises:
        ValueError: a number below zero, or a tensor with more than one value or of another device.
    """
    if isinstance(value, Tensor):
        dense_tensor(name, value)
        if value.numel() != 1:
            raise ValueError(f"{name}: got {value.numel()} values, expected one number")
        if value.device.type != "cpu":
            one_device((name,), (value,), "logits", logits.device)
        # A graph that Inductor captures would keep the value that a tensor of the CPU has then.
        stays = value.device.type == "cpu" and not torch.compiler.is_compiling()
        device = value.device if stays else logits.device
        return value.reshape(()).to(device=device, dtype=torch.float64)
    non_negative(name, value)
    return None if value == 1.0 else torch.tensor(value, dtype=torch.float64, device="cpu")


def region_options(
    logits: Tensor,
    target: Tensor,
    activation: str | None,
    overlap: str,
    voxel_term: str | None,
    mask_mode: str,
    gamma: float,
    first_class: int,
) -> None:
    """The options of ``region_sums``.

    Raises:
        TypeError: logits that are not floating.
        ValueError: an unknown option, or shapes that do not fit.
    """
    if not logits.is_floating_point():
        raise TypeError(hints.of_integer_logits(logits, target))
    if activation is not None:
        option("activation", activation, ("softmax", "sigmoid"))
    option("overlap", overlap, ("product", "min", "squared", "voxel_squared"))
    if voxel_term is not None:
        option("voxel_term", voxel_term, ("ce", "bce", "focal_sigmoid", "focal_softmax"))
    option("mask_mode", mask_mode, ("weight", "product"))
    if gamma < 0:
        raise ValueError(f"gamma: got {gamma}, expected an exponent of at least 0")
    if not 0 <= first_class < logits.shape[1]:
        raise ValueError(f"first_class: got {first_class}, expected a class of the {logits.shape[1]}")
    samples, space = logits.shape[0], logits.shape[2:]
    allowed = (logits.shape, (samples, 1, *space), (samples, *space))
    if logits.ndim < 3 or tuple(target.shape) not in (tuple(shape) for shape in allowed):
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected {tuple(logits.shape)} (values), "
            f"{(samples, 1, *space)} or {(samples, *space)} (labels) for logits {tuple(logits.shape)} "
            "with at least one spatial dimension"
            + hints.target_remedy(
                list(logits.shape), list(target.shape), False, hints.swapped(logits, target)
            )
        )


def index(value: Any) -> int | None:
    """``ignore_index`` as an integer; 255.0 (of a YAML file) is one, too.

    Raises:
        TypeError: not a whole number that int64 holds.
    """
    if value is None:
        return None
    try:
        whole = int(value)
        if whole == value and -(2**63) <= whole < 2**63:
            return whole
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(f"ignore_index: got {value!r}, expected an integer or None")


def constant(name: str, value: Any) -> float:
    """A number of the formula, which the kernels do not differentiate.

    Raises:
        TypeError: a tensor that requires a gradient.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name}: got a tensor that requires a gradient, expected a number; use {name}.detach()"
        )
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{name}: got {value!r:.80}, expected a number") from None
