"""The gate of a wheel: what is in it, what its libraries need, and that it runs in an empty environment.

    python tests/build/wheel_gate.py dist/dicekernels-*.whl
    python tests/build/wheel_gate.py --python <another Python with torch> dist/dicekernels-*.whl

`make wheel` runs it, and so do test_packaging.py and the recipes of pyproject.toml and docs/docker.
Exit status 1 and a line for each check that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 16 * 2**20
SYSTEM = {"libstdc++", "libgcc_s", "libm", "libc", "libdl", "librt", "libpthread"}
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}

# Two classes, four voxels, softmax of zeros: every probability is 1/2. Class 0: I = 3/2 of P + G = 2 + 3,
# class 1: I = 1/2 of 2 + 1. Dice 3/5 and 1/3, loss 1 - (3/5 + 1/3)/2 = 8/15. The slopes by p of class 0 and 1
# are -(2g/D - 2I/D^2)/2 = -7/50 and 1/18 where the label is 0, 3/50 and -5/18 where it is 1; the softmax
# gives the logits a quarter of their difference.
SMOKE = """
import json, sys, torch
import dicekernels
from dicekernels import functional
from dicekernels.backends import native

logits = torch.zeros(1, 2, 4, requires_grad=True)
labels = torch.tensor([[[0, 0, 1, 0]]], dtype=torch.uint8)
options = dict(to_onehot_y=True, softmax=True, smooth_nr=0.0, smooth_dr=0.0)
loss = functional.dice_loss(logits, labels, **options)
loss.backward()
assert abs(loss.item() - 8 / 15) < 1e-6, loss
zero, one = (-7 / 50 - 1 / 18) / 4, (3 / 50 + 5 / 18) / 4
expected = torch.tensor([[[zero, zero, one, zero], [-zero, -zero, -one, -zero]]])
assert (logits.grad - expected).abs().max() < 1e-6, logits.grad
told = dicekernels.explain(functional.dice_loss, logits, labels, **options)
assert told.startswith("Runs in one pass forward and one backward on the cpu kernels"), told
assert native.load_error("cpu") is None
folder = sys.prefix
assert str(native.library_path("cpu")).startswith(folder), native.library_path("cpu")
has_cuda = native.library_path("cuda").is_file()
refused = native.load_error("cuda")
if has_cuda and refused:
    assert torch.version.cuda is None and "no CUDA build" in refused, refused
    # Refused for what torch is; the library itself finds all that it needs.
    torch.ops.load_library(native.library_path("cuda"))
if has_cuda:
    for op in ("sums", "finish", "sums_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dicekernels::{op}", "CUDA"), op
    listed = torch.ops.dicekernels.cuda_architectures().split(",")
    names = ["sm_" + entry.removesuffix("-real") for entry in listed]
    assert names == native.build_config()["cuda"]["architectures"], listed
