"""A simulated CUDA device for the tests of tuning: the timer takes what a candidate's run returns for its time."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lambda_kernels.ops.ln_mlp.fused import tuning
from lambda_kernels.ops.ln_mlp.fused.kernels.configs import Config
from lambda_kernels.ops.ln_mlp.fused.tuning import Candidate, Problem, TuningWarning

CUDA = torch.device("cuda", 0)
CORRECTED = Candidate("corrected", Config(128, 128, 64, 8, 4))
NARROW = Candidate("corrected", Config(64, 128, 64, 4, 3))
NORMALIZED = Candidate("normalized", Config(128, 64, 0, 4, 2))
LIBRARY = Candidate("library")
FC1 = Problem("fc1", 50_000, 384, 1536, "bfloat16", "x=bfloat16 gelu=none")

MEASURE, MACHINE, ASSEMBLER, INTERPRETED = tuning._measure, tuning._machine, tuning._assembler, tuning.in_interpreter


class Ways:
    """The ways to compute a stage with their times in µs, or the errors they raise; notes which of them ran."""

    def __init__(self, times: dict[Candidate, float | Exception]) -> None:
        self.times = times
        self.ran: list[Candidate] = []

    def run(self, candidate: Candidate) -> float:
        self.ran.append(candidate)
        if isinstance(self.times[candidate], Exception):
            raise self.times[candidate]
        return self.times[candidate]

    def choose(self, problem: Problem = FC1, device: torch.device = CUDA) -> Candidate:
        return tuning.choose(problem, list(self.times), self.run, device)


def usual() -> Ways:
    return Ways({CORRECTED: 141.0, NORMALIZED: 150.0, LIBRARY: 120.0})


def simulate_cuda() -> None:
    tuning._measure = lambda run: run()
    tuning._machine = lambda device: "NVIDIA H200, torch 2.15.0"
    tuning._assembler = lambda device: "12.8"


@pytest.fixture(autouse=True, name="cache")
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of this test, which nothing has been written to."""
    monkeypatch.setenv("LAMBDA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LAMBDA_KERNELS_TUNING", raising=False)
    monkeypatch.setattr(tuning, "_measure", None)
    monkeypatch.setattr(tuning, "_machine", None)
    monkeypatch.setattr(tuning, "_assembler", None)
    simulate_cuda()
    monkeypatch.setattr(tuning, "in_interpreter", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning.clear()
    yield tmp_path / "cache" / "tuning.json"
    tuning.clear()


@pytest.fixture(autouse=True)
def no_unexpected_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TuningWarning)
        yield


def latest() -> tuning.Decision:
    return tuning.decisions()[-1]


def measure_in_a_process(folder: str, stage: str, together: object) -> None:
    """What a process does that a test spawns: choose a way for a stage, at the same time as another process."""
    os.environ["LAMBDA_KERNELS_CACHE"] = folder
    simulate_cuda()
    torch.cuda.is_current_stream_capturing = lambda: False
    tuning.in_interpreter = lambda: False
    write = tuning.write_json
    # Between reading and writing there is time for the other process to do the same, if nothing keeps it from that.
    tuning.write_json = lambda path, value: time.sleep(0.3) or write(path, value)
    together.wait(60)
    usual().choose(replace(FC1, stage=stage))
