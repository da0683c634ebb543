"""When the Triton backend serves, and what it says when it does not; of machines that are not here, too."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch
from cases import make_labels, make_logits
from test_dispatch import child

import dicekernels
from dicekernels import dispatch, env, region_sums, unavailable_backends, use_backend
from dicekernels.backends import gpus
from dicekernels.backends.triton import support

HOT = {"to_onehot_y": True, "softmax": True}
NO_GPU = "torch sees no GPU here (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
NOT_INSTALLED = (
    "triton is not installed; pip install 'dicekernels[triton]', or the triton of your torch build"
)
here = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def machine(monkeypatch):
    """Sets what the process sees: version of triton, GPUs of CUDA by capability, XPU, interpreter."""

    def see(version="3.6.0", capabilities=(), xpu=False, interpret=None):
        monkeypatch.setattr(support, "triton_version", lambda: version)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(gpus, "_capabilities", None)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
        if interpret is None:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        else:
            monkeypatch.setenv("TRITON_INTERPRET", interpret)

    return see


@pytest.mark.parametrize("version", ["3.4.0", "3.6.0+git8a7d3b2", "3.9.0", "3.10.1", "4.0.0"])
def test_versions_that_are_taken(version, machine):
    machine(version, [(9, 0)])
    assert support.unavailable() == ""


@pytest.mark.parametrize("version", ["2.1.0", "3.0.0", "3.2.0", "3.3.1", "unknown"])
def test_versions_that_are_refused(version, machine):
    for machine_kind in ({"capabilities": [(9, 0)]}, {"interpret": "1"}):
        machine(version, **machine_kind)
        reason = support.unavailable()
        assert reason.startswith(f"triton {version} is installed, it takes 3.4 or newer")
        assert "upgrade torch" in reason


def test_no_triton_is_told_before_no_gpu(machine):
    machine(None)
    assert support.unavailable() == NOT_INSTALLED


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({}, NO_GPU),
        ({"interpret": "0"}, NO_GPU),
        ({"interpret": "1"}, ""),
        ({"interpret": "True"}, ""),
        ({"capabilities": [(8, 0)]}, ""),
        ({"xpu": True}, ""),
    ],
    ids=str,
)
def test_where_kernels_can_run(kind, reason, machine):
    machine(**kind)
    assert support.unavailable() == reason


@here
def test_interpreted_is_what_triton_does():
    code = """
import triton
from dicekernels.backends.triton.support import interpreted
print(interpreted(), bool(triton.knobs.runtime.interpret))
"""
    for value in ("1", "0", "", "on", "off", "TRUE", "y"):
        done = child(code, TRITON_INTERPRET=value)
        ours, theirs = done.stdout.split()
        assert ours == theirs, f"{value!r}: {done.stdout} {done.stderr}"


@here
def test_the_version_is_found_whatever_the_distribution_is_called(monkeypatch):
    import triton

    assert support.triton_version() == triton.__version__
    real = importlib.metadata.version

    def renamed(name):
        if name == "pytorch-triton-rocm":
            return "3.5.1+rocm6.4"
        if name in support.DISTRIBUTIONS:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", renamed)
    assert support.triton_version() == "3.5.1+rocm6.4"
    monkeypatch.setattr(support, "DISTRIBUTIONS", ())  # a build of one's own
    assert support.triton_version() == triton.__version__


LIMITS = [
    (("cuda", torch.float32, 4), ""),
    (("cuda", torch.bfloat16, 512), ""),
    (("xpu", torch.float16, 1), ""),
    (("cuda", torch.float64, 513), "the logits have 513 classes, it takes up to 512"),
    (("cpu", torch.float32, 4), "the logits are on cpu, it takes tensors on cuda or xpu"),
    (("meta", torch.float32, 4), "the logits are on meta, it takes tensors on cuda or xpu"),
    (
        ("cuda", torch.float8_e4m3fn, 4),
        "the logits are torch.float8_e4m3fn, it takes float32, float16, bfloat16 and float64",
    ),
]


@pytest.mark.parametrize(("facts", "reason"), LIMITS, ids=str)
def test_logits_that_are_taken_and_refused(facts, reason, machine):
    machine(capabilities=[(9, 0)])
    assert support.can_run(*facts) == reason


def test_the_interpreter_takes_tensors_of_the_cpu(machine):
    machine(interpret="1")
    assert support.can_run("cpu", torch.float32, 4) == ""
    assert support.can_run("cuda", torch.float32, 4) == "the logits are on cuda, it takes tensors on cpu"


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        ([(7, 5)], ""),
        ([(12, 0), (8, 6)], ""),
        ([(9, 0), (7, 0)], "a GPU here has compute capability (7, 0), it takes (7, 5) and newer"),
    ],
)
def test_the_oldest_gpu_decides(capabilities, reason, machine, monkeypatch):
    machine(capabilities=capabilities)
    assert support.can_run("cuda", torch.float32, 4) == reason
    # AMD's GPUs have other numbers.
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert support.can_run("cuda", torch.float32, 4) == ""


def test_env_lists_it_with_its_reason():
    reason = unavailable_backends().get("triton")
    state = f"not available: {reason}" if reason else "available"
    assert env.report()["backends"]["triton"] == state


def test_forced_where_it_is_not_available(monkeypatch):
    monkeypatch.setitem(dispatch._unavailable, "triton", NO_GPU)
    with pytest.raises(RuntimeError) as error, use_backend("triton"):
        pass
    assert str(error.value) == f"backend 'triton' is not available: {NO_GPU}"
    logits = make_logits((2, 3, 20)).requires_grad_()
    lines = dicekernels.explain(dicekernels.DiceLoss(**HOT), logits, make_labels((2, 1, 20), 3)).splitlines()
    assert f"  not triton: {NO_GPU}" in lines


@pytest.mark.parametrize(("facts", "reason"), [limit for limit in LIMITS if limit[1]], ids=str)
def test_forced_with_logits_that_it_does_not_take(facts, reason, machine, monkeypatch):
    machine(capabilities=[(9, 0)])
    monkeypatch.setitem(dispatch._unavailable, "triton", "")
    device, dtype, classes = facts

    class Logits:
        """As far as the choice looks."""

        def __init__(self):
            self.device, self.dtype, self.shape = torch.device(device), dtype, (1, classes, 9)

    with use_backend("triton"), pytest.raises(RuntimeError) as error:
        dispatch.choose(Logits())
    assert str(error.value) == f"backend 'triton' was forced, but {reason}"


def test_on_a_gpu_it_comes_before_eager(machine, monkeypatch):
    machine(capabilities=[(9, 0)])
    monkeypatch.setitem(dispatch._unavailable, "triton", "")

    class Logits:
        device, dtype, shape = torch.device("cuda"), torch.float32, (1, 4, 9)

    assert dispatch.choose(Logits()).name == "triton"
    refusals = dispatch.refusals(Logits())
    assert refusals.pop("cuda") == dispatch._unavailable["cuda"]
    assert refusals == {"cpu": "the logits are on cuda, it takes tensors on cpu", "triton": "", "eager": ""}
    Logits.shape = (1, 513, 9)
    assert dispatch.choose(Logits()).name == "eager"


def test_nothing_imports_triton_before_it_runs():
    # It would cost `import dicekernels` more than everything of ours.
    done = child(
        "import dicekernels, sys\n"
        "dicekernels.available_backends()\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'triton'])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_without_triton_everything_else_works():
    code = """
