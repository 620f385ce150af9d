"""What a recipe can ask of the training engine: losses, groups, frozen stages, precision, compilation; and its refusals."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import images, small_vit
from tensor_stream import TensorStream
from timm.layers import DropPath
from torch import nn
from training_support import Notes, largest_difference, plain, recipe, same_weights, tiny_vit, train_set, trainer

from lambda_kernels import AttentionFreeBlock, FusedMlp, convert_vit
from lambda_kernels.blocks import mlp_block
from lambda_vit import dilute, finetune
from lambda_vit.training.dilution import AttentionRemovalError, remove_diluted_attention
from lambda_vit.training.images.stream import LoaderStream, MicroBatch
from lambda_vit.training.loop.model_setup import prepare_model, set_training_mode
from lambda_vit.training.loop.objective import Objective, label_loss


def test_losses():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 10, dtype=torch.float64), torch.randint(10, (6,))
    soft = torch.rand(6, 10, dtype=torch.float64).softmax(1)
    assert label_loss(False, 0.0)(logits, targets) == pytest.approx(float(F.cross_entropy(logits, targets)))
    smoothed = F.cross_entropy(logits, targets, label_smoothing=0.1)
    assert label_loss(False, 0.1)(logits, targets) == pytest.approx(float(smoothed))
    assert label_loss(True, 0.1)(logits, soft) == pytest.approx(float(F.cross_entropy(logits, soft)))


def test_distillation():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout(0.5)).double()
    x, targets = torch.randn(4, 3, 4, dtype=torch.float64), torch.randint(5, (4,))
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    wanted = teacher[1](x.flatten(1)).detach()
    own = {"distillation_alpha": 0.3, "distillation_tau": 4.0}
    soft = Objective(plain(distillation="soft", **own), teacher=teacher)(logits, x, targets)
    p, q = (wanted / 4).softmax(1), (logits / 4).softmax(1)
    distance = 16 * (p * (p / q).log()).sum(1).mean()
    assert float(soft.detach()) == pytest.approx(
        float((0.7 * F.cross_entropy(logits, targets) + 0.3 * distance).detach())
    )
    hard = Objective(plain(distillation="hard", **own), teacher=teacher)(logits, x, targets)
    own = F.cross_entropy(logits, wanted.argmax(1))
    assert float(hard.detach()) == pytest.approx(float((0.7 * F.cross_entropy(logits, targets) + 0.3 * own).detach()))
    soft.backward()
    assert logits.grad is not None
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    with pytest.raises(ValueError, match="need a teacher"):
        Objective(plain(distillation="soft"))
    with pytest.raises(ValueError, match="teacher gives 5 classes, the network 4"):
        Objective(plain(distillation="soft"), teacher=teacher)(logits[:, :4], x, targets % 4)


def test_the_teacher_is_the_model_as_it_was():
    model = tiny_vit()
    start = copy.deepcopy(model)
    found = trainer(recipe(distillation="soft", distillation_alpha=1.0, ema=None), model)
    teacher = found.train_state._objective.teacher
    found.train()
    assert same_weights(teacher, start)
    assert same_weights(model, start)
    assert not teacher.training
    assert type(found.model.blocks[1]) is AttentionFreeBlock
    other = trainer(recipe(distillation="soft", distillation_alpha=1.0, ema=None), model, teacher=tiny_vit(depth=2))
    other.train()
    assert not same_weights(other.model, found.model)
    assert "teacher" in other.fingerprint


def rates(found) -> dict[str, tuple[float, float]]:
    """Rate and weight decay of each parameter by name."""
    names = {id(p): name for name, p in found.model.named_parameters()}
    groups = found.train_state.optimizer.param_groups
    return {
        names[id(p)]: (group["lr"] / group.get("initial_lr", 1), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


def test_rates_and_states_survive_the_boundary():
    found = trainer(recipe(layer_decay=0.6, dilution_epochs=2))
    found.train(until=5)
    before, kept = rates(found), dict(found.train_state.optimizer.state)
    lowest, highest = before["pos_embed"][0], before["head.weight"][0]
    assert lowest == pytest.approx(highest * 0.6**4)  # stem, three blocks, head
    gone = [name for name in before if name.startswith(("blocks.1.norm1", "blocks.1.attn"))]
    found.train(until=6)
    after = rates(found)
    assert sorted(after) == sorted(set(before) - set(gone))
    ratios = {name: (after[name][0] / after["head.weight"][0], after[name][1]) for name in after}
    for name, (ratio, decay) in ratios.items():
        assert ratio == pytest.approx(before[name][0] / highest), name
        assert decay == before[name][1] == (0.05 if found.model.get_parameter(name).dim() > 1 and
                                            name not in ("pos_embed", "cls_token") else 0.0), name  # fmt: skip
    state = found.train_state.optimizer.state
    assert set(state) == set(found.model.parameters())
    for parameter in state:
        assert state[parameter] is kept[parameter]
        assert state[parameter]["step"] == 6


@pytest.mark.parametrize("opt", ["sgd", "lookahead_adamw"])
def test_other_optimizers(opt):
    whole = trainer(plain(opt=opt))
    whole.train()
    part = trainer(plain(opt=opt))
    part.train(until=8)
    state = part.state()
    again = trainer(plain(opt=opt))
    again.restore(copy.deepcopy(state))
    again.train()
    assert same_weights(again.model, whole.model)


def test_the_average_starts_anew_at_the_boundary():
    found = trainer(recipe(ema=0.999))
    found.train(until=5)
    assert largest_difference(found.train_state.ema.module, found.model) > 1e-4
    found.train(until=6)
    assert same_weights(found.train_state.ema.module, found.model)
    assert type(found.train_state.ema.module.blocks[1]) is AttentionFreeBlock
    warm = trainer(recipe(ema=0.999, ema_warmup=True))
    warm.train()
    assert largest_difference(warm.train_state.ema.module, warm.model) < 1e-2  # six steps in, it hardly averages


def active_parts(model: nn.Module) -> set[str] | None:
    if not torch.is_grad_enabled():  # validation
        return None
    return {name for name, module in model.named_modules() if module.training and name not in ("", "blocks")}


def test_frozen_stages():
    own = recipe(freeze=("embed", 0, 1), weight_decay=0.5)
    model = tiny_vit(drop_path_rate=0.5, pos_drop_rate=0.5)
    found = trainer(own, model)
    modes = []
    found.model.head.register_forward_pre_hook(lambda *_: modes.append(active_parts(found.model)))
    found.train(until=7)
    modes = [mode for mode in modes if mode is not None]
    assert len(modes) == 14
    assert all("blocks.2.drop_path2" in mode and "head_drop" in mode for mode in modes)
    assert not any(name.startswith(("blocks.0", "blocks.1", "pos_drop", "patch_embed")) for m in modes for name in m)
    found.train()
    moved = {name for name, p in found.model.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert moved == {
        name for name, _ in found.model.named_parameters() if name.startswith(("blocks.2", "norm", "head"))
    }
    assert type(found.model.blocks[1]) is AttentionFreeBlock
    set_training_mode(found.model, own.freeze)
    assert not found.model.blocks[1].training
    with pytest.raises(ValueError, match="freeze holds 7: block indices are integers from 0 to 2"):
        trainer(recipe(freeze=(7,)))


def test_prepare_model():
    model = small_vit(drop_path_rate=0.1)
    prepare_model(model, plain(drop_path=0.3, drop=0.2, img_size=48))
    rate = [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks]
    assert rate == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [type(block.drop_path1) for block in model.blocks] == [nn.Identity, DropPath, DropPath, DropPath]
    assert model.head_drop.p == 0.2
    assert model(images(size=48)).shape == (4, 10)
    before = copy.deepcopy(model.state_dict())
    prepare_model(model, plain(drop_path=0.3, drop=0.2, img_size=48))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prepare_model(model, plain(drop_path=0.0))
    assert all(type(block.drop_path2) is nn.Identity for block in model.blocks)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_lower_precision(amp):
    own = {"opt": "sgd", "lr": 0.5, "clip_grad": 0.2}  # AdamW would hide a gradient that is too small
    found, full = trainer(plain(amp=amp, **own)), trainer(plain(**own))
    found.train()
    full.train()
    assert all(p.dtype == torch.float32 for p in found.model.parameters())
    start = trainer(plain(dilution="none", dilution_epochs=None)).model
    assert 0 < largest_difference(found.model, full.model) < 0.1 * largest_difference(full.model, start)
    assert found.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.02)


def test_overflow_in_fp16_is_skipped_and_a_run_of_it_is_an_error(monkeypatch):
    from lambda_vit.training.loop import trainer as engine

    found = trainer(plain(amp="fp16"))
    found.train_state._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(found.model)
    start = copy.deepcopy(found.state())
    found.train(until=1)
    assert same_weights(found.model, before)
    assert found.train_state._scaler.get_scale() == 2.0**39
    assert found.state()["skips"] == 1
    again = trainer(plain(amp="fp16"))
    again.restore(start)
    again.train(until=2)
    assert again.train_state._scaler.get_scale() == 2.0**38
    monkeypatch.setattr(engine, "MOST_SKIPPED", 4)
    with pytest.raises(
        ValueError, match=r"gradient of 4 steps in a row was not finite in fp16 \(epoch 2, step 4, .*bf16"
    ):
        found.train()


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly"])
def test_every_schedule_falls_from_its_peak_to_its_end(sched):
    own = recipe(sched=sched, epochs=8)
    train_state = trainer(own).train_state
    rates = []
    for step in range(24):
        rates.append(train_state.lr)
        train_state._scheduler.step_update(step + 1)
    assert rates[0] == own.warmup_lr
    assert max(rates) <= own.lr
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.1 * own.lr


def test_fused_mlps_recompute_what_they_are_told_to(monkeypatch):
    """Once the attention is gone; the average of the weights, which is not trained, may do as it likes."""
    asked, whole = set(), mlp_block.ln_mlp

    def noted(*arguments: object, **options: object) -> torch.Tensor:
        if torch.is_grad_enabled():
            asked.add(options["recompute"])
        return whole(*arguments, **options)

    monkeypatch.setattr(mlp_block, "ln_mlp", noted)
    own = trainer(recipe(recompute="act"), tiny_vit())
    own.train()
    assert asked == {"act"}
    assert own.model.blocks[1].recompute == own.model.blocks[0].recompute == "act"
    assert convert_vit(tiny_vit(), [1]).blocks[1].recompute == "auto"


def test_compilation_follows_lambda_without_compiling_again():
    counted = []

    def backend(graph, example):
        counted.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile
    torch.compile = lambda model: compiled(model, backend=backend)
    try:
        found = trainer(plain(compile=True, micro_batch=16))
        found.train(until=1)
        first = len(counted)
        found.train(until=5)
        assert len(counted) == first > 0
        found.train(until=7)
        second = len(counted)
        assert second > first
        found.train()
        assert len(counted) == second
    finally:
        torch.compile = compiled
        torch._dynamo.reset()
    bare = trainer(plain(micro_batch=16))
    bare.train()
    assert largest_difference(found.model, bare.model) < 1e-4


def test_what_is_drawn_depends_on_the_place_alone():
    runs = []
    for seed in (1, 2):
        found = trainer()
        torch.manual_seed(seed)
        np.random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist()
        found.train()
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.random.get_state()[1].tolist() == states[1]
        runs.append(found.model)
    assert same_weights(*runs)
    assert not same_weights(runs[0], train_with(seed=9))


def train_with(**options: object) -> nn.Module:
    found = trainer(recipe(**options))
    found.train()
    return found.model


def test_mixing_stops_where_it_is_told_to(monkeypatch):
    seen = []
    # Of these shares none is 1, and no box is empty, which would leave nothing of the other image.
    found = trainer(recipe(mixup=5.0, cutmix=0.0, mixup_off_epoch=2))
    compute = Objective.__call__
    monkeypatch.setattr(
        Objective,
        "__call__",
        lambda own, logits, x, y: (seen.append((found._epoch, x, y)), compute(own, logits, x, y))[1],
    )
    raw = {number: parts for number, parts in enumerate(itertools.chain(*map(found.stream.steps, range(4))))}
    found.train()
    assert len(seen) == 24
    for index, (epoch, x, y) in enumerate(seen):
        batch = raw[index // 2][index % 2]
        assert torch.equal(x, batch.images) == (epoch >= 2)
        smooth = F.one_hot(batch.targets, 10) * 0.9 + 0.01
        assert torch.allclose(y, smooth) == (epoch >= 2)
    shares = [float(y.amax(1).min()) for _, _, y in seen[:2]]
    assert shares[0] != shares[1]  # each micro-batch draws its own


def test_the_caller_keeps_its_images():
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(3)]
    before = copy.deepcopy(batches)
    trainer(recipe(), stream=LoaderStream(batches)).train()
    assert all(
        torch.equal(x, y) for pair, other in zip(batches, before, strict=True) for x, y in zip(pair, other, strict=True)
    )


@torch.no_grad()
def test_the_boundary_finds_a_network_that_computes_something_else(monkeypatch):
    from lambda_vit.training import dilution

    model = dilute(small_vit(), (1, 2), lam=0.4)
    difference, bound = remove_diluted_attention(copy.deepcopy(model))
    assert difference <= bound < 1e-2
    wrong = dilution.delete_attention

    def broken(network, layers):
        wrong(network, layers)
        network.blocks[1].residual_scale = 1.9

    monkeypatch.setattr(dilution, "delete_attention", broken)
    with pytest.raises(AttentionRemovalError, match=r"attention of blocks \[1, 2\] moved a logit by .* in float32"):
        remove_diluted_attention(copy.deepcopy(model), images())
    monkeypatch.undo()
    model.head.weight.fill_(math.nan)
    with pytest.raises(AttentionRemovalError, match="by nan"):
        remove_diluted_attention(model, images())


def test_full_models_and_converted_ones_are_trained_as_they_are():
    whole = trainer(plain(), layers=())
    whole.train()
    assert [row["attention"] for row in whole.history] == ["full"] * 4
    assert all(row["best"] is not None and row["lambda"] is None for row in whole.history)
    assert whole.history[0]["best"]
    assert whole.attention_removal is None
    converted = trainer(plain(), convert_vit(tiny_vit(), (1,)), layers=())
    converted.train()
    dropped = trainer(plain(dilution="none", dilution_epochs=None))
    dropped.train()
    assert same_weights(converted.model, dropped.model)
    assert [row["attention"] for row in dropped.history] == ["removed"] * 4
    assert type(dropped.model.blocks[0]) is FusedMlp


def test_refusals():
    with pytest.raises(ValueError, match="layers holds 5"):
        trainer(layers=(5,))
    past = trainer(plain())
    before = copy.deepcopy(past.state())
    past.train(until=6)
    with pytest.raises(ValueError, match="lost its attention, and the state has it: make another Trainer"):
        past.restore(before)
    model = tiny_vit()
    model.distilled_training = True
    with pytest.raises(ValueError, match=r"set_distilled_training\(False\)"):
        trainer(model=model)
    with pytest.raises(ValueError, match=r"micro_batch=3: expected an even number"):
        TensorStream(train_set(), recipe(batch_size=30, micro_batch=None), shard=(0, 10))
    odd = [(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.long))]
    with pytest.raises(ValueError, match="a batch has 3: make batches of an even number, or set both to 0"):
        trainer(recipe(), stream=LoaderStream(odd)).train()
    nan = [(torch.full((4, 1, 8, 8), math.nan), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"loss became nan in epoch 1, step 1 \(lr 1e-06, λ 1\). Lower lr"):
        trainer(plain(), stream=LoaderStream(nan)).train()


@pytest.mark.parametrize(("outputs", "words"), [(0, "no classifier"), (1, "one output")])
def test_models_whose_outputs_are_no_classes_are_refused(outputs, words):
    batches = [(images(), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ValueError, match=rf"the model has {words} .*reset_classifier\(N\), or --num-classes N"):
        finetune(small_vit(num_classes=outputs), batches, epochs=1)
    model = small_vit()
    model.head = nn.Linear(48, 1)
    with pytest.raises(ValueError, match="one logit per image"):
        finetune(model, batches, epochs=1)


def test_the_batch_that_the_boundary_is_checked_on(monkeypatch):
    from lambda_vit.training.loop import train_state

    seen = []
    whole = train_state.remove_diluted_attention
    monkeypatch.setattr(
        train_state, "remove_diluted_attention", lambda model, x, gone: (seen.append(x), whole(model, x, gone))[1]
    )
    found = trainer(recipe())
    found.train()
    last = list(found.stream.steps(1))[2]
    assert isinstance(last[0], MicroBatch)
    assert torch.equal(seen[0], last[0].images)
    trainer(recipe(dilution_epochs=0), log=Notes()).train(until=1)
    assert seen[1] is None
