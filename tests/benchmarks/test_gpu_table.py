"""The table that `benchmarks/gpu/run.py` prints, and what it reads from the outputs of pytest and compute-sanitizer."""

from __future__ import annotations

import pytest

from benchmarks.gpu import summary as table


@pytest.mark.parametrize(
    ("target", "plain", "graph", "expected"),
    [
        (None, 1.5, 1.5, ""),
        (1.2, 1.2, 1.3, "yes"),
        (1.2, 1.1, 1.3, "graph only"),
        (1.2, 1.3, 1.1, "plain only"),
        (1.2, 1.1, 1.0, "no"),
        (1.2, None, 1.3, "yes"),
        (1.2, None, None, "not measured"),
    ],
)
def test_verdict(target, plain, graph, expected):
    assert table.verdict(target, graph=graph, plain=plain) == expected


ROW = {
    "name": "test_forward[T]",
    "what": "forward T, batch 256",
    "ratios": [
        {"ours": "ours", "rival": "timm", "plain": 2.01, "graph": 2.345, "target": 1.7},
        {"ours": "ours", "rival": "max-autotune", "plain": 1.1, "graph": 1.3, "target": 1.2},
    ],
    "plain_us": {"ours": 51.0, "ours, again": 52.0, "timm": 102.5, "max-autotune": 56.1},
    "graph_us": {"ours": 42.0, "ours, again": 42.1, "timm": 98.5, "max-autotune": 54.6},
    "spread": {"plain": 0.0196, "graph": 0.0024},
    "over_floor": 1.12,
    "not_built": {"torch.compile": "Unsupported: something"},
    "not_captured": {},
    "ran": ["one_pass 128x128 w8 s1", "one_pass 128x128 w8 s1"],
}


def test_rows_of_the_table():
    header = table._line(table.HEADER)
    first, second, missing, ran = table.row_lines(ROW)
    assert " ".join(first.split()) == "forward T, batch 256 ours timm 2.35 2.01 0.2% 42.0 1.12 1.70 yes"
    assert " ".join(second.split()) == "ours max-autotune 1.30 1.10 0.2% 42.0 1.12 1.20 graph only"
    for line, value, column in ((first, "2.01", "plain"), (first, "42.0", "µs"), (second, "graph only", "reached")):
        assert line.index(value) == header.index(column)
    assert "torch.compile: Unsupported" in missing
    assert ran.count("one_pass") == 1
    title, missing, _ = table.row_lines({**ROW, "ratios": []})
    assert title == "forward T, batch 256"
    assert "torch.compile: Unsupported" in missing


def test_rows_of_other_kinds():
    (host,) = table.row_lines({"name": "x", "what": "host time staged", "host_us": 61.234})
    assert host.split() == ["host", "time", "staged", "61.23"]
    assert table.row_lines({"name": "test_of_something", "median_us": 14400.04}) == ["test_of_something"]


def test_the_report_fits_and_keeps_its_beginning():
    rows = [{**ROW, "what": f"row {i}"} for i in range(200)]
    part = {"state": "failed", "seconds": 12.0, "rows": rows, "failures": [f"FAILED test_{i}" for i in range(100)]}
    printed = table.report({"environment": {"gpu": "a GPU", "commit": "unknown"}, "parts": {"mlp": part}})
    assert len(printed) <= table.LIMIT
    assert printed.startswith("gpu: a GPU\ncommit: unknown\nTHE COMMIT IS UNKNOWN: name it with --commit")
    assert "\nmlp        failed" in printed
    # What says something about kernels comes first, and is said to.
    assert printed.index("graph: time of the GPU alone") < printed.index(" graph ") < printed.index(" plain ")
    assert "UNKNOWN" not in table.report({"environment": {"commit": "abc"}, "parts": {}})
    assert "… and 75 more" in printed
    assert "row 1 " in printed
    assert printed.endswith("results.json has all of it")


def test_what_pytest_said():
    output = "..F\nFAILED tests/a.py::b - assert 1\nERROR tests/c.py\n1 failed, 40 passed, 2 skipped in 12.34s\n"
    assert table.pytest_summary(output) == "1 failed, 40 passed, 2 skipped in 12.34s"
    assert table.pytest_summary("== 3 passed in 61.20s (0:01:01) ==") == "3 passed in 61.20s (0:01:01)"
    assert table.pytest_summary("Traceback") == "no summary"
    assert (
        table.pytest_summary("....F [ 10%]\n..sE\nstuck")
        == "6 passed, 1 failed, 1 errors, 1 skipped until it was killed"
    )
    assert table.pytest_failures(output) == ["FAILED tests/a.py::b - assert 1", "ERROR tests/c.py"]


def test_what_a_case_said():
    assert table.case_verdict(0, "fc1: 2 results, all right") == "clean"
    assert table.case_verdict(3, "a warning\nfc1: 2 results, wrong: {}\n") == "status 3: fc1: 2 results, wrong: {}"
    assert table.case_verdict(-11, "") == "status -11: "
    assert table.case_verdict(None, "") == "stopped at its limit"


@pytest.mark.parametrize(
    ("status", "output", "kernel", "expected"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "fc1", "clean"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "fc1", "clean"),
        (1, "========= Invalid __global__ read of size 2 bytes\n", "fc1", "Invalid __global__ read of size 2 bytes"),
        (1, "========= Error: Race reported between Write access", "fc1", "Error: Race reported between Write access"),
        (
            0,
            "========= Warning: Race reported between Read access\n========= RACECHECK SUMMARY: 1 hazard displayed",
            "fc1",
            "Warning: Race reported between Read access",
        ),
        (0, "========= Error: No attachable process found", "fc1", "Error: No attachable process found"),
        (
            0,
            "========= Internal Sanitizer Error: x\n========= ERROR SUMMARY: 0 errors",
            "fc1",
            "Internal Sanitizer Error: x",
        ),
        (0, "fc1: 2 results, all right", "fc1", "no summary: nothing was watched"),
        (0, "", "fc1", "no summary: nothing was watched"),
        (3, "one_pass: 2 results, wrong: {}", "fc1", "status 3: one_pass: 2 results, wrong: {}"),
        (None, "", "fc1", "stopped at its limit"),
        (1, "========= Invalid __global__ write of size 4 bytes\n", "planted", "clean"),
        (0, "========= ERROR SUMMARY: 0 errors", "planted", "the planted fault was not found"),
        (1, "========= Error: Race reported between Write access at racing\n", "planted_race", "clean"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed", "planted_race", "the planted fault was not found"),
    ],
)
def test_what_the_sanitizer_said(status, output, kernel, expected):
    assert table.sanitizer_verdict(status, output, kernel) == expected
