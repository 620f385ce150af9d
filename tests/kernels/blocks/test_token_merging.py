"""Merging in whole models: they compute what timm's modules do on tokens that are averaged and kept in their places."""

from __future__ import annotations

import copy
import inspect
import io
import threading

import numpy as np
import pytest
import torch
from merging_oracle import merge_one
from small_models import images, small_vit
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from lambda_kernels import AttentionFreeBlock, FusedMlp, convert_vit
from lambda_kernels.blocks.merging_block import MergingBlock, MergingSequential

pytestmark = pytest.mark.models

SIZE = 80  # pixels: 25 patches, so that there is something left to merge in each block

MODELS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {"num_heads": 3}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "qk_norm": True}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "largest": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "attention pooling": ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
    "no pooling": ("vit_tiny_patch16_224", {"global_pool": "", "num_classes": 0}),
}


def build(name: str) -> nn.Module:
    architecture, options = MODELS[name]
    return small_vit(architecture, img_size=SIZE, **options)


def by_hand(
    model: nn.Module, x: Tensor, r: tuple[int, ...], removed: tuple[int, ...] = (), scale: float = 1.0
) -> Tensor:
    """timm's forward of a float64 model on all tokens to the end, with tokens of one group averaged behind each attention.

    The attention is timm's own: over tokens that are there as often as their group has members. `r` is per block.
    """
    view = copy.copy(model)  # around other blocks, so that gradients arrive in `model`
    view._modules = dict(model._modules)
    prefix = model.num_prefix_tokens
    place: np.ndarray | None = None

    class ByHand(nn.Module):
        def __init__(self, block: nn.Module, index: int) -> None:
            super().__init__()
            self.block, self.index = block, index

        def forward(self, x: Tensor, **options: object) -> Tensor:
            nonlocal place
            block, found = self.block, []
            if self.index in removed:
                x = scale * x
            else:
                handle = block.attn.k_norm.register_forward_hook(lambda module, args, keys: found.append(keys.mean(1)))
                x = x + block.ls1(block.attn(block.norm1(x)))
                handle.remove()
            if r[self.index]:
                if place is None:
                    place = np.tile(np.arange(x.shape[1]), (len(x), 1))
                for b, keys in enumerate(found[0].detach().numpy()):
                    firsts = [int(np.argmax(place[b] == group)) for group in range(place[b].max() + 1)]
                    sizes = np.bincount(place[b]).astype(float)
                    place[b] = merge_one(keys[firsts], x[b].detach().numpy()[firsts], sizes, r[self.index], prefix)[2][
                        place[b]
                    ]
                together = torch.from_numpy(place[:, :, None] == place[:, None, :]).to(x.dtype)
                x = together / together.sum(2, keepdim=True) @ x
            return x + block.ls2(block.mlp(block.norm2(x)))

    view.blocks = nn.Sequential(*(ByHand(block, i) for i, block in enumerate(model.blocks)))
    return view(x)


@pytest.mark.parametrize("name", MODELS)
def test_against_all_tokens_in_their_places(name):
    model, x = build(name).double(), images(3, SIZE).double()
    converted = convert_vit(model, (), tome_r=4, tome_start=1)
    expected = by_hand(model, x, (0, 4, 4, 4))
    torch.testing.assert_close(converted(x), expected, rtol=1e-9, atol=1e-9)
    assert float((model(x) - expected).detach().abs().max()) > 1e-3  # or merging did nothing
    converted(x).square().sum().backward()
    expected.square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for (name, found), wanted in zip(converted.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-8, atol=1e-10 * largest, msg=name)


@pytest.mark.parametrize("fuse", ["all", "removed", "none"])
@torch.no_grad()
def test_with_attention_removed(fuse):
    model, x = build("deit").double(), images(2, SIZE).double()
    converted = convert_vit(model, (1, 2), residual_scale=2.0, tome_r=5, tome_start=0, fuse=fuse)
    expected = by_hand(model, x, (5, 0, 0, 5), removed=(1, 2), scale=2.0)
    torch.testing.assert_close(converted(x), expected, rtol=1e-9, atol=1e-9)
    info = converted.lambda_kernels_info
    assert [(b.tokens, b.merged) for b in info.blocks] == [(26, 5), (21, 0), (21, 0), (21, 5)]
    assert [type(b) for b in converted.blocks] == [MergingBlock, AttentionFreeBlock, AttentionFreeBlock, MergingBlock]
    paths = {"all": ["torch"] * 4, "none": ["modules"] * 4, "removed": ["modules", "torch", "torch", "modules"]}
    assert [b.mlp for b in info.blocks] == paths[fuse]


