"""Machine code of one kernel, read: registers, widths of memory accesses, loops, resident warps.

A cubin goes in (NVIDIA's cuobjdump, which Triton brings along), plain facts come out. Nothing here knows a
loss; bench/static/aot.py puts the facts beside the problem.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Of one multiprocessor: warps, blocks, bytes of shared memory (1 KiB more is taken by each block).
# CUDA programming guide, table "Technical specifications per compute capability".
LIMITS = {
    75: (32, 16, 64 << 10),
    80: (64, 32, 164 << 10),
    86: (48, 16, 100 << 10),
    89: (48, 24, 100 << 10),
    90: (64, 32, 228 << 10),
    100: (64, 32, 228 << 10),
    120: (48, 24, 100 << 10),
}
# A multiprocessor is four partitions of 16384 registers; a warp takes them by the 256.
PARTITIONS, PARTITION_REGISTERS, REGISTER_UNIT = 4, 16384, 256

# `        /*0120*/              @!P0 BRA 0x20d0 ;       /* 0x... */`
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_PLACE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)')
_WIDTHS = ("256", "128", "64", "U16", "S16", "U8", "S8")
_LOADS = ("LDG", "LDGSTS")
_STORES = ("STG",)


@dataclass(frozen=True)
class Instruction:
    """opcode with its modifiers ("LDG.E.128"); target: address of a branch, else None."""

    address: int
    opcode: str
    target: int | None

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def width(self) -> str:
        """Of a memory access: "128", "64", "32", "U16", ...; a bare one moves 32 bits."""
        modifiers = self.opcode.split(".")[1:]
        return next((width for width in _WIDTHS if width in modifiers), "32")

    @property
    def bytes(self) -> int:
        """What a memory access moves for one thread."""
        return int(self.width.lstrip("US")) // 8


@dataclass(frozen=True)
class Loop:
    """Addresses of the first instruction and of the backward branch (the last)."""

    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last

    def cuts(self, other: Loop) -> bool:
        """The other starts inside and ends outside."""
        return self.first < other.first <= self.last < other.last


@dataclass(frozen=True)
class Kernel:
    """A disassembled kernel; NOPs and the trap after the end are left out of ``code``."""

    code: tuple[Instruction, ...]
    registers: int
    stack: int
    shared: int
    loops: tuple[Loop, ...]

    def inside(self, loop: Loop, but: tuple[Loop, ...] = ()) -> tuple[Instruction, ...]:
        """The instructions of a loop, without those of the loops ``but``."""
        return tuple(
            line
            for line in self.code
            if loop.first <= line.address <= loop.last
            and not any(inner.first <= line.address <= inner.last for inner in but)
        )

    def children(self, loop: Loop | None) -> tuple[Loop, ...]:
        """Loops directly inside ``loop``; of the whole kernel for None."""
        within = [other for other in self.loops if loop is None or loop.holds(other)]
        return tuple(one for one in within if not any(other.holds(one) for other in within))


def cuobjdump() -> str:
    """Path of NVIDIA's disassembler, which comes with Triton."""
    from triton import knobs

    return str(knobs.nvidia.cuobjdump.path)


def read(cubin: bytes) -> Kernel:
    """The only kernel of a cubin.

    Raises:
        RuntimeError: cuobjdump fails, or its output holds no kernel in the known form.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [cuobjdump(), "-sass", "-res-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump failed ({done.returncode}): {done.stderr.strip()}")
    return parse(done.stdout)


def source_lines(cubin: bytes, nvdisasm: str) -> dict[int, tuple[str, int]]:
    """(file, line) of each address, as the compiler has noted them: the innermost function's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([nvdisasm, "-g", "-c", str(path)], capture_output=True, text=True, check=True)
    found: dict[int, tuple[str, int]] = {}
    place = ("", 0)
    for line in text.stdout.splitlines():
        if note := _PLACE.match(line):
            place = (note[1], int(note[2]))
        elif match := _INSTRUCTION.match(line):
            found[int(match[1], 16)] = place
    return found


def parse(text: str) -> Kernel:
    """A kernel from what ``cuobjdump -sass -res-usage`` prints.

    Raises:
        RuntimeError: there is no instruction or no line of resources in it.
    """
    usage = _USAGE.search(text)
    code = [_instruction(match) for match in map(_INSTRUCTION.match, text.splitlines()) if match]
    if usage is None or not code:
        raise RuntimeError(
            f"cuobjdump: got {len(code)} instructions and {'no' if usage is None else 'a'} line of "
            "resources, expected both; its output has another form than this reader knows"
        )
    # Behind the last instruction stands a branch to itself, then NOPs as padding.
    code = [line for line in code if line.name != "NOP" and line.target != line.address]
    registers, stack, shared, _ = map(int, usage.groups())
    return Kernel(tuple(code), registers, stack, shared, _loops(code))


def _instruction(match: re.Match[str]) -> Instruction:
    address, opcode, operands = match.groups()
    target = None
    if opcode.split(".", 1)[0] == "BRA":
        addresses = re.findall(r"0x([0-9a-f]+)", operands)
        target = int(addresses[-1], 16) if addresses else None
    return Instruction(int(address, 16), opcode, target)


def _loops(code: list[Instruction]) -> tuple[Loop, ...]:
    """One loop for each target of backward branches, up to the last of them.

    A rare case that stands behind a loop jumps back into its middle: that is no loop.
    """
    ends: dict[int, int] = {}
    for line in code:
        if line.target is not None and line.target < line.address:
            ends[line.target] = max(line.address, ends.get(line.target, 0))
    loops = [Loop(first, last) for first, last in sorted(ends.items())]
    return tuple(one for one in loops if not any(other.cuts(one) for other in loops))


def names(code: tuple[Instruction, ...]) -> Counter[str]:
    return Counter(line.name for line in code)


def loads(code: tuple[Instruction, ...]) -> Counter[str]:
    """Loads from global memory by width, copies to shared memory (cp.async) among them."""
    return Counter(line.width for line in code if line.name in _LOADS)


def stores(code: tuple[Instruction, ...]) -> Counter[str]:
    """Stores to global memory by width."""
    return Counter(line.width for line in code if line.name in _STORES)


def loaded_bytes(code: tuple[Instruction, ...]) -> int:
    """What one thread loads from global memory."""
    return sum(line.bytes for line in code if line.name in _LOADS)


def stored_bytes(code: tuple[Instruction, ...]) -> int:
    return sum(line.bytes for line in code if line.name in _STORES)


def exponentials(code: tuple[Instruction, ...]) -> int:
    return sum(line.opcode.startswith("MUFU.EX2") for line in code)


def resident_warps(registers: int, shared: int, warps: int, capability: int) -> int:
    """Warps of such blocks that one multiprocessor holds at a time.

    Raises:
        ValueError: a capability without known limits.
    """
    if capability not in LIMITS:
        raise ValueError(f"capability: got {capability}, expected one of {sorted(LIMITS)}")
    max_warps, max_blocks, memory = LIMITS[capability]
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = PARTITIONS * (PARTITION_REGISTERS // max(of_a_warp, REGISTER_UNIT))
    by_memory = memory // (shared + 1024)
    return warps * min(max_warps // warps, max_blocks, by_registers // warps, by_memory)
