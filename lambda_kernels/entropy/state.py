"""What an entropy meter has seen, and how more is added, merged, stored and turned into entropies.

A state has one row per channel, layer or sample. Operations make new states and change none, so that an update that
fails leaves everything as it was.

On a CUDA device nothing here looks at a value while batches are added, so the host never waits for the device: what
depends on values is decided there, and `DeferredFiniteCheck` reports later whether they were finite.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteActivationError
from ..ops.checks import dtype_name, require_int
from ..ops.histogram import reference
from ..ops.histogram.function import histogram, rows_of
from ..ops.histogram.grids import (
    LARGEST_MAGNITUDE,
    MAX_BINS,
    CodeGrid,
    Grid,
    dyadic_grid,
    regrid_unchecked,
    uniform_grid,
)

# A row that never changes has log σ = −∞. One below this standard deviation is given it, counted and reported.
STD_FLOOR = 2.0**-24


@dataclass(frozen=True)
class MeterSpec:
    """What is measured: the options that two meters must share to be merged or updated together."""

    kind: str
    per: str
    bins: int
    range: tuple[float, float] | str | None

    @property
    def grows(self) -> bool:
        """Whether bins follow the data, on a dyadic grid."""
        return self.kind == "histogram" and self.range is None

    def fixed_grid(self, rows: int, device: torch.device) -> Grid | CodeGrid | None:
        """The bins, where they do not follow the data; None: there are none."""
        if self.kind == "gaussian" or self.range is None:
            return None
        if self.range == "bfloat16":
            return CodeGrid()
        anchor, inv_width, first, closed_hi = (
            torch.full((rows,), number, dtype=torch.float64, device=device)
            for number in _edges(float(self.range[0]), float(self.range[1]), self.bins)
        )
        return Grid(anchor, inv_width, first, closed_hi, self.bins)


@functools.lru_cache
def _edges(low: float, high: float, bins: int) -> list[float]:
    return uniform_grid(low, high, bins).packed()[0].tolist()


def check_options(bins: int, base: float) -> None:
    """Raise ValueError unless a meter can have these."""
    require_int("bins", bins, 2, MAX_BINS, strict=True)
    if not (isinstance(base, Real) and 0 < base < math.inf and base != 1):
        raise ValueError(f"base must be positive, finite and not 1; got {base!r}")


def checked_range(range: tuple[float, float] | str | None, kind: str) -> tuple[float, float] | str | None:
    """`range` in Python's own types; ValueError if a meter of this kind cannot have it."""
    if range is None:
        return None
    if kind != "histogram":
        raise ValueError(f"range={range!r} belongs to kind='histogram'; got kind={kind!r}")
    named = range if isinstance(range, str) else None  # not every pair compares with a string
    if named == "bfloat16":
        return "bfloat16"
    if named == "minmax":
        raise ValueError('range="minmax" reads all data twice, which a meter cannot; use histogram_entropy')
    try:
        low, high = [] if named else [float(v) for v in range]
    except (TypeError, ValueError):
        raise ValueError(f'range must be None, (low, high) or "bfloat16"; got {range!r}') from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"range must be finite with low < high; got {range!r}")
    return low, high


@dataclass(frozen=True)
class State:
    """K rows."""

    moments: Tensor  # float64 [K, 7], as the operator gives them
    counts: Tensor | None = None  # int64 [K, bins]; None for a Gaussian
    outside: Tensor | None = (
        None  # int64 [K, 2]: values under the first bin, and beyond the last one; None for a Gaussian
    )
    # float64 [K, 4], packed, of a dyadic grid; None where bins are fixed. It holds all values, but which of the grids that do
    # depends on their order; `canonical` has the one that does not.
    grid: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows K."""
        return self.moments.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.moments.device

    @property
    def table(self) -> Tensor:
        """`counts` of a histogram."""
        assert self.counts is not None, "a Gaussian's state counts nothing"
        return self.counts

    @property
    def beyond(self) -> Tensor:
        """`outside` of a histogram."""
        assert self.outside is not None, "a Gaussian's state counts nothing"
        return self.outside

    def dyadic(self, bins: int) -> Grid:
        """`grid` as a `Grid`, of a histogram whose bins follow the data."""
        assert self.grid is not None, "the bins of this state are fixed"
        return Grid.unpack(self.grid, bins)

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """Apply `function` to every tensor."""
        others = (None if tensor is None else function(tensor) for tensor in self._tensors()[1:])
        return State(function(self.moments), *others)

    def to(self, device: torch.device | str | None) -> State:
        """On another device."""
        return self.map(lambda tensor: tensor.to(device))

    def split(self, sizes: Sequence[int]) -> list[State]:
        """Into states of `sizes` rows."""
        if len(sizes) == 1:
            return [self]
        parts = ([None] * len(sizes) if t is None else t.split(sizes) for t in self._tensors())
        return [State(*fields) for fields in zip(*parts, strict=True)]

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """The rows of all `states`, one after the other."""
        if len(states) == 1:
            return states[0]
        fields = zip(*(state._tensors()[1:] for state in states), strict=True)
        others = (None if field[0] is None else torch.cat(field) for field in fields)
        return State(torch.cat([state.moments for state in states]), *others)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.moments, self.counts, self.outside, self.grid


def extremes(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, float64 [K] each, of moments [K, 7]."""
    low, high = moments[:, reference.MINIMUM], moments[:, reference.MAXIMUM]
    return low, high


