"""Nothing of the volume's size but the gradient: counted by torch's allocator, and as physical memory.

MONAI's loss on the same meters shows that they see what a loss allocates.
"""

from __future__ import annotations

import pytest
import torch
from cases import laid_out, make_labels, make_values, swept

import dicekernels
from bench.measure import profiled_memory, subprocess_resident

monai_losses = pytest.importorskip("monai.losses")

HOT = {"to_onehot_y": True, "softmax": True}
LOSSES = {
    "dice_ce": lambda library: library.DiceCELoss(**HOT),
    "generalized": lambda library: library.GeneralizedDiceLoss(**HOT),
    "tversky": lambda library: library.TverskyLoss(alpha=0.3, beta=0.7, **HOT),
    "dice_focal": lambda library: library.DiceFocalLoss(**HOT),
    "generalized_focal": lambda library: library.GeneralizedDiceFocalLoss(**HOT),
    "focal": lambda library: library.FocalLoss(to_onehot_y=True, use_softmax=True),
    "mcc": lambda library: library.MCCLoss(**HOT),
}
SHAPES = [(2, 4, 96, 96, 96), (1, 117, 64, 64, 64)]


@pytest.fixture(autouse=True)
def binary():
    if "cpu" not in dicekernels.available_backends():
        pytest.skip(dicekernels.unavailable_backends()["cpu"])
    with dicekernels.use_backend("cpu"):
        yield


def measured(loss, logits, labels):
    """Memory of a step in units of the logits, after one step that fills caches."""
    logits = logits.detach().requires_grad_()

    def forward():
        return loss(logits, labels)

    def backward(value):
        return torch.autograd.grad(value, logits)

    backward(forward())
    memory = profiled_memory(forward, backward)
    size = logits.numel() * logits.element_size()
    return memory.forward_peak / size, memory.kept / size, memory.backward_peak / size


