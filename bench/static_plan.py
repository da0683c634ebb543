"""The arithmetic of csrc/cuda/fast.h: which instance takes a problem, and how it is launched.

Written again, since a machine that reads the report may have no compiler; tests/bench/test_cuda_static.py
compares the numbers with the header's. Names as there.
"""

from __future__ import annotations

from dataclasses import dataclass

RUN_VOXELS = 4096
FAST_CLASSES, FAST_THREADS = 128, 128
MOST_SHARED_BYTES = 99 * 1024
SLOPE_BYTES = HIT_BYTES = 16
CLASS_BYTES = 24
# Of the other kernels: general_*.cuh has a thread a class, 128 at least, finish.cu always the same number.
GENERAL_THREADS, FINISH_THREADS = 512, 256

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """held: classes in the registers of a thread; warps: that share the classes of a voxel; classes: of one.

    last: channels-last; voxels: of a thread on the usual way.
    """

    element_bytes: int
    last: bool
    held: int
    warps: int
    classes: int
    total: int

    @property
    def split(self) -> bool:
        return self.warps > 1

    @property
    def threads(self) -> int:
        return 32 * self.warps if self.split else FAST_THREADS

    @property
    def voxels(self) -> int:
        return tile_voxels(self.element_bytes, self.held, self.split, self.last)

    @property
    def pitch_bytes(self) -> int:
        """Channels-last: from voxel to voxel in shared memory, an odd number of 16-byte chunks."""
        row = self.total * self.element_bytes
        return row + 16 if row % 32 == 0 else row


def most_sharing(element_bytes: int, held: int, focal: bool) -> int:
    """Warps that share the classes of a voxel, at most."""
    if focal:
        return 16 if element_bytes == 4 else 12
    return 6 if held == 8 else 8


def tile_voxels(element_bytes: int, held: int, split: bool, last: bool) -> int:
    if last:
        return 2 if split and element_bytes == 4 else 4
    return 4 if split and held == 16 else 16 // element_bytes


def plan_classes(classes: int, focal: bool, element_bytes: int, last: bool = False) -> Plan | None:
    """None for numbers of classes that the fast kernels do not take."""
    if not 1 < classes <= FAST_CLASSES:
        return None
    most = 16 if not focal else 8 if element_bytes == 4 else 4
    for held in (4, 8, 16) if focal or last else (2, 3, 4, 6, 8, 12, 16):
        if classes <= held <= most:
            return Plan(element_bytes, last, held, 1, classes, classes)
    found: Plan | None = None
    shared = 12 if element_bytes == 4 else 8
    for held in (most,) if focal or last else (shared, 16):
        warps = -(-classes // held)
        if warps > most_sharing(element_bytes, held, focal):
            continue
        if found is not None and warps * held >= found.warps * found.held:
            continue
        # Whole 16-byte chunks, where channels-last has such and the registers hold them.
        whole = last and classes * element_bytes % 16 == 0 and held * element_bytes % 16 == 0
        unit = 16 // element_bytes if whole else 1
        of_a_warp = -(-classes // (warps * unit)) * unit
        found = Plan(element_bytes, last, held, warps, of_a_warp, classes)
    return found


def memory_bytes(plan: Plan, op: str, direct: bool = True, masked: bool = False) -> int:
    """Shared memory that a launch asks for; direct: labels are bytes that need no copy."""
    if op == "forward":
        first, exchanged, of_a_class = plan.classes * plan.threads * HIT_BYTES, 2, CLASS_BYTES
    else:
        first, exchanged, of_a_class = (plan.total + 1) * SLOPE_BYTES, 3, 0
    # The sums of the classes take the place of what was exchanged.
    exchange = exchanged * plan.warps * 32 * plan.voxels * 4 if plan.split else 0
    size = (first + max(exchange, plan.total * of_a_class) + 4 + 15) // 16 * 16
    if plan.last:
        size += (1 if plan.split else FAST_THREADS // 32) * 32 * plan.voxels * plan.pitch_bytes
    return size + (0 if direct else RUN_VOXELS) + (4 * RUN_VOXELS if masked else 0)
