"""Merging is saved with a model and comes back with it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import images, small_vit

from lambda_kernels import convert_vit, from_pretrained, save_pretrained
from lambda_vit import cli


@pytest.mark.parametrize("options", [{"tome_r": 4, "tome_start": 0}, {"tome_r": [5, 3]}, {"tome_r": 4, "fuse": "none"}])
@torch.no_grad()
def test_comes_back(tmp_path, options):
    model = convert_vit(small_vit(img_size=80), (1,), residual_scale=2.0, **options)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.lambda_kernels_info == model.lambda_kernels_info
    assert torch.equal(loaded(images(2, 80)), model(images(2, 80)))
    saved = json.loads((tmp_path / "config.json").read_text())["lambda_kernels"]
    assert (saved["tome_r"], saved["tome_start"]) == (options["tome_r"], options.get("tome_start", 1))
    other = from_pretrained(tmp_path, backend="torch")
    assert other.lambda_kernels_info.tome_r == model.lambda_kernels_info.tome_r


@torch.no_grad()
def test_files_from_before_there_was_merging(tmp_path):
    model = convert_vit(small_vit(), (1,))
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("tome_r", "tome_start"):
        del config["lambda_kernels"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = from_pretrained(tmp_path)
    assert loaded.lambda_kernels_info.tome_r == 0
    assert torch.equal(loaded(images()), model(images()))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["lambda-vit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)


def test_command(tmp_path, monkeypatch, capsys):
    save_pretrained(small_vit(img_size=80), tmp_path / "full")
    convert = ["convert", "--model", tmp_path / "full", "--out"]
    run(monkeypatch, *convert, tmp_path / "a", "--remove", "1", "--tome-r", "4", "--tome-start", "0")
    assert "tokens into each block: 26, 22, 22, 18; 12 are merged into others" in capsys.readouterr().out
    info = from_pretrained(tmp_path / "a").lambda_kernels_info
    assert (info.removed, info.tome_r, info.tome_start) == ((1,), 4, 0)
    run(monkeypatch, *convert, tmp_path / "b", "--tome-r", "4,2,1")
    assert "Removed the attention of no block" in capsys.readouterr().out
    assert from_pretrained(tmp_path / "b").lambda_kernels_info.tome_r == (4, 2, 1)
    run(monkeypatch, *convert, tmp_path / "c", "--remove", "1")
    assert "tokens" not in capsys.readouterr().out
