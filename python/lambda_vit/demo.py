"""The main job from end to end on data that ships inside scikit-learn: train, measure, select, dilute, remove, compare."""

from __future__ import annotations

import contextlib
import datetime
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lambda_kernels import convert_vit, from_pretrained, save_pretrained
from lambda_kernels.files import atomic_write

from .data.digits import Digits, digits
from .data.loader import make_loader
from .measure.comparison import evaluation_row, kernel_paths, path_lines
from .measure.latency import compare_latency
from .measure.layer_profile import profile_layers
from .report.page import console_summary, write_report
from .runtime import environment
from .runtime.progress import task
from .selection.result import Selection
from .selection.search import select_layers
from .training.finetune import FinetuneResult, finetune

# A ViT small enough to train in seconds. timm's default initialisation reaches only about 42 % here, "moco" over 90.
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "weight_init": "moco",
}
LEAST_BASELINE = 90.0


@dataclass(frozen=True)
class DemoOptions:
    """How long the demo trains, and on what."""

    count: int = 3
    baseline_epochs: int = 15
    dilution_epochs: int = 8
    tuning_epochs: int = 4
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"
    train_images: int | None = None  # fewer than all, for a quick look


@dataclass(frozen=True)
class DemoResult:
    """Where the files are, what was found, and what makes the run a failure: a poor baseline, a check that failed."""

    folder: Path
    record: dict
    failures: tuple[str, ...]


