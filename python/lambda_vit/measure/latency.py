"""Latency of several models, measured in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lambda_kernels.ops.checks import require_int

from ..models.properties import eval_mode, input_shape
from ..runtime import progress
from .runner import _Figures, _resolved, _Runner

MINIMUM_ROUNDS = 5  # fewer give no quartiles worth printing


@dataclasses.dataclass(frozen=True)
class Latency(_Figures):
    """Time of one forward of a whole batch, in milliseconds, over `rounds` repetitions."""

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
    """Time models against each other, taking turns in one process so that a change of clock or load hits all alike.

    Args:
        models: By name. All on one device; each gets inputs of its own size and dtype.
        batch_sizes: Images per forward.
        rounds: Repetitions per model and batch size; the order of the models rotates from one to the next.
        warmup: Untimed repetitions before them.
        seconds: A budget for all of it. It cuts the warm-up to one and the rounds to no fewer than five.
        image_size: (channels, height, width), or pixels a side. Default: what each model was built for.
        device: Where the models are expected to be; None takes whatever device they share.

    Returns:
        `result[name][batch_size]`.

    Raises:
        ValueError: No models, models on different devices or not on `device`, or a number out of range.
    """
    if not models:
        raise ValueError("models is empty: pass at least one, such as {'model': model}")
    for name, value in (("rounds", rounds), *(("batch_sizes", size) for size in batch_sizes)):
        require_int(name, value, 1)
    runners = {name: _Runner(model, device) for name, model in models.items()}
    devices = {name: runner.device for name, runner in runners.items()}
    expected = next(iter(devices.values())) if device is None else _resolved(device)
    if any(found != expected for found in devices.values()):
        found = ", ".join(f"{name} on {where}" for name, where in devices.items())
        raise ValueError(f"latency is compared on one device ({expected}), got {found}: move the models there first")
    result: dict[str, dict[int, Latency]] = {name: {} for name in models}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        advance = stack.enter_context(progress.task("Measure latency", len(batch_sizes) * rounds))
        for size in batch_sizes:
            inputs = {name: r.images(size, input_shape(r.model, image_size)) for name, r in runners.items()}
            budget = math.inf if seconds is None else seconds / len(batch_sizes)
            times = _take_turns(models, inputs, expected, rounds, warmup, budget, advance)
            for name, taken in times.items():
                low, median, high = torch.tensor(taken, dtype=torch.float64).quantile(
                    torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
                )
                result[name][size] = Latency(float(median), float(low), float(high), len(taken))
    return result


def _take_turns(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    device: torch.device,
    rounds: int,
    warmup: int,
    budget: float,
    advance: Callable[..., None],
) -> dict[str, list[float]]:
    """Milliseconds per model and round."""
    started = time.perf_counter()
    names = list(models)
    for done in range(warmup):
        if done and time.perf_counter() - started > budget:
            break
        for name in names:
            models[name](inputs[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn >= MINIMUM_ROUNDS and time.perf_counter() - started > budget:
            advance(rounds - turn)
            break
        first = turn % len(names)
        for name in itertools.chain(names[first:], names[:first]):
            _synchronize(device)
            begun = time.perf_counter()
            models[name](inputs[name])
            _synchronize(device)
            times[name].append(1000 * (time.perf_counter() - begun))
        advance()
    return times


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
