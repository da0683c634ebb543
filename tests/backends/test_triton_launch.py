"""Remembered launches of the Triton backend: what a later call starts is what a plan of its own would start.

On tensors of the CPU, with kernels compiled for a GPU that is not here and a launcher that writes down what
reaches it. Under TRITON_INTERPRET=1 nothing is remembered.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.runtime import driver

from bench.gpu.offline import target
from dicekernels.backends import triton as backend
from dicekernels.backends.triton import finish as finish_module
from dicekernels.backends.triton import launch
from dicekernels.spec import (
    BAD,
    OVERLAP_ROWS,
    POS,
    Activation,
    Denominator,
    FinishSpec,
    Formula,
    G,
    N,
    SumsSpec,
    VoxelTerm,
    Weights,
)

INTERPRETED = triton.knobs.runtime.interpret
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: run again without it")

kernels = backend.kernels()
LABELS = SumsSpec(False, Activation.SOFTMAX, rows=OVERLAP_ROWS | G | POS | N | BAD, voxel_term=VoxelTerm.CE)
DENSE = SumsSpec(True, Activation.SIGMOID, rows=OVERLAP_ROWS | G)
MASKED = SumsSpec(False, Activation.SIGMOID, rows=OVERLAP_ROWS | G | BAD)
RATIO = FinishSpec(Formula.RATIO)


class Started(NamedTuple):
    """One call of a launcher: the grid, the kernel and its arguments."""

    grid: tuple[int, ...]
    kernel: str
    stream: int
    args: tuple[Any, ...]

    def facts(self, known: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """All of it; a tensor by its place among those ``known``, by its layout if it is another."""
        places = {tensor.data_ptr(): place for place, tensor in enumerate(known) if tensor is not None}
        args = [
            (arg.dtype, arg.shape, arg.stride(), places.get(arg.data_ptr()))
            if isinstance(arg, Tensor)
            else arg
            for arg in self.args
        ]
        return self.grid, self.kernel, self.stream, args


class Records(NamedTuple):
    """What reached the launcher, and the names of the kernels that went through a plan."""

    started: list[Started]
    planned: list[str]


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    """Nothing is remembered at first."""
    found = Records([], [])
    plain = launch.Launch.run

    def launcher(source: Any, metadata: Any) -> Callable[..., None]:
        def start(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            _, _, meta, enter, _, *args = rest
            if enter is not None:  # the one in C does the same
                enter(meta)
            found.started.append(Started((x, y, z), metadata.hash, stream, tuple(args)))

        return start

    def run(planned: launch.Launch, device: torch.device) -> Any:
        found.planned.append(planned.kernel.__name__)
        return plain(planned, device)

    monkeypatch.setattr(launch, "remembered", {})
    monkeypatch.setattr(launch.Launch, "run", run)
    with target(90, launcher):
        yield found


def _random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.rand(shape) * 2
    return values.to(dtype)


def _last(tensor: Tensor) -> Tensor:
    """The same shape, channels last."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _off(tensor: Tensor) -> Tensor:
    """The same layout, not on 16 bytes."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    assert moved.data_ptr() % 16
    return moved.copy_(tensor)


def _crop(tensor: Tensor) -> Tensor:
    """The same shape, without one voxel stride."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)[..., :-3]
    return wide.copy_(tensor)


SHAPE = (2, 3, 4, 6, 8)
MAP = (2, 1, 4, 6, 8)
Inputs = tuple[Tensor, Tensor, Tensor | None, SumsSpec]


def _labels() -> Inputs:
    return _random(SHAPE), _random(MAP, torch.uint8), None, LABELS


