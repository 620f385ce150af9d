"""The figures of a selection: scores by round and block, and what every pick does to answers, entropy and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..records.scores import blocks_of, diverging, in_unit, lowest_picked, rankings, score_text
from .style import MUTED, OFF, PAPER, PICK, SERIES, WIDTH, Plot, known, numbers

# Up to here the blocks of one ranking have room for numbers side by side.
_MOST_BESIDE = 16


def score_plot(record: Mapping[str, Any]) -> Plot | None:
    """Scores by round and block: a heat map, or bars where everything was ranked once."""
    chosen = record.get("selection") or {}
    rounds = rankings(chosen)
    if not rounds:
        return None
    if len(rounds) == 1 and len(rounds[0].picked) > 1:
        return Plot("scores", f"Selection scores: {in_unit(chosen)}", 2.7, _draw_ranking)
    rows = len(blocks_of(record)) if _blocks_down(record) else len(rounds)
    title = f"Selection scores, round by round: {in_unit(chosen)}"
    return Plot("scores", title, 1.2 + 0.27 * rows, _draw_scores)


def trajectory_plot(record: Mapping[str, Any]) -> Plot | None:
    """What every pick does; nothing for a full model alone."""
    panels = _panels(record)
    if not panels:
        return None
    height = 1.15 + sum(weight for _, weight in panels)
    return Plot("trajectory", "Effect of every pick, without training", height, _draw_trajectory)


def _blocks_down(record: Mapping[str, Any]) -> bool:
    """Deep models get one row per block: side by side their numbers would be too small to read on paper."""
    blocks, rounds = blocks_of(record), rankings(record["selection"])
    return len(blocks) > 16 and len(rounds) < len(blocks)


def _draw_scores(figure: Any, record: Mapping[str, Any]) -> None:
    import numpy as np
    from matplotlib.patches import Patch, Rectangle

    chosen = record["selection"]
    blocks, rounds, text = blocks_of(record), rankings(chosen), score_text(chosen)
    scores = np.array([numbers([r.scores.get(b) for b in blocks]) for r in rounds], dtype=float)
    shade, norm, colors = _shades(scores, diverging(chosen))
    down = _blocks_down(record)
    xs, ys = (len(rounds), len(blocks)) if down else (len(blocks), len(rounds))

    axes = figure.subplots()
    axes.set_facecolor(OFF)
    axes.grid(visible=False)
    grid = np.ma.masked_invalid(shade.T if down else shade)
    axes.pcolormesh(np.arange(xs + 1), np.arange(ys + 1), grid, cmap=colors, norm=norm, edgecolors=PAPER, linewidth=0.8)
    longest = max((len(text(value)) for value in scores[np.isfinite(scores)]), default=1)
    size = min(8.5, (WIDTH - 0.9) * 72 / xs / max(2.9, 0.68 * longest))
    never = False
    for r, one in enumerate(rounds):
        for b, block in enumerate(blocks):
            x, y = (r, b) if down else (b, r)
            picked = block in one.picked
            if picked:
                axes.add_patch(
                    Rectangle((x, y), 1, 1, fill=False, edgecolor=PICK, linewidth=2.4, zorder=4, clip_on=False)
                )
            if not np.isfinite(scores[r, b]):
                if block not in one.gone:
                    never = True
                    axes.add_patch(Rectangle((x, y), 1, 1, **_KEPT))
            elif size >= 5:
                axes.text(x + 0.5, y + 0.5, text(scores[r, b]), color=_on(colors(norm(shade[r, b]))), fontsize=size,
                          ha="center", va="center_baseline", fontweight="bold" if picked else "normal")  # fmt: skip
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    round_ticks = (np.arange(len(rounds)) + 0.5, [str(n) for n in range(1, len(rounds) + 1)])
    block_ticks = (np.arange(len(blocks)) + 0.5, [str(b) for b in blocks])
    axes.set_xticks(*(round_ticks if down else block_ticks))
    axes.set_yticks(*(block_ticks if down else round_ticks))
    axes.set_xlabel("round" if down else "block")
    axes.set_ylabel("block" if down else "round")
    label = "picked: the lowest of its round" if lowest_picked(chosen) else "picked"
    handles = [Patch(fill=False, edgecolor=PICK, linewidth=2.2, label=label)]
    if any(one.gone for one in rounds):
        handles.append(Patch(facecolor=OFF, linewidth=0, label="removed before"))
    if never:
        handles.append(Patch(**_KEPT, label="not a candidate"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


_KEPT: dict[str, Any] = {"facecolor": OFF, "edgecolor": MUTED, "hatch": "////", "linewidth": 0}


def _shades(scores: Any, signed: bool) -> tuple[Any, Any, Any]:
    """Scores on a scale that keeps small ones apart (they span decades), that scale's ends, and its colours."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    stops = ["#762a83", "#f4f4f2", "#1b7837"] if signed else ["#eef4fa", "#6aaed6", "#0b3c70"]
    colors = LinearSegmentedColormap.from_list("scores", stops)
    known = scores[np.isfinite(scores)]
    if signed:
        shade = np.arcsinh(scores / (float(np.median(np.abs(known))) or 1.0))
        end = float(np.nanmax(np.abs(shade))) or 1.0
        return shade, Normalize(-end, end), colors
    positive = known[known > 0]
    floor = float(positive.min()) if positive.size else 1.0
    shade = np.log10(np.maximum(scores, floor))
    low, high = float(np.nanmin(shade)), float(np.nanmax(shade))
    return shade, Normalize(low, max(high, low + 0.1)), colors


