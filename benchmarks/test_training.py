"""A step of training: of the engine against the bare one, and without some attention layers against the full model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

from benchmarks.support import verify
from lambda_kernels import convert_vit
from lambda_vit.demo import ARCHITECTURE, MODEL_ARGS
from lambda_vit.training.images.stream import LoaderStream
from lambda_vit.training.loop.trainer import Trainer
from lambda_vit.training.recipe import Recipe

pytestmark = pytest.mark.benchmark(group="training step")

MODELS = {
    "digits": (ARCHITECTURE, MODEL_ARGS, (64, 1, 8, 8)),
    "deit_tiny": ("deit_tiny_patch16_224", {}, (8, 3, 224, 224)),
}
LEARNING_RATE = 1e-5


class Endless:
    """One batch, again and again."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1_000_000

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield self.batch


def trainer_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], layers: tuple[int, ...]) -> Trainer:
    recipe = Recipe(
        epochs=2, dilution_epochs=2 if layers else 0, lr=LEARNING_RATE, min_lr=0, warmup_epochs=0, clip_grad=1.0, mixup=0,
        cutmix=0, label_smoothing=0.0, recompute=None,
    )  # fmt: skip
    return Trainer(model, recipe, LoaderStream(Endless(batch)), layers=layers)


def bare_step(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], *, clip: bool = True) -> Callable[[], None]:
    """Forward, loss, backward, clipping, AdamW, and nothing else."""
    optimizer = create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=0.05)

    def step() -> None:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def hold(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The engine's first gradients, those that its optimizer has seen, held against float64's.

    Not the weights after it: a first step of AdamW is a sign, and rounding decides about signs of what is almost nothing.
    """
    trainer, exact = trainer_of(model, batch, ()), copy.deepcopy(model).double()
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.__setitem__(name, p.grad.detach().clone())
        )
    trainer.train(until=trainer.position + 1)
    F.cross_entropy(exact(batch[0].double()), batch[1]).backward()
    names = [name for name, _ in exact.named_parameters()]
    together = [torch.cat([of[name].flatten().double() for name in names]) for of in (seen, gradients(exact))]
    verify.close("the gradient of a step", *together, 1e-4)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        pytest.param("digits", (), id="digits-whole", marks=pytest.mark.quick),
        pytest.param("digits", (1, 3), id="digits-diluting"),
        pytest.param("deit_tiny", (), id="deit_tiny-whole"),
        pytest.param("deit_tiny", (1, 3), id="deit_tiny-diluting"),
    ],
)
def test_a_step(name, layers, against, quick):
    """`layers` under dilution are nothing that the bare step has: there, λ and its blocks are in the ratio too."""
    architecture, options, shape = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, **options).train()
    batch = torch.randn(shape), torch.randint(model.num_classes, shape[:1])
    hold(model, batch)
    steps = 1 if name == "deit_tiny" else 2 if quick else 20
    trainer, step = trainer_of(model, batch, layers), bare_step(copy.deepcopy(model), batch)

    def rival() -> None:
        for _ in range(steps):
            step()

    def ours() -> None:
        trainer.train(until=trainer.position + steps)

    what = f"{name}, {'diluting' if layers else 'whole'}, {steps} steps"
    against({"engine": ours}, {"bare": rival}, what=what, rounds=10 if quick else 20)
    assert trainer.position > 0


@pytest.mark.parametrize("name", [pytest.param("T", marks=pytest.mark.quick), "S"])
def test_without_attention(name, against, quick):
    """A bare step of a DeiT without three attention layers against one of the full model."""
    torch.manual_seed(0)
    architecture = {"T": "deit_tiny_patch16_224", "S": "deit_small_patch16_224"}[name]
    size, count = (112, 2) if quick else (224, 8)
    full = timm.create_model(architecture, img_size=size).train()
    ours = convert_vit(full, remove=(1, 3, 5), backend="torch")
    exact = copy.deepcopy(ours).double()
    images, labels = torch.randn(count, 3, size, size), torch.randint(1000, (count,))
    for model, dtype in ((ours, torch.float32), (exact, torch.float64)):
        F.cross_entropy(model(images[:1].to(dtype)), labels[:1]).backward()
    together = [torch.cat([g.flatten().double() for g in gradients(m).values()]) for m in (ours, exact)]
    verify.close("the gradient", *together, 1e-4)
    versions = {"torch": bare_step(ours, (images, labels))}
    what = f"DeiT-{name} −3, {count} images of {size} pixels, a step"
    against(versions, {"timm": bare_step(full, (images, labels))}, what=what, rounds=12, seconds=30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["T", "S", "B"])
def test_without_attention_on_a_gpu(name, race):
    """In bfloat16, batch 64. A graph is not captured: the optimizer asks the host."""
    from benchmarks.test_vit_cuda import Contest

    contest = Contest(name, 64)
    contest.verified()
    labels = torch.randint(1000, (64,), device="cuda")
    batches = [(images, labels) for images in contest.images]
    models = {"triton": contest.ours, "torch": convert_vit(contest.full, remove=contest.removed, backend="torch")}
    versions = {key: gpu_steps(copy.deepcopy(model).train(), batches) for key, model in models.items()}
    rivals = {"timm": gpu_steps(copy.deepcopy(contest.full).train(), batches)}
    race(f"DeiT-{name} −{len(contest.removed)}, batch 64, a step", versions, rivals, len(batches), rounds=20)


def gpu_steps(model: nn.Module, batches: list) -> Callable[[int], None]:
    optimizer = create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=0.05)

    def step(number: int) -> None:
        images, labels = batches[number]
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step
