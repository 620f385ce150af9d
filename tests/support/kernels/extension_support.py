"""What the tests of the compiled extension share."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from lambda_kernels.ops.histogram import _extension


def require_extension() -> None:
    """Fail if the extension is not there; skip only where it could not have been built."""
    reason = _extension.why_unavailable()
    if reason is None:
        return
    if not os.environ.get("CXX") and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        pytest.skip("no C++ compiler here, so no extension")
    pytest.fail(f"{reason}. {_extension.REMEDY}")


def tool(name: str) -> str:
    """The path of a binary utility: from the PATH, or one of those that Triton brings along."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        found = shutil.which(name, path=Path(triton.origin).parent / "backends/nvidia/bin")
    if found is None:
        pytest.skip(f"no {name} here")
    return found