import sys
sys.modules["triton"] = None
import torch, dicekernels
print(dicekernels.unavailable_backends()["triton"])
loss = dicekernels.DiceLoss(to_onehot_y=True, softmax=True)
print(loss(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)).item())
"""
    done = child(code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == NOT_INSTALLED
    # p = 1/2: class 0 has 1 - 4 / (2 + 4), class 1 has 1 - 1e-5 / (2 + 1e-5)
    assert abs(float(second) - (1 / 3 + 1) / 2) < 1e-5


@here
def test_forced_by_the_environment_in_the_interpreter():
    code = """
import torch, dicekernels
loss = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True)
logits, labels = torch.arange(24.0).sin().view(1, 3, 8).requires_grad_(), torch.arange(8).view(1, 1, 8) % 3
lines = dicekernels.explain(loss, logits, labels).splitlines()
print(lines[0].partition(';')[0])
print([line for line in lines[1:5] if "not cuda" not in line])
values = []
for name in ("cpu", "triton"):
    with dicekernels.use_backend(name):
        value = loss(logits, labels)
        values += [value.item(), torch.autograd.grad(value, logits)[0].sum(1).abs().max().item()]
print(values)
try:
    loss(torch.zeros(1, 513, 8), labels)
except RuntimeError as error:
    print(error)
"""
    done = child(code, TRITON_INTERPRET="1", DICEKERNELS_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    sentence, explained, values, refusal = done.stdout.splitlines()
    assert sentence == "Runs in one pass forward and one backward on the triton kernels"
    assert explained == str(
        ["backend: triton", "  not cpu: 'triton' is forced", "  not eager: 'triton' is forced"]
    )
    cpu, cpu_slope, triton, triton_slope = map(float, values.strip("[]").split(", "))
    eps = torch.finfo(torch.float32).eps
    assert abs(cpu - triton) <= 8 * eps * cpu
    assert max(cpu_slope, triton_slope) <= 8 * eps  # a softmax has no slope along (1, 1, 1)
    assert refusal == "backend 'triton' was forced, but the logits have 513 classes, it takes up to 512"


def test_refused_logits_run_on_the_backend_after_it(monkeypatch):
    # 513 classes: whoever comes next in the list takes them.
    monkeypatch.setitem(dispatch._unavailable, "cpu", "for this test")
    logits, labels = make_logits((1, 513, 5)), make_labels((1, 1, 5), 513, torch.int32)
    assert dispatch.choose(logits).name == "eager"
    assert region_sums(logits, labels).N.shape == (1, 513)
