"""Problems, float64 twins and tolerances for the tests of the fused MLP, with and without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")  # for whoever imports this

from lambda_kernels import ln_mlp
from lambda_kernels.ops.ln_mlp import reference, tracing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU means Triton's interpreter: see torch_setup.py

# Relative error in the 2-norm against float64. One rounding of a dtype is half its unit: 6e-8, 5e-4, 4e-3; float32 sums of a
# few hundred terms take a few of them, and 16-bit dtypes round LayerNorm's output, GELU's and the result once each, a
# gradient also dO, dA and dP.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}

NAMES = ("x", "ln_weight", "ln_bias", "w1", "b1", "w2", "b2", "layer_scale")


def problem(
    tokens: int | tuple[int, ...],
    channels: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    *,
    layer_scale: bool = True,
    device: str = DEVICE,
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Arguments of `ln_mlp`, all of them leaves that want a gradient, with values that none can be left out of unseen."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        value = offset + scale * torch.randn(*size, generator=generator, dtype=torch.float64)
        return value.to(dtype).to(device).requires_grad_()

    leading = tokens if isinstance(tokens, tuple) else (tokens,)
    return {
        "x": draw(*leading, channels, offset=0.5),
        "ln_weight": draw(channels, scale=0.3, offset=1.0),
        "ln_bias": draw(channels, scale=0.3),
        "w1": draw(hidden, channels, scale=channels**-0.5),
        "b1": draw(hidden, scale=0.5),
        "w2": draw(channels, hidden, scale=hidden**-0.5),
        "b2": draw(channels, scale=0.5),
        "layer_scale": draw(channels, scale=0.3, offset=0.8) if layer_scale else None,
    }


def in_float64(args: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """The same values as float64 leaves, wanting a gradient where the original does."""
    return {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for name, t in args.items()
    }


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖, NaN and Inf where they are in `got`."""
    return float((got.double() - expected).norm() / expected.norm())


def errors(
    args: dict[str, torch.Tensor | None], *, approximate: str = "none", backend: str = "triton", **options: object
) -> dict[str, float]:
    """Relative errors of the output and of every wanted gradient against the float64 twin."""
    options = {"eps": 1e-5, **options}
    with tracing.recorded() as ran:
        out = ln_mlp(**args, approximate=approximate, backend=backend, **options)
    assert ran  # a kernel, or a library product between kernels: never the twin
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    twins = in_float64(args)
    twin_options = {k: options[k] for k in ("eps", "residual_scale") if k in options}
    if options.get("branch_scale") is not None:
        twin_options["branch_scale"] = options["branch_scale"].double()
    expected = reference.ln_mlp(**twins, approximate=approximate, **twin_options)
    found = {"out": relative_error(out.detach(), expected.detach())}
    wanted = [name for name, t in args.items() if t is not None and t.requires_grad]
    if wanted:
        got = torch.autograd.grad(out, [args[name] for name in wanted], grad)
        true = torch.autograd.grad(expected, [twins[name] for name in wanted], grad.double())
        for name, g, t in zip(wanted, got, true, strict=True):
            assert g.dtype == args[name].dtype, name
            assert g.shape == args[name].shape, name
            found[name] = relative_error(g, t)
    return found


def assert_close(found: dict[str, float], dtype: torch.dtype) -> None:
    """Fail with the worst of `found` unless all are within the dtype's tolerance (NaN is not)."""
    wrong = {name: error for name, error in found.items() if not error <= TOLERANCES[dtype]}
    assert not wrong, f"beyond {TOLERANCES[dtype]} for {dtype}: {wrong}"
