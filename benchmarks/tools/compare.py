"""Whether this library has become slower: the ratios rival/ours of two files of results, row by row.

    python benchmarks/tools/compare.py OLD NEW
    python benchmarks/tools/compare.py --merge RUN RUN ... --out BASELINE

A row has the interval of 95 % in which its median ratio lies (order statistics of the turns, `intervals.py`). The new ratio
over the old one then lies between new.low / old.high and new.high / old.low: each of the two bounds errs with at most 2.5 %
on either side, so that to say "it fell below x" when the upper end is below x errs with at most 5 %. A "loss" is an upper end
below 1; a gross loss is one below 0.7, and the exit status is then 1.

A gross loss of a row counts on another kind of processor only if the row is portable. `--merge` makes one file of several
runs of the same commit: medians of the ratios, and intervals that hold those of all runs, since a process can be faster or
slower than the one before it as a whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.tools import records
from lambda_kernels.files import atomic_write

# A ratio that falls below this share of what it was, with confidence, is a gross loss.
GROSS = 0.7


@dataclass(frozen=True)
class Change:
    """One ratio in two files.

    Attributes:
        row, ours, rival: Which.
        old, new: (low, ratio, high) of each.
        judged: Whether a gross loss counts.
    """

    row: str
    ours: str
    rival: str
    old: tuple[float, float, float]
    new: tuple[float, float, float]
    judged: bool = True

    @property
    def interval(self) -> tuple[float, float, float]:
        """New over old: the least, the best guess, the most."""
        return self.new[0] / self.old[2], self.new[1] / self.old[1], self.new[2] / self.old[0]

    @property
    def verdict(self) -> str:
        """ "gross loss", "loss", "gain" or nothing."""
        low, _, high = self.interval
        if high < GROSS:
            return "gross loss"
        return "loss" if high < 1 else "gain" if low > 1 else ""

    @property
    def counts(self) -> bool:
        """Whether this is a reason to fail."""
        return self.judged and self.verdict == "gross loss"


def ratios(row: dict) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(ours, rival) → (low, ratio, high) of a row, those that have an interval; of a GPU's the graph's, where there is one."""
    found = {}
    for entry in row.get("ratios", []):
        kind = "graph" if entry.get("graph") is not None else "plain"
        if entry.get(f"{kind}_low") is not None:
            found[entry["ours"], entry["rival"]] = (entry[f"{kind}_low"], entry[kind], entry[f"{kind}_high"])
    return found


def same_processor(old: records.Run, new: records.Run) -> bool:
    """Whether both were measured on the same kind of processor, or GPU."""
    return all(old.environment.get(key) == new.environment.get(key) for key in ("cpu", "gpu"))


def changes(old: records.Run, new: records.Run) -> list[Change]:
    """Every ratio that is in both, in the order of the new file."""
    same, before = same_processor(old, new), old.measured()
    return [
        Change(name, *pair, ratios(before[name])[pair], interval, judged=same or bool(row.get("portable")))
        for name, row in new.measured().items()
        if name in before
        for pair, interval in ratios(row).items()
        if pair in ratios(before[name])
    ]


def report(old: records.Run, new: records.Run, found: Sequence[Change]) -> str:
    """A line for each ratio, and what else has to be known."""
    lines = []
    for key in ("cpu", "gpu", "python", *records.PACKAGES, "commit"):
        if (was := old.environment.get(key)) != (now := new.environment.get(key)):
            lines.append(f"{key}: {was} → {now}")
    lines.append(f"{'row':<60} {'ours':<18} {'rival':<18} {'old':>6} {'new':>6}  new/old, at least 95 %")
    for change in found:
        low, middle, high = change.interval
        names = f"{change.row[:60]:<60} {change.ours[:18]:<18} {change.rival[:18]:<18}"
        note = "" if change.judged else ", another processor: not judged"
        verdict = f"{middle:.2f} ({low:.2f}–{high:.2f}) {change.verdict}{note}".rstrip()
        lines.append(f"{names} {change.old[1]:>6.3g} {change.new[1]:>6.3g}  {verdict}")
    # What is missing in the newer one was left out on purpose, or is broken.
    gone = [name for name in old.measured() if name not in new.measured()]
    for name in gone:
        row = new.rows.get(name, {})
        lines.append(f"{name}: no figure ({row.get('failed') or row.get('skipped') or 'not run'})")
    if not found:
        lines.append("no ratio is in both files")
    return "\n".join(lines)


def merged(runs: Sequence[records.Run]) -> list[dict]:
    """The lines of a baseline out of several runs.

    Raises:
        ValueError: They are of different commits or processors.
    """
    first = runs[0]
    for run in runs[1:]:
        if not same_processor(first, run) or first.environment["commit"] != run.environment["commit"]:
            raise ValueError(f"{run.path} is of another commit or processor than {first.path}: merge runs of one")
    lines = [{"environment": {**first.environment, "runs": len(runs)}}]
    for name, row in first.measured().items():
        others = [ratios(run.measured()[name]) for run in runs if name in run.measured()]
        entries = []
        for pair in ratios(row):
            triples = [other[pair] for other in others if pair in other]
            middle = statistics.median(ratio for _, ratio, _ in triples)
            entries.append(
                {
                    "ours": pair[0],
                    "rival": pair[1],
                    "plain": round(middle, 4),
                    "plain_low": min(low for low, _, _ in triples),
                    "plain_high": max(high for _, _, high in triples),
                }
            )
        if entries:
            kept = {key: row[key] for key in ("name", "group", "what", "clock", "portable") if key in row}
            lines.append({**kept, "runs": len(others), "ratios": entries})
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="OLD NEW", help="two files of results")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="RUN", help="runs to make one baseline of")
    parser.add_argument("--out", type=Path, help="where the baseline goes")
    options = parser.parse_args(arguments)
    if options.merge and (options.runs or options.out is None):
        parser.error("--merge takes runs and --out, and nothing else")
    if not options.merge and len(options.runs) != 2:
        parser.error(f"two files are compared; got {len(options.runs)}")
    try:
        runs = [records.read(path) for path in options.merge or options.runs]
        lines = merged(runs) if options.merge else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.merge:
        with atomic_write(options.out) as temporary:
            temporary.write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
            )
        print(f"{len(lines) - 1} rows of {len(runs)} runs: {options.out}")
        return 0
    old, new = runs
    found = changes(old, new)
    print(report(old, new, found))
    return 1 if any(change.counts for change in found) else 0


if __name__ == "__main__":
    sys.exit(main())
