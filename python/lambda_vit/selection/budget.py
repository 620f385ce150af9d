"""Decides when enough attention layers are picked, and which may be next so that the budget can still be reached."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lambda_kernels.ops.checks import require_int

from ..measure.cost import count_flops
from ..measure.latency import time_forwards
from ..models.properties import eval_mode, input_shape, one_device, one_dtype
from ..models.views import skip_attention

# Rounds and images per forward pass of the timing that a throughput budget requires.
_SPEED_ROUNDS, _SPEED_BATCH = 15, 16


class Stop:
    """When to stop removing `candidates` from the full model, at the latest once `most` of them are removed.

    `value` is a number of layers, the largest remaining share of the parameters or FLOPs, or the factor of throughput to
    reach, by `kind`: "count", "params", "flops" or "throughput". Two removed blocks are at least `min_gap` apart.
    ValueError if the value is wrong or cannot be reached.
    """

    def __init__(
        self, model: nn.Module, kind: str, value: float, candidates: Sequence[int], most: int, min_gap: int = 1
    ) -> None:
        self.kind, self.value = kind, value
        self._candidates, self._min_gap = tuple(candidates), min_gap
        self.last: float | None = None  # the last result of `met`: layers, remaining share, or throughput
        self._model = model
        spaced = f" with min_gap={min_gap}" if min_gap > 1 else ""
        if kind == "count":
            self.value = value = require_int("count", value)
            if not 1 <= value <= most:
                raise ValueError(f"count must be from 1 to {most} for {len(model.blocks)} blocks{spaced}; got {value}")
            self._parts = dict.fromkeys(self._candidates, 1)
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{kind} must be a number; got {value!r}")
        if kind == "throughput":
            if not value > 1:
                raise ValueError(
                    f"throughput must be above 1, such as 1.2 for 20 % more images per second; got {value!r}"
                )
            return
        if not 0 < value < 1:
            raise ValueError(
                f"{kind} must be between 0 and 1, such as 0.85 for 85 % of the {_NAMES[kind]}; got {value!r}"
            )
        measure = attention_parameters if kind == "params" else attention_flops
        self._total, self._parts = measure(model)
        if min_gap > 1:
            gone = spaced_maximum({i: self._parts[i] for i in candidates}, min_gap)
        else:
            gone = sum(sorted((self._parts[i] for i in candidates), reverse=True)[:most])
        least = (self._total - gone) / self._total
        if least > value:
            raise ValueError(
                f"{kind}={value:g} cannot be reached: without the attention of all {most} blocks that may lose it{spaced}, "
                f"{least:.3f} of the {_NAMES[kind]} remain"
            )

    def describe(self) -> str:
        """Return the rule in words."""
        if self.kind == "count":
            return f"{self.value} layer{'s' * (self.value != 1)}"
        if self.kind == "throughput":
            return f"{self.value:g} × the throughput"
        return f"{100 * self.value:g} % of the {_NAMES[self.kind]}"

    def met(self, layers: Collection[int]) -> bool:
        """Whether the model without the attention of `layers` meets the rule; a throughput is measured."""
        if self.kind == "count":
            self.last = len(layers)
        elif self.kind == "throughput":
            self.last = self.speedup(layers)
        else:  # with one division three tenths meet a share of 0.3
            self.last = (self._total - sum(self._parts[i] for i in layers)) / self._total
            return self.last <= self.value
        return self.last >= self.value

    def next_candidates(self, layers: Collection[int]) -> list[int]:
        """Return the blocks that may be picked after `layers`: far enough from each, and the rule can still be met."""
        return [i for i in self._spaced(layers) if self._can_be_met((*layers, i))]

    def _spaced(self, layers: Collection[int]) -> list[int]:
        return [i for i in self._candidates if all(abs(i - picked) >= self._min_gap for picked in layers)]

    def _can_be_met(self, layers: Collection[int]) -> bool:
        """Whether `layers` can be extended until the rule is met; nobody knows in advance for a throughput."""
        if self._min_gap == 1 or self.kind == "throughput":
            return True
        left = {i: self._parts[i] for i in self._spaced(layers)}
        gone = sum(self._parts[i] for i in layers) + spaced_maximum(left, self._min_gap)
        return gone >= self.value if self.kind == "count" else (self._total - gone) / self._total <= self.value

    def shortfall(self, layers: Collection[int]) -> str:
        """Return the note for `layers` that do not meet the rule, although no more can be removed; call `met` before."""
        found = f"{self.last:.2f} × was measured" if self.kind == "throughput" else f"{self.last:.3f} remain"
        return f"{self.kind}={self.value:g} {_MISSED} without the attention of {len(layers)} blocks {found}"

    def speedup(self, layers: Collection[int]) -> float:
        """Measure the throughput without the attention of `layers`, relative to the full model's."""
        views = {"full": self._model, "without": skip_attention(self._model, sorted(layers))}
        times = time_forwards(views, (_SPEED_BATCH,), rounds=_SPEED_ROUNDS)
        rounds = zip(*(taken[_SPEED_BATCH] for taken in times.values()), strict=True)
        return statistics.median(full / without for full, without in rounds)


