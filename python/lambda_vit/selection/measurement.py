"""Entropies and other statistics of a model's output with attention layers skipped; transfer entropy.

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
from . import activation_cache
from .activation_cache import ActivationCache, Batch
from .path_statistics import PathResult, PathStatistics
from .paths import FULL, Outputs, PathRunner, SkippedBlocks

ESTIMATORS = ("gaussian", "histogram")
SCORES = ("logits", "pre_logits")


class Measurement:
    """Measures any number of paths per pass over the data; use it in `with`, which removes its cache.

    Args:
        model: A timm vision transformer; it is put into eval mode while measuring, and back.
        loader: Yields images, or tuples that begin with images and labels; iterated once per pass. With several
            processes, this one's share.
        estimator: "gaussian": Σ log2 σ over the output's channels. "histogram": summed differential entropies.
        score: What the entropies are of: "logits", or "pre_logits" for what goes into the classifier.
        bins: Of a histogram.
        cache: Where the embedded images stay between passes: "ram", "disk", "none"; "auto" is "ram" where it fits.
        cache_budget: Bytes that they may take; None as `ActivationCache`.
        cache_folder: Where "disk" keeps them.
        processes: Those that measure together; None: those of the process group, if there is one, all of which then have
            to make a `Measurement` and call the same methods.

    Attributes:
        seconds: Time spent in passes, and in statistics alone as far as the host can tell.
        samples, channels, constant_channels: Of the passes so far; the last is the most that any path had.

    Raises:
        ValueError: The loader cannot be iterated twice, or an option is wrong.
        UnsupportedModelError: The model cannot be changed block by block.
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
        cache_folder: Path | None = None,
        processes: Processes | None = None,
    ) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("score", score, SCORES)
        if isinstance(loader, Iterator):
            raise ValueError("loader must be iterable more than once (a DataLoader or a list); got an iterator")
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
        self.seconds = {"passes": 0.0, "statistics": 0.0}
        self.samples = 0
        self.channels = 0
        self.constant_channels = 0
        self._kept: tuple[int, ...] = ()
        self._kept_bytes = 0

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
        """All `paths`, in one pass over the data.

        Args:
            paths: Sets of blocks whose attention is skipped.
            description: Of the progress bar.
            compare: Compare with the full model's answers, which are computed beside the paths unless they are cached.
            label: Compare with the labels.
            keep: More paths that begin like these will be asked for: keep what they begin with, as the memory allows.

        Returns:
            The results over the data of all processes, the same on each.

        Raises:
            ValueError: The loader is empty or gives no labels; a path whose output never changes.
            NonFiniteActivationError: NaN or infinity; names the first block that gave it, the batch and the dtype.
            RuntimeError: Another process failed, or is gone (`ProcessLostError`).
        """
        paths = list(dict.fromkeys(paths))
        statistics = PathStatistics(paths, self.estimator, self.score, self.bins, compare=compare, label=label)
        with self.processes.all_or_none(description):
            for batch in self._batches(description):
                if keep:
                    batch.prefixes.announce(paths, self._kept_before(paths))
                try:
                    self._measure_batch(batch, paths, statistics, compare)
                except NonFiniteActivationError as error:
                    raise NonFiniteActivationError(f"{self._culprit(batch, paths)}: {error}") from error
        results = statistics.results(self.processes)
        some = next(iter(results.values()))
        self.samples, self.channels = some.images, some.channels
        self.constant_channels = max(self.constant_channels, *(r.constant_channels for r in results.values()))
        return results

    @torch.inference_mode()
    def cosine_distances(self, description: str = "Measure") -> dict[int, float]:
        """1 − cos(x, x + attention(x)) of each block, a mean over all tokens, in one pass (arXiv 2406.15786).

        Raises:
            ValueError: The loader is empty.
            NonFiniteActivationError: NaN or infinity; names the block, the batch and the dtype.
        """
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
        """How the work was done, for a report: the cache, where paths begin, passes and seconds."""
        plan = self.activations.plan
        return {
            "processes": self.processes.size,
            "passes": self.passes,
            "seconds": round(self.seconds["passes"], 3),
            "statistics_seconds": round(self.seconds["statistics"], 3),
            "cache": None if plan is None else {"kind": plan.kind, "bytes": plan.bytes, "reason": plan.reason},
            "shared": "the embedding and the blocks before a path's first skipped attention"
            if self.runner.why_images is None
            else f"the blocks, not the embedding: {self.runner.why_images}",
            "kept": {"before_blocks": list(self._kept), "bytes": self._kept_bytes} if self._kept else None,
        }

    def _kept_before(self, paths: list[SkippedBlocks]) -> tuple[int, ...]:
        """Before which blocks of `paths` tokens are kept for the next round."""
        plan = self.activations.plan
        assert plan is not None, "the activations were kept before any path ran"
        chosen = activation_cache.positions(paths, self.runner.depth, plan.inside, plan.spare) if plan.spare else ()
        taken = activation_cache.nodes(paths, chosen) * plan.inside
        if taken > self._kept_bytes:
            self._kept, self._kept_bytes = chosen, taken
        return chosen

    def _batches(self, description: str) -> Iterator[Batch]:
        """One pass, in eval mode, behind a progress bar."""
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
        found: dict[SkippedBlocks, Outputs] = dict(self.runner.outputs(batch.start, wanted, batch.prefixes))
        if compare and batch.full is None:
            batch.full = found[FULL].logits
        started = time.perf_counter()
        statistics.add({path: found[path] for path in paths}, batch.full, batch.targets)
        statistics.check()  # while this batch's tokens are there to be looked at
        self.seconds["statistics"] += time.perf_counter() - started

    def _culprit(self, batch: Batch, paths: list[SkippedBlocks]) -> str:
        where = f"batch {batch.number}"
        if self.processes.size > 1:
            where += f" of rank {self.processes.rank}"
        if batch.images is not None and not batches.finite(batch.images):
            return f"{where} of the input holds NaN or infinity ({self._dtype_name()})"
        if not torch.isfinite(batch.start.tokens).all():
            return f"the patch embedding gave NaN or infinity in {where} ({self._dtype_name()})"
        for path in sorted(paths, key=len):
            block = self.runner.first_bad_block(batch.start, path)
            if block is not None:
                skipping = f" with the attention of {sorted(path)} skipped" if path else ""
                return f"block {block} gave NaN or infinity{skipping} in {where} ({self._dtype_name()})"
        return f"what follows the last block gave NaN or infinity in {where} ({self._dtype_name()})"

    def _dtype_name(self) -> str:
        return dtype_name(self.dtype)


