"""The extension's histograms against numpy, fast-histogram, PyTorch and themselves, on the CPU; one thread where not said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.support import verify
from lambda_kernels.ops.histogram import histogram, uniform_grid
from lambda_kernels.ops.histogram.function import Histogram

pytestmark = [pytest.mark.benchmark(group="histogram"), pytest.mark.usefixtures("one_thread")]

BINS, RANGE = 256, (-4.0, 4.0)
VALUES = 1 << 25
SHAPE = (32768, 768)
QUICK_VALUES, QUICK_SHAPE = 1 << 22, (8192, 384)
# How many values are counted by the twin, too, before anything is timed.
CHECKED = 1 << 18


@pytest.fixture(scope="module")
def values(quick) -> Tensor:
    count = QUICK_VALUES if quick else VALUES
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).clamp_(*RANGE)


@pytest.fixture(scope="module")
def activations(values: Tensor, quick) -> Tensor:
    shape = QUICK_SHAPE if quick else SHAPE
    return values[: shape[0] * shape[1]].view(shape)


def counted(x: Tensor, backend: str = "extension", **options: object) -> Histogram:
    grid = uniform_grid(*RANGE, BINS, channels=x.shape[-1] if x.dim() > 1 else 1)
    result = histogram(x, grid, backend=backend, **options)
    assert result.backend == backend
    return result


def layer(x: Tensor, backend: str = "extension", **options: object) -> Histogram:
    return counted(x.view(-1), per="layer", backend=backend, **options)


def hold(measure: Callable, x: Tensor) -> None:
    """The counts are exact integers: those of the twin in float64 on a part of `x`, and nothing lost of the rest."""
    part = x[: max(1, CHECKED // (x.shape[1] if x.dim() > 1 else 1))]
    verify.equal("the counts of a part", measure(part).counts, measure(part, "torch").counts)
    verify.equal("the number of values counted", measure(x).counts.sum(), torch.tensor(x.numel()))


def agree(ours: Tensor, theirs: np.ndarray) -> None:
    # Others compute in float32 or from a table of edges: a value on an edge may change sides.
    if not np.abs(ours.numpy() - theirs).sum() <= 1e-3 * theirs.sum():
        pytest.fail("the rival counts something else: the two cannot be compared")


def capability(benchmark) -> None:
    import lambda_kernels.ops.histogram._extension as extension

    benchmark.extra_info["ran"] = [extension.load().cpu_capability()]


@pytest.mark.quick
def test_layer_against_numpy(values, against, benchmark) -> None:
    array = values.numpy()
    hold(layer, values)
    agree(layer(values).counts[0], np.histogram(array, BINS, RANGE)[0])
    against(
        {"extension": lambda: layer(values)},
        {"numpy": lambda: np.histogram(array, BINS, RANGE)},
        what=f"histogram of {values.numel() >> 20} Mi values",
        portable=False,
    )
    capability(benchmark)


@pytest.mark.quick
def test_layer_against_fast_histogram(values, against, benchmark) -> None:
    fast = pytest.importorskip("fast_histogram", reason="fast-histogram is not installed")
    array = values.numpy()
    hold(layer, values)
    agree(layer(values).counts[0], fast.histogram1d(array, BINS, RANGE))
    against(
        {"extension": lambda: layer(values)},
        {"fast-histogram": lambda: fast.histogram1d(array, BINS, RANGE)},
        what=f"histogram of {values.numel() >> 20} Mi values",
        portable=False,
    )
    capability(benchmark)


def test_layer_against_histc_and_the_twin(values, against, benchmark) -> None:
    """The twin is what runs where there is no extension."""
    hold(layer, values)
    agree(layer(values).counts[0], torch.histc(values, BINS, *RANGE).double().numpy())
    against(
        {"extension": lambda: layer(values), "torch": lambda: layer(values, "torch")},
        {"histc": lambda: torch.histc(values, BINS, *RANGE)},
        what=f"histogram of {values.numel() >> 20} Mi values",
        portable=False,
    )
    capability(benchmark)


def per_channel_rivals(x: Tensor) -> dict[str, Callable[[], list]]:
    array, columns = x.numpy(), x.unbind(1)
    return {
        "numpy": lambda: [np.histogram(array[:, channel], BINS, RANGE)[0] for channel in range(array.shape[1])],
        "histc": lambda: [torch.histc(column, BINS, *RANGE) for column in columns],
    }


@pytest.mark.parametrize("rival", [pytest.param("numpy", marks=pytest.mark.quick), "histc"])
def test_channels_against_a_loop(rival: str, activations, against, benchmark) -> None:
    other = per_channel_rivals(activations)[rival]
    hold(counted, activations)
    agree(counted(activations).counts, np.stack([np.asarray(counts) for counts in other()]))
    against(
        {"extension": lambda: counted(activations)},
        {rival: other},
        what=f"histograms of {activations.shape[1]} channels",
        rounds=12,
        portable=False,
    )
    capability(benchmark)


@pytest.mark.parametrize("measure", [layer, counted], ids=["layer", "channels"])
def test_two_threads_against_one(measure: Callable, activations, against, benchmark) -> None:
    def with_threads(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return measure(activations).counts

    hold(measure, activations)
    verify.equal("what two threads count", with_threads(2), with_threads(1))
    against(
        {"two threads": lambda: with_threads(2)},
        {"one thread": lambda: with_threads(1)},
        what="histogram on two threads",
        clock="wall",
    )
    capability(benchmark)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("measure", [layer, counted], ids=["layer", "channels"])
def test_half_the_bits_against_float32(measure: Callable, dtype: torch.dtype, activations, against, benchmark) -> None:
    narrow = activations.to(dtype)
    wide = narrow.float()  # the same values
    hold(measure, narrow)
    verify.equal("what is counted of half the bits", measure(narrow).counts, measure(wide).counts)
    ours, rivals = {"half": lambda: measure(narrow)}, {"float32": lambda: measure(wide)}
    against(ours, rivals, what="histogram of half the bits")
    capability(benchmark)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("measure", [layer, pytest.param(counted, marks=pytest.mark.quick)], ids=["layer", "channels"])
def test_statistics_cost_little(measure: Callable, dtype: torch.dtype, activations, against, benchmark) -> None:
    """The ratio is what the counts alone take of the time for everything."""
    x = activations.to(dtype)
    hold(measure, x)
    moments = measure(x, statistics=True).moments
    verify.close("the spread", moments.std.squeeze(), x.double().std(0 if measure is counted else None), 1e-12)
    against(
        {"with moments": lambda: measure(x, statistics=True)},
        {"counts alone": lambda: measure(x)},
        what="histogram, moments and extrema",
    )
    capability(benchmark)
