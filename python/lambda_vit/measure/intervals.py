"""Confidence intervals of accuracies, of differences between two models, and of medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# Fewer values have no interval of 95 %: of five, the range covers the median in 94 % of cases.
LEAST = 6


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, as fractions `(low, high)` in 0…1.

    Unlike the normal approximation, it stays within 0…1 and has a positive width at 0 % and 100 %.
    Source: E. B. Wilson, Probable inference, JASA 22 (1927).
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"correct={correct}, total={total}: expected 0 <= correct <= total and total >= 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a fraction between 0 and 1, such as 0.95")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # Rounding must not move an end past the proportion.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def percent_interval(percent: float, images: int) -> list[float]:
    """Wilson's 95 % interval, in percent, of a percentage of a record: it stands for a whole number of `images`."""
    return [100 * end for end in wilson_interval(round(images * percent / 100), images)]


_Z = 1.959964  # of a normal distribution's middle 95 %


def paired_interval(full: Mapping[str, Any], step: Mapping[str, Any], images: int) -> tuple[float, float] | None:
    """The 95 % interval of a step's top-1 minus the full model's, in points, both measured on the same images.

    Only images with different predictions affect the difference. Their number follows from the agreement. How many of them
    both models misclassify is unknown and counts as noise, so that the interval is slightly too wide, never too narrow.
    Source: A. Agresti and Y. Min, Statistics in Medicine 24 (2005): half an image is added to each of the four cells.

    Args:
        full: Step 0, with "top1" in percent.
        step: Another step, with "top1" and "agreement" in percent.
        images: Number of images behind both.

    Returns:
        (low, high), or None if a figure is missing.
    """
    if images < 1 or None in (full.get("top1"), step.get("top1"), step.get("agreement")):
        return None
    difference = round(images * (step["top1"] - full["top1"]) / 100)
    differing = max(abs(difference), round(images * (100 - step["agreement"]) / 100)) + 1
    total = images + 2
    half = _Z * math.sqrt(max(0.0, differing - difference**2 / total)) / total
    return max(-100.0, 100 * (difference / total - half)), min(100.0, 100 * (difference / total + half))


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
    """The median of `values` and the two of them between which the true median lies, however they are distributed.

    Raises:
        ValueError: Too few values.
    """
    k = order_statistic(len(values), confidence)
    if k == 0:
        raise ValueError(f"{len(values)} values have no interval of {confidence:.0%}; at least {LEAST} do at 95 %")
    ordered = sorted(values)
    return statistics.median(ordered), ordered[k - 1], ordered[-k]
