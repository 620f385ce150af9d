"""Model surgery: put attention-free blocks where attention was, fused ones elsewhere. No arithmetic here."""

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
from ..blocks.merging_block import make_merging_block, remove_merging, token_counts, wrap_block_sequence
from ..blocks.mlp_block import MlpBlockBase, copy_with, find_family, find_replacement_obstacles
from ..blocks.structure import inspect_model
from ..errors import AlreadyConvertedError, BackendUnavailableError
from ..ops.ln_mlp.fused import tuning
from .checks import _place, check_indices, check_removal
from .settings import ConversionSettings
from .token_merging import plan_merging


@dataclass(frozen=True)
class BlockInfo:
    """One block after conversion: is its attention there, and how does its MLP half run."""

    block: int
    attention: str  # "kept" or "removed"
    mlp: str  # "timm": the block is timm's own; "modules", "torch", "onednn", "triton": see AttentionFreeBlock.path
    reason: str
    recompute: str  # what a training step computes again in the MLP half: "none", "act" or "all"
    recompute_reason: str
    # Of images of the size that the model was built for; None where no block of the model merges tokens.
    tokens: int | None = None  # that go in
    merged: int = 0  # of them, into others, between the attention and the MLP


@dataclass(frozen=True, kw_only=True)
class ConversionInfo(ConversionSettings):
    """What `convert_vit` did to a model, which carries it as `lambda_kernels_info`: the settings, and what they gave.

    `blocks` says how each block runs in eval mode, and what it recomputes in training, on the device and with the dtype
    that the model had when it was converted; `describe_blocks(model)` says it for the present ones.
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

    Any block with timm's names for its MLP half can lose its attention, one without it too. The others become what
    `settings` say.

    Raises:
        ValueError: `tome_r` or `tome_start` does not fit the blocks.
        UnsupportedModelError: Tokens cannot be merged in this model; it is untouched.
        BackendUnavailableError: The backend was requested by name and cannot run; the model is untouched.
    """
    return _replace_blocks(model, removed, settings, plan_merging(model, removed, settings))


