"""What every loss of this package shares: where its options live, its ``repr``, its form for TorchScript."""

from __future__ import annotations

import inspect
import operator
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from numbers import Number
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .. import checks, plans, scripting
from ..functional.loss import what
from ..functional.wasserstein import MODES
from ..overrides import overridden

CHOICES = {
    "reduction": ("mean", "sum", "none"),
    "w_type": ("square", "simple", "uniform"),
    "weighting_mode": MODES,
}
MAX_ITEMS = 8
_MISSING = object()


def same(*names: str) -> dict[str, str]:
    """Options that have the name of their attribute."""
    return {name: name for name in names}


class Condition(NamedTuple):
    """That an attribute of a part is that of another part, or without one the value; else the reason."""

    part: str
    name: str
    other: str | None
    value: Any
    reason: str


class Loss(_Loss):
    """A loss as a table of its options: ``forward`` calls FUNCTION with what the attributes hold by then.

    Its ``repr`` is one call of its constructor, with the options that are not the default. It reads the
    attributes, so it tells what the next call does. An option that lives in several places, with different
    values, is named by place (``dice.reduction='sum'``). No value of a tensor is read.

    Attributes:
        FUNCTION: the loss as a function; None for a wrapper.
        OPTIONS: part, "" for the loss itself -> option of FUNCTION -> attribute of the part that holds it.
        PARTS: attribute -> class of the submodule that the constructor makes; another one is shown.
        ALIKE: option -> the parts that hold it under its name, the one that is read first.
        PLACES: argument of the constructor -> the attributes that hold it, where the tables above differ.
        FIXED: part -> attribute that no argument sets -> the value it must have in a loss of one pass.
        BESIDE: part -> attribute that no argument sets -> what the constructor leaves there.
        SCRIPTED: option -> what a scripted ``forward`` passes for it, where OPTIONS does not tell.
        FACTORS: names of the lambdas, which are options, too.
        CONDITIONS: what must hold for the halves of a loss to share one pass, of ALIKE and FIXED.
        READ: part, option and attribute, of OPTIONS.
        READERS: part, its options, and what reads them all at once, which costs a third.
        STATE: part, and what reads all that a plan of the loss depends on.
        VARY: part, option and attribute, of the options in no plan.
        SHADOWED: a subclass has an attribute or property of its own under the name of a part.
        KIND: the class of this package that a loss is, or derives from.
        BUILD: what FUNCTION runs.
    """

    FUNCTION: ClassVar[Any] = None
    OPTIONS: ClassVar[Mapping[str, Mapping[str, str]]] = {"": {}}
    PARTS: ClassVar[Mapping[str, type[nn.Module]]] = {}
    ALIKE: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    PLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    FIXED: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    BESIDE: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    SCRIPTED: ClassVar[Mapping[str, str]] = {}
    FACTORS: ClassVar[tuple[str, ...]] = ()
    CONDITIONS: ClassVar[tuple[Condition, ...]] = ()
    READ: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    READERS: ClassVar[tuple[tuple[str, tuple[str, ...], Callable[[Any], Any]], ...]] = ()
    STATE: ClassVar[tuple[tuple[str, Callable[[Any], Any]], ...]] = ()
    VARY: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    SHADOWED: ClassVar[bool] = False
    KIND: ClassVar[type[Loss]]
    BUILD: ClassVar[Any] = None

    if TYPE_CHECKING:  # not in the class: TorchScript would read it there
        reduction: Literal["mean", "sum", "none"]

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if cls.__module__.startswith("dicekernels.modules."):
            cls.KIND = cls
            named = [(part, names) for part, names in cls.OPTIONS.items() if names]
            cls.READERS = tuple((part, tuple(names), _reader(names.values())) for part, names in named)
            cls.READ = tuple((part, *one) for part, names in cls.OPTIONS.items() for one in names.items())
            cls.VARY = tuple(one for one in cls.READ if one[1] in plans.VARYING)
            cls.VARY += tuple(("", name, name) for name in cls.FACTORS)
            cls.STATE = tuple(_state(cls))
            if cls.FUNCTION is not None:
                cls.BUILD = staticmethod(inspect.unwrap(cls.FUNCTION))
                scripting.register(cls)
        cls.SHADOWED = any(hasattr(cls, part) for part in cls.PARTS)

    def _hold(self, given: Mapping[str, Any]) -> None:
        """Sets the attributes of the loss itself to the arguments of its constructor."""
        if "sigmoid" in given:
            checks.activation_options(given["sigmoid"], given["softmax"], given["other_act"])
        for option, name in self.OPTIONS[""].items():
            value = given[option]
            if option in CHOICES:
                value = checks.option(option, value, CHOICES[option])
            elif option in ("smooth_nr", "smooth_dr"):
                value = checks.constant(option, value)
            if name == "class_weight":
                self.register_buffer(name, checks.as_weight(value))
            else:
                setattr(self, name, value)

    def _parts(self) -> dict[str, Any]:
        """The loss itself under "", and its submodules."""
        if self.SHADOWED:
            return {"": self} | {part: getattr(self, part) for part in self.PARTS}
        return {"": self, **self._modules}

    def bent(self, skip: str = "") -> tuple[str, str]:
        """Why no single pass computes the loss, for a loss of halves: see ``TwoHalves``."""
        return "", ""

    def _options(self) -> dict[str, Any]:
        """The options of FUNCTION as the attributes hold them."""
        parts = self._parts()
        if torch.compiler.is_compiling():  # Dynamo knows no attrgetter that was made before
            return {option: getattr(parts[part], name) for part, option, name in self.READ}
        options: dict[str, Any] = {}
        for part, names, read in self.READERS:
            options.update(zip(names, read(parts[part]), strict=True))
        return options

    def _planned(self, input: Tensor, target: Tensor, mask: Tensor | None) -> Tensor | None:
        """The loss by the plan of an earlier call, from fewer looks at the attributes; or None."""
        if torch.compiler.is_compiling() or self.SHADOWED or overridden(self, self.KIND, "forward"):
            return None
        parts = self._parts()
        for name, kind in self.PARTS.items():
            half = parts[name]
            if type(half) is not kind or checks.hooked(half) or overridden(half, kind):
                return None
        varying = {option: getattr(parts[part], name) for part, option, name in self.VARY}
        varying["mask"] = mask
        state = (self.KIND, *[read(parts[part]) for part, read in self.STATE])
        key, plan = plans.find(state, input, target, varying)
        if plan is None and key is not None and not self.bent()[0]:
            options = self._options() | {"mask": mask}
            _, plan = plans.find(what(self.BUILD, options), input, target, options)
            if plan is not None:
                plans.put(key, plan)
        if plan is None or not plan.takes(target, varying):
            return None
        return plan.run(input, target, varying)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this module."""
        return scripting.scriptable(self)

    @reprlib.recursive_repr(fillvalue="...")
    def __repr__(self) -> str:
        kind = self.KIND
        name = f"dicekernels.{kind.__name__}" if type(self) is kind else type(self).__name__
        return f"{name}({', '.join(_shown(self, kind))})"


def _reader(names: Collection[str]) -> Callable[[Any], Any]:
    """The attributes of a module as a tuple."""
    read = operator.attrgetter(*names)
    return read if len(names) > 1 else lambda module: (read(module),)


def _state(kind: type[Loss]) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    for part in ("", *kind.PARTS):
        names = [name for option, name in kind.OPTIONS.get(part, {}).items() if option not in plans.VARYING]
        names += [name for name, parts in kind.ALIKE.items() if part in parts]
        names += kind.FIXED.get(part, {})
        if names:
            yield part, _reader(list(dict.fromkeys(names)))


def part_of(kind: type[nn.Module], given: Mapping[str, Any], **more: Any) -> Any:
    """A part with those arguments of the whole loss's constructor that its own has, too."""
    names = inspect.signature(kind).parameters
    return kind(**{name: given[name] for name in names if name in given} | more)


