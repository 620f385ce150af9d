"""Transfer entropy of attention layers towards the task head, with the shared beginning of all candidates run once.

TE(S) = H(output) − H(output | attention of S skipped), where skipping makes a block x + MLP(LN(x)) (arXiv 2404.05657,
section 3.2). Models are never changed: paths are shallow copies of the model around a list of blocks of their own, so
that timm's own `forward` runs and nothing of it is written again here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lambda_kernels.blocks import AttentionFreeBlock
from lambda_kernels.convert import check_indices
from lambda_kernels.entropy import EntropyMeter
from lambda_kernels.errors import NonFiniteActivationError
from lambda_kernels.families import inspect_model
from lambda_kernels.ops.checks import check_choice

from .placement import eval_mode, one_device, one_dtype
from .progress import task

ESTIMATORS = ("gaussian", "histogram")
SCORES = ("logits", "pre_logits")


def skip_attention(model: nn.Module, skip: Sequence[int]) -> nn.Module:
    """A view of `model` in which the attention of the blocks `skip` is passed over; parameters and modules are shared.

    Raises:
        ValueError: An index is wrong.
        UnsupportedModelError: The model cannot be changed block by block.
    """
    anatomy = inspect_model(model)
    skip = check_indices(skip, anatomy.depth, "skip")
    return with_blocks(model, path_blocks(model, skip))


def path_blocks(model: nn.Module, skip: Iterable[int]) -> list[nn.Module]:
    """The blocks of `model`, those in `skip` without their attention."""
    skip = set(skip)
    return [
        AttentionFreeBlock.from_block(block) if i in skip and not isinstance(block, AttentionFreeBlock) else block
        for i, block in enumerate(model.blocks)
    ]


def with_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """A shallow copy of `model` around other blocks; everything else is shared, and `model` keeps its own."""
    view = copy.copy(model)
    view._modules = dict(model._modules)
    view._modules["blocks"] = nn.Sequential(*blocks)
    return view


class _Tap(nn.Module):
    """Runs a block and keeps what went in."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.seen = block, None

    def forward(self, x: Tensor, **options: object) -> Tensor:
        self.seen = x
        return self.block(x, **options)


