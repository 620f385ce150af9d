"""Batched histograms: one per channel of `x` [N, C], with integer counts that are the same on every device.

A value's bin is `floor((value − anchor) · inv_width) − first`, in float64, with one rounding per operation; a channel's
four numbers make up its row of the grid. Two kinds of grid are made here:

- fixed edges (`uniform_grid`): `bins` equal bins on [lo, hi], the last one closed, as numpy has them;
- dyadic (`dyadic_grid`): bins of width 2^k anchored at 0. These grids nest, so when the range of the data grows,
  neighbouring bins merge (`regrid`) and the counts are those that the final grid would have given from the start,
  however the data was split and in whatever order it came.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _extension
from .. import reference as twin
from ..errors import BackendUnavailableError
from .checks import FLOATING, check_choice, check_same_device, check_tensor

BACKENDS = ("auto", "extension", "torch")
MAX_BINS = 65536

# The dyadic grid. Bin indices stay below 2^41, exact in float64 and int64; 2^-149 is the finest step of float32.
_INDEX_BITS = 40
_FINEST_EXPONENT = -149
# Beyond this a float64 times a power of two may leave the normal numbers, and grids would no longer nest.
_LARGEST_MAGNITUDE = 2.0**500

_CHUNK_ELEMENTS = 1 << 22


class HistogramFallbackWarning(RuntimeWarning):
    """Histograms are counted by plain PyTorch, more slowly, because the extension cannot serve this device."""


@dataclass(frozen=True)
class Grid:
    """The bins of each channel.

    Attributes:
        anchor: float64 [C], in units of the values: where bins are counted from.
        inv_width: float64 [C]: bins per unit.
        first: float64 [C], whole numbers: index, from the anchor, of the first bin that is kept.
        closed_hi: float64 [C]: the last bin's upper edge where that edge belongs to the bin; NaN where it does not.
        bins: Bins per channel, 1 to 65536.

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
        _check_bins(self.bins)
        tensors = {name: getattr(self, name) for name in ("anchor", "inv_width", "first", "closed_hi")}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float64:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a float64 tensor; got {got}")
            if tensor.dim() != 1 or tensor.shape != self.anchor.shape:
                shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in tensors.items() if isinstance(t, Tensor))
                raise ValueError(f"the tensors of a grid must all have one shape [C]; got {shapes}")
        check_same_device(tensors)

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.anchor.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.anchor.device

    @property
    def width(self) -> Tensor:
        """Bin width of each channel, float64 [C], in units of the values."""
        return 1.0 / self.inv_width

    def packed(self) -> Tensor:
        """The grid as the operator takes it: float64 [C, 4]."""
        return torch.stack((self.anchor, self.inv_width, self.first, self.closed_hi), dim=1)


@dataclass(frozen=True)
class Histogram:
    """The counts of one call.

    Attributes:
        counts: int64 [C, bins].
        outside: int64 [C, 5]: values under the first bin, beyond the last one, NaN, +Inf, −Inf.
        backend: What ran: "extension" or "torch".
        reason: Why that one.
    """

    counts: Tensor
    outside: Tensor
    backend: str
    reason: str


def uniform_grid(
    lo: float | Tensor, hi: float | Tensor, bins: int, *, channels: int = 1, device: torch.device | str | None = None
) -> Grid:
    """Equal bins on [lo, hi], both ends included, as in numpy.

    Args:
        lo: Lower edge: a number for all channels, or a tensor [C].
        hi: Upper edge, likewise. Where it equals `lo`, the range is widened by 0.5 on both sides, as numpy does.
        bins: Bins per channel, 1 to 65536.
        channels: C, where both edges are numbers.
        device: Where the grid is to be; None: where the edges are, or the CPU.

    Raises:
        TypeError: `bins` is not an int.
        ValueError: An edge is not finite, `lo` is above `hi`, the bins are too narrow for float64, or the shapes differ.
    """
    _check_bins(bins)
    edges = {"lo": lo, "hi": hi}
    given = {name: edge for name, edge in edges.items() if isinstance(edge, Tensor)}
    if given:
        check_same_device(given)
        channels = next(iter(given.values())).numel()
    for name, edge in given.items():
        if edge.dim() > 1 or edge.numel() != channels:
            raise ValueError(f"{name} must be a number or a tensor [C = {channels}]; got shape {list(edge.shape)}")
    if device is None and given:
        device = next(iter(given.values())).device
    lo, hi = (
        torch.as_tensor(edge, dtype=torch.float64, device=device).reshape(-1).expand(channels) for edge in (lo, hi)
    )

    same = lo == hi
    lo, hi = torch.where(same, lo - 0.5, lo), torch.where(same, hi + 0.5, hi)
    inv_width = bins / (hi - lo)
    wrong = ~((lo < hi) & inv_width.isfinite() & (inv_width > 0))
    if wrong.any():
        channel = int(wrong.nonzero()[0])
        raise ValueError(
            f"lo must be below hi, both finite and far enough apart for {bins} bins; got lo={lo[channel].item()}, "
            f"hi={hi[channel].item()} in channel {channel}"
        )
    return Grid(lo, inv_width, torch.zeros_like(lo), hi, bins)


