"""A configured MONAI loss as the loss of this package that computes the same. Imports nothing of MONAI."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import modules
from ..arguments import documented


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


@dataclass(frozen=True)
class Plan:
    """What a MONAI loss consists of.

    Attributes:
        arguments: attribute -> argument of our constructor, which has MONAI's names.
        later: attributes that are no argument, and are set as they are.
        fixed: attributes that must be as MONAI's constructor leaves them.
        halves: attribute -> class of the module there.
    """

    arguments: dict[str, str]
    later: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    halves: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        return {*self.arguments, *self.later, *self.fixed, *self.halves}


_ACTIVATION = _same("sigmoid", "softmax", "other_act")
_SUMS = _same("include_background", "to_onehot_y", "reduction", "smooth_nr", "smooth_dr", "batch")
_DICE = _SUMS | _same("squared_pred", "jaccard", "soft_label") | {"class_weight": "weight"}
PLANS = {
    "DiceLoss": Plan(_DICE | _ACTIVATION | _same("ignore_index")),
    "MaskedDiceLoss": Plan(
        _DICE | {f"pre_{name}": name for name in _ACTIVATION},
        fixed={"sigmoid": False, "softmax": False, "other_act": None, "ignore_index": None},
        halves={"spatial_weighted": "MaskedLoss"},
    ),
    "GeneralizedDiceLoss": Plan(_SUMS | _ACTIVATION | _same("w_type", "soft_label")),
    "TverskyLoss": Plan(_SUMS | _ACTIVATION | _same("alpha", "beta", "soft_label", "ignore_index")),
    "MCCLoss": Plan(_SUMS | _ACTIVATION),
    "FocalLoss": Plan(
        _same("include_background", "to_onehot_y", "gamma", "alpha", "reduction", "use_softmax")
        | _same("ignore_index")
        | {"class_weight": "weight"},
        later=("weight",),
    ),
    "GeneralizedWassersteinDiceLoss": Plan(
        _same("reduction", "smooth_nr", "smooth_dr") | {"m": "dist_matrix", "alpha_mode": "weighting_mode"},
        later=("m", "num_classes"),
    ),
    "AsymmetricUnifiedFocalLoss": Plan(
        _same("to_onehot_y", "num_classes", "weight", "gamma", "delta", "reduction", "ignore_index"),
        halves={
            "asy_focal_loss": "AsymmetricFocalLoss",
            "asy_focal_tversky_loss": "AsymmetricFocalTverskyLoss",
        },
    ),
    "DiceCELoss": Plan(
        _same("lambda_dice", "lambda_ce"),
        later=("reduction",),
        halves={
            "dice": "DiceLoss",
            "cross_entropy": "CrossEntropyLoss",
            "binary_cross_entropy": "BCEWithLogitsLoss",
        },
    ),
    "DiceFocalLoss": Plan(
        _same("lambda_dice", "lambda_focal", "to_onehot_y"),
        later=("reduction",),
        halves={"dice": "DiceLoss", "focal": "FocalLoss"},
    ),
    "GeneralizedDiceFocalLoss": Plan(
        _same("lambda_gdl", "lambda_focal"),
        later=("reduction",),
        halves={"generalized_dice": "GeneralizedDiceLoss", "focal": "FocalLoss"},
    ),
    "DeepSupervisionLoss": Plan(
        _same("loss", "weight_mode", "weights"),
        later=("interp_mode", "reduction"),
    ),
    "MaskedLoss": Plan(_same("loss"), later=("reduction",)),
}
UNIFIED_HALF = {"to_onehot_y": False, "ignore_index": None, "reduction": "mean"}
# Their numbers are others in MONAI 1.5 and before.
CHANGED_IN_1_6 = ("MaskedDiceLoss", "GeneralizedWassersteinDiceLoss", "AsymmetricUnifiedFocalLoss")
WRAPPERS = ("DeepSupervisionLoss", "MaskedLoss")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@documented()
def from_monai(loss: nn.Module) -> nn.Module:
    """The loss of this package that computes what a MONAI 1.6 loss computes as it is configured now.

    Every option is carried, attributes that were changed after construction too, and the training flag of
    each part. Buffers (class weights) are the same tensors, not copies: what changes them in place changes
    both losses. So the device is the same and so is the ``state_dict``. The wrappers are converted with what
    they wrap. A loss of this package is returned as it is.

    Args:
        loss: an instance of one of the losses of ``monai.losses`` that have a counterpart here, or one of
            this package.

    Returns:
        The loss of this package of the same name.

    Raises:
        TypeError: another class: one of MONAI's without a counterpart here (keep it), a subclass, a loss
            of torch's or of yours.
        ValueError: something in it that is not carried: hooks, parameters, a half that was replaced, an
            attribute that MONAI does not know, options that do not fit together.

    Warns:
        UserWarning: the MONAI that is loaded is not 1.6, which is what results are compared with.
    """
    if not _is_ours(loss):
        _check_version(loss)
    return _converted(loss, type(loss).__name__)


def _converted(loss: Any, path: str) -> nn.Module:
    if _is_ours(loss):
        same: nn.Module = loss
        return same
    name = _name(loss, path)
    plan = PLANS[name]
    _refuse_unknown(loss, plan.names, path)
    _refuse_changed(loss, plan.fixed, path)
    # An older MONAI lacks the newer options: then ours have their defaults.
    given = {to: getattr(loss, key) for key, to in plan.arguments.items() if hasattr(loss, key)}
    _refuse_gradients(given, path)
    if name in WRAPPERS:
        given["loss"] = _converted(given["loss"], f"{path}.loss")
    try:
        ours: nn.Module = getattr(modules, name)(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
    for key in plan.later:
        setattr(ours, key, getattr(loss, key))
    for key, kind in plan.halves.items():
        _carry_half(loss, ours, key, kind, f"{path}.{key}")
    ours.training = loss.training
    devices = {buffer.device.type for buffer in loss.buffers()}
    if len(devices) == 1 and devices.isdisjoint({"cpu", "meta"}):
        ours.to(next(loss.buffers()).device)  # the lambdas; the buffers are there
    return ours


def _is_ours(loss: Any) -> bool:
    return any(kind.__module__.startswith(modules.__name__) for kind in type(loss).__mro__)


def _name(loss: Any, path: str) -> str:
    """The class of a MONAI loss that has a counterpart."""
    kind = type(loss)
    if not isinstance(loss, nn.Module):
        raise TypeError(f"{path}: got {loss!r}, expected an instance of a MONAI loss: {', '.join(PLANS)}")
    if kind.__module__.startswith("monai.losses."):
        if kind.__qualname__ in PLANS:
            return kind.__qualname__
        raise TypeError(
            f"{path}: MONAI's {kind.__qualname__} has no counterpart here: keep it. "
            f"Converted are {', '.join(PLANS)}"
        )
    for base in kind.__mro__[1:]:
        if base.__module__.startswith("monai.losses."):
            ours = base.__qualname__ in PLANS
            raise TypeError(
                f"{path}: {kind.__qualname__} is a subclass of MONAI's {base.__qualname__}, and what it "
                "overrides cannot be carried. "
                + (f"Derive it from dicekernels.{base.__qualname__}" if ours else "Keep it")
            )
    wrapper = ". A wrapper of this package takes any callable: build it around yours" if "." in path else ""
    raise TypeError(
        f"{path}: got {kind.__module__}.{kind.__qualname__}, expected one of MONAI's losses "
        f"{', '.join(PLANS)}{wrapper}"
    )


def _check_version(loss: Any) -> None:
    version = str(getattr(sys.modules.get("monai"), "__version__", "unknown"))
    found = re.match(r"(\d+)\.(\d+)", version)
    numbers = (int(found[1]), int(found[2])) if found else None
    if numbers == (1, 6) or not type(loss).__module__.startswith("monai."):
        return
    parts = loss.modules() if isinstance(loss, nn.Module) else [loss]
    changed = [type(part).__name__ for part in parts if type(part).__name__ in CHANGED_IN_1_6]
    if changed and numbers is not None and numbers < (1, 6):
        raise ValueError(
            f"loss: {changed[0]} of MONAI {version} computes other numbers than that of MONAI 1.6, which "
            f"this package follows. Keep it, or take dicekernels.{changed[0]} knowing that"
        )
    warnings.warn(
        f"MONAI {version} is loaded, and dicekernels is compared with MONAI 1.6: compare a few values before "
        "you rely on them (docs/migrating-from-monai.md)",
        UserWarning,
        stacklevel=3,
    )


def _refuse_unknown(loss: nn.Module, known: set[str], path: str) -> None:
    """Hooks, parameters, and attributes, buffers and modules of other names.

    Raises:
        ValueError: there is one.
    """
    for key in _OF_EVERY_MODULE:
        if key.endswith("_hooks") and getattr(loss, key, None):
            raise ValueError(
                f"{path}: has hooks ({key}), which are not carried; register them on the new loss"
            )
    parameters = [key for key, value in loss._parameters.items() if value is not None]
    if parameters:
        raise ValueError(
            f"{path}: {parameters[0]!r} is a parameter, which is not carried; set it on the new loss"
        )
    there = {*vars(loss)} - _OF_EVERY_MODULE | {*loss._buffers} | {*loss._modules}
    unknown = sorted(there - known)
    if unknown:
        raise ValueError(
            f"{path}: has {unknown[0]!r}, which MONAI's {type(loss).__name__} does not; "
            "delete it before the conversion and set it on the new loss"
        )


def _refuse_changed(loss: nn.Module, fixed: dict[str, Any], path: str) -> None:
    for key, value in fixed.items():
        got = getattr(loss, key, value)
        if got is not value and got != value:
            raise ValueError(f"{path}: {key} was set to {got!r} after construction, which is not carried")


def _refuse_gradients(given: dict[str, Any], path: str) -> None:
    for key, value in given.items():
        if isinstance(value, Tensor) and value.requires_grad and not key.startswith("lambda_"):
            raise ValueError(
                f"{path}: {key} requires a gradient, which is not carried; set it on the new loss"
            )


def _carry_half(loss: nn.Module, ours: nn.Module, key: str, kind: str, path: str) -> None:
    """One half of a compound loss, from theirs to ours.

    Raises:
        ValueError: it is another module than MONAI's constructor put there.
    """
    half = getattr(loss, key)
    where = type(half).__module__
    if type(half).__qualname__ != kind or not where.startswith(("monai.losses.", "torch.nn.")):
        raise ValueError(
            f"{path}: was replaced by {where}.{type(half).__qualname__}, which is not carried; "
            "convert the loss without it, then set it on the new loss"
        )
    if kind in _CARRIED:
        carried = _CARRIED[kind](loss, half, getattr(ours, key, None), path)
    else:
        carried = _converted(half, path)
    if carried is not None:
        carried.training = half.training
        setattr(ours, key, carried)


def _cross_entropy(loss: nn.Module, half: Any, ours: Any, path: str) -> nn.Module:
    _refuse_unknown(half, {"reduction", "ignore_index", "label_smoothing", "weight"}, path)
    return nn.CrossEntropyLoss(
        weight=half.weight,
        ignore_index=half.ignore_index,
        reduction=half.reduction,
        label_smoothing=half.label_smoothing,
    )


def _binary_cross_entropy(loss: nn.Module, half: Any, ours: Any, path: str) -> nn.Module:
    _refuse_unknown(half, {"reduction", "weight", "pos_weight"}, path)
    return nn.BCEWithLogitsLoss(weight=half.weight, reduction=half.reduction, pos_weight=half.pos_weight)


def _unified_half(loss: nn.Module, half: Any, ours: Any, path: str) -> nn.Module:
    _refuse_unknown(half, {*UNIFIED_HALF, "gamma", "delta", "epsilon"}, path)
    _refuse_changed(half, UNIFIED_HALF, path)
    for key in ("gamma", "delta", "epsilon"):
        setattr(ours, key, getattr(half, key))
    carried: nn.Module = ours
    return carried


def _masked_dice(loss: nn.Module, half: Any, ours: Any, path: str) -> None:
    """MaskedDiceLoss holds a wrapper of a method of its own."""
    _refuse_unknown(half, {"loss", "reduction"}, path)
    if getattr(half.loss, "__self__", None) is not loss or half.loss.__name__ != "forward":
        raise ValueError(
            f"{path}: wraps something else than this loss, as after copy.copy or a change; "
            "use copy.deepcopy or build the loss anew"
        )


_CARRIED: dict[str, Callable[[nn.Module, Any, Any, str], nn.Module | None]] = {
    "CrossEntropyLoss": _cross_entropy,
    "BCEWithLogitsLoss": _binary_cross_entropy,
    "AsymmetricFocalLoss": _unified_half,
    "AsymmetricFocalTverskyLoss": _unified_half,
    "MaskedLoss": _masked_dice,
}
