"""`benchmarks/gpu/run.py` where there is no GPU: it says so and does nothing; its budget, its steps, its table."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from places import REPOSITORY

from benchmarks.gpu import run as gpu
from benchmarks.gpu import summary as table

COMMAND = REPOSITORY / "benchmarks" / "gpu" / "run.py"


def load_sanitize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize", REPOSITORY / "tests" / "gpu" / "sanitize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120
    )


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    done = run("--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["run.py: no CUDA device here, nothing was run"]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_unknown_parts_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path / "out"), "--only", "mlp,speed"])
    assert stopped.value.code == 2
    assert "unknown speed; parts are build, tests, ceilings" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_budget():
    now = [100.0]
    budget = gpu.Budget(300 + gpu.RESERVE_S, clock=lambda: now[0])
    assert budget.left() == 300
    assert budget.grant(limit=200, least=60) == 200
    now[0] += 250
    assert budget.grant(limit=200, least=50) == 50
    assert budget.grant(limit=200, least=51) is None
    now[0] += 100
    assert budget.left() == 0
    assert budget.grant(limit=200, least=1) is None


@pytest.fixture
def parts(monkeypatch) -> dict:
    """Parts that need no GPU."""

    def good(job: object) -> dict:
        return {"said": job.step(sys.executable, "-c", "print('hello')").output.strip()}

    def bad(job: object) -> dict:
        job.step(sys.executable, "-c", "raise SystemExit(3)")
        job.step("no-such-program-anywhere")
        return {}

    def broken(job: object) -> dict:
        raise KeyError("missing")

    def slow(job: object) -> dict:
        job.step(sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
        return {}

    found = {"good": (good, 30, 1), "bad": (bad, 30, 1), "broken": (broken, 30, 1), "slow": (slow, 1.5, 1)}
    found["long"] = (good, 5000, 4000)
    monkeypatch.setattr(gpu, "PARTS", found)
    return found


def test_parts_go_on_after_a_failure(parts, tmp_path):
    environment = dict(os.environ)
    results = {name: gpu.run_part(name, gpu.Budget(100), tmp_path, environment) for name in parts}
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
    assert results["slow"]["seconds"] < 20
    assert "begun" in (tmp_path / "slow.log").read_text(encoding="utf-8")
    assert "[stopped at its limit" in (tmp_path / "slow.log").read_text(encoding="utf-8")
    log = (tmp_path / "bad.log").read_text(encoding="utf-8")
    assert "[status 3" in log
    assert "no-such-program-anywhere" in log
    json.dumps(results)
    printed = table.report({"environment": {"gpu": "none"}, "parts": results})
    for name, part in results.items():
        assert f"{name:<10} {part['state']}" in printed


def test_parts_of_an_earlier_run_stay(parts, tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--out", str(tmp_path), "--only", "good"]) == 0
    assert gpu.main(["--out", str(tmp_path), "--only", "bad"]) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert {name: part["state"] for name, part in found["parts"].items()} == {"good": "passed", "bad": "failed"}
    assert gpu.main(["--out", str(tmp_path), "--only", "good"]) == 0  # what is asked for decides, not what was before
    capsys.readouterr()
    found["environment"]["sources"] = "others"
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert gpu.main(["--out", str(tmp_path), "--only", "good"]) == 2
    assert "was measured otherwise (sources was others and is " in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text()) == found
    for text in ("[1]", "{", '{"environment": 3, "parts": {}}'):
        (tmp_path / "results.json").write_text(text)
        assert gpu.main(["--out", str(tmp_path), "--only", "good"]) == 2
        assert "is none of this program's results; choose another --out" in capsys.readouterr().err


def test_all_processes_get_one_assembler(monkeypatch, tmp_path):
    """PyTorch's compiler sets another one for the rest of its process where none was set."""
    own = tmp_path / "ptxas"
    own.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    own.chmod(0o755)
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.setattr(gpu, "triton_assembler", lambda: str(own))
    environment = gpu.child_environment()
    assert environment["TRITON_PTXAS_PATH"] == str(own)
    assert gpu.assembled_by(environment) == f"{own} V12.8.93"
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/another")
    assert gpu.child_environment()["TRITON_PTXAS_PATH"] == "/another"
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    monkeypatch.setattr(gpu, "triton_assembler", lambda: "")
    assert "TRITON_PTXAS_PATH" not in gpu.child_environment()
    assert gpu.assembled_by(gpu.child_environment()) == "unknown"


