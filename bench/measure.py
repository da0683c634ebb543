"""Clocks and meters. Imports nothing of bench, so that tests can use it alone."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Environments of the C library's allocator. By default glibc maps every large block anew (above a
# threshold that never exceeds 32 MiB) and gives it back on free, so each fresh gradient costs a
# page fault per 4 KiB. Raised, blocks come from a heap that only grows.
ALLOCATORS: dict[str, dict[str, str]] = {
    "raised": {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 35),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
    "default": {},
}


@dataclass(frozen=True)
class Step:
    """One training step of a loss, in the two halves that are timed.

    Whatever the halves return is kept alive until the next step, as a network would keep it.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one step, and the page faults it took (0 on other devices than the CPU)."""

    forward: float
    backward: float
    minor_faults: int

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Stats:
    median: float
    min: float
    iqr: float


@dataclass(frozen=True)
class Memory:
    """Bytes allocated beyond what was alive before, by ``profiled_memory``.

    forward_peak: most at any time in forward. kept: left alive by forward for backward (the loss
    itself included). backward_peak: most at any time in backward, over what was alive at its start;
    the gradient is part of it.
    """

    forward_peak: int
    kept: int
    backward_peak: int

    @property
    def peak(self) -> int:
        """Most at any time of the step, over what was alive before it."""
        return max(self.forward_peak, self.kept + self.backward_peak)


@dataclass(frozen=True)
class Resident:
    """Bytes of physical memory beyond those before, by ``subprocess_resident``."""

    peak: int
    kept: int


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    device: str = "cpu",
    warm_up: int = 3,
    settle: int = 1,
    flush: Callable[[], None] | None = None,
) -> dict[str, list[Sample]]:
    """Time the steps in turn, a b c a b c ..., so that a slow minute of the machine hits all alike.

    Before the first round every step runs ``warm_up`` times. Before each timed step the same step
    runs ``settle`` times untimed: what a neighbour left in the caches then is nobody's gain or
    loss. ``flush`` runs after those, right before each half.
    """
    clock = _time_on_gpu if torch.device(device).type == "cuda" else _time_on_cpu
    for step in steps.values():
        for _ in range(warm_up):
            step.backward(step.forward())
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for _ in range(settle):
                step.backward(step.forward())
            samples[name].append(clock(step, flush or (lambda: None)))
    return samples


def summarise(values: list[float]) -> Stats:
    """Median, minimum and the distance of the quartiles."""
    if len(values) == 1:
        return Stats(values[0], values[0], 0.0)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Stats(middle, min(values), high - low)


def minor_faults() -> int:
    """Page faults without disk access of this process so far: one per fresh page touched."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def fill_heap(size: int) -> None:
    """Touch ``size`` bytes of heap and free them.

    With the raised thresholds they stay with the process, and later blocks are cut from pages that
    exist. With the default ones they go back to the system.
    """
    torch.empty(size, dtype=torch.uint8).fill_(1)


def profiled_memory(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], Any] = Tensor.backward
) -> Memory:
    """Bytes that a step allocates, from the memory events of torch.profiler.

    Counts what goes through torch's allocators on any device; memory that a C++ library takes by
    itself shows only in ``subprocess_resident``. ``backward`` gets forward's result; what it
    returns stays alive to the end. Start without a ``.grad``: a sum into an old one allocates
    nothing. Run the step once before, or caches filled by a first call count as kept.
    """
    gc.collect()
    loss, first = _memory_events(forward)
    _gradient, second = _memory_events(lambda: backward(loss))
    forward_peak, kept = _peak_and_end(first)
    backward_peak, _ = _peak_and_end(second)
    return Memory(forward_peak, kept, backward_peak)


