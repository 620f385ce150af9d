"""The MLP half of a block, which all replacement blocks share: as one `ln_mlp`, or its submodules one by one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from timm.layers.activations import GELU, GELUTanh
from timm.models.vision_transformer import LayerScale  # timm.layers has another LayerScale in some versions
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedModelError
from ..ops.checks import check_choice
from ..ops.ln_mlp import recompute as recomputed
from ..ops.ln_mlp.dispatch import Choice, choose
from ..ops.ln_mlp.function import RECOMPUTE, compute_dtype, ln_mlp, resolve_recompute
from ..ops.ln_mlp.reference import scale_residual
from .families import FAMILIES, Family, get_layer_scale
from .hooks import any_altered, has_global_hooks, is_altered

_MLP_PARTS = ("fc1", "act", "drop1", "norm", "fc2", "drop2")

_BARE = frozenset(vars(nn.Module()))
_SETTINGS = frozenset(("residual_scale", "fuse", "backend", "recompute", "family", "tome_r", "prefix_tokens"))


def find_gelu_form(act: nn.Module) -> str | None:
    """`approximate` of the GELU that `act` computes; None if it computes another function."""
    if type(act) is nn.GELU:
        return act.approximate
    if type(act) is GELUTanh:
        return "tanh"
    return "none" if type(act) is GELU else None


def find_replacement_obstacles(block: nn.Module) -> list[str]:
    """Reasons why another block cannot replace `block`, timm's or a `FusedMlp`, and use its parts; empty if it can."""
    found = []
    family = find_family_or_vit(block)
    if family.unknown_arguments:
        found.append(f"this version of timm passes {', '.join(family.unknown_arguments)} to its blocks")
    present = {name for held in (block._modules, block._parameters) for name, part in held.items() if part is not None}
    absent = {name for name in family.scales if family.bare and getattr(block, name, None) is None}
    if present != set(family.parts) - absent:
        names = ", ".join(sorted(present ^ (set(family.parts) - absent)))
        found.append(f"its submodules are not those of timm's Block ({names})")
    usual = {*_BARE, *_SETTINGS, *family.attributes, *absent}
    own = [
        name
        for name, value in vars(block).items()
        if name not in usual or (name not in ("_modules", "_parameters") and isinstance(value, (dict, set)) and value)
    ]
    if any("hooks" in name for name in own):
        found.append("a hook on the block itself would be lost")
    others = [name for name in own if "hooks" not in name]
    if others:
        found.append(f"what was put on the block itself would be lost ({', '.join(others)})")
    return found


@dataclass(frozen=True)
class Recompute:
    """What a training step recomputes in an MLP half instead of saving it, and why."""

    level: str  # "none", "act" or "all", as for `ln_mlp`
    reason: str


