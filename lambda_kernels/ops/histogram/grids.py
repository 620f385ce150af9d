"""Where the bins of a histogram are: a row of numbers per histogram, and how counts move from one grid to another.

A value's bin is `floor((value − anchor) · inv_width) − first`, in float64, with one rounding per operation; a row of the
grid holds these numbers. Three kinds of grid are made here:

- fixed edges (`uniform_grid`): equal bins on [lo, hi], the last one closed, as numpy has them;
- dyadic (`dyadic_grid`): bins of width 2^k anchored at 0. These grids nest, so when the range of the data grows,
  neighbouring bins merge (`regrid`) and the counts are those that the final grid would have given from the start,
  however the data was split and in whatever order it came;
- bfloat16 codes (`bfloat16_codes`): a counter for every value of the dtype, from which any later binning follows
  (`regrid_codes`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..checks import check_same_device, require_int
from . import reference

MAX_BINS = 65536

# The dyadic grid. Bins are no finer than 2^-23 of the largest magnitude, so that indices, the unused bins of a centred
# grid included, stay below 2^24: they and all arithmetic on float32 values are then exact in float32 as well. A product
# with 2^126, the inverse of the finest width, is one with a normal float32.
_INDEX_BITS = 22
_FINEST_EXPONENT = -126
FINEST_WIDTH = 2.0**_FINEST_EXPONENT
_EXACT_INDEX = 2.0**24
# Beyond this a float64 times a power of two may leave the normal numbers, and grids would no longer nest.
LARGEST_MAGNITUDE = 2.0**500

# Rows of code counts that are binned again at a time.
_ROWS = 64


@dataclass(frozen=True)
class Grid:
    """The bins of K histograms: of each channel, layer or sample.

    Attributes:
        anchor: float64 [K], in units of the values: where bins are counted from.
        inv_width: float64 [K]: bins per unit.
        first: float64 [K], whole numbers: index, from the anchor, of the first bin that is kept.
        closed_hi: float64 [K]: the last bin's upper edge where that edge belongs to the bin; NaN where it does not.
        bins: Bins per row, 1 to 65536.

    Raises:
        TypeError: A tensor is not float64, or `bins` is not an int.
        ValueError: The shapes or devices differ, or `bins` is out of range.
    """

    anchor: Tensor
    inv_width: Tensor
    first: Tensor
    closed_hi: Tensor
    bins: int

    def __post_init__(self) -> None:
        check_bins(self.bins)
        tensors = {name: getattr(self, name) for name in ("anchor", "inv_width", "first", "closed_hi")}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float64:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a float64 tensor; got {got}")
            if tensor.dim() != 1 or tensor.shape != self.anchor.shape:
                shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in tensors.items() if isinstance(t, Tensor))
                raise ValueError(f"the tensors of a grid must all have one shape [K]; got {shapes}")
        check_same_device(tensors)

    @classmethod
    def unpack(cls, packed: Tensor, bins: int) -> Grid:
        """From `packed`."""
        anchor, inv_width, first, closed_hi = packed.unbind(1)
        return cls(anchor, inv_width, first, closed_hi, bins)

    @property
    def channels(self) -> int:
        """Number of rows K."""
        return self.anchor.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.anchor.device

    @property
    def width(self) -> Tensor:
        """Bin width of each row, float64 [K], in units of the values."""
        return 1.0 / self.inv_width

    def packed(self) -> Tensor:
        """The grid as the operator takes it: float64 [K, 4], outside any autograd graph."""
        return torch.stack((self.anchor, self.inv_width, self.first, self.closed_hi), dim=1).detach()


@dataclass(frozen=True)
class CodeGrid:
    """A counter for every bfloat16 with a magnitude in [2^-24, 2^16), in order of sign and magnitude.

    The positive ones come first. The first counter of either sign also holds all smaller magnitudes, that of the
    positive ones both zeros as well.
    """

    bins = 2 * reference.CODES_PER_SIGN

    def values(self, device: torch.device | str | None = None) -> Tensor:
        """float64 [bins]: the value of each counter; 0 and −2^-24 for the two that hold several."""
        magnitude = self._magnitudes(device)
        values = torch.cat((magnitude, -magnitude))
        values[0] = 0.0
        return values

    def widths(self, device: torch.device | str | None = None) -> Tensor:
        """float64 [bins]: how many units of value belong to each counter, the distance to the next one."""
        magnitude = self._magnitudes(device)
        # The last one lies in the same power of two as the one before.
        widths = torch.cat((magnitude.diff(), magnitude[-1:] - magnitude[-2:-1]))
        widths[0] += magnitude[0]
        return widths.repeat(2)

    def _magnitudes(self, device: torch.device | str | None) -> Tensor:
        bits = torch.arange(
            reference.FIRST_CODE, reference.FIRST_CODE + reference.CODES_PER_SIGN, dtype=torch.int32, device=device
        )
        return (bits << 16).view(torch.float32).double()


def bfloat16_codes() -> CodeGrid:
    """The grid of all bfloat16 values: one read gives counts from which any later binning follows."""
    return CodeGrid()


def check_bins(bins: int, at_least: int = 1) -> None:
    """Raise unless `bins` is an int that a histogram can have."""
    require_int("bins", bins, at_least, MAX_BINS, wrong_type=TypeError, strict=True)


def uniform_grid(
    lo: float | Tensor, hi: float | Tensor, bins: int, *, channels: int = 1, device: torch.device | str | None = None
) -> Grid:
    """Equal bins on [lo, hi], both ends included, as in numpy.

    Where the width is a power of two and `lo` a multiple of it, below 2^24 times, the bins are counted from 0, which
    makes every operation of the rule exact.

    Args:
        lo: Lower edge: a number for all rows, or a tensor [K].
        hi: Upper edge, likewise. Where it equals `lo`, the range is widened by 0.5 on both sides, as numpy does, and by
            more where that would be lost in rounding.
        bins: Bins per row, 1 to 65536.
        channels: K, a whole number from 0, where both edges are numbers.
        device: Where the grid is to be; None: where the edges are, or the CPU.

    Returns:
        The grid: `bins` bins for each of `channels` rows, or for each row of the edges.

    Raises:
        TypeError: `bins` or `channels` is not an int, or an edge neither a number nor a tensor.
        ValueError: An edge is not finite, `lo` is above `hi`, the bins are too narrow for float64, or the shapes differ.
    """
    check_bins(bins)
    edges = {"lo": lo, "hi": hi}
    given = {name: edge.detach() for name, edge in edges.items() if isinstance(edge, Tensor)}
    for name, edge in edges.items():
        if name not in given and not isinstance(edge, Real):
            raise TypeError(f"{name} must be a number or a tensor; got {type(edge).__name__}")
    require_int("channels", channels, 0, wrong_type=TypeError, strict=True)
    if given:
        check_same_device(given)
        channels = next(iter(given.values())).numel()
    for name, edge in given.items():
        if edge.dim() > 1 or edge.numel() != channels:
            raise ValueError(f"{name} must be a number or a tensor [K = {channels}]; got shape {list(edge.shape)}")
    if device is None and given:
        device = next(iter(given.values())).device
    lo, hi = (
        torch.as_tensor(given.get(name, edge), dtype=torch.float64, device=device).reshape(-1).expand(channels)
        for name, edge in edges.items()
    )

    widening = torch.where(lo == hi, (lo.abs() * 2.0**-50).clamp_min(0.5), 0.0)
    lo, hi = lo - widening, hi + widening
    inv_width = bins / (hi - lo)
    wrong = ~((lo < hi) & inv_width.isfinite() & (inv_width > 0))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"lo must be below hi, both finite and far enough apart for {bins} bins; got lo={lo[row].item()}, "
            f"hi={hi[row].item()} in row {row}"
        )
    first = lo * inv_width
    exact = (torch.frexp(inv_width)[0] == 0.5) & (first == first.floor()) & (first.abs() < _EXACT_INDEX)
    zero = torch.zeros_like(lo)
    return Grid(torch.where(exact, zero, lo), inv_width, torch.where(exact, first, zero) + 0.0, hi, bins)


def dyadic_grid(minimum: Tensor, maximum: Tensor, bins: int, *, centred: bool = False) -> Grid:
    """The finest bins of width 2^k, anchored at 0, that hold [minimum, maximum] in `bins` bins.

    A wider range never gives finer bins, which is what `regrid` needs. Bins are never finer than 2^-126, nor than 2^-23
    of the largest magnitude. No value is looked at, so no device is waited for: NaN (a row without finite values) counts
    as 0, and what lies beyond ±2^500 is left outside.

    Args:
        minimum: float64 [K], as `extrema` returns it.
        maximum: float64 [K], nowhere below `minimum`.
        bins: Bins per row, 2 to 65536: values of both signs need a bin on either side of 0.
        centred: Put half of the unused bins below the data, so that a range that grows seldom needs another grid. Else
            the first bin is that of `minimum`, and the grid depends on nothing but the arguments.

    Raises:
        TypeError: A tensor is not float64, or `bins` is not an int.
        ValueError: The shapes or devices differ, or `bins` is out of range.
    """
    check_bins(bins, at_least=2)
    edges = {"minimum": minimum, "maximum": maximum}
    for name, edge in edges.items():
        if not isinstance(edge, Tensor) or edge.dtype != torch.float64:
            got = edge.dtype if isinstance(edge, Tensor) else type(edge).__name__
            raise TypeError(f"{name} must be a float64 tensor; got {got}")
        if edge.dim() != 1 or edge.shape != minimum.shape:
            shapes = [list(e.shape) for e in edges.values() if isinstance(e, Tensor)]
            raise ValueError(f"minimum and maximum must have one shape [K]; got {shapes}")
    check_same_device(edges)
    minimum, maximum = (
        torch.nan_to_num(edge.detach(), nan=0.0).clamp(-LARGEST_MAGNITUDE, LARGEST_MAGNITUDE)
        for edge in (minimum, maximum)
    )
    # 2^(e−1) ≤ value < 2^e for frexp's exponent e.
    magnitude = torch.maximum(minimum.abs(), maximum.abs())
    finest = (torch.frexp(magnitude)[1].long() - 1 - _INDEX_BITS).clamp_min(_FINEST_EXPONENT)
    finest = torch.where(magnitude == 0, _FINEST_EXPONENT, finest)
    # A range r covers more than r/2^k bins and at most r/2^k + 2 of them, and at most two if r < 2^k. So the k that is
    # wanted is one of four neighbours; one more below makes up for the rounding of the difference.
    spread = maximum - minimum
    lowest = torch.frexp(spread)[1].long() - bins.bit_length() - 1
    lowest = torch.where(spread == 0, _FINEST_EXPONENT - 3, lowest)  # one value: as fine as its magnitude allows
    exponent = torch.maximum(lowest + 3, finest)
    for step in (2, 1, 0):
        candidate = torch.maximum(lowest + step, finest)
        scale = _power_of_two(-candidate)
        covered = (maximum * scale).floor() - (minimum * scale).floor() + 1
        exponent = torch.where(covered <= bins, candidate, exponent)
    inv_width = _power_of_two(-exponent)
    zero = torch.zeros_like(inv_width)
    first = (minimum * inv_width).floor() + 0.0  # never −0
    if centred:
        covered = (maximum * inv_width).floor() - first + 1
        first = first - ((bins - covered) / 2).floor()
    return Grid(zero, inv_width, first, torch.full_like(zero, math.nan), bins)


def _power_of_two(exponent: Tensor) -> Tensor:
    # Built from bits: pow() is not exact on every device.
    return ((exponent + 1023) << 52).view(torch.float64)


def regrid(counts: Tensor, old: Grid, new: Grid) -> Tensor:
    """Carry the counts of a dyadic grid over to a coarser one that covers it: exact, since whole bins merge.

    Args:
        counts: int64 [K, old.bins].
        old: The grid of `counts`, from `dyadic_grid`.
        new: A grid from `dyadic_grid` for a range that includes the old one.

    Returns:
        int64 [K, new.bins].

    Raises:
        ValueError: A grid is not dyadic, `new` is finer than `old` or does not cover its counts, or the shapes differ.
    """
    if counts.shape != (old.channels, old.bins) or old.channels != new.channels:
        raise ValueError(
            f"counts must be [K, bins] for both grids; got {list(counts.shape)} for [{old.channels}, {old.bins}] and "
            f"[{new.channels}, {new.bins}]"
        )
    dyadic = torch.stack([(torch.frexp(g.inv_width)[0] == 0.5) & (g.anchor == 0) for g in (old, new)]).all(0)
    merged = regrid_unchecked(counts, old, new)
    lost = merged.sum(1) != counts.sum(1)
    wrong = ~dyadic | (_coarser_by(old, new) < 0) | lost
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"regrid needs two dyadic grids, the new one no finer and holding every counted bin; row {row} has bin widths "
            f"{old.width[row].item()} and {new.width[row].item()}"
        )
    return merged


def regrid_unchecked(counts: Tensor, old: Grid, new: Grid) -> Tensor:
    """`regrid` for grids that are known to fit: looks at no value, so that no device is waited for."""
    shift = _coarser_by(old, new).clamp(0, 62)[:, None]
    index = old.first.long()[:, None] + torch.arange(old.bins, device=counts.device)
    target = (index >> shift) - new.first.long()[:, None]
    held = (target >= 0) & (target < new.bins)
    merged = counts.new_zeros(new.channels, new.bins)
    return merged.scatter_add_(1, target.clamp(0, new.bins - 1), counts * held)


def _coarser_by(old: Grid, new: Grid) -> Tensor:
    return (torch.frexp(old.inv_width)[1] - torch.frexp(new.inv_width)[1]).long()


def regrid_codes(counts: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Bin the counts of bfloat16 codes, as if the values had been counted on `grid` at once.

    Exact for dyadic bins of width 2^-23 or more. Elsewhere the magnitudes up to 2^-24, which share a counter for each
    sign, are taken as 0 and −2^-24.

    Args:
        counts: int64 [K, 10240], counted on `bfloat16_codes()`.
        grid: K rows, on the device of `counts`.

    Returns:
        counts, int64 [K, grid.bins], and int64 [K, 2]: values under the first bin, and beyond the last one.

    Raises:
        ValueError: The shapes or devices do not fit.
    """
    if counts.shape != (grid.channels, CodeGrid.bins):
        raise ValueError(f"counts must have shape [K = {grid.channels}, {CodeGrid.bins}]; got {list(counts.shape)}")
    check_same_device({"counts": counts, "grid": grid.anchor})
    values, packed = CodeGrid().values(counts.device), grid.packed()
    binned = counts.new_zeros(grid.channels, grid.bins + 2)
    for part in range(0, grid.channels, _ROWS):
        rows = slice(part, part + _ROWS)
        counter = reference.counter_of(values.expand(len(packed[rows]), -1), packed[rows], grid.bins)
        binned[rows].scatter_add_(1, counter, counts[rows])
    return binned[:, : grid.bins].contiguous(), binned[:, grid.bins :].contiguous()
