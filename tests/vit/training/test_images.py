"""A fine-tuning on image files from end to end: opened, augmented by workers, killed, resumed, loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from resume_support import check_same_end, killed_at
from resume_support import forked as in_a_fork
from small_models import small_vit
from stream_support import make_images
from torch import nn
from training_support import train_set, trainer

from lambda_kernels import from_pretrained
from lambda_vit.data.images import BadImage, CorruptImageError
from lambda_vit.measure.accuracy import evaluate
from lambda_vit.training.images.opening import open_training_data
from lambda_vit.training.images.stream import DatasetStream
from lambda_vit.training.loop import train_state
from lambda_vit.training.recipe import Recipe
from lambda_vit.training.run import FinetuningRun, run_finetuning

# 29 readable images, four steps an epoch; λ is 0 after two of three epochs.
RECIPE = Recipe(
    epochs=3, dilution_epochs=2, batch_size=7, micro_batch=7, lr=1e-3, warmup_epochs=0, mixup=0, cutmix=0, ema=0.9,
    img_size=48, drop_path=0.2, checkpoint_every=3, seed=5,
)  # fmt: skip


def fine_tune(images: Path, out: Path, recipe: Recipe = RECIPE, workers: int = 1) -> FinetuningRun:
    def open_data(model: nn.Module, recipe: Recipe) -> tuple:
        return open_training_data(images, model, recipe, workers=workers, skip_bad=1)

    return run_finetuning(small_vit(), recipe, open_data, layers=(0, 2), out=out, log_every=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """One of each split is no image."""
    folder = make_images(tmp_path_factory.mktemp("images"))
    for path in ("train/class3/1.png", "val/class4/0.png"):
        (folder / path).write_bytes(b"no image")
    return folder


def test_from_end_to_end(images, tmp_path):
    whole = fine_tune(images, tmp_path / "whole")

    def work() -> FinetuningRun:
        killed_at(train_state.TrainState, "step", 5)()
        return fine_tune(images, tmp_path / "killed", workers=0)

    assert in_a_fork(work) == -9
    again = fine_tune(images, tmp_path / "killed")
    check_same_end(tmp_path / "killed", tmp_path / "whole")
    for run in (whole, again):
        assert [str(Path(path).relative_to(images)) for path in run.record["unreadable"]] == [
            "train/class3/1.png",
            "val/class4/0.png",
        ]
        assert run.record["data"]["images"] == 30
        assert run.record["model"]["input"] == [3, 48, 48]
        assert run.record["validation"] == {"images": 19}
    loaded = from_pretrained(tmp_path / "whole" / "model")
    assert loaded.lambda_kernels_info.removed == (0, 2)
    assert loaded.blocks[3].drop_path2.drop_prob == pytest.approx(0.2)
    assert loaded(torch.zeros(1, 3, 48, 48)).shape == (1, 10)
    _, val_loader = open_training_data(images, loaded, dataclasses.replace(RECIPE, seed=0), skip_bad=1)
    assert evaluate(loaded, val_loader).top1 == whole.record["result"]["top1"]


def test_unreadable_images_are_counted_over_a_resume():
    recipe = dataclasses.replace(RECIPE, batch_size=32, micro_batch=32, img_size=None)

    def images_of(skip_bad: int) -> DatasetStream:
        return DatasetStream(train_set(), recipe, skip_bad=skip_bad)

    before = trainer(recipe, stream=images_of(2))
    before.stream.add_bad([BadImage("a.png", "truncated"), BadImage("b.png", "truncated")])
    state = before.state()
    again = trainer(recipe, stream=images_of(2))
    again.restore(state)
    assert again.stream.bad == ["a.png", "b.png"]
    with pytest.raises(CorruptImageError, match=r"a\.png"):
        trainer(recipe, stream=images_of(1)).restore(state)