def dyadic_grid(minimum: Tensor, maximum: Tensor, bins: int) -> Grid:
    """The finest bins of width 2^k, anchored at 0, that hold [minimum, maximum] in `bins` bins.

    A wider range never gives finer bins, which is what `regrid` needs. No value is looked at, so no device is waited
    for: NaN (a channel without finite values) counts as 0, and what lies beyond ±2^500 is left outside.

    Args:
        minimum: float64 [C], as `extrema` returns it.
        maximum: float64 [C], nowhere below `minimum`.
        bins: Bins per channel, 2 to 65536: values of both signs need a bin on either side of 0.

    Raises:
        TypeError: A tensor is not float64, or `bins` is not an int.
        ValueError: The shapes or devices differ, or `bins` is out of range.
    """
    _check_bins(bins, at_least=2)
    edges = {"minimum": minimum, "maximum": maximum}
    for name, edge in edges.items():
        if edge.dtype != torch.float64:
            raise TypeError(f"{name} must be float64; got {edge.dtype}")
        if edge.dim() != 1 or edge.shape != minimum.shape:
            shapes = [list(e.shape) for e in edges.values()]
            raise ValueError(f"minimum and maximum must have one shape [C]; got {shapes}")
    check_same_device(edges)
    minimum, maximum = (
        torch.nan_to_num(edge, nan=0.0).clamp(-_LARGEST_MAGNITUDE, _LARGEST_MAGNITUDE) for edge in (minimum, maximum)
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
    return Grid(zero, inv_width, (minimum * inv_width).floor(), torch.full_like(zero, math.nan), bins)


def _power_of_two(exponent: Tensor) -> Tensor:
    # Built from bits: pow() is not exact on every device.
    return ((exponent + 1023) << 52).view(torch.float64)


def regrid(counts: Tensor, old: Grid, new: Grid) -> Tensor:
    """Carry the counts of a dyadic grid over to a coarser one that covers it: exact, since whole bins merge.

    Args:
        counts: int64 [C, old.bins].
        old: The grid of `counts`, from `dyadic_grid`.
        new: A grid from `dyadic_grid` for a range that includes the old one.

    Returns:
        int64 [C, new.bins].

    Raises:
        ValueError: A grid is not dyadic, `new` is finer than `old` or does not cover its counts, or the shapes differ.
    """
    if counts.shape != (old.channels, old.bins) or old.channels != new.channels:
        raise ValueError(
            f"counts must be [C, bins] for both grids; got {list(counts.shape)} for [{old.channels}, {old.bins}] and "
            f"[{new.channels}, {new.bins}]"
        )
    mantissas, exponents = zip(*(torch.frexp(grid.inv_width) for grid in (old, new)), strict=True)
    shift = (exponents[0] - exponents[1]).long()
    dyadic = torch.stack([(m == 0.5) & (g.anchor == 0) for m, g in zip(mantissas, (old, new), strict=True)]).all(0)

    index = old.first.long()[:, None] + torch.arange(old.bins, device=counts.device)
    target = (index >> shift.clamp(0, 62)[:, None]) - new.first.long()[:, None]
    held = (target >= 0) & (target < new.bins)
    lost = (counts != 0) & ~held
    if bool((~dyadic | (shift < 0)).any() | lost.any()):
        channel = int((~dyadic | (shift < 0) | lost.any(1)).nonzero()[0])
        raise ValueError(
            f"regrid needs two dyadic grids, the new one no finer and holding every counted bin; channel {channel} has "
            f"bin widths {old.width[channel].item()} and {new.width[channel].item()}"
        )
    merged = counts.new_zeros(new.channels, new.bins)
    return merged.scatter_add_(1, target.clamp(0, new.bins - 1), counts * held)


def extrema(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest finite value of each channel.

    Args:
        x: [N, C], any strides.

    Returns:
        Two float64 tensors [C]; NaN for a channel that has no finite value. Combine those of several batches with
        `torch.fmin` and `torch.fmax`, which pass over NaN.

    Raises:
        TypeError, ValueError: `x` is not a two-dimensional floating-point tensor.
    """
    _check_input(x)
    channels = x.shape[1]
    low = x.new_full((channels,), math.inf)
    high = x.new_full((channels,), -math.inf)
    for chunk in x.detach().split(max(1, _CHUNK_ELEMENTS // max(1, channels))):
        if chunk.numel():
            finite = chunk.isfinite()
            low = torch.minimum(low, chunk.masked_fill(~finite, math.inf).amin(0))
            high = torch.maximum(high, chunk.masked_fill(~finite, -math.inf).amax(0))
    low, high = (_float64(edge) for edge in (low, high))
    return low.masked_fill(low.isinf(), math.nan), high.masked_fill(high.isinf(), math.nan)


def _float64(x: Tensor) -> Tensor:
    return x.cpu().double() if x.device.type == "mps" else x.double()  # Apple's GPUs have no float64


def histogram_backend(device: torch.device | str, dtype: torch.dtype, backend: str = "auto") -> tuple[str, str]:
    """Choose what counts, without counting.

    Args:
        device: Of the values.
        dtype: Of the values.
        backend: "auto", "extension" or "torch".

    Returns:
        "extension" or "torch", and the reason for it.

    Raises:
        ValueError: There is no such backend.
        BackendUnavailableError: "extension" was asked for by name and has no code for `device` and `dtype`.
        ExtensionUnavailableError: "extension" was asked for by name and cannot be loaded.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return "torch", 'backend="torch" was asked for'
    if backend == "extension":
        _extension.load()
    obstacle = _extension_obstacle(torch.device(device), dtype)
    if obstacle is None:
        info = _extension.build_info()
        return "extension", f"the extension has code for {torch.device(device).type} (CUDA: {info['cuda']})"
    if backend == "extension":
        raise BackendUnavailableError(f'backend="extension" cannot run here: {obstacle}')
    return "torch", obstacle


def _extension_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in FLOATING:
        return f"the extension has no code for {dtype}"
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip):
        return f"the extension has no code for {'ROCm' if device.type == 'cuda' else device.type}"
    reason = _extension.why_unavailable()
    if reason or device.type == "cpu":
        return reason
    info = _extension.build_info()
    if info["cuda"] == "none":
        return "the extension was built without CUDA code; rebuild it with a CUDA toolkit and LAMBDA_KERNELS_CUDA=1"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if not _architectures_cover(info["architectures"], capability):
            major, minor = capability
            return (
                f"the extension was built for architectures {info['architectures']}, not for {major}.{minor}; rebuild it "
                f'with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
            )
    return None


def _architectures_cover(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures`, as in TORCH_CUDA_ARCH_LIST, runs on a device of `capability`."""
    for architecture in filter(None, architectures.split(";")):
        number, _, ptx = architecture.partition("+")
        major, _, minor = number.partition(".")
        if not (major.isdecimal() and minor.isdecimal()):
            # "9.0a" runs on nothing else, and a family's name ("Hopper") is not resolved here: the launch will tell.
            if number.rstrip("af") == f"{capability[0]}.{capability[1]}" or number.isalpha():
                return True
            continue
        built = (int(major), int(minor))
        if built <= capability and (built[0] == capability[0] or ptx):
            return True
    return False


def histogram(x: Tensor, grid: Grid, *, backend: str = "auto") -> Histogram:
    """One histogram per channel of `x`. Deterministic; the counts do not depend on the backend or the device.

    Args:
        x: [N, C], float32, bfloat16, float16 or float64, any strides; it is not copied. N may be 0.
        grid: The bins of the C channels, on the device of `x` (for "mps", which has no float64: on the CPU).
        backend: "extension" (C++ or CUDA), "torch", or "auto": the extension where it can run, else PyTorch with one
            notice per process.

    Returns:
        The counts, on the device of `grid`.

    Raises:
        TypeError: `x` or `grid` has the wrong type or dtype.
        ValueError: The shapes or devices do not fit.
        BackendUnavailableError: The backend asked for by name has no code for `x`.
        ExtensionUnavailableError: The extension was asked for by name and cannot be loaded.
    """
    _check_input(x)
    if not isinstance(grid, Grid):
        raise TypeError(f"grid must be a Grid; got {type(grid).__name__}")
    if grid.channels != x.shape[1]:
        raise ValueError(f"grid has {grid.channels} channels, x of shape {list(x.shape)} has {x.shape[1]}")
    if not (x.device.type == "mps" and grid.device.type == "cpu"):
        check_same_device({"x": x, "grid": grid.anchor})
    name, reason = histogram_backend(x.device, x.dtype, backend)
    if name == "extension":
        counts, outside = torch.ops.lambda_kernels.histogram(x.detach(), grid.packed(), grid.bins)
    else:
        if backend == "auto":
            _notice(reason)
        counts, outside = twin.histogram(x.detach(), grid.packed(), grid.bins)
    return Histogram(counts, outside, name, reason)


_noticed = False


def _notice(reason: str) -> None:
    global _noticed
    if not _noticed:
        _noticed = True
        warnings.warn(f"histograms are counted by plain PyTorch: {reason}", HistogramFallbackWarning, stacklevel=3)


def _check_bins(bins: int, at_least: int = 1) -> None:
    if isinstance(bins, bool) or not isinstance(bins, int):
        raise TypeError(f"bins must be an int; got {type(bins).__name__}")
    if not at_least <= bins <= MAX_BINS:
        raise ValueError(f"bins must be in [{at_least}, {MAX_BINS}]; got {bins}")


def _check_input(x: Tensor) -> None:
    check_tensor("x", x)
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor; got layout {x.layout}")
    if x.dim() != 2:
        raise ValueError(f"x must have 2 dimensions [N, C]; got shape {list(x.shape)}")
