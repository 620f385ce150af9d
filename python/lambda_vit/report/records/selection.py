"""Measures what a selection does to the model after each pick, without training, and makes the record of its report."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...data.loader import ImageLoader, make_loader, subset
from ...measure.layer_profile import profile_layers
from ...models.properties import input_shape, model_name
from ...runtime import environment
from ...runtime.capture import capture_warnings
from ...runtime.formatting import format_size
from ...runtime.processes import Processes
from ...selection.result import Selection
from ...selection.trajectory import TrialData, measure_trajectory
from .recommendation import TOLERANCE, add_recommendation

# Number of images to profile layers on: every token counts, so entropies per channel need no more.
PROFILE_IMAGES = 128


def measure_selection(
    model: nn.Module,
    selection: Selection,
    loader: ImageLoader,
    trial: TrialData | None,
    *,
    profile: bool,
    throughput_batch: int | None,
    tolerance: float = TOLERANCE,
    bins: int = 256,
    processes: Processes | None = None,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[str]]:
    """Measure the trajectory of a selection and the profile of the full model, for `selection_record`.

    The first images of `loader`, on which layers were picked, profile the layers. The picks are tried on those of `trial`;
    without it no trajectory is measured, and without `throughput_batch` no times.

    Returns:
        The trajectory with its recommendation, or None; on rank 0 the profile, or None, and notes for the report.
    """
    processes = Processes() if processes is None else processes
    trajectory, profiled = None, None
    notes: list[str] = []
    if trial is not None:
        measured = measure_trajectory(
            model, trial, selection, throughput_batch=throughput_batch, bins=bins, processes=processes
        )
        trajectory = add_recommendation(measured, selection, tolerance)
    if profile:
        with processes.all_or_none("Profile"):
            if processes.is_main:
                few = subset(loader.dataset, min(PROFILE_IMAGES, len(loader.dataset)))
                images = make_loader(few, loader.batch_size, workers=loader.workers, skip_bad=loader.skip_bad)
                found, notes = capture_warnings(lambda: profile_layers(model, images))
                profiled = found.to_dict()
    return trajectory, profiled, notes


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
    """Make the record that `write_report` turns into the report of a selection."""
    where: dict[str, Any] = dict(environment.versions())
    if engine is not None:
        cache = engine["cache"]
        where["processes"] = str(engine["processes"])
        where["passes over the data"] = f"{engine['passes']} in {engine['seconds']:.0f} s"
        where["shared by all paths"] = engine["shared"]
        if cache is not None:
            where["embedded images"] = f"{cache['kind']}: {cache['reason']}"
        if repair := engine.get("repair"):
            before, after = (statistics.fmean(end) for end in zip(*repair["errors"].values(), strict=True))
            where["repaired MLPs"] = (
                f"{len(repair['errors'])} on {repair['images']} images in {repair['seconds']:.0f} s; relative error of their "
                f"blocks' outputs {before:.3f}, then {after:.3f}"
            )
        if engine.get("kept"):
            blocks = ", ".join(map(str, engine["kept"]["before_blocks"]))
            where["kept between rounds"] = f"tokens before blocks {blocks}, {format_size(engine['kept']['bytes'])}"
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
