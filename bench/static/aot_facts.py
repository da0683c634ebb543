"""What the machine code of one kernel costs for each element of the logits.

An element is one true class of one voxel: classes that pad a tile to a power of two count as cost, never as
work. All counts of instructions are those that one thread executes, predicated or not.
"""

from __future__ import annotations

import linecache
import math
from pathlib import Path
from typing import Any

from bench.static import sass
from bench.static.aot_cases import Problem
from bench.static.sass import Instruction, Kernel, Loop
from dicekernels.spec import Activation, chunk_voxels

# Of a launch, beside the constants of the kernel.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
# The places of the constant SHAPE: dicekernels/backends/triton/configs.py, Tile.shape.
SHAPE = ("BLOCK_C", "BLOCK_N", "LANES", "FOLD", "INNER")


def facts(problem: Problem, op: str, capability: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Compiles the op for the active driver of Triton and reads what came out.

    Raises:
        ValueError: an override that is no constant of the kernel.
    """
    binary, changed = compiled(problem, op, overrides)
    meta = changed | shape_of(changed)
    kernel = sass.read(binary.asm["cubin"])
    warps = binary.metadata.num_warps
    return (
        {"meta": _plain(changed)}
        | of_kernel(kernel, binary.metadata.shared, warps, capability)
        | of_elements(kernel, problem, op, meta, warps)
    )


def compiled(problem: Problem, op: str, overrides: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The binary of an op, and the constants that it was compiled with."""
    launch = problem.plan(op)
    meta = overridden(launch.meta, overrides, problem.voxels)
    return launch._replace(meta=meta).compile(), meta


def by_line(problem: Problem, op: str, overrides: dict[str, Any]) -> list[tuple[str, int, str, str]]:
    """(file:line, instructions of the hot loop, their names, the text of the line), the most costly first."""
    from triton import knobs

    cubin = compiled(problem, op, overrides)[0].asm["cubin"]
    places = sass.source_lines(cubin, knobs.nvidia.nvdisasm.path)
    kernel = sass.read(cubin)
    hot = hottest(kernel)
    spent: dict[tuple[str, int], list[Instruction]] = {}
    for line in kernel.code if hot is None else kernel.inside(hot):
        spent.setdefault(places[line.address], []).append(line)
    rows = []
    for (path, number), code in sorted(spent.items(), key=lambda item: -len(item[1])):
        names = " ".join(f"{name}x{count}" for name, count in sass.names(tuple(code)).most_common(6))
        text = linecache.getline(path, number).strip()[:70]
        rows.append((f"{Path(path).name}:{number}", len(code), names, text))
    return rows


def shape_of(meta: dict[str, Any]) -> dict[str, Any]:
    """BLOCK_C, BLOCK_N and so on out of the constant SHAPE; nothing for a kernel without one."""
    return dict(zip(SHAPE, meta["SHAPE"], strict=True)) if "SHAPE" in meta else {}


def overridden(meta: dict[str, Any], overrides: dict[str, Any], voxels: int) -> dict[str, Any]:
    """The constants of a launch with some replaced; EVEN follows BLOCK_N, as a plan would have it.

    Raises:
        ValueError: an override that is no constant of the kernel.
    """
    shape = shape_of(meta)
    known = {*meta, *shape, *OPTIONS}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"--try: got {unknown}, expected some of {sorted(known)}")
    result = meta | {name: value for name, value in overrides.items() if name not in shape}
    if shape:
        result["SHAPE"] = tuple((shape | overrides)[name] for name in SHAPE)
    if "BLOCK_N" in overrides and "EVEN" in meta and "EVEN" not in overrides:
        result["EVEN"] = voxels % overrides["BLOCK_N"] == 0
    return result


def of_kernel(kernel: Kernel, shared: int, warps: int, capability: int) -> dict[str, Any]:
    """Facts that need no problem. shared: bytes that a launch asks for."""
    named = sass.names(kernel.code)
    return {
        "registers": kernel.registers,
        "stack_bytes": kernel.stack,
        "spill_loads": named["LDL"],
        "spill_stores": named["STL"],
        "shared_bytes": shared,
        "resident_warps": sass.resident_warps(kernel.registers, shared, warps, capability),
        "instructions": len(kernel.code),
        "loads": dict(sass.loads(kernel.code)),
        "stores": dict(sass.stores(kernel.code)),
        "atomics": named["RED"] + named["REDG"] + named["ATOM"] + named["ATOMG"],
        "calls": named["CALL"],
    }


