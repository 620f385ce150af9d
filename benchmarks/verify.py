"""No time is reported of what is wrong: results are held against float64 before a benchmark starts."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

# Of results in a dtype, relative to the 2-norm: of one MLP half and its gradients, as the tests of the operators have it, and
# of the logits of a model of twelve blocks.
OPERATOR = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
MODEL = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def close(what: str, got: Tensor | Iterable[Tensor], expected: Tensor | Iterable[Tensor], tolerance: float) -> None:
    """Fail the benchmark if a result is off by more than `tolerance`, relative to the 2-norm of what it should be."""
    pairs = [(got, expected)] if isinstance(got, Tensor) else zip(got, expected, strict=True)
    for number, (here, true) in enumerate(pairs):
        true = true.detach().double()
        error = float((here.detach().double().to(true.device) - true).norm() / true.norm())
        if not error <= tolerance:
            pytest.fail(
                f"{what}: result {number} is off by {error:.2e}, more than {tolerance:.0e}: no time is reported of what is wrong"
            )


def equal(what: str, got: Tensor, expected: Tensor) -> None:
    """Fail the benchmark unless a result is right to the last bit."""
    if not torch.equal(got.to(expected.device), expected):
        pytest.fail(f"{what} is wrong: no time is reported of it")
