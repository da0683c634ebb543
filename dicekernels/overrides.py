"""What a subclass, an instance or a patched class has in place of a loss's own methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_Kind = TypeVar("_Kind", bound=type[nn.Module])
# Class -> its methods as they were when this package was imported.
_original: dict[type[nn.Module], dict[str, Any]] = {}


def remember(*names: str) -> Callable[[_Kind], _Kind]:
    """Decorator: notes the methods of a class that :func:`overridden` compares with."""

    def noted(kind: _Kind) -> _Kind:
        _original[kind] = {name: getattr(kind, name) for name in names}
        return kind

    return noted


def overridden(module: nn.Module, kind: type[nn.Module], but: str = "") -> tuple[str, ...]:
    """The remembered methods of ``kind``, ``but`` one, that ``module`` has others for.

    Raises:
        TypeError: a submodule was set under the name of a method, where no lookup finds it.
    """
    names: tuple[str, ...] = ()
    for name, method in _original[kind].items():
        if name in module._modules:
            raise TypeError(
                f"{type(module).__name__}.{name}: got a module under the name of a method, which Python "
                "finds first; set a function, or override the method in a subclass"
            )
        if name != but and (name in module.__dict__ or getattr(type(module), name) is not method):
            names += (name,)
    return names


def refuse(module: nn.Module, names: tuple[str, ...], remedy: str) -> None:
    """Refuses MONAI's methods and attributes that this package's loss has no use for.

    Raises:
        NotImplementedError: one of ``names`` was defined in a subclass or set on the instance.
    """
    for name in names:
        if name in module.__dict__ or name in module._modules or hasattr(type(module), name):
            raise NotImplementedError(
                f"{type(module).__name__}.{name}: got an override of MONAI's {name}, which this loss does "
                f"not call, so that it would change nothing; {remedy}"
            )
