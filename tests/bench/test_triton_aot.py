"""The machine code of the Triton kernels, compiled for GPUs that are not here: bench/static/{aot,sass}.py.

Compiled, not interpreted: under TRITON_INTERPRET=1 there is nothing to look at, and these tests are skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("jsonschema")
pytest.importorskip("tabulate")

import triton

from bench import host_cost, schema
from bench.gpu.offline import target
from bench.static import aot, aot_facts, sass, tables
from bench.static.aot_cases import LOSSES, Problem
from bench.static.sass import Instruction, Kernel, Loop

INTERPRETED = triton.knobs.runtime.interpret
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: run again without it")

# Instructions for each true class of a voxel in the loop over tiles, DiceCE, channel-first, sm_90.
LIMITS = {"forward": {4: 20, 14: 20, 32: 20, 117: 27}, "backward": {4: 26, 14: 26, 32: 26, 117: 31}}
# 21 in place of 20: two of the 16 classes of the tile are none, and a thread holds 8 voxels of 8 classes,
# so what is done for a voxel (the logarithm, the label) is done twice. One instruction an element takes
# the largest logit off before the product with log2(e): in one multiply-add the limit holds, but the cross
# entropy of a perfect voxel is a rounding of either sign then, not 0.
EXCEPTIONS = {("forward", 14, "bfloat16"): 21}
OPS = ("forward", "backward")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read was compiled by this test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def _facts(problem: Problem, op: str, capability: int = 90, **overrides: Any) -> dict[str, Any]:
    with target(capability):
        return aot_facts.facts(problem, op, capability, overrides)


def _assert_no_spill(facts: dict[str, Any]) -> None:
    assert (facts["stack_bytes"], facts["spill_loads"], facts["spill_stores"]) == (0, 0, 0)


@compiles
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [4, 14, 32, 117])
@pytest.mark.parametrize("op", OPS)
def test_dice_ce_channel_first_stays_below_the_limits(op: str, classes: int, dtype: str) -> None:
    facts = _facts(Problem("dice_ce", classes, dtype), op)
    _assert_no_spill(facts)
    assert facts["wide_loads"] == 1, facts["loop_loads"]
    assert facts["wide_stores"] == (1 if op == "backward" else None), facts["loop_stores"]
    assert facts["resident_warps"] >= 8
    assert facts["per_element"] <= EXCEPTIONS.get((op, classes, dtype), LIMITS[op][classes])


@compiles
@pytest.mark.parametrize("capability", [80, 100, 120])
@pytest.mark.parametrize(
    ("op", "classes", "dtype"),
    [("forward", 4, "float32"), ("forward", 117, "bfloat16"), ("backward", 117, "bfloat16")],
)
def test_other_gpus_spill_nothing_and_move_16_bytes(
    op: str, classes: int, dtype: str, capability: int
) -> None:
    facts = _facts(Problem("dice_ce", classes, dtype), op, capability)
    _assert_no_spill(facts)
    assert facts["wide_loads"] == 1, facts["loop_loads"]
    assert facts["wide_stores"] == (1 if op == "backward" else None), facts["loop_stores"]


# Both passes of what adds code or loads to them, one of the losses that leave code out.
OTHERS = [(loss, op) for loss in ("dice_ce_soft", "dice_ce_masked", "dice_focal") for op in OPS]
OTHERS += [("dice_ce_int64", "forward"), ("dice_squared", "backward"), ("tversky", "forward")]
OTHERS += [("gdl", "backward")]


@compiles
@pytest.mark.parametrize(("loss", "op"), OTHERS)
def test_other_losses_and_inputs_spill_nothing_and_move_16_bytes(loss: str, op: str) -> None:
    facts = _facts(Problem(loss, 4), op)
    _assert_no_spill(facts)
    assert facts["wide_loads"] == 1, facts["loop_loads"]
    assert facts["wide_stores"] == (1 if op == "backward" else None), facts["loop_stores"]


@compiles
@pytest.mark.parametrize(
    ("classes", "dtype", "width"), [(4, "float32", "128"), (14, "bfloat16", "32"), (117, "float32", "32")]
)
@pytest.mark.parametrize("op", OPS)
def test_channels_last_moves_what_the_classes_of_a_voxel_allow(
    op: str, classes: int, dtype: str, width: str
) -> None:
    """16 bytes, or the largest power of two that divides the bytes of a voxel."""
    problem = Problem("dice_ce", classes, dtype, "channels_last")
    facts = _facts(problem, op)
    _assert_no_spill(facts)
    moved = facts["loop_stores" if op == "backward" else "loop_loads"]
    assert set(facts["loop_stores"]) == ({width} if op == "backward" else set())
    bytes_of_a_load = int(width) // 8
    elements = problem.classes * aot_facts.shape_of(facts["meta"])["BLOCK_N"]
    threads = 32 * facts["meta"]["num_warps"]
    assert moved[width] * bytes_of_a_load >= elements * problem.itemsize / threads


@compiles
@pytest.mark.parametrize("op", [*OPS, "finish"])
def test_more_classes_than_a_tile_holds_and_the_formula_spill_nothing(op: str) -> None:
    _assert_no_spill(_facts(Problem("dice_ce", 257), op))


@compiles
@pytest.mark.parametrize(
    ("space", "dtype", "widths"),
    [
        ((7, 11, 13), "float32", {"32"}),
        ((7, 11, 13), "bfloat16", {"U16"}),
        ((7, 11, 12), "float32", {"128"}),
        ((7, 11, 24), "bfloat16", {"128"}),
    ],
)
def test_stores_are_as_wide_as_the_strides_allow(
    space: tuple[int, ...], dtype: str, widths: set[str]
) -> None:
    """The reader reports scalar accesses where there is no other way, and 16 bytes from 4 (8) voxels on."""
    facts = _facts(Problem("dice_ce", 4, dtype, space=space), "backward")
    assert set(facts["loop_stores"]) == widths
    assert facts["wide_stores"] == facts["wide_loads"] == (1 if widths == {"128"} else 0)


@compiles
def test_a_kernel_that_spills_is_reported() -> None:
    facts = _facts(Problem("dice_ce", 14), "forward", maxnreg=32)
    assert facts["registers"] <= 32
    assert facts["stack_bytes"] > 0 and facts["spill_loads"] > 0 and facts["spill_stores"] > 0


@compiles
@pytest.mark.parametrize(
    ("op", "space"), [("forward", (8, 8, 8)), ("backward", (7, 11, 13)), ("finish", (8, 8, 8))]
)
def test_what_is_compiled_is_what_a_launch_compiles(op: str, space: tuple[int, ...]) -> None:
    """By the key of Triton's cache: from the tensors on meta, and in a launch on tensors that have memory."""
    launched: list[str] = []

    def recorder(source: Any, metadata: Any) -> Any:
        return lambda *args: launched.append(metadata.hash)

    problem = Problem("dice_ce", 3, "bfloat16", space=space)
    with target(90, recorder):
        binary = problem.plan(op).compile()
        assert not launched
        problem.plan(op, "cpu").run(torch.device("cpu"))
    assert launched == [binary.hash]


