"""How the kernels of csrc/cuda meet memory and threads: layouts, offsets past 2^31, runs, schedules.

Every layout meets the fast kernels and, where they take it, those of contiguous classes; the general kernels
meet them in test_sums.py.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import emulated
import pytest
import torch
from cases import DEVICE, LAYOUTS_3D, laid_out, make_labels, make_logits, make_mask, make_values, oracle_rows
from cuda_kernel_cases import (
    CLASSES,
    DTYPES,
    F64,
    FOCAL_CLASSES,
    both,
    check,
    make_coef,
    on_cuda_kernels,
    ops_of,
    plans,
    spec_of,
    tile_of,
)
from test_sums import check as check_region_sums
from torch import Tensor

from dicekernels.spec import (
    BAD,
    OVERLAP_ROWS,
    POS,
    Activation,
    Denominator,
    FinishSpec,
    Formula,
    G,
    N,
    Reduction,
    SumsSpec,
    VoxelTerm,
    chunk_count,
    chunk_voxels,
    row_index,
    row_names,
)
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

pytestmark = on_cuda_kernels


@plans
@pytest.mark.parametrize("layout", [*LAYOUTS_3D, "channels_last"])
def test_layouts(backend, layout, classes, term):
    # 520 voxels: aligned rows and a rest. 63: none of them aligned.
    for turn, space in enumerate([(5, 8, 13), (3, 3, 7)]):
        shape = (2, classes, *(space if "3d" in layout or layout != "channels_last" else space[1:]))
        dtype = DTYPES[(classes + turn + len(layout)) % 3]
        labels = make_labels((2, 1, *shape[2:]), classes)
        check(backend, laid_out(make_logits(shape, dtype), layout), labels, layout, term=term)
        if turn == 0:
            near = make_labels((2, 1, *shape[2:]), classes)
            check(backend, make_logits(shape, dtype), laid_out(near, layout), f"labels {layout}", term=term)


# Classes beside each other: a voxel has a row of them, aligned or not.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_count_of_contiguous_classes(backend, classes, dtype):
    tile, group = tile_of(dtype)
    for turn, voxels in enumerate([tile, tile + group, 131, 4096 + group]):
        if voxels > 4096 and classes > 33:
            continue
        logits = laid_out(make_logits((2, classes, voxels, 1), dtype, seed=turn), "channels_last")
        labels = make_labels((2, 1, voxels, 1), classes, (torch.uint8, torch.int64)[turn % 2])
        check(backend, logits, labels, term=(None, "ce")[(classes + turn) % 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", FOCAL_CLASSES)
def test_every_focal_count_of_contiguous_classes(backend, classes, dtype):
    for voxels in (256, 131):
        logits = laid_out(make_logits((2, classes, voxels, 1), dtype), "channels_last")
        check(backend, logits, make_labels((2, 1, voxels, 1), classes), term="focal_sigmoid")


@plans
def test_contiguous_classes_with_ignored_voxels_and_weights(backend, classes, term):
    for dtype in DTYPES:
        logits = laid_out(make_logits((2, classes, 24, 20), dtype), "channels_last")
        labels = make_labels((2, 1, 24, 20), classes)
        check(backend, logits, labels, term=term, mask=make_mask("fraction", logits.shape))
        check(backend, logits, labels, term=term, ignore_index=1)
        labels[:, :, 7:9] = 255
        check(backend, logits, labels, term=term, ignore_index=255)


def moved(x: Tensor, elements: int) -> Tensor:
    """The same values so many elements behind an aligned address."""
    room = torch.empty(x.numel() + elements, dtype=x.dtype, device=x.device)
    place = room[elements:].view(x.shape)
    return place.copy_(x)


@plans
def test_addresses_that_are_not_aligned(backend, classes, term):
    for dtype, (by, labels_by) in itertools.product(DTYPES, [(1, 0), (0, 1), (2, 2), (4, 4), (8, 8)]):
        logits = moved(make_logits((2, classes, 512), dtype), by)
        labels = moved(make_labels((2, 1, 512), classes), labels_by)
        check(backend, logits, labels, f"{by} {labels_by}", term=term)


def test_samples_of_labels_that_are_not_aligned(backend):
    room = make_labels((2, 1, 515), 5)
    for dtype in DTYPES:
        check(backend, make_logits((2, 5, 512), dtype), room[..., :512], term="ce")
        check(backend, make_logits((2, 5, 257), dtype), room[..., 1::2], "every second", term="ce")


#
# What multiplies the slopes: a gradient scale of AMP, or the gradients of losses without reduction.


@plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64])
def test_incoming_gradients_multiply_the_slopes(backend, dtype, classes, term):
    spec, ops = spec_of(term), ops_of(backend)
    logits, labels = make_logits((2, classes, 300)), make_labels((2, 1, 300), classes)
    coef = make_coef(2, classes, spec.rows)
    for shape in ((), (1, 1), (2, 1), (1, classes), (2, classes), (2, classes - 1)):
        factor = make_logits((2, classes), dtype)[: (shape or (1,))[0], : (shape or (1, 1))[1]].reshape(shape)
        got = ops.sums_backward(factor, logits, labels, None, coef, *spec.args())
        skipped = classes - shape[1] if shape and shape[1] > 1 else 0
        scaled = coef.clone()
        scaled[:, skipped:] *= factor.double().reshape(*(shape or (1, 1)), 1)
        assert torch.equal(got, ops.sums_backward(None, logits, labels, None, scaled, *spec.args())), shape


#
# Offsets past 2^31, in a file that holds nothing else (test_triton_kernels.py has the same). A fast kernel
# takes classes less than 2^32 bytes apart and voxels less than 2^32 / 4097 bytes; the others are general.

FAR = 2**31
FARTHEST_VOXEL = 2**32 // 4097 // 2 - 1  # float16
SPARSE = ["voxel", "voxel of contiguous classes"]  # a page of the file for each voxel, which takes its time
FAR_LOGITS = {
    "sample": ((2, 3, 16), (FAR, 16, 1)),
    "class": ((2, 3, 16), (64, FAR - 8, 1)),
    "class not aligned": ((2, 3, 16), (64, FAR - 1, 1)),
    "class of a general kernel": ((2, 3, 16), (64, FAR, 1)),
    "split classes": ((1, 33, 16), (0, FAR // 16, 1)),
    "voxel": ((2, 2, 8200), (64, 16, FARTHEST_VOXEL)),
    "voxel of a general kernel": ((2, 3, 16), (64, 16, FAR // 8)),
    "voxel of contiguous classes": ((1, 3, 4100), (0, 1, FARTHEST_VOXEL)),
    "sample of contiguous classes": ((2, 3, 16), (FAR, 1, 8)),
}
on_this_machine = pytest.mark.skipif(DEVICE != "cpu", reason="maps a file into the memory of the CPU")


def far_apart(
    values: Tensor, strides: tuple[int, ...], folder: Path, shape: tuple[int, ...] | None = None
) -> Tensor:
    """The values with these strides, in a sparse file; zeros up to ``shape``."""
    shape = shape or tuple(values.shape)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    kind = torch.uint8 if values.dtype == torch.bool else values.dtype
    path = folder / f"far{len(list(folder.iterdir()))}"
    store = torch.from_file(str(path), shared=True, size=size, dtype=kind)
    far = store.as_strided(shape, strides)
    far[tuple(slice(n) for n in values.shape)].copy_(values)
    return far


@contextmanager
def allocated(tensor: Tensor) -> Iterator[None]:
    """``empty_like`` gives this one, as if the allocator had put it there."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_like", lambda *_, **__: tensor, "CPU")
    try:
        yield
    finally:
        library._destroy()


