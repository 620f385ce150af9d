"""Saving and loading: `config.json` describes the model and what was removed, `model.safetensors` holds the weights.

Both are strict: a model that its config cannot rebuild is refused at saving, not at loading.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..blocks.structure import inspect_model
from ..convert.conversion import remove_attention
from ..convert.settings import ConversionSettings
from ..errors import CheckpointError
from ..files import atomic_write, remove_leftovers, sha256, write_json
from .comparison import find_difference, find_output_difference
from .folder import CONFIG, FORMAT_MERGING, FORMAT_PLAIN, PREFIX, PREVIOUS, WEIGHTS, check_config, read_json
from .rebuilding import build, fill, find_model_args, get_removal_args, is_json
from .weights import align, read_weights


@dataclass(frozen=True)
class Provenance:
    """The origin of a saved model; a loaded model has it as `lambda_kernels_provenance`.

    Attributes:
        architecture: timm's name of the model that attention was removed from.
        versions: Versions of "torch", "timm" and "lambda_kernels" at saving; empty if the folder does not record them.
        selection: How the removed layers were chosen, with all scores, as from `Selection.to_dict`; None if unknown.
        training: How the attention was removed and the weights were trained; None if unknown.
    """

    architecture: str
    versions: dict[str, str] = field(default_factory=dict)
    selection: dict[str, Any] | None = None
    training: dict[str, Any] | None = None


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    selection: object = None,
    training: dict[str, Any] | None = None,
) -> Path:
    """Write `folder/config.json` and `folder/model.safetensors`.

    They replace earlier files so that `from_pretrained` finds the old or the new model even if this is killed at any time.

    Args:
        model: A timm vision transformer, converted or not.
        folder: Created if needed.
        architecture: timm's name of the model; None reads it from the model.
        model_args: Arguments for `timm.create_model` that the model does not show. timm 1.0.31 records those that it was
            built with; sizes, classes, pooling, rates and most options of rotary embeddings are also read from its modules.
        selection: How the removed layers were chosen: a `Selection`, or a dict from its `to_dict`. The config stores it
            with all its scores. None retains the one that the model was loaded with.
        training: How the attention was removed and the weights were trained, as plain JSON types: "removal", "layers" and more
            from `lambda-vit finetune`. The config stores it. None retains the one that the model was loaded with.

    Returns:
        The folder.

    Raises:
        CheckpointError: timm would build another model from the config, or one with other outputs; the message names the
            first difference. Or `selection` and the model differ in the removed layers.
        UnsupportedModelError: The model is wrapped, of an unknown kind, or its attention is still being diluted.
        OSError: The disk has too little space; nothing was written.
    """
    folder = Path(folder)
    structure = inspect_model(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    architecture = (architecture or cfg.get("architecture") or "").removeprefix(PREFIX)
    if not architecture:
        raise CheckpointError(
            f"{type(model).__name__} does not name its timm architecture. Build it with timm.create_model, or pass "
            "architecture='…' (and model_args)"
        )
    odd = [f"{name}={value!r}" for name, value in (model_args or {}).items() if not is_json(value)]
    if odd:
        raise CheckpointError(
            f"model_args has {', '.join(odd)}, which config.json cannot hold; pass JSON types (a layer by name)"
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise CheckpointError("the model has no weights to save: some are on the meta device. Load them first")
    cfg = {key: value for key, value in cfg.items() if is_json(value)}
    if "architecture" in cfg:
        cfg["architecture"] = cfg["architecture"].removeprefix(PREFIX)
    chosen = _selection_record(model, selection, structure.removed)
    trained = _training_record(model, training, structure.removed)
    model_args = find_model_args(model, architecture, cfg, dict(model_args or {}))
    info: Any = getattr(model, "lambda_kernels_info", None)
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "model_args": model_args,
        "pretrained_cfg": cfg,
        "lambda_kernels": {
            "format": FORMAT_MERGING if structure.merging else FORMAT_PLAIN,
            "version": __version__,
            **get_removal_args(model),
            # "removed" changes nothing in a model that was never converted
            "fuse": info.fuse if info else "removed",
            "versions": _versions(),
            "selection": chosen,
            **({} if trained is None else {"training": trained}),
        },
    }
    _check_rebuilding(model, config)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    _check_room(folder, state)

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        remove_leftovers(folder / name)
    try:
        with atomic_write(folder / WEIGHTS) as weights:
            # safetensors (seen in 0.8) makes its files readable by their owner only; these follow the user's umask.
            weights.touch()
            mode = stat.S_IMODE(weights.stat().st_mode)
            save_file(state, weights, metadata={"format": "pt"})
            weights.chmod(mode)
            config["lambda_kernels"]["sha256"] = sha256(weights)
            if _weights_of(folder) == folder / WEIGHTS:
                with atomic_write(folder / PREVIOUS) as kept:
                    _link_or_copy(folder / WEIGHTS, kept)
    except SafetensorError as error:
        raise OSError(f"writing {folder / WEIGHTS} failed ({error}); the earlier model there is unchanged") from error
    write_json(folder / CONFIG, config)
    (folder / PREVIOUS).unlink(missing_ok=True)
    return folder


def _check_rebuilding(model: nn.Module, config: dict[str, Any]) -> None:
    """Refuse a model if `from_pretrained` would build another one from this config.

    Raises:
        CheckpointError: The modules, their settings or their outputs differ; the message names the first difference.
    """
    # As from_pretrained will read it.
    rebuilt = build(json.loads(json.dumps(config)))
    difference = find_difference(rebuilt, model)
    if difference is None:
        fill(rebuilt, model.state_dict())
        difference = find_output_difference(rebuilt, model)
    if difference:
        raise CheckpointError(
            f"timm.create_model({config['architecture']!r}, **{config['model_args']}) would not rebuild this model: "
            f"{difference}. Pass the arguments that it was built with as model_args={{…}}; changes that no argument makes "
            "cannot be saved"
        )


def _versions() -> dict[str, str]:
    import timm

    return {"torch": str(torch.__version__), "timm": timm.__version__, "lambda_kernels": __version__}


def _selection_record(model: nn.Module, selection: object, removed: tuple[int, ...]) -> dict[str, Any] | None:
    """`selection` as plain JSON types; None if there is none."""
    if selection is None:
        known = getattr(getattr(model, "lambda_kernels_provenance", None), "selection", None)
        return known if known is not None and sorted(known["layers"]) == list(removed) else None
    record: Any = selection.to_dict() if hasattr(selection, "to_dict") else selection
    layers = record.get("layers") if isinstance(record, dict) else None
    if not isinstance(layers, list) or not is_json(record):
        raise CheckpointError(
            f"selection must be a Selection, or a dict from its to_dict(); got {type(selection).__name__}"
        )
    if sorted(layers) != list(removed):
        raise CheckpointError(
            f"selection is of blocks {sorted(layers)}, but the model has lost those of {list(removed)}"
        )
    return record


def _training_record(model: nn.Module, training: object, removed: tuple[int, ...]) -> dict[str, Any] | None:
    """`training` as it was passed, or else as the model was loaded with it, if no other layers are gone by now."""
    if training is None:
        known = getattr(getattr(model, "lambda_kernels_provenance", None), "training", None)
        return known if known is not None and sorted(known.get("layers") or removed) == list(removed) else None
    if not isinstance(training, dict) or not is_json(training):
        raise CheckpointError(f"training must be a dict of plain JSON types; got {training!r}")
    layers = training.get("layers", list(removed))
    if not isinstance(layers, list) or sorted(layers) != list(removed):
        raise CheckpointError(
            f"training has layers {layers!r}, but the model has lost the attention of {list(removed)}"
        )
    return training


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _weights_of(folder: Path) -> Path | None:
    """The file of weights that belongs to `folder/config.json`; None if there is none."""
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

    A folder that timm's `save_for_hf` wrote is read too, if its architecture is plain or one of `timm_models`.

    Args:
        folder: The folder that `save_pretrained` wrote.
        device: The device of the model.
        fuse: As for `convert_vit`; None uses the saved one.
        backend: As for `convert_vit`.
        recompute: As for `convert_vit`; it is not saved, since it belongs to the training, not to the model.

    Returns:
        The model, with `lambda_kernels_info` and `lambda_kernels_provenance` (a `Provenance`).

    Raises:
        CheckpointError: A file is missing or damaged, or weights and config do not belong together.
        BackendUnavailableError: `backend="triton"` or `"onednn"` cannot run on `device`, or "onednn" in no block.
    """
    running: dict[str, Any] = {"backend": backend, "recompute": recompute, **({} if fuse is None else {"fuse": fuse})}
    ConversionSettings(**running)  # raises before anything is read
    folder = Path(folder)
    config, weights = _read_folder(folder)
    ours = config["lambda_kernels"]
    try:
        model = build(config)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model that can be built: {error}") from error
    state = align(read_weights(weights))  # at once, so that the mapped file is closed
    try:
        fill(model, state, weights.name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder / CONFIG} describes another model than {weights.name} holds; one of them may have been changed: {error}"
        ) from error
    model = model.to(device).eval()
    info = model.lambda_kernels_info
    # Only on its final device does it show whether a backend is available, and which one runs.
    model = remove_attention(model, info.removed, replace(info.settings, **running))
    model.lambda_kernels_provenance = Provenance(  # type: ignore[assignment]  # a record, which PyTorch does not foresee
        config["architecture"], ours.get("versions") or {}, ours.get("selection"), ours.get("training")
    )
    return model


def _read_folder(folder: Path) -> tuple[dict[str, Any], Path]:
    """The checked config in `folder`, and the file of weights that belongs to it."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; expected a folder written by save_pretrained")
    config = read_json(folder / CONFIG)
    if isinstance(config, dict) and "lambda_kernels" not in config:
        from .hub_folder import read_hub_folder

        return read_hub_folder(config, folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; expected a folder written by save_pretrained")
    check_config(config, folder / CONFIG)
    weights = _weights_of(folder)
    if weights is None:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not belong to {CONFIG}: a file was damaged or replaced. Save the model again"
        )
    if weights.name == PREVIOUS:
        warnings.warn(f"the last save to {folder} was interrupted; loading the model saved before it", stacklevel=3)
    return config, weights


def _check_room(folder: Path, state: dict[str, Tensor]) -> None:
    needed = sum(v.numel() * v.element_size() for v in state.values()) + (1 << 20)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(f"saving to {folder} needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free")
