"""What merging is asked for, refused, described and combined with."""

from __future__ import annotations

import json
import warnings

import pytest
import timm
import torch
from small_models import images, small_vit
from timm.models.vision_transformer import Attention, Block
from torch import nn

from lambda_kernels import AttentionFreeBlock, FusedMlp, UnsupportedModelError, convert_vit
from lambda_kernels.blocks.merging_block import MergingBlock, MergingSequential, find_merging_obstacles
from lambda_kernels.blocks.structure import inspect_model
from lambda_kernels.convert.conversion import describe_blocks, remove_attention
from lambda_kernels.convert.settings import ConversionSettings
from lambda_kernels.features import feature_model
from lambda_vit.measure.comparison import kernel_paths, path_lines
from lambda_vit.measure.cost import cost
from lambda_vit.measure.frequency import feature_frequencies
from lambda_vit.measure.layer_profile import profile_layers
from lambda_vit.models.views import skip_attention
from lambda_vit.selection.paths import PathRunner
from lambda_vit.training.dilution import dilute, prepare

pytestmark = pytest.mark.models

SIZE = 80  # 25 patches and a class token


def merged(**options: object) -> nn.Module:
    return convert_vit(small_vit(img_size=SIZE), (1,), **{"tome_r": 4, "tome_start": 0, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tome_r": -1}, "tome_r must be an integer of at least 0 or a sequence of them, .*; got -1"),
        ({"tome_r": 2.0}, "tome_r must be an integer of at least 0 .*; got 2.0"),
        ({"tome_r": True}, "tome_r must be an integer of at least 0 .*; got True"),
        ({"tome_r": "4"}, "tome_r must be an integer of at least 0 .*; got '4'"),
        ({"tome_r": (4, -2, 1)}, r"tome_r\[1\] must be an integer of at least 0; got -2"),
        ({"tome_r": (4, 2)}, r"tome_r has 2 values for 3 blocks that merge tokens: \[0, 2, 3\]"),
        ({"tome_r": (4, 2, 1), "tome_start": 1}, r"tome_r has 3 values for 2 blocks that merge tokens: \[2, 3\]"),
        ({"tome_start": 3}, r"tome_start=3, but .* the model has 3 of them \[0, 2, 3\], counted from 0"),
        ({"tome_start": -1}, "tome_start must be an integer of at least 0; got -1"),
        ({"tome_start": None, "tome_r": 4.5}, "tome_r must be an integer"),
        ({"tome_start": 1.0}, "tome_start must be an integer of at least 0; got 1.0"),
    ],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_wrong_numbers(options, message, inplace):
    model = small_vit(img_size=SIZE)
    with pytest.raises(ValueError, match=message):
        convert_vit(model, (1,), inplace=inplace, **{"tome_r": 4, "tome_start": 0, **options})
    assert {type(block) for block in model.blocks} == {Block}
    assert not hasattr(model, "lambda_kernels_info")


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="tome_r: this VisionTransformer has 1 patch, and merging needs two"):
        convert_vit(small_vit(img_size=16), (), tome_r=1)
    pooled = small_vit(img_size=SIZE, global_pool="avg", class_token=False)
    with pytest.raises(ValueError, match=r"tome_start=0, but .* the model has 0 of them \[\]"):
        convert_vit(pooled, range(4), tome_r=1, tome_start=0)
    # where nothing is merged, it does not matter where it would begin
    assert convert_vit(pooled, range(4)).lambda_kernels_info.tome_r == 0


class Subclass(Attention):
    """What somebody else's attention may be."""


def _refused(change: object, message: str, **options: object) -> None:
    model = small_vit(img_size=SIZE, **options)
    change(model)
    before = list(model.blocks)
    with pytest.raises(UnsupportedModelError, match=message):
        convert_vit(model, (), tome_r=4, inplace=True)
    assert list(model.blocks) == before
    assert type(model.blocks) is nn.Sequential or message.endswith("Blocks")


def test_blocks_that_cannot():
    def hook_attention(model):
        model.blocks[2].attn.register_forward_hook(lambda *args: None)

    def replace_forward(model):
        model.blocks[2].attn.forward = lambda x, **options: x

    def hook_block(model):
        model.blocks[3].register_forward_pre_hook(lambda *args: None)

    def other_attention(model):
        model.blocks[1].attn = Subclass(48, 3)

    def another_part(model):
        model.blocks[1].attn.adapter = nn.Linear(1, 1)

    def without_a_part(model):
        del model.blocks[1].attn.q_norm

    _refused(hook_attention, r"blocks\[2\] cannot merge tokens: a hook or a replaced forward on its attention")
    _refused(replace_forward, r"blocks\[2\] cannot merge tokens: a hook or a replaced forward on its attention")
    _refused(hook_block, r"blocks\[3\] cannot merge tokens: a hook on the block itself would be lost")
    _refused(other_attention, r"blocks\[1\] cannot .*: its attention is .*Subclass, whose keys are not known")
    _refused(another_part, r"its attention has other parts than timm's \(adapter\)")
    _refused(without_a_part, r"its attention has other parts than timm's \(q_norm\)")


