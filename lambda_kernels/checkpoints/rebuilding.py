"""Rebuilding a model from its config: the arguments for timm, and whether the result is the saved model."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..blocks.attention_free import AttentionFreeBlock
from ..blocks.families import FAMILIES
from ..blocks.mlp_block import MlpBlockBase
from ..blocks.structure import inspect_model
from ..convert.checks import check_indices
from ..convert.conversion import remove_attention
from ..convert.settings import ConversionSettings
from ..errors import CheckpointError

# Attributes of a timm model that affect neither its loaded weights nor its output. The last one is a mark that torch.compile
# sets on its argument.
_NO_EFFECT = ("training", "weight_init_mode", "fix_init", "grad_checkpointing", "_is_torch_compile")

# Arguments of timm.create_model that name weights. Older timm (seen in 1.0.15) runs code in a file of checkpoint_path.
_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "model_dir"}


def build(config: dict, device: str) -> nn.Module:
    """The model that `config` describes (see `pretrained`), with timm's initial weights.

    Raises:
        CheckpointError: timm cannot build it.
        ValueError: The config removes the attention of blocks that the model does not have.
    """
    import timm

    ours = config["lambda_kernels"]
    _check_sources(config)
    # JSON made lists of timm's tuples.
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in config["pretrained_cfg"].items()}
    try:
        with torch.device(device):
            model = timm.create_model(
                config["architecture"],
                pretrained=False,
                # restores the mean, standard deviation and crop of the training
                pretrained_cfg=cfg or None,
                **config["model_args"],
            )
    except Exception as error:  # timm raises RuntimeError, TypeError, AssertionError …
        raise CheckpointError(
            f"timm cannot build {config['architecture']!r} with {config['model_args']} ({type(error).__name__}: {error})"
        ) from error
    # Without the warnings of convert_vit, which were issued at the conversion.
    removed = check_indices(ours["removed"], inspect_model(model).depth, "removed")
    names = ("residual_scale", "fuse", "tome_r", "tome_start")
    settings = ConversionSettings(**{name: ours[name] for name in names if ours.get(name) is not None})
    return remove_attention(model, removed, settings)


def _check_sources(config: dict) -> None:
    """Refuse a config that would make timm read from a hub, or a file that may hold code."""
    import timm

    named = sorted(_SOURCES & config["model_args"].keys())
    if named:
        raise CheckpointError(f"model_args has {', '.join(named)}; weights are read only from the folder")
    if not timm.is_model(config["architecture"]):
        raise CheckpointError(f"timm cannot build {config['architecture']!r}: it has no model of that name")


def build_skeleton(config: dict) -> nn.Module:
    """The structure of the model, on the meta device where timm can build it there."""
    try:
        return build(config, "meta")
    except CheckpointError as error:
        # Older timm (seen in 1.0.20) reads its drop-path rates from a tensor, which fails on the meta device.
        if "meta" not in str(error):
            raise
        return build(config, "cpu")


def get_removal_args(model: nn.Module) -> dict[str, Any]:
    """`removed` and `residual_scale`, and `tome_r` and `tome_start` of a model that merges tokens: plain JSON types."""
    structure = inspect_model(model)
    args = {"removed": list(structure.removed), "residual_scale": structure.residual_scale}
    if structure.merging:
        info = model.lambda_kernels_info.to_dict()
        args |= {name: info[name] for name in ("tome_r", "tome_start")}
    return args


def find_model_args(model: nn.Module, architecture: str, cfg: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, and all arguments of the model that visibly differ from timm's defaults for the name."""
    ours = {"removed": [], "residual_scale": 1.0, "fuse": "none"}
    plain = {"architecture": architecture, "model_args": given, "pretrained_cfg": cfg, "lambda_kernels": ours}
    default = infer_args(build_skeleton(plain))
    found = {k: v for k, v in infer_args(model).items() if k not in given and v != default.get(k)}
    return {**found, **given}


