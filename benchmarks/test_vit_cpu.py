"""Whole models on a CPU: DeiT without some of its attention layers against the full one, as it is and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.support import verify
from benchmarks.support.halves import MODES, compiled, cpu_backends
from lambda_kernels import convert_vit

# name → (timm's model, the attention layers that go)
MODELS = {
    "T": ("deit_tiny_patch16_224", (1, 3, 5)),
    "S": ("deit_small_patch16_224", (1, 3, 5)),
    "B": ("deit_base_patch16_224", (0, 1, 3, 4, 6)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Tokens that are merged in every block that keeps its attention, as a rival to removing attention (arXiv 2210.09461).
MERGED = 8

pytestmark = pytest.mark.benchmark(group="whole model")
names = pytest.mark.parametrize("name", MODELS)
batches = pytest.mark.parametrize("batch", [1, 8])
dtypes = pytest.mark.parametrize("dtype", DTYPES)


class Contest:
    """A full model and the same without some attention layers."""

    def __init__(self, name: str, batch: int, dtype: str) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.name, self.batch, self.dtype = name, batch, DTYPES[dtype]
        architecture, self.removed = MODELS[name]
        self.full = timm.create_model(architecture).eval().to(self.dtype)
        self.ours = convert_vit(self.full, remove=self.removed, backend="torch")
        self.images = torch.randn(batch, 3, 224, 224).to(self.dtype)
        self.missing: dict[str, str] = {}

    def version(self, model: Callable) -> Callable[[], Tensor]:
        """A forward of the images."""

        def forward() -> Tensor:
            with torch.no_grad():
                return model(self.images)

        return forward

    def by_name(self) -> dict[str, Callable[[], Tensor]]:
        """Our backends, each by its name."""
        found = {}
        for backend in cpu_backends(self.dtype, self.missing):
            model = convert_vit(self.full, remove=self.removed, backend=backend)
            found[backend] = self.held(f"the logits by {backend}", model)
        return found

    def held(self, what: str, model: nn.Module) -> Callable[[], Tensor]:
        """The version of a model of ours, after its logits for one image were held against those in float64."""
        exact, image = convert_vit(self.full, remove=self.removed, backend="torch").double(), self.images[:1]
        with torch.no_grad():
            verify.close(what, model(image), exact(image.double()), verify.MODEL[self.dtype])
        info = model.lambda_kernels_info
        assert {row.mlp for row in info.blocks} == {info.backend}
        return self.version(model)

    def what(self) -> str:
        """The row's name in words."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"DeiT-{self.name} −{len(self.removed)}, batch {self.batch}, {dtype}"


@names
@batches
@dtypes
def test_against_timm(against, name, batch, dtype):
    contest = Contest(name, batch, dtype)
    rivals = {"timm": contest.version(contest.full)}
    against(contest.by_name(), rivals, what=contest.what(), missing=contest.missing)


@pytest.mark.quick
@pytest.mark.parametrize("removed", [(1, 3, 5), (0, 1, 3, 4, 6, 7, 8, 9)], ids=["3 layers", "8 layers"])
def test_one_image(against, removed):
    """What removing saves, in the subset; much of it is what is left, so that many layers are removed, too."""
    contest = Contest("T", 1, "fp32")
    contest.removed = removed
    contest.ours = convert_vit(contest.full, remove=removed, backend="torch")
    ours = {"torch": contest.held("the logits", contest.ours)}
    against(ours, {"timm": contest.version(contest.full)}, what=contest.what())


@names
@batches
@dtypes
def test_against_compiled(against, name, batch, dtype):
    """Ours as it is and compiled against the full model compiled."""
    contest = Contest(name, batch, dtype)
    ours, mode = {"torch": contest.held("the logits", contest.ours)}, MODES["torch.compile"]
    rivals = compiled("torch.compile", mode, contest.full, contest.version, contest.missing)
    if not rivals:
        pytest.skip(f"torch.compile: {contest.missing['torch.compile']}")
    ours |= compiled("torch, compiled", mode, contest.ours, contest.version, contest.missing)
    against(ours, rivals, what=f"{contest.what()}, compiled", missing=contest.missing)


@names
def test_against_merging_tokens(against, name):
    """Removing attention, merging tokens, and both, against the full model."""
    contest = Contest(name, 8, "fp32")
    merging = convert_vit(contest.full, remove=(), tome_r=MERGED, backend="torch")
    both = convert_vit(contest.full, remove=contest.removed, tome_r=MERGED, backend="torch")
    ours = {"removed": contest.held("the logits", contest.ours)}
    ours["removed and merged"] = merged_as_exactly(contest, both, remove=contest.removed)
    rivals = {"timm": contest.version(contest.full), "merged": merged_as_exactly(contest, merging, remove=())}
    against(ours, rivals, what=f"{contest.what()}, merging {MERGED} tokens a block")


def merged_as_exactly(contest: Contest, model: nn.Module, remove: tuple[int, ...]) -> Callable[[], Tensor]:
    """The version of a model that merges, after its logits were held against float64 for one image.

    Which tokens are merged is a choice, and rounding may turn a close one: the limit is wide, and tells a wrong model alone.
    """
    exact = convert_vit(contest.full, remove=remove, tome_r=MERGED, backend="torch").double()
    image = contest.images[:1]
    with torch.no_grad():
        verify.close("the merged logits", model(image), exact(image.double()), 0.1)
    return contest.version(model)
