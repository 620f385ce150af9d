"""The settings of a conversion: checked once, handed through it, and recorded on the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..ops.checks import check_choice, require_int
from ..ops.ln_mlp.dispatch import BACKENDS
from ..ops.ln_mlp.function import RECOMPUTE

FUSE = ("all", "removed", "none")


@dataclass(frozen=True, kw_only=True)
class ConversionSettings:
    """What a conversion does besides removing attention. `convert_vit` describes each setting.

    Raises:
        ValueError: A setting has none of its allowed values.
    """

    residual_scale: float = 1.0
    fuse: str = "all"
    backend: str = "auto"
    recompute: str = "auto"
    tome_r: int | tuple[int, ...] = 0
    tome_start: int = 1

    def __post_init__(self) -> None:
        check_choice("fuse", self.fuse, FUSE)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("recompute", self.recompute, RECOMPUTE)
        scale, tome_r = self.residual_scale, self.tome_r
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"residual_scale must be a positive, finite number; got {scale!r}")
        if isinstance(tome_r, Sequence) and not isinstance(tome_r, (str, bytes)):
            tome_r = tuple(require_int(f"tome_r[{i}]", value, 0) for i, value in enumerate(tome_r))
        else:
            tome_r = require_int("tome_r", tome_r, 0, more=" or a sequence of them, one for each block that merges")
        tome_start = require_int("tome_start", self.tome_start, 0)
        vars(self).update(residual_scale=float(scale), tome_r=tome_r, tome_start=tome_start)

    @classmethod
    def resolve(cls, model: nn.Module, *, tome_r: object, tome_start: object, **settings: Any) -> ConversionSettings:
        """The settings of a conversion of `model`, where None for `tome_r` or `tome_start` retains what the model has."""
        info = getattr(model, "lambda_kernels_info", None)
        for name, value in (("tome_r", tome_r), ("tome_start", tome_start)):
            settings[name] = getattr(info, name, getattr(cls, name)) if value is None else value
        return cls(**settings)

    @property
    def block_options(self) -> dict[str, Any]:
        """How a block that keeps its attention runs its MLP half."""
        return {"fuse": self.fuse == "all", "backend": self.backend, "recompute": self.recompute}