def _defaults(kind: type[Loss]) -> dict[str, Any]:
    """Argument of the constructor -> its default, in order."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {one.name: one.default for one in parameters if one.kind not in variable}


def _places(kind: type[Loss], argument: str) -> tuple[str, ...]:
    """The attributes that hold an argument of the constructor, those of parts as ``part.attribute``."""
    alike = [(part, argument) for part in kind.ALIKE.get(argument, ())]
    read = [(part, name) for part, option, name in kind.READ if option == argument]
    places = [f"{part}.{name}" if part else name for part, name in alike or read or [("", argument)]]
    return kind.PLACES.get(argument) or tuple(places)


def _shown(loss: Loss, kind: type[Loss]) -> Iterator[str]:
    children: dict[str, Any] = loss.__dict__.get("_modules", {})
    other = {name: child for name, child in children.items() if type(child) is not kind.PARTS.get(name)}
    defaults = _defaults(kind)
    for argument, default in defaults.items():
        held = {}
        for place in _places(kind, argument):
            value = _at(loss, place, other)
            if value is not _MISSING:
                held[place] = value
        values = list(held.values())
        if len(values) > 1 and not all(_same(value, values[0]) for value in values[1:]):
            yield from (f"{place}={_text(x)}" for place, x in held.items() if not _same(x, default))
        elif values and not _same(values[0], default):
            yield f"{argument}={_text(values[0])}"
    for part, beside in (*kind.FIXED.items(), *kind.BESIDE.items()):
        for name, default in beside.items():
            place = f"{part}.{name}" if part else name
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
