"""Warnings as values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def capture_warnings(work: Callable[[], T]) -> tuple[T, list[str]]:
    """Return the result of `work`, and the text of the warnings that it raised, each once."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = work()
    return result, list(dict.fromkeys(str(w.message) for w in found))
