"""EvaBlock and beit.Block: signatures of their own, bare scales, rotary embeddings and position biases, all the way through."""

from __future__ import annotations

import copy
import pickle

import entry_points
import pytest
import timm
import torch
from entry_points import attention_free, picture
from small_models import small_vit
from torch import nn

from lambda_kernels import AttentionFreeBlock, FusedMlp, UnsupportedModelError, convert_vit
from lambda_kernels.blocks.families import FAMILIES
from lambda_kernels.blocks.mlp_block import find_family, find_replacement_obstacles
from lambda_kernels.blocks.structure import inspect_model
from lambda_vit import dilute, finish_dilution, select_layers, set_lambda, transfer_entropy
from lambda_vit.export.tracing import trace_model
from lambda_vit.measure.layer_profile import profile_layers
from lambda_vit.models.views import skip_attention
from lambda_vit.selection.measurement import Measurement
from lambda_vit.selection.paths import PathRunner

pytestmark = pytest.mark.models

# Rotary, with a gated MLP that is packed; separate gates and a norm between; scales; one bias for all blocks, one for each.
MODELS = {
    "eva02": ("eva02_tiny_patch14_224", {}),
    "eva02 with norms": ("eva02_base_patch14_224", {}),
    "eva": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beit with a shared bias": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}),
    "beit without scales": ("beit_base_patch16_224", {"init_values": None}),
}


def build(name: str, **options: object) -> nn.Module:
    architecture, own = MODELS[name]
    if not timm.is_model(architecture):
        pytest.skip(f"timm {timm.__version__} has no {architecture}")
    sizes = {"img_size": 16, "patch_size": 8, "depth": 4}
    return small_vit(architecture, **{**sizes, **own, **options})


def data(model: nn.Module, batches: int = 3) -> list:
    generator = torch.Generator().manual_seed(3)
    return [(picture(model, 8) + torch.randn(8, 3, 1, 1, generator=generator), torch.arange(8)) for _ in range(batches)]


def by_hand(model: nn.Module, removed: tuple[int, ...], scale: float = 1.0) -> nn.Module:
    model = copy.deepcopy(model)
    for index in removed:
        model.blocks[index].forward = attention_free(model.blocks[index], scale)
    return model


def given_to_block(model: nn.Module, index: int) -> tuple[torch.Tensor, dict]:
    """Tokens and keyword arguments that a block of the model gets."""
    seen = []
    handle = model.blocks[index].register_forward_pre_hook(
        lambda module, args, named: seen.append((args[0], named)), with_kwargs=True
    )
    model(picture(model))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_block_takes_what_timms_takes(name):
    model = build(name)
    x, named = given_to_block(model, 1)
    block = model.blocks[1]
    assert any(value is not None for value in named.values()) == (
        name in {"eva02", "eva02 with norms", "eva", "mixed rope", "dinov3", "beit with a shared bias"}
    )
    twin, free = FusedMlp.from_block(block), AttentionFreeBlock.from_block(block)
    assert torch.equal(twin(x, **named), block(x, **named))
    assert torch.equal(twin(x, *named.values()), block(x, *named.values()))
    assert torch.equal(free(x, **named), free(x))
    assert torch.equal(free(x, *named.values()), free(x))
    if "attn_mask" in find_family(block).accepted:
        mask = torch.eye(x.shape[1], dtype=torch.bool)
        masked = twin(x, **{**named, "attn_mask": mask})
        assert torch.equal(masked, block(x, **{**named, "attn_mask": mask}))
        assert not torch.equal(masked, twin(x, **named))
    again = twin.to_timm()
    assert type(again) is type(block)
    assert vars(again).keys() == vars(block).keys()
    assert [vars(again).get(name) for name in find_family(block).attributes] == [
        vars(block).get(name) for name in find_family(block).attributes
    ]
    assert torch.equal(again(x, **named), block(x, **named))
    for each in (block, twin, free):
        with pytest.raises(TypeError, match="unheard_of"):
            each(x, unheard_of=1)
        with pytest.raises(TypeError):
            each(x, *[None] * 9)
        first = find_family(block).accepted[0]
        with pytest.raises(TypeError, match=first):
            each(x, None, **{first: None})


