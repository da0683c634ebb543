"""``make demo``: train a small 3-D U-Net on a real brain with MONAI's DiceCELoss and with ours.

``python -m dicekernels.demo`` labels brain tissue (4 classes); ``--task aal116`` labels 116 regions.
At every step both losses are evaluated on the same logits, and the demo fails (exit code 1) when they
disagree. It prints one table and writes one picture.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from .data import TASKS
from .dispatch import BACKENDS, use_backend
from .env import backend_line

# The extra `demo`.
PACKAGES = "'matplotlib>=3.8' 'monai>=1.6.1,<1.7' 'nibabel>=5.2' nilearn==0.14.1 'rich>=13'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0, or 1 when a package is missing, the crops are too small or the losses disagree."""
    options = parse(arguments)
    # The profiler's library, Kineto, logs two lines to stderr for every profile it takes.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Here, so that --help answers at once and needs none of these.
    try:
        from rich.console import Console

        from .demo_plot import draw
        from .demo_report import report, run
        from .demo_training import RECIPES, CropError, DisagreementError
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        print(f"FAILED: package {package!r} is not installed. Run: pip install {PACKAGES}")
        return 1
    console = Console(highlight=False)
    given = {name: getattr(options, name) for name in ("steps", "stride", "size", "seed")}
    recipe = replace(RECIPES[options.task], **{k: v for k, v in given.items() if v is not None})
    started = time.perf_counter()
    try:
        with use_backend(options.backend) if options.backend else nullcontext():
            console.print(backend_line("cpu"), soft_wrap=True, markup=False)
            result = run(console, options.task, recipe)
    except (ModuleNotFoundError, DisagreementError, CropError) as error:
        console.print(f"FAILED: {error}", style="bold red", soft_wrap=True, markup=False)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(result, options.out)
    report(console, result, options.out, time.perf_counter() - started)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dicekernels.demo",
        description="Train a small 3-D U-Net on a real brain with MONAI's DiceCELoss and with ours.",
    )
    parser.add_argument("--task", choices=list(TASKS), default="mni_tissue", help="default: %(default)s")
    parser.add_argument("--steps", type=_at_least(1), help="training steps of each network")
    parser.add_argument("--stride", type=_at_least(1), help="keep every n-th voxel of each axis")
    parser.add_argument("--size", type=_at_least(0), help="edge of the training crops; 0: whole volume")
    parser.add_argument("--seed", type=int, help="of the first weights and of the crops (default: 0)")
    parser.add_argument("--backend", choices=list(BACKENDS), help="default: the best there is")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.backend:
        backend = BACKENDS[options.backend]
        reason = backend.available() or backend.can_run("cpu", torch.float32, 4)
        if reason:
            parser.error(f"--backend {options.backend}: {reason}")
    return options


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"got {value}, expected at least {lowest}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
