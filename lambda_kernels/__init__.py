"""lambda_kernels: vision transformers without the attention layers they do not need.

Importing this package touches no device, loads no extension and does not import timm; each public name is resolved on
first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name → the module that defines it; resolved by __getattr__ on first use
_PUBLIC = {
    "AlreadyConvertedError": "errors",
    "AttentionFreeBlock": "blocks",
    "BackendUnavailableError": "errors",
    "CheckpointError": "errors",
    "EntropyMeter": "entropy",
    "ExtensionUnavailableError": "errors",
    "FusedMlp": "blocks",
    "NonFiniteActivationError": "errors",
    "UnsupportedModelError": "errors",
    "convert_vit": "convert",
    "from_pretrained": "checkpoint",
    "gaussian_entropy": "entropy",
    "histogram_entropy": "entropy",
    "ln_mlp": "ops.ln_mlp",
    "save_pretrained": "checkpoint",
}

__all__ = [
    "AlreadyConvertedError",
    "AttentionFreeBlock",
    "BackendUnavailableError",
    "CheckpointError",
    "EntropyMeter",
    "ExtensionUnavailableError",
    "FusedMlp",
    "NonFiniteActivationError",
    "UnsupportedModelError",
    "__version__",
    "convert_vit",
    "from_pretrained",
    "gaussian_entropy",
    "histogram_entropy",
    "ln_mlp",
    "save_pretrained",
]

if TYPE_CHECKING:
    from .blocks import AttentionFreeBlock, FusedMlp
    from .checkpoint import from_pretrained, save_pretrained
    from .convert import convert_vit
    from .entropy import EntropyMeter, gaussian_entropy, histogram_entropy
    from .errors import (
        AlreadyConvertedError,
        BackendUnavailableError,
        CheckpointError,
        ExtensionUnavailableError,
        NonFiniteActivationError,
        UnsupportedModelError,
    )
    from .ops.ln_mlp import ln_mlp


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
