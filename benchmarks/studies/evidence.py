"""The accuracy that is left when attention layers are removed, at an equal budget: ways to remove, losses, picks.

    python benchmarks/studies/evidence.py --model deit_tiny_patch16_224 --weights W --data D --out runs/study --results R.json

Every arm starts from one network, adapted to the data set first, and trains on the same images in the same order. Arms of one
length differ in the attention layers they lose and in how these are removed and repaired; the full network is trained by the
same losses, for as long. `--arms short` finds the way in six epochs per arm, `long` decides in thirty, and `picks` trains
sets of five layers for one epoch, to compare what can be known of them before. If the command is interrupted, run it again to
resume; several processes started at once share the arms. Without `--results` it only trains.

Start it with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, MALLOC_MMAP_THRESHOLD_=4294967296 and
MALLOC_TRIM_THRESHOLD_=8589934592, with which a training step took 10 % less time on glibc: its tensors are not unmapped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import fcntl
import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.studies.evidence_table import write_results
from lambda_kernels import convert_vit, from_pretrained, save_pretrained
from lambda_kernels.files import write_json
from lambda_vit.cli.models import open_model
from lambda_vit.data.images import open_images
from lambda_vit.data.loader import make_loader, subset
from lambda_vit.data.transforms import transforms_for
from lambda_vit.measure.cost import cost
from lambda_vit.report.page import write_training_report
from lambda_vit.runtime import environment, progress
from lambda_vit.selection.measurement import Measurement
from lambda_vit.selection.prefix_cache import FULL
from lambda_vit.selection.search import select_layers
from lambda_vit.training.images.opening import open_training_data
from lambda_vit.training.recipe import Recipe, load_recipe
from lambda_vit.training.run import FinetuningRun, run_finetuning
from lambda_vit.training.storage.checkpoints import Checkpoints

# A schedule for a network that is good already, with mild augmentation. The same for every arm that does not say otherwise.
SHARED = {
    "batch_size": 128, "micro_batch": 128, "lr": 3e-4, "min_lr": 3e-6, "warmup_epochs": 0.2, "warmup_lr": 3e-5,
    "weight_decay": 0.05, "clip_grad": 1.0, "label_smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0, "aa": "rand-m5-mstd0.5-inc1",
    "scale": (0.35, 1.0), "reprob": 0.0,
}  # fmt: skip

TEACHER = {"distillation": "soft", "distillation_alpha": 1.0}
FEATURES = {**TEACHER, "feature_loss": 1.0}
HIDDEN = {**TEACHER, "hidden_loss": 1.0}
MIXUP = {**FEATURES, "mixup": 0.8}
LOCAL = {**FEATURES, "local_epochs": 0.5}


def by(removal: str, terms: dict[str, Any]) -> dict[str, Any]:
    """These terms of the loss with another way to remove than "drop"."""
    return {**terms, "removal": removal}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training: whose picks, how many of them, for how many epochs, and what of the recipe differs from `SHARED`."""

    way: str
    picks: str
    count: int
    epochs: int
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        layers = f"{self.picks}-{self.count}" if self.count else "full"
        return f"{layers}-{self.way}-{self.epochs}" + (f"-seed{self.seed}" if self.seed else "")


# Sets of five layers for the group "picks", by the strategy that picks them.
STRATEGIES: dict[str, dict[str, Any]] = {
    "kl": {"strategy": "kl"},
    "kl-apart": {"strategy": "kl", "min_gap": 2},
    "recoverability": {"strategy": "recoverability"},
    "nose": {"strategy": "nose"},
    "cosine": {"strategy": "cosine"},
}
DRAWS = 8
SETS = ("kl", "nose", "recoverability", "kl-apart", *(f"random{n}" for n in range(DRAWS)), "first", "cosine")