def test_models_that_cannot():
    _refused(lambda model: model.set_grad_checkpointing(True), "gradient checkpointing runs its blocks one by one")
    _refused(
        lambda model: model.blocks.register_forward_hook(lambda *args: None),
        "a hook or a replaced forward on model.blocks itself would be lost",
    )

    class Blocks(nn.Sequential):
        pass

    def wrapped(model):
        model.blocks = Blocks(*model.blocks)

    _refused(wrapped, "tokens cannot be merged: model.blocks is .*Blocks")

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(48, 3), Block(48, 3))

    with pytest.raises(
        UnsupportedModelError, match="tokens of Other cannot be merged: only in timm's VisionTransformer"
    ):
        convert_vit(Other(), (), tome_r=1)


def test_other_families():
    for block in (timm.models.eva.EvaBlock(48, 3), timm.models.beit.Block(48, 3)):
        (found,) = find_merging_obstacles(block)
        assert found == (
            f"it is {type(block).__module__}.{type(block).__name__}, and merging supports only "
            "timm.models.vision_transformer.Block"
        )
    rotary = FusedMlp.from_block(small_vit().blocks[0])
    rotary.attn = timm.models.eva.EvaBlock(48, 3).attn
    assert "its attention is timm.models.eva.EvaAttention, whose keys are not known" in find_merging_obstacles(rotary)
    assert find_merging_obstacles(small_vit().blocks[0]) == []


@torch.no_grad()
def test_what_goes_block_by_block_is_refused():
    converted, x = merged(), images(2, SIZE)
    alone = "this block merges tokens and needs their sizes, .*tome_r=0"
    for call in (
        lambda: converted.forward_intermediates(x),
        lambda: converted.get_intermediate_layers(x, 1, reshape=True),
        lambda: converted.blocks[0](torch.randn(1, 26, 48)),
        lambda: nn.Sequential(*converted.blocks)(torch.randn(1, 26, 48)),
        lambda: converted.blocks[0](torch.randn(1, 26, 48), attn_mask=torch.zeros(26, 26)),
    ):
        with pytest.raises(RuntimeError, match=alone):
            call()
    converted.set_grad_checkpointing(True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=alone):
        converted(x)
    converted.set_grad_checkpointing(False)
    converted(x)


@torch.no_grad()
def test_a_hook_that_comes_later_is_not_passed_over():
    converted, x = merged(), images(2, SIZE)
    handle = converted.blocks[2].attn.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match=r"a hook or a replaced forward on the attention .* would not run"):
        converted(x)
    handle.remove()
    seen = []
    converted.blocks[2].attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    converted(x)
    assert seen == [(2, 22, 144)]


@torch.no_grad()
def test_put_on_changed_and_taken_off():
    model, x = small_vit(img_size=SIZE), images(2, SIZE)
    plain = convert_vit(model, (1,))
    keys = list(plain.state_dict())
    on = convert_vit(plain, (1,), tome_r=4)
    assert torch.equal(on(x), convert_vit(model, (1,), tome_r=4)(x))
    assert list(on.state_dict()) == keys
    assert [type(block) for block in on.blocks] == [FusedMlp, AttentionFreeBlock, MergingBlock, MergingBlock]
    assert type(plain.blocks) is nn.Sequential  # the model it came from keeps its own
    assert inspect_model(on).merging == (2, 3)
    # the same again is nothing to do; what is not named stays
    assert convert_vit(on, (1,), tome_r=4, tome_start=1) is convert_vit(on, (1,)) is on
    torch_only = convert_vit(on, (1,), backend="torch")
    assert torch_only.lambda_kernels_info.tome_r == 4
    assert torch.equal(torch_only(x), on(x))
    other = convert_vit(on, (1,), tome_r=(2, 5, 1), tome_start=0)
    assert torch.equal(other(x), convert_vit(model, (1,), tome_r=(2, 5, 1), tome_start=0)(x))
    assert not torch.equal(other(x), on(x))
    later = convert_vit(other, (1,), tome_r=5, tome_start=2)
    assert [type(block) for block in later.blocks] == [FusedMlp, AttentionFreeBlock, FusedMlp, MergingBlock]
    assert torch.equal(later(x), convert_vit(model, (1,), tome_r=5, tome_start=2)(x))
    off = convert_vit(later, (1,), tome_r=0)
    assert torch.equal(off(x), plain(x))
    assert type(off.blocks) is nn.Sequential
    assert off.lambda_kernels_info.blocks == plain.lambda_kernels_info.blocks
    # attention can go from a model that merges, which goes on merging where there is some
    assert torch.equal(convert_vit(convert_vit(model, (), tome_r=4), (1,))(x), convert_vit(model, (1,), tome_r=4)(x))