def problem(shape):
    return torch.randn(shape), make_labels((shape[0], 1, *shape[2:]), shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_forward_keeps_nothing_and_backward_makes_the_gradient(name, shape):
    forward, kept, backward = measured(LOSSES[name](dicekernels), *problem(shape))
    assert forward < 0.01
    assert kept < 0.01
    assert 1 <= backward < 1.01


@pytest.mark.parametrize(
    ("name", "least_kept", "least_peak"), [("dice_ce", 2.9, 4.9), ("dice_focal", 7.9, 10.9)]
)
def test_the_meter_sees_what_monai_allocates(name, least_kept, least_peak):
    forward, kept, backward = measured(LOSSES[name](monai_losses), *problem(SHAPES[0]))
    assert kept >= least_kept
    assert max(forward, kept + backward) >= least_peak


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_not_converted(dtype):
    logits, labels = problem((1, 4, 64, 64, 64))
    for target in (labels, labels.long(), labels[:, 0].short()):
        forward, kept, backward = measured(LOSSES["dice_ce"](dicekernels), logits.to(dtype), target)
        # Slots are double for every dtype: twice the share of float32 for the half precisions.
        assert max(forward, kept, backward - 1) < 0.01


@pytest.mark.parametrize("layout", ["channels_last_3d", "class_slice", "batch_strided"])
def test_layouts_are_not_copied(layout):
    logits, labels = problem((2, 4, 48, 48, 48))
    forward, kept, backward = measured(LOSSES["dice_ce"](dicekernels), laid_out(logits, layout), labels)
    assert max(forward, kept, backward - 1) < 0.01


def test_a_crop_is_copied_once_in_each_pass_and_not_kept():
    # The documented price of a layout without one voxel stride.
    logits, labels = problem((1, 4, 64, 64, 64))
    forward, kept, backward = measured(LOSSES["dice_ce"](dicekernels), laid_out(logits, "crop"), labels)
    assert 1 <= forward < 1.01
    assert kept < 0.01
    assert 2 <= backward < 2.01


@pytest.mark.parametrize("options", ["values", "mask", "ignore", "balanced", "region_sums"])
def test_options_keep_nothing_either(options):
    logits, labels = problem((1, 4, 64, 64, 64))
    values = make_values((1, 4, 64, 64, 64))
    mask = torch.rand(1, 1, 64, 64, 64)
    loss, target = {
        "values": (dicekernels.DiceCELoss(softmax=True, soft_label=True, label_smoothing=0.1), values),
        "mask": (lambda z, y: dicekernels.DiceLoss(**HOT)(z, y, mask=mask), labels),
        "ignore": (dicekernels.DiceCELoss(ignore_index=2, weight=[1.0, 2, 3, 4], **HOT), labels),
        "balanced": (dicekernels.DiceFocalLoss(alpha=[0.1, 0.2, 0.3, 0.4], use_softmax=True, **HOT), labels),
        "region_sums": (lambda z, y: dicekernels.region_sums(z, y, voxel_term="ce").POS.sum(), labels),
    }[options]
    forward, kept, backward = measured(loss, logits, target)
    assert max(forward, kept, backward - 1) < 0.01


def test_a_masked_label_map_is_made_once():
    logits, labels = problem((1, 4, 64, 64, 64))
    mask = torch.rand(1, 1, 64, 64, 64) > 0.5
    loss = dicekernels.MaskedDiceLoss(**HOT)
    forward, kept, backward = measured(lambda z, y: loss(z, y, mask), logits, labels)
    # A byte a voxel, beside four floats; in the forward pass the mask's opposite, too.
    assert forward < 2 / 16 + 0.01
    assert kept < 1 / 16 + 0.01
    assert backward < 1.01


SETUP = """
import torch, {library} as library
torch.set_num_threads(1)
loss = library.{loss}
logits = torch.randn({shape}).requires_grad_()
labels = torch.randint({classes}, {label_shape}, dtype=torch.uint8)
small, few = torch.randn({small}).requires_grad_(), torch.zeros({few}, dtype=torch.uint8)
torch.autograd.grad(loss(small, few), small)
"""
CALLS = {
    "dice_ce": "DiceCELoss(to_onehot_y=True, softmax=True)",
    "generalized": "GeneralizedDiceLoss(to_onehot_y=True, softmax=True)",
    "tversky": "TverskyLoss(to_onehot_y=True, softmax=True, alpha=0.3, beta=0.7)",
    "dice_focal": "DiceFocalLoss(to_onehot_y=True, softmax=True)",
}
# What the meter itself may be off (bench/measure.py): half a megabyte.
METER = 2**19


def resident(library, name, shape, code):
    names = {
        "library": library,
        "loss": CALLS[name],
        "shape": shape,
        "classes": shape[1],
        "label_shape": (shape[0], 1, *shape[2:]),
        "small": (1, shape[1], 32, 32, 32),
        "few": (1, 1, 32, 32, 32),
    }
    return subprocess_resident(code, SETUP.format(**names), threads=1)


@pytest.mark.parametrize("shape", swept(SHAPES, now=SHAPES[:1]), ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_resident_memory_of_forward_and_of_a_step(name, shape):
    size = 4 * torch.Size(shape).numel()
    forward = resident("dicekernels", name, shape, "value = loss(logits, labels)")
    assert forward.peak < 0.01 * size + METER
    assert forward.kept < 0.01 * size + METER
    step = resident(
        "dicekernels",
        name,
        shape,
        "value = loss(logits, labels)\n(grad,) = torch.autograd.grad(value, logits)",
    )
    assert size - METER < step.peak < 1.01 * size + METER


def test_the_resident_meter_sees_what_monai_allocates():
    shape = SHAPES[0]
    size = 4 * torch.Size(shape).numel()
    code = "value = loss(logits, labels)\n(grad,) = torch.autograd.grad(value, logits)"
    assert resident("monai.losses", "dice_ce", shape, code).peak >= 4.9 * size
    assert resident("monai.losses", "dice_ce", shape, "value = loss(logits, labels)").kept >= 2.9 * size
