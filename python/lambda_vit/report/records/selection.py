"""What a selection does to the network, measured after each pick without training, and the record of all of it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...models.properties import input_shape, model_name
from ...runtime import environment
from ...runtime.formatting import format_size
from ...selection.result import Selection


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
