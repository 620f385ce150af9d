"""Feature maps for dense tasks out of a model that has lost attention layers, and the scale that they have.

A removed block of residual_scale s passes s·x on, so that behind k of them the residual stream is s^k times as large as it
would be without the factors: with z = x/s^k

    z ← z + s^−k·MLP(LN(s^k·z))

and LN(s^k·z) is LN(z) with an epsilon divided by s^2k. A final norm takes the factor out. Features taken before it have it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .blocks.structure import inspect_model, refuse_merging
from .errors import UnsupportedModelError
from .ops.checks import check_choice

OUTPUT_FORMATS = ("NCHW", "NLC")


def residual_scales(model: nn.Module) -> tuple[float, ...]:
    """The factor s^k on the residual stream behind each block: k removed blocks of residual_scale s up to and with it.

    Dividing what `forward_intermediates` gives for block i by the i-th of these undoes the factors; for s = 2 no bit is lost.

    Args:
        model: A timm vision transformer, converted or not.

    Raises:
        UnsupportedModelError: The model is wrapped or of an unknown kind.
    """
    structure = inspect_model(model)
    return tuple(
        structure.residual_scale ** sum(removed <= i for removed in structure.removed) for i in range(structure.depth)
    )


class FeatureModel(FeatureGetterNet):
    """What `feature_model` makes: timm's own wrapper of `features_only=True`, whose features may be divided by their scale.

    Attributes:
        scales: The factor s^k that each feature map has, or had if `rescale`.
        rescale: Whether maps are divided by it.
    """

    def __init__(self, model: nn.Module, out_indices: list[int], norm: bool, rescale: bool, output_fmt: str) -> None:
        scales = residual_scales(model)
        super().__init__(model, out_indices=out_indices, output_fmt=output_fmt, norm=norm)
        self.scales = tuple(scales[index] for index in self.out_indices)
        self.rescale = rescale

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of images `[N, channels, height, width]`, in the order of the blocks."""
        maps = super().forward(x)
        if not self.rescale:
            return maps
        return [each if scale == 1.0 else each / scale for each, scale in zip(maps, self.scales, strict=True)]


def feature_model(
    model: nn.Module,
    out_indices: int | Sequence[int] = 3,
    *,
    norm: bool = False,
    rescale: bool = False,
    output_fmt: str = "NCHW",
    inplace: bool = False,
) -> FeatureModel:
    """A backbone for dense tasks, as `timm.create_model(…, features_only=True)` gives, out of a converted model.

    Blocks behind the last map, the classifier and, without `norm`, the final norm are left out.

    Args:
        model: A timm vision transformer, converted or not.
        out_indices: Blocks whose outputs are the maps; negative ones count from the end, a number n means the last n blocks.
        norm: Put every map through the model's final norm, which takes the factor s^k out (up to its epsilon).
        rescale: Divide each map by s^k, so that it has the size that it would have without the factors. A head that was
            trained on the one kind of map is off by the factor on the other.
        output_fmt: "NCHW" for maps `[N, C, H, W]`, "NLC" for tokens `[N, H·W, C]`; class and register tokens are left out.
        inplace: Take `model` itself apart instead of a deep copy.

    Returns:
        A module from images to a list of maps, with timm's `feature_info`; eval or training mode as `model` has it.

    Raises:
        ValueError: An index is out of range, `output_fmt` is unknown, or `norm` and `rescale` are both set.
        UnsupportedModelError: The model is wrapped, of an unknown kind, merges tokens, or has no final norm to put maps
            through.
    """
    check_choice("output_fmt", output_fmt, OUTPUT_FORMATS)
    if norm and rescale:
        raise ValueError(
            "norm=True takes the scale out already, and what it gives has no scale to divide by; set one only"
        )
    structure = inspect_model(model)
    refuse_merging(structure, "a feature model")
    indices = _block_indices(out_indices, structure.depth)
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "prune_intermediate_layers"):
        raise UnsupportedModelError(f"{type(model).__name__} has no forward_intermediates in this version of timm")
    if norm and isinstance(getattr(model, "norm", nn.Identity()), nn.Identity):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no norm before its pooling that norm=True could use; pass rescale=True instead"
        )
    model = model if inplace else copy.deepcopy(model)
    training = model.training
    features = FeatureModel(model, indices, norm, rescale, output_fmt)
    features.training = training  # of the wrapper alone: parts keep the mode they have
    info = getattr(model, "lambda_kernels_info", None)
    if info is not None:
        left = len(model.blocks)
        removed = tuple(index for index in info.removed if index < left)
        model.lambda_kernels_info = dataclasses.replace(info, removed=removed, blocks=info.blocks[:left])
    return features


def _block_indices(out_indices: object, depth: int) -> list[int]:
    """`out_indices` counted from the first block, and in the order of the blocks, which is that of timm's maps."""
    allowed = f"a number of blocks from 1 to {depth}, or block indices from {-depth} to {depth - 1}"
    last = out_indices if isinstance(out_indices, int) else None
    values = out_indices if last is None else [last]
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"out_indices must be {allowed}; got {out_indices!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"out_indices holds {value!r}; it must be {allowed}")
        if not (1 <= value <= depth if last is not None else -depth <= value < depth):
            raise ValueError(f"out_indices holds {value}; it must be {allowed}")
    if last is not None:
        return list(range(depth - last, depth))
    indices = sorted({value % depth for value in values})
    if len(indices) != len(values):
        raise ValueError(f"out_indices names a block twice: {list(values)}")
    return indices
