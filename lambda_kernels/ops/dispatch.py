"""The one predicate that chooses how an operator runs, and can say why.

`choose` is what the operators call and what `explain`-style callers (`model.lambda_kernels_info`, `lambda-vit doctor`)
print, so what is reported cannot drift from what runs. A backend asked for by name never falls back.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from ..errors import BackendUnavailableError
from .checks import check_choice

BACKENDS = ("auto", "triton", "torch")

# Operators for which this version ships a Triton kernel.
TRITON_OPERATORS: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it, in words for people."""

    backend: str
    reason: str


def triton_obstacles(operator: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Everything that keeps `operator` from running as a Triton kernel on `device` with `dtype`; empty when it can."""
    obstacles = []
    if operator not in TRITON_OPERATORS:
        obstacles.append(f"this version ships no Triton kernel for {operator}")
    if importlib.util.find_spec("triton") is None:
        obstacles.append("triton is not installed")
    if device.type != "cuda":
        obstacles.append(f"the tensors are on {device.type}, not on a CUDA device")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        obstacles.append(f"dtype {str(dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16")
    return obstacles


def choose(operator: str, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Choice:
    """Choose the backend of `operator` for tensors on `device` with `dtype`.

    Raises:
        ValueError: `backend` is not one of "auto", "triton", "torch".
        BackendUnavailableError: "triton" was asked for by name and cannot run; every reason is listed.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return Choice("torch", "asked for by name")
    obstacles = triton_obstacles(operator, device, dtype)
    if not obstacles:
        return Choice("triton", "asked for by name" if backend == "triton" else "a fused kernel serves this case")
    if backend == "triton":
        raise BackendUnavailableError(
            f"backend='triton' cannot run {operator}: {'; '.join(obstacles)}. Use backend='auto' or 'torch'"
        )
    return Choice("torch", "; ".join(obstacles))
