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


def close(
    what: str,
    got: Tensor | Iterable[Tensor],
    expected: Tensor | Iterable[Tensor],
    tolerance: float,
    beside: Iterable[Tensor] | None = None,
) -> None:
    """Fail the benchmark if a result is off by too much, relative to the 2-norm of what it should be.

    Args:
        what: What is held, for the message.
        got: One result, or several.
        expected: What they should be, in float64.
        tolerance: By how much each may be off.
        beside: The same results of the rival in the same dtype. Where it is off by more than `tolerance`, ours may be off
            by half as much again: sums over many tokens in bfloat16 are that far off by whoever takes them.
    """
    single = isinstance(got, Tensor)
    pairs = [(got, expected)] if single else list(zip(got, expected, strict=True))
    others = [None] * len(pairs) if beside is None else list(beside)
    for number, ((here, true), other) in enumerate(zip(pairs, others, strict=True)):
        allowed = tolerance if other is None else max(tolerance, 1.5 * _error(other, true))
        error = _error(here, true)
        if not error <= allowed:
            which = what if single else f"{what}, result {number}"
            pytest.fail(f"{which}: off by {error:.2e}, more than {allowed:.1e}: no time is reported of what is wrong")


def _error(got: Tensor, expected: Tensor) -> float:
    true = expected.detach().double()
    return float((got.detach().double().to(true.device) - true).norm() / true.norm())


def equal(what: str, got: Tensor, expected: Tensor) -> None:
    """Fail the benchmark unless a result is right to the last bit."""
    if not torch.equal(got.to(expected.device), expected):
        pytest.fail(f"{what} is wrong: no time is reported of it")
