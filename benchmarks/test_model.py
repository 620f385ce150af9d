"""A DeiT-Tiny without four of its attention layers against the full one, and selection against full forwards."""

from __future__ import annotations

import pytest
import timm
import torch

from lambda_kernels import convert_vit
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


def test_a_round_of_selection(model, against):
    """All twelve candidates from shared prefixes, against one full forward for each."""
    data = [torch.randn(16, 3, 224, 224)]
    measurement = Measurement(model, data)
    with torch.inference_mode():
        against(
            lambda: measurement.entropies((), range(12)),
            lambda: [measurement.entropies((i,), ()) for i in range(12)],
            rounds=3,
        )
