"""Fixtures of all tests: real data where it is there, small models, and memory that betrays what was never written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this variable while it is imported; afterwards
# its own switch takes over, and processes that tests start know nothing of it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # there is no Triton for macOS and Windows
        import triton

        triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]


def interpreter_obstacle(triton_version: str, numpy_version: str) -> str:
    """Why Triton's interpreter cannot run the kernels with this NumPy; empty where it can."""
    old = tuple(map(int, triton_version.split(".")[:2])) < (3, 7)
    if not old or tuple(map(int, numpy_version.split(".")[:2])) < (2, 4):
        return ""
    return (
        f"Triton {triton_version}'s interpreter does not work with NumPy {numpy_version}, and there is no GPU to run the "
        "kernels on: pip install 'numpy<2.4', or Triton 3.7 or later"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Say what is wrong once, before more than two hundred tests do."""
    if torch.cuda.is_available():
        return
    with contextlib.suppress(ImportError):
        import numpy
        import triton

        if obstacle := interpreter_obstacle(triton.__version__, numpy.__version__):
            raise pytest.UsageError(obstacle)


REPOSITORY = Path(__file__).resolve().parents[1]
WEIGHTS = "deit_tiny_patch16_224.safetensors"
IMAGES = "imagenette_224.zip"

# The models are tiny: a second thread gains nothing, and waiting for it costs a factor of ten where a core is busy.
torch.set_num_threads(1)

# Autograd starts a thread for every GPU at the first backward of a process, whose forked children cannot train any more. Once
# torch.compile or torch.export has traced anything it finds GPUs where there are none (FakeTensorMode makes them up). What
# the first backward finds is final, so it comes before them.
torch.ones((), requires_grad=True).backward()


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


def small_vit(name: str = "vit_tiny_patch16_224", **options: object) -> torch.nn.Module:
    """A timm model of width 48 and depth 4 on 32×32 images with 10 classes, seeded, in eval mode.

    Biases, norms and LayerScale gammas get values that are not tiny, so that leaving one out is seen.
    """
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
    model = timm.create_model(name, pretrained=False, **{**sizes, **options})
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() < 2 else 0.05
        with torch.no_grad():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
            if name.endswith("gamma"):
                parameter.add_(0.5)
    return model.eval()


def images(count: int = 4, size: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Random images `[count, channels, size, size]`."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


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
