"""What is measured: problems and lists of problems."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

LOSSES = ("dice", "dice_ce", "gdl", "tversky", "dice_focal", "gdl_focal")
LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Case:
    """One problem: softmax loss over integer labels.

    shape: logits ``(B, C, *S)``; labels are ``(B, 1, *S)``. dtype, label_dtype: torch's names.
    layout: memory format of the logits, "contiguous" or "channels_last" (of 2 or 3 spatial dims).
    """

    loss: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    label_dtype: str = "uint8"
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: got {self.loss!r}, expected one of {LOSSES}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: got {self.layout!r}, expected one of {LAYOUTS}")

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.loss} {size} {self.dtype} {self.label_dtype} {self.layout}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}

    @property
    def voxels(self) -> int:
        return self.shape[0] * math.prod(self.shape[2:])

    @property
    def logits_bytes(self) -> int:
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize

    @property
    def forward_bytes(self) -> int:
        """Least traffic of a forward pass: logits and labels read once."""
        return self.logits_bytes + self.voxels * torch_dtype(self.label_dtype).itemsize

    @property
    def floor_bytes(self) -> int:
        """Least traffic of a step: logits and labels read twice, the gradient written once."""
        return 2 * self.forward_bytes + self.logits_bytes

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        """Logits (a leaf that requires grad) and labels, the same for every contender and run.

        Labels come in blocks of eight voxels a side, as organs do: neighbours mostly agree. Each kind of
        device draws numbers of its own.
        """
        generator = torch.Generator(device).manual_seed(0)
        drawn = {"generator": generator, "device": device}
        logits = torch.randn(self.shape, **drawn).to(torch_dtype(self.dtype))
        if self.layout == "channels_last":
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            logits = logits.contiguous(memory_format=formats[logits.ndim])
        batch, classes, *space = self.shape
        coarse = [math.ceil(size / 8) for size in space]
        labels = torch.randint(classes, (batch, 1, *coarse), **drawn).to(torch_dtype(self.label_dtype))
        for dim, size in enumerate(space, start=2):
            labels = labels.repeat_interleave(8, dim).narrow(dim, 0, size)
        return logits.requires_grad_(), labels.contiguous()


@dataclass(frozen=True)
class Suite:
    """A list of cases and how hard to measure them.

    device: the only device type the suite makes sense on, None for any. compiled: also run what
    needs torch.compile (minutes of compilation). memory: "none", "profiled" (what torch's
    allocators hand out) or "resident" (also the peak resident size of subprocesses; CPU only).
    backends: those of ours that compete, as far as they can run; none: what is chosen for the case.
    monai: also run MONAI.
    """

    cases: tuple[Case, ...]
    device: str | None
    rounds: int
    compiled: bool
    memory: str
    backends: tuple[str, ...] = ()
    monai: bool = True


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: got {name!r}, expected the name of a torch dtype, as 'float32'")
    return dtype


# Brain tumours (4 classes), abdominal organs (14), whole body (117).
_FEW, _SOME, _MANY = (2, 4, 96, 96, 96), (2, 14, 96, 96, 96), (1, 117, 64, 64, 64)

_CPU = (
    *(Case(loss, shape) for loss in ("dice_ce", "gdl", "tversky") for shape in (_FEW, _SOME, _MANY)),
    *(Case("dice_focal", shape) for shape in (_FEW, _SOME, _MANY)),
    Case("gdl_focal", _FEW),
    Case("dice", _FEW),
    Case("dice_ce", _FEW, label_dtype="int64"),
    Case("dice_ce", _FEW, layout="channels_last"),
    Case("dice_ce", _SOME, dtype="bfloat16"),
)

# What memory of 4.3 TB/s moves in 200 microseconds: launches and tails are then a small part of a step.
_FILLING = 860_000_000


def _filling(loss: str, classes: int, dtype: str = "float32", **more: str) -> Case:
    """Volumes of 128^3, as many as it takes."""
    one = Case(loss, (1, classes, 128, 128, 128), dtype, **more)
    samples = math.ceil(_FILLING / one.floor_bytes)
    return Case(loss, (samples, *one.shape[1:]), dtype, **more)


_TRAINED = ("dice_ce", "gdl", "tversky", "dice_focal")
_DTYPES = ("float32", "bfloat16")

# What has a goal comes first, so that a run that is cut short has measured it.
_GPU = (
    *(_filling("dice_ce", classes) for classes in (4, 14, 32, 117)),
    *(_filling("dice_ce", classes, "bfloat16") for classes in (14, 32, 117)),
    *(Case("dice_ce", (samples, 4, 64, 64, 64), dtype) for samples in (1, 2) for dtype in _DTYPES),
    *(Case(loss, (1, 4, 64, 64, 64)) for loss in _TRAINED[1:]),
    *(_filling(loss, classes) for loss in ("gdl", "tversky") for classes in (4, 14, 32, 117)),
    *(_filling(loss, classes, "bfloat16") for loss in ("gdl", "tversky") for classes in (14, 32, 117)),
    *(_filling("dice_focal", classes, dtype) for classes in (4, 14, 32, 117) for dtype in _DTYPES),
    *(_filling(loss, 4, "bfloat16") for loss in _TRAINED[:3]),
    *(_filling(loss, 2, dtype) for loss in _TRAINED for dtype in _DTYPES),
    *(
        _filling(loss, classes, dtype, layout="channels_last")
        for loss in _TRAINED
        for classes in (4, 14, 32, 117, 2)
        for dtype in _DTYPES
    ),
    _filling("dice_ce", 14, "float16"),
    _filling("dice_ce", 4, label_dtype="int64"),
)

# Compiled peers take minutes for many classes: a few problems, and of 117 classes none.
_GPU_PEERS = (
    *(Case("dice_ce", (2, classes, 128, 128, 128)) for classes in (4, 14)),
    Case("dice_ce", (2, 4, 128, 128, 128), "bfloat16"),
    *(Case(loss, (2, 4, 128, 128, 128)) for loss in ("gdl", "tversky", "dice_focal")),
    Case("dice_ce", (2, 14, 128, 128, 128), "bfloat16"),
)

_ON_GPUS = ("cuda", "triton")
SUITES = {
    "cpu": Suite(_CPU, "cpu", rounds=15, compiled=True, memory="resident"),
    "gpu": Suite(_GPU, "cuda", rounds=30, compiled=False, memory="profiled", backends=_ON_GPUS, monai=False),
    "gpu_peers": Suite(_GPU_PEERS, "cuda", rounds=30, compiled=True, memory="profiled", backends=_ON_GPUS),
    "quick": Suite(
        (Case("dice_ce", (1, 4, 20, 24, 28)), Case("gdl", (2, 3, 17, 19, 23))),
        None,
        rounds=3,
        compiled=False,
        memory="profiled",
    ),
}
