"""lambda_vit.data.batches: what loaders of other libraries yield means the same to every function, or is refused."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import small_vit
from torch import Tensor

from lambda_vit import compare_frequencies, feature_frequencies, finetune, profile_layers, select_layers
from lambda_vit.data.fingerprints import data_fingerprint
from lambda_vit.measure.accuracy import evaluate
from lambda_vit.measure.comparison import compare
from lambda_vit.measure.float16_range import check_float16
from lambda_vit.training.plan.step_timing import measure_loading

MODEL = small_vit(depth=2)
IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(12) % 10
PLAIN = [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]


def select(loader: Any) -> Any:
    return select_layers(MODEL, loader, 1, strategy="accuracy").to_dict()


def train(loader: Any) -> Any:
    return finetune(MODEL, loader, epochs=1, lr=1e-4, warmup_epochs=0).history


def profile(loader: Any) -> Any:
    return profile_layers(MODEL, loader, bins=8).to_dict()


def score(loader: Any) -> Any:
    found = evaluate(MODEL, loader, reference=MODEL)
    return found.hits, found.images, found.same


def frequencies(loader: Any) -> Any:
    return feature_frequencies(MODEL, loader).to_dict()


def two_frequencies(loader: Any) -> Any:
    return compare_frequencies(MODEL, MODEL, loader).to_dict()


LABELLED = [select, train, score]
READERS = [*LABELLED, profile, frequencies, two_frequencies]


@pytest.fixture(autouse=True)
def few_images():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def each(change: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    return [change(images, labels) for images, labels in PLAIN]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize(
    "batches",
    [
        each(lambda x, y: [x, y]),
        each(lambda x, y: {"pixel_values": x, "labels": y}),
        each(lambda x, y: collections.UserDict(pixel_values=x, label=y, mask=None)),
        each(lambda x, y: ({"pixel_values": x}, y)),
        each(lambda x, y: (x, y[:, None])),
        each(lambda x, y: (x, y.int())),
        each(lambda x, y: (x, y.float())),
        each(lambda x, y: (x, y.tolist())),
        each(lambda x, y: (x.numpy(), y.numpy())),
        each(lambda x, y: (x.double(), y)),
        [(IMAGES[:0], LABELS[:0]), *PLAIN, (torch.empty(0), torch.empty(0))],
    ],
    ids=[
        "lists",
        "dictionaries",
        "mappings",
        "nested",
        "column",
        "int32",
        "whole",
        "plain",
        "numpy",
        "float64",
        "empty",
    ],
)
def test_what_is_unambiguous_means_the_same_everywhere(read, batches):
    assert read(batches) == read(PLAIN)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: ((x * 40 + 128).clamp(0, 255).byte(), y), r"images of batch 0 are uint8.*ToDtype.*Normalize"),
        (lambda x, y: ((x * 40 + 128).clamp(0, 255).byte().numpy(), y), "images of batch 0 are uint8"),
        (lambda x, y: (x.permute(0, 2, 3, 1), y), r"shape \(6, 32, 32, 3\).*\[N, 3, H, W\].*permute\(0, 3, 1, 2\)"),
        (lambda x, y: (x[:, :1], y), r"shape \(6, 1, 32, 32\): expected \[N, 3, H, W\]$"),
        (lambda x, y: (list(x), y), "holds images as list: expected a tensor"),
        (lambda x, y: ({"image": x, "label": y}), "keys image, label: expected pixel_values and labels"),
        (lambda x, y: ({"patches": x.flatten(2)}, y), "holds patches, which VisionTransformer cannot take"),
    ],
    ids=["uint8", "uint8 numpy", "channels last", "channels", "list", "keys", "patches"],
)
def test_images_that_a_model_cannot_take_are_refused_with_the_remedy(read, change, words):
    with pytest.raises(ValueError, match=words):
        read(each(change))


@pytest.mark.parametrize("read", LABELLED, ids=lambda read: read.__name__)
@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: x,
        lambda x, y: (x, torch.nn.functional.one_hot(y, 10)),
        lambda x, y: (x, y + 0.5),
        lambda x, y: (x, y[:3]),
        lambda x, y: (x, [str(n) for n in y]),
        lambda x, y: {"pixel_values": x},
    ],
    ids=["none", "one-hot", "floats", "few", "names", "no key"],
)
def test_labels_that_are_no_class_indices_are_refused_where_labels_count(read, change):
    with pytest.raises(ValueError, match="class indices"):
        read(each(change))


def test_probabilities_can_be_trained_on_and_not_counted():
    soft = each(lambda x, y: (x, torch.nn.functional.one_hot(y, 10).double()))
    assert train(soft)[0].loss == pytest.approx(train(PLAIN)[0].loss, rel=1e-6)
    assert train(each(lambda x, y: (x, torch.nn.functional.one_hot(y, 10).numpy() * 1.0))) == train(soft)
    with pytest.raises(ValueError, match=r"labels\.argmax\(1\)"):
        finetune(MODEL, soft, epochs=1, lr=1e-4, label_smoothing=0.1)
    for read in (select, score):
        with pytest.raises(ValueError, match=r"labels\.argmax\(1\)"):
            read(soft)
    with pytest.raises(ValueError, match="labels of batch 0 are not probabilities"):
        train(each(lambda x, y: (x, torch.ones(len(x), 10))))


def test_a_loader_that_is_used_up_is_refused_where_it_would_be_read_again():
    once = iter(PLAIN)
    for read in (
        lambda: select_layers(MODEL, once, 1),
        lambda: finetune(MODEL, PLAIN, epochs=1, lr=1e-4, val_loader=once),
        lambda: compare({"model": MODEL}, {"model": "m"}, once, (), cost_batch=1),
    ):
        with pytest.raises(ValueError, match="must be iterable more than once"):
            read()
    assert len(list(once)) == 2

    class Once:
        def __init__(self) -> None:
            self.batches = iter(PLAIN)

        def __iter__(self) -> Any:
            return self.batches

        def __len__(self) -> int:
            return 2

    with pytest.raises(ValueError, match=r"no images in a further pass.*more than once"):
        select_layers(small_vit(), Once(), 2, cache="none")
    with pytest.raises(ValueError, match=r"nothing in epoch 2.*iterated in every epoch"):
        finetune(MODEL, Once(), epochs=2, lr=1e-4)


def test_images_alone_are_checked_too():
    with pytest.raises(ValueError, match="images of this batch are uint8"):
        check_float16(MODEL, IMAGES.byte())


def test_loading_counts_the_images_of_dictionaries():
    assert measure_loading(each(lambda x, y: {"pixel_values": x, "labels": y}), 1.0).images == 12


def test_dictionaries_and_arrays_in_memory_are_fingerprinted():
    found = [
        data_fingerprint(each(change))["data"]
        for change in (
            lambda x, y: {"pixel_values": x, "labels": y},
            lambda x, y: {"pixel_values": x + 1, "labels": y},
            lambda x, y: (x.numpy() + 2, y.numpy()),
        )
    ]
    assert len(set(found)) == 3
    assert data_fingerprint(each(lambda x, y: {"pixel_values": x, "labels": y})) == data_fingerprint(PLAIN)
