"""Training in one call, on a loader and with few options; `lambda_vit.training` has the loop, and all that it can do."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lambda_kernels.convert.checks import unwrap_layers

if TYPE_CHECKING:
    from ..data.batches import SizedLoader
    from ..selection.result import Selection


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss, validation top-1 in percent (None without a validation loader), λ at its end."""

    epoch: int
    loss: float
    top1: float | None
    lam: float | None  # None where nothing is under dilution

    def to_dict(self) -> dict[str, Any]:
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
    train_loader: SizedLoader,
    *,
    layers: Sequence[int] | Selection = (),
    epochs: int = 20,
    removal: str | None = None,
    dilution_epochs: int | None = None,
    schedule: str | None = None,
    local_epochs: float = 0.0,
    val_loader: Iterable[Any] | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup_epochs: float = 1.0,
    label_smoothing: float = 0.0,
    clip_grad: float | None = 1.0,
    seed: int = 0,
    recompute: str | None = None,
    teacher: nn.Module | None = None,
    distillation_alpha: float = 1.0,
    feature_loss: float = 0.0,
    hidden_loss: float = 0.0,
    description: str = "Train",
    inplace: bool = False,
) -> FinetuneResult:
    """Train `model` while the attention of `layers` is removed, at once or on the way.

    The weights returned are those of the last epoch: nothing is chosen while attention is still there.

    Args:
        model: A timm vision transformer, on the device to train on.
        train_loader: Yields images and class indices, or without label smoothing the probabilities of the classes; see
            `data.batches`. Iterated once per epoch; needs a length.
        layers: Blocks that lose their attention, or a `Selection`; empty trains the model as it is.
        epochs: In all.
        removal: "drop" deletes the attention before the first step. "fade" computes x + λ·attention(x) with λ from 1 to 0, and
            "dilute" (2 − λ)·x + λ·attention(x), as in the paper (arXiv 2404.05657); attention is deleted as soon as λ is 0.
            "progressive" deletes one layer after another, in the order of `layers`. None is "dilute" if `dilution_epochs` or
            `schedule` is given, else "drop".
        dilution_epochs: Epochs over which attention is faded or removed; None is three quarters of `epochs`, as in the paper.
        schedule: Shape of λ with "fade" and "dilute": "linear" (the default), "cosine" or "step".
        local_epochs: With "drop", the first epochs, in which each block without attention learns to compute what the teacher's
            block does from the teacher's input, alone (arXiv 2411.19146); part of `epochs`.
        val_loader: Measured after every epoch; during dilution that is the accuracy at the λ of the moment.
        lr: Peak of the cosine schedule (AdamW).
        weight_decay: Of AdamW; norms and biases have none.
        warmup_epochs: Linear warm-up.
        label_smoothing: Of the cross entropy.
        clip_grad: Largest gradient norm, or None.
        seed: For dropout, drop-path and a loader that takes one from `set_epoch`.
        recompute: What a step computes again in the MLP halves of all blocks instead of saving it: "auto", "none", "act" or
            "all", as for `convert_vit`; None leaves the model as it is.
        teacher: Model whose logits are learned (τ = 1), such as `model` itself. A copy of it, in eval mode, gets the same
            images, normalised for it. None: learn the labels alone.
        distillation_alpha: Share of the teacher's logits in the loss; the rest is the labels'. With 1, no labels are used.
        feature_loss: Weight of the squared error to the teacher's tokens after the last norm, over their variance.
        hidden_loss: Weight of 1 − cosine to the teacher's tokens after each block, as a share of the other losses.
        description: Of the progress bar.
        inplace: Train `model` itself instead of a deep copy.

    Returns:
        The trained model in eval mode, the loss, accuracy and λ of every epoch, and the largest change of a logit when the
        faded attention was deleted.

    Raises:
        ValueError: Options or layers are wrong, the teacher does not fit the model, the loader is empty, or the loss became
            NaN or infinite.
        UnsupportedModelError: Attention is to be removed and the model cannot be changed block by block.
    """
    from ..models.properties import set_class_names
    from .images.stream import LoaderStream
    from .loop.trainer import Trainer
    from .recipe import Recipe

    if teacher is None and (feature_loss or hidden_loss or local_epochs):
        raise ValueError(
            "feature_loss, hidden_loss and local_epochs compare tokens with a teacher's: pass one, such as teacher=model"
        )
    indices = unwrap_layers(layers)
    stream = LoaderStream(train_loader, model, soft=label_smoothing == 0)
    steps = stream.steps_per_epoch
    if removal is None:
        removal = "drop" if dilution_epochs is None and schedule in (None, "none") else "dilute"
    if removal != "drop" and dilution_epochs is None:
        dilution_epochs = round(0.75 * epochs)
    recipe = Recipe(
        epochs=epochs,
        removal=removal,
        dilution=schedule,
        dilution_epochs=dilution_epochs,
        local_epochs=local_epochs,
        lr=lr,
        min_lr=lr / 100,
        weight_decay=weight_decay,
        warmup_epochs=min(round(warmup_epochs * steps), epochs * steps // 2) / steps,
        warmup_lr=lr / 100,
        label_smoothing=label_smoothing,
        clip_grad=clip_grad,
        mixup=0,
        cutmix=0,
        recompute=recompute,
        distillation="none" if teacher is None else "soft",
        distillation_alpha=distillation_alpha,
        feature_loss=feature_loss,
        hidden_loss=hidden_loss,
        seed=seed,
    )
    trainer = Trainer(
        model,
        recipe,
        stream,
        layers=layers,
        val_loader=val_loader,
        teacher=copy.deepcopy(teacher),
        description=description,
        inplace=inplace,
    )
    history, removed = [], not len(indices)
    for row in trainer.train():
        history.append(Epoch(row["epoch"], row["loss"], row["top1"], None if removed else row["lambda"]))
        removed = row["attention"] != "diluting"
    labels = getattr(getattr(train_loader, "dataset", None), "class_to_idx", None)
    if recipe.uses_labels and labels:
        set_class_names(trainer.model, labels)
    difference = None if trainer.attention_removal is None else trainer.attention_removal["difference"]
    return FinetuneResult(trainer.model, tuple(history), difference)
