"""A warning before work starts in a dtype that the device computes slower than float32."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch
from selection_support import labelled
from small_models import small_vit
from training_support import plain, trainer

import lambda_vit
from lambda_vit.measure import dtype_speed
from lambda_vit.training.plan.planning import plan_training

CPU = torch.device("cpu")


@pytest.mark.parametrize(("half", "expected"), [([15, 14, 90], 14.0), ([1.5, 1.4, 9.0], 1.0), ([3.0, 1.1, 4.0], 1.0)])
def test_only_a_clear_difference_of_undisturbed_times_counts(monkeypatch, half, expected):
    times = {"float32": [40.0, 1.0, 1.1], "half": half}
    monkeypatch.setattr(dtype_speed, "interleaved_times", lambda *_: times)
    assert dtype_speed.slowdown(torch.bfloat16, CPU) == dtype_speed.slowdown(torch.float16, CPU) == expected
    assert dtype_speed.slowdown(torch.float32, CPU) == dtype_speed.slowdown(torch.float64, CPU) == 1.0


def test_it_is_measured_wherever_the_caller_is_and_draws_nothing():
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert dtype_speed.slowdown(torch.bfloat16, CPU) >= 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="oneDNN can be limited to AVX2 on x86-64 only",
)
def test_a_processor_without_bfloat16_is_found_out():
    program = (
        "import torch; from lambda_vit.measure.dtype_speed import slowdown; "
        "print(slowdown(torch.bfloat16, torch.device('cpu')))"
    )
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", program], env=limited, capture_output=True, text=True, check=True)
    assert float(found.stdout) > 2


@pytest.fixture
def slow(monkeypatch):
    """A device that computes half-precision dtypes 14 times slower."""
    half = (torch.bfloat16, torch.float16)
    monkeypatch.setattr(dtype_speed, "slowdown", lambda dtype, device: 14.0 if dtype in half else 1.0)


@pytest.mark.parametrize(("amp", "name"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_training_warns_of_a_slow_amp(slow, amp, name):
    message = rf"cpu computes {name} 14 times slower than float32 .*: omit --amp \(amp='none' in Python\)"
    with pytest.warns(UserWarning, match=message):
        trainer(plain(amp=amp))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(plain())


def test_finetune_plan_and_select_warn_of_a_slow_model(slow):
    batches = labelled(8, 4)
    halves = [(x.bfloat16(), y) for x, y in batches]
    model = small_vit(depth=3).bfloat16()
    plan = {"images": 8, "dilution_epochs": 1, "recovery_epochs": 0, "batch_size": 2, "seconds": 0.01}
    for work in (
        lambda: lambda_vit.finetune(model, halves, epochs=1),
        lambda: lambda_vit.select_layers(model, halves, count=1),
        lambda: plan_training(model, (1,), **plan),
    ):
        with pytest.warns(UserWarning, match=r"bfloat16 14 times .*: cast the model with model\.float\(\)") as found:
            work()
        assert {str(w.filename) for w in found if "14 times" in str(w.message)} == {__file__}
