"""The entropy of every attention and MLP output, block by block, in one pass over the data, by both estimators."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lambda_kernels.blocks.attention_free import AttentionFreeBlock
from lambda_kernels.blocks.structure import inspect_model, refuse_merging
from lambda_kernels.entropy.meter import EntropyMeter, update_together
from lambda_kernels.entropy.state import STD_FLOOR
from lambda_kernels.ops.checks import check_choice, dtype_name
from lambda_kernels.ops.histogram import _extension
from lambda_kernels.ops.histogram.function import histogram_backend

from ..data import batches
from ..models.properties import eval_mode, one_device, one_dtype
from ..runtime.progress import track

# The choices, and the estimators that each measures.
ESTIMATORS = {"both": ("gaussian", "histogram"), "gaussian": ("gaussian",), "histogram": ("histogram",)}
LAYERS = ("attn", "mlp")

# With fewer tokens per bin, the corrected histogram entropy of a normal channel is at least 0.03 bits too low.
TOKENS_PER_BIN = 4

# On a CUDA device, a call per layer would cost more than its counting: outputs are collected up to this many bytes.
TOGETHER_BYTES = 256 << 20


@dataclass(frozen=True)
class Spread:
    """The entropies of a layer's channels, in bits: their mean and their quartiles."""

    mean: float
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class LayerEntropy:
    """Entropies at the output of one layer; None for an estimator that was not requested."""

    channels: int
    constant_channels: int  # those that never change and count -24 bits (`STD_FLOOR`) instead of -infinity
    tokens: int  # values per channel: all tokens of all images, with prefix tokens and without padding
    gaussian: Spread | None  # log2 σ of the channels
    # Differential entropies of the channels' histograms, corrected by Miller and Madow's term for the bias of few tokens.
    histogram: Spread | None


@dataclass(frozen=True)
class BlockEntropy:
    """A block's attention output and MLP output; `attn` is None where the attention was removed."""

    block: int
    attn: LayerEntropy | None
    mlp: LayerEntropy


