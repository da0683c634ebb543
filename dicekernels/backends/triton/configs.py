"""Which tile a problem gets: a table by classes, bytes of a logit, layout and direction, for every GPU.

So the bits of a result depend on the architecture alone, and no first step of a training waits for an
autotuner. Chosen by ``python -m bench.static.aot``: the fewest instructions an element among the tiles that
spill nowhere from sm_80 to sm_120. ``python -m bench.gpu.tune`` measures the table again on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

# Registers of a thread. Left alone, ptxas stops at some step of occupancy and spills a few bytes for it.
REGISTERS = 255


class Tile(NamedTuple):
    """Constants of a kernel.

    Attributes:
        shape: (BLOCK_C, BLOCK_N, LANES, FOLD, INNER): see tile.py.
        warps: of a program.
        registers: of a thread, at most.
        scattered: classes are contiguous in memory, but neighbouring threads take neighbouring voxels.
    """

    shape: tuple[int, int, int, int, bool]
    warps: int
    registers: int = REGISTERS
    scattered: bool = False


# BLOCK_C: (elements of a tile in one thread: float32, half precision, half precision backward; warps).
CHANNEL_FIRST = {
    1: (8, 8, 8, 4),
    2: (16, 16, 16, 4),
    4: (32, 32, 32, 4),
    8: (32, 64, 64, 4),
    16: (64, 64, 64, 4),
    32: (32, 64, 64, 4),
    64: (32, 64, 64, 4),
    128: (32, 64, 32, 8),
    256: (32, 32, 32, 8),
    512: (64, 64, 64, 8),
}
# Rows of classes that 16-byte accesses divide. BLOCK_C: (elements in one thread, warps).
CHANNELS_LAST = {
    2: (16, 4),
    4: (32, 4),
    8: (32, 4),
    16: (32, 4),
    32: (32, 4),
    64: (32, 4),
    128: (32, 8),
    256: (32, 8),
    512: (32, 8),
}
# All others. BLOCK_C: (BLOCK_N, LANES, warps), forward and backward. LANES = 1: one thread reads all
# classes of a voxel, and its neighbours those of the next ones.
CHANNELS_LAST_ODD = {
    2: ((512, 1, 4), (512, 1, 4)),
    4: ((512, 1, 4), (512, 1, 4)),
    8: ((256, 1, 4), (256, 1, 4)),
    16: ((128, 2, 4), (128, 2, 4)),
    32: ((64, 4, 4), (64, 4, 4)),
    64: ((32, 4, 4), (32, 4, 4)),
    128: ((32, 8, 8), (32, 8, 8)),
    256: ((32, 8, 8), (32, 8, 8)),
    512: ((16, 16, 8), (32, 8, 8)),
}
# Most elements in one thread for what needs more registers: dense targets and masks; binary voxel terms (BCE,
# focal), and dense targets beside channels-last logits, whose tiles change their layout.
WIDER_ELEMENTS = 32
BINARY_ELEMENTS = 16

# (BLOCK_C, bytes of a logit, backward) that reach a step of occupancy without spilling.
FEWER_REGISTERS = {(16, 4, False): 224}


def choose_tile(
    classes: int,
    itemsize: int,
    channels_last: bool,
    backward: bool,
    dense: bool = False,
    masked: bool = False,
    binary: bool = False,
) -> Tile:
    """The tile of a kernel for logits of ``itemsize`` bytes.

    float64, which serves checks of gradients, takes the rows of float32 with half of the voxels.
    """
    block_c = 1 << (classes - 1).bit_length()
    vector = 16 // itemsize
    most = 64
    if binary or (dense and channels_last):
        most = BINARY_ELEMENTS
    elif dense or masked:
        most = WIDER_ELEMENTS
    if channels_last and classes % vector:
        block_n, lanes, warps = CHANNELS_LAST_ODD[block_c][backward]
        fold = 32 // lanes * warps
        while block_n > fold and block_n * block_c > most * 32 * warps:
            block_n //= 2
        return Tile((block_c, block_n, lanes, fold, False), warps, scattered=lanes == 1)
    if channels_last:
        elements, warps = CHANNELS_LAST[block_c]
    else:
        single, half, half_backward, warps = CHANNEL_FIRST[block_c]
        elements = single if itemsize >= 4 else half_backward if backward else half
    elements = min(elements, most) // (2 if itemsize == 8 else 1)
    block_n = max(vector, elements * 32 * warps // block_c)
    if channels_last:
        return Tile((block_c, block_n, 0, min(block_n, 32 * warps * vector // block_c), False), warps)
    registers = FEWER_REGISTERS.get((block_c, itemsize, backward), REGISTERS)
    return Tile((block_c, block_n, 0, vector, True), warps, registers)
