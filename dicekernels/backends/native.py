"""Loads the compiled op libraries and keeps the first error of each for later.

`libdicekernels_<name>.so` stands beside the package (or in `DICEKERNELS_LIBRARY_PATH`) and
registers its ops with PyTorch when it is loaded. A library that cannot be loaded is no error here:
another backend takes over, and `load_error` tells the cause to whoever asks or forces the backend.
`warn_of_missing_libraries` says so once, when the package is imported. `_build_info.json` beside the
libraries says how they were built. Nothing here registers an op.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dicekernels._version import __version__

PACKAGE = Path(__file__).resolve().parent.parent
PATH_VARIABLE = "DICEKERNELS_LIBRARY_PATH"
BUILD_INFO = "_build_info.json"

# name -> "" after a successful load, else the text of the first error. Filled on first use, once:
# a second attempt would hide the first cause behind a later one.
_outcomes: dict[str, str] = {}


def library_path(name: str) -> Path:
    """Where the library of backend `name` ("cpu", "cuda") is looked for; it may not exist.

    `DICEKERNELS_LIBRARY_PATH` replaces the folder of the package and is never fallen back from:
    whoever set it wants that library or an error.
    """
    folder = os.environ.get(PATH_VARIABLE)
    return Path(folder or PACKAGE) / f"libdicekernels_{name}.so"


def is_loaded(name: str) -> bool:
    """Whether the library of backend `name` is loaded; the first call tries to load it."""
    return load_error(name) is None


def load_error(name: str) -> str | None:
    """Why the library of backend `name` is not loaded, or None when it is.

    The first call tries to load it. The text is that of the first failure, with the path and what
    to do about it.
    """
    if name not in _outcomes:
        _outcomes[name] = _load(name, library_path(name))
    return _outcomes[name] or None


def warn_of_missing_libraries() -> None:
    """Warn, at the import of the package, that its CPU library is missing or that a library does not load.

    Without it the losses are the same and many times slower, which nobody would see. A wheel without CUDA is
    no fault, nor is a CUDA library beside a torch without CUDA.
    """
    for name in ("cpu", "cuda") if torch.version.cuda else ("cpu",):
        if is_loaded(name) or (name == "cuda" and not library_path(name).is_file()):
            continue
        # Triton takes the place of the CUDA library, nothing fast that of the other.
        loss = ", far slower" if name == "cpu" else ""
        # Through dispatch.py and __init__.py to the line that imports the package.
        warnings.warn(
            f"dicekernels runs without its {name.upper()} library{loss}: {_remedy(name)}. "
            "DICEKERNELS_BACKEND=eager ends this warning.",
            stacklevel=4,
        )


def _remedy(name: str) -> str:
    """The error of `load_error`; for a clone that was not built, what it is and where to find another."""
    clone = PACKAGE.parent
    missing = not library_path(name).is_file() and not os.environ.get(PATH_VARIABLE)
    if not missing or not (clone / "CMakeLists.txt").is_file():
        return load_error(name) or ""
    text = f"{clone} is a clone that was not built. Run `make build` there"
    found = _installed_elsewhere()
    if found is None:
        return f"{text}, or install it (docs/install.md) and start Python outside of it"
    return f"{text}, or start Python outside of it: an installed dicekernels is in {found.parent}"


def _installed_elsewhere() -> Path | None:
    """Folder of an installed package of ours with a CPU library, other than this one."""
    for distribution in importlib.metadata.distributions(name="dicekernels"):
        folder = Path(str(distribution.locate_file("dicekernels"))).resolve()
        if folder != PACKAGE and (folder / "libdicekernels_cpu.so").is_file():
            return folder
    return None


def cpu_capability() -> str | None:
    """The instruction set that the CPU library chose, or why it refuses; None without library."""
    if not is_loaded("cpu"):
        return None
    try:
        return str(torch.ops.dicekernels.cpu_capability())
    except RuntimeError as error:
        return f"refused: {error}"


def instruction_set() -> str:
    """That of the CPU kernels as its makers spell it: AVX-512, AVX2, baseline."""
    isa = str(cpu_capability())
    return {"avx512": "AVX-512", "avx2": "AVX2"}.get(isa, isa)


def native_module() -> ModuleType | None:
    """The optional pybind11 module `dicekernels._native`, or None where it was not built."""
    try:
        return importlib.import_module("dicekernels._native")
    except ImportError:
        return None


def build_config() -> dict[str, Any] | None:
    """How the libraries that are looked for were built; None where nothing beside them says so.

    Keys: version (with its local tag), commit, compiler, flags, torch (that of the build), torch_target,
    glibc, isas (name: its flags) and cuda (None, or nvcc, flags, architectures, ptx).
    """
    try:
        info: dict[str, Any] = json.loads(library_path("cpu").with_name(BUILD_INFO).read_text())
    except (OSError, ValueError):
        return None
    return info


def _load(name: str, path: Path) -> str:
    """Load the library at `path`; "" on success, else the error with its remedy."""
    rebuild = "`make build` in a clone, or `pip install --no-build-isolation .` with torch installed"
    if name == "cuda":
        rebuild += ", with nvcc on PATH"
    if not path.is_file():
        where = f"{PATH_VARIABLE} points there" if os.environ.get(PATH_VARIABLE) else "not built"
        return f"{path} not found ({where}); expected the compiled library: run {rebuild}"
    # ROCm builds call their GPUs "cuda" too, and would be given the kernels.
    if name == "cuda" and torch.version.cuda is None:
        return f"{path} is not loaded: torch {torch.__version__} is no CUDA build; install one that is"
    info = build_config()
    if info is not None and info["version"].split("+")[0] != __version__:
        return (
            f"{path} is not loaded: got one of dicekernels {info['version']}, expected {__version__}: "
            f"run {rebuild}"
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        # torch wraps the loader's error in one that only repeats the path.
        cause = error.__cause__ or error
        return (
            f"{path} does not load with torch {torch.__version__}: {cause}; expected a library "
            f"built for torch >= 2.10 on this kind of machine: run {rebuild}"
        )
    return ""
