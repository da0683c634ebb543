"""What the backends for GPUs ask of the machine: static facts, asked once, and if a graph is captured."""

from __future__ import annotations

import torch

Capability = tuple[int, int]

_capabilities: tuple[Capability, ...] | None = None


def capabilities() -> tuple[Capability, ...]:
    """Compute capabilities of the GPUs that this process sees, each once, the oldest first.

    Asked only for logits on a GPU, so CUDA is up already.
    """
    global _capabilities
    if _capabilities is None:
        found = {torch.cuda.get_device_capability(at) for at in range(torch.cuda.device_count())}
        _capabilities = tuple(sorted(found))
    return _capabilities


# What torch.compiler.assume_constant_result does; that imports torch._dynamo, which doubles the time of our
# import.
capabilities._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo's own mark


def capturing(device: torch.device) -> bool:
    """Whether the current stream is captured; nothing is asked of CUDA for tensors of other devices."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# Compute capabilities of Tegra, last Xavier, Orin and Thor (11.0 since CUDA 13, 10.1 before). Their machine
# code is that of no other GPU, theirs or not; PTX is. (CUDA programming guide, "Binary compatibility".)
TEGRA = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0)})


def runs_on(architectures: str, capability: Capability) -> bool:
    """Whether code for ``architectures`` runs on a GPU.

    Args:
        architectures: as CMake names them, "80-real,90a-real,120": machine code, and with no suffix PTX too.
            Machine code runs on the same major capability from its minor one on, that with an "a" and that
            of a Tegra on its own alone, and PTX on every newer GPU. (CUDA programming guide, "Compute
            capabilities".)
        capability: (major, minor).
    """
    for entry in architectures.split(","):
        number, _, kind = entry.partition("-")
        own = number.endswith(("a", "f"))
        major, minor = divmod(int(number.rstrip("af")), 10)
        if (major, minor) == capability:
            return True
        compatible = not own and not TEGRA & {(major, minor), capability}
        if compatible and major == capability[0] and minor <= capability[1] and kind != "virtual":
            return True
        if not own and kind != "real" and (major, minor) <= capability:
            return True
    return False
