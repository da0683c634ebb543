"""What only the Triton kernels have: tiles, several runs in a chunk, 64-bit offsets. In Triton's interpreter.

test_triton_interpreter.py runs it, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import laid_out, make_labels, make_logits, make_mask, make_values, oracle_rows
from test_sums import check

from dicekernels import region_sums, spec
from dicekernels.backends.triton.configs import CHANNEL_FIRST, CHANNELS_LAST_ODD, choose_tile
from dicekernels.backends.triton.support import interpreted
from dicekernels.spec import OVERLAP_ROWS, Activation, SumsSpec
from dicekernels.testing import assert_close_to_truth

if not interpreted():
    pytest.skip("run by test_triton_interpreter.py, with TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime.errors import InterpreterError

from dicekernels.backends.triton import loads, sums_backward

pytestmark = pytest.mark.usefixtures("backend")
F64 = torch.float64
CPU = torch.device("cpu")


#
# Around the tile of each pass: one voxel less, all of it, one more, and two tiles with a rest. The tile
# follows from classes, bytes of a logit, layout and pass. Every count meets float32; the others enter as
# conversions around the same code, and take the counts that change it.


COUNTS = {
    torch.float32: lambda tile: (tile - 1, tile, tile + 1, 2 * tile + 7),
    torch.bfloat16: lambda tile: (tile, tile + 1),
    torch.float16: lambda tile: (tile - 1,),
    torch.float64: lambda tile: (tile, tile + 1),
}


def tile_problems(block: int, layout: str):
    """(logits, target, options); classes that fill the tile or not, target and mask in turn."""
    turn = 0
    for dtype, counts in COUNTS.items():
        itemsize = torch.empty(0, dtype=dtype).element_size()
        classes = block - block // 4 * (turn % 2)
        contiguous_classes = layout == "channels_last" and classes > 1
        tiles = {
            choose_tile(classes, itemsize, contiguous_classes, backward).shape[1]
            for backward in (False, True)
        }
        for voxels in sorted({count for tile in tiles for count in counts(tile) if count}):
            turn += 1
            shape = (1, classes, 1, voxels)
            logits = make_logits(shape, dtype, seed=turn)
            if contiguous_classes:
                logits = laid_out(logits, layout)
            options = {"activation": "softmax", "voxel_term": "ce"}
            dense = turn % 2 or classes == 1
            if classes == 1 or (dense and classes > 256 and dtype == torch.float64):
                # A softmax over one class is 1, and its gradient rounding around 0. The sum of 512 random
                # slopes is off by some eps, and the truth in the same dtype grants none for that.
                options = {"activation": "sigmoid", "voxel_term": "bce"}
            if turn % 3 == 2:
                options["mask"] = make_mask("fraction", shape, seed=turn)
            target = make_values(shape) if dense else make_labels((1, 1, 1, voxels), classes, torch.int16)
            yield logits, target, options


@pytest.mark.parametrize("block", CHANNEL_FIRST)
def test_around_a_tile_of_contiguous_voxels(block):
    for logits, target, options in tile_problems(block, "contiguous"):
        check(logits, target, f"{logits.dtype} {tuple(logits.shape)}", **options)


@pytest.mark.parametrize("block", CHANNELS_LAST_ODD)
def test_around_a_tile_of_contiguous_classes(block):
    for logits, target, options in tile_problems(block, "channels_last"):
        check(logits, target, f"{logits.dtype} {tuple(logits.shape)}", **options)


#
# A chunk of a big volume has several runs of 4096 voxels, each summed in float32 for itself. Fewer chunks
# make that so for a small one: 2 of three runs, the last one short; 3 of two runs, the last one without
# voxels. The backward pass has no chunks.


@pytest.mark.parametrize(("chunks", "voxels"), [(2, 5 * 4096 + 77), (3, 4 * 4096 + 1)])
@pytest.mark.parametrize("kind", ["labels", "ignored labels", "values", "mask"])
def test_several_runs_in_a_chunk(kind, chunks, voxels, monkeypatch):
    monkeypatch.setattr(spec, "MAX_CHUNKS", chunks)
    assert spec.chunk_count(voxels) == chunks
    shape = (1, 2, voxels)
    logits = make_logits(shape)
    target = make_values(shape) if kind == "values" else make_labels((1, 1, voxels), 2)
    options = {"voxel_term": "ce"}
    if kind == "ignored labels":
        options["ignore_index"] = 1
    if kind == "mask":
        options["mask"] = make_mask("fraction", shape)
    ours = region_sums(logits, target, **options)
    truth, honest = (oracle_rows(logits, target, dtype, **options) for dtype in (F64, torch.float32))
    for row in truth:
        assert_close_to_truth(
            getattr(ours, row), truth[row], honest[row].to(F64), torch.float32, f"{row} {kind}"
        )
    if kind != "mask":
        assert torch.equal(ours.N, truth["N"])


@pytest.mark.parametrize("chunks", [1, 4])
def test_sums_past_the_integers_of_float32(chunks, monkeypatch):
    # What 79 million voxels do in test_numerics, with few: voxels that weigh 4096 each, and one that weighs
    # 1, which float32 loses beside 3 * 2^24. Within a run all sums are integers up to 2^24.
    monkeypatch.setattr(spec, "MAX_CHUNKS", chunks)
    voxels = 3 * 4096 + 1
    mask = torch.full((1, 1, voxels), 4096.0)
    mask[..., -1] = 1
    logits, labels = torch.zeros(1, 2, voxels), torch.zeros(1, 1, voxels, dtype=torch.uint8)
    sums = region_sums(logits, labels, mask=mask)
    assert torch.tensor(3 * 2.0**24).add(1).item() == 3 * 2**24
    assert sums.N.tolist() == [[3 * 2**24 + 1] * 2]
    assert sums.G.tolist() == [[3 * 2**24 + 1, 0]]
    assert sums.I.tolist() == [[(3 * 2**24 + 1) / 2, 0]]


#
# Offsets past 2^31. The elements lie as far apart as in a big volume, in a file that holds nothing else; the
# interpreter checks each 32-bit addition and multiplication on the way (tests/support/triton_interpreter.py).

FAR = 2**31


def far_apart(values: torch.Tensor, strides: tuple[int, ...], folder: Path) -> torch.Tensor:
    """The values with these strides, in a sparse file."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    path = folder / f"far{len(list(folder.iterdir()))}"
    kind = torch.uint8 if values.dtype == torch.bool else values.dtype
    store = torch.from_file(str(path), shared=True, size=size, dtype=kind)
    far = store.as_strided(values.shape, strides)
    far.copy_(values)
    return far


