"""Pages of which a tool writes a part: what stands between two comments."""

from __future__ import annotations

import re
from pathlib import Path

from lambda_kernels.files import atomic_write


def marks(tool: str) -> tuple[str, str]:
    """The comments before and after the part that a tool writes."""
    return (
        f"<!-- benchmarks/tools/{tool} writes what follows -->",
        f"<!-- benchmarks/tools/{tool} wrote what precedes -->",
    )


def replaced(path: Path, tool: str, new: str) -> tuple[str, str]:
    """What a page holds now, and what it would hold with `new` between the tool's two comments.

    Raises:
        ValueError: They are not there, each once and in this order.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = marks(tool)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} needs the lines {begin!r} and {end!r}, each once and in this order")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return text, pattern.sub(lambda _: f"{begin}\n\n{new}\n\n{end}", text)


def write(path: Path, tool: str, new: str) -> None:
    """Put `new` between the tool's two comments."""
    _, wanted = replaced(path, tool, new)
    with atomic_write(path) as temporary:
        temporary.write_text(wanted, encoding="utf-8")