def _on(fill: tuple[float, ...]) -> str:
    """Black or white, whichever stands out more on `fill` (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in fill[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _draw_ranking(figure: Any, record: Mapping[str, Any]) -> None:
    """One ranking as bars: hollow for what stays, filled and numbered for what was picked."""
    from matplotlib.patches import Patch

    chosen = record["selection"]
    blocks, text = blocks_of(record), score_text(chosen)
    (one,) = rankings(chosen)
    order = {block: n for n, block in enumerate(one.picked, 1)}
    axes = figure.subplots()
    axes.grid(visible=False, axis="x")
    crowded = len(blocks) > _MOST_BESIDE
    values = [one.scores[b] for b in blocks if one.scores.get(b) is not None]
    low, high = min(0.0, *values), max(0.0, *values)
    room = (0.24 if crowded else 0.12) * ((high - low) or 1.0)
    axes.set_ylim(low - (room if low < 0 else 0), high + room)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    never = False
    for x, block in enumerate(blocks):
        value = one.scores.get(block)
        if value is None:
            never = True
            axes.axvspan(x - 0.36, x + 0.36, **_KEPT)
            continue
        filled = block in order
        axes.bar(x, value, 0.72, facecolor=PICK if filled else OFF, edgecolor=PICK if filled else MUTED, linewidth=0.9)
        axes.annotate(text(value), (x, value), (0, 2 if value >= 0 else -2), textcoords="offset points", ha="center",
                      va="bottom" if value >= 0 else "top", fontsize=7.5 if crowded else 8.5,
                      rotation=90 if crowded else 0, fontweight="bold" if filled else "normal")  # fmt: skip
        if filled:
            axes.annotate(str(order[block]), (x, 1.0), (0, 2), xycoords=axes.get_xaxis_transform(), color=PICK,
                          textcoords="offset points", ha="center", va="bottom", fontweight="bold", fontsize=8.5)  # fmt: skip
    axes.annotate("pick", (0, 1.0), (-4, 2), xycoords="axes fraction", textcoords="offset points", color=PICK,
                  ha="right", va="bottom", fontweight="bold", fontsize=8.5)  # fmt: skip
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_xlabel("block")
    axes.set_ylabel(in_unit(chosen, ", "))
    handles = [Patch(facecolor=PICK, linewidth=0, label="picked, in the order above"),
               Patch(facecolor=OFF, edgecolor=MUTED, linewidth=0.9, label="keeps its attention")]  # fmt: skip
    if never:
        handles.append(Patch(**_KEPT, label="not a candidate"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _panels(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(what, inches) of what there is to draw; empty where no layer was picked."""
    steps = (record.get("trajectory") or {}).get("steps") or ()
    if len(steps) < 2:
        return []
    panels = [("answers", 1.9)] if known(steps, "top1") or known(steps, "agreement") else []
    panels += [("entropy", 1.15)] if known(steps, "entropy") else []
    panels += [("cost", 1.15)] if known(steps, "speedup") or known(steps, "parameters") else []
    return panels


def _draw_trajectory(figure: Any, record: Mapping[str, Any]) -> None:
    trajectory = record["trajectory"]
    steps, panels = trajectory["steps"], _panels(record)
    recommended = trajectory.get("recommended")
    heights = [weight for _, weight in panels]
    stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    draw = {"answers": _draw_answers, "entropy": _draw_output_entropy, "cost": _draw_cost}
    handles = []
    for axes, (name, _) in zip(stack, panels, strict=True):
        if recommended:
            axes.axvspan(recommended["step"] - 0.42, recommended["step"] + 0.42, color=PICK, alpha=0.13, linewidth=0)
        axes.grid(visible=False, axis="x")
        handles += draw[name](axes, trajectory)
    top, bottom = stack[0], stack[-1]
    if recommended:
        place = recommended["step"] / max(1, len(steps) - 1)
        align = "left" if place < 0.1 else "right" if place > 0.9 else "center"
        shift = {"left": -0.42, "center": 0, "right": 0.42}[align]
        top.annotate("recommended", (recommended["step"] + shift, 1), (0, 2), xycoords=top.get_xaxis_transform(),
                     textcoords="offset points", color=PICK, fontweight="bold", ha=align, va="bottom")  # fmt: skip
    names = ["full" if step.get("picked") is None else str(step["picked"]) for step in steps]
    bottom.set_xticks(range(len(steps)), names)
    bottom.set_xlim(-0.6, len(steps) - 0.4)
    bottom.set_xlabel("block picked, in addition to those to its left")
    figure.align_ylabels(list(stack))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