def _replace_blocks(
    model: nn.Module, removed: tuple[int, ...], settings: ConversionSettings, merges: dict[int, int]
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
    hooked = [i for i in removed if has_hooks(model.blocks[i])]
    if hooked:
        warnings.warn(f"the hooks on blocks {hooked} are gone with the blocks they were registered on", stacklevel=3)
    _warn_of_saving(rows, fuse, settings.recompute)
    for index, block in enumerate(new):
        model.blocks[index] = block
    blocks = model.blocks = wrap_block_sequence(model.blocks, bool(merges))
    model.lambda_kernels_info = ConversionInfo(  # type: ignore[assignment]  # a record, which PyTorch does not foresee
        removed=removed, blocks=rows, widths=_widths(blocks), **asdict(settings)
    )
    return model


def _refuse_modules(blocks: Sequence[nn.Module], rows: Sequence[BlockInfo], backend: str) -> None:
    """Refuse a backend that was requested by name where blocks that are to be fused would run their submodules instead.

    It is eval mode that counts, as in `rows`: dropout that trains is no reason. Blocks that stay timm's were not asked.
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
            "which takes kernels where they serve and says in lambda_kernels_info where not"
        )


def _warn_of_saving(rows: Sequence[BlockInfo], fuse: str, recompute: str) -> None:
    """Warn about blocks that were to compute something again and cannot; timm's own are meant to with `fuse="all"` alone."""
    if recompute in ("auto", "none"):
        return
    asked = [row for row in rows if row.recompute == "none" and (row.mlp != "timm" or fuse == "all")]
    for reason in dict.fromkeys(row.recompute_reason for row in asked):
        blocks = [row.block for row in asked if row.recompute_reason == reason]
        warnings.warn(f"blocks {blocks} save all that autograd saves: {reason}", stacklevel=4)


def _convert_kept_block(
    model: nn.Module, index: int, settings: ConversionSettings, merges: dict[int, int]
) -> nn.Module:
    """What a block with attention becomes; itself where it is that already, or where something would be lost.

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

    The parameters of removed attention leave the model; those that are left keep their names.

    Args:
        model: A timm model whose `blocks` are of a family in `families.FAMILIES`: plain ViTs (`vision_transformer.Block`),
            EVA-02 and other rotary ones (`eva.EvaBlock`), BEiT (`beit.Block`).
        remove: Indices of the blocks that lose their attention, or a `Selection`. The default is the published choice
            for DeiT-B (arXiv 2404.05657). `()` removes none.
        residual_scale: 1.0 for a skipped attention (measuring, zero-shot use), 2.0 for one that was diluted into the
            identity while training.
        fuse: Which MLP halves go through `ln_mlp`: "all", "removed" (only blocks without attention) or "none". With "all",
            blocks that keep their attention become `FusedMlp`, else they are timm's own. A block that carries hooks or
            anything else of its own stays, and `lambda_kernels_info` says so.
        backend: "auto", "triton", "onednn" or "torch", passed on to `ln_mlp`. "triton" and "onednn" are requested by name: a
            model with an MLP half that `fuse` names and that they cannot serve in eval mode is refused.
        recompute: What a training step computes again in the MLP halves instead of saving it: "all" (the input of a half is
            kept alone), "act" (the first product is kept too), "none", or "auto": by width in the kernels, nothing elsewhere.
            It changes neither weights nor what is saved with `save_pretrained`. Blocks that stay timm's own are not reached.
        tome_r: Tokens to merge in each block that keeps its attention (arXiv 2210.09461), between the attention and the
            MLP: one number, or one for each block that merges. 0 merges none, and takes merging off a model that has it;
            None leaves it as it is, which for a model that was never converted is 0. Merging has no parameters. It comes
            last: nothing is selected, diluted or profiled behind it.
        tome_start: From which of the blocks that keep their attention on tokens are merged, counted from 0. None leaves it
            as it is, which at first is 1, as in the published figures of both together.
        inplace: Change `model` itself instead of a deep copy.

    Returns:
        The converted model, with `lambda_kernels_info` (a `ConversionInfo`). A model that was converted by the same
        arguments comes back as it is; another `fuse`, `backend`, `recompute` or `tome_r` is applied.

    Raises:
        ValueError: Indices or options are wrong, or no attention would be left for a class token to read the image.
        UnsupportedModelError: The model's blocks cannot lose their attention alone, or not merge tokens; the model is
            untouched.
        AlreadyConvertedError: Other layers were removed before, or with another residual_scale.
        BackendUnavailableError: `backend="triton"` or `"onednn"` cannot run on the model's device, or not for all its MLP
            halves; the model is untouched.
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
            f"blocks {list(structure.removed)} of the model have lost their attention already (residual_scale "
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
    """How each block of a converted model runs in eval mode, where the model is now, what it recomputes, and why."""
    return _describe(model, model.blocks, model.lambda_kernels_info.fuse)


def _widths(blocks: Iterable[nn.Module]) -> tuple[tuple[int, int], ...]:
    ours = (block for block in blocks if isinstance(block, (AttentionFreeBlock, FusedMlp)))
    linears = (getattr(block.mlp, "fc1", None) for block in ours)
    found = {(fc1.in_features, fc1.out_features) for fc1 in linears if isinstance(fc1, nn.Linear)}
    return tuple(sorted(found))


def _describe(model: nn.Module, blocks: Sequence[nn.Module], fuse: str) -> tuple[BlockInfo, ...]:
    """How `blocks` run where `model` is; they need not be in it yet."""
    device, dtype = _place(model)
    rows = []
    for index, block in enumerate(blocks):
        if isinstance(block, MlpBlockBase):
            choice, again = block.path(device, dtype, training=False), block.recomputed(device, dtype)
            attention = "removed" if isinstance(block, AttentionFreeBlock) else "kept"
            # A block that stands in for another one for a while says so.
            reason = "; ".join(filter(None, (getattr(block, "why_not_convertible", None), choice.reason)))
            rows.append(BlockInfo(index, attention, choice.backend, reason, again.level, again.reason))
        else:
            why = _why_not_fused(block, fuse)
            rows.append(BlockInfo(index, "kept", "timm", why, "none", f"the block is timm's own: {why}"))
    counts = token_counts(model, blocks)
    if counts is not None:
        rows = [replace(row, tokens=tokens, merged=merged) for row, (tokens, merged) in zip(rows, counts, strict=True)]
    return tuple(rows)


def _why_not_fused(block: nn.Module, fuse: str) -> str:
    if fuse != "all":
        return f"fuse={fuse!r}"
    return "; ".join(find_replacement_obstacles(block)) or "it was put there after the conversion"
