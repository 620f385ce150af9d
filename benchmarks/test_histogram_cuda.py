"""The CUDA half of the histogram against what reads the same tensors and does less: `torch.amax`, and against its rivals.

Activations of ViT-B with batch 256, 50,432 tokens of 768 channels, and 256 bins. A ratio to `torch.amax` is one of bytes
per second. In the order of importance, since time on a GPU may end before the last.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.support import gpu_timing, verify
from benchmarks.support.toolkit import shared_library
from lambda_kernels.ops import histogram as ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.benchmark(group="histogram"),
]

BATCH, TOKENS, CHANNELS, BINS = 256, 197, 768, 256
# No bin's width is a power of two: then placing a value would be exact, and never need the slower way near an edge.
LOW, HIGH = -4.1, 4.0
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def rows_of(per: str) -> int:
    return {"channel": CHANNELS, "layer": 1, "sample": BATCH}[per]


def edges(per: str, layers: int = 1) -> ops.Grid:
    return ops.uniform_grid(LOW, HIGH, BINS, channels=layers * rows_of(per), device="cuda")


def powers(per: str) -> ops.Grid:
    """Bins of a width 2^k, anchored at 0: what measuring entropies uses."""
    limit = torch.full((rows_of(per),), HIGH, dtype=torch.float64, device="cuda")
    return ops.dyadic_grid(-limit, limit, BINS)


def activations(dtype: torch.dtype) -> list[Tensor]:
    return gpu_timing.rotating(BATCH, TOKENS, CHANNELS, dtype=dtype)


def verified(
    xs: list[Tensor], grid: ops.Grid | ops.CodeGrid | None, per: str, *, statistics: bool = False, layers: int = 1
) -> gpu_timing.Version:
    """Counting `layers` inputs in one call, after the counts of the first call were held against the CPU's."""

    def version(number: int) -> ops.Histogram:
        chosen = [xs[(number + layer) % len(xs)] for layer in range(layers)]
        return ops.histogram(chosen, grid, per=per, statistics=statistics, backend="extension")

    here = [xs[layer % len(xs)].cpu() for layer in range(layers)]
    cpu_grid = ops.Grid.unpack(grid.packed().cpu(), grid.bins) if isinstance(grid, ops.Grid) else grid
    expected = ops.histogram(here, cpu_grid, per=per, statistics=statistics)
    got = version(0)
    verify.equal("what is counted", got.counts, expected.counts)
    verify.equal("what is counted outside the bins", got.outside, expected.outside)
    return version


def report(race: Callable, benchmark: object, what: str, ours: dict, rivals: dict, xs: list[Tensor], **options) -> None:
    """Run `race`, and add the bytes per second of the first of ours."""
    layers = options.pop("layers", 1)
    info = race(what, ours, rivals, len(xs), **options)
    first = next(iter(ours))
    us = info["graph_us"].get(first, info["plain_us"][first])
    benchmark.extra_info["gigabytes_per_s"] = round(layers * xs[0].nbytes / us / 1e3, 1)


@dtypes
@pytest.mark.parametrize("per", ["channel", "layer", "sample"])
def test_against_amax(race, benchmark, per, dtype):
    xs = activations(dtype)
    ours = {"edges": verified(xs, edges(per), per), "powers": verified(xs, powers(per), per)}
    rivals = {"amax": lambda number: torch.amax(xs[number])}
    what = f"histogram per {per}, {dtype}".replace("torch.", "")
    report(race, benchmark, what, ours, rivals, xs)


@dtypes
@pytest.mark.parametrize("per", ["channel", "layer"])
def test_statistics_cost_little(race, benchmark, per, dtype):
    xs = activations(dtype)
    ours = {"with moments": verified(xs, powers(per), per, statistics=True)}
    rivals = {"counts alone": verified(xs, powers(per), per)}
    what = f"moments per {per}, {dtype}".replace("torch.", "")
    report(race, benchmark, what, ours, rivals, xs)


