"""The kernels' forms of GELU and its slope against float64: the documented errors hold over the whole range."""

from __future__ import annotations

import pytest
import torch
from mlp_cases import DEVICE

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from lambda_kernels.ops.ln_mlp.fused.kernels.common import gelu, gelu_and_slope  # noqa: E402
from lambda_kernels.ops.ln_mlp.fused.launch import Arithmetic  # noqa: E402


@triton.jit
def apply(x, value, again, slope, N, B: tl.constexpr, FORM: tl.constexpr, UNIT: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    p = tl.load(x + i, mask=i < N, other=0.0)
    tl.store(value + i, gelu(p, FORM, UNIT), mask=i < N)
    a, s = gelu_and_slope(p, FORM, UNIT)
    tl.store(again + i, a, mask=i < N)
    tl.store(slope + i, s, mask=i < N)


def evaluate(x: torch.Tensor, form: str, unit: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU twice (as the forward and as the backward compute it) and its slope, float64 on the CPU."""
    x = x.float().to(DEVICE)
    results = [torch.empty_like(x) for _ in range(3)]
    apply[(triton.cdiv(x.numel(), 4096),)](x, *results, x.numel(), 4096, form, unit)
    return tuple(r.cpu().double() for r in results)


@pytest.fixture(scope="module")
def points() -> torch.Tensor:
    near = torch.linspace(-9, 9, 60_001, dtype=torch.float64)
    far = torch.tensor([-1e10, -1e3, -30.0, -12.0, -11.13, 11.13, 12.0, 30.0, 1e3, 1e10])
    return torch.cat((near, far.double())).float().double()


# (form, PyTorch's name, error of the value, error of the slope), absolute up to |x| = 9, relative beyond
FORMS = [("erf", "none", 6e-7, 1e-6), ("tanh", "tanh", 1e-6, 2e-6), ("quintic", "none", 3.3e-5, 9e-5)]


@pytest.mark.parametrize(("form", "name", "error", "slope_error"), FORMS)
def test_plain_arithmetic(points, form, name, error, slope_error):
    x = points.clone().requires_grad_()
    expected = torch.nn.functional.gelu(x, approximate=name)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    for value in evaluate(points, form, "plain")[:2]:
        assert ((value - expected.detach()).abs() / points.abs().clamp_min(9) * 9).max() < error
    assert (evaluate(points, form, "plain")[2] - slope).abs().max() < slope_error


def test_the_quintic_is_closer_to_erf_than_the_usual_tanh_form(points):
    exact = torch.nn.functional.gelu(points)
    usual = (torch.nn.functional.gelu(points, approximate="tanh") - exact).abs().max()
    ours = (evaluate(points[:60_001], "quintic", "plain")[0] - exact[:60_001]).abs().max()
    assert ours * 10 < usual


def test_negative_tail_keeps_its_digits(points):
    """By the logistic form: 0.5·x·(1 + tanh) would cancel."""
    x = points[(points > -8) & (points < -5)]
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    u = 0.7978845608 * (x + 0.044715 * x**3)
    expected = x * torch.sigmoid(2 * u)
    value = evaluate(x, "tanh", "plain")[0]
    assert ((value - expected) / expected).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["erf", "tanh", "quintic"])
def test_infinities_and_nan(form):
    value = evaluate(torch.tensor([float("inf"), float("nan"), 0.0, -0.0]), form, "plain")[0]
    assert value[0] == float("inf")
    assert value[1].isnan()
    assert not value[2:].any()


@pytest.mark.parametrize(
    ("dtype", "approximate", "form"),
    [
        (torch.float32, "none", "erf"),
        (torch.float16, "none", "quintic"),
        (torch.bfloat16, "none", "quintic"),
        (torch.float32, "tanh", "tanh"),
        (torch.bfloat16, "tanh", "tanh"),
    ],
)
def test_which_form_a_dtype_gets(dtype, approximate, form):
    assert Arithmetic.of(dtype, approximate).form == form


@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter has no inline assembly")
@pytest.mark.parametrize(("unit", "error"), [("tanh", 2**-11), ("rcp", 3.4e-5)])
def test_device_instructions(points, unit, error):
    x = points[:60_001]
    exact = torch.nn.functional.gelu(x)
    for value in evaluate(x, "quintic", unit)[:2]:
        assert ((value - exact).abs() / x.abs().clamp_min(1)).max() < error
