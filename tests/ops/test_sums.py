"""``region_sums``: numbers worked by hand, then rows and gradients of each backend against the oracle."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import (
    ACTIVATIONS,
    LABEL_DTYPES,
    LAYOUTS_3D,
    LOGIT_DTYPES,
    OVERLAPS,
    VALUE_DTYPES,
    VOXEL_TERMS,
    compute_dtype,
    gradient,
    laid_out,
    make_labels,
    make_logits,
    make_mask,
    make_values,
    oracle_rows,
)

from dicekernels import LabelRangeError, region_sums
from dicekernels.backends.triton.support import interpreted
from dicekernels.dispatch import BACKENDS
from dicekernels.spec import OVERLAP_ROWS, Activation, G, N, SumsSpec, chunk_count
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

pytestmark = pytest.mark.usefixtures("backend")
F64 = torch.float64


def named(sums):
    return {name: rows for name, rows in sums._asdict().items() if rows is not None}


def same(got, expected):
    """Equal to the number worked by hand, up to 8 eps of float32."""
    expected = torch.as_tensor(expected, dtype=F64)
    assert_close_to_truth(got, expected, expected, torch.float32, "by hand")


def check(logits, target, name="", seed=11, **options):
    """Rows and the gradient of a random combination of them, against the oracle on the same values."""
    ours = named(region_sums(logits, target, **options))
    truth = oracle_rows(logits, target, **options)
    single = compute_dtype(logits.dtype)
    honest = oracle_rows(logits, target, single, **options)
    assert sorted(ours) == sorted(truth)
    for row in truth:
        label = f"{row} {name}"
        assert ours[row].dtype == F64
        assert_close_to_truth(ours[row], truth[row], honest[row].to(F64), single, label)
    factors = torch.randn(len(truth), *logits.shape[:2], generator=torch.Generator().manual_seed(seed))
    factors = dict(zip(sorted(truth), factors.to(F64), strict=True))

    def mixed(rows):
        # G and N are constants of the logits, but stand in the sum as any row.
        return sum((factors[row] * rows[row]).sum() for row in factors)

    got = gradient(lambda z: mixed(named(region_sums(z, target, **options))), logits)
    expected = gradient(lambda z: mixed(oracle_rows(z, target, **options)), logits, F64)
    plain = gradient(lambda z: mixed(oracle_rows(z, target, single, **options)), logits, single)
    assert got.dtype == logits.dtype
    assert got.stride() == torch.empty_like(logits).stride()
    assert_gradient_close(got, expected, plain.to(logits.dtype), logits.dtype, f"gradient {name}")


# One sample, two classes, four voxels, given as probabilities:
#   p0 = 3/4 1/2 1/4 0     p1 = 1/4 1/2 3/4 1     labels 0 0 1 1

P = torch.tensor([[[0.75, 0.5, 0.25, 0.0], [0.25, 0.5, 0.75, 1.0]]])
LABELS = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("overlap", "hits", "fp", "fn"),
    [
        ("product", [1.25, 1.75], [0.25, 0.75], [0.75, 0.25]),
        ("min", [1.25, 1.75], [0.25, 0.75], [0.75, 0.25]),
        # fp = p(p - g): 3/4 (-1/4) + 1/2 (-1/2) + 1/16 = -3/8;  fn = g(g - p): 1/4 + 1/2
        ("squared", [1.25, 1.75], [-0.375, 0.125], [0.75, 0.25]),
        # p^2 g: 9/16 + 1/4;  p^2 (1 - g): 1/16;  (1 - p)^2 g: 1/16 + 1/4
        ("voxel_squared", [0.8125, 1.5625], [0.0625, 0.3125], [0.3125, 0.0625]),
    ],
)
def test_overlap_rows_by_hand(overlap, hits, fp, fn):
    sums = region_sums(P, LABELS, activation=None, overlap=overlap)
    for row, expected in (("I", hits), ("FP", fp), ("FN", fn), ("G", [2, 2]), ("N", [4, 4])):
        same(getattr(sums, row), [expected])


def test_masks_by_hand():
    # Weights 1 2 0 1/2. weight: I0 = 3/4 + 2/2 = 7/4, FP0 = 0, FN0 = 1/4 + 2/2; I1 = 1/2, FP1 = 1/4 + 2/2
    mask = torch.tensor([[[1.0, 2.0, 0.0, 0.5]]])
    sums = region_sums(P, LABELS, activation=None, mask=mask)
    same(sums.I, [[1.75, 0.5]])
    same(sums.FP, [[0.0, 1.25]])
    same(sums.FN, [[1.25, 0.0]])
    same(sums.G, [[3.0, 0.5]])
    same(sums.N, [[3.5, 3.5]])
    # product: p m and g m first. I0 = 3/4 + 1 * 2 = 11/4; FP0 = pm (1 - gm) = 3/4 * 0 + 1 * (1 - 2) = -1;
    # FN0 = (1 - 3/4) 1 + (1 - 1) 2 = 1/4; I1 = 1/2 * 1/2; FP1 = 1/4 + 1 + 1/2 * 1/2; FN1 = (1 - 1/2) 1/2
    sums = region_sums(P, LABELS, activation=None, mask=mask, mask_mode="product")
    same(sums.I, [[2.75, 0.25]])
    same(sums.FP, [[-1.0, 1.5]])
    same(sums.FN, [[0.25, 0.25]])
    same(sums.G, [[3.0, 0.5]])
    same(sums.N, [[3.5, 3.5]])


def test_voxel_terms_by_hand():
    # Logits 0 and log 3: p = 1/4, 3/4. CE of label 1: log 4/3; -log p of both: log 4 and log 4/3.
    z = torch.tensor([[[0.0], [math.log(3)]]])
    label = torch.tensor([[[1]]])
    sums = region_sums(z, label, voxel_term="ce")
    same(sums.POS, [[0, math.log(4 / 3)]])
    same(sums.LS, [[math.log(4), math.log(4 / 3)]])
    # sigmoid(0) = 1/2, sigmoid(log 3) = 3/4
    sums = region_sums(z, label, voxel_term="bce")
    same(sums.POS, [[0, math.log(4 / 3)]])
    same(sums.NEG, [[math.log(2), 0]])
    # gamma = 2: (1 - 3/4)^2 log 4/3 and (1 - 1/2)^2 log 2
    sums = region_sums(z, label, voxel_term="focal_sigmoid")
    same(sums.POS, [[0, math.log(4 / 3) / 16]])
    same(sums.NEG, [[math.log(2) / 4, 0]])
    same(region_sums(z, label, voxel_term="focal_softmax").POS, [[0, math.log(4 / 3) / 16]])
    # From class 1 on there is one class: p = 1, loss 0.
    same(region_sums(z, label, voxel_term="focal_softmax", first_class=1).POS, [[0, 0]])


def test_gradient_by_hand():
    # I1 = p1 of one voxel: dI1/dz = p1 (1 - p1) (-1, 1) = 3/16 (-1, 1)
    z = torch.tensor([[[0.0], [math.log(3)]]])
    same(gradient(lambda z: region_sums(z, torch.tensor([[[1]]])).I.sum(), z), [[[-3 / 16], [3 / 16]]])


# All of activation x overlap x voxel term, as their code paths multiply. Target kind, mask, ignore and dtype
# enter before those, elementwise: they turn with periods prime to each other, so that each meets each.
TARGETS = ["labels", "labels without channel", "values"]
MASKS = [None, "binary", "fraction", "fraction product"]
GRID = list(itertools.product(ACTIVATIONS, OVERLAPS, VOXEL_TERMS))
SPACE = (3, 19, 23)  # 1311 voxels: full tiles and a rest


def options_of(mask_kind, shape, ignore_index=None):
    options = {}
    if mask_kind is not None:
        kind, _, mode = mask_kind.partition(" ")
        options = {"mask": make_mask(kind, shape), "mask_mode": mode or "weight"}
    return options | ({} if ignore_index is None else {"ignore_index": ignore_index})


def target_of(kind, shape, seed=1):
    if kind == "values":
        return make_values(shape, seed=seed)
    return make_labels((shape[0], *([] if "without" in kind else [1]), *shape[2:]), shape[1], seed=seed)


# Triton's interpreter is slow: one kind of target for each in `make test`, the others in `make test-all`.
TURNS = [
    pytest.param(index, turn, marks=[pytest.mark.slow] * (interpreted() and (index + turn) % 3 != 0))
    for index, turn in itertools.product(range(len(GRID)), range(3))
]


@pytest.mark.parametrize(
    ("index", "turn"), TURNS, ids=["-".join(map(str, (*kind, turn))) for kind in GRID for turn in range(3)]
)
def test_rows_and_gradients_of_every_kind(index, turn):
    activation, overlap, term = GRID[index]
    shape = (2, (4, 5, 3)[turn], *SPACE)  # a power of two, as a tile of Triton has, and others
    at = index + turn
    kind = TARGETS[turn]
    dtype = LOGIT_DTYPES[at % 4]
    ignore = None if kind == "values" else (None, 2, 255)[at // 2 % 3]
    options = options_of(MASKS[(at // 3 + turn) % 4], shape, ignore)
    target = target_of(kind, shape, seed=at)
    if ignore == 255:
        target[target == 1] = 255
    options |= {"activation": activation, "overlap": overlap, "voxel_term": term}
    if term and term.startswith("focal"):
        options |= {"gamma": (0.0, 1.0, 2.0, 2.5)[at % 4]}
    options |= {"first_class": at % 2} if term == "focal_softmax" else {}
    check(make_logits(shape, dtype, seed=at), target, f"{kind} {options}", **options)


IGNORED = [*itertools.product(TARGETS[:2], [None, 0, 3, -100]), ("values", None)]


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize(("kind", "ignore"), IGNORED)
def test_masks_and_ignored_labels(kind, mask_kind, ignore):
    shape = (2, 4, 5, 7, 31)
    target = target_of(kind, shape)
    if ignore == -100:
        target = target.to(torch.int16)
        target[target == 1] = -100
    options = options_of(mask_kind, shape, ignore)
    check(make_logits(shape), target, kind, voxel_term="ce", **options)


@pytest.mark.parametrize("dtype", [*LABEL_DTYPES, torch.bool, torch.float16, torch.float64])
def test_label_dtypes(dtype):
    classes = 2 if dtype == torch.bool else 5
    shape = (2, classes, 11, 13)
    check(make_logits(shape), make_labels((2, 1, 11, 13), classes, dtype), str(dtype), voxel_term="ce")


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_value_dtypes(dtype):
    shape = (2, 3, 11, 13)
    for logit_dtype in (torch.float32, torch.float64):
        check(make_logits(shape, logit_dtype), make_values(shape, dtype), str(dtype), voxel_term="ce")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_mask_dtypes(dtype):
    shape = (2, 3, 9, 15)
    mask = make_mask("fraction" if dtype.is_floating_point else "binary", shape, dtype)
    check(make_logits(shape), make_labels((2, 1, 9, 15), 3), str(dtype), voxel_term="ce", mask=mask)


def test_one_mask_for_the_whole_batch():
    shape = (3, 4, 9, 15)
    mask = make_mask("fraction", (1, *shape[1:]))
    check(make_logits(shape), make_labels((3, 1, 9, 15), 4), mask=mask)


def test_float_labels_are_compared_with_ignore_index_before_truncation():
    # docs/semantics.md, section 6: 0.7 is label 0, and not the ignored value 0.
    labels = torch.tensor([[[0.0, 0.7, 1.0, 1.9]]])
    sums = region_sums(torch.zeros(1, 2, 4), labels, ignore_index=0)
    same(sums.G, [[1, 2]])
    same(sums.N, [[3, 3]])


@pytest.mark.parametrize("layout", LAYOUTS_3D)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts_of_the_logits(layout, dtype):
    shape = (2, 5, 6, 11, 17)
    logits = laid_out(make_logits(shape, dtype), layout)
    check(logits, make_labels((2, 1, *shape[2:]), 5), layout, voxel_term="ce")
    check(logits, make_values(shape), layout, activation="sigmoid", voxel_term="bce")


@pytest.mark.parametrize("layout", LAYOUTS_3D)
def test_layouts_of_targets_and_masks(layout):
    shape = (2, 3, 6, 11, 17)
    logits = make_logits(shape)
    labels = laid_out(make_labels((2, 1, *shape[2:]), 3), layout)
    check(logits, labels, f"labels {layout}")
    check(logits, labels[:, 0], f"labels without channel {layout}")
    check(logits, laid_out(make_values(shape), layout), f"values {layout}", voxel_term="ce")
    mask = laid_out(make_mask("fraction", shape), layout)
    check(logits, make_labels((2, 1, *shape[2:]), 3), f"mask {layout}", mask=mask)


def test_channels_last_and_every_number_of_space_dimensions():
    for space in [(41,), (6, 7), (3, 5, 7), (3, 5, 2, 7)]:
        logits, labels = make_logits((2, 3, *space)), make_labels((2, 1, *space), 3)
        check(logits, labels, str(space), voxel_term="ce")
    shape = (2, 3, 16, 18)
    check(laid_out(make_logits(shape), "channels_last"), make_labels((2, 1, 16, 18), 3), "channels_last")


# Around the lanes of a vector (16), a tile (64 to 1024) and a chunk (4096); primes.
VOXELS = [1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097, 7919, 12289]


@pytest.mark.parametrize("voxels", VOXELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_voxel_counts(voxels, dtype):
    check(make_logits((2, 3, voxels), dtype), make_labels((2, 1, voxels), 3), str(voxels), voxel_term="ce")
    mask = make_mask("fraction", (2, 3, voxels))
    check(make_logits((2, 3, voxels), dtype), make_values((2, 3, voxels)), str(voxels), mask=mask)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 14, 17, 33, 117, 257, 512, 600])
def test_class_counts(classes, backend):
    shape = (2, classes, 131)
    target = make_labels((2, 1, 131), classes, torch.int16) if classes > 1 else make_values(shape)
    if backend in ("triton", "emulated") and classes > 512:  # more do not fit on a multiprocessor
        with pytest.raises(RuntimeError, match=f"'{backend}' was forced, but the logits have 600 classes"):
            region_sums(make_logits(shape), target)
        return
    # The gradient of a softmax over one class is rounding around 0, which has no scale to compare with.
    activation, term = ("softmax", "ce") if classes > 1 else (None, "focal_sigmoid")
    check(make_logits(shape), target, str(classes), activation=activation, voxel_term=term)
    check(make_logits(shape), make_values(shape), str(classes), activation="sigmoid", voxel_term="bce")


def test_empty_inputs():
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        sums = region_sums(make_logits(shape), make_labels((shape[0], 1, *shape[2:]), 3), voxel_term="ce")
        for row in named(sums).values():
            assert torch.equal(row, torch.zeros(shape[:2], dtype=F64))


@pytest.mark.parametrize("classes", [2, 17, 257])
def test_counts_are_exact_integers(classes, backend):
    shape, voxels = (2, classes, 13, 29, 37), 13 * 29 * 37
    labels = make_labels((2, 1, *shape[2:]), classes, torch.int16)
    ignored = labels == 1
    spec = SumsSpec(False, Activation.SOFTMAX, rows=OVERLAP_ROWS | G | N | 256, ignore_index=1)
    op = getattr(torch.ops, BACKENDS[backend].namespace).sums
    slots = op(make_logits(shape), labels, None, *spec.args())
    assert slots.shape == (2, chunk_count(voxels), classes, 6)
    totals = slots.sum(1)
    for sample in range(2):
        counts = torch.bincount(labels[sample].flatten().long(), minlength=classes).to(F64)
        counts[1] = 0
        assert torch.equal(totals[sample, :, 3], counts)
        kept = float((~ignored[sample]).sum())
        assert torch.equal(totals[sample, :, 4], torch.full((classes,), kept, dtype=F64))
    assert torch.equal(slots[..., 5], torch.zeros_like(slots[..., 5]))
    # Each slot counts its own chunk: 4096 voxels, the last one the rest.
    ends = [*range(0, voxels, 4096), voxels]
    per_chunk = [float((~ignored[0]).flatten()[a:b].sum()) for a, b in itertools.pairwise(ends)]
    assert slots[0, :, 0, 4].tolist() == per_chunk


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32]
)
def test_labels_out_of_range_are_counted_and_located(dtype):
    labels = make_labels((2, 1, 5, 1000), 4, dtype)
    wrong = 200 if dtype == torch.uint8 else -7
    labels[1, 0, 3, 17] = wrong
    labels[1, 0, 4, 999] = 4
    logits = make_logits((2, 4, 5, 1000))
    with pytest.raises(LabelRangeError) as error:
        region_sums(logits, labels)
    message = str(error.value)
    assert "target: 2 of 10000 voxels hold a label outside [0, 4)" in message
    assert f"the first is {wrong} (sample 1, voxel 3017)" in message
    assert f"ignore_index={wrong}" in message
    labels[labels == 4] = 0
    check(logits, labels, "ignored", ignore_index=wrong)


def test_a_label_out_of_range_under_a_zero_mask_is_no_error():
    labels = make_labels((1, 1, 90), 3, torch.int64)
    mask = torch.ones(1, 1, 90)
    labels[..., 40], mask[..., 40] = 99, 0.0
    check(make_logits((1, 3, 90)), labels, mask=mask, voxel_term="ce")


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nothing_leaks_from_ignored_voxels(poison):
    logits, labels, values = make_logits((2, 3, 200)), make_labels((2, 1, 200), 3), make_values((2, 3, 200))
    mask = make_mask("fraction", (2, 3, 200))
    out = mask == 0
    dirty = torch.where(out, poison, logits)
    options = {"mask": mask, "voxel_term": "ce"}
    dirty_labels = torch.where(out, 77, labels)
    dirty_values = torch.where(out, poison, values)
    for clean, soiled in ((labels, dirty_labels), (values, dirty_values)):
        one, two = region_sums(logits, clean, **options), region_sums(dirty, soiled, **options)
        assert all(torch.equal(one[i], two[i]) for i in range(len(one)) if one[i] is not None)
        grads = [
            gradient(lambda z, t=t: region_sums(z, t, **options).POS.sum(), x)
            for x, t in ((logits, clean), (dirty, soiled))
        ]
        assert torch.equal(*grads)
        assert torch.equal(grads[1][out.expand_as(grads[1])], torch.zeros(3 * int(out.sum())))


def test_refused_options():
    logits, labels = torch.zeros(1, 3, 4), torch.zeros(1, 1, 4, dtype=torch.uint8)
    for options, message in [
        ({"activation": "tanh"}, "activation: got 'tanh'"),
        ({"overlap": "max"}, "overlap: got 'max'"),
        ({"voxel_term": "mse"}, "voxel_term: got 'mse'"),
        ({"mask_mode": "sum"}, "mask_mode: got 'sum'"),
        ({"first_class": 3}, "first_class: got 3"),
        ({"mask": torch.ones(1, 3, 4)}, r"mask: got shape \(1, 3, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            region_sums(logits, labels, **options)
    with pytest.raises(ValueError, match="ignore_index: got it with a target of values"):
        region_sums(logits, torch.zeros(1, 3, 4), ignore_index=0)
    with pytest.raises(TypeError, match="logits: got torch.int64, expected a floating dtype"):
        region_sums(logits.long(), labels)
    with pytest.raises(ValueError, match=r"target: got shape \(1, 2, 4\)"):
        region_sums(logits, torch.zeros(1, 2, 4))


def test_one_class_takes_values_with_or_without_a_channel():
    # docs: for C = 1 the target is always values; 1/2 is a half, not label 0.
    logits, values = make_logits((2, 1, 40)), make_values((2, 1, 40))
    one = region_sums(logits, values, activation="sigmoid")
    two = region_sums(logits, values[:, 0], activation="sigmoid")
    assert torch.equal(one.G, two.G)
    assert torch.equal(one.I, two.I)
