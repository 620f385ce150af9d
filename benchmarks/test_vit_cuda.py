"""Whole models on a GPU, in bfloat16: DeiT without some of its attention layers against the full one.

In the order of their importance, since time on a GPU may end before the last.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch

from benchmarks.support import gpu_timing, verify
from benchmarks.support.halves import MODES as COMPILED
from benchmarks.support.halves import compiled
from lambda_kernels import convert_vit

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.benchmark(group="whole model"),
]

# name → (timm's model, the attention layers that go)
MODELS = {
    "B": ("deit_base_patch16_224", (0, 1, 3, 4, 6)),
    "S": ("deit_small_patch16_224", (1, 3, 5)),
    "T": ("deit_tiny_patch16_224", (1, 3, 5)),
}


class Contest:
    """A full model and the same without some attention layers, with rotating images."""

    def __init__(self, name: str, batch: int) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.name = name
        architecture, self.removed = MODELS[name]
        self.full = timm.create_model(architecture).eval().cuda().bfloat16()
        self.ours = convert_vit(self.full, remove=self.removed, backend="triton")
        self.images = gpu_timing.rotating(batch, 3, 224, 224)
        self.missing: dict[str, str] = {}

    def version(self, model: Callable) -> gpu_timing.Version:
        """A forward of the images of a number."""

        def forward(number: int) -> torch.Tensor:
            with torch.no_grad():
                return model(self.images[number])

        return forward

    def verified(self) -> gpu_timing.Version:
        """Ours, after its logits were held against float64."""
        exact = convert_vit(self.full, remove=self.removed, backend="torch").double()
        some = self.images[0][:4]
        with torch.no_grad():
            verify.close("the logits", self.ours(some), exact(some.double()), verify.MODEL[torch.bfloat16])
        assert {row.mlp for row in self.ours.lambda_kernels_info.blocks} == {"triton"}
        return self.version(self.ours)

    def plain(self) -> gpu_timing.Version:
        """Ours by PyTorch's operators."""
        return self.version(convert_vit(self.full, remove=self.removed, backend="torch"))

    def compiled(self, name: str, model: torch.nn.Module, mode: str) -> dict[str, gpu_timing.Version]:
        """The compiled model under its name; nothing, and the reason in `missing`, if it cannot be."""
        return compiled(name, COMPILED[mode], model, self.version, self.missing, 0)

    def race(self, race: Callable, what: str, ours: dict, rivals: dict, **options: object) -> None:
        """Run `race` on these versions; at batch 1 each call is waited for."""
        batch = len(self.images[0])
        title = f"DeiT-{self.name} −{len(self.removed)}, batch {batch}, {what}"
        options |= {"graph_sets": 4, "waiting": batch == 1, "missing": self.missing}
        race(title, ours, rivals, len(self.images), **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [256, 1, 64])
def test_against_timm(race, batch, name):
    contest = Contest(name, batch)
    contest.race(
        race,
        "against timm",
        {"triton": contest.verified(), "torch": contest.plain()},
        {"timm": contest.version(contest.full)},
    )


def against_compiled(race: Callable, batch: int, name: str) -> None:
    contest = Contest(name, batch)
    contest.race(
        race,
        "compiled",
        {"triton": contest.verified(), **contest.compiled("triton, compiled", contest.ours, "torch.compile")},
        contest.compiled("torch.compile", contest.full, "torch.compile"),
    )


@pytest.mark.parametrize("name", MODELS)
def test_against_compiled(race, name):
    against_compiled(race, 256, name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 64])
def test_against_compiled_at_smaller_batches(race, batch, name):
    against_compiled(race, batch, name)


@pytest.mark.parametrize("name", MODELS)
def test_against_max_autotune(race, name):
    contest = Contest(name, 256)
    contest.race(
        race,
        "against a tuned rival",
        {"triton": contest.verified()},
        contest.compiled("max-autotune", contest.full, "max-autotune"),
    )
