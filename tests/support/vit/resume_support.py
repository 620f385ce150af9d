"""Fine-tunings that die where a test wants it, and what it takes for two of them to have ended alike."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensor_stream import TensorStream
from training_support import recipe, tiny_vit, train_set, validation

from lambda_vit.training.recipe import Recipe
from lambda_vit.training.run import FinetuningRun, run_finetuning
from lambda_vit.training.storage.checkpoints import Checkpoints
from lambda_vit.training.storage.log import read_log

# What a clock or the machine has a part in.
OTHERWISE = ("time", "seconds", "images_per_second", "memory_bytes")

# Nine steps; λ reaches 0 after six.
OWN = recipe(epochs=3, checkpoint_every=2)


def run(out: Path, own: Recipe = OWN, **options: Any) -> FinetuningRun:
    given = {"model": tiny_vit(), "stream": TensorStream(train_set(), own), "val_loader": validation(), "layers": (1,)}
    given |= {"log_every": 1, **options}
    model, *data = (given.pop(name) for name in ("model", "stream", "val_loader"))
    return run_finetuning(model, own, lambda *_: tuple(data), out=out, **given)


def forked(work: Callable[[], object]) -> int:
    """What became of `work` in a process of its own: its exit code, or minus the number of the signal it died of."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            found = work()
            code = found.exit_code if isinstance(found, FinetuningRun) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(owner: object, name: str, call: int, *, after: bool = False) -> Callable[[], None]:
    """Makes the call of that number, from 1, of `owner.name` the last thing that happens."""

    def prepare() -> None:
        whole, count = getattr(owner, name), [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == call and not after:
                die()
            result = whole(*args, **kwargs)
            if count[0] == call:
                die()
            return result

        setattr(owner, name, counted)

    return prepare


def killed_before_a_manifest() -> None:
    """The data of the second checkpoint is in its place, and what tells that it is whole is not."""
    whole, count = os.replace, [0]

    def counted(source: Any, target: Any) -> None:
        count[0] += Path(target).parent.name == "checkpoints" and Path(target).suffix == ".json"
        if count[0] == 2:
            die()
        whole(source, target)

    os.replace = counted


def killed(out: Path, prepare: Callable[[], None], **options: Any) -> None:
    def work() -> FinetuningRun:
        prepare()
        return run(out, **options)

    assert forked(work) == -signal.SIGKILL


def rows(out: Path) -> list[dict[str, Any]]:
    found, damaged = read_log(out / "log.jsonl")
    assert damaged == 0
    return [
        {k: v for k, v in row.items() if k not in OTHERWISE} for row in found if row["kind"] not in ("resume", "notice")
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def last(out: Path) -> dict[str, Any]:
    """The state of the newest checkpoint; how long the log was then is not part of what was trained."""
    return {key: value for key, value in Checkpoints(out / "checkpoints").newest().state.items() if key != "rows"}


def check_same_end(out: Path, whole: Path) -> None:
    assert same(last(out), last(whole))
    assert rows(out) == rows(whole)
    for name in ("best", "model"):
        for file in ("model.safetensors", "config.json"):
            assert (out / name / file).read_bytes() == (whole / name / file).read_bytes()
    one, other = (json.loads((folder / "run.json").read_text()) for folder in (out, whole))
    for key in ("status", "best", "result", "history", "boundary", "position", "model", "recipe"):
        assert one[key] == other[key]
    left = {path.name for path in out.iterdir()}
    assert left == {path.name for path in whole.iterdir()}