# Each makes (logits, target, mask, spec), with other memory and values every time.
PROBLEMS: dict[str, Callable[[], Inputs]] = {
    "labels": _labels,
    "dense": lambda: (_random(SHAPE), _random(SHAPE), None, DENSE),
    "masked": lambda: (_random(SHAPE), _random(MAP, torch.int64), _random(MAP), MASKED),
    "bool": lambda: (_random(SHAPE), _random(MAP, torch.bool), _random(MAP, torch.bool), MASKED),
    "half": lambda: (_random(SHAPE, torch.float16), _random(MAP, torch.uint8), None, LABELS),
    "channels last": lambda: (_last(_random(SHAPE)), _random(MAP, torch.uint8), None, LABELS),
    "unaligned": lambda: (_off(_random(SHAPE)), _random(MAP, torch.uint8), None, LABELS),
    "unaligned target": lambda: (_random(SHAPE), _off(_random(MAP, torch.uint8)), None, LABELS),
    "odd space": lambda: (_random((2, 3, 77)), _random((2, 77), torch.uint8), None, LABELS),
    "one sample": lambda: (_random((1, 3, 4, 6, 8)), _random((1, 1, 4, 6, 8), torch.uint8), None, LABELS),
    "crop": lambda: (_crop(_random(SHAPE)), _crop(_random(MAP, torch.uint8)), None, LABELS),
}


def _pass(
    problem: Inputs, dtype: torch.dtype = torch.float32, finish: FinishSpec = RATIO
) -> tuple[Tensor, ...]:
    """The three ops; the tensors that callers see."""
    logits, labels, mask, spec = problem
    slots = kernels.sums(logits, labels, mask, spec)
    loss, coef = kernels.finish(slots, Weights(), spec.rows, finish, False, dtype)
    gradient = kernels.sums_backward(torch.ones((), dtype=dtype), logits, labels, mask, coef, spec)
    return *(tensor for tensor in (logits, labels, mask) if tensor is not None), slots, loss, coef, gradient


@compiles
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_remembered_launch_is_the_one_that_would_be_planned(records: Records, name: str) -> None:
    make = PROBLEMS[name]
    _pass(make())
    assert records.planned == ["sums_kernel", "finish_kernel", "sums_backward_kernel"]
    problem = make()
    again = _pass(problem)
    assert len(records.planned) == 3, "planned again"
    launch.remembered.clear()
    planned = _pass(problem)
    assert len(records.planned) == 6
    first, replayed, made = (records.started[at : at + 3] for at in (0, 3, 6))
    assert [one.facts(again) for one in replayed] == [one.facts(planned) for one in made]
    assert [one.kernel for one in first] == [one.kernel for one in made]


@compiles
def test_other_layouts_and_specs_get_a_plan_of_their_own(records: Records) -> None:
    others = [name for name in PROBLEMS if name != "crop"]  # which is copied to the layout of "labels"
    for name in others:
        before = len(records.planned)
        _pass(PROBLEMS[name]())
        new = records.planned[before:]
        assert {"sums_kernel", "sums_backward_kernel"} <= set(new), (
            f"{name} shares a launch of another problem"
        )
    before = len(records.planned)
    logits, labels, _, spec = _labels()
    for other in (replace(spec, ignore_index=1), replace(spec, rows=spec.rows | 64)):
        _pass((logits, labels, None, other))
    # A gradient of other strides, and none at all.
    coef = torch.zeros(2, 3, spec.rows.bit_count(), dtype=torch.float64)
    for grad in (None, torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 3).mT.contiguous().mT):
        kernels.sums_backward(grad, logits, labels, None, coef, spec)
    new = records.planned[before:]
    assert new.count("sums_kernel") == 2 and new.count("sums_backward_kernel") == 2 + 4


