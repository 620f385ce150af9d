"""Benchmarks report ratios against rivals in the same process, and refuse to while the operator is wrong.

Where $LAMBDA_KERNELS_BENCHMARK_LINES names a file, every result is added to it as one line of JSON as soon as it is there,
and so is what was skipped or failed, with the reason.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.support import intervals, turns
from benchmarks.tools import records, targets

# What the turns of a benchmark of the subset may take.
QUICK_S = 4.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this folder."""
    group = parser.getgroup("benchmarks of lambda_kernels")
    group.addoption("--quick", action="store_true", help="only a subset for the CPU, of small sizes, on one thread")
    group.addoption("--more", type=float, default=1.0, help="take this many times the usual turns")


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark of the subset."""
    config.addinivalue_line("markers", "quick: belongs to the subset of --quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not asked for."""
    if config.getoption("--quick"):
        wanted = [item for item in items if item.get_closest_marker("quick")]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Write down what became of a test, if there is a file for it."""
    report = (yield).get_result()
    path = os.environ.get(records.LINES)
    if not path or report.when == "teardown":
        return
    line: dict[str, object] = {"name": f"{Path(str(item.path)).name}::{item.name}"}
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if report.skipped:
        line["skipped"] = str(call.excinfo.value)
    elif report.failed:
        line["failed"] = f"{call.excinfo.typename}: {call.excinfo.value}".strip().splitlines()[0][:300]
    elif report.when == "call" and benchmark is not None and benchmark.extra_info:
        stats = benchmark.stats
        line |= {
            "group": benchmark.group,
            "median_us": None if stats is None else round(1e6 * stats.stats.median, 2),
            **benchmark.extra_info,
        }
    else:
        return
    records.add_line(Path(path), line)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether sizes are to be small."""
    return request.config.getoption("--quick")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread, whose processor time then says what it took."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quick_is_on_one_thread(request: pytest.FixtureRequest, quick: bool) -> None:
    if quick:
        request.getfixturevalue("one_thread")


@pytest.fixture
def against(benchmark, quick: bool, request: pytest.FixtureRequest) -> Callable[..., dict]:
    """Time versions of ours and their rivals on the CPU, taking turns; the figures go into the benchmark's extra info."""
    import torch

    def run(
        ours: dict[str, Callable[[], object]],
        rivals: dict[str, Callable[[], object]],
        *,
        what: str | None = None,
        rounds: int = 30,
        seconds: float = 20.0,
        clock: str | None = None,
        missing: dict[str, str] | None = None,
        portable: bool = True,
    ) -> dict:
        """Time them.

        Args:
            ours: By name; the first is timed twice, as its own rival.
            rivals: What they are compared with.
            what: The row's name in words; the test's name if not given.
            rounds: Turns at most.
            seconds: What all turns together may take, as far as the least number of turns allows it; less in the subset.
            clock: "wall" or "processor"; the latter where one thread computes, if not given.
            missing: Rivals that are not there, and why.
            portable: Whether the ratio should be much the same on other processors. It is where both versions are mostly the
                same library's products, and is not where one of them has vector code of its own.
        """
        clock = clock or ("processor" if torch.get_num_threads() == 1 else "wall")
        first = next(iter(ours))
        again = f"{first}, again"
        others = {again: ours[first], **{name: call for name, call in ours.items() if name != first}, **rivals}
        for call in (ours[first], *others.values()):  # warms up
            call()
        trial = turns.Turns()
        trial.take("all", lambda: [call() for call in (ours[first], *others.values())])
        more = request.config.getoption("--more")
        seconds = min(seconds, QUICK_S) if quick else seconds
        count = turns.rounds_within(more * seconds, trial.seconds["wall"]["all"][0], int(more * rounds))
        taken, names, turn = turns.Turns(), list(others), iter(range(1 << 30))

        def rivals_first() -> None:
            begin = next(turn) % len(names)
            for name in names[begin:] + names[:begin]:
                taken.take(name, others[name])

        # pytest-benchmark's own figures are of the same calls of ours.
        benchmark.pedantic(lambda: taken.take(first, ours[first]), setup=rivals_first, rounds=count)
        if benchmark.disabled:
            return {}
        row = f"{Path(str(request.path)).name}::{request.node.name}"
        pairs = [(name, rival) for name in ours for rival in rivals]
        itself = taken.ratio(clock, again, first)
        info = {
            "what": what or request.node.name,
            "clock": clock,
            "threads": torch.get_num_threads(),
            "rounds": count,
            "portable": portable,
            "ratios": [
                {
                    "ours": name,
                    "rival": rival,
                    **_ranged("plain", taken.ratio(clock, rival, name)),
                    **_ranged("wall", taken.ratio("wall", rival, name)),
                    "graph": None,
                    "target": targets.of(row, name, rival),
                }
                for name, rival in pairs
            ],
            "itself": itself,
            "spread": {"plain": round(abs(itself["ratio"] - 1), 4)},
            "plain_us": {name: times["median"] for name, times in taken.microseconds(clock).items()},
            "quartiles_us": taken.microseconds(clock),
            "not_built": missing or {},
        }
        info["rival_over_ours"] = {f"{row['rival']} / {row['ours']}": row["plain"] for row in info["ratios"]}
        benchmark.extra_info.update(info)
        return info

    return run


def _ranged(name: str, ratio: dict[str, float]) -> dict[str, float]:
    return {name: ratio["ratio"], f"{name}_low": ratio["low"], f"{name}_high": ratio["high"]}


@pytest.fixture(scope="session")
def ceilings() -> object:
    """What this GPU reaches at best, measured once."""
    from benchmarks.support import gpu_timing

    return gpu_timing.ceilings()


@pytest.fixture
def race(benchmark, ceilings, request: pytest.FixtureRequest) -> Callable[..., dict]:
    """Time versions against rivals on the GPU, as launched one by one and as CUDA graphs, taking turns in one process."""
    import torch

    from benchmarks.support import gpu_timing
    from lambda_kernels.ops.ln_mlp import tracing as tracing

    def run(
        what: str,
        ours: dict[str, gpu_timing.Version],
        rivals: dict[str, gpu_timing.Version],
        sets: int,
        *,
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
            flops: Floating-point operations that any version has to do.
            moved: Bytes that any version has to move.
            graph_sets: How many sets a graph takes; all of them if not given.
            missing: Rivals that could not be built, and why.
            waiting: Plain times are latencies, each call waiting for the device, instead of a stream of launches.
            rounds: Turns of each version.
        """
        row = f"{Path(str(request.path)).name}::{request.node.name}"
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
                **_between("plain", plain, rival, name),
                **_between("graph", graph, rival, name),
                "target": targets.of(row, name, rival),
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
            "quartiles_us": {
                kind: {
                    name: dict(zip(("low", "median", "high"), intervals.quartiles(t), strict=True))
                    for name, t in times.items()
                }
                for kind, times in (("plain", plain), ("graph", graph))
            },
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


def _between(kind: str, times: dict[str, list[float]], rival: str, ours: str) -> dict[str, float | None]:
    if rival not in times or ours not in times:
        return {kind: None}
    return _ranged(kind, intervals.paired_ratio(times[rival], times[ours]))