def test_in_place_and_modes():
    model = small_vit(img_size=SIZE).train()
    model.blocks[2].eval()
    first = next(model.blocks[2].parameters())
    assert convert_vit(model, (), tome_r=4, inplace=True) is model
    assert next(model.blocks[2].parameters()) is first
    assert [block.training for block in model.blocks] == [True, True, False, True]
    assert model.blocks.training
    convert_vit(model, (), tome_r=0, inplace=True)
    assert [block.training for block in model.blocks] == [True, True, False, True]
    assert next(model.blocks[2].parameters()) is first
    assert not convert_vit(model.eval(), (), tome_r=4).blocks.training


@torch.no_grad()
def test_hooks_on_blocks_that_merge():
    converted, seen = merged(), []
    converted.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    convert_vit(converted, (1,), tome_r=6, inplace=True)(images(1, SIZE))
    assert seen == [20]
    with pytest.raises(
        UnsupportedModelError, match="merging cannot be turned off: a hook on the block itself would be lost"
    ):
        convert_vit(converted, (1,), tome_r=0, inplace=True)
    converted(images(1, SIZE))
    assert seen == [20, 20]
    container = merged()
    container.blocks.register_forward_hook(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match=r"on model\.blocks itself would be lost"):
        convert_vit(container, (1,), tome_r=0)


def test_what_is_said_of_it():
    converted = merged(tome_r=(4, 0, 6))
    info = converted.lambda_kernels_info
    assert (info.tome_r, info.tome_start) == ((4, 0, 6), 0)
    found = json.loads(json.dumps(info.to_dict()))
    assert (found["tome_r"], found["tome_start"]) == ([4, 0, 6], 0)
    assert [(b["tokens"], b["merged"]) for b in found["blocks"]] == [(26, 4), (22, 0), (22, 0), (22, 6)]
    assert describe_blocks(converted) == info.blocks
    assert "tome_r=4, prefix_tokens=1" in repr(converted.blocks[0])
    *_, last = path_lines(kernel_paths(converted))
    assert last == "tokens into each block: 26, 22, 22, 22; 10 are merged into others"
    plain = convert_vit(small_vit(), (1,))
    assert not any("tokens" in line for line in path_lines(kernel_paths(plain)))
    assert {(b.tokens, b.merged) for b in plain.lambda_kernels_info.blocks} == {(None, 0)}
    # what was said can be asked for again
    again = remove_attention(
        small_vit(img_size=SIZE), (1,), ConversionSettings(tome_r=found["tome_r"], tome_start=found["tome_start"])
    )
    assert again.lambda_kernels_info == info


def test_flops_are_those_of_the_tokens_that_are_left():
    width, hidden, patch, tokens, depth = 48, 192, 3 * 16 * 16, 26, 4
    model = convert_vit(small_vit(img_size=SIZE), (1,), tome_r=4, tome_start=0)
    expected = 2 * 25 * patch * width + 2 * width * 10
    for block in range(depth):
        if block != 1:
            expected += 2 * tokens * width * 4 * width + 4 * tokens * tokens * width
            sources = -(-(tokens - 1) // 2)
            expected += (
                2 * sources * (tokens - 1 - sources) * 16 + 2 * 4 * (tokens - 4) * width
            )  # matching and averages
            tokens -= 4
        expected += 4 * tokens * width * hidden
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cost(model).flops
    assert found == expected
    assert found < cost(convert_vit(model, (1,), tome_r=0)).flops


def test_merging_comes_last():
    converted = merged()
    loader = [images(4, SIZE)]
    for call, what in (
        (lambda: dilute(converted, (2,)), "dilution"),
        (lambda: prepare(convert_vit(small_vit(img_size=SIZE), (), tome_r=4), (2,)), "dilution"),
        (lambda: PathRunner(converted), "measuring paths"),
        (lambda: skip_attention(converted, (2,)), "skipping attention"),
        (lambda: profile_layers(converted, loader), "a profile"),
        (lambda: feature_frequencies(converted, loader), "the analysis of frequencies"),
        (lambda: feature_model(converted), "a feature model"),
    ):
        message = rf"{what} does not support token merging, and blocks \[.*\] merge tokens.* tome_r=0"
        with pytest.raises((UnsupportedModelError, ValueError), match=message):
            call()


def test_training_goes_on_merging():
    converted = merged()
    other = prepare(converted, (), recompute="all")
    assert (other.lambda_kernels_info.tome_r, other.lambda_kernels_info.tome_start) == (4, 0)
    assert {block.recompute for block in other.blocks} == {"all"}
    assert type(other.blocks) is MergingSequential
