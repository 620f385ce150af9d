"""The states of entropy meters as dictionaries and files: canonical, checked, and whole after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from entropy_support import MODES, assert_same, sample

from lambda_kernels import EntropyMeter, files
from lambda_kernels.entropy import storage
from lambda_kernels.entropy.meter import PER


def meter_of(mode: str, per: str = "channel", updates: int = 2) -> EntropyMeter:
    meter = EntropyMeter(**MODES[mode], per=per, bins=16, name="blocks[0].mlp")
    for seed in range(updates):
        meter.update(sample(10, 2, 3, seed=seed, dtype=torch.bfloat16))
    return meter


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("mode", MODES)
def test_round_trips(mode, per, tmp_path):
    meter = meter_of(mode, per)
    torch.save(meter.state_dict(), tmp_path / "state.pt")
    other = EntropyMeter(**MODES[mode], per=per, bins=16)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    meter.save(tmp_path / "deeper" / "meter.pt")
    loaded = EntropyMeter.load(tmp_path / "deeper" / "meter.pt")
    assert loaded.name == "blocks[0].mlp"
    for restored in (other, loaded):
        assert_same(restored, meter)
        assert restored.updates == 2
    more = sample(5, 2, 3, seed=9, dtype=torch.bfloat16) * 7  # past the range so far
    assert_same(loaded.update(more), meter.update(more))
    assert loaded.updates == 3


@pytest.mark.parametrize("mode", MODES)
def test_files_of_the_first_format_are_read(mode, tmp_path):
    """They lack the low parts of mean and M2, which are taken for 0."""
    meter = meter_of(mode)
    state = meter.state_dict()
    state |= {"format": 1, "moments": state["moments"][:, [0, 1, 2, 5, 6]]}
    storage.write(tmp_path / "meter.pt", "mlp", state)
    loaded = EntropyMeter.load(tmp_path / "meter.pt")
    assert_same(loaded, meter)
    assert loaded.moments().mean_low.abs().max() == loaded.moments().m2_low.abs().max() == 0
    assert loaded.state_dict()["format"] == 2
    more = sample(5, 2, 3, seed=9, dtype=torch.bfloat16)
    assert_same(loaded.update(more), meter.update(more))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_seen_is_a_state(mode, tmp_path):
    meter = meter_of(mode, updates=0)
    meter.save(tmp_path / "meter.pt")
    loaded = EntropyMeter.load(tmp_path / "meter.pt")
    assert loaded.count == loaded.channels == loaded.updates == 0
    x = sample(6, 3, dtype=torch.bfloat16)
    assert_same(loaded.update(x), meter.update(x))


def test_options_from_numpy_come_back(tmp_path):
    text = np.array(["histogram", "sample", "mlp"])
    meter = EntropyMeter(text[0], per=text[1], name=text[2], base=np.float32(3), range=np.array([-4.0, 4.0]))
    meter.update(sample(5, 3)).save(tmp_path / "meter.pt")
    loaded = EntropyMeter.load(tmp_path / "meter.pt")
    assert (loaded.name, loaded.base, loaded.range) == ("mlp", 3.0, (-4.0, 4.0))
    assert_same(loaded, meter)
    json.dumps(meter.state_dict()["options"])  # as `all_reduce` sends them


@pytest.mark.skipif(os.name != "posix", reason="asks for processes by signal")
def test_only_the_leftovers_of_this_path_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [f".{name}.{ended.pid}-0123abcd.tmp" for name in ("blocks0.pt", "blocks[0].pt.old")]
    kept += [f".blocks[0].pt.{os.getppid()}-0123abcd.tmp"]  # of a process that may be writing the same file
    removed = [f".blocks[0].pt.{process}-0123abcd.tmp" for process in (ended.pid, os.getpid())]
    for name in kept + removed:
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path / "blocks[0].pt")
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_a_state_is_a_copy():
    meter = meter_of("dyadic")
    before = meter.state_dict()
    after = meter.state_dict()
    after["counts"].zero_()
    after["moments"].zero_()
    assert torch.equal(meter.state_dict()["counts"], before["counts"])
    meter.update(sample(9, 3, dtype=torch.bfloat16))
    other = EntropyMeter(**MODES["dyadic"], bins=16)
    other.load_state_dict(before)
    before["counts"].zero_()
    assert other.counts()[0].sum() == 2 * 20 * 3


def shifted(name: str, row: int, column: int, by: float):
    def change(state: dict) -> None:
        state[name][row, column] += by

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("format"), "not the state of an entropy meter"),
        (lambda state: state.update(format=99), "format 99; this version reads 1 and 2"),
        (lambda state: state.pop("counts"), "counts missing"),
        (lambda state: state["options"].update(bins=17), "belongs to .*17.* this meter is .*16"),
        (lambda state: state["options"].update(per="layer"), "belongs to"),
        (lambda state: state.update(updates=-1), "updates .*-1"),
        (lambda state: state.update(updates=1.5), r"updates .*1\.5"),
        (lambda state: state.update(moments=None), "counts, outside, grid without moments"),
        (lambda state: state.update(moments=[1.0]), "moments must be a tensor; got list"),
        (
            lambda state: state.update(moments=torch.ones(3, 4).double()),
            r"moments must be .*\['K', 7\]; got .*\[3, 4\]",
        ),
        (lambda state: state.update(moments=torch.ones(0, 7).double()), r"\[0, 7\]"),
        (lambda state: state.update(moments=torch.ones(3, 7)), "got torch.float32"),
        (lambda state: state.update(counts=state["counts"][:, :15]), r"counts must be .*\[3, 16\]; got .*\[3, 15\]"),
        (lambda state: state.update(counts=None), "counts must be a tensor; got NoneType"),
        (lambda state: state.update(counts=state["counts"].to_sparse()), "counts"),
        (lambda state: state.update(outside=state["outside"].double()), "outside must be torch.int64"),
        (lambda state: state.update(grid=torch.ones(3, 3)), "grid must be torch.float64"),
        (shifted("moments", 1, 1, float("nan")), "NaN, infinity"),
        (shifted("moments", 0, 0, 0.5), "no whole numbers"),
        (shifted("moments", 0, 2, -1e9), "negative M2"),
        (shifted("moments", 1, 3, 1e-3), "low part that is more than the rounding"),
        (shifted("moments", 0, 4, -1.0), "low part that is more than the rounding"),
        (shifted("moments", 2, 5, 1e9), "above its maximum"),
        (shifted("moments", 2, 6, 1e9), "grid is not that of"),
        (shifted("counts", 1, 3, 1), "do not add up"),
        (shifted("counts", 1, 3, -(10**6)), "negative"),
        (shifted("outside", 1, 0, 1), "do not add up"),
        (shifted("grid", 0, 2, 1), "grid is not that of"),
    ],
)
def test_foreign_and_damaged_states(change, words):
    state = meter_of("dyadic").state_dict()
    change(state)
    meter = EntropyMeter(**MODES["dyadic"], bins=16).update(sample(5, 2))
    before = meter.state_dict()
    with pytest.raises(ValueError, match=words):
        meter.load_state_dict(state)
    assert torch.equal(meter.state_dict()["counts"], before["counts"])
    assert meter.updates == 1
    with pytest.raises(ValueError, match="not the state of an entropy meter"):
        meter.load_state_dict([1, 2])
    layer = EntropyMeter(per="layer")
    stored = EntropyMeter(per="sample").update(sample(5, 2)).state_dict()
    with pytest.raises(ValueError, match="5 rows for one layer"):
        layer.load_state_dict({**stored, "options": layer.state_dict()["options"]})


def test_damaged_files(tmp_path):
    path = tmp_path / "meter.pt"
    meter = meter_of("dyadic")
    meter.save(path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"meter\.pt"):
            EntropyMeter.load(path)
    refused = 0
    for position in range(0, len(whole), 37):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        loaded, message = load_or_complain(path)
        if loaded is None:
            assert "meter.pt" in message
            refused += 1
        else:  # the archive holds padding, where a changed byte changes nothing
            assert_same(loaded, meter)
    assert refused > 10


def load_or_complain(path: Path) -> tuple[EntropyMeter | None, str]:
    try:
        return EntropyMeter.load(path), ""
    except ValueError as error:
        return None, str(error)


def test_foreign_files(tmp_path):
    path = tmp_path / "meter.pt"
    with pytest.raises(ValueError, match=r"cannot read the entropy meter .*meter\.pt: No such file"):
        EntropyMeter.load(path)
    state = meter_of("gaussian").state_dict()
    for content in ({"weight": torch.ones(3)}, [1, 2], {"name": "x", "state": state, "sha256": "0" * 64}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"meter\.pt is damaged or no entropy meter"):
            EntropyMeter.load(path)
    storage.write(path, "x", {**state, "options": {"kind": "future"}})
    with pytest.raises(ValueError, match=r"meter\.pt is no entropy meter that this version reads: .*'future'"):
        EntropyMeter.load(path)


PROGRAM = """
import os, signal, sys, torch
from lambda_kernels import EntropyMeter, files
path, way = sys.argv[1:]
meter = EntropyMeter("histogram", bins=16)
def batch(number):
    return torch.randn(50, 3, generator=torch.Generator().manual_seed(number)) * 2**number
replace = os.replace
for number in range(5):
    meter.update(batch(number))
    if number == 3:
        def die(*args):
            if way == "after":
                replace(*args)
            print("dying", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        files.os.replace = die
    meter.save(path)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("way", ["before", "after"])
def test_a_killed_process_loses_at_most_the_batch_in_flight(way, tmp_path):
    """It is killed while it saves after batch 3: just before the file is replaced, or just after."""
    path = tmp_path / "meter.pt"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(path), way], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert run.stdout == "dying\n"
    meter = EntropyMeter.load(path)
    held = 3 if way == "before" else 4
    assert meter.updates == held
    expected = EntropyMeter("histogram", bins=16)
    for number in range(held):
        expected.update(torch.randn(50, 3, generator=torch.Generator().manual_seed(number)) * 2**number)
    assert_same(meter, expected)
    # The next save tidies up what the killed process left.
    assert len(list(Path(tmp_path).iterdir())) == (2 if way == "before" else 1)
    meter.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["meter.pt"]