@compiles
def test_choices_and_dtypes_of_finish_get_a_plan_of_their_own_and_numbers_do_not(records: Records) -> None:
    slots = torch.zeros(2, 1, 3, LABELS.rows.bit_count(), dtype=torch.float64)

    def run(dtype: torch.dtype = torch.float32, weight: Tensor | None = None, **changed: Any) -> None:
        spec = FinishSpec(**({"formula": Formula.RATIO} | changed))
        kernels.finish(slots, Weights(weight), LABELS.rows, spec, False, dtype)

    run()
    for alpha in (0.25, 0.5, -0.0, float("nan")):
        run(alpha=alpha)
        sent = records.started[-1].args[finish_module.finish_kernel.arg_names.index("alpha")]
        assert str(sent) == str(alpha)
    assert records.planned == ["finish_kernel"]
    changes: list[dict[str, Any]] = [
        {"dtype": torch.float64},
        {"weight": torch.ones(3)},
        {"weight": torch.ones(3, dtype=torch.float64)},
        {"batch": True},
        {"denominator": Denominator.VOXELS},
    ]
    for count, change in enumerate(changes, start=2):
        run(**change)
        assert len(records.planned) == count, change


@compiles
def test_a_lambda_counts_where_it_lies(records: Records) -> None:
    slots = torch.zeros(2, 1, 3, LABELS.rows.bit_count(), dtype=torch.float64)
    names = finish_module.finish_kernel.arg_names
    for number in (0.5, 2.0):
        factor = torch.tensor(number)
        kernels.finish(slots, Weights(region_lambda=factor), LABELS.rows, RATIO, False, torch.float32)
        sent = dict(zip(names, records.started[-1].args, strict=True))
        assert (sent["region_lambda"], sent["region_value"]) == (None, number)
    assert len(records.planned) == 1
    for number in (0.5, 2.0):
        factor = torch.tensor([number])
        kernels.finish(slots, Weights(region_lambda=factor), LABELS.rows, RATIO, False, torch.float32)
        sent = dict(zip(names, records.started[-1].args, strict=True))
        assert sent["region_lambda"].data_ptr() == factor.data_ptr() and sent["region_value"] == 1.0
    assert len(records.planned) == 2


@compiles
def test_one_tensor_in_two_roles_does_not_bind_them(records: Records) -> None:
    both, other = _random(SHAPE), _random(SHAPE)
    kernels.sums(both, both, None, DENSE)
    kernels.sums(both, other, None, DENSE)
    sent = records.started[-1].args
    assert sent[0] is both and sent[1] is other
    # What takes the place of a mask that is not there is no mask.
    mask = _random(SHAPE)
    kernels.sums(both, other, mask[:, :1], DENSE)
    assert records.planned == ["sums_kernel"] * 2


@compiles
def test_a_copy_is_made_in_every_call(records: Records) -> None:
    for _ in range(2):
        logits = _crop(_random(SHAPE))
        kernels.sums(logits, _random(MAP, torch.uint8), None, LABELS)
        sent = records.started[-1].args[0]
        assert sent.is_contiguous() and torch.equal(sent, logits)
    # A plan that copies on its own is of its call alone.
    for _ in range(2):
        tensors = (_crop(_random(SHAPE)), torch.zeros(1))
        launch.launch(functools.partial(_copying, *tensors), tensors, (), "copying")
        assert torch.equal(records.started[-1].args[0], tensors[0])
    assert records.planned == ["sums_kernel", "copy_kernel", "copy_kernel"]


@triton.jit
def copy_kernel(source, result):
    pass


def _copying(source: Tensor, result: Tensor) -> launch.Launch:
    return launch.Launch(copy_kernel, (1,), (source.contiguous(), result), {"num_warps": 1})


