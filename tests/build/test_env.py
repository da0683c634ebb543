"""`python -m dicekernels.env`: complete, truthful, and in step with docs/environment.md."""

import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import captured

from dicekernels import env
from dicekernels.dispatch import available_backends, unavailable_backends

ROOT = Path(__file__).resolve().parents[2]


def test_text_names_each_backend_with_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    env.main([])
    text = capsys.readouterr().out
    assert {"cpu", "eager"} <= set(available_backends())
    states = dict.fromkeys(available_backends(), "available")
    states |= {name: f"not available: {reason}" for name, reason in unavailable_backends().items()}
    for name, state in states.items():
        assert re.search(rf"^  {name} +{re.escape(state)}$", text, re.MULTILINE)


def test_facts_are_those_of_this_process() -> None:
    facts = env.report()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == sys.version.split()[0]
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_json_is_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    env.main(["--json"])
    assert json.loads(capsys.readouterr().out) == env.report()


def test_missing_package_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert env.report()["versions"]["triton"] is None
    assert re.search(r"^  triton +none$", env.as_text(env.report()), re.MULTILINE)


def run_env(**variables: str) -> dict[str, Any]:
    """The report of a new process with these variables."""
    command = [sys.executable, "-m", "dicekernels.env", "--json"]
    done = captured(command, env=os.environ | variables, cwd=ROOT, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("value", "kernels"), [("default", "baseline"), ("sse5", 'refused: .*got "sse5", expected')]
)
def test_kernels_are_those_that_the_variable_names(value: str, kernels: str) -> None:
    facts = run_env(DICEKERNELS_CPU_CAPABILITY=value)
    assert re.match(kernels, facts["cpu"]["kernels"])
    assert facts["variables"]["DICEKERNELS_CPU_CAPABILITY"] == value


def test_build_is_what_the_file_beside_the_libraries_says() -> None:
    facts = run_env()
    written = json.loads((ROOT / "dicekernels/_build_info.json").read_text())
    assert facts["build"] == written
    text = env.as_text({"build": written})
    assert re.search(rf"^  version +{re.escape(written['version'])}$", text, re.MULTILINE)
    if written["cuda"]:
        assert re.search(rf"^    architectures +{', '.join(written['cuda']['architectures'])}$", text, re.M)


def test_broken_library_shows_its_error(tmp_path: Path) -> None:
    library = tmp_path / "libdicekernels_cpu.so"
    library.write_bytes(b"no shared library" * 100)
    facts = run_env(DICEKERNELS_LIBRARY_PATH=str(tmp_path), DICEKERNELS_BACKEND="")
    assert facts["backends"]["eager"] == "available"
    assert facts["backends"]["cpu"].startswith("not available: ")
    assert str(library) in facts["backends"]["cpu"]
    assert "invalid ELF header" in facts["backends"]["cpu"]
    assert facts["cpu"]["kernels"] is None
    assert facts["variables"]["DICEKERNELS_LIBRARY_PATH"] == str(tmp_path)


def line_of_a_process(**variables: str) -> str:
    code = "from dicekernels import env; print(env.backend_line('cpu'))"
    environment = os.environ | {"DICEKERNELS_BACKEND": ""} | variables
    command = [sys.executable, "-W", "ignore", "-c", code]
    return captured(command, env=environment, cwd=ROOT, check=True).stdout.strip()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of this processor there is one set only")
def test_backend_line_names_the_instruction_set() -> None:
    assert line_of_a_process(DICEKERNELS_CPU_CAPABILITY="avx2") == "backend: cpu (AVX2)"
    assert line_of_a_process(DICEKERNELS_CPU_CAPABILITY="default") == "backend: cpu (baseline)"


def test_backend_line_tells_why_it_is_eager(tmp_path: Path) -> None:
    told = line_of_a_process(DICEKERNELS_LIBRARY_PATH=str(tmp_path))
    assert told.startswith(f"backend: eager (cpu: {tmp_path / 'libdicekernels_cpu.so'} not found")
    assert line_of_a_process(DICEKERNELS_BACKEND="eager") == "backend: eager (as asked for)"


def test_every_variable_is_documented() -> None:
    folders = {"dicekernels": "*.py", "csrc": "*.[ch]*"}
    sources = [path for folder, kind in folders.items() for path in (ROOT / folder).rglob(kind)]
    sources += [ROOT / "setup.py", ROOT / "Makefile"]
    used = {
        name
        for path in sources
        for name in re.findall(r"[\"'(](DICEKERNELS_[A-Z_]+)[\"')]", path.read_text())
    }
    documented = set(re.findall(r"`([A-Z_]+)`", (ROOT / "docs/environment.md").read_text()))
    # Options of CMake that setup.py sets, not variables of the environment.
    options = ("ARCH_LIST", "COMMIT", "SANITIZE", "TORCH_DIR", "TORCH_VERSION", "VERSION")
    used -= {f"DICEKERNELS_{option}" for option in options}
    assert {"DICEKERNELS_BUILD", "DICEKERNELS_LIBRARY_PATH"} <= used
    assert used <= documented
    assert set(env.VARIABLES) <= documented
