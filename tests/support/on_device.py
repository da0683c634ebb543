"""A plugin that runs the contract of the backends on a GPU: ``bash bench/gpu.sh`` does.

    DICEKERNELS_TEST_DEVICE=cuda PYTHONPATH=tests/support python -m pytest -p on_device \
        -m "not slow" $(PYTHONPATH=tests/support python -m on_device)

The problems of cases.py are then tensors of that device, and so are those that tests make by themselves.
``oracle_rows`` computes on the CPU; the losses of ``dicekernels.reference`` run in float64 on the device. A
default device would hide where the package makes a tensor without naming one: test_cuda.py has none.

``DICEKERNELS_BACKEND`` restricts it to the tests of one backend. Tests that name none take what is chosen
for them, and belong to the first backend that a GPU has here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

MODULES = ("sums", "finish", "numerics", "ops", "compile", "transforms", "determinism")
# The kernels of csrc/cuda alone, plan by plan.
CUDA_MODULES = ("cuda_kernels", "cuda_kernels_launch")
# Tests by name, and why they do not speak of this device.
NOT_HERE = {
    "test_labels_out_of_range_are_counted_and_located": "no error where it costs a wait; see test_cuda.py",
    "test_labels_out_of_range_are_an_error_there_too": "no error where it costs a wait; see test_cuda.py",
    "test_generalized_dice_weights_below_float32": "calls the op of the CPU",
    "test_offsets_beyond_two_to_the_31": "maps a file into the memory of the CPU; see test_cuda.py",
    "test_a_target_that_requires_grad": "forces the backend of the CPU",
    "test_a_mask_that_requires_grad": "forces the backend of the CPU",
    "test_region_sums_of_a_target_that_requires_grad": "forces the backend of the CPU",
    "test_a_forced_backend_that_cannot_run_gives_its_reason": "forces the backend of the CPU",
    "test_the_forced_backend_is_the_one_that_runs": "forces the backend of the CPU",
    "test_autocast": "autocast of the CPU; see test_cuda.py",
    "test_a_network_with_its_loss_in_one_graph": "cuDNN's convolutions promise no bits",
    "test_a_layout_does_not_change_the_bits": "layouts have tiles of their own, which order the sums",
    "test_the_same_bits_on_any_number_of_threads_and_twice": "threads of the CPU; see test_cuda.py",
    "test_every_cpu_level_keeps_the_bound": "instruction sets of the CPU",
    "test_an_unknown_level_is_refused": "instruction sets of the CPU",
}
# These call the namespace of the CUDA backend, and name no backend.
OF_CUDA = ("test_wrong_lengths_are_refused", "test_cpp_equals_its_twin_and_the_twins_autograd")


class Generator(torch.Generator):
    """``torch.Generator()`` of the default device, as the tensors are that it draws."""

    def __new__(cls, device: Any = None) -> Generator:
        return super().__new__(cls, torch.get_default_device() if device is None else device)


def pytest_configure() -> None:
    device = os.environ.get("DICEKERNELS_TEST_DEVICE", "cpu")
    if device == "cpu":
        raise pytest.UsageError("on_device: DICEKERNELS_TEST_DEVICE names no other device; set it to cuda")
    torch.set_default_device(device)
    torch.Generator = Generator


def _backend_of(item: pytest.Item) -> str | None:
    """What the fixture ``backend`` forces for a test."""
    call = getattr(item, "callspec", None)
    return None if call is None else call.params.get("backend")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from dicekernels import available_backends, dispatch, unavailable_backends

    chosen = dispatch.forced_backend()
    if chosen is not None:
        # The fixture forces it where a test speaks of it; the others are free to choose.
        dispatch.force_backend(None)
        first = next(name for name in ("cuda", "triton", "eager") if name in available_backends())
        groups: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            groups[(_backend_of(item) or first) == chosen].append(item)
        items[:] = groups[True]
        config.hook.pytest_deselected(items=groups[False])
    for item in items:
        name, _, parameters = item.name.partition("[")
        if name in NOT_HERE:
            item.add_marker(pytest.mark.skip(reason=NOT_HERE[name]))
        elif name in OF_CUDA and "cuda" not in available_backends():
            reason = f"backend 'cuda': {unavailable_backends()['cuda']}"
            item.add_marker(pytest.mark.skip(reason=reason))
        elif "cpu" in parameters.rstrip("]").split("-"):
            item.add_marker(pytest.mark.skip(reason="the backend of the CPU"))


if __name__ == "__main__":
    modules = CUDA_MODULES if sys.argv[1:] == ["cuda_kernels"] else MODULES
    tests = Path(__file__).parents[1]
    print(*(f"tests/{next(tests.glob(f'*/test_{name}.py')).relative_to(tests)}" for name in modules))
