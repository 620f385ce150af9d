"""Fixtures of all tests: real data where it is there, small models, and memory that betrays what was never written."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch
from places import IMAGES, REPOSITORY, WEIGHTS
from torch_setup import interpreter_obstacle

# Tests import the tools of benchmarks/; behind everything else, so that an installed lambda_kernels is the one that is tested.
sys.path.append(str(REPOSITORY))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-tile", action="store_true", help="Also execute the PTX of every tile that ships (half an hour)."
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of every tile run where they are asked for."""
    if config.getoption("--every-tile"):
        return
    left = [item for item in items if item.get_closest_marker("every_tile")]
    if left:
        items[:] = [item for item in items if not item.get_closest_marker("every_tile")]
        config.hook.pytest_deselected(items=left)


def pytest_configure(config: pytest.Config) -> None:
    """Say what is wrong once, before more than two hundred tests do."""
    if torch.cuda.is_available():
        return
    with contextlib.suppress(ImportError):
        import numpy
        import triton

        if obstacle := interpreter_obstacle(triton.__version__, numpy.__version__):
            raise pytest.UsageError(obstacle)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real weights and images: $LAMBDA_KERNELS_TEST_DATA, or shared/data beside the checkout."""
    given = os.environ.get("LAMBDA_KERNELS_TEST_DATA")
    places = [Path(given)] if given else [REPOSITORY.parent / "shared" / "data"]
    for place in places:
        if (place / WEIGHTS).is_file() and (place / IMAGES).is_file():
            return place
    pytest.skip(f"no real weights and images in {', '.join(map(str, places))}; set LAMBDA_KERNELS_TEST_DATA")


@pytest.fixture(scope="session")
def deit_tiny(real_data: Path) -> torch.nn.Module:
    """A real DeiT-Tiny in float32, eval mode. Shared by all tests: never change it in place."""
    from lambda_vit.cli.models import open_model

    return open_model("deit_tiny_patch16_224", weights=real_data / WEIGHTS)


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first candidate of each stage runs: results do not depend on times, and nobody's cache is written to."""
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", "off")


@pytest.fixture
def mlp_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The keyword arguments of every call of `ln_mlp` by a block."""
    from lambda_kernels.blocks import mlp_block

    seen = []
    genuine = mlp_block.ln_mlp
    monkeypatch.setattr(mlp_block, "ln_mlp", lambda *a, **k: seen.append(k) or genuine(*a, **k))
    return seen


@pytest.fixture
def no_interpreter() -> None:
    """As in a user's process, where Triton's interpreter is off."""
    runtime = pytest.importorskip("triton").knobs.runtime

    def switch(on: bool) -> None:
        runtime.interpret = on
        os.environ.pop("TRITON_INTERPRET", None)  # set with it, and inherited by processes that tests start

    before = runtime.interpret
    switch(False)
    yield
    switch(before)


@pytest.fixture
def poisoned_empty() -> object:
    """Fill what `torch.empty` and its kin return with NaN, so that reading what was never written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
