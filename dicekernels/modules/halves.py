"""What the losses of two halves share: factors that may change every step, halves that users bend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..call import record_step
from ..overrides import overridden
from ..tensors import readable
from .loss import Condition, Loss


def _is_property(kind: type, name: str) -> bool:
    return hasattr(getattr(kind, name, None), "__set__")


def _traced(name: str) -> str:
    return f"_traced_{name}"


def _traced_factor(value: float, before: Tensor | None) -> Tensor:
    """A 0-dim float64 tensor where the one before it was; real and of use in any context of torch."""
    device = torch.device("cpu") if before is None or before.is_meta else before.device
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device=device)


def _conditions(kind: type[Loss]) -> Iterator[Condition]:
    for name, (first, *others) in kind._ALIKE.items():
        what = "reductions" if name == "reduction" else f"values of {name}"
        for other in others:
            yield Condition(other, name, first, None, f"the {what} of the halves differ")
    for part, fixed in kind._FIXED.items():
        for name, value in fixed.items():
            reason = f"its {part.replace('_', ' ')} has an option of its own, {name}"
            yield Condition(part, name, None, value, reason)


class TwoHalves(Loss):
    """A loss whose lambdas are plain attributes: a number, a 0-dim tensor or a Parameter, as they are set.

    Dynamo would compile a graph for each number that it meets in an attribute. So a number has a tensor
    beside it, which is all that a graph reads. It is no buffer: DDP would broadcast it, FSDP round it.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls._CONDITIONS = tuple(_conditions(cls))

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

    def bent(self, skip: str = "") -> tuple[str, str]:
        """Why the halves cannot share one pass, in general and with the name of the half; or "" twice.

        Args:
            skip: a half that is not called.
        """
        parts = self._parts()
        for name, kind in self.PARTS.items():
            half = parts[name]
            if type(half) is not kind:
                other = f"its {name} is {type(half).__module__}.{type(half).__qualname__}"
                return "a half is another module", other
            if checks.hooked(half):
                return "a half has hooks", f"its {name} has hooks"
            for method in overridden(half, kind):
                return f"{method} of a half is overridden", f"{method} of its {name} is overridden"
        for method in overridden(self, self._KIND):
            if method != "forward":
                return (f"{method} is overridden",) * 2
        for part, name, beside, value, reason in self._CONDITIONS:
            expected = value if beside is None else getattr(parts[beside], name)
            if part != skip and getattr(parts[part], name) != expected:
                return (reason,) * 2
        return "", ""

    def _begin_apart(
        self, input: Tensor, target: Tensor, mask: Tensor | None, reason: str, pytorch: bool = False
    ) -> None:
        """The checks of halves that run one after the other, and what ``explain`` tells of them.

        Args:
            pytorch: the voxel half is PyTorch's.
        """
        checks.tensors(input, target, mask)
        checks.dice_ce_shapes(input, target)
        if pytorch:
            line = f"two passes, the cross entropy in PyTorch: {reason}"
            record_step(line, "eager", reason, whole=True)
        else:
            record_step(f"two passes: {reason}", reason=reason)

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        for name in self.FACTORS:
            options[name] = self.factor(name)
        return options

    def factor(self, name: str) -> float | Tensor:
        """A lambda as the functions take it."""
        if torch.compiler.is_compiling():
            set_plainly = name in self.__dict__ and not _is_property(type(self), name)
            if set_plainly and _traced(name) in self.__dict__:
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
