"""Device, dtype, mode, name and input size of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lambda_kernels.ops.checks import as_int, dtype_name


def one_device(model: nn.Module) -> torch.device:
    """The device of all parameters and buffers of `model`; the CPU if it has none. ValueError if there are several."""
    devices: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        listed = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"the model is spread over several devices ({listed}). Move it with model.to(device) first")
    return next(iter(devices), torch.device("cpu"))


def one_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of all floating-point parameters of `model`; float32 if there are none. Only autocast allows several."""
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            dtypes.setdefault(parameter.dtype, name)
    if len(dtypes) > 1 and not torch.is_autocast_enabled(one_device(model).type):
        listed = ", ".join(f"{name} {dtype_name(dtype)}" for dtype, name in dtypes.items())
        raise ValueError(f"the model mixes dtypes ({listed}). Cast it with model.to(dtype), or use autocast")
    return next(iter(dtypes), torch.float32)


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """A context that puts every module into eval mode and restores the mode of each afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        # Module by module: train() would put frozen parts into training mode too.
        for module, training in modes.items():
            module.training = training


def same_model(one: str, other: str | None) -> bool:
    """Whether two names denote one architecture and, if both name weights, the same weights."""
    first, second = one.partition("."), (other or "").partition(".")
    return first[0] == second[0] and (first[2] == second[2] or not (first[2] and second[2]))


def input_shape(model: nn.Module, image_size: int | tuple[int, int, int] | None = None) -> tuple[int, int, int]:
    """The (channels, height, width) of a model's images: the size it was built for, or `image_size`.

    The patch embedding is read first, because timm's `pretrained_cfg` has the published sizes even if the model is built
    with another `img_size` or `in_chans`.

    Raises:
        ValueError: `image_size` is not one or three positive integers, or is None and the model has no size.
    """
    if isinstance(image_size, (tuple, list)):
        if len(image_size) != 3 or any((as_int(n) or 0) < 1 for n in image_size):
            raise ValueError(f"image_size={image_size!r}: expected (channels, height, width), all at least 1")
        channels, height, width = image_size
        return channels, height, width
    if image_size is not None and (as_int(image_size) or 0) < 1:
        raise ValueError(f"image_size={image_size!r}: expected pixels, or (channels, height, width)")
    model = _unwrapped(model)
    published = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else published and published[0]
    sides = (image_size,) * 2 if image_size else getattr(getattr(model, "patch_embed", None), "img_size", None)
    sides = sides or (published and published[1:])
    if not channels or not sides:
        raise ValueError(
            f"{type(model).__name__} does not say its input size: pass image_size=(channels, height, width)"
        )
    return (channels, *sides)


def image_channels(model: nn.Module) -> int | None:
    """The channels of a vision transformer's images; None where its patch embedding does not say."""
    embedding = getattr(_unwrapped(model), "patch_embed", None)
    modules = embedding.modules() if isinstance(embedding, nn.Module) else ()
    return next((module.in_channels for module in modules if isinstance(module, nn.Conv2d)), None)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a compiled, DDP or DataParallel wrapper."""
    for name in ("_orig_mod", "module"):
        if isinstance(getattr(model, name, None), nn.Module):
            return _unwrapped(getattr(model, name))
    return model


def model_name(model: nn.Module) -> str | None:
    """timm's name of a model with the tag of its weights, as far as its config has them."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name, tag = cfg.get("architecture"), cfg.get("tag")
    return f"{name}.{tag}" if name and tag else name


def why_no_classes(model: nn.Module) -> str | None:
    """Why the outputs of `model` predict no class; None if they do, or if it does not say how many it has."""
    outputs = getattr(model, "num_classes", 2)
    if not outputs:
        return "has no classifier (num_classes=0)"
    if outputs == 1:  # its softmax is always 1, and the largest of one number is always that number
        return "has one output (num_classes=1), which predicts no class"
    return None


def get_class_names(model: nn.Module) -> tuple[str | None, ...] | None:
    """The name of each output, as timm's `label_names` in the model's config; None if the model does not have them all."""
    names = (getattr(_unwrapped(model), "pretrained_cfg", None) or {}).get("label_names")
    return tuple(names) if names and len(names) == getattr(model, "num_classes", None) else None


def set_class_names(model: nn.Module, class_to_idx: Mapping[str, int] | None) -> None:
    """Store the name of each output with the model, or remove stored names; without a name for every output nothing changes."""
    cfg = {**(getattr(model, "pretrained_cfg", None) or {})}
    if class_to_idx is None:
        cfg.pop("label_names", None)
    elif sorted(class_to_idx.values()) == list(range(getattr(model, "num_classes", 0))):
        cfg["label_names"] = tuple(sorted(class_to_idx, key=class_to_idx.__getitem__))
    model.pretrained_cfg = cfg  # type: ignore[assignment]  # a record of timm's, which PyTorch does not foresee


def check_classifier(models: Mapping[str, nn.Module]) -> None:
    """Refuse models, by name, without an accuracy: with one output, or no classifier, as DINOv2, DINOv3 and SigLIP in timm."""
    for name, model in models.items():
        if (reason := why_no_classes(model)) is not None:
            raise ValueError(
                f"the {name} {reason}, so that its outputs have no accuracy. Train a classifier for it first: "
                "lambda-vit finetune --full --num-classes N"
            )
