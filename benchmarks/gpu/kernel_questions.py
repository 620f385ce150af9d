"""Questions about ways to compute the MLP: rows of the one-pass kernel, operands from registers, cuBLASLt's GELU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import answering
from benchmarks.support import gpu_timing
from lambda_kernels import audit, ln_mlp
from lambda_kernels.ops.ln_mlp import reference, tracing
from lambda_kernels.ops.ln_mlp.arguments import Options, Parameters
from lambda_kernels.ops.ln_mlp.fused import launch, tuning
from lambda_kernels.ops.ln_mlp.fused.kernels import configs
from lambda_kernels.ops.ln_mlp.fused.launch import Launch
from lambda_kernels.ops.ln_mlp.fused.tuning import Candidate

BATCHES = (64, 256)
TOKENS = 256 * 197
OPTIONS = Options(1e-6, 1.0, "none")


# One pass: rows per program, and against two kernels


def one_pass() -> Iterator[dict[str, Any]]:
    """Microseconds of every one-pass tile that ships, and of two kernels, at batch 64 and 256 in bfloat16.

    "two kernels" are our own, with the first of their tiles; "staged" is whatever was measured to be the fastest.
    """
    arch = answering.capability()
    for channels in answering.WIDTHS:
        tiles = configs.shipped("one_pass", arch, torch.bfloat16, channels, configs.uses_descriptors(arch))
        for batch in BATCHES if tiles else ():
            parameters, xs = _mlp(channels, batch)
            exact = reference.ln_mlp(*(t.double() for t in (xs[0], *parameters)), eps=1e-6)
            versions = {str(tile): _forced(xs, parameters, forward=Candidate("one_pass", tile)) for tile in tiles}
            versions["two kernels"] = _forced(xs, parameters, forward="staged", fc1="corrected", fc2="fused")
            versions["staged"] = _forced(xs, parameters, forward="staged")
            good, ran = True, {}
            for name, version in versions.items():
                version(0)  # whatever is to be measured about it is measured now
                with tracing.recorded() as ran[name]:
                    good &= answering.close(version(0), exact, f"{name}, {channels} channels")
            graphs, failures = gpu_timing.replayed(versions, len(xs), rounds=30)
            yield {
                "channels": channels,
                "batch": batch,
                "graph_us": gpu_timing.medians(graphs),
                "plain_us": gpu_timing.medians(gpu_timing.launched(versions, len(xs), rounds=30)),
                "programs_per_multiprocessor": {str(tile): programs(xs, parameters, tile) for tile in tiles},
                "not_captured": failures,
                "ran": ran,
                "good": good,
            }


def _mlp(channels: int, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """γ, β, W1, b1, W2, b2 in bfloat16, and rotating inputs [batch · 197, channels]."""
    torch.manual_seed(0)
    hidden = 4 * channels
    matrices = [
        torch.randn(s, device=answering.DEVICE) / math.sqrt(s[1]) for s in ((hidden, channels), (channels, hidden))
    ]
    vectors = [torch.randn(size, device=answering.DEVICE) for size in (channels, channels, hidden, channels)]
    parameters = [vectors[0], vectors[1], matrices[0], vectors[2], matrices[1], vectors[3]]
    return [p.bfloat16() for p in parameters], gpu_timing.rotating(batch * 197, channels, seed=1)


def _forced(xs: list[Tensor], parameters: list[Tensor], **stages: Candidate | str) -> Callable[[int], Tensor]:
    def run(number: int) -> Tensor:
        with torch.no_grad(), tuning.forced(**stages):
            return ln_mlp(xs[number], *parameters, eps=1e-6, backend="triton")

    return run


def programs(xs: list[Tensor], parameters: list[Tensor], tile: configs.Config) -> int:
    """How many programs of a one-pass tile fit onto a multiprocessor of this device, as it was compiled."""
    p, tma = Parameters(*parameters, None, None), configs.uses_descriptors(answering.capability())
    made = launch.one_pass(xs[0], p, OPTIONS, torch.empty_like(xs[0]), None, None, config=tile, tma=tma)
    made.run()
    compiled = made.compiled()
    return resident(compiled.n_regs, 32 * tile.warps, compiled.metadata.shared)


def resident(registers: int, threads: int, shared: int, available: int = 228 * 1024) -> int:
    """Programs that fit onto a multiprocessor of 65,536 registers, 2048 threads and `available` bytes of shared memory.

    Registers are given out to a warp, by 256; each program takes 1 KiB of shared memory beside its own.
    """
    of_a_warp = -(-32 * registers // 256) * 256
    return min(65536 // (of_a_warp * threads // 32), 2048 // threads, available // (shared + 1024))


# Products whose operand comes from registers


@dataclass(frozen=True)
class Chain:
    """A way to compute two products with the hidden values in between on the chip."""

    transposed: bool
    chunks: int  # products that take the same hidden values
    warps: int
    stages: int
    bm: int = 64
    bh: int = 64
    k: int = 128
    n: int = 64
    hidden: int = 768

    def __str__(self) -> str:
        how = "through shared memory" if self.transposed else "from registers"
        return f"{how}, {self.chunks} products, {self.bm}x{self.bh} w{self.warps} s{self.stages}"

    def launch(self, x: Tensor, w1: Tensor, w2: Tensor, out: Tensor, activation: str) -> Launch:
        """x [M, K], w1 [H, K], w2 [chunks·N, H] of one dtype, out [M, chunks·N] float32; M a multiple of `bm`."""
        from benchmarks.gpu.probes import chained_products

        unit = launch.Arithmetic.of(x.dtype, "none").unit
        return Launch(
            chained_products,
            (-(-x.shape[0] // self.bm), 1, 1),
            {
                "x": launch._tile(x, self.bm, self.k, True),
                "w1": launch._tile(w1, self.bh, self.k, True),
                "w2": launch._tile(w2, self.n, self.bh, True),
                "out": out,
                "M": x.shape[0],
            },
            {
                "H": self.hidden,
                "K": self.k,
                "N": self.n,
                "CHUNKS": self.chunks,
                "BM": self.bm,
                "BH": self.bh,
                "STAGES": self.stages,
                "TRANSPOSED": self.transposed,
                "ACTIVATION": activation,
                "UNIT": unit,
                "EMULATE": launch.INTERPRETED,
            },
            self.warps,
            self.stages,
        )

    def problem(self, rows: int, device: str, dtype: torch.dtype, *, whole: bool) -> list[Tensor]:
        """x, w1, w2 and an empty result; of whole numbers −1, 0, 1 if asked for, so that sums have no rounding."""
        shapes = [(rows, self.k), (self.hidden, self.k), (self.chunks * self.n, self.hidden)]
        if whole:
            made = [torch.randint(-1, 2, shape, device=device).to(dtype) for shape in shapes]
        else:
            made = [torch.randn(shape, device=device).to(dtype) / math.sqrt(shape[1]) for shape in shapes]
            made[0] *= math.sqrt(self.k)
        return [*made, torch.empty(rows, self.chunks * self.n, device=device)]


# One product and several of the same registers, two groups of warps, loops with and without loads under way; the form that
# ships beside them.
CHAINS = (
    Chain(transposed=False, chunks=1, warps=4, stages=1),
    Chain(transposed=False, chunks=1, warps=4, stages=3),
    Chain(transposed=False, chunks=3, warps=4, stages=1),
    Chain(transposed=False, chunks=3, warps=4, stages=3),
    Chain(transposed=False, chunks=1, warps=8, stages=2, bm=128),
    Chain(transposed=True, chunks=3, warps=4, stages=1),
    Chain(transposed=True, chunks=3, warps=4, stages=3),
)
CHAIN_TURNS = 20


def chain_result(x: Tensor, w1: Tensor, w2: Tensor, activation: str) -> Tensor:
    """What `chained_products` computes, in float64."""
    p = x.double() @ w1.double().T
    hidden = p.clamp(min=0) if activation == "relu" else torch.nn.functional.gelu(p)
    return hidden @ w2.double().T


def registers() -> Iterator[dict[str, Any]]:
    """How often results of whole numbers were wrong, the error with GELU, and what the assembler made of each way.

    Ways from registers are asked about, and may be wrong; that which ships may not.
    """
    for chain in CHAINS:
        try:
            yield _tried(chain)
        except Exception as error:  # one that does not compile leaves the others
            yield {"way": str(chain), "failed": f"{type(error).__name__}: {error}"[:300], "good": not chain.transposed}


def _tried(chain: Chain) -> dict[str, Any]:
    rows, wrong = TOKENS // chain.bm * chain.bm, 0
    for _ in range(CHAIN_TURNS):
        x, w1, w2, out = chain.problem(rows, answering.DEVICE, torch.bfloat16, whole=True)
        whole = chain.launch(x, w1, w2, out, "relu")
        whole.run()
        wrong += not torch.equal(out.double(), chain_result(x, w1, w2, "relu"))
    x, w1, w2, out = chain.problem(rows, answering.DEVICE, torch.bfloat16, whole=False)
    smooth = chain.launch(x, w1, w2, out, "gelu")
    smooth.run()
    error = answering.relative_error(out, chain_result(x, w1, w2, "gelu"))
    found = {
        form: assembled(chain, made.compiled(), answering.capability())
        for form, made in (("relu", whole), ("gelu", smooth))
    }
    return {
        "way": str(chain),
        "wrong": wrong,
        "of": CHAIN_TURNS,
        "error_with_gelu": answering.two_digits(error),
        "us": gpu_timing.medians(gpu_timing.launched({"chain": answering.runs(smooth)}, 1, rounds=20))["chain"],
        "assembled": found,
        "good": not chain.transposed or (wrong == 0 and error <= answering.TOLERANCE),
    }


def assembled(chain: Chain, compiled: Any, arch: int) -> dict[str, object]:
    """Matrix instructions, whether one takes an operand from registers, whether they wait for one another, registers."""
    finding = audit.read(audit.Case("chained_products", "", str(chain), arch, None, True), compiled)
    faults = " ".join(finding.faults)
    return {
        "products": finding.matrix_instructions,
        "from_registers": "A operand from registers" in faults,
        "serialized": "serialized" in faults,
        "spills": finding.spills,
        "registers": finding.registers,
    }


# cuBLASLt's GELU


def epilogue() -> Iterator[dict[str, Any]]:
    """Microseconds of the first product with bias, alone, with GELU after it, with GELU inside, and of our own kernel.

    In a second round the names of the kernels that ran, by the profiler, which would be in the way of the times.
    """
    for channels in answering.WIDTHS:
        versions, x, weight, bias, sets = _first_products(channels)
        p = x.double() @ weight.double().T + bias.double()
        forms = {form: torch.nn.functional.gelu(p, approximate=form) for form in ("none", "tanh")}
        errors, good = {}, True
        for name, version in versions.items():
            if name != "product":
                got = version(0)
                errors[name] = {
                    form: float(f"{answering.relative_error(got, exact):.3e}") for form, exact in forms.items()
                }
                good &= answering.close(got, forms["none"], f"{name}, {channels} channels")
        del p, forms
        graphs, failures = gpu_timing.replayed(versions, sets, rounds=30)
        yield {
            "channels": channels,
            "graph_us": gpu_timing.medians(graphs),
            "plain_us": gpu_timing.medians(gpu_timing.launched(versions, sets, rounds=30)),
            "error_from": errors,
            "not_captured": failures,
            "good": good,
        }
        del versions, x, graphs
        torch.cuda.empty_cache()
    for channels in answering.WIDTHS:
        versions, *_ = _first_products(channels)
        yield {"channels": channels, "kernels": kernels_of(versions), "good": True}


def _first_products(channels: int) -> tuple[dict[str, gpu_timing.Version], Tensor, Tensor, Tensor, int]:
    """Versions of GELU(x·Wᵀ + b), the first without GELU; the first x, W and b; how many inputs there are."""
    torch.manual_seed(0)
    xs = gpu_timing.rotating(TOKENS, channels, seed=1)
    weight = torch.randn(4 * channels, channels, dtype=torch.bfloat16, device=answering.DEVICE) / math.sqrt(channels)
    bias = torch.randn(4 * channels, dtype=torch.bfloat16, device=answering.DEVICE)
    versions: dict[str, gpu_timing.Version] = {
        "product": lambda n: torch.addmm(bias, xs[n], weight.t()),
        "product, then GELU": lambda n: torch.nn.functional.gelu(torch.addmm(bias, xs[n], weight.t())),
        "GELU inside": lambda n: torch._addmm_activation(bias, xs[n], weight.t(), use_gelu=True),
    }
    arch = answering.capability()
    tma = configs.uses_descriptors(arch)
    for tile in configs.shipped("fc1", arch, torch.bfloat16, channels, tma):
        versions[f"ours {tile}"] = _fc1(xs, weight, bias, tile, tma)
    return versions, xs[0], weight, bias, len(xs)


def _fc1(xs: list[Tensor], weight: Tensor, bias: Tensor, tile: configs.Config, tma: bool) -> gpu_timing.Version:
    """Our first product with bias and GELU, on tokens as they are."""
    p = Parameters(None, None, weight, bias, weight.T, None, None, None)  # W2 plays no part
    out = torch.empty(xs[0].shape[0], weight.shape[0], dtype=torch.bfloat16, device=answering.DEVICE)

    def run(number: int) -> Tensor:
        launch.fc1(xs[number], p, OPTIONS, out, None, config=tile, tma=tma).run()
        return out

    return run


def kernels_of(versions: dict[str, gpu_timing.Version]) -> dict[str, list[str]]:
    """The names of the kernels that each version launches, one profile for each."""
    found = {}
    for name, version in versions.items():
        version(0)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            version(0)
            torch.cuda.synchronize()
        on_device = (e.key[:80] for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
        found[name] = list(on_device) or ["the profiler saw none"]
    return found
