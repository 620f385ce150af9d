"""Streaming, mergeable entropy of activations: Gaussian per channel, and histograms.

Gaussian: channels are taken as independent normals, so up to a constant the entropy of a feature is Σ_j log σ_j with σ
over *all* samples (arXiv 2404.05657, section 3.2). Histogram: H = −Σ_b p_b log p_b over value bins.

Counts are integers and moments are kept in float64 and merged by Chan's formula (Chan, Golub, LeVeque 1979, "Updating
formulae and a pairwise algorithm for computing sample variances"), so that any split of the data over batches or processes
gives the same result: histograms exactly, Gaussians to 1e-12, however large the mean is beside the spread, because mean and
M2 are kept in two float64 each (Dekker 1971, "A floating-point technique for extending the available precision").
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import histogram as ops
from ..ops.checks import check_choice, check_tensor
from ..ops.histogram import reference
from ..ops.histogram.grids import FINEST_WIDTH
from . import distributed, storage
from . import state as entropy_state
from .state import STD_FLOOR, Batch, DeferredFiniteCheck, MeterSpec, State

__all__ = ["KINDS", "PER", "STD_FLOOR", "EntropyMeter", "gaussian_entropy", "histogram_entropy", "update_together"]

KINDS = ("gaussian", "histogram")
PER = ops.PER


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
        ValueError: Fewer than two samples, or every channel is constant; `dim`, `base` or the shape of `x` is wrong.
        TypeError: `x` is no dense floating-point tensor with values, or `dim` no integer.
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
    range: tuple[float, float] | str | None = None,
    base: float = 2,
    miller_madow: bool = False,
) -> Tensor:
    """Histogram entropy of each channel of `x`.

    Args:
        x: Samples `[..., C]`, or with the channels at `dim`; at least two samples.
        dim: The channel dimension; all others are samples.
        bins: Number of bins per channel.
        range: (low, high) edges for all channels; values outside are not counted. None is the dyadic grid: each channel's
            narrowest width 2^k for which its values fit in `bins` bins anchored at 0, and no finer than 2^-23 of its
            largest magnitude. "minmax": equal bins from each channel's smallest to its largest value, in two reads.
            "bfloat16": a bin for every value of that dtype, which `x` must have.
        base: Of the logarithm: 2 for bits, math.e for nats.
        miller_madow: Correct for the bias of few samples.

    Returns:
        float64 `[C]`: −Σ_b p_b log p_b.

    Raises:
        ValueError: Fewer than two samples, or wrong options.
        TypeError: `x` is no dense floating-point tensor with values, has the wrong dtype, or `dim` is no integer.
        NonFiniteActivationError: `x` holds NaN or infinity.
    """
    x = _channels_last(x, dim)
    if not (isinstance(range, str) and range == "minmax"):
        meter = EntropyMeter("histogram", bins=bins, range=range, base=base)
        return meter.update(x).compute(miller_madow=miller_madow)
    entropy_state.check_options(bins, base)
    seen = EntropyMeter("gaussian").update(x)
    seen._check_samples()
    found = seen.moments()
    grid = ops.uniform_grid(found.minimum, found.maximum, bins)
    counts = ops.histogram(x.cpu() if x.device.type == "mps" else x, grid).counts
    return entropy_state.histogram_entropies(counts, grid, base, miller_madow=miller_madow)


def _channels_last(x: Tensor, dim: int) -> Tensor:
    check_tensor("x", x)
    try:
        dim = index(dim)
    except TypeError:
        raise TypeError(f"dim must be an integer, the position of the channels such as -1; got {dim!r}") from None
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is out of range for x of shape {list(x.shape)}")
    return x.movedim(dim, -1)


class EntropyMeter:
    """Entropy over any number of batches, in bounded memory.

    A batch is read once; for a dyadic grid, the first one and channels whose range has grown are read again.

    Args:
        kind: "gaussian" or "histogram". A histogram meter keeps what a Gaussian one does as well.
        per: "channel": one entropy per channel of `[..., C]`. "layer": one over all values. "sample": one per sample of
            `[B, ...]`, in the order of the updates.
        bins: Of a histogram.
        range: (low, high) of a histogram with fixed edges; None for the dyadic grid, which grows with the data;
            "bfloat16" for a bin for every value of that dtype, 10240 for any value of `bins`.
        base: Of the logarithm.
        name: What is measured, for messages.

    A meter is not locked: threads that measure at the same time need one each, to be merged.

    Raises:
        ValueError: An option is wrong.
    """

    def __init__(
        self,
        kind: str = "gaussian",
        *,
        per: str = "channel",
        bins: int = 256,
        range: tuple[float, float] | str | None = None,
        base: float = 2,
        name: str = "x",
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_choice("per", per, PER)
        # The dyadic grid needs a bin on either side of 0.
        entropy_state.check_options(bins, base)
        range = entropy_state.checked_range(range, kind)
        bins = ops.CodeGrid.bins if range == "bfloat16" else bins
        # Python's own types, not NumPy's: what `save` writes must be what `load` and other ranks can read.
        self._spec = MeterSpec(KINDS[KINDS.index(kind)], PER[PER.index(per)], bins, range)
        if isinstance(range, tuple):
            self._spec.fixed_grid(1, torch.device("cpu"))  # raises where the edges are too near for `bins`
        self.base, self.name = float(base), str(name)
        self.updates = 0
        # With per="sample" a part for every update, until they are joined; else at most one.
        self._parts: list[State] = []
        self._pending = DeferredFiniteCheck()

    @property
    def kind(self) -> str:
        """ "gaussian" or "histogram"."""
        return self._spec.kind

    @property
    def per(self) -> str:
        """What has an entropy of its own."""
        return self._spec.per

    @property
    def bins(self) -> int:
        """Bins of each histogram."""
        return self._spec.bins

    @property
    def range(self) -> tuple[float, float] | str | None:
        """Where the bins are; None: they follow the data."""
        return self._spec.range

    def update(self, x: Tensor) -> EntropyMeter:
        """Add a batch. `x` is `[..., C]`, or `[B, ...]` for per="sample"; empty batches are allowed.

        Nothing changes when this raises. On a CUDA device the host does not wait to learn whether all values are finite:
        the error comes from a later call, at the latest from one that needs the result, and then from every call, since
        the finite values of that batch have been added.

        Raises:
            TypeError: `x` is no dense floating-point tensor with values, or not the one that the options ask for.
            ValueError: The number of channels changed, or values are beyond ±2^500.
            NonFiniteActivationError: NaN or infinity; names what was measured, the batch and the dtype.
        """
        update_together([self], [x])
        return self

    def _accept(self, x: Tensor) -> Tensor:
        """Check a batch; nothing is read yet."""
        check_tensor(f"{self.name}: x", x)
        if x.device.type == "meta":
            raise TypeError(
                f"{self.name}: x is on the meta device and has no values; got shape {list(x.shape)}. Materialize the model "
                "and its input on a real device first"
            )
        if x.dim() == 0 or (self.per == "channel" and x.shape[-1] == 0):
            raise ValueError(f"{self.name}: x must be [..., C] with at least one channel; got shape {list(x.shape)}")
        if self.per == "sample" and len(x) > 0 and x.numel() == 0:
            raise ValueError(f"{self.name}: the {len(x)} samples of x hold no values; got shape {list(x.shape)}")
        if self.range == "bfloat16" and x.dtype != torch.bfloat16:
            raise TypeError(f'{self.name}: range="bfloat16" counts values of that dtype; got {x.dtype}')
        if self._parts and self.per == "channel" and x.shape[-1] != self.channels:
            raise ValueError(f"{self.name}: a batch with {x.shape[-1]} channels after {self.channels}")
        self._pending.settle(wait=False)
        return x.detach().cpu() if x.device.type == "mps" else x.detach()  # Metal has no float64

    def check(self) -> EntropyMeter:
        """Wait for the device, so that errors of the batches so far are raised now and not later.

        Raises:
            NonFiniteActivationError: NaN or infinity; names what was measured, the batch and the dtype.
        """
        self._pending.settle(wait=True)
        return self

    def merge(self, other: EntropyMeter) -> EntropyMeter:
        """Add what another meter of the same options has seen.

        Raises:
            TypeError: `other` is no meter.
            ValueError: The other meter measures something else.
            NonFiniteActivationError: Either has seen NaN or infinity.
        """
        if not isinstance(other, EntropyMeter):
            raise TypeError(f"{self.name}: other must be an EntropyMeter, which `load` makes of a file; got {other!r}")
        if self._options() != other._options():
            raise ValueError(f"meters differ: {self._options()} and {other._options()}")
        mine, theirs = self._state(), other._state()
        if theirs is not None and mine is not None:
            theirs = theirs.to(mine.device)
            if self.per == "sample":
                theirs = State.join((mine, theirs))
            elif theirs.rows != mine.rows:
                raise ValueError(f"{self.name}: a meter with {theirs.rows} channels after {mine.rows}")
            else:
                theirs = entropy_state.merge(self._spec, mine, theirs)
        if theirs is not None:
            self._parts = [theirs]
        self.updates += other.updates
        return self

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> EntropyMeter:
        """Merge the meters of all processes of `group`, in rank order, so that every rank ends with the same state.

        Ranks that have seen nothing take part. Counts are summed exactly, moments in float64. Call it once, at the end: a
        second call would count the merged state of every rank again.

        Raises:
            RuntimeError: There is no process group.
            ValueError: The meters of two ranks differ in their options or channels, or a rank has seen values beyond
                ±2^500; on every rank.
            NonFiniteActivationError: A rank has seen NaN or infinity; on every rank.
        """
        state, problem = None, None
        try:
            state = self._state()
        except ValueError as error:
            problem = error
        state, updates = distributed.all_reduce(self._spec, state, self._options(), self.updates, problem, group)
        self._parts, self.updates = [] if state is None else [state], updates
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`: nothing is shared with the copy, nor with meters that were updated together."""
        parts = [part.map(torch.clone) for part in self._parts]
        return {**self.__dict__, "_parts": parts, "_pending": copy.copy(self._pending)}

    def _state(self) -> State | None:
        """All that was seen, which is known to be finite; None: nothing."""
        self._pending.settle(wait=True)
        if len(self._parts) > 1:
            self._parts = [State.join(self._parts)]
        return self._parts[0] if self._parts else None

    @property
    def count(self) -> int:
        """Samples seen per channel; for per="sample", values per sample of the first batch."""
        return int(self._parts[0].moments[0, reference.COUNT]) if self._parts else 0

    @property
    def channels(self) -> int:
        """How many entropies `compute` gives."""
        return sum(part.rows for part in self._parts)

    @property
    def constant_channels(self) -> int:
        """How many channels do not change (Gaussian: by less than `STD_FLOOR`, which they are given instead)."""
        state = self._state()
        if state is None:
            return 0
        if self.kind == "gaussian":
            return int((entropy_state.std(state) < STD_FLOOR).sum())
        return int((state.moments[:, reference.MINIMUM] == state.moments[:, reference.MAXIMUM]).sum())

    def moments(self) -> ops.Moments:
        """Count, mean, M2, smallest and largest value of each channel, layer or sample.

        Raises:
            ValueError: Nothing was seen.
        """
        return ops.Moments.unpack(self._some_state().moments)

    def counts(self) -> tuple[Tensor, ops.Grid | ops.CodeGrid]:
        """int64 `[K, bins]`, and the bins; of a dyadic grid the one that follows from each row's extrema alone.

        Raises:
            ValueError: This is a Gaussian meter, or nothing was seen.
        """
        self._check_kind("histogram")
        state = entropy_state.canonical(self._spec, self._some_state())
        return state.table, entropy_state.grid_of(self._spec, state)

    def compute(
        self, kind: str | None = None, *, constant: bool = False, differential: bool = False, miller_madow: bool = False
    ) -> Tensor:
        """The entropies, float64: `[C]`, `[1]` for per="layer", `[samples]` for per="sample".

        Args:
            kind: "gaussian" or "histogram"; None: that of the meter. A histogram meter can give both.
            constant: Gaussian: add ½ log(2πe).
            differential: Histogram: add the logarithm of the bin width, which makes entropies of different grids
                comparable (an estimate of the differential entropy).
            miller_madow: Histogram: add (occupied bins − 1) / 2N nats, the first term of the bias of N samples.

        Raises:
            ValueError: Fewer than two samples, every channel is constant (Gaussian), nothing fell inside `range`, or the
                meter keeps no counts.
            NonFiniteActivationError: On a CUDA device: a batch held NaN or infinity.
        """
        kind = self.kind if kind is None else kind
        check_choice("kind", kind, KINDS)
        self._check_kind(kind)
        self._check_samples()
        if kind == "gaussian":
            self._warn_of_constants()
            return entropy_state.gaussian_entropies(self._some_state(), self.base, constant)
        counts, grid = self.counts()
        self._warn_of_outside(counts)
        self._warn_of_tiny_ranges()
        return entropy_state.histogram_entropies(
            counts, grid, self.base, differential=differential, miller_madow=miller_madow
        )

    def _check_kind(self, kind: str) -> None:
        if kind == "histogram" and self.kind != "histogram":
            raise ValueError(f'{self.name}: a Gaussian meter keeps no counts; make it with kind="histogram"')

    def _some_state(self) -> State:
        state = self._state()
        if state is None:
            raise ValueError(f"{self.name}: nothing was measured yet; call update first")
        return state

    def _check_samples(self) -> None:
        state = self._state()
        fewest = 0 if state is None else int(state.moments[:, reference.COUNT].min())
        if fewest < 2:
            raise ValueError(f"{self.name}: an entropy needs at least two samples per channel; got {fewest}")

    def _warn_of_constants(self) -> None:
        state = self._some_state()
        dead, rows = int((entropy_state.std(state) < STD_FLOOR).sum()), state.rows
        if dead == rows:
            raise ValueError(f"{self.name}: all {rows} channels are constant over {self.count} samples")
        if dead:
            warnings.warn(
                f"{self.name}: {dead} of {rows} channels are constant over {self.count} samples; their standard "
                f"deviation is taken as 2^{math.log2(STD_FLOOR):.0f}",
                stacklevel=3,
            )

    def _warn_of_outside(self, counts: Tensor) -> None:
        empty = int((counts.sum(1) == 0).sum())
        if empty:
            raise ValueError(
                f"{self.name}: no value of {empty} of {len(counts)} channels fell inside the range; widen it"
            )
        outside = self._some_state().outside
        lost = 0 if outside is None else int(outside.sum())
        if lost:
            warnings.warn(f"{self.name}: {lost} values fell outside the range and were not counted", stacklevel=3)

    def _warn_of_tiny_ranges(self) -> None:
        if self.range is not None:
            return
        moments = self.moments()
        spread = moments.maximum - moments.minimum
        tiny = int(((spread > 0) & (spread < FINEST_WIDTH * self.bins / 4)).sum())
        if tiny:
            warnings.warn(
                f"{self.name}: the values of {tiny} of {len(spread)} channels lie within a few bins of 2^-126, the narrowest "
                "that there are, so that their entropies are too low. Scale the values",
                stacklevel=3,
            )

    def _receive(self, state: State) -> None:
        """Append the state of new samples, or replace the state so far by one that includes the new batch."""
        if self.per == "sample":
            self._parts.append(state)
        else:
            self._parts = [state]

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("kind", "per", "bins", "range", "base")}

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, as tensors on the CPU and plain values.

        The same data gives the same counts and grid, however it was split, ordered or merged.

        Raises:
            NonFiniteActivationError: On a CUDA device: a batch held NaN or infinity.
        """
        return storage.pack(self._spec, self._state(), self._options(), self.updates)

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device | str | None = None) -> None:
        """Replace what was seen by a `state_dict` of a meter with the same options.

        Args:
            state: Of `state_dict`.
            device: Where what was counted is to be; None leaves it where the tensors of `state` are.

        Raises:
            ValueError: The options differ, or the state is damaged or none of a meter; nothing has changed then.
        """
        restored, updates = storage.unpack(self._spec, state, self._options())
        self._parts = [] if restored is None else [restored.to(device)]
        self.updates, self._pending = updates, DeferredFiniteCheck()

    def save(self, path: str | Path) -> None:
        """Write the meter to a file, atomically: a process that is killed leaves the last file that was complete."""
        storage.write(path, self.name, self.state_dict())

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None) -> EntropyMeter:
        """Read what `save` wrote.

        Args:
            path: The file.
            device: As for `load_state_dict`.

        Raises:
            ValueError: The file is missing, damaged or something else; names it.
        """
        name, state = storage.read(path)
        try:
            meter = cls(**state["options"], name=name)
            meter.load_state_dict(state, device=device)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no entropy meter that this version reads: {error}") from error
        return meter


def update_together(meters: Sequence[EntropyMeter], x: Sequence[Tensor]) -> None:
    """Add a batch to each of several meters, as `update` would one by one, but in as few calls as possible.

    Meters with the same kind, per, bins and range whose batches have one dtype and device are updated in one call.

    Args:
        meters: Different meters.
        x: A batch for each.

    Raises:
        ValueError: The lengths differ, or a meter comes twice.
        TypeError, ValueError, NonFiniteActivationError: As for `EntropyMeter.update`; no meter has changed then.
    """
    meters, batches = list(meters), list(x)
    if len(meters) != len(batches):
        raise ValueError(f"every meter needs its batch; got {len(meters)} meters and {len(batches)} tensors")
    if len({id(meter) for meter in meters}) < len(meters):
        raise ValueError("a meter comes twice; update it with one batch after the other")
    batches = [meter._accept(batch) for meter, batch in zip(meters, batches, strict=True)]
    groups: dict[tuple[MeterSpec, torch.dtype, torch.device, bool], list[tuple[EntropyMeter, Tensor]]] = {}
    for meter, batch in zip(meters, batches, strict=True):
        if batch.numel():
            first = meter.per == "sample" or not meter._parts
            groups.setdefault((meter._spec, batch.dtype, batch.device, first), []).append((meter, batch))
    results = [(group, _update_group(group, *key)) for key, group in groups.items()]
    for group, (states, expected) in results:
        for i, (meter, _) in enumerate(group):
            meter._receive(states[i])
            if expected is not None:
                sent, flags, arrival = expected
                meter._pending.add(sent[i], flags[i], arrival)
    for meter in meters:
        meter.updates += 1


def _update_group(
    group: list[tuple[EntropyMeter, Tensor]], spec: MeterSpec, dtype: torch.dtype, device: torch.device, first: bool
) -> tuple[list[State], tuple[list[Batch], Tensor, torch.cuda.Event] | None]:
    """The new states, and where the host cannot look yet, what to watch: batches, their flags, the flags' arrival."""
    batches = [Batch(meter.name, meter.updates, x.numel(), dtype) for meter, x in group]
    expected: tuple[list[Batch], Tensor, torch.cuda.Event] | None = None

    def inspect(flags: Tensor) -> None:
        nonlocal expected
        if entropy_state.host_may_look(device):
            for batch, row in zip(batches, flags, strict=True):
                batch.check(row)
        else:
            expected = (batches, *entropy_state.send_to_host(flags))

    before = None if first else [meter._parts[0].to(device) for meter, _ in group]
    return entropy_state.update_states(spec, [x for _, x in group], before, inspect), expected
