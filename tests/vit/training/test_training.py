"""The training engine in one process: what a step computes, what happens at λ = 0, what counts for the best."""

from __future__ import annotations

import copy
import math

import pytest
import torch.nn.functional as F
from tensor_stream import TensorStream
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from training_support import (
    Notes,
    largest_difference,
    plain,
    recipe,
    same_weights,
    tiny_vit,
    train_set,
    trainer,
    validation,
)

from lambda_kernels import AttentionFreeBlock, from_pretrained
from lambda_vit import dilute, finish_dilution, set_lambda
from lambda_vit.measure.accuracy import Score, evaluate
from lambda_vit.training.dilution import diluted_blocks


def test_a_step_is_the_step_of_a_bare_loop():
    """Gradients of micro-batches add up to that of the whole batch; λ, rate, clipping and average are where they belong."""
    for own in (plain(), plain(micro_batch=8, clip_grad=0.3, ema=0.8, layer_decay=0.7)):
        start = tiny_vit(drop_path_rate=0.0).double()  # AdamW makes large steps of the rounding of small gradients
        found = trainer(own, start)
        found.train()
        model = dilute(start, (1,)).train()
        options = {"layer_decay": own.layer_decay} if own.layer_decay else {}
        optimizer = create_optimizer_v2(model, "adamw", lr=own.lr, weight_decay=own.weight_decay, **options)
        ema, updates = ModelEmaV3(model, 0.8), 0
        stream = TensorStream(train_set(), plain())
        for step in range(12):
            if step == 6:
                set_lambda(model, 0.0)
                kept = dict(optimizer.state)
                model = finish_dilution(model).train()
                optimizer = create_optimizer_v2(model, "adamw", lr=own.lr, weight_decay=own.weight_decay, **options)
                optimizer.state.update({p: kept[p] for p in model.parameters()})
                ema, updates = ModelEmaV3(model, 0.8), 0
            elif step < 6:
                set_lambda(model, 1 - step / 6)
            lr = own.warmup_lr + step * (own.lr - own.warmup_lr) / 3
            if step >= 3:
                lr = own.min_lr + (own.lr - own.min_lr) * (1 + math.cos(math.pi * step / 12)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            ((_, images, labels),) = list(stream.steps(step // 3))[step % 3]
            F.cross_entropy(model(images.double()), labels).backward()
            if own.clip_grad:
                nn.utils.clip_grad_norm_(model.parameters(), own.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            ema.update(model, step=updates)
        assert largest_difference(found.model, model) < 1e-10
        if own.ema:
            assert largest_difference(found.train_state.ema.module, ema.module) < 1e-10


@pytest.mark.parametrize(
    ("options", "lambdas", "boundary"),
    [
        ({}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], 6),
        ({"dilution_per": "epoch"}, [1, 1, 1, 0.5, 0.5, 0.5], 6),
        ({"dilution_per": "epoch", "dilution_epochs": 1.5}, [1, 1, 1, 1 / 3, 1 / 3, 1 / 3], 6),
        ({"dilution_epochs": 1.34}, [1, 0.75, 0.5, 0.25], 4),
        ({"dilution_epochs": 0}, [], 0),
        ({"dilution_epochs": 4, "dilution": "cosine"}, [(1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)], 12),
        ({"dilution": "none", "dilution_epochs": None}, [], None),
    ],
)
def test_lambda_and_the_boundary(options, lambdas, boundary):
    notes = Notes()
    found = trainer(plain(**options), log=notes)
    found.train()
    seen = [row["lambda"] for row in notes.of("step")]
    assert seen[: len(lambdas)] == pytest.approx(lambdas)
    assert seen[len(lambdas) :] == [None] * (12 - len(lambdas))
    assert [row["step"] for row in notes.of("boundary")] == ([] if boundary is None else [boundary])
    block = found.model.blocks[1]
    assert type(block) is AttentionFreeBlock
    assert block.residual_scale == (1.0 if boundary is None else 2.0)
    assert (found.attention_removal is None) == (boundary is None)
    if boundary is not None:
        assert 0 <= found.attention_removal["difference"] <= found.attention_removal["bound"] < 1e-3
        assert found.attention_removal["removed"] == [1]
    for row in found.history:
        assert row["attention"] == ("diluting" if boundary is not None and row["step"] < boundary else "removed")


def test_history_and_log():
    notes, own = Notes(), recipe(val_every=3)
    found = trainer(own, log=notes, log_every=2)
    history = found.train()
    assert [row["step"] for row in notes.of("step")] == [2, 4, 6, 8, 10, 12]
    for row in notes.of("step"):
        assert row["epoch"] == (row["step"] - 1) // 3 + 1
        assert row["images_per_second"] > 0
        assert row["memory_bytes"] > 1e6
        assert row["grad_norm"] > 0
    assert [{k: v for k, v in row.items() if k not in ("kind", "seconds")} for row in notes.of("epoch")] == history
    assert [row["top1"] is None for row in history] == [True, True, False, False]  # the last epoch always counts
    assert [row["lambda"] for row in history] == [pytest.approx(4 / 6), 0.0, 0.0, 0.0]
    wanted = evaluate(found.model, validation())
    assert (history[-1]["top1"], history[-1]["top5"]) == pytest.approx((wanted.top1, wanted.top5))
    assert history[-1]["top1_ema"] == evaluate(found.train_state.ema.module, validation()).top1
    assert found.position == 12
    assert not found.model.training
    losses = []
    bare = trainer(plain(val_every=3), log=(single := Notes()))
    bare.train()
    for epoch in range(4):
        losses.append([row["loss"] for row in single.of("step") if row["epoch"] == epoch + 1])
    assert [row["loss"] for row in bare.history] == pytest.approx([sum(part) / 3 for part in losses])


def test_weights_and_average_are_validated_at_the_lambda_of_the_moment(monkeypatch):
    from lambda_vit.training.loop import trainer as engine

    seen = []

    def noted(model, *args, **kwargs):
        seen.append({index: float(block.lam) for index, block in diluted_blocks(model).items()})
        return Score(1, 2, 3)

    monkeypatch.setattr(engine, "score", noted)
    trainer(recipe(dilution_epochs=3)).train()
    assert seen == [{1: pytest.approx(lam)} for lam in (7 / 9, 7 / 9, 4 / 9, 4 / 9)] + [{}] * 4


class Saves:
    """Stands in for checkpoints: when they are written, and whether the attention was gone."""

    def __init__(self) -> None:
        self.made: list[tuple[int, bool]] = []

    def save(self, step: int, state: dict) -> None:
        self.made.append((step, state["learner"]["removed"] == [1]))


@pytest.mark.parametrize(("every", "steps"), [(None, [3, 4, 6, 9, 12]), (5, [4, 5, 10, 12]), (100, [4, 12])])
def test_when_checkpoints_are_written(every, steps):
    """At the boundary and at the end in any case; once, also where a step's turn comes with the boundary."""
    saves = Saves()
    trainer(plain(dilution_epochs=4 / 3, checkpoint_every=every), checkpoints=saves).train()
    assert saves.made == [(step, step > 3) for step in steps]
    trainer(plain(dilution_epochs=2, checkpoint_every=6), checkpoints=(both := Saves())).train()
    assert both.made == [(6, True), (12, True), (12, True)]  # before the last validation, and after it


def test_a_run_that_starts_without_attention_goes_on_from_its_first_checkpoint():
    """Its first step has the learning rate that it would have had."""
    own, states = recipe(dilution_epochs=0, sched="tanh", warmup_epochs=0), []

    class Kept(Saves):
        def save(self, step: int, state: dict) -> None:
            states.append(copy.deepcopy(state))

    whole = trainer(own, checkpoints=Kept())
    whole.train()
    again = trainer(own)
    again.restore(states[0])
    again.train()
    assert again.attention_removal["step"] == 0
    assert same_weights(again.model, whole.model)


def test_nothing_is_the_best_before_the_attention_is_gone(tmp_path, monkeypatch):
    """Also where the network with the attention scores higher than ever after."""
    from lambda_vit.training.loop import trainer as engine

    seen = []

    def flattered(model, *args, **kwargs):
        fading = not isinstance(model.blocks[1], AttentionFreeBlock)
        hits = 90 if fading else 10 + len(seen)
        seen.append(fading)
        return Score(hits, 90, 90)

    monkeypatch.setattr(engine, "score", flattered)
    found = trainer(recipe(ema=None), best=tmp_path / "best")
    found.train()
    assert seen == [True, False, False, False]  # λ is 0 by the end of the second epoch, and the attention gone
    assert [row["best"] for row in found.history] == [False, True, True, True]
    assert found.best.to_dict() | {"top1_interval": None} == {
        "epoch": 4, "step": 12, "weights": "model", "top1": pytest.approx(100 * 13 / 90), "top5": 100.0, "images": 90,
        "top1_interval": None,
    }  # fmt: skip
    assert same_weights(from_pretrained(tmp_path / "best"), found.model)


def test_best_is_the_better_of_weights_and_average_and_the_first_of_equals(tmp_path, monkeypatch):
    from lambda_vit.training.loop import trainer as engine

    scores = iter([9, 9, 5, 9, 7, 7, 3, 8])  # of the weights and of their average, after each of four epochs

    def given(model, *args, **kwargs):
        return Score(next(scores), 90, 90)

    monkeypatch.setattr(engine, "score", given)
    found = trainer(recipe(dilution_epochs=1), best=tmp_path / "model")
    first = []
    for until in (3, 4, None):
        found.train(until=until)
        first.append(copy.deepcopy(found.model))
    assert [row["best"] for row in found.history] == [True, False, False, False]
    assert (found.best.epoch, found.best.weights, found.best.score.hits) == (1, "model", 9)
    assert same_weights(from_pretrained(tmp_path / "model"), first[0])
    scores = iter([5, 6, 6, 7, 7, 7, 3, 7])
    found = trainer(recipe(dilution_epochs=1), best=tmp_path / "ema")
    found.train(until=6)
    average = copy.deepcopy(found.train_state.ema.module)
    found.train()
    assert [row["best"] for row in found.history] == [True, True, False, False]
    assert (found.best.epoch, found.best.weights, found.best.score.hits) == (2, "ema", 7)
    assert same_weights(from_pretrained(tmp_path / "ema"), average)
