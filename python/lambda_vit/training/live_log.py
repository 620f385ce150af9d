"""A log that keeps the report of its run up to date while the run goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from .run_log import RunLog

# A report may take this share of the time since the one before it; the first waits as if one had taken FIRST seconds.
SHARE = 0.02
FIRST = 3.0


class LiveLog(RunLog):
    """Writes the report of the folder that it is in after an epoch, where that costs next to nothing.

    Runs with epochs of seconds have theirs from time to time, and in any case at the end, from whoever runs them. `tell` gets
    a line for each epoch and notice. Other arguments are those of `RunLog`.
    """

    def __init__(self, *arguments: Any, tell: Callable[[str], None] = lambda line: None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tell = tell
        self._reported, self._took = time.monotonic(), FIRST

    def write(self, kind: str, **fields: Any) -> None:
        super().write(kind, **fields)
        if self._processes.leads and kind in ("epoch", "notice"):
            self._tell(fields["text"] if kind == "notice" else _line(fields))
        now = time.monotonic()
        if kind != "epoch" or not self._processes.leads or self._took > SHARE * (now - self._reported):
            return
        from ..report_training import write_training_report

        # The training is worth more than a picture of it: a full disk is told when the next checkpoint meets it.
        with contextlib.suppress(Exception):
            write_training_report(self.path.parent)
        self._reported = time.monotonic()
        self._took = self._reported - now


def _line(row: dict[str, Any]) -> str:
    """An epoch, for a reader."""
    parts = [f"Epoch {row['epoch']}"]
    for name, form in (("loss", "loss {:.3f}"), ("top1", "top-1 {:.2f} %"), ("top1_ema", "averaged {:.2f} %")):
        if row.get(name) is not None:
            parts.append(form.format(row[name]))
    if row.get("attention") == "diluting":
        parts.append(f"λ {row['lambda']:.2f}")
    if row.get("best"):
        parts.append("the best so far")
    return ", ".join(parts)
