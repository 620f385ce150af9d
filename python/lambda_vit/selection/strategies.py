"""How paths are scored and searched: the strategies of `select_layers`, all behind one interface.

A strategy says what is measured of a path (its criterion), and how the layers follow from it: picked one by one, each
time measured together with those already picked ("greedy"), or ranked once by what each does alone ("ranked"). Controls
measure nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .budget import Stop
from .measurement import Measurement
from .path_statistics import PathResult
from .paths import FULL, SkippedBlocks
from .result import Round
from .search_state import Branch, Found


@dataclass(frozen=True)
class Criterion:
    """What a path is judged by; lower is better.

    Attributes:
        name: As a report calls it.
        unit: Of the score.
        score: From the path's result and the full model's. The second number decides between equal scores. None: what
            is measured are the blocks, not the outputs of paths.
        compare: It needs the full model's logits beside the path's.
        label: It needs labels.
    """

    name: str
    unit: str
    score: Callable[[PathResult, PathResult], tuple[float, float]] | None
    compare: bool = False
    label: bool = False


@dataclass(frozen=True)
class Strategy:
    """How layers are found, and by what.

    Attributes:
        how: "greedy": one by one, each time together with those picked before. "ranked": by what each does alone.
            "control": measures nothing.
        criterion: What a path is judged by; None for a control.
        about: In words, for people.
    """

    how: str
    criterion: Criterion | None
    about: str


def _te(result: PathResult, full: PathResult) -> tuple[float, float]:
    return full.entropy - result.entropy, 0.0


def _absolute_te(result: PathResult, full: PathResult) -> tuple[float, float]:
    return abs(full.entropy - result.entropy), 0.0


def _divergence(result: PathResult, full: PathResult) -> tuple[float, float]:
    return result.kl, 0.0


def _lost_accuracy(result: PathResult, full: PathResult) -> tuple[float, float]:
    # Accuracies of few images are often equal: the loss then knows more.
    return full.top1 - result.top1, result.loss


ABSOLUTE_TE = Criterion("|TE|", "bits", _absolute_te)

TE = Criterion("TE", "bits", _te)

DIVERGENCE = Criterion("KL", "bits", _divergence, compare=True)

LOST_ACCURACY = Criterion("top-1 lost", "points", _lost_accuracy, label=True)

COSINE = Criterion("1 − cosine", "", None)


STRATEGIES = {
    "nose": Strategy("greedy", ABSOLUTE_TE, "the smallest change of the output's entropy, layer by layer"),
    "nose-signed": Strategy("greedy", TE, "the paper's formula, in which inflated entropy counts as good"),
    "one-shot": Strategy("ranked", ABSOLUTE_TE, "as nose, but each layer measured alone, once"),
    "kl": Strategy("greedy", DIVERGENCE, "the smallest divergence of the outputs from the full model's"),
    "accuracy": Strategy("greedy", LOST_ACCURACY, "the smallest loss of accuracy on labelled images"),
    "cosine": Strategy("ranked", COSINE, "the attention layers that turn their tokens least"),
    "random": Strategy("control", None, "a seeded draw"),
    "first": Strategy("control", None, "blocks 0, 1, 2 …"),
    "explicit": Strategy("control", None, "the layers given"),
}


def control_order(
    strategy: str, candidates: Sequence[int], most: int, seed: int, layers: Sequence[int] | None
) -> tuple[int, ...]:
    """The order in which a control removes layers, as many as may go."""
    if strategy == "explicit":
        return tuple(layers)
    if strategy == "random":
        return tuple(random.Random(seed).sample(list(candidates), most))
    return tuple(candidates[:most])


def shortened(layers: Sequence[int], stop: Stop) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The beginning of an order of layers that meets `stop`; all of it where none does, and then what to say."""
    for count in range(1, len(layers) + 1):
        if stop.met(layers[:count]):
            return tuple(layers[:count]), ()
    return tuple(layers), (stop.shortfall(layers),)


def greedy_round(
    measurement: Measurement, criterion: Criterion, found: Found, candidates: Sequence[int], beam: int, description: str
) -> Found:
    """Measure every branch with one more layer skipped, in one pass, and keep the best `beam`."""
    children: dict[SkippedBlocks, list[tuple[Branch, int]]] = {}
    for branch in found.branches:
        for layer in candidates:
            if layer not in branch.layers:
                children.setdefault(frozenset((*branch.layers, layer)), []).append((branch, layer))
    paths = [*([FULL] if found.full is None else []), *children]
    results = measurement.measure(paths, description, compare=criterion.compare, label=criterion.label, keep=True)
    full = results[FULL] if found.full is None else found.full
    scores = {path: criterion.score(results[path], full) for path in children}
    best = sorted(children, key=lambda path: (scores[path], sorted(path)))[:beam]
    kept = []
    for path in best:
        # Where several branches lead to one set, the better one does: branches stand in that order.
        branch, layer = children[path][0]
        siblings = {
            other: scores[frozenset((*branch.layers, other))][0] for other in candidates if other not in branch.layers
        }
        step = Round(layer, siblings, results[path].entropy, branch.layers)
        kept.append(Branch((*branch.layers, layer), (*branch.rounds, step)))
    return Found(tuple(kept), full)


def ranking(
    measurement: Measurement, criterion: Criterion, candidates: Sequence[int], most: int, description: str
) -> Found:
    """Measure every layer alone, and order all that may go by that."""
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
    return Found((Branch(tuple(order), (step,)),), full)
