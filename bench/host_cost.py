"""``python -m bench.host_cost``: what a step of a backend costs the host, beside an empty op.

A step is DiceCE forward and backward on 512 voxels of 4 classes. The empty op is registered as ours are
(torch.library, an autograd of its own) and only allocates what it returns. Contenders take turns, a round
each; the figures are medians over the rounds of a round's mean.

triton, cuda: with a GPU real launches. Without one: tensors of the CPU, kernels compiled for sm_90, and a
launcher that returns at once: packing the arguments in C and cuLaunchKernelEx are missing from the figures.
cpu: ``DiceCELoss`` of this checkout, of another one (``--against``, its compiled library included) and of
MONAI, each in a process of its own and beside an empty op there.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import json
import operator
import os
import pstats
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import dicekernels
from bench import schema
from dicekernels import dispatch
from dicekernels.autograd import fused_loss
from dicekernels.backends import eager
from dicekernels.call import Call, observed

LIMIT = 100.0  # microseconds over the empty op
MONAI_LIMIT = 0.25  # of MONAI's, both over the empty op
OURS, MODULE, EMPTY, CUSTOM = "ours", "ours, module", "empty op", "empty custom_op"
AGAINST, MONAI = "against", "monai"

Step = Callable[[], Any]
# Microseconds of a step, as the mean of so many.
Clock = Callable[[int], float]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20, help="of a contender in one round")
    parser.add_argument("--out", type=Path, help="folder for host-cost-<backend>--<device>.json or -cpu.json")
    parser.add_argument(
        "--backend", default="triton", help="cuda needs a GPU; eager: a dry run; cpu: see above"
    )
    parser.add_argument("--against", type=Path, help="for cpu: another checkout, as a git worktree")
    parser.add_argument("--profile", nargs="?", const=OURS, metavar="CONTENDER", help="cProfile of one")
    parser.add_argument("--top", type=int, default=30, help="lines of the profile")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() and options.backend != "cpu" else "cpu"
    name = "host-cost-cpu" if options.backend == "cpu" else f"host-cost-{options.backend}--{device}"
    with contextlib.ExitStack() as stack:
        if options.backend == "cpu":
            asked = {OURS: (schema.ROOT, "dicekernels"), MONAI: (schema.ROOT, "monai.losses")}
            if options.against:
                asked[AGAINST] = (options.against.resolve(), "dicekernels")
            clocks = processes(stack, asked)
            result = compared(measure(clocks, options.rounds, options.steps), options)
        else:
            stack.enter_context(chosen(device, options.backend))
            stack.enter_context(_offline(device))
            steps = contenders(device, options.backend)
            if options.profile:
                profile(steps[options.profile], options.top)
                return
            clocks = {name: clocked(step, device) for name, step in steps.items()}
            found = summary(measure(clocks, options.rounds, options.steps))
            result = described(found, device, options)
    print(json.dumps(result, indent=1))
    print(line(result))
    if options.out:
        path = options.out / f"{name}.json"
        schema.write(result, path)
        print(f"written: {path}")


def processes(stack: contextlib.ExitStack, asked: dict[str, tuple[Path, str]]) -> dict[str, Clock]:
    """Clocks of bench/host_steps.py for each (folder, module), and of an empty op beside it.

    RuntimeError: one ended, or its loss or gradient is another one than ours.
    """
    script = str(schema.ROOT / "bench" / "host_steps.py")
    # A library that the environment names would be loaded into every checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DICEKERNELS_")}
    clocks: dict[str, Clock] = {}
    results = {}
    for name, (folder, module) in asked.items():
        running = stack.enter_context(
            subprocess.Popen(
                [sys.executable, script, str(folder), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        assert running.stdin and running.stdout
        results[name] = [float(word) for word in running.stdout.readline().split()]
        if not results[name] or not np.allclose(results[name], results[OURS], rtol=1e-5):
            raise RuntimeError(f"{name}: expected loss and gradient {results[OURS]}, got {results[name]}")

        def clock(
            contender: str, count: int, stdin: IO[str] = running.stdin, stdout: IO[str] = running.stdout
        ) -> float:
            print(contender, count, file=stdin, flush=True)
            return float(stdout.readline())

        clocks[name] = functools.partial(clock, "loss")
        clocks[f"{name}, {EMPTY}"] = functools.partial(clock, "empty")
    return clocks


@contextlib.contextmanager
def chosen(device: str, backend: str) -> Iterator[None]:
    """Every loss takes the backend, without a GPU also one that refuses tensors of the CPU."""
    if device == "cuda":
        with dicekernels.use_backend(backend):
            yield
        return
    taken = replace(dispatch.BACKENDS["eager"], name=backend, namespace=_namespace(backend))
    choice = mock.patch.object(dispatch, "choose", lambda logits: taken)
    # The check of labels on the CPU would read what no kernel has written; on a GPU there is none.
    with choice, mock.patch.object(eager, "check_labels", lambda *_: None):
        yield


def _offline(device: str) -> contextlib.AbstractContextManager[Any]:
    """Launches reach the GPU, or the launcher of bench/gpu/offline.py."""
    if device == "cuda":
        return contextlib.nullcontext()
    from bench.gpu.offline import idle_launcher, target

    return target(90, idle_launcher)


def _namespace(backend: str) -> str:
    return dispatch.BACKENDS[backend].namespace


def contenders(device: str, backend: str = "triton") -> dict[str, Step]:
    """A step of each by name: (loss, gradient)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 8, 8, 8, generator=generator).to(device).requires_grad_()
    labels = torch.randint(4, (1, 1, 8, 8, 8), generator=generator).to(device, torch.uint8)
    loss = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True)
    calls: list[Any] = []
    with observed(calls.append):
        loss(logits, labels)
    (call,) = calls
    assert isinstance(call, Call), call
    tensors = (call.logits, call.target, call.mask, *call.weights)
    namespace = _namespace(backend)
    empty, custom = empty_op(call), empty_custom_op(call)

    def step(forward: Callable[[], Tensor]) -> Step:
        def run() -> tuple[Tensor, Tensor]:
            value = forward()
            return value, torch.autograd.grad(value, logits)[0]

        return run

    return {
        OURS: step(lambda: fused_loss(tensors, call.spec, namespace, call.dtype)),
        MODULE: step(lambda: loss(logits, labels)),
        EMPTY: step(lambda: empty(*tensors)[0]),
        CUSTOM: step(lambda: custom(*tensors)[0]),
    }


