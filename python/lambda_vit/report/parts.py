"""What a report's sections are made of: text, tables, cells; templates and the terminal lay them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..runtime.formatting import NONE, format_change, format_known
from .records.readings import Cost

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Column:
    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Cell:
    """`sub` is the small print below the text; `tone` is "good", "bad", "pick" or nothing."""

    text: str
    sub: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """`folded` tables hold the numbers behind a figure."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    folded: bool = False

    def select(self, *names: str) -> Table:
        """The table with these columns only."""
        kept = [n for n, column in enumerate(self.columns) if column.name in names]
        return Table(self.title, [self.columns[n] for n in kept], [[row[n] for n in kept] for row in self.rows])


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figure: str = ""
    caption: str = ""
    items: list[str] = field(default_factory=list)
    commands: list[dict[str, str]] = field(default_factory=list)


def numeric(*names: str) -> list[Column]:
    return [Column(name, True) for name in names]


def make_table(
    title: str,
    columns: Iterable[object],
    rows: Iterable[Iterable[object]],
    *,
    folded: bool = False,
    sparse: bool = False,
) -> Table:
    """A table of columns and cells, of which plain ones may be names and values; `sparse` omits columns without any content."""
    heads = [column if isinstance(column, Column) else Column(str(column)) for column in columns]
    cells = [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in rows]
    kept = [n for n in range(len(heads)) if not sparse or any(row[n].text not in ("", NONE) for row in cells)]
    return Table(title, [heads[n] for n in kept], [[row[n] for n in kept] for row in cells], folded)


def compare(name: str, values: Iterable[str], change: str, note: str = "") -> dict[str, str]:
    """A row of the comparison of two models, with a value of each."""
    before, after = values
    return {"name": name, "before": before, "after": after, "change": change, "note": note}


def compare_costs(before: Mapping[str, Any], after: Mapping[str, Any], costs: Iterable[Cost]) -> list[dict[str, str]]:
    """Rows for the costs that are known of both models."""
    found = ((name, before.get(key), after.get(key), show) for name, key, show in costs)
    return [
        compare(name, (show(old), show(new)), format_change(old, new))
        for name, old, new, show in found
        if None not in (old, new)
    ]


def cost_cells(model: Mapping[str, Any], full: Mapping[str, Any], costs: Iterable[Cost]) -> list[Cell]:
    """The costs of a model, each with its change from those of another one below."""
    cells = []
    for _, key, show in costs:
        value, base = model.get(key), full.get(key)
        change = format_change(base, value) if model is not full and None not in (base, value) else ""
        cells.append(Cell(format_known(value, show), change))
    return cells


def draw_table(columns: Iterable[Column], rows: Iterable[Iterable[object]], **options: Any) -> RichTable:
    """A table for the terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, **options)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        drawn.add_column(Text(column.name), justify=justify, no_wrap=column.numeric, overflow="fold")
    styles = {"good": "green", "bad": "bold red"}
    for row in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row]
        # Text, not str: rich would take "[94.0]" in a label for markup.
        drawn.add_row(*(Text(cell.text, style=styles.get(cell.tone, "")) for cell in cells))
    return drawn
