"""Medians with intervals that assume nothing about how times are distributed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Fewer values have no interval of 95 %: of five, the range covers the median in 94 % of cases.
LEAST = 6


def order_statistic(count: int, confidence: float = 0.95) -> int:
    """The k for which the k-th smallest and the k-th largest of `count` values hold the median between them.

    Each value is above the median or not, like a coin: k is the largest for which both ends together err with a
    probability of at most 1 − `confidence`. 0 if no k does.
    """
    tail, k = 0.0, 0
    while True:
        tail += math.comb(count, k) / 2**count
        if 2 * tail > 1 - confidence:
            return k
        k += 1


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The median of `values` and the two of them between which the true median lies.

    Raises:
        ValueError: Too few values.
    """
    k = order_statistic(len(values), confidence)
    if k == 0:
        raise ValueError(f"{len(values)} values have no interval of {confidence:.0%}; at least {LEAST} do at 95 %")
    ordered = sorted(values)
    return statistics.median(ordered), ordered[k - 1], ordered[-k]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of the ratios of values that were taken one after the other, with its interval of 95 %.

    What slows a machine for longer than a turn takes both alike, and leaves the ratio of the two what it was.
    """
    middle, low, high = median_interval([a / b for a, b in zip(above, below, strict=True)])
    return {"ratio": _digits(middle), "low": _digits(low), "high": _digits(high)}


def _digits(value: float, count: int = 4) -> float:
    return float(f"{value:.{count}g}")
