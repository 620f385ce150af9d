"""Choosing the fastest way: what is measured and remembered, forcing, and how it is told. A CUDA device is simulated."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tuning_support import (
    ASSEMBLER,
    CORRECTED,
    CUDA,
    FC1,
    LIBRARY,
    MACHINE,
    MEASURE,
    NARROW,
    NORMALIZED,
    Ways,
    cache_file,  # noqa: F401
    latest,
    no_unexpected_warning,  # noqa: F401
    usual,
)

from lambda_kernels.ops.ln_mlp.fused import tuning
from lambda_kernels.ops.ln_mlp.fused.tuning import Candidate, Problem, TuningWarning

# What is chosen


@given(st.lists(st.floats(1.0, 1000.0), min_size=2, max_size=6))
@example([102.0, 100.0])  # exactly 2 % apart
@example([101.9, 103.0, 100.0])
@example([103.0, 101.9, 100.0])
@example([101.0, 102.5, 100.0])  # each near the next, the first and the second not both near the fastest
@example([7.0, 7.0])
@example([0.0, 0.0])  # below what the timer resolves
def test_the_first_that_is_within_two_percent_of_the_fastest_is_chosen(times: list[float]) -> None:
    with tuning.forced(other="world"):  # measured here, never written: examples leave nothing to each other
        tuning.clear()
        ways = Ways({Candidate(f"method_{i}"): t for i, t in enumerate(times)})
        chosen = ways.choose()
    assert ways.ran == list(ways.times)
    best = min(times)
    expected = next(i for i, t in enumerate(times) if t == best or t / best < 1.02)
    assert chosen.method == f"method_{expected}"


def test_the_library_is_measured_and_chosen_where_it_is_fastest() -> None:
    assert usual().choose() == LIBRARY
    decision = latest()
    assert (decision.candidate, decision.source, decision.reason) == (LIBRARY, "measured", "fastest of 3")
    assert decision.times_us == {
        "corrected 128x128x64 w8 s4": 141.0,
        "normalized 128x64 w4 s2": 150.0,
        "library": 120.0,
    }
    assert decision.problem == replace(FC1, tokens=65536)


def test_preferring_an_earlier_one_is_told() -> None:
    assert Ways({CORRECTED: 101.0, LIBRARY: 100.0}).choose() == CORRECTED
    assert latest().reason == "within 2 % of the fastest, and preferred"


def test_a_failing_candidate_is_left_out_with_a_warning(cache: Path) -> None:
    ways = Ways({CORRECTED: RuntimeError("out of resource: shared memory"), NORMALIZED: 5.0, LIBRARY: 9.0})
    with pytest.warns(
        TuningWarning, match=r"fc1: corrected 128x128x64 w8 s4 .* RuntimeError: out of resource"
    ) as record:
        assert ways.choose() == NORMALIZED
    assert len(record) == 1
    assert "corrected 128x128x64 w8 s4" not in latest().times_us
    assert "normalized" in cache.read_text()
    assert ways.choose() == NORMALIZED
    assert len(ways.ran) == 3


@pytest.mark.parametrize("error", [ValueError("no capture"), torch.OutOfMemoryError("full")])
def test_when_all_fail_the_first_is_used_and_nothing_written(cache: Path, error: Exception) -> None:
    ways = Ways({CORRECTED: error, LIBRARY: error})
    with pytest.warns(TuningWarning) as record:
        assert ways.choose() == CORRECTED
    assert len(record) == 2
    assert (latest().source, latest().reason) == ("default", "no candidate could be measured")
    assert ways.choose() == CORRECTED
    assert len(ways.ran) == 2, "trying again at each call would cost more than it could win"
    assert not cache.exists()
    tuning.clear()
    ways.times = {CORRECTED: 2.0, LIBRARY: 1.0}
    assert ways.choose() == LIBRARY


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), torch.AcceleratorError("device lost")])
def test_an_error_of_the_moment_is_not_written_down(cache: Path, error: Exception) -> None:
    ways = Ways({CORRECTED: error, LIBRARY: 9.0})
    with pytest.warns(TuningWarning, match="corrected"):
        assert ways.choose() == LIBRARY
    assert ways.choose() == LIBRARY
    assert len(ways.ran) == 2, "this process remembers"
    assert not cache.exists()
    tuning.clear()
    ways.times[CORRECTED] = 1.0
    assert ways.choose() == CORRECTED


def test_a_failed_candidate_holds_no_tensors_while_the_next_is_measured() -> None:
    held = []

    class Big:
        def __del__(self) -> None:
            held.append("freed")

    def run(candidate: Candidate) -> float:
        if candidate == CORRECTED:
            big = Big()  # noqa: F841
            raise RuntimeError("out of resource")
        assert held == ["freed"]
        return 1.0

    with pytest.warns(TuningWarning):
        assert tuning.choose(FC1, [CORRECTED, LIBRARY], run, CUDA) == LIBRARY


def test_no_candidates_are_an_error() -> None:
    with pytest.raises(ValueError, match="fc1: no candidates"):
        Ways({}).choose()


class Device:
    """What `tuning` asks of CUDA to time a run: a clock that counts `gpu_us` per run, of those that a graph replays too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpu_us: float, launch_us: float = 0.0) -> None:
        self.gpu_us, self.launch_us = gpu_us, launch_us
        self.now, self.captured, self.modes, self.replayed, self.waits = 0.0, None, [], [], []
        stream = SimpleNamespace(device=CUDA, wait_stream=self.waits.append)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(tuning, "_side_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def run(self) -> None:
        if self.captured is None:
            self.now += self.gpu_us
        else:
            self.captured += 1


class Graph:
    def __init__(self, device: Device) -> None:
        self.device, self.runs = device, 0

    def capture_begin(self, capture_error_mode: str) -> None:
        self.device.modes.append(capture_error_mode)
        self.device.captured = 0

    def capture_end(self) -> None:
        self.runs, self.device.captured = self.device.captured, None

    def replay(self) -> None:
        self.device.replayed.append(self.runs)
        self.device.now += self.device.launch_us + self.runs * self.device.gpu_us


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, None

    def record(self) -> None:
        self.at = self.device.now

    def synchronize(self) -> None:
        assert self.at is not None

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) / 1000


