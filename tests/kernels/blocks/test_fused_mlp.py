"""Blocks that keep their attention and run their MLP half through `ln_mlp`: timm's own function, bit for bit."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from small_models import images, small_vit
from timm.models.vision_transformer import Block
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from lambda_kernels import AttentionFreeBlock, FusedMlp, convert_vit, from_pretrained, save_pretrained
from lambda_kernels.blocks.mlp_block import find_replacement_obstacles
from lambda_kernels.blocks.structure import inspect_model
from lambda_kernels.convert.conversion import describe_blocks
from lambda_vit import dilute, finetune, finish_dilution, select_layers, set_lambda, transfer_entropy
from lambda_vit.measure.accuracy import evaluate
from lambda_vit.measure.comparison import kernel_paths
from lambda_vit.measure.cost import cost
from lambda_vit.measure.layer_profile import profile_layers
from lambda_vit.models.views import skip_attention

pytestmark = pytest.mark.models

MODELS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {"num_heads": 3}),
    "qk-norm": ("vit_tiny_patch16_224", {"reg_tokens": 2, "qk_norm": True}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "tanh": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
    "no biases": ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
}
CPU = torch.device("cpu")


def build(name: str = "vit", **options: object) -> nn.Module:
    architecture, own = MODELS[name]
    return small_vit(architecture, **own, **options)


def fused(name: str = "vit", **options: object) -> nn.Module:
    return convert_vit(build(name, **options), remove=())


def loader() -> list:
    return [(images(8, seed=seed), torch.arange(8)) for seed in (0, 1)]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_block_gives_timms_own_bits(name, mlp_calls):
    model = build(name)
    x = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    mask |= torch.eye(7, dtype=torch.bool)
    accepted = inspect.signature(Block.forward).parameters
    options = [{}]
    if "attn_mask" in accepted:  # timm 1.0.15 has no masks
        options += [{"attn_mask": None}, {"attn_mask": mask}, {"attn_mask": torch.randn(1, 1, 7, 7)}]
    if "is_causal" in accepted:
        options += [{"is_causal": True}, {"attn_mask": None, "is_causal": False}]
    for fused_attention in (True, False):
        block = model.blocks[1]
        block.attn.fused_attn = fused_attention
        twin = FusedMlp.from_block(block)
        for arguments in options:
            assert torch.equal(twin(x, **arguments), block(x, **arguments)), arguments
        if "attn_mask" in accepted:
            assert torch.equal(twin(x, mask), block(x, mask))
            assert not torch.equal(twin(x, attn_mask=mask), twin(x))
    assert len(mlp_calls) == 2 * (len(options) + 3 * ("attn_mask" in accepted))


def test_mask_arguments_that_timms_block_refuses_are_refused():
    block = build().blocks[0]
    twin, x = FusedMlp.from_block(block), torch.zeros(1, 5, 48)
    arguments = [{"unheard_of": 1}]
    if "is_causal" not in inspect.signature(Block.forward).parameters:
        arguments.append({"is_causal": True})
    for options in arguments:
        for each in (block, twin):
            with pytest.raises(TypeError, match=next(iter(options))):
                each(x, **options)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_gives_timms_own_bits(name, mlp_calls):
    model = build(name)
    converted = convert_vit(model, remove=())
    assert [type(block) for block in converted.blocks] == [FusedMlp] * 4
    assert torch.equal(converted(images()), model(images()))
    assert len(mlp_calls) == 4
    rows = converted.lambda_kernels_info.blocks
    assert [(row.attention, row.mlp) for row in rows] == [("kept", "torch")] * 4
    assert kernel_paths(converted)[0]["reason"] == rows[0].reason != ""
    mlp_calls.clear()
    part = convert_vit(model, remove=(1,), residual_scale=2.0)
    plain = convert_vit(model, remove=(1,), residual_scale=2.0, fuse="removed")
    assert torch.equal(part(images()), plain(images()))
    assert len(mlp_calls) == 4 + 1
    assert [row.attention for row in part.lambda_kernels_info.blocks] == ["kept", "removed", "kept", "kept"]
    assert [row.mlp for row in plain.lambda_kernels_info.blocks] == ["timm", "torch", "timm", "timm"]
    assert plain.lambda_kernels_info.blocks[0].reason == "fuse='removed'"


def test_gradients_are_timms(mlp_calls):
    for name in ("deit3", "qk-norm"):
        model, converted = build(name), fused(name)
        for each in (model, converted):
            each(images()).square().sum().backward()
        theirs, ours = dict(model.named_parameters()), dict(converted.named_parameters())
        assert list(ours) == list(theirs)
        for key, parameter in ours.items():
            assert torch.equal(parameter.grad, theirs[key].grad), key
    assert len(mlp_calls) == 8


@pytest.mark.parametrize("name", ["vit", "deit3"])
def test_training_with_drop_path_and_dropout(name, mlp_calls):
    options = {"drop_path_rate": 0.5, "proj_drop_rate": 0.2, "attn_drop_rate": 0.1}
    model = build(name, **options).train()
    converted = convert_vit(model, remove=())
    results = []
    for each in (model, converted):
        torch.manual_seed(3)
        results.append(each(images(8)))
    assert torch.equal(*results)
    assert not torch.equal(results[0], converted(images(8)))
    assert not mlp_calls
    found = converted.blocks[1].path(CPU, torch.float32)
    assert found.backend == "modules"
    assert "dropout" in found.reason
    assert converted.lambda_kernels_info.blocks[1].mlp == "torch"  # in eval mode
    # without dropout, training runs through ln_mlp
    fused(name).train()(images())
    assert len(mlp_calls) == 4


def test_each_submodules_own_mode_counts():
    """Monte-Carlo dropout: an evaluated model whose dropouts alone are in training mode."""
    model = build(proj_drop_rate=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    converted = convert_vit(model, remove=())
    assert "dropout is active" in converted.blocks[0].path(CPU, torch.float32).reason
    results = []
    for each in (model, converted):
        torch.manual_seed(1)
        results.append(each(images()))
    assert torch.equal(*results)
    frozen = build(drop_path_rate=0.5).train()
    for block in frozen.blocks:
        block.drop_path2.eval()
    converted = convert_vit(frozen, remove=())
    with torch.no_grad():
        x = torch.randn(4, 5, 48)
        assert torch.equal(converted.blocks[3]._mlp_half(x), converted.blocks[3]._mlp_half(x))


def test_what_is_inside_when_it_runs_is_what_runs():
    """Other modules, another forward, other dtypes: as timm's block would compute it, and the reason says why."""

    class Quiet(nn.Module):
        def forward(self, x):
            return 0.1 * x

    def other_drop_path(block):
        block.drop_path2 = Quiet()

    def other_forward(block):
        forward = block.mlp.fc1.forward
        block.mlp.fc1.forward = lambda x: 2 * forward(x)

    def hook_on_the_norm_within_the_mlp(block):
        block.mlp.norm.register_forward_hook(lambda module, args, output: 2 * output)

    def norm_in_float32(block):
        block.bfloat16().norm2.float()

    def layer_scale_in_float32(block):
        block.bfloat16().ls2.float()

    changes = {
        layer_scale_in_float32: "different dtypes",
        other_drop_path: "drop_path2 is Quiet",
        other_forward: "replaced forward",
        hook_on_the_norm_within_the_mlp: "hook",
        norm_in_float32: "different dtypes",
    }
    for change, words in changes.items():
        block, x = FusedMlp.from_block(build("deit3").blocks[0]), torch.randn(2, 5, 48)
        before = block(x)
        change(block)
        x = x.to(block.mlp.fc1.weight.dtype)
        choice = block.path(CPU, x.dtype)
        assert choice.backend == "modules"
        assert words in choice.reason
        result = block(x)
        assert torch.equal(result, block.to_timm()(x)), words
        assert "dtypes" in words or not torch.allclose(result, before, atol=1e-3)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        block, x = FusedMlp.from_block(build("deit3").blocks[0]), torch.randn(2, 5, 48)
        block.to_timm()(x)
        theirs = [kind for kind in seen if kind is not Block]
        seen.clear()
        block(x)
        assert [kind for kind in seen if kind is not FusedMlp] == theirs
    finally:
        handle.remove()
    weight = nn.Parameter(TwoTensor(block.mlp.fc1.weight.detach(), block.mlp.fc1.weight.detach()))
    block = FusedMlp.from_block(build().blocks[0])
    block.mlp.fc1.weight = weight  # as libraries do that quantize or shard
    assert "wrapped" in block.path(CPU, torch.float32).reason


