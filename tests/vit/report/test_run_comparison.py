"""A real fine-tuning and its report: what it measures before and after, and the page that grows while it goes on."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from report_support import Page
from tensor_stream import TensorStream
from training_support import recipe, tiny_vit, train_set, validation

from lambda_kernels import convert_vit, from_pretrained
from lambda_vit.measure import comparison
from lambda_vit.measure.accuracy import evaluate
from lambda_vit.measure.cost import cost
from lambda_vit.report import page as report_training
from lambda_vit.runtime.processes import Processes
from lambda_vit.training import run_record
from lambda_vit.training.run import run_finetuning
from lambda_vit.training.storage import log as live_log


def finetuned(out: Any, **options: Any) -> Any:
    own = recipe(epochs=4, dilution_epochs=2)
    arguments = {"layers": (1,), "log_every": 2, **options}
    return run_finetuning(
        tiny_vit(), own, lambda *_: (TensorStream(train_set(), own), validation()), out=out, **arguments
    )


def test_the_report_of_a_real_run(tmp_path):
    record = finetuned(tmp_path).record
    page = Page(report_training.write_training_report(tmp_path)["html"].read_text(encoding="utf-8")).text
    model = from_pretrained(tmp_path / "model")
    full = tiny_vit()
    found = evaluate(model, validation(), reference=full)
    before = evaluate(full, validation())
    rows = {row["name"]: row for row in record["variants"]}
    assert list(rows) == ["full", "untrained", "model"]
    assert rows["model"]["top1"] == record["result"]["top1"] == found.top1
    assert rows["model"]["agreement"] == found.agreement
    assert rows["full"]["top1"] == before.top1
    untrained = convert_vit(full, (1,))
    assert rows["untrained"]["top1"] == evaluate(untrained, validation()).top1
    assert (rows["full"]["trained"], rows["untrained"]["trained"], rows["model"]["trained"]) == (True, False, True)
    for name, network in (("full", full), ("untrained", untrained), ("model", model)):
        expected = cost(network, batch_size=comparison.COST_BATCH)
        assert rows[name]["parameters"] == expected.parameters
        assert rows[name]["flops"] == expected.flops
        assert rows[name]["peak_memory_bytes"] == expected.peak_memory_bytes
    assert [row["attention"] for row in record["kernel_paths"]] == ["kept", "removed", "kept"]
    assert record["unreadable"] == []
    for words in ("λ reached 0 after epoch 2 (step 6)", f"Top-1 is {found.top1:.1f} %", "on 90 images", "loaded back from disk",
                  f"the full model has {before.top1:.1f} %", "all 2 checks passed", "Kernel path per block"):  # fmt: skip
        assert words in page


def test_what_a_run_starts_from_is_measured_once(tmp_path, monkeypatch):
    finetuned(tmp_path)
    before = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["variants"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(run_record, "measure_baselines", refuse)
    assert finetuned(tmp_path).record["variants"] == before


def test_nothing_removed_is_compared_with_what_it_was(tmp_path):
    rows = finetuned(tmp_path, layers=()).record["variants"]
    assert [(row["name"], row["label"], row["removed"]) for row in rows] == [
        ("full", "As it was", []),
        ("model", "Fine-tuned", []),
    ]
    text = Page(report_training.write_training_report(tmp_path)["html"].read_text(encoding="utf-8")).text
    assert "No attention was removed: the model was trained unchanged." in text
    assert "the original model has" in text


@pytest.mark.parametrize(("allowed", "names"), [(0, []), (3, ["full"])])
def test_a_stop_leaves_out_what_was_not_measured(allowed, names):
    asked = iter([0] * allowed)  # the validation images come in three batches
    rows = run_record.measure_baselines(tiny_vit(), (1,), validation(), Processes(), lambda: next(asked, 15))
    assert [row["name"] for row in rows] == names


def test_the_report_grows_where_that_costs_little(tmp_path, monkeypatch):
    now, written = [0.0], []

    def writes(folder: Any) -> None:
        written.append((folder, now[0]))
        now[0] += 5.0  # what it takes
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(live_log.time, "monotonic", lambda: now[0])
    with live_log.RunLog(tmp_path / "log.jsonl", report=writes) as log:
        for epoch in range(1, 80):
            now[0] += 10.0
            log.write("step", step=epoch)
            log.write("epoch", epoch=epoch, loss=1.0, top1=None, top1_ema=None, attention="full", best=False)
    times = [at for _, at in written]
    assert times[0] == pytest.approx(150.0)  # 2 % of it are the 3 s that the first is taken to need
    assert {round(later - earlier - 5.0) for earlier, later in itertools.pairwise(times)} == {250}
    assert all(folder == tmp_path for folder, _ in written)
    assert log.rows == 158
