"""The tables that commands print: feature frequencies, layer profiles and training plans, each with its notes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..runtime.formatting import (
    NONE,
    format_change,
    format_count,
    format_fixed,
    format_hours,
    format_known,
    format_milliseconds,
    format_number,
    format_ranges,
    format_scientific,
    format_signed,
    format_size,
)
from .parts import Column, draw_table, numeric
from .records.readings import CLEAR, LAYER_NAMES, _highest, at, direction, estimators, lowest, mean, verdict

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.plan.planning import NetworkPlan, Plan


def frequency_table(record: Mapping[str, Any]) -> Table:
    """A row per block: Δ log amplitude at the highest frequency and on average, before, after, and what changed."""
    before, after, highest = record["before"], record.get("after"), record["before"]["highest"]
    place = "at π" if at(record) == "π" else "near π"  # and no wider than a number
    if after:
        titles = ["block", f"{place}\nbefore", "\nafter", "\nchange", "mean\nbefore", "\nafter", "\nchange"]
        titles += ["factor\nat 0", f"\n{place}"]
    else:
        titles = ["block", f"Δ {place}", "mean Δ", "amplitude at 0", place]
    rows = []
    for index, row in enumerate(before["blocks"]):
        other = after["blocks"][index] if after else row
        cells = [f"{'' if other['attention'] else 'removed '}{row['block']}"]
        if after:
            change, logs = record["changes"][index], (row["log_amplitude"], other["log_amplitude"])
            for levels, value, error in (
                ((row["relative"][highest], other["relative"][highest]), *_highest(change, highest)),
                ((row["mean"], other["mean"]), change["mean"], change["mean_error"]),
            ):
                cells += [format_fixed(level, 2) for level in levels]
                cells.append((format_signed(value, 3) if value else "0") + (direction(value, error) or " "))
            cells += [_factor(logs[1][k] - logs[0][k]) for k in (0, highest)]
        else:
            cells += [format_fixed(row["relative"][highest], 3), format_fixed(row["mean"], 3)]
            cells += [f"{row['amplitude'][k]:.3g}" for k in (0, highest)]
        rows.append(cells)
    return draw_table(numeric(*titles), rows, collapse_padding=True)


def _factor(difference: float) -> str:
    return f"{math.exp(difference):.3f}" if difference < 6 else f"{math.exp(difference):.3g}"


def frequency_notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers are, which way the highest frequencies went, and what was floored."""
    before, after = record["before"], record.get("after")
    rows, columns = before["grid"]
    notes = [
        "Δ log amplitude: mean ln |F| of the map's Fourier transform, less that at frequency 0. 'mean' is over the "
        f"{before['highest']} bins above 0 up to {at(record)}.",
        f"{rows} × {columns} tokens of {before['channels']} channels per image, prefix tokens ({before['prefix_tokens']}) left "
        f"out; features {before['dtype']}, transforms float64.",
    ]
    if after:
        highest = before["highest"]
        largest = max(e for change in record["changes"] for e in (_highest(change, highest)[1], change["mean_error"]))
        notes += [
            f"↑ ↓: a change of more than {CLEAR:g} standard errors over the {before['samples']} images, each compared with "
            f"itself; the largest standard error is {format_scientific(largest)}.",
            "factor: what the amplitude (geometric mean) is multiplied by. " + verdict(record),
        ]
        scale = after["residual_scale"]
        if scale not in (None, 1.0):
            notes.append(
                f"Each removed block multiplies its input by {scale:g}: amplitudes grow with it, Δ does not, since a common "
                "factor cancels."
            )
    for title, part in (("before", before), ("after", after)):
        floored = {row["block"]: row["floored"] for row in part["blocks"] if row["floored"]} if part else {}
        if floored:
            total = part["samples"] * part["channels"] * rows * columns
            number = sum(floored.values())
            few = "1 amplitude" if number == 1 else f"{number:,} amplitudes"
            notes.append(
                f"{f'{title}: ' if after else ''}{few}, of {total:,} in each block, below 2^-24 counted as that in "
                f"logarithms ({'block' if len(floored) == 1 else 'blocks'} {format_ranges(floored)})."
            )
    return notes


