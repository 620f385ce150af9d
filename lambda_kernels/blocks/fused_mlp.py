"""A block that keeps its attention and runs its MLP half through `ln_mlp`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .families import FAMILIES, Family
from .mlp_block import MlpBlockBase, copy_runtime_settings, find_family_or_vit

if TYPE_CHECKING:
    from typing_extensions import Self


class FusedMlp(MlpBlockBase):
    """A ViT block that keeps its attention and runs its MLP half through `ln_mlp`: the same function as timm's block.

    Holds the parts of the block it stands for, under timm's names and in timm's order, so that state-dict keys, the
    order of the parameters and optimizer groups survive. It is no `Block` itself: code that patches every `Block` of a
    model must not take it for one.

    Args:
        norm1: The norm before the attention.
        attn: The attention; called with what timm's block of the family passes on to it.
        ls1: LayerScale or an identity; of families with bare parameters γ or None.
        drop_path1: Stochastic depth or an identity.
        norm2: The norm before the MLP.
        mlp: The MLP.
        ls2: As ls1.
        drop_path2: Stochastic depth or an identity.
        fuse: Compute the MLP half through `ln_mlp` where that is possible.
        backend: Passed on to `ln_mlp`.
        recompute: As for `AttentionFreeBlock`; of the MLP half alone. What the attention saves is not touched.
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
        """Take over all parts of a block of a known family; its parameters are shared, not copied.

        Args:
            block: timm's.
            **options: Keyword arguments of the constructor.
        """
        family = find_family_or_vit(block)
        new = cls(*(getattr(block, name) for name in family.parts), family=family.name, **options)
        _take_attributes(new, block, family)
        return copy_runtime_settings(new, block, options)

    def to_timm(self) -> nn.Module:
        """timm's own block around the same parts, as they are now."""
        # Built without __init__, which would need the sizes and make modules to throw away. Nothing of the block that this
        # one came from is kept beside its parts: a second reference would be stale once one of them is replaced.
        family = FAMILIES[self.family]
        block = family.block.__new__(family.block)
        nn.Module.__init__(block)
        for name in family.parts:
            setattr(block, name, getattr(self, name))
        _take_attributes(block, self, family)
        block.training = self.training
        return block

    def forward(self, x: Tensor, *arguments: object, **named: object) -> Tensor:
        """Tokens `x` [N, T, C] to tokens; `arguments` and `named` are what timm's block hands on to its attention."""
        return self._mlp_half(x + self._attention_branch(x, arguments, named))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        # No hook, which would stay behind where the submodules move to another block.
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        here = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if here and not any(key.startswith("attn.") for key in here):
            missing.append(
                f"{prefix.rstrip('.')} has attention, but the checkpoint holds none for it: it was saved from a converted "
                "model. Load it with from_pretrained, or into a model converted with the same `remove`"
            )


def _take_attributes(new: nn.Module, block: nn.Module, family: Family) -> None:
    for name in family.attributes:
        if name in vars(block):
            setattr(new, name, vars(block)[name])
