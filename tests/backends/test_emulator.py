"""The emulator that runs the text of CUDA kernels on the CPU (tests/cpp/emulator.h), on known results.

The checks are functions of C++; each runs in a process of its own, as one that fails may take it along.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest
from processes import captured, compiled_once

CPP = Path(__file__).parents[1] / "cpp"
SOURCES = ["emulator_test.cpp", "emulator_memory_test.cpp"]
COMPILER = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
ORDERS = ["forward", "reverse", "shuffle:1"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def checks_of(source: str) -> list[str]:
    return re.findall(r"^CHECK\((\w+)\)", (CPP / source).read_text(), re.M)


CHECKS = [name for source in SOURCES for name in checks_of(source)]


def build(tmp_path_factory: pytest.TempPathFactory, name: str, *flags: str) -> Path:
    """The folder with `emulator_test`, as a program and as a library."""

    def compile_into(folder: Path) -> None:
        compiler = [*COMPILER, *flags]
        objects = [str(folder / f"{source}.o") for source in SOURCES]
        for source, out in zip(SOURCES, objects, strict=True):
            call([*compiler, "-c", str(CPP / source), "-o", out])
        call([*compiler, *objects, "-pthread", "-o", str(folder / "emulator_test")])
        call([*compiler, *objects, "-pthread", "-shared", "-o", str(folder / "emulator_test.so")])

    return compiled_once(tmp_path_factory, name, compile_into)


def call(command: list[str]) -> None:
    done = captured(command)
    assert done.returncode == 0, done.stderr


def run(
    folder: Path, *arguments: str, order: str = "forward", program: str = "emulator_test"
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DICEKERNELS_EMULATOR_ORDER": order}
    environment.pop("LD_PRELOAD", None)
    return captured([str(folder / program), *arguments], env=environment, timeout=120)


def assert_passes(folder: Path, check: str, order: str, program: str = "emulator_test") -> None:
    done = run(folder, check, order=order, program=program)
    assert (done.returncode, done.stdout) == (0, f"{check}: passed\n"), done.stdout + done.stderr


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, "plain", "-O2")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, "sanitized", *SANITIZE)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, "portable", "-O1", "-DDK_EMULATOR_UCONTEXT")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_check(plain: Path, check: str, order: str) -> None:
    assert_passes(plain, check, order)


def test_library_takes_the_order_from_python(plain: Path) -> None:
    library = ctypes.CDLL(str(plain / "emulator_test.so"))
    set_order = library.dicekernels_emulator_order
    set_order.argtypes = [ctypes.c_int, ctypes.c_ulonglong]

    def began(kind: int, seed: int = 0) -> list[int]:
        set_order(kind, seed)
        order = (ctypes.c_int * 8)()
        library.emulator_test_order(order)
        return list(order)

    assert began(0) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert began(1) == [7, 6, 5, 4, 3, 2, 1, 0]
    shuffles = [began(2, seed) for seed in range(8)]
    assert all(sorted(order) == list(range(8)) for order in shuffles)
    assert len({tuple(order) for order in shuffles}) > 4
    assert {order[0] // 4 for order in shuffles} == {0, 1}
    assert began(2, 3) == shuffles[3]


@pytest.mark.parametrize("order", ["backward", "shuffle", "shuffle:x", "shuffle:1x"])
def test_unknown_order_is_an_error(plain: Path, order: str) -> None:
    done = run(plain, "reduction", order=order)
    assert done.returncode == 1
    assert (
        f"DICEKERNELS_EMULATOR_ORDER is '{order}'; expected forward, reverse or shuffle:SEED" in done.stdout
    )


def test_no_such_check_is_an_error(plain: Path) -> None:
    assert run(plain, "no_such_check").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_check_with_sanitizers(sanitized: Path, check: str, order: str) -> None:
    assert_passes(sanitized, check, order)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["dynamic"]], ids=["static", "dynamic"])
def test_sanitizer_sees_an_overrun_of_shared_memory(sanitized: Path, arguments: list[str]) -> None:
    done = run(sanitized, "--overrun", *arguments)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "in overruns" in done.stderr or "::overruns" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_check_with_ucontext(portable: Path, check: str, order: str) -> None:
    assert_passes(portable, check, order)
