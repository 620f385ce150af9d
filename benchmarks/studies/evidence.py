"""What is left of the accuracy when attention layers go, at an equal budget: picks and controls, with dilution and without.

    python benchmarks/studies/evidence.py --model deit_tiny_patch16_224 --weights W --data D --out runs/study --results R.json

Every arm starts from one network, adapted to the data set first, and trains on the same images in the same order, for as
long, by the same recipe; arms differ in the attention layers they lose, and in whether these are faded out or dropped at
once. The full network is trained on just as long. Interrupted, the command goes on where it was; started several times side
by side, it shares the arms out. Without `--results` it only trains.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.studies.evidence_table import write_results
from lambda_kernels import convert_vit, from_pretrained
from lambda_kernels.files import write_json
from lambda_vit.cli.models import open_model
from lambda_vit.data.images import open_images
from lambda_vit.data.loader import make_loader, subset
from lambda_vit.data.transforms import transforms_for
from lambda_vit.measure.cost import cost
from lambda_vit.report.page import write_training_report
from lambda_vit.runtime import environment, progress
from lambda_vit.selection.search import select_layers
from lambda_vit.training.images.opening import open_training_data
from lambda_vit.training.recipe import Recipe, load_recipe
from lambda_vit.training.run import FinetuningRun, run_finetuning

# A short schedule for a network that is good already, with mild augmentation. The same for every arm. Its rate unsettles the
# full network a little, too, which is why arms are compared with that after its own training.
SHORT = {
    "batch_size": 128, "micro_batch": 128, "lr": 3e-4, "min_lr": 3e-6, "warmup_epochs": 0.2, "warmup_lr": 3e-5,
    "weight_decay": 0.05, "clip_grad": 1.0, "label_smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0, "aa": "rand-m5-mstd0.5-inc1",
    "scale": (0.35, 1.0), "reprob": 0.0, "amp": "bf16",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training: whose picks, how many, and whether they are diluted or dropped at once."""

    picks: str
    count: int
    diluted: bool

    @property
    def name(self) -> str:
        if not self.count:
            return "full"
        return f"{self.picks}-{self.count}-{'diluted' if self.diluted else 'dropped'}"


def arms(seeds: int) -> list[Arm]:
    """All of them, those that the claim rests on first."""
    both = (True, False)
    found = [Arm("full", 0, False), *(Arm("nose", 5, way) for way in both)]
    found += [Arm(picks, 5, way) for picks in ("random 0", "first") for way in both]
    found += [Arm("nose", count, way) for count in (3, 4, 6) for way in both]
    found += [Arm(f"random {seed}", 5, way) for seed in range(1, seeds) for way in both]
    return found + [Arm("kl", 5, way) for way in both]


