"""Which kernels and library products ran, for tests, benchmarks and the curious.

with tracing.recorded() as ran:
    ln_mlp(...)
print(ran)    # ['row_statistics', 'fc1 128x128x64 w8 s4', 'library fc2']
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_lists: list[list[str]] = []
_paused = 0


def note(name: str, detail: str = "") -> None:
    """Record that `name` ran, at next to no cost outside `recorded`."""
    if _paused:
        return
    for recorded_here in _lists:
        recorded_here.append(f"{name} {detail}".rstrip())


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Inside, nothing is recorded: it is only being timed, and its results are discarded."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Collect what runs inside, in this process, in order; all threads (the backward runs in others)."""
    ran: list[str] = []
    _lists.append(ran)
    try:
        yield ran
    finally:
        _lists[:] = [entry for entry in _lists if entry is not ran]
