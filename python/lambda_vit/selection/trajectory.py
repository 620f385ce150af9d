"""What every pick of a selection costs and gains, and which pick to stop at.

A step of a trajectory is the model without the attention of the first picks: step 0 is the full model, step k the one
without k attention layers, nothing trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..data.fingerprints import data_fingerprint
from ..measure.intervals import wilson_interval
from ..runtime.processes import Processes
from .measurement import Measurement
from .result import Selection

if TYPE_CHECKING:
    import torch

    from ..data.loader import ImageLoader
    from ..measure.cost import Cost


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
    """Size, FLOPs, memory and measured throughput of `model` and of what is left of it after each pick.

    All steps are views that share the model's weights, so that none is copied; the attention of the picked blocks is
    really gone from them. They take turns in one process: a change of clock or load hits all alike.

    Args:
        model: A timm vision transformer, where and in the dtype in which it is to be measured. It is not changed.
        layers: The picks in their order.
        batch_size: Images per forward, for throughput and peak memory.
        seconds: A budget for the throughput of all steps together; None keeps to `rounds`. Five rounds are made however
            long they take.
        rounds: Timed forwards per step.
        image_size: (channels, height, width), or pixels a side. Default: what the model was built for.
        device: Where the model is expected to be; None takes where it is.

    Returns:
        One entry for the full model and one per pick: "parameters", "flops" (per image), "weight_bytes",
        "peak_memory_bytes" (of a forward of `batch_size` images: measured on CUDA, elsewhere predicted from one and two
        images), "images_per_second" (median), "images_per_second_interval" (quartiles, the lower first) and "speedup"
        (against the full model, by the medians).

    Raises:
        ValueError: A block index is wrong or given twice, or a number is out of range.
        UnsupportedModelError: The model cannot be changed block by block.
    """
    from lambda_kernels.blocks.structure import inspect_model
    from lambda_kernels.convert.checks import check_indices

    from ..measure.latency import compare_latency
    from ..models.views import skip_attention
    from ..runtime.progress import track

    layers = [int(layer) for layer in layers]
    check_indices(layers, inspect_model(model).depth, "layers")
    views = {str(n): skip_attention(model, layers[:n]) if n else model for n in range(len(layers) + 1)}
    counts = [_cost(view, image_size, batch_size) for view in track(views.values(), "Cost of each step")]
    times = compare_latency(views, (batch_size,), rounds=rounds, seconds=seconds, image_size=image_size, device=device)
    taken = [times[name][batch_size] for name in views]
    return [
        {
            "parameters": counted.parameters,
            "flops": counted.flops,
            "weight_bytes": counted.weight_bytes,
            "peak_memory_bytes": memory,
            "images_per_second": 1000 * batch_size / time.median_ms,
            "images_per_second_interval": [1000 * batch_size / time.high_ms, 1000 * batch_size / time.low_ms],
            "speedup": taken[0].median_ms / time.median_ms,
        }
        for (counted, memory), time in zip(counts, taken, strict=True)
    ]


def _cost(model: nn.Module, image_size: int | tuple[int, int, int] | None, batch_size: int) -> tuple[Cost, int]:
    """The model's cost, and its peak memory at `batch_size`."""
    from ..measure.cost import cost
    from ..models.properties import one_device

    if batch_size <= 2 or one_device(model).type == "cuda":
        counted = cost(model, image_size, batch_size)
        return counted, counted.peak_memory_bytes
    # What lives at the peak is weights and a multiple of the images: two small forwards tell as much as a large one.
    one, two = (cost(model, image_size, size) for size in (1, 2))
    return two, one.peak_memory_bytes + (batch_size - 1) * (two.peak_memory_bytes - one.peak_memory_bytes)


@dataclass(frozen=True)
class TrialData:
    """The images on which picks are tried.

    Attributes:
        loader: Images, with labels where `labelled`; this process's share of them.
        labelled: Whether the labels are the model's classes.
        split: The split that `loader` reads, for the record.
        held_out: Whether the selection has not seen these images.
    """

    loader: ImageLoader
    labelled: bool
    split: str
    held_out: bool

    def fingerprint(self) -> dict[str, Any]:
        """Return what all processes must have opened alike."""
        found = data_fingerprint(self.loader, labelled=self.labelled)
        return found | {"split": self.split, "labelled": self.labelled, "held_out": self.held_out}


def measure_trajectory(
    model: nn.Module,
    trial: TrialData,
    selection: Selection,
    *,
    throughput_batch: int | None,
    seconds: float = 60.0,
    bins: int = 256,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Entropy, accuracy, agreement and cost of the full model and of what is left after each pick.

    Args:
        model: The full model.
        trial: The images.
        selection: The layers, in the order of picking.
        throughput_batch: Images per forward pass of the timing; None measures no times.
        seconds: Time budget of the timing.
        bins: Number of bins of a histogram.
        processes: The processes that measure together.

    Returns:
        The "trajectory" of a report's record; the same in all processes.

    Raises:
        ValueError: The model has no classifier, so that there are no answers to compare.
        ValueError, NonFiniteActivationError, RuntimeError: As `Measurement.measure`.
    """
    if not getattr(model, "num_classes", 1):
        raise ValueError("the model has no classifier: there are no answers that a trajectory could compare")
    processes = Processes() if processes is None else processes
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
            timing: dict[str, Any] = {"batch_size": 1, "rounds": 1}
            if throughput_batch is not None:
                timing = {"batch_size": throughput_batch, "seconds": seconds}
            costs = measure_costs(model, selection.layers, **timing)
            images = found[paths[0]].images
            steps = []
            for count, (path, cost) in enumerate(zip(paths, costs, strict=True)):
                result = found[path]
                interval = None
                if result.hits is not None:
                    interval = [100 * end for end in wilson_interval(result.hits, images)]
                step = {
                    "removed": list(selection.layers[:count]),
                    "picked": selection.layers[count - 1] if count else None,
                    "entropy": result.entropy,
                    "top1": result.top1,
                    "top1_interval": interval,
                    "agreement": result.agreement,
                    "kl": result.kl,
                }
                steps.append(step | {key: value for key, value in cost.items() if key not in step})
            if throughput_batch is None:
                for step in steps:
                    step |= {"images_per_second": None, "images_per_second_interval": None, "speedup": None}
            trajectory = {
                "images": images,
                "split": trial.split,
                "held_out": trial.held_out,
                "labelled": trial.labelled,
                "estimator": estimator,
                "score": score,
                "throughput_batch": throughput_batch,
                "steps": steps,
            }
    return processes.broadcast(trajectory)
