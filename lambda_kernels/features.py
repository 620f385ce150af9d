"""Feature maps for dense tasks from a model that has lost attention layers, and the scale of these maps.

A removed block with residual_scale s passes s·x on. After k such blocks the residual stream is therefore s^k times as large
as it would be without the factors: with z = x/s^k

    z ← z + s^−k·MLP(LN(s^k·z))

and LN(s^k·z) is LN(z) with an epsilon divided by s^2k. A final norm removes the factor. Features from before it have it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .blocks.structure import inspect_model, refuse_merging
from .errors import UnsupportedModelError
from .ops.checks import as_int, check_choice

OUTPUT_FORMATS = ("NCHW", "NLC")


def residual_scales(model: nn.Module) -> tuple[float, ...]:
    """The factor s^k on the residual stream after each block, where k removed blocks with residual_scale s precede or are it.

    Divide the output of `forward_intermediates` for block i by the i-th factor to undo it; for s = 2 this is exact.

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
    """timm's wrapper for `features_only=True`, which can also divide each feature map by its scale; see `feature_model`.

    Attributes:
        scales: The factor s^k of each feature map, before `rescale`.
        rescale: Whether maps are divided by these factors.
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
    """A backbone for dense tasks from a converted model, as `timm.create_model(…, features_only=True)` makes from others.

    It omits the blocks after the last map, the classifier and, without `norm`, the final norm.

    Args:
        model: A timm vision transformer, converted or not.
        out_indices: Blocks whose outputs are the maps; negative ones count from the end, a number n means the last n blocks.
        norm: Apply the model's final norm to every map, which removes the factor s^k (up to its epsilon).
        rescale: Divide each map by s^k, which gives it the size that it would have without the factors. A head that was
            trained on one kind of map is wrong by the factor on the other.
        output_fmt: "NCHW" for maps `[N, C, H, W]`, "NLC" for tokens `[N, H·W, C]`; class and register tokens are omitted.
        inplace: Use the blocks of `model` itself instead of a deep copy.

    Returns:
        A module from images to a list of maps, with timm's `feature_info`, in the mode (eval or training) of `model`.

    Raises:
        ValueError: An index is out of range, `output_fmt` is unknown, or `norm` and `rescale` are both set.
        UnsupportedModelError: The model is wrapped, of an unknown kind, merges tokens, or has no final norm for `norm`.
    """
    check_choice("output_fmt", output_fmt, OUTPUT_FORMATS)
    if norm and rescale:
        raise ValueError(
            "norm=True already removes the scale, so rescale=True has nothing to divide by; set only one of them"
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
    features.training = training  # only the wrapper: each part retains its mode
    info = getattr(model, "lambda_kernels_info", None)
    if info is not None:
        left = len(model.blocks)
        removed = tuple(index for index in info.removed if index < left)
        model.lambda_kernels_info = dataclasses.replace(info, removed=removed, blocks=info.blocks[:left])
    return features


def _block_indices(out_indices: object, depth: int) -> list[int]:
    """`out_indices` counted from the first block, in the order of the blocks, which is the order of timm's maps."""
    allowed = f"a number of blocks from 1 to {depth}, or block indices from {-depth} to {depth - 1}"
    last = out_indices if isinstance(out_indices, int) else None
    values = out_indices if last is None else [last]
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"out_indices must be {allowed}; got {out_indices!r}")
    for value in values:
        index = as_int(value)
        if index is None or not (1 <= index <= depth if last is not None else -depth <= index < depth):
            raise ValueError(f"out_indices holds {value!r}; it must be {allowed}")
    if last is not None:
        return list(range(depth - last, depth))
    indices = sorted({value % depth for value in values})
    if len(indices) != len(values):
        raise ValueError(f"out_indices names a block twice: {list(values)}")
    return indices