_LOOKS: dict[str, dict[str, Any]] = {
    "top1": {"color": SERIES[0], "marker": "o", "markersize": 5, "linewidth": 1.5},
    "agreement": {"color": SERIES[1], "marker": "s", "markersize": 5, "linewidth": 1.3, "linestyle": (0, (4, 1.5)),
                  "markerfacecolor": PAPER},
    "entropy": {"color": SERIES[4], "marker": "D", "markersize": 4.5, "linewidth": 1.3},
    "speedup": {"color": SERIES[3], "marker": "^", "markersize": 5.5, "linewidth": 1.5},
    "parameters": {"color": SERIES[5], "marker": "v", "markersize": 5.5, "linewidth": 1.3, "linestyle": (0, (4, 1.5)),
                   "markerfacecolor": PAPER},
}  # fmt: skip


def _draw_answers(axes: Any, trajectory: dict[str, Any]) -> list[Any]:
    from matplotlib.patches import Patch

    steps = trajectory["steps"]
    handles: list[Any] = []
    for key, label in (("top1", "top-1"), ("agreement", "agreement with the full model")):
        if known(steps, key):
            handles += axes.plot(range(len(steps)), numbers([s.get(key) for s in steps]), label=label, **_LOOKS[key])
    if known(steps, "top1_interval"):
        spans = [step.get("top1_interval") or (math.nan, math.nan) for step in steps]
        axes.fill_between(range(len(steps)), *zip(*spans, strict=True), color=SERIES[0], alpha=0.16, linewidth=0)
        handles.insert(1, Patch(color=SERIES[0], alpha=0.25, linewidth=0, label="top-1's 95 % interval"))
    limit = _limit(trajectory)
    if limit is not None:
        label = f"{trajectory['recommended']['tolerance']:g} points below the full model"
        handles.append(axes.axhline(limit, color=MUTED, linewidth=1, linestyle=(0, (1, 1.5)), label=label))
    axes.set_ylim(max(-2, axes.get_ylim()[0]), min(102, axes.get_ylim()[1]))
    axes.set_ylabel("of the images (%)")
    return handles


def _limit(trajectory: dict[str, Any]) -> float | None:
    """Where the recommendation's tolerance ends."""
    recommended = trajectory.get("recommended") or {}
    if recommended.get("tolerance") is None:
        return None
    full = trajectory["steps"][0].get("top1") if recommended.get("measure") != "agreement" else 100.0
    return None if full is None else full - recommended["tolerance"]


def _draw_output_entropy(axes: Any, trajectory: dict[str, Any]) -> list[Any]:
    values = numbers([step.get("entropy") for step in trajectory["steps"]])
    axes.axhline(values[0], color=MUTED, linewidth=1, linestyle="--")
    axes.set_ylabel("H (bits)")
    axes.margins(y=0.15)
    label = "entropy of the output (dashed: the full model's)"
    return axes.plot(range(len(values)), values, label=label, **_LOOKS["entropy"])


def _draw_cost(axes: Any, trajectory: dict[str, Any]) -> list[Any]:
    steps = trajectory["steps"]
    axes.axhline(1, color=MUTED, linewidth=1, linestyle="--")
    handles = []
    full = steps[0].get("parameters")
    shares = [step["parameters"] / full if full and step.get("parameters") is not None else None for step in steps]
    for key, label, values in (
        ("speedup", "images per second (times the full model's)", [step.get("speedup") for step in steps]),
        ("parameters", "parameters (share of the full model's)", shares),
    ):
        if any(value is not None for value in values):
            handles += axes.plot(range(len(steps)), numbers(values), label=label, **_LOOKS[key])
    if known(steps, "speedup_interval"):
        spans = [step.get("speedup_interval") or (math.nan, math.nan) for step in steps]
        low, high = zip(*spans, strict=True)
        axes.fill_between(range(len(steps)), low, high, color=_LOOKS["speedup"]["color"], alpha=0.2, linewidth=0)
    axes.margins(y=0.15)
    axes.set_ylabel("× full model")
    return handles
