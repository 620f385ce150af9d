"""Models as the command line names them: a timm name with weights from a file or the hub, or a saved folder."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lambda_kernels.checkpoint import CONFIG, PREFIX, from_pretrained
from lambda_kernels.families import inspect_model
from lambda_kernels.weights import blocks_with_attention, load_state_dict, read_weights

from .progress import task


def open_model(
    name: str,
    *,
    weights: Path | None = None,
    pretrained: bool = False,
    device: str = "cpu",
    backend: str = "auto",
    option: str = "--model",
) -> nn.Module:
    """Build the model `name` and load its weights; in eval mode, on `device`.

    Args:
        name: A timm model name, also one of `lambda_kernels.timm_models`, or a folder written by `save_pretrained` or by
            timm's `save_for_hf` (which brings its own weights).
        weights: A state dict in .safetensors or .pth; cast to float32.
        pretrained: Take timm's own weights from the hub (or its cache).
        device: Where the model goes.
        backend: For a saved folder whose attention was removed.
        option: How the caller calls `name`, for messages.

    Raises:
        ValueError: Neither or both sources of weights, or an unknown name; close ones are suggested.
        UnsupportedModelError: The model's attention layers cannot be removed.
        CheckpointError: The weights do not fit.
        RuntimeError: The hub cannot be reached.
    """
    with task(f"Load {name}", 1) as advance:
        model = _open_model(name, weights, pretrained, device, backend, option)
        advance()
    return model


def _open_model(name: str, weights: Path | None, pretrained: bool, device: str, backend: str, option: str) -> nn.Module:
    import timm

    prefix = "--" if option == "--model" else f"{option}-"
    if Path(name).is_dir():
        if weights is not None or pretrained:
            raise ValueError(
                f"{option} {name} is a folder with weights of its own; leave {prefix}weights/pretrained out"
            )
        return from_pretrained(name, device=check_device(device), backend=backend)
    ours = name.startswith(PREFIX)
    if ours:
        import lambda_kernels.timm_models  # noqa: F401 (registers them)
    if not timm.is_model(name):
        close = _close_names(name, timm.list_models())
        hint = f"Did you mean {', '.join(close)}?" if close else "See timm.list_models()"
        raise ValueError(f"{option} {name!r} is neither a folder with a {CONFIG} nor a timm model. {hint}")
    if (weights is None) != pretrained:
        what = "both were given" if pretrained else "random weights say nothing about attention"
        raise ValueError(f"{option} {name} needs either {prefix}weights FILE or {prefix}pretrained: {what}")
    if ours and pretrained:
        raise ValueError(
            f"{option} {name}: there are no pretrained weights without attention. Pass {prefix}weights FILE, or the full "
            f"model {name.removeprefix(PREFIX)} with {prefix}pretrained"
        )
    place = check_device(device)
    if pretrained:
        inspect_model(timm.create_model(name, pretrained=False))  # refused before anything is downloaded
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub client, urllib and timm each raise their own
            raise RuntimeError(
                f"timm could not get the pretrained weights of {name} ({type(error).__name__}: {error}). With no network, "
                f"download them elsewhere and pass {prefix}weights FILE"
            ) from error
    else:
        state = read_weights(weights)
        args: dict[str, Any] = {"num_classes": state["head.weight"].shape[0]} if "head.weight" in state else {}
        if ours:
            args |= _removed_from(state)
        model = timm.create_model(name, pretrained=False, **args)
        inspect_model(model)
        load_state_dict(model, state, source=str(weights))
        if "." not in name:
            # timm fills in the tag of its own default weights, which these are not.
            model.pretrained_cfg = {**model.pretrained_cfg, "tag": ""}
    return model.to(place).eval()


def _removed_from(state: dict[str, Tensor]) -> dict[str, list[int]]:
    """`removed` for a model that these weights fit; nothing where they have all attention, so that a default stands."""
    blocks = {int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)}
    removed = sorted(blocks - blocks_with_attention(state))
    return {"removed": removed} if removed else {}


def _close_names(name: str, names: list[str]) -> list[str]:
    # People shorten names at the end, so each is compared over the length that was typed.
    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name, other[: len(name)]).ratio()

    likely = [other for other in names if likeness(other) > 0.8]
    return sorted(likely, key=lambda other: (-likeness(other), len(other)))[:3]


def check_device(device: str) -> torch.device:
    """The device `device` means; "auto" is the first accelerator, else the CPU.

    Raises:
        ValueError: No such device here; lists what there is.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError, by device
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"--device {device} cannot be used here ({error}). There is: {', '.join(there)}") from error
    return torch.device(device)
