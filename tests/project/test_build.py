"""What setup.py decides to build: the toolkit, the switch, the compiler, the architectures."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from places import REPOSITORY

SETUP = REPOSITORY / "setup.py"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the toolkits here are shell scripts")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lambda_kernels_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def make_toolkit(home: Path, version: str = "13.0", library: str = "lib64/libcudart_static.a") -> Path:
    """A prefix that looks like a toolkit. Its nvcc knows --version, --dryrun and --list-gpu-arch."""
    script(
        home / "bin/nvcc",
        'case "$1" in\n'
        f'--version) echo "Cuda compilation tools, release {version}, V{version}.1";;\n'
        f"--dryrun) echo '#$ TOP={home}/bin/..' >&2;;\n"
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\n';;\n"
        "esac",
    )
    for file in ("include/cuda_runtime.h", library):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    return home


def test_cuda_home_comes_first(build: ModuleType, tmp_path: Path) -> None:
    chosen, other = make_toolkit(tmp_path / "chosen"), make_toolkit(tmp_path / "other")
    toolkit = build.find_toolkit({"CUDA_HOME": str(chosen), "PATH": f"{other}/bin:/bin"}, tmp_path / "none")
    assert toolkit.home == chosen
    assert toolkit.version == "13.0"
    assert toolkit.include == chosen / "include"


def test_nvcc_in_another_prefix_is_asked_where_it_lives(build: ModuleType, tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "real")
    wrapper = script(tmp_path / "prefix/bin/nvcc", f'exec {home}/bin/nvcc "$@"')
    toolkit = build.find_toolkit({"PATH": f"{wrapper.parent}:/bin"}, tmp_path / "none")
    assert toolkit.home == home


def test_conventional_prefix_newest_last_resort(build: ModuleType, tmp_path: Path) -> None:
    for version in ("9.2", "12.8", "13.1"):
        make_toolkit(tmp_path / f"cuda-{version}", version)
    assert build.find_toolkit({"PATH": "/nowhere"}, tmp_path).version == "13.1"
    (tmp_path / "cuda").symlink_to(tmp_path / "cuda-12.8")
    assert build.find_toolkit({"PATH": "/nowhere"}, tmp_path).version == "12.8"


def test_incomplete_toolkit_is_passed_over(build: ModuleType, tmp_path: Path) -> None:
    broken = make_toolkit(tmp_path / "broken")
    (broken / "lib64/libcudart_static.a").unlink()
    whole = make_toolkit(tmp_path / "cuda", library="targets/x86_64-linux/lib/libcudart_static.a")
    environ = {"CUDA_HOME": str(broken), "PATH": "/nowhere"}
    assert build.inspect_toolkit(broken) == f"{broken} has no lib64/libcudart_static.a"
    if build.platform.machine() == "x86_64":
        assert build.find_toolkit(environ, tmp_path).home == whole
    assert build.find_toolkit(environ, tmp_path / "none") == (
        f"no CUDA toolkit found; {broken} has no lib64/libcudart_static.a"
    )


def test_nothing_at_all(build: ModuleType, tmp_path: Path) -> None:
    assert build.find_toolkit({"PATH": "/nowhere"}, tmp_path) == "no CUDA toolkit found"


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("", None), ("0", False), ("1", True)])
def test_switch(build: ModuleType, value: str | None, expected: bool | None) -> None:
    assert build.cuda_switch({} if value is None else {"LAMBDA_KERNELS_CUDA": value}) is expected


@pytest.mark.parametrize("value", ["2", "yes", "ON", " 1"])
def test_switch_rejects_other_values(build: ModuleType, value: str) -> None:
    with pytest.raises(build.BuildError, match=f"must be 0 or 1 or unset, got '{value}'"):
        build.cuda_switch({"LAMBDA_KERNELS_CUDA": value})


def plan(build: ModuleType, switch: str, *, compiler: str | None = "c++", toolkit: object = None, cuda: str = "13.2"):
    environ = {"LAMBDA_KERNELS_CUDA": switch}
    if toolkit is None:
        toolkit = build.Toolkit(Path("/cuda"), Path("/cuda/include"), Path("/cuda/lib64/libcudart_static.a"), "13.0")
    return build.make_plan(environ, compiler, toolkit, "2.15.0", cuda)


def test_plan_with_everything(build: ModuleType) -> None:
    for switch in ("", "1"):
        decided = plan(build, switch)
        assert decided.cpp
        assert decided.toolkit.version == "13.0"
        assert decided.message == "building CPU and CUDA code with CUDA 13.0 from /cuda"
    assert plan(build, "0") == (True, None, "building CPU code only: LAMBDA_KERNELS_CUDA=0")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"toolkit": "no CUDA toolkit found"}, "no CUDA toolkit found"),
        ({"cuda": "12.8"}, "CUDA 13.0, PyTorch 2.15.0 is built for CUDA 12.8"),
        ({"cuda": None}, "PyTorch 2.15.0 is built without CUDA"),
    ],
)
def test_plan_without_cuda_says_why_in_one_line(build: ModuleType, given: dict, reason: str) -> None:
    decided = plan(build, "", **given)
    assert decided.cpp
    assert decided.toolkit is None
    assert reason in decided.message
    assert "\n" not in decided.message
    with pytest.raises(build.BuildError, match=r"LAMBDA_KERNELS_CUDA=1, but .*LAMBDA_KERNELS_CUDA=0"):
        plan(build, "1", **given)


def test_plan_without_python_headers(build: ModuleType) -> None:
    toolkit = build.Toolkit(Path("/cuda"), Path("/cuda/include"), Path("/cuda/lib64/libcudart_static.a"), "13.0")
    decided = build.make_plan({}, "c++", toolkit, "2.15.0", "13.2", headers=False)
    assert (decided.cpp, decided.toolkit) == (False, None)
    assert "python3-dev" in decided.message
    with pytest.raises(build.BuildError, match=r"Python\.h"):
        build.make_plan({"LAMBDA_KERNELS_CUDA": "1"}, "c++", toolkit, "2.15.0", "13.2", headers=False)
    assert build.headers_are_there()


def test_plan_without_compiler(build: ModuleType) -> None:
    decided = plan(build, "", compiler=None)
    assert (decided.cpp, decided.toolkit) == (False, None)
    assert "no C++ compiler" in decided.message
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        plan(build, "1", compiler=None)


def test_compiler(build: ModuleType, tmp_path: Path) -> None:
    assert build.find_compiler({"PATH": str(tmp_path)}) is None
    script(tmp_path / "clang++", "")
    assert build.find_compiler({"PATH": str(tmp_path)}) == "clang++"
    script(tmp_path / "c++", "")
    assert build.find_compiler({"PATH": str(tmp_path)}) == "c++"
    assert build.find_compiler({"PATH": str(tmp_path), "CXX": "clang++ -m64"}) == "clang++ -m64"
    with pytest.raises(build.BuildError, match="CXX names 'g\\+\\+-99'"):
        build.find_compiler({"PATH": str(tmp_path), "CXX": "g++-99"})


def test_architectures(build: ModuleType, tmp_path: Path) -> None:
    nvcc = make_toolkit(tmp_path / "cuda") / "bin/nvcc"
    supported = build.supported_architectures(nvcc)
    assert supported == ["7.5", "8.0", "9.0", "10.0"]
    assert build.architecture_list({}, supported) == "8.0;9.0+PTX"
    assert build.architecture_list({}, []) == "8.0;8.6;8.9;9.0+PTX"
    assert build.architecture_list({}, ["10.0", "12.0"]) == "10.0+PTX"
    assert build.architecture_list({"TORCH_CUDA_ARCH_LIST": "Hopper"}, supported) == "Hopper"


@pytest.mark.parametrize("value", ["2", "true"])
def test_wrong_switch_stops_the_build(value: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SETUP), "build_ext"]
    environ = {**os.environ, "LAMBDA_KERNELS_CUDA": value}
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.strip() == f"lambda-kernels: LAMBDA_KERNELS_CUDA must be 0 or 1 or unset, got {value!r}"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The files that a wheel takes from the packages, and those of a source archive; nothing is compiled for either."""
    folder = tmp_path_factory.mktemp("tree") / "checkout"
    built = shutil.ignore_patterns(".*", "*.so", "*.pyd", "__pycache__", "*.egg-info")
    for name in ("lambda_kernels", "python", "csrc", "tests", "benchmarks"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built", "sdist", "--dist-dir", "packed"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    wheel = {path.relative_to(folder / "built").as_posix() for path in (folder / "built").rglob("*") if path.is_file()}
    (archive,) = (folder / "packed").iterdir()
    with tarfile.open(archive) as opened:
        return wheel, {name.partition("/")[2] for name in opened.getnames()}


def shipped(folder: Path) -> set[str]:
    """What lies in a package of this checkout, but for what is built."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so", ".pyd"))
    return {path.relative_to(folder.parent).as_posix() for path in files}


def test_a_wheel_holds_all_of_both_packages_and_nothing_else(packed: tuple[set[str], set[str]]) -> None:
    wheel, _ = packed
    expected = shipped(REPOSITORY / "lambda_kernels") | shipped(REPOSITORY / "python/lambda_vit")
    assert {"lambda_kernels/py.typed", "lambda_vit/py.typed", "lambda_vit/recipes/digits.yaml"} <= wheel
    assert wheel == expected


def test_a_source_archive_holds_all_that_a_build_takes(packed: tuple[set[str], set[str]]) -> None:
    _, archive = packed
    sources = {f"csrc/{path.name}" for path in (REPOSITORY / "csrc").iterdir()}
    assert sources | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= archive
    assert shipped(REPOSITORY / "lambda_kernels") <= archive