@on_this_machine
@pytest.mark.parametrize(
    "which", [pytest.param(name, marks=[pytest.mark.slow] * (name in SPARSE)) for name in FAR_LOGITS]
)
def test_logits_and_gradients_far_apart(backend, which, tmp_path):
    shape, strides = FAR_LOGITS[which]
    near, labels = make_logits(shape, torch.float16), make_labels((shape[0], 1, shape[2]), shape[1])
    expected = both(backend, near, labels)
    far = far_apart(near, strides, tmp_path)
    slots, gradient = both(backend, far, labels)
    truth = oracle_rows(near, labels, voxel_term="ce")
    honest = oracle_rows(near, labels, torch.float32, voxel_term="ce")
    for row, total in zip(row_names(spec_of("ce").rows), slots.sum(1).unbind(-1), strict=True):
        if row != "BAD":
            assert_close_to_truth(total, truth[row], honest[row].to(F64), torch.float32, f"{row} {which}")
    # Two kernels that are right differ by what a third would differ from both.
    assert_gradient_close(gradient, expected[1].double(), expected[1], torch.float16, which)
    place = far_apart(torch.full_like(near, -1), strides, tmp_path)
    with allocated(place):
        _, written = both(backend, near, labels)
    assert written.data_ptr() == place.data_ptr()
    assert_gradient_close(place, expected[1].double(), expected[1], torch.float16, f"gradient {which}")


