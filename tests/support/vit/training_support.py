"""What tests of the training engine share: a small ViT on digits, recipes with everything switched on, plain comparisons."""

from __future__ import annotations

from typing import Any

import torch
from small_models import small_vit
from tensor_stream import TensorStream
from torch import nn

from lambda_vit.data.digits import Digits, digits
from lambda_vit.data.loader import make_loader
from lambda_vit.runtime.processes import Processes
from lambda_vit.training.loop.trainer import Trainer
from lambda_vit.training.recipe import Recipe


def tiny_vit(**options: Any) -> nn.Module:
    """Three blocks of width 24 on 8×8 digits, with stochastic depth."""
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return small_vit(**{**sizes, "drop_path_rate": 0.2, **options})


def recipe(**options: Any) -> Recipe:
    """Four epochs of three steps of two micro-batches; λ falls over the first two. All that draws or averages is on."""
    own = {
        "epochs": 4,
        "dilution_epochs": 2,
        "batch_size": 32,
        "micro_batch": 16,
        "lr": 2e-3,
        "min_lr": 1e-5,
        "warmup_epochs": 1,
        "clip_grad": 1.0,
        "ema": 0.9,
        "mixup": 0.4,
        "cutmix": 0.5,
    }
    return Recipe(**{**own, **options})


def plain(**options: Any) -> Recipe:
    """The same with nothing drawn, averaged, mixed or smoothed, in one micro-batch."""
    off = {"mixup": 0, "cutmix": 0, "ema": None, "clip_grad": None, "label_smoothing": 0.0, "micro_batch": None}
    return recipe(**{**off, **options})


def train_set(count: int = 96) -> Digits:
    return digits("train").select(range(count))


def validation(count: int = 90, shard: tuple[int, int] = (0, 1)) -> object:
    return make_loader(digits("val").select(range(count)), 30, shard=shard)


def trainer(own: Recipe | None = None, model: nn.Module | None = None, **options: Any) -> Trainer:
    """Dilutes block 1 of a small ViT, with validation; `options` replace the arguments of `Trainer`."""
    own = own or recipe()
    processes = options.get("processes") or Processes()
    shard = (processes.rank, processes.size)
    given = {
        "layers": (1,),
        "stream": TensorStream(train_set(), own, shard=shard),
        "val_loader": validation(shard=shard),
        "processes": processes,
        "log_every": 1,
    }
    return Trainer(model if model is not None else tiny_vit(), own, **{**given, **options})


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Of any weight."""
    b = other.state_dict()
    return max(float((value - b[name]).abs().max()) for name, value in one.state_dict().items())


class Notes:
    """Stands in for a log: keeps the rows."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    @property
    def rows(self) -> int:
        return len(self.kept)

    def write(self, kind: str, **fields: Any) -> None:
        self.kept.append({"kind": kind, **fields})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.kept if row["kind"] == kind]
