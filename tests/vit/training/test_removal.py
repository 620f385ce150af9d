"""Ways to remove attention while training: fading without the identity, one layer after another, repair of single blocks."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from training_support import Notes, plain, recipe, same_weights, tiny_vit, trainer

from lambda_kernels import convert_vit
from lambda_vit.training.dilution import LambdaSchedule, RemovalSchedule, dilute, finish_dilution, set_lambda
from lambda_vit.training.loop.local_repair import LocalRepair

DROP = {"removal": "drop", "dilution_epochs": None}
LOCAL = {**DROP, "local_epochs": 1.5, "distillation": "soft", "distillation_alpha": 1.0}


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(4, 1, 8, 8, dtype=torch.float64)


def attention(block, x):
    return block.ls1(block.attn(block.norm1(x)))


def mlp(block, x):
    return x + block.ls2(block.mlp(block.norm2(x)))


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_a_block_fades_towards_its_residual_scale(scale, lam, images):
    full = tiny_vit(drop_path_rate=0.0, init_values=0.5).double().eval()
    fading = dilute(full, (1,), lam=lam, residual_scale=scale)
    x = full.blocks[0](full._pos_embed(full.patch_embed(images)))
    held = torch.tensor(lam, dtype=torch.float32).double()  # λ is kept in float32
    wanted = mlp(full.blocks[1], (scale + (1 - scale) * held) * x + held * attention(full.blocks[1], x))
    torch.testing.assert_close(fading.blocks[1](x), wanted, rtol=1e-6, atol=1e-7)
    if lam == 1:
        torch.testing.assert_close(fading(images), full(images), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
def test_a_faded_network_becomes_the_converted_one(scale, images):
    full = tiny_vit(drop_path_rate=0.0).double().eval()
    fading = dilute(full, (0, 1), lam=0.0, residual_scale=scale)
    converted = convert_vit(full, (0, 1), residual_scale=scale)
    torch.testing.assert_close(fading(images), converted(images), rtol=1e-13, atol=1e-13)
    finished = finish_dilution(fading)
    assert finished.lambda_kernels_info.residual_scale == scale
    assert torch.equal(finished(images), converted(images))


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_a_residual_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="residual_scale must be a positive number"):
        dilute(tiny_vit(), (1,), residual_scale=scale)


def test_blocks_may_have_a_lambda_each():
    model = dilute(tiny_vit(), (0, 1))
    set_lambda(model, {1: 0.25})
    assert [float(model.blocks[i].lam) for i in (0, 1)] == [1.0, 0.25]
    with pytest.raises(ValueError, match=r"lam names blocks \[2\], which are not under dilution; those are \[0, 1\]"):
        set_lambda(model, {0: 0.5, 2: 0.5})
    assert float(model.blocks[0].lam) == 1.0
    set_lambda(model, {0: 0.0, 1: 0.0})
    finish_dilution(model)


def test_schedules_of_all_ways():
    fading = LambdaSchedule(10)
    assert RemovalSchedule("fade", (4, 1), fading)(4) == {4: 0.6, 1: 0.6}
    assert RemovalSchedule("dilute", (4, 1), fading)(10) == {4: 0.0, 1: 0.0}
    one_by_one = RemovalSchedule("progressive", (4, 1, 3), fading)
    wanted = {0: (0, 1, 1), 3: (0, 1, 1), 4: (0, 0, 1), 6: (0, 0, 1), 7: (0, 0, 0), 99: (0, 0, 0)}
    assert {step: tuple(one_by_one(step)[layer] for layer in (4, 1, 3)) for step in wanted} == wanted
    assert set(RemovalSchedule("drop", (1,), LambdaSchedule(0))(0).values()) == {0.0}


def test_fading_ends_as_a_network_with_residual_scale_one():
    faded, dropped = trainer(plain(removal="fade")), trainer(plain(removal="drop", dilution_epochs=None))
    faded.train()
    dropped.train()
    assert faded.attention_removal["step"] == 6
    assert faded.model.lambda_kernels_info.residual_scale == dropped.model.lambda_kernels_info.residual_scale == 1
    assert not same_weights(faded.model, dropped.model)


def test_layers_go_one_after_another_in_the_order_given():
    """Three layers in six steps: before steps 0, 2 and 4."""
    log = Notes()
    found = trainer(plain(removal="progressive"), tiny_vit(depth=5), layers=(3, 0, 1), log=log)
    parameters = []
    step = found.train_state.step

    def counting(position, batches, **options):
        parameters.append(sum(len(group["params"]) for group in found.train_state.optimizer.param_groups))
        return step(position, batches, **options)

    found.train_state.step = counting
    found.train()
    assert [(row["step"], row["removed"]) for row in log.of("boundary")] == [(0, [3]), (2, [0]), (4, [1])]
    assert [round(row["lambda"] * 3) for row in log.of("step")[:4]] == [2, 2, 1, 1]
    assert [row["lambda"] for row in log.of("step")[4:]] == [None] * 8
    own = len(list(tiny_vit().blocks[0].attn.parameters())) + 2  # with the norm before it
    assert [parameters[0] - count for count in parameters] == [0, 0, own, own, *[2 * own] * 8]
    assert found.attention_removal["step"] == 4
    assert found.attention_removal["removed"] == [0, 1, 3]
    assert found.attention_removal["difference"] == max(row["difference"] for row in found.removals)
    assert [row["attention"] for row in found.history] == ["diluting", "removed", "removed", "removed"]
    assert not found.history[0]["best"]
    assert found.model.lambda_kernels_info.removed == (0, 1, 3)
    assert found.model.lambda_kernels_info.residual_scale == 1
    other = trainer(plain(removal="progressive"), tiny_vit(depth=5), layers=(0, 1, 3))
    other.train()
    assert not same_weights(found.model, other.model)


@pytest.mark.parametrize("more", [{}, {"distillation": "soft", "hidden_loss": 0.3}], ids=["labels", "teacher"])
def test_a_progressive_run_resumes_bit_for_bit(more):
    """Between, at and after its removals; with an average of the weights."""
    own = recipe(removal="progressive", checkpoint_every=1, **more)

    def start():
        return trainer(own, tiny_vit(depth=5), layers=(2, 0, 3))

    whole = start()
    whole.train()
    for stop in (0, 1, 2, 3, 4, 5, 8):
        part = start()
        part.train(until=stop) if stop else None
        state = copy.deepcopy(part.state())
        again = start()
        again.restore(state)
        again.train()
        assert same_weights(again.model, whole.model), stop
        assert again.history == whole.history
        assert again.removals == whole.removals


def test_progressive_removal_of_one_layer_is_refused():
    with pytest.raises(ValueError, match="removal='progressive': expected drop, fade or dilute for one layer"):
        trainer(recipe(removal="progressive"), layers=(1,))
    trainer(recipe(removal="progressive"), layers=())  # the full model by the same recipe


def test_the_order_of_a_progressive_run_is_part_of_what_it_resumes():
    part = trainer(plain(removal="progressive"), layers=(1, 0))
    part.train(until=2)
    with pytest.raises(ValueError, match=r"layers was \[1, 0\], is \[0, 1\]"):
        trainer(plain(removal="progressive"), layers=(0, 1)).restore(part.state())
    dropped = trainer(plain(**DROP), layers=(1, 0))
    dropped.train(until=2)
    trainer(plain(**DROP), layers=(0, 1)).restore(dropped.state())


@pytest.mark.parametrize("dilution", ["linear", "none"])
def test_a_run_from_before_there_were_ways_to_remove_resumes(dilution):
    own = plain(dilution=dilution, dilution_epochs=None if dilution == "none" else 2)
    whole, part = trainer(own), trainer(own)
    whole.train()
    part.train(until=7)
    state = copy.deepcopy(part.state())
    for name in ("removal", "local_epochs"):
        del state["fingerprint"][f"recipe.{name}"]
    removals = state.pop("removals")
    state["boundary"] = removals[0] if removals else None
    state["learner"] |= {"removed": True}
    del state["learner"]["local"]
    again = trainer(own)
    again.restore(state)
    again.train()
    assert same_weights(again.model, whole.model)
    assert again.removals == whole.removals


def tokens_before_and_after(model, images):
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    found = []
    for block in model.blocks:
        found.append((x, block(x)))
        x = found[-1][1]
    return found


def test_local_repair_compares_each_block_on_the_teachers_input(images):
    teacher = tiny_vit(drop_path_rate=0.0).double().eval()
    student = convert_vit(teacher, (0, 1)).train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    repair = LocalRepair(student, teacher, (0, 1))
    loss = repair(repair.blocks, images)
    loss.backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    wanted = 0
    for layer, (x, output) in enumerate(tokens_before_and_after(teacher, images)):
        if layer in (0, 1):
            own = mlp(student.blocks[layer], x.detach())
            wanted = wanted + (own - output.detach()).pow(2).mean() / output.detach().pow(2).mean() / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0, check_dtype=False)
    wanted.backward()
    for name, parameter in student.named_parameters():
        if name.startswith(("blocks.0.", "blocks.1.")):
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-9, msg=name)
        else:
            assert found[name] is None
    assert not any(block._forward_hooks for block in teacher.blocks)


def test_only_the_blocks_without_attention_learn_at_first():
    """In the first four and a half steps of twelve, rounded to four; the optimizer then knows nothing of them."""
    found = trainer(plain(**LOCAL | {"local_epochs": 1.5}), layers=(0, 1))
    before = copy.deepcopy(found.model.state_dict())
    found.train(until=3)
    assert found.train_state.is_local
    changed = {name for name, value in found.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("blocks.0.", "blocks.1.")) for name in changed)
    found.train(until=4)
    assert not found.train_state.is_local
    assert not found.train_state.optimizer.state
    found.train(until=5)
    steps = {float(state["step"]) for state in found.train_state.optimizer.state.values()}
    assert steps == {1.0}
    found.train()
    assert not torch.equal(found.model.state_dict()["blocks.2.attn.qkv.weight"], before["blocks.2.attn.qkv.weight"])


def test_local_repair_lowers_its_loss_and_follows_the_schedule_of_the_learning_rate():
    log = Notes()
    found = trainer(plain(**LOCAL | {"local_epochs": 3.0, "lr": 5e-3}), layers=(0, 1), log=log)
    found.train()
    losses = [row["loss"] for row in found.history]
    assert losses[2] < 0.7 * losses[0]
    whole = trainer(plain(**DROP, lr=5e-3), layers=(0, 1), log=(other := Notes()))
    whole.train()
    assert [row["lr"] for row in log.of("step")] == [row["lr"] for row in other.of("step")]


def test_a_run_with_local_repair_resumes_bit_for_bit():
    """Before, at and after its end; with an average of the weights, mixed images and micro-batches."""
    own = recipe(**LOCAL, feature_loss=0.5)

    def start():
        return trainer(own, layers=(0, 1))

    whole = start()
    whole.train()
    for stop in (2, 4, 5, 9):
        part = start()
        part.train(until=stop)
        again = start()
        again.restore(copy.deepcopy(part.state()))
        assert again.train_state.is_local is (stop < 4)
        again.train()
        assert same_weights(again.model, whole.model), stop
        assert same_weights(again.train_state.ema.module, whole.train_state.ema.module)
        assert again.history == whole.history


def test_a_compiled_network_is_repaired_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    eager, compiled = (trainer(plain(**LOCAL, compile=value), layers=(0,)) for value in (False, True))
    eager.train(until=5)
    compiled.train(until=5)
    assert same_weights(eager.model, compiled.model)


def test_the_full_model_by_the_same_recipe_has_nothing_to_repair():
    """It is its own teacher, of which a warning says that it has nothing to learn; a run from before `removal` resumes."""
    with pytest.warns(UserWarning, match="the model is its own teacher, and nothing is removed"):
        found = trainer(plain(**LOCAL), layers=())
    assert not found.train_state.is_local
    old = trainer(plain(dilution="linear"), layers=())
    old.train(until=3)
    state = copy.deepcopy(old.state())
    state["fingerprint"] |= {"recipe.dilution": "linear", "recipe.dilution_epochs": None, "recipe.dilution_per": "step"}
    again = trainer(plain(**DROP), layers=())
    again.restore(state)
    again.train()
    whole = trainer(plain(dilution="linear"), layers=())
    whole.train()
    assert same_weights(again.model, whole.model)


def test_a_network_past_the_repair_does_not_take_a_state_from_inside_it():
    found = trainer(plain(**LOCAL), layers=(0, 1))
    found.train(until=2)
    state = copy.deepcopy(found.state())
    found.train(until=6)
    with pytest.raises(ValueError, match="this network is past the repair of single blocks"):
        found.restore(state)


@pytest.mark.parametrize(("length", "epochs"), [(0.1, 4), (0.9, 1)])
def test_a_repair_of_no_step_or_of_all_is_refused(length, epochs):
    with pytest.raises(ValueError, match=rf"local_epochs={length:g} is [03] of {3 * epochs} steps"):
        trainer(plain(**LOCAL | {"local_epochs": length, "epochs": epochs, "warmup_epochs": 0}), layers=(0, 1))


def test_progressive_removal_needs_a_step_per_layer():
    with pytest.raises(ValueError, match=r"has 1 steps \(dilution_epochs\) to remove 2 layers one after another"):
        trainer(plain(removal="progressive", dilution_epochs=0.3), layers=(0, 1))
    with pytest.raises(ValueError, match=r"has 1 epochs \(dilution_epochs\) to remove 2 layers"):
        trainer(plain(removal="progressive", dilution_epochs=1, dilution_per="epoch"), layers=(0, 1))


def test_what_cannot_be_repaired_is_refused_before_training():
    with pytest.raises(ValueError, match="all of these are frozen: omit some from freeze, or set local_epochs to 0"):
        trainer(plain(**LOCAL, freeze=(1,)), layers=(1,))
    with pytest.raises(ValueError, match=r"the teacher has no attention in blocks \[1\] either"):
        trainer(plain(**LOCAL), layers=(1,), teacher=convert_vit(tiny_vit(), (1,)))
    with pytest.raises(ValueError, match=r"differ in number of blocks: 2 and 3\. Set local_epochs to 0"):
        trainer(plain(**LOCAL), layers=(1,), teacher=tiny_vit(depth=2))
    with pytest.raises(ValueError, match=r"differ in width: 48 and 24\. Set feature_loss and local_epochs to 0"):
        trainer(plain(**LOCAL, feature_loss=1.0), layers=(1,), teacher=tiny_vit(embed_dim=48))
