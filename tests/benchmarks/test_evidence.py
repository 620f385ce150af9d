"""`benchmarks/studies/evidence.py` and its table, on a small network: equal budgets, and what is made of the hits."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from places import REPOSITORY
from small_models import small_vit
from stream_support import image_set, write_zip

from benchmarks.studies import evidence
from benchmarks.studies import evidence_table as table
from lambda_kernels import from_pretrained


def arm(picks: str, hits: str, *, way: str = "features", epochs: int = 1, **more: object) -> dict:
    count = 0 if picks == "full" else 5
    row = {"arm": f"{picks}-{way}-{epochs}", "way": way, "picks": picks, "count": count, "layers": list(range(count)),
           "epochs": epochs, "seed": 0, "recipe": {"feature_loss": 1.0}, "curve": [50.0] * epochs}  # fmt: skip
    return row | {"parameters": 5_000_000, "hits": hits, "hits_untrained": "1" * 20 + "0" * (len(hits) - 20)} | more


def right(count: int, total: int = 100) -> str:
    return "1" * count + "0" * (total - count)


def test_every_arm_of_the_study_has_a_name_of_its_own():
    found = [arm for group in evidence.GROUPS.values() for arm in group]
    assert len({arm.name for arm in found}) == len(found)
    assert Counter(arm.epochs for arm in found) == {6: 12, 30: 10, 1: 15}
    assert [arm.name for arm in evidence.GROUPS["long"]][:2] == ["full-features-30", "kl-5-features-30"]
    sets = [arm for arm in evidence.GROUPS["picks"] if arm.count]
    assert len({arm.picks for arm in sets}) >= 12
    assert {(arm.count, arm.epochs, tuple(arm.recipe.items())) for arm in sets} == {
        (5, 1, tuple(evidence.FEATURES.items()))
    }


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


def test_the_table_says_what_was_measured_and_what_was_not():
    record = {
        "arms": [arm("nose", right(60), epochs=30), arm("kl", right(70), epochs=30), arm("full", right(80), epochs=30),
                 arm("kl", right(75), way="mixup", epochs=30, recipe={"feature_loss": 1.0, "mixup": 0.8}),
                 arm("full", right(74), way="labels", epochs=30, recipe={}),
                 arm("kl", right(50), epochs=6), arm("kl", right(72), epochs=30, seed=1)],
        "base": {"hits": right(78)}, "missing": ["kl-5-dilute-30"],
    }  # fmt: skip
    lines = table.table(record).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:9]]
    assert [(row[0], row[1], row[3]) for row in cells] == [
        ("6", "kl", "features"), ("30", "full network", "features"), ("30", "full network", "labels"), ("30", "kl", "mixup"),
        ("30", "kl", "features, seed 1"), ("30", "kl", "features"), ("30", "nose", "features"),
    ]  # fmt: skip
    assert cells[1][5] == "80.0 (71.1–86.7)"
    assert [row[6].split(" ")[0] for row in cells] == ["-28.0", "+2.0", "-4.0", "-3.0", "-6.0", "-8.0", "-18.0"]
    # Only as long, with the same seed, by the same losses or else on labels.
    assert [row[7].split(" ")[0] for row in cells] == ["–", "–", "–", "+1.0", "–", "-10.0", "-20.0"]
    assert lines[-1] == "Not trained: kl-5-dilute-30."


def test_rank_correlations_are_spearmans():
    assert table.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert table.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    one, other = [1.0, 5.0, 2.0, 2.0, 9.0], [0.3, 0.1, 0.1, 0.7, 0.5]
    ranks = np.array([1, 4, 2.5, 2.5, 5]), np.array([3, 1.5, 1.5, 5, 4])
    assert table.rank_correlation(one, other) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_a_predictor_that_orders_the_sets_is_seen():
    rng = np.random.default_rng(0)
    rows = [
        arm(f"random{n}", "".join(rng.choice(["0", "1"], 400, p=[0.2 + 0.05 * n, 0.8 - 0.05 * n]))) for n in range(12)
    ]
    values = {f"random{n}": {name: float(n if name == "kl" else n % 3) for name in table.PREDICTORS}
              for n in range(12)}  # fmt: skip
    lines = table.correlations(
        {"arms": [*rows, arm("full", right(300, 400))], "predictors": values}, samples=50
    ).splitlines()
    assert lines[0].startswith("| of 12 sets of five |")
    found = {line.split("|")[1].strip(): float(line.split("|")[2].split()[0]) for line in lines[2:]}
    assert found[table.PREDICTORS["kl"]] > 0.95
    assert abs(found[table.PREDICTORS["te"]]) < 0.5


def test_a_power_law_through_the_budgets_is_extrapolated():
    """Gaps of 16, 8 and 4 points at 1, 8 and 64 epochs: half of it for eight times the epochs."""
    rows = [arm("kl", right(8000 - gap * 100, 10_000), epochs=epochs) for epochs, gap in ((1, 16), (8, 8), (64, 4))]
    record = {"arms": [*rows, arm("kl", right(0, 10_000), epochs=2, seed=1)], "base": {"hits": right(8000, 10_000)}}
    middle, low, high = table.extrapolate(record, "features", 512, samples=50)
    assert middle == pytest.approx(2, rel=1e-3)
    assert low < middle < high
    with pytest.raises(ValueError, match=r"mixup was trained with 0 budget\(s\)"):
        table.extrapolate(record, "mixup", 60)
    record["arms"][2] = arm("kl", right(8010, 10_000), epochs=64)
    with pytest.raises(ValueError, match="reaches the network before"):
        table.extrapolate(record, "features", 512, samples=5)


@pytest.mark.slow
def test_a_study_trains_what_is_missing_and_nothing_twice(tmp_path, monkeypatch):
    small = {**evidence.SHARED, "batch_size": 16, "micro_batch": 16}
    monkeypatch.setattr(evidence, "SHARED", small)
    arms = {
        "long": [evidence.Arm("features", "full", 0, 2, evidence.FEATURES),
                 evidence.Arm("local", "kl", 2, 2, evidence.LOCAL)],
        "picks": [evidence.Arm("features", name, 2, 1, evidence.FEATURES) for name in ("kl", "random0", "first")],
    }  # fmt: skip
    monkeypatch.setattr(evidence, "GROUPS", arms)
    monkeypatch.setattr(evidence, "SETS", ("kl", "random0", "first"))
    monkeypatch.setattr(evidence, "STRATEGIES", {"kl": {"strategy": "kl"}})
    monkeypatch.setattr(evidence, "open_model", lambda name, weights: small_vit(depth=8, num_classes=1000))
    data = write_zip(tmp_path / "images.zip", image_set(train=32, val=6))
    options = ["--model", "small", "--weights", "small.safetensors", "--data", data,
               "--out", tmp_path / "study", "--img-size", 32, "--adapt-epochs", 1, "--calibration", 32,
               "--results", tmp_path / "results.json"]  # fmt: skip
    evidence.main([*map(str, options), "--arms", "full-features-2"])
    first = json.loads((tmp_path / "results.json").read_text())
    assert [row["arm"] for row in first["arms"]] == ["full-features-2"]
    assert "kl-2-local-2" in first["missing"]
    done = (tmp_path / "study" / "full-features-2" / "run.json").stat().st_mtime_ns

    evidence.main([*map(str, options)])
    record = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "study" / "full-features-2" / "run.json").stat().st_mtime_ns == done
    assert record["missing"] == []
    full, repaired, *sets = record["arms"]
    assert full == first["arms"][0]
    assert repaired["layers"] == record["picks"]["kl"][:2]
    assert repaired["parameters"] < full["parameters"]
    assert len(repaired["hits"]) == len(full["hits"]) == len(record["base"]["hits"]) == 6
    assert repaired["hits"].count("1") / 6 * 100 == pytest.approx(repaired["last_top1"], abs=1e-6)
    assert repaired["hits_best"].count("1") / 6 * 100 == pytest.approx(repaired["best_top1"], abs=1e-6)
    assert set(record["predictors"]) == {row["picks"] for row in sets} == {"kl", "random0", "first"}
    assert len(table.correlations(record, samples=5).splitlines()) == 2 + len(table.PREDICTORS)
    trained = from_pretrained(tmp_path / "study" / "kl-2-local-2" / "model")
    assert trained.lambda_kernels_info.removed == tuple(sorted(repaired["layers"]))
    assert trained.lambda_kernels_provenance.training["local_epochs"] == 0.5
    assert torch.isfinite(trained(torch.zeros(1, 3, 32, 32))).all()
    # Equal budgets: as many steps, from the same weights, for both.
    logs = [json.loads(line) for name in ("full-features-2", "kl-2-local-2")
            for line in (tmp_path / "study" / name / "log.jsonl").read_text().splitlines()]  # fmt: skip
    assert len({row["step"] for row in logs if row["kind"] == "epoch" and row["epoch"] == 2}) == 1
    table.plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        evidence.main([*map(str, options), "--arms", "kl-2-lokal-2"])
    with pytest.raises(SystemExit, match="begun with other options"):
        evidence.main([*map(str, options), "--calibration", "16"])


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "benchmarks" / "results").glob("evidence-*.json")), ids=lambda path: path.stem
)
def test_committed_results_can_be_read(path):
    record = table.read_results(path)
    lines = table.table(record).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(record["arms"])
