"""Random problems against the installed MONAI: values, gradients, shapes, dtypes, errors, warnings.

Two sweeps: the losses of ``monai_problems``, and those of ``monai_problems_beyond_dice``. A failure names its
seeds; ``PYTHONPATH=tests/support python tests/losses/test_monai_differential.py SEED`` runs one again, ``more
SEED`` one of the second sweep.
``DICEKERNELS_FIRST_SEED`` moves the sweeps to other problems.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import monai_problems
import monai_problems_beyond_dice
import pytest
from cases import swept
from monai_differential import check, sweep
from monai_problems import MonaiProblem

import dicekernels
from dicekernels.backends.triton.support import interpreted

FIRST_SEED = int(os.environ.get("DICEKERNELS_FIRST_SEED", "0"))
EAGER_SEED = FIRST_SEED + 1_000_000
CHUNK, CPU_CHUNKS, EAGER_CHUNKS = 128, 24, 4
# Nine losses in turn: 14 of each in a chunk, 560 on the kernels.
MORE_CHUNK, MORE_CPU_CHUNKS, MORE_EAGER_CHUNKS = 126, 40, 4
# In Triton's interpreter, at several problems a second: tests/backends/test_triton_interpreter.py.
TRITON_SEED = FIRST_SEED + 2_000_000
TRITON_CHUNK, TRITON_CHUNKS = 18, 12


def chunk_of(problem: Callable[[int], MonaiProblem], first: int, size: int, backend: str) -> None:
    reason = dicekernels.unavailable_backends().get(backend)
    if reason:
        pytest.skip(f"backend {backend!r}: {reason}")
    sweep((problem(seed) for seed in range(first, first + size)), backend)


@pytest.mark.parametrize("chunk", swept(range(CPU_CHUNKS), range(8)))
def test_kernels_give_monais_results(chunk: int) -> None:
    chunk_of(monai_problems.problem, FIRST_SEED + chunk * CHUNK, CHUNK, "cpu")


@pytest.mark.parametrize("chunk", range(EAGER_CHUNKS))
def test_eager_gives_monais_results(chunk: int) -> None:
    chunk_of(monai_problems.problem, EAGER_SEED + chunk * CHUNK, CHUNK, "eager")


@pytest.mark.parametrize("chunk", swept(range(MORE_CPU_CHUNKS), range(12)))
def test_kernels_give_monais_results_in_more_losses(chunk: int) -> None:
    chunk_of(monai_problems_beyond_dice.problem, FIRST_SEED + chunk * MORE_CHUNK, MORE_CHUNK, "cpu")


@pytest.mark.parametrize("chunk", range(MORE_EAGER_CHUNKS))
def test_eager_gives_monais_results_in_more_losses(chunk: int) -> None:
    chunk_of(monai_problems_beyond_dice.problem, EAGER_SEED + chunk * MORE_CHUNK, MORE_CHUNK, "eager")


if interpreted():

    @pytest.mark.parametrize("chunk", swept(range(TRITON_CHUNKS), range(1)))
    @pytest.mark.parametrize(
        "problem", [monai_problems.problem, monai_problems_beyond_dice.problem], ids=["", "more"]
    )
    def test_triton_gives_monais_results(problem: Callable[[int], MonaiProblem], chunk: int) -> None:
        chunk_of(problem, TRITON_SEED + chunk * TRITON_CHUNK, TRITON_CHUNK, "triton")


if __name__ == "__main__":
    more = sys.argv[1] == "more"
    make = monai_problems_beyond_dice.problem if more else monai_problems.problem
    for number in map(int, sys.argv[1 + more :]):
        print(make(number))
        for name in ("cpu", "eager"):
            again = " (not on the first honest run)" if check(make(number), name) else ""
            print(f"  {name}: as MONAI{again}")
