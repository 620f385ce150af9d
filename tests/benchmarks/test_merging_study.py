"""`benchmarks/studies/merging.py` on a small network: what it compares, and that an interrupted study goes on."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
from small_models import small_vit
from stream_support import image_set, write_zip

from benchmarks.studies import merging


@pytest.fixture
def study(monkeypatch) -> ModuleType:
    monkeypatch.setattr(merging, "open_model", lambda *args, **options: small_vit(img_size=80, num_classes=2))
    return merging


def test_study(study, tmp_path, monkeypatch):
    data, out = write_zip(tmp_path / "set.zip", image_set(val=6)), tmp_path / "results.json"
    arguments = [
        "--weights",
        "w",
        "--data",
        str(data),
        "--remove",
        "1,2",
        "--r",
        "0,4",
        "--batch",
        "2",
        "--rounds",
        "2",
    ]

    def run(*more: str) -> dict:
        return study.run(study.arguments().parse_args([*arguments, "--out", str(out), *more]))

    record = run()
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))
    rows = record["networks"]
    assert list(rows) == ["timm", "full, r=0", "full, r=4", "removed, r=0", "removed, r=4"]
    assert rows["full, r=4"]["tokens"] == [26, 26, 22, 18]
    assert rows["removed, r=4"]["merged"] == [0, 0, 0, 4]
    assert rows["timm"]["flops"] == rows["full, r=0"]["flops"] > rows["full, r=4"]["flops"]
    assert rows["timm"]["parameters"] > rows["removed, r=4"]["parameters"] == rows["removed, r=0"]["parameters"]
    assert rows["timm"]["accuracy, set"]["top1"] == rows["full, r=0"]["accuracy, set"]["top1"]
    for row in rows.values():
        assert row["accuracy, set"]["count"] == 6
        ratios = sorted(a / b for a, b in zip(rows["timm"]["seconds"], row["seconds"], strict=True))
        assert row["speed"][1] == pytest.approx(sum(ratios) / 2)
    lines = study.table(record).splitlines()
    assert lines[0] == "| network | tokens behind | GFLOPs | throughput | top-1, set |"
    assert lines[4].startswith("| full, r=4 | 14 | 0.0")

    # What is there is kept, what is missing is measured: another number of images is another measurement.
    del record["networks"]["full, r=4"]["accuracy, set"]
    out.write_text(json.dumps(record))
    calls, evaluate = [], study.evaluate
    monkeypatch.setattr(study, "evaluate", lambda *args, **named: calls.append(named) or evaluate(*args, **named))
    assert run()["networks"]["timm"]["seconds"] == rows["timm"]["seconds"]
    assert [call["description"] for call in calls] == ["set, full, r=4"]
    assert run("--samples", "4")["networks"]["timm"]["accuracy, set"]["count"] == 4
    with pytest.raises(SystemExit, match=r"holds a study of other settings: .*'r': '0,4'"):
        run("--r", "0,5")