def test_names_order_and_optimizer_groups_survive():
    model = build("deit3")
    before = [(name, id(p)) for name, p in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    converted = convert_vit(model, remove=(), inplace=True)
    assert converted is model
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert [name for name, _ in model.named_modules()] == modules
    assert list(model.state_dict()) == keys
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [key for _, key in before]
    assert list(model.blocks[0]._modules) == list(Block(48, 3)._modules)
    model.load_state_dict(build("deit3").state_dict())
    assert model.blocks[0].attn.num_heads == 3
    assert model.blocks[0].mlp.fc1.out_features == 192
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    expected = param_groups_layer_decay(build("deit3"), layer_decay=0.5)
    assert [(g["lr_scale"], len(g["params"])) for g in groups] == [(g["lr_scale"], len(g["params"])) for g in expected]


def test_modes_are_kept():
    model = build().train()
    model.blocks[1].eval()
    model.blocks[2].mlp.eval()
    before = [module.training for module in model.modules()]
    converted = convert_vit(model, remove=())
    assert [module.training for module in converted.modules()] == before
    back = convert_vit(converted, remove=(), fuse="none")
    assert [module.training for module in back.modules()] == before


@pytest.mark.parametrize("fuse", ["removed", "none"])
def test_turning_back_gives_timms_own_blocks_as_they_are_now(fuse):
    model = build("deit3")
    converted = convert_vit(model, remove=())
    assert convert_vit(converted, remove=()) is converted
    adapted = copy.deepcopy(converted).double()
    adapted.blocks[2].mlp = nn.Sequential(adapted.blocks[2].mlp, nn.Tanh())
    buffer = io.BytesIO()
    torch.save(adapted, buffer)
    buffer.seek(0)
    adapted = torch.load(buffer, weights_only=False)
    back = convert_vit(adapted, remove=(), fuse=fuse)
    assert [type(block) for block in back.blocks] == [Block] * 4
    assert all(vars(block).keys() == vars(Block(48, 3)).keys() for block in back.blocks)
    assert type(back.blocks[2].mlp) is nn.Sequential
    assert torch.equal(back(images().double()), adapted(images().double()))
    assert [row.mlp for row in back.lambda_kernels_info.blocks] == ["timm"] * 4
    assert convert_vit(back, remove=(), fuse=fuse) is back
    # and forth again, in place and with another backend
    again = convert_vit(back, remove=(), backend="torch", inplace=True)
    assert again is back
    assert [row.reason for row in again.lambda_kernels_info.blocks[:2]] == ["requested by name"] * 2
    assert [row.mlp for row in again.lambda_kernels_info.blocks] == ["torch", "torch", "modules", "torch"]
    assert "not Mlp" in again.lambda_kernels_info.blocks[2].reason


def test_some_removed_and_turned_back():
    converted = convert_vit(build(), remove=(1,))
    back = convert_vit(converted, remove=(1,), fuse="removed")
    assert [type(block) for block in back.blocks] == [Block, AttentionFreeBlock, Block, Block]
    assert [row.mlp for row in back.lambda_kernels_info.blocks] == ["timm", "torch", "timm", "timm"]
    assert torch.equal(back(images()), converted(images()))
    assert type(converted.blocks[0]) is FusedMlp


def test_a_block_that_carries_something_of_its_own_stays():
    def scaled(x, attn_mask=None, is_causal=False):
        return 2 * x

    model = build()
    fired = []
    handle = model.blocks[0].register_forward_hook(lambda *args: fired.append(0))
    model.blocks[1].forward = scaled
    model.blocks[2].number = 2
    model.blocks[3].register_buffer("seen", torch.zeros(1))
    converted = convert_vit(model, remove=(), inplace=True)
    assert [type(block) for block in converted.blocks] == [Block] * 4
    rows = converted.lambda_kernels_info.blocks
    assert [row.mlp for row in rows] == ["timm"] * 4
    for row, word in zip(rows, ("hook", "forward", "number", "_buffers"), strict=True):
        assert word in row.reason
    converted(images())
    assert fired == [0]
    # what stood against it is gone: the same call now has something to do
    handle.remove()
    assert convert_vit(converted, remove=(), inplace=True) is converted
    assert [type(block) for block in converted.blocks] == [FusedMlp, Block, Block, Block]
    extended = build().blocks[0]
    extended.adapter = nn.Linear(48, 48)
    assert "adapter" in find_replacement_obstacles(extended)[0]
    hooked = build().blocks[0]
    hooked.register_state_dict_post_hook(lambda *args: None)
    assert find_replacement_obstacles(hooked) == ["a hook on the block itself would be lost"]


def test_a_hook_on_a_fused_block_outlives_other_settings():
    converted = fused()
    fired = []
    handle = converted.blocks[1].register_forward_hook(lambda *args: fired.append(1))
    assert convert_vit(converted, remove=(), fuse="none", inplace=True) is converted
    assert [row.mlp for row in converted.lambda_kernels_info.blocks] == ["timm", "modules", "timm", "timm"]
    converted(images())
    assert fired == [1]
    handle.remove()
    converted(images())
    assert fired == [1]
    convert_vit(converted, remove=(), fuse="none", inplace=True)
    assert [type(block) for block in converted.blocks] == [Block] * 4


def test_a_block_of_another_kind_is_described(mlp_calls):
    diluting = dilute(fused(), (1,))
    rows = describe_blocks(diluting)
    assert [(row.attention, row.mlp) for row in rows] == [("kept", "torch")] * 4
    assert ["still being diluted" in row.reason for row in rows] == [False, True, False, False]
    diluting.blocks[0] = build().blocks[0]
    assert "after the conversion" in describe_blocks(diluting)[0].reason


def test_hooks_inside_fire_and_one_on_the_attention_does_not_stop_the_fusion(mlp_calls):
    converted = fused()
    seen = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
        for name, module in (("attn", converted.blocks[0].attn), ("mlp", converted.blocks[1].mlp))
    ]
    expected = build()(images())
    assert torch.equal(converted(images()), expected)
    assert seen == ["attn", "mlp"]
    assert len(mlp_calls) == 3
    assert [row.mlp for row in describe_blocks(converted)] == ["torch", "modules", "torch", "torch"]
    for handle in handles:
        handle.remove()
    converted(images())
    assert len(mlp_calls) == 3 + 4


