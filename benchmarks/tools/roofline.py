"""How near the operators come to what the machine can do at best:

    python benchmarks/tools/roofline.py [--quick] [--write]

Takes about four minutes on two cores, `--quick` half a minute. Prints the rows; `--write` puts them into docs/roofline.md and
benchmarks/results/roofline.json.

For each row the floating-point operations and the bytes that have to be moved are counted: inputs and weights read once,
results written once. In every turn a large product, a copy and the operator run one after the other; the product and the copy
say what the machine does at best just then, and with these the slower of computing and moving is the least time that the
operator could take. Printed is the share of this least time in the time taken: the median over the turns, with its interval of
95 % (`intervals.py`). Times are wall-clock times; on one thread, processor times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.support import intervals, turns
from benchmarks.tools import pages, records

DOCS = records.REPOSITORY / "docs"
PATCHES = 197
WIDTHS = {"T": 192, "S": 384, "B": 768}
ROUNDS, QUICK_ROUNDS = 12, 6
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Work:
    """What an operator has to do.

    Attributes:
        what: In words.
        dtype: "float32" or "bfloat16".
        flops: Of the products; 0 where there are none.
        moved: Bytes that have to be read and written.
        call: Does it; None where it is only counted.
    """

    what: str
    dtype: str
    flops: float
    moved: float
    call: Callable[[], object] | None = field(default=None, repr=False)


def mlp_work(channels: int, count: int, size: int) -> tuple[float, float]:
    """Operations and bytes of LayerNorm and MLP forward: M = `count` tokens, values of `size` bytes."""
    return 16 * count * channels**2, size * (2 * count * channels + 8 * channels**2)


def step_work(channels: int, count: int, size: int) -> tuple[float, float]:
    """The same with its gradients: x and dO read again, dx written; the weights again, and their gradients written."""
    return 48 * count * channels**2, size * (5 * count * channels + 24 * channels**2)


def cpu_works(quick: bool) -> list[Work]:
    """The paths of a CPU."""
    import torch
    from timm.models.vision_transformer import Block

    from lambda_kernels import AttentionFreeBlock, EntropyMeter
    from lambda_kernels.ops.histogram import moments
    from lambda_kernels.ops.histogram.function import histogram
    from lambda_kernels.ops.histogram.grids import uniform_grid

    found = []
    for name, channels in WIDTHS.items():
        count = PATCHES * (2 if quick else {"T": 16, "S": 8, "B": 4}[name])
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            half = AttentionFreeBlock.from_block(Block(channels, 3).to(dtype), backend="torch")
            x = torch.randn(count, channels).to(dtype)
            leaf, grad = x.clone().requires_grad_(), torch.randn(count, channels).to(dtype)

            def forward(half: torch.nn.Module = half, x: torch.Tensor = x) -> None:
                with torch.inference_mode():
                    half(x)

            def step(half: torch.nn.Module = half, x: torch.Tensor = leaf, grad: torch.Tensor = grad) -> None:
                torch.autograd.grad(half(x), [x, *half.parameters()], grad)

            kind, size = str(dtype).removeprefix("torch."), dtype.itemsize
            words = f"{count} tokens of {channels}"
            found.append(Work(f"MLP forward, {words}", kind, *mlp_work(channels, count, size), forward))
            found.append(Work(f"MLP forward + backward, {words}", kind, *step_work(channels, count, size), step))
    shape = (4096, 768) if quick else (32768, 768)
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        x, kind = wide.to(dtype), str(dtype).removeprefix("torch.")
        for per, rows in (("layer", 1), ("channel", shape[1])):
            grid = uniform_grid(-4.0, 4.0, 256, channels=rows)

            def count_values(x: torch.Tensor = x, grid: object = grid, per: str = per) -> None:
                histogram(x, grid, per=per, statistics=True, backend="extension")

            words = f"histogram and moments per {per}, {shape[0]} × {shape[1]}"
            found.append(Work(words, kind, 0, x.nbytes, count_values))

        def only_moments(x: torch.Tensor = x) -> None:
            moments(x, backend="extension")

        def gaussian(x: torch.Tensor = x) -> None:
            EntropyMeter().update(x)

        found.append(Work(f"moments per channel, {shape[0]} × {shape[1]}", kind, 0, x.nbytes, only_moments))
        found.append(Work(f"EntropyMeter.update, {shape[0]} × {shape[1]}", kind, 0, x.nbytes, gaussian))
    return found


def gpu_works() -> list[Work]:
    """The kernels of a GPU in bfloat16; counted where there is none, and timed where there is one."""
    found, count = [], 256 * PATCHES
    for channels in WIDTHS.values():
        words = f"{count} tokens of {channels}"
        found.append(Work(f"MLP forward, {words}", "bfloat16", *mlp_work(channels, count, 2)))
        found.append(Work(f"MLP forward + backward, {words}", "bfloat16", *step_work(channels, count, 2)))
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for per in ("layer", "channel"):
            words = f"histogram and moments per {per}, {count} × 768"
            found.append(Work(words, dtype, 0, size * count * 768))
    return found


@dataclass(frozen=True)
class Probes:
    """What the machine does at best: calls, and how much each does."""

    product: dict[str, tuple[Callable[[], object], float]]
    copy: tuple[Callable[[], object], float]
    read: tuple[Callable[[], object], float]


def cpu_probes(quick: bool) -> Probes:
    """Products of large matrices, a copy and a read of more than any cache holds."""
    import torch

    side, elements = (1024, 1 << 24) if quick else (2048, 1 << 26)
    product = {}
    for kind in ("float32", "bfloat16"):
        a, b = torch.randn(2, side, side).to(getattr(torch, kind)).unbind()
        out = torch.empty_like(a)
        product[kind] = (lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2.0 * side**3)
    source = torch.randn(elements)
    target = torch.empty_like(source)
    return Probes(product, (lambda: target.copy_(source), 2 * 4.0 * elements), (source.amax, 4.0 * elements))


def measured(works: Sequence[Work], probes: Probes, rounds: int, clock: str) -> list[dict]:
    """The rows of these operators."""
    rows = []
    for work in works:
        taken = turns.Turns()
        # What writes about as much as it reads is held against a copy, what only reads against a read.
        memory, amount = probes.copy if work.flops else probes.read
        product, products = probes.product[work.dtype]
        for turn in range(-1, rounds):
            for name, call in (("product", product), ("memory", memory), ("ours", work.call)):
                if turn < 0:
                    call()
                else:
                    taken.take(name, call)
        seconds = taken.seconds[clock]
        computing = [work.flops * s / products for s in seconds["product"]]
        moving = [work.moved * s / amount for s in seconds["memory"]]
        shares = [max(c, m) / s for c, m, s in zip(computing, moving, seconds["ours"], strict=True)]
        middle, low, high = intervals.median_interval(shares)
        bound = "computing" if statistics.median(computing) > statistics.median(moving) else "moving"
        rows.append(
            {
                "what": work.what,
                "dtype": work.dtype,
                "flops": work.flops,
                "moved": work.moved,
                "bound": bound,
                "seconds": statistics.median(seconds["ours"]),
                "share": {"found": middle, "low": low, "high": high},
            }
        )
    return rows


def cpu_ceilings(probes: Probes, rounds: int, clock: str) -> dict[str, float]:
    """Operations and bytes per second of the probes alone."""
    taken = turns.Turns()
    amounts = {f"product, {kind}": probe for kind, probe in probes.product.items()}
    amounts |= {"copy": probes.copy, "read": probes.read}
    for turn in range(-1, rounds):
        for name, (call, _) in amounts.items():
            if turn < 0:
                call()
            else:
                taken.take(name, call)
    return {name: amount / statistics.median(taken.seconds[clock][name]) for name, (_, amount) in amounts.items()}


def gpu_rows() -> tuple[dict[str, float] | None, list[dict]]:
    """Ceilings and rows of a GPU; without one the rows have no times."""
    import torch

    works = gpu_works()
    counted = [{"what": w.what, "dtype": w.dtype, "flops": w.flops, "moved": w.moved} for w in works]
    if not torch.cuda.is_available():
        return None, counted
    from benchmarks.support import gpu_timing

    best = gpu_timing.ceilings()
    timed = gpu_calls()
    for row, work, version in zip(counted, works, timed, strict=True):
        times = gpu_timing.launched({"ours": version}, 2, rounds=30)["ours"]
        floor = gpu_timing.floor_us(work.flops, work.moved, best)
        middle, low, high = intervals.median_interval([floor / t for t in times])
        computing = work.flops / best.teraflops / 1e12 > work.moved / best.gigabytes_per_s / 1e9
        row |= {
            "bound": "computing" if computing else "moving",
            "seconds": statistics.median(times) / 1e6,
            "share": {"found": middle, "low": low, "high": high},
        }
    return {"product, bfloat16": 1e12 * best.teraflops, "copy": 1e9 * best.gigabytes_per_s}, counted


def gpu_calls() -> list[Callable[[int], object]]:
    """What is timed of `gpu_works`, in its order; each takes turns with two sets of inputs."""
    import torch

    from benchmarks.test_ln_mlp import Problem
    from lambda_kernels.ops.histogram import histogram, uniform_grid

    found = []
    for width in WIDTHS:
        for gradients in (False, True):
            problem = Problem(width, 256, gradients=gradients)
            found.append(problem.verified(problem.ours))
    for dtype in (torch.float32, torch.bfloat16):
        xs = torch.randn(2, 256 * PATCHES, 768, device="cuda").to(dtype).unbind()
        for per, rows in (("layer", 1), ("channel", 768)):
            grid = uniform_grid(-4.0, 4.0, 256, channels=rows, device="cuda")

            def counted(number: int, xs: tuple = xs, grid: object = grid, per: str = per) -> object:
                return histogram(xs[number], grid, per=per, statistics=True, backend="extension")

            found.append(counted)
    return found


# What becomes of it


def _ceilings_line(found: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value / 1e12:.3g} TFLOP/s" if "product" in name else f"{name} {value / 1e9:.3g} GB/s"
        for name, value in found.items()
    )


def table(rows: Sequence[dict]) -> str:
    """The rows of one device."""
    lines = ["| | dtype | GFLOP | MB | bound by | ms | of the best (95 %) |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            row["what"],
            row["dtype"],
            f"{row['flops'] / 1e9:.3g}" if row["flops"] else "–",
            f"{row['moved'] / 1e6:.3g}",
        ]
        if "share" in row:
            share = {key: f"{100 * value:.0f}" for key, value in row["share"].items()}
            cells += [
                row["bound"],
                f"{1e3 * row['seconds']:.3g}",
                f"{share['found']} % ({share['low']}–{share['high']})",
            ]
        else:
            cells += ["", NOT_MEASURED, NOT_MEASURED]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(found: dict) -> str:
    """What stands between the page's comments."""
    environment = found["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", *records.PACKAGES))
    commit = f"{environment['commit'][:9]}{' with changes' if environment['dirty'] else ''}"
    parts = [f"{environment['cpu']}; {versions}; commit {commit}; {environment['time'][:10]}."]
    for threads, part in found["cpu"].items():
        parts += [f"### CPU, {threads} thread{'s' * (threads != '1')}"]
        parts += [f"At best: {_ceilings_line(part['ceilings'])}.", table(part["rows"])]
    gpu = found["gpu"]
    best = f"At best: {_ceilings_line(gpu['ceilings'])}." if gpu["ceilings"] else "There was none; counted on paper."
    return "\n\n".join(
        [*parts, f"### GPU{'' if gpu['ceilings'] is None else ', ' + environment['gpu']}", best, table(gpu["rows"])]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="roofline.py", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, on one thread")
    parser.add_argument("--write", action="store_true", help="bring docs/ up to date")
    parser.add_argument(
        "--out", type=Path, default=records.RESULTS / "roofline.json", help="where --write puts everything"
    )
    options = parser.parse_args(arguments)
    if options.write and options.quick:
        parser.error("--write is for full sizes")
    import torch

    from lambda_kernels.files import write_json

    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    found: dict = {"environment": records.describe(), "cpu": {}}
    probes, works = cpu_probes(options.quick), cpu_works(options.quick)
    for threads in (1,) if options.quick else (1, 2):
        torch.set_num_threads(threads)
        clock = "processor" if threads == 1 else "wall"
        ceilings = cpu_ceilings(probes, rounds, clock)
        found["cpu"][str(threads)] = {"ceilings": ceilings, "rows": measured(works, probes, rounds, clock)}
    ceilings, rows = gpu_rows()
    found["gpu"] = {"ceilings": ceilings, "rows": rows}
    if options.write:
        write_json(options.out, found)
        pages.write(DOCS / "roofline.md", "roofline.py", page(found))
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
