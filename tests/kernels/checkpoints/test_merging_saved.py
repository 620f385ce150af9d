"""Merging is saved with a model and comes back with it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from small_models import images, small_vit

from lambda_kernels import CheckpointError, convert_vit, from_pretrained, save_pretrained
from lambda_vit.cli import main as cli

pytestmark = pytest.mark.models


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
def test_models_that_do_not_merge_have_the_older_format(tmp_path):
    """Which readers from before there was merging know; theirs says nothing of merging and is read here."""
    model = convert_vit(small_vit(), (1,))
    save_pretrained(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["lambda_kernels"]
    assert saved["format"] == 1
    assert not {"tome_r", "tome_start"} & set(saved)
    loaded = from_pretrained(tmp_path)
    assert loaded.lambda_kernels_info.tome_r == 0
    assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize(
    ("field", "value"), [("tome_r", "4"), ("tome_r", [1, 2, 3, 4]), ("tome_start", 9), ("tome_r", -1)]
)
def test_a_config_that_was_edited(tmp_path, field, value):
    save_pretrained(convert_vit(small_vit(img_size=80), (1,), tome_r=4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["lambda_kernels"]["format"] == 2
    config["lambda_kernels"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ValueError), match=field):
        from_pretrained(tmp_path)


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
