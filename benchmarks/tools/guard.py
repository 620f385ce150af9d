"""Whether a change has made this library much slower, for CI: about a minute and a half on two busy cores.

    python benchmarks/tools/guard.py [--baseline benchmarks/tools/baseline.jsonl] [--out DIR]

Measures the quick subset and compares its ratios with the baseline's, as `compare.py` does. A row that looks like a gross
loss is measured again, with four times the turns, in a process of its own: only one that is lost both times counts. Exits with
1 for a gross loss, and for a benchmark that fails or is gone. A new baseline, after a change that is meant to cost something:

    for run in 1 2 3 4 5; do python benchmarks/tools/measure.py --quick --out DIR; done
    python benchmarks/tools/compare.py --merge DIR/*-quick.jsonl --out benchmarks/tools/baseline.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.tools import compare, measure, records

BASELINE = Path(__file__).with_name("baseline.jsonl")

# (rows or None for all of them, times the usual turns) → what was measured
Measure = Callable[[Sequence[str] | None, float], records.Run]


def lost(baseline: records.Run, first: records.Run, again: Measure) -> list[compare.Change]:
    """The gross losses of a run that are gross losses in a second, longer one, too.

    Args:
        baseline: What is compared with.
        first: The run.
        again: Measures some rows anew.
    """
    suspects = [change for change in compare.changes(baseline, first) if change.counts]
    if not suspects:
        return []
    names = list(dict.fromkeys(change.row for change in suspects))
    print(f"again, with four times the turns: {', '.join(names)}", flush=True)
    second = again(names, 4.0)
    found = compare.changes(baseline, second)
    asked = dataclasses.replace(baseline, rows={name: baseline.rows[name] for name in names})
    print(compare.report(asked, second, found), flush=True)
    pairs = {(change.row, change.ours, change.rival) for change in suspects}
    return [change for change in found if change.counts and (change.row, change.ours, change.rival) in pairs]


def missing(baseline: records.Run, run: records.Run) -> list[str]:
    """Rows that failed, and those of the baseline that did not run; to be skipped is no reason to fail."""
    return [
        f"{name}: {run.rows.get(name, {}).get('failed', 'it did not run')}"
        for name in dict.fromkeys([*baseline.rows, *run.rows])
        if name not in run.measured() and "skipped" not in run.rows.get(name, {})
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="guard.py", description=__doc__.split("\n")[0])
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--out", type=Path, help="folder for the results; they are thrown away if not given")
    options = parser.parse_args(arguments)
    try:
        baseline = records.read(options.baseline)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)

        def measured(names: Sequence[str] | None, more: float) -> records.Run:
            files = measure.files() if names is None else list(dict.fromkeys(name.split("::")[0] for name in names))
            folder = out if names is None else out / "again"
            path, _ = measure.measure(folder, [files], quick=True, names=names, more=more)
            return records.read(path)

        first = measured(None, 1.0)
        print(compare.report(baseline, first, compare.changes(baseline, first)), flush=True)
        broken = missing(baseline, first)
        bad = lost(baseline, first, measured)
    for line in broken:
        print(f"no figure of {line}")
    for change in bad:
        print(f"much slower than before, twice: {change.row}, {change.ours} against {change.rival}")
    if not compare.same_processor(baseline, first):
        print("the baseline is of another processor: rows that are not portable were shown, not judged")
    return 1 if bad or broken else 0


if __name__ == "__main__":
    sys.exit(main())
