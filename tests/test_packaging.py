"""What leaves the house: the symbols of the library, its dependencies, versions, the wheel."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dicekernels
from dicekernels._version import __version__
from dicekernels.backends import native

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent
LIBRARY = native.library_path("cpu")


def output(*command: object) -> str:
    texts = [str(part) for part in command]
    return subprocess.run(texts, capture_output=True, text=True, check=True).stdout


def undefined_symbols() -> set[str]:
    lines = output("nm", "-D", "--undefined-only", LIBRARY).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def test_library_uses_neither_python_nor_the_unstable_interface() -> None:
    symbols = undefined_symbols()
    assert any(name.startswith("aoti_torch_") for name in symbols)
    assert [name for name in symbols if re.match(r"_?Py", name)] == []
    # Mangled C++ names of namespaces at, c10 and torch: N2at, N3c10, N5torch.
    assert [name for name in symbols if re.match(r"_Z.*?N?K?(2at|3c10|5torch)", name)] == []


def test_library_needs_torch_and_the_system_only() -> None:
    dynamic = output("readelf", "--dynamic", "--wide", LIBRARY)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so[.\d]*\]", dynamic))
    assert "libtorch_cpu" in needed
    loader = {name for name in needed if name.startswith("ld-linux")}
    assert needed - loader <= {"libtorch_cpu", "libstdc++", "libgcc_s", "libm", "libc"}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_kernels_of_one_instruction_set_stay_in_their_namespace() -> None:
    """A weak symbol outside of it would be merged, and baseline code could run AVX-512."""
    objects = sorted(ROOT.glob("build/cmake-*/CMakeFiles/dk_kernels_avx*.dir/**/*.o"))
    if not objects:
        pytest.skip("the library was not built in this tree for x86-64")
    for path in objects:
        isa = re.search(r"dk_kernels_(\w+)\.dir", str(path))[1]
        lines = output("nm", "--demangle", "--defined-only", path).splitlines()
        merged = [line for line in lines if line.split()[1] in "WVu" and f"::{isa}::" not in line]
        assert merged == [], f"{isa}: force these inline or put them into namespace DK_ISA"


def test_library_names_no_folder_of_the_build_machine() -> None:
    content = LIBRARY.read_bytes()
    assert b"csrc/cpu/kernels.cpp" in content
    assert str(ROOT).encode() not in content


def test_torch_abi_audit() -> None:
    audit = shutil.which("torch-abi-audit", path=str(SCRIPTS)) or shutil.which("torch-abi-audit")
    if audit is None:
        pytest.skip("torch-abi-audit is not installed")
    words = " ".join(output(audit, "--check", "torch", LIBRARY).split())
    assert "Torch ABI: STABLE Min torch: 2.10.0 " in words


def test_version_is_the_same_everywhere() -> None:
    assert dicekernels.__version__ == __version__
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == __version__


def test_pins_cover_the_extras_and_satisfy_them() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned: dict[str, list[str]] = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        pinned.setdefault(pin.name, []).append(specifier.version)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [Requirement(text) for name in ("demo", "bench", "dev") for text in extras[name]]
    assert {requirement.name for requirement in wanted} == set(pinned)
    for requirement in wanted:
        assert all(requirement.specifier.contains(version) for version in pinned[requirement.name])


def test_cuda_build_is_refused_by_name(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=str(SCRIPTS)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DDICEKERNELS_BUILD=cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no CUDA sources yet in this version" in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that the development build stays as it is."""
    source = tmp_path_factory.mktemp("source") / "dicekernels"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    environment = os.environ | {"DICEKERNELS_NATIVE": "0", "DICEKERNELS_BUILD": "cpu"}
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], env=environment, check=True)
    (path,) = folder.iterdir()
    return path


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(rf"dicekernels-{__version__}-py3-none-linux_\w+\.whl", wheel.name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dicekernels").rglob("*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"dicekernels-{__version__}.dist-info"
    metadata = {name for name in names if name.startswith(f"{info}/")}
    expected = sources | {"dicekernels/py.typed", "dicekernels/libdicekernels_cpu.so"}
    assert names - metadata == expected
    assert f"{info}/licenses/LICENSE" in metadata


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_runs_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from dicekernels.backends import native\nprint(native.library_path('cpu'), native.load_error('cpu'))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    library = tmp_path / "dicekernels/libdicekernels_cpu.so"
    assert done.stdout.split() == [str(library), "None"]
