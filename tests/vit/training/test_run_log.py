"""The log of a run: what was written is there whatever comes, and what was undone is not."""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runstate_support import dead_process, in_a_child

from lambda_vit.runtime.processes import Processes
from lambda_vit.training.storage.log import RunLog, check_tensorboard, read_log

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


def strict(text: str) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def filled(path: Path, count: int, **options: object) -> RunLog:
    log = RunLog(path, **options)
    for step in range(1, count + 1):
        log.write("step", step=step, loss=step / 4, note="λ")
    return log


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_log(path)[0]]


def test_rows_are_read_back(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    assert read_log(path) == ([], 0)
    before = datetime.datetime.now(datetime.timezone.utc)
    with RunLog(path) as log:
        assert (log.rows, log.notices) == (0, ())
        log.write("step", step=50, epoch=1, loss=0.1, lr=1e-3, **{"lambda": 0.75}, memory_bytes=2**40)
        log.write("epoch", step=100, epoch=1, top1=None, attention="diluting", best=False)
        log.write("boundary", step=100, removed=(3, 1), difference=0)
        assert log.rows == 3
        # what another process would see
        assert len(path.read_text().splitlines()) == 3
    after = datetime.datetime.now(datetime.timezone.utc)
    rows, damaged = read_log(path)
    assert damaged == 0
    times = [datetime.datetime.fromisoformat(row.pop("time")) for row in rows]
    millisecond = datetime.timedelta(milliseconds=1)
    assert before - millisecond <= times[0] <= times[1] <= times[2] <= after
    assert rows == [
        {"kind": "step", "step": 50, "epoch": 1, "loss": 0.1, "lr": 1e-3, "lambda": 0.75, "memory_bytes": 2**40},
        {"kind": "epoch", "step": 100, "epoch": 1, "top1": None, "attention": "diluting", "best": False},
        {"kind": "boundary", "step": 100, "removed": [3, 1], "difference": 0},
    ]
    with RunLog(path) as log:
        assert log.rows == 3
        log.write("notice", text="two\nlines of ⟨λ⟩\r\0")
    assert read_log(path)[0][-1]["text"] == "two\nlines of ⟨λ⟩\r\0"
    assert len(read_log(path)[0]) == 4


def test_what_is_not_finite_is_said_in_words(tmp_path):
    with RunLog(tmp_path / "log") as log:
        log.write("step", step=1, loss=float("nan"), norms=[1.0, -math.inf], by={"a": np.float64("inf"), 3: 0.5})
        log.write("step", step=2, loss=0.5)
    first, second = (strict(line) for line in (tmp_path / "log").read_text().splitlines())
    assert first.pop("not_finite") == {"loss": "nan", "norms.1": "-inf", "by.a": "inf"}
    first.pop("time")
    assert first == {"kind": "step", "step": 1, "loss": None, "norms": [1.0, None], "by": {"a": None, "3": 0.5}}
    assert "not_finite" not in second


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(1.0), r"^loss of a row of the log is a torch.Tensor"),
        ([1, np.float32(1)], r"^loss.1 of a row of the log is a numpy.float32"),
        ({"a": Path("x")}, r"^loss.a of a row of the log is a pathlib"),
    ],
    ids=str,
)
def test_what_json_cannot_hold_is_named(value, words, tmp_path):
    log = filled(tmp_path / "log", 1)
    with pytest.raises(TypeError, match=words):
        log.write("step", step=2, loss=value)
    log.write("step", step=3)
    assert steps(tmp_path / "log") == [1, 3]


def test_a_half_written_last_line(tmp_path):
    """Wherever the end was torn off, in the middle of a letter too."""
    path = tmp_path / "log"
    filled(path, 3).close()
    whole = path.read_bytes()
    last = len(whole.splitlines()[-1])
    for missing in range(last + 2):
        path.write_bytes(whole[: len(whole) - missing])
        rows = [1, 2] if missing else [1, 2, 3]
        assert (steps(path), read_log(path)[1]) == (rows, 0), "reading takes no half for a row"
        with RunLog(path) as log:
            if missing in (0, 1):
                rows = [1, 2, 3]
                assert log.notices == ()
            elif missing == last + 1:
                assert log.notices == ()
            else:
                (notice,) = log.notices
                assert notice == f"the last line of {path} was half-written ({last + 1 - missing} bytes) and is dropped"
            assert log.rows == len(rows)
            log.write("step", step=4)
        assert steps(path) == [*rows, 4]


