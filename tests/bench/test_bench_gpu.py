"""bench/ for a GPU, without one: the clock, shares of the copy bandwidth, saving in time, tiles to try."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import captured

pytest.importorskip("monai")
jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("tabulate")

ROOT = Path(__file__).resolve().parents[2]
# Last, so that an installed dicekernels is not hidden by the sources beside bench.
sys.path.append(str(ROOT))

import dicekernels  # noqa: E402
from bench import measure, peers, report, run, schema  # noqa: E402
from bench.cases import SUITES, Case  # noqa: E402
from bench.gpu import prebuild, sanitize, tune  # noqa: E402
from dicekernels.spec import Activation  # noqa: E402


def test_a_gpus_clock_leads_with_work_and_flushes_before_each_half(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            self.at = len(calls)
            calls.append("event")

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("lead"), raising=False)
    step = measure.Step(lambda: calls.append("forward"), lambda _: calls.append("backward"))
    samples = measure.interleave(
        {"a": step}, 1, "cuda", warm_up=0, settle=0, flush=lambda: calls.append("flush")
    )
    half = ["flush", "lead", "event", "{}", "event"]
    expected = [call.format(name) for name in ("forward", "backward") for call in half]
    assert calls == ["wait", *expected, "wait"]
    assert samples["a"] == [measure.Sample(2.0, 2.0, 0)]


def on_a_gpu(*rows: dict[str, Any]) -> schema.Document:
    """A document of a GPU whose copy runs at 4000 GB/s; three launches take 5 µs."""
    document = schema.describe("gpu", "", "cpu", "triton", threads=1, rounds=3)
    document["allocators"] = {"default": {}}
    copy = {"bytes": 1 << 32, "gb_per_s": 4000.0, "best_gb_per_s": 4100.0}
    ceiling = {"copy": copy, "empty_launches": {"count": 3, "milliseconds": 0.005}}
    device = {"type": "cuda", "name": "NVIDIA H200"}
    return document | {"timings": [*rows], "memory": [], "ceiling": ceiling, "device": device}


def timed(
    case: Case, forward: float, backward: float, role: str = "ours", passed: bool = True
) -> dict[str, Any]:
    row = run._timing_row(case, "default", role, role, case.floor_bytes)
    if role != "floor":
        row["check"] = {"passed": passed, "reason": "", "value_error": 0.0, "gradient_error": 0.0}
    parts = {"forward": forward, "backward": backward, "both": forward + backward}
    row["milliseconds"] = {name: {"median": t, "min": t, "iqr": 0.0} for name, t in parts.items()}
    return row


def test_shares_of_the_copy_bandwidth() -> None:
    # 10^8 voxels of 4 classes: forward 1.7e9 bytes, backward 3.3e9; 0.425 and 0.825 ms at 4000 GB/s
    big = Case("dice_ce", (1, 4, 1000, 1000, 100))
    half = Case("gdl", (1, 14, 1000, 1000, 100), "bfloat16")  # 2.9e9 and 5.7e9 bytes
    plain = Case("dice_ce", (1, 4, 1000, 1000, 100), "bfloat16")
    small = Case("dice_ce", (1, 4, 64, 64, 64))  # 262144 voxels of 50 bytes: 3.2768 µs; and 5, and a fifth
    rows = [
        timed(big, 0.5, 0.9),
        timed(big, 0.5, 1.0),
        timed(half, 1.45, 1.9),
        timed(plain, 9.0, 9.0),
        timed(small, 0.004, 0.0059),
        timed(small, 0.004, 0.0060),
        timed(big, 0.1, 0.1, passed=False),
    ]
    full = on_a_gpu(*rows)
    schema.validate(full)
    cells = [line[2:] for line in report.share_lines(full)]
    assert cells[0] == ["1250.0", "500.0", "85%", "900.0", "92%", "1400.0", "89%", ">= 85%", "met"]
    assert cells[1][-3:] == ["83%", ">= 85%", "MISSED"]
    assert cells[2] == ["2150.0", "1450.0", "50%", "1900.0", "75%", "3350.0", "64%", ">= 60%", "met"]
    assert len(cells[3]) == 7  # no goal
    assert cells[4][-2:] == ["<= 9.9 µs", "met"]
    assert cells[5][-2:] == ["<= 9.9 µs", "MISSED"]
    assert len(cells[6]) == 7 and report.share_lines(full)[6][1] == "WRONG"


def test_a_document_that_was_cut_off_says_so() -> None:
    rows = [timed(Case("dice_ce", (1, 4, 9, 9, 9)), 1.0, 2.0, role) for role in ("ours", "eager", "floor")]
    full = on_a_gpu(*rows)
    assert "4000 GB/s" in report.render(full) and "NOT ALL CASES" not in report.render(full)
    assert "NOT ALL CASES" in report.render(full | {"finished": False})
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(full | {"ceiling": {"copy": full["ceiling"]["copy"]}})


def test_a_gpu_saves_after_each_case_and_stops_when_time_is_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measure, "copy_bandwidth", lambda: {"bytes": 1 << 32, "gb_per_s": 1.0, "best_gb_per_s": 1.0}
    )
    monkeypatch.setattr(measure, "empty_launches", lambda count: 0.005)
    saved: list[tuple[int, bool]] = []
    plain = schema.save

    def save(document: schema.Document, folder: Path) -> Path:
        saved.append((len(document["timings"]), document["finished"]))
        return plain(document, folder)

    monkeypatch.setattr(schema, "save", save)
    for more, expected in (
        ([], [(3, False), (6, False), (6, True)]),
        (["--budget=0"], [(3, False), (3, False)]),
    ):
        saved.clear()
        options = run._parse(["--suite=quick", "--rounds=1", "--memory=none", f"--out={tmp_path}", *more])
        options.allocators = ["default"]
        document = schema.describe(**{key: getattr(options, key) for key in schema.ASKED})
        path = run._run_on_gpu(options, document | {"memory": []})
        assert saved == expected
        assert schema.load(path)["finished"] == expected[-1][1]


TRAINED = ("dice_ce", "gdl", "tversky", "dice_focal")


def test_the_gpu_suites_fill_a_gpu_and_start_with_what_has_a_goal() -> None:
    cases = SUITES["gpu"].cases
    filling = [case for case in cases if case.shape[2:] == (128, 128, 128)]
    assert all(case.floor_bytes >= 200e-6 * 4.3e12 for case in filling)
    asked = set(
        itertools.product(
            TRAINED, (2, 4, 14, 32, 117), ("float32", "bfloat16"), ("contiguous", "channels_last")
        )
    )
    measured = {(c.loss, c.shape[1], c.dtype, c.layout) for c in filling if c.label_dtype == "uint8"}
    assert asked <= measured
    has_goal = [report.goal(case) is not None for case in filling]
    assert has_goal == sorted(has_goal, reverse=True) and sum(has_goal) == 21


def test_both_backends_of_a_gpu_compete() -> None:
    case = SUITES["gpu"].cases[0]
    for name, eager in (("gpu", []), ("gpu_peers", ["MONAI"])):
        suite = SUITES[name]
        found = peers.contenders(case, suite.backends, False, suite.monai)
        assert [c.name for c in found] == ["dicekernels (cuda)", "dicekernels (triton)", *eager]
        assert [c.backend for c in found] == ["cuda", "triton", *[None] * len(eager)]
    (chosen, _) = peers.contenders(case, SUITES["cpu"].backends, False)
    assert (chosen.name, chosen.backend) == ("dicekernels", None)


def of(backend: str, row: dict[str, Any]) -> dict[str, Any]:
    return row | {"backend": backend, "contender": f"dicekernels ({backend})"}


def test_two_backends_beside_each_other() -> None:
    case, other = (Case("dice_ce", (1, classes, 9, 9, 9)) for classes in (4, 5))
    floor = timed(case, 0.1, 0.1, "floor")
    rows = [of("cuda", timed(case, 1.0, 2.09)), of("triton", timed(case, 2.0, 1.0)), floor]
    rows += [of("cuda", timed(other, 1.0, 2.10)), of("triton", timed(other, 2.0, 1.0)), floor]
    rows[-1] = timed(other, 0.1, 0.1, "floor")
    full = on_a_gpu(*rows)
    full |= {"backend": "auto", "backends": {"cuda": "", "triton": ""}}
    schema.validate(full)
    first, second = (line[1:] for line in report.beside_lines(full))
    assert first == ["cuda / triton", "1000.0", "0.500", "2090.0", "2.090", "3090.0", "1.030", "met"]
    assert second[-3:] == ["3100.0", "1.033", "MISSED"]
    text = report.render(full)
    assert "cuda and triton" in text and "should take <= 1.03" in text
    assert f"{case.name}, triton" in text  # the shares of each
    full["timings"][1] = of("triton", timed(case, 2.0, 1.0, passed=False))
    assert report.beside_lines(full)[0][1:] == ["cuda / triton", *[""] * 6, "-"]


def test_what_a_backend_that_did_not_run_leaves() -> None:
    case = Case("dice_ce", (1, 4, 9, 9, 9))
    broken = of("cuda", timed(case, 1.0, 1.0)) | {"milliseconds": None, "check": None, "error": "no code"}
    rows = [broken, of("triton", timed(case, 2.0, 2.0)), timed(case, 1.0, 1.0, "floor")]
    full = on_a_gpu(*rows) | {"backends": {"cuda": "", "triton": ""}}
    text = report.render(full)
    assert "did not run" in text and "no code" in text and "2.00x" in text
    absent = on_a_gpu(*rows[1:]) | {"backends": {"cuda": "no nvcc here", "triton": ""}}
    assert "NOT MEASURED: backend cuda: no nvcc here" in report.render(absent)


def test_two_backends_are_measured_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "cpu" not in dicekernels.available_backends():
        pytest.skip(dicekernels.unavailable_backends()["cpu"])
    options = ["--suite=quick", "--cases=gdl", "--rounds=1", "--memory=none", "--allocators=default"]
    run.main([*options, "--backend=cpu,eager", f"--out={tmp_path}"])
    (path,) = tmp_path.glob("quick--cpu-*--cpu-eager--gdl.json")
    document = schema.load(path)
    assert document["backends"] == {"cpu": "", "eager": ""}
    names = [row["contender"] for row in document["timings"]]
    assert names[:3] == ["dicekernels (cpu)", "dicekernels (eager)", "MONAI"]
    assert [row.get("backend") for row in document["timings"]] == ["cpu", "eager", None, None]
    assert "cpu / eager" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--backend: got 'cuda', which cannot run here"):
        run.usable_backends(run._parse([*options, "--backend=cuda,eager"]))


def test_the_sanitizer_takes_one_backend_after_the_other() -> None:
    tools = ["memcheck", "racecheck", "initcheck"]
    expected = [(tool, name) for name in ("cuda", "triton") for tool in tools]
    expected += [("synccheck", name) for name in ("cuda", "triton")]
    assert sanitize.in_order([*tools, "synccheck"], ["cuda", "triton"]) == expected
    assert {problem.loss for problem in sanitize.PROBLEMS} == {*TRAINED, "values", "soft values"}


def test_prebuilt_problems_are_those_of_the_suite() -> None:
    case = SUITES["gpu"].cases[0]
    problem = prebuild.problem_of(case)
    assert problem is not None
    logits, target, mask = problem.tensors()
    assert (tuple(logits.shape), logits.dtype, mask) == (case.shape, torch.float32, None)
    assert (target.shape[0], target.dtype) == (case.shape[0], torch.uint8)
    assert prebuild.problem_of(Case("gdl_focal", (1, 4, 5, 6, 7))) is None
    focal = prebuild.problem_of(Case("dice_focal", (1, 4, 5, 6, 7)))
    assert focal is not None and focal.spec.sums.activation == Activation.SOFTMAX


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [2, 4, 14, 117])
def test_candidates_begin_with_the_table_and_differ(classes: int, layout: str) -> None:
    pytest.importorskip("triton")
    for dtype in ("float32", "bfloat16"):
        problem = tune.Problem("dice_ce", classes, dtype, layout)
        for direction in tune.DIRECTIONS:
            tile = tune.table_tile(problem, direction)
            found = tune.candidates(tile, problem.itemsize)
            assert found[0] == tile and len(found) > 3
            assert len({(entry.shape, entry.warps) for entry in found}) == len(found)
            launches = [tune.planned(problem, direction, entry) for entry in found]
            assert [launch.meta["SHAPE"] for launch in launches] == [entry.shape for entry in found]
            assert [launch.meta["num_warps"] for launch in launches] == [entry.warps for entry in found]


def test_tuning_refuses_a_result_that_differs() -> None:
    truth = torch.ones(100)
    assert tune.error_of(truth * (1 + 2**-20), truth) == pytest.approx(2**-20)
    assert tune.error_of(truth.index_fill(0, torch.tensor([3]), float("nan")), truth) == float("inf")


def test_gpu_script_refuses_unknown_stages() -> None:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--dry-run", "--only", "bench,test"]
    done = captured(command)
    assert done.returncode == 2 and "--only: got test, expected some of build, check, bench" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_suite_without_a_gpu_says_so() -> None:
    with pytest.raises(SystemExit, match="'gpu' needs a CUDA device.*sees none here"):
        run.main(["--suite", "gpu"])