def test_an_illegal_access_is_looked_for_alone(monkeypatch, tmp_path):
    code = (
        "import os, sys; print(sys.argv[1:], os.environ.get('CUDA_LAUNCH_BLOCKING'));"
        "print('FAILED tests/a.py::b[c] - RuntimeError: CUDA error: an illegal memory access was encountered')"
    )
    monkeypatch.setattr(gpu, "pytest", lambda *arguments: [sys.executable, "-c", code, *map(str, arguments)])
    job = gpu.Job(tmp_path / "tests.log", 60, dict(os.environ))
    found = gpu.tests(job)
    assert list(found["counts"]) == ["current stream", "in parallel", "alone", "illegal access"]
    assert "['tests/a.py::b[c]'] 1" in job.steps[-1].output
    assert " None" in job.steps[-2].output


def test_rows_survive_a_writer_that_was_stopped(tmp_path, monkeypatch):
    others = [{"name": "a", "skipped": "no CUDA device"}, {"name": "b", "failed": "AssertionError"}]
    text = "".join(json.dumps(row) + "\n" for row in (ROW, *others)) + json.dumps(ROW)[:40]
    job = gpu.Job(tmp_path / "mlp.log", 30, dict(os.environ))
    code = "import os, sys; open(os.environ[sys.argv[1]], 'w').write(sys.argv[2]); print('FAILED a::b - why')"
    monkeypatch.setattr(gpu, "pytest", lambda *arguments: [sys.executable, "-c", code, gpu.records.LINES, text])
    found = gpu._rows(job, "benchmarks/test_x.py", compiles=False)
    assert found["rows"] == [ROW]
    assert found["failures"] == ["FAILED a::b - why"]
    assert [path.name for path in tmp_path.iterdir()] == ["mlp.log"]


def test_a_stopped_command_takes_its_children_along(tmp_path, monkeypatch):
    """Even if it does not heed the interrupt."""
    monkeypatch.setattr(gpu, "PATIENCE_S", 0.5)
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(alive)!r}, 'w').close()"
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    step = gpu.execute([sys.executable, "-c", code], 1.0, dict(os.environ))
    assert step.status is None
    assert step.seconds < 4
    time.sleep(5)
    assert not alive.exists()


@pytest.mark.parametrize(
    ("target", "plain", "graph", "expected"),
    [
        (None, 1.5, 1.5, ""),
        (1.2, 1.2, 1.3, "yes"),
        (1.2, 1.1, 1.3, "graph only"),
        (1.2, 1.3, 1.1, "plain only"),
        (1.2, 1.1, 1.0, "no"),
        (1.2, None, 1.3, "yes"),
        (1.2, None, None, "not measured"),
    ],
)
def test_verdict(target, plain, graph, expected):
    assert table.verdict(target, plain, graph) == expected


ROW = {
    "name": "test_forward[T]",
    "what": "forward T, batch 256",
    "ratios": [
        {"ours": "ours", "rival": "timm", "plain": 2.01, "graph": 2.345, "target": 1.7},
        {"ours": "ours", "rival": "max-autotune", "plain": 1.1, "graph": 1.3, "target": 1.2},
    ],
    "plain_us": {"ours": 51.0, "ours, again": 52.0, "timm": 102.5, "max-autotune": 56.1},
    "graph_us": {"ours": 42.0, "ours, again": 42.1, "timm": 98.5, "max-autotune": 54.6},
    "spread": {"plain": 0.0196, "graph": 0.0024},
    "over_floor": 1.12,
    "not_built": {"torch.compile": "Unsupported: something"},
    "not_captured": {},
    "ran": ["one_pass 128x128 w8 s1", "one_pass 128x128 w8 s1"],
}


def test_rows_of_the_table():
    header = table._line(table.HEADER)
    first, second, missing, ran = table.row_lines(ROW)
    assert " ".join(first.split()) == "forward T, batch 256 ours timm 2.01 2.35 0.2% 42.0 1.12 1.70 yes"
    assert " ".join(second.split()) == "ours max-autotune 1.10 1.30 0.2% 42.0 1.12 1.20 graph only"
    for line, value, column in ((first, "2.01", "plain"), (first, "42.0", "µs"), (second, "graph only", "reached")):
        assert line.index(value) == header.index(column)
    assert "torch.compile: Unsupported" in missing
    assert ran.count("one_pass") == 1
    title, missing, _ = table.row_lines({**ROW, "ratios": []})
    assert title == "forward T, batch 256"
    assert "torch.compile: Unsupported" in missing


