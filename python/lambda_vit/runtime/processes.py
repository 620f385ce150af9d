"""The processes of one run: each works on its share of the data, rank 0 decides, and all stop when one fails.

Without a process group every function here is a no-op, so that callers need no special case.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .formatting import format_differences
from .signals import handle_signals

T = TypeVar("T")

# A pass over a large shard can take long. Only a process that hangs without dying is waited for until this timeout.
TIMEOUT = datetime.timedelta(hours=6)


class ProcessLostError(RuntimeError):
    """Another process of the run has stopped or cannot be reached."""


class Processes:
    """The process group of this run, if there is one.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
    """

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if initialized else 0
        self.size = dist.get_world_size() if initialized else 1
        # Messages use gloo whatever backend tensors use: gloo notices at once when a process is gone.
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return, on every rank, the `value` of each rank in rank order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.translate_comm_errors():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def broadcast(self, value: T) -> T:
        """Return the `value` of rank 0 on every rank."""
        if self.size == 1:
            return value
        found = [value]
        with self.translate_comm_errors():
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum a float64 tensor over all ranks, in rank order, so that the result is the same on each."""
        if self.size == 1:
            return values
        return torch.tensor(self.gather(values.tolist()), dtype=torch.float64).sum(0).to(values.device)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group for `EntropyMeter.all_reduce`."""
        return self._group

    @contextlib.contextmanager
    def all_or_none(self, doing: str) -> Iterator[None]:
        """A context whose work succeeds on all ranks or fails on all; the other ranks report which one failed and why.

        Raises:
            RuntimeError: On a rank that succeeded, if another failed.
            ProcessLostError: Another process is gone.
        """
        failure: Exception | None = None
        try:
            yield
        except ProcessLostError:
            raise
        except Exception as error:
            failure = error
        if self.size > 1:
            try:
                messages = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
            except ProcessLostError:
                if failure is not None:
                    raise failure from None
                raise
            for rank, message in enumerate(messages):
                if message is not None and failure is None:
                    raise RuntimeError(f"{doing}: the process of rank {rank} failed: {message}")
        if failure is not None:
            raise failure

    def assert_same(self, value: dict[str, Any], doing: str) -> None:
        """Raise a ValueError that names the differences, on every rank, unless all processes were started alike."""
        first, *others = self.gather(value)
        for rank, other in enumerate(others, 1):
            if listed := format_differences(first, other, "{}: {!r} and {!r}"):
                raise ValueError(f"{doing}: ranks 0 and {rank} were started differently ({listed}). Start all alike")

    @contextlib.contextmanager
    def translate_comm_errors(self) -> Iterator[None]:
        """A context for communication with the other processes: ProcessLostError replaces the error of the backend."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what gloo raises when a connection closes or times out
            raise ProcessLostError(
                f"rank {self.rank} of {self.size}: another process of this run has stopped or cannot be reached "
                f"({str(error).splitlines()[0][:200]})"
            ) from error


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """A context in which SIGTERM (from kill, a scheduler, or torchrun after a failure) exits, so that caches are removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    with handle_signals([signal.SIGTERM], end):
        yield


def local_device(device: str) -> str:
    """The device that `device` names in this process: "auto" and "cuda" mean its own GPU if torchrun started it."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def _backend() -> str:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    direct = dist.is_nccl_available() and 0 < here <= torch.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if direct else "gloo"


@contextlib.contextmanager
def process_group(*, training: bool = False) -> Iterator[Processes]:
    """The processes that torchrun started, in a process group that is opened and closed around the context.

    With `training`, tensors on GPUs are exchanged directly by NCCL if each process has a GPU of its own.
    """
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        yield Processes()
        return
    backend = _backend() if training else "gloo"
    if "nccl" in backend:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # NCCL uses the current device
    dist.init_process_group(backend=backend)
    try:
        yield Processes()
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
