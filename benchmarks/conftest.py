"""Benchmarks report ratios against a rival in the same process, and refuse to while the operator is wrong."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest


@pytest.fixture
def against(benchmark):
    """Time `ours` and, taking turns with it, `rival`; the ratio rival/ours goes into the benchmark's extra info."""

    def run(ours: Callable[[], object], rival: Callable[[], object], rounds: int = 10) -> float:
        times: dict[str, list[float]] = {"ours": [], "rival": []}
        for turn in range(rounds + 1):
            for name, function in (
                (("ours", ours), ("rival", rival)) if turn % 2 else (("rival", rival), ("ours", ours))
            ):
                started = time.perf_counter()
                function()
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - started)
        ratio = statistics.median(times["rival"]) / statistics.median(times["ours"])
        benchmark.extra_info["rival_over_ours"] = round(ratio, 3)
        benchmark.pedantic(ours, rounds=rounds)
        return ratio

    return run
