"""Checkpoints and processes that die: at every call that matters, and at any time; what they leave, and a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from runstate_support import assert_same, dead_process, filled, in_a_child, listing, names, sample

from lambda_vit.training.storage import checkpoint_file
from lambda_vit.training.storage.checkpoints import Checkpoints

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


class Calls:
    """Everything that changes the disk, by name; `at` is told of each call before it is made."""

    def __init__(self, folder: Path, at: Callable[[str, str], None]) -> None:
        self.folder, self.at = folder, at

    def write(self, block: memoryview) -> None:
        self.block = block
        self.at("write", Path(self.file.name).name)
        self.file.write(block)

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        recorder, fsync, replace = checkpoint_file._Recorder, os.fsync, os.replace
        unlink = pathlib.Path.unlink

        def recording(file: BinaryIO) -> object:
            self.file, self.flush = file, file.flush
            return recorder(self)

        def flushing(descriptor: int) -> None:
            self.at("flush", self.name_of(descriptor))
            fsync(descriptor)

        def renaming(source: Path, target: Path) -> None:
            self.at("rename", Path(target).name)
            replace(source, target)

        def removing(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                self.at("remove", path.name)
            unlink(path, missing_ok=missing_ok)

        patch.setattr(checkpoint_file, "_Recorder", recording)
        patch.setattr(os, "fsync", flushing)
        patch.setattr(os, "replace", renaming)
        patch.setattr(pathlib.Path, "unlink", removing)

    def name_of(self, descriptor: int) -> str:
        number = os.fstat(descriptor).st_ino
        found = [path for path in (self.folder, *self.folder.iterdir()) if path.stat().st_ino == number]
        return "folder" if found == [self.folder] else found[0].name


def traced(folder: Path, work: Callable[[], object]) -> list[tuple[str, str]]:
    """What `work` does to the disk, in order."""
    trace: list[tuple[str, str]] = []
    calls = Calls(folder, lambda *call: trace.append(call))
    with pytest.MonkeyPatch.context() as patch:
        calls.patch(patch)
        work()
    return trace


def killed(folder: Path, work: Callable[[], object], number: int) -> bool:
    """Whether a process that does `work` dies by SIGKILL just before its call of that number; of a write half is done."""

    def child() -> None:
        left = [number]

        def at(kind: str, name: str) -> None:
            if left[0] == 0:
                if kind == "write":
                    calls.file.write(calls.block[: len(calls.block) // 2])
                    calls.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

        calls = Calls(folder, at)
        calls.patch(pytest.MonkeyPatch())
        work()

    status = in_a_child(child)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


# What is there, how many are kept, up to which step the run goes back, what it saves, what was the newest before.
SCENES = {
    "usual": ((10, 20), 2, None, 30, 20),
    "one kept": ((20,), 1, None, 30, 20),
    "the same step again": ((20,), 1, None, 20, 20),
    "the first": ((), 2, None, 30, None),
    "going back": ((10, 20, 30), 2, 10, 15, 30),
}


@needs_fork
@pytest.mark.parametrize("scene", SCENES)
def test_killed_at_any_call(scene, tmp_path):
    steps, keep, upto, step, before = SCENES[scene]
    start = tmp_path / "start"
    start.mkdir()
    filled(start, *steps)

    def save(folder: Path) -> Path:
        checkpoints = Checkpoints(folder, keep)
        checkpoints.newest(upto=upto)
        return checkpoints.save(step, sample(99))

    whole = tmp_path / "whole"
    shutil.copytree(start, whole)
    trace = traced(whole, lambda: save(whole))
    committed = trace.index(("rename", f"step-{step:09d}.json"))
    writes = [number for number, (kind, _) in enumerate(trace) if kind == "write"]
    others = [number for number, (kind, _) in enumerate(trace) if kind != "write"]
    moments = [writes[0], writes[len(writes) // 2], writes[-1], *others]
    assert len(moments) >= 3 + 5
    for number in moments:
        folder = tmp_path / str(number)
        shutil.copytree(start, folder)
        assert killed(folder, lambda folder=folder: save(folder), number)
        left = len(list(folder.iterdir()))
        if number > committed:
            found = Checkpoints(folder, keep).newest()
            assert found.step == step
            assert_same(found.state, sample(99))
        elif before is None and trace[number][1].endswith(".json"):  # its state is there under its name
            with pytest.raises(ValueError, match=r"has no step-000000030\.json, so it was not finished"):
                Checkpoints(folder, keep).newest()
        elif before is None:
            assert Checkpoints(folder, keep).newest() is None
        else:
            found = Checkpoints(folder, keep).newest()
            assert found.step == before
            assert_same(found.state, sample(before))
        assert len(list(folder.iterdir())) == left, "reading removed something"
        # The next one tidies up, whatever was left.
        again = Checkpoints(folder, keep)
        try:
            again.newest(upto=upto)
        except ValueError:
            again.clear()
        path = again.save(step, sample(98))
        expected = sorted(name.replace(f"step-{step:09d}.pt", path.name) for name in listing(whole))
        assert sorted(listing(folder)) == sorted({*expected, path.name} - ({f"step-{step:09d}-2.pt"} - {path.name}))
        assert_same(again.newest().state, sample(98))
    assert not killed(start, lambda: save(start), len(trace))


def test_the_order_that_a_power_cut_needs(tmp_path):
    """Content is on disk before its name, the state before its manifest, both before anything old goes."""
    checkpoints = filled(tmp_path, 10, 20, keep=2)
    trace = traced(tmp_path, lambda: checkpoints.save(30, sample(30)))
    kinds = [kind for kind, _ in trace]
    last_write = len(kinds) - 1 - kinds[::-1].index("write")
    assert trace.count(("write", trace[0][1])) == last_write + 1, "all is written to one file, before all else"
    rest = trace[last_write + 1 :]
    temporary = trace[0][1]
    assert temporary.startswith(".step-000000030.pt.")
    assert rest[0] == ("flush", temporary)
    assert rest[1][0] == "flush"
    assert rest[1][1].startswith(".step-000000030.json.")
    assert rest[2:] == [
        ("rename", "step-000000030.pt"),
        ("rename", "step-000000030.json"),
        ("flush", "folder"),
        ("remove", "step-000000010.json"),
        ("remove", "step-000000010.pt"),
    ]


@needs_fork
def test_killed_at_any_time(tmp_path):
    """A process that saves without pause, killed from outside after a while, again and again."""
    last = 0
    for attempt in range(10):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                checkpoints = Checkpoints(tmp_path, 2)
                found = checkpoints.newest()
                step = found.step if found else 0
                while True:
                    step += 1
                    checkpoints.save(step, sample(step, 150))
                    os.write(writer, b"%d\n" % step)
            os._exit(3)
        os.close(writer)
        with os.fdopen(reader) as lines:
            first = lines.readline()
            time.sleep(0.004 * attempt)
            os.kill(child, signal.SIGKILL)
            reported = [int(line) for line in (first, *lines)]
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert reported[0] == last + 1
        found = Checkpoints(tmp_path, 2).newest()
        last = found.step
        assert last - reported[-1] in (0, 1)
        assert_same(found.state, sample(last, 150))
    Checkpoints(tmp_path, 2).save(last + 1, sample(1))
    assert sorted(listing(tmp_path)) == names(last, last + 1)


@needs_fork
def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    checkpoints = filled(tmp_path, 10, 20, keep=2)
    dead, alive = dead_process(), os.getppid()
    gone = [
        f".step-000000012.pt.{dead}-0123abcd.tmp",
        f".step-000000030-2.json.{dead}-0123abcd.tmp",
        "step-000000015-3.pt",
    ]
    # a writer between its two renames, and one that is at its state
    stay = [
        f".step-000000017.json.{alive}-0123abcd.tmp",
        "step-000000017.pt",
        f".step-000000018.pt.{alive}-0123abcd.tmp",
    ]
    for name in [*gone, *stay]:
        (tmp_path / name).write_bytes(b"half")
    assert checkpoints.newest().step == 20
    assert len(listing(tmp_path)) == 10
    checkpoints.save(30, sample(30))
    assert sorted(listing(tmp_path)) == sorted([*names(20, 30), *stay])


@needs_fork
def test_room_is_counted_after_leftovers_are_gone(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path, 10)
    leftover = tmp_path / f".step-000000020.pt.{dead_process()}-0123abcd.tmp"
    leftover.write_bytes(b"much")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0 if leftover.exists() else 1 << 30))
    checkpoints.save(20, sample(20))
    assert checkpoints.steps() == (10, 20)


def test_an_old_one_that_cannot_be_removed(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path, 10, 20, keep=2)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "step-000000010.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        missing_ok or path.exists()

    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    with pytest.warns(UserWarning, match="step 30 is saved, but an older checkpoint cannot be removed from"):
        path = checkpoints.save(30, sample(30))
    assert checkpoints.newest().path == path


# A full disk, as it is foreseen and as it comes.


def refused(checkpoints: Checkpoints, number: int = errno.ENOSPC) -> OSError:
    """The error of a save that has to fail and to leave everything as it is."""
    before = listing(checkpoints.folder)
    with pytest.raises(OSError, match=r"step 20 .*the checkpoint of step 10 is kept\. Make room") as raised:
        checkpoints.save(20, sample(20))
    assert raised.value.errno == number
    assert str(checkpoints.folder) in str(raised.value)
    assert listing(checkpoints.folder) == before
    assert_same(checkpoints.newest().state, sample(10))
    return raised.value


@pytest.mark.parametrize("free", [0, 10_000])
def test_room_is_checked_first(free, tmp_path, monkeypatch):
    checkpoints = filled(tmp_path, 10)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))
    trace = traced(tmp_path, lambda: refused(checkpoints))
    assert trace == []
    with pytest.raises(OSError, match="there is no earlier checkpoint"):
        Checkpoints(tmp_path / "new").save(20, sample(20))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"large": torch.randn(300_000)},
        {f"layer.{i}.weight": torch.ones(3) for i in range(2000)},
        {"views": [torch.zeros(1000, 1000)[i] for i in range(3)]},
        {"shared": [view for view in torch.zeros(1000, 1000)]},
        {"history": [{"epoch": i, "loss": 0.5, "note": "λ" * 20 + str(i)} for i in range(20_000)]},
        sample(1),
    ],
    ids=lambda state: next(iter(state), "empty"),
)
def test_the_room_that_is_asked_for(state, tmp_path):
    """Never less than the file takes, and not much more."""
    _, needed = checkpoint_file.prepare(state)
    taken = Checkpoints(tmp_path).save(0, state).stat().st_size
    manifest = 1000
    assert taken + manifest <= needed <= 2.5 * taken + (16 << 10)
    if next(iter(state), "") in ("large", "views"):
        assert needed <= 1.02 * taken


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    except OSError as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    """With any amount of room that is too small, also where the state fits and its manifest does not."""
    usage, page = shutil.disk_usage(tmp_path), 4096
    with small_disk(tmp_path / "disk", "1m"):
        folder = tmp_path / "disk" / "run"
        checkpoints = filled(folder, 10)
        with monkeypatch.context() as patch:  # the check, by itself
            shutil.copyfile(folder / "step-000000010.pt", tmp_path / "copy")
            (tmp_path / "disk" / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - 5 * page))
            assert "free" in str(refused(checkpoints))
            patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1 << 40))  # and without it
            pages = -(-(tmp_path / "copy").stat().st_size // page)
            shown = set()
            for room in range(pages + 1):
                (tmp_path / "disk" / "filler").unlink()
                free = os.statvfs(folder).f_bavail * page
                (tmp_path / "disk" / "filler").write_bytes(bytes(free - room * page))
                shown.add(type(refused(checkpoints).__cause__.__cause__))
            assert shown == {RuntimeError, type(None)}, "torch's own words for it, and the error as it is"
            (tmp_path / "disk" / "filler").unlink()
            checkpoints.save(20, sample(20))
    assert not list((tmp_path / "disk").iterdir())


@needs_fork
def test_a_limit_on_the_size_of_files(tmp_path):
    resource = pytest.importorskip("resource")
    checkpoints = filled(tmp_path, 10)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        refused(checkpoints, errno.EFBIG)

    assert in_a_child(work) == 0


@pytest.mark.parametrize("kind", ["write", "flush", "rename"])
def test_any_call_may_find_the_disk_full(kind, tmp_path):
    checkpoints = filled(tmp_path, 10)
    trace = traced(tmp_path, lambda: Checkpoints(tmp_path, 9).save(11, sample(20)))
    for name in names(11):
        (tmp_path / name).unlink()
    numbers = [number for number, call in enumerate(trace) if call[0] == kind]
    assert len(numbers) >= 2
    causes = set()
    for number in (numbers[0], numbers[1], numbers[len(numbers) // 2], numbers[1 if kind == "flush" else -1]):
        left = [number]

        def at(*call: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        calls = Calls(tmp_path, at)
        with pytest.MonkeyPatch.context() as patch:
            calls.patch(patch)
            causes.add(type(refused(checkpoints).__cause__.__cause__))
    # Of a write torch says what is wrong with its archive then, and not why.
    assert causes == ({RuntimeError, type(None)} if kind == "write" else {type(None)})


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("a kernel failed"), KeyboardInterrupt()]
)
def test_other_failures_are_not_called_a_full_disk(error, tmp_path, monkeypatch):
    checkpoints = filled(tmp_path, 10)
    before = listing(tmp_path)

    def fail(state: object, file: object) -> None:
        file.write(memoryview(b"half"))
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)) as raised:
        checkpoints.save(20, sample(20))
    assert raised.value is error
    assert listing(tmp_path) == before
