"""Surgery: what comes out equals blocks written by hand, wrong input is refused, refused models are untouched."""

from __future__ import annotations

import copy
import dataclasses
import json
import types
import warnings

import numpy as np
import pytest
import timm
import torch
from small_models import images, small_vit
from torch import nn

from lambda_kernels import (
    AlreadyConvertedError,
    AttentionFreeBlock,
    BackendUnavailableError,
    UnsupportedModelError,
    convert_vit,
)
from lambda_kernels.blocks import mlp_block
from lambda_kernels.convert.conversion import describe_blocks
from lambda_kernels.convert.settings import ConversionSettings
from lambda_kernels.ops.ln_mlp.fused import tuning

pytestmark = pytest.mark.models

MODELS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {"num_heads": 3}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "qk_norm": True}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "tanh": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
    "gated": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": "silu"}),
}


def build(name: str) -> nn.Module:
    architecture, options = MODELS[name]
    return small_vit(architecture, **options)


def run_by_hand(model: nn.Module, x: torch.Tensor, removed: tuple[int, ...], scale: float) -> torch.Tensor:
    """The model's own forward, with the removed blocks' forward written out on timm's modules."""
    model = copy.deepcopy(model)

    def forward(self, x, attn_mask=None, is_causal=False):
        x = scale * x
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    for index in removed:
        model.blocks[index].forward = types.MethodType(forward, model.blocks[index])
    return model(x)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_remove_nothing_changes_nothing(name):
    model = build(name)
    converted = convert_vit(model, remove=())
    assert torch.equal(converted(images()), model(images()))
    assert converted.lambda_kernels_info.removed == ()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