def test_rows_of_other_kinds():
    (host,) = table.row_lines({"name": "x", "what": "host time staged", "host_us": 61.234})
    assert host.split() == ["host", "time", "staged", "61.23"]
    assert table.row_lines({"name": "test_of_something", "median_us": 14400.04}) == ["test_of_something"]


def test_the_report_fits_and_keeps_its_beginning():
    rows = [{**ROW, "what": f"row {i}"} for i in range(200)]
    part = {"state": "failed", "seconds": 12.0, "rows": rows, "failures": [f"FAILED test_{i}" for i in range(100)]}
    printed = table.report({"environment": {"gpu": "NVIDIA H200"}, "parts": {"mlp": part}})
    assert len(printed) <= table.LIMIT
    assert printed.startswith("gpu: NVIDIA H200\nmlp        failed")
    assert "… and 75 more" in printed
    assert "row 1 " in printed
    assert printed.endswith("results.json has all of it")


def test_what_pytest_said():
    output = "..F\nFAILED tests/a.py::b - assert 1\nERROR tests/c.py\n1 failed, 40 passed, 2 skipped in 12.34s\n"
    assert table.pytest_summary(output) == "1 failed, 40 passed, 2 skipped in 12.34s"
    assert table.pytest_summary("== 3 passed in 61.20s (0:01:01) ==") == "3 passed in 61.20s (0:01:01)"
    assert table.pytest_summary("Traceback") == "no summary"
    assert table.pytest_failures(output) == ["FAILED tests/a.py::b - assert 1", "ERROR tests/c.py"]


@pytest.mark.parametrize(
    ("status", "output", "kernel", "expected"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "fc1", "clean"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "fc1", "clean"),
        (1, "========= Invalid __global__ read of size 2 bytes\n", "fc1", "Invalid __global__ read of size 2 bytes"),
        (1, "========= Error: Race reported between Write access", "fc1", "Error: Race reported between Write access"),
        (
            0,
            "========= Warning: Race reported between Read access\n========= RACECHECK SUMMARY: 1 hazard displayed",
            "fc1",
            "Warning: Race reported between Read access",
        ),
        (0, "========= Error: No attachable process found", "fc1", "Error: No attachable process found"),
        (
            0,
            "========= Internal Sanitizer Error: x\n========= ERROR SUMMARY: 0 errors",
            "fc1",
            "Internal Sanitizer Error: x",
        ),
        (0, "fc1: 2 results, all right", "fc1", "no summary: nothing was watched"),
        (0, "", "fc1", "no summary: nothing was watched"),
        (3, "one_pass: 2 results, wrong: {}", "fc1", "status 3: one_pass: 2 results, wrong: {}"),
        (None, "", "fc1", "stopped at its limit"),
        (1, "========= Invalid __global__ write of size 4 bytes\n", "planted", "clean"),
        (0, "========= ERROR SUMMARY: 0 errors", "planted", "the planted fault was not found"),
        (1, "========= Error: Race reported between Write access at racing\n", "planted_race", "clean"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed", "planted_race", "the planted fault was not found"),
    ],
)
def test_what_the_sanitizer_said(status, output, kernel, expected):
    assert table.sanitizer_verdict(status, output, kernel) == expected


@pytest.mark.slow
def test_the_race_that_is_planted_compiles(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA toolkit")
    library = load_sanitize().build_planted_race(tmp_path, "sm_90")
    triton = pytest.importorskip("triton")
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    sass = subprocess.run([binaries / "cuobjdump", "-sass", library], capture_output=True, text=True, check=True).stdout
    assert "STS" in sass
    assert "LDS" in sass
    assert "BAR" not in sass


def test_every_sanitized_kernel_is_a_case():
    cases = load_sanitize().KERNELS
    assert set(cases) == {*gpu.SANITIZED, *(kernel for kernel, _ in gpu.CONTROLS.values())}
    kernels = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("lambda_kernels/ops/ln_mlp/fused/kernels", "csrc")
        for path in (REPOSITORY / folder).iterdir()
        if path.suffix in (".py", ".cu")
    )
    for kernel in {kernel for kernels_of in gpu.SANITIZED.values() for kernel in kernels_of}:
        assert f"{kernel}(" in kernels


def test_the_environment_is_described():
    found = gpu.describe("abc")
    assert found["commit"] == "abc"
    assert len(found["sources"]) == 12
    assert found["torch"] != "none"
