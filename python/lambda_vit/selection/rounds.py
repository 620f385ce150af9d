"""Picks layers: one round of a search, one ranking, or the order of a control."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

from .budget import Stop
from .measurement import Measurement
from .prefix_cache import FULL, SkippedBlocks
from .result import Round
from .search_state import BeamState, SearchState
from .strategies import Criterion


def order_control(
    strategy: str, candidates: Sequence[int], most: int, seed: int, layers: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the order in which a control removes layers, at most `most`."""
    if strategy == "explicit":
        return tuple(layers)
    if strategy == "random":
        return tuple(random.Random(seed).sample(list(candidates), most))
    return tuple(candidates[:most])


def shorten_to_budget(layers: Sequence[int], stop: Stop) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the first layers that meet `stop`; if not even all of them do, all, with a note that says so."""
    for count in range(1, len(layers) + 1):
        if stop.met(layers[:count]):
            return tuple(layers[:count]), ()
    return tuple(layers), (stop.shortfall(layers),)


def search_round(
    measurement: Measurement,
    criterion: Criterion,
    state: SearchState,
    next_candidates: Callable[[Collection[int]], Collection[int]],
    beam: int,
    description: str,
) -> SearchState:
    """Measure every beam state with one more layer skipped, in one pass, and keep the best `beam`.

    `next_candidates` returns the layers that may be picked after those of a state; at least one state has some.
    """
    children: dict[SkippedBlocks, list[tuple[BeamState, int]]] = {}
    for branch in state.branches:
        for layer in next_candidates(branch.layers):
            children.setdefault(frozenset((*branch.layers, layer)), []).append((branch, layer))
    paths = [*([FULL] if state.full is None else []), *children]
    results = measurement.measure(paths, description, compare=criterion.compare, label=criterion.label, keep=True)
    full = results[FULL] if state.full is None else state.full
    scores = {path: criterion.score(results[path], full) for path in children}
    best = sorted(children, key=lambda path: (scores[path], sorted(path)))[:beam]
    kept = []
    for path in best:
        # If several states lead to one set, the best one counts: states are sorted by score.
        branch, layer = children[path][0]
        siblings = {other: scores[frozenset((*branch.layers, other))][0] for other in next_candidates(branch.layers)}
        step = Round(layer, siblings, results[path].entropy, branch.layers)
        kept.append(BeamState((*branch.layers, layer), (*branch.rounds, step)))
    return SearchState(tuple(kept), full)


def rank_layers(
    measurement: Measurement, criterion: Criterion, candidates: Sequence[int], most: int, description: str
) -> SearchState:
    """Measure every layer alone, and return the `most` best in order."""
    if criterion.score is None:
        distances = measurement.cosine_distances(description)
        scores = {layer: (distances[layer], 0.0) for layer in candidates}
        full, entropies = None, {}
    else:
        paths = {layer: frozenset((layer,)) for layer in candidates}
        results = measurement.measure(
            [FULL, *paths.values()], description, compare=criterion.compare, label=criterion.label
        )
        full = results[FULL]
        scores = {layer: criterion.score(results[path], full) for layer, path in paths.items()}
        entropies = {layer: results[path].entropy for layer, path in paths.items()}
    order = sorted(candidates, key=lambda layer: (scores[layer], layer))[:most]
    step = Round(order[0], {layer: score for layer, (score, _) in scores.items()}, entropies.get(order[0]))
    return SearchState((BeamState(tuple(order), (step,)),), full)
