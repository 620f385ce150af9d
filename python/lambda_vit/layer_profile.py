"""The entropy of every attention and MLP output, block by block, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from lambda_kernels.blocks import AttentionFreeBlock
from lambda_kernels.entropy import EntropyMeter
from lambda_kernels.families import inspect_model
from lambda_kernels.ops.checks import check_choice

from .placement import eval_mode, one_device, one_dtype
from .progress import track
from .transfer import ESTIMATORS


@dataclass(frozen=True)
class BlockEntropy:
    """Mean entropy per channel of a block's attention and MLP output, in bits; None where there is no attention."""

    block: int
    attn: float | None
    mlp: float


@dataclass(frozen=True)
class LayerProfile:
    """The profile of a model: what the paper's first two figures show."""

    estimator: str
    samples: int
    blocks: tuple[BlockEntropy, ...]

    def to_dict(self) -> dict:
        """As plain JSON types."""
        return {"unit": "bits", **asdict(self), "blocks": [asdict(b) for b in self.blocks]}


@torch.inference_mode()
def profile_layers(model: nn.Module, loader: Iterable, *, estimator: str = "gaussian") -> LayerProfile:
    """Measure the entropy of every attention and MLP output of `model`, before LayerScale and the residual.

    Args:
        model: A timm vision transformer, converted or not.
        loader: Yields images, or tuples whose first item is images; iterated once.
        estimator: "gaussian" (mean log2 σ per channel) or "histogram" (mean differential entropy per channel).

    Raises:
        ValueError: An empty loader.
        NonFiniteActivationError: NaN or infinity; names block, layer, batch and dtype.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    inspect_model(model)
    device, dtype = one_device(model), one_dtype(model)
    meters: dict[tuple[int, str], EntropyMeter] = {}
    hooks = []
    for index, block in enumerate(model.blocks):
        layers = {"mlp": block.mlp} if isinstance(block, AttentionFreeBlock) else {"attn": block.attn, "mlp": block.mlp}
        for name, layer in layers.items():
            meter = meters[index, name] = EntropyMeter(estimator, name=f"blocks[{index}].{name}")
            hooks.append(layer.register_forward_hook(lambda module, args, output, meter=meter: _add(meter, output)))
    samples = 0
    try:
        with eval_mode(model):
            for batch in track(loader, "Profile"):
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                samples += len(images)
                model(images.to(device, dtype, non_blocking=True))
    finally:
        for hook in hooks:
            hook.remove()
    if samples == 0:
        raise ValueError("loader gave no images: there is nothing to measure")
    values = {
        key: float((meter.compute(differential=True) if estimator == "histogram" else meter.compute()).mean())
        for key, meter in meters.items()
    }
    blocks = tuple(
        BlockEntropy(index, values.get((index, "attn")), values[index, "mlp"]) for index in range(len(model.blocks))
    )
    return LayerProfile(estimator, samples, blocks)


def _add(meter: EntropyMeter, output: object) -> None:
    meter.update(output[0] if isinstance(output, tuple) else output)