def allocated_memory(forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Memory:
    """As ``profiled_memory``, from the counters of the CUDA allocator: bytes asked for, not rounded up."""

    def measured(call: Callable[[], Any]) -> tuple[Any, int, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = call()
        after = torch.cuda.memory_stats()
        kept = after["requested_bytes.all.current"] - before
        return result, after["requested_bytes.all.peak"] - before, kept

    gc.collect()
    loss, forward_peak, kept = measured(forward)
    _gradient, backward_peak, _ = measured(lambda: backward(loss))
    return Memory(forward_peak, kept, backward_peak)


def copy_bandwidth(size: int = 1 << 31, rounds: int = 20) -> dict[str, float]:
    """Gigabytes per second, read plus written, of a copy of ``size`` bytes on the GPU: what memory can do."""
    source = torch.empty(size // 4, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    copy = Step(lambda: target.copy_(source), lambda _: None)
    taken = [sample.forward for sample in interleave({"": copy}, rounds, "cuda")[""]]
    return {
        "bytes": 2 * size,
        "gb_per_s": 2 * size / statistics.median(taken) / 1e6,
        "best_gb_per_s": 2 * size / min(taken) / 1e6,
    }


def empty_launches(count: int = 3, rounds: int = 50) -> float:
    """Milliseconds of ``count`` kernels that do nothing, one after the other (median)."""
    import triton

    @triton.jit
    def nothing():
        pass

    def launch() -> None:
        for _ in range(count):
            nothing[(1,)]()

    taken = interleave({"": Step(launch, lambda _: None)}, rounds, "cuda")[""]
    return statistics.median(sample.forward for sample in taken)


def subprocess_resident(code: str, setup: str = "", threads: int | None = None) -> Resident:
    """Growth of the physical memory of a fresh Python process while it runs ``code``.

    ``setup`` runs first and is not counted; ``code`` sees its names. Library code touched for the
    first time counts as memory too, so let setup run the step once. Freed blocks go back to the
    system at once here (the C library's thresholds are lowered), so that the resident size is what
    is alive. Precise to about half a megabyte: the kernel counts pages in batches per core.

    The peak is VmHWM of /proc, the counter behind getrusage's ru_maxrss; that one is unusable here,
    as a process started by a larger one inherits its parent's peak. RuntimeError where /proc cannot
    reset the counter (not Linux, or a locked-down container) or when the code fails.
    """
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    job = json.dumps({"setup": setup, "code": code})
    done = subprocess.run(
        [sys.executable, "-c", _RESIDENT_CHILD],
        input=job,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"resident size: the subprocess failed:\n{done.stderr}")
    before, peak, after = map(int, done.stdout.rsplit("\n", 2)[-2].split())
    return Resident(peak - before, after - before)


def subprocess_peak(code: str, setup: str = "", threads: int | None = None) -> int:
    """``subprocess_resident(...).peak``, in bytes."""
    return subprocess_resident(code, setup, threads).peak


_RESIDENT_CHILD = """
import gc, json, sys
def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key + ":"))
job = json.load(sys.stdin)
names = {"__name__": "__main__"}
exec(job["setup"], names)
code = compile(job["code"], "<code>", "exec")
gc.collect()
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = kilobytes("VmRSS")
exec(code, names)
peak, after = kilobytes("VmHWM"), kilobytes("VmRSS")
print()
print(1024 * before, 1024 * peak, 1024 * after)
"""


def _time_on_cpu(step: Step, flush: Callable[[], Any]) -> Sample:
    flush()
    faults = minor_faults()
    start = time.perf_counter()
    loss = step.forward()
    middle = time.perf_counter()
    faults = minor_faults() - faults
    flush()
    faults_before = minor_faults()
    again = time.perf_counter()
    # Bound to a name: freeing the gradient is the optimizer's time, not the loss's.
    _gradient = step.backward(loss)
    end = time.perf_counter()
    faults += minor_faults() - faults_before
    return Sample(1e3 * (middle - start), 1e3 * (end - again), faults)


# About a millisecond of a GPU. Meanwhile the host queues all launches of a half, which then follow each
# other as in a training step with work ahead of it: the events see no gap that is the host's.
LEAD_CYCLES = 2_000_000


def _time_on_gpu(step: Step, flush: Callable[[], Any]) -> Sample:
    start, middle, again, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
    torch.cuda.synchronize()
    flush()
    torch.cuda._sleep(LEAD_CYCLES)
    start.record()
    loss = step.forward()
    middle.record()
    flush()
    torch.cuda._sleep(LEAD_CYCLES)
    again.record()
    _gradient = step.backward(loss)
    end.record()
    torch.cuda.synchronize()
    return Sample(start.elapsed_time(middle), again.elapsed_time(end), 0)


def _memory_events(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """The call's result, and the bytes of each allocation (+) and release (-) in order of time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    recorded = profile.profiler.kineto_results.events()
    events = [event for event in recorded if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


def _peak_and_end(changes: list[int]) -> tuple[int, int]:
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak, total
