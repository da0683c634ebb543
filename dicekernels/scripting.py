"""``torch.jit.script`` of the losses: one op for each, called from a ``forward`` that TorchScript compiles.

TorchScript compiles neither Python's dispatch nor keyword-only arguments with defaults. So
``__prepare_scriptable__`` of a loss hands it a stand-in: a module with the attributes, buffers and
submodules of the loss, whose ``forward`` gives them to the op ``dicekernels_losses::<class>``. The body of
the op is the loss as a function: the same kernels, values and gradients. A saved loss needs
``import dicekernels``, which registers the ops, before ``torch.jit.load``.

In a scripted loss ``mask`` may also be the third positional argument, and errors are ``torch.jit.Error``
with the type and text of the original in the message.
"""

from __future__ import annotations

import functools
import inspect
import json
import linecache
import math
import operator
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Optional

import torch
from torch import Tensor, nn

from . import checks
from .functional.unified_focal import Half
from .overrides import overridden

if TYPE_CHECKING:
    from .modules.loss import Loss

_library = torch.library.Library("dicekernels_losses", "DEF")


def _text(value: Any) -> Any:
    return getattr(value, "value", value)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value


# Annotation of an option -> its type in the schema of the op, and what makes an attribute exactly that.
_TYPES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bool": ("bool", bool),
    "float": ("float", float),
    "float | Tensor": ("float", float),
    "int": ("int", int),
    "int | None": ("int?", checks.index),
    "str": ("str", _text),
    "Alpha": ("Any", _number),
    "Half": ("float[]", tuple),
    # An activation of the user's is what it has made of the logits.
    **dict.fromkeys(
        ("Tensor", "Tensor | None", "OtherAct", "checks.Weight", "checks.Weight | Literal['weight']"),
        ("Tensor?", lambda value: value),
    ),
}


def _type(annotation: str) -> tuple[str, Callable[[Any], Any]]:
    return _TYPES["str" if annotation.startswith("Literal") else annotation]


def _place(part: str, name: str) -> str:
    return f"self.{part}.{name}" if part else f"self.{name}"


def _expressions(kind: type[Loss]) -> dict[str, str]:
    """Option -> where a scripted loss has it."""
    places = {option: _place(part, name) for part, option, name in kind._READ}
    return {**places, **{name: f"self.{name}" for name in kind.FACTORS}, **kind._SCRIPTED}


def register(kind: type[Loss]) -> None:
    """Defines the op of a class of losses, from _FUNCTION's signature; it gives the loss and an error."""
    function = kind._FUNCTION
    parameters = inspect.signature(function).parameters
    schema = []
    for option in (*_expressions(kind), "mask"):
        default, type_ = parameters[option].default, _type(parameters[option].annotation)[0]
        # An argument that equals the default of the schema does not reach the body.
        given = default is inspect.Parameter.empty or type_ in ("Any", "Tensor?")
        value = json.dumps(default) if isinstance(default, str) else default
        schema.append(f"{type_} {option}" + ("" if given else f"={value}"))
    arguments = ", ".join(["Tensor input", "Tensor target", "*", *schema])

    def body(input: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, str]:
        acted = options.get("other_act")
        if acted is not None:
            options["other_act"] = functools.partial(_as_taken, acted)
        for name, value in options.items():
            if isinstance(value, list):
                options[name] = Half(*value)
        try:
            return function(input, target, **options), ""
        except Exception as error:  # which the interpreter of TorchScript would hide behind its own
            return torch.full((), math.nan), f"{type(error).__name__}: {error}"

    _library.define(f"{kind.__name__}({arguments}) -> (Tensor, str)")
    _library.impl(kind.__name__, body, "CompositeImplicitAutograd")


def _as_taken(acted: Tensor, logits: Tensor) -> Tensor:
    """What ``other_act`` has made, for a loss that may see the logits with one dimension or digit more."""
    return acted.to(torch.promote_types(acted.dtype, logits.dtype)).reshape(
        *acted.shape, *[1] * (logits.ndim - acted.ndim)
    )


def register_step(schema: str, function: Callable[..., Any]) -> None:
    """An op of a step of the wrappers."""
    _library.define(schema)
    _library.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")


register_step("same(Any value, Any other) -> bool", lambda value, other: value == other)