def host_may_look(device: torch.device) -> bool:
    """Whether reading a value costs no waiting for the device."""
    return device.type != "cuda"


def update_states(
    spec: MeterSpec, x: Sequence[Tensor], before: Sequence[State] | None, inspect: Callable[[Tensor], None]
) -> list[State]:
    """Add batches `x`, of one dtype and device, of several meters to their states `before` (None: there are none yet).

    `inspect` receives float64 [len(x), 2], how many values of each batch are not finite and the largest magnitude, before
    these values change anything; it may raise.
    """
    sizes = [rows_of(tensor, spec.per) for tensor in x]
    device = x[0].device
    old = None if before is None else State.join(before)
    grid = old.dyadic(spec.bins) if spec.grows and old is not None else None
    found = histogram(x, spec.fixed_grid(sum(sizes), device) if grid is None else grid, per=spec.per, statistics=True)
    assert found.moments is not None, "statistics were asked for"
    batch, counts = found.moments.packed(), found.counts
    inspect(_flags(found.outside, batch, sizes))
    moments = batch if old is None else reference.merge_moments(old.moments, batch)
    if spec.kind == "gaussian":
        return State(moments).split(sizes)

    outside = found.outside[:, :2]
    if spec.grows:
        if grid is None or old is None:
            grid = dyadic_grid(*extremes(moments), spec.bins, centred=True)
            counts = histogram(x, grid, per=spec.per).counts
        else:
            grew = outside.sum(1) > 0
            if not host_may_look(device) or bool(grew.any()):
                wider = dyadic_grid(*extremes(moments), spec.bins, centred=True).packed()
                narrower, grid = grid, Grid.unpack(torch.where(grew[:, None], wider, grid.packed()), spec.bins)
                again = histogram(x, grid, per=spec.per, row_mask=grew).counts
                counts = torch.where(grew[:, None], again, counts)
                old = State(old.moments, regrid_unchecked(old.table, narrower, grid), old.outside)
        outside = torch.zeros_like(outside)
    if old is not None:
        outside = outside + old.beyond
        counts += old.table  # in place: they are this batch's own, and a new table costs more than the sum
    return State(moments, counts, outside, None if grid is None else grid.packed()).split(sizes)


def _flags(outside: Tensor, moments: Tensor, sizes: Sequence[int]) -> Tensor:
    bad = outside[:, 2:].sum(1).double()
    largest = torch.nan_to_num(moments[:, reference.MINIMUM :].abs().amax(1), nan=0.0, posinf=math.inf)
    if len(set(sizes)) == 1:  # the usual case, without a handful of small kernels for each meter
        return torch.stack((bad.view(len(sizes), -1).sum(1), largest.view(len(sizes), -1).amax(1)), dim=1)
    return torch.stack(
        [torch.stack((b.sum(), m.amax())) for b, m in zip(bad.split(sizes), largest.split(sizes), strict=True)]
    )


def merge(spec: MeterSpec, a: State, b: State) -> State:
    """Both together, row by row."""
    moments = reference.merge_moments(a.moments, b.moments)
    if spec.kind == "gaussian":
        return State(moments)
    if not spec.grows:
        return State(moments, a.table + b.table, a.beyond + b.beyond)
    grid = dyadic_grid(*extremes(moments), spec.bins, centred=True)
    mine, theirs = (regrid_unchecked(s.table, s.dyadic(spec.bins), grid) for s in (a, b))
    return State(moments, mine + theirs, a.beyond + b.beyond, grid.packed())


