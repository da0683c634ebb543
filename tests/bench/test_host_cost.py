"""What a call costs the host when the volume is too small to matter.

`pytest tests/bench/test_host_cost.py --benchmark-only` prints the times (pytest-benchmark). What is
asserted is the number of operators dispatched, which a busy machine does not change.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dicekernels
from bench import host_cost, schema

monai_losses = pytest.importorskip("monai.losses")
pytest.importorskip("pytest_benchmark")

LOSSES = ["DiceLoss", "DiceCELoss", "GeneralizedDiceLoss", "TverskyLoss"]
LIBRARIES = {"dicekernels": dicekernels, "monai": monai_losses}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Waking a thread pool costs more than the call, and is not the call's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Operators(TorchDispatchMode):
    """Names of the operators called, views and other bookkeeping included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _step(library: str, name: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward on 512 voxels of 4 classes: (loss, gradient)."""
    loss = getattr(LIBRARIES[library], name)(to_onehot_y=True, softmax=True)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 8, 8, 8, generator=generator).requires_grad_()
    labels = torch.randint(4, (1, 1, 8, 8, 8), generator=generator).to(torch.uint8)

    def step() -> tuple[Tensor, Tensor]:
        value = loss(logits, labels)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    return step


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_host_time_of_a_step(benchmark: Any, library: str, name: str) -> None:
    benchmark.group = name
    value, gradient = benchmark.pedantic(_step(library, name), rounds=50, iterations=5, warmup_rounds=5)
    peer_value, peer_gradient = _step("monai", name)()
    # One ulp of the values near 1 and, for the gradient, of its largest element, eight times.
    eps = torch.finfo(torch.float32).eps
    assert abs(value - peer_value) <= 8 * eps * peer_value.abs()
    assert (gradient - peer_gradient).abs().max() <= 8 * eps * peer_gradient.abs().max()


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_dispatches_fewer_operators_than_monai(name: str) -> None:
    if "cpu" not in dicekernels.available_backends():
        pytest.skip("the fused CPU operators are not built")
    counted = {}
    for library in LIBRARIES:
        step = _step(library, name)
        step()
        with _Operators() as operators:
            step()
        counted[library] = operators.names
    assert 2 * len(counted["dicekernels"]) <= len(counted["monai"]), counted["dicekernels"]


def test_ours_over_the_empty_op_as_a_part_of_the_others() -> None:
    taken = {"ours": [30.0, 40.0, 50.0], "ours, empty op": [10.0, 20.0, 10.0]}
    taken |= {"monai": [90.0, 120.0, 200.0], "monai, empty op": [10.0, 20.0, 40.0]}
    options = argparse.Namespace(backend="cpu", against=None, rounds=3, steps=1)
    found = host_cost.compared(taken, options)
    assert found["over"]["ours"] == {"median": 20.0, "min": 20.0, "lower": 20.0, "upper": 40.0}
    # 20 / 80, 20 / 100 and 40 / 160
    assert found["ours over"]["monai"] == {"median": 0.25, "min": 0.2, "lower": 0.2, "upper": 0.25}
    taken |= {"against": [60.0, 70.0, 60.0], "against, empty op": [10.0, 20.0, 10.0]}
    found = host_cost.compared(taken, options)
    assert found["ours over"]["against"]["median"] == 0.4
    assert "ours 40 µs, over an empty op 20 (20 to 40)" in host_cost.line(found)
    assert "0.40 (0.40 to 0.80) of against; ours is 0.25 (0.20 to 0.25) of monai" in host_cost.line(found)


def test_another_checkout_is_measured_beside_this_one(tmp_path: Path) -> None:
    if "cpu" not in dicekernels.available_backends():
        pytest.skip("the fused CPU operators are not built")
    asked = ["--backend=cpu", f"--against={schema.ROOT}", "--rounds=2", "--steps=1", f"--out={tmp_path}"]
    host_cost.main(asked)
    found = json.loads((tmp_path / "host-cost-cpu.json").read_text())
    assert found["against"] == found["commit"]
    assert set(found["ours over"]) == {"against", "monai"}
    names = {f"{name}{empty}" for name in ("ours", "against", "monai") for empty in ("", ", empty op")}
    assert set(found["microseconds"]) == names
    assert all(times["min"] > 0 for times in found["microseconds"].values())


def test_a_package_from_elsewhere_is_not_measured_for_a_checkout(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = pytest.raises(RuntimeError, match=r"ours: expected loss and gradient \[\], got \[\]")
    with refused, contextlib.ExitStack() as stack:
        host_cost.processes(stack, {"ours": (tmp_path, "dicekernels")})
    assert f"expected dicekernels and its CPU library in {tmp_path}" in capfd.readouterr().err


@pytest.mark.parametrize("path", list((schema.ROOT / "bench" / "results").glob("host-cost-cpu.json")))
def test_measured_cost_is_a_quarter_of_monais(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["ours over"]["monai"]["median"] <= host_cost.MONAI_LIMIT, host_cost.line(found)