class StandIn(nn.Module):
    """The attributes, buffers and submodules of a loss.

    Outside of TorchScript a stand-in is that loss. ``torch.jit.script`` of a parent module puts it where
    the parent had the loss and leaves it there, so the parent must still run the loss, and what is set
    on the stand-in or moved with it must reach the loss.
    """

    if TYPE_CHECKING:
        original: tuple[nn.Module]  # in a tuple it is no submodule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The loss; TorchScript goes by ``forward``."""
        return self.original[0](*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original[0], name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Its class was made at run time: another one is, where it is loaded."""
        return scriptable, self.original

    def __prepare_scriptable__(self) -> nn.Module:
        """The loss may have changed since this stand-in was made."""
        # Every loss that has one has this method, which nn.Module does not know.
        return self.original[0].__prepare_scriptable__()  # type: ignore[operator,no-any-return]


def _source(loss: Loss) -> str:
    """A ``forward`` that TorchScript compiles."""
    kind, passed = loss._KIND, _expressions(loss._KIND)
    first, second = list(inspect.signature(kind.forward).parameters)[1:3]
    act = passed.get("other_act", "")
    if act:
        unused = operator.attrgetter(act.removeprefix("self."))(loss) is None
        passed["other_act"] = "None" if unused else f"{act}({first})"
    lines = [
        f"def forward(self, {first}: Tensor, {second}: Tensor, mask: Optional[Tensor] = None) -> Tensor:"
    ]
    for one in kind._CONDITIONS:
        expected = repr(one.value) if one.other is None else _place(one.other, one.name)
        lines += [
            f"    if not torch.ops.dicekernels_losses.same({_place(one.part, one.name)}, {expected}):",
            f"        raise RuntimeError({f'{kind.__name__}: {one.reason}'!r})",
        ]
    arguments = ", ".join(
        [first, second, *(f"{name}={value}" for name, value in passed.items()), "mask=mask"]
    )
    lines += [
        f"    loss, error = torch.ops.dicekernels_losses.{kind.__name__}({arguments})",
        '    if error != "":',
        "        raise RuntimeError(error)",
        "    return loss",
    ]
    return "\n".join(lines) + "\n"


@functools.cache
def _compiled(name: str, source: str) -> type[StandIn]:
    """A stand-in with this ``forward``, where TorchScript finds the source."""
    file = f"<dicekernels.scripting.{name} {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict[str, Any] = {"torch": torch, "Tensor": Tensor, "Optional": Optional}
    exec(compile(source, file, "exec"), scope)
    # TorchScript infers the other types from the values.
    annotations = {"ignore_index": Optional[int]}  # noqa: UP045  TorchScript knows no other form
    return type(name, (StandIn,), {"forward": scope["forward"], "__annotations__": annotations})


def scriptable(loss: Loss) -> nn.Module:
    """What ``__prepare_scriptable__`` of a loss returns: its stand-in.

    A subclass with a ``forward`` of its own is returned as it is: TorchScript compiles that ``forward``, or
    says what in it it cannot compile.

    Raises:
        RuntimeError: a subclass overrides another method that takes part, or the loss was changed in a way
            that a scripted one would not follow.
    """
    kind: Any = loss._KIND
    if type(loss).forward is not kind.forward and "forward" not in vars(loss):
        return loss
    for name in overridden(loss, kind):
        _refuse(loss, f"it overrides {name}, which {kind.__name__} calls in Python alone")
    if kind._CONDITIONS:
        _refuse(loss, kind.bent(loss)[1])
    exact: dict[str, Any] = {}
    if kind._FUNCTION is None:
        made, exact = _wrapper(loss)
    else:
        made = _compiled(kind.__name__, _source(loss))
        loss._options()  # raises for what must stay as constructed
        parameters = inspect.signature(kind._FUNCTION).parameters
        for option, name in kind._OPTIONS[""].items():
            exact[name] = _type(parameters[option].annotation)[1](getattr(loss, name))
    for name in kind.FACTORS:
        value = getattr(loss, name)
        learned = isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.requires_grad)
        _refuse(loss, f"{name} requires a gradient" if learned else "")
        exact[name] = float(value)
    stand_in = made.__new__(made)
    own = {name: value for name, value in vars(loss).items() if not name.startswith("_traced_")}
    # The tensors are shared, the dictionary is not: torch.jit.script replaces modules in it.
    stand_in.__dict__.update(own | exact | {"original": (loss,), "_modules": dict(loss._modules)})
    return stand_in


def _refuse(loss: nn.Module, reason: str) -> None:
    """Raises RuntimeError: a reason is given, so the scripted loss would not be the loss."""
    if reason:
        raise RuntimeError(
            f"torch.jit.script of {type(loss).__name__}: {reason}. Undo that, or write a forward that "
            "TorchScript compiles"
        )


def _wrapper(loss: Any) -> tuple[type[StandIn], dict[str, Any]]:
    if loss._KIND.__name__ == "MaskedLoss":
        return Masked, {}
    called = loss.loss.forward if isinstance(loss.loss, nn.Module) else loss.loss
    weights = None if loss.weights is None else [float(weight) for weight in loss.weights]
    return DeepSupervision, {"weights": weights, "takes_mask": "mask" in inspect.signature(called).parameters}


class DeepSupervision(StandIn):
    """``DeepSupervisionLoss``; ``input`` is a list of tensors or one tensor."""

    # A constant is known while TorchScript compiles: a branch on it leaves out what does not compile.
    __constants__: ClassVar[tuple[str, ...]] = ("takes_mask",)

    if TYPE_CHECKING:
        takes_mask: bool
        weights: list[float] | None
        weight_mode: str
        interp_mode: str

        def loss(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor: ...

    def forward(self, input: Tensor | list[Tensor], target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``DeepSupervisionLoss.forward``."""
        if isinstance(input, Tensor):
            return self.of_level(input.float(), target, mask)
        total = torch.zeros((), device=target.device)
        factors = torch.ops.dicekernels_losses.level_weights(len(input), self.weight_mode, self.weights)
        for level, output in enumerate(input):
            resized, weights = torch.ops.dicekernels_losses.at_level(output, target, mask, self.interp_mode)
            value = self.of_level(output.float(), resized, weights)
            if value.ndim > 0:
                raise RuntimeError(
                    f"loss: gave shape {value.shape} on level {level}, expected one number; give the loss "
                    "the reduction 'mean' or 'sum'"
                )
            total = total + factors[level] * value
        return total.float()

    def of_level(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return self.loss(output, target)
        if self.takes_mask:
            return self.loss(output, target, mask)
        raise TypeError("mask: the loss takes none")


class Masked(StandIn):
    """``MaskedLoss``."""

    if TYPE_CHECKING:

        def loss(self, input: Tensor, target: Tensor) -> Tensor: ...

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``MaskedLoss.forward``."""
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=2)
            return self.loss(input, target)
        input, target = torch.ops.dicekernels_losses.masked(input, target, mask)
        return self.loss(input, target)