_TENSORS = "Tensor logits, Tensor target, Tensor? mask, Tensor? a, Tensor? b, Tensor? c, Tensor? d, Tensor? e"
# Definitions last as long as this object.
_library = torch.library.Library("dicekernels_bench", "FRAGMENT")


def _forward(logits: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss and coef, as the op ``loss`` of ours returns them."""
    coef = logits.new_empty((*logits.shape[:2], width), dtype=torch.float64)
    return logits.new_empty((), dtype=dtype), coef


def empty_op(call: Call) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registered as the ops of this package are: ``torch.library.Library``, and its register_autograd."""
    width, dtype = call.spec.sums.rows.bit_count(), call.dtype
    name = f"dicekernels_bench::empty_{width}"
    if not hasattr(torch.ops.dicekernels_bench, name.split("::")[1]):
        key = "CompositeExplicitAutograd"
        _library.define(f"empty_{width}({_TENSORS}) -> (Tensor, Tensor)")
        _library.impl(f"empty_{width}", lambda logits, *rest: _forward(logits, width, dtype), key)
        back = f"empty_{width}_backward"
        _library.define(f"{back}(Tensor grad, Tensor logits, Tensor target, Tensor coef) -> Tensor")
        _library.impl(back, lambda grad, logits, target, coef: torch.empty_like(logits), key)
        _add_autograd(name, getattr(torch.ops.dicekernels_bench, back), _library)
    op: Callable[..., tuple[Tensor, Tensor]] = getattr(torch.ops.dicekernels_bench, name.split("::")[1])
    return op


def empty_custom_op(call: Call) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same with ``torch.library.custom_op``, which checks its results for aliases on every call."""
    width, dtype = call.spec.sums.rows.bit_count(), call.dtype
    name = f"dicekernels_bench::custom_{width}"

    def forward(
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        c: Tensor | None,
        d: Tensor | None,
        e: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return _forward(logits, width, dtype)

    def backward(grad: Tensor, logits: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        return torch.empty_like(logits)

    for function in (forward, backward):
        function.__annotations__ = typing.get_type_hints(function)
    op = torch.library.custom_op(name, forward, mutates_args=())
    _add_autograd(name, torch.library.custom_op(f"{name}_backward", backward, mutates_args=()), None)
    return op


def _add_autograd(name: str, backward: Callable[..., Tensor], library: torch.library.Library | None) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1], output[1])

    def back(ctx: Any, grad: Tensor, _: Any) -> Any:
        return backward(grad, *ctx.saved_tensors), *(None,) * 7

    torch.library.register_autograd(name, back, setup_context=save, lib=library)


def clocked(step: Step, device: str) -> Clock:
    """A clock of a step in this process."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def clock(count: int) -> float:
        # The queue of the GPU starts empty, so that no launch waits for a place in it.
        wait()
        start = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - start) / count * 1e6

    return clock


