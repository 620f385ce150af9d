"""The dry run: every number against a count of another kind, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from small_models import images, small_vit
from torch import nn

from lambda_kernels import UnsupportedModelError, convert_vit
from lambda_vit import Selection, dilute
from lambda_vit.measure import latency
from lambda_vit.measure.cost import cost
from lambda_vit.measure.latency import Latency
from lambda_vit.report.tables import plan_notes
from lambda_vit.runtime import formatting
from lambda_vit.training.plan import planning, step_timing
from lambda_vit.training.plan.planning import plan_training, split_epochs
from lambda_vit.training.plan.step_timing import Loading, measure_loading, saved_bytes, time_steps

STEPS = {"diluting": Latency(200.0, 150.0, 300.0, 5), "final": Latency(100.0, 90.0, 120.0, 7)}


@pytest.fixture
def fake_steps(monkeypatch) -> None:
    """A step takes 200 ms while attention fades and 100 ms without it; nothing is run."""

    def fake(networks, batch_size, seconds, teacher):
        assert all(module.training for network in networks.values() for module in network.modules())
        return {name: (STEPS[name], None) for name in networks}

    monkeypatch.setattr(planning, "time_steps", fake)


class Clock:
    """Stands for `time.perf_counter`: moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(step_timing.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def saved_by_the_graph(loss: torch.Tensor, network: nn.Module) -> int:
    """The same bytes found another way: walk the graph and ask every node for what it saved."""
    weights = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    storages, nodes, seen = {}, [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    # A Python number, such as a residual's factor, lies in the graph as a float64 without dimensions.
                    if isinstance(tensor, torch.Tensor) and (tensor.dim() or tensor.dtype != torch.float64):
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return sum(s.nbytes() for pointer, s in storages.items() if pointer not in weights)


def graph_bytes(network: nn.Module, count: int) -> int:
    network.train()
    loss = F.cross_entropy(network(images(count)), torch.zeros(count, dtype=torch.long))
    return saved_by_the_graph(loss, network)


def test_saved_bytes_by_hand():
    """Two linear layers: what each operator needs for its backward, each storage once."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 3))
    inputs, before, after, log_probabilities = 12, 5, 5, 3  # float32 per image, plus an int64 target
    expected = 2 * (4 * (inputs + before + after + log_probabilities) + 8) + 4  # and the sum of the loss's weights
    assert saved_bytes(network, torch.randn(2, 3, 2, 2)) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"proj_drop_rate": 0.1}),
        ("deit3_small_patch16_224", {"drop_path_rate": 0.3}),
    ],
)
def test_networks(name, options, fake_steps):
    model = small_vit(name, **options)
    plan = plan_training(model, (0, 2), images=100, batch_size=6)
    without = convert_vit(model, (0, 2), residual_scale=2.0)
    for network, key in ((model, "full"), (dilute(model, (0, 2), lam=0.3), "diluting"), (without, "final")):
        planned, expected = plan.networks[key], cost(network)
        assert (planned.parameters, planned.flops) == (expected.parameters, expected.flops)
        assert planned.weight_bytes == expected.weight_bytes
        assert planned.trainable == planned.parameters
        for count in (1, 3, 6):
            assert planned.saved_bytes_fixed + count * planned.saved_bytes_per_image == graph_bytes(network, count)
        parts = (planned.weight_bytes, planned.gradient_bytes, planned.optimizer_bytes, graph_bytes(network, 6))
        assert planned.step_bytes == sum(parts)
        assert planned.peak_bytes is None
    full, diluting, final = plan.networks.values()
    assert final.parameters < full.parameters == diluting.parameters
    assert final.flops < full.flops
    assert diluting.step_bytes >= full.step_bytes > final.step_bytes
    assert diluting.saved_bytes_per_image > final.saved_bytes_per_image
    assert full.step is None
    assert (diluting.step, final.step) == (STEPS["diluting"], STEPS["final"])


def test_gradients_and_optimizer_state_are_those_of_a_real_step(fake_steps):
    from timm.optim import create_optimizer_v2

    model = small_vit()
    for parameter in model.patch_embed.parameters():
        parameter.requires_grad_(False)
    planned = plan_training(model, (1,), images=10, batch_size=2).networks["full"]
    optimizer = create_optimizer_v2(model.train(), "adamw", lr=1e-3)
    model(images(2)).sum().backward()
    optimizer.step()
    assert planned.gradient_bytes == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert planned.optimizer_bytes == sum(moment.nbytes for moment in moments)
    assert planned.trainable == planned.parameters - sum(p.numel() for p in model.patch_embed.parameters())


def test_hours(fake_steps):
    plan = plan_training(small_vit(), (0,), images=1000, batch_size=30, devices=2, dilution_epochs=3, recovery_epochs=2)
    dilution, recovery = plan.phases["dilution"], plan.phases["recovery"]
    assert (dilution.epochs, dilution.steps, recovery.epochs, recovery.steps) == (3, 51, 2, 34)  # 17 per epoch
    assert dilution.hours == pytest.approx(51 * 0.2 / 3600)
    assert (dilution.low_hours, dilution.high_hours) == pytest.approx((51 * 0.15 / 3600, 51 * 0.3 / 3600))
    assert recovery.hours == pytest.approx(34 * 0.1 / 3600)
    assert dilution.hours_with_loading is plan.loading is plan.limited_by is None
    assert plan.images_per_second("diluting") == pytest.approx(150)
    assert json.loads(json.dumps(plan.to_dict()))["phases"]["recovery"]["steps"] == 34


@pytest.mark.parametrize(("speed", "limit"), [(200.0, "loading"), (1000.0, "training")])
@pytest.mark.parametrize("workers", [0, 2])
def test_hours_with_loading(speed, limit, workers, fake_steps, monkeypatch):
    """Workers load while the device trains, so that the slower one counts; without them one waits for the other."""
    monkeypatch.setattr(planning, "measure_loading", lambda loader, seconds: Loading(speed, 40, workers))
    plan = plan_training(small_vit(), (0,), images=300, batch_size=30, loader=[], dilution_epochs=1, recovery_epochs=1)
    assert plan.limited_by == limit  # without attention 300 images per second, else 150
    for phase, training in (("dilution", 2.0), ("recovery", 1.0)):
        loading = 300 / speed
        expected = max(training, loading) if workers else training + loading
        assert plan.phases[phase].hours_with_loading == pytest.approx(expected / 3600)


def test_a_phase_of_no_epochs_is_left_out(fake_steps):
    plan = plan_training(small_vit(), (0,), images=10, dilution_epochs=0, recovery_epochs=1)
    assert set(plan.phases) == {"recovery"}
    assert plan.networks["diluting"].step is None


def test_real_steps_leave_the_model_and_the_random_numbers_alone():
    model = small_vit(drop_path_rate=0.2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    plan = plan_training(model, Selection((2, 0)), images=64, batch_size=4, seconds=0.01)
    assert torch.equal(torch.rand(1), expected)
    assert plan.removed == (0, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    for name in ("diluting", "final"):
        step = plan.networks[name].step
        assert 0 < step.low_ms <= step.median_ms <= step.high_ms
        assert step.rounds >= latency.MINIMUM_ROUNDS


@pytest.mark.parametrize(("seconds", "rounds", "forwards"), [(0.5, 6, 7), (25.0, 7, 9), (1e9, 30, 32)])
def test_budget_of_the_timing(seconds, rounds, forwards, clock):
    """Steps of one and two seconds: at least six after a warm-up, none more once the budget is spent, at most thirty."""
    networks = {"slow": small_vit().train(), "fast": small_vit().train()}
    calls = []

    def tick(network: nn.Module, *_: object) -> None:
        name = next(name for name, other in networks.items() if other is network)
        clock.now += 2.0 if name == "slow" else 1.0
        calls.append(name)

    for network in networks.values():
        network.register_forward_hook(tick)
    before = networks["slow"].head.weight.detach().clone()
    found = time_steps(networks, 2, seconds)
    turns = [["slow", "fast"][:: -1 if turn % 2 else 1] for turn in range(rounds)]  # the order rotates
    assert calls == ["slow", "fast"] * (forwards - rounds) + [name for turn in turns for name in turn]
    for name, expected in (("slow", 2000), ("fast", 1000)):
        step, passing = found[name]
        assert step.rounds == rounds
        assert (step.low_ms, step.median_ms, step.high_ms) == pytest.approx((expected,) * 3)
        assert passing is None
    assert not torch.equal(networks["slow"].head.weight, before)  # the optimizer was at work


def test_a_teacher_takes_a_forward_of_each_step_and_the_memory_of_its_weights():
    model = small_vit()
    seen = []
    teacher = small_vit(embed_dim=96)
    before = plan_training(model, (0,), images=8, batch_size=2, seconds=0.01, dilution_epochs=1, recovery_epochs=1)
    teacher.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.requires_grad)))
    plan = plan_training(
        model, (0,), images=8, batch_size=2, seconds=0.01, dilution_epochs=1, recovery_epochs=1, teacher=teacher.train()
    )
    assert teacher.training
    assert len(seen) >= plan.networks["final"].step.rounds + plan.networks["diluting"].step.rounds
    assert set(seen) == {(False, False)}
    weights = 4 * sum(p.numel() for p in teacher.parameters())
    assert (before.teacher_bytes, plan.teacher_bytes) == (None, weights)
    for name in ("full", "diluting", "final"):
        assert plan.networks[name].step_bytes - before.networks[name].step_bytes == weights
    assert any("a forward of the teacher" in line for line in plan_notes(plan))
    assert not any("teacher" in line for line in plan_notes(before))
    with pytest.raises(ValueError, match="differ in classes: 7 and 10"):
        plan_training(model, (0,), images=8, teacher=small_vit(num_classes=7))


class FakeLoader:
    """Batches of four, half a second each; what its workers had ready comes at once."""

    def __init__(self, batches: int, workers: int, clock: Clock) -> None:
        self.batches, self.workers, self.clock = batches, workers, clock

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple]:
        self.clock.now += 3.0  # to start
        for number in range(self.batches):
            if number >= 2 * self.workers:
                self.clock.now += 0.5
            yield torch.zeros(4, 1), torch.zeros(4)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_start_out(workers, clock):
    found = measure_loading(FakeLoader(40, workers, clock), seconds=5.0)
    assert found.images_per_second == pytest.approx(8.0)
    assert found.workers == workers
    assert found.images == 4 * 11  # the eleventh batch passes the five seconds
    whole = measure_loading(FakeLoader(30, workers, clock), seconds=1e9)
    assert whole.images_per_second == pytest.approx(8.0)


def test_loading_of_few_batches_counts_everything(clock):
    found = measure_loading(FakeLoader(2, 0, clock), seconds=5.0)
    assert found.images == 8
    assert found.images_per_second == pytest.approx(8 / 4.0)
    with pytest.raises(ValueError, match="gave no images"):
        measure_loading([], 1.0)


def test_loading_counts_the_images_of_patches_and_not_their_keys(clock):
    patches = {"patches": torch.zeros(5, 8, 12), "patch_coord": torch.zeros(5, 8, 2), "patch_valid": torch.ones(5, 8)}

    def loader() -> Iterator:
        for batch in (patches, (patches, torch.zeros(5)), patches):
            clock.now += 0.5
            yield batch

    found = measure_loading(loader(), 1e9)  # the first batch is not timed
    assert (found.images, found.images_per_second) == (10, pytest.approx(10.0))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), (300, 100)),
        ((20,), (0, 20)),
        ((1,), (0, 1)),
        ((20, 5), (5, 15)),
        ((20, None, 5), (15, 5)),
        ((20, 15, 5), (15, 5)),
        ((None, 30), (30, 100)),
        ((None, 0, 7), (0, 7)),
    ],
)
def test_split_epochs(given, expected):
    assert split_epochs(*given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((0,), "epochs must be an integer of at least 1; got 0"),
        ((None, 0, 0), "at least one epoch"),
        ((None, -1), "dilution_epochs must be an integer of at least 0; got -1"),
        ((10, 11), "epochs=10, dilution_epochs=11 do not add up"),
        ((10, None, 11), "epochs=10, recovery_epochs=11 do not add up"),
        ((10, 5, 4), "epochs=10, dilution_epochs=5, recovery_epochs=4 do not add up"),
        ((True,), "epochs must be an integer of at least 1; got True"),
    ],
)
def test_epochs_that_make_no_sense(given, words):
    with pytest.raises(ValueError, match=words):
        split_epochs(*given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": (0, 4)}, "layers holds 4, but block indices are integers from 0 to 3"),
        ({"layers": (-1,)}, "layers holds -1"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": (0, 1, 2, 3)}, "cuts the class token off"),
        ({"images": 0}, "images must be an integer of at least 1; got 0"),
        ({"images": 1.5}, "images must be an integer of at least 1; got 1.5"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"devices": 0}, "devices must be an integer of at least 1; got 0"),
        ({"dilution_epochs": 0, "recovery_epochs": 0}, "at least one epoch"),
        ({"seconds": 0}, "seconds=0: expected a positive number"),
        ({"seconds": math.nan}, "seconds=nan"),
    ],
)
def test_bad_arguments(options, words, monkeypatch):
    monkeypatch.setattr(planning, "cost", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match=words):
        plan_training(small_vit(), **{"layers": (0,), "images": 10, **options})


def test_models_that_cannot_be_planned(monkeypatch):
    monkeypatch.setattr(planning, "cost", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match="lost the attention"):
        plan_training(convert_vit(small_vit(), (1,)), (0,), images=10)
    with pytest.raises(ValueError, match="frozen"):
        plan_training(small_vit().requires_grad_(False), (0,), images=10)
    recomputing = small_vit()
    recomputing.set_grad_checkpointing()
    with pytest.raises(ValueError, match="set_grad_checkpointing"):
        plan_training(recomputing, (0,), images=10)
    with pytest.raises(UnsupportedModelError):
        plan_training(nn.Linear(2, 2), (0,), images=10)


def test_a_batch_beyond_the_memory_is_refused_before_it_is_tried(monkeypatch):
    """With the largest batch that the message names, the count stays within the memory; with one more it does not."""
    counted = plan_training(small_vit(), (0,), images=10, batch_size=1, seconds=0.01).networks["diluting"]
    room = counted.step_bytes + 9 * counted.saved_bytes_per_image + 5
    monkeypatch.setattr(planning, "free_memory", lambda: room)
    monkeypatch.setattr(planning, "time_steps", lambda *_, **__: pytest.fail("it was tried"))
    with pytest.raises(ValueError, match=r"batch_size=11: .* does not fit into the memory of cpu .* at most about 10,"):
        plan_training(small_vit(), (0,), images=10, batch_size=11)
    monkeypatch.setattr(planning, "free_memory", lambda: counted.step_bytes - 1)
    with pytest.raises(ValueError, match="Not even one image does"):
        plan_training(small_vit(), (0,), images=10, batch_size=11)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_is_explained(error, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(planning, "time_steps", fail)
    monkeypatch.setattr(planning, "free_memory", lambda: 2**40)
    with pytest.raises(ValueError, match=r"batch_size=12: .* at most about 6, and accumulate"):
        plan_training(small_vit(), (0,), images=10, batch_size=12)
    monkeypatch.setattr(planning, "saved_bytes", fail)
    with pytest.raises(ValueError, match="not even 4 images"):
        plan_training(small_vit(), (0,), images=10, batch_size=12)


def test_other_errors_pass(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(planning, "time_steps", fail)
    with pytest.raises(RuntimeError, match="something else"):
        plan_training(small_vit(), (0,), images=10)


def test_hours_in_words():
    assert formatting.format_hours(12 / 3600) == "12.0 s"
    assert formatting.format_hours(0.5) == "30.0 min"
    assert formatting.format_hours(20.25) == "20.2 h"
    assert formatting.format_hours(7320) == "7,320 h (305 days)"
