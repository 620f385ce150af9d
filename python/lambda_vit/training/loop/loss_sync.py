"""After every step all processes learn its loss, and whether one of them was asked to stop."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...runtime.processes import Processes

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult(Generic[T]):
    """What came of a step."""

    item: T
    loss: float  # mean over the images of all processes
    norm: float | None
    stop: int  # the highest signal number that a process received; 0 for none


class LossSync(Generic[T]):
    """Reads losses back and adds them up over the processes, which all see the same.

    On a GPU a step's loss is read when the next step has been launched, so that nobody waits for it: what `push` returns
    is one step old there.

    Args:
        processes: All call `push` and `drain` at the same steps.
        device: Where losses are.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self._processes = processes
        self._behind = 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[T, Tensor, bool, torch.cuda.Event | None]] = deque()

    def push(self, item: T, loss: Tensor, norm: Tensor | None, stop: int) -> list[StepResult[T]]:
        """Take note of a step; returns what is known by now, oldest first. `stop` is what this process was asked now."""
        both = torch.stack((loss, loss.new_zeros(()) if norm is None else norm.to(loss.dtype)))
        event = None
        if both.is_cuda:
            both = both.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((item, both, norm is not None, event))
        return self._read(self._behind, stop)

    def drain(self, stop: int) -> list[StepResult[T]]:
        """What is left."""
        return self._read(0, stop)

    def _read(self, keep: int, stop: int) -> list[StepResult[T]]:
        results = []
        while len(self._waiting) > keep:
            item, both, has_norm, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            loss, norm = both.tolist()
            loss, agreed = self._agree(loss, stop)
            results.append(StepResult(item, loss, norm if has_norm else None, agreed))
        return results

    def _agree(self, loss: float, stop: int) -> tuple[float, int]:
        if self._processes.size == 1:
            return loss, stop
        message = torch.tensor([loss, float(stop > 0)], dtype=torch.float64)
        with self._processes.translate_comm_errors():
            dist.all_reduce(message, group=self._processes.group)
        total, asked = message.tolist()
        return total / self._processes.size, max(self._processes.gather(stop)) if asked else 0