@compiles
def test_the_oldest_is_forgotten(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.LIMIT >= 256
    monkeypatch.setattr(launch, "LIMIT", 3)

    def run(size: int) -> int:
        """Launches planned by it. Sizes of one kernel: nothing is compiled for them."""
        before = len(records.planned)
        kernels.sums(_random((1, 3, size)), _random((1, size), torch.uint8), None, LABELS)
        return len(records.planned) - before

    sizes = [5120, 6144, 7168, 8192]
    assert [run(size) for size in sizes] == [1] * 4
    assert len(launch.remembered) == 3
    assert [run(size) for size in sizes[1:]] == [0] * 3
    assert run(sizes[0]) == 1 and len(launch.remembered) == 3


@compiles
def test_no_tensor_is_kept(records: Records) -> None:
    problem = _labels()
    kept = [weakref.ref(tensor) for tensor in _pass(problem)]
    assert launch.remembered
    records.started.clear()
    del problem
    assert not any(ref() is not None for ref in kept)


@compiles
def test_another_driver_gets_kernels_of_its_own(records: Records) -> None:
    problem, elsewhere = _labels(), []

    def launcher(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: elsewhere.append(metadata.target.arch)

    kernels.sums(*problem)
    with target(80, launcher):
        kernels.sums(*problem)
        kernels.sums(*problem)
    assert elsewhere == [80, 80] and len(records.started) == 1
    kernels.sums(*problem)
    assert len(records.started) == 2 and len(records.planned) == 2


class _Elsewhere(Tensor):
    """On device 7."""

    def get_device(self) -> int:
        return 7


@compiles
def test_launches_on_the_device_of_the_tensors(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(driver.active, "device", 7)
            yield

    monkeypatch.setattr(launch, "_current", current)
    monkeypatch.setattr(driver.active, "get_current_stream", lambda device: 100 + device)
    logits, *rest = _labels()
    for _ in range(2):
        kernels.sums(logits.as_subclass(_Elsewhere), *rest)
    assert [started.stream for started in records.started] == [107, 107]
    assert records.planned == ["sums_kernel"]
    assert {key[1] for key in launch.remembered} == {7}


@compiles
def test_hooks_around_launches_and_before_them_are_called(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, calls = _labels(), []
    kernels.sums(*problem)
    hook = "launch_enter_hook"
    monkeypatch.setattr(triton.knobs.runtime, hook, lambda meta: calls.append(meta.get()["name"]))
    kernels.sums(*problem)
    assert calls == ["sums_kernel"] and len(records.planned) == 1
    sums_kernel = kernels.sums.__globals__["sums_kernel"]
    sums_kernel.add_pre_run_hook(lambda *args, **kwargs: calls.append("before"))
    try:
        kernels.sums(*problem)
    finally:
        sums_kernel.pre_run_hooks.clear()
    assert calls == ["sums_kernel", "before", "sums_kernel"] and len(records.planned) == 2


@compiles
def test_debugging_takes_the_way_through_triton(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _labels()
    kernels.sums(*problem)
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    kernels.sums(*problem)
    kernels.sums(*problem)
    monkeypatch.setattr(triton.knobs.runtime, "debug", False)
    kernels.sums(*problem)
    plain, debugged, *rest = (started.kernel for started in records.started)
    assert debugged != plain and rest == [debugged, plain]
    assert len(records.planned) == 3


@compiles
def test_the_first_launch_inside_a_capture_is_an_error_before_it(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = _labels()
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    for _ in range(2):  # what the first one compiled is not loaded yet
        with pytest.raises(launch.CaptureError, match=r"sums_kernel: got its first launch .* Run one step"):
            kernels.sums(*problem)
    assert (records.started, launch.remembered) == ([], {})
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    expected = kernels.sums(*problem).shape
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    launch.remembered.clear()  # forgotten, but loaded
    assert kernels.sums(*problem).shape == expected
    assert len(records.started) == 2


@compiles
def test_a_remembered_launch_does_not_ask_about_captures(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(launch, "capturing", lambda device: bool(asked.append(device)))
    _pass(_labels())
    assert len(asked) == 3
    _pass(_labels())
    assert (len(asked), len(records.started)) == (3, 6)


def test_launches_are_remembered_for_nvidia_gpus_alone() -> None:
    others = torch.version.hip or getattr(torch.version, "xpu", None)
    assert launch.REPLAYS is (not INTERPRETED and not others)
