"""csrc/common and csrc/cuda/device_math.h as functions of arrays, in one library (tests/cpp/*_test.cpp)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from processes import captured
from torch import Tensor

CPP = Path(__file__).parents[1] / "cpp"


def load(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All workers share one compilation."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    base = tmp_path_factory.getbasetemp()
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = base.parent / f"headers-{run}" if run else base / "headers"
    folder.mkdir(exist_ok=True)
    built = folder / "common_headers.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            compiler = ["g++", "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
            device = ["-DDK_EMULATED", "-iquote", str(CPP)]
            parts = {"scalar": ("voxel_math", []), "device": ("voxel_math", device), "finish": ("finish", [])}
            objects = [str(folder / f"{name}.o") for name in parts]
            for (source, flags), out in zip(parts.values(), objects, strict=True):
                call([*compiler, *flags, "-c", str(CPP / f"{source}_test.cpp"), "-o", out])
            call([*compiler, "-shared", *objects, "-pthread", "-o", str(folder / "new.so")])
            (folder / "new.so").rename(built)
    return ctypes.CDLL(str(built))


def call(command: list[str]) -> None:
    done = captured(command)
    assert done.returncode == 0, done.stderr


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
