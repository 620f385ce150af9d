"""The extension's histograms against numpy and PyTorch, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lambda_kernels.ops.histogram import histogram, uniform_grid

BINS = 256


@pytest.fixture(params=[(4_000_000, 1), (8192, 384)], ids=["one column", "per channel"])
def data(request) -> torch.Tensor:
    return torch.randn(*request.param, generator=torch.Generator().manual_seed(0)).clamp_(-4, 4)


def test_against_numpy(data, against):
    grid = uniform_grid(-4.0, 4.0, BINS, channels=data.shape[1])
    columns = data.T.contiguous().numpy()

    def rival() -> list:
        return [np.histogram(column, bins=BINS, range=(-4.0, 4.0))[0] for column in columns]

    result = histogram(data, grid)
    assert result.backend == "extension"
    # numpy computes edges in float32 here: a value on an edge may change sides
    assert np.abs(result.counts.numpy() - np.stack(rival())).sum() <= 1e-3 * data.numel()
    against(lambda: histogram(data, grid), rival, rounds=5)


def test_against_a_loop_of_histc(data, against):
    grid = uniform_grid(-4.0, 4.0, BINS, channels=data.shape[1])
    columns = data.T.contiguous()
    against(
        lambda: histogram(data, grid), lambda: [torch.histc(column, BINS, -4.0, 4.0) for column in columns], rounds=5
    )
