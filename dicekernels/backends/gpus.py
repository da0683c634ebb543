"""What the backends for GPUs ask of the machine: static facts, asked once."""

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


def runs_on(architectures: str, capability: Capability) -> bool:
    """Whether code for ``architectures`` runs on a GPU.

    Args:
        architectures: as CMake names them, "80-real,90a-real,120": machine code, and with no suffix PTX too.
            Machine code runs on the same major capability from its minor one on, that with an "a" on its
            own alone, and PTX on every newer GPU. (CUDA programming guide, "Compute capabilities".)
        capability: (major, minor).
    """
    for entry in architectures.split(","):
        number, _, kind = entry.partition("-")
        own = number.endswith(("a", "f"))
        major, minor = divmod(int(number.rstrip("af")), 10)
        if (major, minor) == capability:
            return True
        if not own and major == capability[0] and minor <= capability[1] and kind != "virtual":
            return True
        if not own and kind != "real" and (major, minor) <= capability:
            return True
    return False
