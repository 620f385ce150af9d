"""Folders in timm's own layout, as `timm.models.save_for_hf` and `push_to_hf_hub` write them."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .folder import CONFIG, CONVERSION_ARGS, PREFIX, WEIGHTS, check_timm_config
from .weights import find_blocks_without_attention, read_weights

# In timm's order of preference.
_FILES = (WEIGHTS, "pytorch_model.bin")


def read_hub_folder(config: dict, folder: Path) -> tuple[dict, Path]:
    """The config that `save_pretrained` would have written for the model in `folder`, and the file of its weights.

    Args:
        config: The content of config.json.
        folder: The folder of config.json.

    Raises:
        CheckpointError: timm did not write the folder, it has no weights, or it does not say what was removed and how.
    """
    path = folder / CONFIG
    check_timm_config(config, path)
    weights = next((folder / file for file in _FILES if (folder / file).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} has neither {' nor '.join(_FILES)}")
    name, args = config["architecture"], dict(config.get("model_args", {}))
    ours = {key: args.pop(key, None) for key in CONVERSION_ARGS}
    merging = {}
    if name.startswith(PREFIX):
        merging = {key: args.pop(key) for key in ("tome_r", "tome_start") if args.get(key) is not None}
    else:
        ours |= {"removed": [], "residual_scale": 1.0}
        _refuse_converted(path, name, weights)
    if not isinstance(ours["removed"], list) or not isinstance(ours["residual_scale"], (int, float)):
        raise CheckpointError(
            f"{path} does not say what was removed: model_args has removed={ours['removed']!r}, residual_scale="
            f"{ours['residual_scale']!r}. Save it with model_args=lambda_kernels.timm_models.model_args(model)"
        )
    if isinstance(config.get("num_classes"), int):
        args.setdefault("num_classes", config["num_classes"])
    name = name.removeprefix(PREFIX)
    found = {**ours, **merging, "fuse": ours["fuse"] or "all"}
    return {
        "architecture": name,
        "model_args": args,
        "pretrained_cfg": {**config["pretrained_cfg"], "architecture": name},
        "lambda_kernels": found,
    }, weights


def _refuse_converted(path: Path, name: str, weights: Path) -> None:
    gone = find_blocks_without_attention(read_weights(weights))
    if gone:
        raise CheckpointError(
            f"{path}: lambda_kernels is None, so this is read as timm's folder of a {name} with all its attention; but "
            f"{weights.name} has none for blocks {gone}. Build the model by its name in timm, {PREFIX}{name.partition('.')[0]} "
            f"with removed={gone} and the residual_scale of its training, and load {weights.name} into it"
        )
