"""Requests to stop: noted in the training process, survived by the workers of its data loaders."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

# Signals that ask a run to stop: Ctrl-C, kill, torchrun and batch systems. Batch systems can send SIGUSR1 some time before
# the end; Windows does not have it.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


@contextlib.contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A context in which `handler` receives these signals; only the main thread can: in others nothing changes."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if is_main}
    try:
        yield
    finally:
        for number, earlier in before.items():  # None: one that was not set from Python
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Block the signals that ask for a stop; worker processes started inside inherit the block until `init_worker` ends it.

    A worker of PyTorch's that receives SIGTERM before its `worker_init_fn` has run dies, and the run fails with it. Windows
    has no signal masks, so that nothing is blocked there.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(init: Callable[[int], None], number: int) -> None:
    """Call `init(number)`, then unblock what `block_signals` blocked; with `functools.partial` a `worker_init_fn`."""
    try:
        init(number)
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class StopRequest:
    """A context that records SIGTERM, SIGUSR1 and a first SIGINT (Ctrl-C); a second SIGINT raises KeyboardInterrupt at once.

    Only the main thread can handle signals; in another thread, entering the context changes nothing. Forked processes inherit
    the handlers: workers of a DataLoader replace them with `spare_worker`.

    Attributes:
        signal: The number of the first signal received; None before one is.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._interrupted = False

    def __enter__(self) -> StopRequest:
        self._handled = handle_signals(STOPPING, self._note)
        self._handled.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._handled.__exit__(*raised)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if self.signal is None:
            self.signal = number


def spare_worker(number: int = 0) -> None:
    """Keep a DataLoader's worker alive when the run receives a request to stop; a `worker_init_fn`, or called by one.

    Terminals, torchrun and batch systems send their signal to all processes of a job. If a worker died of it, the run would
    fail before it writes a checkpoint. Therefore the worker moves to a process group of its own, which signals to the run's
    group do not reach, and ignores the first SIGTERM sent to it. A second SIGTERM ends it: loaders end a hanging worker that
    way. Otherwise the worker ends with its loader, or with the process that started it.
    """
    with contextlib.suppress(AttributeError, OSError):  # only POSIX has process groups
        os.setpgrp()
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