def plan_table(result: Plan) -> Table:
    """The three networks side by side, and the change from the full one to the final one."""
    rows = []
    networks = [result.networks[name] for name in ("full", "diluting", "final")]
    for name, value, show in _rows(result):
        values = [value(network) for network in networks]
        if not any(values):
            continue
        change = format_change(values[0], values[2]) if None not in values else NONE
        rows.append([name, *(format_known(value, show) for value in values), change])
    return draw_table([Column(""), *numeric("full", "diluting", "without", "change")], rows)


def _rows(result: Plan) -> Iterator[tuple[str, Callable[[NetworkPlan], float | None], Callable[[float], str]]]:
    batch = result.batch_size
    yield "parameters", lambda n: n.parameters, format_count
    yield "FLOPs of a forward, per image", lambda n: n.flops, format_count
    yield "weights", lambda n: n.weight_bytes, format_size
    yield "gradients", lambda n: n.gradient_bytes, format_size
    yield "AdamW's state", lambda n: n.optimizer_bytes, format_size
    yield "saved for backward, per image", lambda n: n.saved_bytes_per_image, format_size
    yield "saved for backward, fixed", lambda n: n.saved_bytes_fixed, format_size
    yield f"memory of a step, batch {batch}", lambda n: n.step_bytes, format_size
    yield "  measured peak", lambda n: n.peak_bytes, format_size
    yield f"time of a step, batch {batch}", lambda n: n.step.median_ms if n.step else None, format_milliseconds
    yield "  images per second", lambda n: 1000 * batch / n.step.median_ms if n.step else None, format_number


def _recomputing(result: Plan) -> list[str]:
    """What the networks compute again in the backward, where one does."""
    parts = []
    for name, title in (("full", "full"), ("diluting", "diluting"), ("final", "without")):
        levels = [level for level in result.networks[name].recomputed if level != "none"]
        for level in dict.fromkeys(levels):
            parts.append(f"{title}: {level!r} in {levels.count(level)} of {result.depth} blocks")
    if not parts:
        return []
    return [
        f"- MLP halves recompute in the backward pass instead of saving: {'; '.join(parts)}. The time of a step includes "
        "this; a block's recomputation needs scratch memory."
    ]


