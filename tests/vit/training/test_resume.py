"""A fine-tuning that is killed, wherever, ends as one that was not: weights, averages, log and best, bit for bit.

Runs to be killed are forked, which starts them at once, and killed for good.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import REPOSITORY, SUPPORT
from resume_support import (
    OWN,
    check_same_end,
    die,
    forked,
    killed,
    killed_at,
    killed_before_a_manifest,
    last,
    rows,
    run,
    same,
)
from tensor_stream import TensorStream
from training_support import plain, recipe, same_weights, tiny_vit, train_set, validation

from lambda_kernels import AttentionFreeBlock, CheckpointError, UnsupportedModelError, from_pretrained
from lambda_vit.data import batches
from lambda_vit.data.loader import make_loader
from lambda_vit.measure.accuracy import evaluate
from lambda_vit.runtime.signals import spare_worker
from lambda_vit.training.images.stream import DatasetStream, LoaderStream
from lambda_vit.training.loop import train_state, trainer
from lambda_vit.training.recipe import load_recipe
from lambda_vit.training.run import FinetuningRun, inherit_micro_batch
from lambda_vit.training.storage import best_model, checkpoint_file
from lambda_vit.training.storage.checkpoints import Checkpoints
from lambda_vit.training.storage.log import read_log

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

running = sys.modules["lambda_vit.training.run"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


def test_what_a_run_leaves(whole):
    record = json.loads((whole / "run.json").read_text())
    names = {path.name for path in whole.iterdir()}
    assert names == {"config.yaml", "log.jsonl", "checkpoints", "best", "model", "run.json"}
    assert load_recipe(whole / "config.yaml") == OWN
    assert (record["status"], record["position"], record["steps"], record["layers"]) == ("finished", 9, 9, [1])
    assert record["boundary"]["step"] == 6
    assert record["best"]["epoch"] >= 2  # by then the attention was gone
    parameters = record["model"]["parameters"]
    assert parameters["after"] == sum(p.numel() for p in from_pretrained(whole / "model").parameters())
    assert parameters["after"] < parameters["before"] == sum(p.numel() for p in tiny_vit().parameters())
    assert [start["step"] for start in record["starts"]] == [0]
    kinds = [row["kind"] for row in rows(whole)]
    assert [kinds.count(kind) for kind in ("step", "epoch", "boundary")] == [9, 3, 1]


def test_a_fresh_process_finds_the_claimed_accuracy(whole):
    record = json.loads((whole / "run.json").read_text())
    script = (
        "import sys\nfrom training_support import validation\nfrom lambda_kernels import from_pretrained\n"
        "from lambda_vit.measure.accuracy import evaluate\n"
        "print(repr(evaluate(from_pretrained(sys.argv[1]), validation()).top1))"
    )
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "python", *SUPPORT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", script, whole / "model"], env=environment, text=True, capture_output=True, check=True
    )
    claimed = record["result"]
    assert float(found.stdout) == claimed["top1"] == record["best"]["top1"]
    assert claimed["same"] is True
    eligible = [row for row in record["history"] if row["attention"] == "removed"]
    assert claimed["top1"] == max(max(row["top1"], row["top1_ema"]) for row in eligible)
    assert type(from_pretrained(whole / "model").blocks[1]) is AttentionFreeBlock


STEPS = random.Random(6).sample(range(1, 10), 5)
KILLS = {
    **{f"in step {step}": killed_at(train_state.TrainState, "_clip", step) for step in STEPS},
    "before its first checkpoint": killed_at(train_state.TrainState, "step", 2),
    "writing a checkpoint": killed_at(checkpoint_file._Recorder, "write", 500),
    "having written a checkpoint": killed_at(torch, "save", 3, after=True),
    "between a checkpoint's two files": killed_before_a_manifest,
    "before the boundary": killed_at(train_state.TrainState, "remove", 1),
    "in the boundary": killed_at(train_state, "forget_removed", 1),
    "after the boundary": killed_at(train_state.TrainState, "remove", 1, after=True),
    "after the boundary's checkpoint": killed_at(trainer.Trainer, "_finish_epoch", 2),
    "having found the best": killed_at(best_model.Best, "offer", 3, after=True),
    "putting the best in its place": killed_at(Path, "rename", 1),
    "loading the model": killed_at(running, "from_pretrained", 1),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed(where, whole, tmp_path):
    out = tmp_path / "run"
    killed(out, KILLS[where])
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    if where == "between a checkpoint's two files":
        states, manifests = ({p.stem for p in (out / "checkpoints").glob(f"step*.{kind}")} for kind in ("pt", "json"))
        assert states - manifests
    run(out)
    check_same_end(out, whole)
    record = json.loads((out / "run.json").read_text())
    assert len(record["starts"]) == 2


def test_killed_again_and_again(whole, tmp_path):
    for _ in range(3):
        killed(tmp_path, killed_at(train_state.TrainState, "step", 4))
    run(tmp_path)
    check_same_end(tmp_path, whole)
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")[0] if row["kind"] == "resume"][-1] == 6
    run(tmp_path)  # once more, though it is finished
    check_same_end(tmp_path, whole)


def send(number: int, owner: object, name: str, call: int) -> Callable[[], None]:
    """Sends this process a signal before a call of `owner.name`."""

    def prepare() -> None:
        whole, count = getattr(owner, name), [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == call:
                os.kill(os.getpid(), number)
            return whole(*args, **kwargs)

        setattr(owner, name, counted)

    return prepare


@pytest.mark.parametrize(
    ("number", "owner", "name", "call", "step"),
    [
        (signal.SIGTERM, train_state.TrainState, "step", 5, 5),
        (signal.SIGTERM, train_state.TrainState, "step", 3, 3),  # what goes on begins with validation, at the λ of then
        (signal.SIGUSR1, train_state.TrainState, "step", 9, 9),
        (signal.SIGINT, trainer, "score", 3, 6),  # validation is given up
    ],
)
def test_signals(number, owner, name, call, step, whole, tmp_path):
    def work() -> FinetuningRun:
        send(number, owner, name, call)()
        return run(tmp_path, log_every=1)

    assert forked(work) == 128 + number
    assert Checkpoints(tmp_path / "checkpoints").newest().step == step
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["position"], record["result"]) == ("stopped", step, None)
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "step"] == list(range(1, step + 1))
    assert len([row for row in rows(tmp_path) if row["kind"] == "epoch"]) == (step - 1) // 3
    run(tmp_path)
    check_same_end(tmp_path, whole)


def test_a_truncated_checkpoint_is_passed_over(whole, tmp_path):
    killed(tmp_path, killed_at(train_state.TrainState, "step", 8))
    newest = Checkpoints(tmp_path / "checkpoints").newest()
    os.truncate(newest.path, newest.path.stat().st_size // 2)
    run(tmp_path)
    check_same_end(tmp_path, whole)
    texts = [row["text"] for row in read_log(tmp_path / "log.jsonl")[0] if row["kind"] == "notice"]
    assert len(texts) == 1
    assert newest.path.name in texts[0]


def test_a_damaged_checkpoint_is_passed_over_where_it_knew_of_a_better_model(tmp_path):
    """The one before calls another model the best, which has to be there still."""
    for seed in range(10):  # which epochs are better than all before is chance: one that is, right after another
        own, whole = recipe(epochs=5, seed=seed), tmp_path / f"whole_{seed}"
        run(whole, own)
        best = [row["best"] for row in json.loads((whole / "run.json").read_text())["history"]]
        second = next((epoch for epoch in range(1, 4) if best[epoch - 1] and best[epoch]), None)
        if second is not None:
            break
    assert second is not None
    out, step = tmp_path / "run", 3 * (second + 1)
    killed(out, killed_at(train_state.TrainState, "step", step + 1), own=own)
    newest = Checkpoints(out / "checkpoints").newest()
    assert newest.step == step
    os.truncate(newest.path, 100)
    run(out, own)
    check_same_end(out, whole)


def test_a_full_disk_keeps_the_last_checkpoint(whole, tmp_path, capfd):
    def work() -> FinetuningRun:
        step = train_state.TrainState.step

        def filling(self: object, position: int, *args: Any, **kwargs: Any) -> Any:
            if position == 6:  # a checkpoint does not fit any more
                resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
            return step(self, position, *args, **kwargs)

        train_state.TrainState.step = filling
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return run(tmp_path)

    assert forked(work) == 99
    assert "OSError" in capfd.readouterr().err
    assert Checkpoints(tmp_path / "checkpoints").newest().step == 6
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "failed"
    assert "step 8" in record["error"]
    run(tmp_path)
    check_same_end(tmp_path, whole)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_another_run_is_refused_by_name(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = listing(out)
    other, moved = tiny_vit(), replace(OWN, lr=3e-3)
    with torch.no_grad():
        other.head.bias[0] += 1
    fewer = validation(60)
    for options, words in (
        ({"own": moved}, r"recipe\.lr was 0\.002, is 0\.003"),
        ({"own": replace(OWN, seed=4)}, r"recipe\.seed was 0, is 4; data\.seed was 0, is 4"),
        ({"own": replace(OWN, micro_batch=8)}, r"data\.micro-batch was 16, is 8"),
        ({"model": other}, r"started differently: model was '\w{64}', is '\w{64}'\."),
        ({"layers": (0,)}, r"layers was \[1\], is \[0\]"),
        ({"stream": TensorStream(train_set(97), recipe())}, r"data\.data was .*data\.images was 96, is 97"),
        ({"val_loader": fewer}, r"validation\.data was .*validation\.images was 90, is 60"),
    ):
        with pytest.raises(trainer.ResumeMismatchError, match=words):
            run(out, **options)
    with pytest.raises(ValueError, match=r"3 processes cannot share the 2 micro-batches of a step evenly: start 1, 2"):
        TensorStream(train_set(), recipe(), shard=(0, 3))
    assert listing(out) == before
    run(out, replace(OWN, checkpoint_every=1))  # how often is nobody's business
    assert run(out, replace(OWN, seed=4), restart=True).record["seed"] == 4
    assert not same(last(out), last(whole))


def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = listing(out)
    code = "import sys, time; from lambda_kernels.files import exclusive_lock\n"
    code += "with exclusive_lock(sys.argv[1], ''): print(flush=True); time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", code, out / "checkpoints" / "lock"], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(
            BlockingIOError, match=r"another process holds .*lock: wait until it ends, or use another folder"
        ):
            run(out)
        assert listing(out) == before
    finally:
        other.kill()
        other.wait()
    run(out)


def test_micro_batches_of_a_run_that_goes_on(whole, tmp_path):
    loose = recipe(micro_batch=None)
    assert inherit_micro_batch(loose, tmp_path) == loose
    assert inherit_micro_batch(loose, whole).micro_batch == 16
    shutil.copy(whole / "config.yaml", tmp_path)  # of a run that ended before its first checkpoint, out of memory say
    assert inherit_micro_batch(loose, tmp_path) == loose
    assert inherit_micro_batch(recipe(micro_batch=8), whole).micro_batch == 8
    assert inherit_micro_batch(recipe(micro_batch=None, batch_size=48), whole).micro_batch is None


def test_the_best_of_a_checkpoint_is_found_wherever_the_run_was_killed(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    weights = (out / "best" / "model.safetensors").read_bytes()
    for place in (".best.next", ".best.old"):
        (out / "best").rename(out / place)
        if place == ".best.old":
            shutil.copytree(out / place, out / ".best.next")
            (out / ".best.next" / "score.json").unlink()  # killed while it was written
        run(out)
        assert (out / "best" / "model.safetensors").read_bytes() == weights
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
    shutil.rmtree(out / "best")
    with pytest.raises(CheckpointError, match="does not hold the best model of the run that is to go on"):
        run(out)


def test_a_loader_of_ones_own_goes_on_and_says_what_that_means(tmp_path):
    batches = list(make_loader(train_set(), 32))
    own = plain(checkpoint_every=2)
    stream = {"own": own, "stream": LoaderStream(batches)}
    killed(tmp_path, killed_at(train_state.TrainState, "step", 6), **stream)
    found = run(tmp_path, **stream)
    (text,) = (row["text"] for row in read_log(tmp_path / "log.jsonl")[0] if row["kind"] == "notice")
    assert "not exactly where it stopped: the batches come from a loader of your own" in text
    whole = run(tmp_path / "whole", **stream)
    assert same_weights(found.model, whole.model)  # a list gives the same batches again


def test_what_cannot_be_saved_is_refused_before_training(tmp_path, monkeypatch):
    model = tiny_vit()
    model.pretrained_cfg = {}
    monkeypatch.setattr(train_state.TrainState, "step", die)
    with pytest.raises(CheckpointError, match="does not name its timm architecture"):
        run(tmp_path / "run", model=model)
    with pytest.raises(UnsupportedModelError):
        run(tmp_path / "run", model=torch.nn.Linear(2, 2))
    assert not (tmp_path / "run" / "checkpoints").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run")


def test_what_is_claimed_is_measured_on_what_was_saved(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    best = json.loads((whole / "run.json").read_text())["best"]
    labels = torch.cat([targets for _, targets in validation()])
    right = [100 * int((labels == label).sum()) / len(labels) for label in range(10)]
    # Which label it sees everywhere: one by which it is right as often as the best model is would not show.
    label = next(label for label in range(10) if abs(right[label] - best["top1"]) > 0.5)

    def damaged(folder: Path, **options: Any) -> torch.nn.Module:
        model = from_pretrained(folder, **options)
        with torch.no_grad():
            model.head.bias[label] += 100
        return model

    monkeypatch.setattr(running, "from_pretrained", damaged)
    record = run(tmp_path / "run").record
    assert record["best"] == best
    assert record["result"]["same"] is False
    assert record["result"]["top1"] == evaluate(damaged(whole / "model"), validation()).top1


def test_the_model_that_was_given_stays_as_it_is(tmp_path):
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = run(
        tmp_path, recipe(epochs=2, warmup_epochs=0, dilution="none", dilution_epochs=None, ema=None), model=model
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.record["residual_scale"] == found.model.blocks[1].residual_scale == 1.0
    assert found.record["result"]["top1"] == evaluate(found.model, validation()).top1


def test_a_signal_to_all_of_a_run_spares_its_workers(tmp_path):
    """Batch systems send it to every process; with its workers dead, validation would fail before the checkpoint."""
    own = OWN
    loaders = {
        "stream": DatasetStream(train_set(), own, workers=1),
        "val_loader": make_loader(validation().dataset, 30, workers=1, worker_init=spare_worker),
    }

    def work() -> FinetuningRun:
        check, count, step = batches.check_range, [0], train_state.TrainState.step

        def stepping(*args: Any, **options: Any) -> object:
            count[0] = 1  # what is measured before the training does not count
            return step(*args, **options)

        def counted(*args: Any) -> None:
            count[0] += bool(count[0])
            if count[0] == 3:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            check(*args)

        batches.check_range, train_state.TrainState.step = counted, stepping
        return run(tmp_path, own, **loaders)

    assert forked(work) == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path / "checkpoints").newest().step == 3
