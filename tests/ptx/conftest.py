"""The process that compiles and executes kernels, one for a session of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ptx_worker import Worker


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    pytest.importorskip("triton")
    made = Worker()
    yield made
    made.close()
