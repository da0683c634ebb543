"""What the demo prints: a bar while it trains, then the table and what was counted."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .data import load
from .demo_training import LIBRARIES, LIMIT, MONAI, OURS, Recipe, Result, train

FEW_CLASSES = 8
MEGABYTE = 1e6


def run(console: Console, task: str, recipe: Recipe) -> Result:
    """Train with a progress bar; without a terminal, with ten lines."""
    volume = load(task, stride=recipe.stride)
    extent = "x".join(str(n) for n in volume.image.shape[2:])
    console.print(
        f"{task}: {volume.source}; {extent} voxels of {volume.spacing:g} mm, {volume.classes} classes.\n"
        f"Two U-Nets, both from seed {recipe.seed}; one is trained with each loss for {recipe.steps} steps.",
        soft_wrap=True,
    )
    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss: {task.description}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        bar = progress.add_task("", total=recipe.steps)
        for step, result in enumerate(train(volume, recipe), start=1):
            losses = ", ".join(f"{name} {result.curve[name][-1]:.4f}" for name in LIBRARIES)
            progress.update(bar, completed=step, description=losses)
            if not console.is_terminal and (step * 10) // recipe.steps > ((step - 1) * 10) // recipe.steps:
                print(f"step {step}/{recipe.steps}  loss: {losses}", flush=True)
    return result


def report(console: Console, result: Result, picture: Path, seconds: float) -> None:
    """The table, what was counted, and what to do next."""
    console.print(table(result))
    shape = " x ".join(str(n) for n in result.logits_shape)
    for line in (
        f"Same logits, {len(result.value_gap)} comparisons: values differ by at most "
        f"{max(result.value_gap):.1e}, gradients by {max(result.gradient_gap):.1e} (limit {LIMIT:.0e}).",
        f"Time: forward and backward of the loss alone on {shape} logits, median over the steps.",
        "Memory: most that PyTorch allocated at once in them, beside logits and labels; the gradient "
        f"of the logits ({math.prod(result.logits_shape) * 4 / MEGABYTE:.1f} MB) is included.",
        "The curves part late: training enlarges differences of rounding, so neither final Dice is the "
        "better one.",
        "Both networks were trained and scored on the same single brain: this shows that the losses train "
        "alike and what they cost, not how well anything works on a new patient.",
        f"Picture: {picture.resolve()} (whole demo: {seconds:.0f} s)",
        "Next: in your own training, replace `from monai.losses import DiceCELoss` by "
        "`from dicekernels import DiceCELoss`; nothing else changes.",
    ):
        console.print(line, soft_wrap=True, markup=False)


def table(result: Result) -> Table:
    """One column a library: final Dice, last loss, time and memory of the loss."""
    rows = Table(box=box.SIMPLE_HEAD, title="MONAI's DiceCELoss and ours", title_justify="left")
    rows.add_column("")
    rows.add_column(f"{MONAI} {version('monai')}", justify="right", style="dark_orange")
    rows.add_column(OURS, justify="right", style="dodger_blue1")
    rows.add_column("", justify="right")
    for label, monai, ours in dice_rows(result):
        rows.add_row(label, monai, ours, "")
    rows.add_section()
    rows.add_row("loss at the last step", *(f"{result.curve[name][-1]:.5f}" for name in LIBRARIES), "")
    times = [result.median_seconds(name) for name in LIBRARIES]
    rows.add_row("time of the loss per step", *(f"{t * 1e3:.1f} ms" for t in times), _ratio(*times))
    peaks = [result.peak_bytes[name] for name in LIBRARIES]
    rows.add_row("peak memory of the loss", *(f"{b / MEGABYTE:.1f} MB" for b in peaks), _ratio(*peaks))
    return rows


def dice_rows(result: Result) -> list[tuple[str, str, str]]:
    """Final Dice without background: every class if they are few, else their spread and two by name."""
    monai, ours = (result.dice[name][1:] for name in LIBRARIES)
    names = result.volume.class_names[1:]
    rows = [("final Dice, mean of classes", monai.nanmean(), ours.nanmean())]
    if len(names) <= FEW_CLASSES:
        rows += [(f"  {name}", monai[i], ours[i]) for i, name in enumerate(names)]
    else:
        for label, quantile in (("worst", 0.0), ("lowest tenth", 0.1), ("median", 0.5), ("best", 1.0)):
            rows.append((f"  {label}", monai.nanquantile(quantile), ours.nanquantile(quantile)))
        sizes = torch.bincount(result.volume.target.flatten().int())[1:]
        for label, i in (("largest", int(sizes.argmax())), ("smallest", int(sizes.argmin()))):
            rows.append((f"  {label}: {names[i]}", monai[i], ours[i]))
    return [(label, f"{a:.3f}", f"{b:.3f}") for label, a, b in rows]


def _ratio(monai: float, ours: float) -> str:
    return f"{monai / ours:.1f}x less" if ours <= monai else f"{ours / monai:.1f}x more"
