"""Feature frequencies as a terminal shows them: the table, and what has to be said about its numbers.

What is shown is a record: {"model": name, "before": `FeatureFrequencies.to_dict()`}, or {"model": name} with what
`FrequencyComparison.to_dict()` gives, where "compared" may name the second model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .units import bits2, bits3, listed, ranges, signed3, small

if TYPE_CHECKING:
    from rich.table import Table

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


def frequency_table(record: Mapping[str, Any]) -> Table:
    """A row per block: Δ log amplitude at the highest frequency and on average, before, after, and what changed."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    before, after, highest = record["before"], record.get("after"), record["before"]["highest"]
    place = "at π" if at(record) == "π" else "near π"  # and no wider than a number
    if after:
        titles = ["block", f"{place}\nbefore", "\nafter", "\nchange", "mean\nbefore", "\nafter", "\nchange"]
        titles += ["factor\nat 0", f"\n{place}"]
    else:
        titles = ["block", f"Δ {place}", "mean Δ", "amplitude at 0", place]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for index, row in enumerate(before["blocks"]):
        other = after["blocks"][index] if after else row
        cells = [f"{'' if other['attention'] else 'removed '}{row['block']}"]
        if after:
            change, logs = record["changes"][index], (row["log_amplitude"], other["log_amplitude"])
            for levels, value, error in (
                ((row["relative"][highest], other["relative"][highest]), *_highest(change, highest)),
                ((row["mean"], other["mean"]), change["mean"], change["mean_error"]),
            ):
                cells += [*map(bits2, levels), signed3(value) + (direction(value, error) or " ")]
            cells += [_factor(logs[1][k] - logs[0][k]) for k in (0, highest)]
        else:
            cells += [bits3(row["relative"][highest]), bits3(row["mean"])]
            cells += [f"{row['amplitude'][k]:.3g}" for k in (0, highest)]
        table.add_row(*map(Text, cells))
    return table


def _highest(change: Mapping[str, Any], highest: int) -> tuple[float, float]:
    return change["relative"][highest], change["relative_error"][highest]


def _factor(difference: float) -> str:
    return f"{math.exp(difference):.3f}" if difference < 6 else f"{math.exp(difference):.3g}"


def frequency_notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers are, which way the highest frequencies went, and what was floored."""
    before, after = record["before"], record.get("after")
    rows, columns = before["grid"]
    notes = [
        "Δ log amplitude: mean ln |F| of the map's Fourier transform, less that at frequency 0. 'mean' is over the "
        f"{before['highest']} bins above 0 up to {at(record)}.",
        f"{rows} × {columns} tokens of {before['channels']} channels per image, prefix tokens ({before['prefix_tokens']}) left "
        f"out; features {before['dtype']}, transforms float64.",
    ]
    if after:
        highest = before["highest"]
        largest = max(
            error for change in record["changes"] for error in (_highest(change, highest)[1], change["mean_error"])
        )
        notes += [
            f"↑ ↓: a change of more than {CLEAR:g} standard errors over the {before['samples']} images, each compared with "
            f"itself; the largest standard error is {small(largest)}.",
            "factor: what the amplitude (geometric mean) is multiplied by. " + verdict(record),
        ]
        scale = after["residual_scale"]
        if scale not in (None, 1.0):
            notes.append(
                f"Each removed block multiplies its input by {scale:g}: amplitudes grow with it, Δ does not, since a common "
                "factor cancels."
            )
    for title, part in (("before", before), ("after", after)):
        floored = {row["block"]: row["floored"] for row in part["blocks"] if row["floored"]} if part else {}
        if floored:
            total = part["samples"] * part["channels"] * rows * columns
            number = sum(floored.values())
            few = "1 amplitude" if number == 1 else f"{number:,} amplitudes"
            notes.append(
                f"{f'{title}: ' if after else ''}{few}, of {total:,} in each block, below 2^-24 counted as that in "
                f"logarithms ({'block' if len(floored) == 1 else 'blocks'} {ranges(floored)})."
            )
    return notes


def verdict(record: Mapping[str, Any]) -> str:
    """In which blocks the highest frequencies grew or fell, in one sentence."""
    highest = record["before"]["highest"]
    found: dict[str, list[int]] = {"↑": [], "↓": [], "": []}
    for change in record["changes"]:
        found[direction(*_highest(change, highest))].append(change["block"])
    return (
        f"At {at(record)}, against frequency 0, amplitudes grow in blocks: {ranges(found['↑'])}; fall in: "
        f"{ranges(found['↓'])}; no clear change in: {ranges(found[''])}."
    )


def subject(record: Mapping[str, Any]) -> str:
    """What was measured, or compared with what."""
    name, after = record["model"], record.get("after")
    if not after:
        return name
    if record.get("compared"):
        return f"{name} → {record['compared']}"
    gone = sorted(set(after["removed"]) - set(record["before"]["removed"]))
    return f"{name} → without the attention of blocks {listed(gone)}"
