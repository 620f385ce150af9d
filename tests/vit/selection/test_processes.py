"""Selections over real processes: the picks and scores of one process, whoever saw what; and none waits for the dead.

Each process runs this file as a program; what it finds wrong makes it fail.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_support import launch
from selection_support import CountingLoader, labelled
from small_models import small_vit
from stream_support import make_images

from lambda_kernels import save_pretrained
from lambda_vit import Selection, select_layers

# Which of six batches, the last a short one, each rank sees. With four ranks, the third sees nothing.
SHARES = {1: [[0, 1, 2, 3, 4, 5]], 2: [[0, 1, 2, 3, 5], [4]], 4: [[5], [1, 2], [], [0, 3, 4]]}
RUNS = {
    "nose": {},
    "histogram": {"estimator": "histogram"},
    "kl": {"strategy": "kl", "beam": 2},
    "accuracy": {"strategy": "accuracy", "cache": "disk"},
    "recoverability": {"strategy": "recoverability", "seed": 3},
    "cosine": {"strategy": "cosine"},
    "first": {"strategy": "first"},
}

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo backend"
    ),
    pytest.mark.filterwarnings("ignore::lambda_vit.selection.result.SelectionWarning"),
]


def data() -> list:
    return labelled(43, 8)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes(world, tmp_path):
    found = launch([[__file__, world, tmp_path, rank] for rank in range(world)])
    for rank, (code, output, errors) in enumerate(found):
        if world > 1 and rank == world - 1:
            assert code == -signal.SIGKILL, errors
            continue
        # The last thing that happens is that the last rank is killed; the others may not wait for it.
        assert code == (1 if world > 1 else 0), errors
        if world > 1:
            last = errors.strip().splitlines()[-1]
            assert f"ProcessLostError: rank {rank} of {world}: another process of this run has stopped" in last
        words = ["selected", *["refused", "named"] * (world > 1)]
        assert output.split() == words, errors
    expected = {name: select_layers(small_vit(), data(), 3, **options) for name, options in RUNS.items()}
    for rank in range(world):
        for name, selection in expected.items():
            one = Selection.from_json(tmp_path / f"{name}-{rank}.json")
            assert one.layers == selection.layers
            assert one.samples == selection.samples
            assert (one.entropy_full or 0) == pytest.approx(selection.entropy_full or 0, rel=1e-9)
            assert one.warnings == selection.warnings
            for step, wanted in zip(one.rounds, selection.rounds, strict=True):
                assert step.scores == pytest.approx(wanted.scores, rel=1e-9, abs=1e-9)
    assert not list(tmp_path.glob("lambda-vit-*")), "a cache was left"


@pytest.mark.slow
def test_torchrun_gives_what_one_process_gives(tmp_path):
    make_images(tmp_path / "images")
    model = save_pretrained(small_vit(), tmp_path / "model")
    command = ["-m", "lambda_vit", "select", "--model", model, "--data", tmp_path / "images", "--count", 2]
    command += ["--batch-size", 7, "--strategy", "kl", "--no-latency", "--no-profile", "--device", "cpu"]
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command]
    found = launch([[*elastic, "--out", tmp_path / "two"], [*command, "--out", tmp_path / "one"]])
    for code, output, errors in found:
        assert code == 0, errors
        assert output.count("Picked, in order") == 1
    one, two = (json.loads((tmp_path / name / "selection.json").read_text()) for name in ("one", "two"))
    for step, wanted in zip(two.pop("rounds"), one.pop("rounds"), strict=True):
        assert step.pop("scores") == pytest.approx(wanted.pop("scores"), rel=1e-9, abs=1e-9)
        assert step.pop("entropy") == pytest.approx(wanted.pop("entropy"), rel=1e-9)
        assert step == wanted
    assert two.pop("entropy_full") == pytest.approx(one.pop("entropy_full"), rel=1e-9)
    assert two == one
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert [report["environment"]["processes"] for report in reports] == ["1", "2"]
    assert reports[0]["trajectory"]["images"] == reports[1]["trajectory"]["images"] == 20
    for step, wanted in zip(reports[1]["trajectory"]["steps"], reports[0]["trajectory"]["steps"], strict=True):
        assert (step["top1"], step["agreement"]) == (wanted["top1"], wanted["agreement"])


def test_processes_that_see_other_images_are_refused(tmp_path):
    """Without a val split of its own, one would try the picks on images that they were made on."""
    model = save_pretrained(small_vit(), tmp_path / "model")
    for name in ("0", "1"):
        make_images(tmp_path / name)
    shutil.rmtree(tmp_path / "1" / "val")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [
        "-m",
        "lambda_vit",
        "select",
        "--model",
        model,
        "--count",
        1,
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
    ]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    for code, _, errors in launch([[*command, "--data", tmp_path / rank["RANK"]] for rank in ranks], *ranks):
        assert code == 2, errors
        assert "ranks 0 and 1 were started differently" in errors
        assert "tried on, split: 'val' and 'train'" in errors
    assert not (tmp_path / "out").exists()


def check_refusals(share: CountingLoader, last: bool, folder: Path) -> None:
    """Ranks that were started differently learn so, all of them, before anything is measured."""
    other = small_vit()
    with torch.no_grad():
        other.blocks[1].mlp.fc1.bias[3] += 1e-3
    before = share.passes
    for options, words in (
        ({"count": 2 if last else 1}, r"count: 1 and 2"),
        ({"count": 1, "strategy": "kl" if last else "nose"}, "strategy: 'nose' and 'kl'"),
        ({"count": 1, "strategy": "random", "seed": int(last)}, "seed: 0 and 1"),
        ({"count": 1, "strategy": "first" if last else "nose"}, "strategy: 'nose' and 'first'"),
        ({"count": 1, "model": other if last else small_vit()}, r"weights: '\w{64}' and '\w{64}'"),
    ):
        with pytest.raises(ValueError, match=f"ranks 0 and .* were started differently .*{words}"):
            select_layers(**{"model": small_vit(), "loader": share, **options})
    (folder / "damaged.json").write_text("{")
    words = "cannot read the progress" if share.rank == 0 else "the process of rank 0 failed: ValueError: cannot read"
    with pytest.raises((ValueError, RuntimeError), match=words):
        select_layers(small_vit(), share, 1, progress_file=folder / "damaged.json")
    assert share.passes == before


def check_naming(share: CountingLoader, rank: int, world: int) -> None:
    """NaN in the images of one rank stops all, with its place."""
    if rank == world - 1:
        x, y = share.batches[-1]
        share.batches[-1] = (x.clone(), y)
        share.batches[-1][0][0, 0, 0, 0] = float("nan")
    place = rf"batch {len(SHARES[world][-1]) - 1} of rank {world - 1} of the input holds NaN or infinity \(float32\)"
    words = place if rank == world - 1 else f"the process of rank {world - 1} failed: NonFiniteActivationError: {place}"
    for strategy in ("nose", "cosine"):
        with pytest.raises((ValueError, RuntimeError), match=words):
            select_layers(small_vit(), share, 1, strategy=strategy)
    broken = small_vit()
    if rank == world - 1:
        broken.blocks[2].mlp.register_forward_hook(lambda module, args, output: output / 0)
        share.batches[-1][0].nan_to_num_()
    with pytest.raises(
        (ValueError, RuntimeError), match=f"block 2 gave NaN or infinity in batch 0 of rank {world - 1}"
    ):
        select_layers(broken, share, 1)


class Killed(CountingLoader):
    """Its process dies while it reads."""

    def __iter__(self):
        yield from self.batches
        os.kill(os.getpid(), signal.SIGKILL)


def work(world: int, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    batches = data()
    share = CountingLoader([batches[i] for i in SHARES[world][rank]])
    share.rank = rank
    for name, options in RUNS.items():
        options = {**options, "cache_folder": folder} if "cache" in options else options
        select_layers(small_vit(), share, 3, **options).to_json(folder / f"{name}-{rank}.json")
    print("selected", flush=True)
    if world == 1:
        return
    check_refusals(share, rank == world - 1, folder)
    print("refused", flush=True)
    check_naming(share, rank, world)
    print("named", flush=True)
    select_layers(small_vit(), Killed(share.batches) if rank == world - 1 else share, 2)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
