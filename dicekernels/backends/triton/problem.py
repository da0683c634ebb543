"""Tensors as the kernels see them: their space flattened to one stride, as ``csrc/common/check.h``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...spec import BINARY_TERMS, ROWS, SumsSpec, row_index
from ...tensors import flat_stride, is_flat
from .codes import SUMS_FLOATS
from .configs import Tile, choose_tile
from .support import compiles_ptx

# Voxel offsets are int32 inside of a sample.
MAX_VOXELS = 2**31 - 2**20


# The integers of ``Problem.numbers``, parameters of both kernels. A variant for each multiple of 16 would be
# compiled in the middle of a training with patches of many sizes, so these are not specialized.
NUMBERS = (
    *("voxels", "logits_batch", "logits_channel", "logits_voxel", "target_batch", "target_channel"),
    *("target_voxel", "mask_batch", "mask_voxel", "ignore_index", "one"),
)


class View(NamedTuple):
    """(B, C, V) of a tensor; strides in elements, 0 for a dimension of size 1."""

    data: Tensor
    batch: int
    channel: int
    voxel: int

    def layout(self, elements: int) -> tuple[int, int, int, bool, bool]:
        """What a kernel is compiled for: divisors of the three strides, and whether voxels or channels are
        contiguous. ``elements``: that a thread reads at a time, those of 16 bytes of logits.

        Triton sees of an integer argument only whether 16 divides it, and compiles a variant for each
        outcome. So what lies between two rows of contiguous elements comes divided by the elements of a
        16-byte access, as far as those divide it, and the kernels multiply by them as a constant: rows of 8
        elements are enough for wide loads of half precision, 4 for float32.
        """
        vector = min(elements, 16 // self.data.element_size())
        if self.voxel == 1:
            rows = math.gcd(vector, self.batch, self.channel)
            return rows, rows, 1, True, self.channel == 1
        if self.channel == 1:
            rows = math.gcd(vector, self.batch, self.voxel)
            return rows, 1, rows, False, True
        return 1, 1, 1, False, False

    def strides(self, elements: int) -> tuple[int, int, int]:
        """The strides divided as ``layout`` says."""
        batch, channel, voxel, *_ = self.layout(elements)
        return self.batch // batch, self.channel // channel, self.voxel // voxel


def flat(tensor: Tensor, spatial_from: int) -> Tensor:
    """The tensor as the kernels can read it, a copy if it is not flat."""
    if not is_flat(tensor, spatial_from):
        tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def flat_inputs(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """``flat`` of the inputs of both passes."""
    labels = flat(target, 2 if target.ndim == logits.ndim else 1)
    return flat(logits, 2), labels, None if mask is None else flat(mask, 2)


def view_of(tensor: Tensor, spatial_from: int) -> View:
    """A view of (B, C, *S) or (B, *S)."""
    tensor = flat(tensor, spatial_from)
    voxel = flat_stride(tensor, spatial_from)
    assert voxel is not None
    batch = tensor.stride(0) if tensor.shape[0] > 1 else 0
    channel = tensor.stride(1) if spatial_from == 2 and tensor.shape[1] > 1 else 0
    return View(tensor, batch, channel, voxel)


def check_voxels(voxels: int) -> None:
    """Raises ValueError for a sample with more voxels than int32 offsets reach."""
    if voxels > MAX_VOXELS:
        raise ValueError(
            f"logits: got {voxels} voxels in a sample, expected at most {MAX_VOXELS} for the triton backend; "
            "split the volume, or use dicekernels.use_backend('eager')"
        )


@dataclass(frozen=True)
class Problem:
    """Everything that both passes are told about a problem."""

    logits: View
    target: View
    mask: View | None
    spec: SumsSpec
    classes: int
    voxels: int
    tile: Tile
    out: View

    @staticmethod
    def of(
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        spec: SumsSpec,
        gradient: Tensor | None = None,
    ) -> Problem:
        """``gradient``: what the backward pass writes. Raises ValueError for too many voxels in a sample."""
        classes, voxels = logits.shape[1], logits.shape[2:].numel()
        check_voxels(voxels)
        seen = view_of(logits, 2)
        labels = view_of(target, 2 if target.ndim == logits.ndim else 1)
        weights = None if mask is None else view_of(mask, 2)
        out = seen if gradient is None else view_of(gradient, 2)
        itemsize = logits.element_size()
        channels_last = seen.voxel != 1 and seen.channel == 1
        binary = spec.voxel_term in BINARY_TERMS
        tile = choose_tile(
            classes, itemsize, channels_last, gradient is not None, spec.dense, mask is not None, binary
        )
        return Problem(seen, labels, weights, spec, classes, voxels, tile, out)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, target and mask; a kernel without a mask reads nothing of the third."""
        return self.logits.data, self.target.data, (self.mask or self.logits).data

    def numbers(self) -> tuple[int, ...]:
        """The run-time integers by the names of NUMBERS."""
        ignored = self.spec.ignore_index
        mask = (0, 0) if self.mask is None else (self.mask.batch, self.mask.voxel)
        return (
            self.voxels // self.unit(),
            *self.logits.strides(self.elements),
            *self.target.strides(self.elements),
            *mask,
            0 if ignored is None else ignored,
            1,
        )

    @property
    def elements(self) -> int:
        """Logits in 16 bytes."""
        return 16 // self.logits.data.element_size()

    def unit(self) -> int:
        """What the voxel count comes divided by: see View.layout."""
        return math.gcd(self.elements, self.voxels)

    def constants(self) -> dict[str, Any]:
        """Constexprs of both passes, and the warps of a program."""
        spec = self.spec
        return {
            "C": self.classes,
            "DENSE": spec.dense,
            "ACTIVATION": int(spec.activation),
            "OVERLAP": int(spec.overlap),
            "VOXEL_TERM": int(spec.voxel_term),
            "BINARY": spec.voxel_term in BINARY_TERMS,
            "PLACES": places(spec.rows),
            "HAS_IGNORE": spec.ignore_index is not None and not spec.dense,
            "PRODUCT_MASK": spec.product_mask,
            "FLOATS": tuple(getattr(spec, name) for name in SUMS_FLOATS),
            "FIRST_CLASS": spec.first_class,
            "MASKED": self.mask is not None,
            "EVEN": self.voxels % self.tile.shape[1] == 0,
            "VOXEL_UNIT": self.unit(),
            "LOGITS": self.logits.layout(self.elements),
            "TARGET": self.target.layout(self.elements),
            "ASM": compiles_ptx(),
            "SHAPE": self.tile.shape,
            "SCATTERED": self.tile.scattered,
            "num_warps": self.tile.warps,
            # Multiply-adds are part of the recipe; triton 3.9 makes them an option.
            "enable_fp_fusion": True,
        } | ({"maxnreg": self.tile.registers} if compiles_ptx() else {})


def places(rows: int) -> tuple[int, ...]:
    """Where each row of ``spec.ROWS`` stands among those that are on (-1: it is off), and how many are on."""
    found = (row_index(rows, 1 << row) if rows >> row & 1 else -1 for row in range(len(ROWS)))
    return (*found, rows.bit_count())
