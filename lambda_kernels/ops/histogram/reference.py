"""The histogram operator in plain PyTorch: the test oracle in float64, the CPU path, the baseline of the benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Which values share a row of a histogram's results; the operator's `per` is an index into this.
PER = ("channel", "layer", "sample")
_CHANNEL, _LAYER, _SAMPLE = range(3)

# Counters for what no bin holds: underflow, overflow, NaN, +Inf, −Inf.
_OUTSIDE = 5
# Columns of the moments [K, 7], in the order of the fields of `Moments`: the low parts are what float64 rounds off.
COUNT, MEAN, M2, MEAN_LOW, M2_LOW, MINIMUM, MAXIMUM = range(7)
MOMENTS = 7
# Elements of a histogram's input that are turned into float64 at a time: bounds the memory to some megabytes.
_CHUNK_ELEMENTS = 1 << 18

# The bfloat16 codes: magnitudes in [2^-24, 2^16), and the bits of the first of them.
CODES_PER_SIGN = 40 * 128
FIRST_CODE = (127 - 24) * 128


def histogram(
    x: Sequence[Tensor], grid: Tensor | None, bins: int, per: int, statistics: bool, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Histograms and moments, by the bin rule of `lambda_kernels.ops.histogram.function` in the same float64 operations.

    Args:
        x: Tensors [outer, rows, columns] of one floating-point dtype and device, any strides.
        grid: float64 [K, 4] = (anchor, inv_width, first, closed_hi); the arithmetic runs on its device. None: bfloat16
            codes if `bins` is not 0.
        bins: Bins per row; 0: no counts.
        per: Index into `PER`. Rows are the columns of each tensor, or the tensors, or the `outer` of each tensor.
        statistics: Whether moments are wanted.
        row_mask: bool [K]: the rows to work on, the others stay empty; None: all.

    Returns:
        counts, int64 [K, bins]; outside, int64 [K, 5]: underflow, overflow, NaN, +Inf, −Inf, of which the first two
        stay 0 without bins; moments, float64 [K, 7], or [0, 7]: the finite values' number, mean and
        Σ (x − mean)², what float64 rounds off these two, minimum and maximum.
    """
    if grid is not None:
        device = grid.device
    else:
        device = torch.device("cpu") if x[0].device.type == "mps" else x[0].device  # Apple's GPUs have no float64
    tables, moments, row = [], [], 0
    for tensor in x:
        targets = (tensor.shape[2], 1, tensor.shape[0])[per]
        table = torch.zeros(targets, bins + _OUTSIDE + 1, dtype=torch.int64, device=device)
        total = no_moments(targets, device)
        for first, values in _chunks(tensor, per):
            here = slice(first, first + values.shape[0])
            values = values.to(device)
            if bins and grid is None:
                counter = _counter_of_code(values)
            else:
                rows = None if grid is None else grid[row + first : row + first + values.shape[0]]
                counter = counter_of(values.double(), rows, bins)
            table[here].scatter_add_(1, counter, torch.ones_like(counter))
            if statistics:
                total[here] = merge_moments(total[here], _moments_of(values.double()))
        tables.append(table)
        moments.append(total)
        row += targets
    table, joined = torch.cat(tables), torch.cat(moments)
    if row_mask is not None:
        table = table * row_mask.to(device)[:, None]
        joined = torch.where(row_mask.to(device)[:, None], joined, no_moments(row, device))
    outside = table[:, bins : bins + _OUTSIDE].contiguous()
    return table[:, :bins].contiguous(), outside, joined if statistics else joined[:0]


