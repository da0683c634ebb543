"""Loads the compiled op libraries and keeps the first error of each for later.

`libdicekernels_<name>.so` stands beside the package (or in `DICEKERNELS_LIBRARY_PATH`) and
registers its ops with PyTorch when it is loaded. A library that cannot be loaded is no error here:
another backend takes over, and `load_error` tells the cause to whoever asks or forces the backend.
Nothing here registers an op.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent
PATH_VARIABLE = "DICEKERNELS_LIBRARY_PATH"

# name -> "" after a successful load, else the text of the first error. Filled on first use, once:
# a second attempt would hide the first cause behind a later one.
_outcomes: dict[str, str] = {}


def library_path(name: str) -> Path:
    """Where the library of backend `name` ("cpu") is looked for; it may not exist.

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
        _outcomes[name] = _load(library_path(name))
    return _outcomes[name] or None


def native_module() -> ModuleType | None:
    """The optional pybind11 module `dicekernels._native`, or None where it was not built."""
    try:
        return importlib.import_module("dicekernels._native")
    except ImportError:
        return None


def build_config() -> dict[str, Any] | None:
    """How the libraries were built (version, compiler, flags, commit, isas); None if unknown."""
    module = native_module()
    return None if module is None else dict(module.build_config())


def _load(path: Path) -> str:
    """Load the library at `path`; "" on success, else the error with its remedy."""
    if not path.is_file():
        where = f"{PATH_VARIABLE} points there" if os.environ.get(PATH_VARIABLE) else "not built"
        return (
            f"{path} not found ({where}); expected the compiled library: run `make build` in a "
            "clone, or `pip install --no-build-isolation .` with torch installed"
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        # torch wraps the loader's error in one that only repeats the path.
        cause = error.__cause__ or error
        return (
            f"{path} does not load with torch {torch.__version__}: {cause}; expected a library "
            "built for torch >= 2.10 on this kind of machine: rebuild it with `make build`"
        )
    return ""
