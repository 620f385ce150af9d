"""Saving and loading: `config.json` says what to build and what was removed, `model.safetensors` holds the weights.

Strict both ways: a model that the config cannot rebuild is refused when it is saved, not when it is needed.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from . import __version__
from .blocks import AttentionFreeBlock, FusedMlp
from .convert import check_indices, remove_attention
from .errors import CheckpointError
from .families import inspect_model
from .files import atomic_write, remove_leftovers, sha256, write_json
from .merging import DEFAULT_START
from .ops.checks import check_choice
from .ops.dispatch import BACKENDS
from .ops.ln_mlp import RECOMPUTE

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# The weights that an existing config.json belongs to, kept until the new one has replaced it.
PREVIOUS = "model.previous.safetensors"
FORMAT = 1

# Attributes of a timm model that change neither its weights, once they are loaded, nor what it computes from them.
_NO_EFFECT = ("training", "weight_init_mode", "fix_init", "grad_checkpointing")


def save_pretrained(
    model: nn.Module, folder: str | Path, *, architecture: str | None = None, model_args: dict | None = None
) -> Path:
    """Write `folder/config.json` and `folder/model.safetensors`.

    They replace earlier ones so that `from_pretrained` finds the old model or the new one whenever this is killed.

    Args:
        model: A timm vision transformer, converted or not.
        folder: Created if needed.
        architecture: timm's name of the model; None reads it from the model.
        model_args: Arguments for `timm.create_model` that cannot be seen on the model. Sizes, classes, pooling and rates
            are found by themselves.

    Returns:
        The folder.

    Raises:
        CheckpointError: timm would build another model from the config; the first difference is named.
        UnsupportedModelError: The model is wrapped or of an unknown kind.
        OSError: No room on the disk; nothing was written.
    """
    folder = Path(folder)
    anatomy = inspect_model(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    architecture = architecture or cfg.get("architecture")
    if not architecture:
        raise CheckpointError(
            f"{type(model).__name__} does not say which timm model it is. Build it with timm.create_model, or pass "
            "architecture='…' (and model_args)"
        )
    cfg = {key: value for key, value in cfg.items() if _is_json(value)}
    model_args = _find_model_args(model, architecture, cfg, dict(model_args or {}))
    info = getattr(model, "lambda_kernels_info", None)
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "model_args": model_args,
        "pretrained_cfg": cfg,
        "lambda_kernels": {
            "format": FORMAT,
            "version": __version__,
            "removed": list(anatomy.removed),
            "residual_scale": anatomy.residual_scale or 1.0,
            # "removed" leaves a model that was never converted as it is
            "fuse": info.fuse if info else "removed",
            "tome_r": info.to_dict()["tome_r"] if info else 0,
            "tome_start": info.tome_start if info else DEFAULT_START,
        },
    }
    difference = _first_difference(_build_skeleton(config), model)
    if difference:
        raise CheckpointError(
            f"timm.create_model({architecture!r}, **{model_args}) would not rebuild this model: {difference}. Pass what it "
            "was built with as model_args={…}"
        )
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    _check_room(folder, state)

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        remove_leftovers(folder / name)
    try:
        with atomic_write(folder / WEIGHTS) as weights:
            save_file(state, weights, metadata={"format": "pt"})
            config["lambda_kernels"]["sha256"] = sha256(weights)
            if _weights_of(folder) == folder / WEIGHTS:
                with atomic_write(folder / PREVIOUS) as kept:
                    _link_or_copy(folder / WEIGHTS, kept)
    except SafetensorError as error:
        raise OSError(f"writing {folder / WEIGHTS} failed ({error}); the model that was there is kept") from error
    write_json(folder / CONFIG, config)
    (folder / PREVIOUS).unlink(missing_ok=True)
    return folder


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _weights_of(folder: Path) -> Path | None:
    """The file of weights that `folder/config.json` was written with; None if neither is."""
    try:
        expected = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["lambda_kernels"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    candidates = (folder / WEIGHTS, folder / PREVIOUS)
    return next((path for path in candidates if path.is_file() and sha256(path) == expected), None)


def from_pretrained(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    fuse: str | None = None,
    backend: str = "auto",
    recompute: str = "auto",
) -> nn.Module:
    """Build the model that `save_pretrained` wrote and load its weights, strictly; in eval mode.

    Args:
        folder: What was given to `save_pretrained`.
        device: Where the model goes.
        fuse: As for `convert_vit`; None keeps what was saved.
        backend: As for `convert_vit`.
        recompute: As for `convert_vit`; it is not saved, since it belongs to a training and not to the model.

    Raises:
        CheckpointError: A file is missing or damaged, or weights and config do not belong together.
        BackendUnavailableError: `backend="triton"` cannot run on `device`.
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("recompute", recompute, RECOMPUTE)
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; expected a folder written by save_pretrained")
    config = _read_config(folder / CONFIG)
    weights = _weights_of(folder)
    if weights is None:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that {CONFIG} was written with: a file was damaged or replaced. Save the "
            "model again"
        )
    if weights.name == PREVIOUS:
        warnings.warn(f"the last save to {folder} was interrupted; this is the model saved before it", stacklevel=2)
    if fuse is not None:
        config["lambda_kernels"]["fuse"] = fuse
    model = _build(config, "cpu")
    # assign keeps the dtypes of the file, so a bf16 model comes back as one
    load_state_dict(model, read_weights(weights), assign=True, source=str(weights))
    model = model.to(device).eval()
    info = model.lambda_kernels_info
    # Not before the model is where it will run: there alone it shows whether a backend is available, and which one runs.
    return remove_attention(model, info.removed, info.residual_scale, info.fuse, backend, recompute)


