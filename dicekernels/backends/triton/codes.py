"""The numbers of dicekernels/spec.py as constants of kernels: members of its enums and places of the rows.

Kernels import them by name: as globals of theirs they are part of the key under which Triton keeps compiled
kernels on disk, so a number that changes compiles them anew.
"""

from __future__ import annotations

import triton.language as tl

from ... import finish, spec

_KINDS = (
    spec.Activation,
    spec.Overlap,
    spec.VoxelTerm,
    spec.Formula,
    spec.Transform,
    spec.GdlWeight,
    spec.Reduction,
    spec.Denominator,
)
# NONE is 0 in all kinds that have it; no other name is shared.
_NUMBERS = {member.name: int(member) for kind in _KINDS for member in kind}
_NUMBERS |= {f"ROW_{name}": place for place, name in enumerate(spec.ROWS)}
# The floats of SumsSpec, which the kernels of both passes get as one tuple.
SUMS_FLOATS = tuple(name for name, kind in spec.SumsSpec.kinds().items() if kind is float)
_NUMBERS |= {name.upper(): place for place, name in enumerate(SUMS_FLOATS)}

LOWEST_SCORE = tl.constexpr(finish.LOWEST_SCORE)
# float32 numbers near 2^-128 are 2^-149 apart, and 2^-128 is the largest whose reciprocal is infinite. What
# is at most this is rounded to it or less (a tie to 2^-128, which is even).
INFINITE_BELOW = tl.constexpr(2.0**-128 + 2.0**-150)


def __getattr__(name: str) -> tl.constexpr:
    if name not in _NUMBERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tl.constexpr(_NUMBERS[name])
