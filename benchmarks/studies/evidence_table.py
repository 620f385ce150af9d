"""The results of `evidence.py`: paired intervals, the table as Markdown, the plot.

python benchmarks/studies/evidence_table.py R.json --plot docs/evidence.png
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lambda_kernels.files import atomic_write, write_json
from lambda_vit.measure.intervals import wilson_interval
from lambda_vit.report.figures.style import GRID, MUTED, PICK, SERIES, new_figure

_Z = 1.959964


def write_results(folder: Path, names: Sequence[str], path: Path) -> None:
    """Gather what the arms of a study left, in this order; arms that are not finished are listed as missing."""
    found = {name: folder / f"{name}.json" for name in names}
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in found.values() if file.exists()]
    record = {
        "options": json.loads((folder / "options.json").read_text(encoding="utf-8")),
        "picks": json.loads((folder / "picks.json").read_text(encoding="utf-8")),
        "base": json.loads((folder / "base" / "run.json").read_text(encoding="utf-8"))["result"],
        "missing": [name for name, file in found.items() if not file.exists()],
        "arms": rows,
    }
    write_json(path, record)


def difference(ours: str, theirs: str) -> tuple[float, float, float]:
    """Top-1 of one minus that of another on the same images, in points, and its 95 % interval.

    Source: A. Agresti and Y. Min, Statistics in Medicine 24 (2005): half an image is added to each of the four cells.
    """
    total = len(ours) + 2
    gained = sum(a > b for a, b in zip(ours, theirs, strict=True)) + 0.5
    lost = sum(a < b for a, b in zip(ours, theirs, strict=True)) + 0.5
    middle = (gained - lost) / total
    half = _Z * math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    return 100 * (gained - lost) / len(ours), 100 * (middle - half), 100 * (middle + half)


def top1(hits: str) -> float:
    """In percent."""
    return 100 * hits.count("1") / len(hits)


def table(record: dict[str, Any]) -> str:
    """A row per arm, as Markdown."""
    full = next((row for row in record["arms"] if row["arm"] == "full"), None)
    lines = [
        "| picks | without attention | | parameters | untrained | trained, top-1 (95 %) | against the full model (95 %) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = sorted(
        record["arms"], key=lambda row: (row["count"], row["picks"] != "nose", row["picks"], not row["diluted"])
    )
    for row in order:
        low, high = wilson_interval(row["hits"].count("1"), len(row["hits"]))
        how = "" if not row["count"] else "diluted" if row["diluted"] else "dropped"
        against = "–"
        if full is not None and row is not full:
            middle, below, above = difference(row["hits"], full["hits"])
            against = f"{middle:+.1f} ({below:+.1f} to {above:+.1f})"
        lines.append(
            f"| {row['picks'] if row['count'] else 'full model'} | {', '.join(map(str, row['layers'])) or 'none'} | {how} | "
            f"{row['parameters'] / 1e6:.2f} M | {top1(row['hits_untrained']):.1f} | {top1(row['hits']):.1f} "
            f"({100 * low:.1f}–{100 * high:.1f}) | {against} |"
        )
    if record["missing"]:
        lines.append(f"\nNot trained: {', '.join(record['missing'])}.")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Top-1 against the number of layers removed: NOSE's picks as lines, all others as points."""
    with new_figure(4.4) as figure:
        axes = figure.subplots()
        for row in record["arms"]:
            if not row["count"]:
                low, high = wilson_interval(row["hits"].count("1"), len(row["hits"]))
                axes.axhspan(100 * low, 100 * high, color=GRID, zorder=0, linewidth=0)
                axes.axhline(top1(row["hits"]), color=MUTED, label="full model, trained as long (95 %)")
        for diluted, colour, line in ((True, PICK, "-"), (False, SERIES[0], "--")):
            word, shift = ("diluted", -0.06) if diluted else ("dropped at once", 0.06)
            rows = sorted(
                (r for r in record["arms"] if r["count"] and r["diluted"] == diluted), key=lambda r: r["count"]
            )
            _points(axes, [r for r in rows if r["picks"] == "nose"], shift, colour, "o", line, f"NOSE, {word}")
            for picks, marker in (("kl", "D"), ("random", "x"), ("first", "v")):
                own = [r for r in rows if r["picks"].split()[0] == picks]
                name = {"kl": "KL", "random": "random", "first": "the first blocks"}[picks]
                _points(axes, own, shift * 3, colour, marker, "", f"{name}, {word}")
        axes.set_xlabel("attention layers removed")
        axes.set_ylabel("top-1, %")
        counts = sorted({row["count"] for row in record["arms"] if row["count"]})
        if counts:
            axes.set_xticks(counts)
            axes.set_xlim(counts[0] - 0.5, counts[-1] + 0.5)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=160, facecolor="white")


def _points(
    axes: Any, rows: list[dict[str, Any]], shift: float, colour: str, marker: str, line: str, label: str
) -> None:
    if not rows:
        return
    values = [top1(row["hits"]) for row in rows]
    ends = [wilson_interval(row["hits"].count("1"), len(row["hits"])) for row in rows]
    bars = [[v - 100 * low for v, (low, _) in zip(values, ends, strict=True)],
            [100 * high - v for v, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
    axes.errorbar(
        [row["count"] + shift for row in rows], values, yerr=bars, color=colour, marker=marker, linestyle=line or "none",
        linewidth=1.4, elinewidth=0.7, markersize=5, label=label,
    )  # fmt: skip


def main() -> None:
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    record = json.loads(options.results.read_text(encoding="utf-8"))
    print(table(record))
    if options.plot is not None:
        plot(record, options.plot)


if __name__ == "__main__":
    main()
