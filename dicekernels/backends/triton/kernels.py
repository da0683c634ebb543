"""The three ops: see dicekernels/ops.py."""

from __future__ import annotations

from .finish import finish
from .sums import sums
from .sums_backward import sums_backward

__all__ = ["finish", "sums", "sums_backward"]
