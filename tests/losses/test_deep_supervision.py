"""DeepSupervisionLoss against MONAI's, around MONAI's losses, ours and functions."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import monai.losses
import monai.losses.ds_loss
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from pyramids import F16, F32, F64, HOT, INNER, SPACES, assert_all_close, labels, outputs, run, written_out
from torch import Tensor, nn

import dicekernels
from dicekernels.dropin import monai as dropin
from dicekernels.testing import assert_gradient_close

WEIGHTS: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [1, 0.5, 0.25, 0.125]),
    ({"weight_mode": "two"}, [1, 0.5, 0.5, 0.5]),
    ({"weight_mode": "same"}, [1, 1, 1, 1]),
    ({"weights": [0.3, 0.0, 2.0, 5.0, 7.0]}, [0.3, 0.0, 2.0, 5.0]),
    ({"weights": [9.0]}, [1, 0.5, 0.25, 0.125]),
]


@pytest.mark.parametrize("rank", SPACES)
@pytest.mark.parametrize("name", INNER)
def test_values_and_gradients_are_monais(name: str, rank: int) -> None:
    levels, target = outputs(SPACES[rank]), labels(SPACES[rank][0])
    weights = [1, 0.5, 0.25, 0.125][: len(levels)]
    truth = run(written_out(INNER[name](monai.losses), weights), [level.double() for level in levels], target)
    theirs = INNER[name](monai.losses)
    honest = run(monai.losses.DeepSupervisionLoss(theirs), levels, target)
    for inner in (theirs, INNER[name](dicekernels)):
        got = run(dicekernels.DeepSupervisionLoss(inner), levels, target)
        assert_all_close(got, truth, honest)


@pytest.mark.parametrize(("options", "weights"), WEIGHTS)
def test_the_weights_of_the_levels(options: dict[str, Any], weights: list[float]) -> None:
    levels, target = outputs(SPACES[2]), labels(SPACES[2][0])
    theirs = monai.losses.DiceLoss(**HOT)
    truth = run(written_out(theirs, weights), [level.double() for level in levels], target)
    honest = run(monai.losses.DeepSupervisionLoss(theirs, **options), levels, target)
    ours = dicekernels.DeepSupervisionLoss(dicekernels.DiceLoss(**HOT), **options)
    assert_all_close(run(ours, levels, target), truth, honest)


@pytest.mark.parametrize("mode", ["exp", "same", "two", "unknown", None])
@pytest.mark.parametrize("weights", [None, [], [3.0], (2.0, 1.0), torch.tensor([4.0, 3.0, 2.0])])
def test_get_weights_is_monais(mode: str, weights: Any) -> None:
    ours = dicekernels.DeepSupervisionLoss(nn.MSELoss(), mode, weights)
    theirs = monai.losses.DeepSupervisionLoss(nn.MSELoss(), mode, weights)
    for levels in range(-1, 9):
        assert list(ours.get_weights(levels)) == list(theirs.get_weights(levels))
    assert list(ours.get_weights()) == list(theirs.get_weights())


def test_weights_and_modes_may_change_later() -> None:
    loss = dicekernels.DeepSupervisionLoss(lambda z, y: z.mean())
    ones = [torch.ones(1, 1, 2)] * 3
    loss.weight_mode = "same"
    assert loss(ones, ones[0]).item() == 3
    loss.weights = [4.0, 2.0, 1.0]
    assert loss(ones, ones[0]).item() == 7


def test_torchs_cross_entropy_takes_labels_without_a_channel() -> None:
    levels, target = outputs(SPACES[3]), labels(SPACES[3][0], torch.int64)
    got = run(dicekernels.DeepSupervisionLoss(nn.CrossEntropyLoss()), levels, target[:, 0])

    def ce(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y[:, 0].long())

    truth = run(written_out(ce, [1, 0.5, 0.25]), [level.double() for level in levels], target)
    honest = run(monai.losses.DeepSupervisionLoss(ce), levels, target.float())
    assert_all_close(got, truth, honest)


def test_dense_targets_and_their_gradient() -> None:
    levels, target = outputs(SPACES[2]), torch.softmax(outputs(SPACES[2])[0].flip(1), 1)
    inner = monai.losses.DiceLoss(softmax=True)

    def in_double(levels: list[Tensor], target: Tensor) -> Tensor:
        sizes = [level.shape[2:] for level in levels]
        targets = [F.interpolate(target, size, mode="nearest-exact") for size in sizes]
        weights = [1, 0.5, 0.25, 0.125]
        return sum(w * inner(z.double(), y) for w, z, y in zip(weights, levels, targets, strict=True))

    losses = [
        dicekernels.DeepSupervisionLoss(dicekernels.DiceLoss(softmax=True)),
        monai.losses.DeepSupervisionLoss(inner),
        in_double,
    ]
    results = []
    for loss, dtype in zip(losses, (F32, F32, F64), strict=True):
        leaf = target.to(dtype).detach().requires_grad_()
        results.append(torch.autograd.grad(loss(levels, leaf), leaf)[0])
    assert_gradient_close(results[0], results[2], results[1], F32, "gradient of the target")


def resized_by(loss: nn.Module, target: Tensor, space: tuple[int, ...], channels: int = 2) -> Tensor:
    """What a loss inside the wrapper gets."""
    seen: list[Tensor] = []
    del loss.loss
    loss.loss = lambda z, y: seen.append(y) or z.sum()
    loss([torch.zeros(target.shape[0], channels, *space)], target)
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.bool])
@pytest.mark.parametrize("mode", ["nearest-exact", "nearest"])
def test_integer_labels_take_the_voxels_that_interpolate_takes(dtype: torch.dtype, mode: str) -> None:
    rng = random.Random(3)
    loss = dicekernels.DeepSupervisionLoss(F.mse_loss)
    loss.interp_mode = mode
    for case in range(200):
        rank = 1 + case % 3
        before = tuple(rng.randint(1, 40 if rank < 3 else 13) for _ in range(rank))
        after = tuple(rng.randint(1, 40 if rank < 3 else 13) for _ in range(rank))
        values = torch.randint(0, 2 if dtype == torch.bool else 100, (2, 1, *before)).to(dtype)
        got = resized_by(loss, values, after)
        assert got.dtype == dtype
        assert torch.equal(got, F.interpolate(values.float(), size=after, mode=mode).to(dtype))


def test_integer_labels_give_monais_loss_of_float_labels() -> None:
    levels = outputs(SPACES[3])
    theirs = monai.losses.DeepSupervisionLoss(monai.losses.DiceCELoss(**HOT))
    with pytest.raises(NotImplementedError):
        theirs(levels, labels(SPACES[3][0], torch.int64))
    honest = run(theirs, levels, labels(SPACES[3][0], F32))
    truth = run(
        written_out(monai.losses.DiceCELoss(**HOT), [1, 0.5, 0.25]),
        [level.double() for level in levels],
        labels(SPACES[3][0]),
    )
    ours = dicekernels.DeepSupervisionLoss(dicekernels.DiceCELoss(**HOT))
    for dtype in (torch.int64, torch.int32, torch.int16):
        assert_all_close(run(ours, levels, labels(SPACES[3][0], dtype)), truth, honest)


def test_four_dimensions_in_space() -> None:
    values = torch.arange(2 * 3 * 4 * 5 * 6).reshape(2, 1, 3, 4, 5, 6)
    got = resized_by(dicekernels.DeepSupervisionLoss(nn.MSELoss()), values, (3, 2, 5, 3))
    assert torch.equal(got, values[:, :, :, 1::2, :, 1::2])
    again = resized_by(dicekernels.DeepSupervisionLoss(nn.MSELoss()), values.double(), (3, 2, 5, 3))
    assert torch.equal(again, got.double())


def test_other_modes_are_torchs() -> None:
    loss = dicekernels.DeepSupervisionLoss(nn.MSELoss())
    loss.interp_mode = "area"
    values = torch.rand(2, 3, 8, 6)
    got = resized_by(loss, values, (3, 2), 3)
    assert torch.equal(got, F.interpolate(values, size=(3, 2), mode="area"))
    with pytest.raises(NotImplementedError):
        resized_by(loss, labels((8, 6), torch.int64), (3, 2))


def test_a_target_of_equal_size_is_passed_on_itself() -> None:
    target = labels((4, 5), torch.int64)
    assert resized_by(dicekernels.DeepSupervisionLoss(nn.MSELoss()), target, (4, 5)) is target


def both(**options: Any) -> list[nn.Module]:
    return [
        library.DeepSupervisionLoss(library.DiceLoss(**HOT, **options))
        for library in (dicekernels, monai.losses)
    ]


def test_none_empty_tuple_and_one_tensor() -> None:
    levels, target = outputs(SPACES[2]), labels(SPACES[2][0])
    for loss in both():
        with pytest.raises(ValueError, match="input shouldn't be None"):
            loss(None, target)
        assert torch.equal(loss(tuple(levels), target), loss(levels, target))
        assert loss([], target).item() == 0 and loss([], target).dtype == F32
        # one tensor is not resized
        with pytest.raises(AssertionError):
            loss(levels[1], target)
        assert torch.equal(loss(levels[0], target), loss.loss(levels[0], target))
    with pytest.raises(TypeError, match="input: got dict"):
        both()[0]({"out": levels[0]}, target)


def test_no_reduction_is_for_one_tensor_only() -> None:
    levels, target = outputs(SPACES[2]), labels(SPACES[2][0])
    for loss in both(reduction="none"):
        assert loss(levels[0], target).shape == (2, 3, 1, 1)
        with pytest.raises(RuntimeError, match=r"shape"):
            loss(levels, target)
    with pytest.raises(RuntimeError, match=r"loss: gave shape \(2, 3, 1, 1\) on level 0.*'mean' or 'sum'"):
        both(reduction="none")[0](levels, target)


def test_subclasses_may_override_the_parts() -> None:
    class Doubled(dicekernels.DeepSupervisionLoss):
        def get_loss(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().get_loss(input, target)

        def get_weights(self, levels: int = 1) -> list[float]:
            return [0.5] * levels

    levels, target = outputs(SPACES[2]), labels(SPACES[2][0])
    inner = dicekernels.DiceLoss(**HOT)
    plain = dicekernels.DeepSupervisionLoss(inner, weight_mode="same")
    assert torch.equal(Doubled(inner)(levels, target), plain(levels, target))


def test_state_dict_copies_and_alias() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])
    ours = dicekernels.DeepSupervisionLoss(dicekernels.DiceCELoss(**HOT, weight=weight))
    theirs = monai.losses.DeepSupervisionLoss(monai.losses.DiceCELoss(**HOT, weight=weight + 1))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert ours.loss.cross_entropy.weight.tolist() == [2, 3, 4]
    levels, target = outputs(SPACES[2]), labels(SPACES[2][0])
    expected = ours(levels, target)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(levels, target), expected)
    assert dropin.ds_loss is dicekernels.DeepSupervisionLoss
    assert monai.losses.ds_loss.ds_loss is monai.losses.DeepSupervisionLoss


def test_metatensors_come_out_where_monai_gives_them() -> None:
    levels, target = outputs(SPACES[2]), labels(SPACES[2][0])
    for loss in both():
        assert type(loss([MetaTensor(level) for level in levels], MetaTensor(target))) is MetaTensor
        assert type(loss(levels, MetaTensor(target))) is MetaTensor
        assert type(loss(levels, target)) is Tensor
    ours = both()[0]
    wide = MetaTensor(labels(SPACES[2][0], torch.int64))
    assert torch.equal(ours(levels, wide).as_tensor(), ours(levels, target))


def test_explain_names_every_level() -> None:
    loss, levels, target = both()[0], outputs(SPACES[2]), labels(SPACES[2][0])
    text = dicekernels.explain(loss, levels, target)
    assert text.count("backend:") == 4


@pytest.mark.parametrize("dtype", [F16, F32])
def test_one_graph_without_breaks(dtype: torch.dtype) -> None:
    levels, target = outputs(SPACES[3], dtype), labels(SPACES[3][0], torch.int64)
    loss = dicekernels.DeepSupervisionLoss(dicekernels.DiceCELoss(**HOT))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, expected in zip(run(compiled, levels, target), run(loss, levels, target), strict=True):
        assert torch.equal(got, expected)
