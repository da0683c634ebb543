"""What the losses of two halves share: factors that may change every step, halves that users bend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from ..overrides import overridden
from ..scripting import scriptable
from ..tensors import readable
from .base import Loss


def bent(half: nn.Module, kind: type[nn.Module]) -> str:
    """Why a half computes something else than ``kind`` does with the options of its attributes, or ""."""
    if type(half) is not kind:
        return "a half is another module"
    if checks.hooked(half):
        return "a half has hooks"
    names = overridden(half, kind)
    return f"{names[0]} of a half is overridden" if names else ""


def _is_property(kind: type, name: str) -> bool:
    return hasattr(getattr(kind, name, None), "__set__")


def _traced(name: str) -> str:
    return f"_traced_{name}"


def _traced_factor(value: float, before: Tensor | None) -> Tensor:
    """A 0-dim float64 tensor where the one before it was; real and of use in any context of torch."""
    device = torch.device("cpu") if before is None or before.is_meta else before.device
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device=device)


class TwoHalves(Loss):
    """A loss whose lambdas are plain attributes: a number, a 0-dim tensor or a Parameter, as they are set.

    Dynamo would compile a graph for each number that it meets in an attribute. So a number has a tensor
    beside it, which is all that a graph reads. It is no buffer: DDP would broadcast it, FSDP round it.

    Attributes:
        FACTORS: names of the lambdas.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.FACTORS and not _is_property(type(self), name):
            before = self.__dict__.pop(_traced(name), None)
            # Not in place: copy.copy shares the dictionary.
            self._parameters = {key: x for key, x in self._parameters.items() if key != name}
            if not isinstance(value, Tensor):
                checks.non_negative(name, value)
                # A new tensor each time: the one of an earlier step may wait for its backward.
                self.__dict__[_traced(name)] = _traced_factor(float(value), before)
            elif readable(value) and value.device.type == "cpu" and value.numel() == 1:
                checks.non_negative(name, float(value.detach()))
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop(_traced(name), None)
        super().__delattr__(name)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this module."""
        return scriptable(self)

    def apart_reason(self, binary: bool) -> str:
        """Why the halves cannot share one pass, or ""; ``binary``: the logits have one channel."""
        raise NotImplementedError

    def factor(self, name: str) -> float | Tensor:
        """A lambda as the functions take it."""
        set_plainly = name in self.__dict__ and not _is_property(type(self), name)
        if torch.compiler.is_compiling() and set_plainly and _traced(name) in self.__dict__:
            traced: Tensor = self.__dict__[_traced(name)]
            return traced
        value: float | Tensor = getattr(self, name)
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TwoHalves:
        """As in Module; what a graph reads goes to the same device, in float64 and with its value."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name in map(_traced, self.FACTORS):
            before = self.__dict__.get(name)
            if before is not None:
                moved = fn(before)
                self.__dict__[name] = before if moved.is_meta else before.to(moved.device)
        return self
