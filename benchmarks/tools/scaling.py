"""How time and memory grow with tokens, width, depth, images and candidates, on one thread of a CPU:

    python benchmarks/tools/scaling.py [--quick] [--only tokens,width] [--write]

Takes about six minutes, `--quick` half a minute. Prints the exponents; `--write` puts them into docs/scaling.md, the plots
into docs/scaling-*.png and everything into benchmarks/results/scaling.json.

Each turn goes once through all sizes and gives the slope of a straight line through log time over log size. The exponent is
the median of the slopes, with its interval of 95 % (`intervals.py`); times are processor times. What the design predicts is
counted for the same sizes and fitted by the same line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.support import intervals, turns
from benchmarks.tools import pages, records

DOCS = records.REPOSITORY / "docs"
PATCHES = 197
ROUNDS, QUICK_ROUNDS = 8, 6


@dataclass(frozen=True)
class Point:
    """One size of a series.

    Attributes:
        size: What the axis shows.
        call: What is timed.
        work: What the design says it takes, in any unit: operations.
        kept: Bytes at the worst moment, or kept for the backward; None where memory is not what the series is about.
        expected_bytes: What the design says about them.
    """

    size: int
    call: Callable[[], object]
    work: float
    kept: int | None = None
    expected_bytes: float | None = None


@dataclass(frozen=True)
class Series:
    """Points along one axis, and words for them."""

    title: str
    axis: str
    memory: str
    points: list[Point] = field(repr=False)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the least-squares line through log(value) over log(size)."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def measured(series: Series, rounds: int) -> dict:
    """Times, bytes and exponents of a series."""
    taken = turns.Turns()
    for turn in range(-1, rounds):
        order = series.points if turn % 2 else series.points[::-1]
        for point in order:
            if turn < 0:
                point.call()
            else:
                taken.take(str(point.size), point.call)
    sizes = [point.size for point in series.points]
    seconds = [taken.seconds["processor"][str(size)] for size in sizes]
    middle, low, high = intervals.median_interval([slope(sizes, turn) for turn in zip(*seconds, strict=True)])
    found = {
        "title": series.title,
        "axis": series.axis,
        "sizes": sizes,
        "seconds": [list(intervals.quartiles(times)) for times in seconds],
        "work": [point.work for point in series.points],
        "exponent": {
            "found": middle,
            "low": low,
            "high": high,
            "expected": slope(sizes, [p.work for p in series.points]),
        },
        "rounds": rounds,
    }
    if series.memory:
        kept, expected = ([getattr(p, key) for p in series.points] for key in ("kept", "expected_bytes"))
        found |= {"memory": series.memory, "bytes": kept, "expected_bytes": expected}
        found["memory_exponent"] = {"found": slope(sizes, kept), "expected": slope(sizes, expected)}
    return found


# The series. Those who build them import PyTorch: what is asked of this module elsewhere needs none.


def _half(channels: int, count: int = 1, recompute: str = "none") -> object:
    import torch
    from timm.models.vision_transformer import Block
    from torch import nn

    from lambda_kernels import AttentionFreeBlock

    torch.manual_seed(0)
    blocks = [Block(channels, 3).eval() for _ in range(count)]
    return nn.Sequential(*(AttentionFreeBlock.from_block(b, backend="torch", recompute=recompute) for b in blocks))


def _forward(network: object, x: object) -> Callable[[], object]:
    import torch

    def forward() -> object:
        with torch.inference_mode():
            return network(x)

    return forward


def _step(network: object, x: object) -> Callable[[], None]:
    def step() -> None:
        network.zero_grad(set_to_none=True)
        network(x).sum().backward()

    return step


def tokens(quick: bool) -> Series:
    """Tokens of an attention-free block: all products are of M rows."""
    import torch

    from benchmarks.support.peaks import peak_bytes

    channels, network, points = 192, _half(192), []
    for images in (1, 4, 16, 64) if quick else (1, 4, 16, 64, 256, 1024):
        count = images * PATCHES
        call = _forward(network, torch.randn(count, channels))
        # At the worst moment GELU's input and output are there, [M, 4C] each, and LayerNorm's output
        points.append(Point(count, call, 16 * count * channels**2, peak_bytes(call), 4 * count * 9 * channels))
    return Series("an attention-free block, C = 192, forward", "tokens", "at once", points)


def attention(quick: bool) -> Series:
    """Tokens of one image through a block with attention, whose scores grow with the square."""
    import timm.models.vision_transformer
    import torch

    channels, points = 192, []
    block = timm.models.vision_transformer.Block(channels, 3).eval()
    for count in (196, 392, 784) if quick else (196, 392, 784, 1568, 3136):
        work = 24 * count * channels**2 + 4 * count**2 * channels
        points.append(Point(count, _forward(block, torch.randn(1, count, channels)), work))
    return Series("a block with attention, C = 192, one image", "tokens of the image", "", points)


def width(quick: bool) -> Series:
    """Channels of an attention-free block: its products have C² weights."""
    import torch

    from benchmarks.support.peaks import peak_bytes

    count, points = 4 * PATCHES, []
    for channels in (96, 192, 384) if quick else (96, 192, 384, 768, 1536):
        call = _forward(_half(channels), torch.randn(count, channels))
        points.append(Point(channels, call, 16 * count * channels**2, peak_bytes(call), 4 * count * 9 * channels))
    return Series(f"an attention-free block, {count} tokens, forward", "channels", "at once", points)


def depth(quick: bool) -> Series:
    """Attention-free blocks one behind the other, in training."""
    return _training("none", 10, quick)


def depth_recomputed(quick: bool) -> Series:
    """The same with all of it computed again: the inputs alone are kept."""
    return _training("all", 1, quick)


def _training(recompute: str, kept: int, quick: bool) -> Series:
    import torch

    channels, images, points = 192, 2, []
    x = torch.randn(images, PATCHES, channels, requires_grad=True)
    for count in (1, 2, 4) if quick else (1, 2, 4, 8, 16, 24):
        network = _half(channels, count, recompute)
        products = 48 if recompute == "none" else 56
        work = count * products * images * PATCHES * channels**2
        expected = 4 * images * PATCHES * channels * kept * count
        points.append(Point(count, _step(network, x), work, _saved(network, x), expected))
    title = f"training attention-free blocks, C = 192, recompute={recompute!r}"
    return Series(title, "blocks", "kept for the backward", points)


def _saved(network: object, x: object) -> int:
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(x)
    total = sum(kept.values())
    del out
    return total


def images(quick: bool) -> Series:
    """Images through a DeiT-Tiny without three attention layers."""
    import timm
    import torch

    from benchmarks.support.peaks import peak_bytes
    from lambda_kernels import convert_vit
    from lambda_vit.measure.cost import count_flops

    torch.manual_seed(0)
    model = convert_vit(timm.create_model("deit_tiny_patch16_224").eval(), remove=(1, 3, 5), backend="torch")
    with torch.no_grad():
        flops = count_flops(model, torch.randn(1, 3, 224, 224))
    points = []
    for count in (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32):
        call = _forward(model, torch.randn(count, 3, 224, 224))
        points.append(Point(count, call, flops * count, peak_bytes(call), float(count)))
    return Series("DeiT-Tiny without attention in blocks 1, 3, 5", "images", "at once", points)


def candidates(quick: bool) -> Series:
    """Candidates of a round of selection: a path shares all blocks before the one it skips."""
    return _selecting(quick, shared=True)


def candidates_one_by_one(quick: bool) -> Series:
    """The same by one full forward for each."""
    return _selecting(quick, shared=False)


def _selecting(quick: bool, *, shared: bool) -> Series:
    import timm
    import torch

    from lambda_kernels import EntropyMeter
    from lambda_vit.models.views import skip_attention
    from lambda_vit.selection.measurement import Measurement
    from lambda_vit.selection.prefix_cache import FULL

    torch.manual_seed(0)
    layers = 12
    model = timm.create_model("deit_tiny_patch16_224", depth=layers).eval()
    data = [torch.randn(2, 3, 224, 224)]
    measurement = Measurement(model, data, cache="ram")  # one serves all rounds of a selection
    points = []
    for count in (2, 4, 8) if quick else (1, 2, 4, 8, 12):
        skipped = [round((i + 0.5) * layers / count - 0.5) for i in range(count)]  # spread over the depth
        paths = [FULL, *(frozenset((index,)) for index in skipped)]

        def together(paths: list = paths, measurement: Measurement = measurement) -> None:
            measurement.measure(paths)

        def alone(paths: list = paths) -> None:
            with torch.inference_mode():
                for path in paths:
                    EntropyMeter().update(skip_attention(model, tuple(path))(data[0]))

        # An attention half does 8TC² + 4T²C of a block's 24TC² + 4T²C operations
        half = 1 - 16 / (24 + 4 * PATCHES / 192)
        blocks = layers + sum(layers - index * shared - half for index in skipped)
        points.append(Point(count, together if shared else alone, blocks))
    how = "from shared beginnings" if shared else "one full forward each"
    return Series(f"the full path and candidates of DeiT-Tiny, two images, {how}", "candidates", "", points)


SERIES: dict[str, Callable[[bool], Series]] = {
    "tokens": tokens,
    "attention": attention,
    "width": width,
    "depth": depth,
    "depth-recomputed": depth_recomputed,
    "images": images,
    "candidates": candidates,
    "candidates-one-by-one": candidates_one_by_one,
}


# What becomes of it


def table(found: dict) -> str:
    """The Markdown of the page."""
    lines = [
        "| | over | from … to | time grows as (95 %) | predicted | memory | grows as | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for series in found["series"].values():
        time, memory = series["exponent"], series.get("memory_exponent")
        cells = [series["title"], series["axis"], f"{series['sizes'][0]} … {series['sizes'][-1]}"]
        cells += [f"{time['found']:.2f} ({time['low']:.2f}–{time['high']:.2f})", f"{time['expected']:.2f}"]
        cells += [series["memory"], f"{memory['found']:.2f}", f"{memory['expected']:.2f}"] if memory else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(series: dict, path: Path) -> None:
    """Time, and memory where there is any, over size, both logarithmic; dashed: what is predicted, through the largest size."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    from lambda_kernels.files import atomic_write
    from lambda_vit.report.figures.style import MUTED, SERIES, new_figure

    panels = [("processor time, s", [middle for _, middle, _ in series["seconds"]], series["work"])]
    if "memory" in series:
        panels.append((f"{series['memory']}, MB", [b / 1e6 for b in series["bytes"]], series["expected_bytes"]))
    with new_figure(2.5) as figure:
        figure.set_size_inches(figure.get_figwidth() * len(panels) / 2, figure.get_figheight())
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (label, values, expected) in zip(every, panels, strict=True):
            sizes = series["sizes"]
            axes.loglog(sizes, [values[-1] * e / expected[-1] for e in expected], "--", color=MUTED, label="predicted")
            axes.loglog(sizes, values, "o-", color=SERIES[0], markersize=4, label="measured")
            axes.set_xticks(sizes, [short(size) for size in sizes])
            span = max(values) / min(values)
            steps = (1, 1.5, 2, 3, 5, 7) if span < 10 else (1, 2, 5) if span < 100 else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=steps))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.minorticks_off()
            axes.set_xlabel(series["axis"])
            axes.set_ylabel(label)
        figure.axes[0].legend()
        figure.suptitle(
            textwrap.fill(series["title"], 55 * len(panels)), fontsize=9, x=0.01, horizontalalignment="left"
        )
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=90, facecolor="white")


