"""The pages that `benchmarks/` writes, of figures that were made up; and that a wrong operator is not timed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from places import REPOSITORY

from benchmarks.support import peaks, verify
from benchmarks.tools import pages, roofline, scaling

ENVIRONMENT = {
    "cpu": "A CPU",
    "gpu": "none",
    "python": "3.11.7",
    **dict.fromkeys(("torch", "triton", "timm", "numpy"), "1.0"),
    "commit": "a" * 40,
    "dirty": True,
    "time": "2026-01-02 03:04:05 UTC",
}


def test_what_is_wrong_is_not_timed():
    exact = torch.randn(100, dtype=torch.float64)
    verify.close("ours", exact.float(), exact, 1e-6)
    with pytest.raises(pytest.fail.Exception, match=r"ours: off by 1\.00e-01, more than 1\.0e-02: no time is reported"):
        verify.close("ours", 1.1 * exact, exact, 1e-2)
    with pytest.raises(pytest.fail.Exception, match="ours, result 1: off by nan"):
        verify.close("ours", [exact, exact * float("nan")], [exact, exact], 1e-2)
    with pytest.raises(ValueError, match="longer"):
        verify.close("ours", [exact], [exact, exact], 1e-2)
    # Half as much again as the rival's own error, where that is larger than the limit.
    verify.close("ours", [1.1 * exact], [exact], 1e-2, beside=[1.08 * exact])
    with pytest.raises(pytest.fail.Exception, match=r"more than 7\.5e-02"):
        verify.close("ours", [1.1 * exact], [exact], 1e-2, beside=[1.05 * exact])
    verify.equal("counts", torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(pytest.fail.Exception, match="counts is wrong"):
        verify.equal("counts", torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_peaks_are_those_of_the_worst_moment():
    def call() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.float64)
        second = torch.empty(2000, dtype=torch.float64)
        del first
        return second[:1].clone()

    assert 24_000 <= peaks.peak_bytes(call) < 25_000


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_exponents():
    assert scaling.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    sizes = (1, 2, 4)
    points = [
        scaling.Point(n, lambda n=n: busy(0.002 * n**2), work=float(n), kept=10 * n, expected_bytes=7 * n**3)
        for n in sizes
    ]
    found = scaling.measured(scaling.Series("a square", "things", "kept", points), rounds=6)
    assert found["exponent"]["found"] == pytest.approx(2, abs=0.15)
    assert found["exponent"]["low"] <= found["exponent"]["found"] <= found["exponent"]["high"]
    assert found["exponent"]["expected"] == pytest.approx(1)
    assert found["memory_exponent"] == {"found": pytest.approx(1), "expected": pytest.approx(3)}


def series(memory: bool) -> dict:
    found = {
        "title": "a block",
        "axis": "tokens",
        "sizes": [1, 10],
        "seconds": [[0.9, 1.0, 1.1], [9.0, 10.0, 11.0]],
        "work": [1.0, 10.0],
        "exponent": {"found": 1.0, "low": 0.96, "high": 1.04, "expected": 1.0},
    }
    if memory:
        kept = {"memory": "at once", "bytes": [10, 100], "expected_bytes": [1, 20]}
        found |= {**kept, "memory_exponent": {"found": 1.0, "expected": 1.3}}
    return found


def test_the_page_of_exponents(tmp_path):
    text = scaling.page({"environment": ENVIRONMENT, "series": {"tokens": series(True), "attention": series(False)}})
    assert "| a block | tokens | 1 … 10 | 1.00 (0.96–1.04) | 1.00 | at once | 1.00 | 1.30 |" in text
    assert "| a block | tokens | 1 … 10 | 1.00 (0.96–1.04) | 1.00 |  |  |  |" in text
    assert "commit aaaaaaaaa with changes; 2026-01-02." in text
    assert "![a block](scaling-attention.png)" in text
    for memory in (True, False):
        scaling.plot(series(memory), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "plot.png").stat().st_size < 60_000


def test_a_page_is_drawn_again_from_what_was_measured(tmp_path, monkeypatch):
    begin, end = pages.marks("scaling.py")
    (tmp_path / "scaling.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    found = {"environment": ENVIRONMENT, "series": {"tokens": series(True), "attention": series(False)}}
    (tmp_path / "found.json").write_text(json.dumps(found), encoding="utf-8")
    monkeypatch.setattr(scaling, "DOCS", tmp_path)
    monkeypatch.setattr(scaling, "measured", lambda *_: pytest.fail("nothing is to be measured"))
    assert scaling.main(["--draw", "--out", str(tmp_path / "found.json")]) == 0
    text = (tmp_path / "scaling.md").read_text(encoding="utf-8")
    assert text == f"before\n{begin}\n\n{scaling.page(found)}\n\n{end}\nafter\n"
    assert {path.name for path in tmp_path.glob("*.png")} == {"scaling-tokens.png", "scaling-attention.png"}


def test_the_committed_pages_are_those_of_the_committed_results():
    """Tables and plots are not to be edited, and not to be forgotten."""
    for tool in (scaling, roofline):
        name = Path(tool.__file__).stem
        found = json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert tool.page(found) in (REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("size", "text"), [(1, "1"), (197, "197"), (3152, "3152"), (12608, "12.6k"), (201728, "202k")])
def test_sizes_are_short(size, text):
    assert scaling.short(size) == text


def test_shares_of_the_best():
    """An operator that takes four times as long as a product with as many operations reaches a quarter."""
    probes = roofline.Probes(
        {"float32": (lambda: busy(0.005), 1e6)}, (lambda: busy(0.002), 1e6), (lambda: busy(0.002), 1e3)
    )
    works = [
        roofline.Work("computes", "float32", 1e6, 1.0, lambda: busy(0.02)),
        roofline.Work("moves", "float32", 0, 1e4, lambda: busy(0.02)),
    ]
    computes, moves = roofline.measured(works, probes, 6, "processor")
    assert (computes["bound"], moves["bound"]) == ("computing", "moving")
    assert computes["share"]["found"] == pytest.approx(0.25, rel=0.2)
    assert moves["share"]["found"] == pytest.approx(1.0, rel=0.2)
    text = roofline.table([*(computes, moves), {"what": "elsewhere", "dtype": "bfloat16", "flops": 1e9, "moved": 1e6}])
    assert text.splitlines()[-1] == "| elsewhere | bfloat16 | 1 | 1 |  | not measured | not measured |"
    assert "| computes | float32 | 0.001 | 1e-06 | computing | 20" in text


def test_work_is_counted():
    """Two products of M × C × 4C, two operations per multiply-add; two tensors of tokens, two of weights."""
    assert roofline.mlp_work(192, 1000, 4) == (2 * 2 * 1000 * 192 * 768, 4 * (2 * 1000 * 192 + 2 * 192 * 768))
    assert roofline.step_work(192, 1000, 4)[0] == 3 * roofline.mlp_work(192, 1000, 4)[0]


@pytest.mark.parametrize("tool", [scaling, roofline])
def test_what_is_written_is_of_full_size(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--quick", "--write"])
    assert stopped.value.code == 2
    assert "--write is for" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scaling", "roofline"])
def test_the_pages_have_their_comments(name, tmp_path):
    page: Path = tmp_path / "page.md"
    page.write_text((REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8"), encoding="utf-8")
    pages.write(page, f"{name}.py", "new \\1 words")
    begin, end = pages.marks(f"{name}.py")
    assert f"{begin}\n\nnew \\1 words\n\n{end}" in page.read_text(encoding="utf-8")
