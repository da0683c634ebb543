"""The fast kernels of csrc/cuda: every register plan, both ways through a tile, labels and weights.

The grid. A fast kernel is an instance of (dtype, classes that a thread holds in registers, do warps share the
classes, focal term or not); the class count says which, and how many registers stay without a class. So every
class count that fills an instance, or leaves it a register, meets every dtype. What a tile does depends on
dtype and voxel count: a whole number of tiles; 16 bytes of logits less and more, rows still aligned; a prime,
whose rows are not; more than one chunk. These meet every class count, too, with overlap rows alone and cross
entropy in turn, since only a branch depends on that. Labels, weights and what is left out enter before the
classes and after the softmax: they meet one plan of each form (all classes in one warp, or shared; focal or
not), the dtypes in turn.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import DEVICE, make_labels, make_logits, make_mask
from cuda_kernel_cases import (
    CLASSES,
    COUNTS,
    DTYPES,
    F64,
    FOCAL_CLASSES,
    KINDS,
    both,
    check,
    make_coef,
    on_cuda_kernels,
    plans,
    spec_of,
    tile_of,
)
from torch import Tensor

from dicekernels.spec import BAD, NEG, OVERLAP_ROWS, POS, G, N, chunk_count, row_index, row_names

pytestmark = on_cuda_kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_plan_around_a_tile(backend, classes, dtype):
    tile, group = tile_of(dtype)
    for turn, voxels in enumerate([2 * tile, 2 * tile - group, 2 * tile + group, 251]):
        logits = make_logits((2, classes, voxels), dtype, seed=turn)
        check(backend, logits, make_labels((2, 1, voxels), classes), term=(None, "ce")[(classes + turn) % 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_plan_on_several_chunks(backend, classes, dtype):
    tile, group = tile_of(dtype)
    for turn, voxels in enumerate([4096 + 5 * tile + group, 4099]):
        if turn == 1 and classes > 17:  # the special way leaves chunks as any other problem
            continue
        logits = make_logits((1, classes, voxels), dtype)
        check(backend, logits, make_labels((1, 1, voxels), classes), term=("ce", None)[(classes + turn) % 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", FOCAL_CLASSES)
def test_every_focal_plan(backend, classes, dtype):
    tile, group = tile_of(dtype)
    for turn, voxels in enumerate([2 * tile, 2 * tile - group, 2 * tile + group, 251, 4096 + tile + group]):
        samples = 2 if voxels < 4096 else 1
        logits = make_logits((samples, classes, voxels), dtype, seed=turn)
        check(backend, logits, make_labels((samples, 1, voxels), classes), term="focal_sigmoid")


def with_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    labels = labels.clone()
    labels.view(-1)[::7] = ignore_index
    return labels


# Dtype, ignore_index and mask. uint8 without mask, and nothing ignored inside [0, C), is read where it lies.
LABELS = {
    "uint8": (torch.uint8, None, None),
    "int64": (torch.int64, None, None),
    "float32": (torch.float32, None, None),
    "uint8 inside": (torch.uint8, 1, None),
    "uint8 outside": (torch.uint8, 255, None),
    "uint8 no label": (torch.uint8, 300, None),
    "int16 negative": (torch.int16, -100, None),
    "int32 inside": (torch.int32, 0, None),
    "float16 negative": (torch.float16, -1, None),
    "uint8 binary": (torch.uint8, None, ("binary", torch.bool)),
    "uint8 fraction": (torch.uint8, None, ("fraction", torch.float32)),
    "int64 fraction": (torch.int64, 255, ("fraction", torch.float16)),
    "uint8 double": (torch.uint8, 2, ("fraction", torch.float64)),
}


@plans
@pytest.mark.parametrize("kind", LABELS)
def test_labels_and_weights(backend, kind, classes, term):
    turn = list(LABELS).index(kind) + classes
    dtype, (labels_dtype, ignore_index, mask) = DTYPES[turn % 3], LABELS[kind]
    tile, group = tile_of(dtype)
    for voxels in (3 * tile + group, 347):
        shape = (2, classes, voxels)
        labels = make_labels((2, 1, voxels), classes, labels_dtype, seed=turn)
        if ignore_index is not None and ignore_index != 300:
            labels = with_ignored(labels, ignore_index)
        weights = None if mask is None else make_mask(*mask[:1], shape, mask[1])
        options = {"term": term, "mask": weights, "ignore_index": ignore_index}
        check(backend, make_logits(shape, dtype, seed=turn), labels, kind, **options)


@pytest.mark.parametrize("term", KINDS)
def test_bool_labels(backend, term):
    for voxels, dtype in itertools.product([512, 331], DTYPES):
        check(
            backend, make_logits((2, 2, voxels), dtype), make_labels((2, 1, voxels), 2, torch.bool), term=term
        )


@plans
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_ignored_voxels_in_some_tiles(backend, dtype, classes, term):
    """The usual way and the special one in turn, within one run of one warp."""
    tile, _ = tile_of(torch.float32)
    voxels = 4096 + 2 * tile if classes < 100 else 11 * tile
    labels = make_labels((1, 1, voxels), classes, dtype)
    for at in (0, 2 * tile - 1, slice(4 * tile, 5 * tile), slice(9 * tile + 40, 9 * tile + 90), voxels - 1):
        labels[..., at] = 255
    check(backend, make_logits((1, classes, voxels)), labels, term=term, ignore_index=255)
    labels[...] = 255
    check(backend, make_logits((1, classes, voxels)), labels, "nothing", term=term, ignore_index=255)


@plans
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nothing_leaks_from_voxels_without_weight(backend, poison, classes, term):
    voxels = 1024 + 4
    logits, labels = make_logits((2, classes, voxels)), make_labels((2, 1, voxels), classes)
    out = torch.zeros(2, 1, voxels, dtype=torch.bool, device=DEVICE)
    out[0, 0, 300:400], out[1, 0, ::5] = True, True
    dirty = torch.where(out, poison, logits)
    weights = (~out).float()
    for where, mask, ignore_index in ((out, None, 255), (out & False, weights, None)):
        target = labels.masked_fill(where, 255)
        options = {"term": term, "ignore_index": ignore_index}
        clean = both(backend, logits, target, mask, **options)
        soiled = both(backend, dirty, target, mask, **options)
        assert torch.equal(clean[0], soiled[0])
        assert torch.equal(clean[1], soiled[1])
        assert not soiled[1][out.expand_as(logits)].any()


@plans
def test_nan_in_a_voxel_that_counts_stays_in_its_sample(backend, classes, term):
    logits, labels = make_logits((2, classes, 512)), make_labels((2, 1, 512), classes)
    clean = both(backend, logits, labels, term=term)
    logits[0, classes - 1, 77] = math.nan
    slots, gradient = both(backend, logits, labels, term=term)
    rows = spec_of(term).rows
    place = [row_names(rows).index(row) for row in ("I", "FP", "FN")]
    own = labels[0, 0, 77].long()
    assert slots[0, 0, own, place[0]].isnan()
    assert slots[0, 0, own, place[2]].isnan()
    others = torch.arange(classes, device=DEVICE) != own
    assert slots[0, 0, others, place[1]].isnan().all()
    assert gradient[0, :, 77].isnan().all()
    assert torch.equal(slots[1], clean[0][1])
    gradient[0, :, 77] = clean[1][0, :, 77]
    assert torch.equal(gradient, clean[1])


WRONG = {
    "uint8": (torch.uint8, None, (200, 254, 255)),
    "uint8 beside 255": (torch.uint8, 255, (200, 254, 254)),
    "uint8 beside 0": (torch.uint8, 0, (200, 254, 255)),
    "uint8 negative": (torch.uint8, -1, (200, 254, 255)),
    "int64": (torch.int64, 255, (-1, 2**40, -(2**63))),
    "int8": (torch.int8, None, (-1, -100, -128)),
    "float32": (torch.float32, None, (math.nan, -3.5, 1e9)),
}


@plans
@pytest.mark.parametrize("kind", WRONG)
def test_labels_out_of_range_are_counted_once(backend, kind, classes, term):
    """In the class 0 of their chunk; all other rows, and the gradient, are as if they were ignored."""
    dtype, ignore_index, wrong = WRONG[kind]
    for voxels, places in ((4096 + 260, (0, 127, 128, 4095, 4096, 4355)), (509, (0, 31, 64, 255, 500, 508))):
        labels = make_labels((2, 1, voxels), classes, dtype)
        if ignore_index == 255:
            labels[..., 300:303] = ignore_index
        ignored = labels.to(torch.int64)
        expected = torch.zeros(2, chunk_count(voxels), classes, dtype=F64, device=DEVICE)
        for turn, place in enumerate(places):
            labels[turn % 2, 0, place] = wrong[turn % 3]
            ignored[turn % 2, 0, place] = -7
            expected[turn % 2, place // 4096, 0] += 1
        logits = make_logits((2, classes, voxels))
        options = {"term": term, "ignore_index": ignore_index}
        slots, gradient = both(backend, logits, labels, **options)
        at = row_index(spec_of(term).rows, BAD)
        assert torch.equal(slots[..., at], expected), f"{voxels}"
        if ignore_index is not None:
            ignored[ignored == ignore_index] = -7
        slots[..., at] = 0
        same, alike = both(backend, logits, ignored, term=term, ignore_index=-7)
        assert torch.equal(slots, same)
        assert torch.equal(gradient, alike)


@plans
def test_an_absent_class_has_no_hits(backend, classes, term):
    for dtype in DTYPES:
        labels = make_labels((1, 1, 1024), classes)
        labels[labels == classes - 1] = 0
        slots, _ = both(backend, make_logits((1, classes, 1024), dtype), labels, term=term)
        for row in ("I", "FN", "G", *(["POS"] if term else [])):
            assert slots[0, 0, -1, row_names(spec_of(term).rows).index(row)] == 0, row
        assert slots[0, 0, -1, row_names(spec_of(term).rows).index("FP")] > 0
        check(backend, make_logits((1, classes, 1024), dtype), labels, term=term)


@plans
@pytest.mark.parametrize("voxels", [1024, 509])
def test_a_perfect_prediction_has_a_loss_of_zero(backend, voxels, classes, term):
    labels = make_labels((1, 1, voxels), classes)
    onehot = torch.zeros(1, classes, voxels, device=DEVICE).scatter_(1, labels.long(), 1)
    for dtype in DTYPES:
        slots, gradient = both(backend, (200 * (2 * onehot - 1)).to(dtype), labels, term=term)
        rows = dict(zip(row_names(spec_of(term).rows), slots.unbind(-1), strict=True))
        assert torch.equal(rows["I"], onehot.sum(-1)[:, None].to(F64))
        for row in rows.keys() - {"I", "G", "N"}:
            assert not rows[row].any(), row
        assert gradient.isfinite().all()


@plans
def test_the_gradient_of_a_softmax_adds_up_to_zero(backend, classes, term):
    """Over the classes. Without the focal term, which takes a sigmoid of each logit by itself."""
    rows = COUNTS | (POS if term == "ce" else 0)
    coef = make_coef(2, classes, spec_of(term).rows)
    if term == "focal_sigmoid":
        coef[..., [row_index(spec_of(term).rows, row) for row in (POS, NEG)]] = 0
        rows = spec_of(term).rows
    for dtype, voxels in itertools.product(DTYPES, (1024, 509)):
        logits, labels = make_logits((2, classes, voxels), dtype), make_labels((2, 1, voxels), classes)
        _, gradient = both(backend, logits, labels, term=term, coef=coef, rows=rows)
        # A slope is a sum of five numbers times probabilities that add up to 1, each off by some eps; then
        # each of the gradients is rounded to its dtype.
        eps, single = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        size = gradient.double().abs().sum(1)
        allowed = eps * size + (classes + 16) * single * 5 * coef.abs().amax((1, 2))[:, None]
        assert (gradient.double().sum(1).abs() <= allowed).all()
        assert (size > 100 * allowed).any()


@plans
def test_rows_that_are_off_change_no_bit_of_the_others(backend, classes, term):
    full = spec_of(term).rows
    logits, labels = make_logits((2, classes, 1030)), make_labels((2, 1, 1030), classes)
    coef = make_coef(2, classes, full)
    slots, _ = both(backend, logits, labels, term=term)
    subsets = [OVERLAP_ROWS, OVERLAP_ROWS | BAD, OVERLAP_ROWS | G, G | N, full & ~N, full & ~G, N | BAD]
    for rows in [*subsets, *([POS | N, POS | N | BAD, OVERLAP_ROWS | POS | BAD] if term else [])]:
        kept = [row_index(full, 1 << bit) for bit in range(10) if rows >> bit & 1]
        some = torch.zeros_like(coef)
        some[..., kept] = coef[..., kept]
        fewer, gradient = both(
            backend, logits, labels, term=term, rows=rows, coef=coef[..., kept].contiguous()
        )
        assert torch.equal(fewer, slots[..., kept]), row_names(rows)
        _, expected = both(backend, logits, labels, term=term, coef=some)
        assert torch.equal(gradient, expected), row_names(rows)
