"""Commands that run within limits: the time there is for all, for one part of a run and for each of its commands."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.tools.records import REPOSITORY

# Kept back for stopping what outlasts its limit and for writing what was found.
RESERVE_S = 20.0

# How long a command may take to end once it was interrupted.
PATIENCE_S = 8.0


class Budget:
    """Seconds that are left for all parts together."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds - RESERVE_S

    def left(self) -> float:
        """Seconds until the end, none after it."""
        return max(0.0, self._end - self._clock())

    def grant(self, limit: float, least: float) -> float | None:
        """What a part may take: its limit or what is left; None if it needs more than that."""
        left = self.left()
        return min(limit, left) if left >= min(limit, least) else None


@dataclass
class Step:
    """One command that ran."""

    command: str
    status: int | None  # None: it was stopped at its limit
    seconds: float
    output: str = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether it ended by itself and well."""
        return self.status == 0


class Job:
    """A part while it runs: its commands, the time it has, and where things go.

    Attributes:
        log: The log of all parts; outputs are added to it.
        rows: The file to which a benchmark adds each row as soon as it has it.
        environment: Of every command.
        steps: The commands that ran.
    """

    def __init__(self, folder: Path, seconds: float, environment: dict[str, str]) -> None:
        self.log, self.rows, self.environment = folder / "logs.txt", folder / "rows.jsonl", environment
        self.steps: list[Step] = []
        self._end = time.monotonic() + seconds
        self._writing = threading.Lock()

    def left(self) -> float:
        """Seconds until this part is stopped."""
        return max(0.0, self._end - time.monotonic())

    def step(self, *command: object, at_most: float | None = None, **environment: str) -> Step:
        """Run a command in the repository, its output into the log; stopped at `at_most` seconds or at the part's limit."""
        seconds = self.left() if at_most is None else min(at_most, self.left())
        done = execute([str(word) for word in command], seconds, {**self.environment, **environment}, self.log)
        self.steps.append(done)
        return done

    def side_by_side(
        self, commands: dict[str, Sequence[object]], workers: int, at_most: float, **environment: str
    ) -> dict[str, Step]:
        """Run commands, `workers` at a time; the log gets the output of each when it has ended, in one piece."""

        def run(words: Sequence[object]) -> Step:
            if not self.left():
                return Step(" ".join(map(str, words)), None, 0.0, "no time was left")
            done = execute(
                [str(word) for word in words], min(at_most, self.left()), {**self.environment, **environment}
            )
            with self._writing, self.log.open("a", encoding="utf-8") as file:
                file.write(f"$ {done.command}\n{done.output}\n[{_ended(done.status, done.seconds)}]\n\n")
            return done

        with ThreadPoolExecutor(workers) as pool:
            found = dict(zip(commands, pool.map(run, commands.values()), strict=True))
        self.steps += found.values()
        return found


def execute(words: list[str], seconds: float, environment: dict[str, str], log: Path | None = None) -> Step:
    """Run a command and everything it starts for at most `seconds`; its output goes into `log` as it comes."""
    started, text, status = time.monotonic(), " ".join(words), None
    with tempfile.TemporaryFile("w+b") if log is None else log.open("a+b") as file:
        file.write(f"$ {text}\n".encode())
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                words,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Step(text, 127, 0.0, f"{words[0]} cannot be run: {error}")
        try:
            status = process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            _stop(process)
        except BaseException:
            _stop(process)
            raise
        file.seek(begin)
        output, taken = file.read().decode("utf-8", "replace"), round(time.monotonic() - started, 1)
        file.seek(0, os.SEEK_END)
        file.write(f"\n[{_ended(status, taken)}]\n\n".encode())
    return Step(text, status, taken, output)


def _ended(status: int | None, seconds: float) -> str:
    return f"{'stopped at its limit' if status is None else f'status {status}'} after {seconds:.1f} s"


def _stop(process: subprocess.Popen) -> None:
    """An interrupt, after which pytest says what it has found so far; then an end to whatever is left of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=PATIENCE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
