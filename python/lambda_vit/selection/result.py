"""The result of a selection: the layers, and each round's scores."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lambda_kernels.files import write_json

FORMAT = 1


class SelectionWarning(UserWarning):
    """A doubt about a selection; the selection lists it too."""


@dataclass(frozen=True)
class Selection:
    """The layers to remove, in the order they were picked, and the measurements that led to them.

    Attributes:
        layers: Block indices.
        strategy: Name of the strategy, as for `select_layers`.
        criterion: Name of the criterion, and `unit` of its scores; None for a control.
        stop: The budget, in words.
        beam: Number of sets of layers that the search retained per round.
        min_gap: Smallest distance that the search allowed between two picked blocks; 1 allows neighbours.
        estimator: Entropy estimator, and `score` the output whose entropy was measured; None if no path was run.
        signed: Whether the sign of TE counted.
        model: timm's name of the model, which has `depth` blocks; None if it is not known.
        entropy_full: Entropy of the full model's output, in bits.
        samples: Number of images, and `channels` that of the output's channels.
        rounds: The rounds of the search, in order; a ranking has one, from which all layers come.
        seed: Random seed of strategy "random", or of the images of a repair.
        warnings: Doubts about the selection.
    """

    layers: tuple[int, ...]
    strategy: str = "explicit"
    criterion: str | None = None
    unit: str | None = None
    stop: str | None = None
    beam: int = 1
    min_gap: int = 1
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; block indices that are keys become strings."""
        rounds = [r.to_dict() for r in self.rounds]
        own = {k: v for k, v in vars(self).items() if k != "rounds"}
        lists = {"layers": list(self.layers), "warnings": list(self.warnings), "rounds": rounds}
        return {"format": FORMAT, **own, **lists}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Selection:
        """Read what `to_dict` returned.

        Raises:
            ValueError: `value` is not a selection of a format that this version reads.
        """
        layers = value.get("layers") if isinstance(value, dict) else None
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise ValueError("not a selection: there is no list of block indices named 'layers'")
        if not isinstance(value.get("format", FORMAT), int):
            raise ValueError(f"not a selection: format is {value['format']!r}")
        if value.get("format", FORMAT) > FORMAT:
            raise ValueError(f"selection of format {value['format']}; this version reads up to {FORMAT}")
        try:
            rounds = tuple(map(Round.from_dict, value.get("rounds", ())))
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
            ValueError: The file is missing or is not a selection.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"cannot read the selection {path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Round:
    """One step of a search."""

    picked: int  # index of the block that was picked
    scores: dict[int, float]  # of every candidate
    entropy: float | None = None  # of the output with `skipped` and `picked` skipped; None if no path was run
    skipped: tuple[int, ...] = ()  # the blocks picked before, in order

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; block indices that are keys become strings."""
        return {**asdict(self), "scores": {str(k): v for k, v in self.scores.items()}, "skipped": list(self.skipped)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Round:
        """Read what `to_dict` returned; "skipped" may be missing, as in older files."""
        scores = {int(k): float(v) for k, v in value["scores"].items()}
        return cls(value["picked"], scores, value["entropy"], tuple(value.get("skipped", ())))
