"""lambda_vit: the method. Which attention layers a vision transformer can do without, and how to train it off them.

Names are resolved on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .export.write import export_aoti, export_onnx, export_program
    from .measure.frequency import compare_frequencies, feature_frequencies
    from .measure.layer_profile import profile_layers
    from .models.views import skip_attention
    from .selection.measurement import transfer_entropy
    from .selection.result import Selection
    from .selection.search import select_layers
    from .training.dilution import dilute, finish_dilution, set_lambda
    from .training.finetune import finetune
    from .training.plan.planning import plan_training

_PUBLIC = {
    "Selection": "selection.result",
    "compare_frequencies": "measure.frequency",
    "dilute": "training.dilution",
    "export_aoti": "export.write",
    "export_onnx": "export.write",
    "export_program": "export.write",
    "feature_frequencies": "measure.frequency",
    "finetune": "training.finetune",
    "finish_dilution": "training.dilution",
    "plan_training": "training.plan.planning",
    "profile_layers": "measure.layer_profile",
    "select_layers": "selection.search",
    "set_lambda": "training.dilution",
    "skip_attention": "models.views",
    "transfer_entropy": "selection.measurement",
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


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
