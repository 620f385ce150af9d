"""Launches, as far as they go without a GPU: see launch_checks.py. The interpreter bypasses all of this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch_setup import interpreter_obstacle

pytest.importorskip("triton")

from lambda_kernels.ops.ln_mlp.fused import launch

CHECKS = (
    "check_what_runs_is_what_the_audit_compiles",
    "check_the_short_way_hands_over_the_same",
    "check_what_makes_another_kernel_and_what_does_not",
    "check_plans_hand_over_what_calls_without_them_do",
    "check_plans_follow_settings_of_the_process",
    "check_threads_share_plans_and_no_tensors",
)


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("launch_checks.py"))],
        capture_output=True,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_check(check, results):
    assert set(results) == set(CHECKS)
    assert results[check] is None, results[check]


CHUNKS = {1: (16, 1), 48: (16, 3), 64: (64, 1), 96: (32, 3), 100: (128, 1), 192: (64, 3), 256: (256, 1), 320: (128, 3)}


@pytest.mark.parametrize(("channels", "expected"), CHUNKS.items())
def test_chunks_waste_as_little_as_they_can(channels, expected):
    assert launch.split_columns(channels) == expected


@pytest.mark.parametrize(
    ("matrix", "fits"),
    [
        (torch.empty(4, 8, dtype=torch.float16), True),
        (torch.empty(4, 4), True),
        (torch.empty(4, 6), False),  # rows of 24 bytes
        (torch.empty(4, 16, dtype=torch.float16)[:, 1:9], False),  # starts at an odd address
        (torch.empty(8, 4).T, False),
        (torch.empty(4, 16, dtype=torch.float16)[:, 8:], True),
        (torch.empty(4, 2), False),
        (None, True),
    ],
)
def test_what_a_descriptor_can_address(matrix, fits):
    assert launch.is_describable(matrix) == fits


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "fits"),
    [
        ("3.6.0", "2.4.6", False),
        ("3.6.0", "2.10.0", False),
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "1.24.4", True),
        ("3.7.1", "2.5.5", True),
        ("3.10.0", "2.5.5", True),
    ],
)
def test_the_interpreter_and_numpy(triton_version, numpy_version, fits):
    found = interpreter_obstacle(triton_version, numpy_version)
    assert (found == "") == fits
    assert fits or f"Triton {triton_version}'s interpreter does not work with NumPy {numpy_version}" in found
