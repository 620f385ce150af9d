"""The strategies of `select_layers`: each is one registered object, from which the command line, reports and docs are made.

A strategy says how layers are found and by which criterion they are compared. This module loads no PyTorch, so that the
command line can list the strategies at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .path_statistics import PathResult


@dataclass(frozen=True)
class Criterion:
    """The quantity by which paths are compared; lower is better.

    Attributes:
        name: Its name in reports.
        unit: The unit of the score.
        about: What the score measures, as the end of "Score: …".
        score: Computes the score from the path's result and the full model's; the second number breaks ties. None: the
            criterion compares blocks, not the outputs of paths.
        compare: Whether it requires the full model's logits.
        label: Whether it requires labels.
    """

    name: str
    unit: str
    about: str
    score: Callable[[PathResult, PathResult], tuple[float, float]] | None
    compare: bool = False
    label: bool = False

    @property
    def needs_classes(self) -> bool:
        """Whether it compares predicted classes or their probabilities."""
        return self.compare or self.label


@dataclass(frozen=True)
class Strategy:
    """How layers are found, and by which criterion.

    Attributes:
        how: "greedy": one by one, each measured together with the earlier picks. "ranked": all by one measurement of each
            layer alone. "control": measures nothing.
        criterion: The quantity that it minimizes; None for a control.
        about: One phrase for a list of strategies.
        report: How a report describes the search.
        repair: Whether MLP halves without attention are repaired before the search (`Measurement.repair`).
    """

    how: str
    criterion: Criterion | None
    about: str
    report: str
    repair: bool = False


ABSOLUTE_TE = Criterion(
    "|TE|",
    "bits",
    "the distance of the output's entropy from the full model's without this attention",
    lambda result, full: (abs(full.entropy - result.entropy), 0.0),
)
TE = Criterion(
    "TE",
    "bits",
    "the drop of the output's entropy below the full model's without this attention",
    lambda result, full: (full.entropy - result.entropy, 0.0),
)
DIVERGENCE = Criterion(
    "KL",
    "bits",
    "the mean divergence of the class probabilities from the full model's without this attention",
    lambda result, full: (result.kl, 0.0),
    compare=True,
)
REPAIRED_DIVERGENCE = Criterion(
    "KL after repair",
    "bits",
    "the mean divergence of the class probabilities from the full model's without this attention, with repaired MLPs",
    lambda result, full: (result.kl, 0.0),
    compare=True,
)
LOST_ACCURACY = Criterion(
    "top-1 lost",
    "points",
    "the points of top-1 lost without this attention",
    # Accuracies of few images are often equal: the loss breaks the tie.
    lambda result, full: (full.top1 - result.top1, result.loss),
    label=True,
)
COSINE = Criterion(
    "1 − cosine", "", "the change of direction of the tokens that pass this attention; 0 means none", None
)

STRATEGIES = {
    "nose": Strategy(
        "greedy",
        ABSOLUTE_TE,
        "smallest change of the output's entropy",
        "NOSE (arXiv 2404.05657): each round scores every remaining layer together with the earlier picks and picks the "
        "lowest |TE|",
    ),
    "nose-signed": Strategy(
        "greedy",
        TE,
        "the paper's formula, which prefers layers whose removal inflates the entropy",
        "NOSE by the paper's formula, with the sign of TE: layers whose removal inflates the entropy score best",
    ),
    "one-shot": Strategy(
        "ranked",
        ABSOLUTE_TE,
        "as nose, but each layer measured alone, once",
        "one ranking: every layer is scored alone on the full model, and the lowest are picked",
    ),
    "kl": Strategy(
        "greedy",
        DIVERGENCE,
        "smallest divergence of the class probabilities from the full model's",
        "greedy: each round picks the layer whose removal changes the class probabilities least",
    ),
    "recoverability": Strategy(
        "greedy",
        REPAIRED_DIVERGENCE,
        "as kl, after a short repair of the MLP of each block (arXiv 2202.07861)",
        "greedy: before the search, copies of the MLPs learn to give their block's output without its attention (arXiv "
        "2411.19146); each round picks the layer whose removal then changes the class probabilities least. What this report "
        "shows after each pick is without this repair",
        repair=True,
    ),
    "accuracy": Strategy(
        "greedy",
        LOST_ACCURACY,
        "smallest loss of accuracy on labelled images; the loss breaks ties",
        "greedy: each round picks the layer whose removal costs the fewest correct answers",
    ),
    "cosine": Strategy(
        "ranked",
        COSINE,
        "smallest change of the tokens' direction by the attention (arXiv 2406.15786)",
        "one ranking: picks the layers that change the direction of their tokens least",
    ),
    "random": Strategy("control", None, "random layers, by --seed", "a control that measures nothing: random layers"),
    "first": Strategy("control", None, "blocks 0, 1, 2 …", "a control that measures nothing: the first blocks"),
    "explicit": Strategy("control", None, "the blocks of --layers", "the given layers"),
}

CRITERIA = {strategy.criterion.name: strategy.criterion for strategy in STRATEGIES.values() if strategy.criterion}

SEARCHES = {"greedy": "greedy", "ranked": "ranks once", "control": "measures nothing"}