class _Inject(nn.Module):
    """Replaces the beginning of a path by tokens that are known already."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor, **options: object) -> Tensor:
        return self.tokens


def score_output(model: nn.Module, images: Tensor, score: str) -> Tensor:
    """What the entropy is measured on: the classifier's output, or what goes into it.

    Distilled models average their two heads in eval mode, and average-pooled ones normalise after pooling: the model's own
    `forward_head` does either.
    """
    if score == "logits":
        return model(images)
    return model.forward_head(model.forward_features(images), pre_logits=True)


class Measurement:
    """Entropies of a model's output with some attention layers skipped, and of every candidate for one more.

    Args:
        model: A timm vision transformer; it is put into eval mode while measuring, and back.
        loader: Yields images, or tuples whose first item is images; iterated once per call.
        estimator: "gaussian" or "histogram".
        score: "logits" or "pre_logits".
        bins: Of the histogram.

    Raises:
        ValueError: The loader cannot be iterated twice, or an option is wrong.
    """

    def __init__(
        self, model: nn.Module, loader: Iterable, *, estimator: str = "gaussian", score: str = "logits", bins: int = 256
    ) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("score", score, SCORES)
        if isinstance(loader, Iterator):
            raise ValueError("loader must be iterable more than once (a DataLoader or a list); got an iterator")
        self.anatomy = inspect_model(model)
        self.model, self.loader, self.estimator, self.score, self.bins = model, loader, estimator, score, bins
        self.device, self.dtype = one_device(model), one_dtype(model)
        self.samples = 0
        self.channels = 0
        self.constant_channels = 0  # the most that any path had so far

    @torch.inference_mode()
    def entropies(
        self, skip: Sequence[int], candidates: Sequence[int], description: str = "Measure"
    ) -> tuple[float, dict[int, float]]:
        """H with `skip` skipped, and H with each of `candidates` skipped as well, in one pass over the data.

        A candidate shares everything before its block with the base path, so only the rest of it is run.

        Raises:
            ValueError: The loader is empty.
            NonFiniteActivationError: NaN or infinity; names the first block that gave it, the batch and the dtype.
        """
        taps = [_Tap(block) for block in path_blocks(self.model, skip)]
        base = with_blocks(self.model, taps)
        meters = {None: self._meter(f"{self.score} with {list(skip)} skipped")}
        skipping = {}
        for i in candidates:
            meters[i] = self._meter(f"{self.score} with {[*skip, i]} skipped")
            skipping[i] = AttentionFreeBlock.from_block(self.model.blocks[i])
        samples = 0
        total = len(self.loader) if hasattr(self.loader, "__len__") else None
        with eval_mode(self.model, base, *skipping.values()), task(description, total) as advance:
            for number, batch in enumerate(self.loader):
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                images = images.to(self.device, self.dtype, non_blocking=True)
                samples += len(images)
                try:
                    meters[None].update(score_output(base, images, self.score))
                    for i in candidates:
                        rest = [_Inject(taps[i].seen), skipping[i], *(tap.block for tap in taps[i + 1 :])]
                        meters[i].update(score_output(with_blocks(self.model, rest), images, self.score))
                    for meter in meters.values():
                        meter.check()  # while this batch's tokens are there to be looked at
                except NonFiniteActivationError as error:
                    raise NonFiniteActivationError(f"{_culprit(taps, images, number)}: {error}") from error
                advance()
        if samples == 0:
            raise ValueError("loader gave no images: there is nothing to measure")
        self.samples, self.channels = samples, meters[None].channels
        results = {key: self._entropy(meter) for key, meter in meters.items()}
        return results.pop(None), results

    def _meter(self, name: str) -> EntropyMeter:
        return EntropyMeter(self.estimator, bins=self.bins, name=name)

    def _entropy(self, meter: EntropyMeter) -> float:
        constant = meter.constant_channels
        if meter.count > 1 and constant == meter.channels:
            raise ValueError(f"{meter.name}: all {constant} channels are constant over {meter.count} samples")
        self.constant_channels = max(self.constant_channels, constant)
        with warnings.catch_warnings():
            # Counted above, and reported once by whoever asked instead of once per candidate.
            warnings.filterwarnings("ignore", message=".* channels are constant")
            # Grids of different paths differ in their bin width, so histograms are compared as differential entropies.
            values = meter.compute(differential=True) if self.estimator == "histogram" else meter.compute()
        return float(values.sum())


def constant_note(measurement: Measurement) -> str:
    """What to say about output channels that never change."""
    return (
        f"up to {measurement.constant_channels} of {measurement.channels} output channels never change on these images; "
        "they count with a floor instead of their own entropy"
    )


def _culprit(taps: list[_Tap], images: Tensor, batch: int) -> str:
    dtype = str(images.dtype).removeprefix("torch.")
    if not torch.isfinite(images).all():
        return f"batch {batch} of the input holds NaN or infinity ({dtype})"
    for index, tap in enumerate(taps):
        if not torch.isfinite(tap.seen).all():
            place = f"block {index - 1}" if index else "the patch embedding"
            return f"{place} gave NaN or infinity in batch {batch} ({dtype})"
    return f"block {len(taps) - 1} or the head gave NaN or infinity in batch {batch} ({dtype})"


def transfer_entropy(
    model: nn.Module,
    loader: Iterable,
    skip: Sequence[int],
    *,
    estimator: str = "gaussian",
    signed: bool = False,
    score: str = "logits",
) -> float:
    """Transfer entropy of the attention layers `skip` towards the task head, in bits.

    Args:
        model: A timm vision transformer.
        loader: Yields images, or tuples whose first item is images; iterated twice.
        skip: Block indices.
        estimator: "gaussian": Σ log2 σ over the output's channels. "histogram": summed differential histogram entropies.
        signed: H(full) − H(skipped) itself instead of its absolute value.
        score: "logits", or "pre_logits" for what goes into the classifier.

    Raises:
        ValueError: Wrong indices or options, or an empty loader.
        UnsupportedModelError: The model cannot be changed block by block.
        NonFiniteActivationError: NaN or infinity on the way.
    """
    measurement = Measurement(model, loader, estimator=estimator, score=score)
    skip = check_indices(skip, measurement.anatomy.depth, "skip")
    full, _ = measurement.entropies((), (), "Full model")
    without, _ = measurement.entropies(skip, (), "Skipped")
    if measurement.constant_channels:
        warnings.warn(constant_note(measurement), stacklevel=2)
    return full - without if signed else abs(full - without)