def test_damaged_lines_keep_their_place(tmp_path):
    """So that the rows that a checkpoint counted are still the same ones."""
    path = tmp_path / "log"
    filled(path, 9).close()
    lines = path.read_bytes().split(b"\n")
    for number, content in ((1, b"\0\0\0"), (2, b"{}"), (4, b"[]"), (5, b"\xff\rhalf"), (6, b""), (7, b'{"kind": "st')):
        lines[number] = content
    path.write_bytes(b"\n".join(lines))
    assert (steps(path), read_log(path)[1]) == ([1, 4, 9], 6)
    with RunLog(path) as log:
        assert log.notices == (f"{path} has lines that cannot be read: 2, 3, 5, 6, 7 …",)
        assert log.rows == 9
        log.cut(6)
        assert log.rows == 6
        assert len(log.notices) == 1
        log.write("step", step=10)
    assert path.read_bytes().split(b"\n")[:6] == lines[:6]
    assert steps(path) == [1, 4, 10]


@pytest.mark.parametrize("rows", range(5))
def test_what_came_after_a_checkpoint_is_undone(rows, tmp_path):
    path = tmp_path / "log"
    with filled(path, 4) as log:
        before = path.read_bytes()
        log.cut(rows)
        assert before.startswith(path.read_bytes())
        assert log.rows == rows
        log.write("step", step=9)
        assert (log.rows, log.notices) == (rows + 1, ())
    assert steps(path) == [*range(1, rows + 1), 9]
    assert [place.name for place in tmp_path.iterdir()] == ["log"]


def test_rows_that_were_lost(tmp_path):
    with filled(tmp_path / "log", 3) as log:
        log.cut(5)
        assert log.notices == (f"{tmp_path / 'log'} has 3 rows, 2 fewer than had been written",)
        assert log.rows == 3
    assert steps(tmp_path / "log") == [1, 2, 3]


@needs_fork
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_while_cutting(call, tmp_path):
    path = tmp_path / "log"
    filled(path, 4).close()
    real = getattr(os, call)

    def killed(after: bool) -> None:
        def work() -> None:
            log = RunLog(path)

            def die(*args: object) -> None:
                if after:
                    real(*args)
                os.kill(os.getpid(), signal.SIGKILL)

            setattr(os, call, die)
            log.cut(2)

        assert in_a_child(work) == signal.SIGKILL

    killed(after=False)
    assert steps(path) == [1, 2, 3, 4]
    killed(after=True)
    assert steps(path) == ([1, 2] if call == "replace" else [1, 2, 3, 4])
    RunLog(path).close()
    assert [place.name for place in tmp_path.iterdir()] == ["log"], "a leftover stays"


@needs_fork
def test_leftovers_of_others_stay(tmp_path):
    name = f".log.{os.getppid()}-0123abcd.tmp"
    for leftover in (name, f".log.{dead_process()}-0123abcd.tmp", f".other.{dead_process()}-0123abcd.tmp"):
        (tmp_path / leftover).touch()
    RunLog(tmp_path / "log").close()
    assert (tmp_path / name).exists()
    assert len(list(tmp_path.iterdir())) == 3


@needs_fork
def test_killed_while_writing(tmp_path):
    """All rows that a killed process had written are there, and no half ones."""
    path, last = tmp_path / "log", 0
    for attempt in range(5):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                log, step = RunLog(path), last
                while True:
                    step += 1
                    log.write("step", step=step, text="λ" * 5000)
                    os.write(writer, b"%d\n" % step)
            os._exit(3)
        os.close(writer)
        with os.fdopen(reader) as lines:
            first = lines.readline()
            time.sleep(0.003 * attempt)
            os.kill(child, signal.SIGKILL)
            reported = [int(line) for line in (first, *lines)]
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with RunLog(path) as log:
            last = log.rows
        assert last - reported[-1] in (0, 1)
        assert steps(path) == list(range(1, last + 1))