def constant_note(measurement: Measurement) -> str:
    """What to say about output channels that never change."""
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
    """Transfer entropy of the attention layers `skip` towards the task head, in bits.

    In a process group every process has to call it, with its own share of the images; all get the same.

    Args:
        model: A timm vision transformer.
        loader: Yields images, or tuples whose first item is images; iterated once.
        skip: Block indices.
        estimator: "gaussian": Σ log2 σ over the output's channels. "histogram": summed differential histogram entropies.
        signed: H(full) − H(skipped) itself instead of its absolute value.
        score: "logits", or "pre_logits" for what goes into the classifier.

    Returns:
        Bits, summed over the channels of the output: |H(full) − H(skipped)|, or with its sign.

    Raises:
        ValueError: Wrong indices or options, or an empty loader.
        UnsupportedModelError: The model cannot be changed block by block.
        NonFiniteActivationError: NaN or infinity on the way.
    """
    with Measurement(model, loader, estimator=estimator, score=score, cache="none") as measurement:
        path = frozenset(check_indices(skip, measurement.runner.depth, "skip"))
        found = measurement.measure([FULL, path], "Transfer entropy")
        if measurement.constant_channels:
            warnings.warn(constant_note(measurement), stacklevel=2)
    difference = found[FULL].entropy - found[path].entropy
    return difference if signed else abs(difference)