def plan_notes(result: Plan) -> list[str]:
    """Hours of each phase, what limits them, and what the numbers rest on."""
    from ..training.plan.planning import COUNTED_AT

    lines = []
    names = {"dilution": ("Dilution", "diluting"), "recovery": ("Without attention", "final")}
    for phase, times in result.phases.items():
        title, network = names[phase]
        step = result.networks[network].step
        lines.append(
            f"{title}: {format_hours(times.hours)} for {times.epochs} epochs of {times.steps // times.epochs:,} steps, "
            f"{format_milliseconds(step.median_ms)} each (quartiles of {step.rounds} steps {format_number(step.low_ms)}–"
            f"{format_number(step.high_ms)} ms: {format_hours(times.low_hours)} to {format_hours(times.high_hours)})"
        )
    phases = result.phases.values()
    lines.append(
        f"Total: {format_hours(sum(p.hours for p in phases))} of training steps on {result.devices} × {result.device}"
    )
    if result.loading is not None:
        speed = result.loading.images_per_second
        how = f"with --workers {result.loading.workers}"
        if not result.loading.workers:
            how = "without workers, so that training waits for loading"
        lines.append(
            f"Loading: {speed:,.0f} images per second ({how}; {result.loading.images:,} timed). The slower one is "
            f"{result.limited_by}; both together: {format_hours(sum(p.hours_with_loading for p in phases))}"
        )
    shape = "×".join(map(str, result.input_shape))
    lines += [
        "",
        "Assumptions:",
        f"- {result.images:,} images per epoch, {result.batch_size} per step and device; the last step of an epoch counts "
        "in full.",
        f"- Steps were timed here on random {result.dtype} images of {shape}: forward, loss, backward, clipping, AdamW."
        + ("" if result.teacher_bytes is None else " Each step includes a forward of the teacher, and memory its weights "
           f"({format_size(result.teacher_bytes)})."),
        "- " + ("Loading was timed alone, with timm's random crops and flips." if result.loading else "Image loading is")
        + ("" if result.loading else " omitted; --data measures it.") + " Validation and checkpoints are omitted.",
        f"- Saved for backward: what autograd saves in forward passes of {COUNTED_AT[0]} and {COUNTED_AT[1]} images, each "
        "storage once, without weights.",
        "- Memory of a step: weights, gradients, AdamW's two float32 per trainable parameter, and saved tensors. Scratch "
        "memory inside operators is extra.",
        *_recomputing(result),
    ]  # fmt: skip
    unsteady = max(n.step.high_ms / n.step.low_ms for n in result.networks.values() if n.step)
    if unsteady > 1.5:
        lines.append(
            f"- The quartiles of the step times are a factor of {format_number(unsteady)} apart: other programs used this "
            "machine. Repeat the measurement on a quiet machine."
        )
    if result.devices > 1:
        lines.append(
            f"- {result.devices} devices are assumed to be exactly {result.devices} times as fast as one; nothing was "
            "measured on more than one."
        )
    peak = result.networks["diluting"].peak_bytes
    if peak is None:
        lines.append("- The actual peak is measured on CUDA only.")
    elif peak > result.networks["diluting"].step_bytes:
        over = peak - result.networks["diluting"].step_bytes
        lines.append(f"- The measured peak is {format_size(over)} above the count: scratch memory of operators.")
    return lines


def profile_table(record: Mapping[str, Any]) -> Table:
    """The means of a profile's record, a row per block; the lowest attention entropies are bold and numbered."""
    from rich.table import Table as RichTable
    from rich.text import Text

    names = estimators(record)
    table = RichTable()
    table.add_column("block", justify="right")
    columns: list[tuple[str, str, dict[int, str]]] = []
    for layer, title in LAYER_NAMES.items():
        for name in names:
            order = lowest(record, name) if layer == "attn" else []
            columns.append((layer, name, {block: _ordinal(n) for n, block in enumerate(order, 1)}))
            table.add_column(f"{title}\n{name}", justify="right")
    for row in record["blocks"]:
        cells = [Text(str(row["block"]))]
        for layer, name, places in columns:
            value, place = mean(row, layer, name), places.get(row["block"])
            text = "removed" if value is None else format_fixed(value, 3)
            cells.append(Text(text) if place is None else Text(f"{place} {text}", style="bold"))
        table.add_row(*cells)
    return table


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def profile_notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers are, what counted them, and which layers have channels that never change."""
    notes = []
    if any(row["attn"] is not None for row in record["blocks"]):
        notes.append("1st, 2nd …: the quarter of the attention layers that has the least entropy.")
    if "gaussian" in estimators(record):
        notes.append("gaussian: mean log2 σ of the channels, without the normal's constant of 2.05 bits.")
    if "histogram" in estimators(record):
        notes.append(f"histogram: mean differential entropy of the channels, {record['bins']} bins each.")
    layer = record["blocks"][0]["mlp"]
    notes.append(f"{layer['tokens']:,} tokens of {layer['channels']:,} channels per layer, {record['dtype']}, "
                 f"counted by {record['counted_by']}.")  # fmt: skip
    for row in record["blocks"]:
        for name in LAYER_NAMES:
            layer = row[name]
            if layer is not None and layer["constant_channels"]:
                notes.append(
                    f"blocks[{row['block']}].{name}: {layer['constant_channels']} of {layer['channels']} channels never "
                    "change; each counts as −24 bits."
                )
    return notes
