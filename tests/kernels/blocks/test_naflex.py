"""NaFlexVit: batches hold padding, which no statistic may see and which a removed block may not let into the images."""

from __future__ import annotations

import entry_points
import pytest
import torch
from entry_points import attention_free
from torch import Tensor

from lambda_kernels import convert_vit
from lambda_vit import dilute, finish_dilution, select_layers, set_lambda, transfer_entropy
from lambda_vit.data import batches
from lambda_vit.measure.layer_profile import profile_layers
from lambda_vit.selection.measurement import Measurement
from lambda_vit.selection.paths import PathRunner

pytestmark = pytest.mark.models

pytest.importorskip("timm.models.naflexvit")

GRIDS = [(2, 2), (1, 3), (3, 2), (1, 2), (2, 3), (3, 1)]
MODELS = ("naflexvit_base_patch16_gap", "naflexvit_base_patch16_map", "naflexvit_base_patch16_siglip")


def image(grid: tuple[int, int], seed: int, padded_to: int, padding: float = 0.0) -> dict[str, Tensor]:
    """One image as patches of 8×8 pixels, padded."""
    number = grid[0] * grid[1]
    pixels = torch.randn(1, number, 3 * 64, generator=torch.Generator().manual_seed(seed))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    patches = torch.full((1, padded_to, 3 * 64), padding)
    coordinates = torch.zeros(1, padded_to, 2, dtype=torch.int64)
    valid = torch.zeros(1, padded_to, dtype=torch.bool)
    patches[:, :number], valid[:, :number] = pixels, True
    coordinates[:, :number] = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


def padded(padding: float = 0.0) -> list[tuple[dict, Tensor]]:
    """Two batches of three images each, with the sequence length that timm's collator adds."""
    images = [image(grid, seed, 8, padding) for seed, grid in enumerate(GRIDS)]
    return [
        ({key: torch.cat([one[key] for one in part]) for key in part[0]} | {"seq_len": 8}, torch.arange(3))
        for part in (images[:3], images[3:])
    ]


def alone() -> list[tuple[dict, Tensor]]:
    """The same images one by one, as long as each is."""
    return [(image(grid, seed, grid[0] * grid[1]), torch.tensor([seed % 3])) for seed, grid in enumerate(GRIDS)]


def build(name: str = MODELS[0]) -> torch.nn.Module:
    return entry_points.build(name, "naflexvit")


