"""What the questions of `questions.py` share: how wrong something is, and saying so."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda"

# Widths of DeiT-Tiny, Small and Base.
WIDTHS = (192, 384, 768)

# The largest error of a bfloat16 result relative to the 2-norm, as the tests of the operators have it.
TOLERANCE = 1.2e-2


def capability() -> int:
    """Of the current device: 80, 86, 90 …"""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def multiprocessors() -> int:
    """Of the current device."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Of a result against one in float64, in the 2-norm."""
    return float((got.double() - exact).norm() / exact.norm())


def close(got: Tensor, exact: Tensor, what: str) -> bool:
    """Whether a bfloat16 result is as near as it should be; says so if not."""
    error = relative_error(got, exact)
    return said(error <= TOLERANCE, f"{what}: off by {error:.2e}, more than {TOLERANCE:.1e}")


def said(good: bool, otherwise: str) -> bool:
    """`good`, after `otherwise` was printed where it is not."""
    if not good:
        print(otherwise, file=sys.stderr, flush=True)
    return good


def two_digits(value: float) -> float:
    """As much of an error as is worth keeping."""
    return float(f"{value:.1e}")


def runs(made: object) -> Callable[[int], None]:
    """A version that launches the same, whatever the number of its inputs."""
    return lambda number: made.run()
