"""bench/: meters that find known amounts, a schema that refuses, tables silent when in doubt."""

from __future__ import annotations

import copy
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import captured
from torch import Tensor

pytest.importorskip("monai")
jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("tabulate")

ROOT = Path(__file__).resolve().parents[2]
# Last, so that an installed dicekernels is not hidden by the sources beside bench.
sys.path.append(str(ROOT))

import dicekernels  # noqa: E402
from bench import measure, peers, report, run, schema  # noqa: E402
from bench.cases import SUITES, Case  # noqa: E402
from dicekernels import dispatch  # noqa: E402

LINUX = sys.platform == "linux"
GLIBC = platform.libc_ver()[0] == "glibc"
SMALL = (2, 3, 5, 6, 7)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # 2 * 96^3 = 1769472 voxels of 3 * 4 * 4 + 2 * 1 = 50 bytes
        (Case("dice_ce", (2, 4, 96, 96, 96)), 88_473_600),
        # 64^3 = 262144 voxels of 3 * 117 * 4 + 2 = 1406 bytes
        (Case("gdl", (1, 117, 64, 64, 64)), 368_574_464),
        # 30 voxels of 3 * 14 * 2 + 2 * 8 = 100 bytes
        (Case("dice", (1, 14, 2, 3, 5), "bfloat16", "int64"), 3_000),
    ],
)
def test_floor_bytes(case: Case, expected: int) -> None:
    assert case.floor_bytes == expected


def test_case_names_tell_the_cases_of_a_suite_apart() -> None:
    for suite in SUITES.values():
        assert len({case.name for case in suite.cases}) == len(suite.cases)


def test_tensors_are_the_same_every_time_and_as_described() -> None:
    case = Case("dice", (2, 3, 9, 17, 4), "bfloat16", "int16", "channels_last")
    logits, labels = case.tensors("cpu")
    again, labels_again = case.tensors("cpu")
    assert torch.equal(logits, again) and torch.equal(labels, labels_again)
    assert logits.dtype == torch.bfloat16 and logits.is_leaf and logits.requires_grad
    assert logits.stride() == (9 * 17 * 4 * 3, 1, 17 * 4 * 3, 4 * 3, 3)
    assert labels.dtype == torch.int16 and labels.shape == (2, 1, 9, 17, 4)
    assert labels.unique().tolist() == [0, 1, 2]
    assert torch.equal(labels[..., :8, :8, :], labels[..., :1, :1, :1].expand(2, 1, 8, 8, 4))


def test_interleave_takes_turns_and_settles_before_each_sample() -> None:
    calls: list[str] = []

    def step(name: str) -> measure.Step:
        return measure.Step(lambda: calls.append(name + ">"), lambda _: calls.append(name + "<"))

    samples = measure.interleave(
        {"a": step("a"), "b": step("b")}, rounds=2, warm_up=1, settle=1, flush=lambda: calls.append("flush")
    )
    warm_up = ["a>", "a<", "b>", "b<"]
    one_round = ["a>", "a<", "flush", "a>", "flush", "a<", "b>", "b<", "flush", "b>", "flush", "b<"]
    assert calls == warm_up + 2 * one_round
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 2, "b": 2}


def test_interleave_gives_each_half_its_own_time() -> None:
    slow_forward = measure.Step(lambda: time.sleep(0.02), lambda _: None)
    slow_backward = measure.Step(lambda: None, lambda _: time.sleep(0.02))
    samples = measure.interleave({"f": slow_forward, "b": slow_backward}, rounds=3, warm_up=0)
    assert all(s.forward >= 20 and s.backward < s.forward for s in samples["f"])
    assert all(s.backward >= 20 and s.forward < s.backward for s in samples["b"])
    assert all(s.both == s.forward + s.backward for taken in samples.values() for s in taken)


def test_summarise() -> None:
    # quartiles of 1 2 3 4 100 at positions 1, 2, 3 of 0..4
    assert measure.summarise([100.0, 1.0, 3.0, 2.0, 4.0]) == measure.Stats(3.0, 1.0, 2.0)
    assert measure.summarise([5.0]) == measure.Stats(5.0, 5.0, 0.0)


