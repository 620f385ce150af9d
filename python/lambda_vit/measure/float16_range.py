"""A check whether features fit float16 without attention: residual_scale=2 doubles them in every block that lost it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from lambda_kernels.blocks.attention_free import AttentionFreeBlock
from lambda_kernels.blocks.structure import inspect_model, refuse_merging
from lambda_kernels.convert.checks import check_indices
from lambda_kernels.errors import AlreadyConvertedError, NonFiniteActivationError

from ..data import batches
from ..data.batches import Images
from ..models.properties import eval_mode, one_device, one_dtype
from ..models.views import with_blocks

LIMIT = torch.finfo(torch.float16).max


@torch.inference_mode()
def check_float16(model: nn.Module, images: Images, remove: object = (), *, residual_scale: float = 2.0) -> float:
    """Compare the largest feature between the blocks with the range of float16, before a model is cast to it.

    Args:
        model: A timm vision transformer in float32 or bfloat16, converted or not; it is not changed.
        images: A batch of typical images.
        remove: Blocks whose attention will be removed, or a `Selection`; empty for the model as it is.
        residual_scale: Scale of the residual in those blocks.

    Returns:
        How many times larger features could be: 65504 divided by the largest one.

    Raises:
        ValueError: Features do not fit; the message names the block, the value, and how much removals have scaled it. Or
            indices are wrong.
        AlreadyConvertedError: `remove` is given for a model that has lost attention already.
        NonFiniteActivationError: Features are not finite in the present dtype.
        UnsupportedModelError: The model's blocks are not known; or they merge tokens, and `remove` is given.
    """
    structure = inspect_model(model)
    remove = check_indices(remove, structure.depth)
    if remove and structure.removed:
        raise AlreadyConvertedError(
            f"the model has lost the attention of blocks {list(structure.removed)} already: check it without remove"
        )
    if remove:
        refuse_merging(structure, "checking a removal")
    blocks = [
        AttentionFreeBlock.from_block(block, residual_scale=residual_scale) if index in remove else block
        for index, block in enumerate(model.blocks)
    ]
    largest: list[float] = []

    def record(module: nn.Module, arguments: object, x: Tensor) -> None:
        largest.append(float(x.abs().max()) if x.numel() else 0.0)

    network = with_blocks(model, blocks) if remove else model
    batches.check_images(images, model, "this batch")
    with eval_mode(model, *blocks), contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_hook(record))
        network(batches.to(images, one_device(model), one_dtype(model)))
    for index, value in enumerate(largest):
        if not value <= torch.finfo(torch.float64).max:
            raise NonFiniteActivationError(
                f"block {index} gave NaN or infinity ({one_dtype(model)}): check the weights"
            )
    block = max(range(len(largest)), key=largest.__getitem__)
    if largest[block] > LIMIT:
        scale, removed = (residual_scale, remove) if remove else (structure.residual_scale, structure.removed)
        before = sum(index <= block for index in removed)
        raise ValueError(
            f"features reach {largest[block]:.4g} after block {block}, and float16 ends at {LIMIT:.0f}: {before} removed "
            f"layer(s) with residual_scale={scale:g} have scaled them by {scale**before:g}. Use bfloat16 or float32"
        )
    return LIMIT / largest[block] if largest[block] else float("inf")
