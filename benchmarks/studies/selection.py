"""Every selection strategy on one model and one image set: what is picked, what is left of the accuracy, how stable it is.

    python benchmarks/studies/selection.py --model deit_tiny_patch16_224 --weights W --data D --out study.json

Outputs of paths are remembered per image, since the searches of different strategies and subsets meet the same paths
again and again; searching and scoring are the library's own. Results are written after each experiment, and an
interrupted study goes on with the first that is missing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lambda_kernels.files import write_json
from lambda_vit.cli.models import open_model
from lambda_vit.data.images import ImageDataset, open_images
from lambda_vit.data.loader import make_loader, subset
from lambda_vit.data.transforms import transforms_for
from lambda_vit.runtime.processes import Processes
from lambda_vit.selection.path_statistics import PathResult, PathStatistics
from lambda_vit.selection.paths import Outputs, PathRunner, Tokens
from lambda_vit.selection.prefix_cache import FULL, SkippedBlocks
from lambda_vit.selection.repair import ImagePool, repair_blocks
from lambda_vit.selection.rounds import rank_layers, search_round
from lambda_vit.selection.search_state import SearchState
from lambda_vit.selection.strategies import STRATEGIES

BATCH = 25


class Pool:
    """Images embedded once, and the logits of all paths that were ever asked for."""

    def __init__(self, model: nn.Module, dataset: object) -> None:
        self._model, self._chosen = model, ImagePool(0)
        self.runner = PathRunner(model)
        self.classes = model.num_classes
        self.dtype = next(model.parameters()).dtype
        tokens, targets = [], []
        for number, (images, labels) in enumerate(make_loader(dataset, BATCH)):
            images = images.to(self.dtype)
            self._chosen.add(number, images)
            tokens.append(self.runner.embed(images).tokens)
            if self.runner.why_images is not None:
                raise SystemExit(f"this model cannot be studied: {self.runner.why_images}")
            targets.append(labels)
        self.tokens, self.targets = torch.cat(tokens), torch.cat(targets)
        self._logits: dict[SkippedBlocks, Tensor] = {}
        self._cosines: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def repaired(self) -> Pool:
        """The same images, with repaired MLPs where attention is skipped."""
        found = copy.copy(self)
        found._logits, found.runner = {}, PathRunner(self._model)
        chosen = self._chosen.merge(Processes())
        halves = repair_blocks(found.runner, chosen, range(self.runner.depth), Processes(), self.tokens.device)
        found.runner.use_halves({index: repaired.half for index, repaired in halves.items()})
        return found

    def logits(self, paths: Collection[SkippedBlocks], indices: np.ndarray) -> dict[SkippedBlocks, Tensor]:
        """Of these images; what is missing is computed, all that is missing of an image in one walk."""
        for path in paths:
            if path not in self._logits:
                self._logits[path] = torch.full((len(self), self.classes), torch.nan)
        missing: dict[frozenset[SkippedBlocks], list[int]] = {}
        for index in indices:
            absent = frozenset(path for path in paths if torch.isnan(self._logits[path][index, 0]))
            if absent:
                missing.setdefault(absent, []).append(int(index))
        for absent, images in missing.items():
            for start in range(0, len(images), BATCH):
                some = images[start : start + BATCH]
                for path, out in self.runner.outputs(Tokens(self.tokens[some], None), sorted(absent, key=sorted)):
                    self._logits[path][some] = out.logits.float()
        return {path: self._logits[path][indices] for path in paths}

    def cosines(self, indices: np.ndarray) -> Tensor:
        """1 − cos of each image's tokens at each block, [images, depth]."""
        if self._cosines is None:
            self._cosines = torch.full((len(self), self.runner.depth), torch.nan)
        absent = [int(i) for i in indices if torch.isnan(self._cosines[i, 0])]
        for start in range(0, len(absent), BATCH):
            some = absent[start : start + BATCH]
            for block, before, after in self.runner.attention_inputs_and_outputs(Tokens(self.tokens[some], None)):
                distance = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)
                self._cosines[some, block] = distance.mean(1)
        return self._cosines[indices]


class PoolMeasurement:
    """What a search asks of a `Measurement`, out of a pool's images."""

    def __init__(self, pool: Pool, indices: np.ndarray, estimator: str = "gaussian") -> None:
        self.pool, self.indices, self.estimator = pool, indices, estimator

    def measure(
        self,
        paths: Collection[SkippedBlocks],
        description: str = "",
        *,
        compare: bool = False,
        label: bool = False,
        keep: bool = False,
    ) -> dict[SkippedBlocks, PathResult]:
        """As `Measurement.measure`."""
        wanted = list(dict.fromkeys([*paths, FULL] if compare else paths))
        found = self.pool.logits(wanted, self.indices)
        statistics = PathStatistics(list(paths), self.estimator, "logits", 256, compare=compare, label=label)
        statistics.add(
            {path: Outputs(found[path], found[path]) for path in paths},
            found.get(FULL),
            self.pool.targets[self.indices],
        )
        return statistics.results(Processes())

    def cosine_distances(self, description: str = "") -> dict[int, float]:
        """As `Measurement.cosine_distances`."""
        return dict(enumerate(self.pool.cosines(self.indices).double().mean(0).tolist()))


def search(measurement: PoolMeasurement, strategy: str, count: int, beam: int = 1) -> dict:
    """Run a strategy, and tell its picks and scores."""
    how, found = STRATEGIES[strategy], SearchState()
    candidates = range(measurement.pool.runner.depth)

    def others(layers: Collection[int]) -> list[int]:
        return [layer for layer in candidates if layer not in layers]

    if how.how == "ranked":
        found = rank_layers(measurement, how.criterion, candidates, count, strategy)
    else:
        for _ in range(count):
            found = search_round(measurement, how.criterion, found, others, beam, strategy)
    best = found.branches[0]
    return {"layers": list(best.layers[:count]), "rounds": [r.to_dict() for r in best.rounds]}


