"""Recipes: every knob of a fine-tuning with its default, checked when it is set; kept in YAML files, some of which ship."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lambda_kernels.files import atomic_write

FOLDER = Path(__file__).parents[1] / "recipes"


_CHOICES: dict[str, tuple[str, ...]] = {
    "dilution": ("linear", "cosine", "step", "none"),
    "dilution_per": ("step", "epoch"),
    "sched": ("cosine", "tanh", "poly"),  # timm's that need no milestones
    "mixup_mode": ("batch", "pair", "elem"),
    "remode": ("const", "rand", "pixel"),
    "train_interpolation": ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos", "random"),
    "amp": ("none", "bf16", "fp16"),
    "recompute": ("auto", "none", "act", "all"),
    "distillation": ("none", "soft", "hard"),
}


# Where each number has to lie; a round bracket leaves the bound itself out.
_BOUNDS: dict[str, str] = {
    "epochs": "[1, ∞)",
    "dilution_epochs": "[0, ∞)",
    "batch_size": "[1, ∞)",
    "micro_batch": "[1, ∞)",
    "lr": "(0, ∞)",
    "base_lr": "(0, ∞)",
    "min_lr": "[0, ∞)",
    "weight_decay": "[0, ∞)",
    "betas": "[0, 1)",
    "eps": "(0, ∞)",
    "layer_decay": "(0, 1]",
    "warmup_epochs": "[0, ∞)",
    "warmup_lr": "[0, ∞)",
    "clip_grad": "(0, ∞)",
    "label_smoothing": "[0, 1)",
    "mixup": "[0, ∞)",
    "cutmix": "[0, ∞)",
    "mixup_prob": "[0, 1]",
    "mixup_switch_prob": "[0, 1]",
    "mixup_off_epoch": "[0, ∞)",
    "color_jitter": "[0, ∞)",
    "reprob": "[0, 1]",
    "recount": "[1, ∞)",
    "repeated_aug": "[0, ∞)",
    "scale": "(0, 1]",
    "ratio": "(0, ∞)",
    "hflip": "[0, 1]",
    "crop_pct": "(0, 1]",
    "img_size": "[1, ∞)",
    "drop_path": "[0, 1)",
    "drop": "[0, 1)",
    "ema": "(0, 1)",
    "distillation_alpha": "[0, 1]",
    "distillation_tau": "(0, ∞)",
    "val_every": "[1, ∞)",
    "checkpoint_every": "[1, ∞)",
    "seed": "[0, ∞)",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned. The defaults are DeiT's recipe, cut to 30 epochs, without EMA and repeated augmentation.

    Raises:
        ValueError: Names the field, its value and what is expected.
    """

    epochs: int = 30
    dilution_epochs: float | None = None  # over which λ goes from 1 to 0; None: three quarters of epochs
    dilution: str = "linear"  # shape of λ: "linear", "cosine", "step", or "none": drop at once, then tune
    dilution_per: str = "step"  # λ changes with every optimizer "step", or with every "epoch", as in the paper

    batch_size: int = 512  # images per optimizer step, over all processes
    micro_batch: int | None = None  # images per forward and backward; None: batch_size over the number of processes

    opt: str = "adamw"  # timm's name
    lr: float | None = None  # peak; None: base_lr·batch_size/512
    base_lr: float = 5e-4
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None  # None: the optimizer's own, and so for eps
    eps: float | None = None
    layer_decay: float | None = None  # factor on the learning rate per layer from the head down
    sched: str = "cosine"  # timm's name; its "poly" is a straight line
    warmup_epochs: float | None = None  # None: five, but no more than a sixth of epochs
    warmup_lr: float = 1e-6
    clip_grad: float | None = None  # largest norm

    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0  # the epoch, from 0, that is the first without mixup and cutmix; 0: none

    aa: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float | None = 0.3  # timm leaves it out where aa is on
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    repeated_aug: int = 0  # views of an image per epoch, of a third of the images for 3; 0: one view of every image
    train_interpolation: str = "bicubic"
    scale: tuple[float, float] = (0.08, 1.0)  # area of a random crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    crop_pct: float | None = None  # of validation; None: the model's
    img_size: int | None = None  # pixels a side; None: the model's

    drop_path: float | None = None  # None: as the model was built, and so for drop
    drop: float | None = None
    ema: float | None = None  # decay; None: no average
    ema_warmup: bool = False
    amp: str = "none"
    compile: bool = False
    recompute: str | None = "auto"  # None: the MLP halves stay as the model has them until λ is 0
    distillation: str = "none"  # the teacher is the model as it was
    distillation_alpha: float = 0.5
    distillation_tau: float = 1.0
    freeze: tuple[str | int, ...] = ()  # stages kept as they are: "embed" and block indices
    val_every: int = 1  # epochs
    checkpoint_every: int | None = None  # steps; None: every epoch
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field.name, str(field.type), getattr(self, field.name)))
        if self.dilution == "none" and self.dilution_epochs:
            _refuse("dilution_epochs", self.dilution_epochs, "None or 0 with dilution='none'")
        for name in ("dilution_epochs", "warmup_epochs"):
            if (getattr(self, name) or 0) > self.epochs:
                _refuse(name, getattr(self, name), f"no more than epochs={self.epochs}")
        for name in ("min_lr", *(["warmup_lr"] if self.warmup_length else [])):
            if getattr(self, name) > self.peak_lr:
                whence = "lr" if self.lr is not None else "base_lr·batch_size/512"
                _refuse(
                    name, getattr(self, name), f"no more than the peak of the learning rate, {whence}={self.peak_lr:g}"
                )
        if self.repeated_aug == 1:
            _refuse("repeated_aug", 1, "0 for one view of every image, or at least 2")
        if self.micro_batch is not None:
            self.check_micro_batch(self.micro_batch)
        _check_names(self.opt, self.aa)

    @property
    def dilution_length(self) -> float:
        """Epochs over which λ goes from 1 to 0."""
        if self.dilution == "none":
            return 0.0
        return 0.75 * self.epochs if self.dilution_epochs is None else self.dilution_epochs

    @property
    def warmup_length(self) -> float:
        """Epochs of warm-up."""
        return min(5.0, self.epochs / 6) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.base_lr * self.batch_size / 512 if self.lr is None else self.lr

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def check_micro_batch(self, micro_batch: int) -> int:
        """How many micro-batches of this size a step has.

        Raises:
            ValueError: It does not divide `batch_size`, or is odd where images are mixed.
        """
        if micro_batch < 1 or self.batch_size % micro_batch:
            _refuse("micro_batch", micro_batch, f"a divisor of batch_size={self.batch_size}")
        if self.mixes and micro_batch % 2:
            _refuse("micro_batch", micro_batch, "an even number, since mixup and cutmix pair images; or set both to 0")
        return self.batch_size // micro_batch

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def write(self, path: str | Path) -> None:
        """Write all fields as YAML, atomically; `load_recipe` reads it."""
        import yaml

        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_recipe(
    name_or_path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """A shipped recipe, one from a YAML file, or the defaults; then what `overrides` says.

    Args:
        name_or_path: A name that `shipped` lists, or a YAML file of fields of `Recipe`; None: the defaults.
        overrides: Fields that win over the file. `base_lr` wins over an `lr` of the file too, and a `dilution` of "none" over
            its `dilution_epochs`.

    Raises:
        ValueError: No such recipe, a file that is not a recipe, unknown fields (the nearest name is suggested), or
            values out of range.
    """
    overrides = dict(overrides or {})
    _check_keys(overrides, "an option")
    if name_or_path is None:
        return Recipe(**overrides)
    path = _find(name_or_path)
    values = _read(path)
    values.pop("description", None)
    _check_keys(values, f"in {path}")
    if "base_lr" in overrides and "lr" not in overrides:
        values.pop("lr", None)  # else the rate given last would count for nothing
    if overrides.get("dilution") == "none" and "dilution_epochs" not in overrides:
        values.pop("dilution_epochs", None)
    try:
        return Recipe(**{**values, **overrides})
    except ValueError as error:
        given = f", with {', '.join(f'{k}={v!r}' for k, v in overrides.items())}" if overrides else ""
        raise ValueError(f"recipe {os.fspath(name_or_path)}{given}: {error}") from error


def shipped() -> dict[str, str]:
    """The recipes that come with the package: name and description."""
    return {path.stem: str(_read(path)["description"]) for path in sorted(FOLDER.glob("*.yaml"))}


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    name, path = os.fspath(name_or_path), Path(name_or_path)
    if path.is_file():
        return path
    if (FOLDER / f"{name}.yaml").is_file():
        return FOLDER / f"{name}.yaml"
    names = [path.stem for path in sorted(FOLDER.glob("*.yaml"))]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"Did you mean {near[0]}?" if near else f"There is: {', '.join(names)}"
    raise ValueError(f"recipe {name!r} is neither a file nor a shipped recipe. {hint}")


def _read(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML would quietly take the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise ValueError(f"{twice[0]!r} stands there twice")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"cannot read the recipe {path}: expected 'field: value' lines, got {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]}?" if near else f"There is: {', '.join(known)}"
            raise ValueError(f"unknown field {key!r} ({where}). {hint}")


def _checked(name: str, kind: str, value: Any) -> Any:
    """`value` as its field keeps it; `kind` is the field's annotation."""
    optional = kind.endswith(" | None")
    if optional and value in (None, "none"):  # the word, for a command line
        return None
    kind = kind.removesuffix(" | None")
    tail = ", or nothing" if optional else ""
    if name == "freeze":
        return _frozen_stages(value)
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            _refuse(name, value, f"one of {', '.join(_CHOICES[name])}")
        return value
    if kind in ("bool", "str"):
        if not isinstance(value, bool if kind == "bool" else str) or value == "":
            _refuse(name, value, ("true or false" if kind == "bool" else "a name") + tail)
        return value
    if kind.startswith("tuple"):
        pair = list(value) if isinstance(value, (tuple, list)) else [value]
        numbers = [_number(part, float, _BOUNDS[name]) for part in pair]
        ordered = name == "betas" or numbers == sorted(n for n in numbers if n is not None)
        if len(pair) != 2 or None in numbers or not ordered:
            growing = "" if name == "betas" else ", the lower first"
            _refuse(name, value, f"two numbers in {_BOUNDS[name]}{growing}{tail}")
        return tuple(numbers)
    number = _number(value, int if kind == "int" else float, _BOUNDS[name])
    if number is None:
        _refuse(name, value, f"{'a whole number' if kind == 'int' else 'a number'} in {_BOUNDS[name]}{tail}")
    return number


def _number(value: Any, kind: type, bounds: str) -> Any:
    """`value` as an int or a float, or None where it is none or lies outside."""
    if isinstance(value, str) and kind is float:
        try:
            value = float(value)  # YAML takes 5e-4, without a point, for text
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int,) if kind is int else (int, float)):
        return None
    low, high = (float(part.replace("∞", "inf")) for part in bounds[1:-1].split(", "))
    inside = low < value < high or (value == low and bounds[0] == "[") or (value == high and bounds[-1] == "]")
    return kind(value) if inside and math.isfinite(value) else None


