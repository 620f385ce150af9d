"""The block that remains when an attention layer has been removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from .families import FAMILIES
from .mlp_block import MlpBlockBase, copy_runtime_settings, find_family_or_vit

if TYPE_CHECKING:
    from typing_extensions import Self

_Forward = TypeVar("_Forward", bound=Callable[..., Tensor])


def _forward_for_script(
    self: AttentionFreeBlock,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    shared_rel_pos_bias: Tensor | None = None,
) -> Tensor:
    # timm passes all but tokens by name. Conditions on hasattr are decided when this is compiled.
    x = self.residual_scale * x
    branch = self.mlp(self.norm2(x))
    if hasattr(self, "ls2"):
        branch = self.ls2(branch)
    elif self.gamma_2 is not None:
        branch = self.gamma_2 * branch
    return x + self.drop_path2(branch)


def _scripted_as(source: Callable[..., Tensor]) -> Callable[[_Forward], _Forward]:
    """Let `torch.jit.script`, which knows no variable arguments, compile `source` instead of the decorated forward.

    It compiles the code that `inspect` finds for a method, as for all decorated ones.
    """

    def mark(forward: _Forward) -> _Forward:
        forward.__wrapped__ = source  # type: ignore[attr-defined]  # as functools.wraps sets it
        return forward

    return mark


class AttentionFreeBlock(MlpBlockBase):
    """A ViT block whose attention is gone: `x ← s·x; x ← x + drop_path2(ls2(mlp(norm2(x))))`.

    It uses the parts of the block that it replaces, under timm's names, so that state-dict keys remain. `forward` accepts all
    arguments of timm's block, but ignores masks, rotary embeddings and position biases, which concern the attention.

    Args:
        norm2: The norm before the MLP.
        mlp: The MLP.
        ls2: LayerScale (in some families a bare parameter γ), or None.
        drop_path2: Stochastic depth or None.
        residual_scale: s; 1 where the attention was skipped, 2 where it was diluted into the identity.
        fuse: Compute through `ln_mlp` where that is possible.
        backend: Passed to `ln_mlp`.
        recompute: What a training step recomputes instead of saving it: "auto", "none", "act" or "all", as for `ln_mlp`.
            Submodules that run one by one are run twice for it; `recomputed(...)` says whether they can be.
        family: A key of `families.FAMILIES`, which defines the names of the parts and the arguments of `forward`.
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
        """Make one from the MLP half of `block`, whose parameters it shares.

        Args:
            block: timm's block of a known family, or a `FusedMlp`.
            **options: Keyword arguments of the constructor; `fuse`, `backend` and `recompute` default to those of a `FusedMlp`.
        """
        family = find_family_or_vit(block)
        parts = block.norm2, block.mlp, getattr(block, family.scales[1]), block.drop_path2
        return copy_runtime_settings(cls(*parts, family=family.name, **options), block, options)

    @_scripted_as(_forward_for_script)
    def forward(self, x: Tensor, *arguments: object, **named: object) -> Tensor:
        """Map tokens `x` [N, T, C] to tokens; the other arguments are checked, then ignored: they are for the attention.

        They are those of timm's block of the family: of `rope`, `attn_mask`, `is_causal` and `shared_rel_pos_bias`.
        """
        if arguments or named:
            FAMILIES[self.family].for_attention(arguments, named)  # raises as timm's block does
        return self._mlp_half(x)

    def extra_repr(self) -> str:
        return f"residual_scale={self.residual_scale:g}" + ("" if self.family == "vit" else f", family={self.family}")


def _explain_attention_keys(module: AttentionFreeBlock, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    # Otherwise PyTorch only lists the unexpected keys of a full checkpoint. The reason is added to that list: PyTorch always
    # calls this with strict=True, so that an exception would be raised with strict=False too.
    _, _, _, unexpected, _ = rest
    if any(key.startswith((f"{prefix}attn.", f"{prefix}norm1.")) for key in state_dict):
        unexpected.append(
            f"{prefix.rstrip('.')} has lost its attention, but the checkpoint has weights for it. Load a full checkpoint "
            "into the full model, then convert that"
        )
