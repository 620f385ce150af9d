"""Values that tables, figures and sentences read from a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...runtime.formatting import format_count, format_flops, format_list, format_ranges, format_size, percent_digits

# A cost of a model: title, key in a record, and how the value is shown.
Cost = tuple[str, str, Callable[[float], str]]
COSTS: tuple[Cost, ...] = (
    ("Parameters", "parameters", format_count),
    ("FLOPs per image", "flops", format_flops),
    ("Weights", "weight_bytes", format_size),
    ("Peak memory", "peak_memory_bytes", format_size),
)


def validation_images(record: Mapping[str, Any]) -> int:
    """The number of images behind the accuracies; 0 if the record does not say."""
    counted = [row.get("images") or 0 for row in (*(record.get("variants") or ()), record.get("trajectory") or {})]
    return max(counted) or (record.get("data") or {}).get("validation") or 0


def digits_of(record: Mapping[str, Any]) -> int:
    """Decimals of the percentages of a record."""
    return percent_digits(validation_images(record))


def baseline(record: dict[str, Any]) -> dict[str, Any] | None:
    """The variant that the others are compared with."""
    return next((v for v in record.get("variants") or () if v["name"] in ("full", "reference")), None)


# A change that is larger than so many standard errors is called one.
CLEAR = 2.0


def direction(change: float, error: float) -> str:
    """ "↑", "↓", or "" for a change that is within `CLEAR` standard errors of none."""
    if abs(change) <= CLEAR * error:
        return ""
    return "↑" if change > 0 else "↓"


def at(record: Mapping[str, Any]) -> str:
    """The highest frequency on the axes of the map, in words."""
    before = record["before"]
    value = before["frequencies"][before["highest"]]
    return "π" if value == 1 else f"{value:.2f} π"


def _highest(change: Mapping[str, Any], highest: int) -> tuple[float, float]:
    return change["relative"][highest], change["relative_error"][highest]


def verdict(record: Mapping[str, Any]) -> str:
    """In which blocks the highest frequencies grew or fell, in one sentence."""
    highest = record["before"]["highest"]
    found: dict[str, list[int]] = {"↑": [], "↓": [], "": []}
    for change in record["changes"]:
        found[direction(*_highest(change, highest))].append(change["block"])
    return (
        f"At {at(record)}, against frequency 0, amplitudes grow in blocks: {format_ranges(found['↑'])}; fall in: "
        f"{format_ranges(found['↓'])}; no clear change in: {format_ranges(found[''])}."
    )


def subject(record: Mapping[str, Any]) -> str:
    """What was measured, or compared with what."""
    name, after = record["model"], record.get("after")
    if not after:
        return name
    if record.get("compared"):
        return f"{name} → {record['compared']}"
    gone = sorted(set(after["removed"]) - set(record["before"]["removed"]))
    return f"{name} → without the attention of blocks {format_list(gone)}"


LAYER_NAMES = {"attn": "attention", "mlp": "MLP"}


def estimators(profile: Mapping[str, Any]) -> list[str]:
    """Names of the estimators that a profile's record holds values of."""
    return list(profile.get("estimators") or [profile.get("estimator") or ""])


def spread(row: Mapping[str, Any], layer: str, estimator: str) -> dict[str, float]:
    """{"mean": …}, with the quartiles "low", "median" and "high" where they are known, of a layer of a block's record.

    Empty where the block has no such layer.
    """
    value = row.get(layer)
    if isinstance(value, Mapping):
        return dict(value.get(estimator) or {})
    return {} if value is None else {"mean": value}


def mean(row: Mapping[str, Any], layer: str, estimator: str) -> float | None:
    """Mean entropy of the channels of a layer of a block's record; None where there is no such layer."""
    return spread(row, layer, estimator).get("mean")


def lowest(profile: Mapping[str, Any], estimator: str) -> list[int]:
    """The quarter of the blocks (at least one) whose attention has the least entropy, the lowest first."""
    ranked = _ranked(profile, estimator)
    return [row["block"] for row in ranked[: max(1, len(ranked) // 4)]]


def _ranked(profile: Mapping[str, Any], estimator: str) -> list[Mapping[str, Any]]:
    rows = [row for row in profile["blocks"] if mean(row, "attn", estimator) is not None]
    return sorted(rows, key=lambda row: mean(row, "attn", estimator))
