"""The tools of `benchmarks/` on figures that were made up: intervals, files of results, the table, comparing, guarding."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from places import REPOSITORY

from benchmarks.support import intervals, turns
from benchmarks.tools import compare, guard, measure, pages, records, table, targets
from lambda_vit.measure.intervals import order_statistic

MACHINE = {
    "cpu": "A CPU",
    "cores": 2,
    "gpu": "none",
    "python": "3.11.7",
    "torch": "2.14.1",
    "triton": "3.8.0",
    "timm": "1.0.31",
    "numpy": "2.4.6",
    "commit": "a" * 40,
    "dirty": False,
    "time": "2026-01-02 03:04:05 UTC",
}


def row(name: str, ratio: float, width: float = 0.02, **more: object) -> dict:
    entry = {"ours": "ours", "rival": "timm", "plain": ratio}
    entry |= {"plain_low": ratio * (1 - width), "plain_high": ratio * (1 + width)}
    return {"name": name, "group": "whole model", "portable": True, "ratios": [entry], **more}


@pytest.fixture
def written(tmp_path) -> Callable[..., records.Run]:
    def write(*rows: dict, name: str = "run.jsonl", folder: str = "machine", **environment: object) -> records.Run:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        for line in ({"environment": {**MACHINE, **environment}}, *rows):
            records.add_line(path, line)
        return records.read(path)

    return write


def test_the_interval_of_a_median_covers_it():
    assert [order_statistic(n) for n in (1, 5, 6, 8, 9, 20, 50)] == [0, 0, 1, 1, 2, 6, 18]
    generator = np.random.default_rng(0)
    for count in (6, 11, 30):
        inside = 0
        for _ in range(1500):
            middle, low, high = intervals.median_interval(list(np.exp(generator.standard_normal(count))))
            assert low <= middle <= high
            inside += low <= 1.0 <= high  # the median of this skewed distribution
        assert 0.94 <= inside / 1500 <= 0.995
    with pytest.raises(ValueError, match="5 values have no interval of 95%"):
        intervals.median_interval([1.0] * 5)


def test_ratios_are_of_neighbours():
    """A machine that becomes ten times slower in the middle changes both, and not their ratio."""
    speed = [1.0] * 10 + [10.0] * 10
    found = intervals.paired_ratio([3.0 * s for s in speed], [2.0 * s for s in reversed(speed[::-1])])
    assert found == {"ratio": 1.5, "low": 1.5, "high": 1.5}


def test_turns_note_both_clocks():
    taken = turns.Turns()
    for _ in range(6):
        taken.take("sleeps", lambda: __import__("time").sleep(0.002))
        taken.take("computes", lambda: sum(range(50_000)))
    assert taken.ratio("processor", "sleeps", "computes")["ratio"] < 1
    assert taken.microseconds("wall")["sleeps"]["median"] > 2000
    assert turns.rounds_within(10, 1.0, 30) == 10
    assert turns.rounds_within(10, 0.01, 30) == 30
    assert turns.rounds_within(10, 100.0, 30) == intervals.LEAST


def test_a_file_that_was_cut_keeps_its_rows(written):
    run = written(row("a", 1.5), {"name": "b", "skipped": "no CUDA device"}, {"name": "c", "failed": "Failed: off"})
    with run.path.open("a") as file:
        file.write('{"name": "d", "rat')
    again = records.read(run.path)
    assert again.environment == MACHINE
    assert list(again.rows) == ["a", "b", "c"]
    assert list(again.measured()) == ["a"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "", "its first line does not describe the machine"),
        ("x.jsonl", '{"name": "a"}\n', "its first line does not describe the machine"),
        ("x.jsonl", '{"environment": {}}\nnonsense\n{"name": "a"}\n', "line 2: no JSON"),
        ("x.jsonl", '{"environment": {}}\nnonsense\n', "line 2: no JSON"),
        ("x.jsonl", '{"environment": {}}\n{"ratios": []}\n', "a row without a name"),
        ("x.json", "[]", "not a result of gpu/run.py"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        records.read(tmp_path / name)


def test_this_machine_is_described():
    found = records.describe()
    assert set(found) == set(MACHINE)
    assert found["torch"] != "none"
    assert found["cores"] >= 1
    assert records.describe("abc")["commit"] == "abc"


# The table


TARGETS = [
    targets.Target("model, T / S", "timm", 1.5, 2.0, "cpu", "a", "ours", "timm"),
    targets.Target("model, T / S", "timm", 1.25, 2.0, "cpu", "b", "ours", "timm"),
    targets.Target("model, T / S", "timm", 1.1, None, "gpu", "c", "ours", "timm"),
]


def test_the_table_names_what_was_never_measured(written):
    lines = table.table(TARGETS, [written(row("a", 1.75, portable=False), row("c", 1.0), folder="cpu")]).splitlines()
    assert lines[0].startswith("| CPU |")
    assert lines[2] == "| model, T / S | timm | 1.5 / 1.25 | 2 | 1.75 (1.71–1.79)¹ / not measured |"
    assert lines[4].startswith("| GPU |")
    assert lines[6] == "| model, T / S | timm | 1.1 | – | 1.00 (0.98–1.02)¹ |"
    versions = "python 3.11.7, torch 2.14.1, triton 3.8.0, timm 1.0.31, numpy 2.4.6"
    assert lines[-1].rstrip() == f"¹ A CPU, 2 cores; {versions}; commit aaaaaaaaa; 2026-01-02"
    assert table.table(TARGETS, []).count("not measured") == 2


def test_figures_are_those_of_the_newest_run_that_has_them(tmp_path, written):
    written(row("a", 1.1), row("b", 1.2), time="2026-01-01 00:00:00 UTC", name="old.jsonl")
    written(
        row("a", 1.4), {"name": "b", "failed": "Failed"}, time="2026-03-01 00:00:00 UTC", name="new.jsonl", dirty=True
    )
    written(row("a", 9.0), time="2026-04-01 00:00:00 UTC", name="quick.jsonl", quick=True)
    text = table.table(TARGETS[:2], records.committed(tmp_path))
    assert "| 1.40 (1.37–1.43)¹ / 1.20 (1.18–1.22)² |" in text
    assert "commit aaaaaaaaa with changes; 2026-03-01" in text
    assert "9" not in text.splitlines()[2]


def test_a_gpu_s_file_has_figures_too(tmp_path):
    entry = {"ours": "ours", "rival": "timm", "plain": 1.5, "graph": 1.75, "target": 1.1}
    part = {"state": "passed", "rows": [{"name": "c", "ratios": [entry]}]}
    (tmp_path / "h100").mkdir()
    found = {"environment": {**MACHINE, "gpu": "NVIDIA H100"}, "parts": {"mlp": part, "build": {"state": "passed"}}}
    (tmp_path / "h100" / "results.json").write_text(json.dumps(found))
    text = table.table(TARGETS, records.committed(tmp_path))
    assert "| GPU time 1.75, launched one by one 1.50¹ |" in text
    assert "NVIDIA H100" in text


def test_the_table_is_checked_and_written(tmp_path, written, capsys):
    begin, end = pages.marks("table.py")
    run, readme = written(row("a", 1.5)), tmp_path / "README.md"
    how = ["--file", str(readme), "--results", str(run.path.parents[1])]
    readme.write_text("# title\n")
    assert table.main([*how, "--check"]) == 2
    assert "needs the lines" in capsys.readouterr().err
    before, after = f"# title\n\n{begin}\nold\n", f"{end}\n\nthe rest \\1 of it\n"
    readme.write_text(before + after)
    assert table.main([*how, "--check"]) == 1
    assert readme.read_text() == before + after
    assert table.main([*how, "--write"]) == 0
    assert table.main([*how, "--check"]) == 0
    assert readme.read_text().startswith(f"# title\n\n{begin}\n\n| CPU |")
    assert readme.read_text().endswith(after)
    assert "old" not in readme.read_text()


def test_every_target_names_a_benchmark_that_is_there():
    for target in targets.load():
        file, _, test = target.row.partition("::")
        text = (REPOSITORY / "benchmarks" / file).read_text(encoding="utf-8")
        assert f"def {test.partition('[')[0]}(" in text, target.row
        assert target.limit is None or target.limit >= target.target
    assert targets.of("test_ln_mlp.py::test_forward[T]", "triton", "timm") == 1.5
    assert targets.of("test_ln_mlp.py::test_forward[T]", "torch", "timm") is None
    keys = [(target.row, target.ours, target.rival) for target in targets.load()]
    assert len(set(keys)) == len(keys)


# Comparing


@pytest.mark.parametrize(
    ("before", "after", "width", "verdict"),
    [
        (1.5, 1.5, 0.02, ""),
        (1.5, 1.4, 0.02, "loss"),
        (1.5, 1.4, 0.10, ""),
        (1.5, 1.7, 0.02, "gain"),
        (1.5, 0.75, 0.02, "gross loss"),
        (1.5, 0.75, 0.15, "gross loss"),
        (1.5, 0.75, 0.25, "loss"),  # half, but the two intervals leave room for more than 0.7
        (1.5, 1.06, 0.001, "loss"),
        (1.5, 1.04, 0.001, "gross loss"),
    ],
)
def test_losses(written, before, after, width, verdict):
    old, new = written(row("a", before, width), name="old.jsonl"), written(row("a", after, width), name="new.jsonl")
    (change,) = compare.changes(old, new)
    assert change.verdict == verdict
    assert change.interval[1] == pytest.approx(after / before)
    assert compare.main([str(old.path), str(new.path)]) == int(verdict == "gross loss")


def test_intervals_of_a_quotient_are_the_widest():
    change = compare.Change("a", "ours", "timm", (1.0, 2.0, 4.0), (3.0, 4.0, 6.0))
    assert change.interval == (0.75, 2.0, 6.0)


def test_another_processor_is_judged_by_portable_rows_alone(written, capsys):
    old = written(row("a", 2.0), row("b", 2.0, portable=False), name="old.jsonl")
    new = written(row("a", 2.0), row("b", 0.5, portable=False), name="new.jsonl", cpu="Another CPU", torch="2.15.0")
    assert compare.main([str(old.path), str(new.path)]) == 0
    printed = capsys.readouterr().out
    assert "cpu: A CPU → Another CPU" in printed
    assert "torch: 2.14.1 → 2.15.0" in printed
    assert "gross loss, another processor: not judged" in printed
    new = written(row("a", 0.5), name="new.jsonl", cpu="Another CPU")
    assert compare.main([str(old.path), str(new.path)]) == 1
    assert "b: no figure (not run)" in capsys.readouterr().out


def test_a_baseline_holds_what_all_runs_found(tmp_path, written):
    runs = [written(row("a", ratio), row("b", 1.0), name=f"{ratio}.jsonl") for ratio in (1.0, 1.2, 1.1)]
    path = tmp_path / "baseline.jsonl"
    assert compare.main(["--merge", *(str(run.path) for run in runs), "--out", str(path)]) == 0
    baseline = records.read(path)
    assert compare.ratios(baseline.rows["a"])["ours", "timm"] == pytest.approx((0.98, 1.1, 1.224))
    assert baseline.environment["runs"] == 3
    other = written(row("a", 1.0), name="other.jsonl", commit="b" * 40)
    with pytest.raises(ValueError, match="another commit or processor"):
        compare.merged([runs[0], other])
    with pytest.raises(SystemExit):
        compare.main(["--merge", str(runs[0].path), str(other.path), "--out", str(tmp_path / "other.jsonl")])
    assert not (tmp_path / "other.jsonl").exists()


def test_arguments_of_comparing(written, capsys):
    run = written(row("a", 1.0))
    for arguments in ([str(run.path)], ["--merge", str(run.path)]):
        with pytest.raises(SystemExit) as stopped:
            compare.main(arguments)
        assert stopped.value.code == 2
    assert "two files are compared; got 1" in capsys.readouterr().err
    for command in (lambda path: compare.main([path, path]), lambda path: guard.main(["--baseline", path])):
        with pytest.raises(SystemExit) as stopped:
            command(str(run.path.with_name("absent.jsonl")))
        assert stopped.value.code == 2
        assert "absent.jsonl" in capsys.readouterr().err


# Guarding


def test_a_loss_counts_only_if_it_comes_back(written):
    baseline = written(row("a", 2.0), row("b", 2.0), row("c", 2.0), name="old.jsonl")
    first = written(row("a", 0.9), row("b", 0.9), row("c", 1.9), name="first.jsonl")
    asked = []

    def again(names: list[str], more: float) -> records.Run:
        asked.append((list(names), more))
        # c is now low, too, but was not under suspicion
        return written(row("a", 1.9), row("b", 0.9), row("c", 0.9), name="again.jsonl")

    assert [change.row for change in guard.lost(baseline, first, again)] == ["b"]
    assert asked == [(["a", "b"], 4.0)]
    assert guard.lost(baseline, baseline, again) == []
    assert len(asked) == 1


def test_what_fails_or_is_gone_counts_and_what_is_skipped_does_not(written):
    baseline = written(*(row(name, 1.0) for name in "abcd"), name="old.jsonl")
    rows = row("a", 1.0), {"name": "b", "skipped": "x"}, {"name": "c", "failed": "y"}, {"name": "e", "failed": "z"}
    assert guard.missing(baseline, written(*rows)) == ["c: y", "d: it did not run", "e: z"]


def test_the_command_measures_again_what_looks_lost(monkeypatch, tmp_path, written, capsys):
    baseline, asked = written(row("a.py::x", 2.0), name="old.jsonl"), []

    def measured(out: Path, groups: list, *, quick: bool, names: list[str] | None, more: float) -> tuple[Path, bool]:
        asked.append((quick, names, more))
        return written(row("a.py::x", ratio), name=f"{len(asked)}.jsonl").path, True

    monkeypatch.setattr(measure, "measure", measured)
    ratio = 0.9
    assert guard.main(["--baseline", str(baseline.path), "--out", str(tmp_path)]) == 1
    assert asked == [(True, None, 1.0), (True, ["a.py::x"], 4.0)]
    printed = capsys.readouterr().out
    assert "much slower than before, twice: a.py::x, ours against timm" in printed
    assert "no figure" not in printed
    ratio = 1.9
    assert guard.main(["--baseline", str(baseline.path)]) == 0
    other = written(row("a.py::x", 2.0), row("a.py::y", 2.0), name="more.jsonl")
    assert guard.main(["--baseline", str(other.path)]) == 1
    assert "no figure of a.py::y: it did not run" in capsys.readouterr().out


def test_the_committed_baseline_is_of_rows_that_are_there():
    baseline = records.read(guard.BASELINE)
    assert baseline.environment["runs"] >= 5
    for name, found in baseline.rows.items():
        file, _, test = name.partition("::")
        text = (REPOSITORY / "benchmarks" / file).read_text(encoding="utf-8")
        assert f"def {test.partition('[')[0]}(" in text
        for low, ratio, high in compare.ratios(found).values():
            # Half of the ratio must be seen as a gross loss, by a run whose own interval is 10 % wide.
            assert 0.5 * ratio * 1.1 / low < compare.GROSS, name
            assert math.isfinite(high)


# Measuring


def test_what_measuring_writes(tmp_path, monkeypatch):
    """Of a folder with one benchmark that passes, one that fails, one that is skipped and one that kills its process."""
    text = """