@pytest.mark.parametrize("name", MODELS)
def test_bare_scales_keep_their_names_and_their_gradients(name):
    model = build(name)
    converted = convert_vit(model, (0, 2))
    keys = [key for key in model.state_dict() if not key.startswith(("blocks.0.", "blocks.2.")) or "2." in key[9:]
            or key.endswith("gamma_2") or ".mlp." in key]  # fmt: skip
    assert list(converted.state_dict()) == keys
    assert ("blocks.0.gamma_2" in keys) == (model.blocks[0].gamma_2 is not None)
    assert not any(key.startswith("blocks.0.gamma_1") for key in keys)
    converted(picture(model)).square().sum().backward()
    for key, parameter in converted.named_parameters():
        if "k_proj" not in key:  # a bias of all keys alike changes no attention
            assert parameter.grad is not None, key
            assert bool(parameter.grad.abs().sum() > 0) or "rel_pos" in key or "relative_position" in key, key
    block = pickle.loads(pickle.dumps(copy.deepcopy(converted))).blocks[0]
    assert find_family(block) is find_family(model.blocks[0])
    assert list(block.state_dict()) == list(converted.blocks[0].state_dict())


@pytest.mark.parametrize("name", ["eva", "dinov3", "beit"])
@torch.no_grad()
def test_a_bare_scale_counts(name):
    model = build(name)
    for remove in ((), (1,)):
        converted = convert_vit(model, remove)
        before = converted(picture(model))
        converted.blocks[1].gamma_2.mul_(3)
        assert float((converted(picture(model)) - before).abs().max()) > 1e-3
        converted.blocks[1].gamma_2.data = converted.blocks[1].gamma_2.data.double()
        reason = converted.blocks[1].path(torch.device("cpu"), torch.float32).reason
        assert "gamma_2 have different dtypes" in reason or "not Mlp" in reason


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dilution_and_its_end(name):
    model = build(name)
    images = picture(model)
    diluted = dilute(model, (0, 2))
    assert torch.allclose(diluted(images), model(images), rtol=1e-5, atol=1e-5)
    assert list(diluted.state_dict()) == list(model.state_dict())
    lam = 0.4
    set_lambda(diluted, lam)
    x, named = given_to_block(model, 2)
    block = model.blocks[2]
    branch = block.attn(block.norm1(x), **named)
    y = (2 - lam) * x + lam * (branch if block.gamma_1 is None else block.gamma_1 * branch)
    mlp = block.mlp(block.norm2(y))
    expected = y + (mlp if block.gamma_2 is None else block.gamma_2 * mlp)
    assert torch.allclose(diluted.blocks[2](x, **named), expected, rtol=1e-5, atol=1e-5)
    set_lambda(diluted, 0.0)
    finished = finish_dilution(diluted)
    assert torch.equal(finished(images), convert_vit(model, (0, 2), residual_scale=2.0)(images))
    wanted = by_hand(model, (0, 2), 2.0)(images)
    assert torch.allclose(finished(images), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eva02", "mixed rope", "beit with a shared bias", "beit"])
@pytest.mark.parametrize("cache", ["ram", "disk"])
@torch.no_grad()
def test_selecting_measures_what_plain_forwards_give(name, cache, tmp_path):
    model = build(name).double()
    batches = [(x.double(), y) for x, y in data(model)]

    def entropy(removed: tuple[int, ...]) -> float:
        return float(torch.cat([by_hand(model, removed)(x) for x, _ in batches]).std(0).log2().sum())

    full = entropy(())
    first = {block: abs(full - entropy((block,))) for block in range(4)}
    chosen = select_layers(model, batches, 2, cache=cache, cache_folder=tmp_path)
    assert chosen.layers[0] == min(first, key=first.get)
    assert chosen.rounds[0].scores == pytest.approx(first, rel=1e-8)
    second = {block: abs(full - entropy((chosen.layers[0], block))) for block in range(4) if block != chosen.layers[0]}
    assert chosen.rounds[1].scores == pytest.approx(second, rel=1e-8)
    assert transfer_entropy(model, batches, (1, 3)) == pytest.approx(abs(full - entropy((1, 3))), rel=1e-8)
    wanted = by_hand(model, (1,))(batches[0][0])
    assert torch.allclose(skip_attention(model, (1,))(batches[0][0]), wanted, rtol=1e-9)
    assert PathRunner(model).embed(batches[0][0]).images is None  # tokens go on without the images


@pytest.mark.parametrize("name", MODELS)
def test_the_mlps_of_every_family_are_repaired(name):
    model = build(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with Measurement(model, data(model)) as measurement:
        measurement.repair(range(4))
        errors = measurement.engine()["repair"]["errors"]
        scale = find_family(model.blocks[1]).scales[1]
        trained = getattr(measurement.runner.half(1), scale)
        if trained is not None and before.get(f"blocks.1.{scale}") is not None:
            assert not torch.equal(trained, before[f"blocks.1.{scale}"])
    assert all(after < before for before, after in errors.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert len(select_layers(model, data(model), 2, strategy="recoverability").layers) == 2


@torch.no_grad()
def test_images_of_two_sizes_keep_their_own_rotary_embedding():
    model = build("eva02", dynamic_img_size=True).double()
    generator = torch.Generator().manual_seed(1)
    sizes = [torch.randn(4, 3, side, side, generator=generator, dtype=torch.float64) for side in (16, 24, 16)]
    runner = PathRunner(model)
    for images in sizes:
        ((_, found),) = runner.outputs(runner.embed(images), [frozenset((0, 1))])
        assert torch.allclose(found.logits, by_hand(model, (0, 1))(images), rtol=1e-9)
    assert "differ from batch to batch" in runner.why_images


@pytest.mark.parametrize("name", ["eva02", "mixed rope", "beit with a shared bias", "dinov3"])
@pytest.mark.filterwarnings("ignore:.*tokens per channel are few")
@torch.no_grad()
def test_profiles_and_cosines(name):
    model = build(name)
    batches = data(model)
    outputs = {}

    def keep(key: tuple) -> object:
        return lambda module, args, output: outputs.setdefault(key, []).append(output)

    handles = [
        getattr(block, part).register_forward_hook(keep((index, part)))
        for index, block in enumerate(model.blocks)
        for part in ("attn", "mlp")
    ]
    for images, _ in batches:
        model(images)
    for handle in handles:
        handle.remove()
    found = profile_layers(convert_vit(model, ()), batches, estimator="gaussian")
    for row in found.blocks:
        for part in ("attn", "mlp"):
            values = torch.cat(outputs[row.block, part]).flatten(0, 1).double()
            assert getattr(row, part).gaussian.mean == pytest.approx(float(values.std(0).log2().mean()), rel=1e-5)
    with Measurement(model, batches) as measurement:
        distances = measurement.cosine_distances()
    x, named = given_to_block(model, 2)
    block = model.blocks[2]
    branch = block.attn(block.norm1(x), **named)
    wanted = 1 - torch.cosine_similarity(x, x + (branch if block.gamma_1 is None else block.gamma_1 * branch), dim=-1)
    with Measurement(model, [picture(model)]) as measurement:
        assert measurement.cosine_distances()[2] == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert sorted(distances) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["eva02", "mixed rope", "beit with a shared bias", "dinov3"])
def test_what_else_runs_the_blocks(name):
    model = build(name)
    images = picture(model)
    converted = convert_vit(model, (1,))
    wanted = by_hand(model, (1,))(images)
    _, inner = converted.forward_intermediates(images, indices=2)
    _, expected = by_hand(model, (1,)).forward_intermediates(images, indices=2)
    for one, other in zip(inner, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    converted.set_grad_checkpointing()
    converted.train()
    result = converted(images)
    result.sum().backward()
    assert torch.allclose(result, wanted, rtol=1e-4, atol=1e-4)
    assert converted.blocks[1].norm2.weight.grad is not None


@pytest.mark.parametrize("name", ["eva02", "beit with a shared bias"])
@torch.no_grad()
def test_compiling(name):
    model = build(name, depth=2)
    converted = convert_vit(model, (1,))
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(picture(model)), converted(picture(model)), rtol=1e-5, atol=1e-5)


def test_drop_path_is_drawn_as_timm_draws_it():
    for name in ("eva", "beit"):
        model = build(name, drop_path_rate=0.5).train()
        converted = convert_vit(model, (1,)).train()
        torch.manual_seed(2)
        found = converted(picture(model, 8))
        torch.manual_seed(2)
        assert torch.allclose(found, by_hand(model, (1,))(picture(model, 8)), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, converted(picture(model, 8)))


def test_small_scales_are_warned_of():
    model = build("beit", init_values=1e-6)
    with torch.no_grad():
        model.blocks[1].gamma_2.fill_(1e-6)
    with pytest.warns(UserWarning, match=r"blocks \[1\] have LayerScale gammas below"):
        convert_vit(model, (1,), residual_scale=2.0)


def test_what_is_on_a_block_beside_its_parts_keeps_it():
    block = build("eva").blocks[0]
    assert find_replacement_obstacles(block) == []
    assert find_replacement_obstacles(build("beit without scales").blocks[0]) == []
    block.adapter = nn.Linear(2, 2)
    assert "adapter" in find_replacement_obstacles(block)[0]
    other = build("eva").blocks[0]
    other.prompt = nn.Parameter(torch.zeros(3))
    assert "prompt" in find_replacement_obstacles(other)[0]
    with pytest.raises(ValueError, match=r"family must be one of .*'swin'"):
        AttentionFreeBlock(nn.LayerNorm(2), nn.Identity(), family="swin")


def test_families_are_told_apart_by_class():
    assert {family.block for family in FAMILIES.values()} == {
        timm.models.vision_transformer.Block, timm.models.eva.EvaBlock, timm.models.beit.Block,
    }  # fmt: skip
    assert inspect_model(build("beit")).families == ("beit",)
    assert inspect_model(convert_vit(build("eva"), (0,))).families == ("eva",)

    class Own(timm.models.beit.Block):
        pass

    model = build("beit")
    model.blocks[1].__class__ = Own
    with pytest.raises(UnsupportedModelError, match=r"blocks\[1\] is .*Own.*a subclass of timm's block"):
        convert_vit(model, (0,))


def test_removal_of_all_attention_needs_no_class_token_only_with_pooling():
    model = build("beit", global_pool="token")
    with pytest.raises(ValueError, match="class token"):
        convert_vit(model, (0, 1, 2, 3))
    entry = entry_points.build("beit_base_patch16_224", "beit")
    assert convert_vit(entry, (0, 1, 2, 3)).lambda_kernels_info.removed == (0, 1, 2, 3)


def test_sizes_that_an_export_cannot_change_are_refused_with_the_remedy():
    beit = build("beit")
    newer = hasattr(beit, "set_input_size")
    words = r"blocks \[1\] have none any more.*set_input_size" if newer else "in this version of timm"
    with pytest.raises(ValueError, match=f"image_size=32: Beit .*{words}"):
        trace_model(convert_vit(beit, (1,)), image_size=32)
    if newer:
        assert trace_model(convert_vit(beit, ()), image_size=32, batch_size=1).shape == (3, 32, 32)
        beit.set_input_size(img_size=32)
        assert convert_vit(beit, (1,))(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    if timm.is_model("naflexvit_base_patch16_gap"):
        naflex = convert_vit(entry_points.build("naflexvit_base_patch16_gap", "naflexvit"), (1,))
        with pytest.raises(ValueError, match=r"image_size=32: NaFlexVit has no size of its own.*Leave image_size out"):
            trace_model(naflex, image_size=32)
