"""Whether a device computes a half-precision dtype slower than float32, as processors without instructions for it do."""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch
from torch import Tensor

from lambda_kernels.ops.checks import dtype_name

from .latency import interleaved_times

_ROUNDS = 7
_MARGIN = 1.5  # a smaller difference does not repay a warning


def slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """Measure how many times slower than in float32 `device` computes a matrix product in `dtype`, forward and backward.

    Takes some milliseconds, and up to a tenth of a second where `dtype` is slow.

    Returns:
        The ratio of the shortest times, which other work on the machine lengthens least; 1.0 for dtypes of full precision,
        and where the difference is small.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return 1.0
    # On other devices than a CPU, a small product only measures how fast operators are started.
    rows, width = (128, 256) if device.type == "cpu" else (2048, 2048)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        calls = {
            name: partial(
                _product,
                torch.ones(rows, width, device=device, dtype=kind, requires_grad=True),
                torch.ones(width, width, device=device, dtype=kind, requires_grad=True),
            )
            for name, kind in (("float32", torch.float32), ("half", dtype))
        }
        text = f"Compare {dtype_name(dtype)} with float32"
        times = interleaved_times(calls, device, text, _ROUNDS, 1, math.inf, math.inf)
    ratio = min(times["half"]) / min(times["float32"])
    return ratio if ratio > _MARGIN else 1.0


def warn_if_slow(dtype: torch.dtype, device: torch.device, remedy: str, *, stacklevel: int) -> None:
    """Warn if `device` computes `dtype` slower than float32; `remedy` says what to do instead.

    `stacklevel` is that of `warnings.warn`, where 1 is the caller of this function.
    """
    factor = slowdown(dtype, device)
    if factor > 1:
        warnings.warn(
            f"{device} computes {dtype_name(dtype)} {factor:.2g} times slower than float32 (a matrix product, forward and "
            f"backward): {remedy}",
            stacklevel=stacklevel + 1,
        )


def _product(left: Tensor, right: Tensor) -> None:
    product = left @ right
    torch.autograd.grad(product, (left, right), torch.ones_like(product))
