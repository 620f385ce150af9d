"""Training over real processes: what one process computes, whoever computes which part; and none waits for the dead.

Each process runs this file as a program; what it finds wrong makes it fail.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_support import launch
from resume_support import OWN, check_same_end, run
from tensor_stream import TensorStream
from training_support import Notes, largest_difference, recipe, same_weights, tiny_vit, train_set, trainer, validation

from lambda_vit.runtime.processes import Processes, process_group
from lambda_vit.training.loop import train_state
from lambda_vit.training.storage.checkpoints import Checkpoints
from lambda_vit.training.storage.log import read_log

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo backend"
)

# The gradients of the micro-batches are added up in another order.
ROUNDING = 1e-12


def several() -> tuple[object, Notes]:
    """In float64, two micro-batches in each of two processes; all that draws, averages and clips is on."""
    notes = Notes()
    found = trainer(recipe(micro_batch=8, clip_grad=0.5), tiny_vit().double(), log=notes)
    found.train()
    return found, notes


def single() -> object:
    """In float32, one micro-batch in each of two processes; all terms of the loss."""
    terms = {"distillation": "soft", "feature_loss": 0.3, "hidden_loss": 0.2}
    found = trainer(recipe(clip_grad=0.5, amp="none", **terms))
    found.train()
    return found


def repaired() -> object:
    """Likewise: single blocks first, then the whole network, with nothing diluted."""
    found = trainer(recipe(removal="drop", dilution_epochs=None, local_epochs=1.5, distillation="soft"), layers=(0, 1))
    found.train()
    return found


def progressive() -> object:
    """Likewise: one layer after another."""
    found = trainer(recipe(removal="progressive"), layers=(2, 0))
    found.train()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes leave that train together, are refused, asked to stop, and the last of which then dies."""
    folder = tmp_path_factory.mktemp("two")
    (zero, one) = launch([[__file__, folder, rank] for rank in range(2)])
    assert one[0] == -signal.SIGKILL, one[2]
    assert zero[0] == 1, zero[2]
    assert "ProcessLostError: rank 0 of 2: another process of this run has stopped" in zero[2].splitlines()[-1]
    assert zero[1].split() == one[1].split() == ["trained", "refused", "stopped", "dying"]
    return folder


def test_two_processes_train_what_one_trains(folder):
    found, notes = several()
    state = torch.load(folder / "several.pt")
    there = copy.deepcopy(found.model), copy.deepcopy(found.train_state.ema.module)
    for network, weights in zip(there, state["weights"], strict=True):
        network.load_state_dict(weights)
    assert 0 < largest_difference(there[0], found.model) < ROUNDING
    assert largest_difference(there[1], found.train_state.ema.module) < ROUNDING
    assert state["history"] == [row | {"loss": pytest.approx(row["loss"], rel=1e-6)} for row in found.history]
    for row, wanted in zip(state["rows"], notes.kept, strict=True):
        for name in ("loss", "grad_norm"):
            assert row.get(name, 0) == pytest.approx(wanted.get(name, 0), rel=1e-6)
        same = ("kind", "step", "lr", "lambda")
        assert [row.get(name) for name in same] == [wanted.get(name) for name in same]


@pytest.mark.parametrize("train", [single, repaired, progressive], ids=lambda train: train.__name__)
def test_with_as_many_micro_batches_as_processes_not_a_bit_differs(train, folder):
    found = train()
    other = copy.deepcopy(found.model)
    other.load_state_dict(torch.load(folder / f"{train.__name__}.pt"))
    assert same_weights(other, found.model)


def test_one_process_goes_on_where_two_were_stopped(folder, tmp_path):
    assert Checkpoints(folder / "run" / "checkpoints").newest().step == 5
    run(folder / "run")
    run(tmp_path)
    check_same_end(folder / "run", tmp_path)
    (resume,) = (row for row in read_log(folder / "run" / "log.jsonl")[0] if row["kind"] == "resume")
    assert (resume["step"], resume["processes"]) == (5, 1)


@pytest.mark.parametrize(
    ("gpus", "here", "expected"), [(0, "1", "gloo"), (2, "2", "cpu:gloo,cuda:nccl"), (2, "4", "gloo")]
)
def test_gpus_talk_directly_where_each_process_has_its_own(gpus, here, expected, monkeypatch):
    opened, chosen = [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda backend: opened.append(backend))
    for training in (True, False):
        with process_group(training=training):
            pass
    assert opened == [expected, "gloo"]
    assert chosen == ([1] if "nccl" in expected else [])


def stopped(folder: Path, rank: int) -> int:
    """Rank 1 alone is asked to stop while the fifth step is made; both do, after the same step."""
    whole = train_state.TrainState.step

    def asked(self: object, position: int, *args: object, **kwargs: object) -> object:
        if rank == 1 and position == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, position, *args, **kwargs)

    train_state.TrainState.step = asked
    found = run(folder / "run", stream=stream(OWN), val_loader=validation(shard=(rank, 2)))
    train_state.TrainState.step = whole
    return found.exit_code


def stream(own: object) -> TensorStream:
    processes = dist.get_rank(), dist.get_world_size()
    return TensorStream(train_set(), own, shard=processes)


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    found, notes = several()
    if rank == 0:
        weights = [found.model.state_dict(), found.train_state.ema.module.state_dict()]
        torch.save({"weights": weights, "history": found.history, "rows": notes.kept}, folder / "several.pt")
    for train in (single, repaired, progressive):
        found = train()
        if rank == 0:
            torch.save(found.model.state_dict(), folder / f"{train.__name__}.pt")
        everyone = Processes().gather([value.sum().item() for value in found.model.state_dict().values()])
        assert everyone[0] == everyone[1]
    print("trained", flush=True)
    for options, words in (
        ({"own": recipe(lr=1e-3 * (1 + rank))}, "recipe.lr: 0.001 and 0.002"),
        ({"layers": (rank,)}, r"layers: \[0\] and \[1\]"),
        ({"model": tiny_vit(depth=3 + rank)}, "ranks 0 and 1 were started differently"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer(**options)
    nan = trainer(recipe())
    if rank == 1:
        nan.stream.dataset.tensors[0].fill_(math.nan)
    with pytest.raises(ValueError, match="loss became nan in epoch 1, step 1"):
        nan.train()
    print("refused", flush=True)
    assert stopped(folder, rank) == 128 + signal.SIGTERM
    print("stopped", flush=True)
    print("dying", flush=True)
    dying = trainer(recipe(epochs=50, warmup_epochs=1))
    if rank == 1:
        whole = dying.train_state.step
        dying.train_state.step = lambda position, *args, **kwargs: (
            os.kill(os.getpid(), signal.SIGKILL) if position == 7 else whole(position, *args, **kwargs)
        )
    dying.train()


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
