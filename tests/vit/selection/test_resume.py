"""Selections that were killed go on where they stood, and nothing that is finished is measured again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable

import pytest
import torch
from selection_support import CountingLoader, labelled
from small_models import small_vit
from torch.utils.data import DataLoader, TensorDataset

import lambda_kernels.files
from lambda_vit import select_layers
from lambda_vit.data.loader import make_loader
from lambda_vit.selection import budget, repair, search
from lambda_vit.selection.path_statistics import PathResult
from lambda_vit.selection.search_state import Progress, ProgressMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::lambda_vit.selection.result.SelectionWarning")
RUNS = {
    "nose": {"count": 3},
    "beam": {"count": 3, "strategy": "kl", "beam": 3},
    "recoverability": {"count": 3, "strategy": "recoverability"},
    "gap": {"count": 3, "strategy": "kl", "beam": 2, "min_gap": 2},
    "accuracy": {"count": 3, "strategy": "accuracy", "exclude": (1,)},
    "params": {"params": 0.845},
    "histogram": {"count": 3, "estimator": "histogram"},
}


def network() -> torch.nn.Module:
    """With output channels that never change, of which the notes of a selection speak."""
    model = small_vit(depth=5)
    with torch.no_grad():
        model.head.weight[:2] = 0
    return model


def in_a_child(work: Callable[[], None]) -> int:
    """The exit status of a process that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(3)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(rounds: int) -> Callable[[], None]:
    """Dies once so many rounds are written."""
    save = Progress.save

    def saving(self, found):
        save(self, found)
        if len(found.branches[0].rounds) == rounds:
            die()

    def prepare() -> None:
        Progress.save = saving

    return prepare


def kill_inside_write(rounds: int) -> Callable[[], None]:
    """Dies while the next round is written: its file is there under another name."""
    done = []

    def replace(source, target):
        done.append(target)
        if len(done) > rounds:
            die()
        os.rename(source, target)

    def prepare() -> None:
        lambda_kernels.files.os.replace = replace

    return prepare


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("kill", [kill_after, kill_inside_write])
@pytest.mark.parametrize("name", RUNS)
def test_killed_and_started_again(name, kill, rounds, tmp_path):
    options, path = RUNS[name], tmp_path / "progress.json"
    expected = select_layers(network(), labelled(), **options)
    assert len(expected.layers) == 3
    data = CountingLoader(labelled())

    def work() -> None:
        kill(rounds)()
        select_layers(network(), data, **options, progress_file=path)

    assert in_a_child(work) == signal.SIGKILL
    assert len(json.loads(path.read_text())["found"]["branches"][0]["rounds"]) == rounds
    assert len(list(tmp_path.iterdir())) == (2 if kill is kill_inside_write else 1)
    assert select_layers(network(), data, **options, cache="none", progress_file=path) == expected
    passes = 3 - rounds + (name == "recoverability")  # which repairs the MLPs again, in a pass of its own
    assert data.passes == passes
    assert [place.name for place in tmp_path.iterdir()] == ["progress.json"]
    # finished: returned as it is
    assert select_layers(network(), data, **options, cache="none", progress_file=path) == expected
    assert data.passes == passes


def test_what_earlier_rounds_saw_is_not_forgotten(tmp_path, monkeypatch):
    """The notes speak of the most constant channels of all rounds, also of those before the interruption."""
    path = tmp_path / "p.json"

    def stop(self, layers):
        if len(layers) > 1:
            raise OSError("the plug was pulled")
        return False

    with monkeypatch.context() as patch:
        patch.setattr(budget.Stop, "met", stop)
        with pytest.raises(OSError, match="plug"):
            select_layers(network(), labelled(), 2, progress_file=path)
    record = json.loads(path.read_text())
    assert record["found"]["constant_channels"] == 2
    record["found"]["constant_channels"] = 7
    path.write_text(json.dumps(record))
    selection = select_layers(network(), labelled(), 2, progress_file=path)
    assert any("up to 7 of 10 output channels never change" in note for note in selection.warnings)


