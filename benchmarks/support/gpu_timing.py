"""Times on a CUDA device: versions of one computation take turns in one process, over inputs that no cache holds.

python benchmarks/support/gpu_timing.py        what this device reaches at best, as lines of JSON
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Together more than any L2 cache holds, so that a turn finds nothing that the one before it left there.
LEAST_BYTES = 180e6
BURST = 8

# A version takes the number of an input set.
Version = Callable[[int], object]


def rotating(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", seed: int = 0) -> list[Tensor]:
    """Random tensors of this shape, at least two, of more than `LEAST_BYTES` together."""
    size = math.prod(shape) * dtype.itemsize
    count = max(2, math.floor(LEAST_BYTES / size) + 1)
    generator = torch.Generator(device).manual_seed(seed)
    return list(torch.randn(count, *shape, dtype=dtype, device=device, generator=generator).unbind(0))


def _turns(versions: dict[str, Callable[[], object]], rounds: int, calls: int, idle: bool) -> dict[str, list[float]]:
    """Microseconds per call of each version, `calls` of them between two events, in every order in turn."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in versions}
    names = list(versions)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if idle:
                torch.cuda.synchronize()
            start.record()
            versions[name]()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [1000 * a.elapsed_time(b) / calls for a, b in pairs] for name, pairs in events.items()}


def launched(versions: dict[str, Version], sets: int, rounds: int = 50) -> dict[str, list[float]]:
    """Microseconds per call, launched one by one.

    Each turn starts on an idle device and makes `BURST` calls: where launching takes longer than computing, the time is that
    of launching, as it would be in a program.
    """
    numbers = itertools.count()

    def burst(version: Version) -> Callable[[], None]:
        def call() -> None:
            for _ in range(BURST):
                version(next(numbers) % sets)

        return call

    bursts = {name: burst(version) for name, version in versions.items()}
    for call in bursts.values():
        call()
    return _turns(bursts, rounds, BURST, idle=True)


def replayed(
    versions: dict[str, Version], sets: int, rounds: int = 50
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Microseconds per call as CUDA graphs of one call per input set, and why a version could not be captured."""
    graphs, failures = {}, {}
    for name, version in versions.items():
        try:
            graphs[name] = captured(version, sets)
        except Exception as error:  # a rival that cannot be captured must not take the other figures with it
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    for graph in graphs.values():
        graph.replay()
    if not graphs:
        return {}, failures
    return _turns({name: graph.replay for name, graph in graphs.items()}, rounds, sets, idle=False), failures


def captured(version: Version, sets: int) -> torch.cuda.CUDAGraph:
    """A graph of one call per input set, after calls that compile, measure and load what they need."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(min(3, sets)):
            version(number)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(sets):
            version(number)
    return graph


def latency(versions: dict[str, Version], sets: int, rounds: int = 100) -> dict[str, list[float]]:
    """Microseconds on the host's clock from the call until the device has finished, one call at a time."""
    numbers = itertools.count()
    names = list(versions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-3, rounds):  # the first three warm up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            torch.cuda.synchronize()
            started = time.perf_counter()
            versions[name](next(numbers) % sets)
            torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(1e6 * (time.perf_counter() - started))
    return times


def medians(times: dict[str, Sequence[float]]) -> dict[str, float]:
    """The median of each version, to 0.01 µs."""
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best: bytes read and written by a copy, and bfloat16 products of random matrices."""

    gigabytes_per_s: float
    teraflops: float


def ceilings() -> Ceilings:
    """Measure them: a copy of 4 GiB, a product of 8192 × 8192 matrices; medians of 20."""
    found = Ceilings(_copy_rate(1 << 30), _product_rate(8192))
    torch.cuda.empty_cache()
    return found


def _copy_rate(elements: int) -> float:
    source = torch.empty(elements, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    copied = statistics.median(launched({"copy": lambda n: target.copy_(source)}, 1, 20)["copy"])
    return round(2 * 4 * elements / copied / 1e3, 1)


def _product_rate(size: int) -> float:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiplied = statistics.median(launched({"product": lambda n: torch.mm(a, b)}, 1, 20)["product"])
    return round(2 * size**3 / multiplied / 1e6, 1)


def floor_us(flops: float, moved: float, best: Ceilings) -> float:
    """No version can be faster: the slower of computing `flops` and moving `moved` bytes."""
    return round(max(flops / best.teraflops / 1e6, moved / best.gigabytes_per_s / 1e3), 2)


def spread(times: dict[str, float], name: str, again: str) -> float | None:
    """By how much two turns of the same version differ, relatively; None where one is missing."""
    if name not in times or again not in times:
        return None
    return round(abs(times[again] / times[name] - 1), 4)


if __name__ == "__main__":
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "gigabytes_per_s": _copy_rate(1 << 30)}), flush=True)
    print(json.dumps({"teraflops": _product_rate(8192)}))