@on_this_machine
@pytest.mark.parametrize("which", SPARSE)
def test_the_farthest_voxels_of_a_run(backend, which, tmp_path):
    """Nobody reads the ignored ones between them, so that the file has few pages."""
    shape, strides = (1, 2, 8200), FAR_LOGITS[which][1]
    near = make_logits(shape, torch.float16)
    far = far_apart(near[..., :1], strides, tmp_path, shape)
    labels = torch.full((1, 1, shape[2]), 255, dtype=torch.uint8)
    for at in (0, 1, 4094, 4095, 4096, 8191, 8192, 8199):
        labels[..., at] = at % 2
        far[..., at] = near[..., at]
    for kind in (torch.uint8, torch.int64):
        expected = both(backend, near, labels.to(kind), ignore_index=255)
        slots, gradient = both(backend, far, labels.to(kind), ignore_index=255)
        assert_close_to_truth(slots, expected[0], expected[0], torch.float32, which)
        assert_gradient_close(gradient, expected[1].double(), expected[1], torch.float16, which)
        assert slots[..., row_names(spec_of("ce").rows).index("G")].sum() == 8


@on_this_machine
@pytest.mark.parametrize("strides", [(FAR, 16, 1), (16, 16, FAR // 8)], ids=["sample", "voxel"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_labels_and_masks_far_apart(backend, strides, dtype, tmp_path):
    shape = (2, 3, 16)
    labels = far_apart(make_labels((2, 1, 16), 3, dtype), strides, tmp_path)
    mask = far_apart(make_mask("binary", shape, torch.uint8), strides, tmp_path)
    check(backend, make_logits(shape), labels, term="ce")
    check(backend, make_logits(shape), labels, term="ce", mask=mask)
    check_region_sums(make_logits(shape), labels, voxel_term="ce", mask=mask)


@on_this_machine
@pytest.mark.parametrize("which", ["sample", "class of a general kernel", "voxel of a general kernel"])
def test_values_far_apart(backend, which, tmp_path):
    shape, strides = FAR_LOGITS[which]
    check_region_sums(
        make_logits(shape), far_apart(make_values(shape, torch.uint8), strides, tmp_path), which
    )


#
# 8.4 million voxels of a sample: two runs of 4096 in a chunk, the last chunk one voxel.


def test_two_runs_in_a_chunk(backend):
    voxels = 2048 * 4096 + 1
    assert (chunk_voxels(voxels), chunk_count(voxels)) == (8192, 1025)
    logits = make_logits((1, 2, voxels), torch.float16)
    labels = make_labels((1, 1, voxels), 2)
    labels[..., 5000:5100] = 255
    spec = spec_of("ce", ignore_index=255)
    slots = ops_of(backend).sums(logits, labels, None, *spec.args())
    options = {"voxel_term": "ce", "ignore_index": 255}
    for chunk in (0, 1, 777, 1023, 1024):
        part = slice(8192 * chunk, 8192 * (chunk + 1))
        truth, honest = (
            oracle_rows(logits[..., part], labels[..., part], dtype, **options)
            for dtype in (F64, torch.float32)
        )
        for row, total in zip(row_names(spec.rows), slots[:, chunk].unbind(-1), strict=True):
            if row != "BAD":
                assert_close_to_truth(total, truth[row], honest[row].to(F64), torch.float32, f"{row} {chunk}")
    at = row_names(spec.rows).index("G")
    counts = torch.bincount(labels.flatten().long(), minlength=256)[:2]
    assert slots[0, :, :, at].sum(0).tolist() == counts.tolist()
    assert not slots[..., row_names(spec.rows).index("BAD")].any()


#
# Threads, warps and blocks in other orders: the same bits, or something reads what another thread may not
# have written yet, or has already overwritten.


@pytest.fixture
def set_order(backend) -> Iterator[Callable[[int, int], None]]:
    if backend != "emulated":
        pytest.skip("the emulator alone can be told in which order to run")
    order = ctypes.CDLL(str(emulated.LIBRARY)).dicekernels_emulator_order
    order.argtypes = [ctypes.c_int, ctypes.c_ulonglong]
    yield order
    order(-1, 0)


ORDERS = [(1, 0), *((2, seed) for seed in range(3))]  # reverse, three shuffles


def assert_same_bits(set_order: Callable[[int, int], None], run: Callable, *args, **options) -> None:
    set_order(0, 0)
    expected = run(*args, **options)
    for order in ORDERS:
        set_order(*order)
        for got, forward in zip(run(*args, **options), expected, strict=True):
            assert torch.equal(got, forward), order


@plans
def test_the_order_of_threads_changes_no_bit_of_a_fast_kernel(backend, set_order, classes, term):
    voxels = 4096 + 300 if classes < 30 else 1400
    for turn, dtype in enumerate(DTYPES):
        logits, labels = make_logits((2, classes, voxels), dtype), make_labels((2, 1, voxels), classes)
        labels[..., 130:140] = labels[..., -1] = 255  # the usual way, the special one, the usual one
        mask = make_mask("fraction", logits.shape) if turn == 0 else None
        for weights, ignore_index in ((None, 255), (mask, 1)):
            options = {"term": term, "ignore_index": ignore_index}
            assert_same_bits(set_order, both, backend, logits, labels, weights, **options)
        last, options = laid_out(logits[..., None], "channels_last"), {"term": term, "ignore_index": 255}
        assert_same_bits(set_order, both, backend, last, labels[..., None], **options)


def general(ops, spec: SumsSpec, logits: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    coef = make_coef(*logits.shape[:2], spec.rows)
    gradient = ops.sums_backward(None, logits, values, mask, coef, *spec.args())
    return ops.sums(logits, values, mask, *spec.args()), gradient


@pytest.mark.parametrize(
    ("activation", "term"),
    [
        (Activation.SOFTMAX, VoxelTerm.CE),
        (Activation.SIGMOID, VoxelTerm.FOCAL_SIGMOID),
        (Activation.SOFTMAX, VoxelTerm.FOCAL_SOFTMAX),
    ],
)
def test_the_order_of_threads_changes_no_bit_of_a_general_kernel(backend, set_order, activation, term):
    spec = SumsSpec(True, activation, rows=OVERLAP_ROWS | G | N | POS, voxel_term=term)
    for classes, dtype, voxels in [(5, F64, 4300), (130, torch.float32, 600), (300, torch.float16, 90)]:
        shape = (2, classes, voxels)
        tensors = make_logits(shape, dtype), make_values(shape), make_mask("fraction", shape)
        assert_same_bits(set_order, general, ops_of(backend), spec, *tensors)


@pytest.mark.parametrize("formula", [Formula.RATIO, Formula.GENERALIZED])
@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("batch", [False, True])
def test_the_order_of_threads_changes_no_bit_of_finish(backend, set_order, formula, reduction, batch):
    rows = spec_of(None if reduction == Reduction.NONE else "focal_sigmoid").rows
    spec = FinishSpec(formula, batch=batch, reduction=reduction, denominator=Denominator.ELEMENTS)
    for samples, chunks, classes in [(2, 1, 3), (3, 70, 5), (2, 9, 130), (40, 2, 33)]:
        slots = make_coef(samples * chunks, classes, rows).abs()
        slots = slots.reshape(samples, chunks, classes, -1)
        slots[..., row_index(rows, BAD)] = 0
        arguments = [slots, *[None] * 5, rows, *spec.args(False), F64]
        assert_same_bits(set_order, ops_of(backend).finish, *arguments)
