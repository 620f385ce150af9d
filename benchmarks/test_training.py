"""A step of the training engine against the bare one: the same model, optimizer, loss and clipping, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

from lambda_vit.demo import ARCHITECTURE, MODEL_ARGS
from lambda_vit.training.engine import Trainer
from lambda_vit.training.recipe import Recipe
from lambda_vit.training.stream import LoaderStream

MODELS = {
    "digits": (ARCHITECTURE, MODEL_ARGS, (64, 1, 8, 8)),
    "deit_tiny": ("deit_tiny_patch16_224", {}, (8, 3, 224, 224)),
}


class Endless:
    """One batch, again and again."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1_000_000

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield self.batch


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("layers", [(), (1, 3)], ids=["whole", "diluting"])
def test_a_step(name, layers, against):
    """`layers` under dilution are nothing that the bare step has: there, λ and its blocks are in the ratio too."""
    architecture, options, shape = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, **options).train()
    batch = torch.randn(shape), torch.randint(model.num_classes, shape[:1])
    steps = 1 if name == "deit_tiny" else 20
    recipe = Recipe(
        epochs=2, dilution_epochs=2 if layers else 0, lr=1e-5, min_lr=0, warmup_epochs=0, clip_grad=1.0, mixup=0, cutmix=0,
        label_smoothing=0.0, recompute=None,
    )  # fmt: skip
    trainer = Trainer(model, recipe, LoaderStream(Endless(batch)), layers=layers)
    bare = copy.deepcopy(model)
    optimizer = create_optimizer_v2(bare, "adamw", lr=1e-5, weight_decay=0.05)

    def rival() -> None:
        for _ in range(steps):
            loss = F.cross_entropy(bare(batch[0]), batch[1])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
            optimizer.step()

    ratio = against(lambda: trainer.train(until=trainer.position + steps), rival, rounds=10)
    assert trainer.position > 0
    print(f"{name}, {layers}: the engine's step takes {1 / ratio:.3f} of the bare one's time")
