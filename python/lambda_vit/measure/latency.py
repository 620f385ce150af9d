"""Times of several models or training steps, measured in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lambda_kernels.ops.checks import require_int

from ..models.properties import eval_mode, input_shape
from ..runtime import progress
from .intervals import LEAST
from .runner import Figures, ModelRunner, resolve_device

MINIMUM_ROUNDS = LEAST  # fewer give no interval of a speedup


@dataclasses.dataclass(frozen=True)
class Latency(Figures):
    """Time of one forward, or of one training step, of a whole batch in milliseconds, over `rounds` repetitions."""

    median_ms: float
    low_ms: float  # lower quartile
    high_ms: float  # upper quartile
    rounds: int


def compare_latency(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int] = (1, 64),
    *,
    rounds: int = 30,
    warmup: int = 3,
    seconds: float | None = None,
    image_size: int | tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, dict[int, Latency]]:
    """Time forwards of several models, interleaved in one process.

    Args:
        models: By name. All on one device; each gets inputs of its own size and dtype.
        batch_sizes: Images per forward.
        rounds: Repetitions per model and batch size; the order of the models rotates from one to the next.
        warmup: Untimed repetitions before them.
        seconds: A time budget for all batch sizes. It cuts the warm-up to one and the rounds to no fewer than six.
        image_size: (channels, height, width), or pixels a side. Default: the size that each model was built for.
        device: The device that the models must be on; None: any that they share.

    Returns:
        `result[name][batch_size]`.

    Raises:
        ValueError: There are no models, they are on different devices or not on `device`, or a number is out of range.
    """
    times = time_forwards(models, batch_sizes, rounds, warmup, seconds, image_size, device)
    return {name: {size: summarize(taken) for size, taken in own.items()} for name, own in times.items()}


def time_forwards(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int],
    rounds: int = 30,
    warmup: int = 3,
    seconds: float | None = None,
    image_size: int | tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, dict[int, list[float]]]:
    """The times behind `compare_latency`, in milliseconds and by round; arguments and errors are the same."""
    if not models:
        raise ValueError("models is empty: pass at least one, such as {'model': model}")
    for name, value in (("rounds", rounds), *(("batch_sizes", size) for size in batch_sizes)):
        require_int(name, value, 1, strict=True)
    runners = {name: ModelRunner(model, device) for name, model in models.items()}
    devices = {name: runner.device for name, runner in runners.items()}
    expected = next(iter(devices.values())) if device is None else resolve_device(device)
    if any(found != expected for found in devices.values()):
        found = ", ".join(f"{name} on {where}" for name, where in devices.items())
        raise ValueError(f"latency is compared on one device ({expected}), got {found}: move the models there first")
    result: dict[str, dict[int, list[float]]] = {name: {} for name in models}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        for size in batch_sizes:
            calls = {
                name: partial(r.model.__call__, r.images(size, input_shape(r.model, image_size)))
                for name, r in runners.items()
            }
            budget = math.inf if seconds is None else seconds / len(batch_sizes)
            times = interleaved_times(calls, expected, f"Latency, batch {size}", rounds, warmup, budget, budget)
            for name, taken in times.items():
                result[name][size] = taken
    return result


def interleaved_timing(*arguments: Any, **options: Any) -> dict[str, Latency]:
    """Summarize what `interleaved_times` measures; its arguments."""
    return {name: summarize(taken) for name, taken in interleaved_times(*arguments, **options).items()}


def interleaved_times(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    description: str,
    rounds: int,
    warmup: int,
    seconds: float,
    warmup_seconds: float,
    watch: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, list[float]]:
    """Time calls in turn, so that a change of clock or load affects all alike: milliseconds, by round.

    The order rotates from one round to the next. A budget of `seconds` cuts the rounds to no fewer than six, and
    `warmup_seconds` of it the warm-up to one untimed call of each. `watch(name)` is a context around each timed call.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    with progress.task(description, rounds) as advance:
        for done in range(warmup):
            if done and time.perf_counter() - started > warmup_seconds:
                break
            for name in names:
                calls[name]()
        for turn in range(rounds):
            if turn >= MINIMUM_ROUNDS and time.perf_counter() - started > seconds:
                advance(rounds - turn)
                break
            first = turn % len(names)
            for name in itertools.chain(names[first:], names[:first]):
                synchronize(device)
                with watch(name):
                    begun = time.perf_counter()
                    calls[name]()
                    synchronize(device)
                    times[name].append(1000 * (time.perf_counter() - begun))
            advance(note=", ".join(f"{taken[-1]:.0f} ms" for taken in times.values()))
    return times


def summarize(times: Sequence[float]) -> Latency:
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(quartiles).tolist()
    return Latency(median, low, high, len(times))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
