"""From a user's (logits, target, options) to what the sums need, in MONAI's order of steps.

Every loss shares these steps: activation, one-hot, background, shape check, ignore mask
(``../docs/semantics.md``, "Steps"). Nothing of the volume's size is made here, except where a note says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks, hints
from .labels import check_labels, out_of_range
from .spec import Activation
from .tensors import dense_tensor, readable

OtherAct = Callable[[Tensor], Tensor] | None


@dataclass
class Inputs:
    """The arguments of ``sums`` that come from the user's data.

    Attributes:
        raw_logits: before ``other_act``, for a voxel term.
        skipped: 1 if the background has no overlap term, else 0.
        without_background: the background was not asked for, of one channel too.
        product_mask: the mask multiplies p and g (MONAI's ignored class of a dense target).
        dtype: of an overlap loss by torch's promotion rules.
    """

    logits: Tensor
    raw_logits: Tensor
    target: Tensor
    mask: Tensor | None
    dense: bool
    activation: Activation
    skipped: int
    without_background: bool
    ignore_index: int | None
    product_mask: bool
    dtype: torch.dtype
    notes: tuple[str, ...]

    @property
    def classes(self) -> int:
        """Classes with an overlap term."""
        return self.logits.shape[1] - self.skipped


def plain(tensor: Tensor) -> Tensor:
    """MONAI's MetaTensor as the torch.Tensor that it is; its bookkeeping costs more than a small op."""
    return tensor.as_subclass(Tensor) if type(tensor).__name__ == "MetaTensor" else tensor


def like_input(loss: Tensor, *inputs: Tensor | None) -> Tensor:
    """The loss as MetaTensor if an input was one, as MONAI returns it."""
    for tensor in inputs:
        if type(tensor).__name__ == "MetaTensor":
            return type(tensor)(loss)  # type: ignore[misc]  # MetaTensor is known by name alone
    return loss


def kernel_dtype(tensor: Tensor) -> Tensor:
    """Unsigned integers wider than a byte, with which torch itself can do little, as signed ones.

    What only uint64 holds becomes the largest int64: no class, and no ``ignore_index``.
    """
    if tensor.dtype == torch.uint64:
        wrapped = tensor.to(torch.int64)
        return torch.where(wrapped < 0, torch.iinfo(torch.int64).max, wrapped)
    wider = {torch.uint16: torch.int32, torch.uint32: torch.int64}
    return tensor.to(wider[tensor.dtype]) if tensor.dtype in wider else tensor


def dense_labels(target: Tensor, logits: Tensor, ignore_index: int | None) -> Tensor:
    """Labels (B, 1, *S) or (B, *S) as float32 one-hot of the logits' channels; that of one channel stays.

    What MONAI's losses of two halves hand to both. Voxels of an ``ignore_index`` outside the classes have no
    class, which the losses read as ignored.

    Raises:
        AssertionError: the labels do not fit the logits.
        LabelRangeError: a label outside [0, C); off the CPU in a later call, and it is NaN in every class.
    """
    classes = logits.shape[1]
    if classes == 1:
        warn_single_channel("to_onehot_y=True")
        return target
    labels, logits = kernel_dtype(plain(target)), plain(logits)
    _check_target(logits, labels, False, AssertionError)
    labels = labels.reshape(logits.shape[0], 1, *logits.shape[2:])
    bad = out_of_range(labels, classes, index := checks.index(ignore_index))
    if readable(labels):
        check_labels(bad.flatten(1).sum(1), labels, None, classes, index)
    channels = torch.arange(classes, device=labels.device).view(-1, *[1] * (labels.ndim - 2))
    return (labels.long() == channels).float().masked_fill(bad, float("nan"))


def warn_single_channel(option: str) -> None:
    """MONAI's warning about an option that one channel makes void."""
    if torch.compiler.is_compiling():
        return  # a warning cannot be part of a graph
    warnings.warn(f"single channel prediction, `{option}` ignored.", UserWarning, stacklevel=5)


def prepare(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    activations: tuple[bool, bool, OtherAct],
    include_background: bool,
    to_onehot_y: bool,
    ignore_index: int | None,
    mismatch: type[Exception] = AssertionError,
    signed_mask: bool = False,
) -> Inputs:
    """Checks the data and applies the options; ``activations``: sigmoid, softmax, other_act.

    Raises:
        TypeError, ValueError: not tensors, different devices, a mask of another shape or (unless
            ``signed_mask``) below 0, two activations.
        mismatch: the target's shape does not fit (its type is MONAI's for the loss).
        AssertionError: labels without a channel of their own.
        NotImplementedError: softmax of integers (torch's type).
    """
    sigmoid, softmax, other_act = activations
    checks.activation_options(sigmoid, softmax, other_act)
    checks.tensors(logits, target, mask)
    ignore_index = checks.index(ignore_index)
    logits, target = plain(logits), kernel_dtype(plain(target))
    mask = None if mask is None else kernel_dtype(plain(mask))
    raw_logits, notes = logits, []
    channels = logits.shape[1]
    activation = Activation.SIGMOID if sigmoid else Activation.NONE
    if softmax:
        if channels == 1:
            warn_single_channel("softmax=True")
        elif not logits.is_floating_point():
            raise NotImplementedError(hints.of_integer_logits(logits, target, " for softmax=True"))
        else:
            activation = Activation.SOFTMAX
    if other_act is not None:
        logits = other_act(logits)
        dense_tensor("the result of other_act", logits)
        notes.append(
            "other_act runs in PyTorch and its result of the logits' size is kept for its own backward"
        )
    dense = True
    if to_onehot_y:
        if channels == 1:
            warn_single_channel("to_onehot_y=True")
        else:
            dense = False
    skipped = 0
    if not include_background:
        if channels == 1:
            warn_single_channel("include_background=False")
        else:
            skipped = 1
    if not dense and logits.shape[1] != channels:
        raise mismatch(
            f"ground truth has different shape: one-hot of the {channels} channels of the input, but "
            f"other_act made {logits.shape[1]} of them"
        )
    _check_target(logits, target, dense, mismatch)
    (checks.mask_shape if signed_mask else checks.voxel_weights)(mask, logits)
    promoted = torch.promote_types(
        logits.dtype if logits.is_floating_point() else torch.float32,
        target.dtype if dense else torch.float32,
    )
    device = logits.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        promoted = torch.promote_types(promoted, torch.float32)
    if not logits.is_floating_point():
        logits = logits.float()
        notes.append("integer logits are copied once to float32")
    product_mask = False
    if ignore_index is not None and dense:
        by_class = 0 <= ignore_index < target.shape[1] != 1
        # MONAI multiplies by a float32 mask, or by 1 - the values of the class.
        promoted = torch.promote_types(
            promoted, target.dtype if by_class and target.is_floating_point() else torch.float32
        )
        kept = _dense_ignore_mask(target, ignore_index, torch.promote_types(promoted, torch.float32))
        product_mask = mask is None
        mask = kept if mask is None else mask * kept
        notes.append("ignore_index of a dense target makes a voxel mask (B, 1, *S)")
        ignore_index = None
    if mask is not None and mask.shape[0] != logits.shape[0]:
        mask = mask.expand(logits.shape[0], *mask.shape[1:])
    return Inputs(
        logits,
        raw_logits,
        target,
        mask,
        dense,
        activation,
        skipped,
        not include_background,
        ignore_index,
        product_mask,
        promoted,
        tuple(notes),
    )


def _check_target(logits: Tensor, target: Tensor, dense: bool, mismatch: type[Exception]) -> None:
    shape, expected = tuple(target.shape), tuple(logits.shape)
    if dense:
        if shape != expected:
            raise mismatch(hints.of_different_shapes(logits, target, False))
        return
    if shape == (expected[0], *expected[2:]) and len(shape) > 1:
        return
    if target.ndim < 2 or shape[1] != 1:
        raise AssertionError(
            "labels should have a channel with length equal to one. " + hints.of_target(logits, target, True)
        )
    if (shape[0], *shape[2:]) != (expected[0], *expected[2:]):
        raise mismatch(hints.of_different_shapes(logits, target, True))


def _dense_ignore_mask(target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """MONAI's create_ignore_mask for a target of values: see docs/semantics.md, "Masks"."""
    if target.shape[1] == 1:
        return (target != ignore_index).to(dtype)
    if 0 <= ignore_index < target.shape[1]:
        return 1 - target[:, ignore_index : ignore_index + 1].to(dtype)
    return (target.sum(1, keepdim=True) > 0).to(dtype)
