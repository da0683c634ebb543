"""Random problems that a MONAI loss takes (and some that it refuses), each made from one number.

Here is what all of them share, and the losses of overlap and cross entropy; ``monai_problems_beyond_dice``
has the others.

``problem(seed)`` is the same problem on every run: constructor options, logits, target, cotangent.
The logits and targets lie in memory as training code has them: slices, transposes, channels_last.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOGIT_DTYPES = [torch.float32] * 8 + [torch.float64] * 3 + [torch.float16] * 2 + [torch.bfloat16] * 2
HALVES = (torch.float16, torch.bfloat16)
LABEL_DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.int64,
    torch.float32,
    torch.float64,
    torch.float16,
]
VALUE_DTYPES = [torch.float32] * 4 + [torch.float64, torch.float16, torch.bfloat16]
COUNT_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
CLASSES = [1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 14, 17, 33, 40]
VALUES = ["one-hot", "one-hot", "soft", "multi-hot", "empty"]
ADD_CLASSES = ("GeneralizedDiceLoss", "GeneralizedDiceFocalLoss")
LOSSES = ("DiceLoss", "GeneralizedDiceLoss", "TverskyLoss", "DiceCELoss")


def unit(z: Tensor) -> Tensor:
    """An activation of the user's, with probabilities for values."""
    return 0.5 * torch.tanh(z) + 0.5


def negative(z: Tensor) -> Tensor:
    """Values below zero, far enough from it that no denominator comes near it."""
    return torch.tanh(z) - 3


@dataclass
class MonaiProblem:
    """One call of one loss.

    Attributes:
        loss: name of the class, in monai.losses and in dicekernels.
        options: keywords of its constructor.
        flaw: what MONAI is expected to refuse, or "".
        mask: third argument of the losses that have one.
        levels: further, coarser outputs; None if the loss takes one tensor.
        inner: class and options of the loss that a wrapper wraps.
    """

    seed: int
    loss: str
    options: dict[str, Any]
    logits: Tensor
    target: Tensor
    flaw: str
    note: str
    mask: Tensor | None = None
    levels: list[Tensor] | None = None
    inner: tuple[str, dict[str, Any]] | None = None

    @property
    def own(self) -> dict[str, Any]:
        """The options of the loss that sees the target: those of a wrapper are the inner loss's."""
        return self.options if self.inner is None else self.inner[1]

    @property
    def own_loss(self) -> str:
        return self.loss if self.inner is None else self.inner[0]

    @property
    def labels(self) -> bool:
        """Whether the target is a label map, whose type is no matter of precision."""
        if self.loss == "GeneralizedWassersteinDiceLoss":
            return True
        return self.target.shape[1:2] != self.logits.shape[1:2] and bool(self.own["to_onehot_y"])

    @property
    def masked(self) -> bool:
        return self.loss in ("MaskedDiceLoss", "MaskedLoss")

    def __str__(self) -> str:
        data = f"logits {tuple(self.logits.shape)} {self.logits.dtype}, "
        data += f"target {tuple(self.target.shape)} {self.target.dtype}"
        if self.masked:
            data += f", mask {self.mask if self.mask is None else (tuple(self.mask.shape), self.mask.dtype)}"
        if self.levels is not None:
            data += f", levels {[tuple(level.shape[2:]) for level in self.levels]}"
        inner = f"{self.inner[0]}({_told(self.inner[1])}), " if self.inner else ""
        flaw = f" flaw: {self.flaw}" if self.flaw else ""
        return f"seed {self.seed}: {self.loss}({inner}{_told(self.options)})({data}) [{self.note}]{flaw}"


def _told(options: dict[str, Any]) -> dict[str, Any]:
    """Options with their tensors and arrays in short."""
    told = {}
    for name, value in options.items():
        told[name] = value
        if hasattr(value, "dtype"):
            what = value.tolist() if math.prod(value.shape) < 20 else tuple(value.shape)
            told[name] = f"{type(value).__name__}({what}, {value.dtype})"
    return told