class MlpBlockBase(nn.Module):
    """The base of the blocks here: `x ← s·x; x ← x + drop_path2(ls2(mlp(norm2(x))))`, as one `ln_mlp` where that is possible.

    Subclasses register `norm2`, `mlp`, `drop_path2` and the LayerScale of the MLP, under the names of their `family`.
    """

    family = "vit"  # the name, not the Family, so that copies and pickles share one description

    def __init__(self, residual_scale: float, fuse: bool, backend: str, recompute: str, family: str = "vit") -> None:
        super().__init__()
        check_choice("recompute", recompute, RECOMPUTE)
        check_choice("family", family, tuple(FAMILIES))
        self.family = family
        self.residual_scale = float(residual_scale)
        self.fuse = fuse
        self.backend = backend
        self.recompute = recompute

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script calls this first.
        if self.fuse:
            raise UnsupportedModelError(
                f"torch.jit.script cannot follow a fused block ({type(self).__name__}): convert with fuse='none' for it"
            )
        return self

    def path(
        self, device: torch.device, dtype: torch.dtype, training: bool | None = None, *, recording: bool | None = None
    ) -> Choice:
        """How the MLP half runs for tokens on `device` with `dtype`, and why.

        `backend` of the result is "modules" if the submodules are called one by one, else the choice of `ln_mlp`. `training`
        replaces the present mode of the submodules, `recording` whether autograd records the call, by default as `training`.
        """
        recording = training if recording is None else recording
        if recording is None:
            recording = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        obstacles = self.fusion_obstacles(training)
        if obstacles:
            return Choice("modules", "; ".join(obstacles))
        return choose(device, dtype, self.backend, channels=self.mlp.fc1.in_features, recording=recording)

    def recomputed(self, device: torch.device, dtype: torch.dtype, training: bool | None = True) -> Recompute:
        """What a training step for tokens on `device` with `dtype` recomputes, and why.

        `training` replaces the mode of the submodules; None uses the present one of each.
        """
        by = self.path(device, dtype, training, recording=True).backend
        if by == "modules":
            level, obstacles = self._modules_recompute()
        else:
            channels = self.mlp.fc1.in_features
            level, obstacles = resolve_recompute(self.recompute, channels, by), []
            if by == "torch" and level != "none":
                obstacles = recomputed.obstacles()
        if obstacles:
            return Recompute("none", f"{level!r} was requested, but {'; '.join(obstacles)}")
        if self.recompute != "auto":
            how = {"modules": ", by running modules twice", "torch": ", by PyTorch's operators"}.get(by, "")
            return Recompute(level, f"requested by name{how}")
        if by == "triton":
            return Recompute(level, f"'auto' decides by width, {channels} here")
        return Recompute(level, "'auto' leaves it to autograd where no kernel runs")

    def fusion_obstacles(self, training: bool | None = None) -> list[str]:
        """Reasons why the submodules cannot run as one `ln_mlp` with the same result; empty if they can.

        Checked at every forward: submodules may be wrapped, replaced, hooked or put into another mode at any time.
        `training` replaces the mode of the submodules.
        """
        if not self.fuse:
            return ["fusion was switched off"]
        # From the dictionaries: the attribute lookup of nn.Module would cost more than all the rest of this.
        norm2, mlp, drop_path2 = map(self._modules.get, ("norm2", "mlp", "drop_path2"))
        scale = FAMILIES[self.family].scales[1]
        ls2 = self._modules.get(scale)
        if type(mlp) is not Mlp:
            return [f"mlp is {type(mlp).__name__}, not Mlp"]
        inside = fc1, act, drop1, norm, fc2, drop2 = [*map(mlp._modules.get, _MLP_PARTS)]
        found = []
        if type(norm2) not in (nn.LayerNorm, LayerNorm):
            found.append(f"norm2 is {type(norm2).__name__}, not LayerNorm")
        elif norm2.__dict__.get("_fast_norm"):
            found.append("norm2 uses timm's fast norm, which rounds differently")
        if type(fc1) is not nn.Linear or type(fc2) is not nn.Linear:
            found.append(f"mlp's layers are {type(fc1).__name__} and {type(fc2).__name__}, not Linear")
        if find_gelu_form(act) is None:
            found.append(f"the activation is {type(act).__name__}, not GELU")
        if type(norm) is not nn.Identity:
            found.append("mlp has a norm between its layers")
        if ls2 is not None and type(ls2) not in (nn.Identity, LayerScale):
            found.append(f"{scale} is {type(ls2).__name__}, not LayerScale")
        if type(drop1) is not nn.Dropout or type(drop2) is not nn.Dropout:
            found.append("mlp's dropouts were replaced")
        # The mode of each dropout: Monte-Carlo dropout puts only the dropouts of an evaluated model into training mode.
        elif any(d.p > 0 and (d.training if training is None else training) for d in (drop1, drop2)):
            found.append("dropout is active")
        if type(drop_path2) not in (nn.Identity, DropPath):
            found.append(f"drop_path2 is {type(drop_path2).__name__}, not DropPath")
        if has_global_hooks() or any(map(is_altered, (norm2, mlp, *inside, ls2, drop_path2))):
            found.append("a hook or a replaced forward inside the block must run")
        if not found:
            w1, w2 = _parameter(fc1, "weight"), _parameter(fc2, "weight")
            biases = (_parameter(part, "bias") for part in (norm2, fc1, fc2))
            others = (_parameter(norm2, "weight"), w2, *biases, get_layer_scale(self, scale))
            if any(other is not None and other.dtype != w1.dtype for other in others):
                found.append(f"norm2, mlp and {scale} have different dtypes")
            if hasattr(w1, "__tensor_flatten__") or hasattr(w2, "__tensor_flatten__"):
                found.append("mlp's weights are wrapped: quantized, or spread over devices")
        return found

    def _modules_recompute(self) -> tuple[str, list[str]]:
        """The requested level where the modules run one by one, and reasons why they cannot recompute so."""
        if self.recompute in ("auto", "none"):
            return "none", []
        scale = self._modules.get(FAMILIES[self.family].scales[1])
        halves = (self.norm2, self.mlp, scale, self.drop_path2)
        parts = [module for part in halves if part is not None for module in part.modules()]
        found = recomputed.obstacles()
        if has_global_hooks() or any(map(is_altered, parts)):
            found.append("a hook or a replaced forward inside the block would run twice")
        if any(module.training and any(True for _ in module.buffers(recurse=False)) for module in parts):
            found.append("the buffers of a module inside the block would be updated twice")
        if self.recompute == "act" and type(self.mlp) is not Mlp:
            found.append(f"mlp is {type(self.mlp).__name__}, not Mlp, and may have no activation to stop at")
        return self.recompute, found

    def _run_modules(self, x: Tensor) -> Tensor:
        """Run the submodules one by one; with `recompute`, they run again in the backward.

        The second run uses the same random state and the same autocast. The first product runs twice with "all", the second
        one if a dropout or LayerScale after it needs its result.
        """
        level, obstacles = self._modules_recompute() if torch.is_grad_enabled() else ("none", [])
        if level == "none" or obstacles:
            return self._after(x, self.mlp(self.norm2(self._scaled(x))))
        if level == "all":
            return checkpoint(lambda x: self._after(x, self.mlp(self.norm2(self._scaled(x)))), x, use_reentrant=False)
        mlp = self.mlp

        def norm(x: Tensor) -> Tensor:
            return self.norm2(self._scaled(x))

        def after(x: Tensor, pre: Tensor) -> Tensor:
            return self._after(x, mlp.drop2(mlp.fc2(mlp.norm(mlp.drop1(mlp.act(pre))))))

        return recomputed.checkpoint_around(norm, mlp.fc1, after, x)

    def _scaled(self, x: Tensor) -> Tensor:
        return scale_residual(x, self.residual_scale)

    def _after(self, x: Tensor, branch: Tensor) -> Tensor:
        return self._scaled(x) + self.drop_path2(_apply_layer_scale(self, FAMILIES[self.family].scales[1], branch))

    def _attention_branch(self, x: Tensor, positional: tuple[object, ...], named: dict[str, Any]) -> Tensor:
        """`drop_path1(scale1(attn(norm1(x))))`; `positional` and `named` are the other arguments of `forward`."""
        family = FAMILIES[self.family]
        branch = self.attn(self.norm1(x), **family.for_attention(positional, named))
        return self.drop_path1(_apply_layer_scale(self, family.scales[0], branch))

    def _mlp_half(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            half = find_plain_half(self)
            if half is not None:
                *tensors, eps, form, drop_path = half
                scale = tensors[6]
                factor = _draw_branch_scale(drop_path, x, tensors[4], scale) if drop_path.training else None
                return ln_mlp(
                    x,
                    *tensors[:6],
                    eps=eps,
                    residual_scale=self.residual_scale,
                    layer_scale=scale,
                    branch_scale=factor,
                    approximate=form,
                    recompute=self.recompute,
                    backend=self.backend,
                )
        norm2, mlp = self.norm2, self.mlp
        if self.fusion_obstacles():
            return self._run_modules(x)
        form = find_gelu_form(mlp.act)
        assert form is not None, "fusion_obstacles refuses other activations"
        fc1, fc2 = mlp.fc1, mlp.fc2
        scale = get_layer_scale(self, FAMILIES[self.family].scales[1])
        return ln_mlp(
            x,
            norm2.weight,
            norm2.bias,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            eps=norm2.eps,
            residual_scale=self.residual_scale,
            layer_scale=scale,
            branch_scale=_draw_branch_scale(self.drop_path2, x, fc2.weight, scale),
            approximate=form,
            recompute=self.recompute,
            backend=self.backend,
        )


_NORMS = (nn.LayerNorm, LayerNorm)
_DROP_PATHS = (nn.Identity, DropPath)
_get_parts = itemgetter(*_MLP_PARTS)
_get_weights = itemgetter("weight", "bias")
_PLAIN = (Tensor, nn.Parameter)


def find_plain_half(block: MlpBlockBase) -> tuple[Any, ...] | None:
    """What `ln_mlp` gets of a block, found in less time than `fusion_obstacles` needs; None if anything is unusual.

    Nothing is remembered: modules, hooks, modes and parameters are looked up at each call, and a block that passes has no
    obstacle. In order: γ, β, W1, b1, W2, b2, LayerScale, eps, the form of GELU, the module of stochastic depth.
    """
    if not block.fuse or has_global_hooks() or type(block).fusion_obstacles is not MlpBlockBase.fusion_obstacles:
        return None
    modules = block._modules
    name = FAMILIES[block.family].scales[1]
    try:
        norm2, mlp, drop_path2 = modules["norm2"], modules["mlp"], modules["drop_path2"]
        fc1, act, drop1, norm, fc2, drop2 = parts = _get_parts(mlp._modules)
        ls2 = modules.get(name)
        if (
            type(mlp) is not Mlp
            or type(norm2) not in _NORMS
            or type(fc1) is not nn.Linear
            or type(fc2) is not nn.Linear
            or type(norm) is not nn.Identity
            or type(drop1) is not nn.Dropout
            or type(drop2) is not nn.Dropout
            or (drop1.training and drop1.p > 0)
            or (drop2.training and drop2.p > 0)
            or type(drop_path2) not in _DROP_PATHS
            or norm2.__dict__.get("_fast_norm")
        ):
            return None
        # An attribute beside a registered part or parameter hides it.
        if "fusion_obstacles" in block.__dict__ or any(
            name in module.__dict__
            for module, names in ((block, ("norm2", "mlp")), (mlp, ("fc1", "act", "fc2")))
            for name in names
        ):
            return None
        if any("weight" in module.__dict__ or "bias" in module.__dict__ for module in (norm2, fc1, fc2)):
            return None
        if ls2 is not None and "gamma" in ls2.__dict__:
            return None
        form = find_gelu_form(act)
        if form is None or any_altered(norm2, mlp, ls2, drop_path2, *parts):
            return None
        scale = None
        if type(ls2) is LayerScale:
            scale = ls2._parameters["gamma"]
        elif ls2 is None:
            scale = block._parameters[name] if name in block._parameters else block.__dict__[name]
        elif type(ls2) is not nn.Identity:
            return None
        ln_weight, ln_bias = _get_weights(norm2._parameters)
        w1, b1 = _get_weights(fc1._parameters)
        w2, b2 = _get_weights(fc2._parameters)
    except (AttributeError, KeyError):  # of replicas, whose parameters are attributes
        return None
    tensors = (ln_weight, ln_bias, w1, b1, w2, b2, scale)
    dtype = w1.dtype
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.dtype != dtype):
            return None
    return (*tensors, norm2.eps, form, drop_path2)


