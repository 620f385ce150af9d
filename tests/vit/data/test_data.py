"""lambda_vit.data.images: layouts, labels, unreadable images, subsets."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers import add_img_extensions, del_img_extensions

from lambda_vit.data.digits import digits
from lambda_vit.data.images import BadImage, CorruptImageError, open_images
from lambda_vit.data.loader import make_loader, subset
from lambda_vit.data.transforms import transforms_for

IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def picture(seed: int = 0, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def layout(classes: str = "ab", splits: tuple[str, ...] = ("train", "val"), each: int = 3) -> dict[str, bytes]:
    names = itertools.product(splits, classes, range(each))
    return {f"{split}/{name}/{i}.jpg": picture(i) for split, name, i in names}


def write(root: Path, files: dict[str, bytes], kind: str) -> Path:
    """Files by path, as a folder or as a zip; a path that ends with a slash is an empty folder."""
    if kind == "zip":
        root = root / "images.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        return root
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (root / path).mkdir(parents=True)
        else:
            (root / path).write_bytes(content)
    return root


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path):
    return lambda files: write(tmp_path, files, request.param)


def test_both_splits_are_read_with_the_train_splits_labels(make):
    root = make(layout())
    train, val = open_images(root, "train"), open_images(root, "val")
    assert (train.split, val.split) == ("train", "val")
    assert train.classes == val.classes == ["a", "b"]
    assert val.targets == [0, 0, 0, 1, 1, 1]
    image, label = val[4]
    expected = np.asarray(Image.open(io.BytesIO(picture(1))).convert("RGB")).transpose(2, 0, 1) / np.float32(255)
    assert label == 1
    torch.testing.assert_close(image, torch.from_numpy(expected))


@pytest.mark.parametrize("top", ["", "imagenette2/"])
def test_one_common_top_folder_is_looked_through(make, top):
    files = {top + path: content for path, content in layout().items()}
    root = make({**files, f"__MACOSX/{top}val/a/0.jpg": b"left behind by macOS"})
    assert len(open_images(root, "val")) == 6


def test_hidden_files_macos_leftovers_and_other_files_are_ignored(make):
    clutter = [".DS_Store", "__MACOSX/val/a/0.jpg", "val/.cache/x.jpg", "val/a/._0.jpg", "val/a/notes.txt", "README.md"]
    root = make({**layout(), **dict.fromkeys(clutter, b"clutter")})
    assert [label for _, label in open_images(root, "val")] == [0, 0, 0, 1, 1, 1]


def test_images_may_lie_deeper_in_their_class_and_have_any_extension_that_timm_reads(make):
    root = make({"val/a/x/y/0.JPEG": picture(), "val/a/1.png": picture(kind="PNG", mode="L"), "val/b/2.Jpg": picture()})
    assert [tuple(image.shape) for image, _ in open_images(root, "val")] == [(3, 16, 16)] * 3


def test_class_folders_may_be_links(tmp_path):
    store = write(tmp_path / "store", {"x/deep/0.jpg": picture()}, "folder")
    (tmp_path / "set/val/a").mkdir(parents=True)
    (tmp_path / "set/val/b").symlink_to(store / "x", target_is_directory=True)
    (tmp_path / "set/val/a/linked").symlink_to(store / "x", target_is_directory=True)
    assert open_images(tmp_path / "set", "val").targets == [0, 1]


@pytest.mark.parametrize("alias", ["validation", "valid", "test"])
def test_a_lone_alias_stands_for_val(make, alias):
    root = make(layout(splits=("train", alias)))
    assert len(open_images(root, "val")) == len(open_images(root, alias)) == 6


def test_val_itself_goes_before_its_aliases(make):
    root = make({**layout(), "test/a/0.jpg": picture()})
    assert len(open_images(root, "val")) == 6


def test_two_aliases_are_ambiguous_until_one_is_named(make):
    root = make(layout(splits=("train", "valid", "test")))
    with pytest.raises(ValueError, match=r"valid, test.*by name"):
        open_images(root, "val")
    assert open_images(root, "test").split == "test"


def test_a_root_without_splits_is_one_set_for_any_split(make):
    root = make({"cat/0.jpg": picture(), "dog/0.jpg": picture()})
    for split in ("train", "val"):
        dataset = open_images(root, split)
        assert (dataset.split, dataset.targets) == ("all", [0, 1])


def test_a_split_that_is_not_there_is_named_with_those_that_are(make):
    with pytest.raises(ValueError, match=r"split='val' is not in .*it has train"):
        open_images(make(layout(splits=("train",))), "val")


def test_an_unknown_split_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"split='dev'.*train, .*val"):
        open_images(tmp_path, "dev")


def test_differing_class_folders_are_listed_and_explained(make):
    files = {p: c for p, c in layout("abcd").items() if not p.startswith("val/b/")}
    files = {p: c for p, c in files.items() if not p.startswith("val/c/")} | {"val/c/": b"", "val/z/0.jpg": picture()}
    with pytest.raises(ValueError, match="the train split") as caught:
        open_images(make(files), "val")
    text = str(caught.value)
    assert "missing (1): b" in text
    assert "extra (1): z" in text
    assert "empty (1): c" in text
    assert "class_to_idx" in text


def test_an_empty_class_folder_of_the_train_split_is_an_error_too(make):
    with pytest.raises(ValueError, match=r"empty \(1\): c"):
        open_images(make({**layout(), "train/c/": b""}), "train")


def test_class_to_idx_decides_the_labels_and_must_have_the_folders(make):
    root = make(layout(splits=("val",)))
    assert open_images(root, "val", class_to_idx={"a": 7, "b": 2, "c": 3}, num_classes=8).targets == [7, 7, 7, 2, 2, 2]
    with pytest.raises(ValueError, match=r"extra \(1\): b.*class_to_idx"):
        open_images(root, "val", class_to_idx={"a": 0, "c": 2})
    with pytest.raises(ValueError, match=r"outside 0…4 .*'a': 7"):
        open_images(root, "val", class_to_idx={"a": 7, "b": 2}, num_classes=5)


def test_synsets_get_imagenets_own_labels_when_the_model_has_a_thousand_outputs(make):
    synsets = [ImageNetInfo().index_to_label_name(i) for i in (701, 3)]
    root = make({f"val/{name}/0.jpg": picture() for name in synsets})
    thousand = open_images(root, "val", num_classes=1000)
    assert thousand.targets == [3, 701]
    assert thousand.num_classes == 1000
    assert open_images(root, "val", num_classes=2).targets == [0, 1]


def test_a_count_of_classes_that_does_not_fit_names_both(make):
    with pytest.raises(ValueError, match=r"2 class folders.*num_classes=1000"):
        open_images(make(layout()), "val", num_classes=1000)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("gone", None, "does not exist"), ("x.tar", b"\x1f\x8b rest", "neither a folder nor an intact zip")],
)
def test_a_root_that_cannot_be_opened_says_why(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        open_images(tmp_path / name, "val")
    assert name in str(caught.value)


def test_a_root_without_images_says_what_was_expected(make):
    with pytest.raises(ValueError, match=r"no images in .*\(split 'val'\).*\.jpg"):
        open_images(make({"val/a/notes.txt": b"text"}), "val")


def test_a_zip_whose_paths_start_with_a_dot_folder_is_read(tmp_path):
    files = {f"./{split}/{label}/0.jpg": picture() for split in ("train", "val") for label in "ab"}
    dataset = open_images(
        write(tmp_path, files | {"./val/a/._0.jpg": b"x", "__MACOSX/val/a/0.jpg": b"x"}, "zip"), "val"
    )
    assert [path for path, _ in dataset.samples] == ["val/a/0.jpg", "val/b/0.jpg"]


def test_an_encrypted_zip_is_refused(tmp_path):
    root = write(tmp_path, {"val/a/0.jpg": picture()}, "zip")
    raw = bytearray(root.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + flags] |= 1
    root.write_bytes(raw)
    with pytest.raises(ValueError, match="encrypted"):
        open_images(root, "val")


DAMAGE = {
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "not an image": lambda content: b"<html>404</html>",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_damaged_image_is_named_with_the_remedy(make, damage, kind):
    bad = DAMAGE[damage](picture(kind=kind))
    root = make({"val/a/0.jpg": picture(), "val/a/bad.jpg": bad})
    with pytest.raises(CorruptImageError, match="--skip-bad") as caught:
        open_images(root, "val")[1]
    shown = f"{root}!val/a/bad.jpg" if root.suffix == ".zip" else str(root / "val/a/bad.jpg")
    assert shown in str(caught.value)
    marked = open_images(root, "val", on_bad="mark")[1]
    assert isinstance(marked, BadImage)
    assert marked.path == shown


def test_bytes_that_changed_inside_a_zip_are_noticed(tmp_path):
    root = write(tmp_path, {"val/a/0.jpg": picture()}, "zip")
    raw = bytearray(root.read_bytes())
    raw[raw.index(picture()) + 300] ^= 0xFF
    root.write_bytes(raw)
    with pytest.raises(CorruptImageError, match="CRC"):
        open_images(root, "val")[0]


def test_a_fault_of_the_transform_is_not_blamed_on_the_image(make):
    def broken(image):
        raise KeyError("transform")

    with pytest.raises(KeyError, match="transform"):
        open_images(make(layout()), "val", transform=broken)[0]


def test_on_bad_takes_two_values(tmp_path):
    with pytest.raises(ValueError, match="on_bad='skip'"):
        open_images(tmp_path, "val", on_bad="skip")


def with_bad(count: int) -> dict[str, bytes]:
    return {**layout(), **{f"val/b/bad{i}.jpg": b"junk" for i in range(count)}}


def test_the_loader_leaves_out_as_many_bad_images_as_allowed_and_lists_each_once(make):
    loader = make_loader(open_images(make(with_bad(2)), "val"), 4, skip_bad=2)
    for _ in range(2):
        labels = torch.cat([targets for _, targets in loader])
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert [Path(path).name for path in loader.bad] == ["bad0.jpg", "bad1.jpg"]


def test_a_batch_of_nothing_but_bad_images_is_left_out(make):
    loader = make_loader(open_images(make(with_bad(2)), "val"), 1, skip_bad=2)
    assert [len(images) for images, _ in loader] == [1] * 6
    assert len(loader) == 8


def test_more_bad_images_than_allowed_stop_the_loader(make):
    loader = make_loader(open_images(make(with_bad(3)), "val"), 4, skip_bad=2)
    with pytest.raises(CorruptImageError, match=r"3 images, with 2 allowed: .*bad2\.jpg"):
        list(loader)


def test_workers_read_the_same_batches_and_report_bad_images_cleanly(tmp_path):
    root = write(tmp_path, with_bad(1), "zip")
    dataset = open_images(root, "val")
    assert dataset[0][1] == 0  # opens the handle here, which the workers must not share
    here = list(make_loader(dataset, 2, skip_bad=1))
    loader = make_loader(dataset, 2, workers=2, skip_bad=1)
    for (images, targets), (wanted, labels) in zip(loader, here, strict=True):
        torch.testing.assert_close(images, wanted, rtol=0, atol=0)
        assert targets.tolist() == labels.tolist()
    assert loader.bad == [f"{root}!val/b/bad0.jpg"]
    with pytest.raises(CorruptImageError) as caught:
        list(make_loader(dataset, 2, workers=2))
    assert f"{root}!val/b/bad0.jpg" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_dataset_whose_zip_is_open_can_be_pickled(tmp_path):
    dataset = open_images(write(tmp_path, layout(), "zip"), "val")
    copy = pickle.loads(pickle.dumps(dataset))
    torch.testing.assert_close(copy[5][0], dataset[5][0], rtol=0, atol=0)


def test_another_process_opens_the_zip_anew(tmp_path, monkeypatch):
    source = open_images(write(tmp_path, layout(), "zip"), "val").source
    before = source._archive()
    assert source._archive() is before
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert source._archive() is not before


def test_the_order_follows_seed_and_epoch_alone(make):
    dataset = open_images(make(layout("abcdefgh")), "train")

    def order(seed: int, epoch: int) -> list[float]:
        loader = make_loader(dataset, 5, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        return torch.cat([targets for _, targets in loader]).tolist()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert orders == [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(found) == dataset.targets for found in orders)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 2]), (True, [4])])
def test_the_last_batch(make, drop_last, sizes):
    loader = make_loader(open_images(make(layout()), "val"), 4, drop_last=drop_last)
    assert [len(images) for images, _ in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1; got True"),
        ({"workers": -1}, "workers must be an integer of at least 0; got -1"),
        ({"skip_bad": 0.5}, "skip_bad must be an integer of at least 0; got 0.5"),
        ({"batch_size": 7, "drop_last": True}, "leaves nothing of 6"),
    ],
)
def test_loader_arguments_out_of_range(make, change, words):
    with pytest.raises(ValueError, match=words):
        make_loader(open_images(make(layout()), "val"), **{"batch_size": 2, **change})


def test_an_empty_dataset_names_folder_and_split(make):
    root = make(layout())
    with pytest.raises(ValueError, match="empty") as caught:
        make_loader(open_images(root, "val").select([]), 2)
    assert "'val'" in str(caught.value)
    assert str(root) in str(caught.value)


class Labels:
    """The least that `subset` asks of a dataset."""

    def __init__(self, targets: list[int]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, indices: list[int]) -> list[int]:
        return indices


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 60), st.none() | st.integers(0, 9))
def test_a_subset_is_exact_balanced_and_reproducible(targets, samples, seed):
    dataset, samples = Labels(targets), min(samples, len(targets))
    chosen = subset(dataset, samples, seed=seed)
    assert chosen == subset(dataset, samples, seed=seed)
    assert len(set(chosen)) == len(chosen) == samples
    taken, there = Counter(targets[i] for i in chosen), Counter(targets)
    most = max(taken.values())
    # A class that gives two fewer than the fullest has nothing more to give.
    assert all(taken[label] >= most - 1 or taken[label] == there[label] for label in there)
    # The classes take turns: nobody's second image comes before somebody's first.
    rounds = [Counter(targets[j] for j in chosen[:i])[targets[index]] for i, index in enumerate(chosen)]
    assert rounds == sorted(rounds)


def test_fewer_samples_than_classes_are_spread_over_the_classes():
    labels = [label for label in range(10) for _ in range(4)]
    assert [labels[i] for i in subset(Labels(labels), 5)] == [1, 3, 5, 7, 9]
    assert subset(Labels([0] * 100), 4) == [12, 37, 62, 87]


def test_seeds_give_different_subsets():
    labels = Labels([0] * 50 + [1] * 50)
    assert subset(labels, 10, seed=0) != subset(labels, 10, seed=1)


def test_more_samples_than_there_are_gives_all_and_says_so(make):
    dataset = open_images(make(layout()), "val")
    with pytest.warns(UserWarning, match="samples=7 is more than the 6"):
        assert sorted(subset(dataset, 7).samples) == sorted(dataset.samples)


@pytest.mark.parametrize("samples", [0, -1, 2.5, True])
def test_a_subset_needs_a_positive_count(samples):
    with pytest.raises(ValueError, match="samples must be an integer of at least 1"):
        subset(Labels([0, 1]), samples)


def test_the_fingerprint_follows_the_content_and_not_the_packing(tmp_path):
    folder = open_images(write(tmp_path, layout(), "folder"), "val")
    packed = {f"top/{path}": content for path, content in layout().items()}
    (tmp_path / "other").mkdir()
    in_zip = open_images(write(tmp_path / "other", packed, "zip"), "val")
    assert folder.fingerprint() == in_zip.fingerprint() == folder.describe()["fingerprint"]
    assert folder.select(range(5)).fingerprint() != folder.fingerprint()
    (tmp_path / "val/a/0.jpg").write_bytes(picture() + b"x")
    assert folder.fingerprint() != in_zip.fingerprint()


def test_describe_is_what_a_report_needs(make):
    root = make(layout())
    description = open_images(root, "val").describe()
    description.pop("fingerprint")
    expected = {"root": str(root), "split": "val", "images": 6, "classes": 2, "num_classes": 2}
    assert description == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_transforms_follow_the_size_and_channels_the_model_was_built_for(channels):
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, in_chans=channels, depth=1)
    grey = Image.new("RGB", (50, 40), (124, 116, 104))  # ImageNet's mean
    image = transforms_for(model)(grey)
    assert image.shape == (channels, 32, 32)
    assert image.abs().max() < 0.05  # three grey levels: the mean of the channels is not their luminance
    assert torch.equal(image, transforms_for(model)(grey))


def test_training_transforms_are_random_and_take_timms_arguments():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1)
    image = Image.open(io.BytesIO(picture()))
    transform = transforms_for(model, training=True, auto_augment="rand-m9-mstd0.5", re_prob=1.0)
    assert not torch.equal(transform(image), transform(image))
    assert "RandAugment" in str(transform)
    assert "RandomErasing" in str(transform)


def test_a_model_with_other_channels_needs_its_own_transform():
    with pytest.raises(ValueError, match="4 channels"):
        transforms_for(timm.create_model("deit_tiny_patch16_224", img_size=32, in_chans=4, depth=1))


@pytest.mark.parametrize("image_size", [None, 16])
def test_digits_are_one_stratified_split_scaled_by_train(image_size):
    train, val = digits("train", image_size), digits("val", image_size)
    size = image_size or 8
    assert train.tensors[0].shape == (1437, 1, size, size)
    assert val.tensors[0].shape == (360, 1, size, size)
    assert train.tensors[0].dtype == torch.float32
    assert abs(train.tensors[0].mean()) < 1e-5
    assert abs(train.tensors[0].std() - 1) < 1e-5
    assert set(Counter(val.targets).values()) <= {34, 35, 36, 37, 38}
    assert train.classes == val.classes == list("0123456789")
    rows = {image.numpy().tobytes() for image in train.tensors[0]}
    assert not any(image.numpy().tobytes() in rows for image in val.tensors[0])


def test_digits_are_the_same_every_time_and_go_through_loader_and_subset():
    assert digits("val").fingerprint() == digits("val").fingerprint() != digits("train").fingerprint()
    part = subset(digits("train"), 50)
    assert Counter(part.targets) == dict.fromkeys(range(10), 5)
    images, targets = next(iter(make_loader(part, 20)))
    assert images.shape == (20, 1, 8, 8)
    assert targets.tolist() == list(range(10)) * 2
    assert part.describe()["images"] == 50


@pytest.mark.parametrize(("split", "size", "words"), [("test", None, "split='test'"), ("val", 0, "image_size=0")])
def test_digits_arguments_out_of_range(split, size, words):
    with pytest.raises(ValueError, match=words):
        digits(split, size)


def test_imagenette_is_scored_a_thousand_way(real_data):
    root = real_data / "imagenette_224.zip"
    val = open_images(root, "val", num_classes=1000)
    assert sorted(set(val.targets)) == IMAGENETTE
    assert Counter(val.targets) == dict.fromkeys(IMAGENETTE, 50)
    assert len(open_images(root, "train")) == 1000
    image, _ = val[0]
    assert image.shape == (3, 224, 224)
    assert sorted(subset(val, 10).targets) == IMAGENETTE


def test_images_of_all_usual_kinds_are_found(make):
    kinds = {".webp": "WEBP", ".BMP": "BMP", ".tif": "TIFF", ".jpeg": "JPEG", ".ppm": "PPM"}
    root = make({f"val/a/0{suffix}": picture(kind=kind) for suffix, kind in kinds.items()})
    assert [tuple(image.shape) for image, _ in open_images(root, "val")] == [(3, 16, 16)] * len(kinds)


def test_timms_list_of_extensions_can_be_longer(make):
    root = make({"val/a/0.gif": picture(kind="GIF"), "val/a/1.jpg": picture()})
    assert len(open_images(root, "val")) == 1
    add_img_extensions(".gif")
    try:
        assert len(open_images(root, "val")) == 2
    finally:
        del_img_extensions(".gif")


# Names of splits, archives of other systems, links


@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Val"), ("TRAIN", "TEST"), ("training", "Evaluation"), ("Training", "Testing")]
)
def test_splits_are_found_whatever_their_case(make, train, val):
    files = {path.replace("train", train).replace("val", val): content for path, content in layout().items()}
    root = make(files)
    assert (open_images(root, "train").at, open_images(root, "val").at) == (train, val)
    assert len(open_images(root, "Val")) == 6


def test_splits_that_differ_in_case_alone_are_refused(make):
    with pytest.raises(ValueError, match=r"Train and train in .* differ in case alone"):
        open_images(make(layout(splits=("train", "Train"))), "train")


def test_a_class_may_be_called_like_a_split(make):
    root = make({f"{name}/{i}.jpg": picture(i) for name in ("car", "test", "train") for i in range(2)})
    assert open_images(root, "val").class_to_idx == {"car": 0, "test": 1, "train": 2}


def test_classes_of_splits_may_be_called_like_splits(make):
    root = make(layout(classes=("test", "train", "car")))
    assert open_images(root, "val").classes == ["car", "test", "train"]


def test_a_folder_that_may_be_a_split_or_a_class_is_refused(make):
    with pytest.raises(
        ValueError,
        match=r"'train' with folders in it beside folders with images \(car\).*split or a class. If it is a split, move",
    ):
        open_images(make({"train/steam/0.jpg": picture(), "car/0.jpg": picture()}), "train")


def test_images_that_are_in_no_class_are_no_classes(make):
    """Unlabelled images in train/ and val/ must not become a set of two classes."""
    with pytest.raises(ValueError, match=r"train, val in .* have no class folders: expected <split>/<class>/<image>"):
        open_images(make({"train/0.jpg": picture(), "val/0.jpg": picture()}), "val")
    with pytest.raises(ValueError, match=r"has train \(its folder test has no class folders\)"):
        open_images(make({"train/a/0.jpg": picture(), "test/0.jpg": picture()}), "test")


def test_an_unlabelled_split_is_named_also_when_it_would_serve_as_val(make):
    with pytest.raises(ValueError, match=r"split='val' .*has train \(its folder test has no class folders\)"):
        open_images(make({"train/a/0.jpg": picture(), "test/0.jpg": picture()}), "val")


@pytest.mark.parametrize(
    "rename",
    [
        lambda path: path.replace("/", "\\"),
        lambda path: f"./{path}",
        lambda path: f"/data/{path}",
        lambda path: f"a/b/{path}",
        lambda path: f".\\set\\{path}",
    ],
)
def test_archives_of_other_systems_are_read(tmp_path, rename):
    root = write(tmp_path, {rename(path): content for path, content in layout().items()}, "zip")
    plain = write(tmp_path / "plain", layout(), "folder")
    dataset = open_images(root, "val")
    assert dataset.fingerprint() == open_images(plain, "val").fingerprint()
    assert next(label for _, label in make_loader(dataset, 6)).tolist() == [0, 0, 0, 1, 1, 1]


def test_a_second_top_folder_without_images_does_not_hide_the_splits(make):
    files = {f"set/{path}": content for path, content in layout().items()}
    assert len(open_images(make({**files, "docs/licence.txt": b"", "docs/more/x.txt": b""}), "val")) == 6


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"other/0.jpg": picture()}, r"splits in set beside folders with images \(other\)"),
        (
            {f"set2/{path}": content for path, content in layout().items()},
            r"several folders of .* have splits: set, set2",
        ),
    ],
)
def test_several_top_folders_with_splits_or_images_are_named(make, more, words):
    files = {f"set/{path}": content for path, content in layout().items()}
    with pytest.raises(ValueError, match=words):
        open_images(make({**files, **more}), "val")


def test_a_zip_of_macos_has_the_names_of_its_folder(tmp_path):
    """Its names are UTF-8 without the flag that says so, with decomposed letters."""

    class Unflagged(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):  # noqa: N802 - overrides it
            return self.filename.encode(), 0

    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr(Unflagged("val/cafe\u0301/0.jpg"), picture())
    dataset = open_images(tmp_path / "mac.zip", "val")
    assert dataset.classes == ["caf\u00e9"]
    assert dataset[0][1] == 0


def test_a_folder_of_a_zip_in_another_code_page_is_one_class(tmp_path):
    """Its name alone would also be UTF-8, and those of its files are not."""

    class Gbk(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):  # noqa: N802 - overrides it
            return self.filename.encode("gbk"), 0

    with zipfile.ZipFile(tmp_path / "gbk.zip", "w") as archive:
        for name in ("1", "\u72d7"):
            archive.writestr(Gbk(f"val/\u732b/{name}.jpg"), picture())
    assert len(open_images(tmp_path / "gbk.zip", "val").classes) == 1


def test_no_image_is_taken_twice_through_links(tmp_path):
    root = write(tmp_path / "set", layout(), "folder")
    before = open_images(root, "val").samples
    (root / "val/a/itself").symlink_to(root / "val/a")
    (root / "val/a/split").symlink_to(root / "val")
    (root / "val/b/root").symlink_to(root)
    assert open_images(root, "val").samples == before
    store = write(tmp_path / "store", {"x/0.jpg": picture(), "y/1.jpg": picture()}, "folder")
    (root / "val/a/one").symlink_to(store / "x")
    (root / "val/a/two").symlink_to(store)
    (store / "y/back").symlink_to(root / "val")
    found = [path.removeprefix("val/a/") for path, label in open_images(root, "val").samples if label == 0]
    assert found == ["0.jpg", "1.jpg", "2.jpg", "one/0.jpg", "two/y/1.jpg"]


def test_a_link_that_points_nowhere_is_an_unreadable_image(tmp_path):
    root = write(tmp_path, layout(), "folder")
    whole = open_images(root, "val").fingerprint()
    (root / "val/a/9.jpg").symlink_to("/nowhere/9.jpg")
    (root / "val/b/9.jpg").symlink_to(root / "val/b/9.jpg")
    dataset = open_images(root, "val")
    assert dataset.fingerprint() != whole
    loader = make_loader(dataset, 4, skip_bad=2)
    assert sum(len(labels) for _, labels in loader) == 6
    assert [Path(path).name for path in loader.bad] == ["9.jpg"] * 2
    with pytest.raises(CorruptImageError, match="No such file"):
        list(make_loader(dataset, 4))


def test_a_class_folder_that_points_nowhere_is_named(tmp_path):
    root = write(tmp_path, layout(), "folder")
    (root / "val/c").symlink_to("/nowhere/c")
    with pytest.raises(ValueError, match=r"val/c is a link to /nowhere/c, which does not exist: if this is a class"):
        open_images(root, "val")


@pytest.mark.parametrize("name", ["README.md", "labels.csv", "files.tar.gz"])
def test_a_file_that_points_nowhere_is_no_class_folder(tmp_path, name):
    root = write(tmp_path, layout(), "folder")
    (root / "val" / name).symlink_to("/nowhere/file")
    assert len(open_images(root, "val")) == 6
