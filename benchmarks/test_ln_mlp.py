"""The MLP half of a block on a GPU: `ln_mlp` against timm's own, as it is and compiled, forward and with its gradients.

In bfloat16, and in the order of their importance, since time on a GPU may end before the last.
"""

from __future__ import annotations

import copy
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import Block

from benchmarks.support import gpu_timing, verify
from benchmarks.support.halves import MODES, WIDTHS, TimmHalf, compiled
from benchmarks.tools import targets
from lambda_kernels import AttentionFreeBlock, ln_mlp
from lambda_kernels.ops.ln_mlp import reference as reference
from lambda_kernels.ops.ln_mlp.fused import tuning as tuning
from lambda_kernels.ops.ln_mlp.fused.kernels import configs as configs
from lambda_kernels.ops.ln_mlp.fused.tuning import Candidate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
forward_only = pytest.mark.benchmark(group="MLP forward")
with_gradients = pytest.mark.benchmark(group="MLP forward+backward")

LIBRARY = {"forward": "staged", **dict.fromkeys(("fc1", "fc2", "hidden_gradient", "saved_gradient"), "library")}


class Problem:
    """timm's half and ours on the same parameters, with rotating inputs."""

    def __init__(self, width: str, batch: int, *, gradients: bool = False) -> None:
        torch._dynamo.reset()  # rivals are compiled for this size alone
        torch.manual_seed(0)
        self.tokens, self.channels = batch * 197, WIDTHS[width]
        self.block = Block(self.channels, 3).cuda().bfloat16()
        self.timm = TimmHalf(self.block)
        self.ours = AttentionFreeBlock.from_block(self.block, backend="triton")
        self.parameters = list(self.timm.parameters())
        self.missing: dict[str, str] = {}
        self.xs = gpu_timing.rotating(batch, 197, self.channels)
        self.grads = None
        if gradients:
            self.xs = [x.requires_grad_() for x in self.xs]
            self.grads = gpu_timing.rotating(batch, 197, self.channels, seed=1)

    @property
    def sets(self) -> int:
        """How many sets of inputs there are."""
        return len(self.xs)

    def version(self, module: Callable, **forced: object) -> gpu_timing.Version:
        """One step of `module` on the input set of a number; `forced` are stages of our own."""

        def step(number: int) -> list[torch.Tensor]:
            if self.grads is None:
                with torch.no_grad():
                    return [module(self.xs[number])]
            out = module(self.xs[number])
            inputs = [self.xs[number], *self.parameters]
            return [out, *torch.autograd.grad(out, inputs, self.grads[number])]

        def forced_step(number: int) -> list[torch.Tensor]:
            with tuning.forced(**forced):
                return step(number)

        return forced_step if forced else step

    def verified(self, module: Callable, **forced: object) -> gpu_timing.Version:
        """The same, after its own results for the first inputs were held against float64."""
        version = self.version(module, **forced)
        exact = copy.deepcopy(self.timm).double()
        x = self.xs[0].detach().double().requires_grad_(self.grads is not None)
        out = exact(x)
        expected = [out]
        if self.grads is not None:
            expected += torch.autograd.grad(out, [x, *exact.parameters()], self.grads[0].double())
        verify.close("ours", version(0), expected, verify.OPERATOR[torch.bfloat16])
        return version

    def versions(self) -> dict[str, gpu_timing.Version]:
        """Ours, each backend by its name."""
        plain = AttentionFreeBlock.from_block(self.block, backend="torch")
        return {"triton": self.verified(self.ours), "torch": self.version(plain)}

    def rivals(self, *modes: str) -> dict[str, gpu_timing.Version]:
        """timm's half as it is, and compiled; `missing` says which could not be compiled, and why."""
        found = {"timm": self.version(self.timm)}
        for name in modes:
            found |= compiled(name, MODES[name], self.timm, self.version, self.missing, 0)
        return found

    def race(self, race: Callable, what: str, ours: dict, rivals: dict, **options: object) -> None:
        """Run `race` on these versions, with the work that any of them has to do."""
        race(what, ours, rivals, self.sets, missing=self.missing, **self.work(), **options)

    def work(self) -> dict[str, float]:
        """Operations of the products, and bytes of tokens and weights that have to be read and written once."""
        tokens, channels = self.tokens, self.channels
        flops, row, weights = 16 * tokens * channels**2, 2 * tokens * channels, 2 * 8 * channels**2
        if self.grads is None:
            return {"flops": flops, "moved": 2 * row + weights}
        # x again and dO in, dx out; the weights again, and their gradients out
        return {"flops": 3 * flops, "moved": 5 * row + 3 * weights}