# The arms of each group, those that the conclusions rest on first.
GROUPS = {
    "short": [
        Arm("teacher", "kl", 5, 6, TEACHER),
        Arm("features", "kl", 5, 6, FEATURES),
        Arm("hidden", "kl", 5, 6, HIDDEN),
        Arm("labels", "kl", 5, 6),
        Arm("local", "kl", 5, 6, LOCAL),
        Arm("fade", "kl", 5, 6, by("fade", FEATURES)),
        Arm("progressive", "kl", 5, 6, by("progressive", FEATURES)),
        Arm("dilute", "kl", 5, 6, by("dilute", FEATURES)),
        Arm("slow", "kl", 5, 6, {**FEATURES, "lr": 1e-4, "min_lr": 1e-6, "warmup_lr": 1e-5}),
        Arm("mixup", "kl", 5, 6, MIXUP),
        Arm("features", "full", 0, 6, FEATURES),
        Arm("labels", "full", 0, 6),
    ],
    "long": [
        Arm("features", "full", 0, 30, FEATURES),
        Arm("features", "kl", 5, 30, FEATURES),
        Arm("labels", "full", 0, 30),
        Arm("mixup", "kl", 5, 30, MIXUP),
        Arm("features", "random0", 5, 30, FEATURES),
        Arm("features", "kl", 3, 30, FEATURES),
        Arm("features", "nose", 5, 30, FEATURES),
        Arm("dilute", "kl", 5, 30, by("dilute", FEATURES)),
        Arm("features", "full", 0, 30, FEATURES, seed=1),
        Arm("features", "kl", 5, 30, FEATURES, seed=1),
    ],
    "picks": [Arm("features", name, 5, 1, FEATURES) for name in SETS] + [Arm("features", "full", 0, 1, FEATURES)],
}


