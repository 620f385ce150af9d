"""Where nothing is measured, and the file of what was: no content of it and no other process makes tuning fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuning_support import (
    CORRECTED,
    CUDA,
    FC1,
    INTERPRETED,
    LIBRARY,
    NORMALIZED,
    Ways,
    cache_file,  # noqa: F401
    latest,
    measure_in_a_process,
    no_unexpected_warning,  # noqa: F401
    usual,
)

from lambda_kernels.ops.ln_mlp.fused import tuning
from lambda_kernels.ops.ln_mlp.fused.tuning import TuningWarning

# Where nothing is measured

OBSTACLES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "tuning is off (LAMBDA_KERNELS_TUNING=off)": lambda patch: patch.setenv("LAMBDA_KERNELS_TUNING", "off"),
    "in Triton's interpreter": lambda patch: patch.setattr(tuning, "in_interpreter", lambda: True),
    "the stream is being captured": lambda patch: patch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: True
    ),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_where_nothing_can_be_measured_the_first_is_used(reason: str, cache: Path) -> None:
    ways = usual()
    with pytest.MonkeyPatch.context() as patch:
        OBSTACLES[reason](patch)
        assert ways.choose() == CORRECTED
        assert (latest().source, latest().reason, latest().times_us) == ("default", reason, {})
    assert ways.ran == []
    assert not cache.exists()
    assert ways.choose() == LIBRARY, "a default must not keep from measuring later"
    assert [d.source for d in tuning.decisions()] == ["measured"]


@pytest.mark.parametrize("reason", OBSTACLES)
@pytest.mark.parametrize("known", ["memory", "cache file"])
def test_what_is_known_where_nothing_can_be_measured(reason: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual().choose()
    if known == "cache file":
        tuning.clear()
    OBSTACLES[reason](monkeypatch)
    ways = usual()
    from_file = known == "memory" or reason == "the stream is being captured"
    assert ways.choose() == (LIBRARY if from_file else CORRECTED)
    assert ways.ran == []


def test_one_candidate_and_a_device_other_than_cuda_are_reasons() -> None:
    assert Ways({LIBRARY: 1.0}).choose() == LIBRARY
    assert (latest().source, latest().reason) == ("default", "only one candidate")
    assert Ways({CORRECTED: 1.0}).choose() == CORRECTED
    ways = usual()
    assert ways.choose() == LIBRARY, "a single candidate must not keep several from being measured later"
    assert len(ways.ran) == 3
    assert usual().choose(device=torch.device("cpu")) == CORRECTED
    assert (latest().source, latest().reason) == ("default", "the tensors are on cpu")


@pytest.mark.parametrize("on", [True, False])
def test_the_interpreter_is_recognized(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", on)
    assert INTERPRETED() is on


@pytest.mark.parametrize("value", ["Off", "0", "", "no"])
def test_a_wrong_switch_names_itself_and_what_is_allowed(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", value)
    with pytest.raises(ValueError, match=f"LAMBDA_KERNELS_TUNING must be one of 'on', 'off'; got '{value}'"):
        usual().choose()
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", "on")
    assert usual().choose() == LIBRARY


# The file


def test_the_file_is_readable_json(cache: Path) -> None:
    assert tuning.cache_path() == cache
    usual().choose()
    content = json.loads(cache.read_text(encoding="utf-8"))
    assert content["format"] == 1
    ((key, entry),) = content["entries"].items()
    for part in ("NVIDIA H200", "ptxas 12.8", "fc1", "65536 tokens", "384", "1536", "bfloat16", "x=bfloat16 gelu=none"):
        assert part in key
    assert entry["candidate"] == "library"
    assert entry["times_us"]["corrected 128x128x64 w8 s4"] == 141.0
    assert sorted(p.name for p in cache.parent.iterdir()) == [".tuning.json.lock", "tuning.json"]


@pytest.mark.parametrize(
    ("own", "common", "expected"),
    [
        ("/a", "/b", "/a/tuning.json"),
        ("", "/b", "/b/lambda_kernels/tuning.json"),
        ("", "b", "/home/someone/.cache/lambda_kernels/tuning.json"),
        ("", "", "/home/someone/.cache/lambda_kernels/tuning.json"),
        ("~/a", "/b", "/home/someone/a/tuning.json"),
    ],
)
def test_where_the_file_is(own: str, common: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_KERNELS_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", common)
    monkeypatch.setenv("HOME", "/home/someone")
    assert tuning.cache_path() == Path(expected)


def test_what_an_earlier_version_kept_elsewhere_is_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual().choose()
    home, caches = cache.parent.parent / "home", cache.parent.parent / "Library" / "Caches"
    earlier = home / ".cache" / "lambda_kernels" / "tuning.json"
    earlier.parent.mkdir(parents=True)
    cache.rename(earlier)
    monkeypatch.delenv("LAMBDA_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    # As on macOS, where earlier versions used ~/.cache too.
    monkeypatch.setattr(tuning.platformdirs, "user_cache_path", lambda name, appauthor: caches / name)
    tuning.clear()
    ways, before = usual(), earlier.read_bytes()
    assert ways.choose() == LIBRARY
    assert ways.ran == []
    assert len(tuning.status()["entries"]) == 1
    assert ways.choose(replace(FC1, stage="fc2")) == LIBRARY
    assert tuning.cache_path() == caches / "lambda_kernels" / "tuning.json"
    assert len(json.loads(tuning.cache_path().read_text())["entries"]) == 2
    assert earlier.read_bytes() == before


def the_key(cache: Path) -> str:
    """The key of `usual()`'s entry."""
    usual().choose()
    (key,) = json.loads(cache.read_text())["entries"]
    cache.unlink()
    tuning.clear()
    return key


