"""What a selection does to the network, measured after each pick with nothing trained, and the record of all of it."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from . import environment
from .evaluate import input_shape, wilson_interval
from .processes import Processes
from .selection import Selection, model_name
from .stopping import missed
from .trajectory import measure_costs, recommend
from .transfer import Measurement
from .units import size


def measure_trajectory(
    model: nn.Module,
    loader: Iterable,
    selection: Selection,
    *,
    split: str,
    held_out: bool,
    labelled: bool,
    throughput_batch: int | None,
    seconds: float = 60.0,
    tolerance: float = 5.0,
    bins: int = 256,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Entropy, accuracy, agreement and cost of the full model and of what is left after each pick.

    Args:
        model: The full model.
        loader: Images, with labels where they are the model's classes; this process's share of them.
        selection: The layers, in the order of picking.
        split: What `loader` reads, for the record.
        held_out: Whether the selection has not seen these images.
        labelled: Whether the labels are the model's classes.
        throughput_batch: Images per forward of the timing; None takes no times.
        seconds: For the timing.
        tolerance: Of the recommendation, in points of top-1 (or of agreement).
        bins: Of a histogram.
        processes: Those that measure together.

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
        model, loader, estimator=estimator, score=score, bins=bins, cache="none", processes=processes
    ) as measurement:
        found = measurement.measure(paths, "Trajectory", compare=True, label=labelled)
    trajectory = None
    with processes.together("Trajectory"):
        if processes.leads:
            timing: dict[str, Any] = {"batch_size": 1, "rounds": 1}
            if throughput_batch is not None:
                timing = {"batch_size": throughput_batch, "seconds": seconds}
            costs = measure_costs(model, selection.layers, **timing)
            images = found[paths[0]].images
            steps = []
            for count, (path, cost) in enumerate(zip(paths, costs, strict=True)):
                result = found[path]
                interval = None
                if result.top1 is not None:
                    interval = [100 * end for end in wilson_interval(round(result.top1 * images / 100), images)]
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
                "split": split,
                "held_out": held_out,
                "labelled": labelled,
                "estimator": estimator,
                "score": score,
                "throughput_batch": throughput_batch,
                "steps": steps,
                "recommended": recommend(
                    steps,
                    tolerance=tolerance,
                    wanted=selection.stop,
                    images=images,
                    held_out=held_out,
                    reached=not missed(selection.warnings),
                ),
            }
    return processes.share(trajectory)


def selection_record(
    model: nn.Module,
    name: str,
    selection: Selection,
    *,
    command: str,
    data: dict[str, Any],
    trajectory: dict[str, Any] | None,
    profile: dict[str, Any] | None,
    engine: dict[str, Any] | None,
    next_commands: Sequence[dict[str, str]],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The record that `write_report` turns into the report of a selection."""
    where: dict[str, Any] = dict(environment.versions())
    if engine is not None:
        cache = engine["cache"]
        where["processes"] = str(engine["processes"])
        where["passes over the data"] = f"{engine['passes']} in {engine['seconds']:.0f} s"
        where["shared by all paths"] = engine["shared"]
        if cache is not None:
            where["embedded images"] = f"{cache['kind']}: {cache['reason']}"
        if engine.get("kept"):
            blocks = ", ".join(map(str, engine["kept"]["before_blocks"]))
            where["kept between rounds"] = f"tokens before blocks {blocks}, {size(engine['kept']['bytes'])}"
    record = {
        "title": f"Attention layers to remove from {model_name(model) or name}",
        "model": {
            "name": model_name(model) or name,
            "blocks": selection.depth,
            "input": list(input_shape(model)),
            "classes": getattr(model, "num_classes", None) or None,
        },
        "data": data,
        "command": command,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": where,
        "profile": profile,
        "selection": selection.to_dict(),
        "trajectory": trajectory,
        "engine": engine,
        "warnings": list(notes),
        "next_commands": list(next_commands),
    }
    return {key: value for key, value in record.items() if value is not None}


def caught(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `work` returns, and the text of the warnings that it gave, each once."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = work()
    return result, list(dict.fromkeys(str(w.message) for w in found))
