"""Host time of the MLP half by the kernels, whose launches do nothing: ours against timm's own half, eager.

What Python and PyTorch do until the driver is called decides at batch 1 and for small models. timm's rival makes its calls on
tiny tensors on the CPU, where they compute next to nothing. Results cannot be held against float64, since no kernel runs: the
tests of the operators do that. A CUDA launch itself, some 2 µs each, is in neither: ours makes 1 to 3 in a forward, timm 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from timm.models.vision_transformer import Block

from benchmarks.support.halves import TimmHalf
from lambda_kernels import AttentionFreeBlock
from lambda_kernels.ops.ln_mlp import tracing
from lambda_kernels.ops.ln_mlp.fused import tuning

CHANNELS, TOKENS, CALLS = 16, 2, 20

# Choices, and the launches and library products of a forward by them.
FORWARDS = {
    "one pass": ({"forward": "one_pass"}, ["one_pass"]),
    "corrected": ({"forward": "staged", "fc1": "corrected", "fc2": "fused"}, ["row_statistics", "fc1", "fc2"]),
    "normalized": ({"forward": "staged", "fc1": "normalized", "fc2": "fused"}, ["layer_norm", "fc1", "fc2"]),
}
STEPS = {
    "all": {"forward": "one_pass", "hidden_gradient": "fused"},
    "act": {"forward": "staged", "fc1": "corrected", "fc2": "fused", "saved_gradient": "fused"},
}


@pytest.fixture(autouse=True)
def silent(one_thread: None) -> Iterator[None]:
    """Launches do nothing."""
    pytest.importorskip("triton")
    from benchmarks.support.silent_gpu import silent_gpu

    with silent_gpu():
        yield


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """What a turn times: one call is as short as a clock's own noise."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def halves(**options: object) -> tuple[AttentionFreeBlock, TimmHalf]:
    """Ours and timm's, of the same parameters."""
    block = Block(CHANNELS, 1).bfloat16()
    return AttentionFreeBlock.from_block(block, backend="triton", **options), TimmHalf(block)


@pytest.mark.benchmark(group="host time")
@pytest.mark.parametrize("way", FORWARDS)
def test_forward(against, way):
    ours, timm = halves()
    x = torch.randn(1, TOKENS, CHANNELS, dtype=torch.bfloat16)
    choices, launches = FORWARDS[way]
    with torch.no_grad(), tuning.forced(**choices):
        with tracing.recorded() as ran:
            ours(x)
        assert [entry.split()[0] for entry in ran] == launches
        against(
            {"ours": repeated(lambda: ours(x))},
            {"timm": repeated(lambda: timm(x))},
            what=f"host time, forward, {way}",
            rounds=400,
        )


@pytest.mark.benchmark(group="host time")
@pytest.mark.parametrize("recompute", STEPS)
def test_forward_and_backward(against, recompute):
    ours, timm = halves(recompute=recompute)
    x = torch.randn(1, TOKENS, CHANNELS, dtype=torch.bfloat16, requires_grad=True)
    grad, tensors = torch.randn_like(x), [x, *timm.parameters()]

    def step(module: torch.nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(module(x), tensors, grad)

    with tuning.forced(**STEPS[recompute]):
        with tracing.recorded() as ran:
            step(ours)()
        assert any(entry.startswith(("hidden_gradient", "saved_gradient")) for entry in ran)
        against(
            {"ours": repeated(step(ours))},
            {"timm": repeated(step(timm))},
            what=f"host time, forward and backward, recompute={recompute}",
            rounds=200,
        )


@pytest.mark.benchmark(group="host time")
def test_forward_by_pytorch(against):
    """The CPU's path by PyTorch's operators, which are the same as timm's."""
    block = Block(CHANNELS, 1).eval()
    ours, timm = AttentionFreeBlock.from_block(block, backend="torch"), TimmHalf(block)
    x = torch.randn(1, TOKENS, CHANNELS)
    with torch.inference_mode():
        assert torch.equal(ours(x), timm(x))
        against(
            {"ours": repeated(lambda: ours(x))},
            {"timm": repeated(lambda: timm(x))},
            what="host time, forward by PyTorch's operators",
            rounds=400,
        )
