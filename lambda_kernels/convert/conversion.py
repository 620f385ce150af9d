"""Conversion of a model: its blocks are replaced by attention-free and fused ones. No arithmetic here."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn

from ..blocks.attention_free import AttentionFreeBlock
from ..blocks.fused_mlp import FusedMlp
from ..blocks.hooks import has_hooks
from ..blocks.merging_block import count_tokens, make_merging_block, remove_merging, wrap_block_sequence
from ..blocks.mlp_block import MlpBlockBase, copy_with, find_family, find_replacement_obstacles
from ..blocks.structure import inspect_model
from ..errors import AlreadyConvertedError, BackendUnavailableError
from ..ops.ln_mlp.fused import tuning
from .checks import check_indices, check_removal, get_device_and_dtype
from .settings import ConversionSettings
from .token_merging import plan_merging


@dataclass(frozen=True)
class BlockInfo:
    """One block after conversion: whether it has attention, and how its MLP half runs."""

    block: int
    attention: str  # "kept" or "removed"
    mlp: str  # "timm": the block is timm's own; "modules", "torch", "onednn", "triton": see AttentionFreeBlock.path
    reason: str
    recompute: str  # what a training step recomputes in the MLP half: "none", "act" or "all"
    recompute_reason: str
    # For images of the size that the model was built for.
    tokens: int | None = None  # input tokens; None if no block of the model merges tokens
    merged: int = 0  # how many of them are merged into others, between the attention and the MLP


@dataclass(frozen=True, kw_only=True)
class ConversionInfo(ConversionSettings):
    """What `convert_vit` did to a model, stored on it as `lambda_kernels_info`: the settings and their effect.

    `blocks` describes how each block runs in eval mode and what it recomputes in training, on the device and in the dtype
    of the model at its conversion; `describe_blocks(model)` does so for the present ones.
    """

    removed: tuple[int, ...]
    blocks: tuple[BlockInfo, ...]
    widths: tuple[tuple[int, int], ...] = ()  # (channels, hidden) of the MLP halves that `ln_mlp` can serve

    @property
    def settings(self) -> ConversionSettings:
        """The settings alone."""
        return ConversionSettings(**{field.name: getattr(self, field.name) for field in fields(ConversionSettings)})

    @property
    def kernels(self) -> tuple[str, ...]:
        """Which kernels or library products `ln_mlp` has chosen so far in this process for these widths, one per line."""
        kinds = ("float32", "bfloat16", "float16")
        return tuple(line for width in self.widths for kind in kinds for line in tuning.describe(*width, kind))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self) | {
            "removed": list(self.removed),
            "blocks": [asdict(b) for b in self.blocks],
            "widths": [list(width) for width in self.widths],
            "kernels": list(self.kernels),
            "tome_r": self.tome_r if isinstance(self.tome_r, int) else list(self.tome_r),
        }


def remove_attention(model: nn.Module, removed: tuple[int, ...], settings: ConversionSettings) -> nn.Module:
    """Replace the blocks in place and attach the info; the caller has checked that model and indices allow it.

    `removed` may name any block with timm's names for its MLP half, even one without attention. The other blocks follow
    `settings`. The model is unchanged if tokens cannot be merged in it, or a backend requested by name cannot run.
    """
    return _replace_blocks(model, removed, settings, plan_merging(model, removed, settings), stacklevel=4)


def _replace_blocks(
    model: nn.Module,
    removed: tuple[int, ...],
    settings: ConversionSettings,
    merges: dict[int, int],
    stacklevel: int = 3,
) -> nn.Module:
    fuse, options = settings.fuse, settings.block_options | {"fuse": settings.fuse != "none"}
    new = [
        AttentionFreeBlock.from_block(block, residual_scale=settings.residual_scale, **options)
        if i in removed
        else _convert_kept_block(model, i, settings, merges)
        for i, block in enumerate(model.blocks)
    ]
    rows = _describe(model, new, fuse)
    if settings.backend in ("triton", "onednn"):
        _refuse_modules(new, rows, settings.backend)
    if hooked := [i for i in removed if has_hooks(model.blocks[i])]:
        gone = f"the hooks on blocks {hooked} are gone with the blocks they were registered on"
        warnings.warn(gone, stacklevel=stacklevel)
    _warn_without_recompute(rows, fuse, settings.recompute, stacklevel + 1)
    for index, block in enumerate(new):
        model.blocks[index] = block
    blocks = model.blocks = wrap_block_sequence(model.blocks, bool(merges))
    model.lambda_kernels_info = ConversionInfo(  # type: ignore[assignment]  # a record, which PyTorch does not foresee
        removed=removed, blocks=rows, widths=_widths(blocks), **asdict(settings)
    )
    return model


def _refuse_modules(blocks: Sequence[nn.Module], rows: Sequence[BlockInfo], backend: str) -> None:
    """Refuse a backend requested by name if a block to be fused would run its submodules instead.

    Eval mode counts, as in `rows`: dropout in training is no obstacle. Blocks that remain timm's are exempt.
    """
    asked = [row for block, row in zip(blocks, rows, strict=True) if isinstance(block, MlpBlockBase) and block.fuse]
    alike: dict[str, list[int]] = {}
    for row in asked:
        if row.mlp == "modules":
            alike.setdefault(row.reason, []).append(row.block)
    if alike:
        listed = "; ".join(f"blocks {indices}: {reason}" for reason, indices in alike.items())
        raise BackendUnavailableError(
            f"backend={backend!r} cannot run the MLP halves of all blocks that are to be fused ({listed}). Use backend='auto', "
            "which uses kernels where they can run and reports the others in lambda_kernels_info"
        )


def _warn_without_recompute(rows: Sequence[BlockInfo], fuse: str, recompute: str, stacklevel: int) -> None:
    """Warn about blocks that should recompute and cannot. timm's own blocks should only with `fuse="all"`."""
    if recompute in ("auto", "none"):
        return
    asked = [row for row in rows if row.recompute == "none" and (row.mlp != "timm" or fuse == "all")]
    for reason in dict.fromkeys(row.recompute_reason for row in asked):
        blocks = [row.block for row in asked if row.recompute_reason == reason]
        warnings.warn(f"blocks {blocks} save all that autograd saves: {reason}", stacklevel=stacklevel)


