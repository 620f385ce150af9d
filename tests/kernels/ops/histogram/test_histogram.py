"""Histograms and moments on the CPU, both backends against the stated rule in numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from extension_support import require_extension
from histogram_support import DTYPES, LAYOUTS, assert_as_the_rule, both_backends, moments_of, values_by_row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lambda_kernels.ops import histogram as ops
from lambda_kernels.ops.histogram import _extension, function

# Counting in a new process is slow the first time, which is no reason to fail.
relaxed = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _loaded(request: pytest.FixtureRequest) -> None:
    parameters = getattr(request.node, "callspec", None)
    if parameters is None or parameters.params.get("backend") != "torch":
        require_extension()


def arrays(elements: st.SearchStrategy, rows: int = 12, columns: int = 4) -> st.SearchStrategy:
    shapes = st.tuples(st.integers(0, rows), st.integers(0, columns))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=elements))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


anything = st.one_of(
    st.floats(-8, 8),
    st.integers(-8, 8).map(float),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308, -1e308, 3e38, 65504.0]),
)


@both_backends
@relaxed
@given(
    arrays(anything),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(1, 40),
    st.tuples(st.floats(-9, 9), st.floats(1e-3, 20)),
)
def test_fixed_edges(
    backend: str, values: np.ndarray, dtype: torch.dtype, layout: str, bins: int, edges: tuple[float, float]
) -> None:
    x = LAYOUTS[layout](torch.from_numpy(values).to(dtype))
    grid = ops.uniform_grid(edges[0], edges[0] + edges[1], bins, channels=x.shape[1])
    assert_as_the_rule(x, grid, backend=backend, statistics=False)


@both_backends
@relaxed
@given(arrays(anything), st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS)), st.integers(2, 40))
def test_dyadic_grid(backend: str, values: np.ndarray, dtype: torch.dtype, layout: str, bins: int) -> None:
    x = LAYOUTS[layout](torch.from_numpy(values).to(dtype))
    grid = ops.dyadic_grid(*ops.extrema(x, backend=backend), bins)
    result = assert_as_the_rule(x, grid, backend=backend, statistics=False)
    assert dtype == torch.float64 or (result.outside[:, :2] == 0).all()


@both_backends
@relaxed
@given(arrays(st.floats(-4, 4, width=32)), hnp.arrays(np.float64, 4, elements=st.floats()), st.integers(1, 5))
def test_malformed_grids_give_no_address(backend: str, values: np.ndarray, row: np.ndarray, bins: int) -> None:
    """Whatever the four numbers are, both backends count alike, and each value once."""
    for dtype in (torch.float64, torch.float32):
        x = torch.from_numpy(values).to(dtype)
        packed = torch.from_numpy(row).expand(x.shape[1], 4).contiguous()
        result = ops.histogram(x, ops.Grid.unpack(packed, bins), backend=backend)
        expected = ops.histogram(x, ops.Grid.unpack(packed, bins), backend="torch")
        assert torch.equal(result.counts, expected.counts)
        assert torch.equal(result.outside, expected.outside)
        assert (result.counts.sum(1) + result.outside.sum(1) == x.shape[0]).all()


def random_values(random: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = random.normal(random.choice([0.0, 3.0, -50.0]), random.choice([1e-3, 1.0, 40.0]), shape)
    if random.random() < 0.3:
        values = np.round(values * 8) / 8  # many on an edge
    if random.random() < 0.4:
        specials = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, -1e-40, 65504.0, 2.0**-24, -(2.0**-24), 7e4]
        values = np.where(random.random(shape) < 0.2, random.choice(specials, shape), values)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def random_view(random: np.random.Generator, dtype: torch.dtype) -> Tensor:
    """A tensor of one to four dimensions, cut out of a larger one, with its dimensions in any order."""
    shape = tuple(int(n) for n in random.integers(0 if random.random() < 0.1 else 1, 9, random.integers(1, 5)))
    x = random_values(random, tuple(2 * n + 1 for n in shape), dtype)
    for dim, size in enumerate(shape):
        step = int(random.integers(1, 3))
        x = x.narrow(dim, int(random.integers(0, 2)), 2 * size)[(slice(None),) * dim + (slice(None, None, step),)]
        x = x.narrow(dim, 0, size)
    if random.random() < 0.4:
        x = x.contiguous()
    x = x.permute(*random.permutation(x.dim()))
    if random.random() < 0.1:
        x = x[:1].expand(5, *x.shape[1:]) if x.shape[0] else x
    return x


def random_grid(random: np.random.Generator, x: list[Tensor], per: str, rows: int) -> ops.Grid | ops.CodeGrid | None:
    kind = random.choice(["edges", "powers", "dyadic", "codes", "none"])
    bins = int(random.choice([1, 2, 3, 7, 64, 256, 1000]))
    if kind == "codes" and x[0].dtype == torch.bfloat16:
        return ops.bfloat16_codes()
    if kind == "none":
        return None
    if kind == "powers":
        return ops.uniform_grid(-4.0, 4.0, int(random.choice([1, 2, 8, 64])), channels=rows)
    if kind == "dyadic":
        low, high = ops.extrema(x, per=per, backend="torch")
        return ops.dyadic_grid(low, high, max(2, bins), centred=bool(random.random() < 0.5))
    low = torch.from_numpy(random.normal(-2, 3, rows))
    return ops.uniform_grid(low, low + torch.from_numpy(random.uniform(0.01, 9, rows)), bins)


@both_backends
def test_two_hundred_random_cases(backend: str) -> None:
    kinds = set()
    for seed in range(200):
        random = np.random.default_rng(seed)
        per = str(random.choice(ops.PER))
        dtype = DTYPES[random.integers(len(DTYPES))]
        x = [random_view(random, dtype) for _ in range(random.integers(1, 4))]
        rows = sum(ops.rows_of(tensor, per) for tensor in x)
        grid = random_grid(random, x, per, rows)
        only = torch.from_numpy(random.random(rows) < 0.5) if random.random() < 0.3 else None
        statistics = grid is None or bool(random.random() < 0.7)
        try:
            assert_as_the_rule(x, grid, backend=backend, per=per, statistics=statistics, only=only)
        except AssertionError as error:
            shapes = [(list(t.shape), t.stride()) for t in x]
            raise AssertionError(f"seed {seed}: {per}, {dtype}, {shapes}, {grid}, only {only}") from error
        kinds.add((per, type(grid), dtype))
    assert len(kinds) >= 25  # of 27 combinations


@both_backends
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
def test_sizes(backend: str, dtype: torch.dtype, rows: int, columns: int, bins: int) -> None:
    x = normal(rows, columns).to(dtype)
    grid = ops.uniform_grid(-2.0, 2.0, bins, channels=columns)
    assert_as_the_rule(x, grid, backend=backend, statistics=rows * columns < 300_000)
    if rows * columns < 50_000:
        assert_as_the_rule(x.t().contiguous().t(), grid, backend=backend)
    for per in ("layer", "sample"):
        sample = x[:100]
        grid = ops.dyadic_grid(*ops.extrema(sample, per=per, backend=backend), max(2, min(bins, 999)))
        assert_as_the_rule(sample, grid, backend=backend, per=per)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("per", ops.PER)
def test_threads_do_not_matter(threads: int, per: str) -> None:
    x = normal(20, 5000, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        grid = ops.uniform_grid(-2.0, 2.0, 64, channels=ops.rows_of(x, per))
        assert_as_the_rule(x, grid, backend="extension", per=per)
    finally:
        torch.set_num_threads(before)


@both_backends
@relaxed
@given(arrays(st.integers(-40, 40).map(lambda i: i / 8)), st.sampled_from([1, 2, 4, 8, 16, 64]))
def test_numpy_gives_the_same_counts(backend: str, values: np.ndarray, bins: int) -> None:
    """On edges that float64 holds exactly; elsewhere numpy may move a value by one bin."""
    x = torch.from_numpy(values).float()
    result = ops.histogram(x, ops.uniform_grid(-4.0, 4.0, bins, channels=x.shape[1]), backend=backend)
    for channel in range(x.shape[1]):
        expected = np.histogram(values[:, channel], bins=bins, range=(-4, 4))[0]
        assert result.counts[channel].tolist() == expected.tolist()


@both_backends
def test_outside(backend: str) -> None:
    x = torch.tensor([[-1.0, 0.0, 1.0, 1.5, math.nan, math.inf, -math.inf, math.nan]]).t()
    result = ops.histogram(x, ops.uniform_grid(0.0, 1.0, 2), backend=backend)
    assert result.counts.tolist() == [[1, 1]]
    assert result.outside.tolist() == [[1, 1, 2, 1, 1]]


@both_backends
def test_only_may_be_a_view(backend: str) -> None:
    only = torch.tensor([True, True, False, False, True, False])[::2]
    assert_as_the_rule(normal(9, 3), ops.uniform_grid(-1.0, 1.0, 4, channels=3), backend=backend, only=only)


@both_backends
def test_every_bfloat16_has_its_code(backend: str) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert_as_the_rule(x, ops.bfloat16_codes(), per="layer", backend=backend, statistics=False)


@both_backends
@pytest.mark.parametrize(
    ("shape", "per", "rows"),
    [
        ((0, 3), "channel", 3),
        ((3, 0), "channel", 0),
        ((0, 0), "channel", 0),
        ((2, 0, 4), "channel", 4),
        ((0,), "layer", 1),
        ((4, 0, 2), "layer", 1),
        ((4, 0), "sample", 4),
        ((0, 4), "sample", 0),
    ],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_empty(backend: str, shape: tuple[int, ...], per: str, rows: int) -> None:
    x = torch.zeros(shape)
    grid = ops.uniform_grid(0.0, 1.0, 4, channels=rows)
    result = ops.histogram(x, grid, per=per, statistics=True, backend=backend)
    assert result.counts.shape == (rows, 4)
    assert result.outside.shape == (rows, 5)
    assert result.counts.sum() == result.outside.sum() == 0
    found = result.moments
    assert found.count.tolist() == found.mean.tolist() == found.m2.tolist() == [0] * rows
    assert found.minimum.isnan().all()
    assert found.maximum.isnan().all()
    assert found.minimum.shape == found.maximum.shape == (rows,)
    # An empty tensor in a list leaves the others alone.
    if per == "layer":
        both = ops.histogram([x, torch.ones(3), x], None, per=per, statistics=True, backend=backend)
        assert both.moments.count.tolist() == [0, 3, 0]


@both_backends
def test_extrema_and_moments(backend: str) -> None:
    x = torch.tensor([[1.0, math.nan, math.inf], [-2.0, -math.inf, 7.0], [0.5, math.inf, math.nan]])
    for dtype in DTYPES:
        low, high = ops.extrema(x.to(dtype), backend=backend)
        assert low.dtype == high.dtype == torch.float64
        torch.testing.assert_close(low, torch.tensor([-2, math.nan, 7]).double(), equal_nan=True)
        torch.testing.assert_close(high, torch.tensor([1, math.nan, 7]).double(), equal_nan=True)
    found = ops.moments(x, backend=backend)
    assert found.count.tolist() == [3, 0, 1]
    assert found.count.dtype == torch.int64
    assert found.std[1:].isnan().all()
    assert found.std[0].item() == pytest.approx(np.std([1, -2, 0.5], ddof=1), rel=1e-14)
    assert ops.moments(x, per="layer", backend=backend).count.tolist() == [4]
    assert ops.moments(x, per="sample", backend=backend).count.tolist() == [1, 2, 1]


@both_backends
def test_moments_keep_a_small_spread_beside_a_large_mean(backend: str) -> None:
    x = (1e6 + 1e-3 * normal(30_000, 2, seed=1).double()).requires_grad_()
    found = ops.moments(x, backend=backend)
    for row, values in enumerate(values_by_row(x, "channel")):
        assert found.m2[row].item() == pytest.approx(moments_of(values)[2], rel=1e-12)
    constant = ops.moments(torch.full((1000, 3), 0.1, dtype=torch.float64), backend=backend)
    assert constant.m2.tolist() == [0.0] * 3
    assert constant.mean.tolist() == [0.1] * 3


@both_backends
def test_moments_of_parts_merge(backend: str) -> None:
    x = normal(1000, 3).double() + torch.tensor([0, 5, -100])
    x[:300, 0] = math.nan
    whole = ops.moments(x, backend=backend)
    parts = [ops.moments(part, backend=backend) for part in x.split([0, 1, 299, 300, 400])]
    for order in (parts, parts[::-1]):
        total = order[0]
        for part in order[1:]:
            total = total.merge(part)
        assert torch.equal(total.count, whole.count)
        assert torch.equal(total.minimum, whole.minimum)
        assert torch.equal(total.maximum, whole.maximum)
        torch.testing.assert_close(total.std, whole.std, rtol=1e-13, atol=0)
        torch.testing.assert_close(total.mean, whole.mean, rtol=1e-13, atol=1e-15)
    with pytest.raises(ValueError, match="3 and 1 rows"):
        whole.merge(ops.moments(x, per="layer", backend=backend))


VIEWS = {
    "all tokens but the first": lambda x: x[:, 1:],
    "a range of channels": lambda x: x[..., 1:4],
    "every second row": lambda x: x[::2],
    "every second token and channel": lambda x: x[:, ::2, ::2],
    "channels first": lambda x: x.permute(0, 2, 1),
    "reversed": lambda x: x.permute(2, 1, 0),
    "expanded": lambda x: x[:1].expand(6, -1, -1),
    "a window": lambda x: x[1:3, 1:3, 1:3],
    "four dimensions": lambda x: x[:, 1:].unflatten(2, (2, 3)),
    "a part of the heads": lambda x: x.reshape(4, 7, 3, 2).transpose(1, 2)[:, :, 1:],
    "images": lambda x: x.reshape(2, 3, 7, 4).permute(0, 2, 3, 1),
}


@pytest.mark.parametrize("name", [*VIEWS, "five strides"])
@pytest.mark.parametrize("per", ops.PER)
def test_views_are_read_in_place(name: str, per: str) -> None:
    if name == "five strides":
        base = torch.arange(3.0**5).reshape(3, 3, 3, 3, 3)
        x = base[::2, ::2, ::2, ::2, ::2]
    else:
        base = torch.arange(4 * 7 * 6.0).reshape(4, 7, 6)
        x = VIEWS[name](base)
    source = function._source(x, per)
    assert (source.untyped_storage().data_ptr() == base.data_ptr()) == (name != "five strides")
    rows = {"channel": source.permute(2, 0, 1), "layer": source[None], "sample": source}[per]
    expected = [sorted(row) for row in values_by_row(x, per)]
    assert [sorted(row.flatten().tolist()) for row in rows] == expected


def test_opcheck() -> None:
    operator = torch.ops.lambda_kernels.histogram.default
    _extension.load()
    for dtype, per in itertools.product(DTYPES, range(3)):
        x = [normal(2, 10, 3).to(dtype), normal(1, 4, 3).transpose(1, 2).to(dtype)]
        rows = sum((t.shape[2], 1, t.shape[0])[per] for t in x)
        packed = ops.uniform_grid(-1.0, 1.0, 5, channels=rows).packed()
        only = torch.arange(rows) % 2 == 0
        # No moments of rows that are left out: opcheck takes their NaN for a difference.
        torch.library.opcheck(operator, (x, packed, 5, per, False, only))
        torch.library.opcheck(operator, (x, packed, 5, per, True, None))
        torch.library.opcheck(operator, (x, None, 0, per, True, None))
        if dtype == torch.bfloat16:
            torch.library.opcheck(operator, (x, None, 10240, per, False, None))


@both_backends
def test_compiles_without_a_graph_break(backend: str) -> None:
    grid = ops.uniform_grid(-1.0, 1.0, 5, channels=6)
    x = torch.randn(20, 3, requires_grad=True)

    def measure(x: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.histogram([x, x.t()[:, ::7]], grid, statistics=True, backend=backend)
        return found.counts, found.moments.mean

    compiled = torch.compile(measure, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x), measure(x), strict=True):
        assert torch.equal(got, expected)


def test_the_reason_names_the_vector_code() -> None:
    name, reason = ops.histogram_backend("cpu", torch.float32)
    assert name == "extension"
    assert reason == f"the extension has code for cpu ({_extension.cpu_capability()})"
    assert _extension.cpu_capability() in ("AVX512", "AVX2", "plain")


GRID = ops.uniform_grid(0.0, 1.0, 4, channels=2)
ONES = torch.ones(3, 2)


@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0], GRID), TypeError, r"x\[0\] must be a torch.Tensor; got float"),
        (lambda f: f("x", GRID), TypeError, "x must be a torch.Tensor; got str"),
        (lambda f: f([], GRID), ValueError, "at least one tensor; got an empty list"),
        (lambda f: f(ONES.int(), GRID), TypeError, "got torch.int32"),
        (lambda f: f(ONES.bool(), GRID), TypeError, "got torch.bool"),
        (lambda f: f(ONES.to_sparse(), GRID), TypeError, "torch.sparse_coo"),
        (lambda f: f(torch.tensor(1.0), GRID), ValueError, r"one dimension; got a single number, use x.reshape\(1\)"),
        (
            lambda f: f(torch.ones(3, 5), GRID),
            ValueError,
            r"grid has 2 rows, x of shape \[3, 5\] has 5 for per='channel'",
        ),
        (lambda f: f([ONES, ONES], GRID, per="sample"), ValueError, r"\[3, 2\], \[3, 2\] has 6 for per='sample'"),
        (lambda f: f([ONES, ONES.half()], GRID), TypeError, r"one dtype; got x\[0\] float32, x\[1\] float16"),
        (lambda f: f([ONES, ONES.to("meta")], GRID), ValueError, r"one device; got x\[0\] on cpu, x\[1\] on meta"),
        (lambda f: f(ONES, GRID.packed()), TypeError, "grid must be a Grid, a CodeGrid or None; got Tensor"),
        (lambda f: f(ONES.to("meta"), GRID), ValueError, "x on meta, grid on cpu"),
        (lambda f: f(ONES, None), ValueError, "nothing is asked for"),
        (lambda f: f(ONES, ops.bfloat16_codes()), TypeError, "counts bfloat16; got x of torch.float32"),
        (
            lambda f: f(ONES, GRID, per="token"),
            ValueError,
            "per must be one of 'channel', 'layer', 'sample'; got 'token'",
        ),
        (
            lambda f: f(ONES, GRID, row_mask=torch.ones(2)),
            TypeError,
            "row_mask must be a bool tensor; got torch.float32",
        ),
        (lambda f: f(ONES, GRID, row_mask=[True, False]), TypeError, "row_mask must be a bool tensor; got list"),
        (lambda f: f(ONES, GRID, row_mask=torch.ones(3).bool()), ValueError, r"shape \[K = 2\]; got \[3\]"),
        (
            lambda f: f(ONES, GRID, row_mask=torch.ones(2, device="meta").bool()),
            ValueError,
            "row_mask must be on cpu; got meta",
        ),
        (lambda f: ops.histogram(ONES, GRID, backend="cuda"), ValueError, "backend must be one of.*'cuda'"),
        (lambda f: ops.extrema(ONES.int()), TypeError, "got torch.int32"),
    ],
)
def test_bad_arguments(backend: str, call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(lambda *args, **options: ops.histogram(*args, **options, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": []}, "x must hold at least one tensor"),
        ({"x": [torch.ones(3, 2)]}, r"x must have 3 dimensions \[outer, rows, columns\], got 2"),
        ({"x": [torch.ones(1, 3, 2, dtype=torch.int32)]}, "x must have dtype .*got Int"),
        ({"x": [torch.ones(1, 3, 2), torch.ones(1, 3, 2).double()]}, "one dtype, got Float and Double"),
        ({"grid": GRID.packed()[:1].clone()}, r"grid must have shape \[K, 4\] with K = 2"),
        ({"grid": GRID.packed().float()}, "grid must have dtype Double, got Float"),
        ({"grid": GRID.packed().t().contiguous().t()}, "grid must be contiguous, got strides 1, 2"),
        ({"grid": None}, "codes of BFloat16"),
        ({"bins": -1}, r"bins must be in \[0, 65536\], got -1"),
        ({"bins": 65537}, "got 65537"),
        ({"per": 3}, r"per must be in \[0, 3\), got 3"),
        ({"only": torch.ones(3).bool()}, r"only must have shape \[K\] with K = 2"),
        ({"only": torch.ones(2)}, "only must have dtype Bool, got Float"),
        ({"only": torch.ones(4).bool()[::2]}, "only must be contiguous, got stride 2"),
    ],
)
def test_the_operator_checks_for_itself(change: dict, message: str) -> None:
    _extension.load()
    arguments = {"x": [torch.ones(1, 3, 2)], "grid": GRID.packed(), "bins": 4, "per": 0, "statistics": True}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lambda_kernels.histogram(**{**arguments, "only": None, **change})
