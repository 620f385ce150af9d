"""The block that remains when an attention layer has been removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .families import FAMILIES
from .mlp_block import MlpBlockBase, copy_runtime_settings, find_family_or_vit

if TYPE_CHECKING:
    from typing_extensions import Self


class AttentionFreeBlock(MlpBlockBase):
    """A ViT block whose attention is gone: `x ← s·x; x ← x + drop_path2(ls2(mlp(norm2(x))))`.

    Takes over the parts of the block it replaces, under timm's names, so state-dict keys survive. `forward` takes all that
    timm's block takes; without attention, masks, rotary embeddings and position biases have nothing to act on.

    Args:
        norm2: The norm before the MLP.
        mlp: The MLP.
        ls2: LayerScale, the bare parameter γ of families that have one, or None.
        drop_path2: Stochastic depth or None.
        residual_scale: s; 1 where the attention was skipped, 2 where it was diluted into the identity.
        fuse: Compute through `ln_mlp` where that is possible.
        backend: Passed on to `ln_mlp`.
        recompute: What a training step computes again instead of saving it: "auto", "none", "act" or "all", as for `ln_mlp`.
            Where the submodules run one by one it is done by running them twice; `recomputed(...)` says whether they can.
        family: A name of `families.FAMILIES`: what the parts are called and what `forward` takes.
    """

    def __init__(
        self,
        norm2: nn.Module,
        mlp: nn.Module,
        ls2: nn.Module | None = None,
        drop_path2: nn.Module | None = None,
        *,
        residual_scale: float = 1.0,
        fuse: bool = True,
        backend: str = "auto",
        recompute: str = "auto",
        family: str = "vit",
    ) -> None:
        super().__init__(residual_scale, fuse, backend, recompute, family)
        self.norm2 = norm2
        self.mlp = mlp
        described = FAMILIES[family]
        setattr(self, described.scales[1], nn.Identity() if ls2 is None and not described.bare else ls2)
        self.drop_path2 = drop_path2 if drop_path2 is not None else nn.Identity()
        self.register_load_state_dict_pre_hook(_explain_attention_keys)

    @classmethod
    def from_block(cls, block: nn.Module, **options: Any) -> Self:
        """Take over the MLP half of a block of a known family or of a `FusedMlp`; its parameters are shared, not copied.

        Args:
            block: timm's, or a `FusedMlp`.
            **options: Keyword arguments of the constructor; those for how it runs default to those of a `FusedMlp`.
        """
        family = find_family_or_vit(block)
        scale = getattr(block, family.scales[1])
        return copy_runtime_settings(
            cls(block.norm2, block.mlp, scale, block.drop_path2, family=family.name, **options), block, options
        )

    def forward(self, x: Tensor, *arguments: object, **named: object) -> Tensor:
        """Tokens `x` [N, T, C] to tokens; `arguments` and `named`, meant for the attention, are checked and left."""
        FAMILIES[self.family].for_attention(arguments, named)  # refuses what timm's block refuses
        return self._mlp_half(x)

    def extra_repr(self) -> str:
        return f"residual_scale={self.residual_scale:g}" + ("" if self.family == "vit" else f", family={self.family}")


def _explain_attention_keys(
    module: AttentionFreeBlock,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    *lists: list[str],
) -> None:
    # A checkpoint of the full model would otherwise only give a list of unexpected keys. The reason goes among them: PyTorch
    # always calls this with strict=True, and an error of its own would be raised with strict=False too.
    _, unexpected, _ = lists
    if any(key.startswith((f"{prefix}attn.", f"{prefix}norm1.")) for key in state_dict):
        unexpected.append(
            f"{prefix.rstrip('.')} has no attention any more, but the checkpoint holds some for it. Load a full checkpoint "
            "into the full model first and convert that"
        )
