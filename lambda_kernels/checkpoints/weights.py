"""State dicts: reading them from files without running pickled code, and loading them strictly with explanations."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

# Names under which the files of training scripts store the state dict.
WRAPPERS = ("state_dict", "model", "net")

_ALIGNMENT = 64  # bytes, of PyTorch's allocator on the CPU

# The parts that a block loses with its attention: `ls1` is in timm's Block, `gamma_1` in Eva's and BEiT's.
ATTENTION_PARTS = ("norm1", "attn", "ls1", "gamma_1")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pth/.pt/.bin/.tar without running pickled code.

    Raises:
        CheckpointError: The file is missing, damaged, or holds no state dict.
    """
    path = Path(path)
    loaded = read_file(path)
    for key in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return strip_wrappers(check_state_dict(loaded, path))


def align(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` in memory that begins where PyTorch's own does, so that a model which is given it computes bit-equal outputs.

    Tensors of a .safetensors file begin at any multiple of their element size, and matrix products can depend on that.
    """
    return {name: value if value.data_ptr() % _ALIGNMENT == 0 else value.clone() for name, value in state.items()}


def read_file(path: str | Path) -> object:
    """The content of a .safetensors or a pickled file, on the CPU.

    From a pickled file only data is built: what `torch.load(weights_only=True)` allows, `argparse.Namespace` (the options of
    training scripts) and NumPy's scalars (their metrics).

    Raises:
        CheckpointError: The file is missing or damaged, or requires other classes or functions, which are named and not run.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file of weights in it, or pass the folder as the model")
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with _plain_data_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle each have their own kinds
        refused = _find_refused_globals(path) or _find_refused_global(error)
        if refused:
            raise CheckpointError(
                f"{path} cannot be read as weights: it requires {', '.join(refused)}, and code from a file never runs. If "
                "you trust it, load it where it was written and save only its state dict"
            ) from error
        raise CheckpointError(f"{path} cannot be read as weights ({explain_unreadable(path, error)})") from error


def explain_unreadable(path: Path, error: Exception) -> str:
    """The reason of an error of `torch.load` or of safetensors, in one line.

    PyTorch's own message for a pickle with more than data advises `weights_only=False`, which would run its code.
    """
    if path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, pickle.UnpicklingError):
        reason = "PyTorch did not write it, or it holds more than tensors and plain values; code from a file never runs"
        return f"UnpicklingError: {reason}"
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _plain_data_allowed() -> AbstractContextManager:
    # At its exit, PyTorch would also forbid what the caller had already allowed.
    already = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([kind for kind in _plain_data() if kind not in already])


def _plain_data() -> list:
    allowed: list = [argparse.Namespace]
    try:
        import numpy as np
    except ImportError:  # then no tensor here came from it either
        return allowed
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]
    # The function moved in NumPy 2; files name it by the place that it had when they were written.
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed.append(np.dtype)
    allowed += [type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64", "bool")]
    return allowed


def _find_refused_globals(path: Path) -> list[str]:
    """Names that a pickled file would call or build besides plain data; empty if they cannot be determined."""
    try:
        with _plain_data_allowed():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no such file at all, or one in PyTorch's format of before 1.6
        return []


def _find_refused_global(error: Exception) -> list[str]:
    """The same from PyTorch's error, which names the first one for files in the older format."""
    found = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
    return [found[1]] if found else []


def check_state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    """`loaded`, if it is a state dict.

    Raises:
        CheckpointError: It is not.
    """
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise CheckpointError(f"{path} holds no state dict")
    return loaded


def strip_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes that DistributedDataParallel and torch.compile add to every key."""
    while state:
        prefix = next((p for p in ("module.", "_orig_mod.") if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_state_dict(
    model: nn.Module, state: dict[str, Tensor], *, assign: bool = False, source: str = "the checkpoint"
) -> None:
    """Load strictly, or load nothing and explain what does not fit.

    Raises:
        CheckpointError: Keys or shapes differ; the message says so if only one of the models has certain attention layers.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if not (missing or unexpected or shapes):
        model.load_state_dict(state, strict=True, assign=assign)
        return
    lost, extra = _find_attention_blocks(missing), _find_attention_blocks(unexpected)
    if not shapes and lost is not None and extra is not None:
        raise CheckpointError(f"{source} {_explain_attention(model, lost, extra)}")
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{' …' if len(keys) > 3 else ''})"
        for what, keys in (("missing keys", missing), ("unexpected keys", unexpected))
        if keys
    ]
    for key in sorted(shapes)[:3]:
        parts.append(f"{key} is {list(state[key].shape)}, the model has {list(own[key].shape)}")
    raise CheckpointError(f"{source} does not fit {type(model).__name__}: {'; '.join(parts)}")


def _explain_attention(model: nn.Module, lost: list[int], extra: list[int]) -> str:
    """The difference and the remedy: only the model has attention in `lost`, only the checkpoint has it in `extra`."""
    if not lost:
        return (
            f"has attention for blocks {extra}, which this model lost. Load it into the full model, then convert that"
        )
    # Blocks without attention in either of them count as removed from the checkpoint as well.
    gone = sorted(set(find_blocks_without_attention(model.state_dict())) - set(extra) | set(lost))
    if not extra:
        return (
            f"has no attention for blocks {lost}: it was saved from a converted model. Load it with from_pretrained, or "
            f"into convert_vit(model, remove={gone})"
        )
    removed = sorted(set(gone) - set(lost) | set(extra))
    return (
        f"was saved from a model that had lost the attention of blocks {gone}, this one lost that of blocks {removed}. Load "
        f"it with from_pretrained, or into convert_vit(model, remove={gone}) of the full model"
    )


def parse_block_key(key: str) -> tuple[int, str] | None:
    """The index of the block and the name of its part that a key `blocks.<index>.<part>…` belongs to; None for other keys."""
    found = re.match(r"blocks\.(\d+)\.([^.]+)", key)
    return (int(found[1]), found[2]) if found else None


def find_blocks(state: Iterable[str], part: str | None = None) -> set[int]:
    """Indices of the blocks that have keys in `state`, of any part or of this one."""
    parsed = filter(None, map(parse_block_key, state))
    return {index for index, name in parsed if part in (None, name)}


def find_blocks_without_attention(state: Iterable[str]) -> list[int]:
    """Indices of the blocks that have keys in `state`, but none of an attention."""
    return sorted(find_blocks(state) - find_blocks(state, "attn"))


def _find_attention_blocks(keys: list[str]) -> list[int] | None:
    """The blocks that `keys` belong to; None if a key does not belong to the attention of a block."""
    parsed = [parse_block_key(key) for key in keys]
    if not all(found and found[1] in ATTENTION_PARTS for found in parsed):
        return None
    return sorted({found[0] for found in parsed})