def one_pass_tiles(channels: int) -> list[configs.Config]:
    arch = gpu_arch()
    return configs.shipped("one_pass", arch, torch.bfloat16, channels, configs.uses_descriptors(arch))


def one_pass_candidate(channels: int) -> Candidate | str:
    """The fastest measured one for the most tokens; without measurements, the first."""
    offered = {str(candidate): candidate for candidate in (Candidate("one_pass", t) for t in one_pass_tiles(channels))}
    measured = [d for d in tuning.decisions() if (d.problem.stage, d.problem.channels) == ("forward", channels)]
    for decision in sorted(measured, key=lambda d: -d.problem.tokens):
        times = {name: t for name, t in decision.times_us.items() if name in offered}
        if times:
            return offered[min(times, key=times.__getitem__)]
    return "one_pass"


def gpu_arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@forward_only
@pytest.mark.parametrize("width", WIDTHS)
def test_forward(race, width):
    problem = Problem(width, 256)
    problem.race(race, f"forward {width}, batch 256", problem.versions(), problem.rivals("torch.compile"))


@with_gradients
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_backward(race, width):
    problem = Problem(width, 256, gradients=True)
    problem.race(race, f"forward + backward {width}, batch 256", problem.versions(), problem.rivals("torch.compile"))


@forward_only
def test_one_pass_against_two_kernels(race):
    problem = Problem("T", 256)
    problem.version(problem.ours)(0)  # measures, where it was not yet
    best = one_pass_candidate(problem.channels)
    problem.race(
        race,
        "one pass T, batch 256",
        {"one pass": problem.verified(problem.ours, forward=best)},
        {"two kernels": problem.verified(problem.ours, forward="staged")},
    )


@forward_only
@pytest.mark.parametrize("width", WIDTHS)
def test_latency_at_batch_1(race, width):
    problem = Problem(width, 1)
    problem.race(race, f"latency {width}, batch 1", problem.versions(), problem.rivals("torch.compile"), waiting=True)


