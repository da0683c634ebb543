"""Which backend runs, how one is forced, and what ``explain`` tells about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import make_labels, make_logits, make_values
from processes import captured

import dicekernels
from dicekernels import (
    available_backends,
    dispatch,
    explain,
    functional,
    region_sums,
    unavailable_backends,
    use_backend,
)
from dicekernels.backends.triton import support as triton_support

HOT = {"to_onehot_y": True, "softmax": True}
LOGITS, LABELS = make_logits((2, 3, 4, 5, 6)), make_labels((2, 1, 4, 5, 6), 3)
ROOT = Path(__file__).parents[2]


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter; ``environment`` is added to this one's, "" removes a name."""
    inherited = {key: value for key, value in os.environ.items() if key not in environment}
    added = {key: value for key, value in environment.items() if value}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return captured(
        [sys.executable, "-c", code],
        env=inherited | added | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def lines_of(loss=None, logits=None, labels=LABELS):
    logits = LOGITS.clone().requires_grad_() if logits is None else logits
    return explain(loss or dicekernels.DiceCELoss(**HOT), logits, labels).splitlines()[1:]


def test_every_backend_can_run_or_has_a_reason_and_these_two_run_here(monkeypatch):
    monkeypatch.setitem(dispatch._unavailable, "cuda", "")
    monkeypatch.setitem(dispatch._unavailable, "triton", "no GPU")
    assert available_backends() == ("cuda", "cpu", "eager")
    assert unavailable_backends() == {"triton": "no GPU"}
    monkeypatch.undo()
    reasons = unavailable_backends()
    assert reasons.get("triton", "") == triton_support.unavailable()
    assert reasons.pop("cuda")  # a build of torch without CUDA, or the reason why it cannot run
    assert [name for name in available_backends() if name not in ("cuda", "triton")] == ["cpu", "eager"]
    assert reasons == {name: dispatch._unavailable[name] for name in reasons}
    unavailable_backends()["cpu"] = "a copy"
    assert "cpu" in available_backends()


def test_the_binary_comes_first():
    assert dispatch.choose(LOGITS).name == "cpu"
    refusals = dispatch.refusals(LOGITS)
    assert list(refusals) == ["cuda", "cpu", "triton", "eager"]
    assert refusals["cpu"] == refusals["eager"] == ""
    assert refusals["cuda"] and refusals["triton"]  # no GPU, or logits that are not on it
    with use_backend("eager"):
        assert dispatch.choose(LOGITS).name == "eager"
        with use_backend("cpu"):
            assert dispatch.forced_backend() == "cpu"
        assert dispatch.forced_backend() == "eager"
    assert dispatch.forced_backend() is None


def test_a_backend_is_released_after_an_error():
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert dispatch.forced_backend() is None


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (torch.empty(1, 3, 9, device="meta"), "the logits are on meta, it takes tensors on cpu"),
        (torch.zeros(1, 4097, 1), "the logits have 4097 classes, it takes up to 4096"),
        (
            torch.zeros(1, 3, 9, dtype=torch.float8_e4m3fn),
            "the logits are torch.float8_e4m3fn, it takes float32, float16, bfloat16 and float64",
        ),
    ],
)
def test_refusals_have_reasons_and_eager_takes_over(logits, reason):
    refusals = dispatch.refusals(logits)
    assert (refusals["cpu"], refusals["eager"]) == (reason, "")
    assert dispatch.choose(logits).name == "eager"
    with use_backend("cpu"), pytest.raises(RuntimeError) as error:
        dispatch.choose(logits)
    assert str(error.value) == f"backend 'cpu' was forced, but {reason}"


def test_more_classes_than_the_binary_takes_give_the_same_loss():
    logits, labels = make_logits((1, 4097, 3)), make_labels((1, 1, 3), 4097, torch.int32)
    whole = region_sums(logits, labels)
    fewer = region_sums(logits[:, :4096].contiguous(), labels.clamp(max=4095))
    assert (whole.N.shape, fewer.N.shape) == ((1, 4097), (1, 4096))
    p = logits.double().softmax(1)
    hits = p.gather(1, labels.long()).sum()
    assert abs(whole.I.sum() - hits) <= 8 * torch.finfo(torch.float32).eps * hits


def test_an_unknown_name_lists_the_known_ones():
    with (
        pytest.raises(
            ValueError, match=r"backend: got 'gpu', expected one of \['cpu', 'cuda', 'eager', 'triton'\]"
        ),
        use_backend("gpu"),
    ):
        pass


def test_both_backends_give_one_loss():
    losses = []
    for name in ("cpu", "eager"):
        with use_backend(name):
            losses.append(dicekernels.DiceCELoss(**HOT)(LOGITS, LABELS).item())
    assert abs(losses[0] - losses[1]) <= 8 * torch.finfo(torch.float32).eps * losses[0]


FORCED = "from dicekernels import dispatch; print(dispatch.forced_backend())"


@pytest.mark.parametrize(("value", "expected"), [("eager", "eager"), ("cpu", "cpu"), ("", "None")])
def test_the_environment_forces_a_backend(value, expected):
    done = child(FORCED, DICEKERNELS_BACKEND=value)
    assert done.stdout.strip() == expected, done.stderr


