"""The files of a saved folder, and the schema of its `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# The weights that an existing config.json belongs to, kept until the new one has replaced it.
PREVIOUS = "model.previous.safetensors"

# A model gets the lowest format that describes it, and FORMAT is the highest that this version reads: an older version that
# ignored a field of a later format would build another model. Fields that only inform (versions, selection) came within
# format 1; folders without them load.
FORMAT_PLAIN, FORMAT_MERGING = 1, 2
FORMAT = FORMAT_MERGING

# The prefix of this library's own model names in timm; see `timm_models`.
PREFIX = "lambda_"
# Their arguments that timm's names do not have, apart from those of token merging.
CONVERSION_ARGS = ("removed", "residual_scale", "fuse", "backend", "recompute")
OWN_ARGS = (*CONVERSION_ARGS, "tome_r", "tome_start")

_Kinds = dict[str, type | tuple[type, ...]]

_TIMM_KINDS: _Kinds = {"architecture": str, "model_args": dict, "pretrained_cfg": dict}

_KINDS: _Kinds = {
    **_TIMM_KINDS,
    "lambda_kernels": dict,
    "lambda_kernels.format": int,
    "lambda_kernels.removed": list,
    "lambda_kernels.residual_scale": (int, float),
    "lambda_kernels.fuse": str,
    "lambda_kernels.sha256": str,
}
# Fields that folders may lack.
_OPTIONAL: _Kinds = {
    "lambda_kernels.versions": dict,
    "lambda_kernels.selection": dict,
    "lambda_kernels.training": dict,
    "lambda_kernels.tome_r": (int, list),
    "lambda_kernels.tome_start": int,
}


def read_json(path: Path) -> Any:
    """The content of a config file.

    Raises:
        CheckpointError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a config written by save_pretrained: {error}") from error


def check_config(config: Any, path: Path) -> None:
    """Refuse a config that `save_pretrained` did not write.

    Raises:
        CheckpointError: A field is missing or has the wrong type, or the format is newer than this version; names it.
    """
    _check_kinds(config, {**_KINDS, **_OPTIONAL}, f"{path} is not a config written by save_pretrained")
    found = config["lambda_kernels"]["format"]
    if found > FORMAT:
        raise CheckpointError(f"{path} has format {found}, this version reads up to {FORMAT}; update lambda-kernels")


def check_timm_config(config: Any, path: Path) -> None:
    """Refuse a config that timm's `save_for_hf` did not write either.

    Raises:
        CheckpointError: A field is missing or has the wrong type; names it.
    """
    wrong = f"{path} is neither a config of save_pretrained (lambda_kernels is None) nor one of timm's save_for_hf"
    _check_kinds({"model_args": {}, **config}, _TIMM_KINDS, wrong)


def _check_kinds(config: Any, kinds: _Kinds, wrong: str) -> None:
    for name, kind in kinds.items():
        value = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{wrong}: {name} is {value!r}")
