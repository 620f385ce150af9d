"""What each timm model looks like to this library: which blocks it can change, and what their parts are called.

All that blocks, surgery, paths and dilution know about a family of blocks is in its `Family`; what is refused, and why, is in
`refusals`. Blocks are compared by class identity, never by name or by attributes: several timm families share the attribute
names `norm1`, `attn`, `mlp` and mean other things by them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """One kind of block: `x ← x + drop_path1(scale1(attn(norm1(x)))); x ← x + drop_path2(scale2(mlp(norm2(x))))`.

    Attributes:
        name: How blocks of this library remember which family theirs was.
        block: timm's class.
        scales: What the LayerScales of attention and MLP are called.
        bare: They are parameters of the block itself, or None where there is none; else modules, an identity for none.
        arguments: What `forward` takes beyond tokens and hands on to the attention, in timm's order, with defaults.
        attributes: Plain values that timm keeps on the block and that a replacement takes over.
        parts: The submodules and bare scales of a block, in timm's order.
        accepted: What timm's own block takes beyond tokens in the version that is installed.
    """

    name: str
    block: type[nn.Module]
    scales: tuple[str, str]
    bare: bool
    arguments: Mapping[str, object]
    attributes: tuple[str, ...] = ()
    parts: tuple[str, ...] = field(init=False)
    accepted: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        of_attention, of_mlp = self.scales
        parts = ("norm1", "attn", of_attention, "drop_path1", "norm2", "mlp", of_mlp, "drop_path2")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "accepted", tuple(inspect.signature(self.block.forward).parameters)[2:])

    @property
    def unknown_arguments(self) -> list[str]:
        """What this version of timm may pass to its blocks and this description does not know."""
        return [name for name in self.accepted if name not in self.arguments]

    def for_attention(self, positional: tuple[object, ...], named: dict[str, Any]) -> dict[str, Any]:
        """What a block was called with beyond tokens, as keyword arguments for its attention.

        Arguments that were not given are passed with their defaults where timm's block passes them.

        Raises:
            TypeError: An argument that the family's blocks do not take, or one given twice.
        """
        if not positional and not named:
            return {name: self.arguments[name] for name in self.accepted}
        names = tuple(self.arguments)
        if len(positional) > len(names):
            raise TypeError(f"forward() takes tokens and {len(names)} more arguments; got {len(positional)} more")
        given = dict(zip(names, positional, strict=False))
        for name, value in named.items():
            if name not in names:
                raise TypeError(f"forward() got an unexpected argument {name!r}; it takes {', '.join(names)}")
            if name in given:
                raise TypeError(f"forward() got {name!r} twice")
            given[name] = value
        # An attention that does not know an argument refuses it, as it does under timm's block; a default says nothing.
        return {
            name: given.get(name, default)
            for name, default in self.arguments.items()
            if name in self.accepted or given.get(name, default) is not default
        }


_MASKS = {"attn_mask": None, "is_causal": False}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("vit", vision_transformer.Block, ("ls1", "ls2"), False, _MASKS),
        Family("eva", eva.EvaBlock, ("gamma_1", "gamma_2"), True, {"rope": None, **_MASKS}, ("init_values",)),
        Family("beit", beit.Block, ("gamma_1", "gamma_2"), True, {"shared_rel_pos_bias": None}, ("init_values",)),
    )
}


def layer_scale(block: nn.Module, scale: str) -> Tensor | None:
    """γ [C] of a LayerScale of a block, by its name in the block's family; None for none."""
    found = getattr(block, scale, None)
    return getattr(found, "gamma", None) if isinstance(found, nn.Module) else found
