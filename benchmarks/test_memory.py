"""Memory of training twelve attention-free blocks: ours with `recompute` against timm's own half of a block.

Three figures: bytes that autograd keeps from the forward to the backward; the most that is allocated at once in a step, by the
allocator's own record; and by how much a process of its own grows. The time of one block is beside them.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm.models.vision_transformer
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # this file is run by its path

from benchmarks.support import verify
from benchmarks.support.halves import TimmHalf
from benchmarks.support.peaks import peak_bytes
from benchmarks.tools import targets
from lambda_kernels import AttentionFreeBlock
from lambda_vit.training.plan.step_timing import saved_bytes

WIDTHS = {"T": 192, "B": 768}
BATCHES = {"cpu": {"T": 32, "B": 16}, "cuda": {"T": 256, "B": 256}}
DEPTH, TOKENS = 12, 197
LEVELS = ("act", "all")

memory = pytest.mark.benchmark(group="memory")
with_gradients = pytest.mark.benchmark(group="MLP forward+backward")
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


class Training:
    """Blocks of timm's ("timm") or of ours with `recompute`, on the same parameters, and a batch for them."""

    def __init__(self, width: str, place: str, depth: int = DEPTH, batch: int | None = None) -> None:
        torch.manual_seed(0)
        self.channels = WIDTHS[width]
        dtype = torch.float32 if place == "cpu" else torch.bfloat16
        blocks = [timm.models.vision_transformer.Block(self.channels, 3).to(place, dtype) for _ in range(depth)]
        self.networks = {"timm": nn.Sequential(*map(TimmHalf, blocks))}
        for level in ("none", *LEVELS):
            self.networks[level] = nn.Sequential(*(AttentionFreeBlock.from_block(b, recompute=level) for b in blocks))
        for parameter in self.networks["timm"].parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.batch = batch or BATCHES[place][width]
        shape = (self.batch, TOKENS, self.channels)
        self.x = torch.randn(shape, device=place, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(shape, device=place, dtype=dtype)

    def step(self, name: str) -> None:
        """Forward and backward; gradients are added to those that are there."""
        self.networks[name](self.x).backward(self.grad)

    def hold(self, name: str) -> None:
        """The result and the gradients of one image, held against those of timm's blocks in float64."""
        exact = copy.deepcopy(self.networks["timm"]).double()

        def results(network: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
            x = self.x.detach()[:1].to(dtype).requires_grad_()
            out = network(x)
            return [out, *torch.autograd.grad(out, [x, *exact_order(network)], self.grad[:1].to(dtype))]

        def exact_order(network: nn.Module) -> list[nn.Parameter]:
            return [dict(network.named_parameters())[key] for key, _ in exact.named_parameters()]

        got = results(self.networks[name], self.x.dtype)
        timm = results(self.networks["timm"], self.x.dtype)
        verify.close(name, got, results(exact, torch.float64), verify.MODEL[self.x.dtype], beside=timm)

    def saved(self, name: str) -> int:
        """Bytes that autograd keeps, the batch and the little that a loss takes included."""
        return saved_bytes(Flat(self.networks[name]), self.x)

    def peak(self, name: str) -> int:
        """Bytes allocated at once at the worst moment of a step, above what was there before it."""
        return peak_bytes(lambda: self.step(name), cuda=self.x.is_cuda)


class Flat(nn.Module):
    """One number per class for each image, as a loss wants them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)[:, 0]


def grown(width: str, name: str) -> int:
    """Bytes by which the resident memory of a process of its own grows in its first whole step, on the CPU."""
    command = [sys.executable, str(Path(__file__).resolve()), width, name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure_growth(width: str, name: str) -> None:
    training = Training(width, "cpu")
    whole, grad = training.x, training.grad
    training.x, training.grad = whole.detach()[:1].requires_grad_(), grad[:1]
    training.step(name)  # libraries are loaded, and have their workspaces
    training.x, training.grad = whole, grad
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    before = _resident("VmRSS")
    training.step(name)
    print(_resident("VmHWM") - before)


def _resident(kind: str) -> int:
    """Bytes of this process's memory, "VmRSS" now or "VmHWM" at most. Not by getrusage, which knows the parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


@memory
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("recompute", LEVELS)
def test_memory(benchmark, request, place, width, recompute):
    training = Training(width, place)
    training.hold(recompute)
    saved = {name: training.saved(name) for name in ("timm", recompute)}
    peak = {name: training.peak(name) for name in ("timm", recompute)}
    found = {"saved": saved, "at once": peak}
    if place == "cpu" and sys.platform == "linux":
        found["process"] = {name: grown(width, name) for name in ("timm", recompute)}
    row = f"test_memory.py::{request.node.name}"
    benchmark.extra_info.update(
        what=f"memory {width}, batch {training.batch}, {place}, recompute={recompute}",
        ratios=[ratio(row, f"{kind}, {recompute}", of["timm"] / of[recompute]) for kind, of in found.items()],
        rival_over_ours={kind: round(of["timm"] / of[recompute], 2) for kind, of in found.items()},
        bytes=found,
    )
    benchmark.pedantic(training.step, args=(recompute,), rounds=1)


@memory
@pytest.mark.quick
@pytest.mark.parametrize("recompute", LEVELS)
def test_what_is_kept(benchmark, recompute):
    """What autograd keeps, in the subset: counted, so that it does not scatter."""
    training = Training("T", "cpu", depth=2, batch=1)
    training.hold(recompute)
    kept = {name: training.saved(name) for name in ("timm", recompute)}
    share = kept["timm"] / kept[recompute]
    benchmark.extra_info.update(
        what=f"saved bytes T, batch 1, recompute={recompute}",
        portable=True,
        ratios=[ratio("", f"saved, {recompute}", share)],
        rival_over_ours=round(share, 2),
        bytes=kept,
    )
    benchmark.pedantic(training.step, args=(recompute,), rounds=1)


def ratio(row: str, ours: str, share: float) -> dict:
    """A ratio of bytes: counted, it is its own interval."""
    target = targets.of(row, ours, "timm")
    exact = round(share, 3)
    return {
        "ours": ours, "rival": "timm", "plain": exact, "plain_low": exact, "plain_high": exact, "graph": None, "target": target,
    }  # fmt: skip


@with_gradients
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recompute", ["none", *LEVELS])
@pytest.mark.parametrize("width", WIDTHS)
def test_processor_time(against, width, recompute):
    """Forward and backward of one block on a CPU; "none" runs the same calls as timm's."""
    training = Training(width, "cpu", depth=1)
    training.hold(recompute)
    against(
        {recompute: lambda: training.step(recompute)},
        {"timm": lambda: training.step("timm")},
        what=f"processor time {width}, batch {training.batch}, recompute={recompute}",
        rounds=12,
    )


@with_gradients
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", ["none", *LEVELS])
@pytest.mark.parametrize("width", WIDTHS)
def test_time_on_a_gpu(against, width, recompute):
    training = Training(width, "cuda", depth=1)
    training.hold(recompute)

    def timed(name: str) -> Callable[[], None]:
        def step() -> None:
            training.step(name)
            torch.cuda.synchronize()

        return step

    against({recompute: timed(recompute)}, {"timm": timed("timm")}, clock="wall", portable=False)


if __name__ == "__main__":
    _measure_growth(*sys.argv[1:])
