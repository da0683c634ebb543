"""The machine code of the compiled CUDA library, read without a GPU: bench/static/cuda.py, and its limits."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")  # brings cuobjdump
pytest.importorskip("jsonschema")
pytest.importorskip("tabulate")
pytest.importorskip("dicekernels._native", reason="_native was not built")

from bench import schema
from bench.static import cuda, cuda_facts, library
from bench.static.cuda_facts import ELEMENT_BYTES, Problem
from bench.static.library import Instance, Usage
from bench.static.sass import Instruction, Kernel, Loop
from dicekernels.backends import native

LIBRARY = native.library_path("cuda")

# Instructions for each true class of a voxel on the usual way, DiceCE, channel-first, sm_90.
LIMITS = {"forward": {4: 16, 14: 16, 32: 16, 117: 20}, "backward": {4: 20, 14: 20, 32: 20, 117: 24}}
# (op, classes, dtype) -> another limit, with the reason in a comment.
EXCEPTIONS: dict[tuple[str, int, str], float] = {}
# Kernels whose usual way does not move 16 bytes at a time; that spill. The reason stands in a comment.
# Half precision with 16 classes a thread and warps that share them: 8 voxels, 16 bytes a class, take 254
# registers, which leave one block a multiprocessor, and nothing is loaded while its warps compute. 4 voxels
# leave room for two.
NARROW: set[str] = {
    f"fast_{op}<{dtype}, 16, true, false, false>"
    for op in ("sums", "backward")
    for dtype in ("Half", "Bfloat16")
}
# sm_80 alone, 8 bytes: two blocks of eight warps have 128 registers a thread.
SPILLING: set[str] = {"fast_sums<float, 16, true, false, false>"}
MOST_KERNELS = 250

built = pytest.mark.skipif(
    not LIBRARY.is_file() or shutil.which("c++filt") is None,
    reason=f"{LIBRARY.name} was not built, or there is no c++filt to read the names in it",
)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """Rows of sm_90. Disassembling takes seconds: the test processes of a session do it once."""
    base = tmp_path_factory.getbasetemp()
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = base.parent / f"static-{run}" if run else base / "static"
    folder.mkdir(exist_ok=True)
    cache = folder / "rows.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cache.is_file():
            code = library.kernels(LIBRARY, [90])
            kernels, problems = cuda_facts.rows(code, library.usage(LIBRARY), cuda_facts.problems())
            cache.write_text(json.dumps({"kernels": kernels, "problems": problems}))
        rows: dict[str, list[Row]] = json.loads(cache.read_text())
    return rows


def _problem(rows: list[Row], op: str, classes: int, dtype: str) -> Row:
    (row,) = [row for row in rows if (row["op"], row["classes"], row["dtype"]) == (op, classes, dtype)]
    return row


@built
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [4, 14, 32, 117])
@pytest.mark.parametrize("op", cuda_facts.OPS)
def test_dice_ce_channel_first_stays_below_the_limits(
    found: dict[str, list[Row]], op: str, classes: int, dtype: str
) -> None:
    row = _problem(found["problems"], op, classes, dtype)
    assert row["per_element"] <= EXCEPTIONS.get((op, classes, dtype), LIMITS[op][classes])


@built
def test_usual_ways_move_16_bytes_and_nothing_spills(found: dict[str, list[Row]]) -> None:
    """On sm_90; what is in a table of exceptions and does not need to be is found as well."""
    assert {row["kernel"] for row in found["kernels"] if row["narrow"]} == NARROW
    fast = [row for row in found["kernels"] if row["narrow"] is not None]
    assert len(fast) == sum(row["kernel"].startswith("fast_") for row in found["kernels"]) > 0
    assert {
        row["kernel"]
        for row in found["kernels"]
        if row["stack_bytes"] + row["spill_loads"] + row["spill_stores"] > 0
    } <= SPILLING


@built
def test_no_kernel_uses_a_stack_on_any_architecture_and_there_are_few() -> None:
    """Without a stack there is no place to spill to."""
    used = library.usage(LIBRARY)
    for capability, kernels in used.items():
        assert 0 < len(kernels) <= MOST_KERNELS, capability
        assert {name for name, kernel in kernels.items() if kernel.stack > 0} <= SPILLING, capability
    assert len({frozenset(kernels) for kernels in used.values()}) == 1


@built
def test_library_holds_the_architectures_that_were_asked_for_and_one_ptx() -> None:
    info = native.build_config()
    assert info is not None and info["cuda"] is not None
    machine, ptx = library.architectures(LIBRARY)
    assert {f"sm_{sm}" for sm in machine} == set(info["cuda"]["architectures"])
    assert {f"compute_{sm}" for sm in ptx} == set(info["cuda"]["ptx"])
    assert len(ptx) == 1
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert (machine, ptx) == ({"80", "90", "100", "120"}, {"120"})


@built
def test_resident_warps_are_at_least_those_of_the_report(found: dict[str, list[Row]]) -> None:
    reported = schema.read(cuda.RESULTS)
    info = native.build_config()
    assert info is not None
    if reported["versions"].get("nvcc") != info["cuda"]["nvcc"]:
        pytest.skip("the report was made with another nvcc")
    rows = [row for row in reported["problems"] if row["capability"] == 90]
    assert rows
    for row in rows:
        now = _problem(found["problems"], row["op"], row["classes"], row["dtype"])
        assert now["resident_warps"] >= row["resident_warps"] > 0, row


@built
@pytest.mark.slow
def test_every_architecture_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    cuda.main(["--json", str(out)])
    written = schema.read(out)
    assert str(out) in capsys.readouterr().out
    assert str(Path.home()) not in out.read_text() and str(LIBRARY) not in out.read_text()
    capabilities = {row["capability"] for row in written["kernels"]}
    assert {f"sm_{sm}" for sm in capabilities} == set(written["architectures"])
    assert len(written["problems"]) == len(capabilities) * len(cuda_facts.problems())
    for row in written["kernels"]:
        assert row["kernel"] in SPILLING or row["spill_loads"] + row["spill_stores"] == 0, row
        assert row["kernel"] in NARROW or not row["narrow"], row
    assert all(row["resident_warps"] >= 4 for row in written["problems"])


def _line(address: int, opcode: str) -> Instruction:
    return Instruction(16 * address, opcode, None)


def _kernel() -> Kernel:
    """Outermost loop at 1, usual way at 2 with a loop over the warps at 40, special way at 90."""
    usual = [_line(2 + k, "LDG.E.128.CONSTANT") for k in range(16)]
    usual += [_line(18 + j, "LDG.E.CONSTANT") for j in range(4)]
    usual += [_line(22, "LD.E"), *(_line(address, "FADD") for address in range(23, 80))]
    usual[30] = _line(32, "MUFU.EX2")
    special = [_line(90, "LDG.E.CONSTANT"), *(_line(address, "MUFU.EX2") for address in range(91, 110))]
    rest = [_line(0, "S2R"), _line(1, "IADD3"), _line(110, "LDG.E.128"), _line(111, "EXIT")]
    code = sorted([*usual, *special, *rest], key=lambda line: line.address)
    loops = tuple(Loop(16 * a, 16 * b) for a, b in ((1, 110), (2, 79), (40, 49), (90, 109)))
    return Kernel(tuple(code), 128, 0, 0, loops)


def test_instructions_of_an_element_worked_by_hand() -> None:
    """32 classes of float32: two warps of 16 classes, 4 voxels a thread.

    The usual way has 78 instructions, 10 of them in the loop over the warps: 68 + 2 x 10 = 88 for 4 x 16
    elements of a thread. 24 others are executed once for 4096 / 128 = 32 tiles. Shared memory: 16 bytes for
    each of 16 classes of 64 threads, 2 x 2 rows of 128 floats that the warps exchange, a count, by the 16.
    """
    problem, kernel = Problem("forward", 32, "float32"), _kernel()
    assert (problem.plan.held, problem.plan.warps, problem.plan.voxels) == (16, 2, 4)
    assert problem.plan.shared_bytes == 16 * 16 * 64 + 2 * 2 * 128 * 4 + 16
    assert cuda_facts.hottest(kernel) == Loop(32, 16 * 79)
    row = cuda_facts.of_problem(problem, kernel, Usage(128, 0, 16), 90)
    assert row["tile_instructions"] == 88
    assert row["per_element"] == 88 / 64
    assert row["per_element_chunk"] == pytest.approx((88 + 24 / 32) / 64, abs=1e-3)
    # 128 registers: 16 warps. Two warps a block, and shared memory is not what limits them.
    assert (row["threads"], row["resident_warps"]) == (64, 16)


def test_accesses_that_are_not_16_bytes_are_named() -> None:
    body = _kernel().inside(Loop(32, 16 * 79))
    instance = Instance("forward", "float32", 16, True, False, False)
    assert cuda_facts.narrow(instance, body) == ""
    missing = cuda_facts.narrow(instance, body[1:])
    assert missing == "loads: got 128x15 32x4, expected 128x16 32x4"
    backward = Instance("backward", "float32", 16, True, False, False)
    assert cuda_facts.narrow(backward, body) == "stores: got none, expected 128x16"


def test_names_of_instances() -> None:
    assert library.instance("fast_sums<float, 4, false, false, false>") == Instance(
        "forward", "float32", 4, False, False, False
    )
    found = library.instance("fast_backward<Bfloat16, 16, true, false, true>")
    assert found is not None and found.name == "backward bfloat16 16 split last"
    assert library.instance("general_sums<float>") is None
    assert library.instance("fast_sums<float>") is None


def test_problems_are_the_class_counts_dtypes_and_passes_that_are_reported() -> None:
    found = {(p.op, p.classes, p.dtype) for p in cuda_facts.problems()}
    classes = (2, 3, 4, 5, 8, 14, 16, 17, 32, 33, 64, 117, 128)
    assert found == {(op, c, dtype) for op in cuda_facts.OPS for c in classes for dtype in ELEMENT_BYTES}
    with pytest.raises(ValueError, match="classes: got 129"):
        _ = Problem("forward", 129, "float32").plan


def test_command_says_what_to_do_without_a_library(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run `make build-tests` where nvcc is on PATH"):
        cuda.main(["--library", str(tmp_path / "none.so")])
