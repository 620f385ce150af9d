"""The results of `evidence.py`: paired intervals, the table as Markdown, the plot.

python benchmarks/studies/evidence_table.py R.json --plot docs/evidence.png
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lambda_kernels.files import atomic_write, write_json
from lambda_vit.measure.intervals import wilson_interval
from lambda_vit.report.figures.style import MUTED, PICK, SERIES, new_figure

_Z = 1.959964


def write_results(folder: Path, names: Sequence[str], path: Path) -> None:
    """Gather what the arms of a study left, in this order; arms that are not finished are listed as missing."""
    found = {name: folder / f"{name}.json" for name in names}
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in found.values() if file.exists()]
    predictors, picks = folder / "predictors.json", folder / "picks.json"
    record = {
        "options": json.loads((folder / "options.json").read_text(encoding="utf-8")),
        "picks": json.loads(picks.read_text(encoding="utf-8")) if picks.exists() else {},
        "predictors": json.loads(predictors.read_text(encoding="utf-8")) if predictors.exists() else {},
        "base": json.loads((folder / "base.json").read_text(encoding="utf-8")),
        "missing": [name for name, file in found.items() if not file.exists()],
        "arms": rows,
    }
    write_json(path, record)


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote, also in its first form, where arms differed in picks, count and dilution alone."""
    record = json.loads(path.read_text(encoding="utf-8"))
    record.setdefault("predictors", {})
    for row in record["arms"]:
        if "way" not in row:
            row |= {"way": "labels, diluted" if row["diluted"] else "labels", "recipe": {}, "seed": 0,
                    "epochs": record["options"]["epochs"]}  # fmt: skip
    return record


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
    """A row per arm, as Markdown: the shortest trainings first, and the full network before the others."""
    lines = [
        "| epochs | picks | without attention | trained by | untrained | trained, top-1 (95 %) | against the network before "
        "(95 %) | against the full one, trained as long (95 %) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = record["base"]["hits"] if isinstance(record["base"].get("hits"), str) else None
    for row in sorted(record["arms"], key=lambda row: (row["epochs"], row["count"] > 0, -top1(row["hits"]))):
        low, high = wilson_interval(row["hits"].count("1"), len(row["hits"]))
        full, how = _full_for(row, record["arms"])
        lines.append(
            f"| {row['epochs']} | {row['picks'] if row['count'] else 'full network'} | "
            f"{', '.join(map(str, row['layers'])) or 'none'} | {row['way']}{_seed(row)} | "
            f"{top1(row['hits_untrained']):.1f} | {top1(row['hits']):.1f} ({100 * low:.1f}–{100 * high:.1f}) | "
            f"{_against(row['hits'], base)} | {_against(row['hits'], full)}{how} |"
        )
    if record["missing"]:
        lines.append(f"\nNot trained: {', '.join(record['missing'])}.")
    return "\n".join(lines)


def _seed(row: dict[str, Any]) -> str:
    return f", seed {row['seed']}" if row["seed"] else ""


def _full_for(row: dict[str, Any], arms: Sequence[dict[str, Any]]) -> tuple[str | None, str]:
    """The hits of the full network trained as long as `row`, by the same losses or else on labels, which is said."""

    def losses(arm: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in arm["recipe"].items() if k not in ("removal", "dilution", "local_epochs")}

    if not row["count"]:
        return None, ""
    full = [arm for arm in arms if not arm["count"] and (arm["epochs"], arm["seed"]) == (row["epochs"], row["seed"])]
    if alike := [arm for arm in full if losses(arm) == losses(row)]:
        return alike[0]["hits"], ""
    on_labels = [arm for arm in full if arm["way"] == "labels"]
    return (on_labels[0]["hits"], ", on labels") if on_labels else (None, "")


def _against(ours: str, theirs: str | None) -> str:
    if theirs is None:
        return "–"
    middle, below, above = difference(ours, theirs)
    return f"{middle:+.1f} ({below:+.1f} to {above:+.1f})"


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, where equal values share the mean of theirs."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        return np.array([sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values])

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def correlations(record: dict[str, Any], samples: int = 2000) -> str:
    """How well what is known of a set of layers before training predicts its accuracy after one epoch, as Markdown.

    The interval is of the sets and of the validation images: both are drawn anew, with replacement.
    """
    rows = [row for row in record["arms"] if row["epochs"] == 1 and row["picks"] in record["predictors"]]
    rng = np.random.default_rng(0)
    hits = np.array([[hit == "1" for hit in row["hits"]] for row in rows])
    names = record["predictors"][rows[0]["picks"]]
    known = {name: [record["predictors"][row["picks"]][name] for row in rows] for name in names}
    known["untrained"] = [-top1(row["hits_untrained"]) for row in rows]
    lines = [f"| of {len(rows)} sets of five | rank correlation with the accuracy lost (95 %) |", "| --- | --- |"]
    for name, values in known.items():
        found = []
        for _ in range(samples):
            sets, images = (rng.integers(n, size=n) for n in hits.shape)
            with np.errstate(invalid="ignore", divide="ignore"):  # a sample of equal values has none
                found.append(rank_correlation([values[i] for i in sets], -hits[sets][:, images].mean(1)))
        low, high = np.nanpercentile(found, [2.5, 97.5])
        own = rank_correlation(values, -hits.mean(1))
        lines.append(f"| {PREDICTORS[name]} | {own:+.2f} ({low:+.2f} to {high:+.2f}) |")
    return "\n".join(lines)


PREDICTORS = {
    "kl": "divergence of the class probabilities (`kl`)",
    "repaired": "the same, with MLPs repaired block by block (`recoverability`)",
    "untrained": "accuracy lost without training",
    "te": "change of the output's entropy (`nose`)",
    "cosine": "turned tokens, summed (`cosine`)",
    "neighbours": "pairs of neighbours",
    "first": "layers among the first four",
}


def extrapolate(record: dict[str, Any], way: str, epochs: int, samples: int = 2000) -> tuple[float, float, float]:
    """The points below the network before that the power law a·E^−b through the budgets E of a way promises at `epochs`.

    Returns:
        The value and its 95 % interval, which covers the sampling of validation images alone: not another law, and not another
        seed.
    """
    wanted = {"way": way, "picks": "kl", "count": 5, "seed": 0}
    rows = [row for row in record["arms"] if all(row[key] == value for key, value in wanted.items())]
    budgets = {row["epochs"] for row in rows}
    if len(budgets) < 2:
        raise ValueError(f"{way} was trained with {len(budgets)} budget(s): a law requires two or more")
    base = np.array([hit == "1" for hit in record["base"]["hits"]])
    hits = np.array([[hit == "1" for hit in row["hits"]] for row in rows])
    rng = np.random.default_rng(0)
    found = []
    for sample in range(samples + 1):
        images = rng.integers(len(base), size=len(base)) if sample else np.arange(len(base))
        gaps = 100 * (base[images].mean() - hits[:, images].mean(1))
        if (gaps <= 0).any():
            raise ValueError(
                f"{way} reaches the network before on these images, or may do so by chance: no law fits its gaps"
            )
        slope, offset = np.polyfit(np.log([row["epochs"] for row in rows]), np.log(gaps), 1)
        found.append(math.exp(offset + slope * math.log(epochs)))
    low, high = np.percentile(found[1:], [2.5, 97.5])
    return found[0], float(low), float(high)


def plot(record: dict[str, Any], path: Path) -> None:
    """Left: accuracy after each epoch of the longer arms. Right, if there are any: sets of five after one epoch.

    Random sets are grey, and have no name there.
    """
    base = top1(record["base"]["hits"])
    sets = [row for row in record["arms"] if row["epochs"] == 1 and row["picks"] in record["predictors"]]
    with new_figure(4.4) as figure:
        left, *others = figure.subplots(1, 1 + bool(sets), squeeze=False)[0]
        longer = [row for row in record["arms"] if row["epochs"] > 1]
        for row, (style, colour) in zip(longer, itertools.cycle(itertools.product(("-", "--", ":"), SERIES))):
            label = f"{row['picks'] if row['count'] else 'full network'}, {row['way']}, {row['epochs']} epochs"
            left.plot(
                range(len(row["curve"]) + 1), [top1(row["hits_untrained"]), *row["curve"]],
                color=colour, linestyle=style, label=label,
            )  # fmt: skip
        left.axhline(base, color=MUTED, linestyle="--", label="the network before")
        left.set_xlabel("epoch")
        left.set_ylabel("top-1, %")
        named = [row["picks"] for row in sorted(sets, key=lambda r: -top1(r["hits"])) if "random" not in row["picks"]]
        for right, row in ((axes, row) for axes in others for row in sets):
            x, y, name = record["predictors"][row["picks"]]["kl"], top1(row["hits"]), row["picks"]
            color = PICK if name == "kl" else SERIES[0] if name in named else MUTED
            right.plot(x, y, "o", color=color, markersize=5)
            if name in named:  # alternately above and below, since good sets lie near one another
                place = (4, -11 if named.index(name) % 2 else 6)
                right.annotate(name, (x, y), place, textcoords="offset points", fontsize=8, color=MUTED)
        for right in others:
            right.set_xlabel("KL before training, bits")
            right.set_ylabel("top-1 after one epoch, %")
            right.margins(0.15)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=160, facecolor="white")


def main() -> None:
    """Print the tables and what the curve promises, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    record = read_results(options.results)
    print(table(record))
    if any(row["epochs"] == 1 and row["picks"] in record["predictors"] for row in record["arms"]):
        print(f"\n{correlations(record)}")
    for epochs in (60, 120, 240):
        with contextlib.suppress(ValueError):
            middle, low, high = extrapolate(record, "features", epochs)
            print(f"\n{epochs} epochs: {middle:.1f} points below the network before ({low:.1f} to {high:.1f})")
    if options.plot is not None:
        plot(record, options.plot)


if __name__ == "__main__":
    main()
