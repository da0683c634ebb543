"""Labels outside the classes, where PyTorch and not a kernel reads the label map."""

from __future__ import annotations

from torch import Tensor

from . import deferred
from .backends import eager
from .spec import BAD, Activation, SumsSpec
from .tensors import traced


def out_of_range(labels: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Where a label is outside [0, classes) and not ``ignore_index``."""
    wrong = (labels.long() < 0) | (labels.long() >= classes)
    return wrong & ~eager.ignored_labels(labels, ignore_index)


def check_labels(
    bad: Tensor, labels: Tensor, mask: Tensor | None, classes: int, ignore_index: int | None
) -> None:
    """Raises LabelRangeError if ``bad``, a count for each sample, is not zero.

    As the rest of the package: at once on the CPU and elsewhere with DICEKERNELS_CHECK=1, else in a later
    call (deferred.py); and not in a trace.
    """
    if traced():
        return
    if deferred.reads_at_once(labels.device):
        spec = SumsSpec(dense=False, activation=Activation.NONE, rows=BAD, ignore_index=ignore_index)
        # (B, 1) of a row: the shape that the check of the eager backend reads.
        eager.check_labels(bad.detach().reshape(-1, 1), labels, mask, classes, spec)
    else:
        deferred.raise_earlier(labels.device)
        deferred.count_later(bad.detach(), labels, classes)
