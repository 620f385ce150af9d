"""lambda_vit: the method. Which attention layers a vision transformer can do without, and how to train it off them.

Names are resolved on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_PUBLIC = {
    "Selection": "selection",
    "compare_frequencies": "frequency",
    "dilute": "dilution",
    "export_aoti": "export",
    "export_onnx": "export",
    "export_program": "export",
    "feature_frequencies": "frequency",
    "finetune": "finetuning",
    "finish_dilution": "dilution",
    "plan_training": "planning",
    "profile_layers": "layer_profile",
    "select_layers": "selection",
    "set_lambda": "dilution",
    "skip_attention": "transfer",
    "transfer_entropy": "transfer",
}

__all__ = [
    "Selection",
    "compare_frequencies",
    "dilute",
    "export_aoti",
    "export_onnx",
    "export_program",
    "feature_frequencies",
    "finetune",
    "finish_dilution",
    "plan_training",
    "profile_layers",
    "select_layers",
    "set_lambda",
    "skip_attention",
    "transfer_entropy",
]

if TYPE_CHECKING:
    from .dilution import dilute, finish_dilution, set_lambda
    from .export import export_aoti, export_onnx, export_program
    from .finetuning import finetune
    from .frequency import compare_frequencies, feature_frequencies
    from .layer_profile import profile_layers
    from .planning import plan_training
    from .selection import Selection, select_layers
    from .transfer import skip_attention, transfer_entropy


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
