"""Which GPUs the CUDA library serves, and what runs where it does not: no GPU is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from processes import captured

from dicekernels import dispatch
from dicekernels.backends import gpus, native

# Takes everything: what it says of GPUs is tested in test_triton_support.py.
TRITON = dispatch.Backend("triton", "dicekernels_triton", lambda: "", lambda *facts: "")
LIBRARY = native.library_path("cuda")
LOGITS = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 4, 8, 8, 8))


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        # Machine code of a major capability runs on its later minors; PTX on everything newer.
        (
            "80-real,90-real,100-real,120",
            [(8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 1), (13, 0)],
            [(7, 5), (11, 0)],
        ),
        ("90-real", [(9, 0)], [(8, 0), (8, 9), (10, 0), (12, 0)]),
        ("89-real", [(8, 9)], [(8, 0), (8, 6), (9, 0)]),
        ("80", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("90a", [(9, 0)], [(10, 0), (12, 0)]),
        ("80-virtual", [(8, 0), (9, 0)], [(7, 0)]),
        ("100f-real,75-real", [(10, 0), (7, 5)], [(8, 0), (9, 0)]),
        # A Tegra runs its own machine code and PTX alone, and nobody else runs its machine code.
        ("80-real,86-real", [(8, 6), (8, 9)], [(8, 7)]),
        ("80", [(8, 7), (11, 0)], []),
        ("87-real", [(8, 7)], [(8, 0), (8, 9)]),
        ("100-real", [(10, 3)], [(10, 1), (11, 0)]),
        ("110-real", [(11, 0)], [(10, 0)]),
    ],
)
def test_what_code_runs_on(architectures, runs, does_not):
    assert [capability for capability in runs if not gpus.runs_on(architectures, capability)] == []
    assert [capability for capability in does_not if gpus.runs_on(architectures, capability)] == []


def test_cuda_is_asked_about_captures_for_its_own_tensors_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(True) or True)
    for other in ("cpu", "xpu", "meta"):
        assert not gpus.capturing(torch.device(other))
    assert asked == []
    assert gpus.capturing(torch.device("cuda:0")) and asked == [True]


@pytest.fixture
def machine(monkeypatch):
    """Sets what the process sees: torch's CUDA, the library's first error, GPUs, the library's own word."""

    def see(
        cuda="13.0", error=None, capabilities=((9, 0),), obstacle="", architectures="80-real,90-real,120"
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(native, "load_error", lambda name: error if name == "cuda" else None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(gpus, "_capabilities", None)
        monkeypatch.setattr(dispatch, "_architectures", None)
        library = SimpleNamespace(cuda_obstacle=lambda: obstacle, cuda_architectures=lambda: architectures)
        monkeypatch.setattr(dispatch.torch.ops, "dicekernels", library)
        reason = dispatch.BACKENDS["cuda"].available()
        monkeypatch.setitem(dispatch._unavailable, "cuda", reason)
        monkeypatch.setitem(dispatch._unavailable, "triton", "")
        monkeypatch.setitem(dispatch.BACKENDS, "triton", TRITON)
        return reason

    return see


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, ""),
        ({"cuda": None}, f"torch {torch.__version__} is a build without CUDA"),
        ({"error": "x.so not found (not built); expected ..."}, "x.so not found (not built); expected ..."),
        ({"capabilities": ()}, "torch sees no GPU here"),
        ({"obstacle": "the driver here supports CUDA 12"}, "the driver here supports CUDA 12"),
    ],
    ids=str,
)
def test_why_it_is_not_available(facts, reason, machine):
    assert machine(**facts) == reason
    # The next backend for these logits takes over, and the reason can be asked for.
    assert dispatch.refusals(LOGITS)["cuda"] == reason
    assert dispatch.choose(LOGITS).name == ("triton" if reason else "cuda")


def test_a_gpu_that_the_library_has_no_code_for(machine):
    machine(capabilities=((9, 0), (7, 5)))
    reason = dispatch.refusals(LOGITS)["cuda"]
    assert reason == (
        "a GPU here has compute capability (7, 5), the library was compiled for 80-real,90-real,120; "
        "rebuild it with TORCH_CUDA_ARCH_LIST"
    )
    assert dispatch.choose(LOGITS).name == "triton"
    refused = pytest.raises(RuntimeError, match="backend 'cuda' was forced, but a GPU here has")
    with refused, dispatch.use_backend("cuda"):
        dispatch.choose(LOGITS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "the logits are on cpu, it takes tensors on cuda"),
        (
            {"dtype": torch.int32},
            "the logits are torch.int32, it takes float32, float16, bfloat16 and float64",
        ),
        ({"shape": (1, 513, 8)}, "the logits have 513 classes, it takes up to 512"),
        ({"shape": (1, 512, 8)}, ""),
    ],
    ids=str,
)
def test_logits_that_it_takes(change, reason, machine):
    machine()
    logits = SimpleNamespace(**vars(LOGITS) | change)
    assert dispatch.refusals(logits)["cuda"] == reason


DRIVER = """
#include <stdlib.h>
int cuInit(unsigned flags) { abort(); }
int cuDriverGetVersion(int *version) { *version = %d; return 0; }
"""
ASK = """
import torch, dicekernels
torch.ops.load_library({library!r})
print(torch.ops.dicekernels.cuda_obstacle())
print(torch.ops.dicekernels.cuda_architectures())
"""


@pytest.mark.skipif(not LIBRARY.is_file(), reason=f"{LIBRARY.name} was not built")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to make a driver with")
@pytest.mark.parametrize(("version", "reason"), [(99000, ""), (11080, "the driver here supports CUDA 11")])
def test_the_driver_is_asked_and_not_initialised(version, reason, tmp_path):
    """After cuInit a process can neither fork nor choose its GPUs; an import must not do that."""
    source = tmp_path / "driver.c"
    source.write_text(DRIVER % version)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    code = ASK.format(library=str(LIBRARY))
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = captured([sys.executable, "-c", code], env=environment)
    assert done.returncode == 0, done.stderr
    obstacle, architectures = done.stdout.splitlines()
    assert reason in obstacle and bool(reason) == bool(obstacle)
    assert any(gpus.runs_on(architectures, (major, 0)) for major in (8, 9, 10, 12))
