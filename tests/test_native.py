"""Loading of the compiled library, and the optional module `_native`."""

import platform
import sys
from pathlib import Path

import pytest

from dicekernels._version import __version__
from dicekernels.backends import native

X86 = platform.machine() == "x86_64"


@pytest.fixture
def library_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which libraries are looked for, as in a new process."""
    monkeypatch.setenv("DICEKERNELS_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(native, "_outcomes", {})
    return tmp_path


def test_cpu_library_stands_beside_the_package_and_is_loaded() -> None:
    assert native.load_error("cpu") is None
    assert native.is_loaded("cpu")
    assert native.library_path("cpu").parent == native.PACKAGE


def test_missing_library_says_where_and_what_to_do(library_folder: Path) -> None:
    error = native.load_error("cpu")
    assert error is not None
    assert str(library_folder / "libdicekernels_cpu.so") in error
    assert "DICEKERNELS_LIBRARY_PATH points there" in error
    assert "make build" in error
    assert not native.is_loaded("cpu")


def test_first_error_is_kept(library_folder: Path) -> None:
    library = library_folder / "libdicekernels_cpu.so"
    library.write_bytes(b"no shared library" * 100)
    first = native.load_error("cpu")
    assert first is not None
    assert str(library) in first
    assert "invalid ELF header" in first
    assert "make build" in first

    library.unlink()
    assert native.load_error("cpu") == first
    assert not native.is_loaded("cpu")


def test_each_library_has_its_own_error(library_folder: Path) -> None:
    errors = {name: native.load_error(name) for name in ("cpu", "cuda")}
    for name, error in errors.items():
        assert error is not None
        assert f"libdicekernels_{name}.so" in error


def test_package_works_without_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dicekernels._native", None)
    assert native.native_module() is None
    assert native.build_config() is None


def test_build_config() -> None:
    pytest.importorskip("dicekernels._native", reason="_native was not built")
    config = native.build_config()
    assert config is not None
    assert set(config) == {"version", "compiler", "flags", "torch_target", "commit", "isas"}
    assert config["version"] == __version__
    assert config["torch_target"] == "2.10"
    assert "-fvisibility=hidden" in config["flags"].split()
    assert "-ffast-math" not in config["flags"]
    isas = config["isas"]
    assert set(isas) == ({"baseline", "avx2", "avx512"} if X86 else {"baseline"})
    if X86:
        assert "-mavx512f" in isas["avx512"].split()
        assert "avx512" not in isas["avx2"]
        assert "avx" not in isas["baseline"]


def test_cpu_features_are_those_of_the_processor() -> None:
    module = pytest.importorskip("dicekernels._native", reason="_native was not built")
    features = module.cpu_features()
    if not X86:
        assert features == {}
        return
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split(":")[1].split()
    assert set(features) == {
        *("avx", "avx2", "f16c", "fma"),
        *("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    }
    assert features == {name: name in flags for name in features}
