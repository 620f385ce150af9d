"""The dry run on a GPU: its count of a training step lies below the real peak, and not far below."""

from __future__ import annotations

import gc

import pytest
import torch
from small_models import small_vit

from lambda_vit import plan_training
from lambda_vit.training.plan import planning

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_peak_of_a_step():
    model = small_vit(img_size=112, patch_size=16, embed_dim=192)
    plan = plan_training(model, (0, 2), images=1000, batch_size=64, seconds=1.0, device="cuda")
    assert next(model.parameters()).device.type == "cpu"
    for planned in plan.networks.values():
        # The allocator rounds up, and gradients of activations come on top; the count's own share is most of it.
        assert 0.95 * planned.step_bytes <= planned.peak_bytes <= 1.5 * planned.step_bytes
    assert plan.networks["full"].step is None
    assert plan.networks["full"].peak_bytes > plan.networks["final"].peak_bytes
    assert all(plan.networks[name].step.median_ms > 0 for name in ("diluting", "final"))


def test_a_batch_beyond_the_memory():
    model = small_vit()
    per_image = plan_training(model, (0,), images=9, seconds=0.01).networks["diluting"].saved_bytes_per_image
    too_many = 2 * torch.cuda.mem_get_info()[1] // per_image
    # The batch is tried: other tests that run beside this one are to find room all the same, and afterwards too.
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        with pytest.raises(ValueError, match=rf"batch_size={too_many}: .* at most about \d+, and accumulate"):
            plan_training(model, (0,), images=9, batch_size=too_many, seconds=0.01, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()
    assert planning.plan_training(model, (0,), images=9, seconds=0.01, device="cuda").device.startswith("cuda")
