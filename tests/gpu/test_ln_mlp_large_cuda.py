"""The fused MLP where offsets pass 2^31: rows of one huge call beside the same rows in a small call with the same tiles.

To be run with the GPU to itself: these tests take most of its memory.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from mlp_cases import NAMES, TOLERANCES, in_float64, problem, relative_error

from lambda_kernels import ln_mlp
from lambda_kernels.ops.ln_mlp import reference, tracing
from lambda_kernels.ops.ln_mlp.fused import tuning

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("poisoned_empty"),
]

DEVICE, DTYPE = "cuda", torch.bfloat16
BEYOND = 1 << 31
SLICE = 512
TOLERANCE = TOLERANCES[DTYPE]

# The same tiles compute a row the same way wherever it lies; the library's products may add in another order, and round
# here and there to the neighbouring value. One wrong row among those compared would be an error of 6e-2.
ROUNDING = 5e-3

# Rows of 384 and 1536 bytes go through descriptors; those of 376 and 1528 bytes are not 16-byte aligned and go through
# pointers.
ONE_PASS = {"forward": "one_pass"}
CORRECTED = {"forward": "staged", "fc1": "corrected", "fc2": "fused"}
NORMALIZED = {"forward": "staged", "fc1": "normalized", "fc2": "fused"}
FORWARD = [
    pytest.param(ONE_PASS, 192, ["one_pass"], id="one pass, descriptors"),
    pytest.param(ONE_PASS, 188, ["one_pass"], id="one pass, pointers"),
    pytest.param(CORRECTED, 768, ["row_statistics", "fc1", "fc2"], id="corrected, descriptors"),
    pytest.param(NORMALIZED, 768, ["layer_norm", "fc1", "fc2"], id="normalized, descriptors"),
    pytest.param(NORMALIZED, 764, ["layer_norm", "fc1", "fc2"], id="normalized, pointers"),
]
BACKWARD = [
    pytest.param(192, "all", "hidden_gradient", 80, id="recomputed, descriptors"),
    pytest.param(188, "all", "hidden_gradient", 80, id="recomputed, pointers"),
    pytest.param(192, "act", "saved_gradient", 110, id="saved, descriptors"),
    pytest.param(192, "all", "library", 80, id="library"),
]


@pytest.fixture(autouse=True)
def memory_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: nothing is measured, there would be no room for it."""
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", "off")
    monkeypatch.setenv("LAMBDA_KERNELS_CACHE", str(tmp_path))
    tuning.clear()
    gc.collect()
    torch.cuda.empty_cache()
    yield
    tuning.clear()
    gc.collect()
    torch.cuda.empty_cache()


def require_memory(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free device memory; there are {free:.0f} GB")


def parameters(channels: int) -> dict:
    args = problem(1, channels, 4 * channels, DTYPE, layer_scale=False, device=DEVICE)
    return {name: t for name, t in args.items() if name != "x"}


def drawn(rows: int, channels: int, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(rows + channels)
    return torch.randn(rows, channels, dtype=DTYPE, device=DEVICE, generator=generator).add_(offset)


def windows(rows: int, *widths: int) -> list[slice]:
    """Both ends, and around the rows where offsets in a matrix of each width pass 2^31 and 2^32 elements."""
    around = [limit // width - SLICE // 2 for width in widths for limit in (BEYOND, 2 * BEYOND)]
    starts = sorted({0, rows - SLICE, *(start for start in around if start < rows - SLICE)})
    return [slice(start, start + SLICE) for start in starts]


def names(ran: list[str]) -> list[str]:
    """What ran, without tiles."""
    return [entry if entry.startswith("library") else entry.split()[0] for entry in ran]


@pytest.mark.parametrize(("forced", "channels", "kernels"), FORWARD)
@torch.no_grad()
def test_forward(forced, channels, kernels):
    require_memory(80)
    hidden, rows = 4 * channels, BEYOND // channels + 4099
    args = {name: None if t is None else t.detach() for name, t in parameters(channels).items()}
    x = drawn(rows, channels, 0.5)

    def call(tokens: torch.Tensor) -> torch.Tensor:
        return ln_mlp(tokens, **args, eps=1e-5, residual_scale=2.0, backend="triton")

    with tuning.forced(**forced):
        with tracing.recorded() as ran:
            out = call(x)
        assert names(ran) == kernels
        compared = windows(rows, channels, hidden)
        assert len(compared) >= 4
        for rows_here in compared:
            tokens = x[rows_here].clone()
            with tracing.recorded() as again:
                small = call(tokens)
            assert again == ran
            assert relative_error(out[rows_here], small.double()) <= ROUNDING, rows_here
            twin = reference.ln_mlp(**in_float64({"x": tokens, **args}), eps=1e-5, residual_scale=2.0)
            assert relative_error(small, twin) <= TOLERANCE, rows_here


@pytest.mark.parametrize(("channels", "recompute", "gradient", "gigabytes"), BACKWARD)
def test_backward(channels, recompute, gradient, gigabytes):
    """The gradient of x by rows; those of the parameters, sums over all rows, as sums over eight parts."""
    require_memory(gigabytes)
    hidden, rows = 4 * channels, BEYOND // channels + 4099
    args = parameters(channels)
    wanted = [name for name in NAMES if name == "x" or args[name] is not None]
    x, grad = drawn(rows, channels, 0.5), drawn(rows, channels)

    def gradients(part: slice) -> dict[str, torch.Tensor]:
        tokens = x[part].detach().requires_grad_()
        out = ln_mlp(tokens, **args, eps=1e-5, residual_scale=2.0, recompute=recompute, backend="triton")
        inputs = [tokens if name == "x" else args[name] for name in wanted]
        return dict(zip(wanted, torch.autograd.grad(out, inputs, grad[part]), strict=True))

    forced = {"saved_gradient": "fused", "hidden_gradient": "library" if gradient == "library" else "fused"}
    first = {"fc1": "corrected"} if recompute == "act" else {"forward": "one_pass"}
    with tuning.forced(**first, fc2="fused", **forced):
        with tracing.recorded() as ran:
            found = gradients(slice(0, rows))
        assert ("library hidden_gradient" in ran) == (gradient == "library")
        for rows_here in windows(rows, channels, hidden):
            small = gradients(rows_here)["x"]
            assert relative_error(found["x"][rows_here], small.double()) <= ROUNDING, rows_here
        del found["x"]
        torch.cuda.empty_cache()
        eighth = -(-rows // 8)
        assert eighth * hidden < BEYOND
        sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in found.items()}
        for start in range(0, rows, eighth):
            for name, t in gradients(slice(start, min(start + eighth, rows))).items():
                if name != "x":
                    sums[name] += t
    for name, total in sums.items():
        assert relative_error(found[name], total) <= TOLERANCE, name