def _frozen_stages(value: Any) -> tuple[str | int, ...]:
    stages = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    good = all(s == "embed" or (isinstance(s, int) and not isinstance(s, bool) and s >= 0) for s in stages)
    if not good or len(set(stages)) < len(stages):
        _refuse("freeze", value, "'embed' and block indices, each once")
    return stages


def _check_names(opt: str, aa: str | None) -> None:
    """Ask timm for what it knows by name; what the defaults say it knows."""
    fields = {field.name: field.default for field in dataclasses.fields(Recipe)}
    if opt != fields["opt"]:
        from timm.optim import get_optimizer_info, list_optimizers

        name = opt.lower().removeprefix("lookahead_")
        try:
            get_optimizer_info(name)
        except ValueError:
            near = difflib.get_close_matches(name, list_optimizers(), 3)
            _refuse("opt", opt, "an optimizer of timm" + (f", such as {', '.join(near)}" if near else ""))
    if aa not in (fields["aa"], None):
        from timm.data import create_transform

        try:
            create_transform(32, is_training=True, auto_augment=aa)
        except (AssertionError, KeyError, ValueError, IndexError):
            _refuse("aa", aa, "a policy of timm, such as rand-m9-mstd0.5-inc1, augmix-m3 or original; or nothing")


def _refuse(name: str, value: Any, expected: str) -> None:
    raise ValueError(f"{name}={value!r}: expected {expected}")
