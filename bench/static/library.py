"""The kernels inside of a compiled library: one disassembled kernel for each name and architecture."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.static import sass
from bench.static.sass import Kernel

ELEMENTS = {"float": "float32", "double": "float64", "Half": "float16", "Bfloat16": "bfloat16"}
# From sm_90 on, what a block keeps for the driver is counted as the kernel's own.
RESERVED = 1024

_ARCH = re.compile(r"^arch = sm_(\d+)[a-z]?$", re.MULTILINE)
_USED = re.compile(r"^ Function (\S+):\s*\n\s+(REG:.*)$", re.MULTILINE)
_CODE = re.compile(r"^\s*Function : (\S+)\s*$", re.MULTILINE)
_LISTED = re.compile(r"^(ELF|PTX) file\s+\d+: .*\.(?:sm|compute)_(\d+[a-z]?)\.(?:cubin|ptx)$", re.MULTILINE)
_FAST = re.compile(r"^fast_(sums|backward)<(\w+), (\d+), (\w+), (\w+), (\w+)>$")


@dataclass(frozen=True)
class Usage:
    """What cuobjdump knows of a kernel without its code; shared: static, without what the driver keeps."""

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Instance:
    """A fast kernel by its template's arguments."""

    op: str
    dtype: str
    held: int
    split: bool
    focal: bool
    last: bool

    @property
    def name(self) -> str:
        marks = " split" * self.split + " focal" * self.focal + " last" * self.last
        return f"{self.op} {self.dtype} {self.held}{marks}"


def instance(name: str) -> Instance | None:
    """Of a name as `short` has it; None for the other kernels."""
    match = _FAST.match(name)
    if match is None:
        return None
    op, element, held, *marks = match.groups()
    op = {"sums": "forward", "backward": "backward"}[op]
    split, focal, last = (mark == "true" for mark in marks)
    return Instance(op, ELEMENTS[element], int(held), split, focal, last)


def architectures(library: Path) -> tuple[set[str], set[str]]:
    """(machine code, PTX) in the library: {"90", ...}, {"120"}."""
    text = _run(["-lelf", "-lptx"], library)
    found = _LISTED.findall(text)
    return {sm for kind, sm in found if kind == "ELF"}, {sm for kind, sm in found if kind == "PTX"}


def usage(library: Path) -> dict[int, dict[str, Usage]]:
    """Of every kernel: capability -> name -> usage."""
    text = _run(["-res-usage"], library)
    found: dict[int, dict[str, Usage]] = {}
    for capability, part in _by_arch(text):
        for mangled, line in _USED.findall(part):
            numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            reserved = RESERVED if capability >= 90 else 0
            found.setdefault(capability, {})[mangled] = Usage(
                numbers["REG"], numbers["STACK"], numbers["SHARED"] - reserved
            )
    names = _short({name for kernels in found.values() for name in kernels})
    return {sm: {names[name]: used for name, used in kernels.items()} for sm, kernels in found.items()}


def kernels(library: Path, capabilities: Iterable[int], keep: str = "") -> dict[int, dict[str, Kernel]]:
    """The code of the kernels whose short name `keep` (a regular expression) finds.

    Disassembling takes seconds for each architecture.
    """
    used = usage(library)
    capabilities = [sm for sm in capabilities if sm in used]
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda sm: _run(["-sass", "-arch", f"sm_{sm}"], library), capabilities)
        return {
            sm: dict(_disassembled(text, used[sm], keep))
            for sm, text in zip(capabilities, texts, strict=True)
        }


def _disassembled(text: str, used: dict[str, Usage], keep: str) -> Iterable[tuple[str, Kernel]]:
    parts = _CODE.split(text)
    names = _short(set(parts[1::2]))
    for mangled, code in zip(parts[1::2], parts[2::2], strict=True):
        name = names[mangled]
        if name in used and re.search(keep, name):
            own = used[name]
            line = f"REG:{own.registers} STACK:{own.stack} SHARED:{own.shared} LOCAL:0"
            yield name, sass.parse(f"{line}\n{code}")


def _by_arch(text: str) -> Iterable[tuple[int, str]]:
    parts = _ARCH.split(text)
    return ((int(sm), part) for sm, part in zip(parts[1::2], parts[2::2], strict=True))


def _short(mangled: set[str]) -> dict[str, str]:
    """Mangled -> "fast_sums<float, 4, false, false>", without namespaces, result and parameters.

    Raises:
        FileNotFoundError: there is no c++filt; it comes with every C++ compiler.
    """
    listed = sorted(mangled)
    done = subprocess.run(["c++filt"], input="\n".join(listed), capture_output=True, text=True, check=True)
    names = {}
    for name, demangled in zip(listed, done.stdout.splitlines(), strict=True):
        demangled = demangled.replace("(anonymous namespace)::", "")
        names[name] = re.sub(r"\w+::", "", demangled.split("(", 1)[0]).removeprefix("void ")
    return names


def _run(options: list[str], library: Path) -> str:
    """What cuobjdump prints.

    Raises:
        RuntimeError: it fails.
    """
    tool = sass.cuobjdump()
    # It calls nvdisasm, which stands beside it.
    path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [tool, *options, str(library)], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    if done.returncode:
        raise RuntimeError(f"cuobjdump failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout
