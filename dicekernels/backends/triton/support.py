"""Whether Triton can serve here, from static facts; imports no triton, which would cost every import of ours.

The kernels use what triton 3.4 to 3.9 have alike. 3.2 aborts the process for Blackwell GPUs and 3.3 has a
``tl.histogram`` without a mask; newer ones than 3.9 are tried as they come.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re

import torch

from .. import refused
from ..gpus import capabilities

OLDEST = (3, 4)
MAX_CLASSES = 512
MIN_CAPABILITY = (7, 5)
DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu")


def interpreted() -> bool:
    """Whether Triton runs its kernels in NumPy, on tensors of the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def compiles_ptx() -> bool:
    """Whether kernels are compiled by NVIDIA's assembler, with its options and PTX in the text."""
    return not interpreted() and torch.version.hip is None and getattr(torch.version, "xpu", None) is None


def triton_version() -> str | None:
    """Version of the installed triton, None if there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import triton

    return str(triton.__version__)


def unavailable() -> str:
    """ "" or the reason why no kernel of Triton can run in this process."""
    version = triton_version()
    if version is None:
        return "triton is not installed; pip install 'dicekernels[triton]', or the triton of your torch build"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
        return (
            f"triton {version} is installed, it takes 3.4 or newer (older ones miscompile or lack features "
            "that it uses); upgrade torch, which brings its triton along"
        )
    if interpreted() or torch.cuda.device_count() > 0:
        return ""
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return ""
    return "torch sees no GPU here (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"


def can_run(device: str, dtype: torch.dtype, classes: int) -> str:
    """ "" or the reason why it does not take logits of these."""
    devices = ("cpu",) if interpreted() else ("cuda", "xpu")
    if device not in devices:
        return f"the logits are on {device}, it takes tensors on {' or '.join(devices)}"
    if reason := refused(dtype, classes, MAX_CLASSES):
        return reason
    if device == "cuda" and torch.version.hip is None:
        capability = capabilities()[0]
        if capability < MIN_CAPABILITY:
            return f"a GPU here has compute capability {capability}, it takes {MIN_CAPABILITY} and newer"
    return ""