@needs_fork
def test_a_disk_that_is_full(tmp_path):
    """Half a row is taken back, so that the next one, once there is room, does not go on in its middle."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "log"
    log = filled(path, 10)
    content = path.read_bytes()

    def work() -> None:
        for room in (0, 1, 30):
            limit = len(content) + room
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(OSError, match=r"cannot write to .*log \(.*\)\. Make room there, then resume"):
                log.write("step", step=11, text="x" * 100)
            assert path.read_bytes() == content
            assert log.rows == 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.write("step", step=12)
        assert steps(path) == [*range(1, 11), 12]
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large") as raised:
            log.cut(5)
        assert raised.value.errno == errno.EFBIG
        assert path.read_bytes() == before
        assert [place.name for place in tmp_path.iterdir()] == ["log"]

    assert in_a_child(work) == 0


def test_one_process_writes(tmp_path):
    processes = Processes()
    processes.rank = 1
    with RunLog(tmp_path / "new" / "log", processes=processes, tensorboard=tmp_path / "new") as log:
        log.write("step", step=1, loss=object())
        log.cut(0)
        assert (log.rows, log.notices) == (0, ())
    assert not list(tmp_path.iterdir())


def test_without_tensorboard(tmp_path, monkeypatch):
    """It is missed before anything is written, and with the way to get it."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = r"needs the package tensorboard: pip install tensorboard, or pip install 'lambda-kernels\[tensorboard\]'"
    with pytest.raises(ImportError, match=words):
        check_tensorboard()
    with pytest.raises(ImportError, match=words):
        RunLog(tmp_path / "new" / "log", tensorboard=tmp_path)
    assert not list(tmp_path.iterdir())
    filled(tmp_path / "log", 2).close()  # which asks for none


def test_a_broken_tensorboard(tmp_path, monkeypatch):
    (tmp_path / "tensorboard.py").write_text("import what_it_lacks")
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="No module named 'what_it_lacks'"):
        check_tensorboard()


def test_tensorboard_shows_the_same_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown() -> dict[str, list[tuple[int, float]]]:
        found = EventAccumulator(str(tmp_path / "board"))
        found.Reload()
        tags = found.Tags()["scalars"]  # also those of which all was forgotten
        return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags if found.Scalars(tag)}

    with RunLog(tmp_path / "log", tensorboard=tmp_path / "board") as log:
        log.cut(0)
        for step in (10, 20, 30, 40):
            log.write("step", step=step, loss=step / 4, lr=None, kind_of="a", memory_bytes=step)
        log.write("epoch", step=40, epoch=1, top1=12.5, best=True, removed=[1])
        log.write("notice", text="a")
        log.write("resume", processes=2)
    assert shown() == {
        "step/loss": [(10, 2.5), (20, 5.0), (30, 7.5), (40, 10.0)],
        "step/memory_bytes": [(step, step) for step in (10, 20, 30, 40)],
        "epoch/top1": [(40, 12.5)],
    }
    with RunLog(tmp_path / "log", tensorboard=tmp_path / "board") as log:
        log.cut(2)
        log.write("step", step=30, loss=float("inf"))
    assert steps(tmp_path / "log") == [10, 20, 30]
    assert shown() == {"step/loss": [(10, 2.5), (20, 5.0), (30, math.inf)], "step/memory_bytes": [(10, 10), (20, 20)]}
    with RunLog(tmp_path / "log", tensorboard=tmp_path / "board") as log:
        log.write("step", step=40, loss=1.0)  # on from where it was
        log.cut(4)
    assert shown()["step/loss"] == [(10, 2.5), (20, 5.0), (30, math.inf), (40, 1.0)]
