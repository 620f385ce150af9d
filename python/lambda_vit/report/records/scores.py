"""A selection's scores as its record has them: rounds, what was picked from each, and the score's name and unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...runtime.formatting import format_bits, format_score


@dataclass(frozen=True)
class Ranking:
    """One round of scores. `picked` holds the blocks picked from it, in order; `gone` those picked before."""

    scores: dict[int, float | None]
    picked: tuple[int, ...]
    gone: frozenset[int]
    entropy: float | None  # with everything up to and including `picked` skipped


def rankings(selection: Mapping[str, Any]) -> list[Ranking]:
    """The rounds that have scores.

    Strategies that rank once pick several layers from one round: picks without scores of their own belong to the round
    before them.
    """
    groups: list[tuple[Mapping[str, Any], list[int]]] = []
    for one in selection.get("rounds") or ():
        if one["scores"] or not groups:
            groups.append((one, []))
        groups[-1][1].append(one["picked"])
    if groups:
        known = {block for _, picks in groups for block in picks}
        groups[-1][1].extend(block for block in selection["layers"] if block not in known)
    found: list[Any] = []
    before: list[Any] = []
    for one, picks in groups:
        if one["scores"]:
            skipped = one.get("skipped")
            scores = {int(block): value for block, value in one["scores"].items()}
            gone = frozenset(before if skipped is None else skipped)
            found.append(Ranking(scores, tuple(picks), gone, one.get("entropy")))
        before = [*before, *picks]
    return found


def blocks_of(record: Mapping[str, Any]) -> list[int]:
    """All blocks of the model if the record has their number, else those with a score."""
    selection = record["selection"]
    blocks = {block for one in rankings(selection) for block in one.scores}
    blocks.update(range((record.get("model") or {}).get("blocks") or selection.get("depth") or 0))
    return sorted(blocks)


def score_name(selection: Mapping[str, Any]) -> str:
    return selection.get("criterion") or ("TE" if selection.get("signed") else "|TE|")


def score_unit(selection: Mapping[str, Any]) -> str:
    """ "bits", "points" or nothing; older records have no such entry and mean bits."""
    unit = selection.get("unit")
    return "bits" if unit is None else unit


def in_unit(selection: Mapping[str, Any], joint: str = " in ") -> str:
    """The score's name with its unit."""
    unit = score_unit(selection)
    return score_name(selection) + (f"{joint}{unit}" if unit else "")


def score_text(selection: Mapping[str, Any]) -> Callable[[float | None], str]:
    """How this selection's scores are written: entropies span decades above 0.1, divergences and cosines lie below."""
    return format_bits if score_name(selection) in ("TE", "|TE|") or score_unit(selection) == "points" else format_score


def diverging(selection: Mapping[str, Any]) -> bool:
    """Whether the sign of a score says something."""
    if selection.get("signed") or score_name(selection) == "TE":
        return True
    return any(value is not None and value < 0 for one in rankings(selection) for value in one.scores.values())


def lowest_picked(selection: Mapping[str, Any]) -> bool:
    """Whether every round picked its lowest: a beam search may not have."""
    for one in rankings(selection):
        known = sorted(value for value in one.scores.values() if value is not None)
        picked = [one.scores.get(block) for block in one.picked]
        if None in picked or sorted(picked) != known[: len(picked)]:
            return False
    return True
