"""`benchmarks/studies/evidence.py` and its table, on a small network: equal budgets, and what is made of the hits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import pytest
import torch
from small_models import small_vit
from stream_support import image_set, write_zip

from benchmarks.studies import evidence
from benchmarks.studies import evidence_table as table
from lambda_kernels import from_pretrained


def arm(name: str, hits: str, **more: object) -> dict:
    picks, count, how = (*name.rsplit("-", 2),) if "-" in name else ("full", "0", "")
    layers = list(range(int(count)))
    row = {"arm": name, "picks": picks, "count": int(count), "diluted": how == "diluted", "layers": layers}
    return row | {"parameters": 5_000_000, "hits": hits, "hits_untrained": "0" * len(hits)} | more


def test_every_arm_of_the_study_is_there_once():
    names = [a.name for a in evidence.arms(3)]
    assert len(names) == len(set(names)) == 19
    assert names[:3] == ["full", "nose-5-diluted", "nose-5-dropped"]
    counted = Counter((a.picks.split()[0], a.count) for a in evidence.arms(3))
    assert counted == {
        ("full", 0): 1, ("nose", 3): 2, ("nose", 4): 2, ("nose", 5): 2, ("nose", 6): 2,
        ("random", 5): 6, ("first", 5): 2, ("kl", 5): 2,
    }  # fmt: skip


def test_a_paired_interval_is_that_of_the_source():
    # 30 images only ours gets right, 10 only theirs, of 200: with half an image in each cell 30.5 and 10.5 of 202.
    ours = "1" * 30 + "0" * 10 + "1" * 160
    theirs = "0" * 30 + "1" * 10 + "1" * 160
    middle, low, high = table.difference(ours, theirs)
    assert middle == pytest.approx(10.0)
    half = 1.959964 * math.sqrt(41 - 20**2 / 202) / 202
    assert (low, high) == pytest.approx((100 * (20 / 202 - half), 100 * (20 / 202 + half)))
    assert table.difference(theirs, ours) == pytest.approx((-middle, -high, -low))
    same = table.difference(ours, ours)
    assert same[0] == 0
    assert same[1] == -same[2] < 0  # never an interval of no width


def test_the_table_says_what_was_measured_and_what_was_not(tmp_path):
    record = {
        "arms": [arm("random 0-2-dropped", "1" * 60 + "0" * 40), arm("full", "1" * 80 + "0" * 20),
                 arm("nose-2-dropped", "1" * 70 + "0" * 30), arm("nose-2-diluted", "0" * 10 + "1" * 80 + "0" * 10)],
        "missing": ["kl-2-diluted"],
    }  # fmt: skip
    lines = table.table(record).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["full model", "nose", "nose", "random 0"]
    assert [line.split("|")[3].strip() for line in lines[2:6]] == ["", "diluted", "dropped", "dropped"]
    assert "| 80.0 (71.1–86.7) | – |" in lines[2]
    assert all(f"| {middle} (" in line for middle, line in zip(("+0.0", "-10.0", "-20.0"), lines[3:6], strict=True))
    assert lines[-1] == "Not trained: kl-2-diluted."
    table.plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_study_trains_what_is_missing_and_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "SHORT", evidence.SHORT | {"batch_size": 16, "micro_batch": 16, "amp": "none"})
    small = dataclasses.asdict(evidence.Arm("nose", 3, True))
    monkeypatch.setattr(
        evidence, "arms", lambda seeds: [evidence.Arm("full", 0, False), evidence.Arm(**small | {"count": 2})]
    )
    monkeypatch.setattr(evidence, "open_model", lambda name, weights: small_vit(depth=8, num_classes=1000))
    data = write_zip(tmp_path / "images.zip", image_set(train=32, val=6))
    options = ["--model", "small", "--weights", "small.safetensors", "--data", data,
               "--out", tmp_path / "study", "--img-size", 32, "--adapt-epochs", 1, "--epochs", 1, "--calibration", 32,
               "--results", tmp_path / "results.json"]  # fmt: skip
    evidence.main([*map(str, options), "--only", "full"])
    first = json.loads((tmp_path / "results.json").read_text())
    assert [row["arm"] for row in first["arms"]] == ["full"]
    assert first["missing"] == ["nose-2-diluted"]
    done = (tmp_path / "study" / "full" / "run.json").stat().st_mtime_ns

    evidence.main([*map(str, options)])
    record = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "study" / "full" / "run.json").stat().st_mtime_ns == done
    assert record["missing"] == []
    full, nose = record["arms"]
    assert full == first["arms"][0]
    assert nose["layers"] == record["picks"]["nose"][:2]
    assert nose["parameters"] < full["parameters"]
    assert len(nose["hits"]) == len(full["hits"]) == 6
    assert nose["hits"].count("1") / 6 * 100 == pytest.approx(nose["best_top1"], abs=1e-6)
    trained = from_pretrained(tmp_path / "study" / "nose-2-diluted" / "model")
    assert trained.lambda_kernels_info.removed == tuple(sorted(nose["layers"]))
    assert torch.isfinite(trained(torch.zeros(1, 3, 32, 32))).all()
    # Equal budgets: as many steps, from the same weights, for both.
    logs = [json.loads(line) for name in ("full", "nose-2-diluted")
            for line in (tmp_path / "study" / name / "log.jsonl").read_text().splitlines()]  # fmt: skip
    assert len({row["step"] for row in logs if row["kind"] == "epoch" and row["epoch"] == 1}) == 1
    with pytest.raises(SystemExit, match="begun with other options"):
        evidence.main([*map(str, options), "--epochs", "2"])
