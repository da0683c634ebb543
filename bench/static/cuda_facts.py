"""What the kernels of a compiled library cost: each kernel by itself, and DiceCE for each element.

An element is one true class of one voxel: registers without a class are cost, never work. Counts are those
of the instructions that one thread executes on the usual way through a tile, predicated or not. Where a
branch leads around something (the owner's sums where warps share the classes), it counts as never taken.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from bench.static import sass
from bench.static.aot_cases import prepared
from bench.static.library import Instance, Usage, instance
from bench.static.sass import Kernel, Loop
from dicekernels.spec import RUN_VOXELS

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CLASSES = (2, 3, 4, 5, 8, 14, 16, 17, 32, 33, 64, 117, 128)
OPS = ("forward", "backward")

Row = dict[str, Any]


class Plan(NamedTuple):
    """How csrc/cuda/fast.h cuts a problem.

    held: classes in the registers of a thread; warps: that share the classes of a voxel; voxels: of a thread
    on the usual way; threads, shared_bytes: of a block.
    """

    held: int
    warps: int
    voxels: int
    threads: int
    shared_bytes: int


class Problem(NamedTuple):
    """DiceCE on channel-first logits with uint8 labels, a whole number of tiles."""

    op: str
    classes: int
    dtype: str

    @property
    def plan(self) -> Plan:
        from dicekernels._native import launch_plan

        layout = {"masked": False, "channels_last": False} | asdict(
            prepared("dice_ce", self.classes).spec.sums
        )
        passes = launch_plan((1, self.classes, 128**3), self.dtype, "uint8", **layout)
        found = passes["sums" if self.op == "forward" else "sums_backward"]
        if found["kernel"] != "fast":
            raise ValueError(f"classes: got {self.classes}, expected a number that the fast kernels take")
        keys = ("classes_in_registers", "warps_per_voxel", "voxels_per_thread", "threads", "shared_bytes")
        return Plan(*(found[key] for key in keys))

    @property
    def instance(self) -> Instance:
        return Instance(self.op, self.dtype, self.plan.held, self.plan.warps > 1, False, False)


def of_kernel(name: str, kernel: Kernel, used: Usage, capability: int) -> Row:
    """Facts that need no problem."""
    named = sass.names(kernel.code)
    found = instance(name)
    hot = None if found is None else hottest(kernel)
    body = () if hot is None else kernel.inside(hot)
    return {
        "kernel": name,
        "capability": capability,
        "registers": used.registers,
        "stack_bytes": used.stack,
        "spill_loads": named["LDL"],
        "spill_stores": named["STL"],
        "static_shared_bytes": used.shared,
        "instructions": len(kernel.code),
        "loads": dict(sass.loads(kernel.code)),
        "stores": dict(sass.stores(kernel.code)),
        "loop_instructions": len(body) or None,
        "loop_loads": dict(sass.loads(body)),
        "loop_stores": dict(sass.stores(body)),
        "loop_spills": sum(line.name in ("LDL", "STL") for line in body),
        "narrow": None if found is None or hot is None else narrow(found, body),
    }


def narrow(found: Instance, body: tuple[sass.Instruction, ...]) -> str:
    """What is not as it has to be among the accesses of the usual way; empty if nothing is.

    `held` rows of logits by 16 bytes, as many of the gradient; beside them the own logit of each voxel, by
    one element. Channels-last copies its tile by 16 bytes and has the rest in shared memory. Labels may stand
    there too and are read by loads that name no memory (LD).
    """
    bytes_ = ELEMENT_BYTES[found.dtype]
    if found.last:
        loads = Counter({"128": sass.loads(body)["128"]})
        stores = Counter({"128": sass.stores(body)["128"]} if found.op == "backward" else {})
    else:
        loads = Counter({"128": found.held, "32" if bytes_ == 4 else "U16": 16 // bytes_})
        stores = Counter({"128": found.held} if found.op == "backward" else {})
    wrong = []
    for what, got, expected in (
        ("loads", sass.loads(body), loads),
        ("stores", sass.stores(body), stores),
    ):
        if got != expected:
            wrong.append(f"{what}: got {_widths(got)}, expected {_widths(expected)}")
    return "; ".join(wrong)


def _widths(counts: Counter[str]) -> str:
    return " ".join(f"{width}x{count}" for width, count in sorted(counts.items())) or "none"


def of_problem(problem: Problem, kernel: Kernel, used: Usage, capability: int) -> Row:
    """Shared memory, resident warps and instructions for each element of a problem.

    Raises:
        RuntimeError: the kernel has no loop over tiles that could be told.
    """
    plan = problem.plan
    warps = plan.threads // 32
    hot = hottest(kernel)
    if hot is None:
        raise RuntimeError(f"{problem.instance.name}: no loop with 16-byte loads and exponentials")
    tile = per_tile(kernel, hot, plan.warps)
    # All warps of a block together take a chunk; where they share the classes, every tile of it.
    tiles = math.ceil(RUN_VOXELS / (32 * plan.voxels)) / (1 if plan.warps > 1 else warps)
    outside = len(kernel.code) - len(kernel.inside(hot))
    elements = plan.voxels * problem.classes / plan.warps
    return {
        "op": problem.op,
        "capability": capability,
        "classes": problem.classes,
        "dtype": problem.dtype,
        "instance": problem.instance.name,
        "sharing_warps": plan.warps,
        "threads": plan.threads,
        "registers": used.registers,
        "dynamic_shared_bytes": plan.shared_bytes,
        "resident_warps": sass.resident_warps(
            used.registers, plan.shared_bytes + used.shared, warps, capability
        ),
        "tile_instructions": tile,
        "per_element": round(tile / elements, 3),
        "per_element_chunk": round((tile + outside / tiles) / elements, 3),
    }


def per_tile(kernel: Kernel, hot: Loop, warps: int) -> int:
    """Instructions of a thread for one tile: loops inside are those over the warps that share the classes."""
    around = kernel.inside(hot, but=kernel.children(hot))
    return len(around) + warps * (len(kernel.inside(hot)) - len(around))


def hottest(kernel: Kernel) -> Loop | None:
    """The loop over tiles on the usual way: the shortest of those with the most wide loads of logits.

    Those are marked as constant, or go to shared memory. The special way has a loop of its own, without
    such; the loops around both are longer.
    """

    def wide(loop: Loop) -> int:
        return sum(
            line.name == "LDGSTS"
            or (line.name == "LDG" and "CONSTANT" in line.opcode and line.width in ("128", "64"))
            for line in kernel.inside(loop)
        )

    found = [loop for loop in kernel.loops if sass.exponentials(kernel.inside(loop)) and wide(loop)]
    return max(found, key=lambda loop: (wide(loop), -len(kernel.inside(loop))), default=None)


def rows(
    code: Mapping[int, Mapping[str, Kernel]],
    used: Mapping[int, Mapping[str, Usage]],
    problems: list[Problem],
) -> tuple[list[Row], list[Row]]:
    """(of every kernel, of every problem).

    Raises:
        RuntimeError: the library lacks the kernel of a problem: it is older than the plans here.
    """
    by_kernel, by_problem = [], []
    for capability, kernels in code.items():
        instances = {instance(name): name for name in kernels}
        for name in sorted(kernels, key=_natural):
            by_kernel.append(of_kernel(name, kernels[name], used[capability][name], capability))
        for problem in problems:
            name = instances.get(problem.instance, "")
            if not name:
                raise RuntimeError(f"the library has no kernel {problem.instance.name!r}: build it again")
            by_problem.append(of_problem(problem, kernels[name], used[capability][name], capability))
    return by_kernel, by_problem


def problems(
    classes: list[int] | None = None, dtypes: list[str] | None = None, ops: list[str] | None = None
) -> list[Problem]:
    return [
        Problem(op, c, dtype)
        for op in ops or OPS
        for dtype in dtypes or ELEMENT_BYTES
        for c in classes or CLASSES
    ]


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
