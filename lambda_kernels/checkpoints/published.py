"""The published networks (arXiv 2404.05657): which layers each one lacks, and a reader for the released checkpoints."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..convert.checks import check_indices
from ..convert.conversion import convert_vit
from ..errors import CheckpointError
from .weights import (
    ATTENTION_PARTS,
    find_blocks,
    find_blocks_without_attention,
    find_network,
    load_state_dict,
    parse_block_key,
    read_file,
)


@dataclass(frozen=True)
class Published:
    """A network of the paper. `top1` is its accuracy on ImageNet-1k in %, under torch 1.7.1 and under 1.12.1."""

    architecture: str
    removed: tuple[int, ...]
    top1: tuple[float, float]


# By the name of the released file without .pth.
PUBLISHED = {
    "base_01346": Published("deit_base_patch16_224", (0, 1, 3, 4, 6), (81.83, 81.77)),
    "base_013469": Published("deit_base_patch16_224", (0, 1, 3, 4, 6, 9), (81.33, 81.46)),
    "small_024": Published("deit_small_patch16_224", (0, 2, 4), (80.31, 80.33)),
    "small_0246": Published("deit_small_patch16_224", (0, 2, 4, 6), (79.90, 79.89)),
    "tiny_024": Published("deit_tiny_patch16_224", (0, 2, 4), (72.94, 72.79)),
    "tiny_0246": Published("deit_tiny_patch16_224", (0, 2, 4, 6), (71.90, 71.88)),
}

# All of them were diluted, which doubles the residual in each removed block.
RESIDUAL_SCALE = 2.0

# Share of the image that remains after the center crop in evaluation, as in DeiT's own script; timm's configs have 0.9.
CROP = 0.875

_WIDTHS = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
# The shortest released name has three digits; fewer could be the number of an epoch.
_NAME = re.compile(r"(tiny|small|base)_(\d{3,})")


@dataclass(frozen=True)
class Released:
    """A released checkpoint as a model, and how it was identified.

    Attributes:
        model: Converted, in eval mode, on the CPU, with the weights of the file.
        architecture: timm's name of the full model.
        architecture_from: The source of `architecture`.
        removed: Blocks without attention.
        removed_from: The source of `removed`.
        dropped: Keys of removed attention in the file, which were ignored.
        others: Names of other entries of the file, such as "optimizer", which were ignored.
        published: The matching entry of `PUBLISHED`, or None.
    """

    model: nn.Module
    architecture: str
    architecture_from: str
    removed: tuple[int, ...]
    removed_from: str
    dropped: tuple[str, ...]
    others: tuple[str, ...]
    published: Published | None


def load_released(
    path: str | Path, *, remove: Iterable[int] | None = None, architecture: str | None = None
) -> Released:
    """Read a checkpoint as the paper's training script writes it, for example `base_01346.pth`.

    It is a dict with the state dict under `model` (or `net`). The digits of the file's name, the attention missing from its
    keys, or `remove` say which layers were removed.

    Args:
        path: The file. Code pickled in it never runs; see `weights.read_file`.
        remove: Block indices, which override the name; None infers them from the name or the keys.
        architecture: timm's name of the full model, which overrides the name; None infers it from name and width.

    Raises:
        CheckpointError: The file cannot be read or holds no such model; or its name, its keys and the arguments contradict
            each other, or do not say what was removed.
        ValueError: `remove` holds an invalid block index.
    """
    path = Path(path)
    state, others, crop = _read(path)
    name = _NAME.fullmatch(path.name.split(".")[0])
    depth = 1 + max(find_blocks(state), default=-1)
    if depth == 0 or "patch_embed.proj.weight" not in state:
        raise CheckpointError(f"{path} holds no vision transformer under timm's names: {', '.join(list(state)[:3])} …")
    architecture, architecture_from = _find_architecture(path, state, name[1] if name else None, architecture)
    removed, removed_from = _find_removed(path, state, depth, name[2] if name else None, remove)
    parts = {(index, part) for index in removed for part in ATTENTION_PARTS}
    dropped = tuple(key for key in state if parse_block_key(key) in parts)
    model = _build(path, {key: value for key, value in state.items() if key not in dropped}, architecture, removed)
    model.pretrained_cfg = {**model.pretrained_cfg, "tag": "", "crop_pct": crop}  # type: ignore[assignment]  # as timm does
    entry = PUBLISHED.get(path.name.split(".")[0])
    if entry is not None and (entry.architecture, entry.removed) != (architecture, removed):
        entry = None
    return Released(model, architecture, architecture_from, removed, removed_from, dropped, others, entry)


def _read(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...], float]:
    """The state dict, the names of the other entries, and the crop from the options in the file."""
    loaded = read_file(path)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    # DeiT's training script evaluates the trained weights, not their average.
    network = find_network(loaded, path, use_ema=False)
    key = network.entries[0] if network.entries else None
    others = () if key is None else tuple(str(other) for other in loaded if other != key)
    options = {} if key is None else loaded.get("args")
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    crop = options.get("eval_crop_ratio") if isinstance(options, dict) else None
    return network.state, others, float(crop) if isinstance(crop, (int, float)) and 0 < crop <= 1 else CROP


def _find_architecture(path: Path, state: dict[str, Tensor], size: str | None, given: str | None) -> tuple[str, str]:
    width = state["patch_embed.proj.weight"].shape[0]
    if given is not None:
        return given, "the argument"
    by_width = _WIDTHS.get(width)
    if by_width is None:
        raise CheckpointError(
            f"{path} is {width} channels wide, not a width of DeiT ({', '.join(map(str, _WIDTHS))}); name the model with "
            "architecture (--architecture)"
        )
    if size is not None and f"deit_{size}_patch16_224" != by_width:
        raise CheckpointError(
            f"{path} is called {size}, but its {width} channels are those of {by_width}; name the model with architecture "
            "(--architecture)"
        )
    return by_width, f"{'the name and ' if size else ''}its {width} channels"


def _find_removed(
    path: Path, state: dict[str, Tensor], depth: int, digits: str | None, given: Iterable[int] | None
) -> tuple[tuple[int, ...], str]:
    absent = tuple(find_blocks_without_attention(state))
    said, by = None, ""
    if given is not None:
        said, by = check_indices(given, depth), "the argument"
    elif digits is not None:
        # The released names hold one digit for each block, in rising order.
        said, by = tuple(map(int, digits)), f"the file's name, {path.name}"
        if list(said) != sorted(set(said)) or said[-1] >= depth:
            said = None
    if said is not None and absent and said != absent:
        raise CheckpointError(
            f"{path}: blocks {list(said)} lost their attention according to {'remove' if given is not None else 'its name'}, "
            f"but its keys have none for blocks {list(absent)}. "
            + (
                f"Omit remove (--remove), or pass {','.join(map(str, absent))}; convert can remove more afterwards"
                if given is not None
                else f"Pass remove (--remove) {','.join(map(str, absent))} if the keys are right"
            )
        )
    if said is not None:
        return said, by
    if absent:
        return absent, "the attention that its keys lack"
    raise CheckpointError(
        f"{path} does not say what was removed: it has attention for all {depth} blocks, and its name is not of the form "
        "base_01346.pth, with a digit for each block in rising order. Pass remove (--remove), for example 0,1,3,4,6"
    )


def _build(path: Path, state: dict[str, Tensor], architecture: str, removed: tuple[int, ...]) -> nn.Module:
    import timm

    if not timm.is_model(architecture):
        raise CheckpointError(
            f"architecture (--architecture) {architecture!r} is not a timm model; see timm.list_models()"
        )
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    model = timm.create_model(architecture, pretrained=False, num_classes=classes)
    model = convert_vit(model, removed, residual_scale=RESIDUAL_SCALE, inplace=True)
    try:
        load_state_dict(model, state, source=path.name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is not a {architecture} without the attention of {list(removed)}: {error}"
        ) from error
    return model.eval()
