"""Views of a model that share its parameters: without some attention layers, or from one block on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from lambda_kernels.blocks.attention_free import AttentionFreeBlock
from lambda_kernels.blocks.structure import find_stem, inspect_model, refuse_merging
from lambda_kernels.convert.checks import check_indices


class SupportsLayers(Protocol):
    """An object with block indices in `layers`, such as a `Selection`."""

    @property
    def layers(self) -> Sequence[int]: ...


def skip_attention(model: nn.Module, skip: Sequence[int] | SupportsLayers) -> nn.Module:
    """A view of `model` that skips the attention of the blocks `skip`; it shares parameters and modules.

    Args:
        model: A timm vision transformer; it is not changed.
        skip: Block indices, or an object with `layers`, such as a `Selection`.

    Returns:
        A model that shares all modules with `model`, and whose blocks in `skip` compute x + MLP(LN(x)).

    Raises:
        ValueError: An index is wrong.
        UnsupportedModelError: The model cannot be changed block by block.
    """
    structure = inspect_model(model)
    refuse_merging(structure, "skipping attention")
    skip = check_indices(skip, structure.depth, "skip")
    blocks = [view_without_attention(block) if i in skip else block for i, block in enumerate(model.blocks)]
    return with_blocks(model, blocks)


class InjectTokens(nn.Module):
    """A replacement of all blocks that returns their known output."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor, *positional: object, **named: object) -> Tensor:
        return self.tokens


def view_without_attention(block: nn.Module) -> nn.Module:
    return block if isinstance(block, AttentionFreeBlock) else AttentionFreeBlock.from_block(block)


def with_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """A shallow copy of `model` with other blocks; all else is shared, and `model` is not changed."""
    view = copy.copy(model)
    view._modules = dict(model._modules)
    view._modules["blocks"] = nn.Sequential(*blocks)
    return view


def view_without_stem(model: nn.Module) -> nn.Module:
    """A shallow copy of a timm model whose input is the output of the last block."""
    view, stem = with_blocks(model, ()), find_stem(model)
    view._parameters = dict(model._parameters)
    for name in stem.identities:
        if name in view._modules:
            view._modules[name] = nn.Identity()
    for name in stem.absent:
        held = view._parameters if name in view._parameters else view._modules
        held[name] = None
    for name in stem.no_tokens:
        view._parameters[name] = nn.Parameter(getattr(model, name).detach()[:, :0], requires_grad=False)
    if stem.pos_embed is not None and hasattr(view, "_pos_embed"):
        view._pos_embed = lambda x: (x, *stem.pos_embed) if stem.pos_embed else x  # type: ignore[assignment]  # over its method
    return view
