"""The parts of `benchmarks/gpu/run.py` and the commands that they run within limits; every kernel has a case."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from places import REPOSITORY

from benchmarks.gpu import execution, parts, precompile, summary
from benchmarks.gpu import run as gpu
from benchmarks.tools import records


def load_one_kernel() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_kernel", REPOSITORY / "tests" / "gpu" / "one_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_budget():
    now = [100.0]
    budget = execution.Budget(300 + execution.RESERVE_S, clock=lambda: now[0])
    assert budget.left() == 300
    assert budget.grant(limit=200, least=60) == 200
    now[0] += 250
    assert budget.grant(limit=200, least=50) == 50
    assert budget.grant(limit=200, least=51) is None
    assert budget.grant(limit=10, least=60) == 10  # who limits a part to so little means it
    now[0] += 100
    assert budget.left() == 0
    assert budget.grant(limit=200, least=1) is None


def good(job: execution.Job) -> dict:
    return {"said": job.step(sys.executable, "-c", "print('hello')").output.strip()}


def bad(job: execution.Job) -> dict:
    job.step(sys.executable, "-c", "raise SystemExit(3)")
    job.step("no-such-program-anywhere")
    return {}


def broken(job: execution.Job) -> dict:
    raise KeyError("missing")


def slow(job: execution.Job) -> dict:
    job.step(sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
    return {}


def test_parts_go_on_after_a_failure(tmp_path):
    made = {"good": parts.Part(good, 30, 1), "bad": parts.Part(bad, 30, 1), "broken": parts.Part(broken, 30, 1)}
    made |= {"slow": parts.Part(slow, 1.5, 1), "long": parts.Part(good, 5000, 4000)}
    environment = dict(os.environ)
    results = {n: gpu.run_part(n, part, execution.Budget(100), tmp_path, environment) for n, part in made.items()}
    assert {name: part["state"] for name, part in results.items()} == {
        "good": "passed",
        "bad": "failed",
        "broken": "failed",
        "slow": "stopped at its limit",
        "long": "skipped",
    }
    assert results["good"]["said"] == "hello"
    assert [step["status"] for step in results["bad"]["steps"]] == [3, 127]
    assert "KeyError" in results["broken"]["note"]
    assert "needs 4000 s" in results["long"]["note"]
    assert [path.name for path in tmp_path.iterdir()] == ["logs.txt"]
    log = (tmp_path / "logs.txt").read_text(encoding="utf-8")
    headed = re.split(r"^===== (\w+), .*\n", log, flags=re.MULTILINE)[1:]
    sections = dict(zip(headed[::2], headed[1::2], strict=True))
    assert list(sections) == ["good", "bad", "broken", "slow"]
    assert "begun" in sections["slow"]
    assert "[stopped at its limit" in sections["slow"]
    assert "[status 3" in sections["bad"]
    assert "no-such-program-anywhere" in sections["bad"]
    json.dumps(results)
    printed = summary.report({"environment": {"gpu": "none"}, "parts": results})
    for name, part in results.items():
        assert f"{name:<10} {part['state']}" in printed


def test_an_illegal_access_is_looked_for_alone(monkeypatch, tmp_path):
    code = (
        "import os, sys; print(sys.argv[1:], os.environ.get('CUDA_LAUNCH_BLOCKING'));"
        "print('FAILED tests/a.py::b[c] - RuntimeError: CUDA error: an illegal memory access was encountered')"
    )
    monkeypatch.setattr(parts, "pytest", lambda *arguments: [sys.executable, "-c", code, *map(str, arguments)])
    job = execution.Job(tmp_path, 60, dict(os.environ))
    found = parts.tests(job)
    assert list(found["counts"]) == ["waiting", "in parallel", "alone", "illegal access"]
    assert "['tests/a.py::b[c]'] 1" in job.steps[-1].output
    assert " None" in job.steps[-2].output


def test_rows_survive_a_writer_that_was_stopped(tmp_path, monkeypatch):
    row = {"name": "c", "what": "forward T"}
    others = [{"name": "a", "skipped": "no CUDA device"}, {"name": "b", "failed": "AssertionError"}]
    text = "".join(json.dumps(line) + "\n" for line in (row, *others)) + json.dumps(row)[:20]
    job = execution.Job(tmp_path, 30, dict(os.environ))
    code = "import os, sys; open(os.environ[sys.argv[1]], 'w').write(sys.argv[2]); print('FAILED a::b - why')"
    monkeypatch.setattr(parts, "pytest", lambda *arguments: [sys.executable, "-c", code, records.LINES, text])
    found = parts._rows(job, "benchmarks/test_x.py", compiles=False)
    assert found["rows"] == [row]
    assert found["failures"] == ["FAILED a::b - why"]


def test_a_stopped_command_takes_its_children_along(tmp_path, monkeypatch):
    """Even if it does not heed the interrupt."""
    monkeypatch.setattr(execution, "PATIENCE_S", 0.5)
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(alive)!r}, 'w').close()"
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    step = execution.execute([sys.executable, "-c", code], 1.0, dict(os.environ))
    assert step.status is None
    time.sleep(5)
    assert not alive.exists()


def test_commands_side_by_side_that_no_time_is_left_for_do_not_begin(tmp_path):
    job = execution.Job(tmp_path, 0.0, dict(os.environ))
    found = job.side_by_side({"a": ["no-such-program-anywhere"]}, 2, 10)
    assert (found["a"].status, found["a"].output) == (None, "no time was left")
    job = execution.Job(tmp_path, 30.0, dict(os.environ))
    code = "import os; print('said', os.environ['HOW'])"
    commands = {name: [sys.executable, "-c", code, name] for name in "abc"}
    found = job.side_by_side(commands, 2, 20, HOW="so")
    assert [step.output.strip() for step in found.values()] == ["said so"] * 3
    assert (tmp_path / "logs.txt").read_text(encoding="utf-8").count("said so\n\n[status 0") == 3


def test_a_kernel_that_was_tried_is_not_compiled_again(tmp_path, monkeypatch, capsys):
    wanted, tried = [(192, {"forward": name}, False) for name in "abc"], []

    def compiled(job: precompile.Job) -> str:
        tried.append(job[1]["forward"])
        if len(tried) == 2:
            raise KeyboardInterrupt  # time is up
        return "no registers" if job[1]["forward"] == "a" else ""

    monkeypatch.setattr(precompile, "compiled", compiled)
    monkeypatch.setattr(precompile, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))
    with pytest.raises(KeyboardInterrupt):
        precompile.precompile(wanted, tmp_path / "stamps", 1)
    assert not (tmp_path / "stamps" / "complete").exists()
    assert "a" in tried
    first = [name for name in tried if name != tried[1]]
    tried[:] = ["", ""]
    assert precompile.precompile(wanted, tmp_path / "stamps", 1) == 1  # one of them does not compile
    assert sorted(first + tried[2:]) == ["a", "b", "c"]
    assert (tmp_path / "stamps" / "complete").exists()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no registers"
    assert said[1].startswith(f"{len(tried) - 2} of 3 kernels in ")
    assert said[1].endswith("1 failed")


def test_what_the_parts_name_is_there():
    source = (REPOSITORY / "benchmarks" / "gpu" / "parts.py").read_text(encoding="utf-8")
    named = re.findall(r'"((?:benchmarks|tests)/[\w/]+(?:\.py)?)"', source)
    assert len(named) > 5
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
    for name in ("fused", "operators", "gelu"):
        assert (REPOSITORY / f"tests/kernels/ops/ln_mlp/test_{name}.py").is_file()
    waiting = re.compile("|".join(parts.WAITING.split(" or ")))
    for path in (REPOSITORY / "tests" / "gpu").glob("test_*.py"):
        for test in re.split(r"^def (?=test_)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            assert not ("_sleep(" in test and ".query()" in test) or waiting.search(test.split("(")[0]), test[:60]


def test_every_kernel_has_a_case():
    """One that is added without one would be timed unseen."""
    module = load_one_kernel()
    assert set(module.KERNELS) == {*parts.CASES, *(case for case, _ in parts.CONTROLS.values())}
    launches = (REPOSITORY / "lambda_kernels/ops/ln_mlp/fused/launch.py").read_text(encoding="utf-8")
    launched = set(re.findall(r"Launch\(\s+\w+\.(\w+),", launches))
    assert len(launched) == launches.count("return Launch(") == 8
    cuda = (REPOSITORY / "csrc/histogram_cuda.cu").read_text(encoding="utf-8")
    in_cuda = set(re.findall(r"__global__ void(?: __launch_bounds__\([\w:]+\))?\s+(\w+)\(", cuda))
    assert len(in_cuda) == cuda.count("__global__ void")
    # A case of the MLP raises an error unless these ran.
    assert set().union(*(ran for _, _, ran in module.MLP.values())) == launched
    assert set().union(*parts.CASES.values()) == launched | in_cuda
    assert {"hidden_gradient", "saved_gradient"} <= {stage for forced, _, _ in module.MLP.values() for stage in forced}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(parts.CASES))
def test_the_cases_are_right_where_there_is_no_gpu(case, monkeypatch):
    """In Triton's interpreter, and with the CPU's histograms: what fails on a GPU is then the GPU's."""
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", "off")
    if case.startswith("histogram"):
        from extension_support import require_extension

        require_extension()
    assert load_one_kernel().main([case], device="cpu") == 0


@pytest.mark.slow
def test_the_race_that_is_planted_compiles(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA toolkit")
    library = load_one_kernel().build_planted_race(tmp_path, "sm_90")
    triton = pytest.importorskip("triton")
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    sass = subprocess.run([binaries / "cuobjdump", "-sass", library], capture_output=True, text=True, check=True).stdout
    assert "STS" in sass
    assert "LDS" in sass
    assert "BAR" not in sass