def saved_bytes(call: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> tuple[int, int]:
    """Bytes of what autograd keeps for the backward, parameters left out, and by how much allocated memory grew."""
    own = {t.untyped_storage().data_ptr() for t in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    grown = torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes()
    return sum(storage.nbytes() for storage in kept.values()), grown


@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize("width", WIDTHS)
def test_saved_activations(benchmark, width):
    """What is kept from the forward to the backward, the tokens themselves included, in units of timm's."""
    problem = Problem(width, 64, gradients=True)
    problem.verified(problem.ours)
    x = problem.xs[0].detach().clone().requires_grad_()  # of its own memory
    norm2, mlp = problem.timm.norm2, problem.timm.mlp
    tensors = (norm2.weight, norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)

    def ours(recompute: str) -> Callable[[], torch.Tensor]:
        return lambda: ln_mlp(x, *tensors, eps=norm2.eps, recompute=recompute, backend="triton")

    for recompute in ("all", "act", "none"):  # what is measured and compiled must not count
        ours(recompute)()
    usual, usual_grown = saved_bytes(lambda: problem.timm(x), problem.parameters)
    rows = []
    for recompute in ("all", "act", "none"):
        saved, grown = saved_bytes(ours(recompute), problem.parameters)
        rows.append(
            {
                "ours": f"recompute={recompute}",
                "rival": "timm",
                "plain": round(usual / saved, 2),
                "graph": None,
                "target": targets.of(
                    f"test_ln_mlp.py::test_saved_activations[{width}]", f"recompute={recompute}", "timm"
                ),
                "saved_bytes": saved,
                "allocated_bytes": grown,
            }
        )
    benchmark.extra_info.update(
        what=f"saved bytes {width}, batch 64",
        ratios=rows,
        rival_over_ours={row["ours"]: row["plain"] for row in rows},
        timm_saved_bytes=usual,
        timm_allocated_bytes=usual_grown,
    )
    benchmark.pedantic(ours("all"), rounds=3)


@forward_only
@pytest.mark.parametrize("path", ["one_pass", "staged", "library", "twin", "block"])
def test_host_time_per_call(benchmark, capsys, path):
    """Microseconds of the calling thread's own time to launch a call of 197 tokens, and where they go."""
    problem = Problem("T", 1)
    x, norm2, mlp = problem.xs[0], problem.timm.norm2, problem.timm.mlp
    tensors = (norm2.weight, norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    forced = {"one_pass": {"forward": "one_pass"}, "staged": {"forward": "staged"}, "library": LIBRARY}.get(path, {})
    problem.verified(problem.ours, **forced)

    def call() -> torch.Tensor:
        if path == "block":
            return problem.ours(x)
        if path == "twin":
            return reference.ln_mlp(x, *tensors, eps=norm2.eps)
        return ln_mlp(x, *tensors, eps=norm2.eps, backend="triton")

    def many(count: int) -> float:
        torch.cuda.synchronize()
        started = time.thread_time()
        for _ in range(count):
            call()
        return 1e6 * (time.thread_time() - started) / count

    with torch.no_grad(), tuning.forced(**forced):
        many(50)
        times = [many(200) for _ in range(15)]
        profile = cProfile.Profile()
        profile.runcall(many, 500)
        torch.cuda.synchronize()
        benchmark.extra_info.update(
            what=f"host time {path}, 197 tokens of 192", host_us=round(statistics.median(times), 2)
        )
        benchmark.pedantic(call, rounds=50)
    with capsys.disabled():
        print(f"\nwhere the host's time goes: {path}")
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


@forward_only
@pytest.mark.parametrize("width", WIDTHS)
def test_our_own_ways(race, width):
    """What is chosen by measuring beside each way by its name."""
    problem = Problem(width, 256)
    auto = problem.verified(problem.ours)
    ways = {
        "staged": problem.verified(problem.ours, forward="staged"),
        "library": problem.verified(problem.ours, **LIBRARY),
    }
    if one_pass_tiles(problem.channels):
        ways["one pass"] = problem.verified(problem.ours, forward=one_pass_candidate(problem.channels))
    problem.race(race, f"our ways {width}, batch 256", {"auto": auto}, ways)


@forward_only
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_at_batch_64(race, width):
    problem = Problem(width, 64)
    problem.race(race, f"forward {width}, batch 64", problem.versions(), problem.rivals("torch.compile"))


@with_gradients
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_backward_at_batch_64(race, width):
    problem = Problem(width, 64, gradients=True)
    problem.race(race, f"forward + backward {width}, batch 64", problem.versions(), problem.rivals())


# What has to be tuned first takes longest.


@forward_only
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_against_max_autotune(race, width):
    problem = Problem(width, 256)
    problem.race(race, f"forward {width}, batch 256, autotuned", problem.versions(), problem.rivals("max-autotune"))


@with_gradients
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_backward_against_max_autotune(race, width):
    problem = Problem(width, 256, gradients=True)
    problem.race(
        race, f"forward + backward {width}, batch 256, autotuned", problem.versions(), problem.rivals("max-autotune")
    )
