"""Token merging on a full network and on one without some of its attention layers: accuracy, FLOPs, and time in turns.

    python benchmarks/studies/merging.py --model deit_tiny_patch16_224 --weights W --remove 1,4,5,11 --data D.zip --out R.json

Nothing is trained: layers are skipped, tokens are merged, and what is left is measured. All networks take turns in one
process; what is compared is the median of the ratios within a round. Results are written after each measurement, and what
the file holds already is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lambda_kernels import convert_vit
from lambda_kernels.files import write_json
from lambda_vit.cli.models import open_model
from lambda_vit.cli.options import parse_indices
from lambda_vit.data.images import open_images
from lambda_vit.data.loader import make_loader, subset
from lambda_vit.data.transforms import transforms_for
from lambda_vit.measure.accuracy import evaluate
from lambda_vit.measure.cost import cost
from lambda_vit.models.properties import input_shape
from lambda_vit.runtime import environment

PLAIN = "timm"  # the network as timm built it: what every time is compared with


def networks(model: nn.Module, remove: Sequence[int], merged: Sequence[int], start: int) -> dict[str, nn.Module]:
    """timm's own, and with `merged` tokens gone per block: all attention layers, and without those of `remove`."""
    found = {PLAIN: model}
    for layers in ((), tuple(remove)):
        for r in merged:
            name = f"{'removed' if layers else 'full'}, r={r}"
            found[name] = convert_vit(model, layers, residual_scale=1.0, tome_r=r, tome_start=start)
    return found


def take_turns(models: Mapping[str, nn.Module], batch: int, rounds: int) -> dict[str, dict[str, object]]:
    """Seconds of the processor per network and round, and the quartiles of `PLAIN`'s over its own in the same round.

    The processor's and not the wall's: with one thread they are the same on a quiet machine, and on a busy one only the
    first do not hold the time that others had it.
    """
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    inputs = torch.randn(batch, *input_shape(models[PLAIN]), generator=torch.Generator().manual_seed(0))
    for turn in range(-1, rounds):  # the first is not counted
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.process_time()
            models[name](inputs)
            if turn >= 0:
                times[name].append(time.process_time() - begun)
    return {name: {"seconds": times[name], "speed": _quartiles(times[PLAIN], times[name])} for name in names}


def _quartiles(rival: Sequence[float], own: Sequence[float]) -> list[float]:
    return statistics.quantiles([a / b for a, b in zip(rival, own, strict=True)], n=4, method="inclusive")


def describe(model: nn.Module) -> dict[str, object]:
    """Size and FLOPs, and how many tokens go into each block."""
    costs, info = cost(model), getattr(model, "lambda_kernels_info", None)
    return {
        "parameters": costs.parameters,
        "flops": costs.flops,
        "tokens": [row.tokens for row in info.blocks] if info else None,
        "merged": [row.merged for row in info.blocks] if info else None,
    }


def table(record: Mapping) -> str:
    """The results as Markdown."""
    sets = record["data"]
    head = ["network", "tokens behind", "GFLOPs", "throughput", *(f"top-1, {name}" for name in sets)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in record["networks"].items():
        tokens = row["tokens"][-1] - row["merged"][-1] if row["tokens"] and row["tokens"][-1] else "–"
        speed = "–"
        if "speed" in row:
            low, middle, high = row["speed"]
            speed = f"{middle:.2f} ({low:.2f}–{high:.2f})"
        accuracy = [f"{row[key]['top1']:.1f} %" if (key := f"accuracy, {s}") in row else "–" for s in sets]
        lines.append("| " + " | ".join([name, str(tokens), f"{row['flops'] / 1e9:.2f}", speed, *accuracy]) + " |")
    return "\n".join(lines)


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def run(options: argparse.Namespace) -> dict:
    """Measure everything that is asked for, and keep it in `options.out`."""
    model = open_model(options.model, weights=options.weights)
    models = networks(model, parse_indices(options.remove, "--remove"), parse_indices(options.r, "--r"), options.start)
    record = _begun(options) or {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commits": [],
        "environment": environment.versions(),
        "settings": _settings(options),
        "data": {},
        "networks": {name: describe(network) for name, network in models.items()},
    }
    if (commit := _commit()) not in record["commits"]:
        record["commits"].append(commit)  # an interrupted study may have gone on with another one
    rows = record["networks"]
    if "speed" not in rows[PLAIN]:
        for name, found in take_turns(models, options.batch, options.rounds).items():
            rows[name].update(found)
        record["load_average"] = list(os.getloadavg())
        write_json(options.out, record)
    for path in options.data:
        dataset = open_images(path, "val", transform=transforms_for(model), num_classes=model.num_classes)
        if options.samples and options.samples < len(dataset):
            dataset = subset(dataset, options.samples)
        record["data"][path.stem] = len(dataset)
        key = f"accuracy, {path.stem}"
        for name in [name for name in models if rows[name].get(key, {}).get("count") != len(dataset)]:
            result = evaluate(models[name], make_loader(dataset, options.batch), description=f"{path.stem}, {name}")
            found = result.to_dict()
            rows[name][key] = {"count": found.pop("images"), **found}
            write_json(options.out, record)
    return record


def _settings(options: argparse.Namespace) -> dict[str, object]:
    names = ("model", "remove", "r", "start", "batch")
    return {name: getattr(options, name) for name in names}


def _begun(options: argparse.Namespace) -> dict | None:
    """What `options.out` holds of this study; None where there is no such file yet."""
    if not options.out.exists():
        return None
    record = json.loads(options.out.read_text(encoding="utf-8"))
    if record["settings"] != _settings(options):
        raise SystemExit(f"{options.out} holds a study of other settings: {record['settings']}. Use another file")
    return record


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="zips or folders; the split val is read")
    parser.add_argument("--remove", default="1,4,5,11")
    parser.add_argument("--r", default="0,4,8,13,16,19", help="tokens merged per block")
    parser.add_argument(
        "--start", type=int, default=1, help="of the blocks that keep their attention, the first to merge"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15, help="of times, at least 2")
    parser.add_argument("--samples", type=int, help="images of each data set; all without it")
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    print(table(run(arguments().parse_args())))
