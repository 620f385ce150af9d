"""The state of a search, written after every round so that the same call resumes from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lambda_kernels.files import remove_leftovers, write_json

from ..runtime.formatting import format_differences
from .path_statistics import PathResult
from .result import Round

FORMAT = 1

# What fingerprints of older versions lack, with the value that these versions meant.
_ADDED = {"min_gap": 1}


class ProgressMismatchError(ValueError):
    """The progress file belongs to another model, other data or other options."""


class Progress:
    """The file that holds the state of a search, and in `fingerprint` everything on which the scores depend.

    Without a path nothing is written.
    """

    def __init__(self, path: Path | None, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.found: SearchState | None = None  # None before the first round
        if path is None:
            return
        remove_leftovers(path)
        if not path.exists():
            return
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
            if listed := format_differences({**_ADDED, **record["fingerprint"]}, self.fingerprint):
                raise ProgressMismatchError(
                    f"{path} holds a selection that was started differently: {listed}. Use its options, model and data, "
                    "another output folder, or start over with --restart (restart=True)"
                )
            self.found = SearchState.from_dict(record["found"])
        except ProgressMismatchError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"cannot read the progress in {path} ({type(error).__name__}: {error}). Start over with --restart "
                "(restart=True), which removes it"
            ) from error

    def save(self, found: SearchState) -> None:
        """Write the state, atomically."""
        self.found = found
        if self.path is not None:
            write_json(self.path, {"format": FORMAT, "fingerprint": self.fingerprint, "found": found.to_dict()})


def refuse_search(path: Path, control: str, restart: bool) -> None:
    """Refuse a control whose selection would replace that of a search; with `restart`, remove the search's progress."""
    if restart:
        path.unlink(missing_ok=True)
    elif path.exists():
        raise ProgressMismatchError(
            f"{path} holds the progress of a search, and {control!r} would replace its selection. Use another "
            "output folder, or start over with --restart (restart=True)"
        )


@dataclass(frozen=True)
class BeamState:
    """A set of layers that a search retains, and the rounds that led to it."""

    layers: tuple[int, ...] = ()
    rounds: tuple[Round, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"layers": list(self.layers), "rounds": [r.to_dict() for r in self.rounds]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> BeamState:
        """Read what `to_dict` returned."""
        return cls(tuple(value["layers"]), tuple(map(Round.from_dict, value["rounds"])))


@dataclass(frozen=True)
class SearchState:
    """The sets of layers that a search retains after a round, and the full model's result."""

    branches: tuple[BeamState, ...] = (BeamState(),)  # the best first; at most as many as the beam is wide
    full: PathResult | None = None  # None before the first round, or if the criterion runs no path
    done: bool = False  # whether the first branch is the result of the search
    samples: int | None = None  # number of images of a pass
    constant_channels: int = 0  # the largest number of output channels that never changed on a path
    notes: tuple[str, ...] = ()  # on the measurement, for the selection's warnings

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        full = None if self.full is None else self.full.to_dict()
        branches = [b.to_dict() for b in self.branches]
        return {**vars(self), "branches": branches, "full": full, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> SearchState:
        """Read what `to_dict` returned."""
        full = None if value["full"] is None else PathResult.from_dict(value["full"])
        branches = tuple(map(BeamState.from_dict, value["branches"]))
        known: dict[str, Any] = {"branches": branches, "full": full, "notes": tuple(value["notes"])}
        return cls(**known, **{name: value[name] for name in ("done", "samples", "constant_channels")})
