"""Files of results: what they were measured on, and a line of JSON for each row.

The first line of a file describes the machine, the versions and the commit. A row is added as soon as it is there, so that
a run that was stopped keeps what it has.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"

# Where the rows of a run go; set by whoever starts pytest.
LINES = "LAMBDA_KERNELS_BENCHMARK_LINES"

# What a figure depends on: a page or a result that was written since changes none.
SOURCES = ("lambda_kernels", "csrc", "python", "benchmarks/*.py", "benchmarks/*.cu", "setup.py", "pyproject.toml")

PACKAGES = ("torch", "triton", "timm", "numpy")


@dataclass(frozen=True)
class Run:
    """A file of results.

    Attributes:
        path: The file.
        environment: Machine, versions, commit and date.
        rows: By name; of rows that were measured twice, the last.
    """

    path: Path
    environment: dict[str, object]
    rows: dict[str, dict] = field(repr=False)

    def measured(self) -> dict[str, dict]:
        """The rows that have figures: neither skipped nor failed."""
        return {name: row for name, row in self.rows.items() if "skipped" not in row and "failed" not in row}


def add_line(path: Path, record: dict) -> None:
    """Add a record to a file of lines, in one piece."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read(path: Path) -> Run:
    """A file of lines, or what `gpu/run.py` leaves.

    A last line that was cut in the middle is left out.

    Raises:
        ValueError: It is neither; the message names the file and what is wrong.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return _gpu_run(path, text)
    lines = text.splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
    if not records or "environment" not in records[0]:
        raise ValueError(f"{path}: its first line does not describe the machine; was it written by measure.py?")
    return Run(path, records[0]["environment"], _by_name(path, records[1:]))


def _gpu_run(path: Path, text: str) -> Run:
    try:
        found = json.loads(text)
        environment, parts = found["environment"], found["parts"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a result of gpu/run.py (no environment and parts)") from None
    return Run(path, environment, _by_name(path, [row for part in parts.values() for row in part.get("rows", [])]))


def _by_name(path: Path, rows: Iterable[dict]) -> dict[str, dict]:
    found = {}
    for row in rows:
        if "name" not in row:
            raise ValueError(f"{path}: a row without a name: {json.dumps(row)[:80]}")
        found[row["name"]] = row
    return found


def committed(results: Path = RESULTS) -> list[Run]:
    """The runs in `results/<machine>/`, the oldest first: lines of `measure.py` and files of `gpu/run.py`, which say .json."""
    paths = [path for path in results.glob("*/*") if path.suffix in (".json", ".jsonl")]
    return sorted((read(path) for path in paths), key=lambda run: str(run.environment.get("time", "")))


def describe(commit: str | None = None) -> dict[str, object]:
    """This machine, the versions and the state of the sources.

    Args:
        commit: The commit, where there is no git to ask.
    """
    head = _said("git", "rev-parse", "HEAD")
    found = head if re.fullmatch(r"[0-9a-f]{40}", head) else "unknown"
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader") or "none",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": commit or found,
        # Unknown where there is no git: then `commit` is what somebody said.
        "dirty": bool(_said("git", "status", "--porcelain", "--untracked-files=no", "--", *SOURCES))
        if found != "unknown"
        else None,
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def cpu_model() -> str:
    """The processor's name and, where the system tells, family and model: names alone are cut short by hypervisors."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    name = found.get("model name", platform.machine())
    return f"{name} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _said(*command: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
