"""A layer profile as a terminal shows it: the table, and what has to be said about its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .profile_figures import LAYER_NAMES, estimators, lowest, mean
from .units import bits3

if TYPE_CHECKING:
    from rich.table import Table


def profile_table(record: Mapping[str, Any]) -> Table:
    """The means of a profile's record, a row per block; the lowest attention entropies are bold and numbered."""
    from rich.table import Table as RichTable
    from rich.text import Text

    names = estimators(record)
    table = RichTable()
    table.add_column("block", justify="right")
    columns: list[tuple[str, str, dict[int, str]]] = []
    for layer, title in LAYER_NAMES.items():
        for name in names:
            order = lowest(record, name) if layer == "attn" else []
            columns.append((layer, name, {block: _ordinal(n) for n, block in enumerate(order, 1)}))
            table.add_column(f"{title}\n{name}", justify="right")
    for row in record["blocks"]:
        cells = [Text(str(row["block"]))]
        for layer, name, places in columns:
            value, place = mean(row, layer, name), places.get(row["block"])
            text = "removed" if value is None else bits3(value)
            cells.append(Text(text) if place is None else Text(f"{place} {text}", style="bold"))
        table.add_row(*cells)
    return table


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def profile_notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers are, what counted them, and which layers have channels that never change."""
    notes = []
    if any(row["attn"] is not None for row in record["blocks"]):
        notes.append("1st, 2nd …: the quarter of the attention layers that has the least entropy.")
    if "gaussian" in estimators(record):
        notes.append("gaussian: mean log2 σ of the channels, without the normal's constant of 2.05 bits.")
    if "histogram" in estimators(record):
        notes.append(f"histogram: mean differential entropy of the channels, {record['bins']} bins each.")
    layer = record["blocks"][0]["mlp"]
    notes.append(f"{layer['tokens']:,} tokens of {layer['channels']:,} channels per layer, {record['dtype']}, "
                 f"counted by {record['counted_by']}.")  # fmt: skip
    for row in record["blocks"]:
        for name in LAYER_NAMES:
            layer = row[name]
            if layer is not None and layer["constant_channels"]:
                notes.append(
                    f"blocks[{row['block']}].{name}: {layer['constant_channels']} of {layer['channels']} channels never "
                    "change; each counts as −24 bits."
                )
    return notes