import os, signal
import pytest

@pytest.mark.quick
@pytest.mark.benchmark(group="some")
def test_good(against):
    against({"ours": lambda: sum(range(2000))}, {"rival": lambda: sum(range(8000))}, clock="processor", what="a sum")

@pytest.mark.quick
def test_bad(against):
    pytest.fail("off by 1: no time is reported of what is wrong")

@pytest.mark.quick
def test_absent(against):
    pytest.skip("no such machine")

def test_not_quick(against):
    raise AssertionError

@pytest.mark.quick
@pytest.mark.skipif("KILL" not in os.environ, reason="not to be killed")
def test_deadly(against):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    source = (REPOSITORY / "benchmarks" / "conftest.py").read_text(encoding="utf-8")
    (folder / "conftest.py").write_text(source, encoding="utf-8")
    (folder / "test_some.py").write_text(text)
    monkeypatch.setattr(measure, "BENCHMARKS", folder)
    path, good = measure.measure(tmp_path / "out", [["test_some.py"]], quick=True, commit="abc")
    assert not good
    run = records.read(path)
    assert (run.environment["commit"], run.environment["quick"]) == ("abc", True)
    assert set(run.rows) == {f"test_some.py::test_{name}" for name in ("good", "bad", "absent", "deadly")}
    assert run.rows["test_some.py::test_bad"]["failed"] == "Failed: off by 1: no time is reported of what is wrong"
    assert run.rows["test_some.py::test_absent"]["skipped"] == "no such machine"
    found = run.rows["test_some.py::test_good"]
    assert (found["group"], found["what"], found["clock"], found["threads"]) == ("some", "a sum", "processor", 1)
    (entry,) = found["ratios"]
    assert 2 < entry["plain_low"] <= entry["plain"] <= entry["plain_high"] < 8
    assert 0.5 < found["itself"]["ratio"] < 2
    assert found["rounds"] >= intervals.LEAST
    # What was there before the process died stays.
    monkeypatch.setenv("KILL", "1")
    names = ["test_some.py::test_good", "test_some.py::test_deadly"]
    path, good = measure.measure(tmp_path / "again", [["test_some.py"]], quick=True, names=names)
    assert not good
    assert list(records.read(path).rows) == ["test_some.py::test_good"]


