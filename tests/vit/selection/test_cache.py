"""What is kept between passes: the same numbers whichever way, images decoded once, sizes known before, nothing left."""

from __future__ import annotations

import shutil
import types
import weakref

import pytest
import torch
from safetensors import SafetensorError
from selection_support import CountingLoader, Endless, labelled
from small_models import images, small_vit

from lambda_vit import select_layers
from lambda_vit.selection import activation_cache
from lambda_vit.selection.activation_cache import Batch
from lambda_vit.selection.measurement import Measurement

TOKENS, WIDTH = 5, 48  # of `small_vit` on 32×32 images: four patches and the class token
# Of an image: its tokens, its label, and the full model's logits.
EACH = TOKENS * WIDTH * 4 + 8 + 10 * 4
pytestmark = pytest.mark.filterwarnings("ignore::lambda_vit.selection.result.SelectionWarning")

PATHS = [frozenset(path) for path in ((), (1,), (0, 2))]


@pytest.mark.parametrize("strategy", ["nose", "kl", "accuracy"])
def test_the_same_selection_whichever_way(strategy, tmp_path):
    model, found, loaders = small_vit(), {}, {}
    for cache in ("none", "ram", "disk", "auto"):
        loaders[cache] = CountingLoader(labelled())
        found[cache] = select_layers(
            model, loaders[cache], 3, strategy=strategy, cache=cache, cache_folder=tmp_path / "cache"
        )
    assert all(selection == found["none"] for selection in found.values())
    assert {cache: loader.passes for cache, loader in loaders.items()} == {"none": 3, "ram": 1, "disk": 1, "auto": 1}
    assert {cache: loader.given for cache, loader in loaders.items()} == {"none": 9, "ram": 3, "disk": 3, "auto": 3}
    assert list((tmp_path / "cache").iterdir()) == []


def plan_of(cache: str, loader: object = None, **options: object) -> activation_cache.CachePlan:
    with Measurement(small_vit(), labelled() if loader is None else loader, cache=cache, **options) as measurement:
        measurement.measure(PATHS)
        measurement.measure(PATHS)
        return measurement.activations.plan


def test_the_size_is_known_before_anything_is_kept(monkeypatch):
    kept = []
    keep = activation_cache.ActivationCache._keep
    monkeypatch.setattr(
        activation_cache.ActivationCache, "_keep", lambda self, batch: (kept.append(self.plan), keep(self, batch))
    )
    plan = plan_of("ram", cache_budget=24 * EACH)
    assert (plan.kind, plan.bytes) == ("ram", 24 * EACH)
    assert kept[0] == plan
    kept.clear()
    for cache, others in (("ram", "disk or none"), ("disk", "none")):
        words = rf"24 images take .*, the budget is 2.*Use fewer images, a larger budget .*, or {others} \(--cache\)"
        with pytest.raises(ValueError, match=words):
            plan_of(cache, cache_budget=24 * EACH - 1)
    assert kept == []


def test_auto_falls_back_and_says_why(tmp_path):
    loader = CountingLoader(labelled())
    plan = plan_of("auto", loader, cache_budget=1000)
    assert plan.kind == "none"
    assert "24 images take" in plan.reason
    assert "the budget is 1000 B" in plan.reason
    assert loader.passes == 2
    assert "quarter of the free memory" in plan_of("auto").reason


def test_sizes_of_uneven_batches():
    """Lists are counted; of other loaders, the batch size counts where the first batch is a short one."""
    uneven = [(images(n), torch.zeros(n, dtype=torch.long)) for n in (2, 9)]
    assert plan_of("ram", uneven).bytes == 11 * EACH
    loader = CountingLoader(uneven)
    loader.batch_size = 9
    assert plan_of("ram", loader).bytes == 18 * EACH


def test_processes_of_one_machine_share_what_is_free(monkeypatch, tmp_path):
    usage = types.SimpleNamespace(free=activation_cache.DISK_RESERVE + 24 * EACH)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert plan_of("disk", cache_folder=tmp_path).kind == "disk"
    memory = activation_cache._free_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the usable free space on the disk"):
        plan_of("disk", cache_folder=tmp_path)
    assert activation_cache._free_memory() == pytest.approx(memory / 2, rel=0.2)


def test_loaders_without_a_length():
    plan = plan_of("auto", Endless(labelled()))
    assert (plan.kind, plan.reason) == ("none", "the loader has no length")
    for cache in ("ram", "disk"):
        with pytest.raises(ValueError, match=f"cache='{cache}'.*requires a loader with a length"):
            plan_of(cache, Endless(labelled()))
    expected = select_layers(small_vit(), labelled(), 2)
    assert select_layers(small_vit(), Endless(labelled()), 2) == expected


