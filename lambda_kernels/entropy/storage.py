"""The states of entropy meters as plain dictionaries, checked when they come back, and as files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from ..files import atomic_write, remove_leftovers
from ..ops.histogram.grids import dyadic_grid
from ..ops.histogram.reference import MEAN_LOW, MOMENTS
from .state import MeterSpec, State, canonical

FORMAT = 2
_COLUMNS = {1: 5, FORMAT: MOMENTS}  # of `moments`; format 1 has no low parts
TENSORS = ("moments", "counts", "outside", "grid")
_KEYS = {"format", "options", "updates", *TENSORS}


def pack(spec: MeterSpec, state: State | None, options: dict, updates: int) -> dict:
    """A meter's state in its canonical form: the same data gives the same counts and grid, however it was split.

    Returns:
        `format`, `options`, `updates`, and on the CPU, None where there is nothing: `moments` float64 [K, 7] (count, mean,
        M2, the low parts of these two, minimum, maximum), `counts` int64 [K, bins], `outside` int64 [K, 2], and of a dyadic
        grid `grid` float64 [K, 3] (anchor, inverse width, first).
    """
    tensors = dict.fromkeys(TENSORS)
    if state is not None:
        held = canonical(spec, state).map(lambda tensor: tensor.detach().cpu().clone())
        grid = None if held.grid is None else held.grid[:, :3].clone()
        tensors = {"moments": held.moments, "counts": held.counts, "outside": held.outside, "grid": grid}
    return {"format": FORMAT, "options": options, "updates": updates, **tensors}


def unpack(spec: MeterSpec, stored: object, options: dict) -> tuple[State | None, int]:
    """The inverse of `pack`: a state on the CPU, and the number of updates; ValueError says what is wrong."""
    if not isinstance(stored, dict) or "format" not in stored:
        raise ValueError("not the state of an entropy meter: it has no 'format'")
    columns = _COLUMNS.get(stored["format"]) if type(stored["format"]) is int else None
    if columns is None:
        listed = " and ".join(map(str, _COLUMNS))
        raise ValueError(f"the state has format {stored['format']!r}; this version reads {listed}")
    if missing := sorted(_KEYS - stored.keys()):
        raise ValueError(f"damaged state: {', '.join(missing)} missing")
    if stored["options"] != options:
        raise ValueError(f"the state belongs to {stored['options']}, this meter is {options}")
    updates = stored["updates"]
    if type(updates) is not int or updates < 0:
        raise ValueError(f"damaged state: updates must be a whole number from 0; got {updates!r}")
    if stored["moments"] is None:
        if present := [name for name in TENSORS if stored[name] is not None]:
            raise ValueError(f"damaged state: {', '.join(present)} without moments")
        return None, updates
    moments = _checked(stored, "moments", (None, columns), torch.float64)
    if columns < MOMENTS:
        low = torch.zeros_like(moments[:, :2])  # format 1 stored no low parts
        moments = torch.cat((moments[:, :MEAN_LOW], low, moments[:, MEAN_LOW:]), dim=1)
    rows = len(moments)
    if spec.per == "layer" and rows != 1:
        raise ValueError(f"damaged state: moments of {rows} rows for one layer")
    count, mean, m2, mean_low, m2_low, low, high = moments.unbind(1)
    if not (moments.isfinite().all() and (count >= 1).all() and (count == count.floor()).all()):
        raise ValueError("damaged state: moments hold NaN, infinity, or counts that are no whole numbers from 1")
    if not ((m2 >= 0).all() and (low <= high).all()):
        raise ValueError("damaged state: moments hold a negative M2, or a minimum above its maximum")
    if not (torch.equal(mean + mean_low, mean) and torch.equal(m2 + m2_low, m2)):
        raise ValueError("damaged state: moments hold a low part that is more than the rounding of the mean or of M2")
    if spec.kind == "gaussian":
        return State(moments), updates
    counts = _checked(stored, "counts", (rows, spec.bins), torch.int64)
    outside = _checked(stored, "outside", (rows, 2), torch.int64)
    if not ((counts >= 0).all() and (outside >= 0).all()):
        raise ValueError("damaged state: counts or outside are negative")
    if not torch.equal(counts.sum(1) + outside.sum(1), count.long()):
        raise ValueError("damaged state: counts and outside do not add up to the number of values in moments")
    if not spec.grows:
        return State(moments, counts, outside), updates
    grid = dyadic_grid(low, high, spec.bins).packed()
    if not torch.equal(_checked(stored, "grid", (rows, 3), torch.float64), grid[:, :3]):
        raise ValueError("damaged state: grid is not that of the minimum and maximum in moments")
    return State(moments, counts, outside, grid), updates


def _checked(stored: dict, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
    tensor = stored[name]
    if not isinstance(tensor, Tensor):
        raise ValueError(f"damaged state: {name} must be a tensor; got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits or tensor.numel() == 0 or tensor.layout != torch.strided:
        wanted = ["K" if size is None else size for size in shape]
        raise ValueError(f"damaged state: {name} must be {dtype} {wanted}; got {tensor.dtype} {list(tensor.shape)}")
    return tensor.detach().cpu().clone()


def write(path: str | Path, name: str, stored: dict) -> None:
    """Write a packed state atomically, with a checksum: `path` holds what it held before, or all of the new state."""
    remove_leftovers(path)
    with atomic_write(path) as temporary:
        torch.save({"name": name, "state": stored, "sha256": _digest(name, stored)}, temporary)


def read(path: str | Path) -> tuple[str, dict]:
    """The name and the packed state that `write` wrote; ValueError if the file is missing, damaged or something else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not {"name", "state", "sha256"} <= content.keys():
            raise ValueError("it holds no name, state and sha256")
        name, stored = content["name"], content["state"]
        if not isinstance(name, str) or not isinstance(stored, dict) or content["sha256"] != _digest(name, stored):
            raise ValueError("its content does not match its checksum")
    except OSError as error:
        raise ValueError(f"cannot read the entropy meter {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can cause any error of the reader
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} while it was read"
        raise ValueError(f"{path} is damaged or no entropy meter: {reason}") from error
    return name, stored


def _digest(name: str, stored: dict) -> str:
    digest = hashlib.sha256()
    plain = {key: value for key, value in stored.items() if not isinstance(value, Tensor)}
    digest.update(json.dumps([name, plain], sort_keys=True, default=repr).encode())
    for key in sorted(stored.keys() - plain.keys()):
        tensor = stored[key]
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
