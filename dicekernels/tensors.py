"""Which tensors the kernels read: those with a value in memory for each place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace follows this call and may read no tensor."""
    # torch documents is_tracing, but neither exports nor types it.
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_compiling() or tracing


def readable(value: Tensor) -> bool:
    """Whether the values of a tensor may be read: no trace, transform or fake tensor hides them."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and not value.is_meta
        and not traced()
        and not torch._C._are_functorch_transforms_active()
    )


def tensor(name: str, value: Any) -> None:
    """Raises TypeError for what is no tensor, or a list of tensors in one."""
    if isinstance(value, Tensor) and not value.is_nested:
        return
    if isinstance(value, Tensor):
        got, remedy = "a nested tensor", "pad or crop the samples to one size and stack them"
    elif isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value):
        got = f"a {type(value).__name__} of {len(value)}"
        remedy = (
            f"torch.stack({name}) makes a batch of samples; outputs of several resolutions go into "
            "DeepSupervisionLoss, with one target"
        )
    else:
        got, remedy = type(value).__name__, f"wrap it in torch.as_tensor({name})"
    raise TypeError(f"{name}: got {got}, expected a torch.Tensor; {remedy}")


def dense_tensor(name: str, value: Any) -> None:
    """Raises TypeError unless the values lie in memory, one for each place: what the kernels read."""
    tensor(name, value)
    # By name: a check is no reason to import torch.distributed.tensor.
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: got a DTensor placed {tuple(value.placements)}, expected a torch.Tensor; pass "
            f"{name}.to_local() where it is replicated or each rank has samples of its own, "
            f"{name}.full_tensor() where its classes or its space are split, and the other arguments alike"
        )
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name}: got the layout {value.layout}, expected torch.strided; use {name}.to_dense()"
        )
    if value.is_quantized:
        raise TypeError(
            f"{name}: got the quantized {value.dtype}, expected a plain dtype; use {name}.dequantize()"
        )
    if value.is_floating_point() and value.element_size() == 1:
        raise TypeError(f"{name}: got {value.dtype}, expected a dtype to compute in; use {name}.bfloat16()")
    if value.is_complex():
        raise TypeError(f"{name}: got {value.dtype}, expected a real dtype; use {name}.real or {name}.abs()")


def as_tensor(name: str, value: Any, expected: str, device: torch.device | str | None = None) -> Tensor:
    """A number, a sequence, an array or a tensor, which is shared and not copied.

    Args:
        device: where what is no tensor yet goes; None: to the default device, as a new buffer of a module.

    Raises:
        TypeError, RuntimeError, ValueError: as torch.as_tensor, for anything else.
    """
    if isinstance(value, Tensor):
        dense_tensor(name, value)
        return value
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, RuntimeError, ValueError) as error:
        raise type(error)(f"{name}: got {value!r:.80}, expected {expected}") from None


def flat_stride(tensor: Tensor, spatial_from: int) -> int | None:
    """Stride of the space (dimensions ``spatial_from`` and on) seen as one dimension; None: it is not one."""
    expected, stride = None, 1
    sizes, strides = tensor.shape, tensor.stride()
    for dim in range(tensor.ndim - 1, spatial_from - 1, -1):
        if sizes[dim] == 1:
            continue
        if expected is None:
            stride = strides[dim]
        elif strides[dim] != expected:
            return None
        expected = strides[dim] * sizes[dim]
    return stride


def is_flat(tensor: Tensor, spatial_from: int) -> bool:
    """Whether the space has one voxel stride: all but some views, a spatial crop for one."""
    return tensor.is_contiguous() or flat_stride(tensor, spatial_from) is not None
