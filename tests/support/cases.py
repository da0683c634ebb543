"""Problems that the tests share: data from a seed, layouts, and the oracle of the region rows."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from dicekernels import reference

ACTIVATIONS = ["softmax", "sigmoid", None]
OVERLAPS = ["product", "min", "squared", "voxel_squared"]
VOXEL_TERMS = [None, "ce", "bce", "focal_sigmoid", "focal_softmax"]
LOGIT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LABEL_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.bfloat16]
VALUE_DTYPES = [*LABEL_DTYPES, torch.bool, torch.float16, torch.float64]
LAYOUTS_3D = [
    "contiguous",
    "channels_last_3d",
    "class_slice",
    "batch_strided",
    "permuted",
    "crop",
    "flipped",
    "expanded_batch",
]
# Where the problems are: "cpu", or what tests/support/on_device.py runs the contract on.
DEVICE = os.environ.get("DICEKERNELS_TEST_DEVICE", "cpu")


def swept(values: Iterable[Any], now: Collection[Any]) -> list[Any]:
    """Values of a parameter: `make test` takes those of ``now``, `make test-all` the others, too."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (value not in now)) for value in values]


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def _drawn(seed: int) -> torch.Generator:
    """Of the CPU, so that the data are the same on every device."""
    return torch.Generator("cpu").manual_seed(seed)


def make_logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal with deviation 2: probabilities from 1e-4 to 1 - 1e-4."""
    values = 2 * torch.randn(shape, generator=_drawn(seed), dtype=torch.float64, device="cpu")
    return values.to(dtype).to(DEVICE)


def make_labels(
    shape: tuple[int, ...], classes: int, dtype: torch.dtype = torch.uint8, seed: int = 1
) -> Tensor:
    """Labels of ``shape`` in [0, classes) that ``dtype`` holds exactly."""
    top = {torch.bool: 2, torch.int8: 127, torch.uint8: 256, torch.bfloat16: 256}.get(dtype, classes)
    return torch.randint(min(classes, top), shape, generator=_drawn(seed), device="cpu").to(dtype).to(DEVICE)


def make_values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """A dense target: fractions in [0, 1), or integers 0 to 2 (bool: 0 and 1)."""
    if dtype.is_floating_point:
        values = torch.rand(shape, generator=_drawn(seed), dtype=torch.float64, device="cpu")
    else:
        values = torch.randint(2 if dtype == torch.bool else 3, shape, generator=_drawn(seed), device="cpu")
    return values.to(dtype).to(DEVICE)


def make_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    """Voxel weights (B, 1, *S): "binary" zeros and ones, "fraction" in [0, 2) with a third exactly 0."""
    at = (shape[0], 1, *shape[2:])
    uniform = torch.rand(at, generator=_drawn(seed), dtype=torch.float64, device="cpu")
    weights = uniform > 0.4 if kind == "binary" else torch.where(uniform > 1 / 3, 2 * uniform - 0.1, 0.0)
    return weights.to(dtype).to(DEVICE)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` in another layout; memory around them holds NaN, or the dtype's largest integer.

    "expanded_batch" repeats the first sample.
    """
    poison = float("nan") if x.is_floating_point() else (x.dtype != torch.bool and torch.iinfo(x.dtype).max)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "channels_last_3d":
        return x.to(memory_format=torch.channels_last_3d)
    if layout == "class_slice":
        room = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), poison)
        room[:, 2:-1] = x
        return room[:, 2:-1]
    if layout == "batch_strided":
        room = x.new_full((2 * x.shape[0], *x.shape[1:]), poison)
        room[::2] = x
        return room[::2]
    if layout == "permuted":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "crop":
        room = x.new_full((*x.shape[:2], *(size + 2 for size in x.shape[2:])), poison)
        inside = (slice(None), slice(None), *(slice(1, -1) for _ in x.shape[2:]))
        room[inside] = x
        return room[inside]
    if layout == "flipped":  # the space in the order W, H, D; every axis downwards
        order = [0, 1, *range(x.ndim - 1, 1, -1)]
        return x.permute(order).contiguous().permute(order)
    if layout == "expanded_batch":
        return x[:1].expand(x.shape)
    assert layout == "contiguous", layout
    return x.contiguous()


def _on_cpu(oracle: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """The oracle computed by the CPU from tensors of any device; the rows come back to that of the logits."""

    @functools.wraps(oracle)
    def run(logits: Tensor, target: Tensor, *args: Any, mask: Tensor | None = None, **options: Any) -> Any:
        with torch.device("cpu"):
            mask = None if mask is None else mask.cpu()
            rows = oracle(logits.cpu(), target.cpu(), *args, mask=mask, **options)
        return {name: row.to(logits.device) for name, row in rows.items()}

    return run


@_on_cpu
def oracle_rows(
    logits: Tensor,
    target: Tensor,
    dtype: torch.dtype = torch.float64,
    *,
    activation: str | None = "softmax",
    overlap: str = "product",
    voxel_term: str | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "weight",
    ignore_index: int | None = None,
    gamma: float = 2.0,
    first_class: int = 0,
) -> dict[str, Tensor]:
    """``reference.region_sums`` in ``dtype`` with the arguments of ``dicekernels.region_sums``.

    It has no "voxel_squared"; that is written out here: tp = p^2 g, fp = p^2 (1 - g), fn = (1 - p)^2 g.
    """
    z = logits if logits.dtype == dtype else logits.to(dtype)
    to_onehot_y = target.shape != logits.shape
    options = {
        "activation": activation,
        "voxel_term": voxel_term,
        "mask": None if mask is None else mask.to(dtype),
        "mask_mode": mask_mode,
        "ignore_index": ignore_index,
        "to_onehot_y": to_onehot_y,
        "gamma": gamma,
        "first_class": first_class,
    }
    if overlap != "voxel_squared":
        return reference.region_sums(z, target, overlap=overlap, **options)
    rows = reference.region_sums(z, target, **options)
    m = torch.ones_like(z[:, :1]) if mask is None else mask.to(dtype)
    if to_onehot_y:
        labels = target if target.ndim == z.ndim else target[:, None]
        ignored = labels == ignore_index if ignore_index is not None else torch.zeros_like(labels).bool()
        m = m * ~ignored
        target = reference.dense_target(z, torch.where(m == 0, 0, labels), True)
    p, g = reference.rows.activate(z, activation), target.to(dtype)
    weight, product = (m, 1) if mask_mode == "weight" else (1, m)
    p, g, space = p * product, g * product, tuple(range(2, z.ndim))
    inside = m != 0
    for name, term in (("I", p * p * g), ("FP", p * p * (1 - g)), ("FN", (1 - p) ** 2 * g)):
        rows[name] = torch.where(inside, weight * term, 0).sum(space)
    return rows


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What p, exp and log are computed in for logits of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient(value: Callable[[Tensor], Tensor], logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """d value / d logits at the values of ``logits``, computed in ``dtype`` (default: as they are)."""
    leaf = logits.detach() if dtype is None else logits.detach().to(dtype)
    leaf.requires_grad_()
    return torch.autograd.grad(value(leaf), leaf)[0]
