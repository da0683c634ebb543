"""The demo's picture: curves, agreement, segmentations, Dice, time and memory. One colour a library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .demo_training import LIBRARIES, LIMIT, MONAI, OURS, Result

# Okabe and Ito's orange and blue: told apart by every kind of colour vision.
COLOUR = {MONAI: "#E69F00", OURS: "#0072B2"}
TISSUE_COLOURS = ("#56B4E9", "#D55E00", "#F0E442")
FEW_CLASSES = len(TISSUE_COLOURS) + 1

LAYOUT = [
    ["curve"] * 6 + ["agreement"] * 6,
    ["image"] * 3 + ["truth"] * 3 + [MONAI] * 3 + [OURS] * 3,
    ["dice"] * 6 + ["time"] * 3 + ["memory"] * 3,
]


def draw(result: Result, path: Path) -> None:
    """Write the picture of a finished result to ``path`` (PNG)."""
    figure = Figure(figsize=(13, 12), layout="constrained")
    # matplotlib types the layout as an invariant list of its own.
    axes: dict[str, Axes] = figure.subplot_mosaic(LAYOUT, height_ratios=[1, 1.25, 1])  # type: ignore[arg-type]
    volume = result.volume
    steps = len(result.curve[MONAI])
    figure.suptitle(
        f"MONAI's DiceCELoss and dicekernels: {volume.name}, {volume.classes} classes, {steps} steps\n"
        f"{volume.source}: one brain, trained and scored on itself",
        fontsize=14,
    )
    _curve(axes["curve"], result)
    _agreement(axes["agreement"], result)
    _slices(axes, result)
    (_dice_bars if volume.classes <= FEW_CLASSES else _dice_dots)(axes["dice"], result)
    seconds = {name: result.median_seconds(name) * 1e3 for name in LIBRARIES}
    _bars(axes["time"], seconds, "Time of the loss per step", "ms, forward + backward")
    peaks = {name: result.peak_bytes[name] / 1e6 for name in LIBRARIES}
    _bars(axes["memory"], peaks, "Peak memory of the loss", "MB beside logits and labels")
    figure.savefig(path, format="png", dpi=110)


def _curve(axes: Axes, result: Result) -> None:
    # Ours is drawn thin on top of MONAI's thick line: where they coincide both are still seen.
    for name, width, style in ((MONAI, 5.0, "-"), (OURS, 1.6, "-")):
        values = result.curve[name]
        axes.plot(range(1, len(values) + 1), values, style, color=COLOUR[name], lw=width, label=name)
    axes.set(title="Training loss (Dice + cross-entropy), each with its own", xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="trained with")
    axes.grid(alpha=0.3)


def _agreement(axes: Axes, result: Result) -> None:
    # Equal values have gap 0, which a logarithmic axis cannot show.
    floor = 1e-9
    gaps = (
        ("value", result.value_gap, "o", "#009E73"),
        ("gradient (relative L2)", result.gradient_gap, "s", "#CC79A7"),
    )
    for label, gap, marker, colour in gaps:
        step = np.arange(len(gap)) / len(LIBRARIES) + 1
        axes.plot(step, np.maximum(gap, floor), marker, ms=4, color=colour, alpha=0.7, label=label)
    axes.axhline(LIMIT, color="black", ls="--", lw=1, label=f"limit {LIMIT:.0e}")
    axes.set_yscale("log")
    axes.set(
        title="MONAI against dicekernels on the same logits",
        xlabel="step",
        ylabel=f"difference (0 drawn at {floor:.0e})",
        ylim=(floor / 2, LIMIT * 100),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", ncols=3)
    axes.grid(alpha=0.3)


def _slices(axes: dict[str, Axes], result: Result) -> None:
    volume = result.volume
    truth = volume.target[0, 0]
    # The axial slice through the middle, turned so that the front of the head is up.
    middle = truth.shape[2] // 2
    image = volume.image[0, 0, :, :, middle].T.numpy()
    dark, bright = np.quantile(image, [0.01, 0.995])
    labelled = {"truth": truth, **result.segmentation}
    colours = _label_colours(volume.classes)
    for name, title in (
        ("image", "T1, axial slice"),
        ("truth", "Truth"),
        *((n, f"Trained with {n}") for n in LIBRARIES),
    ):
        panel = axes[name]
        panel.imshow(image, cmap="gray", origin="lower", vmin=dark, vmax=bright)
        if name in labelled:
            labels = labelled[name][:, :, middle].T.numpy()
            panel.imshow(
                np.where(labels == 0, np.nan, labels),  # NaN is transparent
                cmap=ListedColormap(colours),
                origin="lower",
                vmin=0,
                vmax=volume.classes - 1,
                interpolation="nearest",
                alpha=0.8,
            )
        panel.set_title(title, color=COLOUR.get(name, "black"))
        panel.set(xticks=[], yticks=[])
    if volume.classes <= FEW_CLASSES:
        for i, label in enumerate(volume.class_names[1:], start=1):
            axes["truth"].plot([], [], "s", ms=8, color=colours[i], label=label)
        axes["truth"].legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=3,
            fontsize=8,
            handletextpad=0.1,
            columnspacing=0.8,
        )


def _label_colours(classes: int) -> list[Any]:
    """Background first. Left and right have neighbouring numbers: these get hues far apart."""
    if classes <= FEW_CLASSES:
        return ["black", *TISSUE_COLOURS[: classes - 1]]
    hues = np.arange(classes) * 0.618034 % 1
    return ["black", *colormaps["hsv"](hues[1:])]


def _dice_bars(axes: Axes, result: Result) -> None:
    names = result.volume.class_names[1:]
    for offset, name in ((-0.2, MONAI), (0.2, OURS)):
        bars = axes.bar(
            np.arange(len(names)) + offset,
            result.dice[name][1:].numpy(),
            0.38,
            color=COLOUR[name],
            label=name,
        )
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=10)
    axes.set_xticks(range(len(names)), names)
    axes.set(title="Final Dice per class", ylabel="Dice", ylim=(0, 1.15))
    axes.legend(loc="upper left", ncols=2)


def _dice_dots(axes: Axes, result: Result) -> None:
    voxels = torch.bincount(result.volume.target.flatten().int())[1:].numpy()
    for name, size, marker in ((MONAI, 55, "o"), (OURS, 14, "o")):
        axes.scatter(
            voxels, result.dice[name][1:].numpy(), size, color=COLOUR[name], marker=marker, label=name
        )
    axes.set_xscale("log")
    axes.set(
        title="Final Dice, a dot a class", xlabel="voxels of the class", ylabel="Dice", ylim=(-0.03, 1.03)
    )
    axes.legend()
    axes.grid(alpha=0.3)


def _bars(axes: Axes, heights: dict[str, float], title: str, unit: str) -> None:
    bars = axes.bar(list(heights), list(heights.values()), 0.6, color=[COLOUR[name] for name in heights])
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set(title=title, ylabel=unit)
    axes.margins(y=0.12)
