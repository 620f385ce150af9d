"""Recipes: the options of a fine-tuning, with defaults and checks, and the YAML files that hold them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lambda_kernels.files import atomic_write

FOLDER = Path(__file__).parents[1] / "recipes"
_SCALED = ("min_lr", "warmup_lr")  # rates that a batch size changes together with the peak


# The factor on the residual of a block whose attention is gone, by the way in which it was removed.
RESIDUAL_SCALES = {"drop": 1.0, "fade": 1.0, "dilute": 2.0, "progressive": 1.0}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An interval of numbers; a round bracket excludes the bound beside it."""

    low: float
    high: float
    brackets: str

    def __contains__(self, value: float) -> bool:
        return (
            self.low < value < self.high
            or (value == self.low and self.brackets[0] == "[")
            or (value == self.high and self.brackets[1] == "]")
        )

    def __str__(self) -> str:
        high = "∞" if self.high == math.inf else f"{self.high:g}"
        return f"{self.brackets[0]}{self.low:g}, {high}{self.brackets[1]}"


_COUNT = Bounds(1, math.inf, "[)")
_NOT_NEGATIVE = Bounds(0, math.inf, "[)")
_POSITIVE = Bounds(0, math.inf, "()")
_FRACTION = Bounds(0, 1, "[]")
_BELOW_ONE = Bounds(0, 1, "[)")
_ABOVE_ZERO = Bounds(0, 1, "(]")


