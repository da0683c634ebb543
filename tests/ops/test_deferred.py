"""Labels out of range off the CPU: the count travels behind the kernels, and a later call raises.

On tensors of the CPU that are taken for those of a GPU, with copies that land when a test says so: the CUDA
kernels in the emulator, and the eager backend.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import ClassVar

import emulated
import pytest
import torch
from cases import DEVICE, make_labels, make_logits
from torch._subclasses.fake_tensor import FakeTensorMode

import dicekernels
from dicekernels import LabelRangeError, deferred, functional
from dicekernels.backends import gpus

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a fake GPU; test_cuda.py has the real one")
HOT = {"to_onehot_y": True, "softmax": True}
SHAPE = (2, 3, 70, 80)  # two chunks a sample


class FakeCopy:
    """Its number is there from ``land`` on, in the order of the calls as on a stream."""

    made: ClassVar[list[FakeCopy]] = []
    started: ClassVar[list[FakeCopy]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        FakeCopy.made.append(self)

    def start(self, number: torch.Tensor) -> None:
        assert number.shape == () and number.dtype == torch.float64
        self.number, self.there = number.clone(), False
        self.memory = self.number.numpy()
        FakeCopy.started.append(self)

    def landed(self) -> bool:
        return self.there

    def value(self) -> float:
        assert self.there
        return float(self.memory)

    @classmethod
    def land(cls, count: int | None = None) -> None:
        for copy in cls.started[:count]:
            copy.there = True
        del cls.started[:count]


@pytest.fixture(params=["emulated", "eager"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each backend on a "GPU" that has done nothing yet."""
    if request.param == "emulated" and emulated.unavailable():
        pytest.skip(emulated.unavailable())
    monkeypatch.setattr(deferred, "reads_at_once", lambda device: False)
    monkeypatch.setattr(deferred, "takes", lambda device: True)
    monkeypatch.setattr(deferred, "Copy", FakeCopy)
    monkeypatch.setattr(deferred, "_queues", {})
    FakeCopy.made, FakeCopy.started = [], []
    with emulated.registered(), dicekernels.use_backend(request.param):
        yield request.param


