"""lambda_vit.training.images.opening: folders and zips, sets of the Hugging Face hub, WebDataset shards."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_vit
from stream_support import SMALL, assert_same, collected, image_set, picture, write_folder, write_zip

from lambda_vit.data.images import CorruptImageError
from lambda_vit.data.transforms import transforms_for
from lambda_vit.measure.accuracy import evaluate
from lambda_vit.runtime.seeding import preserved, seed_all
from lambda_vit.training.images.hub import HubImages
from lambda_vit.training.images.opening import open_training_data, training_transform
from lambda_vit.training.images.shards import open_shards
from lambda_vit.training.loop.model_setup import prepare_model
from lambda_vit.training.recipe import Recipe, load_recipe

MODEL = small_vit(num_classes=2)
RECIPE = Recipe(**SMALL)


class Ranks:
    """What a process of several knows of them."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def shares(data: str, size: int, **options: object) -> list[tuple]:
    return [open_training_data(data, MODEL, RECIPE, processes=Ranks(rank, size), **options) for rank in range(size)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_zip(tmp_path_factory.mktemp("set") / "images.zip", image_set())


# Folders and zips


def test_both_splits_are_opened_each_with_its_transform(images):
    stream, loader = open_training_data(images, MODEL, RECIPE, val_batch_size=4)
    (part, *_) = next(stream.steps(0))
    assert tuple(part.images.shape) == (2, 3, 32, 32)
    assert (stream.steps_per_epoch, len(loader), loader.batch_size) == (5, 2, 4)
    assert torch.cat([labels for _, labels in loader]).tolist() == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(one, two) for (one, _), (two, _) in zip(loader, loader, strict=True))
    assert evaluate(MODEL, loader).images == 6
    assert stream.fingerprint()["transform"] != repr(loader.dataset.transform)


def test_validation_images_are_cropped_as_the_model_says_or_the_recipe(images):
    model = small_vit(num_classes=2)
    _, loader = open_training_data(images, model, RECIPE)
    assert repr(loader.dataset.transform) == repr(transforms_for(model))
    assert "Resize(size=35" in repr(loader.dataset.transform)  # of timm's 0.9
    own = dataclasses.replace(RECIPE, crop_pct=1.0)
    _, loader = open_training_data(images, model, own)
    assert "Resize(size=32" in repr(loader.dataset.transform)
    # Whoever loads the model afterwards measures it on the same crop.
    assert repr(transforms_for(prepare_model(model, own))) == repr(loader.dataset.transform)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_training_and_validation(images, size):
    stream, loader = open_training_data(images, MODEL, RECIPE)
    whole, val = collected(stream, epoch=1), list(loader)
    opened = shares(images, size)
    for part, _ in opened:
        assert_same(collected(part, epoch=1), whole)
    found = [batch for _, share in opened for batch in share]
    assert len(found) == len(val) == 3
    assert all(any(torch.equal(batch[0], other[0]) for other in found) for batch in val)


def test_options_reach_the_stream_and_the_loader(images):
    stream, loader = open_training_data(images, MODEL, RECIPE, workers=1, skip_bad=5, prefetch=3)
    assert (stream.workers, stream.skip_bad, stream._loader.prefetch_factor) == (1, 5, 3)
    assert (loader.workers, loader.skip_bad, loader.batch_size) == (1, 5, 2)
    with pytest.raises(
        ValueError, match="3 processes cannot share the 4 micro-batches of a step evenly: start 1, 2, 4"
    ):
        shares(images, 3)


def test_classes_that_differ_between_the_splits_are_listed(tmp_path):
    files = {**image_set(), "val/c/0.jpg": b"", "val/d/0.jpg": b""}
    files = {name: content for name, content in files.items() if not name.startswith("val/a")}
    with pytest.raises(ValueError, match=r"of the train split.*missing \(1\): a; extra \(2\): c, d"):
        open_training_data(write_zip(tmp_path / "images.zip", files), MODEL, RECIPE)


