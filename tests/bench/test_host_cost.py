"""What a call costs the host when the volume is too small to matter.

`pytest tests/bench/test_host_cost.py --benchmark-only` prints the times (pytest-benchmark). What is
asserted is the number of operators dispatched, which a busy machine does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dicekernels

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