def _field(
    panel: str, default: Any, help: str, bounds: Bounds | None = None, *, choices: tuple[str, ...] | None = None
) -> Any:
    """A field of `Recipe`: its default, and all that checks, messages and the command line say about it.

    Args:
        panel: Heading of its flag in the help of `lambda-vit finetune`.
        default: Value in a recipe that does not set it.
        help: A phrase that stands alone.
        bounds: Where a number has to lie.
        choices: Words that are accepted.
    """
    metadata = {"panel": panel, "help": help, "bounds": bounds, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


_removal, _steps, _optimizer, _images, _network, _teacher = (
    functools.partial(_field, panel) for panel in ("Removal", "Steps", "Optimizer", "Images", "Network", "Teacher")
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned. The defaults are DeiT's recipe, shortened to 30 epochs, without EMA and repeated augmentation.

    The metadata of each field holds its help, panel, bounds and choices.

    Raises:
        ValueError: Names the field, its value and what is expected.
    """

    epochs: int = _removal(30, "Total training epochs.", _COUNT)
    removal: str | None = _removal(
        None,
        "How attention is removed; by default drop, or dilute if --dilution or --dilution-epochs is set.",
        choices=("drop", "fade", "dilute", "progressive"),
    )
    dilution: str | None = _removal(
        None,
        "Shape of λ with fade and dilute, by default linear; setting it selects dilute, none selects drop.",
        choices=("linear", "cosine", "step", "none"),
    )
    dilution_epochs: float | None = _removal(
        None,
        "Epochs over which attention is faded or removed; by default three quarters of all. Not for drop.",
        _NOT_NEGATIVE,
    )
    dilution_per: str = _removal(
        "step",
        "Whether λ changes with every optimizer step or, as in the paper, with every epoch.",
        choices=("step", "epoch"),
    )
    local_epochs: float = _removal(
        0.0,
        "First epochs, in which each block without attention learns the teacher's block alone; requires --removal drop.",
        _NOT_NEGATIVE,
    )

    batch_size: int = _steps(512, "Images per optimizer step, over all processes.", _COUNT)
    micro_batch: int | None = _steps(
        None,
        "Images per forward and backward pass; by default the batch size divided by the number of processes.",
        _COUNT,
    )
    val_every: int = _steps(1, "Epochs between validations.", _COUNT)
    checkpoint_every: int | None = _steps(
        None, "Optimizer steps between checkpoints; by default one checkpoint per epoch.", _COUNT
    )
    seed: int = _steps(0, "Random seed.", _NOT_NEGATIVE)

    opt: str = _optimizer("adamw", "Optimizer, by its name in timm.")
    lr: float | None = _optimizer(None, "Peak learning rate; by default base_lr × batch_size / 512.", _POSITIVE)
    base_lr: float = _optimizer(5e-4, "Peak learning rate for 512 images per step; ignored if lr is set.", _POSITIVE)
    min_lr: float = _optimizer(
        1e-5, "Final learning rate; by default it follows --batch-size as the peak does.", _NOT_NEGATIVE
    )
    # timm's schedules that need no milestones
    sched: str = _optimizer(
        "cosine", "Learning-rate schedule after warm-up; poly is a straight line.", choices=("cosine", "tanh", "poly")
    )
    warmup_epochs: float | None = _optimizer(
        None, "Epochs of linear warm-up; by default 5, but at most a sixth of all epochs.", _NOT_NEGATIVE
    )
    warmup_lr: float = _optimizer(
        1e-6,
        "Learning rate at the start of warm-up; by default it follows --batch-size as the peak does.",
        _NOT_NEGATIVE,
    )
    weight_decay: float = _optimizer(0.05, "Weight decay, which spares norms and biases.", _NOT_NEGATIVE)
    betas: tuple[float, float] | None = _optimizer(
        None,
        "Two decay rates of the optimizer's moments, such as 0.9,0.999; by default the optimizer's own.",
        _BELOW_ONE,
    )
    eps: float | None = _optimizer(None, "Epsilon of the optimizer; by default the optimizer's own.", _POSITIVE)
    layer_decay: float | None = _optimizer(
        None, "Factor on the learning rate per layer, from the head down.", _ABOVE_ZERO
    )
    clip_grad: float | None = _optimizer(
        None, "Largest gradient norm; a larger gradient is scaled down to it.", _POSITIVE
    )
    ema: float | None = _optimizer(
        None, "Decay of a moving average of the weights, which restarts when attention is removed.", Bounds(0, 1, "()")
    )
    ema_warmup: bool = _optimizer(False, "Use a smaller decay in the first steps of the moving average.")

    img_size: int | None = _images(None, "Input size in pixels per side; by default the model's.", _COUNT)
    scale: tuple[float, float] = _images(
        (0.08, 1.0), "Range of a random crop's area, as a share of the image, such as 0.08,1.", _ABOVE_ZERO
    )
    ratio: tuple[float, float] = _images(
        (3 / 4, 4 / 3), "Range of a random crop's aspect ratio, such as 0.75,1.33.", _POSITIVE
    )
    hflip: float = _images(0.5, "Probability of a horizontal flip.", _FRACTION)
    train_interpolation: str = _images(
        "bicubic",
        "Interpolation of training images: bicubic, bilinear, nearest, box, hamming, lanczos or random.",
        choices=("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos", "random"),
    )
    crop_pct: float | None = _images(
        None, "Share of a validation image's sides that the crop keeps; by default the model's.", _ABOVE_ZERO
    )
    aa: str | None = _images("rand-m9-mstd0.5-inc1", "Policy of timm's automatic augmentation, or none.")
    color_jitter: float | None = _images(
        0.3, "Strength of color jitter, which timm applies only without automatic augmentation.", _NOT_NEGATIVE
    )
    reprob: float = _images(0.25, "Probability of random erasing.", _FRACTION)
    remode: str = _images(
        "pixel",
        "Fill of an erased patch: black, one random color, or random pixels.",
        choices=("const", "rand", "pixel"),
    )
    recount: int = _images(1, "Largest number of erased patches per image.", _COUNT)
    repeated_aug: int = _images(
        0,
        "Augmented views of an image per epoch, of correspondingly fewer images; 0 gives one view of each.",
        _NOT_NEGATIVE,
    )
    mixup: float = _images(0.8, "Strength of mixup; 0 disables it.", _NOT_NEGATIVE)
    cutmix: float = _images(1.0, "Strength of cutmix; 0 disables it.", _NOT_NEGATIVE)
    mixup_prob: float = _images(1.0, "Probability that images are mixed at all.", _FRACTION)
    mixup_switch_prob: float = _images(0.5, "Probability of cutmix where mixup and cutmix are both enabled.", _FRACTION)
    mixup_mode: str = _images(
        "batch",
        "What shares one mixing ratio: a batch, a pair of images, or each image alone.",
        choices=("batch", "pair", "elem"),
    )
    mixup_off_epoch: int = _images(
        0, "First epoch, counted from 0, without mixup and cutmix; 0 never disables them.", _NOT_NEGATIVE
    )

    label_smoothing: float = _network(0.1, "Label smoothing of the cross entropy.", _BELOW_ONE)
    drop_path: float | None = _network(
        None, "Stochastic depth rate of the last block; by default as the model was built.", _BELOW_ONE
    )
    drop: float | None = _network(
        None, "Dropout rate before the classifier; by default as the model was built.", _BELOW_ONE
    )
    freeze: tuple[str | int, ...] = _network((), "Stages to freeze, embed and block indices, such as embed,0,1.")
    amp: str = _network("none", "Precision of automatic mixed precision.", choices=("none", "bf16", "fp16"))
    compile: bool = _network(False, "Compile the model with torch.compile.")
    recompute: str | None = _network(
        "auto",
        "What the backward pass recomputes in fused MLPs instead of saving it; none leaves the model as it is.",
        choices=("auto", "none", "act", "all"),
    )

    distillation: str = _teacher("none", "Distillation from the teacher's logits.", choices=("none", "soft", "hard"))
    distillation_alpha: float = _teacher(
        0.5, "Share of distillation in the loss; with 1, no labels are used.", _FRACTION
    )
    distillation_tau: float = _teacher(1.0, "Temperature of soft distillation.", _POSITIVE)
    feature_loss: float = _teacher(
        0.0,
        "Weight of the squared error to the teacher's tokens after the last norm, over their variance.",
        _NOT_NEGATIVE,
    )
    hidden_loss: float = _teacher(
        0.0,
        "Weight of 1 − cosine to the teacher's tokens after each block, as a share of the other losses.",
        _NOT_NEGATIVE,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        self._resolve_removal()
        for name in ("dilution_epochs", "local_epochs", "warmup_epochs"):
            if (getattr(self, name) or 0) > self.epochs:
                _refuse(name, getattr(self, name), f"at most epochs={self.epochs}")
        for name in ("min_lr", *(["warmup_lr"] if self.warmup_length else [])):
            if getattr(self, name) > self.peak_lr:
                whence = "lr" if self.lr is not None else "base_lr·batch_size/512"
                peak = f"at most the peak learning rate, {whence}={self.peak_lr:g}"
                _refuse(name, getattr(self, name), f"{peak}; lower {name}, or raise the peak")
        if self.repeated_aug == 1:
            _refuse("repeated_aug", 1, "0 for one view of every image, or at least 2")
        if self.micro_batch is not None:
            self.check_micro_batch(self.micro_batch)
        _check_names(self.opt, self.aa)

    def _resolve_removal(self) -> None:
        """Settle `removal` and `dilution`, each of which may follow from the other."""
        if self.removal is None:
            given = self.dilution_epochs is not None
            dilutes = given if self.dilution is None else self.dilution != "none"
            object.__setattr__(self, "removal", "dilute" if dilutes else "drop")
        shape = self.dilution
        if self.removal in ("fade", "dilute"):
            if shape == "none":
                _refuse(
                    "dilution", shape, f"linear, cosine or step with removal={self.removal!r}; or use removal='drop'"
                )
            object.__setattr__(self, "dilution", shape or "linear")
        else:
            if shape not in (None, "none"):
                _refuse("dilution", shape, f"none with removal={self.removal!r}; or use removal='fade' or 'dilute'")
            object.__setattr__(self, "dilution", "none")
        if self.removal == "drop" and self.dilution_epochs:
            _refuse(
                "dilution_epochs",
                self.dilution_epochs,
                "None or 0 where attention is removed at once; or set removal to fade, dilute or progressive",
            )
        if self.removal == "progressive" and self.dilution_epochs == 0:
            _refuse(
                "dilution_epochs", self.dilution_epochs, "more than 0 with removal='progressive'; or use removal='drop'"
            )
        if self.removal != "drop" and self.local_epochs:
            _refuse("local_epochs", self.local_epochs, f"0 with removal={self.removal!r}; or use removal='drop'")
        if self.local_epochs and self.local_epochs >= self.epochs:
            _refuse(
                "local_epochs",
                self.local_epochs,
                f"less than epochs={self.epochs}, so that the whole network is trained",
            )

    @property
    def residual_scale(self) -> float:
        """The factor on the residual of blocks that lose their attention by this recipe."""
        return RESIDUAL_SCALES[str(self.removal)]

    @property
    def dilution_length(self) -> float:
        """Epochs until no attention is left to fade or to remove."""
        if self.removal == "drop":
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
    def compares_tokens(self) -> bool:
        """Whether the loss compares tokens with the teacher's."""
        return self.feature_loss > 0 or self.hidden_loss > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the training has parts that require a teacher."""
        return self.distillation != "none" or self.compares_tokens or self.local_epochs > 0

    @property
    def uses_labels(self) -> bool:
        """Whether the loss depends on labels."""
        return self.distillation == "none" or self.distillation_alpha < 1

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def check_micro_batch(self, micro_batch: int) -> int:
        """Count the micro-batches of this size in a step.

        Raises:
            ValueError: It does not divide `batch_size`, or is odd where images are mixed.
        """
        if micro_batch < 1 or self.batch_size % micro_batch:
            _refuse("micro_batch", micro_batch, f"a divisor of batch_size={self.batch_size}")
        if self.mixes and micro_batch % 2:
            _refuse("micro_batch", micro_batch, "an even number, since mixup and cutmix pair images; or set both to 0")
        return self.batch_size // micro_batch

    def check_layers(self, count: int) -> None:
        """Refuse a way to remove that makes no sense for `count` layers.

        Raises:
            ValueError: One layer cannot be removed after another.
        """
        if self.removal == "progressive" and count == 1:
            _refuse(
                "removal",
                self.removal,
                "drop, fade or dilute for one layer: progressive removes layers one after another",
            )

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
    """Load a shipped recipe, a YAML file, or the defaults, and apply `overrides`.

    Args:
        name_or_path: A name that `list_recipes` lists, or a YAML file of fields of `Recipe`; None: the defaults.
        overrides: Fields that replace those of the file. `base_lr` also replaces the file's `lr`; `removal` and `dilution`
            replace what contradicts them, such as "drop" `dilution_epochs`. `batch_size` also scales the file's `min_lr` and
            `warmup_lr` where it scales the peak learning rate, and replaces a `micro_batch` that is larger.

    Raises:
        ValueError: No such recipe, a file that is not a recipe, unknown fields (the nearest name is suggested), or
            values out of range.
    """
    overrides = dict(overrides or {})
    _check_keys(overrides, "an option")
    if name_or_path is None:
        return Recipe(**_scale_rates({}, overrides), **overrides)
    path = _find(name_or_path)
    values = _read(path)
    values.pop("description", None)
    _check_keys(values, f"in {path}")
    if "base_lr" in overrides and "lr" not in overrides:
        values.pop("lr", None)  # it would win over the rate that was given last
    micro, batch = values.get("micro_batch"), overrides.get("batch_size")
    if "micro_batch" not in overrides and isinstance(micro, int) and isinstance(batch, int) and micro > batch:
        values.pop("micro_batch")
    _drop_contradictions(values, overrides)
    try:
        return Recipe(**{**values, **_scale_rates(values, overrides), **overrides})
    except ValueError as error:
        given = f", with {', '.join(f'{k}={v!r}' for k, v in overrides.items())}" if overrides else ""
        raise ValueError(f"recipe {os.fspath(name_or_path)}{given}: {error}") from error


def _drop_contradictions(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Remove what a file says of the way to remove attention, where `overrides` say otherwise."""
    way, shape = overrides.get("removal"), overrides.get("dilution")
    if way in ("drop", "progressive") or (way in ("fade", "dilute") and values.get("dilution") == "none"):
        values.pop("dilution", None)
    if shape == "none" or (shape is not None and values.get("removal") in ("drop", "progressive")):
        values.pop("removal", None)
    if way == "drop" or shape == "none":
        values.pop("dilution_epochs", None)


def _scale_rates(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Scale the first and the last learning rate as the peak, where an overriding batch size changes the peak."""
    if "batch_size" not in overrides or {**values, **overrides}.get("lr") not in (None, "none"):
        return {}
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    own = {name: _checked(fields[name], values.get(name, fields[name].default)) for name in ("batch_size", *_SCALED)}
    factor = _checked(fields["batch_size"], overrides["batch_size"]) / own["batch_size"]
    return {name: factor * own[name] for name in _SCALED if name not in overrides}


def list_recipes() -> dict[str, str]:
    """Names and descriptions of the recipes that the package ships."""
    return {path.stem: str(_read(path)["description"]) for path in sorted(FOLDER.glob("*.yaml"))}


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    name, path = os.fspath(name_or_path), Path(name_or_path)
    if path.is_file():
        return path
    if (FOLDER / f"{name}.yaml").is_file():
        return FOLDER / f"{name}.yaml"
    names = [path.stem for path in sorted(FOLDER.glob("*.yaml"))]
    raise ValueError(f"recipe {name!r} is neither a file nor a shipped recipe. {_suggest(name, names)}")


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"Did you mean {near[0]}?" if near else f"Available: {', '.join(known)}"


def _read(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a repeated key, of which YAML would silently use the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise ValueError(f"{twice[0]!r} is given twice")
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
            raise ValueError(f"unknown field {key!r} ({where}). {_suggest(key, known)}")


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as its field holds it."""
    name, kind = field.name, str(field.type)
    optional = kind.endswith(" | None")
    bounds, choices = field.metadata["bounds"], field.metadata["choices"]
    # A command line has only the word. What follows from another field is not left open by it.
    if optional and (value is None or (value == "none" and name not in ("removal", "dilution"))):
        return None
    kind = kind.removesuffix(" | None")
    tail = ", or none" if optional else ""
    if name == "freeze":
        return _frozen_stages(value)
    if choices is not None:
        if value not in choices:
            _refuse(name, value, f"one of {', '.join(choices)}")
        return value
    if kind in ("bool", "str"):
        if not isinstance(value, bool if kind == "bool" else str) or value == "":
            _refuse(name, value, ("true or false" if kind == "bool" else "a name") + tail)
        return value
    if kind.startswith("tuple"):
        pair = list(value) if isinstance(value, (tuple, list)) else [value]
        numbers = [_number(part, float, bounds) for part in pair]
        ordered = name == "betas" or numbers == sorted(n for n in numbers if n is not None)
        if len(pair) != 2 or None in numbers or not ordered:
            order = "" if name == "betas" else ", the lower first"
            _refuse(name, value, f"two numbers in {bounds}{order}{tail}")
        return tuple(numbers)
    number = _number(value, int if kind == "int" else float, bounds)
    if number is None:
        _refuse(name, value, f"{'a whole number' if kind == 'int' else 'a number'} in {bounds}{tail}")
    return number


def _number(value: Any, kind: type, bounds: Bounds) -> Any:
    """`value` as an int or a float; None if it is no number or lies outside `bounds`."""
    if isinstance(value, str) and kind is float:
        try:
            value = float(value)  # YAML reads 5e-4, without a point, as text
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int,) if kind is int else (int, float)):
        return None
    return kind(value) if value in bounds and math.isfinite(value) else None


def _frozen_stages(value: Any) -> tuple[str | int, ...]:
    stages = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    valid = all(s == "embed" or (isinstance(s, int) and not isinstance(s, bool) and s >= 0) for s in stages)
    if not valid or len(set(stages)) < len(stages):
        _refuse("freeze", value, "'embed' and block indices, each once")
    return stages


def _check_names(opt: str, aa: str | None) -> None:
    """Ask timm whether it knows these names; importing it is spared for the defaults, which it knows."""
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
            _refuse("aa", aa, "a policy of timm, such as rand-m9-mstd0.5-inc1, augmix-m3 or original; or none")


def _refuse(name: str, value: Any, expected: str) -> None:
    raise ValueError(f"{name}={value!r}: expected {expected}")