def test_classes_that_do_not_fit_the_model_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match=r"2 class folders .* num_classes=10"):
        open_training_data(images, small_vit(), RECIPE)
    stream, loader = open_training_data(images, small_vit(), RECIPE, class_map={"a": 7, "b": 3})
    assert set(stream.dataset.targets) == set(loader.dataset.targets) == {3, 7}


def test_a_new_classifier_learns_whatever_order_the_classes_have(tmp_path):
    pictures = list(image_set().values())
    data = write_folder(
        tmp_path,
        {f"{split}/{name}/{i}.jpg": pictures[i] for split in ("train", "val") for name in range(11) for i in (0, 1)},
    )
    with pytest.warns(UserWarning, match="the labels follow timm's order"):
        open_training_data(data, small_vit(num_classes=11), RECIPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream, loader = open_training_data(data, small_vit(num_classes=11), RECIPE, new_classifier=True)
    assert stream.dataset.class_to_idx == loader.dataset.class_to_idx == {str(name): name for name in range(11)}


def test_validation_images_may_lie_elsewhere_and_take_the_labels_of_training(tmp_path, images):
    held_out = write_folder(tmp_path / "val", {name: image_set()[f"val/{name}"] for name in ("a/000.jpg", "b/001.jpg")})
    pictures = {f"{name}/{i}.jpg": content for name in "ab" for i, content in enumerate(list(image_set().values())[:4])}
    training = write_folder(tmp_path / "train", pictures)
    stream, loader = open_training_data(training, MODEL, RECIPE, val_data=held_out, class_map={"a": 1, "b": 0})
    assert (len(stream.dataset), loader.dataset.targets) == (8, [1, 0])
    with pytest.raises(ValueError, match=r"no split folders.*same images.*--val-data"):
        open_training_data(training, MODEL, RECIPE)
    (held_out / "b" / "001.jpg").rename(held_out / "a" / "1.jpg")
    (held_out / "b").rmdir()
    with pytest.raises(ValueError, match=r"missing \(1\): b"):
        open_training_data(images, MODEL, RECIPE, val_data=held_out)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_training_data(tmp_path / "nowhere", MODEL, RECIPE)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        open_training_data(tmp_path, MODEL, RECIPE)


# Transforms


def test_the_transform_is_timms_with_the_figures_of_the_recipe():
    recipe = Recipe(
        scale=(0.5, 0.9),
        ratio=(0.8, 1.2),
        reprob=0.4,
        remode="const",
        recount=2,
        hflip=0.25,
        aa="rand-m3-n4",
        train_interpolation="box",
    )
    text = repr(training_transform(MODEL, recipe))
    for piece in ("scale=(0.5, 0.9)", "ratio=(0.8, 1.2)", "p=0.25", "RandAugment(n=4", "interpolation=box"):
        assert piece in text
    assert "RandomErasing(p=0.4, mode=const, count=(1, 2))" in text
    assert "ColorJitter" not in text
    jittered = repr(training_transform(MODEL, Recipe(aa=None, color_jitter=0.2)))
    assert "ColorJitter(brightness=(0.8, 1.2)" in jittered.replace("[", "(").replace("]", ")")
    plain = repr(training_transform(MODEL, load_recipe("digits")))
    for piece in ("ColorJitter", "RandAugment", "Erasing", "Flip"):
        assert piece not in plain


@pytest.mark.parametrize(
    ("policy", "channels"),
    [
        *(
            (policy, channels)
            for policy in ("rand-m10-n15-inc1", "rand-m1-n15", "original", "v0")
            for channels in (1, 3)
        ),
        ("augmix-m10", 3),
    ],
)
def test_every_operation_of_a_policy_runs_at_its_highest_level(policy, channels):
    model = small_vit(in_chans=channels)
    transform = training_transform(model, Recipe(aa=policy))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    with preserved():
        for seed in range(20):
            seed_all(seed)
            assert tuple(transform(Image.fromarray(pixels)).shape) == (channels, 32, 32)


def test_keeping_no_bit_of_an_image_blackens_it():
    from timm.data.auto_augment import AugmentOp

    transform = training_transform(MODEL, Recipe(aa="rand-m10-inc1"))
    (policy,) = (part for part in transform.transforms if hasattr(part, "ops"))
    (op,) = (op for op in policy.ops if op.name == "PosterizeIncreasing")
    op.prob = 1.0
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    assert not np.asarray(op(image)).any()
    op.magnitude = 5
    reference = AugmentOp("PosterizeIncreasing", 1.0, 5, op.hparams)
    assert np.array_equal(np.asarray(op(image)), np.asarray(reference(image)))
    assert np.asarray(op(image)).any()


def test_another_image_size_than_the_models_is_refused():
    with pytest.raises(
        ValueError, match=r"img_size=48 and the model takes 32×32 pixels: call model.set_input_size\(48\)"
    ):
        training_transform(MODEL, Recipe(img_size=48))
    model = small_vit()
    model.set_input_size(48)
    image = Image.new("RGB", (20, 20))
    assert training_transform(model, Recipe(img_size=48))(image).shape[1:] == (48, 48)


# The Hugging Face hub


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A folder that datasets reads by itself, its cache beside it; capitals in its name count."""
    return write_folder(tmp_path_factory.mktemp("hub") / "Images", image_set())


@pytest.fixture
def hub(hub_folder, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub_folder.parent / "cache")
    return f"hfds/{hub_folder}"


def test_a_hub_set_gives_the_stream_of_its_folder(hub, hub_folder):
    expected, val = open_training_data(hub_folder, MODEL, RECIPE)
    stream, loader = open_training_data(hub, MODEL, RECIPE)
    whole = collected(expected, epoch=1)
    assert_same(collected(stream, epoch=1), whole)
    assert loader.dataset.split == "validation"
    for (found, labels), (images, targets) in zip(loader, val, strict=True):
        assert torch.equal(found, images)
        assert torch.equal(labels, targets)
    assert_same(collected(shares(hub, 2)[1][0], epoch=1, start=3), whole)
    workers, _ = open_training_data(hub, MODEL, RECIPE, workers=1)
    assert_same(collected(workers, epoch=1, steps=2), whole)
    workers.close()
    assert stream.fingerprint() == workers.fingerprint() == json.loads(json.dumps(stream.fingerprint()))
    assert stream.describe()["root"] == hub


def test_hub_labels_follow_a_class_map_and_fit_the_model(hub):
    stream, loader = open_training_data(hub, small_vit(), RECIPE, class_map={"a": 9, "b": 2})
    assert set(stream.dataset.targets) == set(loader.dataset.targets) == {9, 2}
    with pytest.raises(ValueError, match=r"2 classes in split 'train' of hfds.*num_classes=10"):
        open_training_data(hub, small_vit(), RECIPE)
    with pytest.raises(ValueError, match=r"without a label: extra \(1\): b"):
        open_training_data(hub, small_vit(), RECIPE, class_map={"a": 9, "c": 2})
    with pytest.raises(ValueError, match="labels outside 0…1 for num_classes=2"):
        open_training_data(hub, MODEL, RECIPE, class_map={"a": 0, "b": 2})


def test_a_hub_set_that_is_not_there_is_refused(tmp_path, hub):
    with pytest.raises(ValueError, match=r"cannot open hfds/.*nowhere .*a network or a filled cache"):
        open_training_data(f"hfds/{tmp_path}/nowhere", MODEL, RECIPE)
    with pytest.raises(ValueError, match=r"has no column 'fine' of labels; it has image: Image, label: ClassLabel"):
        open_training_data(f"{hub}#fine", MODEL, RECIPE)


def test_a_hub_set_with_several_labels_lets_one_choose(tmp_path, hub):
    import datasets

    files = image_set(train=8, val=2)
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine": datasets.ClassLabel(names=["w", "x", "y", "z"]),
            "coarse": datasets.ClassLabel(names=["p", "q"]),
        }
    )
    for split in ("train", "test"):
        content = [files[name] for name in files if name.startswith("train")]
        rows = {
            "img": [{"bytes": part, "path": None} for part in content],
            "fine": [0, 1, 2, 3] * 2,
            "coarse": [0, 1] * 4,
        }
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"several columns of labels: fine, coarse\. Choose one with"):
        open_training_data(f"hfds/{tmp_path}", MODEL, RECIPE)
    stream, loader = open_training_data(f"hfds/{tmp_path}#coarse", MODEL, RECIPE)
    assert (stream.dataset.targets, loader.dataset.split) == ([0, 1] * 4, "test")
    assert len(collected(stream)) == 4


def test_unreadable_images_of_a_hub_set_are_counted(tmp_path, hub):
    files = image_set()
    files["train/b/005.jpg"] = files["train/b/005.jpg"][:100]
    files["val/a/000.jpg"] = b"no image"
    data = f"hfds/{write_folder(tmp_path / 'set', files)}"
    stream, loader = open_training_data(data, MODEL, RECIPE, skip_bad=1)
    assert len(collected(stream)) == 20
    assert [path.rpartition("/")[2] for path in stream.bad] == ["005.jpg"]
    assert sum(len(labels) for _, labels in loader) == 5
    assert len(loader.bad) == 1
    strict, _ = open_training_data(data, MODEL, RECIPE)
    with pytest.raises(CorruptImageError, match=r"hfds/.*train\[\d+\] .*b/005.jpg"):
        collected(strict)


def test_the_cause_behind_an_error_of_the_hub_is_named(monkeypatch):
    def fail(name):
        raise RuntimeError("An error occurred while generating the dataset") from KeyError("the cause")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(get_dataset_split_names=fail))
    with pytest.raises(ValueError, match=r"cannot open hfds/x \(KeyError: 'the cause'\)"):
        open_training_data("hfds/x", MODEL, RECIPE)


def test_rows_of_a_hub_set_without_an_image_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path, {"0.jpg": picture(0)}))
    rows = [{"image": None}, {"image": {"bytes": None, "path": None}}, {"image": {"bytes": b"", "path": "0.jpg"}}]
    found = HubImages("hfds/x", "train", rows, "image", [0, 0, 0], {"a": 0}, 1, None, on_bad="mark")
    assert [found[i].reason for i in range(3)] == [*["the data set stores no image here"] * 2, "not an image"]


# WebDataset


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    kind = {".gz": "w:gz", ".tgz": "w:gz"}.get(path.suffix, "w")
    with tarfile.open(path, kind) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, files: dict[str, bytes], each: int = 5, info: bool = True) -> Path:
    """Shards of `each` samples, with the index of the class as label."""
    folder.mkdir()
    known = {}
    for split, name in (("train", "train"), ("val", "validation")):
        paths = [path for path in files if path.startswith(split)]
        lengths = []
        for number, first in enumerate(range(0, len(paths), each)):
            part = paths[first : first + each]
            lengths.append(len(part))
            members = []
            for path in part:
                key = path.replace("/", "_").removesuffix(".jpg")
                label = str("ab".index(path.split("/")[1])).encode()
                members += [(f"{key}.jpg", files[path]), (f"{key}.cls", label)]
            write_tar(folder / f"set-{name}-{number:02d}.tar", members)
        names = [f"set-{name}-{number:02d}.tar" for number in range(len(lengths))]
        known[name] = {"name": name, "filenames": names, "shard_lengths": lengths, "num_samples": len(paths)}
    if info:
        (folder / "_info.json").write_text(json.dumps({"splits": known}))
    return folder


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    return write_shards(tmp_path / "shards", image_set(train=43))


def test_shards_give_the_same_stream_to_any_processes_and_workers(shards):
    data = f"wds/{shards}"
    stream, _ = open_training_data(data, MODEL, RECIPE)
    assert (stream.steps_per_epoch, stream.micro_batches, stream.exact) == (5, 4, None)
    whole = collected(stream, epoch=1)
    assert len(whole) == 20
    assert_same(collected(stream, epoch=1, start=3), whole)
    assert_same(collected(shares(data, 2, workers=1)[1][0], epoch=1), whole)
    assert_same(collected(shares(data, 4)[3][0], epoch=1, start=1), whole)
    for workers in (1, 2):
        others, _ = open_training_data(data, MODEL, RECIPE, workers=workers)
        assert_same(collected(others, epoch=1, start=1), whole)
    second = collected(stream, epoch=2)
    assert not torch.equal(second[0, 0][0], whole[0, 0][0])
    assert stream.fingerprint() == json.loads(json.dumps(stream.fingerprint()))
    assert "reads past what was used" in stream.describe()["order"]


@pytest.mark.parametrize(("count", "whole"), [(40, True), (43, False)])
def test_no_sample_of_a_number_comes_again_before_all_came(tmp_path, shards, count, whole):
    folder = write_shards(tmp_path / "counted", image_set(train=count))
    stream, _ = open_training_data(f"wds/{folder}", MODEL, RECIPE)
    paths: list[str] = []
    load = stream.dataset.load
    stream.dataset.load = lambda sample: (paths.append(sample[0]), load(sample))[1]
    collected(stream)
    found = [[paths[8 * step + 2 * number + slot] for step in range(5) for slot in (0, 1)] for number in range(4)]
    urls = [{path.partition("!")[0] for path in own} for own in found]
    assert sum(map(len, urls)) == len(set().union(*urls))  # no two numbers share a shard
    for own, shards_of_it in zip(found, urls, strict=True):
        there = min(10, sum(stream.dataset.lengths[url] for url in shards_of_it))
        assert len(set(own[:there])) == there
    assert (len(set(paths)) == 40) == whole


def test_validation_on_shards_sees_each_image_once(tmp_path, shards):
    files = image_set(train=8, val=23)
    folder = write_shards(tmp_path / "more", files)
    _, plain = open_training_data(write_folder(tmp_path / "plain", files), MODEL, RECIPE, val_batch_size=4)
    transform = plain.dataset.transform
    for size, workers in ((1, 0), (1, 2), (2, 0), (3, 2), (8, 0)):  # five shards: eight processes share each of them
        opened = [open_shards(str(folder), "val", transform, 2) for _ in range(size)]
        loaders = [part.loader(4, shard=(rank, size), workers=workers) for rank, part in enumerate(opened)]
        batches = [batch for loader in loaders for batch in loader]
        pixels = torch.cat([images for images, _ in batches]).double().sum((1, 2, 3)).sort().values
        expected = torch.cat([images for images, _ in plain]).double().sum((1, 2, 3)).sort().values
        assert torch.equal(pixels, expected)
    assert evaluate(MODEL, opened[0].loader(4)).top1 == evaluate(MODEL, plain).top1


def test_shards_without_an_info_file_are_counted(tmp_path, shards):
    folder = write_shards(tmp_path / "bare", image_set(train=43), info=False)
    bare, known = open_shards(str(folder), "val", None), open_shards(str(shards), "val", None)
    assert list(bare.lengths.values()) == list(known.lengths.values()) == [5, 1]
    bare, known = open_shards(str(folder), "train", None), open_shards(str(shards), "train", None)
    assert bare.fingerprint() == known.fingerprint()
    assert (len(bare), bare.split) == (43, "train")


def test_unreadable_images_in_shards_are_counted_and_others_stand_in(tmp_path, shards):
    files = image_set(train=43)
    files["train/b/005.jpg"] = files["train/b/005.jpg"][:100]
    files["val/a/000.jpg"] = b"no image"
    data = f"wds/{write_shards(tmp_path / 'damaged', files)}"
    whole = collected(open_training_data(f"wds/{shards}", MODEL, RECIPE)[0])
    for workers in (0, 2):
        stream, loader = open_training_data(data, MODEL, RECIPE, skip_bad=1, workers=workers)
        found = collected(stream)
        assert [path.rpartition("!")[2] for path in stream.bad] == ["train_b_005"]
        assert sum(not torch.equal(found[key][0], whole[key][0]) for key in whole) == 1
        assert sum(len(labels) for _, labels in loader) == 5
        assert len(loader.bad) == 1
    strict, loader = open_training_data(data, MODEL, RECIPE)
    for reading in (lambda: collected(strict), lambda: list(loader)):
        with pytest.raises(CorruptImageError, match="with 0 allowed"):
            reading()


def test_shards_leave_the_callers_generators_alone(shards):
    stream, loader = open_training_data(f"wds/{shards}", MODEL, RECIPE)
    with preserved():
        seed_all(1)
        expected = np.random.rand(), torch.rand(1)
        seed_all(1)
        collected(stream)
        list(loader)
        assert (np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 20}, "has 9 shards and a step 10 micro-batches, of which each reads shards of its own"),
        ({"repeated_aug": 3}, "repeated_aug=3: shards give one view"),
        ({"batch_size": 44}, "has 43 images, a step takes batch_size=44"),
    ],
)
def test_shards_that_do_not_fit_the_recipe_are_refused(shards, change, message):
    with pytest.raises(ValueError, match=message):
        open_training_data(f"wds/{shards}", MODEL, Recipe(**{**SMALL, **change}))


def test_damaged_shards_are_refused_by_name(tmp_path, shards):
    for name, content in (("cut", lambda b: b[:3000]), ("short", lambda b: b[: len(b) // 2 // 512 * 512])):
        folder = write_shards(tmp_path / name, image_set(train=43))
        target = folder / "set-train-03.tar"
        target.write_bytes(content(target.read_bytes()))
        stream, _ = open_training_data(f"wds/{folder}", MODEL, RECIPE)
        with pytest.raises(ValueError, match=r"shard .*set-train-03\.tar"):
            collected(stream)


def test_wrong_labels_and_other_files_in_shards_are_refused(tmp_path, shards):
    with pytest.raises(ValueError, match="the labels of shards are numbers already"):
        open_training_data(f"wds/{shards}", MODEL, RECIPE, class_map={"a": 0, "b": 1})
    stream, _ = open_training_data(f"wds/{shards}", small_vit(num_classes=1), RECIPE)
    with pytest.raises(ValueError, match=r"train_b_\d+ has the label b'1': expected a number from 0 to 0"):
        collected(stream)
    write_tar(shards / "set-train-00.tar", [("x.txt", b"")])
    with pytest.raises(
        ValueError, match=r"set-train-00.tar holds 0 samples, not 5: replace it, or correct .*_info\.json"
    ):
        collected(open_training_data(f"wds/{shards}", MODEL, RECIPE)[0])


def pairs(rename=lambda name: name) -> list[tuple[str, bytes]]:
    """Three samples, an image and its label after each other."""
    return [
        (rename(f"{number:03}.{suffix}"), content)
        for number in range(3)
        for suffix, content in (("jpg", picture(number)), ("cls", b"%d\n" % number))
    ]


def beside(names: list[str]) -> list[tuple[str, bytes]]:
    return [*((name, b"{}") for name in names), *pairs()]


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        (
            [(f"{folder}{name}", content) for m in pairs() for folder, name, content in (("._", m[0], b"x"), ("", *m))],
            3,
        ),
        ([(f"a/{own}{m[0]}", m[1]) for m in pairs() for own in ("._", "")], 3),
        ([("./.DS_Store", b"x"), ("__MACOSX/0.jpg", b"x"), *pairs("./{}".format)], 3),
        (beside(["README", "README.md", "a/.b.jpg", "__index__", "__meta__/x.json", "dataset.json"]), 3),
        (pairs(str.upper), 3),
        (pairs(lambda name: name.replace("jpg", "webp")), 3),
        ([*pairs(), *pairs()[:2]], 4),
    ],
    ids=["mac", "mac-folder", "dot-folder", "others", "upper-case", "webp", "again"],
)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_files_that_are_no_samples_are_left_out_of_shards(tmp_path, members, labels, suffix):
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    write_tar(tmp_path / f"train-0{suffix}", members)
    (tmp_path / f"._train-0{suffix}").write_bytes(b"made on a Mac")
    opened = open_shards(str(tmp_path), "train", None, 3)
    (url,) = opened.lengths
    found = list(opened.samples(url))
    assert [label for _, _, label in found] == [0, 1, 2, 0][:labels]
    assert [content for _, content, _ in found] == [picture(n) for n in (0, 1, 2, 0)][:labels]
    assert len(opened) == labels


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            sorted(pairs(), key=lambda m: m[0][-3:]),
            r"!000 must have .* and a label \(\.cls\), .*it has cls\. .*--sort=name",
        ),
        (
            pairs(lambda name: name.replace("cls", "txt")),
            r"it has jpg, txt\. Write the label as a number to a \.cls file",
        ),
        (pairs("v1.{}".format), r"!v1 must have .*it has 000\.jpg, 000\.cls, .*: rename files with further points"),
        ([*pairs()[:1], *pairs()], r"train-0\.tar \(000\.jpg: duplicate .*Rename one of these files"),
        ([("README.md", b"")], r"split 'train' of wds/.* has no samples: expected an image and a label \(\.cls\)"),
    ],
    ids=["unsorted", "txt", "points", "twice", "none"],
)
def test_wrong_shards_are_refused_with_the_cause_before_training(tmp_path, members, message):
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(ValueError, match=message):
        open_shards(str(tmp_path), "train", None, 3)


def test_lengths_that_are_wrong_name_the_file_that_gave_them(tmp_path, shards):
    known = json.loads((shards / "_info.json").read_text())
    known["splits"]["train"]["shard_lengths"].pop()
    (shards / "_info.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"_info\.json does not give every shard of split 'train' a length"):
        open_shards(str(shards), "train", None)
    (shards / "_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read _info\.json .*Correct or remove it"):
        open_shards(str(shards), "train", None)
    (shards / "_info.json").unlink()
    counted = open_shards(str(shards), "train", None)
    write_tar(shards / "set-train-00.tar", pairs())
    with pytest.raises(ValueError, match=r"holds 3 samples, not 5: it changed since it was counted"):
        list(counted.samples(str(shards / "set-train-00.tar")))


def test_shards_that_are_not_there_are_refused(tmp_path, shards):
    with pytest.raises(ValueError, match=r"cannot read info.json .*Without one, shards must lie in a folder"):
        open_shards(f"{tmp_path}/nowhere", "train", None)
    (shards / "_info.json").unlink()
    with pytest.raises(ValueError, match=r"no shards with other in their names: it has set-train-00\.tar"):
        open_shards(str(shards), "other", None)
    (shards / "info.json").write_text(json.dumps({"splits": {"train": {}}}))
    with pytest.raises(ValueError, match=r"/info\.json lacks 'filenames'"):
        open_shards(str(shards), "train", None)
    with pytest.raises(ValueError, match=r"split='val' is not in wds/.*: it has train"):
        open_shards(str(shards), "val", None)


@pytest.mark.parametrize(("package", "data", "extra"), [("datasets", "hfds/x", "hf"), ("webdataset", "wds/x", "wds")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, package, data, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"{data} needs the package {package}: pip install {package}, or .*\[{extra}\]"
    ):
        open_training_data(data, MODEL, RECIPE)
