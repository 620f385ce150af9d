"""`lambda-vit validate` of models that want their images prepared differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from small_models import small_vit

from lambda_kernels import save_pretrained


def test_models_that_want_other_images_are_not_compared(run, folder, saved, tmp_path):
    other = small_vit()
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": [0.1, 0.2, 0.3]}
    save_pretrained(other, tmp_path / "other")
    code, _, err = run("validate", "--model", saved, "--reference", tmp_path / "other", "--data", folder)
    assert code == 2
    assert "mean" in err
    assert "Validate each alone" in err


def test_models_that_want_another_crop_are_compared_with_one(run, folder, saved, tmp_path):
    other = small_vit()
    other.pretrained_cfg = {**other.pretrained_cfg, "crop_pct": 0.5}
    save_pretrained(other, tmp_path / "other")
    arguments = ["validate", "--model", saved, "--reference", tmp_path / "other", "--data", folder, "--no-latency"]
    code, _, err = run(*arguments)
    assert code == 2
    assert "crop_pct" in err
    assert "--crop-pct" in err
    accuracies = {}
    for share in (0.5, 1.0):
        code, _, err = run(*arguments, "--crop-pct", share, "--out", tmp_path / "v.json")
        assert code == 0, err
        rows = json.loads((tmp_path / "v.json").read_text())["variants"]
        assert rows[0]["top1"] == rows[1]["top1"]
        (alone,) = alone_at(share, run, folder, tmp_path)
        accuracies[share] = (rows[0]["top1"], alone["top1"])
    assert all(both == alone for both, alone in accuracies.values()), accuracies
    for share in (0, 1.01, -1):
        code, _, err = run(*arguments, "--crop-pct", share)
        assert code == 2
        assert f"--crop-pct must be above 0 and at most 1, such as 0.9; got {share:g}" in err


def alone_at(crop_pct: float, run: Callable, folder: Path, tmp_path: Path) -> list[dict]:
    """The same network, whose own config asks for this crop."""
    network = small_vit()
    network.pretrained_cfg = {**network.pretrained_cfg, "crop_pct": crop_pct}
    model = save_pretrained(network, tmp_path / f"alone_{crop_pct}")
    out = tmp_path / f"alone_{crop_pct}.json"
    code, _, err = run("validate", "--model", model, "--data", folder, "--no-latency", "--out", out)
    assert code == 0, err
    return json.loads(out.read_text())["variants"]


def test_a_model_without_a_classifier_has_no_accuracy(run, folder, saved, tmp_path):
    features = save_pretrained(small_vit(num_classes=0), tmp_path / "features")
    code, _, err = run("validate", "--model", features, "--data", folder)
    assert code == 2
    assert "the model has no classifier (num_classes=0)" in err
    code, _, err = run("validate", "--model", saved, "--reference", features, "--data", folder)
    assert code == 2
    assert "the reference has no classifier (num_classes=0)" in err
    assert "lambda-vit finetune --full --num-classes N" in err
    binary = save_pretrained(small_vit(num_classes=1), tmp_path / "binary")
    code, _, err = run("validate", "--model", binary, "--data", folder)
    assert code == 2
    assert (
        "the model has one output (num_classes=1), which predicts no class, so that its outputs have no accuracy" in err
    )
