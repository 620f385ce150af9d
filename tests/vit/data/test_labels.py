"""lambda_vit.data.labels: which output of the model each class stands for."""

from __future__ import annotations

import json
import unicodedata
import warnings

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_vit
from timm.data import create_dataset
from timm.utils.misc import natural_key
from torchvision.datasets import FakeData

from lambda_kernels import from_pretrained, save_pretrained
from lambda_vit import finetune
from lambda_vit.data.fingerprints import data_fingerprint
from lambda_vit.data.images import open_images
from lambda_vit.data.labels import label_classes, read_class_map, sort_naturally
from lambda_vit.data.loader import make_loader
from lambda_vit.models.properties import get_class_names, set_class_names
from lambda_vit.training.loop.model_setup import replace_classifier

NUMBERED = [str(number) for number in range(12)]


def folders(root, names, split="val"):
    for name in names:
        (root / split / name).mkdir(parents=True)
        FakeData(1, (3, 8, 8))[0][0].save(root / split / name / "a.jpeg")
    return root


@pytest.mark.parametrize("names", [NUMBERED, ["Zebra", "apple", "Mango"], ["c10", "c9", "C1"], ["n02", "n10", "n1"]])
def test_folders_have_the_labels_that_timms_reader_gives_them(tmp_path, names):
    folders(tmp_path, names)
    theirs = create_dataset("", str(tmp_path / "val")).reader.class_to_idx
    dataset = open_images(tmp_path, "val")
    assert dataset.class_to_idx == theirs
    assert [label for path, label in dataset.samples] == [theirs[path.split("/")[1]] for path, _ in dataset.samples]


@settings(deadline=None)
@given(st.sets(st.text(st.characters(codec="ascii", exclude_characters="/\0"), min_size=1)))
def test_the_order_is_timms(names):
    ours = sort_naturally(names)
    assert [natural_key(name) for name in ours] == sorted(map(natural_key, names))
    assert ours == sort_naturally(reversed(ours))


def test_digits_of_other_scripts_are_numbers_and_superscripts_are_letters():
    assert sort_naturally(["x²", "x10", "x\u0663"]) == ["x\u0663", "x10", "x²"]  # the digit three of Arabic