def test_against_a_loop_of_histc(race, benchmark):
    xs = activations(torch.float32)
    columns = [x.view(-1, CHANNELS).T.contiguous() for x in xs]
    rivals = {"histc": lambda number: [torch.histc(column, BINS, LOW, HIGH) for column in columns[number]]}
    ours = {"edges": verified(xs, edges("channel"), "channel")}
    report(race, benchmark, "768 channels", ours, rivals, xs, graph_sets=1, rounds=10)


@dtypes
def test_twelve_layers_at_once(race, benchmark, dtype):
    xs = activations(dtype)
    one = verified(xs, edges("channel"), "channel", statistics=True)
    ours = {"one call": verified(xs, edges("channel", 12), "channel", statistics=True, layers=12)}
    rivals = {
        "twelve calls": lambda number: [one((number + layer) % len(xs)) for layer in range(12)],
        "amax": lambda number: [torch.amax(xs[(number + layer) % len(xs)]) for layer in range(12)],
    }
    what = f"twelve layers, {dtype}".replace("torch.", "")
    report(race, benchmark, what, ours, rivals, xs, layers=12, graph_sets=1)


@dtypes
def test_extrema_alone(race, benchmark, dtype):
    """The pass that finds the range, against PyTorch's, which passes over nothing and must be told the dimension."""
    xs = activations(dtype)
    ours = {"moments": lambda number: ops.moments(xs[number], backend="extension")}
    rivals = {"aminmax": lambda number: torch.aminmax(xs[number].view(-1, CHANNELS), dim=0)}
    low, high = torch.aminmax(xs[0].view(-1, CHANNELS), dim=0)
    found = ops.moments(xs[0], backend="extension")
    assert torch.equal(found.minimum, low.double())
    assert torch.equal(found.maximum, high.double())
    report(race, benchmark, f"extrema per channel, {dtype}".replace("torch.", ""), ours, rivals, xs)


def test_codes(race, benchmark):
    xs = activations(torch.bfloat16)
    ours = {"codes": verified(xs, ops.bfloat16_codes(), "layer")}
    report(race, benchmark, "exact codes of a layer", ours, {"amax": lambda number: torch.amax(xs[number])}, xs)


CUB = """
#include <cub/cub.cuh>
extern "C" int even(void* scratch, size_t* bytes, const float* x, int* counts, int levels, float low, float high,
                    int size, void* stream) {
  return cub::DeviceHistogram::HistogramEven(scratch, *bytes, x, counts, levels, low, high, size, (cudaStream_t)stream);
}
"""


@pytest.fixture(scope="module")
def cub(tmp_path_factory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("cub")
    (folder / "even.cu").write_text(CUB, encoding="utf-8")
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    try:
        return ctypes.CDLL(str(shared_library(folder / "even.cu", folder, arch)))
    except RuntimeError as error:
        pytest.skip(f"CUB's histogram cannot be built: {error}")


def test_against_cub(race, benchmark, cub):
    """One histogram of all values, which is what CUB has; into 32-bit counters."""
    xs = activations(torch.float32)
    counts = torch.zeros(BINS, dtype=torch.int32, device="cuda")
    size = ctypes.c_size_t(0)

    def even(number: int, scratch: Tensor | None = None) -> Tensor:
        status = cub.even(
            ctypes.c_void_p(None if scratch is None else scratch.data_ptr()),
            ctypes.byref(size),
            ctypes.c_void_p(xs[number].data_ptr()),
            ctypes.c_void_p(counts.data_ptr()),
            ctypes.c_int(BINS + 1),
            ctypes.c_float(LOW),
            ctypes.c_float(HIGH),
            ctypes.c_int(xs[number].numel()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        assert status == 0
        return counts

    even(0)  # asks how much scratch memory it takes
    scratch = torch.empty(size.value, dtype=torch.uint8, device="cuda")
    inside = even(0, scratch).sum().item()
    assert math.isclose(inside, xs[0].numel(), rel_tol=1e-3)
    ours = {"edges": verified(xs, edges("layer"), "layer")}
    rivals = {"CUB": lambda number: even(number, scratch)}
    report(race, benchmark, "one histogram of all values", ours, rivals, xs)