@pytest.mark.parametrize(("gpu_us", "runs"), [(8.0, 100), (141.0, 14), (5000.0, 3)])
def test_runs_are_timed_in_a_graph_of_many(monkeypatch: pytest.MonkeyPatch, gpu_us: float, runs: int) -> None:
    device = Device(monkeypatch, gpu_us)
    assert MEASURE(device.run) == pytest.approx(gpu_us)
    assert device.replayed == [3] * 2 + [runs] * 11  # each graph once unmeasured
    assert device.modes == ["thread_local"] * 2
    assert len(device.waits) == 2


def test_the_launch_of_a_graph_hardly_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MEASURE(Device(monkeypatch, 8.0, launch_us=6.0).run) == pytest.approx(8.0, rel=0.02)


def test_a_capture_ends_when_what_is_captured_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 8.0)

    def run() -> None:
        if device.captured is not None:
            raise RuntimeError("not while capturing")
        device.run()

    with pytest.raises(RuntimeError, match="not while capturing"):
        MEASURE(run)
    assert device.captured is None
    assert len(device.waits) == 2, "later work waits for what was begun"


def test_after_a_capture_that_did_not_end_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    device = Device(monkeypatch, 8.0)
    monkeypatch.setattr(tuning, "_measure", MEASURE)
    monkeypatch.setattr(Graph, "capture_end", lambda graph: (_ for _ in ()).throw(RuntimeError("invalidated")))
    ran = []

    def run(candidate: Candidate) -> None:
        ran.append(candidate)
        device.run()

    with pytest.warns(TuningWarning, match="could not be captured: invalidated. Nothing more is measured") as record:
        assert tuning.choose(FC1, [CORRECTED, LIBRARY], run, CUDA) == CORRECTED
    assert len(record) == 1
    assert tuning.choose(replace(FC1, stage="fc2"), [CORRECTED, LIBRARY], run, CUDA) == CORRECTED, "without a warning"
    assert set(ran) == {CORRECTED}
    assert latest().source == "default"
    assert not cache.exists()