class Evidence:
    """The folder of a study, and what all arms share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        shared = {
            "model": options.model, "weights": options.weights.name, "data": options.data.name,
            "img_size": options.img_size, "adapt_epochs": options.adapt_epochs, "epochs": options.epochs,
            "calibration": options.calibration, "seeds": options.seeds, "seed": options.seed,
        }  # fmt: skip
        path = self.out / "options.json"
        with locked(self.out / "options.lock"):
            if not path.exists():
                write_json(path, shared)
            found = json.loads(path.read_text(encoding="utf-8"))
        if found != shared:
            raise SystemExit(f"{self.out} was begun with other options: {found}")

    def recipe(self, **more: Any) -> Recipe:
        return load_recipe(None, {**SHORT, "seed": self.options.seed, "img_size": self.options.img_size, **more})

    def base(self) -> nn.Module:
        """The network that all arms start from."""
        folder = self.out / "base"
        with locked(self.out / "base.lock"):
            if not (folder / "model" / "config.json").exists():
                model = with_classes(open_model(self.options.model, weights=self.options.weights), self.options.data)
                recipe = self.recipe(epochs=self.options.adapt_epochs)
                run = self.finetune(model, recipe, out=folder, description="Adapt")
                if run.stopped:
                    sys.exit(run.exit_code)
        return from_pretrained(folder / "model", fuse="none")

    def finetune(self, model: nn.Module, recipe: Recipe, **options: Any) -> FinetuningRun:
        """Train in a folder, with a report."""

        def open_data(model: nn.Module, recipe: Recipe) -> Any:
            return open_training_data(self.options.data, model, recipe)

        return run_finetuning(model, recipe, open_data, report=write_training_report, **options)

    def picks(self, base: nn.Module) -> dict[str, list[int]]:
        """Layers in the order picked, by whose picks they are."""
        path = self.out / "picks.json"
        with locked(self.out / "picks.lock"):
            if not path.exists():
                train = open_images(
                    self.options.data, "train", transform=transforms_for(base), num_classes=base.num_classes
                )
                images = make_loader(subset(train, self.options.calibration), 100)
                found = {name: select_layers(base, images, 6, strategy=name).layers for name in ("nose", "kl")}
                found["first"] = tuple(range(6))
                for seed in range(self.options.seeds):
                    drawn = select_layers(base, None, 6, strategy="random", seed=seed)
                    found[f"random {seed}"] = drawn.layers
                write_json(path, {name: list(layers) for name, layers in found.items()})
        return json.loads(path.read_text(encoding="utf-8"))

    def run(self, arm: Arm, base: nn.Module, picks: dict[str, list[int]]) -> None:
        """Train an arm, and note what came of it."""
        layers = picks[arm.picks][: arm.count] if arm.count else []
        how = "linear" if arm.diluted else "none"
        recipe = self.recipe(epochs=self.options.epochs, **({"dilution": how} if layers else {}))
        started = time.perf_counter()
        folder = self.out / arm.name
        run = self.finetune(base, recipe, layers=layers, out=folder, description=arm.name)
        if run.stopped:
            sys.exit(run.exit_code)
        untrained = convert_vit(base, layers, fuse="none") if layers else base
        size, (_, val) = cost(run.model), open_training_data(self.options.data, base, recipe)
        last = run.record["history"][-1]
        write_json(self.out / f"{arm.name}.json", {
            "arm": arm.name, "picks": arm.picks, "count": arm.count, "diluted": arm.diluted, "layers": list(layers),
            "parameters": size.parameters, "flops": size.flops, "best_epoch": run.record["best"]["epoch"],
            "best_top1": run.record["result"]["top1"], "last_top1": last["top1"],
            "boundary": run.record["boundary"], "starts": len(run.record["starts"]),
            "hits": hits(run.model, val), "hits_untrained": hits(untrained, val),
            "seconds": round(time.perf_counter() - started), "environment": environment.versions(),
        })  # fmt: skip


def with_classes(model: nn.Module, data: Path) -> nn.Module:
    """A classifier for the folders of `data`: the rows of ImageNet's own classes, where the folders are named so."""
    from timm.data import ImageNetInfo

    names = open_images(data, "train").classes
    if len(names) == model.num_classes:
        return model
    known = {synset: index for index, synset in enumerate(ImageNetInfo().label_names())}
    if model.num_classes != len(known) or not set(names) <= set(known):
        model.reset_classifier(len(names))
        return model
    rows = torch.tensor([known[name] for name in names])
    weight, bias = model.head.weight.detach()[rows].clone(), model.head.bias.detach()[rows].clone()
    model.reset_classifier(len(names))
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    return model


@torch.inference_mode()
def hits(model: nn.Module, loader: Any) -> str:
    """A 1 for each validation image that the model gets right, else a 0, in the loader's order."""
    model = model.eval()
    return "".join("01"[int(hit)] for images, labels in loader for hit in model(images).argmax(1) == labels)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the system opens the lock of one that was killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether nobody else has it now."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def main(arguments: Sequence[str] | None = None) -> None:
    """Read options, train what is missing, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--adapt-epochs", type=int, default=4, help="of the network that all arms start from")
    parser.add_argument("--epochs", type=int, default=3, help="of every arm")
    parser.add_argument("--calibration", type=int, default=2000, help="training images that layers are picked on")
    parser.add_argument("--seeds", type=int, default=3, help="random draws of layers")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--only", default="", help="arms whose name holds this")
    parser.add_argument("--results", type=Path, help="JSON for the table and the plot, written from what is there")
    options = parser.parse_args(arguments)
    evidence = Evidence(options)
    with progress.progress_bars():
        base = evidence.base()
        picks = evidence.picks(base)
        for arm in arms(options.seeds):
            if options.only not in arm.name or (evidence.out / f"{arm.name}.json").exists():
                continue
            with claimed(evidence.out / f"{arm.name}.lock") as ours:
                if ours and not (evidence.out / f"{arm.name}.json").exists():
                    evidence.run(arm, base, picks)
                    print(f"{arm.name}: done", flush=True)
    if options.results is not None:
        write_results(evidence.out, [arm.name for arm in arms(options.seeds)], options.results)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
