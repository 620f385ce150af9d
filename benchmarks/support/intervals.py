"""Medians with intervals that assume nothing about how times are distributed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lambda_vit.measure.intervals import LEAST, median_interval

__all__ = ["LEAST", "median_interval", "paired_ratio", "quartiles"]


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