def spaced_maximum(worth: Mapping[int, int], min_gap: int) -> int:
    """Return the largest sum of `worth` over blocks of which any two are at least `min_gap` apart."""
    best = [0]  # best[n]: among the blocks below n
    for block in range(max(worth, default=-1) + 1):
        best.append(max(best[-1], worth.get(block, 0) + best[max(0, block + 1 - min_gap)]))
    return best[-1]


_NAMES = {"params": "parameters", "flops": "FLOPs"}
_MISSED = "was not reached:"


def missed(notes: Iterable[str]) -> bool:
    """Whether one of a selection's warnings is a `Stop.shortfall`."""
    return any(_MISSED in note for note in notes)


def attention_parameters(model: nn.Module) -> tuple[int, dict[int, int]]:
    """Count the parameters of `model`, and those that each block's attention removes."""
    parts = {}
    for index, block in enumerate(model.blocks):
        bare = skip_attention(model, (index,)).blocks[index]
        parts[index] = sum(p.numel() for p in block.parameters()) - sum(p.numel() for p in bare.parameters())
    return sum(p.numel() for p in model.parameters()), parts


def attention_flops(model: nn.Module) -> tuple[int, dict[int, int]]:
    """Count the FLOPs of one image, and those that each block's attention removes.

    Blocks with parameters of the same shapes are assumed to cost the same.
    """
    image = torch.zeros(1, *input_shape(model), device=one_device(model), dtype=one_dtype(model))
    total = _flops(model, image)
    by_shape: dict[tuple[tuple[int, ...], ...], int] = {}
    parts = {}
    for index, block in enumerate(model.blocks):
        shapes = tuple(tuple(p.shape) for p in block.parameters())
        if shapes not in by_shape:
            by_shape[shapes] = total - _flops(skip_attention(model, (index,)), image)
        parts[index] = by_shape[shapes]
    return total, parts


def _flops(model: nn.Module, image: torch.Tensor) -> int:
    with eval_mode(model), torch.no_grad():
        return count_flops(model, image)


DEFAULT_COUNT = 5


@dataclass(frozen=True)
class Budget:
    """At most one of: number of layers, remaining share of the parameters or FLOPs, factor of throughput."""

    count: int | None = None
    params: float | None = None
    flops: float | None = None
    throughput: float | None = None

    def __post_init__(self) -> None:
        if len(self._given()) > 1:
            raise ValueError(f"pass one of count, params, flops and throughput; got {', '.join(self._given())}")

    def resolve(self, default_count: int) -> tuple[str, float]:
        """Return the kind and value of the rule; `default_count` layers if none was given."""
        return next(iter(self._given().items()), ("count", default_count))

    def _given(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}
