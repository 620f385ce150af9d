"""Whether a model that timm has rebuilt is the saved one: its modules, their settings, and its outputs."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..blocks.attention_free import AttentionFreeBlock
from ..blocks.families import FAMILIES
from ..blocks.hooks import no_hooks
from ..blocks.mlp_block import MlpBlockBase

# How a module computes, on which its function does not depend.
_RUNTIME = ("fused_attn", "fuse", "backend", "recompute")

# Attributes of timm's modules that affect neither loaded weights nor outputs: they act at the initialization, in the
# backward, or only on how something is computed. The last one is a mark that torch.compile sets on its argument.
NO_EFFECT = (
    "training",
    "weight_init_mode",
    "fix_init",
    "init_values",
    "head_init_scale",
    "grad_checkpointing",
    *_RUNTIME,
    "_is_torch_compile",
)

# Of outputs on accelerators, or where a fused block stands for timm's own, relative to the largest one.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2

# Modes and hooks belong to a model and the compiler's stance to the process: two saves at a time would restore each other's.
_COMPARING = threading.RLock()


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
    for name, module in old.items():
        other = vars(new[name])
        for key, value in vars(module).items():
            theirs = other.get(key, value)
            if key not in NO_EFFECT and _is_plain(value) and _is_plain(theirs) and not _alike(value, theirs):
                return f"{'.'.join(filter(None, (name or 'model', key)))} is {value!r}, timm builds {theirs!r}"
    return None


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _alike(value: object, other: object) -> bool:
    # A size may have come as a list.
    if isinstance(value, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(value) == len(other) and all(map(_alike, value, other))
    if isinstance(value, float) and isinstance(other, float):
        # timm takes its drop-path rates from a float32 tensor.
        return math.isclose(value, other, rel_tol=1e-6)
    return value == other


def _class_name(module: nn.Module) -> str:
    # A FusedMlp computes the same as timm's block, and has the same weights.
    if isinstance(module, MlpBlockBase) and not isinstance(module, AttentionFreeBlock):
        return FAMILIES[module.family].block.__name__
    return type(module).__name__


def find_output_difference(rebuilt: nn.Module, model: nn.Module) -> str | None:
    """The difference of the outputs for one image of each size that `model` accepts; None if there is none.

    On the CPU the outputs have to be bit-equal. The modes and hooks of `model` remain and the hooks do not run.

    Args:
        rebuilt: What timm builds, with the weights of `model`; it changes.
        model: The model to save.
    """
    place = next(model.parameters())
    rebuilt.to(place.device)
    pairs = list(zip(model.modules(), rebuilt.modules(), strict=True))
    for ours, theirs in pairs:
        vars(theirs).update(
            {name: vars(ours)[name] for name in _RUNTIME if name in vars(ours) and name in vars(theirs)}
        )
    exact = place.device.type == "cpu" and all(type(ours) is type(theirs) for ours, theirs in pairs)
    tolerance = 0.0 if exact else _TOLERANCES.get(place.dtype, _HALF_TOLERANCE)
    channels, sizes = _find_sizes(model)
    with _COMPARING, torch.no_grad(), _evaluating(model), _evaluating(rebuilt):
        for i, size in enumerate(sizes):
            x = torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0), device="cpu").to(place)
            try:
                want = model(x)
            except Exception as error:  # a size that it does not accept, or weights spread over dtypes or devices
                if i == 0:
                    warnings.warn(
                        f"the model was saved without a test: it cannot process an image of {list(x.shape)} "
                        f"({type(error).__name__}: {error})",
                        stacklevel=4,
                    )
                continue
            try:
                got = rebuilt(x)
            except Exception as error:
                return f"what timm builds cannot process an image of {list(x.shape)} ({type(error).__name__}: {error})"
            difference = _differ(got, want, tolerance)
            if difference:
                found = f"the outputs for an image of {list(x.shape)} differ by {difference}"
                return "; ".join((found, *_find_changed_buffers(rebuilt, model)[:1]))
    return None


def _find_changed_buffers(rebuilt: nn.Module, model: nn.Module) -> list[str]:
    built = dict(rebuilt.named_buffers())
    return [
        f"{name} has other values than timm computes"
        for name, buffer in model.named_buffers()
        if name in built and not torch.equal(buffer, built[name])
    ]


def _find_sizes(model: nn.Module) -> tuple[int, list[tuple[int, int]]]:
    """The channels of images, and sizes: the usual one, one of other proportions, and one that has to be padded."""
    embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    channels, *usual = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    channels = find_channels(embed) or getattr(model, "in_chans", channels)
    height, width = getattr(embed, "img_size", None) or usual
    patch = getattr(embed, "patch_size", None)
    p, q = patch if isinstance(patch, tuple) else (16, 16)
    return channels, [(height, width), (2 * p, 3 * q), (2 * p + 1, 3 * q + 1)]


def find_channels(embed: nn.Module | None) -> int | None:
    """The channels of images: those of the first convolution, which in a hybrid belongs to the backbone; None without one."""
    layers = () if embed is None else embed.modules()
    return next((layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)), None)


def _differ(got: object, want: object, tolerance: float) -> str | None:
    if (
        not isinstance(got, Tensor)
        or not isinstance(want, Tensor)
        or got.shape != want.shape
        or got.dtype != want.dtype
    ):
        return None if type(got) is type(want) and not isinstance(want, Tensor) else "shape or dtype"
    # A model that has diverged or overflows gives NaN and infinity, and so does the same one rebuilt.
    largest = float(want.nan_to_num(0.0, 0.0, 0.0).abs().max())
    if torch.allclose(got, want, rtol=0.0, atol=tolerance * largest, equal_nan=True):
        return None
    return f"{float((got - want).abs().max()):.1e} where the largest is {largest:.1e}"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run `model` in eval mode and without what was put around it: hooks and compilation."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with no_hooks(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