def infer_args(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that can be inferred from a built ViT, DeiT, Eva, BEiT or NaFlexViT."""
    names = _argument_names(model)
    args: dict[str, Any] = {
        k: v
        for k, v in vars(model).items()
        if k in names and k not in _NO_EFFECT and isinstance(v, (bool, int, float, str))
    }
    patch = getattr(model, "patch_embed", None)
    embeds = getattr(model, "embeds", model)  # where NaFlexViT stores what others have on the model
    proj = getattr(patch, "proj", None)
    if isinstance(proj, nn.Conv2d):
        args |= {"in_chans": proj.in_channels, "patch_size": list(proj.kernel_size)}
    elif embeds is not model:
        args |= {"patch_size": list(embeds.patch_size), "pos_embed_grid_size": _sides(embeds.pos_embed_grid_size)}
    if getattr(patch, "img_size", None) is not None:
        args["img_size"] = list(patch.img_size)
    args["depth"] = len(model.blocks)
    args["class_token"] = getattr(embeds, "cls_token", None) is not None
    registers = getattr(embeds, "reg_token", None)
    args["reg_tokens"] = args["num_reg_tokens"] = 0 if registers is None else registers.shape[1]
    args["num_classes"] = model.num_classes
    args |= _args_of_blocks(model.blocks)
    if "mlp_ratio" in args and _doubles_glu(model):
        args["mlp_ratio"] /= 2
    args |= {
        "drop_rate": _rate(getattr(model, "head_drop", None)),
        "pos_drop_rate": _rate(getattr(embeds, "pos_drop", None)),
        "patch_drop_rate": _rate(getattr(model, "patch_drop", None)),
    }
    return {k: v for k, v in args.items() if k in names}


def _argument_names(model: nn.Module) -> set[str]:
    # Of all base classes: a distilled model passes *args and **kwargs to them.
    constructors = [cls.__init__ for cls in type(model).__mro__]  # type: ignore[misc]  # each class's own is meant
    names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    if "cfg" in names:
        from timm.models import naflexvit

        if isinstance(model, naflexvit.NaFlexVit):
            names |= set(naflexvit.NaFlexVitCfg.__dataclass_fields__)
    return names


def _doubles_glu(model: nn.Module) -> bool:
    # Eva makes its gated MLPs twice as wide as mlp_ratio says, a ViT does not.
    from timm.layers import GluMlp
    from timm.models.eva import Eva

    return isinstance(model, Eva) and isinstance(model.blocks[-1].mlp, GluMlp)


def _args_of_blocks(blocks: nn.Sequential | nn.ModuleList) -> dict[str, Any]:
    last = blocks[-1]  # the highest drop-path rate
    args = {"drop_path_rate": _rate(last.drop_path2), "init_values": _init_values(last)}
    first = next(
        (layer for name in ("fc1", "fc1_g") if isinstance(layer := getattr(last.mlp, name, None), nn.Linear)), None
    )
    if first is not None:
        args["mlp_ratio"] = find_mlp_ratio(first.in_features, first.out_features)
        args["proj_drop_rate"] = _rate(getattr(last.mlp, "drop2", getattr(last.mlp, "drop", None)))
    attention = next((block.attn for block in blocks if hasattr(block, "attn")), None)
    if attention is None:
        return args
    args |= {"num_heads": attention.num_heads, "attn_drop_rate": _rate(getattr(attention, "attn_drop", None))}
    query = getattr(attention, "qkv", None)
    query = getattr(attention, "q_proj", None) if query is None else query
    if isinstance(query, nn.Linear):
        # Eva and BEiT store the bias outside the layer.
        args["qkv_bias"] = query.bias is not None or getattr(attention, "q_bias", None) is not None
    args["qk_norm"] = not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity)
    return args


def find_mlp_ratio(channels: int, hidden: int) -> float:
    """The float for which `int(channels * ratio)` is `hidden`; with the plain quotient it can be one less."""
    ratio = hidden / channels
    return ratio if int(channels * ratio) == hidden else math.nextafter(ratio, math.inf)


def _sides(size: Iterable[int] | None) -> list[int] | None:
    return None if size is None else list(size)


def _rate(dropout: nn.Module | None) -> float:
    """Of a dropout, a DropPath or a PatchDropout."""
    for name in ("p", "prob", "drop_prob"):
        value = getattr(dropout, name, None)
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0


def _init_values(block: nn.Module) -> float | None:
    """Any value makes a LayerScale, whose gamma comes from the weights; not every timm stores the original value."""
    scale = getattr(block, "ls2", None)
    found = getattr(scale, "init_values", None)
    if isinstance(found, (int, float)):
        return found
    bare = [getattr(block, name, None) for name in ("gamma_2", "gamma_1")]
    return 1e-5 if hasattr(scale, "gamma") or any(gamma is not None for gamma in bare) else None


def find_difference(rebuilt: nn.Module, model: nn.Module) -> str | None:
    """The first difference between `model` and what its config builds, apart from values of weights; None if there is none."""
    if type(rebuilt) is not type(model):
        return f"the class is {type(model).__name__}, timm builds {type(rebuilt).__name__}"
    new, old = dict(rebuilt.named_modules()), dict(model.named_modules())
    for name in sorted(new.keys() | old.keys()):
        if name not in new or name not in old:
            return f"{name} exists only in {'the model' if name in old else 'what timm builds'}"
        ours, theirs = (f"{_class_name(m)}({m.extra_repr()})" for m in (old[name], new[name]))
        if ours != theirs:
            return f"{name or 'the model'} is {ours}, timm builds {theirs}"
    new_state, old_state = rebuilt.state_dict(), model.state_dict()
    for name in sorted(new_state.keys() | old_state.keys()):
        shape, built = (list(s[name].shape) if name in s else None for s in (old_state, new_state))
        if shape != built:
            return f"{name} has shape {shape}, timm builds {built}"
    plain = (bool, int, float, str, type(None))
    for name, value in vars(model).items():
        other = vars(rebuilt).get(name)
        if name not in _NO_EFFECT and isinstance(value, plain) and isinstance(other, plain) and value != other:
            return f"model.{name} is {value!r}, timm builds {other!r}"
    return None


def _class_name(module: nn.Module) -> str:
    # A FusedMlp computes the same as timm's block, and has the same weights.
    if isinstance(module, MlpBlockBase) and not isinstance(module, AttentionFreeBlock):
        return FAMILIES[module.family].block.__name__
    return type(module).__name__


def is_json(value: object) -> bool:
    """Whether strict JSON can hold `value`."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
