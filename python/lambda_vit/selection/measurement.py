"""Measures entropies and other statistics of a model's output with attention layers skipped; transfer entropy.

TE(S) = H(output) − H(output | attention of S skipped) (arXiv 2404.05657, section 3.2).
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lambda_kernels.convert.checks import check_indices
from lambda_kernels.errors import NonFiniteActivationError
from lambda_kernels.ops.checks import check_choice, dtype_name

from ..data import batches
from ..models.properties import eval_mode, one_device, one_dtype
from ..runtime.processes import Processes
from ..runtime.progress import task
from .activation_cache import ActivationCache, Batch
from .path_statistics import PathResult, PathStatistics
from .paths import Outputs, PathRunner
from .prefix_cache import FULL, SkippedBlocks
from .repair import SETTINGS, ImagePool, repair_blocks

ESTIMATORS = ("gaussian", "histogram")
SCORES = ("logits", "pre_logits")


class Measurement:
    """Measures any number of paths per pass over the data; use it inside `with`, which removes its cache.

    Arguments are those of `select_layers`. The loader yields this process's share of the images. `processes` measure
    together, by default those of the process group, if there is one: all of them must make a `Measurement` and call the
    same methods. The model is in eval mode while measuring, then in its earlier mode again.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        estimator: str = "gaussian",
        score: str = "logits",
        bins: int = 256,
        cache: str = "auto",
        cache_budget: int | None = None,
        cache_folder: str | Path | None = None,
        processes: Processes | None = None,
    ) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("score", score, SCORES)
        batches.check_repeatable("loader", loader)
        self.runner = PathRunner(model, score)
        self.processes = Processes() if processes is None else processes
        self.estimator, self.score, self.bins = estimator, score, bins
        self.device, self.dtype = one_device(model), one_dtype(model)
        self.activations = ActivationCache(
            self.runner,
            loader,
            self.device,
            self.dtype,
            cache=cache,
            budget=cache_budget,
            folder=cache_folder,
            classes=int(getattr(model, "num_classes", 0) or 0),
        )
        self.passes = 0
        self.seconds = {"passes": 0.0, "statistics": 0.0}  # the latter as far as the host can measure it
        self.samples = 0
        self.channels = 0
        self.constant_channels = 0  # the maximum over paths
        self._repair: dict[str, Any] | None = None  # what was repaired, for a report

    def __enter__(self) -> Measurement:
        return self

    def __exit__(self, *exception: object) -> None:
        self.activations.__exit__(*exception)

    @torch.inference_mode()
    def measure(
        self,
        paths: Collection[SkippedBlocks],
        description: str = "Measure",
        *,
        compare: bool = False,
        label: bool = False,
        keep: bool = False,
    ) -> dict[SkippedBlocks, PathResult]:
        """Measure all `paths` in one pass over the data of all processes; returns the same on each.

        `compare` compares with the full model's predictions, which are computed with the paths unless they are cached,
        and `label` with the labels. `keep` caches the prefixes of these paths, as the memory allows, for later paths that
        share them. Errors on NaN or infinity name the first block that produced it, the batch and the dtype.
        """
        paths = list(dict.fromkeys(paths))
        statistics = PathStatistics(paths, self.estimator, self.score, self.bins, compare=compare, label=label)
        with self.processes.all_or_none(description):
            for batch in self._batches(description):
                if keep:
                    self.activations.prefixes.announce(paths)
                try:
                    self._measure_batch(batch, paths, statistics, compare)
                except NonFiniteActivationError as error:
                    raise NonFiniteActivationError(f"{self._culprit(batch, paths)}: {error}") from error
        results = statistics.results(self.processes)
        some = next(iter(results.values()))
        self.samples, self.channels = some.images, some.channels
        self.constant_channels = max(self.constant_channels, *(r.constant_channels for r in results.values()))
        return results

    def repair(self, blocks: Collection[int], seed: int = 0, description: str = "Repair") -> None:
        """Repair the MLP halves of `blocks`; paths then run them where the attention of these blocks is skipped.

        The images of the repair are chosen by their pixels and `seed`, in a pass that has to be the first. The model is
        not changed.
        """
        pool = ImagePool(seed, self.processes.rank)
        with self.processes.all_or_none(description), torch.inference_mode():
            for batch in self._batches(f"{description}: images"):
                assert batch.images is not None, "the first pass reads the images"
                if not torch.isfinite(batch.start.tokens).all():
                    raise NonFiniteActivationError(self._culprit(batch, []))
                pool.add(batch.number, batch.images)
                if self.activations.plan is not None and self.activations.plan.kind != "none":
                    # A search that repairs compares with the full model, whose logits are only cached in the first pass.
                    batch.full = dict(self.runner.outputs(batch.start, [FULL]))[FULL].logits
        images = pool.merge(self.processes)
        if not images:
            raise ValueError("loader gave no images: there is nothing to measure")
        started = time.perf_counter()
        with eval_mode(*self.runner.modules()):
            found = repair_blocks(self.runner, images, blocks, self.processes, self.device, description=description)
        self.runner.use_halves({index: repaired.half for index, repaired in found.items()})
        self.activations.prefixes.clear()
        self._repair = {
            "images": len(images),
            "passes": SETTINGS.passes,
            "seconds": round(time.perf_counter() - started, 3),
            "errors": {str(index): [repaired.before, repaired.after] for index, repaired in sorted(found.items())},
        }

    @torch.inference_mode()
    def cosine_distances(self, description: str = "Measure") -> dict[int, float]:
        """Measure 1 − cos(x, x + attention(x)) of each block, a mean over all tokens, in one pass (arXiv 2406.15786)."""
        depth = self.runner.depth
        sums = torch.zeros(depth + 1, 2, dtype=torch.float64)  # the last row: images
        with self.processes.all_or_none(description):
            for batch in self._batches(description):
                sums[depth, 0] += len(batch)
                for index, before, after in self.runner.attention_inputs_and_outputs(batch.start):
                    distance = 1.0 - torch.cosine_similarity(before.float(), after.float(), dim=-1)
                    total = float(distance.sum())
                    if not math.isfinite(total):
                        raise NonFiniteActivationError(f"{self._culprit(batch, [FULL])}: it has no cosine")
                    sums[index] += torch.tensor([total, distance.numel()], dtype=torch.float64)
        sums = self.processes.sum(sums)
        self.samples = int(sums[depth, 0])
        if not self.samples:
            raise ValueError("loader gave no images: there is nothing to measure")
        return {i: float(sums[i, 0] / sums[i, 1]) for i in range(depth) if sums[i, 1] > 0}

    def engine(self) -> dict[str, Any]:
        """Return how the work was done, for a report: the caches, passes and seconds."""
        plan, prefixes = self.activations.plan, self.activations.prefixes
        return {
            "processes": self.processes.size,
            "passes": self.passes,
            "seconds": round(self.seconds["passes"], 3),
            "statistics_seconds": round(self.seconds["statistics"], 3),
            "cache": None if plan is None else {"kind": plan.kind, "bytes": plan.bytes, "reason": plan.reason},
            "shared": "the embedding and the blocks before a path's first skipped attention"
            if self.runner.why_images is None
            else f"the blocks, not the embedding: {self.runner.why_images}",
            "repair": self._repair,
            "kept": {"before_blocks": list(prefixes.blocks), "bytes": prefixes.bytes} if prefixes.bytes else None,
        }

    def _batches(self, description: str) -> Iterator[Batch]:
        """Yield the batches of one pass, in eval mode, and show its progress."""
        started = time.perf_counter()
        total = None
        with contextlib.suppress(TypeError):
            total = len(self.activations)
        with eval_mode(*self.runner.modules()), task(description, total) as advance:
            for batch in self.activations:
                yield batch
                advance()
        self.passes += 1
        self.seconds["passes"] += time.perf_counter() - started

    def _measure_batch(
        self, batch: Batch, paths: list[SkippedBlocks], statistics: PathStatistics, compare: bool
    ) -> None:
        wanted = [FULL, *paths] if compare and batch.full is None else paths
        found: dict[SkippedBlocks, Outputs] = dict(
            self.runner.outputs(batch.start, wanted, self.activations.prefixes, batch.number)
        )
        if compare and batch.full is None:
            batch.full = found[FULL].logits
        started = time.perf_counter()
        statistics.add({path: found[path] for path in paths}, batch.full, batch.targets)
        statistics.check()  # while this batch's tokens are available to find the culprit
        self.seconds["statistics"] += time.perf_counter() - started

    def _culprit(self, batch: Batch, paths: list[SkippedBlocks]) -> str:
        where, dtype = f"batch {batch.number}", dtype_name(self.dtype)
        if self.processes.size > 1:
            where += f" of rank {self.processes.rank}"
        if batch.images is not None and not batches.finite(batch.images):
            return f"{where} of the input holds NaN or infinity ({dtype})"
        if not torch.isfinite(batch.start.tokens).all():
            return f"the patch embedding gave NaN or infinity in {where} ({dtype})"
        for path in sorted(paths, key=len):
            block = self.runner.first_bad_block(batch.start, path)
            if block is not None:
                skipping = f" with the attention of {sorted(path)} skipped" if path else ""
                return f"block {block} gave NaN or infinity{skipping} in {where} ({dtype})"
        return f"what follows the last block gave NaN or infinity in {where} ({dtype})"


