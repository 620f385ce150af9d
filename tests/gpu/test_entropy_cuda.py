"""`EntropyMeter` on a CUDA device, where the host never waits for values: what it finds is what it finds on a CPU."""

from __future__ import annotations

import pytest
import torch

from lambda_kernels import EntropyMeter, NonFiniteActivationError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PER = ("channel", "layer", "sample")
MODES = {
    "gaussian": {"kind": "gaussian"},
    "dyadic": {"kind": "histogram", "bins": 64},
    "fixed": {"kind": "histogram", "bins": 64, "range": (-3.0, 3.0)},
    "bfloat16": {"kind": "histogram", "range": "bfloat16"},
}


@pytest.mark.filterwarnings("ignore")  # of values outside the fixed edges
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("mode", MODES)
def test_as_on_a_cpu(mode: str, per: str) -> None:
    """The range grows from batch to batch, so that dyadic grids are counted anew."""
    here, there = (EntropyMeter(**MODES[mode], per=per) for _ in range(2))
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(9, 197, 48, generator=generator) * 3**seed).bfloat16()
        here.update(x)
        there.update(x.cuda())
    there.check()
    assert (there.count, there.channels) == (here.count, here.channels)
    if here.kind == "histogram":
        (a, grid_a), (b, grid_b) = here.counts(), there.counts()
        assert torch.equal(a, b.cpu())
        if hasattr(grid_a, "packed"):
            torch.testing.assert_close(grid_b.packed().cpu(), grid_a.packed(), rtol=0, atol=0, equal_nan=True)
    for kind in {here.kind, "gaussian"}:
        torch.testing.assert_close(there.compute(kind=kind).cpu(), here.compute(kind=kind), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_is_noticed_at_the_latest_by_check(mode: str) -> None:
    meter = EntropyMeter(**MODES[mode])
    x = torch.randn(64, 48, device="cuda").bfloat16()
    meter.update(x)
    x[3, 7] = float("nan")
    with pytest.raises(NonFiniteActivationError):
        meter.update(x).check()
