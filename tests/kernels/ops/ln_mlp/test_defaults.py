"""What the MLP's stages use where nothing was measured, by tokens, width and architecture."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from hypothesis import given
from hypothesis import strategies as st

from lambda_kernels.ops.ln_mlp.fused import stages, tuning
from lambda_kernels.ops.ln_mlp.fused.kernels import configs
from lambda_kernels.ops.ln_mlp.fused.kernels.configs import Config

LARGE, MIDDLE, SMALL = Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 4)
TALL, WIDE = Config(128, 64, 64, 4, 4), Config(64, 128, 64, 4, 4)


@pytest.mark.parametrize(
    ("channels", "tokens", "fc1", "fc2"),
    [
        (192, 197, SMALL, SMALL),
        (192, 1576, WIDE, SMALL),
        (192, 6304, LARGE, TALL),
        (192, 50432, LARGE, MIDDLE),
        (384, 197, SMALL, SMALL),
        (384, 1576, MIDDLE, SMALL),
        (384, 6304, LARGE, MIDDLE),
        (384, 50432, LARGE, MIDDLE),
        (768, 197, SMALL, SMALL),
        (768, 1576, LARGE, TALL),
        (768, 6304, LARGE, MIDDLE),
        (768, 50432, LARGE, MIDDLE),
    ],
)
def test_the_default_tile_by_tokens_and_width(channels, tokens, fc1, fc2):
    """On 132 multiprocessors: 197 tokens are one image, 50,432 are 256."""
    for kernel, columns, expected in (("fc1", 4 * channels, fc1), ("fc2", channels, fc2)):
        assert default_tiles(kernel, tokens, channels, columns)[0] == expected


@given(
    st.sampled_from(["fc1", "fc2", "hidden_gradient", "saved_gradient"]),
    st.integers(1, 1 << 17),
    st.sampled_from([64, 192, 384, 768, 1024]),
)
def test_no_default_leaves_more_of_the_device_idle_than_another_tile(kernel, tokens, channels):
    columns = channels if kernel == "fc2" else 4 * channels
    rows = tuning.bucket(tokens)
    programs = [
        min(132, -(-rows // tile.bm) * -(-columns // tile.bn))
        for tile in default_tiles(kernel, tokens, channels, columns)
    ]
    assert programs[0] == max(programs)


def default_tiles(kernel: str, tokens: int, channels: int, columns: int) -> list[Config]:
    """What ships for Hopper, the default for 132 multiprocessors first."""
    sizes = (tuning.bucket(tokens), channels, columns)
    tiles = [c.config for c in stages._shipped(kernel, ("any",), 90, torch.bfloat16, sizes, 132, True)]
    assert set(tiles) == set(configs.shipped(kernel, 90, torch.bfloat16, channels, True))
    return tiles


def test_the_default_forward():
    """Two kernels where products are fed by descriptors; else one pass, if its programs are enough for 108 multiprocessors."""
    for arch, tma, tokens, channels, method in (
        (90, True, 50432, 192, "staged"), (90, True, 197, 192, "staged"),
        (80, False, 50432, 192, "one_pass"), (80, False, 1576, 192, "staged"), (80, False, 197, 192, "staged"),
        (80, False, 50432, 384, "staged"),
    ):  # fmt: skip
        sizes = (tuning.bucket(tokens), channels, 1)
        tiles = stages._shipped("one_pass", ("one_pass",), arch, torch.bfloat16, sizes, 108, tma)
        ordered = stages._order_forward(tiles, tokens, channels, 108, tma)
        assert (ordered[0].method, set(ordered)) == (method, {stages.STAGED, *tiles})
    assert stages._order_forward((), 50432, 192, 108, False) == (stages.STAGED,)
