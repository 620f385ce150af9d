"""What a report's sections are made of: text, tables, cells; templates and the terminal lay them out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..runtime.formatting import NONE


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


def columns_of(table: Table, names: Iterable[str]) -> tuple[list[Column], list[list[Cell]]]:
    kept = [n for n, column in enumerate(table.columns) if column.name in names]
    return [table.columns[n] for n in kept], [[row[n] for n in kept] for row in table.rows]


def filled(title: str, columns: list[Column], rows: list[list[Cell]]) -> Table:
    """A table without the columns in which no row has anything to say."""
    kept = [n for n in range(len(columns)) if any(row[n].text not in ("", NONE) for row in rows)]
    return Table(title, [columns[n] for n in kept], [[row[n] for n in kept] for row in rows])