def test_losing_the_attention_later(mlp_calls):
    model, converted = build(), convert_vit(build(), remove=(), backend="torch")
    block = AttentionFreeBlock.from_block(converted.blocks[0])
    assert (block.fuse, block.backend, block.residual_scale) == (True, "torch", 1.0)
    assert AttentionFreeBlock.from_block(converted.blocks[0], fuse=False).fuse is False
    assert block.mlp is converted.blocks[0].mlp
    assert inspect_model(converted) == inspect_model(model)
    later = convert_vit(converted, remove=(0, 2), residual_scale=2.0)
    assert inspect_model(later).removed == (0, 2)
    assert later.lambda_kernels_info == convert_vit(model, remove=(0, 2), residual_scale=2.0).lambda_kernels_info
    assert torch.equal(later(images()), convert_vit(model, remove=(0, 2), residual_scale=2.0)(images()))


@pytest.mark.filterwarnings("ignore:the last")
def test_measuring_and_selecting():
    model, converted = build(), fused()
    assert transfer_entropy(converted, loader(), (1, 2)) == transfer_entropy(model, loader(), (1, 2))
    assert select_layers(converted, loader(), 2) == select_layers(model, loader(), 2)
    assert profile_layers(converted, loader()) == profile_layers(model, loader())
    assert torch.equal(skip_attention(converted, (1,))(images()), skip_attention(model, (1,))(images()))
    ours, theirs = evaluate(converted, loader(), reference=model), evaluate(model, loader())
    assert (ours.top1, ours.agreement, ours.kl) == (theirs.top1, 100.0, 0.0)
    assert cost(converted).flops == cost(model).flops
    assert cost(converted).parameters == cost(model).parameters
    assert [type(block) for block in converted.blocks] == [FusedMlp] * 4


