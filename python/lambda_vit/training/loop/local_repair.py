"""The repair of single blocks: each block without attention learns, alone, what the teacher's block computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RemovedBlocks(nn.Module):
    """Blocks of a network side by side: gives each its own tokens [N, T, C], and returns their outputs."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(model.blocks[layer] for layer in layers)

    def forward(self, tokens: list[Tensor]) -> list[Tensor]:
        return [block(x) for block, x in zip(self.blocks, tokens, strict=True)]


class LocalRepair:
    """The loss of blocks without attention against the teacher's blocks, each on the input of the teacher's block.

    For outputs o it is MSE(o, o_teacher) / MSE(o_teacher, 0), averaged over the blocks: one forward of the teacher and a short
    backward per block repair all blocks at once (as in NVIDIA's Puzzle, arXiv 2411.19146).

    Args:
        model: The network that is trained, without the attention of `layers`.
        teacher: Its like with that attention, in eval mode.
        layers: Block indices.

    Attributes:
        blocks: The blocks that learn.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, layers: Sequence[int]) -> None:
        self.blocks = RemovedBlocks(model, layers)
        if not any(parameter.requires_grad for parameter in self.blocks.parameters()):
            raise ValueError(
                "local_epochs repairs the blocks without attention, and all of these are frozen: omit some from freeze, or set "
                "local_epochs to 0"
            )
        if poor := [layer for layer in layers if not hasattr(teacher.blocks[layer], "attn")]:
            raise ValueError(
                f"the teacher has no attention in blocks {poor} either, so local_epochs has nothing to repair them by: use a "
                "teacher with that attention, or set local_epochs to 0"
            )
        self._teacher, self._layers = teacher, layers

    def __call__(self, network: nn.Module, images: Tensor) -> Tensor:
        """The loss of `blocks`, or of a wrapper of them, on images [N, C, H, W] as the teacher expects them."""
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def capture(layer: int) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                found[layer] = inputs[0], output

            return hook

        handles = [self._teacher.blocks[layer].register_forward_hook(capture(layer)) for layer in self._layers]
        try:
            with torch.no_grad():
                self._teacher(images)
        finally:
            for handle in handles:
                handle.remove()
        outputs = network([found[layer][0] for layer in self._layers])
        distances = []
        for layer, own in zip(self._layers, outputs, strict=True):
            wanted = found[layer][1].float()
            distances.append(F.mse_loss(own.float(), wanted) / wanted.square().mean())
        return torch.stack(distances).mean()
