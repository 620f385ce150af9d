"""Times on a CPU: versions of one computation take turns in one process.

Wall-clock time is what a user waits. Processor time leaves out what other programs took off the core, and is sound with one
thread only: more than one are charged for waiting for each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.support import intervals

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass
class Turns:
    """Seconds of each version in each turn, by both clocks."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {clock: {} for clock in CLOCKS})

    def take(self, name: str, call: Callable[[], object]) -> None:
        """Run a version once and note what it took."""
        begun = {clock: now() for clock, now in CLOCKS.items()}
        call()
        for clock, now in CLOCKS.items():
            self.seconds[clock].setdefault(name, []).append(now() - begun[clock])

    def ratio(self, clock: str, above: str, below: str) -> dict[str, float]:
        """Of one version's time to another's, turn by turn."""
        return intervals.paired_ratio(self.seconds[clock][above], self.seconds[clock][below])

    def microseconds(self, clock: str) -> dict[str, dict[str, float]]:
        """Quartiles of each version."""
        found = {}
        for name, values in self.seconds[clock].items():
            low, middle, high = (round(1e6 * value, 2) for value in intervals.quartiles(values))
            found[name] = {"low": low, "median": middle, "high": high}
        return found


def rounds_within(seconds: float, turn: float, most: int) -> int:
    """How many turns fit: as many as have an interval at least, however long they take."""
    return max(intervals.LEAST, min(most, int(seconds / max(turn, 1e-9))))
