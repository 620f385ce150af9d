"""Blocks that call the operators. They keep timm's parameter names, so that checkpoints fit with and without them."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm, Mlp
from timm.layers.activations import GELU, GELUTanh
from timm.models.vision_transformer import LayerScale  # timm.layers has another class of that name in some versions
from torch import Tensor, nn

from .ops.dispatch import Choice, choose
from .ops.ln_mlp import ln_mlp

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def gelu_form(act: nn.Module) -> str | None:
    """`approximate` of the GELU that `act` computes, or None when it is another function."""
    if type(act) is nn.GELU:
        return act.approximate
    if type(act) is GELUTanh:
        return "tanh"
    return "none" if type(act) is GELU else None


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` would run hooks."""
    return any(getattr(module, name) for name in _HOOKS)


class AttentionFreeBlock(nn.Module):
    """A ViT block whose attention is gone: `x ← s·x; x ← x + drop_path2(ls2(mlp(norm2(x))))`.

    Takes over the submodules of the block it replaces, under timm's names, so state-dict keys survive. `forward` has the
    full signature of timm's `Block`. Without attention, `attn_mask` and `is_causal` have nothing to act on.

    Args:
        norm2: The norm before the MLP.
        mlp: The MLP.
        ls2: LayerScale or None.
        drop_path2: Stochastic depth or None.
        residual_scale: s; 1 where the attention was skipped, 2 where it was diluted into the identity.
        fuse: Compute through `ln_mlp` where that is possible.
        backend: Passed on to `ln_mlp`.
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
    ) -> None:
        super().__init__()
        self.norm2 = norm2
        self.mlp = mlp
        self.ls2 = ls2 if ls2 is not None else nn.Identity()
        self.drop_path2 = drop_path2 if drop_path2 is not None else nn.Identity()
        self.residual_scale = float(residual_scale)
        self.fuse = fuse
        self.backend = backend
        self.register_load_state_dict_pre_hook(_explain_attention_keys)

    @classmethod
    def from_block(cls, block: nn.Module, **options: object) -> AttentionFreeBlock:
        """Take over the MLP half of a timm `Block`; its parameters are shared, not copied.

        `options` are the keyword arguments of the constructor.
        """
        new = cls(block.norm2, block.mlp, block.ls2, block.drop_path2, **options)
        new.training = block.training  # of this block alone: its parts keep the mode they have
        return new

    def path(self, device: torch.device, dtype: torch.dtype, training: bool | None = None) -> Choice:
        """How `forward` runs for tokens on `device` with `dtype`, and why.

        `backend` is "modules" where the submodules are called one by one, else what `ln_mlp` chooses. `training` asks for
        a mode other than the present one.
        """
        obstacles = self.fusion_obstacles(self.training if training is None else training)
        if obstacles:
            return Choice("modules", "; ".join(obstacles))
        return choose("ln_mlp", device, dtype, self.backend)

    def fusion_obstacles(self, training: bool) -> list[str]:
        """Why the submodules cannot run as one `ln_mlp` without changing what they compute; empty when they can.

        Asked at every forward: submodules may be wrapped, replaced or hooked at any time.
        """
        norm2, mlp, ls2, drop_path2 = self.norm2, self.mlp, self.ls2, self.drop_path2
        if not self.fuse:
            return ["fusion was switched off"]
        if type(mlp) is not Mlp:
            return [f"mlp is {type(mlp).__name__}, not Mlp"]
        found = []
        if type(norm2) not in (nn.LayerNorm, LayerNorm):
            found.append(f"norm2 is {type(norm2).__name__}, not LayerNorm")
        elif getattr(norm2, "_fast_norm", False):
            found.append("norm2 uses timm's fast norm, which rounds differently")
        if type(mlp.fc1) is not nn.Linear or type(mlp.fc2) is not nn.Linear:
            found.append(f"mlp's layers are {type(mlp.fc1).__name__} and {type(mlp.fc2).__name__}, not Linear")
        if gelu_form(mlp.act) is None:
            found.append(f"the activation is {type(mlp.act).__name__}, not GELU")
        if type(mlp.norm) is not nn.Identity:
            found.append("mlp has a norm between its layers")
        if type(ls2) not in (nn.Identity, LayerScale):
            found.append(f"ls2 is {type(ls2).__name__}, not LayerScale")
        if type(mlp.drop1) is not nn.Dropout or type(mlp.drop2) is not nn.Dropout:
            found.append("mlp's dropouts were replaced")
        elif training and (mlp.drop1.p > 0 or mlp.drop2.p > 0):
            found.append("dropout is active")
        if training and type(drop_path2) is not nn.Identity and getattr(drop_path2, "drop_prob", 1.0):
            found.append("drop-path is active")
        if any(map(has_hooks, (norm2, mlp, mlp.fc1, mlp.act, mlp.drop1, mlp.fc2, mlp.drop2, ls2, drop_path2))):
            found.append("a hook inside the block must fire")
        return found

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.fusion_obstacles(self.training):
            x = x if self.residual_scale == 1.0 else self.residual_scale * x
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return ln_mlp(
            x,
            self.norm2.weight,
            self.norm2.bias,
            self.mlp.fc1.weight,
            self.mlp.fc1.bias,
            self.mlp.fc2.weight,
            self.mlp.fc2.bias,
            eps=self.norm2.eps,
            residual_scale=self.residual_scale,
            layer_scale=getattr(self.ls2, "gamma", None),
            approximate=gelu_form(self.mlp.act),
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"residual_scale={self.residual_scale:g}"


def _explain_attention_keys(
    module: AttentionFreeBlock, state_dict: dict, prefix: str, metadata: dict, strict: bool, *rest: list
) -> None:
    # A checkpoint of the full model would otherwise only give a list of unexpected keys.
    error_msgs = rest[-1]
    if strict and any(key.startswith((f"{prefix}attn.", f"{prefix}norm1.")) for key in state_dict):
        error_msgs.append(
            f"{prefix.rstrip('.')} has no attention any more, but the checkpoint holds some for it. Load a full checkpoint "
            "into the full model first and convert that"
        )
