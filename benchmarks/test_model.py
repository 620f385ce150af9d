"""A DeiT-Tiny without four of its attention layers against the full one, and selection against full forwards."""

from __future__ import annotations

import pytest
import timm
import torch

from lambda_kernels import EntropyMeter, convert_vit
from lambda_vit.paths import PathRunner, skip_attention
from lambda_vit.transfer import Measurement


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224").eval()


@pytest.mark.parametrize("batch", [1, 16])
@torch.inference_mode()
def test_four_layers_removed(model, against, batch):
    converted = convert_vit(model, remove=(1, 3, 5, 7))
    x = torch.randn(batch, 3, 224, 224)
    against(lambda: converted(x), lambda: model(x))


def test_selecting_five_of_twelve(model, against):
    """Every round's candidates from shared beginnings, against one full forward for each; the picks are given."""
    data = [torch.randn(8, 3, 224, 224)]
    picks = (5, 3, 1, 7, 4)
    rounds = [
        [frozenset((*picks[:number], i)) for i in range(12) if i not in picks[:number]] for number in range(len(picks))
    ]
    rounds[0].insert(0, frozenset())

    def shared() -> None:
        with Measurement(model, data) as measurement:
            for paths in rounds:
                measurement.measure(paths, keep=True)

    def one_by_one() -> None:
        for paths in rounds:
            for path in paths:
                meter = EntropyMeter()
                for images in data:
                    meter.update(skip_attention(model, tuple(path))(images))
                meter.compute()

    with torch.inference_mode():
        against(shared, one_by_one, rounds=3)


def test_statistics_of_a_round(model, against):
    """All candidates of a round with their statistics, against the same forwards with nothing measured."""
    data = [torch.randn(8, 3, 224, 224)]
    paths = [frozenset(), *(frozenset((i,)) for i in range(12))]

    def measured() -> None:
        with Measurement(model, data, cache="none") as measurement:
            measurement.measure(paths, compare=True)

    def bare() -> None:
        runner = PathRunner(model)
        for images in data:
            dict(runner.outputs(runner.embed(images), paths))

    with torch.inference_mode():
        against(measured, bare, rounds=5)