@compiles
def test_a_step_is_two_launches_forward_and_one_backward() -> None:
    launched: list[str] = []

    def recorder(source: Any, metadata: Any) -> Any:
        return lambda *args: launched.append(metadata.name)

    with target(90, recorder), host_cost.chosen("cpu", "triton"):
        step = host_cost.contenders("cpu")[host_cost.OURS]
        launched.clear()
        step()
    assert launched == ["sums_kernel", "finish_kernel", "sums_backward_kernel"]


@compiles
def test_nothing_is_launched_and_no_driver_stays_where_kernels_are_only_compiled() -> None:
    from triton.runtime import driver

    before = dict(vars(driver))
    problem = Problem("dice_ce", 2, space=(8, 8, 8))
    with pytest.raises(RuntimeError, match="launched where nothing runs"), target(90):
        problem.plan("backward").run(torch.device("meta"))
    assert vars(driver) == before


@compiles
def test_command_writes_the_json_that_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--capability", "90", "--classes", "2", "--dtype", "float16", "--layout", "contiguous"]
    out = tmp_path / "found.json"
    aot.main([*asked, "--op", "backward", "--try", "BLOCK_N=512/1024", "--out", str(out), "--jobs", "1"])
    written = schema.read(out)
    rows = written["kernels"]
    assert [row["overrides"] for row in rows] == [{"BLOCK_N": 512}, {"BLOCK_N": 1024}]
    assert [aot_facts.shape_of(row["facts"]["meta"])["BLOCK_N"] for row in rows] == [512, 1024]
    assert "ptxas" in written["versions"] and "triton" in written["versions"]
    assert str(Path.home()) not in out.read_text() and str(schema.ROOT) not in out.read_text()
    assert tables.launches(rows) in capsys.readouterr().out


