"""The compiled extension as a library: how it loads, what it depends on, what it tells, what its kernels became."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from extension_support import require_extension, tool
from places import REPOSITORY

from lambda_kernels.errors import BackendUnavailableError, ExtensionUnavailableError
from lambda_kernels.ops import histogram as ops
from lambda_kernels.ops.histogram import _extension, function


@pytest.fixture
def library() -> str:
    require_extension()
    return _extension.load().__file__


@pytest.fixture
def cuda_library(library: str) -> str:
    if _extension.build_info()["cuda"] == "none":
        pytest.skip("the extension was built without CUDA code")
    return library


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state before the first use."""
    monkeypatch.setattr(_extension, "_loaded", None)
    monkeypatch.setattr(_extension, "_failure", None)


@pytest.fixture
def broken(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An extension that cannot be loaded, and a list with one entry per attempt."""
    attempts: list[int] = []

    def fail() -> None:
        attempts.append(1)
        raise ImportError("libmissing.so.1: cannot open shared object file")

    monkeypatch.setattr(_extension, "_import", fail)
    return attempts


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_import_of_the_package_loads_no_extension() -> None:
    code = (
        "import sys, lambda_kernels, lambda_kernels.ops.histogram.function; print('lambda_kernels._C' in sys.modules)"
    )
    assert output(sys.executable, "-c", code).strip() == "False"


def test_build_info_tells_what_was_built(library: str) -> None:
    info = _extension.build_info()
    assert set(info) == {"compiler", "cuda", "architectures", "torch", "sources"}
    assert all(info.values())
    assert (info["cuda"] == "none") == (info["architectures"] == "none")
    assert re.match(r"\d+\.\d+", info["torch"])
    assert re.fullmatch(r"[0-9a-f]{12}|unknown", info["sources"])


def test_one_file_serves_every_python(library: str) -> None:
    suffix = "".join(Path(library).suffixes)
    assert suffix == ".pyd" if sys.platform == "win32" else suffix == ".abi3.so"


@pytest.mark.usefixtures("unloaded")
def test_many_threads_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, module = [], object()

    def slow_import() -> object:
        attempts.append(1)
        threading.Event().wait(0.05)
        return module

    monkeypatch.setattr(_extension, "_import", slow_import)
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(_extension.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(attempts) == 1
    assert results == [module] * 8


def test_failure_keeps_its_cause_and_is_not_retried(broken: list[int]) -> None:
    for _ in range(2):
        with pytest.raises(ExtensionUnavailableError, match=r"libmissing\.so\.1.*Build it with") as caught:
            _extension.load()
        assert isinstance(caught.value.__cause__, ImportError)
    assert not _extension.available()
    assert "ImportError" in _extension.why_unavailable()
    assert len(broken) == 1


@pytest.mark.usefixtures("unloaded")
def test_missing_file_is_called_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'lambda_kernels._C'")

    monkeypatch.setattr(_extension, "_import", absent)
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "ops" / "histogram" / "_extension.py"))
    assert "not built" in _extension.why_unavailable()
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "cannot be loaded" in _extension.why_unavailable()


def test_by_name_never_falls_back(broken: list[int]) -> None:
    x, grid = torch.zeros(3, 1), ops.uniform_grid(0.0, 1.0, 4)
    with pytest.raises(ExtensionUnavailableError, match=r"libmissing"):
        ops.histogram(x, grid, backend="extension")


def test_by_name_on_a_device_without_code(library: str) -> None:
    with pytest.raises(BackendUnavailableError, match="no code for mps"):
        ops.histogram_backend("mps", torch.float32, "extension")
    with pytest.raises(BackendUnavailableError, match=r"no code for torch\.int8"):
        ops.histogram_backend("cpu", torch.int8, "extension")


def test_auto_falls_back_with_one_notice(
    broken: list[int], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(function, "_noticed", False)
    x, grid = torch.tensor([[0.1], [0.9], [2.0]]), ops.uniform_grid(0.0, 1.0, 2)
    for _ in range(2):
        result = ops.histogram(x, grid)
        assert result.backend == "torch"
        assert "libmissing" in result.reason
        assert result.counts.tolist() == [[1, 1]]
    notices = [w for w in recwarn if issubclass(w.category, ops.HistogramFallbackWarning)]
    assert len(notices) == 1
    assert "libmissing" in str(notices[0].message)
    assert notices[0].filename == __file__


def test_auto_takes_the_extension(library: str) -> None:
    assert ops.histogram_backend("cpu", torch.bfloat16) == ops.histogram_backend("cpu", torch.bfloat16, "extension")
    assert ops.histogram(torch.zeros(3, 1), ops.uniform_grid(0.0, 1.0, 4)).backend == "extension"


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("8.0;8.6;8.9;9.0+PTX", (8, 0), True),
        ("8.0;8.6;8.9;9.0+PTX", (8, 7), True),
        ("8.0;8.6;8.9;9.0+PTX", (10, 0), True),
        ("8.0;8.6;8.9;9.0+PTX", (7, 5), False),
        ("8.6", (8, 0), False),
        ("8.6", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
    ],
)
def test_architectures_cover(architectures: str, capability: tuple[int, int], covered: bool) -> None:
    assert function._architectures_cover(architectures, capability) is covered


@pytest.mark.skipif(sys.platform != "linux", reason="ELF only")
def test_needs_no_cuda_library(library: str) -> None:
    needed = re.findall(r"NEEDED.*\[(.+)\]", output(tool("readelf"), "-d", library))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"cuda|cudart|nvrtc|torch_python|libpython", name)]


@pytest.mark.skipif(sys.platform != "linux", reason="ELF only")
def test_undefined_symbols_belong_to_stable_interfaces(library: str) -> None:
    """Only the C interface of libtorch and the stable ABI of Python: nothing of c10, ATen or CUDA."""
    symbols = re.findall(r" U (\S+)", output(tool("nm"), "-D", "--undefined-only", library))
    assert [name for name in symbols if name.startswith("aoti_torch_")]
    assert not [name for name in symbols if re.match(r"cuda|cu[A-Z]|_ZN?K?(2at|3c10|5torch)|torch_c10_cuda", name)]
    assert not [name for name in symbols if "cuda" in name and name != "aoti_torch_device_type_cuda"]


def test_one_bin_rule_in_the_sources() -> None:
    """CPU and CUDA code fall back on one definition; only vector code, which is tested edge by edge, repeats it."""
    sources = {path.name: path.read_text() for path in (REPOSITORY / "csrc").iterdir()}
    code = {name: re.sub(r"//.*", "", text) for name, text in sources.items()}
    assert {name for name, text in code.items() if re.search(r"\bfloor\(", text)} == {"binning.h", "cpu_plain.cpp"}
    for name in ("cpu_direct.h", "histogram_phases.h"):
        assert "counter_of(" in code[name]
    assert "fixed_bin(" in code["histogram_phases.h"]


def test_types_of_headers_have_names_of_their_own() -> None:
    """CPU and CUDA code are linked into one library, in which two types of one name would be taken for each other."""
    headers = "\n".join(path.read_text() for path in (REPOSITORY / "csrc").glob("*.h"))
    names = re.findall(
        r"^(?:struct|class|enum class|enum) (?:alignas\(\d+\) )?(\w+)(?: : .*)? \{", headers, re.MULTILINE
    )
    assert {"Runs", "Launch", "LaneGrids", "Outside", "Histogram"} <= set(names)
    assert len(set(names)) == len(names)


def test_cuda_code_is_there_for_every_architecture(cuda_library: str) -> None:
    held = set(re.findall(r"arch = sm_(\d+)", output(tool("cuobjdump"), cuda_library)))
    asked = re.findall(r"(\d+)\.(\d+)", _extension.build_info()["architectures"])
    assert held >= {major + minor for major, minor in asked}


def test_kernels_do_not_spill(cuda_library: str) -> None:
    usage = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", output(tool("cuobjdump"), "-res-usage", cuda_library))
    assert usage
    for registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0)
        assert int(registers) <= 64


def test_kernels_read_16_bytes_at_once(cuda_library: str) -> None:
    """Along a line into registers, of a row of channels past them into shared memory."""
    tool("nvdisasm")
    functions = re.split(r"\n\s*Function : ", output(tool("cuobjdump"), "-sass", cuda_library))[1:]
    kernels = [text for text in functions if re.match(r"\S*histogram_kernel", text)]
    columns = [text for text in kernels if "6LayoutE0E" in text.split()[0]]
    lanes = [text for text in kernels if "6LayoutE1E" in text.split()[0]]
    assert columns
    assert len(columns) == len(lanes)
    assert len(columns) + len(lanes) == len(kernels)
    for text in columns:
        copies = re.findall(r"LDGSTS\.(\S+)", text)
        assert copies
        assert all(re.fullmatch(r"E\.BYPASS(\.\w+)*\.128", copy) for copy in copies)
    for text in lanes:
        assert len(re.findall(r"LDG\.E\.128", text)) >= 2


def test_counting_fuses_no_float64(cuda_library: str) -> None:
    """DFMA would round a value once where the CPU rounds it twice; in moments it is meant."""
    tool("nvdisasm")
    functions = re.split(r"\n\s*Function : ", output(tool("cuobjdump"), "-sass", cuda_library))[1:]
    counting = [text for text in functions if re.match(r"\S*histogram_kernel\S*Lb0EEEEEv", text)]
    assert len(counting) < len([text for text in functions if re.match(r"\S*histogram_kernel", text)])
    assert counting
    for text in counting:
        assert "DFMA" not in text
    assert all("DMUL" in text for text in counting if "Codes" not in text.split()[0])
