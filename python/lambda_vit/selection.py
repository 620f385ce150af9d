"""Which attention layers to remove: NOSE, and controls that any selection has to beat."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from lambda_kernels.convert import check_indices, check_removal
from lambda_kernels.families import Anatomy, inspect_model
from lambda_kernels.files import write_json
from lambda_kernels.ops.checks import check_choice

from .progress import task
from .transfer import Measurement, constant_note

STRATEGIES = ("nose", "random", "first")
FORMAT = 1


class SelectionWarning(UserWarning):
    """Something about a selection that deserves a second look; the selection itself lists it too."""


@dataclass(frozen=True)
class Round:
    """One step of the greedy search: the score of every candidate in bits, and the one that was picked."""

    picked: int
    scores: dict[int, float]
    entropy: float  # of the output with everything up to and including `picked` skipped


@dataclass(frozen=True)
class Selection:
    """The layers to remove, in the order they were picked, and all that was measured on the way."""

    layers: tuple[int, ...]
    strategy: str = "explicit"
    estimator: str | None = None
    signed: bool = False
    score: str | None = None
    model: str | None = None
    depth: int | None = None
    entropy_full: float | None = None
    samples: int | None = None
    channels: int | None = None
    seed: int | None = None
    rounds: tuple[Round, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict:
        """As plain JSON types; block indices that are keys become strings."""
        rounds = [asdict(r) | {"scores": {str(k): v for k, v in r.scores.items()}} for r in self.rounds]
        own = {k: v for k, v in vars(self).items() if k != "rounds"}
        lists = {"layers": list(self.layers), "warnings": list(self.warnings), "rounds": rounds}
        return {"format": FORMAT, **own, **lists}

    @classmethod
    def from_dict(cls, value: dict) -> Selection:
        """The inverse of `to_dict`.

        Raises:
            ValueError: `value` is no selection of a format that this version reads.
        """
        layers = value.get("layers") if isinstance(value, dict) else None
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise ValueError("not a selection: there is no list of block indices named 'layers'")
        if not isinstance(value.get("format", FORMAT), int):
            raise ValueError(f"not a selection: format is {value['format']!r}")
        if value.get("format", FORMAT) > FORMAT:
            raise ValueError(f"selection of format {value['format']}; this version reads up to {FORMAT}")
        try:
            rounds = tuple(
                Round(r["picked"], {int(k): float(v) for k, v in r["scores"].items()}, r["entropy"])
                for r in value.get("rounds", ())
            )
            known = {k: v for k, v in value.items() if k in cls.__dataclass_fields__}
            known |= {"layers": tuple(value["layers"]), "warnings": tuple(value.get("warnings", ())), "rounds": rounds}
            return cls(**known)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a selection: {type(error).__name__}: {error}") from error

    def to_json(self, path: str | Path) -> None:
        """Write to `path`, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> Selection:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The file is missing or no selection.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"cannot read the selection {path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def select_layers(
    model: nn.Module,
    loader: Iterable | None,
    count: int = 5,
    *,
    strategy: str = "nose",
    estimator: str = "gaussian",
    signed: bool = False,
    score: str = "logits",
    exclude: Sequence[int] = (),
    seed: int = 0,
) -> Selection:
    """Pick `count` attention layers whose removal changes the output's entropy least.

    NOSE (arXiv 2404.05657, algorithm 1) is greedy: in each round, the transfer entropy towards the task head of what is
    picked so far and one more is measured for every candidate, and the lowest is picked. The default compares |TE|:
    with the sign left in, layers that inflate the entropy look best, and the network breaks.

    Args:
        model: A timm vision transformer that still has all its attention.
        loader: Yields images, or tuples whose first item is images; iterated once per round. None for a control.
        count: How many layers to pick.
        strategy: "nose", or a control that measures nothing: "random" (seeded), "first" (blocks 0, 1, 2 …).
        estimator: "gaussian" or "histogram".
        signed: Compare TE itself, as in the paper's formula.
        score: "logits" or "pre_logits".
        exclude: Blocks that must keep their attention.
        seed: For "random".

    Raises:
        ValueError: `count` or an option is wrong, the loader is empty, or a class token would be cut off from the image.
        UnsupportedModelError: The model cannot be changed block by block.
        NonFiniteActivationError: NaN or infinity on the way; nothing is ranked.
    """
    check_choice("strategy", strategy, STRATEGIES)
    anatomy = inspect_model(model)
    if anatomy.removed:
        raise ValueError(
            f"the model has lost the attention of {list(anatomy.removed)} already; select on the full model"
        )
    excluded = check_indices(exclude, anatomy.depth, "exclude")
    candidates = [i for i in range(anatomy.depth) if i not in excluded]
    _check_count(count, candidates, anatomy)
    common = {"strategy": strategy, "model": model_name(model), "depth": anatomy.depth}
    if strategy != "nose":
        order = random.Random(seed).sample(candidates, count) if strategy == "random" else candidates[:count]
        notes = _removal_warnings(model, order, anatomy)
        return Selection(tuple(order), **common, seed=seed if strategy == "random" else None, warnings=notes)
    if loader is None:
        raise ValueError("loader is None, but strategy 'nose' measures on images; pass a loader")

    measurement = Measurement(model, loader, estimator=estimator, score=score)
    picked: list[int] = []
    rounds: list[Round] = []
    full = None
    with task("Select", count) as advance:
        for number in range(count):
            left = [i for i in candidates if i not in picked]
            base, entropies = measurement.entropies(picked, left, f"Round {number + 1} of {count}")
            full = base if full is None else full
            scores = {i: full - h if signed else abs(full - h) for i, h in entropies.items()}
            best = min(scores, key=lambda i: (scores[i], i))
            picked.append(best)
            rounds.append(Round(best, scores, entropies[best]))
            advance()
    notes = [*_removal_warnings(model, picked, anatomy)]
    if measurement.constant_channels:
        notes.append(constant_note(measurement))
    if measurement.samples < measurement.channels:
        notes.append(
            f"{measurement.samples} images for {measurement.channels} output channels: the entropies are rough. "
            "Use more images"
        )
    for note in notes:
        warnings.warn(note, SelectionWarning, stacklevel=2)
    return Selection(
        tuple(picked),
        **common,
        estimator=estimator,
        signed=signed,
        score=score,
        entropy_full=full,
        samples=measurement.samples,
        channels=measurement.channels,
        rounds=tuple(rounds),
        warnings=tuple(notes),
    )


def model_name(model: nn.Module) -> str | None:
    """timm's name of a model with the tag of its weights, as far as the model knows it."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name, tag = cfg.get("architecture"), cfg.get("tag")
    return f"{name}.{tag}" if name and tag else name


def _check_count(count: int, candidates: list[int], anatomy: Anatomy) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise ValueError(f"count must be an integer; got {count!r}")
    most = len(candidates)
    if most == anatomy.depth and anatomy.pooling == "token":
        most -= 1  # a class token without any attention never sees the image
    if not 1 <= count <= most:
        raise ValueError(f"count must be from 1 to {most} for {anatomy.depth} blocks; got {count}")


def _removal_warnings(model: nn.Module, layers: Sequence[int], anatomy: Anatomy) -> tuple[str, ...]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_removal(model, tuple(sorted(layers)), anatomy, 1.0)
    return tuple(str(w.message) for w in caught)
