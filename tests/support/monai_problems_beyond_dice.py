"""Random problems of the focal and masked losses, the others and the wrappers; see ``monai_problems``.

``problem(seed)`` takes the losses in turn, so that every one of nine successive seeds is another loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai_problems import (
    ADD_CLASSES,
    CLASSES,
    HALVES,
    LOSSES,
    VALUES,
    MonaiProblem,
    draw_call,
    draw_ignored,
    draw_labels,
    draw_logits,
    draw_space,
    draw_values,
    draw_weight,
    laid_out,
    own_options,
)
from torch import Tensor

MORE = (
    "FocalLoss",
    "DiceFocalLoss",
    "GeneralizedDiceFocalLoss",
    "MaskedDiceLoss",
    "MCCLoss",
    "GeneralizedWassersteinDiceLoss",
    "AsymmetricUnifiedFocalLoss",
    "DeepSupervisionLoss",
    "MaskedLoss",
)
INNER = (*LOSSES, "FocalLoss", "DiceFocalLoss", "GeneralizedDiceFocalLoss", "MCCLoss")
ACTIVATIONS = ("sigmoid", "softmax", "other_act")
Drawn = tuple[dict[str, Any], Tensor, Tensor]


def problem(seed: int) -> MonaiProblem:
    """The problem of this number."""
    rng = random.Random(f"more {seed}")
    generator = torch.Generator().manual_seed(seed)
    loss = MORE[seed % len(MORE)]
    inner = rng.choice(INNER) if loss in ("DeepSupervisionLoss", "MaskedLoss") else None
    samples, classes = rng.choice([1, 2, 2, 3]), rng.choice([*CLASSES, rng.randint(1, 40)])
    space = draw_space(rng, classes)
    mask, levels, wrapped = None, None, None
    if loss == "GeneralizedWassersteinDiceLoss":
        options, logits, target = _wasserstein(rng, generator, (samples, min(max(classes, 2), 17), *space))
    elif loss == "AsymmetricUnifiedFocalLoss":
        options, logits, target = _unified(rng, generator, samples, space)
    else:
        if inner and len(space) > 3:
            space = (17, 17, 17)  # torch resizes at most three dimensions
        options, logits, target = _draw(rng, generator, inner or loss, (samples, classes, *space))
    if inner is not None:
        wrapped, options = (inner, options), {}
    if loss == "DeepSupervisionLoss":
        assert wrapped is not None
        options, target, levels = _levels(rng, generator, wrapped[1], logits, target)
        if levels and rng.random() < 0.2:
            logits, levels = levels[0], levels[1:]
    if loss == "MaskedLoss" and logits.dtype in HALVES and wrapped is not None:
        # the slope at the product with the mask is held in half precision: nr / dr^2 overflows it
        wrapped[1].update({name: 0.25 for name in wrapped[1] if name == "smooth_dr"})
    if loss in ("MaskedDiceLoss", "MaskedLoss"):
        mask = draw_mask(rng, generator, logits, target)
        if loss == "MaskedDiceLoss" and options["to_onehot_y"]:
            # fractions of labels are background: without nr the other classes' gradients are but rounding
            options["smooth_nr"] = max(options["smooth_nr"], 1e-5)
    logits, how = laid_out(rng, logits)
    target, how_target = laid_out(rng, target)
    note = f"logits {how}, target {how_target}"
    made = MonaiProblem(seed, loss, options, logits, target, "", note, mask, levels, wrapped)
    if rng.random() < 0.06:
        _spoil(rng, made)
    return made


def _draw(rng: random.Random, generator: torch.Generator, loss: str, shape: tuple[int, ...]) -> Drawn:
    if loss == "FocalLoss":
        return _focal(rng, generator, shape)
    return draw_call(rng, generator, loss, shape, own_options if loss in LOSSES else _own)


def _focal(rng: random.Random, generator: torch.Generator, shape: tuple[int, ...]) -> Drawn:
    samples, classes, *space = shape
    options: dict[str, Any] = {
        "include_background": rng.random() < 0.6,
        "to_onehot_y": rng.random() < 0.5,
        "use_softmax": rng.random() < (0.5 if classes > 1 else 0.2),
        "reduction": rng.choice(["mean", "mean", "sum", "none"]),
    }
    logits = draw_logits(rng, generator, shape, {"sigmoid": True})
    if options["to_onehot_y"] and classes > 1:
        target = draw_labels(rng, generator, samples, classes, space)
    else:
        target = draw_values(rng, generator, shape, VALUES)
    if rng.random() < 0.4:
        target = draw_ignored(rng, generator, target, classes, options)
    left = classes - (classes > 1 and not options["include_background"])
    options |= _focal_part(rng, generator, left, options["use_softmax"])
    numbers = (torch.rand(left, dtype=torch.float64, generator=generator) + 0.1) / 1.1
    alphas = [None, None, 0.25, 0.7, 1, torch.tensor(0.3), numbers.tolist(), numbers]
    if options["use_softmax"] and options["gamma"] == 0.5 and options["reduction"] == "none":
        options["gamma"] = 1.5  # the slope of the map is NaN where float32 rounds p to 1, in MONAI and here
    return options | {"alpha": rng.choice(alphas)}, logits, target


def _focal_part(
    rng: random.Random, generator: torch.Generator, left: int, use_softmax: bool = False
) -> dict[str, Any]:
    weight = draw_weight(rng, generator, left)
    if left == 1 and rng.random() < 0.9:  # MONAI refuses a weight for each class of one
        weight = rng.choice([None, 0.7, torch.tensor(0.3)])
    # gamma < 1: 0^(gamma - 1) log 1, of a softmax over one channel, is NaN in MONAI
    gammas = [0.0, 1.0, 2.0, 2.0, 2.0, 3.5, *([] if use_softmax and left == 1 else [0.5, 1.5])]
    return {"weight": weight, "gamma": rng.choice(gammas)}


def _own(
    rng: random.Random, generator: torch.Generator, loss: str, logits: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """The options that only this loss has; they may override the shared ones."""
    left = logits.shape[1] - (logits.shape[1] > 1 and not options["include_background"])
    if loss == "MCCLoss":
        single = logits.shape[2:].numel() == 1  # TP TN = FP FN: no gradient but that of nr
        return {
            "smooth_nr": 0.5 if single else rng.choice([0.0, 0.0, 1e-3, 0.5]),
            # a class that is absent has nothing but dr under the root
            "smooth_dr": rng.choice([1e-5, 1e-5, 1e-3, 0.25]),
        }
    overlap = {"squared_pred": rng.random() < 0.3, "jaccard": rng.random() < 0.3}
    if loss == "MaskedDiceLoss":
        # |p - g| of a p that half precision rounds to g has the slope of a kink
        soft = not ("other_act" in options and logits.dtype in HALVES)
        weight = draw_weight(rng, generator, left)
        return overlap | {"weight": weight, "soft_label": rng.random() < 0.3 and soft}
    # one fault at a time: MONAI's generalized Dice refuses logits without spatial dims
    refused = loss in ADD_CLASSES and logits.ndim == 2
    focal = {"weight": None} if refused else {}
    focal = _focal_part(rng, generator, left) | focal | {"lambda_focal": rng.choice([0.0, 1.0, 1.0, 2.5])}
    factor = rng.choice([0.0, 1.0, 1.0, 0.3])
    if loss == "DiceFocalLoss":
        return overlap | focal | {"lambda_dice": factor, "alpha": rng.choice([None, None, 0.25, 0.8])}
    return focal | {"lambda_gdl": factor, "w_type": rng.choice(["square", "simple", "uniform"])}


def _wasserstein(rng: random.Random, generator: torch.Generator, shape: tuple[int, ...]) -> Drawn:
    samples, classes, *space = shape
    matrix: Any = torch.rand(classes, classes, dtype=torch.float64, generator=generator) + 0.1
    matrix = (matrix + matrix.T) * (1 - torch.eye(classes, dtype=torch.float64))
    if rng.random() < 0.3:
        matrix = matrix / matrix.max()
    matrix = matrix.to(rng.choice([torch.float32, torch.float32, torch.float64]))
    if rng.random() < 0.15:
        matrix = 1 - torch.eye(classes, dtype=torch.int64)
    if rng.random() < 0.6:
        matrix = np.asarray(matrix)
    options = {
        "dist_matrix": matrix,
        "weighting_mode": rng.choice(["default", "GDL"]),
        "reduction": rng.choice(["mean", "mean", "sum", "none"]),
        "smooth_nr": rng.choice([1e-5, 1e-5, 0.0, 1e-3, 0.5]),
        "smooth_dr": rng.choice([1e-5, 1e-5, 0.0, 1e-3, 0.25]),
    }
    logits = draw_logits(rng, generator, shape, {"sigmoid": True})
    target = draw_labels(rng, generator, samples, classes, space)
    if options["weighting_mode"] == "default" and not target.long().any():
        options["smooth_nr"] = 0.5  # without foreground nothing else in the gradient is not rounding
    return options, logits, target[:, 0] if rng.random() < 0.4 else target


def _unified(rng: random.Random, generator: torch.Generator, samples: int, space: tuple[int, ...]) -> Drawn:
    if len(space) not in (2, 3) and rng.random() < 0.95:  # MONAI refuses other dimensions
        space = (17, 17, 17) if sum(space) > 100 else rng.choice([(1, 1), (5, 7), (2, 3, 4)])
    channels = rng.choice([1, 1, 2, 2, 2, 2, 2, 3])
    options: dict[str, Any] = {
        "to_onehot_y": rng.random() < 0.5,
        "num_classes": rng.choice([2] * 9 + [3]),
        "weight": rng.choice([0.5, 0.5, 0.0, 1.0, 0.3]),
        "gamma": rng.choice([0.5, 0.5, 0.0, 0.2, 0.75]),
        "delta": rng.choice([0.7, 0.7, 0.5, 0.3]),
        "reduction": rng.choice(["mean", "mean", "sum", "none"]),
    }
    shape = (samples, channels, *space)
    logits = draw_logits(rng, generator, shape, {})
    if options["to_onehot_y"] and channels > 1:
        target = draw_labels(rng, generator, samples, 2, space)
    else:
        target = draw_values(rng, generator, shape, ["one-hot", "one-hot", "soft", "empty"])
    if rng.random() < 0.4:
        target = draw_ignored(rng, generator, target, 2, options)
    return options, logits, target


def _levels(
    rng: random.Random, generator: torch.Generator, inner: dict[str, Any], logits: Tensor, target: Tensor
) -> tuple[dict[str, Any], Tensor, list[Tensor] | None]:
    """Options of the wrapper, the target in a dtype that torch resizes (mostly), and coarser outputs."""
    if rng.random() < 0.9 and inner["reduction"] == "none":  # MONAI refuses it
        inner["reduction"] = "mean"
    if not target.is_floating_point() and rng.random() < 0.9:
        small = target.dtype != torch.bool and target.numel() > 0 and int(target.min()) >= 0
        kinds = [torch.float32, torch.float32, torch.float64, *([torch.uint8] * 2 if small else [])]
        target = target.to(rng.choice(kinds))
    options = {"weight_mode": rng.choice(["exp", "exp", "two", "same", "none of them"])}
    count = rng.choice([1, 2, 3, 3, 4, 6])
    if rng.random() < 0.3:
        given = max(1, count + rng.choice([-1, 0, 0, 1]))
        options["weights"] = [rng.choice([0.1, 0.5, 1.0, 2.0]) for _ in range(given)]
    if rng.random() < 0.15:
        return options, target, None
    kind = {name: inner[name] for name in ACTIVATIONS if name in inner}
    if "use_softmax" in inner:
        kind = {"sigmoid": True}  # the focal loss takes logits of any sign
    levels = []
    for level in range(1, count):
        space = [max(1, size >> level) for size in logits.shape[2:]]
        drawn = draw_logits(rng, generator, (*logits.shape[:2], *space), kind)
        levels.append(laid_out(rng, drawn.to(logits.dtype))[0])
    return options, target, levels


def draw_mask(
    rng: random.Random, generator: torch.Generator, logits: Tensor, target: Tensor
) -> Tensor | None:
    """(B, 1, *S) or (1, 1, *S): binary of several types, or fractions; above 1 where no label is moved."""
    kind = rng.choice(["binary"] * 4 + ["fractions"] * 3 + ["none"])
    if kind == "none":
        return None
    shape = (rng.choice([1, logits.shape[0]]), 1, *logits.shape[2:])
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
    if kind == "binary":
        mask = (uniform < rng.choice([0.3, 0.7, 0.7, 0.0, 1.1])).to(
            rng.choice(
                [torch.float32] * 3
                + [torch.bool] * 2
                + [torch.uint8, torch.int64, torch.float64, torch.float16]
            )
        )
    else:
        mask = (uniform * rng.choice([1, 1, 2.5 if target.shape == logits.shape else 1])).masked_fill(
            uniform < 0.2, 0
        )
        # a product that is rounded below the precision of the loss is another problem
        coarse = [] if logits.dtype in HALVES or target.dtype in HALVES else [torch.bfloat16]
        fine = [torch.float32] * 4 + [torch.float64, *coarse]
        mask = mask.to(torch.float64 if logits.dtype == torch.float64 else rng.choice(fine))
    return laid_out(rng, mask)[0]


def _spoil(rng: random.Random, made: MonaiProblem) -> None:
    """One thing that MONAI refuses, or takes with a warning."""
    if made.logits.ndim == 2 and made.own_loss in ADD_CLASSES:
        return  # refused as it is, mostly: of two faults each library names another
    if made.loss == "AsymmetricUnifiedFocalLoss" and made.logits.shape[1] > 2:
        return
    flaws: Sequence[str] = ["label", "space", "samples", "channels"]
    if made.mask is not None:
        flaws = [*flaws, "mask samples", "mask channels", "mask point", "mask space", "mask dims"] * 2
    elif "weight" in made.options or "alpha" in made.options:
        flaws = [*flaws, "weight length", "weight sign", "alpha length"]
    elif "dist_matrix" in made.options:
        flaws = [*flaws, "matrix"]
    made.flaw = rng.choice([*flaws, "reduction"] if "reduction" in made.options else flaws)
    target, classes, mask = made.target, made.logits.shape[1], made.mask
    if made.flaw == "label" and made.labels and target.numel():
        made.target = target.clone()
        last = tuple(size - 1 for size in target.shape)
        made.target[last] = rng.choice([classes, 100, *([] if target.dtype == torch.uint8 else [-1])])
    elif made.flaw == "space" and target.ndim > 2:
        made.target = torch.cat([target, target], -1)
    elif made.flaw == "samples":
        made.target = torch.cat([target, target])
    elif made.flaw == "channels" and target.ndim > 1:
        made.target = torch.cat([target] * 2, 1) if rng.random() < 0.5 else target[:, :1]
    elif made.flaw == "reduction":
        made.options["reduction"] = "median"
    elif made.flaw == "matrix":
        made.options["dist_matrix"] = torch.ones(classes, classes + 1)
    elif made.flaw == "alpha length" and "alpha" in made.options:
        made.options["alpha"] = [0.5] * (classes + 1)
    elif made.flaw in ("weight length", "weight sign") and made.loss != "AsymmetricUnifiedFocalLoss":
        length = classes + 3 if made.flaw == "weight length" else classes
        made.options["weight"] = torch.full((length,), -0.5 if made.flaw == "weight sign" else 1.0)
    elif mask is not None and made.flaw.startswith("mask"):
        made.mask = {
            "mask samples": mask.expand(made.logits.shape[0], *mask.shape[1:]).repeat_interleave(2, 0),
            "mask channels": torch.cat([mask, mask], 1),
            "mask point": mask[(slice(None), slice(None), *[slice(1)] * (mask.ndim - 2))],
            "mask space": torch.cat([mask, mask], -1),
            "mask dims": mask[..., 0],
        }[made.flaw]