def problem(seed: int) -> MonaiProblem:
    """The problem of this number."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    loss = rng.choice(LOSSES)
    samples, classes = rng.choice([1, 2, 2, 3]), rng.choice([*CLASSES, rng.randint(1, 40)])
    space = draw_space(rng, classes)
    options, logits, target = draw_call(rng, generator, loss, (samples, classes, *space), own_options)
    logits, how = laid_out(rng, logits)
    target, how_target = laid_out(rng, target)
    made = MonaiProblem(seed, loss, options, logits, target, "", f"logits {how}, target {how_target}")
    if rng.random() < 0.06:
        _spoil(rng, made)
    return made


def draw_call(
    rng: random.Random,
    generator: torch.Generator,
    loss: str,
    shape: tuple[int, ...],
    own: Callable[..., dict[str, Any]],
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Options, logits and target; ``own`` draws the options that only this loss has."""
    samples, classes, *space = shape
    options = draw_activation(rng, loss)
    logits = draw_logits(rng, generator, shape, options)
    options |= {
        "include_background": rng.random() < 0.6,
        "to_onehot_y": rng.random() < 0.5,
        "batch": rng.random() < 0.4,
        "reduction": rng.choice(["mean", "mean", "sum", "none"]),
        # without spatial dims a nr of 0 makes gradients that are 0 but for their rounding
        "smooth_nr": rng.choice([1e-5, 1e-5, 1e-5, *([0.0] if space else []), 1e-3, 0.5]),
        "smooth_dr": rng.choice([1e-5, 1e-5, 1e-5, 0.0, 1e-3, 0.25]),
    }
    if "other_act" in options and logits.dtype in HALVES:
        # the slope at the activation's result is held in half precision: nr / dr^2 overflows it
        options["smooth_dr"] = max(options["smooth_dr"], 1e-3)
    if options["to_onehot_y"] and classes > 1:
        target = draw_labels(rng, generator, samples, classes, space)
    else:
        # with softmax, sum_c p = 1: where classes are added up, equal targets have no gradient but rounding
        flat = (loss in ADD_CLASSES or not space) and "softmax" in options
        target = draw_values(rng, generator, shape, ["one-hot", "soft"] if flat else VALUES)
    if loss in ("DiceLoss", "TverskyLoss") and rng.random() < 0.4:
        target = draw_ignored(rng, generator, target, classes, options)
    return options | own(rng, generator, loss, logits, options), logits, target


def draw_space(rng: random.Random, classes: int) -> tuple[int, ...]:
    kind = rng.random()
    if kind < 0.05:
        return ()
    if kind < 0.1:
        return (1,) * rng.randint(1, 3)
    if kind < 0.16 and classes <= 5:
        # around and above the 4096 voxels of a run of fp32 sums
        return rng.choice([(4096,), (4097,), (8192,), (9001,), (64, 65), (17, 17, 17), (2, 3, 37, 41)])
    dims = rng.choice([1, 2, 2, 3, 3, 3])
    return tuple(rng.choice([1, 2, 3, 4, 5, 7, 8]) for _ in range(dims))


def draw_activation(rng: random.Random, loss: str) -> dict[str, Any]:
    kind = rng.choice(["none", "sigmoid", "softmax", "softmax", "softmax", "other", "other"])
    if kind == "other":
        # FN of negative p is positive: the denominators of the others may come near 0
        return {"other_act": rng.choice([unit, torch.tanh, *([negative] if loss == "DiceLoss" else [])])}
    return {} if kind == "none" else {kind: True}


def draw_logits(
    rng: random.Random, generator: torch.Generator, shape: tuple[int, ...], options: dict[str, Any]
) -> Tensor:
    scale = rng.choice([0.1, 1.0, 1.0, 4.0])
    logits = scale * torch.randn(shape, dtype=torch.float64, generator=generator)
    if options.get("other_act") is torch.tanh:
        # MONAI's own examples use tanh; its mean stays off 0, where the ratio has no digits left
        logits = logits.abs() + 0.1
    elif not options or (options.get("softmax") and shape[1] == 1):
        logits = logits.sigmoid()
        if rng.random() < 0.2:
            logits = logits.round()
    dtypes = LOGIT_DTYPES
    if "other_act" in options:
        # In half precision a user's activation saturates, and MONAI's sums of it overflow.
        logits = logits.clamp(-2, 2)
        dtypes = dtypes if logits[0, 0].numel() < 4096 else [torch.float32, torch.float64]
    return logits.to(rng.choice(dtypes))


def draw_labels(
    rng: random.Random, generator: torch.Generator, samples: int, classes: int, space: Sequence[int]
) -> Tensor:
    """Label map (B, 1, *S) in which some classes may be absent."""
    present = torch.randperm(classes, generator=generator)[: rng.choice([classes, classes, 1, 2, 3])]
    labels = present[torch.randint(0, len(present), (samples, 1, *space), generator=generator)]
    labels = labels.to(rng.choice(LABEL_DTYPES))
    return labels + 0.5 if labels.is_floating_point() and rng.random() < 0.3 else labels


def draw_values(
    rng: random.Random, generator: torch.Generator, shape: tuple[int, ...], kinds: list[str]
) -> Tensor:
    """Dense target (B, C, *S)."""
    kind = rng.choice(kinds)
    if kind == "soft":
        soft = torch.randn(shape, dtype=torch.float64, generator=generator)
        soft = soft.softmax(1) if shape[1] > 1 else soft.sigmoid()
        return soft.to(rng.choice(VALUE_DTYPES))
    if kind == "one-hot" and shape[1] > 1:
        labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
        values = torch.nn.functional.one_hot(labels, shape[1]).movedim(-1, 1)
    else:
        values = torch.randint(
            0, 1 if kind == "empty" and rng.random() < 0.5 else 2, shape, generator=generator
        )
    return values.to(rng.choice([*VALUE_DTYPES, *COUNT_DTYPES]))


