"""What the tests of histograms share: both backends, memory layouts, and the bin rule once more, in numpy."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from extension_support import require_extension
from torch import Tensor

from lambda_kernels.ops import histogram as ops
from lambda_kernels.ops.histogram import _extension

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("extension", "torch")

both_backends = pytest.mark.parametrize("backend", BACKENDS)


@contextlib.contextmanager
def counting_with(backend: str) -> Iterator[None]:
    """Let `backend="auto"` mean `backend`."""
    if backend == "extension":
        require_extension()
        yield
        return
    off = {"_loaded": None, "_failure": ImportError("switched off")}
    with mock.patch.multiple(_extension, **off), warnings.catch_warnings():
        warnings.simplefilter("ignore", ops.HistogramFallbackWarning)
        yield


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every third column": lambda x: x.repeat_interleave(3, 1)[:, ::3],
    "offset": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 0))[3:, 1:-2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def values_by_row(x: Tensor, per: str) -> list[np.ndarray]:
    """The values of each row of the results, float64."""
    values = x.detach().double().numpy()
    if per == "channel":
        return [values[..., channel].ravel() for channel in range(values.shape[-1])]
    return [values.ravel()] if per == "layer" else [sample.ravel() for sample in values]


def count_by_the_rule(values: np.ndarray, row: list[float], bins: int) -> tuple[list[int], list[int]]:
    """Counts and outside of one row, from the rule as it is stated: a difference, a product, a floor, a difference."""
    anchor, inv_width, first, closed_hi = row
    finite = values[np.isfinite(values)]
    with np.errstate(over="ignore", invalid="ignore"):
        index = np.floor((finite - anchor) * inv_width) - first
    index = np.where((index >= bins) & (finite <= closed_hi), bins - 1, index)
    inside = (index >= 0) & (index < bins)
    counts = np.bincount(index[inside].astype(np.int64), minlength=bins)
    return counts.tolist(), [int((index < 0).sum()), int((index >= bins).sum()), *_not_finite(values)]


def count_codes(values: np.ndarray) -> tuple[list[int], list[int]]:
    """The same for bfloat16 codes: 128 counters for each power of two from 2^-24 on, the negative ones after."""
    finite = values[np.isfinite(values)]
    mantissa, exponent = np.frexp(np.maximum(np.abs(finite), 2.0**-24))
    code = (exponent + 23) * 128 + (mantissa * 256 - 128)
    negative = finite < 0
    inside = code < 5120
    counts = np.bincount((code + 5120 * negative)[inside].astype(np.int64), minlength=10240)
    return counts.tolist(), [int((~inside & negative).sum()), int((~inside & ~negative).sum()), *_not_finite(values)]


def _not_finite(values: np.ndarray) -> list[int]:
    return [int(np.isnan(values).sum()), int((values == math.inf).sum()), int((values == -math.inf).sum())]


def moments_of(values: np.ndarray) -> list[float]:
    """Count, mean, M2, minimum and maximum of the finite values."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return [0.0, 0.0, 0.0, math.nan, math.nan]
    mean = math.fsum(finite) / finite.size
    distance = finite - mean
    m2 = math.fsum(distance**2) - math.fsum(distance) ** 2 / finite.size  # as the mean is rounded
    return [finite.size, mean, m2, finite.min(), finite.max()]


def assert_as_the_rule(
    x: Tensor | list[Tensor],
    grid: ops.Grid | ops.CodeGrid | None,
    *,
    backend: str,
    per: str = "channel",
    statistics: bool = True,
    only: Tensor | None = None,
) -> ops.Histogram:
    """Measure `x` and compare everything with numpy."""
    result = ops.histogram(x, grid, per=per, statistics=statistics, row_mask=only, backend=backend)
    assert result.backend == backend
    rows = [row for tensor in (x if isinstance(x, list) else [x]) for row in values_by_row(tensor, per)]
    if only is not None:
        rows = [row if wanted else row[:0] for row, wanted in zip(rows, only.tolist(), strict=True)]
    if grid is None:
        expected = [([], [0, 0, *_not_finite(row)]) for row in rows]
    elif isinstance(grid, ops.CodeGrid):
        expected = [count_codes(row) for row in rows]
    else:
        packed = grid.packed().tolist()
        expected = [count_by_the_rule(row, four, grid.bins) for row, four in zip(rows, packed, strict=True)]
    assert result.counts.dtype == result.outside.dtype == torch.int64
    assert result.counts.tolist() == [counts for counts, _ in expected]
    assert result.outside.tolist() == [outside for _, outside in expected]
    if not statistics:
        assert result.moments is None
        return result
    wanted = torch.tensor([moments_of(row) for row in rows], dtype=torch.float64).reshape(-1, 5)
    got = result.moments.packed()
    assert torch.equal(got[:, [0, 5, 6]].nan_to_num(7), wanted[:, [0, 3, 4]].nan_to_num(7))
    # A mean may be much smaller than the values; what counts is its distance from them.
    largest = wanted[:, 3:].nan_to_num(0).abs().amax(1)
    assert ((got[:, 1] - wanted[:, 1]).abs() <= 1e-13 * largest).all()
    torch.testing.assert_close(got[:, 2], wanted[:, 2], rtol=1e-12, atol=0)
    assert torch.equal(got[:, 1:3] + got[:, 3:5], got[:, 1:3])  # low parts are what was rounded off
    return result
