"""Run the benchmarks and write what they found, a line at a time:

    python benchmarks/tools/measure.py --out DIR [--quick] [--only FILE,FILE] [-k EXPRESSION] [--threads N]

One process of pytest for each file (with --quick one for all of them). Writes DIR/<date>-<commit>.jsonl, whose first line
describes the machine, and a log beside it, goes on after a benchmark that fails or a process that dies, and exits with 1
at the end if any did. On two CPU cores all takes about half an hour, `--quick` about a minute. `benchmarks/gpu/run.py` does the
same on a machine with a GPU that is there for minutes only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.tools import records

BENCHMARKS = records.REPOSITORY / "benchmarks"

# What may take longest is given this long; what hangs must not keep the rest from being measured.
LIMIT_S = 3600.0


def files() -> list[str]:
    """The names of the files with benchmarks."""
    return sorted(path.name for path in BENCHMARKS.glob("test_*.py"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="measure.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results, such as benchmarks/results/MACHINE"
    )
    parser.add_argument("--quick", action="store_true", help="a subset of small sizes for the CPU, on one thread")
    parser.add_argument("--only", help=f"files to run, of {','.join(files())}")
    parser.add_argument("-k", dest="expression", help="benchmarks to run, as pytest's -k")
    parser.add_argument("--threads", type=int, help="threads of PyTorch; its own choice if not given")
    parser.add_argument("--more", type=float, default=1.0, help="take this many times the usual turns")
    parser.add_argument("--commit", help="the commit, where there is no git to ask")
    options = parser.parse_args(arguments)
    wanted = files() if options.only is None else [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in wanted if name not in files()]:
        parser.error(f"--only: unknown {', '.join(unknown)}; files are {', '.join(files())}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1; got {options.threads}")
    path, good = measure(
        options.out,
        [wanted] if options.quick else [[name] for name in wanted],
        quick=options.quick,
        expression=options.expression,
        threads=options.threads,
        more=options.more,
        commit=options.commit,
    )
    print(path)
    return 0 if good else 1


def measure(
    out: Path,
    groups: Sequence[Sequence[str]],
    *,
    quick: bool = False,
    expression: str | None = None,
    names: Sequence[str] | None = None,
    threads: int | None = None,
    more: float = 1.0,
    commit: str | None = None,
) -> tuple[Path, bool]:
    """Run groups of files, each in a process of its own.

    Args:
        out: Folder for the results.
        groups: Names of files in this folder.
        quick: Only the subset, on one thread.
        expression: As pytest's -k.
        names: Only these rows, "file::test".
        threads: Of PyTorch.
        more: Times the usual turns.
        commit: Where there is no git to ask.

    Returns:
        The file of results, and whether all that ran passed.
    """
    environment = records.describe(commit)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.strptime(str(environment["time"]), "%Y-%m-%d %H:%M:%S UTC"))
    out.mkdir(parents=True, exist_ok=True)
    path = out.resolve() / f"{stamp}-{str(environment['commit'])[:9]}{'-quick' if quick else ''}.jsonl"
    if path.exists():
        raise FileExistsError(f"{path} is there already; wait a second")
    records.add_line(path, {"environment": {**environment, "quick": quick, "threads": threads}})
    # Without what pytest-xdist tells its workers: there pytest-benchmark would measure nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    child = {**inherited, records.LINES: str(path), "PYTHONUNBUFFERED": "1"}
    sources = [str(records.REPOSITORY), str(records.REPOSITORY / "python"), child.get("PYTHONPATH", "")]
    child["PYTHONPATH"] = os.pathsep.join(filter(None, sources))
    if quick or threads:
        child["OMP_NUM_THREADS"] = "1" if quick else str(threads)
    good = True
    for group in groups:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--benchmark-only"]
        command += ["--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds", f"--more={more:g}"]
        command += ["--quick"] * quick + (["-k", expression] if expression else [])
        wanted = list(group) if names is None else [name for name in names if name.split("::")[0] in group]
        if wanted:
            good &= _run([*command, *(str(BENCHMARKS / name) for name in wanted)], child, path.with_suffix(".log"))
    rows = records.read(path).rows.values()
    failed = [row["name"] for row in rows if "failed" in row]
    skipped = sum("skipped" in row for row in rows)
    print(f"{len(rows) - skipped - len(failed)} measured, {skipped} skipped, {len(failed)} failed", flush=True)
    for name in failed:
        print(f"    {name}: {records.read(path).rows[name]['failed']}")
    return path, good


def _run(command: list[str], environment: dict[str, str], log: Path) -> bool:
    """Run pytest, its output into the log; whether it ended well. That no benchmark was asked for in a file is well."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        try:
            done = subprocess.run(
                command,
                cwd=records.REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            file.write(f"\n[stopped after {LIMIT_S:.0f} s]\n".encode())
            print(f"stopped after {LIMIT_S:.0f} s: {' '.join(command[-1:])}", flush=True)
            return False
        file.write(f"\n[status {done.returncode}]\n\n".encode())
    if done.returncode not in (0, 5):
        print(f"status {done.returncode}: see {log}", flush=True)
    return done.returncode in (0, 5)


if __name__ == "__main__":
    sys.exit(main())