@torch.no_grad()
def test_one_number_per_block():
    model, x = build("vit").double(), images(2, SIZE).double()
    converted = convert_vit(model, (2,), tome_r=(0, 6), tome_start=1)  # blocks 1 and 3
    torch.testing.assert_close(converted(x), by_hand(model, x, (0, 0, 0, 6), (2,)), rtol=1e-9, atol=1e-9)
    falling = convert_vit(model, (), tome_r=[7, 0, 2, 0], tome_start=0)  # sizes count where nothing is merged, too
    torch.testing.assert_close(falling(x), by_hand(model, x, (7, 0, 2, 0)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_no_more_than_half_is_merged():
    model, x = build("registers").double(), images(2, SIZE).double()
    converted = convert_vit(model, (), tome_r=100, tome_start=0)
    assert [(b.tokens, b.merged) for b in converted.lambda_kernels_info.blocks] == [(28, 12), (16, 6), (10, 3), (7, 2)]
    torch.testing.assert_close(converted(x), by_hand(model, x, (12, 6, 3, 2)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_zero_is_the_identity(name):
    model, x = build(name), images(2, SIZE)
    expected = convert_vit(model, ())(x)
    assert torch.equal(expected, model(x))
    merged = convert_vit(model, (), tome_r=6)
    assert not torch.equal(merged(x), expected)
    for nothing in (0, (0, 0, 0), [0]):
        for start in (convert_vit(model, (), tome_r=nothing), convert_vit(merged, (), tome_r=nothing)):
            assert torch.equal(start(x), expected)
            assert type(start.blocks) is nn.Sequential
            assert {type(b) for b in start.blocks} == {FusedMlp}
    assert type(convert_vit(merged, (), tome_r=0, fuse="none").blocks[1]) is Block


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_the_attention_is_timms(fused):
    attentions = {name: build(name).blocks[2].attn for name in ("vit", "registers")}
    attentions |= {"newer": Attention(48, 3, **NEWER, norm_layer=nn.LayerNorm)}
    for name, attn in attentions.items():
        block = convert_vit(build("vit"), (), tome_r=1, tome_start=0).blocks[2]
        block.attn = attn
        attn.fused_attn = fused
        attn.scale *= 0.7  # which timm's fused attention does not look at
        x, seen = torch.randn(2, 9, 48), []
        branch, keys = block._attend(x, None)
        assert torch.equal(branch, attn(x)), name
        attn.k_norm.register_forward_hook(lambda module, args, keys, seen=seen: seen.append(keys))
        attn(x)
        assert torch.equal(keys, seen[0].mean(1)), name


# Parts of an attention that not every timm knows.
NEWER = {name: True for name in ("scale_norm", "gated") if name in inspect.signature(Attention.__init__).parameters}


@torch.no_grad()
def test_dropout_of_attention_as_timm_has_it():
    # all of it in training mode, or, as for Monte-Carlo dropout, the dropouts alone
    for fused, whole in ((True, True), (False, True), (False, False)):
        block = convert_vit(small_vit(attn_drop_rate=0.3), (), tome_r=1, tome_start=0).blocks[0]
        (block if whole else block.attn.attn_drop).train()
        block.attn.fused_attn = fused
        x = torch.randn(2, 9, 48)
        torch.manual_seed(1)
        expected = block.attn(x)
        torch.manual_seed(1)
        assert torch.equal(block._attend(x, None)[0], expected)
        assert not torch.equal(block.attn(x), expected)


@torch.no_grad()
def test_other_sizes_of_images():
    model = small_vit(dynamic_img_size=True).double()
    converted = convert_vit(model, (), tome_r=4)
    for size in (64, 96):
        x = images(2, size).double()
        torch.testing.assert_close(converted(x), by_hand(model, x, (0, 4, 4, 4)), rtol=1e-9, atol=1e-9)
    assert [(b.tokens, b.merged) for b in converted.lambda_kernels_info.blocks] == [(5, 0), (5, 2), (3, 1), (2, 0)]


@torch.no_grad()
def test_features_come_back_in_their_places():
    model, x = build("distilled").double(), images(2, SIZE).double()
    converted = convert_vit(model, (), tome_r=6)
    features = converted.forward_features(x)
    assert features.shape == model.forward_features(x).shape == (2, 27, 48)
    assert len(features[0].unique(dim=0)) == 27 - 18  # merged ones are alike
    # a head that pools is right, whichever it is and whenever it came
    for pooling in ("avg", "max", "avgmax"):
        torch.testing.assert_close(converted.pool(features, pooling), model.pool(features, pooling), rtol=0, atol=0)


@pytest.mark.parametrize("recompute", ["none", "act", "all"])
def test_training_recomputes(recompute):
    model, x = small_vit(img_size=SIZE, drop_path_rate=0.2).double().train(), images(2, SIZE).double()
    plain = convert_vit(model, (1,), tome_r=4, recompute="none")
    other = convert_vit(model, (1,), tome_r=4, recompute=recompute)
    for network in (plain, other):
        torch.manual_seed(5)
        network(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
        assert a.grad.abs().max() > 0, name


def test_nothing_stays_behind():
    """Forwards of other sizes, copies, threads: nothing of one is seen by another."""
    converted = convert_vit(small_vit(dynamic_img_size=True), (), tome_r=4)
    batches = [images(n, size, seed=n) for n, size in ((1, 64), (3, 96), (2, 48), (3, 64))]
    before = set(vars(converted.blocks[1]))
    with torch.no_grad():
        expected = [converted(x) for x in batches]
        twin = copy.deepcopy(converted)
        found: dict[int, list[Tensor]] = {}

        def run(index: int) -> None:
            with torch.no_grad():
                found[index] = [(converted if index % 2 else twin)(batches[index]) for _ in range(20)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, outputs in found.items():
        assert all(torch.equal(output, expected[index]) for output in outputs)
    assert set(vars(converted.blocks[1])) == before


@torch.no_grad()
def test_pickled_whole():
    converted, x = convert_vit(build("vit"), (0,), tome_r=4), images(2, SIZE)
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), converted(x))
    assert loaded.lambda_kernels_info == converted.lambda_kernels_info


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_short_types(dtype):
    model, x = build("deit3"), images(2, SIZE)
    converted = convert_vit(model, (1,), tome_r=5)
    expected = converted(x)
    found = copy.deepcopy(converted).to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    # Rounded keys may choose other pairs, which are about as similar: the outputs are close, not equal.
    assert torch.cosine_similarity(found.float(), expected).min() > 0.98
    with torch.autocast("cpu", dtype=dtype):
        assert torch.cosine_similarity(converted(x).float(), expected).min() > 0.98


@torch.no_grad()
def test_empty_batch():
    converted = convert_vit(small_vit(), (), tome_r=1)
    assert converted(torch.empty(0, 3, 32, 32)).shape == (0, 10)


def test_one_graph():
    model, x = small_vit(depth=2, global_pool="avg"), images(2)
    converted = convert_vit(model, (), tome_r=1, tome_start=0)
    expected = converted(x)
    expected.sum().backward()
    wanted = {name: p.grad.clone() for name, p in converted.named_parameters()}
    converted.zero_grad()
    torch._dynamo.reset()
    found = torch.compile(converted, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


@torch.no_grad()
def test_exported_with_any_number_of_images():
    converted = convert_vit(small_vit(img_size=SIZE), (2,), tome_r=4)
    count = torch.export.Dim("count", min=1, max=64)
    program = torch.export.export(converted, (images(3, SIZE),), dynamic_shapes=({0: count},))
    for count in (1, 5):
        x = images(count, SIZE, seed=count)
        torch.testing.assert_close(program.module()(x), converted(x))


@pytest.mark.filterwarnings("ignore")  # of the tracer, about sizes that it takes for constants
@torch.no_grad()
def test_traced_by_torchscript():
    converted = convert_vit(small_vit(img_size=SIZE), (2,), tome_r=4)
    traced = torch.jit.trace(converted, images(3, SIZE))
    torch.testing.assert_close(traced(images(3, SIZE, seed=7)), converted(images(3, SIZE, seed=7)))


@pytest.mark.slow
@torch.no_grad()
def test_onnx_with_any_number_of_images(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    converted = convert_vit(small_vit(img_size=SIZE, depth=2), (), tome_r=4, tome_start=0)
    count = torch.export.Dim("count", min=1, max=64)
    program = torch.onnx.export(converted, (images(3, SIZE),), dynamo=True, dynamic_shapes=({0: count},), verbose=False)
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for number in (1, 5):
        x = images(number, SIZE, seed=number)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), converted(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hooks_on_blocks_see_tokens():
    converted, seen = convert_vit(build("vit"), (2,), tome_r=4), []
    for block in converted.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    converted(images(2, SIZE))
    assert seen == [(2, 26, 48), (2, 22, 48), (2, 22, 48), (2, 18, 48)]


def test_part_of_the_blocks():
    """timm cuts off blocks by slices: what is left still hands sizes on."""
    model, x = build("vit").double(), images(2, SIZE).double()
    converted = convert_vit(model, (), tome_r=4)
    assert type(converted.blocks[:3]) is MergingSequential
    converted.blocks = converted.blocks[:3]
    model.blocks = model.blocks[:3]
    torch.testing.assert_close(converted(x), by_hand(model, x, (0, 4, 4)), rtol=1e-9, atol=1e-9)