def _chunks(x: Tensor, per: int) -> Iterator[tuple[int, Tensor]]:
    """The first row of the results, and values [rows of the results, n] that belong there."""
    if x.numel() == 0:
        return
    outer, rows, columns = x.shape
    width = min(columns, _CHUNK_ELEMENTS)
    height = min(rows, max(1, _CHUNK_ELEMENTS // width))
    depth = min(outer, max(1, _CHUNK_ELEMENTS // (width * height)))
    for o in range(0, outer, depth):
        for r in range(0, rows, height):
            for c in range(0, columns, width):
                block = x[o : o + depth, r : r + height, c : c + width]
                if per == _CHANNEL:
                    yield c, block.permute(2, 0, 1).reshape(block.shape[2], -1)
                elif per == _LAYER:
                    yield 0, block.reshape(1, -1)
                else:
                    yield o, block.reshape(block.shape[0], -1)


def counter_of(value: Tensor, grid: Tensor | None, bins: int) -> Tensor:
    """The rule: the counter of each float64 value [K, n] on the grid [K, 4].

    Returns:
        int64 [K, n]: in [0, bins) a bin, then the five of `histogram`'s outside, then what is counted nowhere.
    """
    if bins == 0:
        counter = torch.full_like(value, _OUTSIDE)
    else:
        anchor, inv_width, first, closed_hi = (column.unsqueeze(1) for column in grid.unbind(1))
        counter = (value - anchor).mul_(inv_width).floor_().sub_(first)
        underflow = ~(counter >= 0)
        overflow = (counter >= bins) & ~(value <= closed_hi)
        counter.clamp_(max=bins - 1)  # a value on the closed upper edge
        counter.masked_fill_(underflow, bins).masked_fill_(overflow, bins + 1)
    for kind, mask in enumerate((value.isnan(), value == math.inf, value == -math.inf), start=2):
        counter.masked_fill_(mask, bins + kind)
    return counter.long()


def _counter_of_code(value: Tensor) -> Tensor:
    """The counter of each bfloat16 by its bits."""
    bits = value.view(torch.int16).long() & 0xFFFF
    magnitude, negative = bits & 0x7FFF, bits > 0x8000
    codes = 2 * CODES_PER_SIGN
    code = magnitude - FIRST_CODE
    counter = code.clamp_min(0) + negative * CODES_PER_SIGN
    counter = torch.where(code >= CODES_PER_SIGN, codes + (~negative).long(), counter)
    counter = torch.where(magnitude == 0x7F80, codes + 3 + negative.long(), counter)
    return torch.where(magnitude > 0x7F80, codes + 2, counter)


def no_moments(rows: int, device: torch.device | str) -> Tensor:
    """Return the moments of no values."""
    moments = torch.zeros(rows, MOMENTS, dtype=torch.float64, device=device)
    moments[:, MINIMUM:] = math.nan
    return moments


def _moments_of(value: Tensor) -> Tensor:
    """float64 [K, n] to [K, 7], in two passes: the second is over distances from the mean."""
    finite = value.isfinite()
    count = finite.sum(1).double()
    low = value.masked_fill(~finite, math.inf).amin(1)
    high = value.masked_fill(~finite, -math.inf).amax(1)
    # Counted from the smallest, so that equal values have a spread of exactly 0.
    shift = low.masked_fill(count == 0, 0.0)
    distance = (value - shift[:, None]).masked_fill_(~finite, 0.0)
    mean = distance.sum(1) / count.clamp_min(1.0)
    m2 = (distance - mean[:, None]).masked_fill_(~finite, 0.0).square_().sum(1)
    low, high = (edge.masked_fill(count == 0, math.nan) for edge in (low, high))
    zero = torch.zeros_like(shift)
    mean, mean_low = _added(shift, zero, mean)
    return torch.stack((count, mean, m2, mean_low, zero, low, high), dim=1)


def merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """The moments [K, 7] of two parts together (Chan, Golub, LeVeque 1979, equation 2.1b for unequal parts).

    The mean takes a step from that of the larger part. The step is rounded in proportion to itself, and mean and M2 are
    kept in two float64 each, so that what is lost grows neither with the mean nor with the number of parts.
    """
    a_is_larger = (a[:, COUNT] >= b[:, COUNT])[:, None]
    a, b = torch.where(a_is_larger, a, b), torch.where(a_is_larger, b, a)
    count = a[:, COUNT] + b[:, COUNT]
    part = b[:, COUNT] / count.clamp_min(1.0)
    difference = (b[:, MEAN] - a[:, MEAN]) + (b[:, MEAN_LOW] - a[:, MEAN_LOW])
    step = difference * part
    gain = b[:, M2] + difference * (difference * (a[:, COUNT] * part))
    mean_and_m2, low = a[:, MEAN : M2 + 1], a[:, MEAN_LOW : M2_LOW + 1].clone()
    low[:, 1] += b[:, M2_LOW]
    high, low = _added(mean_and_m2, low, torch.stack((step, gain), dim=1))
    edges = torch.fmin(a[:, MINIMUM], b[:, MINIMUM]), torch.fmax(a[:, MAXIMUM], b[:, MAXIMUM])
    return torch.cat((count[:, None], high, low, torch.stack(edges, dim=1)), dim=1)


def _added(high: Tensor, low: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """`high + low + by` in two float64; the rounding error of a sum is known exactly (Knuth's TwoSum)."""
    total = high + by
    added = total - high
    rest = (high - (total - added)) + (by - added) + low
    rest = rest.masked_fill(~total.isfinite(), 0.0)
    high = total + rest
    return high, rest.sub_((high - total).nan_to_num_(0.0))
