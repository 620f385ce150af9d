"""λ = 0: the faded attention is deleted in the middle of training, from the network and from what trains it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..dilution import diluted_blocks, finish_dilution, set_lambda
from ..evaluate import input_shape
from ..placement import eval_mode, one_device, one_dtype

# By how much deleting the attention may move a logit, as a share of the largest one. The block computes the same at
# λ = 0 with the attention and without; a fused kernel only adds up in another order.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32_BOUND = 2e-2  # products of float32 that keep ten bits of each factor

# Images that are compared; more would say nothing else.
COMPARED = 16


class BoundaryError(RuntimeError):
    """The network without the faded attention does not compute what it did with it."""


@torch.no_grad()
def remove_faded(model: nn.Module, images: Tensor | None = None) -> tuple[float, float]:
    """Delete the attention of all blocks under dilution, in place, with λ at 0.

    Args:
        model: Has blocks under dilution.
        images: [N, C, H, W] to compare on; None takes seeded noise.

    Returns:
        The largest |difference| of a logit before and after, and what was allowed.

    Raises:
        BoundaryError: More than was allowed, or logits that are not finite.
    """
    device, dtype = one_device(model), one_dtype(model)
    if images is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(COMPARED, *input_shape(model), generator=generator)
    images = images[:COMPARED].to(device, dtype)
    set_lambda(model, 0.0)
    layers = tuple(diluted_blocks(model))
    with eval_mode(model):
        before = model(images)
    finish_dilution(model)
    with eval_mode(model):
        after = model(images)
    difference = float((after - before).abs().max())
    bound = _bound(device, dtype) * (1 + float(before.abs().max()))
    if not difference <= bound:  # NaN too
        raise BoundaryError(
            f"deleting the faded attention of blocks {list(layers)} moved a logit by {difference:.3g}, more than rounding "
            f"explains ({bound:.3g} in {str(dtype).removeprefix('torch.')}): the network would not be what was trained"
        )
    return difference, bound


def _bound(device: torch.device, dtype: torch.dtype) -> float:
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return TF32_BOUND if tf32 else BOUNDS[dtype]


def forget_removed(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Take parameters that are no longer in `model` out of the optimizer, with their state.

    The others keep their group, hence their learning rate and weight decay, and what the optimizer knows of them. A group
    that loses all stays, empty: schedulers count groups.
    """
    alive = {id(parameter) for parameter in model.parameters()}
    # timm's lookahead shares the groups of the optimizer it wraps, which keeps the state of both.
    states = [optimizer.state, getattr(getattr(optimizer, "_base_optimizer", None), "state", {})]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in alive:
                parameter.grad = None
                for state in states:
                    state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in alive]
