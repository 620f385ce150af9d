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

from ..models.properties import input_shape
from ..runtime import environment
from ..runtime.processes import Processes
from ..runtime.progress import task
from .accuracy import Score, evaluate
from .cost import cost
from .latency import Latency, compare_latency


def variant(
    name: str,
    label: str,
    model: nn.Module,
    loader: Iterable,
    *,
    reference: nn.Module | None = None,
    cost_batch: int = 64,
    latency: Mapping[int, Latency] | None = None,
    trained: bool = True,
    note: str = "",
) -> dict:
    """One row of a comparison, in plain JSON types: accuracy, agreement with `reference`, cost, latency.

    Args:
        name: Key of the row.
        label: What people read.
        model: A timm vision transformer, converted or not.
        loader: Labelled images.
        reference: The original model; None leaves agreement out.
        cost_batch: Batch size of the peak memory.
        latency: By batch size, from `compare_latency`.
        trained: Whether the weights were trained as the model now is.
        note: Shown beside the row.
    """
    structure = inspect_model(model)
    result = evaluate(model, loader, reference=reference, description=label)
    with task(f"Cost of {label}", 1) as advance:
        price = cost(model, batch_size=cost_batch)
        advance()
    row = {
        "name": name,
        "label": label,
        "removed": list(structure.removed),
        "residual_scale": structure.residual_scale or 1.0,
        "trained": trained,
        "top1": result.top1,
        "top1_interval": list(result.top1_interval),
        "top5": result.top5,
        "agreement": result.agreement,
        "images": result.count,
        "parameters": price.parameters,
        "flops": price.flops,
        "weight_bytes": price.weight_bytes,
        "peak_memory_bytes": price.peak_memory_bytes,
        "note": note,
    }
    if latency is not None:
        row["latency_ms"] = {
            str(batch): {"median": t.median_ms, "low": t.low_ms, "high": t.high_ms} for batch, t in latency.items()
        }
    return row


def kernel_paths(model: nn.Module) -> list[dict]:
    """How each block of a converted model runs where it is now, for a report; empty for an untouched model."""
    return [asdict(row) for row in describe_blocks(model)] if hasattr(model, "lambda_kernels_info") else []


def check_preparation(models: Mapping[str, nn.Module], remedy: str) -> None:
    """Refuse models, by name, that were made for images that are prepared differently.

    Raises:
        ValueError: What differs, and `remedy`.
    """
    from timm.data import resolve_model_data_config

    wanted = {}
    for name, model in models.items():
        config = resolve_model_data_config(model, args={"input_size": input_shape(model)})
        wanted[name] = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
    first, *others = wanted
    for other in others:
        keys = [key for key in wanted[first] if wanted[first][key] != wanted[other].get(key)]
        if keys:
            listed = "; ".join(f"{key} {wanted[first][key]} and {wanted[other].get(key)}" for key in keys)
            raise ValueError(
                f"{first} and {other} want their images prepared differently ({listed}): they cannot be compared on one "
                f"data set. {remedy}"
            )


def check_classifier(models: Mapping[str, nn.Module]) -> None:
    """Refuse models, by name, whose outputs are no classes: what they answer has no accuracy.

    Raises:
        ValueError: A model has no classifier, as DINOv2, DINOv3 and SigLIP in timm.
    """
    for name, model in models.items():
        if not getattr(model, "num_classes", 1):
            raise ValueError(
                f"the {name} has no classifier (num_classes=0), so that its outputs have no accuracy. Train one for it first: "
                "lambda-vit finetune --full --num-classes N"
            )


def check_crop(crop_pct: float | None) -> None:
    """Refuse what is no share of an image.

    Raises:
        ValueError: It is not above 0 and at most 1.
    """
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"--crop-pct must be above 0 and at most 1, such as 0.9; got {crop_pct:g}")


def set_crop(models: Iterable[nn.Module], crop_pct: float) -> None:
    """Have timm prepare images for these models with this share of the shorter side, whatever their own configs say."""
    for model in models:
        model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "crop_pct": crop_pct}  # type: ignore[assignment]


def path_lines(paths: Sequence[Mapping]) -> list[str]:
    """The `kernel_paths` of a model in words, blocks that run alike on one line, and how many tokens go into each."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for row in paths:
        alike.setdefault((row["attention"], row["mlp"], row["reason"]), []).append(row["block"])
    lines = [
        f"blocks {', '.join(map(str, blocks))}: attention {attention}, MLP {mlp} ({reason})"
        for (attention, mlp, reason), blocks in alike.items()
    ]
    return lines + merging_lines(paths)


def merging_lines(paths: Sequence[Mapping]) -> list[str]:
    """How many tokens go into each block, where some are merged."""
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
    """A report record of `models`; agreement is with the one called "reference", where there is one.

    Args:
        models: By name.
        labels: What people read, by the same names.
        loader: Labelled images, for all models alike.
        batch_sizes: At which latencies are compared; empty leaves them out.
        cost_batch: Batch size of the peak memory.

    Raises:
        ValueError: The models were made for images that are prepared differently: one loader cannot serve them all.
    """
    check_preparation(models, "Validate each alone, or give both one crop_pct where only that differs: --crop-pct")
    sizes = tuple(dict.fromkeys(batch_sizes))
    times = compare_latency(models, sizes, seconds=30) if sizes else {}
    reference = models.get("reference")
    variants = [
        variant(
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


# Images of the forward whose memory is measured, as in `validate`'s comparison.
COST_BATCH = 64


def row_of(
    name: str, label: str, model: nn.Module, found: Score, processes: Processes, *, trained: bool = True, note: str = ""
) -> dict[str, Any]:
    """One row, as `validation.variant` makes them, of what `score` found; all processes call it, one counts the cost."""
    price = None
    with processes.all_or_none(f"Cost of {label}"):
        if processes.is_main:
            price = cost(model, batch_size=COST_BATCH)
    price = processes.broadcast(price)
    removed, scale = [], 1.0
    with contextlib.suppress(UnsupportedModelError):  # where nothing is removed, any network can be trained
        structure = inspect_model(model)
        removed, scale = list(structure.removed), structure.residual_scale or 1.0
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
