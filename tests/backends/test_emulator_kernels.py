"""Checks in C++ of the text of csrc/cuda over the emulator: races in shared memory, and launches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from processes import captured, compiled_once
from test_emulator import COMPILER, CPP, ORDERS, assert_passes, call, checks_of, run

CSRC = CPP.parent.parent / "csrc"
# As csrc/emulated.cmake has them.
KERNELS = ["-DDK_EMULATED", f"-I{CPP}", f"-I{CSRC}", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
# The kernels' accesses are reported to races.cpp (see there), which is linked in place of the sanitizer.
RACES = ["-DDK_EMULATOR_RACES", "-fsanitize=thread", "-fno-pie"]
TORCH = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def compile_into(folder: Path) -> None:
        detector, kernels = str(folder / "races.o"), str(folder / "kernels.o")
        call([*COMPILER, "-O2", "-c", str(CPP / "races.cpp"), "-o", detector])
        source = str(CPP / "races_test.cpp")
        call([*COMPILER, "-O1", "-g1", *KERNELS, *RACES, "-c", source, "-o", kernels])
        call(["g++", "-no-pie", detector, kernels, "-pthread", "-o", str(folder / "races_test")])

    return compiled_once(tmp_path_factory, "races", compile_into)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def compile_into(folder: Path) -> None:
        # Of torch the headers alone; what they declare and nobody calls is not linked.
        include = ["-isystem", f"{torch.__path__[0]}/include"]
        source, program = str(CPP / "launch_test.cpp"), str(folder / "launch_test")
        call([*COMPILER, "-O1", *KERNELS, *TORCH, *include, source, "-pthread", "-o", program])

    return compiled_once(tmp_path_factory, "launches", compile_into)


def places(program: Path, output: str) -> str:
    """The lines of source of the addresses that races are reported with."""
    found = sorted(set(re.findall(r"0x[0-9a-f]+", output)))
    command = ["addr2line", "-pCfe", str(program), *found]
    return captured(command).stdout


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", checks_of("races_test.cpp"))
def test_races(races: Path, check: str, order: str) -> None:
    done = run(races, check, order=order, program="races_test")
    passed = done.stdout.splitlines()[-1:] == [f"{check}: passed"]
    assert passed, done.stdout + done.stderr + places(races / "races_test", done.stdout)


@pytest.mark.parametrize("check", checks_of("launch_test.cpp"))
def test_what_surrounds_a_launch(launches: Path, check: str) -> None:
    assert_passes(launches, check, "forward", program="launch_test")


def test_braced_lists_have_their_header() -> None:
    """A loop over one names no std:: type, so nobody misses the header until another drops it."""
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    braced = [path for path in sources if re.search(r"for \([^;()]* : \{", path.read_text())]
    assert "fast.h" in {path.name for path in braced}
    assert [path for path in braced if "#include <initializer_list>" not in path.read_text()] == []
