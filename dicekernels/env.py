"""What a bug report needs: `python -m dicekernels.env` (`--json` for machines).

Versions, how the libraries were built, the processor and the instruction set chosen on it, GPUs,
each backend with the reason why it is not available, and the environment variables that matter.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dicekernels._version import __version__
from dicekernels.backends import native
from dicekernels.dispatch import BACKENDS, choose, forced_backend, refusals, unavailable_backends

# Every variable that changes what the package does; docs/environment.md explains each.
VARIABLES = (
    "DICEKERNELS_BACKEND",
    "DICEKERNELS_CHECK",
    "DICEKERNELS_CPU_CAPABILITY",
    "DICEKERNELS_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
)


def report() -> dict[str, Any]:
    """The report as plain data, fit for JSON; no key is ever left out."""
    return {
        "versions": {
            "dicekernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch CUDA": torch.version.cuda,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "platform": platform.platform(),
        },
        "build": native.build_config(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "backends": _backends(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def chosen_backend(device: str) -> tuple[str, str]:
    """The backend of an ordinary loss on this device, and its processor or why it is no faster one."""
    logits = torch.empty(1, 4, 1, device=device)
    name = choose(logits).name
    if name == "cpu":
        return name, instruction_set()
    if name != "eager":
        return name, torch.cuda.get_device_name(logits.device) if device == "cuda" else ""
    if forced_backend() == "eager":
        return name, "as asked for"
    fast = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device, ("triton",))
    reasons = refusals(logits)
    return name, "; ".join(f"{other}: {reasons[other]}" for other in fast)


def instruction_set() -> str:
    """That of the CPU kernels as its makers spell it: AVX-512, AVX2, baseline."""
    isa = str(_kernel_isa())
    return {"avx512": "AVX-512", "avx2": "AVX2"}.get(isa, isa)


def backend_line(device: str) -> str:
    """``backend: cpu (AVX-512)``: what a program says before it measures or trains."""
    name, detail = chosen_backend(device)
    return f"backend: {name} ({detail})" if detail else f"backend: {name}"


def as_text(facts: Mapping[str, Any]) -> str:
    """`report()` as indented lines for people."""
    return "\n".join(_lines(facts, 0))


def _lines(facts: Mapping[str, Any], depth: int) -> Iterator[str]:
    width = max((len(str(key)) for key in facts), default=0)
    for key, value in facts.items():
        indent = "  " * depth
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}"
            yield from _lines(value, depth + 1)
        else:
            yield f"{indent}{key:<{width}}  {_plain(value)}"


def _plain(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    module = native.native_module()
    features = {} if module is None else module.cpu_features()
    return {
        "machine": platform.machine(),
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "features": sorted(name for name, usable in features.items() if usable),
        "kernels": _kernel_isa(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _kernel_isa() -> str | None:
    """The instruction set that the CPU library chose, or why it refuses; None without library."""
    if not native.is_loaded("cpu"):
        return None
    try:
        return str(torch.ops.dicekernels.cpu_capability())
    except RuntimeError as error:
        return f"refused: {error}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in properties
    ]


def _backends() -> dict[str, str]:
    """Each backend with "available" or the reason why it is not."""
    reasons = unavailable_backends()
    return {name: f"not available: {reasons[name]}" if name in reasons else "available" for name in BACKENDS}


def main(arguments: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m dicekernels.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    facts = report()
    if parser.parse_args(arguments).json:
        print(json.dumps(facts, indent=2))
    else:
        print(as_text(facts))


if __name__ == "__main__":
    main()