@compiles
def test_command_fails_where_a_kernel_does_not_compile(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--capability", "90", "--classes", "2", "--dtype", "float16", "--layout", "contiguous"]
    with pytest.raises(SystemExit, match="1 of 1 kernels did not compile"):
        aot.main([*asked, "--op", "forward", "--try", "NO_SUCH=1"])
    assert "got ['NO_SUCH'], expected some of" in capsys.readouterr().err


CODE = """
 Function step:
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
        /*0010*/                   CS2R R42, SRZ ;                        /* 0x00000000002a7805 */
        /*0020*/              @!P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x00 */
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.64 [R3], desc[UR4][R2.64] ;  /* 0x00 */
        /*0040*/                   LDG.E.U8 R9, desc[UR4][R6.64] ;        /* 0x00 */
        /*0050*/                   MUFU.EX2 R5, R5 ;                      /* 0x00 */
        /*0060*/                   NOP ;                                  /* 0x00 */
        /*0070*/               @P0 STG.E desc[UR4][R6.64], R5 ;           /* 0x00 */
        /*0080*/                   LDL R5, [R1] ;                         /* 0x00 */
        /*0090*/               @P2 BRA 0x20 ;                             /* 0x00 */
        /*00a0*/                   BRA.U !UP0, 0x10 ;                     /* 0x00 */
        /*00b0*/                   EXIT ;                                 /* 0x00 */
        /*00c0*/                   BRA 0xc0;                              /* 0x00 */
        /*00d0*/                   NOP ;                                  /* 0x00 */
"""


def test_reader_on_code_worked_by_hand() -> None:
    kernel = sass.parse(CODE)
    inner, outer = Loop(0x20, 0x90), Loop(0x10, 0xA0)
    assert (kernel.registers, kernel.stack, kernel.shared) == (40, 16, 1024)
    assert len(kernel.code) == 11  # neither the NOPs nor the branch to itself
    assert set(kernel.loops) == {inner, outer}
    assert kernel.children(None) == (outer,)
    assert kernel.children(outer) == (inner,)
    assert aot_facts.hottest(kernel) == inner
    body = kernel.inside(inner)
    assert len(body) == 7
    assert [line.name for line in kernel.inside(outer, but=(inner,))] == ["CS2R", "BRA"]
    # LTC128B is a hint for the cache, no width.
    assert sass.loads(body) == {"128": 1, "64": 1, "U8": 1}
    assert sass.loaded_bytes(body) == 16 + 8 + 1
    assert sass.stores(body) == {"32": 1}
    assert sass.exponentials(body) == 1
    assert sass.names(kernel.code)["LDL"] == 1


def test_a_rare_case_behind_a_loop_is_no_loop() -> None:
    kernel = sass.parse(CODE.replace("EXIT ;", "BRA 0x30 ;"))
    assert kernel.code[-1] == Instruction(0xB0, "BRA", 0x30)
    assert set(kernel.loops) == {Loop(0x20, 0x90), Loop(0x10, 0xA0)}


@pytest.mark.parametrize("text", ["", "REG:40 STACK:0 SHARED:0 LOCAL:0", CODE.split("REG")[0] + "LDC R1 ;"])
def test_reader_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(RuntimeError, match="another form than this reader knows"):
        sass.parse(text)


# Registers, bytes of shared memory, warps of a block, capability; warps that are resident.
RESIDENT = [
    (32, 0, 8, 90, 64),  # all that there are
    (32, 0, 8, 120, 48),
    (128, 0, 4, 90, 16),  # 4096 registers a warp, 4 of them in each partition
    (168, 0, 4, 90, 12),  # 5376 a warp: 3 in a partition
    (168, 0, 8, 90, 8),  # 12 warps are one block of 8
    (255, 0, 4, 80, 8),
    (32, 56 << 10, 4, 90, 16),  # 57 KiB with what each block takes: 4 blocks of 228 KiB
    (32, 100 << 10, 4, 120, 0),
    (16, 0, 1, 90, 32),  # 32 blocks at most
]


@pytest.mark.parametrize(("registers", "shared", "warps", "capability", "resident"), RESIDENT)
def test_resident_warps(registers: int, shared: int, warps: int, capability: int, resident: int) -> None:
    assert sass.resident_warps(registers, shared, warps, capability) == resident


def test_resident_warps_of_an_unknown_gpu() -> None:
    with pytest.raises(ValueError, match="capability: got 30, expected one of"):
        sass.resident_warps(32, 0, 4, 30)


def _line(address: int, opcode: str, target_: int | None = None) -> Instruction:
    return Instruction(16 * address, opcode, None if target_ is None else 16 * target_)


def _filled(first: int, last: int, opcode: str = "FADD") -> list[Instruction]:
    return [_line(address, opcode) for address in range(first, last)]


@pytest.mark.parametrize(("tiles", "per_element", "chunk"), [(1, 12.5, 14.0625), (2, 6.25, 7.8125)])
def test_instructions_of_an_element_worked_by_hand(tiles: int, per_element: float, chunk: float) -> None:
    """3 classes of 4096 voxels in tiles of 4 x 1024 for 128 threads: 32 elements a thread and tile, 24 true.

    A loop of 300 instructions with 32 exponentials is one tile: 300 / 24. With 64 it is two: 150 / 24. The
    150 others come once for 96 true elements of a thread.
    """
    loop = [*_filled(50, 50 + 298 - 32 * tiles), *_filled(348 - 32 * tiles, 348, "MUFU.EX2")]
    code = [*_filled(0, 50), *loop, _line(348, "LDG.E.128"), _line(349, "BRA", 50), *_filled(350, 450)]
    kernel = Kernel(tuple(code), 32, 0, 0, (Loop(16 * 50, 16 * 349),))
    meta = {"BLOCK_C": 4, "BLOCK_N": 1024}
    found = aot_facts.of_elements(kernel, Problem("dice_ce", 3), "forward", meta, 4)
    assert (found["loop_instructions"], found["loop_tiles"]) == (300, tiles)
    assert found["per_element"] == per_element
    assert found["per_element_chunk"] == chunk


def test_passes_over_the_classes_worked_by_hand() -> None:
    """200 classes in tiles of 64: 4 trips of each pass. 64 x 64 elements over 128 threads: 32 in a tile.

    An iteration over voxels is 20 + 4 x 50 + 4 x 70 = 500 instructions for 200 x 64 / 128 = 100 elements.
    """
    first = [*_filled(20, 37), *_filled(37, 68, "MUFU.EX2"), _line(68, "LDG.E.128"), _line(69, "BRA", 20)]
    second = [*_filled(70, 106), *_filled(106, 138, "MUFU.EX2"), _line(138, "LDG.E"), _line(139, "BRA", 70)]
    code = [*_filled(0, 10), *_filled(10, 20), *first, *second, *_filled(140, 149), _line(149, "BRA", 10)]
    loops = (Loop(160, 16 * 149), Loop(320, 16 * 69), Loop(16 * 70, 16 * 139))
    kernel = Kernel((*code, *_filled(150, 190)), 32, 0, 0, loops)
    meta = {"BLOCK_C": 64, "BLOCK_N": 64}
    found = aot_facts.of_elements(kernel, Problem("dice_ce", 200), "forward", meta, 4)
    assert found["per_element"] == 5.0
    # 4096 voxels are 64 iterations; 50 instructions stand outside.
    assert found["per_element_chunk"] == (64 * 500 + 50) / 6400


def test_trials_are_every_combination() -> None:
    assert aot.trials([]) == [()]
    assert aot.trials(["BLOCK_N=512/1024,num_warps=4", "ASM=false"]) == [
        (("BLOCK_N", 512), ("num_warps", 4)),
        (("BLOCK_N", 1024), ("num_warps", 4)),
        (("ASM", False),),
    ]
    with pytest.raises(SystemExit, match="got 'BLOCK_N', expected NAME=VALUE"):
        aot.trials(["BLOCK_N"])


def test_matrix_holds_every_gpu_class_count_dtype_layout_and_pass() -> None:
    options = aot._parse([])
    found = {
        (sm, p.classes, p.dtype, p.layout, op) for p, op, sm, _ in aot.tasks(options) if p.loss == "dice_ce"
    }
    asked = [
        (sm, classes, dtype, layout, op)
        for sm in (80, 90, 100, 120)
        for classes in (1, 2, 4, 14, 32, 117, 257)
        for dtype in ("float32", "bfloat16", "float16")
        for layout in ("contiguous", "channels_last")
        for op in OPS
    ]
    assert len(asked) == 336
    assert set(asked) <= found
    assert {p.loss for p, *_ in aot.tasks(options)} == set(LOSSES)
    assert any(op == "finish" for _, op, _, _ in aot.tasks(options))


def test_host_cost_is_held_against_the_empty_op() -> None:
    taken = {
        host_cost.OURS: [210.0, 190.0, 400.0, 200.0, 180.0],
        host_cost.MODULE: [300.0] * 5,
        host_cost.EMPTY: [99.0, 101.0, 100.0, 90.0, 300.0],
        host_cost.CUSTOM: [120.0] * 5,
    }
    options = argparse.Namespace(backend="triton", rounds=5, steps=1)
    result = host_cost.described(host_cost.summary(taken), "cpu", options)
    assert result["over"][host_cost.EMPTY] == 200.0 - 100.0
    assert result["over_of_minima"] == 180.0 - 90.0
    assert result["met"] and "difference 100 µs, limit 100 µs: met" in host_cost.line(result)
    taken[host_cost.EMPTY][2] = 99.5
    result = host_cost.described(host_cost.summary(taken), "cpu", options)
    assert not result["met"] and "MISSED" in host_cost.line(result)
    assert "without packing in C" in host_cost.line(result)
