"""Selecting layers: all candidates of a round from shared beginnings, against a full forward for each of them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from lambda_kernels import EntropyMeter
from lambda_vit.models.views import skip_attention
from lambda_vit.selection.measurement import Measurement
from lambda_vit.selection.paths import PathRunner
from lambda_vit.selection.prefix_cache import FULL

pytestmark = [pytest.mark.benchmark(group="selection"), pytest.mark.usefixtures("one_thread")]

PICKS = (5, 3, 1, 7, 4)
QUICK_PICKS = (5,)
# Of entropies summed over 1000 channels, which one forward after another and shared ones round alike but for products that
# a library takes in another order for another batch.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224").eval()


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    """Of the depth of a DeiT, a quarter of a DeiT-Tiny's tokens and fewer channels."""
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=112, embed_dim=96).eval()


def rounds_of(picks: tuple[int, ...]) -> list[list[frozenset[int]]]:
    """The paths that each round of a selection measures, for picks that are given."""
    rounds = [
        [frozenset((*picks[:number], i)) for i in range(12) if i not in picks[:number]] for number in range(len(picks))
    ]
    rounds[0].insert(0, FULL)
    return rounds


class Selecting:
    """Both ways to measure the same rounds."""

    def __init__(self, model: torch.nn.Module, images: torch.Tensor, picks: tuple[int, ...]) -> None:
        self.model, self.data, self.rounds = model, [images], rounds_of(picks)

    def shared(self) -> dict[frozenset[int], float]:
        """Entropies of all paths, from beginnings that are run once."""
        found = {}
        with Measurement(self.model, self.data) as measurement:
            for paths in self.rounds:
                found |= {path: result.entropy for path, result in measurement.measure(paths, keep=True).items()}
        return found

    def one_by_one(self) -> dict[frozenset[int], float]:
        """The same by a full forward for each path."""
        return {path: self.entropy(path) for paths in self.rounds for path in paths}

    def entropy(self, path: frozenset[int]) -> float:
        """Of the output with the attention of `path` skipped."""
        meter = EntropyMeter()
        for images in self.data:
            meter.update(skip_attention(self.model, tuple(path))(images))
        return float(meter.compute().sum())

    def hold(self) -> None:
        """Every path's entropy is the one of its own full forward, and some of them are float64's."""
        found = self.shared()
        for path, expected in self.one_by_one().items():
            off(path, found[path], expected)
        for path in list(found)[:: max(1, len(found) // 3)]:
            exact = Selecting(copy.deepcopy(self.model).double(), self.data[0].double(), PICKS[:1])
            off(path, found[path], exact.entropy(path))


def off(path: frozenset[int], found: float, expected: float) -> None:
    if not abs(found - expected) <= TOLERANCE * abs(expected):
        pytest.fail(
            f"without {sorted(path)} the entropy is {found}, not {expected}: no time is reported of what is wrong"
        )


@torch.inference_mode()
def selecting(against, model: torch.nn.Module, images: torch.Tensor, picks: tuple[int, ...], rounds: int) -> None:
    work = Selecting(model, images, picks)
    work.hold()
    against(
        {"shared beginnings": work.shared},
        {"one by one": work.one_by_one},
        what=f"selecting {len(picks)} of 12 layers, {len(images)} images",
        rounds=rounds,
        seconds=60,
    )


def test_selecting_five_of_twelve(model, against):
    """Every round's candidates; the picks are given."""
    selecting(against, model, torch.randn(4, 3, 224, 224), PICKS, 6)


@pytest.mark.quick
def test_selecting_one_of_twelve(small, against):
    selecting(against, small, torch.randn(2, 3, 112, 112), QUICK_PICKS, 6)


def test_statistics_of_a_round(model, against):
    """All candidates of a round with their statistics, against the same forwards with nothing measured."""
    data = [torch.randn(8, 3, 224, 224)]
    paths = [FULL, *(frozenset((i,)) for i in range(12))]

    def measured() -> None:
        with Measurement(model, data, cache="none") as measurement:
            measurement.measure(paths, compare=True)

    def bare() -> None:
        runner = PathRunner(model)
        for images in data:
            dict(runner.outputs(runner.embed(images), paths))

    with torch.inference_mode():
        Selecting(model, data[0], PICKS[:1]).hold()
        against(
            {"with statistics": measured}, {"forwards alone": bare}, what="statistics of a round", rounds=8, seconds=40
        )