# Voxels that 8 divides, so that strides of half precision are divided by 8 on the way to the kernel.
FAR_LOGITS = {
    "sample": (FAR, 16, 1),
    "class": (64, FAR, 1),
    "second class": (64, FAR // 2, 1),
    "voxel": (64, 16, FAR // 8),
    "voxel of contiguous classes": (8, 1, FAR // 8),
    "sample of contiguous classes": (FAR, 1, 8),
}


@pytest.mark.parametrize("which", FAR_LOGITS)
def test_logits_far_apart(which, tmp_path):
    near = make_logits((2, 3, 16), torch.float16)
    logits = far_apart(near, FAR_LOGITS[which], tmp_path)
    check(logits, make_labels((2, 1, 16), 3), which, voxel_term="ce")


@pytest.mark.parametrize("which", FAR_LOGITS)
def test_a_gradient_far_apart(which, tmp_path):
    logits, labels = make_logits((2, 3, 16), torch.float16), make_labels((2, 1, 16), 3)
    spec = SumsSpec(False, Activation.SOFTMAX, rows=OVERLAP_ROWS)
    coef = make_logits((2, 3, 3), torch.float64)
    near = sums_backward.sums_backward(None, logits, labels, None, coef, spec)
    far = far_apart(torch.zeros_like(logits), FAR_LOGITS[which], tmp_path)
    sums_backward.plan_sums_backward(None, logits, labels, None, coef, far, spec).run(CPU)
    assert near.any()
    assert torch.equal(far, near)


@pytest.mark.parametrize("strides", [(FAR, 16, 1), (16, 16, FAR // 8)], ids=["sample", "voxel"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_labels_and_masks_far_apart(dtype, strides, tmp_path):
    logits, labels, mask = (
        make_logits((2, 3, 16)),
        make_labels((2, 1, 16), 3),
        make_mask("binary", (2, 3, 16)),
    )
    check(logits, far_apart(labels, strides, tmp_path), mask=far_apart(mask.to(dtype), strides, tmp_path))


@pytest.mark.parametrize("which", FAR_LOGITS)
def test_values_far_apart(which, tmp_path):
    values = far_apart(make_values((2, 3, 16), torch.uint8), FAR_LOGITS[which], tmp_path)
    check(make_logits((2, 3, 16)), values, which)


def test_an_offset_in_32_bits_is_noticed(tmp_path, monkeypatch):
    logits = far_apart(make_logits((2, 3, 16), torch.float16), (64, 16, FAR // 8), tmp_path)
    labels = make_labels((2, 1, 16), 3)
    region_sums(logits, labels)
    monkeypatch.setattr(loads, "voxel_offset", lambda v, stride, *_: v * stride)
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation mul"):
        region_sums(logits, labels)