def constant_note(measurement: Measurement) -> str:
    """Return the note on output channels that never change."""
    return (
        f"up to {measurement.constant_channels} of {measurement.channels} output channels never change on these images; "
        "they count with a floor instead of their own entropy"
    )


def transfer_entropy(
    model: nn.Module,
    loader: Iterable[Any],
    skip: Sequence[int],
    *,
    estimator: str = "gaussian",
    signed: bool = False,
    score: str = "logits",
) -> float:
    """Measure the transfer entropy of the attention layers `skip` towards the task head, in bits.

    In a process group every process must call it with its own share of the images; all get the same result.

    Args:
        model: A timm vision transformer.
        loader: Yields images, or tuples whose first item is images; iterated once.
        skip: Block indices.
        estimator: "gaussian": Σ log2 σ over the output's channels. "histogram": summed differential entropies.
        signed: H(full) − H(skipped) itself instead of its absolute value.
        score: "logits", or "pre_logits" for the classifier's input.

    Returns:
        |H(full) − H(skipped)| in bits, summed over the output's channels; with its sign if `signed`.

    Raises:
        ValueError: Wrong indices or options, or an empty loader.
        UnsupportedModelError: The model cannot be changed block by block.
        NonFiniteActivationError: NaN or infinity in the activations.
    """
    with Measurement(model, loader, estimator=estimator, score=score, cache="none") as measurement:
        path = frozenset(check_indices(skip, measurement.runner.depth, "skip"))
        found = measurement.measure([FULL, path], "Transfer entropy")
        if measurement.constant_channels:
            warnings.warn(constant_note(measurement), stacklevel=2)
    difference = found[FULL].entropy - found[path].entropy
    return difference if signed else abs(difference)