def logits(model: torch.nn.Module, loader: list) -> Tensor:
    return torch.cat([model(images) for images, _ in loader])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_removed_and_kept_blocks_leave_padding_out(name):
    model = build(name)
    for remove, scale in (((), 1.0), ((0, 2), 1.0), ((1, 3), 2.0)):
        converted = convert_vit(model, remove, residual_scale=scale)
        hand = build(name)
        for index in remove:
            hand.blocks[index].forward = attention_free(hand.blocks[index], scale)
        found = logits(converted, padded())
        assert torch.allclose(found, logits(hand, padded()), rtol=1e-4, atol=1e-5)
        assert torch.allclose(found, logits(converted, alone()), rtol=1e-4, atol=1e-4)
        assert torch.allclose(found, logits(converted, padded(100.0)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(model, padded()), atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*tokens per channel are few")
def test_profiles_leave_padding_out():
    model = build()
    whole, each = profile_layers(model, padded(50.0)), profile_layers(model, alone())
    prefix = model.num_prefix_tokens * len(GRIDS)
    assert whole.samples == each.samples == 6
    for one, other in zip(whole.blocks, each.blocks, strict=True):
        for part in ("attn", "mlp"):
            found, wanted = getattr(one, part), getattr(other, part)
            assert found.tokens == wanted.tokens == prefix + sum(h * w for h, w in GRIDS)
            assert found.gaussian.mean == pytest.approx(wanted.gaussian.mean, rel=1e-4)
            assert found.histogram.mean == pytest.approx(wanted.histogram.mean, rel=1e-2)


@pytest.mark.parametrize("score", ["logits", "pre_logits"])
@torch.no_grad()
def test_scores_are_those_of_the_images(score):
    model = build()
    assert transfer_entropy(model, padded(50.0), (1,), score=score) == pytest.approx(
        transfer_entropy(model, alone(), (1,), score=score), rel=1e-3
    )
    runner, hand = PathRunner(model, score), build()
    for index in (0, 3):
        hand.blocks[index].forward = attention_free(hand.blocks[index])
    for images, _ in padded():
        ((_, found),) = runner.outputs(runner.embed(images), [frozenset((0, 3))])
        assert torch.allclose(found.logits, hand(images), rtol=1e-4, atol=1e-5)
    assert runner.why_images is not None


def test_cosines_leave_padding_out():
    found = []
    for loader in (padded(50.0), alone()):
        with Measurement(build(), loader) as measurement:
            found.append(measurement.cosine_distances())
            assert measurement.samples == 6
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_selecting_with_every_cache(cache, tmp_path):
    wanted = select_layers(build(), alone(), 2, cache="none")
    found = select_layers(build(), padded(50.0), 2, cache=cache, cache_folder=tmp_path)
    assert found.layers == wanted.layers
    for one, other in zip(found.rounds, wanted.rounds, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-2, abs=1e-3)
    by_labels = select_layers(build(), padded(), 1, strategy="accuracy", cache=cache, cache_folder=tmp_path)
    assert len(by_labels.layers) == 1


def test_repairs_leave_padding_out(tmp_path):
    errors = []
    for padding in (0.0, 50.0):
        with Measurement(build(), padded(padding)) as measurement:
            measurement.repair(range(4))
            errors.append([end for ends in measurement.engine()["repair"]["errors"].values() for end in ends])
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert all(after < before for before, after in zip(errors[0][::2], errors[0][1::2], strict=True))
    found = [
        select_layers(build(), padded(), 2, strategy="recoverability", cache=cache, cache_folder=tmp_path)
        for cache in ("ram", "disk", "none")
    ]
    assert found[0] == found[1] == found[2]


@torch.no_grad()
def test_dilution_with_padding():
    model = build()
    diluted = dilute(model, (0, 1))
    assert torch.allclose(logits(diluted, padded()), logits(model, padded()), rtol=1e-4, atol=1e-5)
    set_lambda(diluted, 0.3)
    assert torch.allclose(logits(diluted, padded(50.0)), logits(diluted, alone()), rtol=1e-4, atol=1e-4)
    set_lambda(diluted, 0.0)
    finished = finish_dilution(diluted)
    wanted = logits(convert_vit(model, (0, 1), residual_scale=2.0), padded())
    assert torch.allclose(logits(finished, padded()), wanted, rtol=1e-4, atol=1e-5)


def test_not_a_number_is_found_in_patches():
    loader = padded()
    loader[1][0]["patches"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="batch 1 of the input holds NaN"):
        select_layers(build(), loader, 1)


def test_batches_are_counted_cut_and_moved():
    images = padded()[0][0]
    assert batches.count(images) == 3
    assert batches.count(images["patches"]) == 3
    assert batches.first(images, 2)["patch_valid"].shape == (2, 8)
    moved = batches.to(images, torch.device("cpu"), torch.float64)
    assert (moved["patches"].dtype, moved["patch_coord"].dtype) == (torch.float64, torch.int64)
    assert moved["patch_valid"].dtype == torch.bool
    assert set(batches.tensors(images)) == {"patches", "patch_coord", "patch_valid"}
    assert batches.tensors(None) == {}
    assert batches.from_tensors({}) is None
    assert batches.valid_tokens(build(), None) is None
    valid = batches.valid_tokens(build(), images)
    assert valid.sum(1).tolist() == [build().num_prefix_tokens + h * w for h, w in GRIDS[:3]]
