"""State dicts: reading them from files without running pickled code, and loading them strictly with explanations."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

# Names of the average that training scripts store beside the trained weights: state_dict_ema, model_ema, ema_model …
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)", re.IGNORECASE)

# What torch.compile, checkpointing and FSDP insert into keys, wherever they wrap a module.
_INSERTED = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

# The prefix of a network's keys: what precedes its patch embedding.
_PREFIX = re.compile(r"((?:[^.]+\.)*?)(?:patch_embed|embeds)\.")

# Counters that averages and profilers register among the weights.
_COUNTERS = ("n_averaged", "total_ops", "total_params")

_ALIGNMENT = 64  # bytes, of PyTorch's allocator on the CPU

# The parts that a block loses with its attention: `ls1` is in timm's Block, `gamma_1` in Eva's and BEiT's.
ATTENTION_PARTS = ("norm1", "attn", "ls1", "gamma_1")


def read_weights(path: str | Path, *, use_ema: bool | None = None) -> dict[str, Tensor]:
    """Read the state dict of a network from .safetensors, or from .pth/.pt/.bin/.tar without running pickled code.

    It may be nested in other entries, as trainers store it, and its keys may have a prefix.

    Args:
        path: The file.
        use_ema: Whether to use the average of a file that holds the trained weights and their average (EMA). None uses the
            average, as timm's `load_checkpoint` does, and warns.

    Raises:
        CheckpointError: The file is missing or damaged, or holds no state dict, several networks, or not the copy that
            `use_ema` requests.
    """
    path = Path(path)
    return find_network(read_file(path), path, use_ema=use_ema).state


@dataclass(frozen=True, eq=False)
class Network:
    """A state dict found in a file.

    Attributes:
        entries: The entries that lead to it; empty if it is the content of the file.
        prefix: What preceded its keys.
        state: Its tensors, without the prefix.
        beside: Keys next to it that belong to no network, such as those of a loss.
        complete: Whether it has a patch embedding.
    """

    entries: tuple[str, ...]
    prefix: str
    state: dict[str, Tensor]
    beside: tuple[str, ...]
    complete: bool

    @property
    def name(self) -> str:
        """The entries and the prefix, for messages."""
        return ".".join(filter(None, (*self.entries, self.prefix.rstrip(".")))) or "the file itself"


def find_network(content: object, path: Path, *, use_ema: bool | None = None) -> Network:
    """The network in the content of a file; the arguments are those of `read_weights`.

    Raises:
        CheckpointError: There is none, or several.
    """
    found = [network for entries, state in _find_states(content) for network in _split(entries, state)]
    # Other state dicts stand beside a network: those of losses, of metrics.
    found = [network for network in found if network.complete] or found
    averages = [network for network in found if _AVERAGE.search(network.name)]
    trained = [network for network in found if network not in averages]
    if not found:
        raise CheckpointError(f"{path} holds no state dict{_describe_entries(content)}")
    if len(averages) > 1 or len(trained) > 1:
        raise CheckpointError(
            f"{path} holds several networks: {', '.join(network.name for network in found)}. Save the state dict of the one "
            "to use to a file of its own"
        )
    usable = (averages or trained) if use_ema is None else averages if use_ema else trained
    if not usable:
        kind, remedy = (
            "not the trained weights",
            "pass the file as --weights without --no-ema, or read it without use_ema",
        )
        if use_ema:
            kind, remedy = "no average", "omit use_ema (--use-ema)"
        raise CheckpointError(f"{path} holds only {found[0].name}, {kind}; {remedy}")
    chosen = usable[0]
    if averages and trained and use_ema is None:
        warnings.warn(
            f"{path} holds the trained weights, {trained[0].name}, and their average, {chosen.name}. The average is used, as "
            "by timm; pass use_ema=False (--no-ema) for the trained weights",
            stacklevel=3,
        )
    if chosen.beside:
        warnings.warn(
            f"{path}: ignored {len(chosen.beside)} tensors beside those of {chosen.name} "
            f"({', '.join(chosen.beside[:3])}{' …' if len(chosen.beside) > 3 else ''})",
            stacklevel=3,
        )
    return chosen


def _describe_entries(content: object) -> str:
    if not isinstance(content, dict):
        return ""
    if not content:
        return ": it is empty"
    # Those that make it no state dict come first.
    entries = sorted(content.items(), key=lambda entry: isinstance(entry[1], Tensor))
    listed = ", ".join(f"{key} ({type(value).__name__})" for key, value in entries[:3])
    return f", which has only tensors: its entries are {listed}{' …' if len(entries) > 3 else ''}"


def _find_states(content: object, entries: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """All state dicts in the content of a file, with the entries that lead to them, apart from those of optimizers."""
    if not isinstance(content, dict) or not content:
        return
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        yield entries, content
        return
    for key, value in content.items():
        if isinstance(key, str) and "optim" not in key:
            yield from _find_states(value, (*entries, key))


def _split(entries: tuple[str, ...], state: dict[str, Tensor]) -> list[Network]:
    """The networks in a state dict: one for each prefix of a patch embedding; else the whole, which may be of anything."""
    named = {_INSERTED.sub("", key): value for key, value in state.items() if key.rpartition(".")[2] not in _COUNTERS}
    prefixes = sorted({match[1] for key in named if (match := _PREFIX.match(key))}, key=len, reverse=True)
    complete = bool(prefixes)
    if not complete:
        prefixes = ["module." if all(key.startswith("module.") for key in named) else ""]
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    beside = []
    for key, value in named.items():
        owner = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if owner is None:
            beside.append(key)
        else:
            parts[owner][key.removeprefix(owner)] = value
    return [Network(entries, prefix, part, tuple(beside), complete) for prefix, part in parts.items()]


def align(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` in memory that begins where PyTorch's own does, so that a model which is given it computes bit-equal outputs.

    Tensors of a .safetensors file begin at any multiple of their element size, and matrix products can depend on that.
    """
    return {name: value if value.data_ptr() % _ALIGNMENT == 0 else value.clone() for name, value in state.items()}


def read_file(path: str | Path) -> object:
    """The content of a safetensors or a pickled file, under any name, on the CPU.

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
        if _is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path)
        # As a file object, since newer torch.load (seen in 2.14) goes by the suffix of a path.
        with _plain_data_allowed(), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle each have their own kinds
        refused = _find_refused_globals(path) or _find_refused_global(error)
        if refused:
            raise CheckpointError(
                f"{path} cannot be read as weights: it requires {', '.join(refused)}, and code from a file never runs. If "
                "you trust it, load it where it was written and save only its state dict"
            ) from error
        raise CheckpointError(f"{path} cannot be read as weights ({explain_unreadable(path, error)})") from error


def _is_safetensors(path: Path) -> bool:
    """By the content, since files get renamed: the length of a JSON header and its first brace, or not PyTorch's own."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return True
    return path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))


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