def canonical(spec: MeterSpec, state: State) -> State:
    """The same on the one grid that depends on nothing but the smallest and the largest value of each row."""
    if not spec.grows:
        return state
    grid = dyadic_grid(*extremes(state.moments), spec.bins)
    counts = regrid_unchecked(state.table, state.dyadic(spec.bins), grid)
    return State(state.moments, counts, state.outside, grid.packed())


def grid_of(spec: MeterSpec, state: State) -> Grid | CodeGrid:
    """The bins of a histogram's state."""
    if spec.grows:
        return state.dyadic(spec.bins)
    grid = spec.fixed_grid(state.rows, state.device)
    assert grid is not None, "a Gaussian's state has no bins"
    return grid


def std(state: State) -> Tensor:
    """float64 [K]: the sample standard deviation."""
    return (state.moments[:, reference.M2] / (state.moments[:, reference.COUNT] - 1).clamp_min(1)).sqrt()


def gaussian_entropies(state: State, base: float, constant: bool) -> Tensor:
    """float64 [K]: log σ, with σ not below its floor."""
    offset = 0.5 * math.log(2 * math.pi * math.e) if constant else 0.0
    return (std(state).clamp_min(STD_FLOOR).log() + offset) / math.log(base)


def histogram_entropies(
    counts: Tensor, grid: Grid | CodeGrid, base: float, *, differential: bool = False, miller_madow: bool = False
) -> Tensor:
    """float64 [K]: −Σ_b p_b log p_b of the counts int64 [K, bins], every row of which holds a value.

    `differential` adds Σ_b p_b log(width of b); `miller_madow` adds (occupied bins − 1) / 2N nats, the first term of the
    bias of N samples (Miller 1955).
    """
    inside = counts.sum(1).double()
    p = counts / inside[:, None]
    entropy = 0.0 - torch.special.xlogy(p, p).sum(1)
    if differential:
        entropy = entropy + (p @ grid.widths(p.device).log() if isinstance(grid, CodeGrid) else grid.width.log())
    if miller_madow:
        entropy = entropy + ((counts > 0).sum(1) - 1) / (2 * inside)
    return entropy / math.log(base)


@dataclass(frozen=True)
class Batch:
    """What a message about a batch needs to know of it."""

    name: str
    number: int
    values: int
    dtype: torch.dtype

    def check(self, flags: Tensor) -> None:
        """Raise if its flags from `update_states`, on the host, report a value that is not finite or too large to square."""
        bad, largest = flags.tolist()
        dtype = dtype_name(self.dtype)
        if bad:
            raise NonFiniteActivationError(
                f"{self.name}: {bad:.0f} of {self.values} values are NaN or infinite in batch {self.number} ({dtype}). "
                + ("Try bfloat16 or float32" if self.dtype == torch.float16 else "Check the weights and the input")
            )
        if largest > LARGEST_MAGNITUDE:
            raise ValueError(
                f"{self.name}: values up to {largest:g} are too large to take statistics of, in batch {self.number} "
                f"({dtype}); the largest allowed is 2^500"
            )


class DeferredFiniteCheck:
    """Batches whose flags are on their way to the host; the first error found is kept and raised from then on."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Batch, Tensor, torch.cuda.Event]] = deque()
        self._error: ValueError | None = None

    def __getstate__(self) -> dict[str, Any]:
        # For copies: an event cannot go with them, so the flags are waited for.
        with contextlib.suppress(ValueError):
            self.settle(wait=True)
        return {"_waiting": deque(), "_error": self._error}

    def add(self, batch: Batch, flags: Tensor, arrival: torch.cuda.Event) -> None:
        """Expect `flags` of `batch` on the host when `arrival` has happened."""
        self._waiting.append((batch, flags, arrival))

    def settle(self, *, wait: bool) -> None:
        """Look at the flags that have arrived, or wait for all of them; raise as `Batch.check` for the first bad batch."""
        while self._error is None and self._waiting:
            batch, flags, arrival = self._waiting[0]
            if wait:
                arrival.synchronize()
            elif not arrival.query():
                return
            self._waiting.popleft()
            try:
                batch.check(flags)
            except ValueError as error:
                self._error = error
        if self._error is not None:
            raise type(self._error)(str(self._error))


def send_to_host(flags: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Start a copy to the host without waiting; returns it, and the event after which it holds anything."""
    copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    copy.copy_(flags, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(flags.device))
    return copy, arrival
