"""Bad input that touches models: what is accepted gives the same numbers, what is not gets a message that names the remedy."""

from __future__ import annotations

import pytest
import timm
import torch
from small_models import images, small_vit
from torch import nn

from lambda_kernels import AlreadyConvertedError, NonFiniteActivationError, UnsupportedModelError, convert_vit
from lambda_kernels.blocks.mlp_block import find_family
from lambda_vit import dilute, profile_layers, select_layers, transfer_entropy
from lambda_vit.models.views import skip_attention

pytestmark = pytest.mark.models

MODELS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "beit": ("beit_base_patch16_224", {}),
}


def build(name: str) -> nn.Module:
    architecture, options = MODELS[name]
    return small_vit(architecture, **options)


def loader(count: int = 2) -> list:
    return [(images(8, seed=seed), torch.arange(8)) for seed in range(count)]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_layouts_of_images_do_not_matter(name):
    model = build(name)
    x = images(4)
    wide = torch.zeros(4, 3, 32, 64)
    wide[..., ::2] = x
    for remove in ((), (0, 2)):
        converted = convert_vit(model, remove)
        wanted = converted(x)
        for same in (
            x.to(memory_format=torch.channels_last),
            wide[..., ::2],
            x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            assert torch.allclose(converted(same), wanted, rtol=1e-5, atol=1e-5)
        assert torch.allclose(convert_vit(model.to(memory_format=torch.channels_last), remove)(x), wanted, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_any_number_of_tokens_and_none(name):
    model = build(name)
    block = convert_vit(model, (1,)).blocks[1]
    for number, tokens in ((2, 1), (2, 3), (1, 7), (2, 197), (0, 5), (3, 0)):
        assert block(torch.randn(number, tokens, 48)).shape == (number, tokens, 48)
    for ours in (convert_vit(model, ()), convert_vit(model, (0, 1)), dilute(model, (0, 1), lam=0.5)):
        try:
            wanted = model(images(0)).shape
        except RuntimeError:  # the attention of some families cannot reshape nothing
            with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
                ours(images(0))
        else:
            assert ours(images(0)).shape == wanted == (0, 10)


@pytest.mark.parametrize("name", ["eva02", "beit"])
@pytest.mark.parametrize(
    ("layers", "words"),
    [((4,), "holds 4, but block indices are integers from 0 to 3"), ((-1,), "holds -1"), ((1, 1), "holds 1 twice"),
     ((True,), "holds True"), (("0",), "holds '0'"), ("01", "got '01'")],
)  # fmt: skip
def test_wrong_indices_in_every_family(name, layers, words):
    model = build(name)
    for use, argument in (
        (lambda: convert_vit(model, layers, inplace=True), "remove"),
        (lambda: dilute(model, layers, inplace=True), "layers"),
        (lambda: skip_attention(model, layers), "skip"),
        (lambda: transfer_entropy(model, loader(), layers), "skip"),
    ):
        with pytest.raises(ValueError, match=argument) as caught:
            use()
        assert words in str(caught.value)
    assert {type(block) for block in model.blocks} == {find_family(model.blocks[0]).block}


@pytest.mark.parametrize("name", ["eva02", "beit"])
def test_converted_models_of_every_family(name):
    model = convert_vit(build(name), (0, 2))
    assert convert_vit(model, (0, 2)) is model
    with pytest.raises(AlreadyConvertedError, match=r"blocks \[0, 2\] already.*requested: \[1\]"):
        convert_vit(model, (1,))
    with pytest.raises(ValueError, match=r"\[0, 2\] already; dilute the full model"):
        dilute(model, (1,))
    with pytest.raises(UnsupportedModelError, match=r"call lambda_vit\.finish_dilution first"):
        convert_vit(dilute(build(name), (1,)), (1,))


@pytest.mark.parametrize("name", ["eva02", "beit"])
def test_wrappers_in_every_family(name):
    for wrapped, remedy in (
        (torch.compile(build(name), backend="eager"), r"pass model\._orig_mod"),
        (nn.DataParallel(build(name)), r"pass model\.module"),
    ):
        with pytest.raises(UnsupportedModelError, match=remedy):
            convert_vit(wrapped, (0,))
    features = timm.create_model(MODELS[name][0], features_only=True, img_size=32, patch_size=16)
    with pytest.raises(UnsupportedModelError, match=r"features\.feature_model\(converted, out_indices\)"):
        convert_vit(features, (0,))


@pytest.mark.parametrize("name", MODELS)
def test_mixed_dtypes_and_devices_are_listed(name):
    mixed, spread = build(name), build(name)
    mixed.blocks[1].mlp.bfloat16()
    spread.head.to("meta")
    for use in (profile_layers, lambda model, data: select_layers(model, data, 1)):
        with pytest.raises(ValueError, match=r"mixes dtypes.*float32.*blocks\.1\.mlp.*bfloat16.*Cast it"):
            use(mixed, loader())
        with pytest.raises(ValueError, match=r"spread over several devices.*cpu.*head\.weight on meta.*Move it"):
            use(spread, loader())
    reasons = [row.reason for row in convert_vit(mixed, (1,)).lambda_kernels_info.blocks]
    assert "different dtypes" in reasons[1] or "not Mlp" in reasons[1]


@pytest.mark.parametrize("name", ["eva02", "beit"])
def test_not_a_number_is_found_in_every_family(name):
    model = build(name)
    with torch.no_grad():
        model.blocks[2].mlp.fc2.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteActivationError, match=r"block 2 gave NaN.*batch 0 \(float32\)"):
        select_layers(model, loader(), 1)
    with pytest.raises(NonFiniteActivationError, match=r"blocks\[2\]\.mlp.*batch 0 \(float32\)"):
        profile_layers(model, loader())


@pytest.mark.parametrize("name", ["eva02", "beit"])
def test_too_few_images_in_every_family(name):
    model = build(name)
    for data in ([], [(images(0), torch.arange(0))]):
        with pytest.raises(ValueError, match="no images"):
            profile_layers(model, data)
        with pytest.raises(ValueError, match="no images"):
            select_layers(model, data, 1)
    with pytest.raises(ValueError, match="one image"):
        profile_layers(model, [images(1)])


@pytest.mark.parametrize("name", ["eva02", "beit"])
def test_no_attention_left_and_no_norm(name):
    model = build(name)
    if not isinstance(model.norm, nn.Identity):
        model.norm = nn.Identity()
    model.fc_norm = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"no norm after its last block.*4-fold.*residual_scale=1\.0"):
        convert_vit(model, (0, 1), residual_scale=2.0)
    with pytest.raises(UnsupportedModelError, match=r"residual_scale=1\.0"):
        dilute(model, (0, 1))
    assert convert_vit(model, (0, 1)).lambda_kernels_info.residual_scale == 1.0
    model.global_pool = "token"
    with pytest.raises(ValueError, match="all 4 blocks cuts the class token off"):
        convert_vit(model, range(4))
    with pytest.warns(UserWarning, match="the last 2 block"):
        convert_vit(model, (2, 3))


def test_a_full_checkpoint_does_not_go_into_a_converted_model():
    for name in ("eva02", "beit"):
        model = build(name)
        with pytest.raises(RuntimeError, match=r"blocks\.1 has lost its attention.*Load a full checkpoint"):
            convert_vit(model, (1,)).load_state_dict(model.state_dict())
