"""Free main memory: what the system has available, limited by the control groups of this process."""

from __future__ import annotations

import contextlib
from pathlib import Path

_ROOT = Path("/")

# Files of a control group: its limit, its usage, and the line of memory.stat with what the kernel reclaims when memory
# runs short.
_GROUPS = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory() -> int | None:
    """Bytes of main memory that this process can still allocate; None if the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (_ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for folder, kind in _groups():
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append(_left(folder, *_GROUPS[kind]))
    return min(found, default=None)


def _left(folder: Path, limit: str, usage: str, given_back: str) -> int:
    """Bytes that a group has left; ValueError if it has no limit ("max")."""
    most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return max(0, most - used + int(stat[given_back]))


def _groups() -> list[tuple[Path, str]]:
    """The folders of this process's groups, innermost first; in a container only the outermost may be visible."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in (_ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                top, kind = _ROOT / "sys/fs/cgroup", "v2"
            elif "memory" in controllers.split(","):
                top, kind = _ROOT / "sys/fs/cgroup/memory", "v1"
            else:
                continue
            inner = top / path.strip("/")
            found += [(folder, kind) for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
    return found
