"""Thin driver of CMake: finds torch, decides about `_native`, tags the wheel.

Environment (docs/environment.md): DICEKERNELS_BUILD, DICEKERNELS_NATIVE, MAX_JOBS.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
TORCH_REMEDY = (
    "dicekernels builds against the torch you already have: "
    "install torch >= 2.10, then run `pip install --no-build-isolation .`"
)


def torch_dir() -> Path:
    """Folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(f"torch is not installed in {sys.prefix}. {TORCH_REMEDY}")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        sys.exit(f"torch is {version}; expected 2.10 or newer. {TORCH_REMEDY}")
    return Path(spec.origin).parent


def tool(name: str) -> str:
    """Path of cmake or ninja: the one beside this Python first, then the one on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        sys.exit(f"{name} is not installed; run `pip install {name}`")
    return found


def native_obstacle() -> str:
    """Why `_native` cannot be built here ("" when it can)."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed (`pip install pybind11`)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing (Debian and Ubuntu: package python3-dev)"
    return ""


def native_wanted(development: bool) -> bool:
    """`_native` ties a wheel to one Python: by default it is for development installs only."""
    asked = os.environ.get("DICEKERNELS_NATIVE", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"DICEKERNELS_NATIVE is {asked!r}; expected 0, 1 or unset")
    if asked == "0" or (asked == "" and not development):
        return False
    obstacle = native_obstacle()
    if obstacle and asked == "1":
        sys.exit(f"DICEKERNELS_NATIVE=1, but {obstacle}; or set DICEKERNELS_NATIVE=0")
    if obstacle:
        print(f"building without the optional dicekernels._native: {obstacle}")
    return not obstacle


def commit() -> str:
    """The git commit of this tree, "" outside a repository."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


class CMakeBuild(build_ext):
    """Builds with CMake and installs into build_lib, or into the tree for editable installs."""

    def run(self) -> None:
        development = self.inplace or self.editable_mode
        native = native_wanted(development)
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        prefix = ROOT if development else Path(self.build_lib).resolve()
        if not development:
            for stale in (prefix / "dicekernels").glob("*.so"):
                stale.unlink()
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "DICEKERNELS_BUILD": os.environ.get("DICEKERNELS_BUILD", "auto"),
            "DICEKERNELS_COMMIT": commit(),
            "DICEKERNELS_NATIVE": "ON" if native else "OFF",
            "DICEKERNELS_TORCH_DIR": str(torch_dir()),
            "Python_EXECUTABLE": sys.executable,
        }
        if native:
            import pybind11

            options["pybind11_DIR"] = pybind11.get_cmake_dir()
        cmake = tool("cmake")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        flags = [f"-D{key}={value}" for key, value in options.items()]
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags],
            [cmake, "--build", str(build), "--parallel", jobs],
            [cmake, "--install", str(build), "--prefix", str(prefix)],
        ):
            if subprocess.run(command, check=False).returncode != 0:
                sys.exit(f"failed: {' '.join(command)}\nits messages are above")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "dicekernels").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class UniversalWheel(bdist_wheel):
    """The libraries know no Python, so one wheel serves every Python unless `_native` is in it."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        native = native_wanted(development=False)
        return (python, abi, platform) if native else ("py3", "none", platform)


setup(
    ext_modules=[Extension("dicekernels.libdicekernels_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": UniversalWheel},
)
