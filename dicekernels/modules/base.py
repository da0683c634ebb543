"""What every module of this package shares: a ``repr`` that tells its options."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterator, Mapping
from enum import Enum
from numbers import Number
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

MAX_ITEMS = 8
_MISSING = object()


class Loss(_Loss):
    """A loss whose ``repr`` is one call of its constructor, with the options that are not the default.

    It reads the attributes, so it tells what the next call does. An option that lives in several places, with
    different values, is named by place (``dice.reduction='sum'``). No value of a tensor is read.

    Attributes:
        PLACES: argument of the constructor -> the attributes that hold it. Without an entry these are the
            attributes of its name, of the loss and of its parts.
        BESIDE: attribute that no argument sets -> what the constructor leaves there.
        PARTS: attribute -> class of the submodule that the constructor makes; another one is shown.
    """

    PLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    BESIDE: ClassVar[Mapping[str, Any]] = {}
    PARTS: ClassVar[Mapping[str, type[nn.Module]]] = {}

    if TYPE_CHECKING:  # not in the class: TorchScript would read it there
        reduction: Literal["mean", "sum", "none"]

    @reprlib.recursive_repr(fillvalue="...")
    def __repr__(self) -> str:
        kind = _kind(type(self))
        name = f"dicekernels.{kind.__name__}" if type(self) is kind else type(self).__name__
        return f"{name}({', '.join(_options(self, kind))})"


def _kind(cls: type[Loss]) -> type[Loss]:
    """The class of this package that ``cls`` is, or derives from."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("dicekernels.modules."))


def _defaults(kind: type[Loss]) -> dict[str, Any]:
    """Argument of the constructor -> its default, in order."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {one.name: one.default for one in parameters if one.kind not in variable}


def _options(loss: Loss, kind: type[Loss]) -> Iterator[str]:
    children: dict[str, Any] = loss.__dict__.get("_modules", {})
    other = {name: child for name, child in children.items() if type(child) is not kind.PARTS.get(name)}
    defaults = _defaults(kind)
    for argument, default in defaults.items():
        held = {}
        everywhere = (argument, *(f"{part}.{argument}" for part in kind.PARTS))
        for place in kind.PLACES.get(argument, everywhere):
            value = _at(loss, place, other)
            if value is not _MISSING:
                held[place] = value
        values = list(held.values())
        if len(values) > 1 and not all(_same(value, values[0]) for value in values[1:]):
            yield from (f"{place}={_text(x)}" for place, x in held.items() if not _same(x, default))
        elif values and not _same(values[0], default):
            yield f"{argument}={_text(values[0])}"
    for place, default in kind.BESIDE.items():
        value = _at(loss, place, other)
        if value is not _MISSING and not _same(value, default):
            yield f"{place}={_text(value)}"
    yield from (f"{name}={_text(child)}" for name, child in other.items() if name not in defaults)


def _at(loss: Loss, place: str, other: Mapping[str, Any]) -> Any:
    """The value of an attribute of the loss or of one of its parts, or _MISSING."""
    part, _, name = place.rpartition(".")
    if part in other:
        return _MISSING  # it is shown as a whole
    try:
        value = getattr(getattr(loss, part) if part else loss, name)
    except Exception:  # a property of the user's may raise anything
        return _MISSING
    return value.item() if isinstance(value, np.generic) else value


def _same(value: Any, other: Any) -> bool:
    """Without reading a tensor: those of several places are one option."""
    if isinstance(value, Tensor):
        return isinstance(other, Tensor)
    plain = isinstance(value, (str, Number)) and isinstance(other, (str, Number))
    return value is other or (plain and bool(value == other))


def _text(value: Any) -> str:
    """Short, on one line but for modules of others, and without a call that reads a device."""
    try:
        if isinstance(value, Tensor):
            size = " x ".join(map(str, value.shape)) or "1"
            where = "" if value.device.type == "cpu" else f", {value.device}"
            name = "Parameter" if isinstance(value, nn.Parameter) else "tensor"
            return f"{name}({size} value{'' if size == '1' else 's'}{where})"
        if isinstance(value, Enum):
            return repr(value.value)
        if value is None or isinstance(value, (str, Number, nn.Module)):
            return repr(value)
        if isinstance(value, (list, tuple)):
            items = [_text(item) for item in value[:MAX_ITEMS]] + ["..."] * (len(value) > MAX_ITEMS)
            return f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)})"
        return str(value.__name__)  # a function or a class
    except Exception:  # a repr that raises hides what it was asked for
        return f"{type(value).__name__}(...)"