@torch.no_grad()
def test_remove_some_equals_blocks_by_hand(name, scale):
    model = build(name)
    converted = convert_vit(model, remove=(2, 0), residual_scale=scale)
    expected = run_by_hand(model, images(), (0, 2), scale)
    assert float((converted(images()) - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    # and that it is another function than the full model's, or the comparison would say nothing
    assert float((converted(images()) - model(images())).abs().max()) > 1e-2


def test_layer_scale_gammas_count():
    """A LayerScale left out must show: the gammas of the test model are not tiny and not one."""
    model = build("deit3")
    converted = convert_vit(model, remove=(0,))
    with torch.no_grad():
        before = converted(images())
        converted.blocks[0].ls2.gamma.mul_(3)
        assert float((converted(images()) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_drop_path_and_dropout_in_training(scale):
    model = small_vit(drop_path_rate=0.5, proj_drop_rate=0.2).train()
    converted = convert_vit(model, remove=(1, 2, 3)[:2], residual_scale=scale).train()
    torch.manual_seed(3)
    got = converted(images(8))
    torch.manual_seed(3)
    assert torch.equal(got, run_by_hand(model, images(8), (1, 2), scale))
    assert not torch.equal(got, converted(images(8)))
    assert converted.blocks[1].path(torch.device("cpu"), torch.float32).backend == "modules"
    assert "dropout" in converted.blocks[1].path(torch.device("cpu"), torch.float32).reason


def test_gradients_reach_every_parameter_that_is_left():
    model = build("deit3")
    converted = convert_vit(model, remove=(0, 1))
    converted(images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in converted.parameters())


def test_which_path_runs(monkeypatch):
    """ln_mlp serves the eligible blocks, the modules the others; the info says the same."""
    calls = []
    genuine = mlp_block.ln_mlp
    monkeypatch.setattr(mlp_block, "ln_mlp", lambda *a, **k: calls.append(k) or genuine(*a, **k))
    for name, expected, path in (("tanh", 2, "torch"), ("deit3", 2, "torch"), ("gated", 0, "modules")):
        for fuse, kept in (("removed", "timm"), ("all", path)):
            calls.clear()
            converted = convert_vit(build(name), remove=(0, 2), fuse=fuse)
            converted(images())
            rows = converted.lambda_kernels_info.blocks
            assert len(calls) == expected * (2 if fuse == "all" else 1)
            assert [row.mlp for row in rows] == [path, kept] * 2
            assert [row.attention for row in rows] == ["removed", "kept"] * 2
    assert "GluMlp" in rows[0].reason
    assert "GluMlp" in rows[1].reason
    calls.clear()
    converted = convert_vit(build("tanh"), remove=(0,))
    converted(images())
    assert calls[0]["approximate"] == "tanh"
    calls.clear()
    convert_vit(build("vit"), remove=(0, 2), fuse="none")(images())
    assert not calls


def test_parts_changed_after_conversion_count():
    """An adapter around a linear, another activation, a backward hook: what is there when it runs is what runs."""

    class Louder(nn.Linear):
        def forward(self, x):
            return 100 * super().forward(x)

    converted = convert_vit(build("vit"), remove=(0,))
    block, before = converted.blocks[0], converted(images())
    plain = block.mlp.fc1
    block.mlp.fc1 = Louder(48, 192)
    block.mlp.fc1.load_state_dict(plain.state_dict())
    assert block.path(torch.device("cpu"), torch.float32).backend == "modules"
    assert not torch.allclose(converted(images()), before, atol=1e-3)
    block.mlp.fc1 = plain
    assert torch.equal(converted(images()), before)
    block.mlp.act = nn.ReLU()
    assert "ReLU" in block.path(torch.device("cpu"), torch.float32).reason
    assert not torch.allclose(converted(images()), before, atol=1e-3)
    block.mlp.act = nn.GELU()
    fired = []
    block.mlp.register_full_backward_hook(lambda module, grads, outputs: fired.append(module))
    converted(images()).sum().backward()
    assert fired == [block.mlp]


def test_the_info_speaks_of_eval_mode():
    model = small_vit(proj_drop_rate=0.2).train()
    converted = convert_vit(model, remove=(1,))
    assert converted.lambda_kernels_info.blocks[1].mlp == "torch"
    assert "dropout" in converted.blocks[1].path(torch.device("cpu"), torch.float32).reason
    converted.double()
    assert "float64" in describe_blocks(converted)[1].reason
    assert "float64" not in converted.lambda_kernels_info.blocks[1].reason


def test_hooks_inside_a_removed_block_still_fire():
    converted = convert_vit(build("vit"), remove=(0,))
    seen = []
    handle = converted.blocks[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    hooked = converted(images())
    handle.remove()
    assert seen == [torch.Size([4, 5, 48])]
    assert torch.allclose(converted(images()), hooked, atol=1e-5)


def test_parameters_are_gone():
    model = timm.create_model("deit_base_patch16_224")
    converted = convert_vit(model, remove=(0, 1, 3, 4, 6))
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    assert sum(p.numel() for p in converted.parameters()) == 86_567_656 - 5 * 2_363_904
    keys = converted.state_dict().keys()
    assert not any(key.startswith(("blocks.0.attn", "blocks.0.norm1", "blocks.6.attn")) for key in keys)
    assert set(keys) < set(model.state_dict().keys())
    assert isinstance(converted.blocks, nn.Sequential)


def test_copy_or_in_place():
    model = build("vit")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    converted = convert_vit(model, remove=(0,))
    assert converted is not model
    assert converted.blocks[1].mlp.fc1.weight is not model.blocks[1].mlp.fc1.weight
    assert model.state_dict().keys() == before.keys()
    assert convert_vit(model, remove=(0,), inplace=True) is model
    assert type(model.blocks[0]) is AttentionFreeBlock


def test_mask_and_compile_and_checkpointing():
    converted = convert_vit(build("vit"), remove=(1,))
    expected = converted(images())
    assert converted.blocks[1](torch.zeros(1, 5, 48), attn_mask=None, is_causal=True).shape == (1, 5, 48)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images()), expected, atol=1e-5)
    converted.set_grad_checkpointing()
    assert torch.allclose(converted(images()), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        ((0, 4), ["4", "0 to 3"]),
        ((-1,), ["-1", "0 to 3"]),
        ((1, 1), ["1 twice"]),
        ((True,), ["True", "integers"]),
        (torch.tensor([True, False]), ["True", "integers"]),
        (("1",), ["'1'", "integers"]),
        ("0,1", ["'0,1'"]),
        ((1.0,), ["1.0"]),
        (3, ["3", "sequence"]),
        (None, ["None"]),
        ((0, 1, 2, 3), ["class token", "Retain the attention of at least one block"]),
    ],
)
def test_wrong_indices(remove, words):
    model = build("vit")
    with pytest.raises(ValueError, match="remov") as caught:
        convert_vit(model, remove=remove, inplace=True)
    for word in words:
        assert word in str(caught.value)
    assert all(type(block) is not AttentionFreeBlock for block in model.blocks)


def test_numpy_indices_and_a_selection():
    import numpy as np

    from lambda_vit import Selection

    assert convert_vit(build("vit"), remove=np.array([2, 0])).lambda_kernels_info.removed == (0, 2)
    assert convert_vit(build("vit"), remove=Selection((2, 1))).lambda_kernels_info.removed == (1, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"residual_scale": 0}, ["residual_scale", "0"]),
        ({"residual_scale": float("nan")}, ["residual_scale", "nan"]),
        ({"residual_scale": "2"}, ["residual_scale", "'2'"]),
        ({"fuse": "some"}, ["fuse", "'some'", "'removed'"]),
        ({"backend": "cuda"}, ["backend", "'cuda'"]),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        convert_vit(build("vit"), remove=(0,), **options)
    for word in words:
        assert word in str(caught.value)


def test_a_backend_by_name_raises_and_leaves_the_model_alone():
    model = build("vit").double()  # which no kernel takes, wherever it runs
    for remove in ((0,), ()):
        with pytest.raises(BackendUnavailableError, match="triton"):
            convert_vit(model, remove=remove, backend="triton", inplace=True)
    assert {type(block) for block in model.blocks} == {timm.models.vision_transformer.Block}
    assert not hasattr(model, "lambda_kernels_info")


def test_already_converted():
    model = convert_vit(build("vit"), remove=(0, 2))
    assert convert_vit(model, remove=(2, 0)) is model
    with pytest.raises(BackendUnavailableError):
        convert_vit(copy.deepcopy(model).double(), remove=(0, 2), backend="triton")
    other = convert_vit(model, remove=(0, 2), fuse="none")
    assert other is not model
    assert [row.mlp for row in other.lambda_kernels_info.blocks] == ["modules", "timm"] * 2
    assert torch.allclose(other(images()), model(images()), atol=1e-5)
    for remove, scale in (((0, 1), 1.0), ((0, 2), 2.0)):
        with pytest.raises(AlreadyConvertedError) as caught:
            convert_vit(model, remove=remove, residual_scale=scale)
        assert "[0, 2]" in str(caught.value)
        assert str(list(remove)) in str(caught.value)


REFUSED = {
    "swin_tiny_patch4_window7_224": ["SwinTransformer", "window"],
    "cait_xxs24_224": ["LayerScaleBlock", "talking-heads"],
    "vit_relpos_small_patch16_224": ["RelPosBlock", "relative position biases"],
    "convit_tiny": ["timm.models.convit.Block", "positional"],
    "xcit_nano_12_p16_224": ["XCABlock", "channels"],
    "tnt_s_legacy_patch16_224": ["timm.models.tnt.Block", "inner"],
    "samvit_base_patch16": ["timm.models.vision_transformer_sam.Block", "windows"],
    "vit_base_patch16_18x2_224": ["ParallelThingsBlock", "several"],
    "volo_d1_224": ["VOLO", "outlook"],
    "resnet18": ["ResNet", "convolutional"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models(name):
    if not timm.is_model(name.split(".")[0]):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = timm.create_model(name.split(".")[0])
    before = str(model)
    with pytest.raises(UnsupportedModelError) as caught:
        convert_vit(model, remove=(0,), inplace=True)
    for word in (*REFUSED[name], "Use a model"):
        assert word in str(caught.value)
    assert str(model) == before


def test_a_subclass_of_block_is_refused():
    class Own(timm.models.vision_transformer.Block):
        pass

    model = build("vit")
    model.blocks[2] = Own(48, 3)
    with pytest.raises(UnsupportedModelError, match=r"blocks\[2\].*subclass"):
        convert_vit(model, remove=(0,))


def test_wrappers_are_refused_with_the_remedy(tmp_path):
    compiled = torch.compile(build("vit"), backend="eager")
    with pytest.raises(UnsupportedModelError, match="_orig_mod"):
        convert_vit(compiled, remove=(0,))
    with pytest.raises(UnsupportedModelError, match=r"model\.module"):
        convert_vit(nn.DataParallel(build("vit")), remove=(0,))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(UnsupportedModelError, match=r"DistributedDataParallel.*model\.module"):
            convert_vit(nn.parallel.DistributedDataParallel(build("vit")), remove=(0,))
    finally:
        torch.distributed.destroy_process_group()
    features = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=32)
    with pytest.raises(UnsupportedModelError, match="convert the whole model first"):
        convert_vit(features, remove=(0,))
    with pytest.raises(TypeError, match="dict"):
        convert_vit({}, remove=(0,))


def test_no_final_norm_needs_scale_one():
    model = small_vit(final_norm=False)
    assert convert_vit(model, remove=(0,)).lambda_kernels_info.removed == (0,)
    with pytest.raises(UnsupportedModelError, match=r"residual_scale=1\.0"):
        convert_vit(model, remove=(0,), residual_scale=2.0)


def test_warnings():
    hooked = build("vit")
    hooked.blocks[1].register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match=r"hooks on blocks \[1\] are gone"):
        convert_vit(hooked, remove=(0, 1))
    with pytest.warns(UserWarning, match="last 2 block"):
        convert_vit(build("vit"), remove=(2, 3))
    small = build("deit3")
    with torch.no_grad():
        small.blocks[1].ls2.gamma.fill_(1e-4)
    with pytest.warns(UserWarning, match=r"blocks \[1\].*LayerScale"):
        convert_vit(small, remove=(0, 1), residual_scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_vit(build("average"), remove=(2, 3))
        convert_vit(build("deit3"), remove=(0,), residual_scale=2.0)


def test_average_pooling_may_lose_all_attention():
    converted = convert_vit(build("average"), remove=(0, 1, 2, 3))
    assert not torch.allclose(converted(images(1, seed=1)), converted(images(1, seed=2)))


def test_the_info_tells_which_kernels_were_chosen():
    from mlp_cases import DEVICE

    converted = convert_vit(build("vit").to(DEVICE), remove=(1,), backend="triton")
    info = converted.lambda_kernels_info
    assert info.widths == ((48, 192),)
    tuning.clear()
    assert info.kernels == ()
    with tuning.forced(forward="staged", fc2="library"), torch.no_grad():
        converted(images().to(DEVICE))
    assert any(line.startswith("fc2, ") and "library (forced)" in line for line in info.kernels)
    assert json.loads(json.dumps(info.to_dict()))["kernels"] == list(info.kernels)


def test_settings_are_checked_once_and_do_not_change():
    settings = ConversionSettings(residual_scale=2, tome_r=[4, np.int64(2)])
    assert (settings.residual_scale, settings.tome_r) == (2.0, (4, 2))
    assert type(settings.tome_r[1]) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.fuse = "none"
    for wrong, words in (({"residual_scale": True}, "got True"), ({"tome_start": -1}, "of at least 0; got -1")):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(settings, **wrong)


def test_the_info_holds_the_settings_of_the_next_conversion():
    model = convert_vit(small_vit(), (1,), residual_scale=2.0, fuse="removed", recompute="none", tome_r=1, tome_start=0)
    info = model.lambda_kernels_info
    assert info.settings == ConversionSettings(
        residual_scale=2.0, fuse="removed", recompute="none", tome_r=1, tome_start=0
    )
    resolved = ConversionSettings.resolve(model, tome_r=None, tome_start=None, fuse="none")
    assert resolved == ConversionSettings(fuse="none", tome_r=1, tome_start=0)
    assert convert_vit(model, (1,), **dataclasses.asdict(info.settings)) is model
