"""Paths with shared prefixes: the numbers of one full forward per candidate, at the price of a trie."""

from __future__ import annotations

import pytest
import torch
from selection_support import labelled, plain_outputs, plain_result
from small_models import images, small_vit
from timm.models.vision_transformer import VisionTransformer

from lambda_kernels import UnsupportedModelError, convert_vit
from lambda_vit import select_layers
from lambda_vit.models.views import skip_attention
from lambda_vit.selection.measurement import Measurement
from lambda_vit.selection.paths import PathRunner
from lambda_vit.selection.prefix_cache import FULL

pytestmark = pytest.mark.models

PATHS = [frozenset(path) for path in ((), (2,), (2, 0), (1, 2), (2, 3), (0, 1, 3))]

MODELS = {
    "class token": lambda: small_vit(),
    "distilled": lambda: small_vit("deit_tiny_distilled_patch16_224"),
    "average": lambda: small_vit(global_pool="avg"),
    "registers": lambda: small_vit(reg_tokens=3),
    "layer scale": lambda: small_vit("deit3_small_patch16_224"),
    "pre-norm": lambda: small_vit("vit_base_patch16_clip_224"),
    "map": lambda: small_vit("vit_base_patch16_siglip_224"),
    "fused": lambda: convert_vit(small_vit(), remove=()),
}


class Normalising(VisionTransformer):
    """Brings its images to the range it was trained on, and turns the logits around: more than timm's own forward."""

    def forward(self, x, **options):
        return super().forward((x - torch.linspace(0, 1, 32, dtype=x.dtype)) / 0.3, **options).roll(1, dims=1) ** 3


def of_class(kind: type) -> torch.nn.Module:
    model = small_vit()
    model.__class__ = kind
    return model


def check_against_plain(model, score: str, estimator: str, shared: bool = True) -> None:
    model, data = model.double(), labelled()
    with Measurement(model, data, score=score, estimator=estimator) as measurement:
        found = measurement.measure(PATHS, compare=True, label=True)
        again = measurement.measure(PATHS[1:], compare=True, label=True)
    assert list(found) == PATHS
    assert again == {path: found[path] for path in PATHS[1:]}
    for path, result in found.items():
        wanted = plain_result(model, data, sorted(path), score=score, estimator=estimator)
        assert {name: getattr(result, name) for name in wanted} == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        assert result.images == 24
    assert (measurement.runner.why_images is None) == shared
    assert ("the embedding and" in measurement.engine()["shared"]) == shared


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_one_forward_per_candidate(name):
    check_against_plain(MODELS[name](), "logits", "gaussian")


@pytest.mark.parametrize("name", ["class token", "average", "distilled", "map"])
def test_pre_logits_and_histograms(name):
    check_against_plain(MODELS[name](), "pre_logits", "histogram")


@pytest.mark.parametrize("score", ["logits", "pre_logits"])
def test_forwards_of_ones_own_take_the_images_along(score):
    model = of_class(Normalising)
    assert not torch.allclose(model(images()), small_vit()(images()))
    check_against_plain(model, score, "gaussian", shared=False)


def test_why_the_images_are_needed_is_told():
    runner = PathRunner(of_class(Normalising))
    with torch.no_grad():
        start = runner.embed(images())
    assert start.images is not None
    assert "its forward" in runner.why_images

    class Scaling(VisionTransformer):
        def forward(self, x, **options):
            return 3 * super().forward(x.abs(), **options)

    runner = PathRunner(of_class(Scaling))
    with torch.no_grad():
        runner.embed(images())
    assert "more than embedding, blocks, norm and head" in runner.why_images


def test_forwards_that_cannot_be_followed_are_refused():
    class Mirrored(VisionTransformer):
        def forward(self, x, **options):
            return super().forward(x, **options) + super().forward(x.flip(3), **options)

    with pytest.raises(UnsupportedModelError, match="Mirrored does not run its blocks once"):
        select_layers(of_class(Mirrored), labelled(), 1)
    model = small_vit()
    model.forward = model.forward  # bound to this model: a view of it would run the full model's blocks
    with pytest.raises(UnsupportedModelError, match="replaced on the instance"):
        select_layers(model, labelled(), 1)


def test_compiled_models_lose_attention_too():
    model = small_vit()
    model.compile(backend="eager")
    plain = small_vit()
    with torch.no_grad():
        found = skip_attention(model, (1,))(images())
    assert torch.allclose(found, plain_outputs(plain, [(images(),)], (1,))[0], atol=1e-5)
    assert not torch.allclose(found, plain(images()), atol=1e-3)


@pytest.mark.parametrize(
    "paths",
    [
        [FULL],
        [frozenset((i,)) for i in range(5)],
        [FULL, *(frozenset((i,)) for i in range(5))],
        [frozenset((1, i)) for i in (0, 2, 3, 4)],
        [frozenset(p) for p in ((0, 1), (0, 2), (3,), (3, 4), (), (0, 1, 2, 3))],
    ],
)
def test_every_block_runs_as_often_as_the_trie_branches(paths):
    """Block b is needed once for each different set of skips among blocks 0…b."""
    model = small_vit(depth=5)
    runner = PathRunner(model)
    runs, attentions = [0] * 5, [0] * 5

    def count(into, index):
        return lambda *_: into.__setitem__(index, into[index] + 1)

    with torch.inference_mode():
        start = runner.embed(images())
        for index, block in enumerate(model.blocks):
            block.mlp.register_forward_hook(count(runs, index))
            block.attn.register_forward_hook(count(attentions, index))
        found = list(runner.outputs(start, [*paths, *paths]))
        prefixes = [{frozenset(b for b in path if b <= index) for path in paths} for index in range(5)]
        assert runs == [len(p) for p in prefixes]
        assert attentions == [sum(index not in prefix for prefix in p) for index, p in enumerate(prefixes)]
        assert sorted(map(sorted, (path for path, _ in found))) == sorted(map(sorted, paths))
        for path, out in found:
            assert torch.equal(out.logits, skip_attention(model, sorted(path))(images()))


def test_the_embedding_runs_once_per_batch_and_pass():
    model, data = small_vit(), labelled()
    seen = []
    model.patch_embed.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    with Measurement(model, data, cache="none") as measurement:
        measurement.measure(PATHS)
        assert seen == [2, 2, 8, 8, 8]  # two images, twice, to see how the model can be split
        measurement.measure(PATHS)
        assert seen[5:] == [8, 8, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_a_forward_scales_are_noticed_in_any_dtype(dtype):
    model = small_vit().to(dtype)

    class Scaled(type(model)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1.25 if x.dim() == 4 else 1.0)

    model.__class__ = Scaled
    runner = PathRunner(model)
    with torch.inference_mode():
        batch = images().to(dtype)
        ((_, found),) = runner.outputs(runner.embed(batch), [frozenset()])
        assert "does more than embedding" in runner.why_images
        assert torch.equal(found.logits, model(batch))
