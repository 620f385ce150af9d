"""Benchmarks report ratios against a rival in the same process, and refuse to while the operator is wrong.

Where $LAMBDA_KERNELS_BENCHMARK_LINES names a file, every result is added to it as one line of JSON as soon as it is there.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LINES = "LAMBDA_KERNELS_BENCHMARK_LINES"


@pytest.fixture(autouse=True)
def written_down(request: pytest.FixtureRequest) -> Iterator[None]:
    """Add the test's extra info to the file, if there is one to add to."""
    yield
    benchmark = request.node.funcargs.get("benchmark")
    if benchmark is None or not benchmark.extra_info or not os.environ.get(LINES):
        return
    median = None if benchmark.stats is None else round(1e6 * benchmark.stats.stats.median, 2)
    line = {"name": request.node.name, "median_us": median, **benchmark.extra_info}
    with Path(os.environ[LINES]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


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


@pytest.fixture(scope="session")
def ceilings() -> object:
    """What this GPU reaches at best, measured once."""
    import gpu_timing

    return gpu_timing.ceilings()


@pytest.fixture
def race(benchmark, ceilings) -> Callable[..., dict]:
    """Time versions against rivals on the GPU, as launched one by one and as CUDA graphs, taking turns in one process."""
    import gpu_timing
    import torch

    from lambda_kernels.ops import tracing

    def run(
        what: str,
        ours: dict[str, gpu_timing.Version],
        rivals: dict[str, gpu_timing.Version],
        sets: int,
        *,
        targets: dict[str, float] | None = None,
        flops: float = 0.0,
        moved: float = 0.0,
        graph_sets: int | None = None,
        missing: dict[str, str] | None = None,
        waiting: bool = False,
        rounds: int = 50,
    ) -> dict:
        """Fill the benchmark's extra info.

        Args:
            what: The row's name.
            ours: Versions of this library; the first is timed twice, as its own rival.
            rivals: What they are compared with.
            sets: How many sets of inputs the versions take turns with.
            targets: For each rival the ratio rival/ours to reach.
            flops: Floating-point operations that any version has to do.
            moved: Bytes that any version has to move.
            graph_sets: How many sets a graph takes; all of them if not given.
            missing: Rivals that could not be built, and why.
            waiting: Plain times are latencies, each call waiting for the device, instead of a stream of launches.
            rounds: Turns of each version.
        """
        first = next(iter(ours))
        again = f"{first}, again"
        versions = {**ours, again: ours[first], **rivals}
        with tracing.recorded() as ran:
            ours[first](0)
        plain = (gpu_timing.latency if waiting else gpu_timing.launched)(versions, sets, rounds=rounds)
        graph, failures = gpu_timing.replayed(versions, min(sets, graph_sets or sets), rounds=rounds)
        plain_us, graph_us = gpu_timing.medians(plain), gpu_timing.medians(graph)
        ratios = [
            {
                "ours": name,
                "rival": rival,
                "plain": _ratio(plain_us, rival, name),
                "graph": _ratio(graph_us, rival, name),
                "target": (targets or {}).get(rival),
            }
            for name in ours
            for rival in rivals
        ]
        own = graph_us.get(first, plain_us[first])
        info = {
            "what": what,
            "rival_over_ours": {f"{row['rival']} / {row['ours']}": row["graph"] or row["plain"] for row in ratios},
            "ratios": ratios,
            "plain_us": plain_us,
            "graph_us": graph_us,
            "spread": {
                "plain": gpu_timing.spread(plain_us, first, again),
                "graph": gpu_timing.spread(graph_us, first, again),
            },
            "not_built": missing or {},
            "not_captured": failures,
            "ran": ran,
            "gpu": torch.cuda.get_device_name(),
        }
        if flops:
            floor = gpu_timing.floor_us(flops, moved, ceilings)
            info |= {
                "teraflops": round(flops / own / 1e6, 1),
                "gigabytes_per_s": round(moved / own / 1e3, 1),
                "floor_us": floor,
                "over_floor": round(own / floor, 2),
            }
        benchmark.extra_info.update(info)

        def once() -> None:
            ours[first](0)
            torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=10)
        return info

    return run


def _ratio(times: dict[str, float], rival: str, ours: str) -> float | None:
    return round(times[rival] / times[ours], 3) if rival in times and ours in times else None
