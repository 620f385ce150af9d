"""The MLP halves that timm's models have: those that a kernel serves, those that PyTorch runs, and the reason that is shown."""

from __future__ import annotations

import entry_points
import pytest
import timm
import torch
from entry_points import attention_free, picture
from small_models import small_vit
from torch import nn

from lambda_kernels import BackendUnavailableError, convert_vit, from_pretrained, save_pretrained
from lambda_kernels.convert.conversion import describe_blocks
from lambda_vit import dilute, finish_dilution
from lambda_vit.measure.comparison import kernel_paths, path_lines

pytestmark = pytest.mark.models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# module, entry point, what `ln_mlp` is asked for; or the reason for which timm's modules run.
FUSED = {
    "exact GELU": ("vision_transformer", "vit_base_patch16_224", "none"),
    "exact GELU with LayerScale": ("deit", "deit3_base_patch16_224", "none"),
    "exact GELU in EvaBlock": ("eva", "eva_giant_patch14_224", "none"),
    "exact GELU in beit.Block": ("beit", "beit_base_patch16_224", "none"),
    "tanh GELU": ("vision_transformer", "vit_base_patch32_siglip_256", "tanh"),
}
MODULES = {
    "QuickGELU": ("vision_transformer", "vit_base_patch16_clip_quickgelu_224", "the activation is QuickGELU, not GELU"),
    "GEGLU": ("vitamin", "vitamin_small_224", "mlp is GeGluMlp, not Mlp"),
    "SwiGLU and RmsNorm": ("vision_transformer", "aimv2_large_patch14_224", "mlp is SwiGLU, not Mlp"),
    "packed SwiGLU": ("vision_transformer", "vit_giant_patch14_dinov2", "mlp is GluMlp, not Mlp"),
    "SwiGLU in EvaBlock": ("eva", "eva02_base_patch14_224", "mlp is SwiGLU, not Mlp"),
    "packed SwiGLU in EvaBlock": ("eva", "eva02_tiny_patch14_224", "mlp is GluMlp, not Mlp"),
    "RmsNorm": ("vision_transformer", "test_vit4", "norm2 is RmsNorm, not LayerNorm"),
    "a norm inside": ("vision_transformer", "beit3_base_patch16_224", "mlp has a norm between its layers"),
}


def build(module: str, name: str) -> nn.Module:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return entry_points.build(name, module)