@dataclass(frozen=True)
class LayerProfile:
    """The profile of a model: what the paper's first two figures show."""

    estimators: tuple[str, ...]  # "gaussian", "histogram" or both, in this order
    samples: int  # number of images
    bins: int | None  # of each channel's histogram; None without histograms
    dtype: str  # of the outputs, such as "float32"
    counted_by: str  # the backend that counted: "extension AVX512", "extension CUDA", "torch" …
    blocks: tuple[BlockEntropy, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types. Layers hold the estimators that were asked for, and no others."""
        record = {"unit": "bits", **asdict(self), "estimators": list(self.estimators), "blocks": []}
        for row in self.blocks:
            entry = asdict(row)
            for layer in filter(None, map(entry.get, LAYERS)):
                for name in set(ESTIMATORS["both"]) - set(self.estimators):
                    del layer[name]
            record["blocks"].append(entry)
        return record


@torch.inference_mode()
def profile_layers(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    estimator: str = "both",
    bins: int = 256,
    together_bytes: int | None = None,
) -> LayerProfile:
    """Measure the entropy of every attention and MLP output of `model`, before LayerScale and the residual.

    One forward per batch, whatever is asked for; what is kept of a batch is its counts and moments.

    Args:
        model: A timm vision transformer, converted or not.
        loader: Yields images, with or without labels; see `data.batches`. Iterated once.
        estimator: "gaussian": mean over the channels of log2 σ, the paper's form up to its constant ½ log2(2πe).
            "histogram": mean over the channels of the differential entropy of their histogram. "both", from one read.
        bins: Of each channel's histogram.
        together_bytes: Outputs of several layers are kept, up to this many bytes, and measured in one call; 0: each at
            once. None: at once on a CPU, where an output is still in the cache; on CUDA as far as `TOGETHER_BYTES` go.

    Returns:
        Per block the entropies of the attention's and the MLP's outputs in bits: mean and quartiles over the channels.

    Raises:
        ValueError: Fewer than two images, a wrong option, or a layer of which no channel ever changes.
        UnsupportedModelError: The model's blocks are not known, or merge tokens.
        NonFiniteActivationError: NaN or infinity; names block, layer, batch and dtype.
    """
    check_choice("estimator", estimator, tuple(ESTIMATORS))
    estimators = ESTIMATORS[estimator]
    refuse_merging(inspect_model(model), "a profile")
    device, dtype = one_device(model), one_dtype(model)
    if together_bytes is None:
        together_bytes = TOGETHER_BYTES if device.type == "cuda" and not _changes_in_place(model) else 0
    queue = _Queue(together_bytes)
    meters: dict[tuple[int, str], EntropyMeter] = {}
    samples = 0
    with eval_mode(model), contextlib.ExitStack() as stack:
        for index, block in enumerate(model.blocks):
            for name in LAYERS[isinstance(block, AttentionFreeBlock) :]:
                # The meter of a histogram also has the moments, so that one meter serves both estimators.
                meter = meters[index, name] = EntropyMeter(estimators[-1], bins=bins, name=f"blocks[{index}].{name}")
                hook = getattr(block, name).register_forward_hook(
                    lambda module, arguments, output, meter=meter: queue.add(meter, output)
                )
                stack.enter_context(hook)
        for batch in batches.read(track(loader, "Profile"), model):
            samples += batches.count(batch.images)
            images = batches.to(batch.images, device, dtype)
            queue.valid = batches.valid_tokens(model, images)
            model(images)
            queue.flush()
    if samples < 2:
        got = "no images" if samples == 0 else "one image"
        raise ValueError(f"loader gave {got}: there is nothing to measure; an entropy needs two or more")
    layers = {key: _layer_entropy(meter, estimators) for key, meter in meters.items()}
    fewest = min(layer.tokens for layer in layers.values())
    if "histogram" in estimators and fewest < TOKENS_PER_BIN * bins:
        warnings.warn(
            f"{fewest} tokens per channel are few for {bins} bins: histogram entropies are too low. Measure more "
            f"images, or use at most {max(2, fewest // TOKENS_PER_BIN)} bins",
            stacklevel=3,  # past the decorator
        )
    return LayerProfile(
        estimators=estimators,
        samples=samples,
        bins=bins if "histogram" in estimators else None,
        dtype=dtype_name(queue.dtype),
        counted_by=_counted_by(queue.device, queue.dtype),
        blocks=tuple(BlockEntropy(i, layers.get((i, "attn")), layers[i, "mlp"]) for i in range(len(model.blocks))),
    )


def _changes_in_place(model: nn.Module) -> bool:
    """Whether a module, such as timm's LayerScale, may overwrite an output before it is measured."""
    return any(getattr(module, "inplace", False) for module in model.modules())


class _Queue:
    """Outputs that wait for their meters: at most `limit` bytes, or a single larger one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.valid: Tensor | None = None  # bool [N, T] of this batch's tokens; None: all are of images
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._waiting: list[tuple[EntropyMeter, Tensor]] = []
        self._bytes = 0

    def add(self, meter: EntropyMeter, output: Tensor | tuple[Tensor, ...]) -> None:
        x = output[0] if isinstance(output, tuple) else output
        x = x if self.valid is None else x[self.valid]
        self.device, self.dtype = x.device, x.dtype
        size = x.numel() * x.element_size()
        if self._bytes + size > self.limit:
            self.flush()
        self._waiting.append((meter, x))
        self._bytes += size
        if self._bytes >= self.limit:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if waiting:
            update_together(*zip(*waiting, strict=True))


def _layer_entropy(meter: EntropyMeter, estimators: tuple[str, ...]) -> LayerEntropy:
    found = meter.moments()
    # The histogram of one value has the narrowest bin of the grid, which means nothing: the Gaussian's floor is used.
    constant = (found.std < STD_FLOOR) | (found.minimum == found.maximum)
    number = int(constant.sum())
    if number == meter.channels:
        raise ValueError(f"{meter.name}: all {number} channels are constant over {meter.count} tokens")
    floor = torch.full((), STD_FLOOR, dtype=torch.float64, device=constant.device).log2()
    spreads = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* channels are constant")  # they are counted in the result
        for name in estimators:
            counted = name == "histogram"
            values = meter.compute(name, differential=counted, miller_madow=counted)
            spreads[name] = _spread(torch.where(constant, floor, values))
    return LayerEntropy(meter.channels, number, meter.count, spreads.get("gaussian"), spreads.get("histogram"))


def _spread(values: Tensor) -> Spread:
    quartiles = values.quantile(torch.tensor((0.25, 0.5, 0.75), dtype=values.dtype, device=values.device))
    return Spread(float(values.mean()), *quartiles.tolist())


def _counted_by(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `histogram` chooses for such outputs."""
    if device.type == "mps":  # has no float64, so that meters move the values to the CPU
        device = torch.device("cpu")
    name, _ = histogram_backend(device, dtype)
    if name == "extension":
        name += " CUDA" if device.type == "cuda" else f" {_extension.cpu_capability()}"
    return name
