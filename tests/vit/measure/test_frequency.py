"""Feature frequencies: against hooks and loops, whatever the batches, before and after removal, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from small_models import images, small_vit
from spectra import spectra_by_loops

from lambda_kernels import NonFiniteActivationError, UnsupportedModelError, convert_vit
from lambda_kernels.blocks.structure import inspect_model
from lambda_vit import compare_frequencies, feature_frequencies, skip_attention
from lambda_vit.measure.frequency import BlockFrequencies

pytestmark = pytest.mark.models

SIZE = 64  # a map of 4 × 4 tokens


def vit(name: str = "vit_tiny_patch16_224", **options: object) -> torch.nn.Module:
    return small_vit(name, **{"img_size": SIZE, **options})


def loader(count: int = 10, batch: int = 4, size: int | tuple[int, int] = SIZE) -> list:
    height, width = (size, size) if isinstance(size, int) else size
    data = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    return [(x, torch.zeros(len(x))) for x in data.split(batch)]


def features(model: torch.nn.Module, batches: list) -> list[np.ndarray]:
    """Each block's output, float64 [N, T, C], a block after the other by hand."""
    outputs: list[list] = [[] for _ in model.blocks]
    handles = [
        block.register_forward_hook(lambda module, args, output, index=index: outputs[index].append(output))
        for index, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return [torch.cat(found).double().numpy() for found in outputs]


MODELS = {
    "plain": (lambda: vit(), 1, (4, 4)),
    "distilled": (lambda: vit("deit_tiny_distilled_patch16_224"), 2, (4, 4)),
    "registers": (lambda: vit("vit_small_patch14_reg4_dinov2", patch_size=16), 5, (4, 4)),
    "attention pooling": (lambda: vit("vit_base_patch16_siglip_224"), 0, (4, 4)),
    "layer scale": (lambda: vit("deit3_small_patch16_224"), 1, (4, 4)),
    "removed": (lambda: convert_vit(vit(), remove=(0, 2), residual_scale=2.0, fuse="removed"), 1, (4, 4)),
    "not square": (lambda: vit(img_size=(32, 80)), 1, (2, 5)),
    "dynamic": (lambda: vit(img_size=64, dynamic_img_size=True), 1, (3, 6)),
    "padded": (lambda: vit(img_size=64, dynamic_img_size=True, dynamic_img_pad=True), 1, (4, 3)),
    "as many tokens, other sides": (lambda: vit(img_size=64, dynamic_img_size=True), 1, (2, 8)),
}
SIZES = {"not square": (32, 80), "dynamic": (48, 96), "padded": (50, 40), "as many tokens, other sides": (32, 128)}


@pytest.mark.parametrize("kind", MODELS)
def test_every_block_is_what_hooks_and_loops_give(kind):
    build, prefix, grid = MODELS[kind]
    model, data = build(), loader(5, 2, SIZES.get(kind, SIZE))
    found = feature_frequencies(model, data)
    assert (found.samples, found.grid, found.prefix_tokens, found.channels, found.dtype) == (
        5,
        grid,
        prefix,
        48,
        "float32",
    )
    assert (found.removed, found.residual_scale) == (((0, 2), 2.0) if kind == "removed" else ((), None))
    assert [row.block for row in found.blocks] == [0, 1, 2, 3]
    assert [row.block for row in found.blocks if not row.attention] == list(found.removed)
    for row, output in zip(found.blocks, features(model, data), strict=True):
        spectra = spectra_by_loops(output[:, prefix:].reshape(5, *grid, 48))
        for name, values in spectra.items():
            np.testing.assert_allclose(getattr(row, name), values.mean(0), rtol=1e-9, atol=1e-12)
        relative = spectra["log_amplitude"] - spectra["log_amplitude"][:, :1]
        mean = relative[:, 1 : min(grid) // 2 + 1].mean(1)
        np.testing.assert_allclose(row.relative, relative.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(row.relative_error, relative.std(0, ddof=1) / math.sqrt(5), rtol=1e-9, atol=1e-12)
        assert (row.mean, row.mean_error) == pytest.approx((mean.mean(), mean.std(ddof=1) / math.sqrt(5)), rel=1e-9)
        # Parseval, from the record alone
        total = np.dot(found.coefficients, row.power)
        assert total == pytest.approx(np.square(output[:, prefix:]).mean(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "prefix"), [("eva02_tiny_patch14_224", 1), ("vit_small_patch16_dinov3", 5), ("beit_base_patch16_224", 1)]
)
def test_other_families_where_they_are_supported(name, prefix):
    import timm

    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    size = 56 if "patch14" in name else SIZE
    model = timm.create_model(name, img_size=size, embed_dim=48, depth=2, num_heads=4).eval()
    try:
        inspect_model(model)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    data = loader(3, 2, size)
    found = feature_frequencies(model, data)
    assert (found.grid, found.prefix_tokens) == ((4, 4), prefix)
    for row, output in zip(found.blocks, features(model, data), strict=True):
        expected = spectra_by_loops(output[:, prefix:].reshape(3, 4, 4, 48))["log_amplitude"].mean(0)
        np.testing.assert_allclose(row.log_amplitude, expected, rtol=1e-9, atol=1e-12)


def numbers(row: BlockFrequencies) -> list[float]:
    return [
        *row.log_amplitude,
        *row.amplitude,
        *row.power,
        *row.relative,
        *row.relative_error,
        row.mean,
        row.mean_error,
    ]


def test_neither_batches_nor_order_matter():
    model, data = vit(), [x for x, _ in loader(11, 1)]
    whole = feature_frequencies(model, [torch.cat(data)])
    for batches in (
        data,
        [torch.cat(data[:7]), torch.cat(data[7:])],
        [torch.cat(data[::-1])[:6], torch.cat(data[::-1])[6:]],
    ):
        other = feature_frequencies(model, batches)
        assert other.samples == 11
        for one, two in zip(whole.blocks, other.blocks, strict=True):
            assert numbers(one) == pytest.approx(
                numbers(two), rel=1e-5, abs=1e-6
            )  # the model's own rounding in float32
    exact = vit().double()
    whole, other = (feature_frequencies(exact, batches) for batches in ([torch.cat(data)], data))
    for one, two in zip(whole.blocks, other.blocks, strict=True):
        assert numbers(one) == pytest.approx(numbers(two), rel=1e-11, abs=1e-13)


def test_one_pass_that_keeps_no_batch():
    model = vit()
    alive, drawn = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))

    def batches():
        for x, _ in loader():
            assert all(reference() is None for reference in alive)
            drawn.append(len(x))
            yield x

    assert feature_frequencies(model, batches()).samples == 10
    assert drawn == [4, 4, 2]
    assert len(alive) == 3 * 4
    assert all(len(block._forward_hooks) == 1 for block in model.blocks)  # the test's own


def test_modes_come_back():
    model = vit(drop_rate=0.5, proj_drop_rate=0.5)
    expected = feature_frequencies(model, loader())
    model.train()
    model.blocks[1].eval()
    assert feature_frequencies(model, loader()) == expected
    assert model.training
    assert not model.blocks[1].training
    compared = compare_frequencies(model, skip_attention(model, (1,)), loader())
    assert compared.before == expected
    assert model.training
    assert not model.blocks[1].training


def test_a_common_factor_cancels_in_what_is_relative():
    """Blocks that add nothing leave 2^k of a removal with residual_scale 2: Δ is the same, amplitudes are not."""
    model = vit()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    comparison = compare_frequencies(model, convert_vit(model, (0, 2), residual_scale=2.0, fuse="removed"), loader())
    for k, before, after, change in zip(
        (1, 1, 2, 2), comparison.before.blocks, comparison.after.blocks, comparison.changes, strict=True
    ):
        assert after.relative == pytest.approx(before.relative, rel=1e-9, abs=1e-12)
        assert after.mean == pytest.approx(before.mean, rel=1e-9)
        assert [*change.relative, change.mean, change.mean_error] == pytest.approx(
            [0] * (len(change.relative) + 2), abs=1e-9
        )
        assert after.amplitude == pytest.approx([2**k * a for a in before.amplitude], rel=1e-9)
        assert after.power == pytest.approx([4**k * a for a in before.power], rel=1e-9)
        assert after.log_amplitude == pytest.approx([k * math.log(2) + a for a in before.log_amplitude], rel=1e-9)
    assert (comparison.after.removed, comparison.after.residual_scale) == ((0, 2), 2.0)


def test_a_comparison_is_two_measurements_and_their_paired_difference():
    model, data = vit(), loader()
    view = skip_attention(model, (1, 2))
    found = compare_frequencies(model, view, data)
    assert found.before == feature_frequencies(model, data)
    assert found.after == feature_frequencies(view, data)
    outputs = features(model, data), features(view, data)
    for index, change in enumerate(found.changes):
        first, second = (
            spectra_by_loops(part[index][:, 1:].reshape(10, 4, 4, 48))["log_amplitude"] for part in outputs
        )
        difference = (second - second[:, :1]) - (first - first[:, :1])
        assert change.block == index
        np.testing.assert_allclose(change.relative, difference.mean(0), rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(
            change.relative_error, difference.std(0, ddof=1) / math.sqrt(10), rtol=1e-7, atol=1e-10
        )
        mean = difference[:, 1:3].mean(1)
        assert (change.mean, change.mean_error) == pytest.approx(
            (mean.mean(), mean.std(ddof=1) / math.sqrt(10)), rel=1e-7
        )
    # before the first skipped attention nothing differs, and behind it something does
    assert set(found.changes[0].relative) | {found.changes[0].mean} == {0.0}
    assert all(abs(change.mean) > 1e-4 for change in found.changes[1:])
    # of images that have little in common, so that pairing is what makes the error small
    assert found.changes[3].mean_error < 0.9 * math.hypot(
        found.before.blocks[3].mean_error, found.after.blocks[3].mean_error
    )


def test_records_are_plain_json_and_pickle():
    found = compare_frequencies(vit(), convert_vit(vit(), (1,), fuse="removed"), loader())
    record = found.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert set(record) == {"before", "after", "changes"}
    assert record["after"]["removed"] == [1]
    assert record["before"]["grid"] == [4, 4]
    assert record["before"]["blocks"][2]["power"] == list(found.before.blocks[2].power)
    assert pickle.loads(pickle.dumps(found)) == found


def test_other_dtypes():
    half = feature_frequencies(vit().bfloat16(), loader())
    assert half.dtype == "bfloat16"
    exact = feature_frequencies(vit(), loader())
    assert half.blocks[1].relative == pytest.approx(exact.blocks[1].relative, abs=0.05)


def test_gradient_checkpointing_runs_blocks_all_the_same():
    model = vit()
    expected = feature_frequencies(model, loader())
    model.set_grad_checkpointing(True)
    assert feature_frequencies(model, loader()) == expected


def test_amplitudes_below_the_floor_are_counted():
    model = vit()
    with torch.no_grad():
        # A channel that is zero in every token: nothing is embedded, added or attended to there.
        model.patch_embed.proj.weight[7] = 0
        model.patch_embed.proj.bias[7] = 0
        model.pos_embed[..., 7] = 0
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight[7] = 0
                layer.bias[7] = 0
    found = feature_frequencies(model, loader())
    assert [row.floored for row in found.blocks] == [10 * 16] * 4
    assert all(math.isfinite(value) for row in found.blocks for value in numbers(row))
    assert [row.floored for row in feature_frequencies(vit(), loader()).blocks] == [0] * 4


class Dropping(torch.nn.Module):
    """Drops tokens, in eval mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :-3]


def test_tokens_that_are_no_map_are_refused():
    dropping = vit()
    dropping.patch_drop = Dropping()
    with pytest.raises(
        UnsupportedModelError, match=r"blocks\[0\] gives 13 tokens of the image and 1 others.*no map of 4 × 4"
    ):
        feature_frequencies(dropping, loader())
    # timm's own patch dropout is a training matter, and eval mode switches it off
    assert feature_frequencies(vit(patch_drop_rate=0.5).train(), loader()).grid == (4, 4)
    merging = vit()
    merging.blocks[1].register_forward_hook(lambda module, args, output: output[:, :-2])
    with pytest.raises(UnsupportedModelError, match=r"blocks\[1\] gives 14 tokens.*token merging"):
        feature_frequencies(merging, loader())
    assert not any(block._forward_hooks for block in dropping.blocks)
    with pytest.raises(ValueError, match=r"token map of 1 × 4 has no radial frequencies"):
        feature_frequencies(vit(img_size=(16, 64)), loader(4, 4, (16, 64)))


def test_models_that_say_too_little_are_refused():
    import timm

    with pytest.raises(UnsupportedModelError, match="SwinTransformer is not supported"):
        feature_frequencies(timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2), loader())
    if timm.is_model("naflexvit_base_patch16_gap"):  # timm has it since 1.0.16
        with pytest.raises(UnsupportedModelError, match=r"NaFlexVit.*not supported: its batches hold padding"):
            feature_frequencies(
                timm.create_model("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3), loader()
            )
    nameless = vit()
    nameless.num_prefix_tokens = None
    with pytest.raises(UnsupportedModelError, match=r"num_prefix_tokens is None"):
        feature_frequencies(nameless, loader())
    gridless = vit()
    embedding = gridless.patch_embed
    gridless.patch_embed = torch.nn.Sequential(copy.deepcopy(embedding))
    with pytest.raises(UnsupportedModelError, match="no map of a known size"):
        feature_frequencies(gridless, loader())
    twice = vit()
    forward = twice.forward_features
    twice.forward_features = lambda *args, **options: (forward(*args, **options), forward(*args, **options))[1]
    with pytest.raises(UnsupportedModelError, match=r"once, one after the other: 4 blocks ran as \[0, 1, 2, 3, 0, 1"):
        feature_frequencies(twice, loader())
    with pytest.raises(UnsupportedModelError, match=r"convert before torch\.compile"):
        feature_frequencies(torch.compile(vit()), loader())
    with pytest.raises(ValueError, match="meta device"):
        feature_frequencies(vit().to("meta"), loader())
    mixed = vit()
    mixed.head.double()
    with pytest.raises(ValueError, match="mixes dtypes"):
        feature_frequencies(mixed, loader())


def test_too_little_to_measure():
    model = vit()
    for data, got in (([], "no images"), ([torch.zeros(0, 3, SIZE, SIZE)], "no images"), (loader(1), "one image")):
        with pytest.raises(ValueError, match=f"loader gave {got}.*two or more"):
            feature_frequencies(model, data)
        with pytest.raises(ValueError, match=f"loader gave {got}.*two or more"):
            compare_frequencies(model, skip_attention(model, (1,)), data)


def test_images_of_several_sizes_are_refused():
    model = vit(dynamic_img_size=True)
    data = [images(2, 64), images(2, 96)]
    with pytest.raises(
        ValueError, match=r"batch 2 has token maps of 6 × 6, those before it 4 × 4: measure images of one size"
    ):
        feature_frequencies(model, data)


def test_models_that_do_not_compare_are_refused():
    with pytest.raises(ValueError, match="have 4 and 3 blocks"):
        compare_frequencies(vit(), vit(depth=3), loader())
    with pytest.raises(ValueError, match=r"token maps of 4 × 4 and 8 × 8"):
        compare_frequencies(vit(), vit(patch_size=8), loader())


def test_what_is_not_finite_is_named():
    model = vit()
    handle = model.blocks[2].attn.register_forward_hook(
        lambda m, a, output: output * (math.nan if len(output) == 2 else 1.0)
    )
    with pytest.raises(
        NonFiniteActivationError, match=r"^blocks\[2\]: 1632 of 1632 values.*batch 3 \(float32\)\. Check"
    ):
        feature_frequencies(model, loader())
    assert not any(block._forward_hooks for block in model.blocks)
    view = skip_attention(model, (2,))
    with pytest.raises(NonFiniteActivationError, match=r"^before: blocks\[2\]"):
        compare_frequencies(model, view, loader())
    with pytest.raises(NonFiniteActivationError, match=r"^after: blocks\[2\]"):
        compare_frequencies(view, model, loader())
    handle.remove()
    model.half().blocks[1].register_forward_hook(lambda m, a, output: output * 1e30)
    with pytest.raises(NonFiniteActivationError, match=r"blocks\[1\].*\(float16\)\. Try bfloat16"):
        feature_frequencies(model, loader())
