"""The network before and after a fine-tuning, side by side: the rows that its report compares."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lambda_kernels import convert_vit
from lambda_kernels.errors import UnsupportedModelError
from lambda_kernels.families import inspect_model

from ..evaluate import cost
from ..processes import Processes
from .scoring import Score, score

# Images of the forward whose memory is measured, as in `validate`'s comparison.
COST_BATCH = 64


def rows_before(
    model: nn.Module,
    layers: Sequence[int],
    loader: Iterable,
    processes: Processes,
    *,
    asked: Callable[[], int] = lambda: 0,
    trained: bool = True,
) -> list[dict[str, Any]]:
    """Accuracy and cost of `model` as it is ("full"), and with the attention of `layers` removed and nothing trained
    ("untrained"; left out where there are none).

    Args:
        model: The original, on its device. It is not changed.
        layers: Blocks whose attention is to go.
        loader: This process's share of the validation images.
        processes: All call this.
        asked: The number of a signal to stop on, or 0; what was not measured by then is left out.
        trained: Whether `model` was, down to its classifier.
    """
    label = "Full model" if layers else "As it was"
    own: dict[str, Any] = {"trained": trained, "note": "" if trained else "with a new classifier, not trained yet"}
    found = score(model, loader, processes, asked=asked, description=label)
    if found is None:
        return []
    rows = [row_of("full", label, model, found, processes, **own)]
    if layers:
        label = "Attention removed, nothing trained"
        smaller = convert_vit(model, layers)
        found = score(smaller, loader, processes, reference=model, asked=asked, description=label)
        if found is not None:
            rows.append(row_of("untrained", label, smaller, found, processes, **{**own, "trained": False}))
    return rows


def row_of(
    name: str, label: str, model: nn.Module, found: Score, processes: Processes, *, trained: bool = True, note: str = ""
) -> dict[str, Any]:
    """One row, as `validation.variant` makes them, of what `score` found; all processes call it, one counts the cost."""
    price = None
    with processes.together(f"Cost of {label}"):
        if processes.leads:
            price = cost(model, batch_size=COST_BATCH)
    price = processes.share(price)
    removed, scale = [], 1.0
    with contextlib.suppress(UnsupportedModelError):  # where nothing is removed, any network can be trained
        anatomy = inspect_model(model)
        removed, scale = list(anatomy.removed), anatomy.residual_scale or 1.0
    return {
        "name": name,
        "label": label,
        "removed": removed,
        "residual_scale": scale,
        "trained": trained,
        **found.to_dict(),
        "parameters": price.parameters,
        "flops": price.flops,
        "weight_bytes": price.weight_bytes,
        "peak_memory_bytes": price.peak_memory_bytes,
        "note": note,
    }
