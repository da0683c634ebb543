"""``python -m bench.static.aot``: compile the Triton kernels for GPUs that are not here, read what came out.

See bench/README.md for what the columns mean.

    python -m bench.static.aot --op forward --capability 90 --classes 4 14 --dtype float32 --case dice_ce
    python -m bench.static.aot ... --try BLOCK_N=512/1024,num_warps=4/8
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.offline import target
from bench.static import aot_facts, tables
from bench.static.aot_cases import LAYOUTS, LOSSES, OPS, Problem

CAPABILITIES = (80, 90, 100, 120)
CLASSES = (1, 2, 4, 14, 32, 117, 257)
DTYPES = ("float32", "bfloat16", "float16")


class Task(NamedTuple):
    """One kernel: ``overrides`` replace constants of its Launch."""

    problem: Problem
    op: str
    capability: int
    overrides: tuple[tuple[str, Any], ...] = ()


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    work = tasks(options)
    if not work:
        raise SystemExit(
            "bench.static.aot: no kernel of the matrix has these properties; widen --case or --op"
        )
    if options.lines:
        for task in work:
            with target(task.capability):
                print(f"\n{' '.join(map(str, task))}")
                print(tables.lines(aot_facts.by_line(task.problem, task.op, dict(task.overrides))))
        return
    rows = compiled(work, options.jobs)
    print(tables.launches(rows))
    if options.out:
        tables.save("aot-triton", options.out, tables.tool_versions(), kernels=rows)
    errors: dict[str, list[str]] = {}
    for row in rows:
        errors.setdefault(row["error"], []).append(tables.name(row))
    errors.pop("", None)
    for text, names in list(errors.items())[:4]:
        print(f"\n{', '.join(names)}:\n{text}", file=sys.stderr)
    if errors:
        raise SystemExit(
            f"bench.static.aot: {sum(map(len, errors.values()))} of {len(rows)} kernels did not compile"
        )


def compiled(work: list[Task], jobs: int) -> list[dict[str, Any]]:
    """A row for each task, in their order."""
    if jobs == 1 or len(work) == 1:
        return [_row(task) for task in _progress(work, len(work))]
    # Forked: torch and triton are imported once. Nothing here has touched a GPU.
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return list(_progress(pool.imap(_row, work), len(work)))


def _row(task: Task) -> dict[str, Any]:
    """What bench/static/aot_facts.py finds, or the text of the error in its place."""
    problem, op, capability, overrides = task
    row = {
        "case": problem.loss,
        "op": op,
        "capability": capability,
        "classes": problem.classes,
        "dtype": problem.dtype,
        "layout": problem.layout,
        "shape": [problem.samples, problem.classes, *problem.space],
        "overrides": dict(overrides),
    }
    try:
        with target(capability):
            return row | {"error": "", "facts": aot_facts.facts(problem, op, capability, dict(overrides))}
    except Exception as error:  # the matrix goes on, the run fails at its end
        return row | {"error": _causes(error), "facts": None}


def _causes(error: BaseException | None) -> str:
    """An error of the compiler with those that led to it, the first cause first."""
    texts: list[str] = []
    while error is not None:
        texts.insert(0, f"{type(error).__name__}: {error}")
        error = error.__cause__
    return "\n".join(texts)


def _progress(rows: Any, total: int) -> Any:
    for done, row in enumerate(rows, start=1):
        if sys.stderr.isatty():
            print(f"\r{done} of {total} kernels", end="" if done < total else "\n", file=sys.stderr)
        elif done % 25 == 0 or done == total:
            print(f"{done} of {total} kernels", file=sys.stderr)
        yield row


def tasks(options: argparse.Namespace) -> list[Task]:
    """The matrix of DiceCE and the other losses, as far as the options leave it."""
    every = itertools.product(CAPABILITIES, CLASSES, DTYPES, LAYOUTS, ("forward", "backward"))
    work = [Task(Problem("dice_ce", c, dtype, layout), op, sm) for sm, c, dtype, layout, op in every]
    for sm, loss in itertools.product(CAPABILITIES, LOSSES):
        if loss != "dice_ce":
            work += [Task(Problem(loss, 4), op, sm) for op in ("forward", "backward")]
            work += [Task(Problem(loss, 14, "bfloat16"), op, sm) for op in ("forward", "backward")]
        work += [Task(Problem(loss, 14), "finish", sm)] if loss in ("dice_ce", "gdl") else []
    if options.restricted:
        # What is asked for is compiled although the matrix leaves it out, int64 labels at C = 117, say.
        asked = itertools.product(
            options.capability or CAPABILITIES,
            options.case or ("dice_ce",),
            options.classes or CLASSES,
            options.dtype or DTYPES,
            options.layout or LAYOUTS,
            options.op or ("forward", "backward"),
        )
        space = tuple(options.space)
        work = [
            Task(Problem(loss, c, dtype, layout, options.samples, space), op, sm)
            for sm, loss, c, dtype, layout, op in asked
        ]
    return [task._replace(overrides=overrides) for task in work for overrides in options.overrides]


def trials(texts: list[str]) -> list[tuple[tuple[str, Any], ...]]:
    """Every combination of ``["BLOCK_N=512/1024,num_warps=4"]``, the sets of several texts one by one."""
    result: list[tuple[tuple[str, Any], ...]] = []
    for text in texts:
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(name and values for name, _, values in pairs):
            raise SystemExit(f"--try: got {text!r}, expected NAME=VALUE[/VALUE...][,NAME=VALUE...]")
        choices = [
            [(name.strip(), _value(value)) for value in values.split("/")] for name, _, values in pairs
        ]
        result += list(itertools.product(*choices))
    return result or [()]


def _value(text: str) -> Any:
    """A number, true, false or null as JSON writes them; else the text itself."""
    try:
        return json.loads(text.lower())
    except json.JSONDecodeError:
        return text


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.static.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--capability", type=int, nargs="+", metavar="SM")
    parser.add_argument("--classes", type=int, nargs="+", metavar="C")
    parser.add_argument("--dtype", nargs="+", choices=(*DTYPES, "float64"))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS)
    parser.add_argument("--op", nargs="+", choices=OPS)
    parser.add_argument("--case", nargs="+", choices=tuple(LOSSES))
    parser.add_argument("--space", type=int, nargs="+", default=[128, 128, 128], help="sizes of the volume")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--try", dest="overrides", action="append", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--lines", action="store_true", help="instructions of the hot loop by source line")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    options.overrides = trials(options.overrides)
    asked = (options.capability, options.classes, options.dtype, options.layout, options.op, options.case)
    other_size = options.space != [128, 128, 128] or options.samples != 2
    options.restricted = any(asked) or other_size
    if math.prod(options.space) * options.samples < 1:
        parser.error(f"--space, --samples: got {options.space} and {options.samples}, expected sizes above 0")
    return options


if __name__ == "__main__":
    main()
