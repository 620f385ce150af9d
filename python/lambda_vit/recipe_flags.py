"""A flag for every field of a recipe, made from the fields themselves, so that none can be forgotten."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Optional

import typer

from .training.recipe import Recipe

# Where a flag stands in the help, and what it says there.
_PANELS: dict[str, dict[str, str]] = {
    "Dilution": {
        "epochs": "In all.",
        "dilution_epochs": "Over which λ goes from 1 to 0.",
        "dilution": "Shape of λ: linear, cosine, step; none drops the attention at once.",
        "dilution_per": "λ changes with every step or epoch.",
    },
    "Steps": {
        "batch_size": "Images per optimizer step, over all processes.",
        "micro_batch": "Images per forward and backward; a step accumulates over as many as it takes.",
        "val_every": "Epochs between two validations.",
        "checkpoint_every": "Steps between two checkpoints.",
        "seed": "Of everything random.",
    },
    "Optimizer": {
        "opt": "timm's name.",
        "lr": "Its peak.",
        "base_lr": "The peak for 512 images per step, where --lr does not say it.",
        "min_lr": "At the end.",
        "sched": "cosine, tanh or poly (a straight line).",
        "warmup_epochs": "Of a linear rise.",
        "warmup_lr": "Where it begins.",
        "weight_decay": "Norms and biases have none.",
        "betas": "Two numbers: 0.9,0.999.",
        "eps": "Of the optimizer.",
        "layer_decay": "Factor on the rate per layer, from the head down.",
        "clip_grad": "Largest norm of the gradient.",
        "ema": "Decay of an average of the weights, begun anew at λ = 0.",
        "ema_warmup": "A smaller decay in its first steps.",
    },
    "Images": {
        "img_size": "Another input size than the model's, pixels a side.",
        "scale": "Area of a random crop: 0.08,1.",
        "ratio": "Its sides: 0.75,1.33.",
        "hflip": "Probability of a mirror image.",
        "train_interpolation": "bicubic, bilinear, nearest …",
        "crop_pct": "Of validation images.",
        "aa": "Policy of timm's automatic augmentation.",
        "color_jitter": "Where there is no --aa.",
        "reprob": "Probability of random erasing.",
        "remode": "What it puts there: const, rand, pixel.",
        "recount": "How many patches.",
        "repeated_aug": "Views of an image per epoch, of as many fewer images.",
        "mixup": "Strength; 0 is none.",
        "cutmix": "Strength; 0 is none.",
        "mixup_prob": "Of mixing at all.",
        "mixup_switch_prob": "Of cutmix where both are on.",
        "mixup_mode": "batch, pair or elem.",
        "mixup_off_epoch": "The first epoch without.",
    },
    "Network": {
        "label_smoothing": "Of the cross entropy.",
        "drop_path": "Stochastic depth of the last block.",
        "drop": "Dropout before the classifier.",
        "freeze": "Stages that stay as they are: embed,0,1.",
        "distillation": "From the original network: soft, hard or none.",
        "distillation_alpha": "Its share of the loss.",
        "distillation_tau": "Temperature of soft.",
        "amp": "Autocast: none, bf16, fp16.",
        "compile": "torch.compile.",
        "recompute": "What fused MLPs recompute in the backward: auto, none, act, all.",
    },
}


def with_recipe_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command, in place of its `**flags`, a flag per field; those that were given arrive as text."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    panel_of = {name: (panel, text) for panel, fields in _PANELS.items() for name, text in fields.items()}
    flags = []
    for field in sorted(dataclasses.fields(Recipe), key=lambda field: list(panel_of).index(field.name)):
        panel, text = panel_of[field.name]
        if field.type == "bool":
            name, kind = f"--{_dashed(field.name)}/--no-{_dashed(field.name)}", Optional[bool]  # noqa: UP045
        else:
            name, kind = f"--{_dashed(field.name)}", Optional[str]  # noqa: UP045
        option = typer.Option(
            None, name, help=text, rich_help_panel=panel, show_default=_shown(field.default), metavar=_metavar(field)
        )
        flags.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
    command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]  # for inspect
    command.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return command


def overrides(flags: Mapping[str, str | bool | None]) -> dict[str, Any]:
    """What `load_recipe` takes: the flags that were given, their text read as numbers where it is some."""
    return {name: _read(name, value) for name, value in flags.items() if value is not None}


def _read(name: str, value: str | bool) -> Any:
    if isinstance(value, bool):
        return value
    parts = [_plain(part.strip()) for part in value.split(",")]
    return parts if len(parts) > 1 or name == "freeze" else parts[0]


def _plain(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # "none" too: a field that can be nothing knows the word


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _shown(default: object) -> str | bool:
    if default is None or default == ():
        return False
    return ",".join(f"{v:g}" for v in default) if isinstance(default, tuple) else str(default)


def _metavar(field: dataclasses.Field) -> str | None:
    kind = field.type.removesuffix(" | None")
    return {"int": "INTEGER", "float": "FLOAT", "bool": None}.get(kind, "TEXT")
