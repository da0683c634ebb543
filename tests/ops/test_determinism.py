"""One problem, one set of bits: any run, any number of threads; the bound on every CPU level."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import gradient, laid_out, make_labels, make_logits, make_mask, make_values, oracle_rows
from processes import captured

from dicekernels import functional, region_sums
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

HOT = {"to_onehot_y": True, "softmax": True}
F64 = torch.float64
ROOT = Path(__file__).parents[2]
SHAPE = (2, 5, 23, 29, 31)  # 20677 voxels: six chunks a sample, the last one a rest


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problems():
    logits, labels = make_logits(SHAPE), make_labels((2, 1, *SHAPE[2:]), 5)
    mask, values = make_mask("fraction", SHAPE), make_values(SHAPE)
    return {
        "dice_ce": lambda z: functional.dice_ce_loss(z, labels, **HOT),
        "generalized": lambda z: functional.generalized_dice_loss(z, labels, ignore_index=2, **HOT),
        "tversky": lambda z: functional.tversky_loss(z, values, sigmoid=True, mask=mask),
        "sums": lambda z: sum(r.sum() for r in region_sums(z, labels, voxel_term="ce") if r is not None),
    }, {
        "contiguous": logits,
        "channels_last_3d": laid_out(logits, "channels_last_3d"),
        "half": logits.half(),
        "double": logits.double(),
    }


def bits(value, logits):
    """Loss and gradient."""
    leaf = logits.detach().requires_grad_()
    loss = value(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", ["dice_ce", "generalized", "tversky", "sums"])
def test_the_same_bits_on_any_number_of_threads_and_twice(name, threads):
    losses, layouts = problems()
    for layout, logits in layouts.items():
        torch.set_num_threads(1)
        loss, grad = bits(losses[name], logits)
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for _ in range(2):
                again = bits(losses[name], logits)
                assert torch.equal(again[0], loss), f"{layout}, {count} threads"
                assert torch.equal(again[1], grad), f"{layout}, {count} threads"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "class_slice", "permuted", "crop"])
@pytest.mark.parametrize("name", ["dice_ce", "tversky"])
def test_nothing_of_uninitialised_memory_is_read(name, layout, backend):
    # In deterministic mode torch fills new memory with NaN: a sum or gradient left unwritten shows.
    losses, layouts = problems()
    logits = laid_out(layouts["contiguous"], layout)
    expected = bits(losses[name], logits)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        got = bits(losses[name], logits)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[1].isfinite().all()


def test_a_layout_does_not_change_the_bits():
    losses, layouts = problems()
    loss, grad = bits(losses["dice_ce"], layouts["contiguous"])
    for layout in ("channels_last_3d", "class_slice", "batch_strided"):
        again = bits(losses["dice_ce"], laid_out(layouts["contiguous"], layout))
        assert torch.equal(again[0], loss), layout
        assert torch.equal(again[1], grad), layout


def test_a_sample_does_not_depend_on_its_neighbours():
    logits, labels = make_logits(SHAPE), make_labels((2, 1, *SHAPE[2:]), 5)
    both = region_sums(logits, labels, voxel_term="ce")
    for sample in range(2):
        one = region_sums(logits[sample : sample + 1], labels[sample : sample + 1], voxel_term="ce")
        assert all(
            torch.equal(a[sample : sample + 1], b) for a, b in zip(both, one, strict=True) if b is not None
        )


CHILD = """
import sys, torch
from dicekernels import region_sums
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
results = []
for problem in torch.load(sys.argv[1]):
    leaf = problem["logits"].requires_grad_()
    sums = region_sums(leaf, problem["target"], **problem["options"])
    rows = {name: row.detach() for name, row in sums._asdict().items() if row is not None}
    (grad,) = torch.autograd.grad(sum(row.sum() for row in (sums.I, sums.FP, sums.POS)), leaf)
    results.append((rows, grad))
torch.save(results, sys.argv[2])
"""


def capabilities() -> list[str]:
    """The levels of this processor; "default" is the one that every processor of its kind has."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        flags = set()
    avx2 = {"avx2", "fma", "f16c"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    return ["default", *["avx2"] * avx2, *["avx512"] * avx512]


def run_child(capability: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    added = {"DICEKERNELS_CPU_CAPABILITY": capability, "PYTHONPATH": path, "DICEKERNELS_BACKEND": "cpu"}
    command = [sys.executable, "-c", code, *arguments]
    return captured(command, env=os.environ | added, timeout=200)


def capability_problems():
    found = []
    for at, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16, F64)):
        # Voxel counts around the lanes of every level (4 to 16) and a chunk.
        for voxels in (1, 7, 8, 9, 33, 1025, 4101):
            shape = (2, 3, voxels)
            logits = make_logits(shape, dtype, seed=voxels + at)
            mask = make_mask("fraction", shape) if voxels % 2 else None
            labels = make_labels((2, 1, voxels), 3)
            found.append((logits, labels, {"voxel_term": "ce", "mask": mask}))
            term = ("bce", "focal_sigmoid", "focal_softmax", "ce")[voxels % 4]
            options = {"activation": "sigmoid", "overlap": ("min", "squared")[at % 2], "voxel_term": term}
            found.append((laid_out(logits, "class_slice"), make_values(shape), options))
    return [dict(zip(("logits", "target", "options"), problem, strict=True)) for problem in found]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_cpu_level_keeps_the_bound(capability, tmp_path):
    if capability not in capabilities():
        pytest.skip(f"this processor has no {capability}")
    problems = capability_problems()
    torch.save(problems, tmp_path / "problems")
    done = run_child(capability, CHILD, str(tmp_path / "problems"), str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    for problem, (rows, grad) in zip(problems, torch.load(tmp_path / "results"), strict=True):
        logits, target, options = problem.values()
        dtype = logits.dtype
        single = torch.promote_types(dtype, torch.float32)
        truth, honest = (oracle_rows(logits, target, kind, **options) for kind in (F64, single))
        name = f"{capability} {tuple(logits.shape)} {options}"
        for row in truth:
            assert_close_to_truth(rows[row], truth[row], honest[row], single, f"{row} {name}")

        def value(z, kind, target=target, options=options):
            rows = oracle_rows(z, target, kind, **options)
            return sum(rows[row].sum() for row in ("I", "FP", "POS"))

        exact, plain = (gradient(lambda z, k=k, f=value: f(z, k), logits, k) for k in (F64, single))
        assert_gradient_close(grad, exact, plain.to(dtype), dtype, f"gradient {name}")


def test_an_unknown_level_is_refused():
    code = "import torch, dicekernels as d; d.region_sums(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4))"
    done = run_child("sse9", code)
    assert done.returncode
    assert 'DICEKERNELS_CPU_CAPABILITY: got "sse9", expected default, avx2 or avx512' in done.stderr