class Evidence:
    """The folder of a study, and what all arms share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        shared = {
            "model": options.model, "weights": options.weights.name, "data": options.data.name,
            "img_size": options.img_size, "adapt_epochs": options.adapt_epochs, "calibration": options.calibration,
            "amp": options.amp,
        }  # fmt: skip
        path = self.out / "options.json"
        with locked(self.out / "options.lock"):
            if not path.exists():
                write_json(path, shared)
            found = {"amp": "none", **json.loads(path.read_text(encoding="utf-8"))}
        if found != shared:
            raise SystemExit(f"{self.out} was begun with other options: {found}")

    def recipe(self, **more: Any) -> Recipe:
        """The shared recipe with what differs."""
        return load_recipe(None, {**SHARED, "img_size": self.options.img_size, "amp": self.options.amp, **more})

    def base(self) -> nn.Module:
        """The network that all arms start from."""
        folder = self.out / "base"
        with locked(self.out / "base.lock"):
            if not (folder / "model" / "config.json").exists() and not self.options.adapt_epochs:
                save_pretrained(open_model(self.options.model, weights=self.options.weights), folder / "model")
            elif not (folder / "model" / "config.json").exists():
                model = with_classes(open_model(self.options.model, weights=self.options.weights), self.options.data)
                recipe = self.recipe(epochs=self.options.adapt_epochs)
                run = self.finetune(model, recipe, out=folder, description="Adapt")
                if run.stopped:
                    sys.exit(run.exit_code)
            model = from_pretrained(folder / "model", fuse="none")
            if not (path := self.out / "base.json").exists():
                _, val = open_training_data(self.options.data, model, self.recipe())
                write_json(path, {"hits": hits(model, val), "parameters": cost(model).parameters})
        return model

    def finetune(self, model: nn.Module, recipe: Recipe, **options: Any) -> FinetuningRun:
        """Train in a folder, with a report."""

        def open_data(model: nn.Module, recipe: Recipe) -> Any:
            return open_training_data(self.options.data, model, recipe)

        return run_finetuning(model, recipe, open_data, report=write_training_report, **options)

    def calibration(self, base: nn.Module) -> Any:
        """Training images for picking layers."""
        train = open_images(self.options.data, "train", transform=transforms_for(base), num_classes=base.num_classes)
        return make_loader(subset(train, self.options.calibration), 100)

    def picks(self, base: nn.Module, wanted: Collection[str]) -> dict[str, list[int]]:
        """Layers in the order picked, by whose picks they are: at least those of `wanted`."""
        path = self.out / "picks.json"
        with locked(self.out / "picks.lock"):
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            strategies = {**STRATEGIES, **{f"random{n}": {"strategy": "random", "seed": n} for n in range(DRAWS)}}
            for name, how in {**strategies, "first": {"strategy": "first"}}.items():
                if name in wanted and name not in known:
                    images = None if how["strategy"] in ("random", "first") else self.calibration(base)
                    known[name] = list(select_layers(base, images, 5, **how).layers)
                    write_json(path, known)
        return known

    def predictors(self, base: nn.Module, picks: dict[str, list[int]]) -> dict[str, dict[str, float]]:
        """What is known of each set of five layers before training, lower is better, by set."""
        path = self.out / "predictors.json"
        with locked(self.out / "predictors.lock"):
            if not path.exists():
                write_json(path, measure_sets(base, self.calibration(base), {n: picks[n][:5] for n in SETS}))
        return json.loads(path.read_text(encoding="utf-8"))

    def run(self, arm: Arm, base: nn.Module, picks: dict[str, list[int]]) -> None:
        """Train an arm, and note what came of it."""
        layers = picks[arm.picks][: arm.count] if arm.count else []
        recipe = self.recipe(epochs=arm.epochs, seed=arm.seed, **({"removal": "drop"} | dict(arm.recipe)))
        started = time.perf_counter()
        folder = self.out / arm.name
        run = self.finetune(copy.deepcopy(base), recipe, layers=layers, out=folder, description=arm.name)
        if run.stopped:
            sys.exit(run.exit_code)
        untrained = convert_vit(base, layers, fuse="none") if layers else base
        size, (_, val) = cost(run.model), open_training_data(self.options.data, base, recipe)
        history = run.record["history"]
        write_json(self.out / f"{arm.name}.json", {
            "arm": arm.name, "way": arm.way, "picks": arm.picks, "count": arm.count, "layers": list(layers),
            "epochs": arm.epochs, "seed": arm.seed, "recipe": dict(arm.recipe),
            "parameters": size.parameters, "flops": size.flops, "best_epoch": run.record["best"]["epoch"],
            "best_top1": run.record["result"]["top1"], "last_top1": history[-1]["top1"],
            "curve": [row["top1"] for row in history], "losses": [row["loss"] for row in history],
            "boundary": run.record["boundary"], "starts": len(run.record["starts"]),
            "hits": hits(last_of(run), val), "hits_best": hits(run.model, val), "hits_untrained": hits(untrained, val),
            "seconds": round(time.perf_counter() - started), "environment": environment.versions(),
        })  # fmt: skip


def measure_sets(model: nn.Module, loader: Any, sets: Mapping[str, Sequence[int]]) -> dict[str, dict[str, float]]:
    """What is known of whole sets before training: divergence from the full model, |TE|, turned tokens, and their places."""
    paths = {name: frozenset(layers) for name, layers in sets.items()}
    with Measurement(model, loader) as measurement:
        found = measurement.measure([FULL, *paths.values()], "Measure the sets", compare=True)
        turned = measurement.cosine_distances()
    with Measurement(model, loader) as measurement:
        measurement.repair(range(len(model.blocks)))
        repaired = measurement.measure([FULL, *paths.values()], "Measure the repaired sets", compare=True)
    entropy = found[FULL].entropy
    return {
        name: {
            "kl": found[path].kl,
            "repaired": repaired[path].kl,
            "te": abs(entropy - found[path].entropy),
            "cosine": sum(turned[layer] for layer in path),
            "neighbours": sum(layer + 1 in path for layer in path),
            "first": sum(layer < 4 for layer in path),
        }
        for name, path in paths.items()
    }


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


def last_of(run: FinetuningRun) -> nn.Module:
    """The network after the last epoch. A run returns the best one, which was chosen by the images that it is scored on."""
    model = copy.deepcopy(run.model)
    model.load_state_dict(Checkpoints(run.folder / "checkpoints", 2).newest().state["learner"]["model"])
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
    parser.add_argument(
        "--adapt-epochs",
        type=int,
        default=4,
        help="of the network that all arms start from; with 0 it is the model as it is, with all its classes",
    )
    parser.add_argument("--amp", default="none", help="precision of automatic mixed precision, of all arms")
    parser.add_argument("--calibration", type=int, default=2000, help="training images that layers are picked on")
    parser.add_argument("--arms", nargs="*", default=list(GROUPS), help="groups or names of arms, in this order")
    parser.add_argument("--results", type=Path, help="JSON for the table and the plot, written from what is there")
    options = parser.parse_args(arguments)
    evidence = Evidence(options)
    known = [arm for group in GROUPS.values() for arm in group]
    if strangers := set(options.arms) - set(GROUPS) - {arm.name for arm in known}:
        parser.error(f"no such arms: {', '.join(sorted(strangers))}. Groups: {', '.join(GROUPS)}")
    chosen = [arm for name in options.arms for arm in GROUPS.get(name, [a for a in known if a.name == name])]
    with progress.progress_bars():
        base = evidence.base()
        picks = evidence.picks(base, {arm.picks for arm in chosen})
        for arm in chosen:
            if (evidence.out / f"{arm.name}.json").exists():
                continue
            with claimed(evidence.out / f"{arm.name}.lock") as ours:
                if ours and not (evidence.out / f"{arm.name}.json").exists():
                    evidence.run(arm, base, picks)
                    print(f"{arm.name}: done", flush=True)
        if "picks" in options.arms:
            evidence.predictors(base, picks)
    if options.results is not None:
        write_results(evidence.out, [arm.name for arm in known], options.results)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
