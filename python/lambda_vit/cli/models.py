"""Models as the command line names them: a timm name with weights from a file or the hub, or a saved folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import parse_indices

# Commands import this module to declare their options, which must not wait for `import torch`.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..selection.result import Selection


def open_model(
    name: str,
    *,
    weights: Path | None = None,
    use_ema: bool | None = None,
    pretrained: bool = False,
    device: str = "cpu",
    option: str = "--model",
    removable: bool = True,
) -> nn.Module:
    """Build the model `name` and load its weights, in eval mode on `device`.

    Args:
        name: A timm model name, also one of `lambda_kernels.timm_models`, or a folder written by `save_pretrained` or by
            timm's `save_for_hf` (which brings its own weights).
        weights: A state dict in .safetensors or .pth; cast to float32.
        use_ema: Which copy to use of a file with the trained weights and their average; as for `read_weights`.
        pretrained: Download timm's weights from the hub, or use its cache.
        device: Device of the model.
        option: The option that gives `name`, for messages.
        removable: Refuse models whose attention layers cannot be removed.

    Raises:
        ValueError: Neither or both sources of weights, or an unknown name; the message suggests similar names.
        UnsupportedModelError: The model's attention layers cannot be removed, and `removable`.
        CheckpointError: The weights do not fit.
        RuntimeError: The hub cannot be reached.
    """
    from ..runtime.progress import task

    with task(f"Load {name}", 1) as advance:
        model = _open_model(name, weights, use_ema, pretrained, device, option, removable)
        advance()
    return model


def _open_model(
    name: str, weights: Path | None, use_ema: bool | None, pretrained: bool, device: str, option: str, removable: bool
) -> nn.Module:
    import timm

    from lambda_kernels.blocks.structure import inspect_model
    from lambda_kernels.checkpoints.folder import CONFIG, PREFIX
    from lambda_kernels.checkpoints.pretrained import from_pretrained
    from lambda_kernels.checkpoints.weights import find_blocks_without_attention, load_state_dict, read_weights

    prefix = "--" if option == "--model" else f"{option}-"
    if use_ema is not None and weights is None:
        raise ValueError(
            f"--use-ema and --no-ema choose a copy in the file of {prefix}weights, which is missing; omit them"
        )
    if Path(name).is_dir():
        if weights is not None or pretrained:
            raise ValueError(
                f"{option} {name} is a folder with its own weights; omit {prefix}weights and {prefix}pretrained"
            )
        return from_pretrained(name, device=check_device(device))
    ours = name.startswith(PREFIX)
    if ours:
        import lambda_kernels.timm_models  # noqa: F401 (registers them)
    if not timm.is_model(name):
        close = _close_names(name, timm.list_models())
        hint = f"Did you mean {', '.join(close)}?" if close else "See timm.list_models()"
        raise ValueError(f"{option} {name!r} is neither a folder with a {CONFIG} nor a timm model. {hint}")
    if (weights is None) != pretrained:
        what = "got both" if pretrained else "random weights do not show which attention layers matter"
        raise ValueError(f"{option} {name} requires either {prefix}weights FILE or {prefix}pretrained: {what}")
    if ours and pretrained:
        raise ValueError(
            f"{option} {name}: there are no pretrained weights without attention. Pass {prefix}weights FILE, or the full "
            f"model {name.removeprefix(PREFIX)} with {prefix}pretrained"
        )
    place = check_device(device)
    if pretrained:
        if removable:
            inspect_model(timm.create_model(name, pretrained=False))  # refused before anything is downloaded
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub client, urllib and timm each raise their own
            raise RuntimeError(
                f"timm could not download the pretrained weights of {name} ({type(error).__name__}: {error}). Without a "
                f"network, download them elsewhere and pass {prefix}weights FILE"
            ) from error
    else:
        state = read_weights(weights, use_ema=use_ema)
        args: dict[str, Any] = {"num_classes": state["head.weight"].shape[0]} if "head.weight" in state else {}
        if ours and (removed := find_blocks_without_attention(state)):  # if none is missing, the default stands
            args["removed"] = removed
        model = timm.create_model(name, pretrained=False, **args)
        if removable:
            inspect_model(model)
        load_state_dict(model, state, source=str(weights))
        if "." not in name:
            # timm fills in the tag of its default weights, but these weights are others.
            model.pretrained_cfg = {**model.pretrained_cfg, "tag": ""}
    return model.to(place).eval()


def _close_names(name: str, names: list[str]) -> list[str]:
    # People shorten names at the end, so each is compared over the length that was typed.
    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name, other[: len(name)]).ratio()

    likely = [other for other in names if likeness(other) > 0.8]
    return sorted(likely, key=lambda other: (-likeness(other), len(other)))[:3]


def check_device(device: str) -> torch.device:
    """Return the device that `device` names; "auto" is the first accelerator, otherwise the CPU."""
    import torch

    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError, by device
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"--device {device} cannot be used here ({error}). Available: {', '.join(available)}"
        ) from error
    return torch.device(device)


def make_weights_options(prefix: str, weights: Path | None, use_ema: bool | None, pretrained: bool) -> list[object]:
    if weights is not None:
        copy = [] if use_ema is None else ["--use-ema" if use_ema else "--no-ema"]
        return [f"{prefix}weights", weights, *copy]
    return [f"{prefix}pretrained"] if pretrained else []


def read_layers(selection: Path | None, remove: str) -> Selection | tuple[int, ...]:
    """Return the layers that --selection FILE or --remove INDICES names: a `Selection`, or unchecked indices."""
    from ..selection.result import Selection

    if (selection is None) == (not remove):
        raise ValueError("pass either --selection FILE or --remove 1,5,4,11")
    if selection is None:
        return parse_indices(remove, "--remove")
    return Selection.from_json(selection / "selection.json" if selection.is_dir() else selection)


def check_made_for(chosen: Selection, path: Path, network: nn.Module, model: str) -> None:
    """Refuse the selection in `path` if it was made for another model than `network`, which --model calls `model`."""
    from lambda_kernels.blocks.structure import inspect_model

    from ..models.properties import model_name, same_model

    depth = inspect_model(network).depth
    if chosen.depth not in (None, depth):
        raise ValueError(f"{path} was made for a model of {chosen.depth} blocks, {model} has {depth}")
    name = model_name(network)
    if chosen.model is not None and not same_model(chosen.model, name):
        raise ValueError(f"{path} was made for {chosen.model}, not for {name}; select on this model")
