"""What was got, what was expected and what to do: the end of the errors."""

from __future__ import annotations

from torch import Tensor


def shape(sizes: list[int]) -> str:
    return "(" + ", ".join([str(size) for size in sizes]) + ")"


def target_text(
    logits: list[int],
    target: list[int],
    labels: bool,
    swapped: bool,
    logits_name: str = "logits",
    target_name: str = "target",
) -> str:
    """The argument, what was got, what was expected, what to do.

    Args:
        labels: the target is to be a label map; else it has a value for each class.
        swapped: the dtypes are those of swapped arguments.
    """
    one = shape([*logits[:1], 1, *logits[2:]])
    if labels:
        expected = f"labels {one} or {shape(logits[:1] + logits[2:])} for {logits_name} {shape(logits)}"
    elif logits[1] == 1:
        expected = f"{one} as {logits_name}"
    else:
        expected = f"{shape(logits)} (one-hot or probabilities), or labels {one} with to_onehot_y=True"
    text = f"{target_name}: got shape {shape(target)}, expected {expected}"
    return text + target_remedy(logits, target, labels, swapped, logits_name, target_name)


def target_remedy(
    logits: list[int],
    target: list[int],
    labels: bool,
    swapped: bool,
    logits_name: str = "logits",
    target_name: str = "target",
) -> str:
    """The remedy after a semicolon, or "" if the shapes show none."""
    samples, classes, space = logits[0], logits[1], logits[2:]
    if swapped:
        text = f"; the arguments look swapped: their order is ({logits_name}, {target_name})"
        if classes == 1 and target[1:2] == [2]:
            text += (
                f"; if not, {logits_name} of one channel go with the foreground alone, {target_name}[:, 1:]"
            )
        return text
    if (target == logits[1:] and samples == 1) or target == space:
        return f"; {target_name} has no batch dimension: use {target_name}[None]"
    if target == logits[1:] or target == [1, *logits[1:]]:
        return (
            f"; if {logits_name} is (C, *S) of one sample, both need a batch dimension: "
            f"{logits_name}[None], {target_name}[None]"
        )
    if target == [1, *logits] or target == [1, 1, *logits[1:]]:
        return f"; {logits_name} has no batch dimension: use {logits_name}[None]"
    if len(target) == 0 or target[0] != samples:
        return f"; take {logits_name} and {target_name} of the same {samples} samples"
    if target == [samples, *space]:
        return "; pass to_onehot_y=True for a label map"
    if len(space) > 0:
        last = target[1:-1] == space and (target[-1] == classes or target[-1] == 1)
        if last and len(target) == len(logits):
            return f"; the classes of {target_name} come last: use {target_name}.movedim(-1, 1)"
        if target[1:] == logits[1:-1] or target[1:] == [1, *logits[1:-1]]:
            return f"; the classes of {logits_name} come last: use {logits_name}.movedim(-1, 1)"
    if len(target) == len(logits) and target[2:] == space:
        return channels_remedy(classes, target[1], labels)
    if len(target) == len(logits) or len(target) == len(logits) - 1:
        return (
            f"; crop, pad or resample the space of one of them; {logits_name} of several resolutions go "
            "into DeepSupervisionLoss"
        )
    return ""


def channels_remedy(classes: int, channels: int, labels: bool) -> str:
    """Where only the channels of the target differ."""
    if labels:
        if channels == classes:
            return "; a one-hot target goes with to_onehot_y=False"
        return f"; labels have one channel, and a one-hot target of these classes {classes}"
    if channels == 1:
        return "; pass to_onehot_y=True for a label map"
    if channels == classes - 1:
        return (
            f"; a one-hot target has a channel for each of the {classes} classes, the background (channel 0) "
            "included: include_background=False leaves it out of the loss, not of the target"
        )
    return f"; make the target one-hot of {classes} classes, or give the network {channels} output channels"


def of_weight_length(got: int, expected: int, skipped: int, whole: int | None) -> str:
    """What a weight of a wrong length should hold.

    Args:
        skipped: 1 if ``expected`` leaves out the background.
        whole: length of the weight of all classes that this one may be a part of.
    """
    if whole is not None and whole == got + skipped:
        return (
            f"Got {whole}, expected {expected + skipped}: the weight of DiceCELoss has one for every class, "
            "the background included, also with include_background=False (the Dice half leaves it out)."
        )
    if skipped > 0:
        more = "; leave out that of the background, weight[1:]" if got == expected + 1 else ""
        return (
            "If `include_background=False`, the weight should not include the background category class 0. "
            f"Got {got}, expected {expected}{more}."
        )
    return f"Got {got}, expected {expected}: one for every class, the background included."


def swapped(logits: Tensor, target: Tensor) -> bool:
    """Whether the target looks like logits and the logits like a target."""
    if not target.is_floating_point() or target.ndim < 2 or target.shape[1] < 2:
        return False
    return logits.shape[1] == 1 or not logits.is_floating_point()


def of_integer_logits(logits: Tensor, target: Tensor, use: str = "") -> str:
    """The error of logits of an integer dtype."""
    text = f"logits: got {logits.dtype}, expected a floating dtype{use}; use logits.float()"
    return text + (", or swap the arguments: (logits, target)" if swapped(logits, target) else "")


def of_different_shapes(
    logits: Tensor, target: Tensor, labels: bool, names: tuple[str, str] = ("logits", "target")
) -> str:
    """MONAI's words for a target whose shape does not fit, and :func:`of_target`."""
    different = f"ground truth has different shape ({target.shape}) from input ({logits.shape}). "
    return different + of_target(logits, target, labels, names)


def of_target(
    logits: Tensor, target: Tensor, labels: bool, names: tuple[str, str] = ("logits", "target")
) -> str:
    """What is wrong with the shape of a target, and what to do."""
    return target_text(list(logits.shape), list(target.shape), labels, swapped(logits, target), *names)
