"""Checkpoints of a training run: what is read is what was written, or the last one before it that is whole."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from runstate_support import assert_same, filled, listing, names, sample
from small_models import small_vit
from torch import nn

from lambda_vit.training.storage.checkpoint_file import prepare
from lambda_vit.training.storage.checkpoints import Checkpoints

NEWEST = "step-000000030"


def test_what_is_read_is_what_was_written(tmp_path):
    state = sample(7)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.newest() is None
    assert checkpoints.steps() == ()
    path = checkpoints.save(7, state)
    found = checkpoints.newest()
    assert (found.step, found.notices, found.path) == (7, (), path)
    assert path == tmp_path / "run" / "checkpoints" / "step-000000007.pt"
    assert sorted(listing(path.parent)) == names(7)
    assert_same(found.state, state)
    read = found.state["model"]
    shared = {read[name].untyped_storage().data_ptr() for name in ("weight", "view", "transposed")}
    assert len(shared) == 1, "what shared memory does not any more"
    assert read["bf16"].untyped_storage().data_ptr() not in shared
    assert state["model"]["weight"].requires_grad, "the state itself was changed"


def test_the_manifest_describes_the_file(tmp_path):
    path = filled(tmp_path, 30).folder / f"{NEWEST}.pt"
    manifest = json.loads((tmp_path / f"{NEWEST}.json").read_text())
    assert manifest.pop("created").endswith("+00:00")
    assert type(manifest.pop("order")) is int
    assert manifest.pop("versions")["torch"] == torch.__version__
    digest = sha256(path.read_bytes()).hexdigest()
    expected = {"format": 1, "step": 30, "file": path.name, "bytes": path.stat().st_size, "sha256": digest}
    assert manifest == expected


def test_what_a_run_of_timm_holds(tmp_path):
    """Model, EMA, optimizer, schedule and scaler go through, and training goes on from them as it would have."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    def parts() -> dict:
        model = small_vit()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.7)
        schedule = CosineLRScheduler(optimizer, t_initial=5, warmup_t=1, cycle_limit=1)
        ema, scaler = ModelEmaV3(model), torch.amp.GradScaler("cpu")
        return {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema, "scaler": scaler}

    def train(run: dict, step: int) -> None:
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        run["optimizer"].zero_grad()
        run["scaler"].scale(run["model"](x).square().mean()).backward()
        run["scaler"].step(run["optimizer"])
        run["scaler"].update()
        run["schedule"].step(step + 1)
        run["ema"].update(run["model"])

    run, other = parts(), parts()
    train(run, 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {name: part.state_dict() for name, part in run.items()})
    train(run, 1)
    for name, state in checkpoints.newest().state.items():
        other[name].load_state_dict(state)
    train(other, 1)
    for name in run:
        assert_same(prepare(other[name].state_dict())[0], prepare(run[name].state_dict())[0], name)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.float64(1), r"state\['a'\]\[1\] is a numpy.float64"),
        (np.ones(3), r"state\['a'\]\[1\] is a numpy.ndarray"),
        (Path("x"), r"state\['a'\]\[1\] is a pathlib.\w*Path"),
        (nn.Linear(1, 1), r"state\['a'\]\[1\] is a torch.nn.modules.linear.Linear"),
        ({np.int64(3): 1}, r"state\['a'\]\[1\] has a key of type numpy.int64"),
        ({"b": {1, 2}}, r"state\['a'\]\[1\]\['b'\] is a builtins.set"),
        (torch.eye(2).to_sparse(), r"state\['a'\]\[1\] is a tensor without plain storage \(torch.sparse_coo"),
        (torch.empty(2, device="meta"), r"state\['a'\]\[1\] is a tensor without plain storage .*meta"),
    ],
    ids=str,
)
def test_what_could_not_be_read_back_is_refused(value, words, tmp_path):
    checkpoints = filled(tmp_path, 10)
    before = listing(tmp_path)
    with pytest.raises(TypeError, match=words + ".*A checkpoint holds dicts, lists"):
        checkpoints.save(20, {"a": [1, value]})
    assert listing(tmp_path) == before


@pytest.mark.parametrize("step", [-1, True, 1.0, "3", None])
def test_steps_are_whole_numbers(step, tmp_path):
    with pytest.raises(ValueError, match="step must be an integer of at least 0; got"):
        Checkpoints(tmp_path).save(step, {})


@pytest.mark.parametrize("keep", [0, -1, True, 1.5, None])
def test_at_least_one_is_kept(keep, tmp_path):
    with pytest.raises(ValueError, match="keep must be an integer of at least 1; got"):
        Checkpoints(tmp_path, keep)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(keep, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep)
    steps = [0, 1, 5, 999_999_999, 1_000_000_000, 1_000_000_001, 1_000_000_003]
    for number, step in enumerate(steps, 1):
        checkpoints.save(step, sample(step % 10))
        left = steps[max(0, number - keep) : number]
        assert checkpoints.steps() == tuple(left)
        assert sorted(listing(tmp_path)) == names(*left)
        assert checkpoints.newest().step == step


def test_what_looks_broken_takes_no_place(tmp_path):
    checkpoints = filled(tmp_path, 10, 20, 30, keep=3)
    (tmp_path / f"{NEWEST}.pt").write_bytes(b"half")
    checkpoints.save(40, sample(40))
    assert sorted(listing(tmp_path)) == names(10, 20, 40)


def test_foreign_files_stay(tmp_path):
    foreign = ["notes.txt", "step-12.pt", "step-000000010.pth", "model.pt", ".hidden.tmp", "step-000000001-best.pt"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / "step-000000001").mkdir()
    checkpoints = filled(tmp_path, 10, 20, keep=1)
    checkpoints.clear()
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "step-000000001"}
    assert checkpoints.newest() is None


def test_a_step_saved_again_replaces_itself(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for seed in range(1, 5):
        path = checkpoints.save(30, sample(seed))
        assert_same(checkpoints.newest().state, sample(seed))
        assert sorted(listing(tmp_path)) == sorted([f"{NEWEST}.json", path.name])


def test_a_clock_that_was_put_back(tmp_path, monkeypatch):
    """The order of writing is that of the calls, whatever the clock says."""
    checkpoints = filled(tmp_path, 10, 20, 30)
    monkeypatch.setattr("time.time_ns", lambda: 5)
    assert checkpoints.newest(upto=20).step == 20
    checkpoints.save(25, sample(25))
    assert Checkpoints(tmp_path).newest().step == 25
    assert checkpoints.steps() == (10, 20, 25)
