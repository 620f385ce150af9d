"""The extension's histograms against numpy, fast-histogram, PyTorch and themselves, on the CPU; one thread where not said."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lambda_kernels.ops.histogram import Histogram, histogram, uniform_grid

BINS, RANGE = 256, (-4.0, 4.0)
VALUES = 1 << 25
SHAPE = (32768, 768)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def values() -> Tensor:
    return torch.randn(VALUES, generator=torch.Generator().manual_seed(0)).clamp_(*RANGE)


@pytest.fixture(scope="module")
def activations(values: Tensor) -> Tensor:
    return values[: SHAPE[0] * SHAPE[1]].view(SHAPE)


def counted(x: Tensor, **options: object) -> Histogram:
    result = histogram(x, uniform_grid(*RANGE, BINS, channels=x.shape[-1] if x.dim() > 1 else 1), **options)
    assert result.backend == "extension"
    return result


def layer(x: Tensor, **options: object) -> Histogram:
    return counted(x.view(-1), per="layer", **options)


def agree(ours: Tensor, theirs: np.ndarray) -> None:
    # Others compute in float32 or from a table of edges: a value on an edge may change sides.
    assert np.abs(ours.numpy() - theirs).sum() <= 1e-3 * theirs.sum()


def report(benchmark, target: str) -> None:
    import lambda_kernels._extension as extension

    benchmark.extra_info["target"] = target
    benchmark.extra_info["ran"] = extension.load().cpu_capability()


def test_layer_against_numpy(values, against, benchmark) -> None:
    array = values.numpy()
    agree(layer(values).counts[0], np.histogram(array, BINS, RANGE)[0])
    report(benchmark, ">= 10")
    against(lambda: layer(values), lambda: np.histogram(array, BINS, RANGE), rounds=5)


def test_layer_against_fast_histogram(values, against, benchmark) -> None:
    fast = pytest.importorskip("fast_histogram", reason="fast-histogram is not installed")
    array = values.numpy()
    agree(layer(values).counts[0], fast.histogram1d(array, BINS, RANGE))
    report(benchmark, ">= 2")
    against(lambda: layer(values), lambda: fast.histogram1d(array, BINS, RANGE))


def test_layer_against_histc(values, against, benchmark) -> None:
    agree(layer(values).counts[0], torch.histc(values, BINS, *RANGE).double().numpy())
    report(benchmark, "none")
    against(lambda: layer(values), lambda: torch.histc(values, BINS, *RANGE), rounds=5)


def per_channel_rivals(x: Tensor) -> dict[str, Callable[[], list]]:
    array, columns = x.numpy(), x.unbind(1)
    return {
        "numpy": lambda: [np.histogram(array[:, channel], BINS, RANGE)[0] for channel in range(array.shape[1])],
        "histc": lambda: [torch.histc(column, BINS, *RANGE) for column in columns],
    }


@pytest.mark.parametrize("rival", ["numpy", "histc"])
def test_channels_against_a_loop(rival: str, activations, against, benchmark) -> None:
    other = per_channel_rivals(activations)[rival]
    agree(counted(activations).counts, np.stack([np.asarray(counts) for counts in other()]))
    report(benchmark, ">= 20" if rival == "numpy" else "none")
    against(lambda: counted(activations), other, rounds=3)


@pytest.mark.parametrize("measure", [layer, counted], ids=["layer", "channels"])
def test_two_threads_against_one(measure: Callable, activations, against, benchmark) -> None:
    def with_threads(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return measure(activations).counts

    assert torch.equal(with_threads(1), with_threads(2))
    report(benchmark, ">= 1.7")
    against(lambda: with_threads(2), lambda: with_threads(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("measure", [layer, counted], ids=["layer", "channels"])
def test_half_the_bits_against_float32(measure: Callable, dtype: torch.dtype, activations, against, benchmark) -> None:
    narrow = activations.to(dtype)
    wide = narrow.float()  # the same values
    assert torch.equal(measure(narrow).counts, measure(wide).counts)
    report(benchmark, ">= 1 (bfloat16)")
    against(lambda: measure(narrow), lambda: measure(wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("measure", [layer, counted], ids=["layer", "channels"])
def test_counts_alone_against_all_statistics(
    measure: Callable, dtype: torch.dtype, activations, against, benchmark
) -> None:
    """The ratio is what the counts alone take of the time for everything."""
    x = activations.to(dtype)
    moments = measure(x, statistics=True).moments
    dims = 0 if measure is counted else None
    torch.testing.assert_close(moments.std.squeeze(), x.double().std(dims), rtol=1e-12, atol=0)
    report(benchmark, ">= 0.87 (1 / 1.15)")
    against(lambda: measure(x, statistics=True), lambda: measure(x))
