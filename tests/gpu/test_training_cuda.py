"""Training on a GPU: the engine's weights are those of the CPU up to rounding, and a run goes on where it stopped."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from training_support import Notes, largest_difference, plain, recipe, same_weights, tiny_vit, train_set, trainer

from lambda_vit.data.loader import make_loader
from lambda_vit.training.images.stream import LoaderStream
from lambda_vit.training.loop.trainer import MOST_SKIPPED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(own=None, **options):
    return trainer(own, device="cuda", **options)


def test_the_same_weights_as_on_the_cpu():
    """In float64, where AdamW makes nothing of the rounding of small gradients; every step is in the log, in order."""
    start = tiny_vit(drop_path_rate=0.0).double()
    notes, expected = Notes(), Notes()
    own = recipe(mixup=0, cutmix=0)
    there = on_gpu(own, model=copy.deepcopy(start), log=notes)
    here = trainer(own, copy.deepcopy(start), log=expected)
    there.train()
    here.train()
    assert largest_difference(there.model.cpu(), here.model) < 1e-9
    assert [(row["kind"], row["step"]) for row in notes.kept] == [(row["kind"], row["step"]) for row in expected.kept]
    for row, wanted in zip(notes.of("step"), expected.of("step"), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)
        assert (row["lr"], row["lambda"]) == (wanted["lr"], wanted["lambda"])
    assert [row["top1"] for row in there.history] == [row["top1"] for row in here.history]


@pytest.mark.parametrize("stop", [2, 5, 6, 8])
def test_a_run_goes_on_where_it_stopped(stop):
    whole = on_gpu()
    whole.train()
    part = on_gpu()
    part.train(until=stop)
    file = io.BytesIO()
    torch.save(part.state(), file)
    file.seek(0)
    again = on_gpu()
    again.restore(torch.load(file, map_location="cpu", weights_only=True))
    again.train()
    # Sums over threads that finish in any order are not the same twice.
    assert largest_difference(again.model, whole.model) < 1e-3
    assert again.position == whole.position == 12
    assert [row["step"] for row in again.history] == [row["step"] for row in whole.history]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_lower_precision(amp):
    found, full = on_gpu(plain(amp=amp)), on_gpu(plain())
    found.train()
    full.train()
    assert all(p.dtype == torch.float32 for p in found.model.parameters())
    assert found.attention_removal["difference"] <= found.attention_removal["bound"]
    assert found.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.05)


def test_a_loss_that_is_not_finite_is_found_one_step_late():
    batches = list(make_loader(train_set(), 32))
    batches[1][0].fill_(float("nan"))
    found = on_gpu(plain(), stream=LoaderStream(batches))
    with pytest.raises(ValueError, match="loss became nan in epoch 1, step 2"):
        found.train()
    assert not found.history


def test_overflow_is_skipped():
    found = on_gpu(plain(amp="fp16"))
    found.train_state._scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    before = copy.deepcopy(found.model)
    found.train(until=1)
    assert same_weights(found.model, before)
    assert MOST_SKIPPED > 1