def short(size: int) -> str:
    """A size in at most four characters."""
    return f"{size:g}" if size < 10_000 else f"{size / 1000:.3g}k"


def page(found: dict) -> str:
    """What stands between the page's comments."""
    environment = found["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", *records.PACKAGES))
    commit = f"{environment['commit'][:9]}{' with changes' if environment['dirty'] else ''}"
    text = f"{environment['cpu']}, one thread, float32; {versions}; commit {commit}; {environment['time'][:10]}."
    plots = [f"![{series['title']}](scaling-{name}.png)" for name, series in found["series"].items()]
    return "\n\n".join([text, table(found), *plots])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="scaling.py", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and small sizes")
    parser.add_argument("--only", default=",".join(SERIES), help=f"series, of {','.join(SERIES)}")
    parser.add_argument("--write", action="store_true", help="measure all and bring docs/ up to date")
    parser.add_argument("--draw", action="store_true", help="docs/ anew from --out, without measuring")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "scaling.json", help="where --write puts all")
    options = parser.parse_args(arguments)
    wanted = [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in wanted if name not in SERIES]:
        parser.error(f"--only: unknown {', '.join(unknown)}; series are {', '.join(SERIES)}")
    if options.draw:
        found = json.loads(options.out.read_text(encoding="utf-8"))
        for name, series in found["series"].items():
            plot(series, DOCS / f"scaling-{name}.png")
        pages.write(DOCS / "scaling.md", "scaling.py", page(found))
        return 0
    if options.write and (options.quick or wanted != list(SERIES)):
        parser.error("--write is for all series in full size")
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # PyTorch's profiler, of which only the record of the allocator is wanted
    import torch

    from lambda_kernels.files import write_json

    torch.set_num_threads(1)
    found: dict = {"environment": records.describe(), "series": {}}
    for name in wanted:
        found["series"][name] = measured(SERIES[name](options.quick), QUICK_ROUNDS if options.quick else ROUNDS)
        print(table({**found, "series": {name: found["series"][name]}}).splitlines()[-1], flush=True)
        if options.write:
            write_json(options.out, found)
            plot(found["series"][name], DOCS / f"scaling-{name}.png")
    if options.write:
        pages.write(DOCS / "scaling.md", "scaling.py", page(found))
    else:
        print(json.dumps(found["environment"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
