"""Memory of training twelve attention-free blocks: ours with `recompute` against timm's own half of a block.

Three figures: bytes that autograd keeps from the forward to the backward; the most that is allocated at once in a step, by the
allocator's own record; and by how much a process of its own grows. The time of one block is beside them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm.models.vision_transformer
import torch
from torch import nn

from lambda_kernels import AttentionFreeBlock
from lambda_vit.training_step import saved_bytes

WIDTHS = {"T": 192, "B": 768}
BATCHES = {"cpu": {"T": 32, "B": 16}, "cuda": {"T": 256, "B": 256}}
DEPTH, TOKENS = 12, 197
# timm's over ours, to reach: of what is saved, of the most that is there at once
TARGETS = {"act": (1.9, None), "all": (9.0, 5.0)}

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


class TimmHalf(nn.Module):
    """What timm's `Block` does after its attention."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm2, self.mlp = block.norm2, block.mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm2(x))


class Training:
    """Blocks of timm's ("timm") or of ours with `recompute`, on the same parameters, and a batch for them."""

    def __init__(self, width: str, place: str, depth: int = DEPTH) -> None:
        torch.manual_seed(0)
        self.channels = WIDTHS[width]
        dtype = torch.float32 if place == "cpu" else torch.bfloat16
        blocks = [timm.models.vision_transformer.Block(self.channels, 3).to(place, dtype) for _ in range(depth)]
        self.networks = {"timm": nn.Sequential(*map(TimmHalf, blocks))}
        for level in ("none", *TARGETS):
            self.networks[level] = nn.Sequential(*(AttentionFreeBlock.from_block(b, recompute=level) for b in blocks))
        for parameter in self.networks["timm"].parameters():
            parameter.grad = torch.zeros_like(parameter)
        shape = (BATCHES[place][width], TOKENS, self.channels)
        self.x = torch.randn(shape, device=place, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(shape, device=place, dtype=dtype)

    def step(self, name: str) -> None:
        """Forward and backward; gradients are added to those that are there."""
        self.networks[name](self.x).backward(self.grad)

    def saved(self, name: str) -> int:
        """Bytes that autograd keeps, the batch and the little that a loss takes included."""
        return saved_bytes(Flat(self.networks[name]), self.x)

    def peak(self, name: str) -> int:
        """Bytes allocated at once at the worst moment of a step, above what was there before it."""
        self.step(name)  # what is compiled and measured must not count
        if self.x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(name)
            return torch.cuda.max_memory_allocated() - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
            self.step(name)
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        allocated = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            allocated += event.nbytes()
            most = max(most, allocated)
        return most


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


@pytest.mark.parametrize("recompute", TARGETS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("place", PLACES)
def test_memory(benchmark, place, width, recompute):
    training = Training(width, place)
    saved = {name: training.saved(name) for name in ("timm", recompute)}
    peak = {name: training.peak(name) for name in ("timm", recompute)}
    found = {"saved": saved, "peak": peak}
    if place == "cpu" and sys.platform == "linux":
        found["grown"] = {name: grown(width, name) for name in ("timm", recompute)}
    targets = dict(zip(("saved", "peak"), TARGETS[recompute], strict=True))
    benchmark.extra_info.update(
        what=f"memory {width}, batch {BATCHES[place][width]}, {place}, recompute={recompute}",
        rival_over_ours={kind: round(of["timm"] / of[recompute], 2) for kind, of in found.items()},
        targets={kind: target for kind, target in targets.items() if target},
        bytes=found,
    )
    benchmark.pedantic(training.step, args=(recompute,), rounds=3)


@pytest.mark.parametrize("recompute", ["none", *TARGETS])
@pytest.mark.parametrize("width", WIDTHS)
def test_processor_time(benchmark, width, recompute):
    """Forward and backward of one block on a CPU; "none" runs the same calls as timm's.

    The least that the process was charged, of turns that alternate: what other programs take off a core does not count.
    """
    training = Training(width, "cpu", depth=1)
    best = {"timm": float("inf"), recompute: float("inf")}
    for turn in range(12):
        for name in best:
            started = time.process_time()
            training.step(name)
            if turn:  # the first turn warms up
                best[name] = min(best[name], time.process_time() - started)
    benchmark.extra_info.update(
        what=f"processor time {width}, batch {BATCHES['cpu'][width]}, recompute={recompute}",
        rival_over_ours=round(best["timm"] / best[recompute], 3),
        best_ms={name: round(1000 * seconds, 1) for name, seconds in best.items()},
    )
    benchmark.pedantic(training.step, args=(recompute,), rounds=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", ["none", *TARGETS])
@pytest.mark.parametrize("width", WIDTHS)
def test_time_on_a_gpu(against, width, recompute):
    training = Training(width, "cuda", depth=1)

    def timed(name: str) -> Callable[[], None]:
        def step() -> None:
            training.step(name)
            torch.cuda.synchronize()

        return step

    against(timed(recompute), timed("timm"), rounds=30)


if __name__ == "__main__":
    _measure_growth(*sys.argv[1:])
