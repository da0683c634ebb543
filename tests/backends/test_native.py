"""Loading of the compiled library, and the optional module `_native`."""

import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from processes import captured

from dicekernels import dispatch
from dicekernels._version import __version__
from dicekernels.backends import native
from dicekernels.ops import OPS

ROOT = native.PACKAGE.parent
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


def test_library_of_another_version_is_not_loaded(library_folder: Path) -> None:
    (library_folder / "libdicekernels_cpu.so").write_bytes(b"never read")
    (library_folder / "_build_info.json").write_text('{"version": "0.0.1+cu130"}')
    error = native.load_error("cpu")
    assert error is not None
    assert f"got one of dicekernels 0.0.1+cu130, expected {__version__}" in error
    assert "make build" in error


def test_cuda_library_is_not_loaded_beside_a_torch_without_cuda(
    library_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ROCm build has no CUDA either, and would give the kernels its tensors."""
    monkeypatch.setattr(torch.version, "cuda", None)
    (library_folder / "libdicekernels_cuda.so").write_bytes(b"never read")
    error = native.load_error("cuda")
    assert error is not None
    assert f"torch {torch.__version__} is no CUDA build" in error


def test_import_and_a_loss_survive_broken_libraries(tmp_path: Path) -> None:
    for name in ("cpu", "cuda"):
        (tmp_path / f"libdicekernels_{name}.so").write_bytes(b"no shared library" * 100)
    # Two classes at 1/2 each, both voxels of class 0: Dice 2/3 and 0, loss 1 - 1/3.
    code = """if True:
        import torch
        from dicekernels import functional, unavailable_backends
        labels = torch.zeros(1, 1, 2, dtype=torch.uint8)
        options = dict(to_onehot_y=True, softmax=True, smooth_nr=0.0, smooth_dr=0.0)
        print(functional.dice_loss(torch.zeros(1, 2, 2), labels, **options).item())
        print(unavailable_backends()["cpu"])
    """
    environment = {key: value for key, value in os.environ.items() if key != "DICEKERNELS_BACKEND"}
    environment["DICEKERNELS_LIBRARY_PATH"] = str(tmp_path)
    command = [sys.executable, "-c", code]
    done = captured(command, env=environment, check=True)
    loss, reason = done.stdout.splitlines()[:2]
    assert abs(float(loss) - 2 / 3) < 1e-6
    assert "invalid ELF header" in reason


def warnings_of_an_import(folder: Path, **variables: str) -> str:
    """What a new process prints to stderr that imports the package of this folder, if one is there."""
    hidden = ("DICEKERNELS_BACKEND", "DICEKERNELS_LIBRARY_PATH", "PYTHONWARNINGS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    code = "import dicekernels, sys; import dicekernels.env; print(dicekernels.__file__)"
    command = [sys.executable, "-c", code]
    done = captured(command, env=environment | variables, cwd=folder, check=True)
    assert Path(done.stdout.strip()).parent.parent == folder
    return done.stderr


def unbuilt(folder: Path, *others: str) -> Path:
    """A folder with the package without libraries, and empty files of these names."""
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(native.PACKAGE, folder / "dicekernels", ignore=ignored)
    for name in others:
        (folder / name).touch()
    return folder


def test_unbuilt_clone_warns_once_and_says_where_an_installed_one_is(tmp_path: Path) -> None:
    clone = unbuilt(tmp_path / "clone", "CMakeLists.txt", "setup.py")
    told = warnings_of_an_import(clone)
    assert told.count("UserWarning") == 1
    assert told.startswith("<string>:1: UserWarning: dicekernels runs without its CPU library")
    assert f"{clone} is a clone that was not built. Run `make build` there, or install it" in told

    installed = tmp_path / "site"
    for folder in ("dicekernels", "dicekernels-0.1.0.dist-info"):
        (installed / folder).mkdir(parents=True)
    (installed / "dicekernels" / "libdicekernels_cpu.so").touch()
    (installed / "dicekernels-0.1.0.dist-info" / "METADATA").write_text("Name: dicekernels\nVersion: 0.1.0\n")
    told = warnings_of_an_import(clone, PYTHONPATH=str(installed))
    assert f"start Python outside of it: an installed dicekernels is in {installed}." in told


def test_installed_package_without_its_library_warns_with_the_remedy(tmp_path: Path) -> None:
    told = warnings_of_an_import(unbuilt(tmp_path / "site"))
    assert f"{tmp_path / 'site' / 'dicekernels' / 'libdicekernels_cpu.so'} not found (not built)" in told
    assert "pip install --no-build-isolation ." in told
    assert "is a clone" not in told


def test_library_that_does_not_load_warns_with_its_first_cause(tmp_path: Path) -> None:
    clone = unbuilt(tmp_path / "clone", "CMakeLists.txt")
    (clone / "dicekernels" / "libdicekernels_cpu.so").write_bytes(b"no shared library" * 100)
    told = warnings_of_an_import(clone)
    assert told.count("UserWarning") == 1
    assert "invalid ELF header" in told
    assert "is a clone" not in told


def test_cuda_library_warns_where_it_stands_and_torch_could_use_it(
    library_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(native._outcomes, "cpu", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.warn_of_missing_libraries()  # a CPU-only wheel is no fault

    (library_folder / "libdicekernels_cuda.so").write_bytes(b"no shared library" * 100)
    del native._outcomes["cuda"]
    with pytest.warns(UserWarning, match="without its CUDA library: .*invalid ELF header"):
        native.warn_of_missing_libraries()


def test_no_warning_where_the_library_loads_or_a_backend_is_named(tmp_path: Path) -> None:
    assert warnings_of_an_import(ROOT) == ""
    assert warnings_of_an_import(unbuilt(tmp_path / "site"), DICEKERNELS_BACKEND="eager") == ""


def test_native_leaves_the_lock_of_a_free_threaded_python_off() -> None:
    """Such a Python takes its lock again for a module that does not say that it needs none."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        code = "import sys, dicekernels._native; print(sys._is_gil_enabled())"
        done = captured([sys.executable, "-c", code], check=True)
        assert done.stdout.strip() == "False"
    source = (Path(__file__).parents[2] / "csrc" / "native.cpp").read_text()
    assert re.findall(r"^PYBIND11_MODULE\((.+)\) {$", source, re.M) == ["_native, m, py::mod_gil_not_used()"]


def test_package_works_without_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dicekernels._native", None)
    assert native.native_module() is None
    assert native.build_config() is not None


@pytest.mark.parametrize("text", [None, "", "{", "no JSON"])
def test_build_config_is_none_where_nothing_says_it(library_folder: Path, text: str | None) -> None:
    if text is not None:
        (library_folder / "_build_info.json").write_text(text)
    assert native.build_config() is None


def test_build_config() -> None:
    config = native.build_config()
    assert config is not None
    assert set(config) == {
        *("version", "commit", "compiler", "flags", "torch", "torch_target", "glibc", "isas", "cuda")
    }
    base, _, local = config["version"].partition("+")
    assert base == __version__
    assert config["torch_target"] == "2.10"
    assert re.fullmatch(r"2\.\d+", config["glibc"])
    assert "-fvisibility=hidden" in config["flags"].split()
    assert "-ffast-math" not in config["flags"]
    isas = config["isas"]
    assert set(isas) == ({"baseline", "avx2", "avx512"} if X86 else {"baseline"})
    if X86:
        assert "-mavx512f" in isas["avx512"].split()
        assert "avx512" not in isas["avx2"]
        assert "avx" not in isas["baseline"]
    cuda = config["cuda"]
    assert (cuda is not None) == native.library_path("cuda").is_file()
    assert local == ("cu" + "".join(cuda["nvcc"].split(".")[:2]) if cuda else "")


def test_native_module_is_of_the_same_build() -> None:
    module = pytest.importorskip("dicekernels._native", reason="_native was not built")
    assert module.build_config() == native.build_config()


# Label maps, softmax, product overlap, rows I, FP, FN and G: Dice. (Those left out are false or 0.)
DICE = {"activation": 2, "rows": 0b1111, "ignore_index": None, "focal_gamma": 2.0}
NUMBERS = ("masked", "channels_last", "dense", "overlap", "voxel_term", "product_mask", "first_class")


def launch_plan(shape: tuple[int, int, int], **changes: object) -> dict[str, dict[str, object]]:
    module = pytest.importorskip("dicekernels._native", reason="_native was not built")
    problem = dict.fromkeys(NUMBERS, 0) | DICE | {"logits": "float32", "target": "uint8"}
    return module.launch_plan(shape=shape, **problem | changes)


def test_launch_plan_has_a_block_for_each_chunk() -> None:
    # 128^3 voxels are 512 chunks of 4096. 256^3 are 4096 runs of 4096: two runs a chunk make 2048 chunks,
    # while the backward pass has a block for each run.
    for size, sums, backward in ((128, 512, 512), (256, 2048, 4096)):
        plan = launch_plan((3, 4, size**3))
        assert plan["sums"]["blocks"] == 3 * sums
        assert plan["sums_backward"]["blocks"] == 3 * backward


def test_launch_plan_names_the_kernel() -> None:
    voxels = 64**3
    assert launch_plan((1, 4, voxels))["sums"]["wide"]
    assert not launch_plan((1, 4, voxels))["sums"]["channels_last"]
    assert launch_plan((1, 4, voxels), channels_last=True)["sums"]["channels_last"]
    assert not launch_plan((1, 4, 63**3))["sums_backward"]["wide"]
    assert launch_plan((1, 4, voxels))["sums"]["direct_labels"]
    assert not launch_plan((1, 4, voxels), target="int64")["sums"]["direct_labels"]
    for changes in ({"dense": True}, {"logits": "float64"}, {"overlap": 2}, {"activation": 1}):
        plan = launch_plan((1, 4, voxels), **changes)
        assert {plan[each]["kernel"] for each in plan} == {"general"}
    plan = launch_plan((1, 4, voxels))
    assert {plan[each]["kernel"] for each in plan} == {"fast"}


@pytest.mark.parametrize("classes", [1, 2, 14, 16, 17, 117, 128, 129, 300, 512])
@pytest.mark.parametrize("logits", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("dense", [False, True])
def test_launch_plan_fits_every_gpu(classes: int, logits: str, dense: bool) -> None:
    """The smallest limits, of sm_86, 89 and 120: 99 KiB of shared memory, 1024 threads (CUDA guide)."""
    if dispatch.cuda_takes(getattr(torch, logits), classes):
        pytest.skip("the backend does not take it")
    target = logits if dense else "int64"
    for masked in (False, True):
        plan = launch_plan((1, classes, 64**3), logits=logits, masked=masked, target=target, dense=dense)
        for part in plan.values():
            assert 0 < part["shared_bytes"] <= 99 * 1024
            assert part["threads"] % 32 == 0
            assert 32 <= part["threads"] <= 1024


def test_launch_plan_refuses_what_is_no_problem() -> None:
    with pytest.raises(ValueError, match="dtype: got 'float8', expected as float32 or uint8"):
        launch_plan((1, 2, 8), logits="float8")
    with pytest.raises(ValueError, match=r"expected \(B, C, V\) with at least one class"):
        launch_plan((1, 0, 8))


def test_schemas_are_those_of_the_parameters_in_cpp() -> None:
    module = pytest.importorskip("dicekernels._native", reason="_native was not built")
    assert module.schemas() == {name: name + op.schema for name, op in OPS.items() if op.compiled}


def test_isa_level_is_that_of_the_kernels() -> None:
    module = pytest.importorskip("dicekernels._native", reason="_native was not built")
    if os.environ.get("DICEKERNELS_CPU_CAPABILITY"):
        pytest.skip("DICEKERNELS_CPU_CAPABILITY is set")
    assert module.isa_level() == torch.ops.dicekernels.cpu_capability()


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
