"""The ratios to reach, kept in `targets.json`: what is compared with what, on which kind of device, and in which row.

A target is a ratio rival/ours. `limit` is what physics allows on paper. An entry without a target is listed for its figure.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """One ratio.

    Attributes:
        what, against: In words.
        target: The least ratio aimed at; None where there is no aim.
        limit: The most that can be had, on paper; None where nobody counted.
        device: "cpu" or "gpu".
        row, ours, rival: Where the ratio is found: the row's name, and the names of the two versions in it.
    """

    what: str
    against: str
    target: float | None
    limit: float | None
    device: str
    row: str
    ours: str
    rival: str


@functools.cache
def load() -> tuple[Target, ...]:
    """All of them, in the order of the table."""
    text = Path(__file__).with_name("targets.json").read_text(encoding="utf-8")
    return tuple(Target(**entry) for entry in json.loads(text))


def of(row: str, ours: str, rival: str) -> float | None:
    """The ratio to reach in a row, if there is one."""
    return next((t.target for t in load() if (t.row, t.ours, t.rival) == (row, ours, rival)), None)
