"""DeepSupervisionLoss: dtypes, memory and voxel weights."""

from __future__ import annotations

from typing import Any

import monai.losses
import pytest
import torch
from pyramids import (
    F16,
    F32,
    F64,
    HOT,
    INNER,
    SPACES,
    assert_all_close,
    labels,
    outputs,
    run,
    voxel_weights,
    written_out,
)
from torch import Tensor, nn

import dicekernels
from bench.measure import profiled_memory
from dicekernels.testing import assert_close_to_truth, assert_gradient_close


@pytest.mark.parametrize("dtype", [F16, torch.bfloat16, F64])
@pytest.mark.parametrize("name", INNER)
def test_other_dtypes_give_monais_float32(name: str, dtype: torch.dtype) -> None:
    levels, target = outputs(SPACES[3], dtype), labels(SPACES[3][0])
    definition = written_out(INNER[name](monai.losses), [1, 0.5, 0.25])
    truth = run(definition, [level.double() for level in levels], target)
    honest = run(monai.losses.DeepSupervisionLoss(INNER[name](monai.losses)), levels, target)
    got = run(dicekernels.DeepSupervisionLoss(INNER[name](dicekernels)), levels, target)
    # float64 outputs are rounded to float32 on the way, so their gradient has float32's digits.
    assert got[1].dtype == dtype
    assert_close_to_truth(got[0], truth[0], honest[0], F32, "loss")
    for ours, true, plain in zip(got[1:], truth[1:], honest[1:], strict=True):
        assert_gradient_close(ours, true, plain, F32 if dtype == F64 else dtype, "gradient")


def dtype_of_the_level(inner: nn.Module, target: Tensor, dtype: torch.dtype = F16) -> torch.dtype:
    seen: list[Tensor] = []
    loss = dicekernels.DeepSupervisionLoss(inner)

    def spy(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module is inner:
            seen.append(args[0])

    # Of all modules: a hook or a forward of its own would change what the loss is given.
    hook = nn.modules.module.register_module_forward_pre_hook(spy)
    try:
        value = loss([torch.randn(2, 3, 4, 4).to(dtype)], target)
    finally:
        hook.remove()
    assert value.dtype == F32
    return seen[0].dtype


def test_half_precision_reaches_our_losses_and_no_others() -> None:
    target, onehot = labels((4, 4)), torch.zeros(2, 3, 4, 4)
    for name in INNER:
        assert dtype_of_the_level(INNER[name](dicekernels), target) == F16
        assert dtype_of_the_level(INNER[name](monai.losses), target) == F32
    dense = dicekernels.DiceLoss(softmax=True)
    assert dtype_of_the_level(dense, onehot) == F16
    # the loss of these would be rounded to half precision
    for dtype in (F16, torch.uint8, torch.bool):
        assert dtype_of_the_level(dense, onehot.to(dtype)) == F32
    # a function of the user's would compute in half precision
    assert dtype_of_the_level(dicekernels.DiceLoss(to_onehot_y=True, other_act=torch.tanh), target) == F32
    apart = dicekernels.DiceCELoss(**HOT)
    apart.cross_entropy = nn.CrossEntropyLoss(ignore_index=1)
    assert dtype_of_the_level(apart, target) == F32
    assert dtype_of_the_level(dicekernels.DiceLoss(**HOT), target, F64) == F32
    for part in ("", "dice", "focal"):
        hooked = dicekernels.DiceFocalLoss(**HOT)
        hooked.get_submodule(part).register_forward_pre_hook(lambda *_: None)
        assert dtype_of_the_level(hooked, target) == F32
    replaced = dicekernels.DiceFocalLoss(**HOT)
    replaced.focal = monai.losses.FocalLoss()
    assert dtype_of_the_level(replaced, target) == F32


def test_a_float64_target_gives_float32_too() -> None:
    levels, target = outputs(SPACES[2]), outputs(SPACES[2], F64)[0].softmax(1)
    for library in (dicekernels, monai.losses):
        loss = library.DeepSupervisionLoss(library.DiceLoss(softmax=True))
        assert loss.loss(levels[0], target).dtype == F64
        assert loss(levels, target).dtype == F32


def test_half_precision_outputs_are_not_copied() -> None:
    if "cpu" not in dicekernels.available_backends():
        pytest.skip(dicekernels.unavailable_backends()["cpu"])
    shapes = [(64, 64, 64), (32, 32, 32), (16, 16, 16)]
    levels = [torch.randn(1, 4, *shape).half().requires_grad_() for shape in shapes]
    target = labels(shapes[0], classes=4)[:1]
    size = sum(level.numel() * 2 for level in levels)
    coarse = sum(level[0, 0].numel() for level in levels[1:])  # the resized labels, a byte each

    def measured(library: Any) -> tuple[float, float, float]:
        loss = library.DeepSupervisionLoss(library.DiceCELoss(**HOT))
        with dicekernels.use_backend("cpu"):
            torch.autograd.grad(loss(levels, target), levels)
            memory = profiled_memory(lambda: loss(levels, target), lambda v: torch.autograd.grad(v, levels))
        return memory.forward_peak / size, memory.kept / size, memory.backward_peak / size

    forward, kept, backward = measured(dicekernels)
    assert forward < 0.015 + coarse / size
    assert kept < 0.01 + coarse / size
    assert 0.98 < backward < 1.015  # the resized labels are given back meanwhile
    assert measured(monai.losses)[1] > 2


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", INNER)
def test_the_mask_is_resized_and_handed_on(name: str, samples: int) -> None:
    levels, target = outputs(SPACES[3]), labels(SPACES[3][0], torch.int64)
    mask = voxel_weights(samples, SPACES[3][0])
    inner = INNER[name](dicekernels)
    truth = run(
        written_out(inner, [1, 0.5, 0.25]), [level.double() for level in levels], target, mask=mask.double()
    )
    single = written_out(lambda z, y, mask: inner(z.float(), y, mask=mask.float()), [1, 0.5, 0.25])
    honest = run(single, levels, target, mask=mask)
    got = run(dicekernels.DeepSupervisionLoss(inner), levels, target, mask=mask)
    assert_all_close(got, truth, honest)


def test_masked_voxels_may_hold_anything() -> None:
    levels, target = outputs(SPACES[3]), labels(SPACES[3][0])
    mask = torch.ones(1, 1, *SPACES[3][0])
    mask[..., :4] = 0
    loss = dicekernels.DeepSupervisionLoss(dicekernels.DiceCELoss(**HOT))
    clean = run(loss, levels, target, mask=mask)
    for level in levels:
        level[..., : level.shape[-1] // 3] = torch.nan
    target[..., :4] = 77
    for got, expected in zip(run(loss, levels, target, mask=mask), clean, strict=True):
        assert torch.equal(got, expected)


def test_one_output_and_a_mask() -> None:
    (level, *_), target = outputs(SPACES[2]), labels(SPACES[2][0])
    mask = voxel_weights(2, SPACES[2][0])
    inner = dicekernels.DiceLoss(**HOT, reduction="none")
    got = dicekernels.DeepSupervisionLoss(inner)(level, target, mask=mask)
    assert torch.equal(got, inner(level, target, mask=mask))


def test_a_loss_without_a_mask_says_so() -> None:
    loss = dicekernels.DeepSupervisionLoss(monai.losses.DiceLoss(**HOT))
    with pytest.raises(TypeError, match="mask"):
        loss(outputs(SPACES[2]), labels(SPACES[2][0]), mask=torch.ones(1, 1, *SPACES[2][0]))
