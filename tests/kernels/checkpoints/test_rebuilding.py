"""What can be read off a model that timm built is enough to build it again, for every family of models."""

from __future__ import annotations

import threading

import pytest
import timm
import torch
from small_models import images, small_vit
from torch import nn

from lambda_kernels import from_pretrained, save_pretrained
from lambda_kernels.checkpoints.comparison import find_difference
from lambda_kernels.checkpoints.rebuilding import find_mlp_ratio, find_model_args, infer_args

pytestmark = pytest.mark.models

# Older timm reads its drop-path rates off a tensor, which one without memory does not have.
BUILDS_ON_META = hasattr(timm.models, "resolve_model_input_args")
SIZES = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7, "mlp_ratio": 2.5, "drop_path_rate": 0.25}
OTHERS = {
    "ViT": ("vit_tiny_patch16_224", {"img_size": 32, "init_values": 0.1, "qk_norm": True}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "reg_tokens": 2, "patch_drop_rate": 0.1}),
    "Eva": ("eva_giant_patch14_224", {"img_size": 28, "qkv_bias": False, "drop_rate": 0.1}),
    "Eva with a gated MLP": ("eva02_tiny_patch14_224", {"img_size": (28, 42), "class_token": False}),
    "BEiT": ("beit_base_patch16_224", {"img_size": 32, "init_values": None, "pos_drop_rate": 0.1}),
    "NaFlexViT": ("naflexvit_base_patch16_gap", {"patch_size": 8, "pos_embed_grid_size": (4, 6), "attn_drop_rate": 0.1}),
    "NaFlexViT with a class token": ("naflexvit_base_patch16_parfac_gap", {"class_token": True, "reg_tokens": 1}),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_is_built_again_from_what_can_be_seen(family):
    name, options = OTHERS[family]
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = timm.create_model(name, **{**SIZES, **options})
    default = timm.create_model(name, **{key: SIZES[key] for key in ("embed_dim", "depth", "num_heads")})
    changed = {k: v for k, v in infer_args(model).items() if v != infer_args(default).get(k)}
    rebuilt = timm.create_model(name, **{key: SIZES[key] for key in ("embed_dim", "depth", "num_heads")}, **changed)
    assert find_difference(rebuilt, model) is None
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    if BUILDS_ON_META:
        with torch.device("meta"):
            assert find_difference(timm.create_model(name, **{**SIZES, **options}), model) is None
    assert find_difference(default, model) is not None
    assert "pre_norm" not in changed  # nor anything else that was left alone


def test_building_leaves_other_threads_and_default_devices_alone(tmp_path):
    """Parameters of the rebuilt model have no memory at first; those of modules that another thread makes do."""
    model = small_vit()
    save_pretrained(model, tmp_path)
    stop, wrong = threading.Event(), []

    def make_modules():
        while not stop.is_set():
            wrong.extend(p for p in nn.Linear(2, 2).parameters() if p.is_meta)

    other = threading.Thread(target=make_modules)
    other.start()
    try:
        for _ in range(5):
            from_pretrained(tmp_path)
    finally:
        stop.set()
        other.join()
    assert not wrong
    with torch.device("meta"):
        loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(images()), model(images()))


def test_given_arguments_win_over_what_is_seen():
    model = small_vit(mlp_ratio=2.5)
    architecture = model.pretrained_cfg["architecture"]
    cfg = {"input_size": [3, 224, 224]}
    assert find_model_args(model, architecture, cfg, {})["mlp_ratio"] == 2.5
    assert find_model_args(model, architecture, cfg, {"mlp_ratio": 3.0})["mlp_ratio"] == 3.0


def test_a_ratio_gives_the_width_back():
    """The quotient of two integers times the one is not always the other; 49·(1/49) is below 1."""
    assert int(49 * (1 / 49)) == 0
    for channels in (*range(1, 200), 384, 768, 1152, 1408, 1664):
        for hidden in (1, channels, 3 * channels + 1, 4304, 6144):
            assert int(channels * find_mlp_ratio(channels, hidden)) == hidden


def test_differences_are_named():
    model = small_vit()
    assert find_difference(small_vit(), model) is None
    assert "head" in find_difference(small_vit(num_classes=3), model)
    other = small_vit()
    other.blocks[2].mlp.act = nn.SiLU()
    assert find_difference(model, other) == "blocks.2.mlp.act is SiLU(), timm builds GELU(approximate='none')"
    other = small_vit()
    other.extra = nn.Identity()
    assert find_difference(model, other) == "extra exists only in the model"
    other = small_vit()
    torch.compile(other, backend="eager")  # leaves a mark on what it is given, and changes nothing of it
    assert find_difference(model, other) is None
    other = small_vit()
    other.no_embed_class = True
    assert "no_embed_class is True" in find_difference(model, other)
    other = small_vit()
    other.cls_token = nn.Parameter(torch.zeros(1, 2, 48))
    assert find_difference(model, other) == "cls_token has shape [1, 2, 48], timm builds [1, 1, 48]"
    assert "timm builds Linear" in find_difference(nn.Linear(2, 2), nn.Identity())
