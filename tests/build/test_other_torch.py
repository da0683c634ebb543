"""What `make test-torch` does, beside the torch that is here, and without an index of packages."""

from __future__ import annotations

import sys
from pathlib import Path

import other_torch
import pytest
import torch
from processes import captured
from wheel_gate import output

from dicekernels.backends import native


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An empty environment that sees our torch."""
    folder = tmp_path / "environment"
    output(sys.executable, "-m", "venv", "--without-pip", folder)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(output(folder / "bin" / "python", "-c", where).strip())
    (packages / "torch_beside.pth").write_text(f"{Path(torch.__path__[0]).parent}\n")
    return folder


@pytest.mark.skipif(not native.is_loaded("cpu"), reason="the CPU library was not built")
def test_the_libraries_of_the_tree_run_in_another_environment(environment: Path) -> None:
    told = other_torch.runs(environment)
    assert told.startswith(f"torch {torch.__version__}: loaded, the loss and the gradient")


@pytest.mark.skipif(not native.is_loaded("cpu"), reason="the CPU library was not built")
def test_wrong_numbers_are_an_error(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_torch, "SMOKE", other_torch.SMOKE.replace("8 / 15", "9 / 15"))
    with pytest.raises(AssertionError, match="assert abs"):
        other_torch.runs(environment)


def test_a_release_that_cannot_be_had_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, other_torch.__file__, "99.1"]
    done = captured(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch 99.1: skipped: ERROR: Could not find a version")
