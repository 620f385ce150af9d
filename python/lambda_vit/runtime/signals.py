"""Signals while a DataLoader starts its workers: none reaches a worker that cannot say yet what it does about it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from .processes import Processes

# What asks a run to end: Ctrl-C, kill, torchrun and batch systems; of SIGUSR1 it can be chosen how long before the end. Windows
# has no such.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals that ask for a stop wait until the end of this, and in processes started inside until `started` lets them come.

    PyTorch lets SIGTERM kill a worker from its first instruction to its `worker_init_fn`, and a worker that dies takes the run
    with it. Where there are no such masks (Windows) nothing is held back.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def started(init: Callable[[int], None], number: int) -> None:
    """`init(number)`, and then what was held back; with `functools.partial` a `worker_init_fn`."""
    try:
        init(number)
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class StopRequest:
    """While it is entered, SIGTERM, SIGUSR1 and a first SIGINT (Ctrl-C) are noted; a second SIGINT interrupts at once.

    Elsewhere than in the main thread no signal can be noted, and entering changes nothing. Processes that are forked inside
    inherit this: for workers of a DataLoader there is `spare_worker`.

        with StopRequest() as stop:
            for step in steps:
                ...
                if stop.agreed(processes):
                    save()
                    raise SystemExit(stop.exit_code)

    Attributes:
        signal: The number of the first one that came; None: none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # signals are the main thread's
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():  # None: one that was not set from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def __bool__(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that the signal killed: 128 and its number; 0: none came."""
        return 0 if self.signal is None else 128 + self.signal

    def agreed(self, processes: Processes) -> bool:
        """Whether any rank was asked to stop: the same answer on all, so that they stop after the same step.

        All ranks must call it. Afterwards all have the `signal` of the first rank that got one.
        """
        numbers = [number for number in processes.gather(self.signal) if number is not None]
        if numbers:
            self.signal = numbers[0]
        return bool(numbers)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if self.signal is None:
            self.signal = number


def spare_worker(number: int = 0) -> None:
    """Keep a DataLoader's worker alive when the run is asked to stop; a `worker_init_fn`, or called by one.

    Terminals, torchrun and batch systems send their signal to all processes of a job. A worker that dies of it takes the run
    with it before a checkpoint is written. In a process group of its own a worker is not reached by what is sent to that of the
    run, and the first SIGTERM sent to itself is passed over. A second one ends it: that is how loaders end a worker that hangs.
    Otherwise it ends with its loader, or once the process that started it is gone.
    """
    with contextlib.suppress(AttributeError, OSError):  # there are no process groups elsewhere than on POSIX
        os.setpgrp()
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
