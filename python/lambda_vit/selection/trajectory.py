"""Measures the accuracy and cost of the model after each pick of a selection, without training.

Step k of a trajectory is the model without the attention of the first k picks; step 0 is the full model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lambda_kernels.blocks.structure import inspect_model
from lambda_kernels.convert.checks import check_indices

from ..data.fingerprints import data_fingerprint
from ..data.loader import ImageLoader
from ..measure.cost import Cost, cost
from ..measure.intervals import LEAST, median_interval, percent_interval
from ..measure.latency import summarize, time_forwards
from ..models.properties import one_device, why_no_classes
from ..models.views import skip_attention
from ..runtime.processes import Processes
from ..runtime.progress import track
from .measurement import Measurement
from .path_statistics import PathResult
from .result import Selection


def measure_costs(
    model: nn.Module,
    layers: Sequence[int],
    *,
    batch_size: int = 64,
    seconds: float | None = 60.0,
    rounds: int = 30,
    image_size: int | tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
) -> list[dict[str, Any]]:
    """Measure size, FLOPs, memory and throughput of `model`, and of the model without the attention of each further pick.

    All steps are views that share the model's weights, and lack the attention of the picked blocks. Their timings are
    interleaved in one process, so that a change of clock or load affects all of them.

    Args:
        model: A timm vision transformer on the device and in the dtype to measure; it is not changed.
        layers: The picks in their order.
        batch_size: Images per forward pass, for throughput and peak memory.
        seconds: Time budget of all timings together, but at least six rounds; None makes `rounds` rounds.
        rounds: Timed forward passes per step.
        image_size: (channels, height, width), or pixels per side. Default: the model's input size.
        device: The expected device of the model; None accepts any.

    Returns:
        One entry for the full model and one per pick: "parameters", "flops" (per image), "weight_bytes",
        "peak_memory_bytes" (of a forward pass of `batch_size` images: measured on CUDA, elsewhere extrapolated from one
        and two images), "images_per_second" (median), "images_per_second_interval" (quartiles, the lower first), "speedup"
        (the median over the rounds of the full model's time divided by the step's) and "speedup_interval" (its 95 %
        interval; None for the full model and for fewer than six rounds).

    Raises:
        ValueError: A block index is wrong or given twice, or a number is out of range.
        UnsupportedModelError: The model cannot be changed block by block.
    """
    layers = [int(layer) for layer in layers]
    check_indices(layers, inspect_model(model).depth, "layers")
    views = {str(n): skip_attention(model, layers[:n]) if n else model for n in range(len(layers) + 1)}
    counts = [_cost(view, image_size, batch_size) for view in track(views.values(), "Cost of each step")]
    times = time_forwards(views, (batch_size,), rounds=rounds, seconds=seconds, image_size=image_size, device=device)
    taken = [times[name][batch_size] for name in views]
    latencies = [summarize(own) for own in taken]
    return [
        {
            "parameters": counted.parameters,
            "flops": counted.flops,
            "weight_bytes": counted.weight_bytes,
            "peak_memory_bytes": memory,
            "images_per_second": 1000 * batch_size / time.median_ms,
            "images_per_second_interval": [1000 * batch_size / time.high_ms, 1000 * batch_size / time.low_ms],
            **_speedup(taken[0], own),
        }
        for (counted, memory), time, own in zip(counts, latencies, taken, strict=True)
    ]


def _speedup(full: Sequence[float], step: Sequence[float]) -> dict[str, Any]:
    """Compare times of the same round, so that a load that lasts longer than a round slows both alike."""
    ratios = [before / after for before, after in zip(full, step, strict=True)]
    interval = None if step is full or len(ratios) < LEAST else list(median_interval(ratios)[1:])
    return {"speedup": statistics.median(ratios), "speedup_interval": interval}


def _cost(model: nn.Module, image_size: int | tuple[int, int, int] | None, batch_size: int) -> tuple[Cost, int]:
    """Return the model's cost, and its peak memory at `batch_size`."""
    if batch_size <= 2 or one_device(model).type == "cuda":
        counted = cost(model, image_size, batch_size)
        return counted, counted.peak_memory_bytes
    # Peak memory is the weights and a multiple of the images: two small forward passes suffice to extrapolate.
    one, two = (cost(model, image_size, size) for size in (1, 2))
    return two, one.peak_memory_bytes + (batch_size - 1) * (two.peak_memory_bytes - one.peak_memory_bytes)


@dataclass(frozen=True)
class TrialData:
    """The images on which picks are tried."""

    loader: ImageLoader  # this process's share of the images, with labels if `labelled`
    labelled: bool  # whether the labels are the model's classes
    split: str  # name of the split, for the record
    held_out: bool  # whether no layer was picked on these images

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be the same in all processes."""
        found = data_fingerprint(self.loader, labelled=self.labelled)
        return found | {"split": self.split, "labelled": self.labelled, "held_out": self.held_out}


def measure_trajectory(
    model: nn.Module,
    trial: TrialData,
    selection: Selection,
    *,
    throughput_batch: int | None,
    bins: int,
    processes: Processes,
) -> dict[str, Any]:
    """Measure entropy, accuracy, agreement and cost of the full model and after each pick.

    `throughput_batch` is the number of images per forward pass of the timing; None measures no times. Returns the
    "trajectory" of a report's record, the same in all processes.
    """
    if (reason := why_no_classes(model)) is not None:
        raise ValueError(f"the model {reason}: a trajectory has no predictions to compare")
    paths = [frozenset(selection.layers[:count]) for count in range(len(selection.layers) + 1)]
    estimator = selection.estimator or "gaussian"
    score = selection.score or "logits"
    with Measurement(
        model, trial.loader, estimator=estimator, score=score, bins=bins, cache="none", processes=processes
    ) as measurement:
        found = measurement.measure(paths, "Trajectory", compare=True, label=trial.labelled)
    trajectory = None
    with processes.all_or_none("Trajectory"):
        if processes.is_main:
            if throughput_batch is not None:
                costs = measure_costs(model, selection.layers, batch_size=throughput_batch)
            else:
                timed = ("images_per_second", "images_per_second_interval", "speedup", "speedup_interval")
                costs = [
                    row | dict.fromkeys(timed) for row in measure_costs(model, selection.layers, batch_size=1, rounds=1)
                ]
            rows = enumerate(zip(paths, costs, strict=True))
            steps = [_make_step(selection.layers[:count], found[path], row) for count, (path, row) in rows]
            trajectory = {
                "images": found[paths[0]].images,
                "split": trial.split,
                "held_out": trial.held_out,
                "labelled": trial.labelled,
                "estimator": estimator,
                "score": score,
                "throughput_batch": throughput_batch,
                "steps": steps,
            }
    return processes.broadcast(trajectory)


def _make_step(removed: Sequence[int], result: PathResult, costs: dict[str, Any]) -> dict[str, Any]:
    return {
        "removed": list(removed),
        "picked": removed[-1] if removed else None,
        "entropy": result.entropy,
        "top1": result.top1,
        "top1_interval": None if result.hits is None else percent_interval(result.top1, result.images),
        "agreement": result.agreement,
        "kl": result.kl,
        **costs,
    }
