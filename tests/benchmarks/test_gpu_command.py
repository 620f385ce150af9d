"""`benchmarks/gpu/run.py`: what it refuses, and whole runs in which a stub answers for every command that is started."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY

from benchmarks.gpu import execution, machine, parts
from benchmarks.gpu import run as gpu

COMMAND = REPOSITORY / "benchmarks" / "gpu" / "run.py"
STUB = REPOSITORY / "tests" / "support" / "general" / "gpu_stub.py"
KILLED = "1 passed until it was killed"
SANITIZER = """#!/bin/sh
case "$*" in
--help) echo "--kernel-name";;
*planted_race) echo "========= Error: Race reported between Write access"; exit 1;;
*planted) echo "========= Invalid __global__ write of size 4 bytes"; exit 1;;
*) echo "========= ERROR SUMMARY: 0 errors";;
esac
"""


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, COMMAND, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["run.py: no CUDA device here, nothing was run"]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "mlp,speed"], "--only: unknown speed; parts are build, smoke, ceilings"),
        (["--limit", "speed=3"], "--limit: unknown part in 'speed=3'; write PART=SECONDS, parts are build, smoke"),
        (["--limit", "mlp=3,30"], "--limit: unknown part in '30'"),
        (["--limit", "mlp"], "--limit: 'mlp' has no number of seconds, as mlp=120 has"),
        (["--limit", "mlp=3m"], "--limit: 'mlp=3m' has no number of seconds"),
        (["--limit", "mlp=3", "--limit", "histogram=0"], "--limit: 'histogram=0' must be more than 0 seconds"),
        (["--limit", "mlp=-3"], "--limit: 'mlp=-3' must be more than 0 seconds"),
        (["--limit", "mlp=nan"], "--limit: 'mlp=nan' must be more than 0 seconds"),
        (["--limit", "mlp=inf"], "--limit: 'mlp=inf' must be more than 0 seconds"),
        (
            ["--only", "mlp,model", "--limit", "tests=9"],
            "--limit: tests is not run, only mlp, model; name it in --only",
        ),
    ],
)
def test_what_it_cannot_read_is_refused_before_anything_starts(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "asked", lambda environment: pytest.fail("something was started"))
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_one_call_runs_fits_into_its_budget():
    limits = [parts.PARTS[name].limit for name in parts.DEFAULT]
    assert sum(limits) <= gpu.BUDGET_S - execution.RESERVE_S - gpu.START_UP_S
    assert all(part.least <= part.limit for part in parts.PARTS.values())
    # Correctness is known before anything is timed, and what is timed is not kept waiting by what takes longest.
    assert list(parts.PARTS)[:3] == ["build", "smoke", "ceilings"]
    assert list(parts.PARTS)[-3:] == ["tests", "sanitizer", "questions"]


def test_the_documented_calls_fit_into_their_budgets():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    calls = [shlex.split(line, comments=True) for line in re.findall(r"benchmarks/gpu/run\.py (--out .*)", text)]
    assert len(calls) >= 2
    for call in calls:
        options = dict(zip(call[::2], call[1::2], strict=True))
        wanted = gpu.parts_named(options.get("--only", ",".join(parts.DEFAULT)))
        limits = gpu.limits_given([options["--limit"]] if "--limit" in options else [], wanted)
        chosen = {name: parts.PARTS[name]._replace(limit=limits.get(name, parts.PARTS[name].limit)) for name in wanted}
        assert "cut short" not in gpu.plan(chosen, float(options.get("--budget", gpu.BUDGET_S))), call


def test_a_plan_that_does_not_fit_says_so():
    assert gpu.plan({"mlp": parts.PARTS["mlp"]._replace(limit=300)}, 350) == "limits: mlp 300 s; together 300 of 300 s"
    assert gpu.plan({"mlp": parts.PARTS["mlp"]._replace(limit=300)}, 349).endswith("may be cut short or skipped")


@pytest.fixture
def stubbed(tmp_path, monkeypatch) -> Path:
    """The file with what was started, none of which is what it says; where results go is `tmp_path / "out"`."""
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(STUB))} "$@"\n')
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    for program in (python, tool):
        program.chmod(0o755)
    digest = re.search(r"not (\w+)$", machine.extension_obstacle({"obstacle": None, "extension": {"sources": "?"}}))[1]
    settings = {"STUB_CALLS": calls, "STUB_DIGEST": digest, "STUB_SOURCES": digest}
    for name, value in {**settings, "LAMBDA_KERNELS_CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(parts, "cuda_tool", lambda name: str(tool))
    monkeypatch.setattr(execution, "PATIENCE_S", 0.1)
    return calls


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    status = gpu.main(["--out", str(tmp_path / "out"), *arguments])
    return status, json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))


def test_all_parts_run_in_their_order(stubbed, tmp_path, monkeypatch, capsys):
    saved = []
    genuine = gpu.write
    monkeypatch.setattr(gpu, "write", lambda path, results: saved.append(json.dumps(results)) or genuine(path, results))
    status, found = run(tmp_path, "--only", "all", "--budget", "5000", "--commit", "abc")
    assert status == 0
    assert list(found["parts"]) == list(parts.PARTS)
    assert {part["state"] for part in found["parts"].values()} == {"passed"}
    assert found["environment"]["commit"] == "abc"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["logs.txt", "results.json"]

    logs = (tmp_path / "out" / "logs.txt").read_text(encoding="utf-8")
    assert re.findall(r"^===== (\w+), at most \d+ s =====$", logs, re.MULTILINE) == list(parts.PARTS)
    started = stubbed.read_text(encoding="utf-8")
    places = ["one_kernel.py one_pass", "gpu_timing.py", "precompile.py", "test_ln_mlp.py", "test_histogram_cuda.py"]
    places += ["test_vit_cuda.py", "test_training.py", "not (current_stream", "questions.py --only l2"]
    assert [started.index(place) for place in places] == sorted(started.index(place) for place in places)
    assert started.count("precompile.py") == 1  # what has its stamps is not compiled again

    # Written before each part and after it: whatever kills the run, what was found is there, and what ran is named.
    first, second = (json.loads(text)["parts"] for text in saved[:2])
    assert {name: part["state"] for name, part in first.items()} == {"build": "interrupted"}
    assert {name: part["state"] for name, part in second.items()} == {"build": "passed"}
    assert len(saved) == 2 * len(parts.PARTS)

    out = capsys.readouterr().out
    assert out.index("timm: ") < out.index("limits: build 100 s, smoke 60 s") < out.index("build      passed")
    assert "a stub: nothing was measured" in out
    assert "22 of 22 as they should be" in out


@pytest.mark.parametrize(
    ("name", "slow", "left"),
    [
        ("smoke", "one_kernel.py staged", {"verdicts": {"one_pass": "clean", "staged": "stopped at its limit"}}),
        ("ceilings", "gpu_timing", {"gigabytes_per_s": 0.0}),
        ("mlp", "test_ln_mlp", {"counts": {"benchmarks/test_ln_mlp.py": KILLED}, "rows": ["row 0"]}),
        ("tests", "not (current_stream", {"counts": {"waiting": "2 passed in 0.01s", "in parallel": KILLED}}),
        ("questions", "--only atomics", {"answers": {"l2": 1, "atomics": 1}}),
    ],
)  # fmt: skip
def test_a_part_that_outlives_its_limit_leaves_what_it_has(name, slow, left, stubbed, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SLOW", slow)
    monkeypatch.setattr(parts, "QUESTION_S", 2.0)
    status, found = run(tmp_path, "--only", f"{name},sanitizer", "--limit", f"{name}=5,sanitizer=60")
    part = found["parts"][name]
    assert status == 1
    assert part["state"] == "stopped at its limit"
    assert part["limit"] == 5
    assert found["parts"]["sanitizer"]["state"] == "passed"
    for key, values in left.items():
        kept = part[key]
        if key == "rows":
            kept = [row["name"] for row in kept]
        elif key == "answers":
            kept = {question: len(kept[question]) for question in values}
        elif isinstance(values, dict):
            kept = {entry: kept[entry] for entry in values}
        assert kept == values
    assert len(list((tmp_path / "out").iterdir())) <= 4


def test_rows_are_in_a_file_before_their_part_ends(stubbed, tmp_path, monkeypatch):
    """So that they are there if the run itself is killed."""

    def killed(job: object) -> dict:
        parts.histogram(job)
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.PARTS, "histogram", parts.PARTS["histogram"]._replace(run=killed))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--only", "histogram")
    assert len((tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert found["parts"]["histogram"]["state"] == "interrupted"


def test_the_extension_is_built_only_where_what_is_there_does_not_fit(stubbed, tmp_path, monkeypatch):
    _, found = run(tmp_path, "--only", "build")
    assert found["parts"]["build"]["built"] is False
    assert found["parts"]["build"]["note"] == "not built: what is there fits"
    assert "pip install" not in stubbed.read_text(encoding="utf-8")

    monkeypatch.setenv("STUB_SOURCES", "unknown")
    status, found = run(tmp_path, "--only", "build")
    assert status == 0
    note = found["parts"]["build"]["note"]
    assert (
        note
        == f"built, since the extension was built of other sources: their digest is unknown, not {os.environ['STUB_DIGEST']}"
    )
    assert "pip install" in stubbed.read_text(encoding="utf-8")

    stubbed.unlink()
    monkeypatch.setenv("STUB_DIGEST", "another")  # what the build itself leaves
    status, found = run(tmp_path, "--only", "build")
    assert status == 1
    assert found["parts"]["build"]["note"].startswith(
        "does not fit after the build either: the extension was built of other"
    )


def test_without_a_package_nothing_is_run(stubbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STUB_MISSING", "platformdirs")
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "run.py: ModuleNotFoundError: No module named 'platformdirs'\n"
    assert not (tmp_path / "out").exists()


def test_parts_of_an_earlier_run_stay(stubbed, tmp_path, capsys):
    assert run(tmp_path, "--only", "ceilings")[0] == 0
    status, found = run(tmp_path, "--only", "smoke")
    assert status == 0
    assert {name: part["state"] for name, part in found["parts"].items()} == {"ceilings": "passed", "smoke": "passed"}
    assert (tmp_path / "out" / "logs.txt").read_text(encoding="utf-8").startswith("===== ceilings")
    capsys.readouterr()
    results = tmp_path / "out" / "results.json"
    found["environment"]["sources"] = "others"
    results.write_text(json.dumps(found))
    assert gpu.main(["--out", str(tmp_path / "out"), "--only", "smoke"]) == 2
    assert "was measured otherwise (sources was others and is " in capsys.readouterr().err
    assert json.loads(results.read_text()) == found
    for text in ("[1]", "{", '{"environment": 3, "parts": {}}'):
        results.write_text(text)
        assert gpu.main(["--out", str(tmp_path / "out"), "--only", "smoke"]) == 2
        assert "is none of this program's results; choose another --out" in capsys.readouterr().err


def test_all_processes_get_one_assembler(stubbed, tmp_path, monkeypatch):
    """PyTorch's compiler sets another one for the rest of its process where none was set."""
    own = tmp_path / "ptxas"
    own.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    own.chmod(0o755)
    seen = []

    def look(job: execution.Job) -> dict:
        seen.append(job.environment.get("TRITON_PTXAS_PATH"))
        return {"passed": True}

    monkeypatch.setitem(gpu.PARTS, "smoke", parts.PARTS["smoke"]._replace(run=look))
    _, found = run(tmp_path, "--only", "smoke")
    assert found["environment"]["ptxas"] == "unknown"
    facts = {"cuda": True, "capability": "9.0", "ptxas": str(own)}
    monkeypatch.setattr(machine, "asked", lambda environment: facts)
    (tmp_path / "out" / "results.json").unlink()
    _, found = run(tmp_path, "--only", "smoke")
    assert found["environment"]["ptxas"] == f"{own} V12.8.93"
    (tmp_path / "out" / "results.json").unlink()
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/another")
    run(tmp_path, "--only", "smoke")
    assert seen == [None, str(own), "/another"]


def test_the_environment_is_described():
    found = machine.describe("abc", "")
    assert found["commit"] == "abc"
    assert len(found["sources"]) == 12
    assert found["torch"] != "none"
    assert "platformdirs " in found["packages"]