def run_demo(folder: str | Path, options: DemoOptions | None = None, console: Console | None = None) -> DemoResult:
    """Run the demo and write `folder/`: report.{html,md,png,json}, selection.json, model/. Without a console it is silent."""
    options = options or DemoOptions()
    console = console or Console(quiet=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    with torch.random.fork_rng(), _one_thread(), warnings.catch_warnings():
        # The selection's own warnings contain it once; every variant would repeat it.
        warnings.filterwarnings("ignore", message="the last .* would have no attention")
        return _run(folder, options, device, console)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # Layers this small gain nothing from a second thread, and lose a factor of ten where it has to wait for a busy core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, options: DemoOptions, device: torch.device, console: Console) -> DemoResult:
    torch.manual_seed(options.seed)
    train, val = digits("train"), digits("val")
    if options.train_images is not None:
        train = train.select(range(options.train_images))
    demo = _Demo(options, device, train, val)

    def say(text: str) -> None:
        console.print(text, style="bold", markup=False)

    with task("Demo", 7) as advance:

        @contextlib.contextmanager
        def step(title: str) -> Iterator[None]:
            say(title)
            yield
            advance()

        with step("1/7 Train a small ViT on scikit-learn's digits"):
            full = demo.train_baseline()
        with step("2/7 Measure the entropy of every attention and MLP output"):
            profile = profile_layers(full, demo.calibration)
        with step(f"3/7 Select {options.count} attention layers by NOSE, and controls"):
            picks = {
                "nose": select_layers(full, demo.calibration, options.count),
                # Drawn without looking at NOSE's picks: where they coincide, the report shows that.
                "random": select_layers(full, None, options.count, strategy="random", seed=options.seed),
                "first": select_layers(full, None, options.count, strategy="first"),
            }
            picks["nose"].to_json(folder / "selection.json")
        with step("4/7 Dilute the selected layers, then the controls, each from the same baseline"):
            models = demo.train_variants(full, picks)
        with step("5/7 Save, load again, compare"):
            demo.check_reload(models["nose diluted"], folder / "model")
        with step("6/7 Count costs and take times"):
            variants = demo.variants(models)
        with step("7/7 Write the report"):
            record = demo.record(full, profile.to_dict(), picks, variants, models["nose diluted"], folder)
            write_report(record, folder)
            demo.write_log(folder / "log.jsonl")
    console.print(console_summary(record))
    say("How the blocks of the smaller model run")
    for line in path_lines(record["kernel_paths"]):
        console.print(f"  {line}", soft_wrap=True, markup=False)
    return DemoResult(folder, record, failures_of(record, variants[0]["top1"]))


def failures_of(record: dict, baseline: float) -> tuple[str, ...]:
    """What makes a run a failure: checks that did not hold, and a baseline (top-1 in percent) that is too low."""
    failures = [f"{check['name']}: {check['value']}" for check in record["checks"] if not check["ok"]]
    if baseline < LEAST_BASELINE:
        failures.append(
            f"the baseline reached {baseline:.1f} %, below {LEAST_BASELINE:g} %: what follows means nothing"
        )
    return tuple(failures)


class _Demo:
    """What the steps share: data, training settings, and the checks gathered on the way."""

    def __init__(self, options: DemoOptions, device: torch.device, train: Digits, val: Digits) -> None:
        self.options, self.device, self.train_set, self.val = options, device, train, val
        # 8×8 images fit on any device, and the fixed order makes runs comparable.
        self.calibration = make_loader(train, 256)
        self.val_loader = make_loader(val, 256)
        self.histories: list[dict] = []
        self.checks: list[dict] = []

    def train(self, name: str, label: str, model: nn.Module, **options: Any) -> FinetuneResult:
        """Train `model`, and keep the history of it under `name`."""
        result = finetune(
            model,
            make_loader(self.train_set, self.options.batch_size, shuffle=True, seed=self.options.seed, drop_last=True),
            val_loader=self.val_loader,
            seed=self.options.seed,
            **options,
        )
        self.histories.append({"name": name, "label": label, "epochs": [epoch.to_dict() for epoch in result.history]})
        return result

    def train_baseline(self) -> nn.Module:
        import timm

        model = timm.create_model(ARCHITECTURE, pretrained=False, **MODEL_ARGS).to(self.device)
        options = {"epochs": self.options.baseline_epochs, "lr": 2e-3, "description": "Baseline", "inplace": True}
        return self.train("baseline", "Full model, from scratch", model, **options).model

    def train_variants(self, full: nn.Module, picks: dict[str, Selection]) -> dict[str, nn.Module]:
        """Each pick diluted from the same baseline; NOSE's also dropped at once, and the full model tuned as long."""
        models = {"full": full, "nose untrained": convert_vit(full, picks["nose"])}
        epochs = self.options.dilution_epochs + self.options.tuning_epochs
        plans = {
            "nose diluted": (full, picks["nose"].layers, "NOSE, diluted"),
            "nose dropped": (models["nose untrained"], (), "NOSE, dropped at once"),
            "random diluted": (full, picks["random"].layers, "Random, diluted"),
            "first diluted": (full, picks["first"].layers, "First blocks, diluted"),
            "full tuned": (full, (), "Full model, trained on"),
        }
        for name, (start, layers, label) in plans.items():
            result = self.train(
                name,
                label,
                start,
                layers=layers,
                epochs=epochs,
                dilution_epochs=self.options.dilution_epochs,
                lr=1e-3,
                description=label,
            )
            models[name] = result.model
            if name == "nose diluted":
                bound = 1e-4
                self._check(
                    "Deleting the faded attention changes no logit",
                    f"largest difference {result.swap_difference:.1e}",
                    result.swap_difference < bound,
                    f"on a training batch, the diluted model at λ = 0 against the one without the layers; bound {bound:g}",
                )
        return models

    def check_reload(self, model: nn.Module, folder: Path) -> None:
        save_pretrained(model, folder)
        loaded = from_pretrained(folder, device=self.device)
        images = self.val.tensors[0].to(self.device)
        with torch.inference_mode():
            same = torch.equal(model(images), loaded(images))
        what = f"logits of all {len(images)} validation images compared bit by bit"
        self._check("The saved model loads and gives the same logits", "equal" if same else "different", same, what)

    def variants(self, models: dict[str, nn.Module]) -> list[dict]:
        """A row per model: accuracy with its interval, agreement with the full model, cost, latency."""
        rows = {
            "full": ("Full model", "as trained from scratch"),
            "nose untrained": ("NOSE, skipped, untrained", "the attention is skipped, nothing was trained"),
            "nose diluted": ("NOSE, diluted", ""),
            "nose dropped": ("NOSE, dropped at once, tuned", "the same epochs, no dilution"),
            "random diluted": ("Random, diluted", "control"),
            "first diluted": ("First blocks, diluted", "control"),
            "full tuned": ("Full model, tuned as long", "what the extra epochs alone give"),
        }
        # Removed variants of one size run the same code: two models are enough for a time.
        timed = compare_latency({k: models[k] for k in ("full", "nose diluted")}, (1, 64), rounds=50)
        return [
            evaluation_row(
                name,
                label,
                models[name],
                self.val_loader,
                reference=None if name == "full" else models["full"],
                cost_batch=64,
                latency=timed.get(name),
                trained="untrained" not in name,
                note=note,
            )
            for name, (label, note) in rows.items()
        ]

    def record(
        self, full: nn.Module, profile: dict, picks: dict[str, Selection], variants: list[dict], final: nn.Module,
        folder: Path,
    ) -> dict:  # fmt: skip
        """Everything the report shows, in plain JSON types."""
        by_name = {row["name"]: row for row in variants}
        before, after, untrained = by_name["full"], by_name["nose diluted"], by_name["nose untrained"]
        layers = ", ".join(map(str, picks["nose"].layers))
        smaller = 100 * (1 - after["parameters"] / before["parameters"])
        summary = (
            f"Without the attention of blocks {layers} ({len(picks['nose'].layers)} of {len(full.blocks)}) the model has "
            f"{smaller:.0f} % fewer parameters. Top-1 is {after['top1']:.1f} % after dilution against "
            f"{before['top1']:.1f} % with all its attention ({untrained['top1']:.1f} % without training, "
            f"{by_name['first diluted']['top1']:.1f} % with the first {len(picks['first'].layers)} removed instead, "
            f"{by_name['full tuned']['top1']:.1f} % for the full model trained as long). "
            f"Dilution against dropping at once: {after['top1']:.1f} and {by_name['nose dropped']['top1']:.1f} %; on "
            f"{len(self.val)} images a difference of a few points is noise."
        )
        data = {
            "description": "scikit-learn digits, 8×8 grey images",
            "train": len(self.train_set),
            "validation": len(self.val),
            "calibration": len(self.train_set),
            "classes": 10,
        }
        return {
            "title": "Attention removal on handwritten digits",
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": environment.command_line(),
            "seed": self.options.seed,
            "summary": summary,
            "environment": environment.versions(),
            "model": {
                "name": f"ViT, width {MODEL_ARGS['embed_dim']}, {MODEL_ARGS['depth']} blocks, patch {MODEL_ARGS['patch_size']}",
                "blocks": len(full.blocks),
                "input": [1, 8, 8],
                "classes": 10,
                "score": "logits",
            },
            "data": data,
            "profile": profile,
            "selection": picks["nose"].to_dict(),
            "variants": variants,
            "training": self.histories,
            "kernel_paths": kernel_paths(final),
            "checks": self.checks,
            "not_exercised": [
                *environment.not_exercised(self.device),
                "natural images, and a network that was trained by others",
                "more than one process",
            ],
            "next_commands": next_commands(folder),
            "files": {
                "selection.json": "the picks and every score",
                "log.jsonl": "every epoch of every run",
                "model/": "config.json and model.safetensors, for from_pretrained",
                "report.html": "this report as one page",
                "report.json": "all figures of this report",
            },
        }

    def write_log(self, path: Path) -> None:
        """One JSON object per line and epoch, of all runs."""
        rows = [{"run": run["name"], **epoch} for run in self.histories for epoch in run["epochs"]]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")

    def _check(self, name: str, value: str, ok: bool, detail: str) -> None:
        self.checks.append({"name": name, "value": value, "ok": ok, "detail": detail})


def next_commands(folder: Path) -> list[dict[str, str]]:
    """What a user would type next, for data of their own."""
    model, images = "--model deit_small_patch16_224 --pretrained", "path/to/images"
    commands = {
        "Select on your own images, a folder or zip with train/<class>/* and val/<class>/*": f"lambda-vit select {model} "
        f"--data {images} --count 4 --out runs/select",
        "Remove the selected attention, and train what remains to do what the full model did": f"lambda-vit finetune {model} "
        f"--selection runs/select --recipe recover --data {images} --out runs/finetune",
        "Or remove it at once, without training": f"lambda-vit convert {model} --selection runs/select --out smaller/",
        "Compare accuracy, size and speed with the full model": "lambda-vit validate --model runs/finetune/model "
        f"--reference deit_small_patch16_224 --reference-pretrained --data {images}",
        "Look at the model of this run": f"ls {folder / 'model'}",
    }
    return [{"what": what, "command": command} for what, command in commands.items()]
