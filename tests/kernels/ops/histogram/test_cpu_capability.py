"""The CPU code of every instruction set that this processor has counts alike: by the rule, to the last value."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from extension_support import require_extension
from histogram_support import assert_as_the_rule, moments_of, values_by_row
from torch import Tensor

from lambda_kernels.ops import histogram as ops
from lambda_kernels.ops.histogram import _extension

VARIABLE = "LAMBDA_KERNELS_CPU_CAPABILITY"
NAMES = ("AVX512", "AVX2", "plain")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(params=NAMES, autouse=True)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    require_extension()
    monkeypatch.setenv(VARIABLE, request.param)
    here = _extension.load().cpu_capability()
    if here is None:
        pytest.skip(f"this processor has no {request.param}")
    assert here == request.param
    return here


def neighbours(values: np.ndarray, dtype: torch.dtype, reach: int = 3) -> Tensor:
    """The numbers of `dtype` next to some float64 values, on either side."""
    nearest = torch.from_numpy(values).to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    steps = torch.arange(-reach, reach + 1, dtype=bits)
    return (nearest.view(bits)[:, None] + steps).view(dtype).flatten()


def edges_of(grid: ops.Grid) -> np.ndarray:
    anchor, inv_width, first, _ = grid.packed()[0].tolist()
    return anchor + (first + np.arange(-1, grid.bins + 2)) / inv_width


GRIDS = {
    "a power of two": lambda: ops.uniform_grid(-4.0, 4.0, 256),
    "a third": lambda: ops.uniform_grid(-1 / 3, 1 / 3, 100),
    "far from 0": lambda: ops.uniform_grid(1000.1, 1001.7, 64),
    "very far from 0": lambda: ops.uniform_grid(1e6, 1e6 + 1, 300),
    "huge": lambda: ops.uniform_grid(-3e38, 3e38, 7),
    "tiny": lambda: ops.uniform_grid(-1e-40, 3e-39, 9),
    "closed just above 0": lambda: ops.uniform_grid(-4.0, 1e-40, 64),
    "closed just above 0, in float32": lambda: ops.uniform_grid(-4.0, 2.0**-140, 64),
    "many bins": lambda: ops.uniform_grid(-7.3, 2.9, 4091),
    "more bins than lanes take": lambda: ops.uniform_grid(-7.3, 2.9, 4092),
    "dyadic": lambda: ops.dyadic_grid(torch.tensor([-3.3]).double(), torch.tensor([9.1]).double(), 200),
    "dyadic, fine": lambda: ops.dyadic_grid(torch.tensor([8.0]).double(), torch.tensor([8.0001]).double(), 256),
    "dyadic, subnormal": lambda: ops.dyadic_grid(torch.tensor([-1e-44]).double(), torch.tensor([3e-44]).double(), 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_at_every_edge(name: str, dtype: torch.dtype) -> None:
    """The short form in float32 is on its own exactly where it could be wrong."""
    grid = GRIDS[name]()
    x = neighbours(edges_of(grid), dtype)
    special = [0.0, -0.0, 1e-45, -1e-45, 2.0**-149, 1e-30, -1e-30, math.inf, -math.inf, math.nan, 65504.0]
    x = torch.cat([x, torch.tensor(special).to(dtype), -x])
    assert_as_the_rule(x, grid, backend="extension", per="layer")
    if grid.bins < 300:
        many = torch.stack([x, x.flip(0), x.roll(5)], 1).repeat(1, 9)  # a group of columns, and a part of one
        columns = ops.Grid.unpack(grid.packed().expand(27, 4).contiguous(), grid.bins)
        assert_as_the_rule(many, columns, backend="extension")


def assert_close_moments(got: ops.Moments, wanted: ops.Moments, atol: float) -> None:
    assert torch.equal(got.count, wanted.count)
    for field in ("mean", "m2", "minimum", "maximum"):  # low parts are what other sums round off
        torch.testing.assert_close(getattr(got, field), getattr(wanted, field), rtol=1e-12, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_columns_and_layers(dtype: torch.dtype) -> None:
    """More rows than a 16-bit counter takes, all in one bin, and sums that go on around another shift."""
    x = torch.randn(70_003, 35, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, 3] = 1.5
    x[::7, 4] = math.nan
    x[0] = 500.0  # what a shift by the first value would suffer from
    for per in ops.PER[:2]:
        rows = ops.rows_of(x, per)
        grid = ops.uniform_grid(-2.0, 2.0, 50, channels=rows)
        result = ops.histogram(x, grid, per=per, statistics=True, backend="extension")
        twin = ops.histogram(x, grid, per=per, statistics=True, backend="torch")
        assert torch.equal(result.counts, twin.counts)
        assert torch.equal(result.outside, twin.outside)
        assert_close_moments(result.moments, twin.moments, atol=1e-12)


@pytest.mark.parametrize("per", ops.PER[:2])
@pytest.mark.parametrize("value", [0.1, 1e308, -1.7e308, 3e-320])
def test_equal_values_have_their_mean_and_no_spread(value: float, per: str) -> None:
    x = torch.full((1000, 3), value, dtype=torch.float64)
    found = ops.histogram(x, None, per=per, statistics=True, backend="extension").moments
    assert set(found.mean.tolist()) == {value}
    assert set(found.m2.tolist()) == {0.0}


@pytest.mark.parametrize("per", ops.PER[:2])
def test_spread_far_from_0_behind_values_that_are_not_finite(per: str) -> None:
    x = 1e6 + torch.randn(5000, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:70] = math.nan
    x[:, 3] = math.inf
    found = ops.histogram(x, None, per=per, statistics=True, backend="extension").moments
    wanted = [moments_of(row)[2] for row in values_by_row(x, per)]
    torch.testing.assert_close(found.m2, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("per", ops.PER)
def test_many_codes(per: str) -> None:
    x = torch.randn(3, 40_000, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, :5, 0] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-30])
    for view in (x, x[:, 5:-7:3]):
        ours, twin = (
            ops.histogram(view, ops.bfloat16_codes(), per=per, statistics=True, backend=backend)
            for backend in ("extension", "torch")
        )
        assert torch.equal(ours.counts, twin.counts)
        assert torch.equal(ours.outside, twin.outside)
        assert_close_moments(ours.moments, twin.moments, atol=1e-14)


@pytest.fixture
def flushed() -> Iterator[Tensor]:
    x = torch.tensor([-1e-44, 1e-44, 0.0]).repeat(40)
    torch.set_flush_denormal(True)
    yield x
    torch.set_flush_denormal(False)


def test_subnormal_numbers_count_where_pytorch_flushes_them(flushed: Tensor) -> None:
    grid = ops.Grid(*torch.tensor([[0.0], [1.0], [-1.0], [math.nan]], dtype=torch.float64), bins=2)
    result = ops.histogram(flushed, grid, per="layer", statistics=True, backend="extension")
    assert result.counts.tolist() == [[40, 80]]
    assert result.moments.minimum.item() < 0 < result.moments.maximum.item()


def test_subnormal_extrema_of_several_parts_are_kept(flushed: Tensor) -> None:
    x = torch.zeros(300_000, dtype=torch.float64)
    x.view(torch.int64)[[200_000, 250_000]] = torch.tensor([1, 7 - 2**63])  # the bits of 5e-324 and −3.5e-323
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = ops.histogram(x, None, per="layer", statistics=True, backend="extension").moments
    finally:
        torch.set_num_threads(before)
    torch.set_flush_denormal(False)
    assert (found.minimum.item(), found.maximum.item()) == (-3.5e-323, 5e-324)


def test_an_unknown_name_is_refused() -> None:
    code = """
import torch
from lambda_kernels.ops import histogram as ops
try:
    ops.histogram(torch.ones(3, 1), ops.uniform_grid(0.0, 1.0, 4), backend="extension")
except RuntimeError as error:
    print(error)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, VARIABLE: "SSE9"}, text=True, capture_output=True, check=True
    )
    assert f"{VARIABLE} must be AVX512, AVX2 or plain" in found.stdout
    assert "SSE9" in found.stdout
