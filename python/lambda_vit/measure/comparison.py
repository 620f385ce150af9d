"""Models side by side on one data set: what `lambda-vit validate` prints, and rows of a report."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from lambda_kernels.blocks.structure import inspect_model
from lambda_kernels.convert.conversion import describe_blocks
from lambda_kernels.errors import UnsupportedModelError

from ..data.batches import check_repeatable
from ..data.transforms import check_preparation
from ..runtime import environment
from ..runtime.processes import Processes
from ..runtime.progress import task
from .accuracy import Score, evaluate
from .cost import cost
from .latency import Latency, compare_latency

# Images of the forward whose memory is measured.
COST_BATCH = 64


def make_row(
    name: str,
    label: str,
    model: nn.Module,
    found: Score,
    *,
    processes: Processes | None = None,
    cost_batch: int = COST_BATCH,
    latency: Mapping[int, Latency] | None = None,
    trained: bool = True,
    note: str = "",
) -> dict[str, Any]:
    """One row of a comparison, in plain JSON types: accuracy, agreement with a reference, cost, latency.

    All `processes` call this function, and one measures the cost, with the peak memory of `cost_batch` images. `trained`
    says whether the weights were trained as the model now is. `note` is shown beside the row.
    """
    processes = Processes() if processes is None else processes
    costs = None
    with processes.all_or_none(f"Cost of {label}"):
        if processes.is_main:
            with task(f"Cost of {label}", 1) as advance:
                costs = cost(model, batch_size=cost_batch)
                advance()
    costs = processes.broadcast(costs)
    removed, scale = [], 1.0
    with contextlib.suppress(UnsupportedModelError):  # any network can be trained as long as nothing is removed
        structure = inspect_model(model)
        removed, scale = list(structure.removed), structure.residual_scale
    row = {
        "name": name,
        "label": label,
        "removed": removed,
        "residual_scale": scale,
        "trained": trained,
        **Score.to_dict(found),  # an evaluation's speed and divergence are no figures of a row
        "agreement": found.agreement,
        "parameters": costs.parameters,
        "flops": costs.flops,
        "weight_bytes": costs.weight_bytes,
        "peak_memory_bytes": costs.peak_memory_bytes,
        "note": note,
    }
    if latency is not None:
        row["latency_ms"] = {
            str(batch): {"median": t.median_ms, "low": t.low_ms, "high": t.high_ms} for batch, t in latency.items()
        }
    return row


def evaluation_row(
    name: str, label: str, model: nn.Module, loader: Iterable, *, reference: nn.Module | None = None, **options: Any
) -> dict[str, Any]:
    """Evaluate `model` on labelled images, against `reference` if there is one, and make its row.

    `options` are those of `make_row`.
    """
    return make_row(name, label, model, evaluate(model, loader, reference=reference, description=label), **options)


def kernel_paths(model: nn.Module) -> list[dict]:
    """The kernel path of each block of a converted model on its device, for a report; empty for an unconverted model."""
    return [asdict(row) for row in describe_blocks(model)] if hasattr(model, "lambda_kernels_info") else []


def path_lines(paths: Sequence[Mapping]) -> list[str]:
    """The `kernel_paths` of a model in words, one line for blocks with the same path, and the tokens of each block."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for row in paths:
        alike.setdefault((row["attention"], row["mlp"], row["reason"]), []).append(row["block"])
    lines = [
        f"blocks {', '.join(map(str, blocks))}: attention {attention}, MLP {mlp} ({reason})"
        for (attention, mlp, reason), blocks in alike.items()
    ]
    return lines + merging_lines(paths)


def merging_lines(paths: Sequence[Mapping]) -> list[str]:
    """The number of tokens of each block, if tokens are merged."""
    merged = sum(row.get("merged") or 0 for row in paths)
    tokens = ", ".join(str(row.get("tokens")) for row in paths)
    return [f"tokens into each block: {tokens}; {merged} are merged into others"] if merged else []


def compare(
    models: Mapping[str, nn.Module],
    labels: Mapping[str, str],
    loader: Iterable,
    batch_sizes: Sequence[int],
    *,
    cost_batch: int,
) -> dict:
    """A report record of `models`, whose predictions are compared with those of the model "reference", if there is one.

    `labels` are the models' names for people. Without `batch_sizes` no latency is measured.
    """
    check_repeatable("loader", loader)
    check_preparation(models, "Validate each alone, or give both one crop_pct where only that differs: --crop-pct")
    sizes = tuple(dict.fromkeys(batch_sizes))
    times = compare_latency(models, sizes, seconds=30) if sizes else {}
    reference = models.get("reference")
    variants = [
        evaluation_row(
            name,
            labels[name],
            model,
            loader,
            reference=None if model is reference else reference,
            cost_batch=cost_batch,
            latency=times.get(name),
        )
        for name, model in models.items()
    ]
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": environment.command_line(),
        "environment": environment.versions(),
        "variants": variants,
        "kernel_paths": kernel_paths(models["model"]),
    }
