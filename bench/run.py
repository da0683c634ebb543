"""``python -m bench.run``: measure a suite, write its JSON, print its tables.

Every allocator mode is a process of its own (its environment is read when the process starts), and
all contenders of a case are timed interleaved in that one process. On a GPU there is one mode, and the
file is written again after each case. See README.md for the method.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure, schema
from bench.cases import SUITES, Case, Suite

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"bench: suite {options.suite!r} needs a CUDA device, and torch {torch.__version__} "
            "sees none here. Run it on a GPU node (bash bench/gpu.sh), or a suite of the CPU: "
            "python -m bench.run --suite cpu"
        )
    torch.set_num_threads(options.threads)
    if options.worker:
        options.worker.write_text(json.dumps(_work(options, lambda rows: None)))
        return
    # Here, so that --help needs no package of the extra.
    try:
        from bench import report
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"bench: package {error.name!r} is not installed. In the clone run: pip install "
            '--no-build-isolation ".[bench]"'
        ) from error
    print(announced(options), file=sys.stderr, flush=True)

    document = schema.describe(**{key: getattr(options, key) for key in schema.ASKED})
    document |= {"allocators": {}, "timings": [], "memory": []}
    if asked := asked_backends(options):
        document["backends"] = {name: refusal(name, options.device) for name in asked}
    if options.device == "cuda":
        path = _run_on_gpu(options, document)
    else:
        for allocator in options.allocators:
            document["allocators"][allocator] = measure.ALLOCATORS[allocator]
            rows = _run_worker(options, allocator)
            document["timings"] += rows["timings"]
            document["memory"] += rows["memory"]
        path = schema.save(document, options.out)
    print(report.render(document))
    print(f"written: {path}")


LAUNCHES = 3


def announced(options: argparse.Namespace) -> str:
    """Which backends of ours will be measured; refuses to measure the eager one that nobody asked for."""
    from dicekernels.dispatch import forced_backend
    from dicekernels.env import backend_line, chosen_backend

    if asked := asked_backends(options):
        return f"backends: {', '.join(asked)}"
    name, reason = chosen_backend(options.device)
    if name == "eager" and forced_backend() is None:
        raise SystemExit(
            f"bench: backend 'auto' is the eager one here ({reason}). Its times would say nothing of the "
            "kernels: build them, or measure it with --backend eager"
        )
    return backend_line(options.device)


def _run_on_gpu(options: argparse.Namespace, document: schema.Document) -> Path:
    """Measures in this process, since nothing of it is read from the environment; saves after each case."""
    # Kineto and the compiler read these when they start.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    document["allocators"] = {name: measure.ALLOCATORS[name] for name in options.allocators}
    document["ceiling"] = {
        "copy": measure.copy_bandwidth(),
        "empty_launches": {"count": LAUNCHES, "milliseconds": measure.empty_launches(LAUNCHES)},
    }
    torch.cuda.empty_cache()

    def save(rows: dict[str, list[Row]]) -> None:
        document.update(rows, finished=False)
        schema.save(document, options.out)

    from bench import report

    rows = _work(options, save)
    asked = {case.name for case in chosen_cases(SUITES[options.suite], options.cases)}
    document.update(rows, finished={report.name_of(row) for row in rows["timings"]} == asked)
    return schema.save(document, options.out)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the suite's own")
    parser.add_argument(
        "--backend",
        default="auto",
        help="backend of dicekernels to force, or several between commas that compete; auto: the suite's "
        "own, or what is chosen for the case",
    )
    parser.add_argument("--out", type=Path, default=schema.ROOT / "bench" / "results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="default: the suite's own")
    parser.add_argument("--cases", default="", help="only cases whose name has this regex")
    parser.add_argument("--allocators", nargs="+", choices=measure.ALLOCATORS)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--memory", choices=["none", "profiled", "resident"])
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; then no case starts")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    suite = SUITES[options.suite]
    options.device = options.device or suite.device or "cpu"
    if suite.device not in (None, options.device):
        parser.error(f"--device: got {options.device}, suite {options.suite} is for {suite.device}")
    options.rounds = options.rounds or suite.rounds
    # The C library's allocator does not serve a GPU's memory.
    both = ["raised", "default"] if options.device == "cpu" else ["default"]
    options.allocators = options.allocators or both
    if options.compiled is None:
        options.compiled = suite.compiled
    options.memory = options.memory or suite.memory
    if options.memory == "resident" and options.device != "cpu":
        parser.error("--memory resident: only the CPU's memory is resident; use profiled")
    if not chosen_cases(suite, options.cases):
        parser.error(f"--cases: {options.cases!r} matches no case of suite {options.suite}")
    return options


def chosen_cases(suite: Suite, pattern: str) -> list[Case]:
    return [case for case in suite.cases if re.search(pattern, case.name)]


def _run_worker(options: argparse.Namespace, allocator: str) -> dict[str, list[Row]]:
    # Memory is counted in bytes asked for, alike under both allocators: once is enough.
    memory = options.memory if allocator == options.allocators[-1] else "none"
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.run", "--worker", str(rows)]
        for name in ("suite", "device", "backend", "threads", "rounds", "cases", "budget"):
            command += [f"--{name}={getattr(options, name)}"]
        command += [f"--allocators={allocator}", f"--memory={memory}"]
        command += ["--compiled" if options.compiled else "--no-compiled"]
        settings = ("MALLOC_", "GLIBC_TUNABLES")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(settings)}
        environment |= measure.ALLOCATORS[allocator]
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # Kineto logs two lines to stderr for every profile it takes.
        environment.setdefault("KINETO_LOG_LEVEL", "99")
        code = subprocess.run(command, env=environment).returncode
        if code:
            raise SystemExit(f"bench: the run with allocator {allocator!r} failed, see above: {code}")
        found: dict[str, list[Row]] = json.loads(rows.read_text())
    return found


def _work(
    options: argparse.Namespace, after_case: Callable[[dict[str, list[Row]]], None]
) -> dict[str, list[Row]]:
    """Rows of all cases under the allocator that this process was started with; at least of one."""
    end = time.monotonic() + options.budget
    (allocator,) = options.allocators
    suite = replace(
        SUITES[options.suite],
        rounds=options.rounds,
        compiled=options.compiled,
        memory=options.memory,
    )
    backends = usable_backends(options)
    timings: list[Row] = []
    memory: list[Row] = []
    cases = chosen_cases(suite, options.cases)
    for number, case in enumerate(cases, start=1):
        if timings and time.monotonic() > end:
            print(f"bench: no time left for {len(cases) - number + 1} cases", file=sys.stderr)
            break
        print(f"[{allocator} {number}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        try:
            found = measure_case(case, suite, options.device, backends, allocator)
        except torch.OutOfMemoryError as error:
            rows = [_timing_row(case, allocator, role, role, case.floor_bytes) for role in ("ours", "floor")]
            found = [row | {"error": f"OutOfMemoryError: {error}"} for row in rows], []
        timings += found[0]
        memory += found[1]
        after_case({"timings": timings, "memory": memory})
    return {"timings": timings, "memory": memory}


def asked_backends(options: argparse.Namespace) -> tuple[str, ...]:
    """Backends of ours that compete, by name; none: each case takes what is chosen for it."""
    if options.backend == "auto":
        return SUITES[options.suite].backends
    return tuple(options.backend.split(","))


def refusal(backend: str, device: str) -> str:
    """ "" or why a backend cannot run on the device."""
    from dicekernels import unavailable_backends
    from dicekernels.dispatch import BACKENDS

    if backend not in BACKENDS:
        return "no backend has this name"
    return unavailable_backends().get(backend) or BACKENDS[backend].can_run(device, torch.float32, 4)


def usable_backends(options: argparse.Namespace) -> list[str]:
    """The asked ones that can run; those that the caller named have to."""
    reasons = {name: refusal(name, options.device) for name in asked_backends(options)}
    usable = [name for name, reason in reasons.items() if not reason]
    for name, reason in reasons.items():
        if reason and options.backend != "auto":
            from dicekernels.dispatch import BACKENDS

            able = [known for known in BACKENDS if not refusal(known, options.device)]
            raise SystemExit(
                f"bench: --backend: got {name!r}, which cannot run here: {reason}. Expected 'auto' or "
                f"some of {able}"
            )
        if reason:
            print(f"bench: not measured: backend {name!r}: {reason}", file=sys.stderr)
    if reasons and not usable:
        raise SystemExit(f"bench: suite {options.suite!r}: none of its backends runs here: {reasons}")
    return usable


def measure_case(
    case: Case, suite: Suite, device: str, backends: list[str], allocator: str
) -> tuple[list[Row], list[Row]]:
    """Rows of time and of memory. Who fails the check is timed, but no ratio is printed for it."""
    from bench import peers

    # Compiled code of earlier cases counts against dynamo's limit of recompilations, after which
    # it would run eagerly without a word.
    torch._dynamo.reset()
    if allocator == "raised":
        measure.fill_heap(16 * case.logits_bytes)
    logits, labels = case.tensors(device)
    checker = peers.Checker(case, logits, labels)
    found = peers.contenders(case, backends, suite.compiled, suite.monai)
    steps, rows = {}, {}
    for contender in found:
        row = _timing_row(case, allocator, contender.name, contender.role, case.floor_bytes)
        if contender.backend is not None:
            row["backend"] = contender.backend
        rows[contender.name] = row
        # A peer that cannot run is a result too; the others go on.
        try:
            row["check"] = asdict(checker.check(contender.loss))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            continue
        steps[contender.name] = loss_step(contender.loss, logits, labels)
    del checker

    floor, name = floor_step(logits, device)
    rows[name] = _timing_row(case, allocator, name, "floor", 3 * case.logits_bytes)
    flush = l2_flush() if device == "cuda" else None
    samples = measure.interleave(steps | {name: floor}, suite.rounds, device, flush=flush)
    for contender_name, taken in samples.items():
        row = rows[contender_name]
        row["milliseconds"] = {
            part: asdict(measure.summarise([getattr(sample, part) for sample in taken]))
            for part in ("forward", "backward", "both")
        }
        if device == "cpu":
            faults = [float(sample.minor_faults) for sample in taken]
            row["minor_faults"] = measure.summarise(faults).median
    memory = [
        memory_row(case, contender, steps[contender.name], suite.memory == "resident", device)
        for contender in found
        if contender.name in steps and suite.memory != "none"
    ]
    return list(rows.values()), memory


def loss_step(loss: Any, logits: Tensor, labels: Tensor) -> measure.Step:
    """The gradient that comes in exists beforehand: in a training the ops after the loss made it."""
    ones: dict[torch.dtype, Tensor] = {}

    def backward(value: Tensor) -> Tensor:
        if value.dtype not in ones:
            ones[value.dtype] = torch.ones_like(value)
        return torch.autograd.grad(value, logits, ones[value.dtype])[0]

    return measure.Step(lambda: loss(logits, labels), backward)


def floor_step(logits: Tensor, device: str) -> tuple[measure.Step, str]:
    """The traffic of the floor without the work: read the logits; read them and write a gradient.

    The gradient's memory exists beforehand. Of the plain ways to do either half, the fastest here.
    The logits must be dense in some layout; they are taken as one row, half precision in words of
    four bytes, since its arithmetic is slower than memory on a CPU.
    """
    data = logits.detach().as_strided((logits.numel(),), (1,))
    if data.itemsize == 2 and data.numel() % 2 == 0:
        data = data.view(torch.int32)
    gradient = torch.empty_like(data)
    readers = {
        "sum": lambda: torch.sum(data),
        "amax": lambda: torch.amax(data),
        "max": lambda: torch.max(data),
    }
    writers = {
        "mul": lambda: torch.mul(data, 2, out=gradient),
        "neg": lambda: torch.neg(data, out=gradient),
        "copy": lambda: gradient.copy_(data),
    }
    alone = {name: measure.Step(half, lambda _: None) for name, half in (readers | writers).items()}
    samples = measure.interleave(alone, 7, device)
    times = {name: min(sample.forward for sample in taken) for name, taken in samples.items()}
    reader, writer = min(readers, key=times.__getitem__), min(writers, key=times.__getitem__)
    step = measure.Step(readers[reader], lambda _: writers[writer]())
    return step, f"floor ({reader}, {writer})"


def l2_flush() -> Callable[[], Any]:
    """Evict the GPU's L2 cache, which holds a small volume whole: times are those of cold data.

    By reading: lines that were written would go back to memory in the time of the step that follows.
    """
    waste = torch.zeros(1 << 27, dtype=torch.int32, device="cuda")
    return lambda: torch.amax(waste)


def memory_row(case: Case, contender: Any, step: measure.Step, resident: bool, device: str) -> Row:
    meter = measure.allocated_memory if device == "cuda" else measure.profiled_memory
    profiled = meter(step.forward, step.backward)
    sizes = None
    if resident and contender.role in ("ours", "eager"):
        setup = _RESIDENT_SETUP.format(case=case, role=contender.role)
        threads = torch.get_num_threads()
        forward = measure.subprocess_resident("loss = step.forward()", setup, threads)
        whole = "loss = step.forward(); gradient = step.backward(loss)"
        both = measure.subprocess_resident(whole, setup, threads)
        sizes = {"forward_peak": forward.peak, "kept": forward.kept, "peak": both.peak}
    return {
        "case": case.as_json(),
        "contender": contender.name,
        "logits_bytes": case.logits_bytes,
        "profiled": asdict(profiled),
        "resident": sizes,
    }


_RESIDENT_SETUP = """
from bench import peers, run
from bench.cases import Case
case = {case!r}
loss = peers.ours(case) if {role!r} == "ours" else peers.monai_loss(case)
step = run.loss_step(loss, *case.tensors("cpu"))
step.backward(step.forward())
"""


def _timing_row(case: Case, allocator: str, name: str, role: str, traffic: int) -> Row:
    return {
        "case": case.as_json(),
        "allocator": allocator,
        "contender": name,
        "role": role,
        "traffic_bytes": traffic,
        "check": None,
        "error": "",
        "milliseconds": None,
        "minor_faults": None,
    }


if __name__ == "__main__":
    main()
