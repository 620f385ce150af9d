"""A small training loop over timm's optimizers and schedulers: dilution, the swap at λ = 0, and what comes after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .dilution import LambdaSchedule, diluted_blocks, finish_dilution, prepare, set_lambda
from .evaluate import evaluate
from .placement import one_device
from .progress import task


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss, validation top-1 in percent (None without a validation loader), λ at its end."""

    epoch: int
    loss: float
    top1: float | None
    lam: float | None  # None where nothing is under dilution

    def to_dict(self) -> dict:
        """As plain JSON types; λ under its full name."""
        own = asdict(self)
        own["lambda"] = own.pop("lam")
        return own


@dataclass(frozen=True)
class FinetuneResult:
    """The trained model and how it came about."""

    model: nn.Module
    history: tuple[Epoch, ...]
    # largest |logit difference| between the diluted model at λ = 0 and the one with the attention deleted
    swap_difference: float | None


def finetune(
    model: nn.Module,
    train_loader: Iterable,
    *,
    layers: Sequence[int] = (),
    epochs: int = 20,
    dilution_epochs: int | None = None,
    schedule: str = "linear",
    val_loader: Iterable | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup_epochs: float = 1.0,
    label_smoothing: float = 0.0,
    clip_grad: float | None = 1.0,
    seed: int = 0,
    recompute: str | None = None,
    description: str = "Train",
    inplace: bool = False,
) -> FinetuneResult:
    """Train `model`, fading the attention of `layers` out on the way; it is deleted as soon as λ reaches 0.

    The weights returned are those of the last epoch: nothing is chosen while attention is still there.

    Args:
        model: A timm vision transformer, on the device to train on.
        train_loader: Yields (images, class indices); iterated once per epoch; needs a length.
        layers: Blocks to dilute, or a `Selection`; empty trains the model as it is.
        epochs: In all.
        dilution_epochs: Epochs over which λ goes from 1 to 0; None is three quarters of `epochs`, as in the paper.
        schedule: Shape of λ: "linear", "cosine" or "step".
        val_loader: Measured after every epoch; during dilution that is the accuracy at the λ of the moment.
        lr: Peak of the cosine schedule (AdamW).
        weight_decay: Of AdamW; norms and biases have none.
        warmup_epochs: Linear warm-up.
        label_smoothing: Of the cross entropy.
        clip_grad: Largest gradient norm, or None.
        seed: For dropout, drop-path and a loader that takes one from `set_epoch`.
        recompute: What a step computes again in the MLP halves of all blocks instead of saving it: "auto", "none", "act" or
            "all", as for `convert_vit`; None leaves the model as it is.
        description: Of the progress bar.
        inplace: Train `model` itself instead of a deep copy.

    Raises:
        ValueError: Options or layers are wrong, the loader is empty, or the loss became NaN or infinite.
        UnsupportedModelError: Layers are to be diluted and the model cannot be changed block by block.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    layers = getattr(layers, "layers", layers)
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1; got {epochs}")
    if dilution_epochs is None:
        dilution_epochs = round(0.75 * epochs)
    if len(layers) and not 0 <= dilution_epochs <= epochs:
        raise ValueError(f"dilution_epochs must be from 0 to epochs={epochs}; got {dilution_epochs}")
    steps_per_epoch = len(train_loader)
    if steps_per_epoch == 0:
        raise ValueError("train_loader is empty: there is nothing to train on")
    model = prepare(model, layers, recompute=recompute, inplace=inplace)
    device = one_device(model)
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=weight_decay)
    steps = epochs * steps_per_epoch
    warmup = min(round(warmup_epochs * steps_per_epoch), steps // 2)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, lr_min=lr / 100, warmup_t=warmup, warmup_lr_init=lr / 100, t_in_epochs=False
    )
    lam_at = LambdaSchedule(dilution_epochs * steps_per_epoch, schedule)
    history: list[Epoch] = []
    swap_difference = None
    generators = [device] if device.type == "cuda" else []  # the caller's stay as they are
    with torch.random.fork_rng(generators), task(description, steps) as advance:
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            model.train()
            if hasattr(train_loader, "set_epoch"):
                train_loader.set_epoch(epoch - 1)
            total, seen, lam = 0.0, 0, None
            # Counted from the epoch's beginning: a loader that leaves out bad batches must not stretch the schedules.
            for step, (images, targets) in enumerate(train_loader, (epoch - 1) * steps_per_epoch):
                images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                if diluted_blocks(model):
                    lam = lam_at(step)
                    set_lambda(model, lam)
                    if lam == 0:
                        swap_difference = _swap(model, optimizer, images)
                loss = F.cross_entropy(model(images), targets, label_smoothing=label_smoothing)
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"the loss became {loss.item()} in epoch {epoch}, step {step} (lr {lr:g}). Lower lr, or clip "
                        "gradients"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if clip_grad is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
                optimizer.step()
                scheduler.step_update(step + 1)
                total, seen = total + float(loss.detach()) * len(images), seen + len(images)
                advance(note=f"loss {total / seen:.3f}" + ("" if lam is None else f"  λ {lam:.2f}"))
            if seen == 0:
                raise ValueError(f"train_loader gave nothing in epoch {epoch}, though its length is {steps_per_epoch}")
            if diluted_blocks(model) and epoch >= dilution_epochs:
                set_lambda(model, 0.0)
                swap_difference, lam = _swap(model, optimizer, images), 0.0
            top1 = None if val_loader is None else evaluate(model, val_loader, description="Validate").top1
            history.append(Epoch(epoch, total / seen, top1, lam))
    return FinetuneResult(model.eval(), tuple(history), swap_difference)


@torch.no_grad()
def _swap(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> float:
    """Delete the faded attention, from the optimizer too; returns the largest change of a logit on `images`."""
    training = model.training
    model.eval()
    before = model(images)
    finish_dilution(model)
    model.eval()
    difference = float((model(images) - before).abs().max())
    model.train(training)
    alive = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in alive:
                optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) in alive]
    return difference
