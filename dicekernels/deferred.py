"""Labels out of range where reading their count would wait for the device: a later call raises.

Behind a forward pass its count is copied into pinned memory, and an event is recorded behind the copy. Later
calls on the device look at the counts that have arrived, in the order of their calls, and raise
LabelRangeError for one that is not 0. Nobody waits for a count: one that no later call finds raises nothing.

Not counted, so that the loss is NaN with zero gradient and no error follows: what torch.compile or a CUDA
graph runs, what PyTorch computes inside a transform of torch.func, and devices without events or pinned
memory.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.eager import LabelRangeError
from .backends.gpus import capturing

# Counts of a device that are on their way; a call that would add to them is not counted.
LIMIT = 64


def reads_at_once(device: torch.device) -> bool:
    """Whether a call reads its own count: on the CPU, where it is, and wherever the user asks for it."""
    return device.type == "cpu" or os.environ.get("DICEKERNELS_CHECK") == "1"


def takes(device: torch.device) -> bool:
    """Whether a device has the events and the pinned memory."""
    return device.type in ("cuda", "xpu")


class Copy:
    """A float64 number on its way from a device to the host. Used again once it has landed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        # Made inside of inference mode it could not be written to outside.
        with torch.inference_mode(False):
            self._host = _pinned()
        # The same memory: a mode of torch, as that of fake tensors, sees no read of it.
        self._landed = self._host.numpy()
        self._event = self._module.Event()

    def start(self, number: Tensor) -> None:
        self._host.copy_(number, non_blocking=True)
        self._event.record(self._module.current_stream(self._device))

    def landed(self) -> bool:
        return bool(self._event.query())

    def value(self) -> float:
        return float(self._landed)


def _pinned() -> Tensor:
    return torch.zeros((), dtype=torch.float64, device="cpu", pin_memory=True)


class _Pending(NamedTuple):
    """A count on its way, of labels of this shape for so many classes."""

    copy: Copy
    shape: torch.Size
    classes: int


class _Queue:
    """The counts of a device, and copies that are free again."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pending: deque[_Pending] = deque()
        self.free: list[Copy] = []

    def add(self, bad: Tensor, shape: torch.Size, classes: int) -> None:
        with self.lock:
            if len(self.pending) >= LIMIT:
                return
            copy = self.free.pop() if self.free else Copy(bad.device)
            copy.start(bad)
            self.pending.append(_Pending(copy, shape, classes))

    def first_bad(self) -> tuple[int, _Pending] | None:
        """The first count above 0 among those that have arrived. The others are forgotten then.

        Torch's allocator keeps the pinned memory of a copy on its way that nobody holds any more.
        """
        with self.lock:
            while self.pending and self.pending[0].copy.landed():
                first = self.pending.popleft()
                count = int(first.copy.value())
                self.free.append(first.copy)
                if count > 0:
                    self.pending.clear()
                    return count, first
        return None


_queues: dict[torch.device, _Queue] = {}


def count_later(bad: Tensor, labels: Tensor, classes: int) -> None:
    """Sends the sum of ``bad``, counts of labels out of range in ``labels``, on its way to the host.

    Call it only where ``reads_at_once`` says no.
    """
    device = bad.device
    followed = torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined, no-untyped-call]  # torch types neither
    # Fake tensors and other subclasses have no number.
    if not takes(device) or type(bad) is not Tensor or followed or capturing(device):
        return
    _queues.setdefault(device, _Queue()).add(bad.sum(dtype=torch.float64), labels.shape, classes)


def raise_earlier(device: torch.device) -> None:
    """The error of an earlier call on ``device``, if its count has arrived since.

    Raises:
        LabelRangeError: there were labels out of range. Whatever else is on its way is forgotten.
    """
    queue = _queues.get(device)
    # No event may be asked for inside a capture.
    if queue is None or not queue.pending or capturing(device):
        return
    found = queue.first_bad()
    if found is None:
        return
    count, (_, shape, classes) = found
    raise LabelRangeError(
        f"target: {count} voxels of an EARLIER pass held a label outside [0, {classes}), in a target of "
        f"shape {tuple(shape)}: one of an earlier call, whose loss was NaN with zero gradient, or the first "
        f"one of this call. Expected labels 0 to {classes - 1} "
        f"for logits with {classes} channels: remap the labels, give the network more channels, or pass "
        "ignore_index to leave such voxels out. DICEKERNELS_CHECK=1 raises in the call itself, and names the "
        "label and its place"
    )


def forget() -> None:
    """Drops all counts that nobody has looked at yet."""
    _queues.clear()