def _parameter(module: nn.Module, name: str) -> Any:
    # The dictionary is several times faster than the attribute, which wrappers may define otherwise.
    return module._parameters[name] if name in module._parameters else getattr(module, name)


def _apply_layer_scale(block: nn.Module, name: str, branch: Tensor) -> Tensor:
    """A branch times its LayerScale, which is a module, a parameter of the block, or None."""
    scale = getattr(block, name)
    if scale is None:
        return branch
    return scale(branch) if isinstance(scale, nn.Module) else scale * branch


def _draw_branch_scale(drop_path: nn.Module, x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor | None:
    """The factor `[B, 1, …]` of timm's DropPath for the branches of x `[B, …, C]`; None if it does nothing.

    It is drawn as timm does, in the dtype that `weight` and the LayerScale `scale` give the branch, so that the same seed
    drops the same samples.
    """
    if type(drop_path) is not DropPath or not drop_path.training or not drop_path.drop_prob:
        return None
    dtype = compute_dtype(x, weight)
    dtype = dtype if scale is None else torch.promote_types(dtype, scale.dtype)
    keep = 1.0 - drop_path.drop_prob
    factor = torch.empty((x.shape[0],) + (1,) * (x.dim() - 2), dtype=dtype, device=x.device)
    factor.bernoulli_(keep)
    return factor.div_(keep) if keep > 0.0 and drop_path.scale_by_keep else factor


_Half = TypeVar("_Half", bound=MlpBlockBase)


def copy_runtime_settings(new: _Half, block: nn.Module, options: dict[str, Any]) -> _Half:
    """Give `new`, which uses parts of `block`, the mode of `block` and the settings of it that `options` omit."""
    if isinstance(block, MlpBlockBase):
        for name in ("fuse", "backend", "recompute"):
            setattr(new, name, options.get(name, getattr(block, name)))
    new.training = block.training  # only this block: each part retains its mode
    return new


def copy_with(block: _Half, **attributes: Any) -> _Half:
    """`block` with these attributes: itself if it has them, else a copy that shares submodules and hooks.

    Handles of those hooks remain valid.
    """
    if all(getattr(block, name) == value for name, value in attributes.items()):
        return block
    copied = copy.copy(block)
    for name, value in attributes.items():
        setattr(copied, name, value)
    return copied


def find_family_or_vit(block: nn.Module) -> Family:
    """The family of `block`; that of timm's `Block` for a module of an unknown class, which needs the parts of a ViT block."""
    return find_family(block) or FAMILIES["vit"]


def find_family(block: nn.Module) -> Family | None:
    """The family of timm's own block, or of a block of this library that replaces one; None for all others."""
    if isinstance(block, MlpBlockBase):
        return FAMILIES[block.family]
    return next((family for family in FAMILIES.values() if type(block) is family.block), None)