def test_a_finished_ranking_is_not_measured_again(tmp_path, monkeypatch):
    """Nor is the throughput that decided how long it is, which would come out differently."""
    speeds = iter([1.1, 1.3, 1.05])
    monkeypatch.setattr(budget.Stop, "speedup", lambda self, layers: next(speeds))
    data = CountingLoader(labelled())
    options = {"throughput": 1.2, "strategy": "one-shot", "progress_file": tmp_path / "p.json"}
    first = select_layers(network(), data, **options)
    assert len(first.layers) == 2
    assert select_layers(network(), data, **options) == first
    assert (data.passes, next(speeds)) == (1, 1.05)


@pytest.mark.parametrize("strategy", ["nose", "one-shot"])
def test_what_was_not_reached_is_said_again(strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(budget.Stop, "speedup", lambda self, layers: 1 + len(layers) / 100)
    options = {"throughput": 2.0, "strategy": strategy, "progress_file": tmp_path / "p.json"}
    first = select_layers(network(), labelled(), **options)
    assert "throughput=2 was not reached: without the attention of 4 blocks 1.04 × was measured" in first.warnings
    assert select_layers(network(), labelled(), **options) == first


class Named(TensorDataset):
    """Knows its images by their paths, as a folder does, and not what their labels mean."""

    def fingerprint(self) -> str:
        return "paths"

    @property
    def targets(self) -> list[int]:
        return self.tensors[1].tolist()


def other_weights() -> torch.nn.Module:
    model = network()
    with torch.no_grad():
        model.blocks[4].norm1.bias[7] += 1e-6
    return model


def of_dataset(images: torch.Tensor, labels: torch.Tensor, batch: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size=batch)


X, Y = (torch.cat(parts) for parts in zip(*labelled(), strict=True))
CHANGES = {
    "count": ({"count": 2}, "count was 1, is 2"),
    "budget": ({"count": None, "params": 0.9}, r"count was 1, is None; .*params was None, is 0\.9"),
    "strategy": ({"strategy": "kl"}, "strategy was 'nose', is 'kl'"),
    "estimator": ({"estimator": "histogram"}, "estimator was 'gaussian', is 'histogram'"),
    "score": ({"score": "pre_logits"}, "score was 'logits', is 'pre_logits'"),
    "bins": ({"bins": 64}, "bins was 256, is 64"),
    "exclude": ({"exclude": (2,)}, r"exclude was \[\], is \[2\]"),
    "beam": ({"beam": 2}, "beam was 1, is 2"),
    "min_gap": ({"min_gap": 2}, "min_gap was 1, is 2"),
    "weights": ({"model": other_weights()}, r"weights was '\w{64}', is '\w{64}'"),
    "dtype": ({"model": network().double()}, r"dtype was 'torch\.float32', is 'torch\.float64'"),
    "images": ({"loader": of_dataset(X + 1, Y)}, r"data was '\w{64}', is '\w{64}'"),
    "number": ({"loader": of_dataset(X[:-1], Y[:-1])}, "images was 24, is 23"),
    "batch size": ({"loader": of_dataset(X, Y, 6)}, "batch size was 8, is 6"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_found_otherwise_is_not_continued(name, tmp_path):
    path = tmp_path / "p.json"
    usual = {"model": network(), "loader": of_dataset(X, Y), "count": 1, "progress_file": path}
    select_layers(**usual)
    written = path.read_bytes()
    change, words = CHANGES[name]
    with pytest.raises(ProgressMismatchError, match=f"p.json holds a selection .*{words}.*--restart"):
        select_layers(**{**usual, **change})
    assert path.read_bytes() == written
    expected = select_layers(**{**usual, **change, "progress_file": None})
    assert select_layers(**{**usual, **change}, restart=True) == expected
    assert select_layers(**{**usual, **change}) == expected


def test_progress_of_versions_without_a_gap_is_resumed(tmp_path):
    path, data = tmp_path / "p.json", CountingLoader(labelled())
    expected = select_layers(network(), data, 2, progress_file=path)
    record = json.loads(path.read_text())
    del record["fingerprint"]["min_gap"]
    path.write_text(json.dumps(record))
    assert select_layers(network(), data, 2, progress_file=path) == expected
    assert data.passes == 1
    with pytest.raises(ProgressMismatchError, match="min_gap was 1, is 2"):
        select_layers(network(), data, 2, progress_file=path, min_gap=2)


def test_a_repair_counts_too(tmp_path, monkeypatch):
    options = {"count": 1, "strategy": "recoverability", "progress_file": tmp_path / "p.json"}
    select_layers(network(), labelled(), **options)
    with pytest.raises(ProgressMismatchError, match="seed was 0, is 1"):
        select_layers(network(), labelled(), **options, seed=1)
    monkeypatch.setattr(search, "SETTINGS", repair.RepairSettings(passes=5))
    with pytest.raises(ProgressMismatchError, match=r"repair was .*'passes': 4.*, is .*'passes': 5"):
        select_layers(network(), labelled(), **options)


def test_batches_in_memory_and_labels_count_too(tmp_path):
    path = tmp_path / "p.json"
    options = {"count": 1, "strategy": "accuracy", "progress_file": path}
    select_layers(network(), labelled(), **options)
    with pytest.raises(ProgressMismatchError, match="data was"):
        select_layers(network(), [(x, y.flip(0)) for x, y in labelled()], **options)
    for labels, outcome in (
        (Y, contextlib.nullcontext()),
        (9 - Y, pytest.raises(ProgressMismatchError, match="labels was")),
    ):
        loader = make_loader(Named(X, labels), 8)
        with outcome:
            select_layers(network(), loader, 1, strategy="accuracy", progress_file=tmp_path / "q.json")
        # labels that nobody looks at may be others
        select_layers(network(), loader, 1, progress_file=tmp_path / "r.json")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": 9, "fingerprint": {}, "found": {}}', "found", "branches"],
)
def test_damaged_progress(text, tmp_path):
    path = tmp_path / "p.json"
    expected = select_layers(network(), labelled(), 1, progress_file=path)
    if text in ("found", "branches"):
        record = json.loads(path.read_text())
        record["found"] = {} if text == "found" else {**record["found"], "branches": [{"layers": 3}]}
        text = json.dumps(record)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cannot read the progress in .*p\.json .*Start over with --restart"):
        select_layers(network(), labelled(), 1, progress_file=path)
    assert path.read_text() == text
    assert select_layers(network(), labelled(), 1, progress_file=path, restart=True) == expected
    assert json.loads(path.read_text())["found"]["done"] is True


def test_a_disk_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        select_layers(network(), labelled(), 1, progress_file=tmp_path / "file" / "p.json")


def test_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "p.json"
    select_layers(network(), labelled(), 1, progress_file=str(path))
    assert path.exists()


def test_counts_of_a_path_are_saved_as_percentages_and_read_back_exactly():
    for images in (3, 7, 997, 50_000):
        for hits in {0, 1, images // 3, images - 1, images}:
            result = PathResult(images, 4, 0, 1.5, hits=hits, loss=0.25, same=images - hits, kl=0.5)
            saved = json.loads(json.dumps(result.to_dict()))
            assert set(saved) == {
                "images",
                "channels",
                "constant_channels",
                "entropy",
                "top1",
                "loss",
                "agreement",
                "kl",
            }
            assert PathResult.from_dict(saved) == result
    bare = PathResult(3, 4, 0, 1.5)
    assert (bare.top1, bare.agreement) == (None, None)
    assert PathResult.from_dict(bare.to_dict()) == bare
