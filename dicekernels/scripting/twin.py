"""What the scriptable twins share; why there are twins: ``dicekernels.scripting``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from .. import checks

T = TypeVar("T", bound="Twin")
# Options that Python takes in more types than the functions of TorchScript do.
EXACT: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("include_background", "to_onehot_y", "sigmoid", "softmax", "batch"), bool),
    **dict.fromkeys(("pre_sigmoid", "pre_softmax"), bool),
    **dict.fromkeys(("smooth_nr", "smooth_dr"), float),
    **dict.fromkeys(("reduction", "w_type"), lambda option: getattr(option, "value", option)),
    "ignore_index": checks.index,
}


class Twin(nn.Module):
    """The attributes, buffers and submodules of a loss, and a dense ``forward`` that TorchScript can read.

    Outside of TorchScript a twin is that loss. ``torch.jit.script`` of a parent module puts the twin where
    the parent had the loss and leaves it there, so the parent must still run the kernels, and what is set
    on the twin or moved with it must reach the loss.
    """

    # A constant is known while TorchScript compiles: a branch on it leaves out what does not compile.
    __constants__: ClassVar[tuple[str, ...]] = ("has_act",)

    ACTIVATION: ClassVar[str] = "other_act"

    if TYPE_CHECKING:
        original: tuple[nn.Module]  # in a tuple it is no submodule
        has_act: bool

    @classmethod
    def of(cls: type[T], loss: nn.Module, **changed: Any) -> T:
        """The twin of ``loss``; ``changed``: attributes that TorchScript needs in another form.

        Registered tensors are shared, so that state and device stay the same.

        Raises:
            RuntimeError: something was changed in the loss that the twin does not do.
        """
        twin = cls.__new__(cls)
        exact = {name: cast(getattr(loss, name)) for name, cast in EXACT.items() if hasattr(loss, name)}
        own = {name: value for name, value in loss.__dict__.items() if not name.startswith("_traced_")}
        state = {**own, **exact, **changed, "original": (loss,)}
        state["has_act"] = getattr(loss, cls.ACTIVATION, None) is not None
        state["_modules"] = dict(loss._modules)  # torch.jit.script replaces what is in it
        twin.__dict__.update(state)
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The loss; TorchScript goes by ``forward``."""
        return self.original[0](*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original[0], name, value)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> nn.Module:
        """The loss may have changed since this twin was made."""
        # Every loss that has a twin has this method, which nn.Module does not know.
        return self.original[0].__prepare_scriptable__()  # type: ignore[operator,no-any-return]


def refuse(loss: nn.Module, reason: str) -> None:
    """Raises RuntimeError: a reason is given, so the twin would not be the loss."""
    if reason:
        raise RuntimeError(
            f"torch.jit.script of {type(loss).__name__}: {reason}. Undo that, or write a forward that "
            "TorchScript compiles"
        )