def test_profiled_memory_counts_known_allocations() -> None:
    def forward() -> Tensor:
        temporary = torch.empty(1_000_000, dtype=torch.uint8)
        kept = torch.empty(300_000, dtype=torch.uint8)
        del temporary
        return kept

    def backward(kept: Tensor) -> Tensor:
        gradient = torch.empty(500_000, dtype=torch.uint8)
        for _ in range(3):
            torch.empty(70_000, dtype=torch.uint8)
        return gradient

    memory = measure.profiled_memory(forward, backward)
    assert memory == measure.Memory(1_300_000, 300_000, 570_000)
    assert memory.peak == 1_300_000
    assert measure.Memory(100, 60, 50).peak == 110


def test_profiled_memory_of_monai_is_three_kept_and_five_at_the_peak() -> None:
    case = Case("dice_ce", (1, 4, 32, 32, 32))
    logits, labels = case.tensors("cpu")
    step = run.loss_step(peers.monai_loss(case), logits, labels)
    step.backward(step.forward())
    memory = measure.profiled_memory(step.forward, step.backward)
    # softmax, one-hot, log-softmax; and the labels as int64, 8 bytes to a voxel's 16 of logits
    assert memory.kept / case.logits_bytes == pytest.approx(3.5, abs=0.01)
    assert memory.peak / case.logits_bytes == pytest.approx(5.0, abs=0.01)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_subprocess_resident_finds_known_blocks() -> None:
    million = 1_000_000
    setup = "import torch\nbefore = torch.ones(30_000_000, dtype=torch.uint8)"
    code = (
        "temporary = torch.ones(50_000_000, dtype=torch.uint8)\n"
        "del temporary\n"
        "kept = torch.ones(20_000_000, dtype=torch.uint8)"
    )
    resident = measure.subprocess_resident(code, setup, threads=1)
    assert resident.peak == pytest.approx(50 * million, abs=million)
    assert resident.kept == pytest.approx(20 * million, abs=million)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_subprocess_peak_is_not_its_parents() -> None:
    # ru_maxrss of a child starts at the peak of the process that started it.
    ballast = torch.ones(400_000_000, dtype=torch.uint8)
    assert measure.subprocess_peak("pass") < 1_000_000
    assert ballast[-1] == 1
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measure.subprocess_peak("1 / 0")


