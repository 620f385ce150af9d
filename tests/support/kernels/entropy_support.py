"""What the tests of entropy meters share."""

from __future__ import annotations

import torch
from torch import Tensor

from lambda_kernels import EntropyMeter

# Options of every kind of meter.
MODES = {
    "gaussian": {"kind": "gaussian"},
    "dyadic": {"kind": "histogram"},
    "fixed": {"kind": "histogram", "range": (-4.0, 7.5)},
    "codes": {"kind": "histogram", "range": "bfloat16"},
}


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values about 3, channels from narrow to wide."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, shape[-1], base=10, dtype=torch.float64)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + 3).to(dtype)


def assert_same(got: EntropyMeter, wanted: EntropyMeter) -> None:
    """Two meters have seen the same data: counts and grids bit for bit, moments to rounding."""
    one, other = got.state_dict(), wanted.state_dict()
    assert one["options"] == other["options"]
    for name in ("counts", "outside", "grid"):
        if other[name] is None:
            assert one[name] is None
        else:
            assert one[name].dtype == other[name].dtype
            assert torch.equal(one[name], other[name]), name
    exact = [0, 5, 6]  # count, minimum, maximum
    assert torch.equal(one["moments"][:, exact], other["moments"][:, exact])
    largest = other["moments"][:, 5:].abs().amax(1)
    assert ((one["moments"][:, 1] - other["moments"][:, 1]).abs() <= 1e-13 * largest).all()
    entropies = [meter.compute("gaussian") for meter in (got, wanted)]
    torch.testing.assert_close(*entropies, rtol=1e-12, atol=1e-13)
