"""``python -m bench.gpu.tune``: measure again which tile each problem should have, on the GPU that is here.

For each problem (classes, dtype, layout, direction) the tile of dicekernels/backends/triton/configs.py and
its neighbours run on the same data: one whose result differs from that of the table is refused, the others
are timed in turn with a cold L2 cache. Written to bench/results/tune-triton--<device>.json; the table itself
is edited by hand. ``--dry-run``: two candidates of each direction at toy size, in Triton's interpreter,
without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor

from bench import measure, schema
from bench.cases import Case, torch_dtype
from bench.gpu.prebuild import pool_of
from bench.run import l2_flush
from bench.static.aot_cases import Problem

DIRECTIONS = ("forward", "backward")
HEADS = ["problem", "tile", "warps", "µs", "of table", ""]
# Elements of a tile in one thread that are worth a try.
FEWEST, MOST = 4, 128


def problems(classes: list[int], dtypes: list[str], layouts: list[str], toy: bool) -> list[Problem]:
    """DiceCE, on volumes of together some 250 MB of logits."""
    found = []
    for layout, count, dtype in itertools.product(layouts, classes, dtypes):
        if toy:
            found.append(Problem("dice_ce", count, dtype, layout, 1, (6, 11, 13)))
            continue
        volume = count * 128**3 * torch_dtype(dtype).itemsize
        found.append(Problem("dice_ce", count, dtype, layout, max(1, round(250e6 / volume))))
    return found


def table_tile(problem: Problem, direction: str) -> Any:
    """The tile of configs.py."""
    from dicekernels.backends.triton.configs import choose_tile

    last = problem.layout == "channels_last"
    return choose_tile(problem.classes, problem.itemsize, last, direction == "backward")


def candidates(tile: Any, itemsize: int) -> list[Any]:
    """The tile of the table, and what lies around it; see tile.py for the shapes."""
    block_c, block_n, lanes, _, inner = tile.shape
    vector = 16 // itemsize
    found = [tile]
    choices = itertools.product((0.25, 0.5, 1, 2, 4), (2, 4, 8), (1, 2, 4, 8, 16) if lanes else (0,))
    for factor, warps, width in choices:
        voxels = int(block_n * factor)
        if not FEWEST <= block_c * voxels / (32 * warps) <= MOST or width > block_c:
            continue
        if lanes:
            fold = 32 // width * warps
        else:
            fold = vector if inner else min(voxels, 32 * warps * vector // block_c)
        if voxels < max(fold, vector):
            continue
        changed = tile._replace(shape=(block_c, voxels, width, fold, inner), warps=warps)
        if "scattered" in tile._fields:
            changed = changed._replace(scattered=width == 1)
        if changed.shape != tile.shape or changed.warps != tile.warps:
            found.append(changed)
    return found


def planned(problem: Problem, direction: str, tile: Any, tensors: tuple[Tensor, ...] | None = None) -> Any:
    """The ``Launch`` with another tile; ``tensors``: those of ``data_of``, None for such on ``meta``."""
    with mock.patch("dicekernels.backends.triton.problem.choose_tile", lambda *_: tile):
        if tensors is None:
            return problem.plan(direction)
        from dicekernels.backends.triton.sums import plan_sums
        from dicekernels.backends.triton.sums_backward import plan_sums_backward

        logits, target, numbers, gradient = tensors
        sums = problem.spec.sums
        if direction == "forward":
            return plan_sums(logits, target, None, numbers, sums)
        return plan_sums_backward(None, logits, target, None, numbers, gradient, sums)


def compile_tile(task: tuple[Problem, str, Any]) -> str:
    """ "" or why a tile does not compile, in a process of its own."""
    problem, direction, tile = task
    try:
        planned(problem, direction, tile).compile()
    except Exception as error:
        return f"{problem} {direction} {tile}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def data_of(problem: Problem, direction: str, device: str) -> tuple[Tensor, ...]:
    """Logits, labels, slots (backward: coefficients), gradient."""
    case = Case(
        "dice_ce", (problem.samples, problem.classes, *problem.space), problem.dtype, "uint8", problem.layout
    )
    logits, labels = case.tensors(device)
    width = problem.spec.sums.rows.bit_count()
    chunks = problem.plan("forward").args[3].shape[1]
    shape = (problem.samples, chunks, problem.classes, width)
    numbers = torch.empty(shape, dtype=torch.float64, device=device)
    if direction == "backward":
        numbers = torch.randn((shape[0], *shape[2:]), dtype=torch.float64, device=device)
    return logits.detach(), labels, numbers, torch.empty_like(logits.detach())


def error_of(result: Tensor, expected: Tensor) -> float:
    """Relative L2 error; infinite for NaN, which memory that nothing wrote holds."""
    error = (
        torch.linalg.vector_norm((result - expected).double()) / torch.linalg.vector_norm(expected.double())
    ).item()
    return error if error == error else float("inf")


def measured(
    problem: Problem, direction: str, device: str, rounds: int, tiles: list[Any]
) -> list[dict[str, Any]]:
    """A row for each tile, that of the table first."""
    tensors = data_of(problem, direction, device)
    written = tensors[2] if direction == "forward" else tensors[3]
    # Sums are exact but for their order; a gradient is rounded to its own type.
    eps = torch.finfo(torch.float32 if direction == "forward" else torch_dtype(problem.dtype)).eps
    expected: Tensor | None = None
    steps, rows = {}, []
    for number, tile in enumerate(tiles):
        row = {
            "shape": list(tile.shape),
            "warps": tile.warps,
            "error": None,
            "refused": "",
            "milliseconds": None,
        }
        rows.append(row)
        written.fill_(float("nan"))
        try:
            launch = planned(problem, direction, tile, tensors)
            launch.run(written.device)
            row["error"] = 0.0 if expected is None else error_of(written, expected)
        except Exception as error:
            row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if expected is None:
            expected = written.clone()
        if not row["error"] <= 16 * eps:
            row["refused"] = f"differs from the table's tile: {row['error']:.1e}"
            continue
        steps[str(number)] = measure.Step(_runner(launch, written.device), lambda _: None)
    flush = l2_flush() if device == "cuda" else None
    for key, taken in measure.interleave(steps, rounds, device, flush=flush).items():
        rows[int(key)]["milliseconds"] = asdict(measure.summarise([sample.forward for sample in taken]))
    return rows


def _runner(launch: Any, device: torch.device) -> Callable[[], None]:
    return lambda: launch.run(device)


def lines_of(entry: dict[str, Any], best: int = 3) -> list[list[str]]:
    """The table's tile, the best others, and those that are wrong, under HEADS."""
    first, *others = entry["tiles"]
    name = f"C={entry['classes']} {entry['dtype']} {entry['layout']} {entry['direction']}"
    timed = [row for row in others if row["milliseconds"]]
    timed.sort(key=lambda row: row["milliseconds"]["median"])
    wrong = [row for row in others if "differs" in row["refused"]]
    lines = []
    for row in [first, *timed[:best], *wrong]:
        cells = [name, str(tuple(row["shape"])), str(row["warps"])]
        if row["milliseconds"] and first["milliseconds"]:
            taken, before = row["milliseconds"]["median"], first["milliseconds"]["median"]
            cells += [f"{1e3 * taken:.1f}", f"{taken / before:.0%}"]
        lines.append([*cells, *[""] * (5 - len(cells)), "the table's" if row is first else row["refused"]])
    return lines


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=[4, 14, 32, 117, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layouts", nargs="+", default=["contiguous", "channels_last"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; then no problem starts")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--out", type=Path, default=schema.ROOT / "bench" / "results")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    if options.dry_run:
        options.classes, options.dtypes, options.rounds = [3], ["float32"], 1
    return options


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    from dicekernels.backends.triton.support import interpreted

    if options.dry_run and not interpreted():
        # Triton decides when it is imported.
        again = [sys.executable, "-m", "bench.gpu.tune", *(sys.argv[1:] if arguments is None else arguments)]
        os.execve(sys.executable, again, os.environ | {"TRITON_INTERPRET": "1"})
    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "bench.gpu.tune: torch sees no CUDA device here; run it on a GPU node, or with --dry-run"
        )
    end = time.monotonic() + options.budget
    found = problems(options.classes, options.dtypes, options.layouts, options.dry_run)
    tasks = [
        (problem, direction, candidates(table_tile(problem, direction), problem.itemsize))
        for problem in found
        for direction in DIRECTIONS
    ]
    document = schema.describe("tune-triton", "", device, "triton", threads=1, rounds=options.rounds)
    if options.dry_run:
        tasks = [(problem, direction, tiles[:2]) for problem, direction, tiles in tasks]
    else:
        document["copy"] = measure.copy_bandwidth()
    document = document | {"finished": False, "problems": []}
    path = options.out / f"tune-triton--{schema.slug(document['device']['name'])}.json"
    pool = None if options.dry_run else pool_of(options.workers)
    for number, (problem, direction, tiles) in enumerate(tasks):
        if number and time.monotonic() > end:
            print(f"bench.gpu.tune: no time left for {len(tasks) - number} problems", file=sys.stderr)
            break
        if pool is not None:
            pool.map(compile_tile, [(problem, direction, tile) for tile in tiles], chunksize=1)
        entry = asdict(problem) | {"direction": direction}
        entry["tiles"] = measured(problem, direction, device, options.rounds, tiles)
        document["problems"].append(entry)
        print(tabulate(lines_of(entry), HEADS, disable_numparse=True), flush=True)
        document["finished"] = number == len(tasks) - 1
        schema.write(document, path)
    if pool is not None:
        pool.terminate()
    print(f"written: {path}")


if __name__ == "__main__":
    main()