def _convert_kept_block(
    model: nn.Module, index: int, settings: ConversionSettings, merges: dict[int, int]
) -> nn.Module:
    """The block that replaces one with attention: itself if nothing changes, or if something would be lost.

    The block itself does not change: the caller may still find that the model cannot be converted.
    """
    block, options = model.blocks[index], settings.block_options
    if index in merges:
        return make_merging_block(block, merges[index], model.num_prefix_tokens, **options)
    block = remove_merging(block)
    family = find_family(block)
    if family is None or type(block) not in (family.block, FusedMlp):
        return block
    stays = bool(find_replacement_obstacles(block))
    if type(block) is not FusedMlp:
        return block if stays or not options["fuse"] else FusedMlp.from_block(block, **options)
    if not options["fuse"] and not stays:
        return block.to_timm()
    return copy_with(block, **options)


def convert_vit(
    model: nn.Module,
    remove: object = (0, 1, 3, 4, 6),
    *,
    residual_scale: float = 1.0,
    fuse: str = "all",
    backend: str = "auto",
    recompute: str = "auto",
    tome_r: int | Sequence[int] | None = None,
    tome_start: int | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Remove attention layers of a timm vision transformer, and run the MLP halves of its blocks through `ln_mlp`.

    The parameters of the removed attention leave the model; the others keep their names.

    Args:
        model: A timm model whose `blocks` are of a family in `families.FAMILIES`: plain ViTs (`vision_transformer.Block`),
            EVA-02 and other rotary ones (`eva.EvaBlock`), BEiT (`beit.Block`).
        remove: Indices of the blocks that lose their attention, or a `Selection`. The default is the published choice
            for DeiT-B (arXiv 2404.05657). `()` removes none.
        residual_scale: 1.0 for a skipped attention (measuring, zero-shot use), 2.0 for one that was diluted into the
            identity while training.
        fuse: Which MLP halves go through `ln_mlp`: "all", "removed" (only blocks without attention) or "none". With "all",
            blocks that keep their attention become `FusedMlp`, else they are timm's own. A block with hooks or
            other additions of its own is not replaced, and `lambda_kernels_info` says so.
        backend: "auto", "triton", "onednn" or "torch", passed to `ln_mlp`. "triton" and "onednn" are strict: a
            model is refused if they cannot run, in eval mode, each MLP half that `fuse` selects.
        recompute: What a training step recomputes in the MLP halves instead of saving it: "all" (it saves only the input),
            "act" (also the first product), "none", or "auto" (kernels decide by width, others recompute nothing).
            It changes neither the weights nor what `save_pretrained` writes, and does not apply to timm's own blocks.
        tome_r: Tokens to merge in each block that keeps its attention (arXiv 2210.09461), between the attention and the
            MLP: one number, or one for each block that merges. 0 merges none and removes merging from a model that has it;
            None retains what the model has, which is 0 at first. Merging has no parameters. It comes last: models that
            merge tokens cannot be profiled, diluted or searched.
        tome_start: The first block that merges tokens, counted from 0 among the blocks that keep their attention. None
            retains what the model has, which is 1 at first, as in the published results of both methods together.
        inplace: Change `model` itself instead of a deep copy.

    Returns:
        The converted model, with `lambda_kernels_info` (a `ConversionInfo`). A model that was converted with
        the same arguments is returned unchanged; another `fuse`, `backend`, `recompute` or `tome_r` is applied.

    Raises:
        ValueError: An index or option is wrong, or the class token would be cut off from the image.
        UnsupportedModelError: The attention of its blocks cannot be removed alone, or its tokens cannot be merged; the model
            is unchanged.
        AlreadyConvertedError: Other layers have already been removed, or with another residual_scale.
        BackendUnavailableError: `backend="triton"` or `"onednn"` cannot run on the model's device, or not all its MLP
            halves; the model is unchanged.
    """
    settings = ConversionSettings.resolve(
        model,
        residual_scale=residual_scale,
        fuse=fuse,
        backend=backend,
        recompute=recompute,
        tome_r=tome_r,
        tome_start=tome_start,
    )
    structure = inspect_model(model)
    removed = check_indices(remove, structure.depth)
    if structure.removed and (removed, settings.residual_scale) != (structure.removed, structure.residual_scale):
        raise AlreadyConvertedError(
            f"the model has lost the attention of blocks {list(structure.removed)} already (residual_scale "
            f"{structure.residual_scale:g}); requested: {list(removed)} (residual_scale {residual_scale:g}). Convert the full "
            "model instead"
        )
    if not structure.removed:
        check_removal(model, removed, structure, settings.residual_scale)
    merges = plan_merging(model, removed, settings)
    info = getattr(model, "lambda_kernels_info", None)
    if info is not None and info.removed == structure.removed == removed and info.settings == settings:
        kept = [i for i in range(structure.depth) if i not in removed]
        if all(_convert_kept_block(model, i, settings, merges) is model.blocks[i] for i in kept):
            return model
    return _replace_blocks(model if inplace else copy.deepcopy(model), removed, settings, merges)


def describe_blocks(model: nn.Module) -> tuple[BlockInfo, ...]:
    """How each block of a converted model runs in eval mode on its present device, what it recomputes, and why."""
    return _describe(model, model.blocks, model.lambda_kernels_info.fuse)


def _widths(blocks: Iterable[nn.Module]) -> tuple[tuple[int, int], ...]:
    ours = (block for block in blocks if isinstance(block, (AttentionFreeBlock, FusedMlp)))
    linears = (getattr(block.mlp, "fc1", None) for block in ours)
    found = {(fc1.in_features, fc1.out_features) for fc1 in linears if isinstance(fc1, nn.Linear)}
    return tuple(sorted(found))


def _describe(model: nn.Module, blocks: Sequence[nn.Module], fuse: str) -> tuple[BlockInfo, ...]:
    """How `blocks` run on the device of `model`, which need not contain them yet."""
    device, dtype = get_device_and_dtype(model)
    rows = []
    for index, block in enumerate(blocks):
        if isinstance(block, MlpBlockBase):
            choice, again = block.path(device, dtype, training=False), block.recomputed(device, dtype)
            attention = "removed" if isinstance(block, AttentionFreeBlock) else "kept"
            # A block that replaces another one temporarily says so.
            reason = "; ".join(filter(None, (getattr(block, "why_not_convertible", None), choice.reason)))
            rows.append(BlockInfo(index, attention, choice.backend, reason, again.level, again.reason))
        else:
            why = _explain_not_fused(block, fuse)
            rows.append(BlockInfo(index, "kept", "timm", why, "none", f"the block is timm's own: {why}"))
    counts = count_tokens(model, blocks)
    if counts is not None:
        rows = [replace(row, tokens=tokens, merged=merged) for row, (tokens, merged) in zip(rows, counts, strict=True)]
    return tuple(rows)


def _explain_not_fused(block: nn.Module, fuse: str) -> str:
    if fuse != "all":
        return f"fuse={fuse!r}"
    return "; ".join(find_replacement_obstacles(block)) or "the block was inserted after the conversion"
