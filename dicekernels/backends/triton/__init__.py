"""The ops in Triton, for every GPU that it reaches.

Nothing is imported here: ``support`` tells whether Triton can serve without importing it, which would cost
every import of ours, and ``kernels`` imports it at its first use.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace


@functools.cache
def kernels() -> SimpleNamespace:
    """The three ops: see dicekernels/ops.py."""
    from .finish import finish
    from .sums import sums
    from .sums_backward import sums_backward

    return SimpleNamespace(sums=sums, finish=finish, sums_backward=sums_backward)
