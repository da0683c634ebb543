"""The demo's work: two U-Nets, one trained with MONAI's DiceCELoss, one with ours, compared at every step."""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from monai.inferers.utils import sliding_window_inference
from monai.losses.dice import DiceCELoss as MonaiDiceCELoss
from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor, nn

from dicekernels import DiceCELoss

from .data import Volume

MONAI = "MONAI"
OURS = "dicekernels"
LIBRARIES = (MONAI, OURS)
LIMIT = 1e-6
# The U-Net halves four times; batch norm needs more than one voxel at the bottom.
SMALLEST_SIDE = 32

Loss = Callable[[Tensor, Tensor], Tensor]


class DisagreementError(RuntimeError):
    """MONAI's loss and ours gave different numbers on the same logits."""


class CropError(ValueError):
    """The crops are too small for the U-Net."""


@dataclass(frozen=True)
class Recipe:
    """How one task is trained. ``size`` is the edge of the random crops in voxels, 0 the whole volume."""

    steps: int
    stride: int
    size: int
    batch: int
    learning_rate: float
    features: tuple[int, ...]
    coordinates: bool
    seed: int = 0


RECIPES = {
    "mni_tissue": Recipe(150, 2, 64, 1, 1e-2, (8, 8, 16, 32, 64, 8), coordinates=False),
    "aal116": Recipe(120, 4, 0, 1, 1e-2, (16, 16, 32, 64, 64, 64), coordinates=True),
}


@dataclass(frozen=True)
class Evaluation:
    """One loss on one batch of logits: its value, its gradient and the time for both."""

    value: float
    gradient: Tensor
    seconds: float


@dataclass
class Result:
    """What the demo shows; every dict is keyed by library.

    curve:         the loss that each network was trained with, one value per step.
    value_gap:     |MONAI - ours| / max(1, |MONAI|) on the same logits, two values per step (one per network).
    gradient_gap:  ||MONAI - ours|| / ||MONAI|| of the gradient with respect to those logits.
    seconds:       forward and backward of the loss alone, two values per step.
    peak_bytes:    see `peak_memory`.
    segmentation:  (X, Y, Z) int64 labels of the whole volume by the trained network.
    dice:          (C,) float64, of that segmentation with the truth.
    """

    volume: Volume
    logits_shape: tuple[int, ...] = ()
    curve: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LIBRARIES})
    value_gap: list[float] = field(default_factory=list)
    gradient_gap: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LIBRARIES})
    peak_bytes: dict[str, int] = field(default_factory=dict)
    segmentation: dict[str, Tensor] = field(default_factory=dict)
    dice: dict[str, Tensor] = field(default_factory=dict)

    def median_seconds(self, library: str) -> float:
        return statistics.median(self.seconds[library])


def make_losses() -> dict[str, Loss]:
    """The two losses under comparison, built alike."""
    return {
        MONAI: MonaiDiceCELoss(to_onehot_y=True, softmax=True),
        OURS: DiceCELoss(to_onehot_y=True, softmax=True),
    }


def train(volume: Volume, recipe: Recipe) -> Iterator[Result]:
    """Train one network with each loss, in lock-step on the same batches; yields the result after every step.

    The last one yielded has the segmentations, the Dice scores and the peak memory.

    Raises DisagreementError when the losses differ by more than `LIMIT` on the same logits, CropError
    when the recipe's crops are too small.
    """
    torch.manual_seed(recipe.seed)
    losses = make_losses()
    inputs = network_input(volume, recipe)
    network = BasicUNet(3, inputs.shape[1], volume.classes, features=recipe.features, norm="batch")
    networks: dict[str, nn.Module] = {name: copy.deepcopy(network) for name in LIBRARIES}
    optimisers = {name: torch.optim.Adam(networks[name].parameters()) for name in LIBRARIES}
    schedules = {
        name: torch.optim.lr_scheduler.OneCycleLR(optimisers[name], recipe.learning_rate, recipe.steps)
        for name in LIBRARIES
    }
    result = Result(volume)
    for step, (image, target) in enumerate(batches(inputs, volume.target, recipe), start=1):
        for name in LIBRARIES:
            logits = networks[name](image)
            order = LIBRARIES if step % 2 else LIBRARIES[::-1]
            evaluations = {each: evaluate(losses[each], logits, target) for each in order}
            record_gaps(result, evaluations, f"step {step}, logits of the network trained with {name}")
            result.curve[name].append(evaluations[name].value)
            optimisers[name].zero_grad()
            logits.backward(evaluations[name].gradient)
            optimisers[name].step()
            schedules[name].step()
        if step == recipe.steps:
            result.logits_shape = tuple(logits.shape)
            result.peak_bytes = {each: peak_memory(losses[each], logits, target) for each in LIBRARIES}
            for name in LIBRARIES:
                labels = segment(networks[name], inputs, recipe.size)
                result.segmentation[name] = labels
                result.dice[name] = dice_per_class(labels, volume.target[0, 0], volume.classes)
        yield result