def draw_ignored(
    rng: random.Random, generator: torch.Generator, target: Tensor, classes: int, options: dict[str, Any]
) -> Tensor:
    """Sets ``ignore_index`` and the voxels that it means: of a class, or of a value outside them."""
    small = target.dtype in (torch.uint8, torch.bool)
    index = rng.choice([0, classes - 1, rng.randrange(classes), *([] if small else [-1, -100]), classes, 100])
    options["ignore_index"] = index
    if 0 <= index < classes:
        return target
    gone = torch.rand((target.shape[0], 1, *target.shape[2:]), generator=generator) < rng.choice(
        [0.1, 0.4, 1.1]
    )
    by_value = target.shape[1] == 1 and (options["to_onehot_y"] or target.dtype != torch.bool)
    return target.masked_fill(gone, index if by_value else 0)


def own_options(
    rng: random.Random, generator: torch.Generator, loss: str, logits: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """The options that only this loss has; they may override the shared ones."""
    classes = logits.shape[1]
    # P + G - I and P + G of negative p come near 0
    steady = options.get("other_act") is not negative
    # |p - g| of a p that half precision rounds to g has the slope of a kink
    soft = not ("other_act" in options and logits.dtype in HALVES)
    overlap = {"squared_pred": rng.random() < 0.3, "jaccard": rng.random() < 0.3 and steady}
    if loss == "DiceLoss":
        left = classes - (classes > 1 and not options["include_background"])
        weight = draw_weight(rng, generator, left)
        return overlap | {"weight": weight, "soft_label": rng.random() < 0.3 and soft}
    if loss == "GeneralizedDiceLoss":
        w_type = rng.choice(["square", "simple", "uniform"])
        return {"w_type": w_type, "soft_label": rng.random() < 0.3 and soft}
    if loss == "TverskyLoss":
        return {
            "alpha": rng.choice([0.5, 0.3, 1.0]),
            "beta": rng.choice([0.5, 0.7, 2.0]),
            "soft_label": rng.random() < 0.4 and soft,
        }
    weight = None
    if rng.random() < 0.4:
        weight = torch.rand(classes, dtype=torch.float64, generator=generator) + 0.1
        weight = weight.to(rng.choice([logits.dtype, logits.dtype, logits.dtype, torch.float32]))
    return overlap | {
        "reduction": rng.choice(["mean", "mean", "sum"]),
        "weight": weight,
        "lambda_dice": rng.choice([0.0, 1.0, 1.0, 0.3]),
        "lambda_ce": rng.choice([0.0, 1.0, 1.0, 2.5]),
        "label_smoothing": rng.choice([0.0, 0.0, 0.2, 1.0]),
    }


def draw_weight(rng: random.Random, generator: torch.Generator, left: int) -> Any:
    numbers = torch.rand(left, dtype=torch.float64, generator=generator) + 0.1
    if rng.random() < 0.3:
        numbers[0] = 0
    return rng.choice([None, None, 0.7, 2, numbers.tolist(), numbers, numbers.float(), torch.tensor(0.3)])


def laid_out(rng: random.Random, x: Tensor) -> tuple[Tensor, str]:
    """The values of x in another place: with junk around them, or with other strides."""
    kind = rng.choice(["contiguous"] * 4 + ["crop", "step", "transposed", "channels last", "expanded"])
    junk = float("nan") if x.is_floating_point() else 1 if x.dtype == torch.bool else 77
    if kind == "crop":
        around = x.new_full([size + 2 for size in x.shape], junk)
        inside = around[tuple(slice(1, size + 1) for size in x.shape)]
        return inside.copy_(x), kind
    if kind == "step" and x.ndim > 2:
        inside = x.new_full([*x.shape[:-1], 3 * x.shape[-1]], junk)[..., ::3]
        return inside.copy_(x), kind
    if kind == "transposed" and x.ndim > 3:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2), kind
    if kind == "channels last" and x.ndim > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1), kind
    if kind == "expanded":
        return x[:1].expand(x.shape), kind
    return x, "contiguous"


def _spoil(rng: random.Random, made: MonaiProblem) -> None:
    """One thing that MONAI refuses."""
    made.flaw = rng.choice(["label", "space", "samples", "channels", "weight length", "weight sign"])
    target, classes = made.target, made.logits.shape[1]
    if made.flaw == "label" and made.options["to_onehot_y"] and classes > 1:
        made.target = target.clone()
        last = tuple(size - 1 for size in target.shape)
        made.target[last] = rng.choice([classes, 100, *([] if target.dtype == torch.uint8 else [-1])])
    elif made.flaw == "space" and target.ndim > 2:
        made.target = torch.cat([target, target], -1)
    elif made.flaw == "samples":
        made.target = torch.cat([target, target])
    elif made.flaw == "channels":
        made.target = torch.cat([target] * 2, 1) if rng.random() < 0.5 else target[:, :1]
    elif made.loss in ("DiceLoss", "DiceCELoss"):
        length = classes + 3 if made.flaw == "weight length" else classes
        numbers = torch.full((length,), -0.5 if made.flaw == "weight sign" else 1.0, dtype=made.logits.dtype)
        made.options["weight"] = numbers
