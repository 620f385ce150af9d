"""The families of timm blocks that this library can change: their classes, and the names of their parts.

All that the library knows about a family of blocks is in its `Family`; `refusals` lists which classes are refused, and why.
Blocks are compared by class identity, never by name or attributes: several timm families use the names `norm1`, `attn` and
`mlp` with other meanings.
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
    """A kind of block: `x ← x + drop_path1(scale1(attn(norm1(x)))); x ← x + drop_path2(scale2(mlp(norm2(x))))`."""

    name: str  # the key in `FAMILIES`, which blocks of this library store
    block: type[nn.Module]  # timm's class
    scales: tuple[str, str]  # names of the LayerScales of attention and MLP
    bare: bool  # whether these are parameters of the block itself, or None if absent; else they are modules, or identities
    arguments: Mapping[
        str, object
    ]  # of `forward` besides tokens, passed to the attention: in timm's order, with defaults
    attributes: tuple[str, ...] = ()  # plain values that timm stores on the block and that a replacement copies
    parts: tuple[str, ...] = field(init=False)  # names of the submodules and bare scales of a block, in timm's order
    accepted: tuple[str, ...] = field(init=False)  # arguments besides tokens that the installed timm's block accepts

    def __post_init__(self) -> None:
        of_attention, of_mlp = self.scales
        parts = ("norm1", "attn", of_attention, "drop_path1", "norm2", "mlp", of_mlp, "drop_path2")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "accepted", tuple(inspect.signature(self.block.forward).parameters)[2:])

    @property
    def unknown_arguments(self) -> list[str]:
        """Arguments that the installed timm may pass to its blocks and that this description lacks."""
        return [name for name in self.accepted if name not in self.arguments]

    def for_attention(self, positional: tuple[object, ...], named: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of a block, besides tokens, as keyword arguments for its attention.

        Omitted arguments are passed with their defaults where timm's block passes them.

        Raises:
            TypeError: An argument that the family's blocks do not accept, or the same argument twice.
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
        # An attention raises for an argument that it does not accept, as in timm's block, unless it has its default.
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


def get_layer_scale(block: nn.Module, scale: str) -> Tensor | None:
    """γ [C] of the LayerScale of this name of a block; None if it has none."""
    found = getattr(block, scale, None)
    return getattr(found, "gamma", None) if isinstance(found, nn.Module) else found
