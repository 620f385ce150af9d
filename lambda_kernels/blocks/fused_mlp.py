"""The block with attention whose MLP half runs through `ln_mlp`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .families import FAMILIES, Family
from .mlp_block import MlpBlockBase, copy_runtime_settings, find_family_or_vit

if TYPE_CHECKING:
    from typing_extensions import Self


class FusedMlp(MlpBlockBase):
    """A ViT block with attention whose MLP half runs through `ln_mlp`: the same function as timm's block.

    It holds the parts of the block that it replaces, under timm's names and in timm's order, so that state-dict keys, the
    order of the parameters and optimizer groups remain. It is not a subclass of `Block`, because code that patches every
    `Block` of a model must not patch it.

    Args:
        norm1: The norm before the attention.
        attn: The attention, called with the arguments that timm's block of the family passes to it.
        ls1: LayerScale or an identity; in families with bare parameters, γ or None.
        drop_path1: Stochastic depth or an identity.
        norm2: The norm before the MLP.
        mlp: The MLP.
        ls2: As ls1.
        drop_path2: Stochastic depth or an identity.
        fuse: Compute the MLP half through `ln_mlp` where that is possible.
        backend: Passed to `ln_mlp`.
        recompute: As for `AttentionFreeBlock`, for the MLP half only.
        family: As for `AttentionFreeBlock`.
    """

    def __init__(
        self,
        norm1: nn.Module,
        attn: nn.Module,
        ls1: nn.Module | nn.Parameter | None,
        drop_path1: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        ls2: nn.Module | nn.Parameter | None,
        drop_path2: nn.Module,
        *,
        fuse: bool = True,
        backend: str = "auto",
        recompute: str = "auto",
        family: str = "vit",
    ) -> None:
        super().__init__(1.0, fuse, backend, recompute, family)
        parts = (norm1, attn, ls1, drop_path1, norm2, mlp, ls2, drop_path2)
        for name, part in zip(FAMILIES[family].parts, parts, strict=True):
            setattr(self, name, part)

    @classmethod
    def from_block(cls, block: nn.Module, **options: Any) -> Self:
        """Make one from all parts of `block`, whose parameters it shares.

        Args:
            block: timm's block of a known family.
            **options: Keyword arguments of the constructor.
        """
        family = find_family_or_vit(block)
        new = cls(*(getattr(block, name) for name in family.parts), family=family.name, **options)
        _copy_attributes(new, block, family)
        return copy_runtime_settings(new, block, options)

    def to_timm(self) -> nn.Module:
        """timm's own block with the present parts of this one."""
        # Built without __init__, which would need the sizes and make modules only to discard them. The original block is not
        # retained for this: its parts would be stale once one of them here is replaced.
        family = FAMILIES[self.family]
        block = family.block.__new__(family.block)
        nn.Module.__init__(block)
        for name in family.parts:
            setattr(block, name, getattr(self, name))
        _copy_attributes(block, self, family)
        block.training = self.training
        return block

    def forward(self, x: Tensor, *arguments: object, **named: object) -> Tensor:
        """Map tokens `x` [N, T, C] to tokens; `arguments` and `named` are those that timm's block passes to its attention."""
        return self._mlp_half(x + self._attention_branch(x, arguments, named))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Not a hook, which would remain on this block when its submodules move to another one.
        super()._load_from_state_dict(state_dict, prefix, *rest)
        _, _, missing, _, _ = rest
        here = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if here and not any(key.startswith("attn.") for key in here):
            missing.append(
                f"{prefix.rstrip('.')} has attention, but the checkpoint has no weights for it: it was saved from a converted "
                "model. Load it with from_pretrained, or into a model converted with the same `remove`"
            )


def _copy_attributes(new: nn.Module, block: nn.Module, family: Family) -> None:
    for name in family.attributes:
        if name in vars(block):
            setattr(new, name, vars(block)[name])
