"""The amplitude of a vision transformer's features by the radial frequency of the token map, block by block.

After "How Do Vision Transformers Work?" (arXiv 2202.06709, figures 2 and 8: the log amplitude of Fourier transformed
feature maps, relative to frequency zero) and the frequency analysis of arXiv 2404.05657, which compares features before
and after attention layers are removed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lambda_kernels.blocks.refusals import qualified_name
from lambda_kernels.blocks.structure import inspect_model, refuse_merging
from lambda_kernels.errors import NonFiniteActivationError, UnsupportedModelError
from lambda_kernels.ops.checks import dtype_name

from ..data import batches
from ..models.properties import eval_mode, one_device, one_dtype
from ..runtime.progress import track
from .radial import radial_bins, radial_spectra

_PADDED = "timm.models.naflexvit.NaFlexVit"  # by name: not every timm has it


@dataclass(frozen=True)
class BlockFrequencies:
    """The output of one block by radial frequency, with an entry per bin in each tuple; errors are over the images."""

    block: int
    attention: bool  # whether the block has its attention
    log_amplitude: tuple[float, ...]  # mean over images, channels and coefficients of ln A; see `radial.RadialSpectra`
    amplitude: tuple[float, ...]  # mean of A, as arXiv 2404.05657 has it
    power: tuple[float, ...]  # mean of A²
    # Δ log amplitude: `log_amplitude` minus its first entry. A factor on all features does not change it.
    relative: tuple[float, ...]
    relative_error: tuple[float, ...]  # its standard error
    mean: float  # of `relative` over the bins above zero up to the highest one
    mean_error: float  # its standard error
    floored: int  # how many amplitudes of the images were below 2^-24, which replaced them in logarithms


@dataclass(frozen=True)
class FeatureFrequencies:
    """The spectra of the features of a model."""

    samples: int  # number of images
    grid: tuple[int, int]  # rows and columns of the token map
    prefix_tokens: int  # class, distillation and register tokens, which are not part of the map and are omitted
    channels: int  # of the features
    dtype: str  # of the features, such as "float32"; spectra are computed in float64
    removed: tuple[int, ...]  # blocks without attention
    residual_scale: float | None  # of those blocks; None if there are none
    frequencies: tuple[float, ...]  # middle of each bin, in units of π
    coefficients: tuple[int, ...]  # number of coefficients of a map in each bin
    highest: int  # the bin at π, or the next lower bin if the shorter side of the map is odd
    blocks: tuple[BlockFrequencies, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class BlockChange:
    """The features of one block in the second model minus those in the first; errors are over images paired with themselves."""

    block: int
    relative: tuple[float, ...]  # change of Δ log amplitude in each bin
    relative_error: tuple[float, ...]  # its standard error
    mean: float  # change of the mean of Δ log amplitude over the bins above zero up to the highest one
    mean_error: float  # its standard error


@dataclass(frozen=True)
class FrequencyComparison:
    """Two models on the same images, and the change of each block."""

    before: FeatureFrequencies
    after: FeatureFrequencies
    changes: tuple[BlockChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return json.loads(json.dumps(asdict(self)))


@torch.inference_mode()
def feature_frequencies(model: nn.Module, loader: Iterable[Any]) -> FeatureFrequencies:
    """Measure the amplitude of the output of every block of `model` by radial frequency, in one pass over the data.

    Only the sums of each batch are kept, in float64.

    Args:
        model: A timm vision transformer, converted or not.
        loader: Yields images of one size, with or without labels; see `data.batches`. Iterated once.

    Returns:
        Per block and frequency bin the log amplitude, amplitude and power, means over images and channels, with errors.

    Raises:
        ValueError: There are fewer than two images, or the weights are on the meta device.
        UnsupportedModelError: The model's blocks are not known, or their tokens do not form a map (dropped or merged tokens).
        NonFiniteActivationError: Features are NaN or infinite; the message names block, batch and dtype.
    """
    meter = _Meter(model)
    with eval_mode(model):
        for batch in batches.read(track(loader, "Frequencies"), model):
            meter.update(batch.images)
    return meter.result()


@torch.inference_mode()
def compare_frequencies(model: nn.Module, other: nn.Module, loader: Iterable[Any]) -> FrequencyComparison:
    """Measure two models, such as one before and after the removal of attention layers, in one pass over the data.

    Args:
        model: A timm vision transformer, converted or not: "before".
        other: A model with as many blocks: "after". It may share modules with `model`, as `skip_attention(model, layers)` does.
        loader: As for `feature_frequencies`.

    Returns:
        Both measurements and the change per block, with standard errors over the paired images.

    Raises:
        ValueError: As for `feature_frequencies`, or the models differ in depth or in the size of their token maps.
        UnsupportedModelError: As for `feature_frequencies`.
        NonFiniteActivationError: Features are NaN or infinite; the message names model, block, batch and dtype.
    """
    before, after = _Meter(model, "before: "), _Meter(other, "after: ")
    if before.depth != after.depth:
        raise ValueError(
            f"the models have {before.depth} and {after.depth} blocks: they can only be compared block by block"
        )
    changes = _Moments()
    with eval_mode(model, other):
        for batch in batches.read(track(loader, "Frequencies"), model):
            first, second = (meter.update(batch.images) for meter in (before, after))
            if before.grid != after.grid:
                raise ValueError(
                    f"the models have token maps of {_times(before.grid)} and {_times(after.grid)}: their frequencies are "
                    "not the same ones"
                )
            changes.update(second - first)
    results = before.result(), after.result()
    means, errors = changes.mean.tolist(), changes.error().tolist()
    rows = (
        BlockChange(index, tuple(mean[:-1]), tuple(error[:-1]), mean[-1], error[-1])
        for index, (mean, error) in enumerate(zip(means, errors, strict=True))
    )
    return FrequencyComparison(*results, tuple(rows))


def _times(grid: tuple[int, int]) -> str:
    return f"{grid[0]} × {grid[1]}"


class _Moments:
    """Mean and squared deviations over the first dimension of its input, merged by the formula of Chan et al. (1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Add float64 values `[N, …]`; N may be 0."""
        number = len(values)
        if number == 0:
            return
        mean = values.mean(0)
        shift = mean - self.mean
        total = self.count + number
        self._squares = self._squares + (values - mean).square().sum(0) + shift.square() * (self.count * number / total)
        self.mean = self.mean + shift * (number / total)
        self.count = total

    def error(self) -> Tensor:
        """Standard error of the mean of two or more values."""
        return (self._squares / (self.count - 1) / self.count).sqrt()


class _Meter:
    """Runs one model on batches and accumulates the spectra of its blocks' outputs."""

    def __init__(self, model: nn.Module, label: str = "") -> None:
        if qualified_name(model) == _PADDED:
            raise UnsupportedModelError(
                f"{label}frequencies of NaFlexVit are not supported: its batches hold padding, and images whose token maps "
                "differ. Use a model of one image size"
            )
        self._structure = inspect_model(model)
        refuse_merging(self._structure, "the analysis of frequencies")
        self._device, self._dtype = one_device(model), one_dtype(model)
        if self._device.type == "meta":
            raise ValueError(f"{label}the weights are on the meta device, where nothing is computed: load them first")
        self.depth = self._structure.depth
        self.grid = (0, 0)  # of the first batch; (0, 0) before it
        self._model, self._label = model, label
        self._prefix = _prefix_tokens(model)
        self._batches = 0
        self._seen = (0, "")  # channels and dtype
        self._spectra = _Moments()  # [N, depth, 3, bins]
        self._relative = _Moments()  # [N, depth, bins + 1]
        self._floored = torch.zeros(self.depth, dtype=torch.int64)

    def update(self, images: Any) -> Tensor:
        """Measure a batch: Δ log amplitude, and its mean behind the bins; float64 `[N, depth, bins + 1]` on the CPU."""
        self._batches += 1
        found: list[tuple[int, Tensor, Tensor, Tensor]] = []
        shape = images.shape[-2:]

        def hook(index: int, output: Tensor) -> None:
            bad = output.numel() - torch.isfinite(output).sum()
            spectra = radial_spectra(self._token_map(index, output, shape))
            means = torch.stack((spectra.log_amplitude, spectra.amplitude, spectra.power), 1)
            self._seen = (output.shape[-1], dtype_name(output.dtype))
            found.append((index, bad, means, spectra.floored.sum()))

        # Only for this forward: the other model of a comparison may run the same modules.
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self._model.blocks):
                handle = block.register_forward_hook(lambda module, args, output, index=index: hook(index, output))
                stack.enter_context(handle)
            self._model(images.to(self._device, self._dtype, non_blocking=True))
        indices, bad, means, floored = zip(*found, strict=True) if found else ((), (), (), ())
        if indices != tuple(range(self.depth)):
            raise UnsupportedModelError(
                f"{self._label}the forward of this {type(self._model).__name__} does not run its blocks once, one after the "
                f"other: {self.depth} blocks ran as {list(indices)}"
            )
        tokens = self._prefix + self.grid[0] * self.grid[1]
        self._check_finite(torch.stack(bad).tolist(), len(images) * tokens * self._seen[0])
        stacked = torch.stack(means, 1).cpu()
        self._floored += torch.stack(floored).cpu()
        self._spectra.update(stacked)
        logarithms = stacked[:, :, 0]
        relative = logarithms - logarithms[..., :1]
        up_to = radial_bins(*self.grid).highest + 1
        relative = torch.cat((relative, relative[..., 1:up_to].mean(-1, keepdim=True)), -1)
        self._relative.update(relative)
        return relative

    def _token_map(self, index: int, output: Tensor, shape: Sequence[int]) -> Tensor:
        """The tokens of the image as a map [N, H, W, C]."""
        if output.dim() != 3:
            raise UnsupportedModelError(
                f"{self._label}blocks[{index}] gives a tensor of shape {tuple(output.shape)}, not [N, T, C]"
            )
        tokens = output.shape[1] - self._prefix
        grid = next((g for g in _grids(self._model, shape) if g[0] * g[1] == tokens), None)
        if grid is None:
            raise UnsupportedModelError(
                f"{self._label}blocks[{index}] gives {tokens} tokens of the image and {self._prefix} others, which is no map "
                f"of {' or '.join(map(_times, _grids(self._model, shape))) or 'a known size'}: frequencies need every "
                "token in its place. Measure without patch dropout and token merging"
            )
        if self.grid == (0, 0):
            self.grid = grid
        if grid != self.grid:
            raise ValueError(
                f"{self._label}batch {self._batches} has token maps of {_times(grid)}, those before it {_times(self.grid)}: "
                "measure images of one size"
            )
        return output[:, self._prefix :].unflatten(1, grid)

    def _check_finite(self, bad: list[int], values: int) -> None:
        for index, number in enumerate(bad):
            if number:
                dtype = self._seen[1]
                raise NonFiniteActivationError(
                    f"{self._label}blocks[{index}]: {number} of {values} values are NaN or infinite in batch {self._batches} "
                    f"({dtype}). "
                    + ("Try bfloat16 or float32" if dtype == "float16" else "Check the weights and the input")
                )

    def result(self) -> FeatureFrequencies:
        samples = self._spectra.count
        if samples < 2:
            got = "no images" if samples == 0 else "one image"
            raise ValueError(f"loader gave {got}: a mean over images and its standard error need two or more")
        bins = radial_bins(*self.grid)
        spectra = self._spectra.mean.tolist()
        relative, errors = self._relative.mean.tolist(), self._relative.error().tolist()
        blocks = (
            BlockFrequencies(
                index,
                index not in self._structure.removed,
                tuple(spectra[index][0]),
                tuple(spectra[index][1]),
                tuple(spectra[index][2]),
                tuple(relative[index][:-1]),
                tuple(errors[index][:-1]),
                relative[index][-1],
                errors[index][-1],
                int(self._floored[index]),
            )
            for index in range(self.depth)
        )
        return FeatureFrequencies(
            samples,
            self.grid,
            self._prefix,
            *self._seen,
            self._structure.removed,
            self._structure.residual_scale if self._structure.removed else None,
            bins.frequencies,
            bins.coefficients,
            bins.highest,
            tuple(blocks),
        )


def _prefix_tokens(model: nn.Module) -> int:
    """Number of tokens before those of the image."""
    number = getattr(model, "num_prefix_tokens", None)
    if type(number) is not int:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say how many of its tokens are none of the image (num_prefix_tokens is "
            f"{number!r}): the token map cannot be told from the rest"
        )
    return number


def _grids(model: nn.Module, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Possible rows and columns of the token map of images of `shape` (H, W), the likeliest first."""
    embedding: Any = getattr(model, "patch_embed", None)
    found = []
    if hasattr(embedding, "dynamic_feat_size"):
        found.append(embedding.dynamic_feat_size(tuple(shape)))
    found.append(getattr(embedding, "grid_size", None))  # a convolutional stem may round differently
    return list(dict.fromkeys((int(grid[0]), int(grid[1])) for grid in found if grid is not None))