@torch.no_grad()
def test_dilution(mlp_calls):
    converted, expected = fused("deit3"), convert_vit(build("deit3"), (0, 2), residual_scale=2.0)
    diluted = dilute(converted, (0, 2))
    assert list(diluted.state_dict()) == list(converted.state_dict())
    assert torch.equal(diluted(images()), converted(images()))
    assert len(mlp_calls) == 4 + 4
    set_lambda(diluted, 0.0)
    finished = finish_dilution(diluted)
    assert torch.equal(finished(images()), expected(images()))
    assert finished.lambda_kernels_info == expected.lambda_kernels_info


def test_finetuning_from_a_fused_model_is_that_from_timms():
    results = [
        finetune(model, loader(), layers=(1,), epochs=2, dilution_epochs=1, seed=1, lr=1e-3)
        for model in (build(), fused())
    ]
    assert [type(block) for block in results[1].model.blocks] == [FusedMlp, AttentionFreeBlock, FusedMlp, FusedMlp]
    ours, theirs = (result.model.state_dict() for result in results)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@torch.no_grad()
def test_features_and_copies(mlp_calls):
    model, converted = build("deit3"), fused("deit3")
    x = images()
    ours, theirs = (each.forward_intermediates(x, indices=[0, 2]) for each in (converted, model))
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(*pair) for pair in zip(ours[1], theirs[1], strict=True))
    ours, theirs = (each.get_intermediate_layers(x, n=2) for each in (converted, model))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert len(mlp_calls) == 2 * 4
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(converted), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        assert twin.lambda_kernels_info == converted.lambda_kernels_info
        assert twin.blocks[0].mlp.fc1.weight is not converted.blocks[0].mlp.fc1.weight
    converted.prune_intermediate_layers([0, 1])
    assert [type(block) for block in converted.blocks] == [FusedMlp] * 2


