"""Signals while a DataLoader starts its workers: none reaches a worker that cannot say yet what it does about it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

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
