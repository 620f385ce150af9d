"""What a selection has found so far, written after every round, so that the same call goes on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lambda_kernels.files import remove_leftovers, write_json

from ..runtime.formatting import format_differences
from .path_statistics import PathResult
from .result import Round

FORMAT = 1


class ProgressMismatchError(ValueError):
    """What is written was found with another model, other data or other options."""


class Progress:
    """The state of a search in a file.

    Args:
        path: Of the file; None: nothing is kept.
        fingerprint: All that the scores depend on, by name, as plain JSON types.

    Raises:
        ProgressMismatchError: The file holds the progress of another search; lists what differs.
        ValueError: The file cannot be read.
    """

    def __init__(self, path: Path | None, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.found: SearchState | None = None
        if path is None:
            return
        remove_leftovers(path)
        if not path.exists():
            return
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
            before, found = record["fingerprint"], record["found"]
            self._compare(before)
            self.found = SearchState.from_dict(found)
        except ProgressMismatchError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"cannot read the progress in {path} ({type(error).__name__}: {error}). Start over with --restart "
                "(restart=True), which removes it"
            ) from error

    def save(self, found: SearchState) -> None:
        """Write where the search stands, atomically."""
        self.found = found
        if self.path is not None:
            write_json(self.path, {"format": FORMAT, "fingerprint": self.fingerprint, "found": found.to_dict()})

    def _compare(self, before: dict[str, Any]) -> None:
        if listed := format_differences(before, self.fingerprint):
            raise ProgressMismatchError(
                f"{self.path} holds a selection that was started differently: {listed}. Use the options, model and data "
                "that it was started with, another place to write to, or start over with --restart (restart=True)"
            )


def refuse_search(path: Path, control: str, restart: bool) -> None:
    """Keep a control from replacing what a search found: its layers would go where those of the search are.

    Raises:
        ProgressMismatchError: `path` holds the progress of a search, and it is not to be forgotten (`restart`).
    """
    if restart:
        path.unlink(missing_ok=True)
    elif path.exists():
        raise ProgressMismatchError(
            f"{path} holds the progress of a search, and {control!r} would replace its selection. Use another place to "
            "write to, or start over with --restart (restart=True)"
        )


@dataclass(frozen=True)
class BeamState:
    """A set of layers that a search has come to, and the rounds that led there."""

    layers: tuple[int, ...] = ()
    rounds: tuple[Round, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"layers": list(self.layers), "rounds": [r.to_dict() for r in self.rounds]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> BeamState:
        """The inverse of `to_dict`."""
        return cls(tuple(value["layers"]), tuple(map(Round.from_dict, value["rounds"])))


@dataclass(frozen=True)
class SearchState:
    """Where a search stands: its branches, the best first, and what was measured of the full model.

    Attributes:
        branches: One for a greedy search; up to `beam` for a beam search.
        full: The full model's result; None before the first round, and where no path is run.
        done: Whether the first branch is the answer.
        samples: Images of a pass.
        constant_channels: The most output channels that never changed on a path.
        notes: What has to be said of the measurement.
    """

    branches: tuple[BeamState, ...] = (BeamState(),)
    full: PathResult | None = None
    done: bool = False
    samples: int | None = None
    constant_channels: int = 0
    notes: tuple[str, ...] = ()

    def noted(self, done: bool, samples: int, constant_channels: int, notes: tuple[str, ...]) -> SearchState:
        """The same with what is known after the round."""
        return replace(self, done=done, samples=samples, constant_channels=constant_channels, notes=notes)

    def with_layers(self, layers: tuple[int, ...]) -> SearchState:
        """The same with other layers in its first branch."""
        return replace(self, branches=(replace(self.branches[0], layers=layers), *self.branches[1:]))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        full = None if self.full is None else self.full.to_dict()
        branches = [b.to_dict() for b in self.branches]
        return {**vars(self), "branches": branches, "full": full, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> SearchState:
        """The inverse of `to_dict`."""
        full = None if value["full"] is None else PathResult.from_dict(value["full"])
        branches = tuple(map(BeamState.from_dict, value["branches"]))
        known: dict[str, Any] = {"branches": branches, "full": full, "notes": tuple(value["notes"])}
        return cls(**known, **{name: value[name] for name in ("done", "samples", "constant_channels")})