def step(*wrong: int, shape: tuple[int, ...] = SHAPE, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """DiceCE with these wrong labels: loss and gradient."""
    logits = make_logits(shape).requires_grad_()
    labels = make_labels((shape[0], 1, *shape[2:]), shape[1])
    for at, label in enumerate(wrong):
        labels[-1, 0, -1 - at] = label
    loss = functional.dice_ce_loss(logits, labels, **HOT, **options)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_a_later_call_raises_once_the_count_is_there(gpu: str) -> None:
    loss, gradient = step(7, 200)  # rows of 80 voxels each
    assert loss.isnan()
    assert torch.equal(gradient, torch.zeros_like(gradient))
    for _ in range(2):
        assert step()[0].isfinite()
    FakeCopy.land(1)
    told = (
        r"target: 160 voxels of an EARLIER pass held a label outside \[0, 3\), in a target of shape "
        r"\(2, 1, 70, 80\).* remap the labels.* ignore_index .*DICEKERNELS_CHECK=1"
    )
    with pytest.raises(LabelRangeError, match=told):
        step()
    FakeCopy.land()
    assert step()[0].isfinite()


def test_labels_in_range_never_raise_and_memory_is_used_again(gpu: str) -> None:
    for _ in range(5):
        step(255, ignore_index=255)
        FakeCopy.land()
    assert len(FakeCopy.made) == 1


def test_no_count_is_waited_for_and_few_are_on_their_way(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "LIMIT", 3)
    step(9)
    for _ in range(5):
        step()
    assert len(FakeCopy.started) == len(FakeCopy.made) == 3
    FakeCopy.land()
    with pytest.raises(LabelRangeError, match="80 voxels of an EARLIER pass"):
        step()


def test_the_error_takes_the_others_with_it(gpu: str) -> None:
    for _ in range(3):
        step(9)
    FakeCopy.land(2)
    with pytest.raises(LabelRangeError):
        step()
    FakeCopy.land()
    assert step()[0].isfinite()


def test_the_first_call_with_wrong_labels_is_named(gpu: str) -> None:
    step()
    step(5, shape=(1, 4, 30))
    step(9)
    FakeCopy.land()
    with pytest.raises(
        LabelRangeError, match=r"target: 1 voxels .* \[0, 4\), in a target of shape \(1, 1, 30\)"
    ):
        step()


def test_each_device_has_its_own(gpu: str) -> None:
    step(9)
    FakeCopy.land()
    deferred.raise_earlier(torch.device("cuda", 0))
    with pytest.raises(LabelRangeError):
        deferred.raise_earlier(torch.device("cpu"))


def test_values_have_nothing_to_count_and_look_at_earlier_calls(gpu: str) -> None:
    logits, values = make_logits(SHAPE), torch.rand(SHAPE)
    functional.dice_loss(logits, values, softmax=True)
    assert FakeCopy.made == []
    step(9)
    FakeCopy.land()
    with pytest.raises(LabelRangeError):
        functional.dice_loss(logits, values, softmax=True)


@pytest.mark.parametrize("loss", ["wasserstein", "unified_focal", "focal halves"])
def test_losses_without_a_kernel_have_it_too(loss: str, monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    if gpu != "eager":
        pytest.skip("no kernel has these losses")
    logits, labels = make_logits(SHAPE), make_labels((2, 1, 70, 80), 3)
    labels[0, 0, 0, :6] = 99
    distances = 1 - torch.eye(3)
    run = {
        "wasserstein": lambda: functional.generalized_wasserstein_dice_loss(logits, labels, distances),
        "unified_focal": lambda: functional.asymmetric_unified_focal_loss(
            logits, labels, to_onehot_y=True, num_classes=3
        ),
        "focal halves": lambda: dicekernels.DiceFocalLoss(**HOT)(logits, labels),
    }[loss]
    run()
    FakeCopy.land()
    with pytest.raises(LabelRangeError, match="6 voxels of an EARLIER pass"):
        run()


@pytest.mark.parametrize("inside", ["vmap", "grad"])
def test_the_kernels_count_inside_of_transforms(gpu: str, inside: str) -> None:
    logits, labels = make_logits((1, 3, 40)), make_labels((1, 1, 40), 3)
    labels[..., :2] = 9

    def loss(z: torch.Tensor) -> torch.Tensor:
        return functional.dice_ce_loss(z, labels, **HOT)

    if inside == "vmap":
        assert torch.func.vmap(loss)(torch.stack([logits, logits])).isnan().all()
    else:
        assert not torch.func.grad(loss)(logits).any()
    assert [copy.number.item() for copy in FakeCopy.started] == [2.0] * (2 if inside == "vmap" else 1)
    FakeCopy.land()
    with pytest.raises(LabelRangeError, match="2 voxels of an EARLIER pass"):
        loss(logits)


def test_a_count_may_land_before_a_call_on_fake_tensors(gpu: str) -> None:
    logits, labels = make_logits((1, 3, 40)), make_labels((1, 1, 40), 3)
    functional.dice_ce_loss(logits, labels, **HOT)
    FakeCopy.land()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (logits, labels)]
        assert functional.dice_ce_loss(*fake, **HOT).shape == ()


@pytest.mark.parametrize("inside", ["vmap", "grad", "jit"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_transforms_and_traces_change_no_number(gpu: str, inside: str) -> None:
    logits, labels = make_logits((1, 3, 40)), make_labels((1, 1, 40), 3)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return functional.dice_ce_loss(z, labels, **HOT)

    expected = loss(logits)
    FakeCopy.made, FakeCopy.started = [], []
    deferred.forget()
    if inside == "vmap":
        got = torch.func.vmap(loss)(torch.stack([logits, logits]))
        assert torch.equal(got, torch.stack([expected, expected]))
    elif inside == "grad":
        assert torch.func.grad(loss)(logits).any()
    else:
        torch.jit.trace(loss, logits, check_trace=False)
    for copy in FakeCopy.started:
        assert copy.number.item() == 0
    if inside == "jit":
        assert FakeCopy.made == []


def test_compiled_calls_are_not_counted(gpu: str) -> None:
    torch.compiler.reset()
    logits, labels = make_logits(SHAPE), make_labels((2, 1, 70, 80), 3)
    labels[0, 0, 0] = 9
    compiled = torch.compile(
        lambda z: functional.dice_ce_loss(z, labels, **HOT), backend="eager", fullgraph=True
    )
    assert compiled(logits).isnan()
    assert FakeCopy.made == []
    torch.compiler.reset()


def test_a_capture_is_neither_counted_nor_disturbed(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step(9)
    monkeypatch.setattr(deferred, "capturing", lambda device: True)
    monkeypatch.setattr(FakeCopy, "landed", lambda copy: pytest.fail("an event was asked inside a capture"))
    step(9)
    assert len(FakeCopy.started) == 1


def test_threads_share_a_queue(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No count is lost, and each is looked at by one thread alone."""
    errors: list[Exception] = []
    logits, labels = make_logits((1, 3, 20)), make_labels((1, 1, 20), 3)
    labels[..., :2] = 9

    class Landed(FakeCopy):
        def landed(self) -> bool:
            return True

        def value(self) -> float:
            return self.number.item()

    monkeypatch.setattr(deferred, "Copy", Landed)

    def work() -> None:
        with dicekernels.use_backend(gpu):
            for _ in range(20):
                try:
                    functional.dice_ce_loss(logits, labels, **HOT)
                except LabelRangeError as error:
                    errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # A call raises, or sends a count; an error takes one count at least.
    assert len(errors) + len(FakeCopy.started) == 4 * 20
    assert 1 <= len(errors) <= 40


def test_where_a_call_reads_its_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DICEKERNELS_CHECK", raising=False)
    kinds = ("cpu", "cuda", "xpu", "mps", "meta")
    assert [deferred.reads_at_once(torch.device(kind)) for kind in kinds] == [True] + [False] * 4
    assert [deferred.takes(torch.device(kind)) for kind in kinds] == [False, True, True, False, False]
    monkeypatch.setenv("DICEKERNELS_CHECK", "1")
    assert all(deferred.reads_at_once(torch.device(kind)) for kind in kinds)


def test_other_devices_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "Copy", lambda device: pytest.fail("mps has no pinned memory"))
    monkeypatch.setattr(gpus.torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("no CUDA here"))
    bad, labels = torch.ones(2, 1, device="meta"), torch.zeros(2, 1, 5, device="meta")
    deferred.count_later(bad, labels, 3)
    deferred.raise_earlier(torch.device("meta"))
    assert deferred._queues == {}


def test_a_copy_records_its_event_behind_itself_on_the_stream_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, done, host = torch.device("cuda", 3), [], torch.zeros((), dtype=torch.float64)

    class Host(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            done.append((function.__name__, kwargs))
            return super().__torch_function__(function, types, args, kwargs or {})

    class Event:
        def record(self, stream):
            done.append(("record", stream))

        def query(self):
            return "record" in [name for name, _ in done]

    monkeypatch.setattr(deferred, "_pinned", lambda: host.as_subclass(Host))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    copy = deferred.Copy(device)
    done.clear()
    assert not copy.landed()
    copy.start(torch.tensor(5.0, dtype=torch.float64))
    assert done == [("copy_", {"non_blocking": True}), ("record", "stream of cuda:3")]
    assert copy.landed()
    with FakeTensorMode():
        assert copy.value() == 5