def quality(measurement: PoolMeasurement, layers: Sequence[int], counts: Sequence[int]) -> list[dict]:
    """Accuracy, agreement and divergence after some of the picks, nothing trained."""
    paths = {count: frozenset(layers[:count]) for count in counts}
    found = measurement.measure(list(paths.values()), compare=True, label=True)
    return [
        {"count": count, "top1": found[p].top1, "agreement": found[p].agreement, "kl": found[p].kl,
         "entropy": found[p].entropy} for count, p in paths.items()
    ]  # fmt: skip


class Study:
    """Experiments by name, each done once."""

    def __init__(self, path: Path, options: dict) -> None:
        self.path = path
        self.record = json.loads(path.read_text()) if path.exists() else {"options": options, "results": {}}
        if self.record["options"] != options:
            raise SystemExit(f"{path} was made with other options: {self.record['options']}")

    def run(self, name: str, experiment: Callable[[], object]) -> dict:
        """The result of `experiment`, from the file if it is there."""
        if name not in self.record["results"]:
            started = time.perf_counter()
            result = experiment()
            self.record["results"][name] = {"result": result, "seconds": round(time.perf_counter() - started, 1)}
            write_json(self.path, self.record)
            print(f"{self.record['results'][name]['seconds']:8.1f} s  {name}", flush=True)
        return self.record["results"][name]["result"]


def main() -> None:
    """Read options, run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--images", type=int, default=200, help="for the comparison of strategies")
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--evaluate-at", default="1,2,3,4,5,6", help="picks after which accuracy is measured")
    parser.add_argument("--sizes", default="100,500", help="of random subsets, for the stability of NOSE")
    parser.add_argument("--draws", type=int, default=5, help="subsets of each size, and random selections")
    options = parser.parse_args()
    counts = [int(c) for c in options.evaluate_at.split(",")]
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("out",)}
    for name in ("weights", "data"):
        shown[name] = Path(shown[name]).name
    study = Study(options.out, shown)
    with torch.inference_mode():
        model = open_model(options.model, weights=options.weights)
        opened = {
            split: open_images(options.data, split, transform=transforms_for(model), num_classes=model.num_classes)
            for split in ("train", "val")
        }
        picks = compare_strategies(study, model, opened["train"], options)
        validation = Pool(model, subset(opened["val"], options.validation))
        measure_quality(study, validation, picks, counts)
        # The rounding of bfloat16 is far below what another choice of images changes, and this is most of the work.
        coarse = copy.deepcopy(model).bfloat16()
        for draw in range(options.draws):
            stability(study, coarse, opened["train"], draw, options)
        every = PoolMeasurement(validation, np.arange(len(validation)))
        for size, draw in itertools.product(sizes_of(options), range(options.draws)):
            layers = study.record["results"][f"stability {size} {draw}"]["result"]["layers"]
            study.run(f"quality stability {size} {draw}", lambda layers=layers: quality(every, layers, [4]))


def sizes_of(options: argparse.Namespace) -> list[int]:
    """Of the random subsets, the smallest first."""
    return sorted(map(int, options.sizes.split(",")))


def stability(study: Study, model: nn.Module, dataset: ImageDataset, draw: int, options: argparse.Namespace) -> None:
    """NOSE on one draw of random images: subsets of it, each holding the smaller ones."""
    sizes = sizes_of(options)
    if sizes[-1] > len(dataset):
        raise SystemExit(f"--sizes: there are {len(dataset)} training images, not {sizes[-1]}")
    if all(f"stability {size} {draw}" in study.record["results"] for size in sizes):
        return
    drawn = np.random.default_rng(draw).permutation(len(dataset))[: sizes[-1]]
    pool = Pool(model, dataset.select(drawn.tolist()))
    for size in sizes:
        measurement = PoolMeasurement(pool, np.arange(size))
        study.run(f"stability {size} {draw}", lambda m=measurement: search(m, "nose", options.count))


def compare_strategies(study: Study, model: nn.Module, dataset: object, options: argparse.Namespace) -> dict:
    """The layers that each strategy picks from the same images, by name."""
    pool = Pool(model, subset(dataset, options.images))
    indices = np.arange(len(pool))
    found = {}
    searched = [name for name, how in STRATEGIES.items() if how.how != "control"]
    for name in searched:

        def searching(name: str = name) -> dict:
            own = pool.repaired() if STRATEGIES[name].repair else pool
            return search(PoolMeasurement(own, indices), name, options.count)

        found[name] = study.run(name, searching)
    histogram = PoolMeasurement(pool, indices, "histogram")
    found["nose, histogram"] = study.run("nose, histogram", lambda: search(histogram, "nose", options.count))
    measurement = PoolMeasurement(pool, indices)
    found["nose, beam 3"] = study.run("nose, beam 3", lambda: search(measurement, "nose", options.count, beam=3))
    picks = {name: result["layers"] for name, result in found.items()}
    picks["first"] = list(range(options.count))
    for seed in range(options.draws):
        generator = np.random.default_rng(seed)
        picks[f"random {seed}"] = generator.permutation(pool.runner.depth)[: options.count].tolist()
    return study.run("picks", lambda: picks)


def measure_quality(study: Study, pool: Pool, picks: dict, counts: Sequence[int]) -> None:
    """The accuracy of every strategy's picks on images that none has seen."""
    everything = PoolMeasurement(pool, np.arange(len(pool)))
    study.run("quality full", lambda: quality(everything, [], [0]))
    for name, layers in picks.items():
        study.run(f"quality {name}", lambda layers=layers: quality(everything, layers, counts))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
