"""Streaming, mergeable entropy of activations: Gaussian per channel, and histograms.

Gaussian: channels are taken as independent normals, so up to a constant the entropy of a feature is Σ_j log σ_j with σ
over *all* samples (arXiv 2404.05657, section 3.2). Histogram: H = −Σ_b p_b log p_b over value bins.

Statistics are kept in float64 and merged by Chan's formula (Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise
algorithm for computing sample variances"), so that any split of the data over batches or processes gives the same result.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from .errors import NonFiniteActivationError
from .ops import histogram as ops
from .ops.checks import check_choice, check_tensor

KINDS = ("gaussian", "histogram")
PER = ("channel", "layer", "sample")

# A channel that never changes has log σ = −∞. One below this standard deviation is given it, counted and reported.
STD_FLOOR = 2.0**-24

# Rows that are turned into float64 at a time: bounds the memory of an update to a few tens of megabytes.
_CHUNK = 1 << 22


def gaussian_entropy(x: Tensor, *, dim: int = -1, base: float = 2, constant: bool = False) -> Tensor:
    """Entropy of each channel of `x` under the Gaussian assumption; `.sum()` is the paper's H.

    Args:
        x: Samples `[..., C]`, or with the channels at `dim`; at least two samples.
        dim: The channel dimension; all others are samples.
        base: Of the logarithm: 2 for bits, math.e for nats.
        constant: Add ½ log(2πe), which makes it the differential entropy of the normal.

    Returns:
        float64 `[C]`: log σ_j. σ is the sample standard deviation (n − 1).

    Raises:
        ValueError: Fewer than two samples, or every channel is constant.
        NonFiniteActivationError: `x` holds NaN or infinity.
    """
    meter = EntropyMeter("gaussian", base=base)
    meter.update(_channels_last(x, dim))
    return meter.compute(constant=constant)


def histogram_entropy(
    x: Tensor,
    *,
    dim: int = -1,
    bins: int = 256,
    range: tuple[float, float] | None = None,
    base: float = 2,
) -> Tensor:
    """Histogram entropy of each channel of `x`.

    Args:
        x: Samples `[..., C]`, or with the channels at `dim`.
        dim: The channel dimension; all others are samples.
        bins: Number of bins per channel.
        range: (low, high) edges for all channels; values outside are not counted. None is the dyadic grid: each channel's
            narrowest width 2^k for which its values fit in `bins` bins anchored at 0.
        base: Of the logarithm: 2 for bits, math.e for nats.

    Returns:
        float64 `[C]`: −Σ_b p_b log p_b.

    Raises:
        ValueError: Fewer than two samples, or wrong options.
        NonFiniteActivationError: `x` holds NaN or infinity.
    """
    meter = EntropyMeter("histogram", bins=bins, range=range, base=base)
    meter.update(_channels_last(x, dim))
    return meter.compute()


def _channels_last(x: Tensor, dim: int) -> Tensor:
    check_tensor("x", x)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is out of range for x of shape {list(x.shape)}")
    return x.movedim(dim, -1)


class EntropyMeter:
    """Entropy over any number of batches, in one pass and bounded memory.

    Args:
        kind: "gaussian" or "histogram".
        per: "channel": one entropy per channel of `[..., C]`. "layer": one over all values. "sample": one per sample of
            `[B, ...]`, in the order of the updates.
        bins: Of a histogram.
        range: (low, high) of a histogram with fixed edges; None for the dyadic grid, which grows with the data.
        base: Of the logarithm.
        name: What is measured, for messages.

    Raises:
        ValueError: An option is wrong.
    """

    def __init__(
        self,
        kind: str = "gaussian",
        *,
        per: str = "channel",
        bins: int = 256,
        range: tuple[float, float] | None = None,
        base: float = 2,
        name: str = "x",
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_choice("per", per, PER)
        least = 2 if range is None else 1  # the dyadic grid needs a bin on either side of 0
        if isinstance(bins, bool) or not isinstance(bins, int) or not least <= bins <= ops.MAX_BINS:
            raise ValueError(f"bins must be an integer from {least} to {ops.MAX_BINS}; got {bins!r}")
        if not (0 < base < math.inf and base != 1):
            raise ValueError(f"base must be positive, finite and not 1; got {base!r}")
        if range is not None and kind != "histogram":
            raise ValueError(f"range={range!r} belongs to kind='histogram'; got kind={kind!r}")
        if range is not None:
            low, high = (float(v) for v in range)
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"range must be finite with low < high; got {range!r}")
            range = (low, high)
        self.kind, self.per, self.bins, self.range, self.base, self.name = kind, per, bins, range, base, name
        self.updates = 0
        # One row per sample for per="sample", else a single state; see _Gaussian and _Histogram.
        self._parts: list[_Gaussian | _Histogram] = []

    def update(self, x: Tensor) -> EntropyMeter:
        """Add a batch. `x` is `[..., C]`, or `[B, ...]` for per="sample"; empty batches are allowed.

        Raises:
            TypeError: `x` is no floating-point tensor.
            ValueError: The number of channels changed.
            NonFiniteActivationError: NaN or infinity; names what was measured, the batch and the dtype.
        """
        check_tensor("x", x)
        if x.dim() == 0 or (x.dim() > 1 and x.shape[-1] == 0):
            raise ValueError(f"{self.name}: x must be [..., C] with at least one channel; got shape {list(x.shape)}")
        x = x.detach()
        if self.per == "sample":
            x = x.reshape(x.shape[0], -1).T
        elif self.per == "layer":
            x = x.reshape(-1, 1)
        else:
            x = x.reshape(-1, x.shape[-1])
        batch, self.updates = self.updates, self.updates + 1
        if x.numel() == 0:
            return self
        if x.device.type == "mps":  # Metal has no float64
            x = x.cpu()
        new = _Gaussian.of(x) if self.kind == "gaussian" else _Histogram.of(x, self.bins, self.range)
        if not new.finite:
            bad = int((~torch.isfinite(x)).sum())
            if bad == 0:
                raise ValueError(
                    f"{self.name}: values up to {float(x.abs().max()):g} are too large to take statistics of"
                )
            raise NonFiniteActivationError(
                f"{self.name}: {bad} of {x.numel()} values are NaN or infinite in batch {batch} "
                f"({str(x.dtype).removeprefix('torch.')}). "
                + ("Try bfloat16 or float32" if x.dtype == torch.float16 else "Check the weights and the input")
            )
        self._add(new)
        return self

    def _add(self, new: _Gaussian | _Histogram) -> None:
        if self.per == "sample" or not self._parts:
            self._parts.append(new)
            return
        if new.channels != self._parts[0].channels:
            raise ValueError(f"{self.name}: a batch with {new.channels} channels after {self._parts[0].channels}")
        self._parts[0] = self._parts[0].merge(new)

    def merge(self, other: EntropyMeter) -> EntropyMeter:
        """Add what another meter of the same options has seen.

        Raises:
            ValueError: The other meter measures something else.
        """
        if self._options() != other._options():
            raise ValueError(f"meters differ: {self._options()} and {other._options()}")
        for part in other._parts:
            self._add(part)
        self.updates += other.updates
        return self

    def all_reduce(self, group: object = None) -> EntropyMeter:
        """Merge the meters of all processes of `group`, in rank order, so that every rank ends with the same state."""
        import torch.distributed as dist

        states: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, self.state_dict(), group=group)
        device = self._parts[0].device if self._parts else None
        self.updates, self._parts = 0, []
        for state in states:
            other = EntropyMeter(**self._options(), name=self.name)
            other.load_state_dict(state, device=device)
            self.merge(other)
        return self

    @property
    def count(self) -> int:
        """Samples seen per channel; for per="sample", values per sample of the first batch."""
        return self._parts[0].count if self._parts else 0

    @property
    def channels(self) -> int:
        """How many entropies `compute` gives."""
        return sum(part.channels for part in self._parts)

    @property
    def constant_channels(self) -> int:
        """How many channels do not change (Gaussian: by less than `STD_FLOOR`, which they are given instead)."""
        return sum(int(part.constant().sum()) for part in self._parts)

    def compute(self, *, constant: bool = False, differential: bool = False) -> Tensor:
        """The entropies, float64: `[C]`, `[1]` for per="layer", `[samples]` for per="sample".

        Args:
            constant: Gaussian: add ½ log(2πe).
            differential: Histogram: add the logarithm of each channel's bin width, which makes entropies of different
                grids comparable (an estimate of the differential entropy).

        Raises:
            ValueError: Fewer than two samples, every channel is constant (Gaussian), or nothing fell inside `range`.
        """
        if self.count < 2:
            raise ValueError(f"{self.name}: an entropy needs at least two samples per channel; got {self.count}")
        if self.kind == "histogram":
            return torch.cat([part.entropy(self.base, differential, self.name) for part in self._parts])
        dead, channels = self.constant_channels, self.channels
        if dead == channels:
            raise ValueError(f"{self.name}: all {channels} channels are constant over {self.count} samples")
        if dead:
            warnings.warn(
                f"{self.name}: {dead} of {channels} channels are constant over {self.count} samples; their standard "
                f"deviation is taken as 2^{math.log2(STD_FLOOR):.0f}",
                stacklevel=2,
            )
        return torch.cat([part.entropy(self.base, constant) for part in self._parts])

    def _options(self) -> dict:
        return {name: getattr(self, name) for name in ("kind", "per", "bins", "range", "base")}

    def state_dict(self) -> dict:
        """Everything seen so far, as tensors on the CPU and plain values."""
        return {"options": self._options(), "updates": self.updates, "parts": [p.state() for p in self._parts]}

    def load_state_dict(self, state: dict, *, device: torch.device | str | None = None) -> None:
        """Replace what was seen by a `state_dict` of a meter with the same options.

        Raises:
            ValueError: The options differ.
        """
        if state["options"] != self._options():
            raise ValueError(f"the state belongs to {state['options']}, this meter is {self._options()}")
        cls = _Gaussian if self.kind == "gaussian" else _Histogram
        self._parts = [cls.from_state(part, device) for part in state["parts"]]
        self.updates = state["updates"]


class _Gaussian:
    """Count, mean and M2 = Σ (x − mean)² of each channel, in float64."""

    def __init__(self, count: int, mean: Tensor, m2: Tensor) -> None:
        self.count, self.mean, self.m2 = count, mean, m2

    @classmethod
    def of(cls, x: Tensor) -> _Gaussian:
        rows = max(1, _CHUNK // max(1, x.shape[1]))
        total = None
        for chunk in x.split(rows):
            chunk = chunk.double()
            # Two passes over shifted values: a plain sum of squares loses a small σ beside a large mean, and the shift
            # by the first row makes the M2 of a constant channel exactly zero.
            first = chunk[0]
            chunk = chunk - first
            mean = chunk.mean(0)
            part = cls(chunk.shape[0], first + mean, (chunk - mean).square_().sum(0))
            total = part if total is None else total.merge(part)
        return total

    def merge(self, other: _Gaussian) -> _Gaussian:
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return _Gaussian(count, mean, m2)

    def entropy(self, base: float, constant: bool) -> Tensor:
        std = self._std().clamp_min(STD_FLOOR)
        offset = 0.5 * math.log(2 * math.pi * math.e) if constant else 0.0
        return (std.log() + offset) / math.log(base)

    def constant(self) -> Tensor:
        return self._std() < STD_FLOOR

    def _std(self) -> Tensor:
        return (self.m2 / max(1, self.count - 1)).sqrt()

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.m2).all())

    @property
    def channels(self) -> int:
        return self.mean.numel()

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def state(self) -> dict:
        return {"count": self.count, "mean": self.mean.cpu(), "m2": self.m2.cpu()}

    @classmethod
    def from_state(cls, state: dict, device: torch.device | str | None) -> _Gaussian:
        return cls(state["count"], state["mean"].to(device), state["m2"].to(device))


class _Histogram:
    """Counts per channel on a grid; on the dyadic grid the range grows with the data and neighbours merge."""

    def __init__(
        self, count: int, counts: Tensor, outside: Tensor, grid: ops.Grid, extrema: tuple[Tensor, Tensor] | None
    ) -> None:
        # extrema is None for fixed edges, where the grid does not follow the data
        self.count, self.counts, self.outside, self.grid, self.extrema = count, counts, outside, grid, extrema

    @classmethod
    def of(cls, x: Tensor, bins: int, range: tuple[float, float] | None) -> _Histogram:
        extrema = None
        if range is None:
            extrema = ops.extrema(x)
            grid = ops.dyadic_grid(*(torch.nan_to_num(e) for e in extrema), bins)
        else:
            low, high = (torch.full((x.shape[1],), v, dtype=torch.float64, device=x.device) for v in range)
            grid = ops.uniform_grid(low, high, bins)
        result = ops.histogram(x, grid)
        return cls(x.shape[0], result.counts, result.outside, grid, extrema)

    def merge(self, other: _Histogram) -> _Histogram:
        count, outside = self.count + other.count, self.outside + other.outside
        if self.extrema is None:
            return _Histogram(count, self.counts + other.counts, outside, self.grid, None)
        low = torch.minimum(self.extrema[0], other.extrema[0])
        high = torch.maximum(self.extrema[1], other.extrema[1])
        grid = ops.dyadic_grid(low, high, self.grid.bins)
        counts = sum(ops.regrid(part.counts, part.grid, grid) for part in (self, other))
        return _Histogram(count, counts, outside, grid, (low, high))

    def entropy(self, base: float, differential: bool, name: str) -> Tensor:
        inside = self.counts.sum(1, keepdim=True)
        empty = int((inside == 0).sum())
        if empty:
            raise ValueError(f"{name}: no value of {empty} of {len(inside)} channels fell inside the range; widen it")
        lost = int(self.outside[:, :2].sum())
        if lost:
            warnings.warn(f"{name}: {lost} values fell outside the range and were not counted", stacklevel=3)
        p = self.counts.double() / inside
        entropy = -torch.special.xlogy(p, p).sum(1)
        if differential:
            entropy = entropy + self.grid.width.log()
        return entropy / math.log(base)

    def constant(self) -> Tensor:
        return (self.counts > 0).sum(1) <= 1 if self.extrema is None else self.extrema[0] == self.extrema[1]

    @property
    def finite(self) -> bool:
        # The dyadic grid follows the data: what it cannot hold is not finite, or beyond its largest magnitude.
        return not bool(self.outside[:, 0 if self.extrema is not None else 2 :].any())

    @property
    def channels(self) -> int:
        return self.counts.shape[0]

    @property
    def device(self) -> torch.device:
        return self.counts.device

    def state(self) -> dict:
        return {
            "count": self.count,
            "counts": self.counts.cpu(),
            "outside": self.outside.cpu(),
            "packed_grid": self.grid.packed().cpu(),
            "extrema": None if self.extrema is None else tuple(e.cpu() for e in self.extrema),
        }

    @classmethod
    def from_state(cls, state: dict, device: torch.device | str | None) -> _Histogram:
        grid = ops.Grid(*state["packed_grid"].to(device).unbind(1), bins=state["counts"].shape[1])
        extrema = None if state["extrema"] is None else tuple(e.to(device) for e in state["extrema"])
        return cls(state["count"], state["counts"].to(device), state["outside"].to(device), grid, extrema)
