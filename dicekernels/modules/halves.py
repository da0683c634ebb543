"""What the losses of two halves share: factors that may change every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .. import checks
from ..scripting import scriptable


def _factor(value: float, before: Tensor | None) -> Tensor:
    """A 0-dim float64 tensor where the one before it was; real and trainable in any context of torch."""
    device = torch.device("cpu") if before is None or before.is_meta else before.device
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device=device)


class TwoHalves(_Loss):
    """A loss whose lambdas live in 0-dim non-persistent buffers, so that a warm-up recompiles nothing.

    A lambda reads as a float. A tensor that requires a gradient stays one and gets it.

    Attributes:
        FACTORS: name of a lambda -> name of its buffer.
    """

    FACTORS: ClassVar[dict[str, str]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.FACTORS:
            super().__setattr__(name, value)
            return
        buffer = self.FACTORS[name]
        if isinstance(value, nn.Parameter):
            self._buffers.pop(buffer, None)
            super().__setattr__(buffer, value)
        else:
            self._parameters.pop(buffer, None)
            if not (isinstance(value, Tensor) and value.requires_grad):
                checks.non_negative(name, float(value))
                value = _factor(float(value), self._buffers.get(buffer))
            # A new tensor each time: the one of an earlier step may wait for its backward.
            self._buffers[buffer] = value
            self._non_persistent_buffers_set.add(buffer)

    def __getattr__(self, name: str) -> Any:
        if name not in self.FACTORS:
            return super().__getattr__(name)
        value = self.factor(name)
        return value if value.requires_grad else float(value)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this module."""
        return scriptable(self)

    def factor(self, name: str) -> Tensor:
        """The tensor behind a lambda."""
        value = getattr(self, self.FACTORS[name])
        assert isinstance(value, Tensor)
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TwoHalves:
        """As in Module, but ``half()`` leaves the factors in float64, and ``to_empty`` their values."""
        kept = {name: self._buffers[name] for name in self.FACTORS.values() if name in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, value in kept.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and not moved.is_meta:
                self._buffers[name] = value.to(moved.device)
        return self