def test_an_order_that_plain_sorting_would_change_is_reported():
    words = r"timm's order.*'0', '1', '2', '3', ….*'0', '1', '10', '11', ….*10 of 12.*--class-map"
    with pytest.warns(UserWarning, match=words):
        label_classes(NUMBERED, num_classes=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label_classes(NUMBERED)  # the labels are not compared with any model
        label_classes(["a", "b"], num_classes=2)
        label_classes(NUMBERED, num_classes=12, class_to_idx={name: int(name) for name in NUMBERED})
        label_classes(NUMBERED, num_classes=12, class_names=NUMBERED)


def test_the_models_own_names_decide(tmp_path):
    plain = sorted(NUMBERED)
    assert label_classes(NUMBERED, num_classes=12, class_names=plain) == {name: i for i, name in enumerate(plain)}
    assert label_classes(["b", "a"], num_classes=3, class_names=["c", "b", "a"]) == {"a": 2, "b": 1}
    with pytest.raises(ValueError, match=r"classes are 'c', 'b', 'a', and 1 of the 2 class folders .*: wolf\. Rename"):
        label_classes(["b", "wolf"], num_classes=3, class_names=["c", "b", "a"])
    with pytest.warns(UserWarning, match=r"classes are 'a', 'b', and none of the class folders \('x', 'y'\)"):
        assert label_classes(["y", "x"], num_classes=2, class_names=["a", "b"]) == {"x": 0, "y": 1}


def test_a_name_of_two_outputs_decides_nothing():
    with pytest.raises(ValueError, match="1 of the 2 class folders are not among them: crane"):
        label_classes(["crane", "dog"], num_classes=3, class_names=["crane", "dog", "crane"])


def test_composed_and_decomposed_letters_are_the_same_class(tmp_path):
    composed, decomposed = "café", unicodedata.normalize("NFD", "café")
    folders(tmp_path, [composed, "tea"], "train")
    folders(tmp_path, [decomposed, "tea"])
    train, val = open_images(tmp_path, "train"), open_images(tmp_path, "val")
    assert train.class_to_idx == val.class_to_idx == {composed: 0, "tea": 1}
    assert open_images(tmp_path, "val", class_to_idx={decomposed: 1, "tea": 0}).targets.count(1) == 1
    assert open_images(tmp_path, "val", num_classes=2, class_names=["tea", decomposed]).class_to_idx[composed] == 1


def test_a_trained_model_knows_its_classes_wherever_it_was_trained(tmp_path):
    folders(tmp_path, ["10", "9"], "train")

    images = FakeData(4, (3, 32, 32), 2, lambda image: torch.rand(3, 32, 32))
    images.class_to_idx = {"10": 0, "9": 1}  # as torchvision orders its folders
    model = finetune(small_vit(num_classes=2), torch.utils.data.DataLoader(images, 2), epochs=1).model
    save_pretrained(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert get_class_names(loaded) == ("10", "9")
    names = get_class_names(loaded)
    assert open_images(tmp_path, "train", num_classes=2, class_names=names).class_to_idx == {"10": 0, "9": 1}
    replace_classifier(loaded, 2, seed=0)
    assert get_class_names(loaded) is None


def test_names_are_stored_for_all_outputs_or_not_at_all():
    model = timm.create_model("test_vit", num_classes=3)
    set_class_names(model, {"a": 0, "b": 2})
    assert get_class_names(model) is None
    set_class_names(model, {"a": 0, "b": 2, "c": 1})
    assert get_class_names(model) == ("a", "c", "b")
    assert get_class_names(timm.create_model("test_vit", num_classes=2, pretrained_cfg=model.pretrained_cfg)) is None


@pytest.mark.parametrize("end", ["", "\n"])
def test_timms_class_map_is_one_name_per_line(tmp_path, end):
    path = tmp_path / "class_map.txt"
    path.write_text("dog\ncat\r\nbird" + end)
    assert read_class_map(path) == {"dog": 0, "cat": 1, "bird": 2}


def test_a_class_map_may_be_json(tmp_path):
    path = tmp_path / "map.json"
    path.write_text("\ufeff" + json.dumps({"dog": 3}), encoding="utf-8")
    assert read_class_map(path) == {"dog": 3}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("map.json", "dog\ncat\n", "is not a JSON file.*one class per line"),
        ("map.json", '{"dog": "1"}', "must hold an object"),
        ("map.json", '{"dog": true}', "must hold an object"),
        ("map.txt", "dog\ndog\n", "each once"),
        ("map.txt", "dog\n\ncat", "each once"),
        ("map.txt", "", "each once"),
    ],
)
def test_other_class_maps_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_class_map(tmp_path / name)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["map.txt", "map.json"])
def test_a_class_map_in_another_encoding_is_named(tmp_path, name, encoding):
    (tmp_path / name).write_text('{"caf\u00e9": 0}', encoding=encoding)
    with pytest.raises(ValueError, match=rf"the class map .*{name} is not UTF-8 text"):
        read_class_map(tmp_path / name)


def test_a_run_under_another_order_of_classes_is_another_run(tmp_path):
    """What was trained or selected with the labels of plain sorting is not resumed with those of timm's order."""
    folders(tmp_path, NUMBERED)
    plain = {name: index for index, name in enumerate(sorted(NUMBERED))}
    prints = [
        data_fingerprint(make_loader(open_images(tmp_path, "val", class_to_idx=order), 2), labelled=True)
        for order in (None, plain)
    ]
    assert prints[0]["data"] == prints[1]["data"]
    assert prints[0]["labels"] != prints[1]["labels"]