def test_an_unknown_name_in_the_environment_is_an_error():
    done = child(FORCED, DICEKERNELS_BACKEND="gpu")
    assert done.returncode
    assert "ValueError: backend: got 'gpu', expected one of ['cpu', 'cuda', 'eager', 'triton']" in done.stderr


def test_without_the_binary_eager_runs_and_the_first_cause_is_kept(tmp_path):
    code = """
import torch, dicekernels
from dicekernels import DiceLoss, explain, unavailable_backends, use_backend
loss = DiceLoss(to_onehot_y=True, softmax=True)
print(explain(loss, torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)))
print("reason:", unavailable_backends()["cpu"])
try:
    with use_backend("cpu"): pass
except RuntimeError as error:
    print("forced:", error)
"""
    done = child(code, DICEKERNELS_LIBRARY_PATH=str(tmp_path), DICEKERNELS_BACKEND="")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    cause = f"{tmp_path}/libdicekernels_cpu.so not found (DICEKERNELS_LIBRARY_PATH points there)"
    assert lines[0] == "backend: eager"
    assert lines[1].startswith("  not cuda: ")
    assert lines[2].startswith(f"  not cpu: {cause}")
    assert lines[-2].startswith(f"reason: {cause}")
    assert lines[-1].startswith(f"forced: backend 'cpu' is not available: {cause}")


def test_explain_names_backend_sums_and_memory():
    lines = lines_of()
    assert lines[0] == "backend: cpu"
    assert lines.pop(1).startswith("  not cuda: ")
    assert lines[1].startswith("  not triton: ")
    assert lines[2] == "  not eager: not the first choice"
    # 2 * 3 * 120 * 4 bytes; rows I FP FN POS N BAD, 1 chunk: 2 * 1 * 3 * 6 * 8 bytes
    assert lines[3].startswith(
        "logits: (2, 3, 4, 5, 6) torch.float32 on cpu, 0.0 MB; target: (2, 1, 4, 5, 6)"
    )
    assert lines[3].endswith("torch.uint8, labels")
    assert lines[4].startswith("sums: I, FP, FN, POS, N, BAD in 1 chunks a sample, 0.000 MB")
    assert len(lines) == 5
    big = torch.zeros(1, 2, 1).expand(1, 2, 2**20)
    lines = lines_of(logits=big, labels=torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, 1, 2**20))
    del lines[1]
    assert "8.4 MB" in lines[3]
    assert "in 256 chunks a sample, 0.025 MB" in lines[4]
    assert "kept for backward: 0.000 MB" in lines[4]
    assert lines[5] == "note: no gradient is recorded for these logits; backward was not considered"


def test_explain_under_a_forced_backend():
    with use_backend("eager"):
        lines = lines_of()
    assert lines[0] == "backend: eager"
    assert lines[2] == "  not cpu: 'eager' is forced"


def test_explain_a_target_that_requires_grad():
    values = make_values(tuple(LOGITS.shape)).requires_grad_()
    lines = lines_of(dicekernels.DiceLoss(softmax=True), labels=values)
    reason = "target requires a gradient, and the kernels differentiate the logits alone"
    assert lines[0] == f"backend: eager ({reason})"
    assert lines[2] == f"  not cpu: {reason}"


def test_explain_other_act():
    lines = lines_of(dicekernels.DiceLoss(to_onehot_y=True, other_act=torch.tanh))
    assert lines[0] == "backend: cpu"
    assert lines[-1].startswith("note: other_act runs in PyTorch and its result of the logits' size is kept")
    # The cross entropy takes the raw logits: two passes, two reports.
    lines = lines_of(dicekernels.DiceCELoss(to_onehot_y=True, other_act=torch.tanh))
    assert [line.partition(" in ")[0] for line in lines if line.startswith("sums")] == [
        "sums: I, FP, FN, BAD",
        "sums: POS, N, BAD",
    ]


def test_explain_logits_without_space():
    flat = make_logits((4, 3)).requires_grad_()
    lines = lines_of(dicekernels.DiceLoss(softmax=True), flat, make_values((4, 3)))
    assert "backend: eager (dense PyTorch: the logits have no spatial dimensions)" in lines


def test_explain_an_ignored_class_of_values():
    lines = lines_of(
        dicekernels.DiceLoss(softmax=True, ignore_index=1), labels=make_values(tuple(LOGITS.shape))
    )
    assert any(line.startswith("note: ignore_index of a dense target makes a voxel mask") for line in lines)


def test_explain_changes_nothing_and_needs_a_loss_of_this_package():
    loss = dicekernels.DiceCELoss(**HOT)
    before = loss(LOGITS, LABELS)
    explain(loss, LOGITS, LABELS)
    assert torch.equal(loss(LOGITS, LABELS), before)
    with pytest.raises(ValueError, match="loss: MSELoss made no call into dicekernels"):
        explain(torch.nn.MSELoss(), torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError, match="ground truth has different shape"):
        explain(functional.dice_loss, LOGITS, LABELS)
