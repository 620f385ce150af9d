"""lambda_kernels: vision transformers without the attention layers they do not need.

Importing this package touches no device, loads no extension and does not import timm; each public name is resolved on
first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .blocks.attention_free import AttentionFreeBlock
    from .blocks.fused_mlp import FusedMlp
    from .checkpoints.pretrained import from_pretrained, save_pretrained
    from .convert.conversion import convert_vit
    from .entropy.meter import EntropyMeter, gaussian_entropy, histogram_entropy
    from .errors import (
        AlreadyConvertedError,
        BackendUnavailableError,
        CheckpointError,
        ExtensionUnavailableError,
        NonFiniteActivationError,
        UnsupportedModelError,
    )
    from .ops.ln_mlp.function import ln_mlp

# public name → the module that defines it; resolved by __getattr__ on first use
_PUBLIC = {
    "AlreadyConvertedError": "errors",
    "AttentionFreeBlock": "blocks.attention_free",
    "BackendUnavailableError": "errors",
    "CheckpointError": "errors",
    "EntropyMeter": "entropy.meter",
    "ExtensionUnavailableError": "errors",
    "FusedMlp": "blocks.fused_mlp",
    "NonFiniteActivationError": "errors",
    "UnsupportedModelError": "errors",
    "convert_vit": "convert.conversion",
    "from_pretrained": "checkpoints.pretrained",
    "gaussian_entropy": "entropy.meter",
    "histogram_entropy": "entropy.meter",
    "ln_mlp": "ops.ln_mlp.function",
    "save_pretrained": "checkpoints.pretrained",
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


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
