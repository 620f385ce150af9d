"""The figures of a layer profile, after the first two of arXiv 2404.05657: entropy by block, and the blocks in its order.

They draw the record that `LayerProfile.to_dict` gives. A record may also hold one estimator and one number per layer,
its mean: then there are no quartiles to draw.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.formatting import format_list
from ..records.readings import LAYER_NAMES, _ranked, estimators, lowest, mean, spread
from .files import Part, render_page, save_page
from .style import MUTED, OFF, PAPER, PICK, SERIES, WIDTH, numbers, shortened

# Filled against hollow and solid against dashed: the two stay apart without colour.
_LOOKS = {
    "attn": {"color": SERIES[0], "marker": "o", "markersize": 5, "markerfacecolor": SERIES[0]},
    "mlp": {"color": SERIES[1], "marker": "s", "markersize": 5, "markerfacecolor": PAPER},
}
_DASHES = {"attn": "-", "mlp": (0, (4, 1.5))}
_AXIS = {"gaussian": "mean log₂ σ", "histogram": "differential entropy"}
# What a normal distribution's differential entropy has on top of log2 σ.
_CONSTANT = 0.5 * math.log2(2 * math.pi * math.e)
# Panels that hold more blocks lie one below the other.
_MOST_BESIDE = 16


def by_block_height(profile: Mapping[str, Any]) -> float:
    """Inches that `draw_by_block` needs."""
    return 3.1 if _columns(profile) == len(estimators(profile)) else 0.6 + 2.4 * len(estimators(profile))


def _columns(profile: Mapping[str, Any]) -> int:
    return len(estimators(profile)) if len(profile["blocks"]) <= _MOST_BESIDE else 1


def _panels(figure: Any, profile: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(estimator, axes), which show the same range of bits: at one height stands one entropy, if a channel is normal."""
    names, columns = estimators(profile), _columns(profile)
    grid = figure.subplots(len(names) // columns, columns, squeeze=False)
    shifts = {name: _CONSTANT if name == "gaussian" and len(names) > 1 else 0.0 for name in names}
    values = [
        value + shifts[name]
        for name in names
        for row in profile["blocks"]
        for layer in LAYER_NAMES
        for value in spread(row, layer, name).values()
    ]
    low, high = min(values, default=0.0), max(values, default=0.0)
    margin = 0.06 * (high - low) or 0.5
    panels = list(zip(names, grid.flat, strict=True))
    for name, axes in panels:
        axes.set_ylim(low - margin - shifts[name], high + margin - shifts[name])
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(f"{_AXIS.get(name, 'entropy per channel')} ({profile.get('unit', 'bits')})")
    return panels


def _title(axes: Any, name: str, pad: float = 6) -> None:
    axes.set_title(name.capitalize(), loc="left", fontsize=9, fontweight="bold", pad=pad)


def draw_by_block(figure: Any, profile: Mapping[str, Any], picks: Mapping[int, int]) -> None:
    """Fill `figure`, `by_block_height(profile)` inches high, with the entropy of both layers by block, a panel per estimator.

    `picks` gives each picked block's place in the order of picking; these blocks are shaded.
    """
    from matplotlib.patches import Patch

    rows = profile["blocks"]
    blocks = [row["block"] for row in rows]
    picked = [block for block in blocks if block in picks]
    size = min(8.5, (WIDTH / _columns(profile) - 0.8) * 72 / len(blocks) / 1.55)
    panels = _panels(figure, profile)
    banded = False
    for name, axes in panels:
        for block in picked:
            axes.axvspan(block - 0.42, block + 0.42, color=PICK, alpha=0.13, linewidth=0)
            axes.text(block, 1.015, str(picks[block]), color=PICK, fontsize=size, fontweight="bold", ha="center",
                      va="bottom", transform=axes.get_xaxis_transform())  # fmt: skip
        if picked:
            axes.text(-0.012, 1.015, "pick", color=PICK, fontsize=8.5, fontweight="bold", ha="right", va="bottom",
                      transform=axes.transAxes)  # fmt: skip
        for layer, look in _LOOKS.items():
            found = [spread(row, layer, name) for row in rows]
            low, high = (numbers([one.get(end) for one in found]) for end in ("low", "high"))
            if any(map(math.isfinite, low)):
                axes.fill_between(blocks, low, high, color=look["color"], alpha=0.16, linewidth=0)
                banded = True
            label = f"{LAYER_NAMES[layer]} output"
            means = numbers([one.get("mean") for one in found])
            axes.plot(blocks, means, linewidth=1.3, linestyle=_DASHES[layer], label=label, **look)
        axes.set_xticks(blocks[:: math.ceil(len(blocks) * _columns(profile) / 40)])
        axes.set_xlim(min(blocks) - 0.5, max(blocks) + 0.5)
        axes.set_xlabel("block")
        if len(panels) > 1:
            _title(axes, name, pad=17 if picked else 6)
    handles, _ = panels[0][1].get_legend_handles_labels()
    if banded:
        handles.append(Patch(color=MUTED, alpha=0.3, linewidth=0, label="middle half of the channels"))
    if picks:
        handles.append(Patch(color=PICK, alpha=0.25, linewidth=0, label="picked, in the order above"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if len(panels) > 1 else 3)


def draw_ranking(figure: Any, profile: Mapping[str, Any]) -> None:
    """Fill `figure` with the blocks in order of their attention's entropy, each with its MLP's, a panel per estimator."""
    panels = _panels(figure, profile)
    for name, axes in panels:
        rows, bottom = _ranked(profile, name), len(lowest(profile, name))
        gone = [row["block"] for row in profile["blocks"] if row not in rows]
        axes.axvspan(-0.5, bottom - 0.5, color=OFF, linewidth=0, zorder=0)
        axes.text(-0.35, 0.985, "lowest\nquarter" if len(rows) >= 4 else "lowest", color=MUTED, fontsize=8, va="top",
                  transform=axes.get_xaxis_transform())  # fmt: skip
        places = range(len(rows))
        values = {layer: [mean(row, layer, name) for row in rows] for layer in LAYER_NAMES}
        axes.vlines(places, values["attn"], values["mlp"], color=MUTED, linewidth=0.9)
        for layer, look in _LOOKS.items():
            axes.plot(places, values[layer], linestyle="", label=f"{LAYER_NAMES[layer]} output", **look)
        size = min(9, (WIDTH / _columns(profile) - 0.8) * 72 / len(rows) / 1.55)
        axes.set_xticks(places, [str(row["block"]) for row in rows], fontsize=size)
        for label in axes.get_xticklabels()[:bottom]:
            label.set_fontweight("bold")
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.5, len(rows) - 0.5)
        without = f" (removed in {format_list(gone)})" if gone else ""
        axes.set_xlabel(
            "\n".join(textwrap.wrap(f"block, by the entropy of its attention{without}", 110 // _columns(profile)))
        )
        if len(panels) > 1:
            _title(axes, name)
    handles, _ = panels[0][1].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def save_plot(path: str | Path, profile: Mapping[str, Any]) -> None:
    """Write both figures of a profile on one page, atomically.

    Args:
        path: Ends in .png, .svg or .pdf.
        profile: The result of `LayerProfile.to_dict`; "model" in it names the model.

    Raises:
        ValueError: The suffix is another one.
        OSError: The file cannot be written.
    """
    save_page(path, lambda kind: render(profile, kind))


def render(profile: Mapping[str, Any], kind: str) -> bytes:
    """Draw both figures on one page as "png", "svg" or "pdf"."""
    height = by_block_height(profile) + 0.35
    parts: list[Part] = [("Block by block", height, lambda part: draw_by_block(part, profile, {}))]
    if any(mean(row, "attn", name) is not None for name in estimators(profile) for row in profile["blocks"]):
        parts.append(("In the order of the attention's entropy", height, lambda part: draw_ranking(part, profile)))
    title = f"Entropy by layer: {shortened(str(profile.get('model') or 'model'))}"
    return render_page(kind, title, _facts(profile), parts, _notes(profile))


def _facts(profile: Mapping[str, Any]) -> str:
    facts = [f"{profile['samples']:,} images"] if profile.get("samples") else []
    layer = profile["blocks"][0].get("mlp")
    if isinstance(layer, Mapping):
        facts.append(f"{layer['tokens']:,} tokens of {layer['channels']:,} channels at each layer")
    facts += [f"{profile['bins']} bins"] if profile.get("bins") else []
    facts += [f"counted by {profile['counted_by']}"] if profile.get("counted_by") else []
    return " · ".join(facts)


def _notes(profile: Mapping[str, Any]) -> list[str]:
    notes = ["Outputs before LayerScale and the residual. A point is the mean over the channels of a layer."]
    if len(estimators(profile)) > 1:
        notes += [
            "At one height in both panels stands one entropy if channels are normal "
            f"(log₂ σ leaves out {_CONSTANT:.2f} bits of it).",
            "Lower by the histogram than by the Gaussian: channels are not normal, and hold less than their variance allows.",
        ]
    return notes
