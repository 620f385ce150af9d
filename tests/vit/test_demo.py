"""The demo on few images and few epochs: everything it promises to write and to say is there."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import lambda_vit.demo as demo
from lambda_kernels import from_pretrained
from lambda_vit import Selection

QUICK = demo.DemoOptions(count=2, baseline_epochs=2, dilution_epochs=1, tuning_epochs=1, train_images=128)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = io.StringIO()
    result = demo.run_demo(tmp_path_factory.mktemp("runs") / "demo", QUICK, Console(file=out, width=100))
    return result, out.getvalue()


def test_files(result):
    folder = result[0].folder
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "report.html", "report.md", "report.png", "report.json", "selection.json", "log.jsonl",
        "model/config.json", "model/model.safetensors",
    }  # fmt: skip
    record = json.loads((folder / "report.json").read_text())
    assert record == result[0].record
    assert Selection.from_json(folder / "selection.json").layers == tuple(record["selection"]["layers"])
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(log) == sum(len(run["epochs"]) for run in record["training"])
    assert {"run", "epoch", "loss", "top1", "lambda"} <= log[0].keys()


def test_the_saved_model_is_the_reported_one(result):
    record = result[0].record
    model = from_pretrained(result[0].folder / "model")
    assert model.lambda_kernels_info.removed == tuple(sorted(record["selection"]["layers"]))
    assert model.lambda_kernels_info.residual_scale == 2.0
    images, labels = demo.digits("val").tensors
    with torch.inference_mode():
        top1 = 100 * float((model(images).argmax(1) == labels).double().mean())
    row = next(v for v in record["variants"] if v["name"] == "nose diluted")
    assert row["top1"] == pytest.approx(top1)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_what_is_compared(result):
    record = result[0].record
    rows = {row["name"]: row for row in record["variants"]}
    assert list(rows) == [
        "full", "nose untrained", "nose diluted", "nose dropped", "random diluted", "first diluted", "full tuned",
    ]  # fmt: skip
    assert rows["first diluted"]["removed"] == [0, 1]
    assert [rows[n]["residual_scale"] for n in ("nose untrained", "nose diluted", "nose dropped")] == [1.0, 2.0, 1.0]
    assert not rows["nose untrained"]["trained"]
    assert rows["nose diluted"]["parameters"] < rows["full"]["parameters"]
    assert rows["nose diluted"]["flops"] < rows["full"]["flops"]
    assert set(rows["full"]["latency_ms"]) == {"1", "64"}
    assert all(check["ok"] for check in record["checks"])
    assert len(record["checks"]) == 2
    assert [path["attention"] for path in record["kernel_paths"]].count("removed") == 2


def test_it_says_what_it_did_not_do_and_what_comes_next(result):
    record, printed = result[0].record, result[1]
    assert any("Triton" in line for line in record["not_exercised"])
    assert any(entry["command"].startswith("lambda-vit select") for entry in record["next_commands"])
    assert "Not exercised" in printed
    assert "attention removed, MLP torch (" in printed
    for step in range(1, 8):
        assert f"{step}/7" in printed


def test_a_poor_baseline_is_a_failure(result, monkeypatch, capsys):
    assert len(result[0].failures) == 1  # two epochs on 128 images cannot reach 90 %
    import sys

    import lambda_vit.cli.main as cli

    monkeypatch.setattr(demo, "run_demo", lambda *args, **kwargs: result[0])
    monkeypatch.setattr(sys, "argv", ["lambda-vit", "demo", "--out", str(result[0].folder)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "below 90 %" in capsys.readouterr().err


def test_a_failed_check_is_a_failure():
    """Shown on the checks alone: nothing is trained."""
    record = {"checks": [{"name": "reload", "value": "different", "ok": False}]}
    assert demo.failures_of(record, 99.0) == ("reload: different",)
    assert demo.failures_of({"checks": [{"name": "reload", "value": "equal", "ok": True}]}, 90.0) == ()
    assert "below 90 %" in demo.failures_of({"checks": []}, 89.9)[0]


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with demo._one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
