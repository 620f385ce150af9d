"""Where a model is, in which precision, and in which mode: checked before work starts, put back after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def one_device(model: nn.Module) -> torch.device:
    """The device that all parameters and buffers of `model` are on; the CPU where there are none.

    Raises:
        ValueError: They are spread over several; each is listed with a tensor that lives there.
    """
    devices: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        listed = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"the model is spread over several devices ({listed}). Move it with model.to(device) first")
    return next(iter(devices), torch.device("cpu"))


def one_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point dtype of all parameters of `model`; float32 where there are none.

    Raises:
        ValueError: There are several, and no autocast that would bring them together; each is listed.
    """
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            dtypes.setdefault(parameter.dtype, name)
    if len(dtypes) > 1 and not torch.is_autocast_enabled(one_device(model).type):
        listed = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for dtype, name in dtypes.items())
        raise ValueError(f"the model mixes dtypes ({listed}). Cast it with model.to(dtype), or use autocast")
    return next(iter(dtypes), torch.float32)


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and back into the mode that each had."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        # One by one: train() would put frozen parts into training mode too.
        for module, training in modes.items():
            module.training = training
