"""The files of a saved folder, and the schema of its `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

CONFIG, WEIGHTS = "config.json", "model.safetensors"

# The weights that an existing config.json belongs to, kept until the new one has replaced it.
PREVIOUS = "model.previous.safetensors"

# The newest that is read. A model gets the lowest that builds it: a reader that passed over a field of a higher one would
# build another model. Fields that only tell more (versions, selection) came within format 1; folders without them load.
_PLAIN, _MERGING = 1, 2

FORMAT = _MERGING


# Names that start so are this library's own entry points in timm; see `timm_models`.
PREFIX = "lambda_"


_KINDS: dict[str, type | tuple[type, ...]] = {
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

# Newer than the first folders of format 1.
_OPTIONAL: dict[str, type | tuple[type, ...]] = {"lambda_kernels.versions": dict, "lambda_kernels.selection": dict}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a config written by save_pretrained: {error}") from error


def _check_config(config: Any, path: Path) -> None:
    for name, kind in {**_KINDS, **_OPTIONAL}.items():
        value = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{path} is not a config written by save_pretrained: {name} is {value!r}")
    found = config["lambda_kernels"]["format"]
    if found > FORMAT:
        raise CheckpointError(f"{path} has format {found}, this version reads up to {FORMAT}; update lambda-kernels")
