"""torch.jit.script and torch.fx.symbolic_trace: they follow a model converted with fuse="none", and name the remedy else."""

from __future__ import annotations

import pytest
import timm
import torch
from small_models import images, small_vit

from lambda_kernels import UnsupportedModelError, convert_vit
from lambda_kernels.blocks.structure import inspect_model

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")]

MODELS = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {"init_values": 0.1},
    "eva02_tiny_patch14_224": {"img_size": 28},
    "beit_base_patch16_224": {},
    "vit_small_patch16_dinov3": {},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_without_fusion_is_scripted(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    full = small_vit(name, scriptable=True, **MODELS[name])
    x = images(size=MODELS[name].get("img_size", 32))
    model = convert_vit(full, (0, 2), residual_scale=2.0, fuse="none")
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    assert inspect_model(model).removed == (0, 2)  # the original has its own blocks
    if name == "vit_tiny_patch16_224":
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("fuse", ["removed", "all"])
def test_fused_blocks_name_the_remedy(fuse):
    model = convert_vit(small_vit(scriptable=True), (1,), fuse=fuse)
    with pytest.raises(UnsupportedModelError, match=r"torch\.jit\.script cannot follow a fused block.*fuse='none'"):
        torch.jit.script(model)
    with pytest.raises(TypeError, match=r"torch\.fx\.symbolic_trace cannot follow this operator.*fuse='none'"):
        torch.fx.symbolic_trace(model)
