"""The contract of the backends on the Triton kernels, in Triton's interpreter: no GPU is needed.

Triton decides at import whether it interprets, so each group of modules runs in a process of its own. There
the fixture ``backend`` gives "triton" alone (tests/conftest.py), and the interpreter rounds as a GPU does and
takes an overflow of 32-bit integers for an error (tests/support/triton_interpreter.py). What a kernel does to
a register, to a cache or to another program at the same time is not seen here: test_triton_aot.py and a GPU
see that.

What `make test` runs is a grid whose axes enter the kernels at different places, each axis in full:

* every kind of row: activation x overlap x voxel term, 60 kinds, each with one kind of target, whose dtypes,
  masks, ignored labels and logits dtypes turn along (test_sums). They multiply in the kernels, so all meet.
* every dtype of labels, values and masks, every layout of logits, target and mask, every mask mode with every
  kind of ignored label: conversions and addresses before the kinds part, met with one kind each (test_sums).
* every row of the tile tables, contiguous and channels-last, at a voxel below, at and above a tile and with a
  rest, classes that fill it or not; several runs in a chunk; offsets past 2^31 (test_triton_kernels).
* every formula with every reduction, and its slopes (test_finish, test_triton_finish, test_triton_formulas).
* what surrounds the kernels, autograd, opcheck, torch.compile, torch.func, export, autocast, is the same code
  for every backend: each is met with one or a few losses (test_ops, test_transforms, test_compile, ...).
* random problems against MONAI, and each loss with its options against the oracle.

`make test-all` runs the others of these modules that have a backend, too, and the property tests.

A program of a kernel costs the interpreter some 20 ms and an element of a tile 0.2 µs, whence small volumes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.version import Version
from processes import captured

from dicekernels.backends.triton import support

TESTS = Path(__file__).parents[1]


class Group(NamedTuple):
    """Modules of one process.

    Attributes:
        modules: names without "test_", with blanks between.
        chosen: what of them `make test` runs, an expression of ``pytest -k``; the ids of all have "triton".
        passed: no fewer tests than these pass in `make test`, and of the others in `make test-all`.
        skipped: tests of machine code, or of a loss without kernels, which there are none of here.
    """

    modules: str
    chosen: str
    passed: tuple[int, int]
    skipped: int = 0


GROUPS = {
    # Half of the voxel counts: those of float64 take the same path.
    "sums": Group("sums", "not (counts_are_exact and 257) and not (voxel_counts and dtype1)", (197, 137)),
    "kernels": Group(
        "triton_kernels numerics",
        "not (more_voxels or amp_scale) or (more_voxels and dice_ce_loss-dtype1)",
        (77, 8),
    ),
    "finish": Group(
        "finish triton_finish triton_formulas",
        "not (shapes or many_samples or without_reduction) or (without_reduction and GENERALIZED)",
        (109, 57),
        5,
    ),
    # Numerical derivatives run each kernel a hundred times.
    "autograd": Group(
        "ops transforms",
        "not (gradcheck or twice or no_grad or reverse_mode or vmap or create_graph)"
        " or ((twice or no_grad) and dice_ce])"
        " or ((reverse_mode or vmap or create_graph) and (DiceCELoss or MCCLoss or DeepSupervisionLoss))",
        (60, 67),
    ),
    "torch": Group(
        "compile integration determinism",
        "compile or inductor or export or opcheck"
        " or (memory and dice_ce and (contiguous or channels_last_3d or crop))",
        (8, 7),
    ),
    "losses": Group(
        "focal halves ignored overrides devices monai_modules monai_extras monai_differential plans",
        "not (whole or beyond_float16 or extras_are or every_attribute) or (whole and mean-False)"
        " or (extras_are and values and dtype0) or (every_attribute and triton-DiceCELoss)",
        (270, 513),
        4,
    ),
    # The arguments go through the same code whatever the loss and the dtype are.
    "arguments": Group("invalid_inputs", "DiceCELoss and not (dtype1 or dtype2)", (83, 790)),
}
# Too slow for `make test`: random problems by the hundred.
SLOW = {
    **{name: group.modules for name, group in GROUPS.items()},
    "identities": "identities",
    "properties": "properties",
}


def why_not() -> str:
    """ "" or why the interpreter cannot run here."""
    version = support.triton_version()
    if version is None:
        return "triton is not installed"
    numpy = importlib.metadata.version("numpy")
    if Version(version) < Version("3.7") and Version(numpy) >= Version("2.4"):
        return f"the interpreter of triton {version} fails with numpy {numpy}: install numpy < 2.4"
    return ""


pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.skipif(
        support.interpreted(), reason="TRITON_INTERPRET is set: the modules run by themselves"
    ),
]


def run(modules: str, chosen: str, *options: str) -> dict[str, int]:
    """How many tests passed, were skipped and so on; fails with the output if one failed."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DICEKERNELS_"))
    }
    select = "triton" + (f" and ({chosen})" if chosen else "")
    files = [
        name if name.endswith(".py") else next(TESTS.glob(f"*/test_{name}.py")) for name in modules.split()
    ]
    command = [
        sys.executable,
        *["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--tb=short", "-k"],
        select,
        *options,
    ]
    environment = kept | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = captured([*command, *files], env=environment, cwd=TESTS.parent)
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-2000:]}"
    summary = done.stdout.strip().splitlines()[-1]
    return {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", summary)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", GROUPS)
def test_the_contract(name: str) -> None:
    group = GROUPS[name]
    counts = run(group.modules, group.chosen, "-m", "not slow")
    assert counts["passed"] >= group.passed[0], counts
    assert counts.get("skipped", 0) <= group.skipped, counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SLOW)
def test_the_rest_of_the_contract(name: str) -> None:
    # The volumes that are slow for compiled kernels are out of reach here, and their tests name no backend.
    # What `test_the_contract` runs is not run again.
    others = f"slow or not ({GROUPS[name].chosen})" if name in GROUPS else ""
    counts = run(SLOW[name], others, "--timeout", "1800")
    assert counts["passed"] >= (GROUPS[name].passed[1] if name in GROUPS else 9), counts
    assert counts.get("skipped", 0) <= (GROUPS[name].skipped if name in GROUPS else 0), counts


def test_no_module_with_a_backend_is_forgotten() -> None:
    # Those that force a backend for each test; test_demo runs a program, which takes GPUs as they are, and
    # test_cuda_kernels* are for the CUDA kernels alone.
    with_backend = {
        path.stem.removeprefix("test_")
        for path in TESTS.glob("*/test_*.py")
        if re.search(r"def test_\w+\([^)]*\bbackend\b|usefixtures\(\"backend\"\)", path.read_text())
    }
    covered = {module for modules in SLOW.values() for module in modules.split()}
    assert with_backend - covered == {"demo", "cuda_kernels", "cuda_kernels_launch"}
    assert {"sums", "triton_kernels", "invalid_inputs", "identities"} <= with_backend


def test_a_failure_shows_the_output_of_the_process(tmp_path: Path) -> None:
    broken = tmp_path / "test_broken.py"
    broken.write_text("def test_triton():\n    assert 1 == 2, 'seen inside'\n")
    with pytest.raises(AssertionError, match="seen inside"):
        run(str(broken), "")