def test_gradient_checkpointing(mlp_calls):
    model, converted = build("deit3"), fused("deit3")
    converted.set_grad_checkpointing()
    for each in (model, converted):
        each(images()).square().sum().backward()
    assert len(mlp_calls) == 4 * 2  # every block once more in the backward
    for ours, theirs in zip(converted.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


@torch.no_grad()
def test_compiling_and_exporting():
    for converted in (fused("deit3"), convert_vit(build("deit3"), remove=(1,))):
        x, expected = images(), converted(images())
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        batch = torch.export.Dim("batch", min=1, max=64)
        for dynamic in (None, {"x": {0: batch}}):
            program = torch.export.export(converted, (x,), dynamic_shapes=dynamic)
            assert torch.allclose(program.module()(x), expected, atol=1e-5)
        assert torch.allclose(program.module()(x[:3]), expected[:3], atol=1e-5)


def test_compiling_a_training_step():
    model, converted = build(), fused()
    compiled = torch.compile(converted.train(), fullgraph=True, backend="aot_eager")
    for each in (model.train(), compiled):
        each(images()).square().sum().backward()
    for ours, theirs in zip(converted.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)


def test_the_kernels_serve_blocks_that_keep_their_attention(mlp_calls, tmp_path):
    """On a GPU where there is one, else in Triton's interpreter: see torch_setup.py."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("vit", "deit3"):
        model = build(name).to(device)
        converted = convert_vit(model, remove=(1,), residual_scale=2.0, backend="triton")
        assert [row.mlp for row in converted.lambda_kernels_info.blocks] == ["triton"] * 4
        plain = convert_vit(model, remove=(1,), residual_scale=2.0, fuse="none")
        mlp_calls.clear()
        results = [each(images().to(device)) for each in (converted, plain)]
        assert [call["backend"] for call in mlp_calls] == ["triton"] * 4
        assert torch.allclose(*results, atol=1e-4)
        for result in results:
            result.square().sum().backward()
        for ours, theirs in zip(converted.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    loaded = from_pretrained(save_pretrained(converted, tmp_path), device=device, backend="triton")
    assert loaded.lambda_kernels_info == converted.lambda_kernels_info
    assert torch.equal(loaded(images().to(device)), converted(images().to(device)))