def test_without_a_memory_cache_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    ways = usual()
    assert ways.choose() == CORRECTED
    assert ways.ran == []
    assert "no CUDA graph can be captured" in latest().reason


# What is remembered


def test_memory_spares_measuring() -> None:
    ways = usual()
    first = ways.choose()
    assert ways.choose() == first
    assert len(ways.ran) == 3
    assert latest().source == "measured"


def test_a_new_process_reads_the_file() -> None:
    usual().choose()
    measured = latest()
    tuning.clear()
    assert tuning.decisions() == ()
    ways = usual()
    assert ways.choose() == LIBRARY
    assert ways.ran == []
    assert latest() == replace(measured, source="cache file", reason="measured earlier")


def test_the_file_is_read_once(cache: Path) -> None:
    other = replace(FC1, stage="fc2")
    for problem in (FC1, other):
        usual().choose(problem)
    tuning.clear()
    usual().choose()
    cache.unlink()
    ways = usual()
    assert ways.choose(other) == LIBRARY
    assert ways.ran == []


def test_order_of_candidates_is_not_part_of_the_file_but_their_set_is() -> None:
    usual().choose()
    tuning.clear()
    backwards = Ways(dict(reversed(usual().times.items())))
    assert backwards.choose() == LIBRARY
    assert backwards.ran == []


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], Problem]] = {
    "machine": lambda patch: patch.setattr(tuning, "_machine", lambda device: "NVIDIA A10") or FC1,
    "assembler": lambda patch: patch.setattr(tuning, "_assembler", lambda device: "12.9") or FC1,
    "stage": lambda patch: replace(FC1, stage="fc2"),
    "bucket": lambda patch: replace(FC1, tokens=65537),
    "channels": lambda patch: replace(FC1, channels=192),
    "hidden": lambda patch: replace(FC1, hidden=1024),
    "dtype": lambda patch: replace(FC1, dtype="float16"),
    "details": lambda patch: replace(FC1, details="x=float32 gelu=none"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_machine_or_problem_is_measured_anew(change: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    usual().choose()
    if change in ("machine", "assembler"):
        tuning.clear()  # for what was decided, a process does not ask again
    other = CHANGES[change](monkeypatch)
    ways = Ways({CORRECTED: 1.0, NORMALIZED: 150.0, LIBRARY: 120.0})
    assert ways.choose(other) == CORRECTED
    assert len(ways.ran) == 3
    assert len(json.loads(cache.read_text())["entries"]) == 2


@pytest.mark.parametrize("again", ["same process", "new process"])
def test_other_candidates_are_measured_anew_beside_the_old(again: str) -> None:
    def start() -> None:
        if again == "new process":
            tuning.clear()

    usual().choose()
    for times in ({CORRECTED: 1.0, LIBRARY: 120.0}, {NARROW: 1.0, NORMALIZED: 150.0, LIBRARY: 120.0}):
        start()
        ways = Ways(times)
        assert ways.choose() == next(iter(times))
        assert len(ways.ran) == len(times)
    start()
    ways = usual()
    assert ways.choose() == LIBRARY
    assert ways.ran == [], "the first set is still known"


def test_another_device_of_the_process_is_measured_anew() -> None:
    tuning._machine = str
    usual().choose()
    ways = Ways({CORRECTED: 1.0, NORMALIZED: 2.0, LIBRARY: 3.0})
    assert ways.choose(device=torch.device("cuda", 1)) == CORRECTED
    assert usual().choose() == LIBRARY


@pytest.mark.parametrize(("tokens", "measured"), [(32769, 0), (65536, 0), (32768, 3), (65537, 3)])
def test_token_counts_of_one_bucket_share_a_choice(tokens: int, measured: int) -> None:
    usual().choose()
    ways = usual()
    ways.choose(replace(FC1, tokens=tokens))
    assert len(ways.ran) == measured


@given(st.integers(1, 1 << 40))
def test_buckets_are_the_next_power_of_two(tokens: int) -> None:
    bucket = replace(FC1, tokens=tokens).bucket
    assert bucket >= max(tokens, 16)
    assert bucket & (bucket - 1) == 0
    assert bucket == 16 or bucket // 2 < tokens
    assert replace(FC1, tokens=bucket).bucket == bucket


def test_the_machine_is_told_with_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    words = MACHINE.__wrapped__(CUDA)
    versions = (torch.__version__, triton.__version__, str(torch.version.cuda))
    for part in ("NVIDIA H200", "9.0", "132", *versions, f"kernels {tuning._sources()}"):
        assert part in words


def test_the_assembler_is_asked_for_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch's compiler sets another one through this variable, for the rest of a process."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    before = ASSEMBLER(CUDA)
    assert re.fullmatch(r"\d+\.\d+", before)
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.25, V1.25.7'\n", encoding="utf-8")
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    assert ASSEMBLER(CUDA) == "1.25"


@pytest.mark.parametrize("name", ["kernels/forward.py", "kernels/common.py", "launch.py", "stages.py"])
def test_times_of_other_sources_are_not_used(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "fused"
    shutil.copytree(Path(tuning.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(tuning, "__file__", str(copy / "tuning.py"))
    before = tuning._sources.__wrapped__()
    assert before == tuning._sources()
    (copy / name).write_bytes((copy / name).read_bytes().replace(b"\n", b"\r\n"))  # as Git may check it out on Windows
    assert tuning._sources.__wrapped__() == before
    (copy / name).write_bytes((copy / name).read_bytes() + b"# changed\n")
    assert tuning._sources.__wrapped__() != before


def test_threads_do_not_measure_the_same_twice() -> None:
    ways = usual()
    tuning._measure = lambda run: time.sleep(0.02) or run()
    chosen = []
    threads = [threading.Thread(target=lambda: chosen.append(ways.choose())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == [LIBRARY] * 4
    assert len(ways.ran) == 3


def test_a_composite_candidate_chooses_its_parts_while_it_is_measured() -> None:
    parts = usual()

    def run(candidate: Candidate) -> float:
        return 100.0 if candidate.method == "one_pass" else parts.times[parts.choose()] - 30.0

    candidates = [Candidate("one_pass"), Candidate("staged")]
    assert tuning.choose(replace(FC1, stage="forward"), candidates, run, CUDA).method == "staged"
    assert [(d.problem.stage, d.source) for d in tuning.decisions()] == [("fc1", "measured"), ("forward", "measured")]


# Forcing


def sources() -> dict[str, str]:
    return {d.problem.stage: d.source for d in tuning.decisions()}


@pytest.mark.parametrize(
    ("wish", "expected"),
    [("corrected", NARROW), (CORRECTED, CORRECTED), ("library", LIBRARY), (replace(LIBRARY), LIBRARY)],
)
def test_forced_takes_the_first_of_a_method_or_the_very_candidate(wish: str | Candidate, expected: Candidate) -> None:
    ways = Ways({NORMALIZED: 1.0, NARROW: 50.0, CORRECTED: 20.0, LIBRARY: 70.0})
    for device in (CUDA, torch.device("cpu")):
        with tuning.forced(fc1=wish):
            assert ways.choose(device=device) == expected
        assert latest().source == "forced"
    assert ways.ran == []
    assert ways.choose() == NORMALIZED


@pytest.mark.parametrize("wish", ["one_pass", NARROW])
def test_forcing_what_is_not_there_lists_what_is(wish: str | Candidate) -> None:
    message = f"fc1 is forced to {wish}; available here: corrected 128x128x64 w8 s4, normalized 128x64 w4 s2, library"
    with tuning.forced(fc1=wish), pytest.raises(ValueError, match=message):
        usual().choose()
    assert usual().choose() == LIBRARY


def test_forcing_nests_and_ends() -> None:
    ways = usual()

    def chosen() -> list[str]:
        return [ways.choose(replace(FC1, stage=stage)).method for stage in ("fc1", "fc2")]

    def fail() -> None:
        with tuning.forced(fc1="library"):
            raise KeyError

    assert chosen() == ["library", "library"]
    with tuning.forced(fc1="normalized"):
        assert chosen() == ["normalized", "library"]
        assert sources() == {"fc1": "forced", "fc2": "cache file"}, "what was measured outside is used inside"
        with tuning.forced(fc2="corrected"):
            assert chosen() == ["normalized", "corrected"]
            with tuning.forced(fc1=None):
                assert chosen() == ["library", "corrected"]
        assert chosen() == ["normalized", "library"]
        with pytest.raises(KeyError):
            fail()
        assert chosen() == ["normalized", "library"]
        tuning.clear()
        assert chosen() == ["normalized", "library"], "forgetting does not end what is forced"
    assert chosen() == ["library", "library"]
    assert len(ways.ran) == 6


def test_after_forcing_decisions_tell_what_is_used_now() -> None:
    usual().choose()
    with tuning.forced(fc1="normalized"):
        usual().choose()
        assert sources() == {"fc1": "forced"}
    usual().choose()
    assert sources() == {"fc1": "measured"}


def test_other_threads_are_forced_too() -> None:
    # Autograd runs the backward on a CUDA device in a thread of its own.
    chosen = []
    with tuning.forced(fc1="normalized"):
        thread = threading.Thread(target=lambda: chosen.append(usual().choose()))
        thread.start()
        thread.join()
    assert chosen == [NORMALIZED]


def test_what_was_measured_with_forced_parts_stays_inside(cache: Path) -> None:
    times = {"corrected": 200.0, "library": 50.0}
    parts = Ways({CORRECTED: 200.0, LIBRARY: 50.0})
    ran = []

    def run(candidate: Candidate) -> float:
        ran.append(candidate)
        return 100.0 if candidate.method == "one_pass" else times[parts.choose().method]

    def forward() -> str:
        return tuning.choose(
            replace(FC1, stage="forward"), [Candidate("one_pass"), Candidate("staged")], run, CUDA
        ).method

    for _ in range(2):
        with tuning.forced(fc1="corrected"):
            assert forward() == "one_pass"
    assert len(ran) == 2, "inside, it is remembered"
    assert not cache.exists()
    assert forward() == "staged"
    tuning.clear()
    assert forward() == "staged"
    assert len(ran) == 4


# Words


def test_describe_and_decisions() -> None:
    def decide(stage: str, times: dict[Candidate, float], **changes: object) -> None:
        Ways(times).choose(replace(FC1, stage=stage, **changes))

    decide("fc1", {CORRECTED: 141.0, NORMALIZED: 155.55, LIBRARY: 160.24})
    decide("fc2", {NARROW: 90.0, LIBRARY: 70.0}, tokens=3)
    decide("forward", {Candidate("staged"): 9.0, CORRECTED: 6.0, NARROW: 7.0})
    decide("hidden_gradient", {LIBRARY: 1.0})
    decide("fc1", {CORRECTED: 1.0, LIBRARY: 9.0}, channels=192)
    decide("fc1", {CORRECTED: 1.0, LIBRARY: 9.0}, dtype="float16")
    with tuning.forced(saved_gradient="library"):
        decide("saved_gradient", {CORRECTED: 1.0, LIBRARY: 9.0})
    assert tuning.describe(384, 1536, "bfloat16") == [
        "fc1, 32769–65536 tokens: corrected 128x128x64 w8 s4 (measured, 141.0 µs; library 160.2 µs)",
        "fc2, 1–16 tokens: library (measured, 70.0 µs; corrected 64x128x64 w4 s3 90.0 µs)",
        "forward, 32769–65536 tokens: corrected 128x128x64 w8 s4 (measured, 6.0 µs; staged 9.0 µs)",
        "hidden_gradient, 32769–65536 tokens: library (default: only one candidate)",
        "saved_gradient, 32769–65536 tokens: library (forced)",
    ]
    assert len(tuning.describe(192, 1536, "bfloat16")) == 1
    assert tuning.describe(384, 1024, "bfloat16") == []
    assert len(tuning.decisions()) == 7
    tuning.clear()
    decide("fc1", {CORRECTED: 141.0, NORMALIZED: 155.55, LIBRARY: 160.24})
    assert tuning.describe(384, 1536, "bfloat16") == [
        "fc1, 32769–65536 tokens: corrected 128x128x64 w8 s4 (cache file, 141.0 µs; library 160.2 µs)"
    ]


def test_describe_tells_details_only_where_lines_would_be_alike() -> None:
    for details in ("pre", "", "act"):
        Ways({LIBRARY: 1.0}).choose(replace(FC1, details=details))
    Ways({LIBRARY: 1.0}).choose(replace(FC1, stage="fc2", details="pre"))
    Ways({LIBRARY: 1.0}).choose(replace(FC1, stage="fc2", details="pre"), torch.device("cuda", 1))
    grounds = "library (default: only one candidate)"
    assert tuning.describe(384, 1536, "bfloat16") == [
        f"fc1, 32769–65536 tokens, pre: {grounds}",
        f"fc1, 32769–65536 tokens: {grounds}",
        f"fc1, 32769–65536 tokens, act: {grounds}",
        f"fc2, 32769–65536 tokens: {grounds}",
    ]


def test_importing_needs_neither_triton_nor_timm() -> None:
    code = "import sys; sys.modules['triton'] = sys.modules['timm'] = None; from lambda_kernels.ops.ln_mlp.fused import tuning"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# What steps remember of it


@pytest.fixture
def new_steps() -> Callable[[], object]:
    return pytest.importorskip("lambda_kernels.ops.ln_mlp.fused.steps").Steps  # needs triton


def steps_choose(ways: Ways, steps: object) -> tuple[Candidate, Candidate | None]:
    """What was chosen now, and what would be without asking."""
    chosen = steps.choose(FC1, list(ways.times), lambda candidate, own: ways.run(candidate), CUDA)
    return chosen, steps.chosen("fc1")


def test_steps_remember_what_was_measured_until_it_is_forgotten(new_steps):
    steps = new_steps()
    assert steps_choose(usual(), steps) == (LIBRARY, LIBRARY)
    assert steps.is_current()
    with tuning.forced(fc1="corrected"):
        assert not steps.is_current()
        assert steps_choose(usual(), new_steps()) == (CORRECTED, CORRECTED)
    assert not new_steps().chosen("fc1")
    steps = new_steps()
    tuning.clear()
    assert not steps.is_current()


def test_steps_remember_the_default_as_long_as_tuning_is_off(monkeypatch, new_steps):
    monkeypatch.setenv(tuning.SWITCH, "off")
    steps = new_steps()
    assert steps_choose(usual(), steps) == (CORRECTED, CORRECTED)
    assert steps.is_current()
    monkeypatch.setenv(tuning.SWITCH, "on")
    assert not steps.is_current()


def test_steps_do_not_remember_the_default_of_a_capture(monkeypatch, new_steps):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    steps = new_steps()
    assert steps_choose(usual(), steps) == (CORRECTED, None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert steps_choose(usual(), steps) == (LIBRARY, LIBRARY)