def measure(clocks: dict[str, Clock], rounds: int, count: int) -> dict[str, list[float]]:
    """Microseconds of a step by contender, one figure a round; the order turns with the rounds."""
    for clock in clocks.values():
        clock(count)
    taken: dict[str, list[float]] = {name: [] for name in clocks}
    names = list(clocks)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(clocks[name](count))
    return taken


def summary(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Minimum and quartiles of each."""
    found = {}
    for name, figures in taken.items():
        lower, _, upper = statistics.quantiles(figures, n=4)
        median = statistics.median(figures)
        found[name] = {"median": median, "min": min(figures), "lower": lower, "upper": upper}
    return found


def described(found: dict[str, Any], device: str, options: argparse.Namespace) -> dict[str, Any]:
    over = {name: found[OURS]["median"] - found[name]["median"] for name in (EMPTY, CUSTOM)}
    # Other processes slow both down alike, and with them the difference; the minima are disturbed least.
    over_of_minima = found[OURS]["min"] - found[EMPTY]["min"]
    return _circumstances(device, options) | {
        "launch": "real" if device == "cuda" else "without packing in C and cuLaunchKernelEx",
        "microseconds": found,
        "over": over,
        "over_of_minima": over_of_minima,
        "limit": LIMIT,
        "met": over[EMPTY] <= LIMIT,
    }


def compared(taken: dict[str, list[float]], options: argparse.Namespace) -> dict[str, Any]:
    """The result for the CPU: each over its empty op, and ours as a part of the others' in the same round."""
    names = [name for name in (OURS, AGAINST, MONAI) if name in taken]
    over = {name: list(map(operator.sub, taken[name], taken[f"{name}, {EMPTY}"])) for name in names}
    ratios = {name: list(map(operator.truediv, over[OURS], over[name])) for name in names[1:]}
    return _circumstances("cpu", options) | {
        "against": options.against and (schema.git("rev-parse", "HEAD", folder=options.against) or "unknown"),
        "microseconds": summary(taken),
        "over": summary(over),
        "ours over": summary(ratios),
    }


def _circumstances(device: str, options: argparse.Namespace) -> dict[str, Any]:
    suite = f"host-cost-{options.backend}"
    where = schema.describe(suite, "", device, options.backend, threads=1, rounds=options.rounds)
    kept = ("suite", "date", "commit", "dirty", "device", "backend", "host", "rounds", "versions")
    return {key: where[key] for key in kept} | {"steps": options.steps}


def line(result: dict[str, Any]) -> str:
    """The result in words."""
    medians = {name: found["median"] for name, found in result["microseconds"].items()}
    if "ours over" in result:
        words = [
            f"{name} {medians[name]:.0f} µs, over an empty op {over['median']:.0f} "
            f"({over['lower']:.0f} to {over['upper']:.0f})"
            for name, over in result["over"].items()
        ]
        words += [
            f"ours is {ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f}) of {name}"
            for name, ratio in result["ours over"].items()
        ]
        return "forward + backward: " + "; ".join(words)
    verdict = "met" if result["met"] else "MISSED"
    note = "" if result["launch"] == "real" else f"; {result['launch']}"
    return (
        f"forward + backward: ours {medians[OURS]:.0f} µs, empty op {medians[EMPTY]:.0f} µs, difference "
        f"{result['over'][EMPTY]:.0f} µs, limit {result['limit']:.0f} µs: {verdict} "
        f"(of the minima {result['over_of_minima']:.0f} µs; as a module {medians[MODULE]:.0f} µs, empty "
        f"custom_op {medians[CUSTOM]:.0f} µs{note})"
    )


def profile(run: Step, top: int, steps: int = 2000) -> None:
    """The functions that take the most time themselves; on a GPU backward has a thread that is not seen."""
    for _ in range(50):
        run()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        run()
    profiler.disable()
    print(f"{steps} steps; divide by it")
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(top)


if __name__ == "__main__":
    main()