def as_file(key: str, **entry: object) -> str:
    return json.dumps({"format": 1, "entries": {key: {"candidate": "library", "times_us": {"library": 1.0}, **entry}}})


def test_a_choice_that_is_not_offered_is_ignored(cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    key = the_key(cache)
    cache.write_text(as_file(key, candidate="gone", times_us={"gone": 1.0}))
    ways = usual()
    assert ways.choose() == LIBRARY
    assert len(ways.ran) == 3


DAMAGED: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda key: "",
    "garbage": lambda key: "fc1 = library",
    "half of it": lambda key: as_file(key)[:-9],
    "not text": lambda key: b"\xff\xfe\x00",
    "too deep": lambda key: "[" * 100_000,
    "a list": lambda key: "[]",
    "a newer format": lambda key: as_file(key).replace('"format": 1', '"format": 2'),
    "no format": lambda key: as_file(key).replace("format", "from"),
    "no entries": lambda key: '{"format": 1}',
    "entries in a list": lambda key: '{"format": 1, "entries": []}',
    "an entry that is none": lambda key: json.dumps({"format": 1, "entries": {key: "library"}}),
    "a candidate that is a list": lambda key: as_file(key, candidate=["library"]),
    "a candidate without a time": lambda key: as_file(key, times_us={"corrected": 1.0}),
    "times in a list": lambda key: as_file(key, times_us=["library"]),
    "a time in words": lambda key: as_file(key, times_us={"library": "1"}),
    "a negative time": lambda key: as_file(key, times_us={"library": -1.0}),
    "not a number": lambda key: as_file(key, times_us={"library": float("nan")}),
    "infinite": lambda key: as_file(key, times_us={"library": float("inf")}),
    "a huge integer": lambda key: as_file(key, times_us={"library": 10**400}),
    "half a surrogate pair": lambda key: as_file(key, times_us={"library": 1.0, "\ud800": 1.0}),
    "half a surrogate pair elsewhere": lambda key: as_file("\ud800"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning_and_replaced(damage: str, cache: Path) -> None:
    content = DAMAGED[damage](the_key(cache))
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    ways = Ways({CORRECTED: 1.0, NORMALIZED: 2.0, LIBRARY: 3.0})
    with pytest.warns(TuningWarning, match="will be replaced at the next measurement") as record:
        chosen = [ways.choose(replace(FC1, stage=stage)) for stage in ("fc1", "fc2")]
    assert chosen == [CORRECTED] * 2
    assert len(record) == 1
    assert str(cache) in str(record[0].message)
    assert len(ways.ran) == 6
    tuning.clear()
    assert ways.choose() == CORRECTED
    assert len(ways.ran) == 6, "what replaced the file is sound"


anything = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(exclude_categories=()), max_size=5)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


def nearly(value: st.SearchStrategy) -> st.SearchStrategy:
    """Mostly what is right there."""
    return st.one_of(value, value, value, anything)


def near_files(key: str) -> st.SearchStrategy:
    names = st.one_of(st.sampled_from([*map(str, usual().times), "gone"]), st.text(max_size=3))
    times = st.dictionaries(names, nearly(st.floats(0, 1e6)), max_size=4)
    entry = st.fixed_dictionaries({"candidate": nearly(names), "times_us": nearly(times)}, optional={"more": anything})
    entries = st.dictionaries(st.one_of(st.just(key), st.text(max_size=3)), nearly(entry), max_size=3)
    content = nearly(st.fixed_dictionaries({"format": nearly(st.just(1)), "entries": nearly(entries)}))
    return st.one_of(content.map(json.dumps).map(str.encode), st.binary(max_size=30))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_content_of_the_file_makes_it_fail(
    data: st.DataObject, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # most of the time, and no disk fails here
    tuning.clear()
    cache.parent.mkdir(exist_ok=True)
    key = tuning._entry_key(FC1, tuple(usual().times), CUDA)
    cache.write_bytes(data.draw(near_files(key)))
    other = replace(FC1, stage="fc2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        chosen = usual().choose()
        assert chosen in usual().times
        assert usual().choose(other) == LIBRARY  # is written beside what was sound
    assert len(tuning.describe(384, 1536, "bfloat16")) == 2
    tuning.clear()
    ways = usual()
    assert (ways.choose(), ways.choose(other)) == (chosen, LIBRARY)  # a warning would be an error here
    assert ways.ran == []


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMBDA_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    ways = usual()
    with pytest.warns(TuningWarning, match="cannot be saved for the next process: .*LAMBDA_KERNELS_CACHE") as record:
        chosen = [ways.choose(replace(FC1, stage=stage)) for stage in ("fc1", "fc2")]
    assert chosen == [LIBRARY] * 2
    assert len(record) == 1
    assert ways.choose() == LIBRARY
    assert len(ways.ran) == 6, "memory keeps the choice"


def test_a_folder_in_place_of_the_file(cache: Path) -> None:
    cache.mkdir(parents=True)
    with pytest.warns(TuningWarning) as record:
        assert usual().choose() == LIBRARY
    assert len(record) == 2  # neither read nor written
    assert [p.name for p in cache.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_without_a_home_folder_memory_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("LAMBDA_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", find)
    ways = usual()
    with pytest.warns(TuningWarning, match="home directory"):
        assert ways.choose() == LIBRARY
    assert ways.choose() == LIBRARY
    assert len(ways.ran) == 3


def test_a_lock_that_is_never_released_is_waited_for_in_vain(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(tuning, "_LOCK_SECONDS", 0.1)
    cache.parent.mkdir()
    with open(cache.parent / ".tuning.json.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        start = time.monotonic()
        assert usual().choose() == LIBRARY
        assert time.monotonic() - start >= 0.1
    assert "library" in cache.read_text()


def test_processes_that_write_at_once_lose_nothing(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    stages = ("fc1", "fc2")
    processes = [
        context.Process(target=measure_in_a_process, args=(str(cache.parent), stage, together)) for stage in stages
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    for stage in stages:
        ways = usual()
        assert ways.choose(replace(FC1, stage=stage)) == LIBRARY
        assert ways.ran == []