_KINDS = {
    "architecture": str,
    "model_args": dict,
    "pretrained_cfg": dict,
    "lambda_kernels": dict,
    "lambda_kernels.format": int,
    "lambda_kernels.removed": list,
    "lambda_kernels.residual_scale": (int, float),
    "lambda_kernels.fuse": str,
    "lambda_kernels.sha256": str,
}


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a config written by save_pretrained: {error}") from error
    for name, kind in _KINDS.items():
        value = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{path} is not a config written by save_pretrained: {name} is {value!r}")
    if config["lambda_kernels"]["format"] > FORMAT:
        found = config["lambda_kernels"]["format"]
        raise CheckpointError(f"{path} has format {found}, this version reads up to {FORMAT}; update lambda-kernels")
    return config


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pth/.pt/.bin without running pickled code.

    Raises:
        CheckpointError: The file is missing, damaged, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle each have their own kinds
        raise CheckpointError(f"{path} cannot be read as weights ({type(error).__name__}: {error})") from error
    for key in ("state_dict", "model", "net"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{path} holds no state dict")
    return loaded


def load_state_dict(
    model: nn.Module, state: dict[str, Tensor], *, assign: bool = False, source: str = "the checkpoint"
) -> None:
    """Load strictly, and explain what does not fit. Unlike plain `load_state_dict`, nothing is loaded in that case.

    Raises:
        CheckpointError: Keys or shapes differ; says so where the one model has attention layers that the other lost.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if not (missing or unexpected or shapes):
        model.load_state_dict(state, strict=True, assign=assign)
        return
    lost, extra = _attention_blocks(missing), _attention_blocks(unexpected)
    if missing and not unexpected and not shapes and lost is not None:
        raise CheckpointError(
            f"{source} has no attention for blocks {lost}: it was saved from a converted model. Load it with "
            f"from_pretrained, or into convert_vit(model, remove={lost})"
        )
    if unexpected and not missing and not shapes and extra is not None:
        raise CheckpointError(
            f"{source} has attention for blocks {extra}, which this model lost. Load it into the full model first, and "
            "convert that"
        )
    parts = [f"{len(keys)} {what} ({', '.join(keys[:3])}{' …' if len(keys) > 3 else ''})"
             for what, keys in (("missing keys", missing), ("unexpected keys", unexpected)) if keys]  # fmt: skip
    for key in sorted(shapes)[:3]:
        parts.append(f"{key} is {list(state[key].shape)}, the model has {list(own[key].shape)}")
    raise CheckpointError(f"{source} does not fit {type(model).__name__}: {'; '.join(parts)}")


def _attention_blocks(keys: list[str]) -> list[int] | None:
    blocks = set()
    for key in keys:
        parts = key.split(".")
        if len(parts) < 4 or parts[0] != "blocks" or parts[2] not in ("attn", "norm1", "ls1"):
            return None
        blocks.add(int(parts[1]))
    return sorted(blocks)


def _build(config: dict, device: str) -> nn.Module:
    import timm

    ours = config["lambda_kernels"]
    # JSON made lists of timm's tuples.
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in config["pretrained_cfg"].items()}
    try:
        with torch.device(device):
            model = timm.create_model(
                config["architecture"],
                pretrained=False,
                # the mean, standard deviation and crop that the weights were trained with come back with them
                pretrained_cfg=cfg or None,
                **config["model_args"],
            )
    except Exception as error:  # timm raises RuntimeError, TypeError, AssertionError …
        raise CheckpointError(
            f"timm cannot build {config['architecture']!r} with {config['model_args']} ({type(error).__name__}: {error})"
        ) from error
    # The warnings of convert_vit were given when the model was converted.
    removed = check_indices(ours["removed"], inspect_model(model).depth, "removed")
    merging = {
        "tome_r": ours.get("tome_r", 0),
        "tome_start": ours.get("tome_start", DEFAULT_START),
    }  # not in older files
    return remove_attention(model, removed, ours["residual_scale"], ours["fuse"], **merging)


def _build_skeleton(config: dict) -> nn.Module:
    """The model for its structure alone: without memory for weights where timm can build it so."""
    try:
        return _build(config, "meta")
    except CheckpointError as error:
        # Older timm (seen in 1.0.20) reads its drop-path rates off a tensor, which a meta tensor does not have.
        if "meta" not in str(error):
            raise
        return _build(config, "cpu")


def _find_model_args(model: nn.Module, architecture: str, cfg: dict, given: dict) -> dict:
    """`given`, and whatever can be seen to differ from what timm builds for the name alone."""
    ours = {"removed": [], "residual_scale": 1.0, "fuse": "none"}
    plain = {"architecture": architecture, "model_args": given, "pretrained_cfg": cfg, "lambda_kernels": ours}
    default = _visible_args(_build_skeleton(plain))
    found = {k: v for k, v in _visible_args(model).items() if k not in given and v != default.get(k)}
    return {**found, **given}


def _visible_args(model: nn.Module) -> dict:
    """Constructor arguments that can be read off a built model."""
    # Over all base classes: a distilled model passes *args and **kwargs on.
    names = {name for cls in type(model).__mro__ for name in inspect.signature(cls.__init__).parameters}
    args = {
        k: v
        for k, v in vars(model).items()
        if k in names and k not in _NO_EFFECT and isinstance(v, (bool, int, float, str))
    }
    patch = model.patch_embed
    proj = getattr(patch, "proj", None)
    if isinstance(proj, nn.Conv2d):
        args |= {"in_chans": proj.in_channels, "patch_size": list(proj.kernel_size)}
    if getattr(patch, "img_size", None) is not None:
        args["img_size"] = list(patch.img_size)
    args["depth"] = len(model.blocks)
    args["class_token"] = getattr(model, "cls_token", None) is not None
    args["reg_tokens"] = getattr(model, "num_reg_tokens", 0)
    args["num_classes"] = model.num_classes
    last = model.blocks[-1]  # the highest drop-path rate
    args["drop_path_rate"] = float(getattr(last.drop_path2, "drop_prob", 0.0) or 0.0)
    # Any value makes a LayerScale; its gamma comes from the weights. Not every timm keeps the one it was built with.
    args["init_values"] = getattr(last.ls2, "init_values", 1e-5 if hasattr(last.ls2, "gamma") else None)
    if isinstance(getattr(last.mlp, "fc1", None), nn.Linear):
        args["mlp_ratio"] = last.mlp.fc1.out_features / last.mlp.fc1.in_features
        args["proj_drop_rate"] = last.mlp.drop2.p
    for block in model.blocks:
        if not isinstance(block, AttentionFreeBlock):
            attn = block.attn
            args |= {"num_heads": attn.num_heads, "attn_drop_rate": attn.attn_drop.p}
            if isinstance(getattr(attn, "qkv", None), nn.Linear):
                args["qkv_bias"] = attn.qkv.bias is not None
            args["qk_norm"] = not isinstance(getattr(attn, "q_norm", nn.Identity()), nn.Identity)
            break
    for name, dropout in (("drop_rate", "head_drop"), ("pos_drop_rate", "pos_drop"), ("patch_drop_rate", "patch_drop")):
        module = getattr(model, dropout, None)
        args[name] = float(getattr(module, "p", getattr(module, "prob", 0.0)))
    return {k: v for k, v in args.items() if k in names}


def _first_difference(rebuilt: nn.Module, model: nn.Module) -> str | None:
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
        ours, theirs = (list(s[name].shape) if name in s else None for s in (old_state, new_state))
        if ours != theirs:
            return f"{name} has shape {ours}, timm builds {theirs}"
    plain = (bool, int, float, str, type(None))
    for name, value in vars(model).items():
        other = vars(rebuilt).get(name)
        if name not in _NO_EFFECT and isinstance(value, plain) and isinstance(other, plain) and value != other:
            return f"model.{name} is {value!r}, timm builds {other!r}"
    return None


def _class_name(module: nn.Module) -> str:
    # A FusedMlp computes what timm's Block does, and which of the two a block is says nothing about the weights.
    return "Block" if type(module) is FusedMlp else type(module).__name__


def _check_room(folder: Path, state: dict[str, Tensor]) -> None:
    needed = sum(v.numel() * v.element_size() for v in state.values()) + (1 << 20)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(f"saving to {folder} needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free")


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
