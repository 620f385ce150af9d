"""The MLP half of a block on a CPU: ours against timm's own, as it is and compiled, forward and with its gradients.

The path by PyTorch's operators makes the same calls in the same order as timm: against timm as it is, 1.0 is expected. Where no
gradient is asked for it stands beside oneDNN's products; in the subset, whose time is short, it stands alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from benchmarks.support import verify
from benchmarks.support.halves import MODES, WIDTHS, TimmHalf, compiled, cpu_backends
from lambda_kernels import AttentionFreeBlock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = {"T": 8, "S": 4, "B": 2}
QUICK_BATCH = 2

forward_only = pytest.mark.benchmark(group="MLP forward")
with_gradients = pytest.mark.benchmark(group="MLP forward+backward")
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def chosen(*quick: str) -> pytest.MarkDecorator:
    """All widths, of which some belong to the subset."""
    return pytest.mark.parametrize(
        "width", [pytest.param(width, marks=pytest.mark.quick) if width in quick else width for width in WIDTHS]
    )


class Halves:
    """timm's half and ours on the same parameters."""

    def __init__(self, width: str, dtype: str, *, gradients: bool, quick: bool) -> None:
        torch._dynamo.reset()  # rivals are compiled for this size alone
        torch.manual_seed(0)
        self.width, self.dtype, self.gradients = width, dtype, gradients
        self.batch = QUICK_BATCH if quick else BATCHES[width]
        self.block = Block(WIDTHS[width], 3).to(DTYPES[dtype])
        self.timm = TimmHalf(self.block)
        self.parameters = list(self.timm.parameters())
        self.x, self.grad = torch.randn(2, self.batch, 197, WIDTHS[width]).to(DTYPES[dtype]).unbind()
        self.x = self.x.clone().requires_grad_(gradients)
        self.missing: dict[str, str] = {}

    def ours(self, backend: str = "torch", **options: object) -> Callable[[], list[Tensor]]:
        """Our version by one backend, after its results were held against float64."""
        version = self.version(AttentionFreeBlock.from_block(self.block, backend=backend, **options))
        expected = self.version(copy.deepcopy(self.timm).double(), torch.float64)()
        tolerance, timm = verify.OPERATOR[DTYPES[self.dtype]], self.version(self.timm)()
        verify.close(f"ours, {self.width} {self.dtype}", version(), expected, tolerance, beside=timm)
        return version

    def version(self, module: Callable, dtype: torch.dtype | None = None) -> Callable[[], list[Tensor]]:
        """A forward of `module`, with its gradients where they are wanted."""
        x, grad = self.x, self.grad
        parameters = self.parameters
        if dtype is not None:
            x, grad, parameters = (
                x.detach().to(dtype).requires_grad_(self.gradients),
                grad.to(dtype),
                list(module.parameters()),
            )

        def forward() -> list[Tensor]:
            with torch.inference_mode():
                return [module(x)]

        def step() -> list[Tensor]:
            out = module(x)
            return [out, *torch.autograd.grad(out, [x, *parameters], grad)]

        return step if self.gradients else forward

    def rivals(self, modes: dict[str, str]) -> dict[str, Callable]:
        """timm's half compiled in these modes; skips the benchmark where none can be."""
        found = {}
        for name, mode in modes.items():
            found |= compiled(name, mode, self.timm, self.version, self.missing)
        if not found:
            pytest.skip("; ".join(f"{name}: {reason}" for name, reason in self.missing.items()))
        return found

    def what(self) -> str:
        """The row's name in words."""
        kind = "forward + backward" if self.gradients else "forward"
        return f"MLP {kind} {self.width}, batch {self.batch}, {self.dtype}"


@forward_only
@dtypes
@chosen("T", "S")
def test_forward(against, quick, width, dtype):
    halves = Halves(width, dtype, gradients=False, quick=quick)
    backends = ("torch",) if quick else cpu_backends(DTYPES[dtype], halves.missing)
    ours = {backend: halves.ours(backend) for backend in backends}
    against(ours, {"timm": halves.version(halves.timm)}, what=halves.what(), missing=halves.missing)


@with_gradients
@dtypes
@chosen("T")
def test_forward_and_backward(against, quick, width, dtype):
    """Nothing computed again, as timm; and the two ways that keep less."""
    halves = Halves(width, dtype, gradients=True, quick=quick)
    levels = {"torch": "none", "recompute=act": "act", "recompute=all": "all"}
    ours = {name: halves.ours(recompute=level) for name, level in levels.items()}
    against(ours, {"timm": halves.version(halves.timm)}, what=halves.what())


@forward_only
@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_against_compiled(against, quick, width, dtype):
    halves = Halves(width, dtype, gradients=False, quick=quick)
    rivals = halves.rivals(MODES)
    ours = {backend: halves.ours(backend) for backend in cpu_backends(DTYPES[dtype], halves.missing)}
    against(ours, rivals, what=halves.what(), missing=halves.missing)


@with_gradients
@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_backward_against_compiled(against, quick, width, dtype):
    halves = Halves(width, dtype, gradients=True, quick=quick)
    default = {"torch.compile": MODES["torch.compile"]}
    against(
        {"torch": halves.ours(recompute="none")}, halves.rivals(default), what=halves.what(), missing=halves.missing
    )
