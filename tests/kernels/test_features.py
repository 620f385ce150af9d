"""Feature maps of converted models: the same as loops over blocks written by hand, and what scale they have."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import timm
import torch
from small_models import images, small_vit
from torch import nn

from lambda_kernels import UnsupportedModelError, convert_vit
from lambda_kernels.features import FeatureModel, feature_model, residual_scales

pytestmark = pytest.mark.models

REMOVED = (0, 2)
MODELS = {
    "vit": {},
    "deit": {"name": "deit_tiny_patch16_224"},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "registers": {"reg_tokens": 2},
    "deit3": {"name": "deit3_small_patch16_224"},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
}
PREFIX = {"vit": 1, "deit": 1, "distilled": 2, "registers": 3, "deit3": 1, "no class token": 0}


def build(kind: str) -> nn.Module:
    return small_vit(patch_size=8, **MODELS[kind])


def by_hand(full: nn.Module, scale: float) -> list[torch.Tensor]:
    """Tokens [4, prefix + 16, 48] behind each block of the full model, with the attention of `REMOVED` left out."""
    x = full.norm_pre(full._pos_embed(full.patch_embed(images())))
    tokens = []
    for index, block in enumerate(full.blocks):
        x = scale * x if index in REMOVED else x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        tokens.append(x)
    return tokens


def as_map(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, 4, 4)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_timms_own_methods(kind, scale):
    full, prefix = build(kind), PREFIX[kind]
    model = convert_vit(full, REMOVED, residual_scale=scale)
    expected = by_hand(full, scale)
    final, maps = model.forward_intermediates(images())
    close(final, full.norm(expected[-1]))
    assert len(maps) == 4
    for found, tokens in zip(maps, expected, strict=True):
        close(found, as_map(tokens[:, prefix:]))
    for indices, norm in (([1, 3], False), ([0, 2], True)):
        options = {"indices": indices, "norm": norm, "output_fmt": "NLC", "intermediates_only": True}
        wanted = [full.norm(expected[i]) if norm else expected[i] for i in indices]
        for found, tokens in zip(model.forward_intermediates(images(), **options), wanted, strict=True):
            close(found, tokens[:, prefix:])
        pairs = model.forward_intermediates(images(), return_prefix_tokens=prefix > 0, **options)
        for pair, tokens in zip(pairs, wanted, strict=True):
            # What holds the two has changed from one version of timm to another, their order has not.
            found, before = pair if prefix else (pair, None)
            close(found, tokens[:, prefix:])
            if prefix:
                close(before, tokens[:, :prefix])
        layers = model.get_intermediate_layers(images(), n=indices, norm=norm, return_prefix_tokens=prefix > 0)
        for each, tokens in zip(layers, wanted, strict=True):
            close(each[0] if prefix else each, tokens[:, prefix:])
        for each, tokens in zip(model.get_intermediate_layers(images(), n=indices, reshape=True, norm=norm), wanted):  # noqa: B905
            close(each, as_map(tokens[:, prefix:]))


@torch.no_grad()
def test_stopping_early():
    model, ran = convert_vit(build("vit"), REMOVED, residual_scale=2.0), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    early = model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
    assert ran == [0, 1]
    whole = model.forward_intermediates(images(), indices=[1], intermediates_only=True)
    assert ran == [0, 1, 0, 1, 2, 3]
    assert torch.equal(early[0], whole[0])
    if "output_dict" in inspect.signature(model.forward_intermediates).parameters:
        found = model.forward_intermediates(images(), indices=[1], output_dict=True, return_prefix_tokens=True)
        assert torch.equal(found["image_intermediates"][0], whole[0])
        assert found["image_intermediates_prefix"][0].shape == (4, 1, 48)


def test_scales():
    full = build("vit")
    assert residual_scales(full) == (1, 1, 1, 1)
    assert residual_scales(convert_vit(full, (1, 2))) == (1, 1, 1, 1)
    assert residual_scales(convert_vit(full, (1, 2), residual_scale=2.0)) == (1, 2, 4, 4)
    assert residual_scales(convert_vit(full, REMOVED, residual_scale=3.0)) == (3, 3, 9, 9)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_feature_model(kind):
    full, prefix = build(kind), PREFIX[kind]
    model = convert_vit(full, REMOVED, residual_scale=2.0)
    before = model(images())
    expected = by_hand(full, 2.0)
    # of block 1 the first factor alone, of block 2 both
    cases = {
        "plain": ({}, [expected[1], expected[2]]),
        "norm": ({"norm": True}, [full.norm(expected[1]), full.norm(expected[2])]),
        "rescale": ({"rescale": True}, [expected[1] / 2, expected[2] / 4]),
    }
    for options, wanted in cases.values():
        for given in ([1, 2], (-3, -2), [2, 1]):
            features = feature_model(model, given, **options)
            assert isinstance(features, timm.models._features.FeatureGetterNet)
            assert not features.training
            assert features.scales == (2, 4)
            assert features.feature_info.channels() == [48, 48]
            for found, tokens in zip(features(images()), wanted, strict=True):
                close(found, as_map(tokens[:, prefix:]))
        features = feature_model(model, [1, 2], output_fmt="NLC", **options)
        for found, tokens in zip(features(images()), wanted, strict=True):
            close(found, tokens[:, prefix:])
    assert torch.equal(model(images()), before)  # nothing was taken off the model itself
    assert len(features.model.blocks) == 3
    assert features.model.lambda_kernels_info.removed == REMOVED
    assert [row.block for row in features.model.lambda_kernels_info.blocks] == [0, 1, 2]


@torch.no_grad()
def test_dividing_by_two_loses_nothing():
    model = convert_vit(build("vit"), REMOVED, residual_scale=2.0)
    plain, rescaled = (feature_model(model, 4, rescale=rescale)(images()) for rescale in (False, True))
    for scale, map_, divided in zip((2, 2, 4, 4), plain, rescaled, strict=True):
        assert torch.equal(divided * scale, map_)


@torch.no_grad()
def test_as_timm_wraps():
    """The same weights in what `features_only=True` builds give the same maps, under the same keys."""
    full = build("vit")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    theirs = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=[0, 2], **sizes).eval()
    ours = feature_model(convert_vit(full, ()), [0, 2])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    for found, expected in zip(ours(images()), theirs(images()), strict=True):
        close(found, expected)
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    assert ours.feature_info.module_name() == theirs.feature_info.module_name()


def test_training_a_head():
    model = convert_vit(build("vit"), REMOVED, residual_scale=2.0).train()
    features = feature_model(model, [1], rescale=True, inplace=True)
    assert features.model is model
    assert features.training
    assert len(model.blocks) == 2
    maps = features(images())
    maps[0].square().sum().backward()
    assert all(p.grad is not None for name, p in features.named_parameters() if "blocks.1" in name)
    for twin in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        assert torch.equal(twin(images())[0], maps[0])
        assert (twin.scales, twin.rescale) == ((2,), True)
    compiled = torch.compile(features.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(images())[0], features(images())[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": [0, 4]}, r"out_indices holds 4; it must be .* from -4 to 3"),
        ({"out_indices": [-5]}, "out_indices holds -5"),
        ({"out_indices": 5}, "out_indices holds 5; it must be a number of blocks from 1 to 4"),
        ({"out_indices": 0}, "out_indices holds 0"),
        ({"out_indices": True}, "out_indices holds True"),
        ({"out_indices": [1.0]}, r"out_indices holds 1\.0"),
        ({"out_indices": "1"}, "out_indices must be"),
        ({"out_indices": []}, "out_indices must be"),
        ({"out_indices": [3, -1]}, r"out_indices names a block twice: \[3, -1\]"),
        ({"output_fmt": "NHWC"}, "output_fmt"),
        ({"norm": True, "rescale": True}, "norm=True already removes the scale"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        feature_model(convert_vit(build("vit"), (1,)), **options)


def test_models_that_cannot(monkeypatch):
    pooled = small_vit(global_pool="avg", patch_size=8)  # its norm is behind the pooling
    with pytest.raises(UnsupportedModelError, match="no norm before its pooling"):
        feature_model(convert_vit(pooled, (1,)), norm=True)
    assert isinstance(feature_model(pooled), FeatureModel)
    for wrapped in (feature_model(build("vit")), timm.create_model("vit_tiny_patch16_224", features_only=True)):
        for work in (lambda wrapped=wrapped: convert_vit(wrapped, (1,)), lambda w=wrapped: feature_model(w)):
            with pytest.raises(UnsupportedModelError, match=r"then wrap it: lambda_kernels\.features\.feature_model"):
                work()
