"""The table of targets and figures in README.md, out of the files in `benchmarks/results/<machine>/`:

    python benchmarks/tools/table.py            print it
    python benchmarks/tools/table.py --check    exit with 1 unless README.md holds just this
    python benchmarks/tools/table.py --write    put it there, between two comments

A figure comes from the newest file that has its row; what was never measured says so. A file of a quick run is left out, since
its sizes are small ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.tools import pages, records, targets

NOT_MEASURED = "not measured"
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Sources:
    """What figures were measured on, numbered in the order of their use."""

    def __init__(self) -> None:
        self._described: list[str] = []

    def mark(self, run: records.Run) -> str:
        """The number of what the run was measured on, raised."""
        if (text := described(run)) not in self._described:
            self._described.append(text)
        return _raised(self._described.index(text) + 1)

    def lines(self) -> list[str]:
        """What each was measured on."""
        return [f"{_raised(number)} {text}" for number, text in enumerate(self._described, 1)]


def _raised(number: int) -> str:
    return str(number).translate(_RAISED)


def described(run: records.Run) -> str:
    """Machine, versions, commit and date of a run."""
    found = run.environment
    gpu = found.get("gpu")
    machine = [f"{found['cpu']}, {found['cores']} core{'s' * (found['cores'] != 1)}"] if "cpu" in found else []
    machine += [str(gpu)] if gpu and gpu != "none" else []
    versions = [f"{name} {found[name]}" for name in ("python", *records.PACKAGES) if name in found]
    commit = f"commit {str(found.get('commit', 'unknown'))[:9]}"
    if found.get("dirty"):
        commit += " with changes"
    return f"{'; '.join(machine)}; {', '.join(versions)}; {commit}; {str(found.get('time', 'no date'))[:10]}"


def figure(target: targets.Target, runs: Sequence[records.Run], sources: Sources) -> str:
    """The ratio, with its interval, and where it comes from."""
    for run in reversed(runs):
        row = run.measured().get(target.row, {})
        entry = next((e for e in row.get("ratios", []) if (e["ours"], e["rival"]) == (target.ours, target.rival)), None)
        if entry is None or run.environment.get("quick"):
            continue
        texts = []
        for kind, words in (("graph", "GPU time "), ("plain", "launched one by one " if entry.get("graph") else "")):
            if entry.get(kind) is not None:
                text = _measured(entry[kind])
                if (low := entry.get(f"{kind}_low")) is not None and low != entry.get(f"{kind}_high"):
                    text += f" ({_measured(low)}–{_measured(entry[f'{kind}_high'])})"
                texts.append(words + text)
        if texts:
            return f"{', '.join(texts)}{sources.mark(run)}"
    return NOT_MEASURED


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _measured(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def lines_of(entries: Sequence[targets.Target]) -> list[list[targets.Target]]:
    """Targets that share a line: those that follow one another with the same words."""
    found: list[list[targets.Target]] = []
    for entry in entries:
        last = found[-1][0] if found else None
        if last and (last.what, last.against, last.device) == (entry.what, entry.against, entry.device):
            found[-1].append(entry)
        else:
            found.append([entry])
    return found


def _joined(texts: Sequence[str]) -> str:
    """One text where all are the same, else all of them."""
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def table(entries: Sequence[targets.Target], runs: Sequence[records.Run]) -> str:
    """The Markdown that stands between the two comments: a table for each kind of device, then where figures come from."""
    sources = Sources()
    text = []
    for device in ("cpu", "gpu"):
        lines = lines_of([entry for entry in entries if entry.device == device])
        if not lines:
            continue
        text += [
            f"| {device.upper()} | against | aimed at | limit on paper | measured (95 %) |",
            "|---|---|---|---|---|",
        ]
        for line in lines:
            figures = _joined([figure(entry, runs, sources) for entry in line])
            aim, limit = (_joined([_number(getattr(e, key)) for e in line]) for key in ("target", "limit"))
            text.append(f"| {line[0].what} | {line[0].against} | {aim} | {limit} | {figures} |")
        text.append("")
    text.append("Ratios, rival over ours: above 1 ours takes less.")
    text += ["", *(f"{line}  " for line in sources.lines())] if sources.lines() else []
    return "\n".join(text).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="table.py", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="exit with 1 unless the file is current")
    what.add_argument("--write", action="store_true", help="bring the file up to date")
    parser.add_argument("--file", type=Path, default=records.REPOSITORY / "README.md")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    options = parser.parse_args(arguments)
    try:
        new = table(targets.load(), records.committed(options.results))
        if not (options.check or options.write):
            print(new)
            return 0
        old, wanted = pages.replaced(options.file, "table.py", new)
    except (OSError, ValueError) as error:
        print(f"table.py: {error}", file=sys.stderr)
        return 2
    if options.check:
        if old != wanted:
            print(f"{options.file} is out of date: python benchmarks/tools/table.py --write", file=sys.stderr)
        return int(old != wanted)
    pages.write(options.file, "table.py", new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