def network_input(volume: Volume, recipe: Recipe) -> Tensor:
    """The image, and for classes that position decides, three channels of coordinates from -1 to 1.

    The background is lifted to just below the darkest tissue: at its own value it takes most of the variance.
    """
    image = volume.image.clamp(min=-2.5)
    if not recipe.coordinates:
        return image
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in image.shape[2:]), indexing="ij")
    return torch.cat([image, torch.stack(axes)[None]], dim=1)


def batches(inputs: Tensor, target: Tensor, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """``recipe.steps`` batches: ``recipe.batch`` random crops, or the whole volume for size 0."""
    generator = torch.Generator().manual_seed(recipe.seed)
    sides = [min(recipe.size or n, n) for n in target.shape[2:]]
    if min(sides) < SMALLEST_SIDE:
        raise CropError(
            f"crops: got {'x'.join(map(str, sides))} voxels, the U-Net expects at least {SMALLEST_SIDE} "
            "along each axis; raise --size or lower --stride"
        )
    for _ in range(recipe.steps):
        crops = []
        for _ in range(recipe.batch):
            room = [n - side + 1 for n, side in zip(target.shape[2:], sides, strict=True)]
            starts = [int(torch.randint(n, (), generator=generator)) for n in room]
            box = [slice(start, start + side) for start, side in zip(starts, sides, strict=True)]
            crops.append((slice(None), slice(None), *box))
        yield torch.cat([inputs[crop] for crop in crops]), torch.cat([target[crop] for crop in crops])


def evaluate(loss: Loss, logits: Tensor, target: Tensor) -> Evaluation:
    """The loss and its gradient on logits cut off from the network, so that the time is the loss's alone."""
    leaf = logits.detach().requires_grad_()
    start = time.perf_counter()
    value = loss(leaf, target)
    (gradient,) = torch.autograd.grad(value, leaf)
    return Evaluation(value.item(), gradient, time.perf_counter() - start)


def record_gaps(result: Result, evaluations: dict[str, Evaluation], where: str) -> None:
    """Note how far the libraries are apart on the same logits; DisagreementError if it is too far."""
    monai, ours = evaluations[MONAI], evaluations[OURS]
    value_gap = abs(monai.value - ours.value) / max(1.0, abs(monai.value))
    gradient_gap = float((monai.gradient - ours.gradient).norm() / monai.gradient.norm())
    # Negated, so that a NaN fails as well.
    if not (value_gap <= LIMIT and gradient_gap <= LIMIT):
        raise DisagreementError(
            f"{where}: MONAI gives {monai.value:.9g}, ours {ours.value:.9g} (apart by {value_gap:.1e}), "
            f"the gradients are apart by {gradient_gap:.1e} in relative L2 norm; "
            f"expected at most {LIMIT:.0e} for both"
        )
    result.value_gap.append(value_gap)
    result.gradient_gap.append(gradient_gap)
    for name in LIBRARIES:
        result.seconds[name].append(evaluations[name].seconds)


def peak_memory(loss: Loss, logits: Tensor, target: Tensor) -> int:
    """Most bytes held at once, beside logits and labels, by forward and backward of the loss.

    The running sum of PyTorch's own allocations and frees as its profiler reports them. The gradient
    of the logits is in it, memory that a library takes outside PyTorch's allocator is not.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        evaluate(loss, logits, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate((int(event["args"]["Bytes"]) for event in changes), initial=0))


def segment(network: nn.Module, inputs: Tensor, size: int) -> Tensor:
    """(1, channels, X, Y, Z) -> (X, Y, Z) labels, in windows as large as the training crops."""
    network.eval()
    with torch.no_grad():
        windows = [size or n for n in inputs.shape[2:]]
        logits = sliding_window_inference(inputs, windows, 2, network, overlap=0.25)
        assert isinstance(logits, Tensor)
        return logits[0].argmax(0)


def dice_per_class(labels: Tensor, truth: Tensor, classes: int) -> Tensor:
    """2 |A and B| / (|A| + |B|) of every class by counting voxels; NaN for a class that neither has."""
    pairs = torch.bincount((truth.long() * classes + labels).flatten(), minlength=classes**2)
    counts = pairs.view(classes, classes).double()
    return 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1))
