"""Stochastic depth in the fused blocks: the samples that timm drops, in one operator with the MLP."""

from __future__ import annotations

import pytest
import torch
from mlp_cases import DEVICE, relative_error
from small_models import images, small_vit
from torch import nn

from lambda_kernels import AttentionFreeBlock, FusedMlp, convert_vit
from lambda_kernels.ops.ln_mlp import tracing

ARCHITECTURES = {"vit": "vit_tiny_patch16_224", "deit3": "deit3_small_patch16_224"}


def build(name: str = "vit", **options: object) -> nn.Module:
    return small_vit(ARCHITECTURES[name], num_heads=3, **options)


@pytest.mark.parametrize("name", ["vit", "deit3"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_drop_path_is_fused_and_drops_the_samples_that_timm_drops(name, dtype, mlp_calls):
    model = build(name, drop_path_rate=0.5).train()
    converted = convert_vit(model, remove=())
    results = []
    for each in (model, converted):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            results.append(each(images(8)))
    assert torch.equal(*results)
    assert len(mlp_calls) == 4
    assert [call["branch_scale"] is None for call in mlp_calls] == [True, False, False, False]  # timm's first rate is 0
    factors = {float(f) for call in mlp_calls[1:] for f in call["branch_scale"].flatten()}
    assert 0.0 in factors
    assert max(factors) > 1.0


def test_drop_path_without_scaling(mlp_calls):
    model = build(drop_path_rate=0.5).train()
    model.blocks[3].drop_path2.scale_by_keep = False
    converted = convert_vit(model, remove=())
    results = []
    for each in (model, converted):
        torch.manual_seed(3)
        results.append(each(images(8)))
    assert torch.equal(*results)
    assert set(mlp_calls[3]["branch_scale"].flatten().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("name", ["vit", "deit3"])
@pytest.mark.parametrize("kind", ["kept", "removed"])
def test_by_the_kernels(name, kind):
    """Forward and every gradient as by the modules, with the same samples dropped."""
    block = build(name, drop_path_rate=0.5).blocks[3].to(DEVICE).train()
    make = FusedMlp.from_block if kind == "kept" else AttentionFreeBlock.from_block
    x = torch.randn(6, 5, 48, device=DEVICE, requires_grad=True)
    results = []
    for options in ({"fuse": False}, {"backend": "triton"}):
        new = make(block, **options)
        torch.manual_seed(4)
        with tracing.recorded() as ran:
            out = new(x)
            gradients = torch.autograd.grad(out.square().sum(), [x, *new.parameters()])
        results.append([out.detach(), *gradients])
    assert any(entry.startswith("hidden_gradient") for entry in ran)
    for theirs, ours in zip(*results, strict=True):
        assert relative_error(ours, theirs.double()) < 1e-5
