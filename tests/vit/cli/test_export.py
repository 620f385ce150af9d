"""`lambda-vit export` as a user types it: what it writes, what it says, and what it refuses before it works."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from export_support import onnx_metadata, run_onnx
from small_models import images, small_vit

from lambda_kernels import convert_vit, from_pretrained, save_pretrained
from lambda_vit.cli import export as command_export
from lambda_vit.export import check as export_check
from lambda_vit.export import write as export
from lambda_vit.export.check import Checked
from lambda_vit.measure.latency import Latency


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small model without the attention of its first block."""
    model = convert_vit(small_vit(depth=2, patch_size=16), (0,), residual_scale=2.0)
    return save_pretrained(model, tmp_path_factory.mktemp("model") / "small")


@torch.no_grad()
def test_onnx_and_a_program(run, saved, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    onnx, program, out = tmp_path / "out" / "m.onnx", tmp_path / "m.pt2", tmp_path / "m.json"
    classes = tmp_path / "classes.json"
    classes.write_text('{"zero": 0, "nine": 9}')
    options = ["--onnx", onnx, "--torch-export", program, "--class-map", classes, "--opset", 20, "--out", out]
    code, printed, err = run("export", "--model", saved, *options)
    assert code == 0, err
    record = json.loads(out.read_text())
    assert "images [batch, 3, 32, 32] float32; attention removed from blocks 0" in printed
    assert f"Written: {onnx} (ONNX, opset 20, " in printed
    assert "largest difference from the model, run by onnxruntime " in printed
    assert "run by torch.export.load: " in printed
    assert "Latency by onnx, relative to eager PyTorch: " in printed
    assert f"measured on this machine, under its current load: device {record['environment']['device']}" in printed
    assert f"Next: onnxruntime.InferenceSession('{onnx}').run(None, {{'images': images}})" in printed
    assert f"Next: torch.export.load('{program}').module()(images)" in printed
    model, x = from_pretrained(saved), images(5)
    assert torch.allclose(run_onnx(onnx, x)[0], model(x), atol=1e-4)
    assert torch.allclose(torch.export.load(program).module()(x), model(x), atol=1e-5)
    assert onnx_metadata(onnx)["class_names"][::9] == ["zero", "nine"]
    file = record["files"]["onnx"]
    assert (file["bytes"], file["opset"], file["not_compared"]) == (onnx.stat().st_size, 20, None)
    assert set(file["largest_difference"]) == {"1", "3"}
    assert set(record["latency_ms"]) == {"eager", "onnx", "torch-export"}
    assert set(record["latency_ms"]["onnx"]) == {"1", "8"}
    assert record["metadata"]["removed_attention"] == "[0]"

    code, printed, err = run("export", "--model", saved, "--onnx", onnx)
    assert code == 2
    assert f"--onnx {onnx} exists already: choose another name, or pass --overwrite" in err
    changed = ["--overwrite", "--no-latency", "--fixed-batch", 2, "--image-size", 48, "--dtype", "float16"]
    code, printed, err = run("export", "--model", saved, "--torch-export", program, *changed)
    assert code == 0, err
    assert "images [2, 3, 48, 48] float16" in printed
    assert "at batch 2" in printed
    assert "Time of" not in printed
    assert torch.export.load(program).module()(images(2, 48).half()).dtype == torch.float16


def test_what_is_refused_before_work(run, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("lambda_vit.cli.models.open_model", lambda *_, **__: pytest.fail("the model was opened"))
    onnx, program = tmp_path / "m.onnx", tmp_path / "m.pt2"
    (tmp_path / "classes.json").write_text("[]")
    (tmp_path / "folder.onnx").mkdir()
    again = tmp_path / "folder.onnx" / ".." / "m.pt2"  # the same file by another path
    for options, message in (
        ([], "pass at least one of --onnx FILE.onnx"),
        (["--onnx", program], "--onnx: a file of the form onnx ends in .onnx; got "),
        (["--onnx", tmp_path / "folder.onnx"], "folder.onnx is a folder; name a file in it"),
        (["--aoti", program, "--torch-export", program], "two formats cannot share one file"),
        (["--aoti", again, "--torch-export", program, "--overwrite"], "two formats cannot share one file"),
        (["--torch-export", program, "--out", again], "--out writes JSON, but"),
        (["--torch-export", program, "--out", tmp_path], "is a folder; name a file in it"),
        (["--torch-export", program, "--opset", 20], "--opset 20 requires --onnx, which is missing"),
        (["--onnx", onnx, "--opset", 17], "opset must lie between 18"),
        (["--onnx", "/proc/none/m.onnx"], "cannot write to /proc"),
        (["--onnx", onnx, "--class-map", tmp_path / "classes.json"], "must hold an object"),
    ):
        code, _, err = run("export", "--model", saved, *options)
        assert code == 2
        assert message in err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        code, _, err = run("export", "--model", saved, "--onnx", onnx)
        assert code == 2
        assert (
            "ONNX needs the package onnxscript: pip install onnxscript, or pip install 'lambda-kernels[export]'" in err
        )
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, _, err = run("export", "--model", saved, "--aoti", program)
    assert code == 2
    assert "needs a C++ compiler, and there is no no-such-compiler here" in err


def test_a_file_that_differs_is_a_failure(run, saved, tmp_path, monkeypatch):
    whole = export_check.open_file
    monkeypatch.setattr(export_check, "open_file", lambda *given: lambda x: tuple(y + 1 for y in whole(*given)(x)))
    program = tmp_path / "m.pt2"
    code, _, err = run("export", "--model", saved, "--torch-export", program)
    assert code == 1
    assert f"{program}: of 1 image(s) torch.export.load is off by 1" in err
    assert not program.exists()


def test_what_was_not_compared_is_said(tmp_path):
    file = export.Exported(tmp_path / "a.onnx", "onnx", 3 << 20, Checked({}, "onnxruntime", "it is not here"), opset=20)
    assert command_export.describe_file(file) == [
        f"Written: {tmp_path / 'a.onnx'} (ONNX, opset 20, 3.00 MiB)",
        "  not compared with the model: it is not here",
    ]
    assert command_export.describe_times({}, {}) == []
    times = {"eager": {1: Latency(20.0, 19.0, 21.0, 9)}, "aoti": {1: Latency(10.0, 9.0, 12.0, 9)}}
    first, second = command_export.describe_times(times, {"device": "cpu (X)", "threads": "1 of 2", "torch": "2"})
    assert first.endswith("0.50 at batch 1 (10.0 ms, quartiles 9.00–12.0, against 20.0 ms)")
    assert second == "  measured on this machine, under its current load: device cpu (X), threads 1 of 2, torch 2"
