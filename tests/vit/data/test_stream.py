"""lambda_vit.training.images.stream: the same micro-batches whatever computes them, and images that cannot be read."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from stream_support import SMALL, assert_same, collected, image_set, picture, stream_of, write_folder, write_zip
from tensor_stream import TensorStream
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_tensor

from lambda_vit.data.digits import digits
from lambda_vit.data.images import BadImage, CorruptImageError, open_images
from lambda_vit.data.loader import make_loader
from lambda_vit.runtime.seeding import mixed_seed, preserved, seed_all
from lambda_vit.runtime.signals import spare_worker
from lambda_vit.training.images.stream import DatasetStream, LoaderStream, read_micro_batch
from lambda_vit.training.recipe import Recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A zip of 40 images for training."""
    return write_zip(tmp_path_factory.mktemp("set") / "images.zip", image_set())


@pytest.fixture(scope="module")
def expected(images):
    """Epoch 1 as one process computes it by itself."""
    return collected(stream_of(images), epoch=1)


class Numbered(torch.utils.data.Dataset):
    """Images that hold nothing but their index and one random number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index), random.random(), np.random.rand(), torch.rand(()).item()]), index % 10


def test_micro_batches_have_the_sizes_of_the_recipe(images, expected):
    stream = stream_of(images)
    assert (stream.steps_per_epoch, stream.micro_batches, stream.micro_batch_size) == (5, 4, 2)
    assert (stream.batch_size, stream.images_per_epoch, stream.exact) == (8, 40, None)
    assert list(expected) == [(step, number) for step in range(5) for number in range(4)]
    for found, targets in expected.values():
        assert (found.dtype, tuple(found.shape)) == (torch.float32, (2, 3, 32, 32))
        assert (targets.dtype, tuple(targets.shape)) == (torch.int64, (2,))
    assert Counter(torch.cat([t for _, t in expected.values()]).tolist()) == {0: 20, 1: 20}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(images, expected, workers):
    stream = stream_of(images, workers=workers)
    assert_same(collected(stream, epoch=1), expected)
    stream.close()


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_same_micro_batches(images, expected, size):
    shares = [collected(stream_of(images, shard=(rank, size)), epoch=1) for rank in range(size)]
    assert [len(share) for share in shares] == [20 // size] * size
    for rank, share in enumerate(shares):
        assert {number // (4 // size) for _, number in share} == {rank}
        assert_same(share, expected)


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (4, 0), (3, 2), (5, 0), (5, 1)])
def test_a_pass_may_start_at_any_step(images, expected, start, workers):
    stream = stream_of(images, workers=workers)
    rest = collected(stream, epoch=1, start=start)
    assert list(rest) == [key for key in expected if key[0] >= start]
    for key, part in rest.items():
        assert torch.equal(part[0], expected[key][0])
    stream.close()


def test_what_was_drawn_before_changes_nothing_and_goes_on_as_if_nothing_had_been_drawn(images, expected):
    for seed in (1, 2):
        seed_all(seed)
        untouched = random.random(), np.random.rand(), torch.rand(1)
        stream = stream_of(images)
        seed_all(seed)
        assert_same(collected(stream, epoch=1, steps=2), expected)
        assert (random.random(), np.random.rand(), torch.rand(1)) == untouched


def test_workers_leave_the_callers_generators_alone(images):
    seed_all(3)
    untouched = random.random(), np.random.rand(), torch.rand(1)
    stream = stream_of(images, workers=1)
    seed_all(3)
    collected(stream, steps=1)
    stream.close()
    assert (random.random(), np.random.rand(), torch.rand(1)) == untouched


@pytest.mark.skipif(not hasattr(os, "setpgrp"), reason="signals are those of POSIX")
def test_workers_outlast_the_signal_that_ends_a_job(images):
    """Schedulers send theirs to every process; the run still has to finish its step and write a checkpoint."""

    def struck(batches: Iterator) -> list:
        found = [next(batches)]
        workers = multiprocessing.active_children()
        assert len(workers) == 1
        os.kill(workers[0].pid, signal.SIGTERM)
        return [*found, *batches]

    stream = stream_of(images, workers=1)
    assert len(struck(stream.steps(1))) == 5
    stream.close()
    loader = make_loader(open_images(images, "val", transform=to_tensor), 1, workers=1, worker_init=spare_worker)
    assert len(struck(iter(loader))) == 6


def test_generators_are_put_back_after_an_error_too():
    seed_all(4)
    untouched = random.random(), np.random.rand(), torch.rand(1)
    seed_all(4)
    with pytest.raises(ZeroDivisionError), preserved():
        _ = [seed_all(5), 1 / 0]
    assert (random.random(), np.random.rand(), torch.rand(1)) == untouched


def test_seeds_differ_by_all_that_they_are_mixed_from():
    parts = [("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1), ("a", 2**40, 0), ("aa", 0, 0)]
    seeds = [mixed_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [mixed_seed(*part) for part in parts]


def test_a_stream_may_be_read_again_and_dropped_halfway(images, expected):
    stream = stream_of(images, workers=2)
    assert_same(collected(stream, epoch=1, steps=2), expected)
    assert_same(collected(stream, epoch=1), expected)
    workers = [worker.pid for worker in multiprocessing.active_children()]
    assert len(collected(stream, epoch=2)) == 20
    assert [worker.pid for worker in multiprocessing.active_children()] == workers  # the same ones, not new ones
    stream.close()
    assert not multiprocessing.active_children()
    assert_same(collected(stream, epoch=1, steps=1), expected)
    stream.close()


def test_two_passes_at_once_are_refused(images):
    stream = stream_of(images)
    first, second = stream.steps(0), stream.steps(1)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="another pass over this stream was started"):
        next(first)
    assert len(list(second)) == 4


def test_each_epoch_has_each_image_at_most_once_and_another_order():
    stream = DatasetStream(Numbered(43), Recipe(**SMALL))
    orders = []
    for epoch in range(3):
        parts = [part.images for step in stream.steps(epoch) for part in step]
        indices = torch.cat(parts)[:, 0].int().tolist()
        assert len(indices) == len(set(indices)) == 40  # three are left over
        orders.append(indices)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert set().union(*orders) == set(range(43))
    other = DatasetStream(Numbered(43), Recipe(**SMALL, seed=1))
    assert torch.cat([part.images for step in other.steps(0) for part in step])[:, 0].int().tolist() != orders[0]


def test_every_view_has_random_numbers_of_its_own_from_all_three_generators():
    stream = DatasetStream(Numbered(40), Recipe(**SMALL))
    drawn = torch.cat([part.images for epoch in (0, 1) for step in stream.steps(epoch) for part in step])[:, 1:]
    assert len(drawn.unique()) == 2 * 40 * 3


@pytest.mark.parametrize("count", [40, 600])
def test_repeated_augmentation_deals_three_views_to_different_micro_batches(count):
    recipe = Recipe(**SMALL, repeated_aug=3)
    stream = DatasetStream(Numbered(count), recipe)
    assert stream.steps_per_epoch == count // 8
    whole = collected(stream, epoch=1)
    views: dict[int, list[tuple[int, float]]] = {}
    for (_, number), (found, _) in whole.items():
        for index, *drawn in found.tolist():
            views.setdefault(int(index), []).append((number, drawn[0]))
    assert len(views) == pytest.approx(count / 3, abs=2)
    complete = [found for found in views.values() if len(found) == 3]
    assert len(complete) >= len(views) - 2
    for found in complete:
        assert len({number for number, _ in found}) == 3
        assert len({drawn for _, drawn in found}) == 3
    for rank in range(2):
        assert_same(collected(DatasetStream(Numbered(count), recipe, shard=(rank, 2)), epoch=1, start=1), whole)
    assert not torch.equal(collected(stream, epoch=2)[0, 0][0][:, 0], whole[0, 0][0][:, 0])


def test_the_views_of_repeated_augmentation_differ_by_seed():
    first, second = (DatasetStream(Numbered(40), Recipe(**SMALL, repeated_aug=3, seed=seed)) for seed in (0, 1))
    order = [collected(stream, steps=1)[0, 0][0][:, 0].tolist() for stream in (first, second)]
    assert order[0] != order[1]


@pytest.mark.parametrize(("size", "micro_batch"), [(3, 2), (8, 2), (3, None)])
def test_processes_that_cannot_share_a_step_are_refused_with_those_that_can(size, micro_batch):
    allowed = "1, 2, 4" if micro_batch else "1, 2, 4, 8"
    with pytest.raises(
        ValueError, match=rf"{size} processes cannot share the .* of a step evenly: start {allowed}, or"
    ):
        DatasetStream(Numbered(40), Recipe(**{**SMALL, "micro_batch": micro_batch}), shard=(0, size))


def test_without_a_size_micro_batches_are_what_a_process_takes():
    recipe = Recipe(**{**SMALL, "micro_batch": None})
    assert DatasetStream(Numbered(40), recipe).micro_batches == 1
    stream = DatasetStream(Numbered(40), recipe, shard=(1, 4))
    assert (stream.micro_batches, stream.micro_batch_size, list(stream.numbers)) == (4, 2, [1])
    with pytest.raises(ValueError, match="micro_batch=1: expected an even number"):
        DatasetStream(Numbered(40), recipe, shard=(0, 8))


def test_less_data_than_a_step_takes_is_refused():
    with pytest.raises(ValueError, match="Numbered has 7 images, a step takes batch_size=8: lower it"):
        DatasetStream(Numbered(7), Recipe(**SMALL))
    assert DatasetStream(Numbered(8), Recipe(**SMALL)).steps_per_epoch == 1


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 6)])
def test_steps_that_are_not_there_are_refused(epoch, start):
    with pytest.raises(ValueError, match=rf"epoch={epoch}, start={start}: expected start from 0 to 5"):
        DatasetStream(Numbered(40), Recipe(**SMALL)).steps(epoch, start)


@pytest.mark.parametrize("options", [{"workers": -1}, {"skip_bad": True}, {"prefetch": 0}, {"shard": (2, 2)}])
def test_options_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))}|{name} must be .*; got {value}"):
        DatasetStream(Numbered(40), Recipe(**SMALL), **options)


def test_a_folder_and_a_zip_give_the_same_stream(tmp_path, images, expected):
    folder = write_folder(tmp_path / "set", image_set())
    stream = stream_of(folder)
    assert_same(collected(stream, epoch=1, steps=2), expected)
    assert stream.fingerprint() == stream_of(images).fingerprint()


def test_what_a_worker_gets_can_be_sent_to_another_process(images, expected):
    reader = pickle.loads(pickle.dumps(stream_of(images)._loader.dataset))
    stream = stream_of(images)
    stream._loader = DataLoader(reader, batch_size=None, sampler=stream._requests)
    assert_same(collected(stream, epoch=1, steps=1), expected)


def test_the_fingerprint_names_all_that_micro_batches_depend_on(images):
    known = stream_of(images).fingerprint()
    assert known == json.loads(json.dumps(known))
    for change in ({"seed": 1}, {"micro_batch": 4}, {"repeated_aug": 3}, {"reprob": 0.5}, {"batch_size": 4}):
        assert stream_of(images, **change).fingerprint() != known
    assert stream_of(images, workers=2, shard=(1, 2)).fingerprint() == known
    assert stream_of(images).describe()["images"] == 40


# Images that cannot be read


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The same zip with three images cut short."""
    files = image_set()
    for name in BAD:
        files[name] = files[name][: len(files[name]) // 2]
    return write_zip(tmp_path_factory.mktemp("set") / "damaged.zip", files)


BAD = ("train/a/000.jpg", "train/b/017.jpg", "train/a/030.jpg")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_once_and_others_stand_in(damaged, expected, workers):
    stream = stream_of(damaged, workers=workers, skip_bad=3)
    found = collected(stream, epoch=1)
    assert sorted(stream.bad) == sorted(f"{damaged}!{name}" for name in BAD)
    assert all("runcated" in bad.reason for bad in stream.bad_images)
    changed = [key for key in expected if not torch.equal(found[key][0], expected[key][0])]
    assert len(changed) == 3
    for key in changed:
        images, targets = found[key]
        good = [slot for slot in range(2) if torch.equal(images[slot], expected[key][0][slot])]
        assert len(good) == 1
        # the other slot has the same picture, in a view of its own
        assert targets.tolist() == [expected[key][1][good[0]].item()] * 2
        assert not torch.equal(images[0], images[1])
    collected(stream, epoch=2)
    assert len(stream.bad) == 3
    stream.close()


def test_stand_ins_do_not_depend_on_the_processes(damaged):
    whole = collected(stream_of(damaged, skip_bad=3), epoch=1)
    bad = []
    for rank in range(2):
        stream = stream_of(damaged, shard=(rank, 2), skip_bad=3)
        assert_same(collected(stream, epoch=1), whole)
        bad += stream.bad
    assert len(bad) == len(set(bad)) == 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("allowed", [0, 2])
def test_more_unreadable_images_than_allowed_are_refused_by_path(damaged, workers, allowed):
    stream = stream_of(damaged, workers=workers, skip_bad=allowed)
    with pytest.raises(CorruptImageError, match=f"with {allowed} allowed: .*--skip-bad N") as caught:
        collected(stream)
    assert sum(name in str(caught.value) for name in BAD) == allowed + 1
    stream.close()
    assert not multiprocessing.active_children()  # though `caught` holds the frames of the pass


def test_a_micro_batch_with_nothing_readable_is_refused(tmp_path):
    root = write_zip(tmp_path / "images.zip", {f"train/{c}/{i}.jpg": b"no" for c in "ab" for i in range(4)})
    with pytest.raises(
        CorruptImageError, match=r"nothing in micro-batch 0 of step 0 can stand in .*: not an image|\(not"
    ):
        collected(stream_of(root, skip_bad=8))


def test_unreadable_images_of_other_processes_and_of_before_count_too(damaged):
    stream = stream_of(damaged, skip_bad=3)
    stream.add_bad([BadImage("elsewhere.jpg", "gone")] * 2)
    stream.add_bad([["elsewhere.jpg", "gone"]])  # as JSON has it
    assert stream.bad == ["elsewhere.jpg"]
    with pytest.raises(CorruptImageError, match="cannot read 4 images, with 3 allowed"):
        collected(stream)


def test_the_next_readable_image_stands_in_and_after_the_last_the_first():
    def load(sample: int) -> tuple[torch.Tensor, int] | BadImage:
        return (torch.tensor(float(sample)), sample) if sample < 10 else BadImage(str(sample), "")

    answer = read_micro_batch([10, 1, 11, 12, 2, 13], load, 0, 0, 0)
    assert answer.targets.tolist() == answer.images.tolist() == [1, 1, 2, 2, 2, 1]
    assert [bad.path for bad in answer.bad] == ["10", "11", "12", "13"]


def test_an_error_of_a_transform_is_no_unreadable_image(images):
    def broken(image: object) -> torch.Tensor:
        raise ZeroDivisionError("of the transform")

    stream = stream_of(images, skip_bad=10)
    stream._loader.dataset.dataset.transform = broken
    with pytest.raises(ZeroDivisionError, match="of the transform"):
        collected(stream)


# Tensors and loaders


def test_tensors_are_gathered_in_the_same_order_for_any_processes():
    data = TensorDataset(torch.arange(43.0).reshape(43, 1), torch.arange(43, dtype=torch.int32))
    recipe = Recipe(**SMALL)
    whole = collected(TensorStream(data, recipe), epoch=1)
    values = torch.cat([found for found, _ in whole.values()])
    assert len(whole) == 20
    assert len(values.unique()) == 40
    assert all(torch.equal(found[:, 0].long(), targets) for found, targets in whole.values())
    order = torch.cat([part.images[:, 0] for step in DatasetStream(Numbered(43), recipe).steps(1) for part in step])
    assert torch.equal(values[:, 0], order)
    for rank in range(4):
        assert_same(collected(TensorStream(data, recipe, shard=(rank, 4)), epoch=1, start=2), whole)


def test_the_digits_are_a_stream():
    stream = TensorStream(digits("train"), Recipe(epochs=1, lr=1e-3, batch_size=64))
    assert (stream.steps_per_epoch, stream.micro_batches, stream.images_per_epoch) == (22, 1, 1408)
    (part,) = next(stream.steps(0))
    assert tuple(part.images.shape) == (64, 1, 8, 8)
    assert stream.describe()["root"] == "scikit-learn digits"
    assert stream.fingerprint() == TensorStream(digits("train"), Recipe(epochs=1, lr=1e-3, batch_size=64)).fingerprint()
    with pytest.raises(ValueError, match="1437 images, a step takes batch_size=2048"):
        TensorStream(digits("train"), Recipe(batch_size=2048))


def test_a_loader_of_the_callers_is_a_stream_that_says_what_it_cannot_do():
    loader = make_loader(digits("train"), 100, shuffle=True, drop_last=True)
    stream = LoaderStream(loader)
    assert (stream.steps_per_epoch, stream.micro_batches, stream.images_per_epoch) == (14, 1, 1400)
    assert "may see others" in stream.exact
    steps = list(stream.steps(3))
    assert [part.number for (part,) in steps] == [0] * 14
    loader.set_epoch(3)
    assert all(torch.equal(part.targets, targets) for (part,), (_, targets) in zip(steps, loader, strict=True))
    assert len(list(stream.steps(0, start=12))) == 2
    assert stream.fingerprint() == json.loads(json.dumps(stream.fingerprint()))
    assert stream.bad == []
    plain = LoaderStream([(torch.ones(2, 1), torch.zeros(2))])
    assert (plain.steps_per_epoch, plain.images_per_epoch) == (1, 0)


def test_a_loader_that_is_empty_or_does_not_end_is_refused():
    with pytest.raises(ValueError, match="train_loader is empty"):
        LoaderStream([])
    with pytest.raises(ValueError, match="train_loader has no length"):
        LoaderStream(iter([picture(0)]))
