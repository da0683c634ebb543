"""What only a GPU shows: no wait of the host, streams, memory, bits; and that its backends agree.

Every test runs on each backend of a GPU. ``bash bench/gpu.sh`` runs them.

No default device is set here: a tensor that the package makes without naming a device is an error. The
contract itself runs on a GPU by on_device.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from cases import gradient, laid_out, make_labels, make_logits
from cuda_cases import (
    DEVICE,
    HERE,
    MODULES,
    assert_same,
    bits,
    gpu_backend,  # noqa: F401  (a fixture)
    inputs_of,
    memory_alone,  # noqa: F401  (a fixture)
    no_wait,
    problem,
)
from test_ops import HOT, LOSSES, problem_of

import dicekernels
from dicekernels import DiceCELoss, LabelRangeError, functional, reference, region_sums
from dicekernels.dispatch import available_backends, forced_backend
from dicekernels.testing import assert_close_to_truth, assert_gradient_close, error_bound

pytestmark = HERE
F64 = torch.float64


#
# Values and gradients, with arguments where users leave them: weights and factors in memory of the CPU.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_against_its_oracle(name, dtype):
    loss, oracle, logits, target = problem_of(name, dtype, (2, 3, 13, 17))
    got = bits(loss, logits.to(DEVICE).requires_grad_(), target.to(DEVICE))
    assert {x.device.type for x in got} == {torch.device(DEVICE).type}
    single = target.float() if target.is_floating_point() else target
    wide = target.double() if target.is_floating_point() else target
    truth, honest = oracle(logits.double(), wide), oracle(logits.float(), single).to(got[0].dtype)
    assert_close_to_truth(got[0], truth, honest, got[0].dtype, name)
    truth = gradient(lambda z: oracle(z, wide).sum(), logits, F64)
    honest = gradient(lambda z: oracle(z, single).sum(), logits, torch.float32).to(dtype)
    assert_gradient_close(got[1], truth, honest, dtype, name)


@pytest.mark.parametrize("moved", [False, True], ids=["module on the CPU", "module moved"])
@pytest.mark.parametrize("name", MODULES)
def test_every_module_against_the_eager_backend_of_the_cpu(name, moved):
    logits, labels = problem()
    module = MODULES[name]()
    plain = logits.detach().cpu()
    with dicekernels.use_backend("eager"):
        wide, single = (
            bits(module, plain.to(k).requires_grad_(), labels.cpu()) for k in (F64, torch.float32)
        )
    got = bits(module.to(DEVICE) if moved else module, logits, labels)
    assert_close_to_truth(got[0], wide[0].double(), single[0], torch.float32, name)
    assert_gradient_close(got[1], wide[1], single[1], torch.float32, name)


TRAINED = {
    "dice_ce": (functional.dice_ce_loss, reference.dice_ce_loss),
    "generalized": (functional.generalized_dice_loss, reference.generalized_dice_loss),
    "tversky": (functional.tversky_loss, reference.tversky_loss),
    "dice_focal": (functional.dice_focal_loss, reference.dice_focal_loss),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 4, 14, 32, 117])
@pytest.mark.parametrize("name", TRAINED)
def test_both_backends_agree(name, classes, dtype, layout):
    # Two chunks a sample and a rest. Each keeps the bound around the truth, and so does their difference.
    loss, oracle = TRAINED[name]
    logits, labels = problem((2, classes, 16, 17, 32), dtype)
    logits = laid_out(logits.detach(), layout).requires_grad_()
    got = bits(lambda z, y: loss(z, y, **HOT), logits, labels)
    truth, single = (
        bits(lambda z, y: oracle(z, y, **HOT), logits.detach().to(kind).requires_grad_(), labels)
        for kind in (F64, torch.float32)
    )
    honest = tuple(x.to(ours.dtype) for x, ours in zip(single, got, strict=True))
    assert_close_to_truth(got[0], truth[0], honest[0], got[0].dtype, name)
    assert_gradient_close(got[1], truth[1], honest[1], dtype, name)
    if forced_backend() != "cuda" or "triton" not in available_backends():
        return
    with dicekernels.use_backend("triton"):
        other = bits(lambda z, y: loss(z, y, **HOT), logits, labels)
    for ours, theirs, exact, plain in zip(got, other, truth, honest, strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= error_bound(exact, plain, ours.dtype)
        assert ours.stride() == theirs.stride()


def test_weights_and_factors_on_either_side():
    logits, labels = problem()
    weights, results = [0.1, 0.2, 0.3, 0.4, 0.5], []
    for place in ("cpu", DEVICE, None):
        weight = weights if place is None else torch.tensor(weights, device=place)
        factors = (0.3, 2.7) if place is None else torch.tensor([0.3, 2.7], dtype=F64, device=place).unbind()
        options = {"weight": weight, "lambda_dice": factors[0], "lambda_ce": factors[1], **HOT}
        results.append(bits(lambda z, y, o=options: functional.dice_ce_loss(z, y, **o), logits, labels))
    for result in results[1:]:
        assert_same(result, results[0])


def test_autocast():
    images = make_logits((2, 3, 12, 13), seed=4).to(DEVICE)
    network = torch.nn.Conv2d(3, 3, 3, padding=1).to(DEVICE)
    labels = make_labels((2, 1, 12, 13), 3)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        logits = network(images)
        value = functional.dice_ce_loss(logits, labels.to(DEVICE), **HOT)
    assert (logits.dtype, value.dtype) == (torch.bfloat16, torch.float32)
    plain = logits.detach().cpu()
    truth, honest = (reference.dice_ce_loss(plain.to(k), labels, **HOT) for k in (F64, torch.float32))
    assert_close_to_truth(value, truth, honest, torch.float32, "dice_ce")


#
# Labels out of range


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bad_label_gives_nan_and_a_gradient_of_zeros(compiled, monkeypatch):
    monkeypatch.delenv("DICEKERNELS_CHECK", raising=False)
    logits, labels = problem()
    labels[1, 0, 3, 4, 5] = 200
    loss = DiceCELoss(**HOT)
    value, grad = bits(torch.compile(loss, fullgraph=True) if compiled else loss, logits, labels)
    assert value.isnan()
    assert torch.equal(grad, torch.zeros_like(grad))


def test_a_later_call_raises_for_a_bad_label(monkeypatch):
    monkeypatch.delenv("DICEKERNELS_CHECK", raising=False)
    logits, labels = problem()
    fine = labels.clone()
    labels[1, 0, 3, 4, 5] = 200
    with no_wait():
        DiceCELoss(**HOT)(logits, labels)
    torch.cuda.synchronize()
    with pytest.raises(LabelRangeError, match=r"1 voxels of an EARLIER pass .* outside \[0, 5\)"):
        DiceCELoss(**HOT)(logits, fine)
    assert DiceCELoss(**HOT)(logits, fine).isfinite()


def test_a_bad_label_is_an_error_on_request(monkeypatch):
    monkeypatch.setenv("DICEKERNELS_CHECK", "1")
    logits, labels = problem()
    labels[1, 0, 3, 4, 5] = 200
    with pytest.raises(LabelRangeError, match=r"1 of 41354 voxels .* outside \[0, 5\), the first is 200"):
        DiceCELoss(**HOT)(logits, labels)


#
# The host waits for nothing.


@pytest.mark.parametrize("name", LOSSES)
def test_no_function_waits(name):
    loss, _, logits, target = problem_of(name, torch.float32, (2, 3, 13, 17))
    logits, target = logits.to(DEVICE).requires_grad_(), target.to(DEVICE)
    expected = bits(loss, logits, target)  # compiles, and checks weights once
    with no_wait():
        got = bits(loss, logits, target)
    assert_same(got, expected)


@pytest.mark.parametrize("moved", [False, True], ids=["module on the CPU", "module moved"])
@pytest.mark.parametrize("name", MODULES)
def test_no_module_waits(name, moved):
    logits, labels = problem()
    module = MODULES[name]().to(DEVICE) if moved else MODULES[name]()
    expected = bits(module, logits, labels)
    with no_wait():
        got = bits(module, logits, labels)
    assert_same(got, expected)


def test_the_meter_of_waits_sees_one():
    logits, labels = problem()
    with no_wait(), pytest.raises(RuntimeError, match="synchronizing"):
        DiceCELoss(**HOT)(logits, labels).item()


# Those of the CUDA backend are templates, with a fast form and a general one.
KERNELS = {
    "cuda": [r"\b(fast|general)_sums\b", r"\bfinish_kernel\b", r"\b(fast|general)_backward\b"],
    "triton": ["^sums_kernel$", "^finish_kernel$", "^sums_backward_kernel$"],
}


@pytest.mark.parametrize("kind", ["labels", "values and mask"])
def test_two_kernels_forward_and_one_backward(kind):
    loss, logits, target = inputs_of(kind)
    grad_loss = torch.ones((), device=DEVICE)
    torch.autograd.grad(loss(logits, target), logits, grad_loss)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(loss(logits, target), logits, grad_loss)
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not on_device:
        pytest.skip("the profiler sees nothing of this GPU; test_cuda_graphs.py counts the nodes of a graph")
    launched = [e.name for e in sorted(on_device, key=lambda e: e.time_range.start)]
    expected = [*KERNELS[forced_backend()]]
    if kind == "labels":  # the count of labels out of range, on its way to a later call
        expected[1:1] = [r"\breduce_kernel\b", "Memcpy DtoH"]
    assert len(launched) == len(expected), launched
    assert all(re.search(*pair) for pair in zip(expected, launched, strict=True)), launched


#
# Bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "class_slice", "crop"])
def test_the_same_bits_on_every_run(layout, dtype):
    logits, labels = problem((2, 14, 40, 41, 43), dtype)
    logits = laid_out(logits.detach(), layout).requires_grad_()
    for name in ("dice_ce", "generalized"):
        expected = bits(MODULES[name](), logits, labels)
        for run in range(20):
            assert_same(bits(MODULES[name](), logits, labels), expected, f"{name}, run {run}")


@pytest.mark.parametrize("kind", ["labels", "values and mask"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "class_slice", "permuted", "crop"])
def test_nothing_of_uninitialised_memory_is_read(layout, kind):
    loss, logits, target = inputs_of(kind)
    logits = laid_out(logits.detach(), layout).requires_grad_()
    expected = bits(loss, logits, target)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        got = bits(loss, logits, target)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    assert_same(got, expected)
    assert got[1].isfinite().all()


def test_two_streams_at_a_time():
    # The programs of a launch count themselves: launches that overlap must not share the counter.
    work = []
    for seed, shape in enumerate([(2, 5, 40, 41, 42), (3, 4, 33, 34, 35), (1, 14, 40, 30, 20)]):
        logits, labels = problem(shape, seed=seed)
        work.append((logits, labels, bits(DiceCELoss(**HOT), logits, labels), torch.cuda.Stream()))
    torch.cuda.synchronize()
    found = []
    for _ in range(100):
        for at, (logits, labels, _, stream) in enumerate(work):
            with torch.cuda.stream(stream):
                found.append((at, bits(DiceCELoss(**HOT), logits, labels)))
        if len(found) >= 60:
            torch.cuda.synchronize()
            for at, got in found:
                assert_same(got, work[at][2], f"stream {at}")
            found.clear()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_a_device_that_is_not_the_current_one():
    logits, labels = problem()
    expected = bits(DiceCELoss(**HOT), logits, labels)
    other = logits.detach().to("cuda:1").requires_grad_()
    got = bits(DiceCELoss(**HOT, lambda_ce=1.0), other, labels.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {x.device.index for x in got} == {1}
    assert_same((x.to(DEVICE) for x in got), expected)


#
# Memory


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 4, 96, 96, 96), torch.float32), ((1, 117, 64, 64, 64), torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["dice_ce", "generalized", "tversky", "dice_focal"])
def test_nothing_of_the_volumes_size_but_the_gradient(name, shape, dtype):
    logits, labels = problem(shape, dtype)
    module = MODULES[name]()
    bits(module, logits, labels)
    size = logits.numel() * logits.element_size()

    def beyond(before: int) -> float:
        return (torch.cuda.max_memory_allocated() - before) / size

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    value = module(logits, labels)
    assert beyond(start) < 0.01
    assert (torch.cuda.memory_allocated() - start) / size < 0.01
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    grad = torch.autograd.grad(value, logits)[0]
    assert 1 <= beyond(start) < 1.01
    assert grad.shape == logits.shape


#
# Offsets. Slabs of whole chunks (4096 voxels) are problems of their own: sums add up, gradients have the
# same bits.


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last_3d], ids=["classes", "voxels"]
)
def test_more_than_two_to_the_31_elements(layout):
    shape, slab = (1, 117, 300, 512, 512), 50
    size = 2 * torch.Size(shape).numel()
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * size:
        pytest.skip(f"{3 * size >> 30} GB of memory needed, {free >> 30} GB are free")
    torch.manual_seed(0)
    logits = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=layout)
    logits = logits.normal_().requires_grad_()
    labels = torch.randint(117, (1, 1, *shape[2:]), device=DEVICE, dtype=torch.uint8)

    def score(z, y):
        rows = region_sums(z, y, voxel_term="ce")
        factors = torch.arange(1, 118, dtype=F64, device=DEVICE)
        return rows, (factors * (rows.I + 2 * rows.FP + 3 * rows.FN + 4 * rows.POS)).sum()

    rows, value = score(logits, labels)
    (whole,) = torch.autograd.grad(value, logits)
    totals = {name: torch.zeros_like(row) for name, row in rows._asdict().items() if row is not None}
    for at in range(0, shape[2], slab):
        z = logits.detach()[:, :, at : at + slab].contiguous(memory_format=layout).requires_grad_()
        part, value = score(z, labels[:, :, at : at + slab].contiguous())
        for name in totals:
            totals[name] += getattr(part, name).detach()
        (piece,) = torch.autograd.grad(value, z)
        assert torch.equal(whole[:, :, at : at + slab], piece), f"slices {at} to {at + slab}"
    for name, total in totals.items():
        got = getattr(rows, name).detach()
        assert_close_to_truth(got, total, total, F64, name)
    assert torch.equal(totals["N"], torch.full((1, 117), float(labels.numel()), dtype=F64, device=DEVICE))


@pytest.mark.usefixtures("memory_alone")
def test_classes_and_samples_far_apart():
    # 2^30 elements between classes, 2^32 between samples: offsets of both beyond int32.
    stride = 2**30
    if torch.cuda.mem_get_info()[0] < 4 * (8 * stride):
        pytest.skip("32 GB of memory needed")
    near, labels = problem((2, 4, 100), torch.bfloat16)
    store = torch.empty(8 * stride, dtype=torch.bfloat16, device=DEVICE)
    far = store.as_strided((2, 4, 100), (4 * stride, stride, 1)).copy_(near.detach()).requires_grad_()
    got, expected = (bits(DiceCELoss(**HOT), z, labels) for z in (far, near))
    assert_same(got, expected)
