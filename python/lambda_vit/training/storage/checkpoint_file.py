"""One checkpoint on disk: a file with the state, and a manifest beside it that says what the file has to be.

The manifest is renamed into place last. So a manifest proves that its file is complete, whenever the writer is killed.
"""

from __future__ import annotations

import collections
import datetime
import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from lambda_kernels._version import __version__
from lambda_kernels.checkpoints.weights import explain_unreadable
from lambda_kernels.files import atomic_writes, sha256

FORMAT = 1
FILE = re.compile(r"step-(\d{9,})(?:-\d+)?\.(?:pt|json)")
LEFTOVER = re.compile(r"\.(step-(\d{9,})(?:-\d+)?\.(?:pt|json))\.\d+-[0-9a-f]{8}\.tmp")

_VALUES = (bool, int, float, str, type(None))
# What the archive takes beyond the values of tensors, generously: headers and alignment of each storage, and pickles.
_PER_FILE, _PER_STORAGE, _PER_TENSOR, _PER_VALUE = 16 << 10, 512, 128, 16


class UnusableError(Exception):
    """Why a checkpoint cannot be used; the message names the file."""


@dataclass(frozen=True)
class Manifest:
    """The content of `step-….json`."""

    format: int
    step: int  # optimizer steps made
    file: str  # name of the file with the state, in the same folder
    bytes: int
    sha256: str
    order: int  # of writing, larger than in all earlier ones: nanoseconds since 1970 where the clock never went back
    created: str  # UTC
    versions: dict[str, str]  # of this package and of torch


def manifest_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.json"


def free_path(folder: Path, step: int) -> Path:
    """An unused name for the state of a step: an earlier state of it must last until the new one is complete."""
    stem = f"step-{step:09d}"
    names = (f"{stem}.pt" if number == 1 else f"{stem}-{number}.pt" for number in count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def prepare(state: Any) -> tuple[Any, int]:
    """The state with its tensors detached, and about how many bytes it takes as a file.

    TypeError names what `torch.load(weights_only=True)` could not read back.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    size = _PER_FILE

    def walk(value: Any, where: str) -> Any:
        nonlocal size
        # Exact types: what derives from them, as numpy's float64 from float, is pickled as something else.
        kind: Any = type(value)
        size += _PER_VALUE
        if kind in (Tensor, nn.Parameter):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                kinds = f"{value.layout}, {value.dtype}, {value.device}"
                raise TypeError(f"{where} is a tensor without plain storage ({kinds})")
            storage = value.untyped_storage()
            storages[value.device, storage.data_ptr()] = storage.nbytes()  # shared ones are written once
            size += _PER_TENSOR
            return value.detach()
        if kind in (dict, collections.OrderedDict):
            for key in value:
                if type(key) not in _VALUES:
                    raise TypeError(f"{where} has a key of type {kind_name(type(key))}")
                walk(key, where)
            return kind((key, walk(item, f"{where}[{key!r}]")) for key, item in value.items())
        if kind in (list, tuple):
            return kind(walk(item, f"{where}[{index}]") for index, item in enumerate(value))
        if kind in _VALUES:
            size += len(value.encode(errors="replace")) if kind is str else 0
            return value
        raise TypeError(f"{where} is a {kind_name(kind)}")

    try:
        plain = walk(state, "state")
    except TypeError as error:
        raise TypeError(
            f"{error}. A checkpoint holds dicts, lists and tuples of dense tensors, numbers, strings, bools and None"
        ) from None
    return plain, size + sum(_PER_STORAGE + nbytes for nbytes in storages.values())


def kind_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Recorder:
    """A file for `torch.save` that computes the digest on the way, and keeps the error that torch hides behind its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, block: memoryview) -> int:
        try:
            self.file.write(block)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self.digest.update(block)
        self.bytes += len(block)
        return len(block)

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, step: int, plain: Any, order: int) -> Manifest:
    """Write what `prepare` gave to `path`, a new file, and the manifest of its step, flushed to disk.

    If that fails, nothing is left behind, and the step's earlier manifest remains valid.
    """
    described = manifest_path(path.parent, step)
    recorder = None
    try:
        with atomic_writes([path, described]) as (data, text):
            with open(data, "wb") as file:
                recorder = _Recorder(file)
                torch.save(plain, recorder)  # type: ignore[arg-type]  # it writes, and needs no more of a file
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            versions = {"lambda-kernels": __version__, "torch": torch.__version__}
            digest = recorder.digest.hexdigest()
            manifest = Manifest(FORMAT, step, path.name, recorder.bytes, digest, order, now, versions)
            text.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    except Exception as error:
        if not _stands_for(described, path):  # the second rename failed
            path.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and recorder is not None and recorder.failure is not None:
            raise recorder.failure from error
        raise
    return manifest


def _stands_for(described: Path, path: Path) -> bool:
    try:
        return json.loads(described.read_bytes())["file"] == path.name
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or an earlier one that was damaged
        return False
    except OSError:  # it may be
        return True


def read_manifest(path: Path, step: int) -> Manifest:
    """The manifest at `path`, which its name says is of `step`; ValueError says how it is damaged."""
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}, which this version reads")
    kinds = {"format": int, "step": int, "file": str, "bytes": int, "sha256": str, "order": int, "created": str}
    for name, kind in (kinds | {"versions": dict}).items():
        if type(found.get(name)) is not kind:
            raise ValueError(f"{name} is {found.get(name)!r}")
    manifest = Manifest(**{field.name: found[field.name] for field in fields(Manifest)})
    named = FILE.fullmatch(manifest.file)
    if manifest.step != step or not named or int(named[1]) != step or not manifest.file.endswith(".pt"):
        raise ValueError(f"it is of step {manifest.step} and file {manifest.file!r}")
    return manifest


def wrong_size(folder: Path, manifest: Manifest) -> str:
    """What can be seen to be wrong without reading the file; empty: nothing."""
    try:
        found = (folder / manifest.file).stat().st_size
    except FileNotFoundError:
        return f"{manifest.file} is missing"
    except OSError as error:
        return f"{manifest.file} cannot be read ({error.strerror})"
    return "" if found == manifest.bytes else f"{manifest.file} has {found} bytes, {manifest.bytes} were written"


def read(folder: Path, manifest: Manifest) -> Any:
    """The state, its tensors on the CPU; UnusableError if the file is not what was written, or cannot be read."""
    if wrong := wrong_size(folder, manifest):
        raise UnusableError(wrong)
    name = manifest.file
    try:
        if sha256(folder / name) != manifest.sha256:
            raise UnusableError(f"{name} does not have the content that was written (its SHA-256 differs)")
        return torch.load(folder / name, map_location="cpu", weights_only=True)
    except (UnusableError, MemoryError):
        raise
    except OSError as error:
        raise UnusableError(f"{name} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # pickle, the archive and torch each have their own kinds
        raise UnusableError(f"{name} cannot be loaded ({explain_unreadable(folder / name, error)})") from error
