"""Thin driver of CMake: finds torch and nvcc, decides about `_native`, gives version and tag.

Environment (docs/environment.md): DICEKERNELS_BUILD, DICEKERNELS_EMULATED, DICEKERNELS_NATIVE,
TORCH_CUDA_ARCH_LIST, CUDACXX, CUDA_HOME, MAX_JOBS.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TOOLS = "pip install cmake ninja 'setuptools>=77' wheel"
# Older ones, as a new environment of Python 3.10 and 3.11 has one, know neither this nor the license's form.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools is {setuptools.__version__}; expected 77 or newer: run `{TOOLS}`")
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
OLDEST_NVCC = (12, 0)
# Commands of setuptools for which torch has to be there. An sdist and its metadata need none.
BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
TORCH_REMEDY = (
    "dicekernels builds against the torch you already have: "
    f"install torch >= 2.10, then run `{TOOLS}` and `pip install --no-build-isolation .`"
)


def nvcc_release(path: str) -> tuple[int, int] | None:
    """(13, 0) of a nvcc that runs, else None."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else None


@functools.cache  # so that what it prints is printed once
def cuda_compiler() -> tuple[str, tuple[int, int]] | None:
    """Path and release of the nvcc to build with, None for a CPU-only build.

    nvcc decides, not a GPU: wheels are built on machines without one. The order is that of
    csrc/cuda.cmake.
    """
    asked = os.environ.get("DICEKERNELS_BUILD", "") or "auto"
    if asked not in ("auto", "nvcc", "cuda", "cpu"):
        sys.exit(f"DICEKERNELS_BUILD is {asked!r}; expected auto, nvcc, cuda or cpu")
    if asked == "cpu":
        return None
    if asked == "auto" and torch_without_cuda():
        version = importlib.metadata.version("torch")
        print(
            f"building for the CPU only: torch {version} is no CUDA build and loads no CUDA library; "
            "DICEKERNELS_BUILD=cuda builds it all the same"
        )
        return None
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    homes = [str(Path(folder, "bin", "nvcc")) for folder in folders if folder]
    candidates = [os.environ.get("CUDACXX"), *filter(os.path.exists, homes), shutil.which("nvcc")]
    path = next(filter(None, candidates), None)
    release = nvcc_release(path) if path else None
    if path and release and release >= OLDEST_NVCC:
        return path, release
    if path is None:
        obstacle = "no nvcc on PATH, in $CUDA_HOME/bin or in $CUDACXX"
    elif release is None:
        obstacle = f"{path} does not run"
    else:
        obstacle = f"{path} is of CUDA {release[0]}.{release[1]}, expected 12.0 or newer"
    if asked == "cuda":
        sys.exit(
            f"DICEKERNELS_BUILD=cuda, but {obstacle}: install the CUDA toolkit, or set DICEKERNELS_BUILD=cpu"
        )
    print(f"building for the CPU only: {obstacle}")
    return None


def version() -> str:
    """That of `_version.py`, with a local tag where the CUDA library is built: 0.1.0+cu130.

    CPU-only wheels have none, so that pip prefers the CUDA wheel in a folder with both. A source archive
    has none, and neither has what is built from it: pip insists that both versions agree.
    """
    text = (ROOT / "dicekernels" / "_version.py").read_text()
    base = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)[1]
    if "sdist" in sys.argv or (ROOT / "PKG-INFO").exists():
        return base
    compiler = cuda_compiler()
    return f"{base}+cu{compiler[1][0]}{compiler[1][1]}" if compiler else base


def isolated() -> bool:
    """Whether this is the environment that pip, build or uv made of `[build-system]` alone."""
    folders = [sys.prefix, *sys.path]
    return any(re.search(r"[/\\](pip-build-env-|build-env-|builds-v\d+[/\\])", folder) for folder in folders)


def torch_without_cuda() -> bool:
    """Whether the installed torch is a CPU or ROCm build, read from it without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = Path(spec.origin).with_name("version.py").read_text()
    return re.search(r"^cuda\b.*= None$", text, re.MULTILINE) is not None


def torch_dir() -> Path:
    """Folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        if isolated():
            sys.exit(
                "this is an isolated build (the default of pip, build and uv): your torch is not seen.\n"
                f"Run `{TOOLS}`, then `pip install --no-build-isolation .`\n"
                "(`python -m build --no-isolation`, `uv pip install --no-build-isolation .`)"
            )
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
    if obstacle:
        print(f"building without the optional dicekernels._native: {obstacle}")
    return not obstacle


def emulated_wanted(development: bool) -> bool:
    """The CUDA kernels compiled for the CPU are for the tests: never in a wheel."""
    asked = os.environ.get("DICEKERNELS_EMULATED", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"DICEKERNELS_EMULATED is {asked!r}; expected 0, 1 or unset")
    return development and asked != "0"


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
        compiler = cuda_compiler()
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "DICEKERNELS_BUILD": "cuda" if compiler else "cpu",
            "DICEKERNELS_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            "DICEKERNELS_COMMIT": commit(),
            "DICEKERNELS_EMULATED": "ON" if emulated_wanted(development) else "OFF",
            "DICEKERNELS_NATIVE": "ON" if native else "OFF",
            "DICEKERNELS_TORCH_DIR": str(torch_dir()),
            "DICEKERNELS_TORCH_VERSION": importlib.metadata.version("torch"),
            "DICEKERNELS_VERSION": self.distribution.get_version(),
        }
        if native:
            import pybind11

            options["pybind11_DIR"] = pybind11.get_cmake_dir()
            options["Python_EXECUTABLE"] = sys.executable
        cmake = tool("cmake")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        what = "CPU and CUDA libraries (5 to 10 minutes" if compiler else "CPU library (about a minute"
        print(f"compiling the {what} on two cores, docs/install.md) with {jobs} jobs", flush=True)
        flags = [f"-D{key}={value}" for key, value in options.items()]
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags],
            [cmake, "--build", str(build), "--parallel", jobs],
            [cmake, "--install", str(build), "--prefix", str(prefix)],
        ):
            if subprocess.run(command, check=False).returncode != 0:
                sys.exit(f"failed: {' '.join(command)}\nits messages are above")
        # What this build does not make (CUDA, after a change to CPU only) is of another state of the
        # sources. `_native` of another Python may stay beside ours in the tree.
        installed = (build / "install_manifest.txt").read_text().splitlines()
        stale = "libdicekernels_*.so" if development else "*.so"
        for folder in (prefix / "dicekernels", prefix / "tests" / "cpp"):
            for path in folder.glob(stale):
                if str(path) not in installed:
                    path.unlink()

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib, "dicekernels")
        return [str(path) for path in (*package.glob("*.so"), package / "_build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class UniversalWheel(bdist_wheel):
    """The libraries know no Python, so one wheel serves every Python unless `_native` is in it."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        native = native_wanted(development=False)
        return (python, abi, platform) if native else ("py3", "none", platform)


if BUILDING.intersection(sys.argv):
    torch_dir()  # before anything is copied or compiled
setup(
    version=version(),
    ext_modules=[Extension("dicekernels.libdicekernels_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": UniversalWheel},
)
