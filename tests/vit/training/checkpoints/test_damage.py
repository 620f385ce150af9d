"""Checkpoints that were damaged, and runs that went back: which one counts."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from runstate_support import assert_same, filled, in_a_child, listing, names, sample

from lambda_kernels.errors import CheckpointError
from lambda_vit.training.storage.checkpoints import Checkpoints

NEWEST = "step-000000030"


def change_manifest(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / f"{NEWEST}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def replace_state(content: bytes) -> Callable[[Path], None]:
    """Other content, with the right size and checksum."""

    def change(folder: Path) -> None:
        (folder / f"{NEWEST}.pt").write_bytes(content)
        change_manifest(bytes=len(content), sha256=sha256(content).hexdigest())(folder)

    return change


def flip(folder: Path) -> None:
    path = folder / f"{NEWEST}.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Payload:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("code-was-run",)


def harmful(folder: Path) -> None:
    torch.save({"a": Payload()}, folder / "harmful")
    content = (folder / "harmful").read_bytes()
    (folder / "harmful").unlink()
    replace_state(content)(folder)


def manifest_is_a_folder(folder: Path) -> None:
    (folder / f"{NEWEST}.json").unlink()
    (folder / f"{NEWEST}.json").mkdir()


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / f"{NEWEST}.json").write_text(content)


DAMAGES = {
    "truncated": (lambda folder: os.truncate(folder / f"{NEWEST}.pt", 5000), r"30.pt has 5000 bytes, \d+ were written"),
    "empty": (lambda folder: os.truncate(folder / f"{NEWEST}.pt", 0), r"30.pt has 0 bytes, \d+ were written"),
    "longer": (lambda folder: (folder / f"{NEWEST}.pt").open("ab").write(b"0"), r"30.pt has \d+ bytes, \d+ were written"),
    "flipped byte": (flip, r"30.pt does not have the content that was written \(its SHA-256 differs\)"),
    "no state": (lambda folder: (folder / f"{NEWEST}.pt").unlink(), "30.pt is missing"),
    "no manifest": (lambda folder: (folder / f"{NEWEST}.json").unlink(), r"30.pt has no step-000000030.json, so it was not"),
    "empty manifest": (text(""), r"30.json is damaged \(Expecting value"),
    "half a manifest": (text('{"format": 1, "step": 30, "fi'), r"30.json is damaged \(Unterminated string"),
    "no object": (text("[1]"), r"30.json is damaged \(it is not of format 1"),
    "not UTF-8": (lambda folder: (folder / f"{NEWEST}.json").write_bytes(b"\xff\xfe{"), r"30.json is damaged"),
    "another format": (change_manifest(format=2), r"30.json is damaged \(it is not of format 1"),
    "wrong type": (change_manifest(bytes="9"), r"30.json is damaged \(bytes is '9'\)"),
    "missing field": (change_manifest(sha256=None), r"30.json is damaged \(sha256 is None\)"),
    "another step": (change_manifest(step=31), r"30.json is damaged \(it is of step 31 and file 'step-000000030.pt'\)"),
    "another file": (change_manifest(file="step-000000020.pt"), r"30.json is damaged .*file 'step-000000020.pt'"),
    "a file elsewhere": (change_manifest(file="../step-000000030.pt"), r"30.json is damaged .*file '\.\./step"),
    "itself": (change_manifest(file="step-000000030.json"), r"30.json is damaged .*file 'step-000000030.json'"),
    "unreadable manifest": (manifest_is_a_folder, r"30.json cannot be read \(Is a directory\)"),
    "no archive": (replace_state(b"hello"), r"30.pt cannot be loaded \("),
    "code": (harmful, r"30.pt cannot be loaded \(UnpicklingError: PyTorch did not write it, or it holds more"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, words = DAMAGES[damage]
    folder = tmp_path / "run"
    filled(folder, 10, 20, 30)
    change(folder)
    after = sorted(path.name for path in folder.iterdir())
    checkpoints = Checkpoints(folder, 9)
    found = checkpoints.newest()
    assert found.step == 20
    assert_same(found.state, sample(20))
    (notice,) = found.notices
    assert re.search(rf"step 30 in {re.escape(str(folder))} cannot be used: .*{words}", notice), notice
    assert sorted(path.name for path in folder.iterdir()) == after, "reading changed the folder"
    assert not (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_removed_once_there_is_a_newer_one(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, _ = DAMAGES[damage]
    filled(tmp_path, 10, 20, 30)
    change(tmp_path)
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.newest().step == 20
    checkpoints.save(40, sample(40))
    assert checkpoints.newest().notices == ()
    if damage == "unreadable manifest":  # which may be read again tomorrow
        assert checkpoints.steps() == (20, 30, 40)
    elif damage in ("flipped byte", "no archive", "code"):  # seen when it is read alone
        assert sorted(listing(tmp_path)) == names(30, 40)
    else:
        assert sorted(listing(tmp_path)) == names(20, 40)


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_damaged_is_an_error(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, words = DAMAGES[damage]
    folder = tmp_path / "run"
    filled(folder, 10, 30)
    (folder / "step-000000010.pt").write_bytes(b"lost")
    change(folder)
    with pytest.raises(CheckpointError, match=words) as raised:
        Checkpoints(folder).newest()
    assert "step 10" in str(raised.value)
    assert "step-000000010.pt has 4 bytes" in str(raised.value)
    assert "None is left to resume from: put back a copy of one, or remove these files to start over" in str(
        raised.value
    )
    checkpoints = Checkpoints(folder)
    if damage != "unreadable manifest":
        checkpoints.clear()
        assert checkpoints.newest() is None


def test_several_in_a_row(tmp_path):
    filled(tmp_path, 10, 20, 30, 40)
    flip(tmp_path)
    (tmp_path / "step-000000040.json").unlink()
    os.truncate(tmp_path / "step-000000020.pt", 9)
    found = Checkpoints(tmp_path).newest()
    assert found.step == 10
    assert [re.search(r"step (\d+)", notice)[1] for notice in found.notices] == ["40", "30", "20"]


def test_what_lies_behind_the_newest_is_not_spoken_of(tmp_path):
    filled(tmp_path, 10, 20, 30)
    (tmp_path / "step-000000010.json").unlink()
    os.truncate(tmp_path / "step-000000020.pt", 9)
    assert Checkpoints(tmp_path).newest().notices == ()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("kind", ["pt", "json", "folder", "write"])
def test_permissions(kind):
    """As a user whom the files do not belong to."""
    folder = Path(tempfile.mkdtemp())  # pytest's own is closed to others
    try:
        filled(folder, 20, 30)
        # As root nothing is unreadable: another user takes over. Whatever is imported late is imported before.
        assert Checkpoints(folder).newest().step == 30
        os.chmod(folder, {"folder": 0, "write": 0o555}.get(kind, 0o755))
        if kind in ("pt", "json"):
            os.chmod(folder / f"{NEWEST}.{kind}", 0)

        def work() -> None:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            checkpoints = Checkpoints(folder)
            if kind == "folder":
                with pytest.raises(PermissionError):
                    checkpoints.newest()
                return
            found = checkpoints.newest()
            if kind == "write":
                assert found.step == 30
                with pytest.raises(PermissionError, match=r"step 40 could not be written .*denied.*step 30 is kept"):
                    checkpoints.save(40, sample(40))
            else:
                assert found.step == 20
                assert f"{NEWEST}.{kind} cannot be read (Permission denied)" in found.notices[0]

        assert in_a_child(work) == 0
        os.chmod(folder, 0o755)
        assert sorted(path.name for path in folder.iterdir()) == names(20, 30)
    finally:
        shutil.rmtree(folder)


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Checkpoints(tmp_path / "file").newest()


def test_going_back(tmp_path):
    """Reading an older one changes nothing; saving on from it gives up what came after it."""
    filled(tmp_path, 10, 20, 30)
    before = listing(tmp_path)
    checkpoints = Checkpoints(tmp_path, 2)
    for upto in (20, 29):
        found = checkpoints.newest(upto=upto)
        assert (found.step, found.notices) == (20, ())
        assert_same(found.state, sample(20))
    assert Checkpoints(tmp_path).newest().step == 30
    assert listing(tmp_path) == before
    checkpoints.save(25, sample(25))
    assert sorted(listing(tmp_path)) == names(20, 25)
    assert checkpoints.newest().step == 25


def test_going_back_to_before_all(tmp_path):
    filled(tmp_path, 10, 20)
    with pytest.raises(CheckpointError, match="has no checkpoint up to step 9; it has those of steps 10, 20"):
        Checkpoints(tmp_path).newest(upto=9)
    assert Checkpoints(tmp_path / "empty").newest(upto=9) is None


def test_going_back_because_of_damage(tmp_path):
    """What became unreadable, and is whole again later, is not of this course any more."""
    filled(tmp_path, 10, 20, 30)
    manifest = (tmp_path / f"{NEWEST}.json").read_text()
    manifest_is_a_folder(tmp_path)
    checkpoints = Checkpoints(tmp_path, 9)
    assert checkpoints.newest().step == 20
    checkpoints.save(25, sample(25))
    (tmp_path / f"{NEWEST}.json").rmdir()
    (tmp_path / f"{NEWEST}.json").write_text(manifest)
    found = Checkpoints(tmp_path).newest()
    assert found.step == 25
    assert "30.pt was given up when the run went back and wrote step 25" in found.notices[0]
    checkpoints.save(26, sample(26))
    assert sorted(listing(tmp_path)) == names(10, 20, 25, 26)


def test_what_was_given_up_is_no_way_out(tmp_path, monkeypatch):
    """Killed before the later steps were removed, and then the new one is damaged: on from before both."""
    checkpoints = filled(tmp_path, 10, 20, 30)
    monkeypatch.setattr(Checkpoints, "_prune", lambda self: None)
    checkpoints.save(15, sample(15))
    os.truncate(tmp_path / "step-000000015.pt", 9)
    found = Checkpoints(tmp_path).newest()
    assert found.step == 10
    assert [re.search(r"step (\d+)", notice)[1] for notice in found.notices] == ["30", "20", "15"]
    for name in names(10):
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="None is left"):
        Checkpoints(tmp_path).newest()


def test_going_back_by_hand(tmp_path):
    filled(tmp_path, 10, 20, 30)
    for name in names(30):
        (tmp_path / name).unlink()
    checkpoints = Checkpoints(tmp_path, 9)
    assert checkpoints.newest().step == 20
    checkpoints.save(30, sample(31))
    assert_same(checkpoints.newest().state, sample(31))
    assert sorted(listing(tmp_path)) == names(10, 20, 30)


@pytest.mark.parametrize("step", [0, 10, 29, 30])
def test_a_run_that_starts_over_unasked_loses_nothing(step, tmp_path):
    filled(tmp_path, 10, 30)
    before = listing(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"holds checkpoints of steps .*30, which would be lost if step {step} were"
    ):
        checkpoints.save(step, sample(1))
    assert listing(tmp_path) == before
    checkpoints.save(31, sample(31))  # which gives nothing up
    checkpoints.clear()
    checkpoints.save(step, sample(1))
    assert sorted(listing(tmp_path)) == names(step)