@pytest.mark.parametrize("variant", FUSED)
@torch.no_grad()
def test_those_that_a_kernel_serves(variant, mlp_calls):
    module, name, approximate = FUSED[variant]
    model = build(module, name)
    converted = convert_vit(model, (1,), backend="torch")
    found = converted(picture(model))
    assert [call["approximate"] for call in mlp_calls] == [approximate] * 4
    assert [row.mlp for row in converted.lambda_kernels_info.blocks] == ["torch"] * 4
    model.blocks[1].forward = attention_free(model.blocks[1])
    assert torch.allclose(found, model(picture(model)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["exact GELU in EvaBlock", "exact GELU in beit.Block", "tanh GELU"])
@torch.no_grad()
def test_by_the_kernels_themselves(variant, mlp_calls):
    pytest.importorskip("triton")
    module, name, _ = FUSED[variant]
    model = build(module, name).to(DEVICE)
    converted = convert_vit(model, (1,), backend="triton")
    assert [row.mlp for row in converted.lambda_kernels_info.blocks] == ["triton"] * 4
    plain = convert_vit(model, (1,), backend="torch")
    x = picture(model, 1).to(DEVICE)
    assert torch.allclose(converted(x), plain(x), rtol=1e-3, atol=1e-3)
    assert {call["backend"] for call in mlp_calls} == {"triton", "torch"}


@pytest.mark.parametrize("variant", MODULES)
@torch.no_grad()
def test_those_that_pytorch_runs_say_why(variant, mlp_calls):
    module, name, reason = MODULES[variant]
    model = build(module, name)
    converted = convert_vit(model, (1,))
    rows = converted.lambda_kernels_info.blocks
    assert [row.mlp for row in rows] == ["modules"] * 4
    assert [row.attention for row in rows] == ["kept", "removed", "kept", "kept"]
    for row in (*rows, *describe_blocks(converted)):
        assert reason in row.reason
    assert all(reason in line for line in path_lines(kernel_paths(converted)))
    assert converted.lambda_kernels_info.to_dict()["blocks"][0]["reason"] == rows[0].reason
    found = converted(picture(model))
    assert not mlp_calls
    model.blocks[1].forward = attention_free(model.blocks[1])
    assert torch.allclose(found, model(picture(model)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", MODULES)
def test_kernels_asked_for_by_name_are_refused_with_the_reason(variant):
    pytest.importorskip("triton")
    module, name, reason = MODULES[variant]
    model = build(module, name).to(DEVICE)
    before = list(model.blocks)
    for remove in ((), (1,)):
        with pytest.raises(BackendUnavailableError, match=r"triton.*blocks \[0, 1, 2, 3\]: .*auto") as caught:
            convert_vit(model, remove, backend="triton", inplace=True)
        assert reason in str(caught.value)
    with pytest.raises(BackendUnavailableError, match=r"blocks \[1\]: "):
        convert_vit(model, (1,), fuse="removed", backend="triton", inplace=True)
    assert list(model.blocks) == before
    assert not hasattr(model, "lambda_kernels_info")
    assert [row.mlp for row in convert_vit(model, (1,), fuse="none", backend="triton").lambda_kernels_info.blocks] == [
        "timm", "modules", "timm", "timm",
    ]  # fmt: skip


def test_what_is_asked_of_the_kernels_by_name(tmp_path):
    pytest.importorskip("triton")
    model = small_vit(proj_drop_rate=0.1).train().to(DEVICE)
    model.blocks[0].register_forward_hook(lambda *_: None)
    converted = convert_vit(model, (1,), backend="triton")  # dropout is of training alone; block 0 keeps its hook
    assert [row.mlp for row in converted.lambda_kernels_info.blocks] == ["timm", "triton", "triton", "triton"]
    model.blocks[2].mlp.act = nn.SiLU()
    with pytest.raises(BackendUnavailableError, match=r"blocks \[2\]: the activation is SiLU, not GELU"):
        convert_vit(model, (1,), backend="triton")
    assert convert_vit(model, (1,), fuse="removed", backend="triton").lambda_kernels_info.blocks[1].mlp == "triton"
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendUnavailableError, match=r"blocks \[1\]: a hook or a replaced forward inside the block"):
        convert_vit(model, (1,), fuse="removed", backend="triton")
    diluted = dilute(build("vision_transformer", "vit_giant_patch14_dinov2").to(DEVICE), (1,), lam=0.0)
    with pytest.raises(BackendUnavailableError, match="mlp is GluMlp, not Mlp"):
        finish_dilution(diluted, backend="triton")
    saved = save_pretrained(convert_vit(small_vit("test_vit4"), (1,)), tmp_path)
    with pytest.raises(BackendUnavailableError, match="norm2 is RmsNorm, not LayerNorm"):
        from_pretrained(saved, device=DEVICE, backend="triton")


def test_every_activation_is_one_of_these():
    """No variant that timm's ViTs have is left without a row above."""
    kinds = set()
    for module in ("vision_transformer", "deit", "beit", "naflexvit"):
        if not entry_points.names(module):
            continue
        for model in entry_points.sweep(module)[1].values():
            block = model.blocks[0]
            kinds |= {(type(block.mlp).__name__, type(getattr(block.mlp, "act", None)).__name__)}
    known = set()
    for module, name, _ in (*FUSED.values(), *MODULES.values()):
        if timm.is_model(name):
            mlp = entry_points.build(name, module).blocks[0].mlp
            known.add((type(mlp).__name__, type(getattr(mlp, "act", None)).__name__))
    assert kinds <= known
