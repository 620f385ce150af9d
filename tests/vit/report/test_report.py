"""The report: what is written, that it is whole, and that it says what the record says."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from report_support import FADE, Page, assert_tables_are_whole, made_up, printed

from lambda_kernels import files
from lambda_vit.report import page as report
from lambda_vit.report.page import console_summary, write_report
from lambda_vit.runtime import formatting


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Path]]:
    record = made_up()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_report(record, tmp_path_factory.mktemp("run") / "new" / "folder")
    console_summary(record)
    assert record == made_up()
    return record, paths


def test_writes_all_four_files_and_nothing_else(written):
    record, paths = written
    assert sorted(paths) == ["html", "json", "md", "png"]
    assert sorted(p.name for p in paths["json"].parent.iterdir()) == sorted(p.name for p in paths.values())
    assert json.loads(paths["json"].read_text(encoding="utf-8")) == record
    assert paths["png"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_page_is_one_file_that_loads_nothing(written):
    text = written[1]["html"].read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    loads = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href", "srcset")]
    assert loads
    assert all(value.startswith("#") for value in loads)
    assert "http" not in text
    assert "@import" not in text


def test_page_identifiers_are_unique_and_links_lead_somewhere(written):
    page = Page(written[1]["html"].read_text(encoding="utf-8"))
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(names) == len(set(names))
    targets = {attrs["href"][1:] for _, attrs in page.tags if "href" in attrs}
    targets |= {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs}
    assert targets <= set(names)


def test_page_is_accessible_and_follows_the_colour_scheme(written):
    text = written[1]["html"].read_text(encoding="utf-8")
    page = Page(text)
    count = [tag for tag, _ in page.tags].count
    figures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(figures) == count("figcaption") == 3
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 40 for attrs in figures)
    assert count("caption") == count("table") > 8
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert count("h1") == 1
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    drawn = text[text.index("<svg") :]
    assert "var(--series-0)" in drawn
    assert "#0072b2" not in drawn


def test_every_section_variant_and_number_is_on_page_and_in_markdown(written):
    record, paths = written
    page = Page(paths["html"].read_text(encoding="utf-8")).text
    markdown = paths["md"].read_text(encoding="utf-8").replace("\\", "")
    wanted = [record["title"], record["summary"], record["command"], "1,437 train", "−0.8 points", "−16.7 %"]
    wanted += ["205 k", "171 k", "28.2 MFLOP", "23.4 MFLOP", "801 KiB", "9.00 MiB", "1.28 ms", "1.24–1.39", "13.9 ms"]
    wanted += ["94.0–98.1", "they overlap", "they are apart", "H(full) = 36.8 bits", FADE]
    wanted += [v["label"] for v in record["variants"]] + [f"{v['top1']:.1f}" for v in record["variants"]]
    wanted += list(record["environment"].values())
    wanted += [text for c in record["checks"] for text in (c["name"], c["value"], c["detail"])]
    wanted += record["not_exercised"] + record["warnings"] + record["selection"]["warnings"]
    wanted += [c["what"] for c in record["next_commands"]] + list(record["files"].values())
    wanted += [f"{row[key]:.2f}".replace("-", "−") for row in record["profile"]["blocks"] for key in ("attn", "mlp")]
    wanted += [formatting.format_bits(s) for r in record["selection"]["rounds"] for s in r["scores"].values()]
    assert [text for text in wanted if text not in page] == []
    assert [text for text in wanted if text not in markdown] == []
    for command in record["next_commands"]:
        assert f"```sh\n{command['command']}\n```" in paths["md"].read_text(encoding="utf-8")


def test_page_and_markdown_follow_one_order(written):
    paths = written[1]
    page = re.findall(r"<h2[^>]*>([^<]+)</h2>", paths["html"].read_text(encoding="utf-8"))
    assert page == re.findall(r"^## (.+)$", paths["md"].read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert page == ["Key numbers", "Entropy by block", "Selection", "Accuracy", "Cost", "Checks",
                    "Kernel path per block", "Environment", "Not exercised", "Warnings", "Next commands",
                    "Files"]  # fmt: skip


HOSTILE = 'a<script>alert("1")</script> & b | c *d* `e` $f$'


def test_hostile_text_stays_text():
    record = made_up()
    record["title"] = record["summary"] = record["variants"][1]["label"] = record["checks"][0]["name"] = HOSTILE
    record["next_commands"][0]["command"] = record["warnings"][0] = HOSTILE
    record["environment"]["device"] = record["profile"]["unit"] = HOSTILE + '" onload="x'
    page = Page(report._render("report.html.j2", record))
    assert page.text.count('<script>alert("1")</script> & b | c') > 6
    assert "script" not in {tag for tag, _ in page.tags}
    assert all("onload" not in attrs for _, attrs in page.tags)
    outside_code = re.sub(r"```.*?```", "", report._render("report.md.j2", record), flags=re.DOTALL)
    assert "<script" not in outside_code
    assert_tables_are_whole(outside_code)


def test_markdown_tables_are_well_formed_and_the_picture_is_named(written):
    text = written[1]["md"].read_text(encoding="utf-8")
    assert assert_tables_are_whole(text) == 10
    assert "](report.png)" in text
    assert "\n\n\n" not in text


def test_a_deep_model_renders_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_report(made_up(32, 10), tmp_path)
    page = Page(paths["html"].read_text(encoding="utf-8")).text
    assert "32 blocks" in page
    assert "10 of 32 attention layers" in page


def test_odd_but_honest_records_render(tmp_path):
    record = made_up(12, 4)
    record["selection"]["signed"] = True
    for one in record["selection"]["rounds"]:
        one["scores"] = {key: value - 20 for key, value in one["scores"].items()}
    record["profile"]["blocks"][4]["attn"] = None
    record["variants"][1] |= {
        "label": "long" * 40,
        "top1_interval": None,
        "top5": None,
        "latency_ms": {},
        "flops": None,
    }
    record["variants"][3] |= {"top1": None, "top1_interval": None, "removed": list(range(0, 12, 2))}
    record["checks"][1]["ok"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_report(record, tmp_path)
    page = Page(paths["html"].read_text(encoding="utf-8")).text
    assert "1 of 3 checks failed" in page
    assert "TE in bits: the drop of the output's entropy below the full model's" in page
    assert "FAILED" in page
    assert "FAILED" in printed(record, 80)


@pytest.mark.parametrize(
    ("section", "heading"),
    [("profile", "Entropy by block"), ("selection", "Selection"), ("variants", "Accuracy"), ("variants", "Key numbers"),
     ("variants", "Cost"), ("checks", "Checks"), ("kernel_paths", "Kernel path per block"),
     ("environment", "Environment"), ("not_exercised", "Not exercised"), ("next_commands", "Next commands"),
     ("files", "Files")],
)  # fmt: skip
def test_absent_section_is_left_out(section, heading):
    record = made_up()
    assert f"## {heading}\n" in report._render("report.md.j2", record)
    del record[section]
    assert f"## {heading}\n" not in report._render("report.md.j2", record)
    assert printed(record, 80)


@pytest.mark.parametrize(
    "record", [{}, {"title": "only a title"}, {"variants": [], "profile": None, "selection": None}]
)
def test_nearly_empty_record_is_still_a_report(tmp_path, record):
    paths = write_report(record, tmp_path)
    Page(paths["html"].read_text(encoding="utf-8"))
    assert paths["png"].stat().st_size > 500
    printed(record, 80)


def test_same_record_same_bytes(written, tmp_path):
    first, second = written[1], write_report(made_up(), tmp_path)
    assert all(first[kind].read_bytes() == second[kind].read_bytes() for kind in first)


@pytest.mark.parametrize(
    ("path", "value", "error", "match"),
    [
        (("variants", 1, "top1"), math.nan, ValueError, r"variants\[1\]\.top1 is nan"),
        (("selection", "rounds", 0, "scores", "2"), math.inf, ValueError, r"selection\.rounds\[0\]\.scores\.2 is inf"),
        (("checks", 0, "value"), {1, 2}, TypeError, r"checks\[0\]\.value is of type set"),
        (("variants", 0, "latency_ms"), {1: {"median": 1.0}}, TypeError, r"variants\[0\]\.latency_ms has the key 1"),
        (("title",), "\ud800", ValueError, "title holds text"),
        (("variants", 2), {"name": "diluted"}, ValueError, r"variants\[2\] has no 'label'"),
        (("profile", "blocks", 0), 3, ValueError, r"profile\.blocks\[0\] must be an object"),
    ],
)
def test_bad_record_is_named_and_writes_nothing(tmp_path, path, value, error, match):
    record: Any = made_up()
    *parents, last = path
    target = record
    for key in parents:
        target = target[key]
    target[last] = value
    with pytest.raises(error, match=match):
        write_report(record, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("call", "allowed"), [("fsync", 0), ("fsync", 3), ("replace", 0), ("replace", 2)])
def test_failure_while_writing_leaves_earlier_files_whole(tmp_path, monkeypatch, call, allowed):
    paths = write_report({"title": "earlier"}, tmp_path)
    before = {kind: path.read_bytes() for kind, path in paths.items()}
    real, calls = getattr(files.os, call), []

    def fails(*args):
        calls.append(args)
        if len(calls) > allowed:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(files.os, call, fails)
    with pytest.raises(OSError, match="No space left"):
        write_report({"title": "later"}, tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths.values())
    changed = [kind for kind, path in paths.items() if path.read_bytes() != before[kind]]
    assert len(changed) == (allowed if call == "replace" else 0)
    later = write_report({"title": "later"}, tmp_path / "whole")
    assert all(paths[kind].read_bytes() == later[kind].read_bytes() for kind in changed)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("blocks", [6, 32])
def test_console_summary_is_not_cut(width, blocks):
    record = made_up(blocks, 3)
    record["variants"][0]["label"] = "Full [bold]model[/bold]"
    text = printed(record, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    flat = " ".join(text.split())
    wanted = [
        "96.4 %",
        "95.6 %",
        "−0.8 points",
        "94.0–98.1",
        "3.1e-06",
        "reload gives the same logits",
        "FLOPs per image",
    ]
    wanted += ["Full [bold]model[/bold]", *record["not_exercised"], *record["warnings"]]
    wanted += [f"{v['top1']:.1f}" for v in record["variants"]]
    wanted += [f"{row['attn']:.2f}".replace("-", "−") for row in record["profile"]["blocks"]]
    wanted += [f"(block {rest})" for rest in re.findall(r"\(block (\d+)\)", report._render("report.md.j2", record))]
    assert [item for item in wanted if item not in flat] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.00"), (2.04, "2.0"), (-0.31, "−0.31"), (79.13, "79.1"), (99.97, "100"), (52_000.0, "52k")],
)
def test_bits_are_short(value, text):
    assert formatting.format_bits(value) == text


@pytest.mark.parametrize(
    ("shown", "text"),
    [(formatting.format_count(86_567_656), "86.6 M"), (formatting.format_count(999_600), "1.00 M"),
     (formatting.format_count(512), "512"), (formatting.format_flops(1.26e9), "1.26 GFLOP"),
     (formatting.format_size(1023 * 1024), "1023 KiB"), (formatting.format_change(200, 174), "−13.0 %"),
     (formatting.format_change(2, 2.0001), "no change"), (formatting.format_change(0, 1), "–"),
     (formatting.format_signed(-1.25, 1), "−1.2"), (formatting.format_signed(0.5, 2), "+0.50"),
     (formatting.format_fixed(-3.14159, 3), "−3.142"), (formatting.format_fixed(None, 1), "–"),
     (formatting.format_ends((78.44, 79.76), 1), "78.4–79.8"), (formatting.format_rate(123_456), "123 k"),
     (formatting.percent_digits(9_999), 1), (formatting.percent_digits(10_000), 2), (formatting.percent_digits(None), 1),
     (formatting.format_differences({"a": 1, "b": 2}, {"a": 1, "c": 3}), "b was 2, is None; c was None, is 3"),
     (formatting.format_ranges([6, 0, 1, 3, 4, 5]), "0, 1, 3–6"), (formatting.format_ranges([]), "none")],
)  # fmt: skip
def test_numbers_for_people(shown, text):
    assert shown == text


def test_comparison_of_two_models_needs_no_other_section():
    record = {"variants": made_up()["variants"][:3:2]}
    record["variants"][0] |= {"name": "reference", "label": "vit_small"}
    record["variants"][1] |= {"name": "model", "label": "smaller/", "images": 50_000}
    text = printed(record, 80)
    assert "vit_small → smaller/" in text
    assert "95.60 %" in text
    del record["variants"][0]
    text = printed(record, 80)
    assert [word for word in ("Parameters", "171 k", "1.06 ms", "95.60") if word not in text] == []


def test_selection_without_rounds_is_still_told():
    record = {"selection": {"layers": [4, 1], "strategy": "random", "rounds": [], "entropy_full": None, "warnings": []}}
    assert "Picked, in this order: 4, 1 · strategy random." in printed(record, 80)
    assert "strategy random" in report._render("report.md.j2", record)
