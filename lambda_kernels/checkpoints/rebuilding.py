"""Rebuilding a model from its config, and the arguments for timm that describe a model."""

from __future__ import annotations

import inspect
import json
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..blocks.structure import inspect_model
from ..convert.checks import check_indices
from ..convert.conversion import remove_attention
from ..convert.settings import ConversionSettings
from ..errors import CheckpointError
from .comparison import NO_EFFECT, find_channels
from .folder import OWN_ARGS, PREFIX
from .weights import load_state_dict

# Arguments of timm.create_model that name weights. Older timm (seen in 1.0.15) runs code in a file of checkpoint_path.
_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "model_dir"}

# Parts of a model that store arguments of its constructor, and the prefix that those have there.
_PLACES = (("patch_embed", ""), ("embeds", ""), ("rope", ""), ("rope", "rope_"), ("", ""))


def build(config: dict) -> nn.Module:
    """The model that `config` describes (see `pretrained`), on the CPU. Its parameters have no values; see `fill`.

    Raises:
        CheckpointError: timm cannot build it.
        ValueError: The config removes the attention of blocks that the model does not have.
    """
    ours = config["lambda_kernels"]
    _check_sources(config)
    # JSON made lists of timm's tuples.
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in config["pretrained_cfg"].items()}
    model = _create(config["architecture"], cfg, config["model_args"])
    # Without the warnings of convert_vit, which were issued at the conversion.
    removed = check_indices(ours["removed"], inspect_model(model).depth, "removed")
    names = ("residual_scale", "fuse", "tome_r", "tome_start")
    settings = ConversionSettings(**{name: ours[name] for name in names if ours.get(name) is not None})
    return remove_attention(model, removed, settings)


def _create(architecture: str, cfg: dict[str, Any], args: dict[str, Any]) -> nn.Module:
    import timm

    # pretrained_cfg restores the mean, standard deviation and crop of the training.
    create = partial(timm.create_model, architecture, pretrained=False, pretrained_cfg=cfg or None, **args)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            try:
                with _parameters_without_memory():
                    model = create()
                if not any(buffer.is_meta for buffer in model.buffers()):
                    return model
            except Exception:  # some constructors compute with the values of their parameters
                pass
            return create()
    except Exception as error:  # timm raises RuntimeError, TypeError, AssertionError …
        raise CheckpointError(
            f"timm cannot build {architecture!r} with {args} ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules that are built inside it have their buffers, but parameters on the meta device, which cost no initialization.

    Buffers that are not in the state dict (rotary frequencies, indices of positions) get their values from the constructor.
    """

    caller = threading.get_ident()  # PyTorch calls the hook for modules of all threads

    def strip(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != caller:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(strip)  # type: ignore[arg-type]  # its annotation lacks the result
    try:
        yield
    finally:
        handle.remove()


def fill(model: nn.Module, state: dict[str, Tensor], source: str = "the checkpoint") -> None:
    """Give a model from `build` its weights, which keep their dtypes; buffers outside of `state` follow these.

    Raises:
        CheckpointError: Keys or shapes differ.
    """
    load_state_dict(model, state, assign=True, source=source)
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())


def _check_sources(config: dict) -> None:
    """Refuse a config that would make timm read from a hub, or a file that may hold code."""
    import timm

    named = sorted(_SOURCES & config["model_args"].keys())
    if named:
        raise CheckpointError(f"model_args has {', '.join(named)}; weights are read only from the folder")
    if not timm.is_model(config["architecture"]):
        raise CheckpointError(f"timm cannot build {config['architecture']!r}: it has no model of that name")


def get_removal_args(model: nn.Module) -> dict[str, Any]:
    """`removed` and `residual_scale`, and `tome_r` and `tome_start` of a model that merges tokens: plain JSON types."""
    structure = inspect_model(model)
    args = {"removed": list(structure.removed), "residual_scale": structure.residual_scale}
    if structure.merging:
        info = model.lambda_kernels_info.to_dict()
        args |= {name: info[name] for name in ("tome_r", "tome_start")}
    return args


def find_model_args(model: nn.Module, architecture: str, cfg: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, the arguments that timm has recorded, and all that visibly differ from what timm would build with these."""
    ours = {"removed": [], "residual_scale": 1.0, "fuse": "none"}
    known = {**_recorded_args(model, architecture), **given}
    plain = {"architecture": architecture, "model_args": known, "pretrained_cfg": cfg, "lambda_kernels": ours}
    default = infer_args(build(plain))
    found = {k: v for k, v in infer_args(model).items() if k not in given and v != default.get(k)}
    return {**known, **found}


def _recorded_args(model: nn.Module, architecture: str) -> dict[str, Any]:
    """The arguments of timm.create_model that timm (1.0.31, not 1.0.15) has stored on the model; plain JSON types."""
    recorded = getattr(model, "_model_args", None)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not isinstance(recorded, dict) or (cfg.get("architecture") or "").removeprefix(PREFIX) != architecture:
        return {}
    names = recorded.keys() - _SOURCES - set(OWN_ARGS)
    return {name: value for name, value in recorded.items() if name in names and is_json(value)}


def infer_args(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that can be inferred from a built ViT, DeiT, Eva, BEiT or NaFlexViT."""
    names = _argument_names(model)
    args: dict[str, Any] = {}
    for part, prefix in _PLACES:
        place = getattr(model, part, None) if part else model
        values = {prefix + name: value for name, value in vars(place).items()} if place is not None else {}
        args |= {k: _plain(v) for k, v in values.items() if k in names - set(NO_EFFECT) and _plain(v) is not None}
    patch = getattr(model, "patch_embed", None)
    embeds = getattr(model, "embeds", model)  # where NaFlexViT stores what others have on the model
    proj = getattr(patch, "proj", None)
    if isinstance(proj, nn.Conv2d):
        args |= {"in_chans": find_channels(patch), "patch_size": list(proj.kernel_size)}
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
    args["rope_rotate_half"] = getattr(attention, "rotate_half", False)
    args["qk_norm"] = not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity)
    return args


def _plain(value: object) -> object:
    """A value as the config stores it; None if it is no plain one."""
    if isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value):
        return list(value)
    return value if isinstance(value, (bool, int, float, str)) else None


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


def is_json(value: object) -> bool:
    """Whether strict JSON can hold `value`."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