def test_files_that_are_not_there_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        measure.main(["--out", str(tmp_path / "out"), "--only", "test_nothing.py"])
    assert stopped.value.code == 2
    assert "unknown test_nothing.py; files are" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measure.main(["--out", str(tmp_path / "out"), "--threads", "0"])
    assert list(tmp_path.iterdir()) == []


def test_rows_for_a_gpu_are_skipped_with_the_reason(tmp_path):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", records.LINES: str(tmp_path / "lines")}
    sources = [str(REPOSITORY), str(REPOSITORY / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sources))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
    command += [f"benchmarks/{name}" for name in ("test_ln_mlp.py", "test_vit_cuda.py", "test_histogram_cuda.py")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert len(rows) > 50
    assert {line.get("skipped") for line in rows} == {"no CUDA device"}
    missing = {t.row for t in targets.load() if t.device == "gpu"} - {line["name"] for line in rows}
    assert not missing


@pytest.mark.slow
def test_rows_for_a_cpu_are_there():
    sources = [str(REPOSITORY), str(REPOSITORY / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sources))}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "benchmarks"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    found = {line.removeprefix("benchmarks/") for line in done.stdout.splitlines() if "::" in line}
    assert {target.row for target in targets.load()} <= found
    assert set(records.read(guard.BASELINE).rows) <= found