def of_elements(
    kernel: Kernel, problem: Problem, op: str, meta: dict[str, Any], warps: int
) -> dict[str, Any]:
    """The hot loop and the instructions for each element; None where the op has no elements or no loop."""
    hot = hottest(kernel)
    body = () if hot is None or op == "finish" else kernel.inside(hot)
    named = sass.names(body or kernel.code)
    found: dict[str, Any] = {
        "loop_instructions": len(body) or None,
        "loop_tiles": None,
        "loop_loads": dict(sass.loads(body)),
        "loop_stores": dict(sass.stores(body)),
        "wide_loads": None,
        "wide_stores": None,
        "barriers": named["BAR"],
        "shuffles": named["SHFL"],
        "mufu": named["MUFU"],
        "per_element": None,
        "per_element_chunk": None,
    }
    if op == "finish":
        return found
    tile = Tile(problem, op, meta, warps)
    tiles = tile.held_by(body or kernel.code)
    found["wide_loads"] = min(1.0, sass.loads(body or kernel.code)["128"] * 16 / (tile.true_bytes * tiles))
    if op == "backward":
        written = sass.stores(body or kernel.code)
        found["wide_stores"] = written["128"] * 16 / max(1, sass.stored_bytes(body or kernel.code))
    elements = tile.chunk * problem.classes / (32 * warps)
    if hot is None or not body:
        return found | {"per_element_chunk": len(kernel.code) / elements}
    cost, trips, once = iterations(kernel, hot, tile, tiles)
    return found | {
        "loop_tiles": tiles,
        "per_element": cost * trips / elements,
        "per_element_chunk": (once + cost * trips) / elements,
    }


class Tile:
    """BLOCK_C classes of BLOCK_N voxels, as one thread sees it.

    Attributes:
        elements: with those of the classes that pad the tile.
        bytes: of these elements' logits.
        true_bytes: of the logits that exist, which is what has to be loaded.
        beside: bytes of labels or values and of the mask.
    """

    def __init__(self, problem: Problem, op: str, meta: dict[str, Any], warps: int) -> None:
        self.op, self.threads = op, 32 * warps
        self.voxels: int = meta["BLOCK_N"]
        self.elements: float = meta["BLOCK_C"] * self.voxels / self.threads
        self.bytes = self.elements * problem.itemsize
        self.true_bytes = self.bytes * min(1.0, problem.classes / meta["BLOCK_C"])
        self.class_tiles = -(-problem.classes // meta["BLOCK_C"])
        # What a program handles: a slot of the sums, or what the backward pass calls its span.
        self.chunk: int = meta.get("SPAN", chunk_voxels(problem.voxels))
        self.softmax = problem.spec.sums.activation == Activation.SOFTMAX
        _, target, mask = problem.tensors()
        values = self.elements if problem.spec.sums.dense else self.voxels / self.threads
        self.beside = values * target.element_size()
        self.beside += 0 if mask is None else self.voxels / self.threads * mask.element_size()

    def held_by(self, code: tuple[Instruction, ...]) -> int:
        """Tiles that a piece of code handles: more than one where a compiler has unrolled its loop.

        Told by what each element needs exactly once: a stored gradient, else the exponential of the softmax,
        else (roughly, since threads share labels) the bytes that are loaded.
        """
        if self.op == "backward":
            held = sass.stored_bytes(code) / self.bytes
        elif self.softmax:
            held = sass.exponentials(code) / self.elements
        else:
            held = sass.loaded_bytes(code) / (self.bytes + self.beside)
        return max(1, round(held))


def hottest(kernel: Kernel) -> Loop | None:
    """The innermost loop with the most exponentials and global traffic; the shorter of two such."""

    def weight(loop: Loop) -> tuple[int, int, int]:
        code = kernel.inside(loop)
        traffic = sass.loaded_bytes(code) + sass.stored_bytes(code)
        return sass.exponentials(code) + sass.names(code)["MUFU"], traffic, -len(code)

    innermost = [loop for loop in kernel.loops if not kernel.children(loop)]
    busy = [loop for loop in innermost if sass.loaded_bytes(kernel.inside(loop))]
    return max(busy, key=weight, default=None)


def iterations(kernel: Kernel, hot: Loop, tile: Tile, tiles: int) -> tuple[float, float, int]:
    """(instructions of an iteration, iterations in a chunk, instructions outside of the loop).

    Where a tile does not hold all classes, an iteration is one of the loop over voxels, with every pass over
    the classes inside of it; each pass takes as many trips as there are tiles of classes.
    """
    voxel_trips = math.ceil(tile.chunk / tile.voxels)
    around = [loop for loop in kernel.loops if loop.holds(hot)]
    if tile.class_tiles == 1 or not around:
        body = len(kernel.inside(hot))
        return body, voxel_trips / tiles, len(kernel.code) - body
    outer = min(around, key=lambda loop: loop.last - loop.first)
    passes = tuple(loop for loop in kernel.children(outer) if sass.loaded_bytes(kernel.inside(loop)))
    cost = float(len(kernel.inside(outer, but=passes)))
    for loop in passes:
        code = kernel.inside(loop)
        cost += len(code) * math.ceil(tile.class_tiles / tile.held_by(code))
    return cost, voxel_trips, len(kernel.code) - len(kernel.inside(outer))


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """Constants as JSON holds them."""
    kept = (int, float, str, bool, type(None))
    lists = {name: list(value) for name, value in meta.items() if isinstance(value, tuple)}
    return {name: value if isinstance(value, kept) else str(value) for name, value in meta.items()} | lists
