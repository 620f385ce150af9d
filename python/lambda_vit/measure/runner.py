"""A model with the device and dtype of its inputs, as every measurement runs it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lambda_kernels.errors import NonFiniteActivationError

from ..data.batches import Images, random_images, to
from ..models.properties import one_device


@dataclasses.dataclass(frozen=True)
class Figures:
    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)


class ModelRunner:
    """A model with the device and dtype that its inputs need; `device` is used if it has no parameters or buffers."""

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        self.model = model
        self.device = one_device(model) if tensors_of(model) else resolve_device(device or "cpu")
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        # A model of mixed dtypes casts for itself (autocast, or a cast inside): its images stay float32.
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def images(self, count: int, shape: tuple[int, int, int]) -> Tensor:
        return random_images((count, *shape), self.device, self.dtype)

    @torch.inference_mode()
    def logits(self, images: Images, where: str) -> Tensor:
        """Compute logits [N, classes] in float64 on the CPU, and check them; the copy also waits for the device."""
        output = self.model(to(images, self.device, self.dtype))
        if isinstance(output, (tuple, list)):
            if self.model.training:
                raise ValueError(
                    f"{type(self.model).__name__} gives {len(output)} outputs and ignores eval(): fix its mode"
                )
            output = torch.stack(tuple(output)).mean(0)
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] == 1:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{type(self.model).__name__} must give logits [N, classes] of two or more classes, got {got}"
            )
        output = output.cpu().double()
        if not output.isfinite().all():
            raise NonFiniteActivationError(
                f"logits of {where} of {type(self.model).__name__} hold NaN or infinity (dtype {self.dtype}): "
                "check the weights, or evaluate in float32 or bfloat16"
            )
        return output


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def resolve_device(device: torch.device | str) -> torch.device:
    """Return the device with its index, as tensors report it."""
    return torch.empty(0, device=device).device
