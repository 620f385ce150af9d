"""Histograms on the CPU: the extension against its PyTorch twin, against numpy, and the nesting of dyadic grids."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from extension_support import require_extension
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lambda_kernels import _extension, reference
from lambda_kernels.ops import histogram as ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Counting in a new process is slow the first time, which is no reason to fail.
relaxed = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _loaded() -> None:
    require_extension()


def arrays(elements: st.SearchStrategy, rows: int = 12, columns: int = 4) -> st.SearchStrategy:
    shapes = st.tuples(st.integers(0, rows), st.integers(0, columns))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=elements))


anything = st.one_of(
    st.floats(-8, 8),
    st.integers(-8, 8).map(float),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308, -1e308, 3e38, 65504.0]),
)

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every third column": lambda x: x.repeat_interleave(3, 1)[:, ::3],
    "offset": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 0))[3:, 1:-2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def assert_equals_twin(x: Tensor, grid: ops.Grid) -> ops.Histogram:
    result = ops.histogram(x, grid, backend="extension")
    counts, outside = reference.histogram(x, grid.packed(), grid.bins)
    assert result.backend == "extension"
    torch.testing.assert_close(result.counts, counts, rtol=0, atol=0)
    torch.testing.assert_close(result.outside, outside, rtol=0, atol=0)
    assert (counts.sum(1) + outside.sum(1) == x.shape[0]).all()
    return result


@relaxed
@given(
    arrays(anything),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(1, 40),
    st.tuples(st.floats(-9, 9), st.floats(1e-3, 20)),
)
def test_fixed_edges_equal_the_twin(
    values: np.ndarray, dtype: torch.dtype, layout: str, bins: int, edges: tuple[float, float]
) -> None:
    x = LAYOUTS[layout](torch.from_numpy(values).to(dtype))
    assert_equals_twin(x, ops.uniform_grid(edges[0], edges[0] + edges[1], bins, channels=x.shape[1]))


@relaxed
@given(arrays(anything), st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS)), st.integers(2, 40))
def test_dyadic_grid_equals_the_twin(values: np.ndarray, dtype: torch.dtype, layout: str, bins: int) -> None:
    x = LAYOUTS[layout](torch.from_numpy(values).to(dtype))
    assert_equals_twin(x, ops.dyadic_grid(*ops.extrema(x), bins))


@relaxed
@given(arrays(st.floats(-4, 4, width=32)), hnp.arrays(np.float64, 4, elements=st.floats()), st.integers(1, 5))
def test_malformed_grids_are_counted_alike(values: np.ndarray, row: np.ndarray, bins: int) -> None:
    """Whatever the four numbers are, no address is built from them."""
    x = torch.from_numpy(values)
    packed = torch.from_numpy(row).expand(x.shape[1], 4).contiguous()
    assert_equals_twin(x, ops.Grid(*packed.unbind(1), bins=bins))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "bins"),
    # One task and several; tiles cut off at the edge; columns shared out, and rows; one long column; many bins.
    [
        (1, 1, 1),
        (197, 192, 256),
        (3000, 70, 100),
        (200_000, 1, 256),
        (100_000, 3, 1000),
        (50, 3000, 17),
        (400, 20, 65536),
    ],
)
def test_sizes(dtype: torch.dtype, rows: int, columns: int, bins: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    grid = ops.uniform_grid(-2.0, 2.0, bins, channels=columns)
    assert_equals_twin(x, grid)
    if rows * columns < 50_000:
        assert_equals_twin(x.t().contiguous().t(), grid)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(threads: int) -> None:
    x = torch.randn(100_000, 5, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equals_twin(x, ops.uniform_grid(-2.0, 2.0, 64, channels=5))
    finally:
        torch.set_num_threads(before)


@relaxed
@given(arrays(st.integers(-40, 40).map(lambda i: i / 8)), st.sampled_from([1, 2, 4, 8, 16, 64]))
def test_numpy_gives_the_same_counts(values: np.ndarray, bins: int) -> None:
    """On edges that float64 holds exactly; elsewhere numpy may move a value by one bin."""
    x = torch.from_numpy(values).float()
    result = ops.histogram(x, ops.uniform_grid(-4.0, 4.0, bins, channels=x.shape[1]))
    for channel in range(x.shape[1]):
        expected = np.histogram(values[:, channel], bins=bins, range=(-4, 4))[0]
        assert result.counts[channel].tolist() == expected.tolist()


def test_outside() -> None:
    x = torch.tensor([[-1.0, 0.0, 1.0, 1.5, math.nan, math.inf, -math.inf, math.nan]]).t()
    result = ops.histogram(x, ops.uniform_grid(0.0, 1.0, 2))
    assert result.counts.tolist() == [[1, 1]]
    assert result.outside.tolist() == [[1, 1, 2, 1, 1]]


def test_equal_edges_are_widened_as_in_numpy() -> None:
    x = torch.full((5, 2), 3.0)
    grid = ops.uniform_grid(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 6.0]), 4)
    assert ops.histogram(x, grid).counts.tolist() == [[0, 0, 5, 0], [0, 0, 5, 0]]
    assert np.histogram([3.0], bins=4, range=(3, 3))[0].tolist() == [0, 0, 1, 0]
    assert grid.width.tolist() == [0.25, 1.5]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.usefixtures("poisoned_empty")
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    result = ops.histogram(x, ops.uniform_grid(0.0, 1.0, 4, channels=shape[1]))
    assert result.counts.shape == (shape[1], 4)
    assert result.outside.shape == (shape[1], 5)
    assert result.counts.sum() == result.outside.sum() == 0
    low, high = ops.extrema(x)
    assert low.shape == high.shape == shape[1:]
    assert not shape[0] or not low.numel()
    assert low.isnan().all()
    assert high.isnan().all()


def test_extrema() -> None:
    x = torch.tensor([[1.0, math.nan, math.inf], [-2.0, -math.inf, 7.0], [0.5, math.inf, math.nan]])
    for dtype in DTYPES:
        low, high = ops.extrema(x.to(dtype))
        assert low.dtype == high.dtype == torch.float64
        torch.testing.assert_close(low, torch.tensor([-2, math.nan, 7]).double(), equal_nan=True)
        torch.testing.assert_close(high, torch.tensor([1, math.nan, 7]).double(), equal_nan=True)


# The magnitudes for which dyadic grids nest: every number of the smaller dtypes, and these of float64.
nesting = st.one_of(st.floats(-1e4, 1e4, width=32), st.floats(1e-150, 1e150), st.floats(-1e150, -1e-150), st.just(0.0))


@relaxed
@given(nesting, nesting, st.one_of(st.integers(2, 9), st.sampled_from([255, 256, 257, 65536])))
def test_dyadic_grid_is_the_finest(a: float, b: float, bins: int) -> None:
    low, high = min(a, b), max(a, b)
    grid = ops.dyadic_grid(*torch.tensor([[low], [high]], dtype=torch.float64), bins)
    width = Fraction(grid.width.item())
    assert math.log2(width.numerator) % 1 == math.log2(width.denominator) % 1 == 0

    def covered(width: Fraction) -> int:
        return Fraction(high) // width - Fraction(low) // width + 1

    assert grid.first.item() == Fraction(low) // width
    assert covered(width) <= bins
    magnitude = max(abs(low), abs(high))
    finest = max(-149, math.frexp(magnitude)[1] - 41) if magnitude else -149
    assert width == Fraction(2) ** finest or covered(width / 2) > bins


@relaxed
@given(
    st.integers(1, 3).flatmap(
        lambda columns: st.lists(
            hnp.arrays(np.float64, st.tuples(st.integers(0, 5), st.just(columns)), elements=nesting),
            min_size=1,
            max_size=5,
        )
    ),
    st.sampled_from(DTYPES),
    st.integers(2, 20),
    st.randoms(use_true_random=False),
)
def test_any_split_in_any_order_counts_as_one_shot(batches: list, dtype: torch.dtype, bins: int, random) -> None:
    batches = [torch.from_numpy(batch).to(dtype) for batch in batches]
    everything = torch.cat(batches)
    low, high = ops.extrema(everything)
    final = ops.dyadic_grid(low, high, bins)
    expected = ops.histogram(everything, final)
    assert (expected.outside[:, :2] == 0).all()

    random.shuffle(batches)
    low, high = ops.extrema(batches[0])
    grid = ops.dyadic_grid(low, high, bins)
    counts = ops.histogram(batches[0], grid).counts
    for batch in batches[1:]:
        batch_low, batch_high = ops.extrema(batch)
        low, high = torch.fmin(low, batch_low), torch.fmax(high, batch_high)
        wider = ops.dyadic_grid(low, high, bins)
        assert (wider.width >= grid.width).all()
        counts = ops.regrid(counts, grid, wider) + ops.histogram(batch, wider).counts
        grid = wider
    assert torch.equal(grid.packed()[:, :3], final.packed()[:, :3])
    assert torch.equal(counts, expected.counts)


def test_regrid_refuses_what_would_lose_counts() -> None:
    def dyadic(low: float, high: float, bins: int = 8) -> ops.Grid:
        return ops.dyadic_grid(*torch.tensor([[low], [high]], dtype=torch.float64), bins)

    fine, coarse, elsewhere = dyadic(0, 7), dyadic(0, 70), dyadic(500, 570)
    counts = torch.ones(1, 8, dtype=torch.int64)
    assert ops.regrid(counts, fine, coarse).tolist() == [[8, 0, 0, 0, 0, 0, 0, 0]]
    assert ops.regrid(0 * counts, fine, elsewhere).sum() == 0
    with pytest.raises(ValueError, match=r"channel 0 has bin widths 16.0 and 1.0"):
        ops.regrid(counts, coarse, fine)
    with pytest.raises(ValueError, match="holding every counted bin"):
        ops.regrid(counts, fine, elsewhere)
    with pytest.raises(ValueError, match="two dyadic grids"):
        ops.regrid(counts, fine, ops.uniform_grid(0.0, 3.0, 8))
    with pytest.raises(ValueError, match=r"got \[1, 7\]"):
        ops.regrid(counts[:, :7], fine, coarse)


def test_opcheck() -> None:
    _extension.load()
    for dtype in DTYPES:
        x = torch.randn(20, 3).to(dtype)
        for layout in LAYOUTS.values():
            grid = ops.uniform_grid(-1.0, 1.0, 5, channels=3)
            torch.library.opcheck(torch.ops.lambda_kernels.histogram.default, (layout(x), grid.packed(), 5))


def test_compiles_without_a_graph_break() -> None:
    grid = ops.uniform_grid(-1.0, 1.0, 5, channels=3)
    x = torch.randn(20, 3, requires_grad=True)
    compiled = torch.compile(lambda x: ops.histogram(x, grid).counts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.histogram(x, grid).counts)


GRID = ops.uniform_grid(0.0, 1.0, 4, channels=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.histogram([1.0], GRID), TypeError, "x must be a torch.Tensor; got list"),
        (lambda: ops.histogram(torch.ones(3, 2, dtype=torch.int32), GRID), TypeError, "got torch.int32"),
        (lambda: ops.histogram(torch.ones(3, 2, dtype=torch.bool), GRID), TypeError, "got torch.bool"),
        (lambda: ops.histogram(torch.ones(3, 2).to_sparse(), GRID), TypeError, "torch.sparse_coo"),
        (lambda: ops.histogram(torch.ones(3), GRID), ValueError, r"2 dimensions \[N, C\]; got shape \[3\]"),
        (lambda: ops.histogram(torch.ones(3, 5), GRID), ValueError, r"grid has 2 channels, x of shape \[3, 5\] has 5"),
        (lambda: ops.histogram(torch.ones(3, 2), GRID.packed()), TypeError, "grid must be a Grid; got Tensor"),
        (lambda: ops.histogram(torch.ones(3, 2, device="meta"), GRID), ValueError, "x on meta, grid on cpu"),
        (lambda: ops.histogram(torch.ones(3, 2), GRID, backend="cuda"), ValueError, "backend must be one of.*'cuda'"),
        (lambda: ops.uniform_grid(1.0, 0.0, 4), ValueError, "got lo=1.0, hi=0.0 in channel 0"),
        (lambda: ops.uniform_grid(0.0, math.inf, 4), ValueError, "hi=inf"),
        (lambda: ops.uniform_grid(math.nan, 1.0, 4), ValueError, "lo=nan"),
        (lambda: ops.uniform_grid(-1e308, 1.7e308, 4), ValueError, "both finite and far enough apart"),
        (lambda: ops.uniform_grid(torch.zeros(2), torch.ones(3), 4), ValueError, r"hi must be a number or .* \[3\]"),
        (lambda: ops.uniform_grid(0.0, 1.0, 0), ValueError, r"bins must be in \[1, 65536\]; got 0"),
        (lambda: ops.uniform_grid(0.0, 1.0, 65537), ValueError, "got 65537"),
        (lambda: ops.uniform_grid(0.0, 1.0, 4.0), TypeError, "bins must be an int; got float"),
        (lambda: ops.uniform_grid(0.0, 1.0, True), TypeError, "bins must be an int; got bool"),
        (
            lambda: ops.dyadic_grid(*[torch.zeros(2).double()] * 2, 1),
            ValueError,
            r"bins must be in \[2, 65536\]; got 1",
        ),
        (lambda: ops.dyadic_grid(*[torch.zeros(2)] * 2, 4), TypeError, "minimum must be float64; got torch.float32"),
        (lambda: ops.dyadic_grid(torch.zeros(2).double(), torch.ones(3).double(), 4), ValueError, r"\[\[2\], \[3\]\]"),
        (lambda: ops.Grid(*torch.zeros(4, 2), bins=4), TypeError, "anchor must be a float64 tensor; got torch.float32"),
        (lambda: ops.extrema(torch.ones(3)), ValueError, r"2 dimensions"),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, r"x must have 2 dimensions \[N, C\], got 1"),
        ({"x": torch.ones(3, 2, dtype=torch.int32)}, "x must have dtype .*got Int"),
        ({"grid": GRID.packed()[:1].clone()}, r"grid must have shape \[C, 4\] with C = 2"),
        ({"grid": GRID.packed().float()}, "grid must have dtype Double, got Float"),
        ({"grid": GRID.packed().t().contiguous().t()}, "grid must be contiguous, got strides 1, 2"),
        ({"bins": 0}, r"bins must be in \[1, 65536\], got 0"),
        ({"bins": 65537}, "got 65537"),
    ],
)
def test_the_operator_checks_for_itself(change: dict, message: str) -> None:
    _extension.load()
    arguments = {"x": torch.ones(3, 2), "grid": GRID.packed(), "bins": 4, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lambda_kernels.histogram(**arguments)
