"""The limit on what a step of the Triton backend costs the host: bench/host_cost.py.

A busy machine changes every time, so functions are counted here, and what was timed is in bench/results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("jsonschema")

import triton

from bench import host_cost
from bench.gpu.offline import idle_launcher, target
from dicekernels.backends.triton import launch

RESULTS = Path(__file__).parents[2] / "bench" / "results"
compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET: run again without it")


@compiles
def test_a_second_step_plans_nothing_and_calls_little(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[str] = []
    plain = launch.Launch.run

    def run(self: launch.Launch, device: torch.device) -> Any:
        planned.append(self.kernel.__name__)
        return plain(self, device)

    monkeypatch.setattr(launch.Launch, "run", run)
    with target(90, idle_launcher), host_cost.chosen("cpu", "triton"):
        steps = host_cost.contenders("cpu")
        counts = {name: _calls(steps[name]) for name in (host_cost.OURS, host_cost.EMPTY)}
    assert planned == ["sums_kernel", "finish_kernel", "sums_backward_kernel"]
    # 0.5 to 1 microsecond each; without remembering it is several hundred.
    assert counts[host_cost.OURS] - counts[host_cost.EMPTY] <= 100, counts


def _calls(step: Callable[[], Any]) -> int:
    """Python functions that a warm step calls."""
    step()
    count = 0

    def profiler(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profiler)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("path", sorted(RESULTS.glob("host-cost-triton--*.json")), ids=lambda path: path.stem)
def test_measured_cost_is_within_the_limit(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["limit"] == host_cost.LIMIT == 100.0
    assert found["met"] and found["over"][host_cost.EMPTY] <= found["limit"], host_cost.line(found)


def test_the_cost_was_measured() -> None:
    assert list(RESULTS.glob("host-cost-triton--*.json"))
