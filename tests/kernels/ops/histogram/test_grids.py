"""Grids: what their numbers are, that dyadic ones nest, and that counts move between them without loss."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from histogram_support import DTYPES, both_backends, counting_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lambda_kernels.ops import histogram as ops
from lambda_kernels.ops.histogram import grids

relaxed = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# The magnitudes for which dyadic grids nest: every number of the smaller dtypes, and these of float64.
nesting = st.one_of(st.floats(-1e4, 1e4, width=32), st.floats(1e-150, 1e150), st.floats(-1e150, -1e-150), st.just(0.0))


def dyadic(low: float, high: float, bins: int = 8, *, centred: bool = False) -> ops.Grid:
    return ops.dyadic_grid(*torch.tensor([[low], [high]], dtype=torch.float64), bins, centred=centred)


def covered(low: float, high: float, width: Fraction) -> int:
    return Fraction(high) // width - Fraction(low) // width + 1


def test_equal_edges_are_widened_as_in_numpy() -> None:
    x = torch.full((5, 2), 3.0)
    grid = ops.uniform_grid(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 6.0]), 4)
    assert ops.histogram(x, grid, backend="torch").counts.tolist() == [[0, 0, 5, 0], [0, 0, 5, 0]]
    assert np.histogram([3.0], bins=4, range=(3, 3))[0].tolist() == [0, 0, 1, 0]
    assert grid.width.tolist() == [0.25, 1.5]
    # A half added to these would be lost.
    large = torch.tensor([1e17, -3e38], dtype=torch.float64)
    counts = ops.histogram(large[None], ops.uniform_grid(large, large, 4), backend="torch").counts
    assert counts.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("lo", "hi", "bins", "anchor", "first"),
    [
        (-4.0, 4.0, 64, 0.0, -32.0),
        (0.0, 1.0, 256, 0.0, 0.0),
        (3.0, 3.5, 2, 0.0, 12.0),
        (2.0**22, 2.0**22 + 2, 4, 0.0, 2.0**23),
        (-0.0, 2.0**-100, 2, 0.0, 0.0),
        # Not a multiple of the width; too many times the width; not a power of two.
        (0.1, 1.1, 4, 0.1, 0.0),
        (2.0**24, 2.0**24 + 2, 4, 2.0**24, 0.0),
        (-1.0, 2.0, 256, -1.0, 0.0),
    ],
)
def test_uniform_grid_is_counted_from_zero_where_that_is_exact(
    lo: float, hi: float, bins: int, anchor: float, first: float
) -> None:
    grid = ops.uniform_grid(lo, hi, bins)
    assert (grid.anchor.item(), grid.first.item(), grid.closed_hi.item()) == (anchor, first, hi)
    assert math.copysign(1, grid.first.item()) == (-1 if first < 0 else 1)
    edges = torch.tensor([lo, hi, math.nextafter(lo, -math.inf), math.nextafter(hi, math.inf)], dtype=torch.float64)
    result = ops.histogram(edges[:, None], grid, backend="torch")
    assert (result.counts[0, 0], result.counts[0, -1]) == (1, 1)
    assert result.outside.tolist() == [[1, 1, 0, 0, 0]]


@relaxed
@given(nesting, nesting, st.one_of(st.integers(2, 9), st.sampled_from([255, 256, 257, 65536])))
def test_dyadic_grid_is_the_finest(a: float, b: float, bins: int) -> None:
    low, high = min(a, b), max(a, b)
    grid = dyadic(low, high, bins)
    width = Fraction(grid.width.item())
    assert math.log2(width.numerator) % 1 == math.log2(width.denominator) % 1 == 0
    assert grid.first.item() == Fraction(low) // width
    assert covered(low, high, width) <= bins
    magnitude = max(abs(low), abs(high))
    finest = max(-126, math.frexp(magnitude)[1] - 23) if magnitude else -126
    assert width == Fraction(2) ** finest or covered(low, high, width / 2) > bins
    assert width * 2**23 > Fraction(magnitude)


@relaxed
@given(nesting, nesting, st.one_of(st.integers(2, 9), st.sampled_from([255, 256, 257, 65536])))
def test_centred_grid_has_the_same_bins_around_the_data(a: float, b: float, bins: int) -> None:
    low, high = min(a, b), max(a, b)
    plain, grid = dyadic(low, high, bins), dyadic(low, high, bins, centred=True)
    assert grid.inv_width.item() == plain.inv_width.item()
    below = int(plain.first.item() - grid.first.item())
    above = bins - covered(low, high, Fraction(grid.width.item())) - below
    assert 0 <= below <= above <= below + 1
    assert abs(grid.first.item()) < 2**24


def test_no_value_gives_a_grid_all_the_same() -> None:
    low = torch.tensor([math.nan, -math.inf, 1e300], dtype=torch.float64)
    high = torch.tensor([math.nan, math.inf, 1e300], dtype=torch.float64)
    for centred in (False, True):
        packed = ops.dyadic_grid(low, high, 4, centred=centred).packed()
        assert packed[:, :3].isfinite().all()
        assert packed[0].tolist()[:3] == [0.0, 2.0**126, -1.0 if centred else 0.0]


@both_backends
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
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_split_in_any_order_counts_as_one_shot(
    backend: str, batches: list, dtype: torch.dtype, bins: int, centred: bool, random
) -> None:
    batches = [torch.from_numpy(batch).to(dtype) for batch in batches]
    everything = torch.cat(batches)
    with counting_with(backend):
        final = ops.dyadic_grid(*ops.extrema(everything), bins)
        expected = ops.histogram(everything, final)
        assert (expected.outside[:, :2] == 0).all()

        random.shuffle(batches)
        low, high = ops.extrema(batches[0])
        grid = ops.dyadic_grid(low, high, bins, centred=centred)
        counts = ops.histogram(batches[0], grid).counts
        for batch in batches[1:]:
            batch_low, batch_high = ops.extrema(batch)
            low, high = torch.fmin(low, batch_low), torch.fmax(high, batch_high)
            wider = ops.dyadic_grid(low, high, bins, centred=centred)
            assert (wider.width >= grid.width).all()
            counts = ops.regrid(counts, grid, wider) + ops.histogram(batch, wider).counts
            grid = wider
    assert torch.equal(ops.regrid(counts, grid, final), expected.counts)
    if not centred:
        assert torch.equal(grid.packed()[:, :3], final.packed()[:, :3])


def test_regrid_refuses_what_would_lose_counts() -> None:
    fine, coarse, elsewhere = dyadic(0, 7), dyadic(0, 70), dyadic(500, 570)
    counts = torch.ones(1, 8, dtype=torch.int64)
    assert ops.regrid(counts, fine, coarse).tolist() == [[8, 0, 0, 0, 0, 0, 0, 0]]
    assert ops.regrid(0 * counts, fine, elsewhere).sum() == 0
    with pytest.raises(ValueError, match=r"row 0 has bin widths 16.0 and 1.0"):
        ops.regrid(counts, coarse, fine)
    with pytest.raises(ValueError, match="holding every counted bin"):
        ops.regrid(counts, fine, elsewhere)
    with pytest.raises(ValueError, match="two dyadic grids"):
        ops.regrid(counts, fine, ops.uniform_grid(0.0, 3.0, 8))
    with pytest.raises(ValueError, match=r"got \[1, 7\]"):
        ops.regrid(counts[:, :7], fine, coarse)


def test_codes_are_the_values_of_bfloat16() -> None:
    values, widths = ops.bfloat16_codes().values(), ops.bfloat16_codes().widths()
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16).double()
    held = every[(every.abs() > 2.0**-24) & (every.abs() < 2.0**16)]
    assert len(held) == 10240 - 2
    apart = torch.arange(10240) % 5120 != 0
    assert set(values[apart].tolist()) == set(held.tolist())
    assert values[~apart].tolist() == [0.0, -(2.0**-24)]
    assert (values[2:5120].diff() > 0).all()
    assert torch.equal(values[5121:], -values[1:5120])
    # The counters of a sign follow each other without a gap from 0 to 2^16.
    assert widths[:5120].sum() == widths[5120:].sum() == 2.0**16
    assert torch.equal(widths[1:5119], values[2:5120] - values[1:5119])


@both_backends
@relaxed
@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.integers(2, 300), st.booleans())
def test_codes_can_be_binned_later(backend: str, values: list[float], bins: int, uniform: bool) -> None:
    x = torch.tensor(values).bfloat16().reshape(-1, 1)
    x = x[~((x.abs() >= 2.0**16) & x.isfinite())].reshape(-1, 1)
    with counting_with(backend):
        codes = ops.histogram(x, ops.bfloat16_codes())
        if uniform:
            x = torch.where(x.abs() <= 2.0**-24, torch.where(x < 0, -(2.0**-24), 0.0), x).to(x.dtype)
            grid = ops.uniform_grid(-1.0, 3.0, bins)
        else:
            low, high = ops.extrema(x)
            # Wide enough that no bin is finer than 2^-23.
            grid = ops.dyadic_grid(torch.fmin(low, torch.zeros(1)), torch.fmax(high, torch.ones(1) * bins / 64), bins)
            assert grid.width >= 2.0**-23
        counts, outside = ops.regrid_codes(codes.counts, grid)
        expected = ops.histogram(x, grid)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(outside, expected.outside[:, :2])


def test_codes_of_many_rows() -> None:
    x = torch.randn(50, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = ops.uniform_grid(torch.linspace(-2, -1, 130), torch.linspace(1, 2, 130), 7)
    expected = ops.histogram(x, grid, backend="torch")
    counts, outside = ops.regrid_codes(ops.histogram(x, ops.bfloat16_codes(), backend="torch").counts, grid)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(outside, expected.outside[:, :2])


def test_packing() -> None:
    grid = ops.uniform_grid(0.0, 3.0, 4, channels=3)
    again = ops.Grid.unpack(grid.packed(), 4)
    assert torch.equal(again.packed(), grid.packed())
    assert (again.channels, again.bins, again.device.type) == (3, 4, "cpu")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.uniform_grid(1.0, 0.0, 4), ValueError, "got lo=1.0, hi=0.0 in row 0"),
        (lambda: ops.uniform_grid(0.0, math.inf, 4), ValueError, "hi=inf"),
        (lambda: ops.uniform_grid(math.nan, 1.0, 4), ValueError, "lo=nan"),
        (lambda: ops.uniform_grid(-1e308, 1.7e308, 4), ValueError, "both finite and far enough apart"),
        (lambda: ops.uniform_grid(0.0, 5e-324, 4), ValueError, "both finite and far enough apart"),
        (lambda: ops.uniform_grid(torch.zeros(2), torch.ones(3), 4), ValueError, r"hi must be a number or .* \[3\]"),
        (lambda: ops.uniform_grid(0.0, 1.0, 0), ValueError, "bins must be an integer from 1 to 65536; got 0"),
        (lambda: ops.uniform_grid(0.0, 1.0, 65537), ValueError, "got 65537"),
        (lambda: ops.uniform_grid(0.0, 1.0, 4.0), TypeError, "bins must be an integer from 1 to 65536; got 4.0"),
        (lambda: ops.uniform_grid(0.0, 1.0, True), TypeError, "bins must be an integer from 1 to 65536; got True"),
        (lambda: ops.uniform_grid([0.0], 1.0, 4), TypeError, "lo must be a number or a tensor; got list"),
        (lambda: ops.uniform_grid(0.0, "1", 4), TypeError, "hi must be a number or a tensor; got str"),
        (
            lambda: ops.uniform_grid(0.0, 1.0, 4, channels=-1),
            ValueError,
            "channels must be an integer of at least 0; got -1",
        ),
        (
            lambda: ops.uniform_grid(0.0, 1.0, 4, channels=2.0),
            TypeError,
            "channels must be an integer of at least 0; got 2.0",
        ),
        (lambda: ops.dyadic_grid(0.0, 1.0, 4), TypeError, "minimum must be a float64 tensor; got float"),
        (
            lambda: ops.dyadic_grid(*[torch.zeros(2).double()] * 2, 1),
            ValueError,
            "bins must be an integer from 2 to 65536; got 1",
        ),
        (
            lambda: ops.dyadic_grid(*[torch.zeros(2)] * 2, 4),
            TypeError,
            "minimum must be a float64 .* got torch.float32",
        ),
        (lambda: ops.dyadic_grid(torch.zeros(2).double(), torch.ones(3).double(), 4), ValueError, r"\[\[2\], \[3\]\]"),
        (lambda: ops.Grid(*torch.zeros(4, 2), bins=4), TypeError, "anchor must be a float64 tensor; got torch.float32"),
        (lambda: ops.Grid(*torch.zeros(4, 2).double(), bins=0), ValueError, "got 0"),
        (lambda: ops.Grid(*torch.zeros(4, 2, 1).double(), bins=1), ValueError, r"one shape \[K\]; got anchor \[2, 1\]"),
        (
            lambda: ops.regrid_codes(torch.zeros(2, 9, dtype=torch.int64), dyadic(0, 1)),
            ValueError,
            r"\[K = 1, 10240\]; got \[2, 9\]",
        ),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@both_backends
def test_edges_that_require_grad_leave_no_graph(backend: str) -> None:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
    low, high = x.amin(0), x.amax(0)
    edges = [edge.detach() for edge in (low, high)]
    own = ops.Grid(*ops.uniform_grid(*edges, 4).packed().requires_grad_().unbind(1), bins=4)
    for grid in (ops.uniform_grid(low, high, 4), ops.dyadic_grid(low, high, 4), own):
        assert grid is own or not grid.anchor.requires_grad | grid.inv_width.requires_grad | grid.first.requires_grad
        with counting_with(backend):
            result = ops.histogram(x, grid, statistics=True)
        assert result.counts.sum() == 12
        assert not result.moments.packed().requires_grad


def test_moving_counts_looks_at_no_value() -> None:
    """On a device whose values cannot be read."""
    low, high = torch.zeros(2, 3, dtype=torch.float64, device="meta")
    old, new = ops.dyadic_grid(low, high, 4), ops.dyadic_grid(low, high, 6, centred=True)
    counts = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    assert grids.regrid_unchecked(counts, old, new).shape == (3, 6)
    with pytest.raises(RuntimeError, match="meta"):
        ops.regrid(counts, old, new)
