"""Removal while training: fade selected attention layers out, together or one after another, then delete them.

With λ going from 1 to 0 a block under dilution computes, for a final residual scale s,

    x ← (s + (1 − s)·λ)·x + λ·drop_path1(ls1(attn(norm1(x))))
    x ← x + drop_path2(ls2(mlp(norm2(x))))

With s = 2, as attention fades its identity twin takes its place (arXiv 2404.05657, eq. 5–6); with s = 1, attention only fades.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lambda_kernels.blocks.attention_free import AttentionFreeBlock
from lambda_kernels.blocks.mlp_block import MlpBlockBase, find_family
from lambda_kernels.blocks.structure import inspect_model, refuse_merging
from lambda_kernels.convert.checks import check_indices, check_removal, unwrap_layers
from lambda_kernels.convert.conversion import convert_vit, remove_attention
from lambda_kernels.convert.settings import ConversionSettings
from lambda_kernels.ops.checks import check_choice, dtype_name
from lambda_kernels.ops.ln_mlp.reference import scale_residual

from ..data.batches import random_images
from ..models.properties import eval_mode, input_shape, one_device, one_dtype
from .recipe import RESIDUAL_SCALES

if TYPE_CHECKING:
    from ..selection.result import Selection

SHAPES = ("linear", "cosine", "step")

# What (2 − λ) is at λ = 0: the factor on the residual of a block whose attention was diluted away.
DILUTED_SCALE = RESIDUAL_SCALES["dilute"]


class DilutedBlock(MlpBlockBase):
    """A ViT block whose attention is being faded out. It shares the modules of the block that it replaces, under their names.

    λ lives in a buffer, so that changing it does not recompile; at λ = 0 attention is not computed at all, since
    0·∞ would be NaN. The MLP half runs as in an `AttentionFreeBlock`: of a `FusedMlp` it keeps `fuse`, `backend` and
    `recompute`.
    """

    # Shown by convert_vit and save_pretrained, which must not take a network that is still fading.
    why_not_convertible = "its attention is still being diluted; call lambda_vit.finish_dilution first"

    lam: Tensor

    def __init__(self, block: nn.Module, lam: float = 1.0, final_scale: float = DILUTED_SCALE) -> None:
        family = find_family(block)
        assert family is not None, "the model was inspected"
        defaults = {"fuse": True, "backend": "auto", "recompute": "auto"}
        settings: dict[str, Any] = {name: getattr(block, name, value) for name, value in defaults.items()}
        super().__init__(1.0, **settings, family=family.name)
        # All that is on the block, parts that somebody added to it too; a scale that is not there is None, as timm has it.
        held = dict(block.named_parameters(recurse=False)) | dict(block.named_children())
        for name, part in (held | {name: None for name in family.scales if name not in held}).items():
            setattr(self, name, part)
        reference = block.norm2.weight if getattr(block.norm2, "weight", None) is not None else torch.empty(0)
        self.register_buffer("lam", torch.ones((), device=reference.device), persistent=False)
        self.attention_on = True
        self.final_scale = float(final_scale)  # of the residual, at λ = 0
        self.set_lambda(lam)
        self.training = block.training  # of this block alone: its parts keep the mode they have

    def set_lambda(self, lam: float) -> None:
        """Set λ, from 1 (plain block) to 0 (identity twin)."""
        if not 0.0 <= lam <= 1.0:
            raise ValueError(f"lam must lie in [0, 1]; got {lam!r}")
        if self.lam.dtype != torch.float32:
            self.lam = self.lam.float()  # the model was cast; λ keeps its digits
        self.lam.fill_(lam)
        self.attention_on = lam > 0

    def forward(self, x: Tensor, *arguments: object, **named: object) -> Tensor:
        scale = self.final_scale
        if not self.attention_on:
            return self._mlp_half(scale_residual(x, scale))
        own = x if scale == 1 else (scale + (1 - scale) * self.lam) * x
        return self._mlp_half(own + self.lam * self._attention_branch(x, arguments, named))

    def extra_repr(self) -> str:
        return f"lam={float(self.lam):.4g}, final_scale={self.final_scale:g}"


def dilute(
    model: nn.Module,
    layers: Sequence[int] | Selection,
    *,
    lam: float = 1.0,
    residual_scale: float = DILUTED_SCALE,
    inplace: bool = False,
) -> nn.Module:
    """Put the blocks `layers` of a timm vision transformer under dilution.

    At λ = 1 the model computes what it did before. Lower λ with `set_lambda` while training, then call
    `finish_dilution`; `finetune` does all of it. A model from `convert_vit(model, (), recompute=…)` continues to recompute,
    in the blocks under dilution too.

    Args:
        model: A timm vision transformer with all its attention.
        layers: Block indices, or a `Selection`.
        lam: λ to start from.
        residual_scale: Factor on the residual of these blocks at λ = 0: 2 in the paper, where the identity takes the place of
            attention; 1 lets attention fade alone, so that tokens keep their size.
        inplace: Change `model` itself instead of a deep copy.

    Returns:
        The model under dilution, in the mode that `model` is in: a copy unless `inplace`.

    Raises:
        ValueError: Wrong indices or scale, or a class token would be cut off from the image.
        UnsupportedModelError: The model cannot be changed block by block.
    """
    if not (math.isfinite(residual_scale) and residual_scale > 0):
        raise ValueError(f"residual_scale must be a positive number; got {residual_scale!r}")
    layers = _dilutable(model, layers, residual_scale)
    return _put_under_dilution(model if inplace else copy.deepcopy(model), layers, lam, residual_scale)


def _dilutable(model: nn.Module, layers: Sequence[int] | Selection, residual_scale: float) -> tuple[int, ...]:
    """The indices of `layers`, checked."""
    structure = inspect_model(model)
    layers = check_indices(layers, structure.depth, "layers")
    refuse_merging(structure, "dilution")
    if structure.removed:
        raise ValueError(
            f"the model has lost the attention of {list(structure.removed)} already; dilute the full model"
        )
    check_removal(model, layers, structure, residual_scale, stacklevel=4)
    return layers


def _put_under_dilution(
    model: nn.Module, layers: tuple[int, ...], lam: float, residual_scale: float, recompute: str | None = None
) -> nn.Module:
    for index in layers:
        block = DilutedBlock(model.blocks[index], lam, residual_scale)
        block.recompute = block.recompute if recompute is None else recompute
        model.blocks[index] = block
    return model


def prepare(
    model: nn.Module,
    layers: Sequence[int] | Selection = (),
    *,
    residual_scale: float = DILUTED_SCALE,
    recompute: str | None = None,
    inplace: bool = False,
) -> nn.Module:
    """The model as its training begins: `layers` under dilution at λ = 1, its MLP halves recomputing as `recompute` says.

    Args:
        model: A timm vision transformer, converted or not.
        layers: Blocks to dilute, or a `Selection`; empty dilutes none.
        residual_scale: As for `dilute`.
        recompute: As for `convert_vit`, which is applied with `fuse="all"`, so that it reaches all blocks; None leaves the
            model as it is.
        inplace: Change `model` itself instead of a deep copy.

    Raises:
        ValueError: Indices or `recompute` are wrong, or a class token would be cut off from the image.
        UnsupportedModelError: The model cannot be changed block by block.
    """
    indices = unwrap_layers(layers)
    chosen = _dilutable(model, indices, residual_scale) if len(indices) else ()
    model = model if inplace else copy.deepcopy(model)
    if recompute is not None:
        structure, info = inspect_model(model), getattr(model, "lambda_kernels_info", None)
        scale, backend = structure.residual_scale, "auto" if info is None else info.backend
        convert_vit(model, structure.removed, residual_scale=scale, backend=backend, recompute=recompute, inplace=True)
    return _put_under_dilution(model, chosen, 1.0, residual_scale, recompute)


def diluted_blocks(model: nn.Module) -> dict[int, DilutedBlock]:
    """The blocks under dilution, by index."""
    return {i: block for i, block in enumerate(model.blocks) if isinstance(block, DilutedBlock)}


def set_lambda(model: nn.Module, lam: float | Mapping[int, float]) -> None:
    """Set λ of the blocks under dilution.

    Args:
        model: Under dilution.
        lam: λ, from 1 (the block as it was) to 0 (attention has no part in it): one number for all blocks under dilution, or
            one for each block of a dict.

    Raises:
        ValueError: λ lies outside [0, 1], no block is under dilution, or a block of the dict is not.
    """
    blocks = _require_diluted_blocks(model)
    given = lam if isinstance(lam, Mapping) else dict.fromkeys(blocks, lam)
    if strangers := sorted(set(given) - set(blocks)):
        raise ValueError(f"lam names blocks {strangers}, which are not under dilution; those are {sorted(blocks)}")
    for index, value in given.items():
        blocks[index].set_lambda(value)


def _require_diluted_blocks(model: nn.Module) -> dict[int, DilutedBlock]:
    if not (blocks := diluted_blocks(model)):
        raise ValueError("no block of the model is under dilution; call dilute(model, layers) first")
    return blocks


def finish_dilution(
    model: nn.Module, *, fuse: str = "all", backend: str = "auto", recompute: str | None = None
) -> nn.Module:
    """Delete the attention of every diluted block, in place: the model becomes what `convert_vit` gives.

    Args:
        model: Under dilution, at λ = 0.
        fuse: As for `convert_vit`.
        backend: As for `convert_vit`.
        recompute: As for `convert_vit`; None keeps what the model was converted with before it was diluted.

    Returns:
        `model` itself, with `lambda_kernels_info`; its optimizer still holds the parameters that are gone.

    Raises:
        ValueError: λ is not 0 yet, no block is under dilution, or an option is none of the known ones.
        BackendUnavailableError: `backend` was requested by name and cannot run.
    """
    blocks = _require_diluted_blocks(model)
    fading = {i: float(block.lam) for i, block in blocks.items() if block.attention_on}
    if fading:
        raise ValueError(f"λ must reach 0 before attention is deleted; blocks at {fading}. Call set_lambda(model, 0)")
    return delete_attention(model, tuple(blocks), fuse=fuse, backend=backend, recompute=recompute)


def delete_attention(
    model: nn.Module, layers: Sequence[int], *, fuse: str = "all", backend: str = "auto", recompute: str | None = None
) -> nn.Module:
    """Delete the attention of the diluted blocks `layers`, at λ = 0, in place. Others remain under dilution."""
    info = getattr(model, "lambda_kernels_info", None)
    if recompute is None:
        recompute = "auto" if info is None else info.recompute
    scale = diluted_blocks(model)[layers[0]].final_scale
    options = {"residual_scale": scale, "fuse": fuse, "backend": backend, "recompute": recompute}
    settings = ConversionSettings.resolve(model, tome_r=None, tome_start=None, **options)
    gone = [index for index, block in enumerate(model.blocks) if isinstance(block, AttentionFreeBlock)]
    return remove_attention(model, tuple(sorted({*gone, *layers})), settings)


@dataclass(frozen=True)
class LambdaSchedule:
    """λ as a function of the optimizer step: from 1 at step 0 to 0 at `steps`, and 0 from there on."""

    steps: float  # length of the dilution; need not be whole
    shape: str = "linear"  # "linear" (the paper's), "cosine", or "step" (ten equal stairs)

    def __post_init__(self) -> None:
        check_choice("shape", self.shape, SHAPES)
        if self.steps < 0:
            raise ValueError(f"steps must not be negative; got {self.steps}")

    def __call__(self, step: int) -> float:
        """λ at `step`."""
        if step >= self.steps:
            return 0.0
        done = step / self.steps
        if self.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.shape == "step":
            return 1 - math.floor(done * 10) / 10
        return 1 - done


@dataclass(frozen=True)
class RemovalSchedule:
    """λ of every layer as a function of the optimizer step, by a way to remove attention.

    Layers fade together by a `LambdaSchedule`, except with "progressive": there the i-th of k layers is removed at once at step
    i·steps/k, the first one before the first step.
    """

    removal: str
    layers: tuple[int, ...]  # in the order of their removal
    fading: LambdaSchedule

    def __call__(self, step: int) -> dict[int, float]:
        """λ of every layer at `step`."""
        if self.removal != "progressive":
            return dict.fromkeys(self.layers, self.fading(step))
        count, steps = len(self.layers), self.fading.steps
        return {layer: float(step < place * steps / count) for place, layer in enumerate(self.layers)}


# By how much deleting the attention may move a logit, as a share of the largest one. The block computes the same at
# λ = 0 with the attention and without; a fused kernel only adds up in another order.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32_BOUND = 2e-2  # products of float32 that keep ten bits of each factor

# Images that are compared; more would say nothing else.
COMPARED = 16


class AttentionRemovalError(RuntimeError):
    """The network without the faded attention does not compute what it did with it."""


@torch.no_grad()
def remove_diluted_attention(
    model: nn.Module, images: Tensor | None = None, layers: Sequence[int] | None = None
) -> tuple[float, float]:
    """Delete the attention of the blocks `layers`, by default of all blocks under dilution, in place, with λ at 0.

    Returns:
        The largest |difference| of a logit before and after, on images [N, C, H, W] or else seeded noise, and the largest
        allowed one. AttentionRemovalError if it is larger, or logits are not finite.
    """
    device, dtype = one_device(model), one_dtype(model)
    if images is None:
        images = random_images((COMPARED, *input_shape(model)), device, dtype)
    images = images[:COMPARED].to(device, dtype)
    layers = tuple(diluted_blocks(model)) if layers is None else tuple(layers)
    set_lambda(model, dict.fromkeys(layers, 0.0))
    with eval_mode(model):
        before = model(images)
    delete_attention(model, layers)
    with eval_mode(model):
        after = model(images)
    difference = float((after - before).abs().max())
    bound = _bound(device, dtype) * (1 + float(before.abs().max()))
    if not difference <= bound:  # NaN too
        raise AttentionRemovalError(
            f"deleting the faded attention of blocks {list(layers)} moved a logit by {difference:.3g}, more than rounding "
            f"explains ({bound:.3g} in {dtype_name(dtype)}): the network would not be what was trained"
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
