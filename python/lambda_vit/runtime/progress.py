"""Progress bars with an ETA for work that may take longer than two seconds.

Library code calls `track` or `task`. Nothing is drawn unless a caller (the command line) opened `progress_bars()` first, so
that notebooks and scripts that import the library stay silent.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

_current: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("lambda_vit_progress", default=None)


@contextlib.contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Progress]:
    """Draw the bars of all `track` and `task` calls made inside, on `console` (default: standard error)."""
    bars = Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console or Console(stderr=True),
        transient=True,
    )
    token = _current.set(bars)
    try:
        with bars:
            yield bars
    finally:
        _current.reset(token)


@contextlib.contextmanager
def task(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Open one bar; yield `advance(steps=1, note=None)`. Silent outside `progress_bars()`."""
    bars = _current.get()
    if bars is None:
        yield lambda steps=1, note=None: None
        return
    # Names of models may be paths, whose brackets are not markup.
    identifier = bars.add_task(escape(description), total=total, note="")

    def advance(steps: int = 1, note: str | None = None) -> None:
        fields: dict[str, Any] = {} if note is None else {"note": note}
        bars.update(identifier, advance=steps, **fields)

    try:
        yield advance
    finally:
        bars.remove_task(identifier)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` with a progress bar. `total` defaults to `len(items)` if that is known."""
    if total is None:
        with contextlib.suppress(TypeError):
            total = len(items)  # type: ignore[arg-type]  # the TypeError is meant
    with task(description, total) as advance:
        for item in items:
            yield item
            advance()
