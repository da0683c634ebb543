"""``python -m bench.gpu.prebuild``: compile the Triton kernels of a suite into Triton's cache, on every core.

A run of the suite then measures at once, and a short lease of a GPU is not spent on one compiling core.
``--capability 90`` compiles for a GPU that is not here (a dry run; the cache is then of no other use).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import dicekernels
from bench.cases import SUITES, Case
from bench.static.aot_cases import LOSSES, OPS, Problem
from dicekernels.call import Call, observed
from dicekernels.spec import LossSpec


@dataclass(frozen=True)
class SuiteProblem(Problem):
    """With the options of bench/peers.py; bench/static/aot_cases.py has others for the focal term."""

    @property
    def spec(self) -> LossSpec:
        return suite_spec(self.loss, self.classes)


@cache
def suite_spec(loss: str, classes: int) -> LossSpec:
    """What the functional layer makes of a contender of ours."""
    from bench.peers import ours

    case = Case(loss, (1, classes, 2, 2, 2))
    calls: list[Any] = []
    with dicekernels.use_backend("eager"), observed(calls.append):
        ours(case)(*case.tensors("cpu"))
    (call,) = calls
    assert isinstance(call, Call), call
    return call.spec


def problem_of(case: Case) -> Problem | None:
    """The case as bench/static/aot_cases.py has it, None for one that it does not know."""
    if case.loss not in LOSSES or case.label_dtype != "uint8":
        return None
    samples, classes, *space = case.shape
    kind = SuiteProblem if case.loss == "dice_focal" else Problem
    return kind(case.loss, classes, case.dtype, case.layout, samples, tuple(space))


def compile_op(task: tuple[Problem, str, int | None]) -> str:
    """ "" or why an op of a problem does not compile."""
    problem, op, capability = task
    with _target(capability):
        try:
            problem.plan(op).compile()
        except Exception as error:
            return f"{problem} {op}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def _target(capability: int | None) -> contextlib.AbstractContextManager[Any]:
    if capability is None:
        return contextlib.nullcontext()
    from bench.gpu.offline import target

    return target(capability)


def pool_of(workers: int) -> Any:
    """Processes that share Triton's cache with this one, and nothing else."""
    return multiprocessing.get_context("spawn").Pool(workers)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.prebuild", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="gpu")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--capability", type=int)
    parser.add_argument("--limit", type=int, help="problems; default: all")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    found = (problem_of(case) for case in SUITES[options.suite].cases)
    problems = [problem for problem in dict.fromkeys(found) if problem is not None][: options.limit]
    tasks = [(problem, op, options.capability) for problem in problems for op in OPS]
    with pool_of(options.workers) as pool:
        complaints = [said for said in pool.imap_unordered(compile_op, tasks) if said]
    print(
        f"{len(tasks)} kernels compiled or found in {time.monotonic() - start:.0f} s", *complaints, sep="\n"
    )


if __name__ == "__main__":
    main()