def test_wrong_options():
    for options, words in (
        ({"cache": "gpu"}, "cache must be one of auto, ram, disk, none; got 'gpu'"),
        ({"cache_budget": 0}, "cache_budget must be an integer of at least 1, a number of bytes; got 0"),
        ({"cache_budget": 2.5}, "got 2.5"),
    ):
        with pytest.raises(ValueError, match=words):
            select_layers(small_vit(), labelled(), 1, **options)


class Breaks(CountingLoader):
    """Fails before the last batch of the pass."""

    def __iter__(self):
        yield from self.batches[:-1]
        raise RuntimeError("the images are gone")


def test_the_folder_goes_after_an_error_too(tmp_path):
    with pytest.raises(RuntimeError, match="the images are gone"):
        select_layers(small_vit(), Breaks(labelled()), 2, cache="disk", cache_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=activation_cache.DISK_RESERVE + 100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(
            ValueError, match=r"does not fit: 24 images take .*KiB, the usable free space on the disk .*100 B"
        ):
            select_layers(small_vit(), labelled(), 1, cache="disk", cache_folder=tmp_path)
    save = activation_cache.save_file
    for failure in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):

        def fail_later(tensors, path, failure=failure):
            if path.stem != "0":
                raise failure
            save(tensors, path)

        with monkeypatch.context() as patch:
            patch.setattr(activation_cache, "save_file", fail_later)
            with pytest.raises(OSError, match=r"cannot write the cache .*No space left.*--cache none"):
                select_layers(small_vit(), labelled(), 1, cache="disk", cache_folder=tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_cache_that_somebody_removed(tmp_path):
    with Measurement(small_vit(), labelled(), cache="disk", cache_folder=tmp_path) as measurement:
        measurement.measure(PATHS)
        for path in tmp_path.rglob("1.safetensors"):
            path.unlink()
        with pytest.raises(OSError, match=r"cannot read the cache .*1\.safetensors"):
            measurement.measure(PATHS)
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_earlier_batches_is_held_without_a_cache(monkeypatch):
    """While a batch is embedded, no tokens of an earlier one are alive."""
    alive, most = weakref.WeakSet(), []
    model = small_vit()
    with Measurement(model, labelled(48, 8), cache="none") as measurement:
        embed = measurement.runner.embed

        def watched(batch):
            most.append(len(alive))
            start = embed(batch)
            alive.add(start.tokens)
            return start

        monkeypatch.setattr(measurement.runner, "embed", watched)
        measurement.measure(PATHS, compare=True, label=True)
        measurement.cosine_distances()
    assert most == [0] * 12


def test_what_is_kept_is_no_view_of_more():
    """The tokens of a batch may be a slice of a larger tensor, which a kept view would keep alive."""
    with Measurement(small_vit(), labelled(), cache="ram") as measurement:
        measurement.measure(PATHS, compare=True)
        for kept in measurement.activations._kept:
            assert isinstance(kept, Batch)
            for tensor in (kept.start.tokens, kept.targets, kept.full):
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert kept.images is None
    assert measurement.activations._kept == []


def test_the_full_models_answers_are_kept_with_the_rest():
    """With a cache the full model runs once in all, and not beside the paths of every round."""
    model, runs = small_vit(), []
    with Measurement(model, labelled(), cache="ram") as measurement:
        measurement.measure([frozenset((1,))], compare=True)
        model.blocks[1].attn.register_forward_hook(lambda *_: runs.append(1))
        measurement.measure([frozenset((1,))], compare=True)
        assert runs == []


def test_labels_that_are_no_numbers_do_not_disturb_who_needs_none():
    batches = [(x, [f"{n}.png" for n in range(len(x))]) for x, _ in labelled()]
    assert select_layers(small_vit(), batches, 1) == select_layers(small_vit(), labelled(), 1)
    assert select_layers(small_vit(), [x for x, _ in batches], 1) == select_layers(small_vit(), labelled(), 1)
    with pytest.raises(ValueError, match="yields no labels"):
        select_layers(small_vit(), batches, 1, strategy="accuracy")


def test_empty_batches_count_for_nothing():
    batches = [(images(0), torch.zeros(0)), *labelled(), (images(0), torch.zeros(0))]
    for strategy in ("nose", "accuracy"):
        expected = select_layers(small_vit(), labelled(), 1, strategy=strategy)
        assert select_layers(small_vit(), batches, 1, strategy=strategy) == expected