print(json.dumps({"torch": torch.__version__, "cuda": refused, "build": native.build_config()}))
"""


def output(*command: object, **options: object) -> str:
    texts = [str(part) for part in command]
    done = subprocess.run(texts, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(texts[:4])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def program(name: str) -> str | None:
    """Path of a program: beside this Python, in triton (its NVIDIA tools), or on PATH."""
    folders = [Path(sys.executable).parent]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    beside = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    return beside or shutil.which(name)


def undefined_symbols(library: Path) -> set[str]:
    lines = output("nm", "-D", "--undefined-only", library).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def foreign(symbols: set[str]) -> list[str]:
    """Those of Python, and of the C++ interface of torch, which no release keeps."""
    # Mangled C++ names of namespaces at, c10 and torch: N2at, N3c10, N5torch.
    return sorted(name for name in symbols if re.match(r"_?Py|_Z.*?N?K?(2at|3c10|5torch)", name))


def needed(library: Path) -> set[str]:
    """What the loader must find, without versions and the loader itself."""
    dynamic = output("readelf", "--dynamic", "--wide", library)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    names = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so[.\d]*\]", dynamic))
    return {name for name in names if not name.startswith("ld-linux")}


def abi(library: Path) -> str | None:
    """What torch-abi-audit says, in one line; None where it is not installed."""
    audit = program("torch-abi-audit")
    return audit and " ".join(output(audit, "--check", "torch", library).split())


def gpu_code(library: Path) -> tuple[set[str], set[str]] | None:
    """Architectures with machine code and with PTX; None without cuobjdump."""
    tool = program("cuobjdump")
    if tool is None:
        return None
    # It calls nvdisasm.
    environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    listed = [output(tool, option, library, env=environment) for option in ("-lelf", "-lptx")]
    sass, ptx = (set(re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)", text)) for text in listed)
    return sass, {name.replace("sm_", "compute_") for name in ptx}


def newest_glibc(library: Path) -> tuple[int, int]:
    versions = re.findall(r"\bGLIBC_(\d+)\.(\d+)", output("objdump", "-T", library))
    return max((int(major), int(minor)) for major, minor in versions)


class Wheel:
    """A wheel, unpacked into `folder`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        zipfile.ZipFile(path).extractall(folder)
        self.names = set(zipfile.ZipFile(path).namelist())
        self.package = folder / "dicekernels"
        self.libraries = sorted(self.package.glob("libdicekernels_*.so"))
        self.info = json.loads((self.package / "_build_info.json").read_text())
        self.version, self.python, self.abi_tag, self.platform = path.stem.split("-")[1:]

    def contents(self) -> str:
        expected = {str(path.relative_to(ROOT)) for path in (ROOT / "dicekernels").rglob("*.py")}
        expected |= {
            f"dicekernels/{name}" for name in ("py.typed", "_build_info.json", "libdicekernels_cpu.so")
        }
        if self.info["cuda"]:
            expected.add("dicekernels/libdicekernels_cuda.so")
        if self.python != "py3":
            (native,) = (name for name in self.names if re.fullmatch(r"dicekernels/_native\.\S+\.so", name))
            expected.add(native)
        expected |= {f"dicekernels-{self.version}.dist-info/{name}" for name in METADATA}
        files = {name for name in self.names if not name.endswith("/")}
        assert files == expected, f"too much: {files - expected}, missing: {expected - files}"
        return f"{len(files)} files"

    def versions(self) -> str:
        text = (ROOT / "dicekernels" / "_version.py").read_text()
        base, _, local = self.version.partition("+")
        assert f'"{base}"' in text
        assert self.info["version"] == self.version, self.info["version"]
        if local:
            release = "".join(self.info["cuda"]["nvcc"].split(".")[:2])
            assert local == f"cu{release}", local
        return self.version

    def size(self) -> str:
        size = self.path.stat().st_size
        assert size <= MOST_BYTES, f"{size} bytes, expected at most {MOST_BYTES}"
        return f"{size / 2**20:.1f} MiB"

    def symbols(self) -> str:
        for library in self.libraries:
            assert foreign(undefined_symbols(library)) == [], library.name
        return "neither Python nor the C++ interface of torch"

    def dependencies(self) -> str:
        for library in self.libraries:
            names = needed(library)
            assert "libtorch_cpu" in names, library.name
            assert names - SYSTEM == {"libtorch_cpu"}, f"{library.name}: {names}"
        return "libtorch_cpu and the system"

    def stable(self) -> str:
        for library in self.libraries:
            words = abi(library)
            if words is None:
                return "NOT CHECKED: torch-abi-audit is not installed"
            assert "Torch ABI: STABLE Min torch: 2.10.0 " in words, words
        return "stable, torch >= 2.10"

    def architectures(self) -> str:
        if not self.info["cuda"]:
            return "none, CPU only"
        found = gpu_code(self.package / "libdicekernels_cuda.so")
        if found is None:
            return "NOT CHECKED: cuobjdump is not installed"
        asked = set(self.info["cuda"]["architectures"]), set(self.info["cuda"]["ptx"])
        assert found == asked, f"got {found}, expected {asked}"
        assert len(asked[1]) <= 1, asked
        return " ".join(self.info["cuda"]["architectures"] + self.info["cuda"]["ptx"])

    def platform_tag(self) -> str:
        newest = max(map(newest_glibc, self.libraries))
        tag = re.search(r"manylinux_(\d+)_(\d+)_", self.platform)
        if tag is None:
            return f"{self.platform}, needs glibc {newest[0]}.{newest[1]}"
        assert newest <= (int(tag[1]), int(tag[2])), f"needs glibc {newest}, the tag is {self.platform}"
        return self.platform

    def runs(self, python: str, folder: Path) -> str:
        """Installed beside the torch of `python` in an environment that has nothing else of ours."""
        output(python, "-m", "venv", "--without-pip", folder)
        inside = folder / "bin" / "python"
        where = (
            "import importlib.util; print(importlib.util.find_spec('torch').submodule_search_locations[0])"
        )
        torch_home = Path(output(python, "-c", where).strip()).parent
        ours = Path(output(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        # A line of a .pth file adds the folder, and follows no .pth file in it: no editable install.
        (ours / "torch_beside.pth").write_text(f"{torch_home}\n")
        pip = (sys.executable, "-m", "pip", "--python", inside)
        output(*pip, "install", "--quiet", "--no-deps", "--no-index", self.path)
        hidden = ("PYTHONPATH", "DICEKERNELS_BACKEND", "DICEKERNELS_LIBRARY_PATH", "TRITON_INTERPRET")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        (folder / "smoke.py").write_text(SMOKE)
        printed = output(inside, "smoke.py", cwd=folder, env=environment)
        facts = json.loads(printed.splitlines()[-1])
        assert facts["build"] == self.info
        if not self.info["cuda"]:
            cuda = "none in this wheel"
        else:
            cuda = "loads; not used by this torch, which is no CUDA build" if facts["cuda"] else "loaded"
        return f"beside torch {facts['torch']}; CUDA library: {cuda}"


def passes(path: Path, python: str) -> bool:
    """Prints a line for each check."""
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        wheel = Wheel(path, Path(temporary, "wheel"))
        checks: dict[str, Callable[[], str]] = {
            "contents": wheel.contents,
            "versions": wheel.versions,
            "size": wheel.size,
            "symbols": wheel.symbols,
            "dependencies": wheel.dependencies,
            "stable ABI": wheel.stable,
            "architectures": wheel.architectures,
            "platform": wheel.platform_tag,
            "runs": lambda: wheel.runs(python, Path(temporary, "environment")),
        }
        for name, check in checks.items():
            try:
                print(f"  {name:<14} {check()}")
            except AssertionError as error:
                good = False
                print(f"  {name:<14} FAILED: {error}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the Python whose torch is used (this one)")
    arguments = parser.parse_args()
    good = True
    for path in arguments.wheels:
        print(path.name)
        good &= passes(path.resolve(), arguments.python)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