@pytest.mark.skipif(not GLIBC, reason="the thresholds are glibc's")
@pytest.mark.parametrize("allocator", ["raised", "default"])
def test_allocator_modes_do_what_they_say(allocator: str) -> None:
    """Fresh 40 MB blocks fault for each page by default, and not at all with raised thresholds."""
    size = 40_000_000
    code = (
        f"import torch; from bench import measure; measure.fill_heap(4 * {size})\n"
        f"block = lambda *_: torch.empty({size}, dtype=torch.uint8).fill_(1)\n"
        "samples = measure.interleave({'': measure.Step(block, block)}, rounds=5)['']\n"
        "print(measure.summarise([float(s.minor_faults) for s in samples]).median)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = captured(
        [sys.executable, "-c", code],
        env=environment | measure.ALLOCATORS[allocator] | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=True,
    )
    pages = 2 * size / 4096
    share = float(done.stdout) / pages
    assert share < 0.01 if allocator == "raised" else share > 0.9


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Output and result folder of ``gpu.sh --dry-run``."""
    out = tmp_path_factory.mktemp("results")
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable}
    environment.pop("DICEKERNELS_WHEEL", None)
    done = captured(["bash", str(ROOT / "bench" / "gpu.sh"), "--dry-run", "--no-compiled"], env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


@pytest.fixture(scope="module")
def document(dry_run: tuple[str, Path]) -> schema.Document:
    (path,) = dry_run[1].glob("quick--cpu-*.json")
    return schema.load(path)


def test_gpu_dry_run_prints_the_commands_in_order(dry_run: tuple[str, Path]) -> None:
    output, out = dry_run
    commands = [line for line in output.splitlines() if line.startswith("+ ")]
    contract = "-p on_device -m not slow tests/ops/test_sums.py tests/ops/test_finish.py"
    parts = ["-DDICEKERNELS_BUILD=cuda -DDICEKERNELS_ARCH_LIST=9.0", "--target dicekernels_cuda"]
    parts += ["-m dicekernels.env", "tests/backends/test_cuda.py tests/backends/test_cuda_graphs.py -k not"]
    parts += ["-m bench.gpu.prebuild --suite gpu"]
    parts += [f"-m bench.run --suite gpu --out {out} --budget 170 --no-compiled"]
    parts += ["tests/backends/test_cuda_kernels.py tests/backends/test_cuda_kernels_launch.py"]
    parts += [f"DICEKERNELS_BACKEND={name} .*{contract}" for name in ("cuda", "triton", "eager")]
    parts += ["tests/backends/test_triton_finish.py", "-m bench.gpu.sanitize --backends cuda triton"]
    parts += ["-m bench.host_cost", "--suite gpu_peers"]
    places = [[re.search(part, line) is not None for line in commands].index(True) for part in parts]
    assert places == sorted(set(places))
    assert "-m bench.gpu.tune" not in "".join(commands)
    assert "13 problems ran" in output
    assert "Time, forward + backward" in output
    assert re.search(r"triton in the interpreter: loss (\S+), eager \1;", output)
    assert (out / "gpu.log").read_text() == output
    (tuned,) = out.glob("tune-triton--*.json")
    entries = json.loads(tuned.read_text())["problems"]
    refused = {entry["direction"]: [row["refused"] for row in entry["tiles"]] for entry in entries}
    assert refused == {"forward": ["", ""], "backward": ["", ""]}


def test_a_real_result_is_complete(document: schema.Document) -> None:
    asked = {(case.name, mode) for case in SUITES["quick"].cases for mode in measure.ALLOCATORS}
    by_problem: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in document["timings"]:
        by_problem.setdefault((report.name_of(row), row["allocator"]), []).append(row)
    assert set(by_problem) == asked
    for rows in by_problem.values():
        assert [row["role"] for row in rows] == ["ours", "eager", "floor"]
        for row in rows:
            assert row["role"] == "floor" or row["check"]["passed"], row["check"]
    assert {report.name_of(row) for row in document["memory"]} == {name for name, _ in asked}


GONE = object()
FORMS: dict[str, tuple[Any, ...]] = {
    "no commit": ("commit", GONE),
    "no threads": ("threads", GONE),
    "other version": ("schema", 99),
    "short commit": ("commit", "abc123"),
    "vague date": ("date", "yesterday"),
    "unknown key": ("surprise", 1),
    "no allocator": ("allocators", {}),
    "no timings": ("timings", []),
    "negative time": ("timings", 0, "milliseconds", "both", "median", -1.0),
    "time in words": ("timings", 0, "milliseconds", "forward", "min", "fast"),
    "unknown role": ("timings", 0, "role", "umpire"),
    "no profile": ("memory", 0, "profiled", None),
}
CONTRADICTIONS: dict[str, tuple[Any, ...]] = {
    "error beside times": ("timings", 0, "error", "out of memory"),
    "neither error nor times": ("timings", 0, "milliseconds", None),
    "times without a check": ("timings", 0, "check", None),
    "allocator unexplained": ("allocators", {"default": {}}),
}


@pytest.mark.parametrize("damage", [*FORMS, *CONTRADICTIONS])
def test_schema_rejects(document: schema.Document, damage: str) -> None:
    *path, key, value = (FORMS | CONTRADICTIONS)[damage]
    broken: Any = copy.deepcopy(document)
    place = broken
    for step in path:
        place = place[step]
    place[key] = value
    if value is GONE:
        del place[key]
    with pytest.raises(jsonschema.ValidationError if damage in FORMS else ValueError):
        schema.validate(broken)


def test_file_name_is_suite_and_device(document: schema.Document, tmp_path: Path) -> None:
    named = document | {"device": {"type": "cuda", "name": "NVIDIA H200 (SXM)"}}
    assert schema.save(named, tmp_path).name == "quick--cuda-nvidia-h200-sxm.json"
    forced = named | {"backend": "triton"}
    assert schema.save(forced, tmp_path).name == "quick--cuda-nvidia-h200-sxm--triton.json"
    part = forced | {"cases": "gdl.*14"}
    assert schema.save(part, tmp_path).name == "quick--cuda-nvidia-h200-sxm--triton--gdl-14.json"
    assert schema.load(tmp_path / "quick--cuda-nvidia-h200-sxm.json") == named


def test_rows_are_packed_into_lines(tmp_path: Path) -> None:
    rows = [{"a": {"b": 1 / 3, "c": 1}, "d": [1]}, {"a": None, "d": "x"}, {"d": "y"}]
    packed = schema.pack(rows, ["a.b", "d"])
    assert packed == [["a.b", "d"], [0.33333333, [1]], [None, "x"], [None, "y"]]
    schema.write({"rows": packed, "none": schema.pack([], ["a"]), "x": [1]}, tmp_path / "new" / "file.json")
    assert (tmp_path / "new" / "file.json").read_text().splitlines()[2:4] == [
        '  ["a.b","d"],',
        "  [0.33333333,[1]],",
    ]
    first, *others = schema.read(tmp_path / "new" / "file.json")["rows"]
    assert first == {"a": {"b": 0.33333333}, "d": [1]}
    assert others == [{"a": None, "d": "x"}, {"a": None, "d": "y"}]


def test_result_files_are_small_and_have_a_line_a_row(tmp_path: Path) -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "bench" / "results").glob("*.json")}
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    assert len(sizes) >= 4
    assert max(sizes.values()) <= 60 << 10 and sum(sizes.values()) <= 600 << 10, sizes
    for name, text in texts.items():
        schema.write(json.loads(text), tmp_path / name)
        assert (tmp_path / name).read_text() == text, name


def _row(name: str, role: str, both: float, passed: bool = True) -> dict[str, Any]:
    case = Case("dice_ce", (1, 4, 10, 10, 10))
    row = run._timing_row(case, "default", name, role, case.floor_bytes)
    stats = {"median": both, "min": both, "iqr": 0.0}
    row["milliseconds"] = {"forward": stats, "backward": stats, "both": stats}
    if role != "floor":
        reason = "" if passed else "loss is off by a mile"
        row["check"] = {"passed": passed, "reason": reason}
        row["check"] |= {"value_error": 0.0, "gradient_error": 0.0}
    return row


def _rendered(document: schema.Document, *rows: dict[str, Any]) -> str:
    return report.render(document | {"timings": [*rows], "memory": []})


def test_ratios_wins_and_losses(document: schema.Document) -> None:
    rows = [
        _row("ours", "ours", 2.0),
        _row("MONAI", "eager", 16.0),
        _row("slow compile", "compiled", 8.0),
        _row("good compile", "compiled", 1.0),
        _row("floor", "floor", 0.8),
    ]
    text = _rendered(document, *rows)
    summary = text[text.index("in one line per case") :]
    assert "2.50x" in summary and "8.00x faster" in summary
    assert re.search(r"2\.00x slower\s+good compile", summary)


def test_no_ratio_for_a_peer_that_is_wrong(document: schema.Document) -> None:
    rows = [
        _row("ours", "ours", 2.0),
        _row("MONAI", "eager", 16.0, passed=False),
        _row("wrong compile", "compiled", 1.0, passed=False),
        _row("compile", "compiled", 6.0),
        _row("floor", "floor", 0.8),
    ]
    text = _rendered(document, *rows)
    assert text.count("WRONG") == 2 and "MONAI: loss is off by a mile" in text
    assert "8.00x" not in text and "2.00x slower" not in text
    assert re.search(r"3\.00x faster\s+compile", text)


def test_no_ratio_at_all_when_ours_is_wrong(document: schema.Document) -> None:
    rows = [
        _row("ours", "ours", 2.0, passed=False),
        _row("MONAI", "eager", 16.0),
        _row("compile", "compiled", 6.0),
        _row("floor", "floor", 0.8),
    ]
    text = _rendered(document, *rows)
    assert "WRONG" in text and "faster" not in text and "slower" not in text
    assert "2.50x" not in text


def test_a_peer_that_did_not_run_has_a_reason_and_no_ratio(document: schema.Document) -> None:
    broken = _row("compile", "compiled", 6.0)
    broken |= {"error": "RuntimeError: no compiler", "milliseconds": None, "check": None}
    rows = [_row("ours", "ours", 2.0), _row("MONAI", "eager", 4.0), broken]
    text = _rendered(document, *rows, _row("floor", "floor", 0.8))
    assert "did not run" in text and "RuntimeError: no compiler" in text and "3.00x" not in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", peers.CLASSES)
def test_checker_passes_honest_and_refuses_wrong_results(loss: str, dtype: str) -> None:
    case = Case(loss, SMALL, dtype)
    logits, labels = case.tensors("cpu")
    checker = peers.Checker(case, logits, labels)
    honest = peers.monai_loss(case)
    assert checker.check(honest).passed
    scaled = checker.check(lambda z, y: 1.001 * honest(z, y))
    assert not scaled.passed and scaled.reason.startswith("loss")
    assert scaled.gradient_error == pytest.approx(0.001, rel=0.5) or dtype == "bfloat16"

    def wrong_gradient_alone(z: Tensor, y: Tensor) -> Tensor:
        wrong = 1.1 * honest(z, y)
        return wrong - 0.1 * honest(z, y).detach()

    refused = checker.check(wrong_gradient_alone)
    assert not refused.passed and refused.reason.startswith("gradient")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", peers.CLASSES)
def test_closed_forms_are_right(loss: str, dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler, whose work each run of the suites checks on its own problems."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    # the last class is absent from the second sample: an infinite weight in generalized Dice
    case = Case(loss, (2, 6, 9, 17, 10), dtype, layout=layout)
    logits, labels = case.tensors("cpu")
    labels[1][labels[1] == 5] = 2
    checker = peers.Checker(case, logits, labels)
    compiled = [c for c in peers.contenders(case, [], compiled=True) if c.role == "compiled"]
    assert len(compiled) == 4
    for contender in compiled:
        result = checker.check(contender.loss)
        assert result.passed, f"{contender.name}: {result.reason}"
        value = contender.loss(logits, labels)
        (gradient,) = torch.autograd.grad(value, logits)
        if contender.name == "closed form, unrolled":
            assert gradient.stride() == logits.stride()


def test_backend_is_named_before_anything_runs() -> None:
    if dispatch.BACKENDS["cpu"].available():
        pytest.skip("the CPU library was not built")
    auto = run._parse(["--suite=cpu"])
    assert re.fullmatch(r"backend: cpu \((AVX-512|AVX2|baseline)\)", run.announced(auto))
    assert run.announced(run._parse(["--suite=cpu", "--backend=cpu,eager"])) == "backends: cpu, eager"


def test_auto_that_fell_to_eager_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._unavailable, "cpu", "the library is not built")
    options = ["--suite=cpu", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match=r"'auto' is the eager one here \(cpu: the library is not built\)"):
        run.main(options)
    assert list(tmp_path.iterdir()) == []
    assert run.announced(run._parse([*options, "--backend=eager"])) == "backends: eager"
    with dicekernels.use_backend("eager"):
        assert run.announced(run._parse(options)) == "backend: eager (as asked for)"


def test_package_does_not_know_its_benchmarks() -> None:
    for source in (ROOT / "dicekernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) bench\b", source.read_text(), re.M), source
