"""What timm's `Block` does after its attention, and rivals made of it by `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lambda_kernels.ops.ln_mlp.dispatch import onednn_obstacles

WIDTHS = {"T": 192, "S": 384, "B": 768}
MODES = {"torch.compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class TimmHalf(nn.Module):
    """The second half of a timm `Block`, whose modules it shares."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def cpu_backends(dtype: torch.dtype, missing: dict[str, str]) -> tuple[str, ...]:
    """Ours by name, for inference on a CPU; the reason for which one cannot run goes into `missing`."""
    obstacles = onednn_obstacles(torch.device("cpu"), dtype)
    if obstacles:
        missing["onednn"] = "; ".join(obstacles)
    return ("torch",) if obstacles else ("torch", "onednn")


def compiled(
    name: str,
    mode: str,
    module: nn.Module,
    version: Callable[[Callable], Callable],
    missing: dict[str, str],
    *arguments: object,
) -> dict[str, Callable]:
    """`version` of the compiled module under its name; nothing, and the reason in `missing`, where it cannot be compiled.

    Args:
        name: Of the rival.
        mode: Of `torch.compile`.
        module: To compile, for one size alone.
        version: Makes what is timed out of something to call instead of the module.
        missing: Gets the reason.
        arguments: For a first call of what is timed, in which it is compiled.
    """
    found = version(torch.compile(module, mode=mode, dynamic=False, fullgraph=True))
    try:
        found(*arguments)
    except Exception as error:  # the other rivals are still worth their row
        missing[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return {}
    return {name: found}
