"""Batched histograms and moments: of each channel, layer or sample of many tensors in one read.

Counts are integers and the same on every device, whatever backend counts; `grids.py` defines the bins. The finite
values' number, mean, spread and extrema can come from the same read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendUnavailableError
from ..checks import FLOATING, check_choice, check_same_device, check_tensor, dtype_name
from . import _extension, reference
from .grids import CodeGrid, Grid
from .moments import Moments

BACKENDS = ("auto", "extension", "torch")
PER = reference.PER


class HistogramFallbackWarning(RuntimeWarning):
    """Histograms are counted by plain PyTorch, more slowly, because the extension cannot serve this device."""


@dataclass(frozen=True)
class Histogram:
    """What one call measured, K rows of it.

    Attributes:
        counts: int64 [K, bins]; [K, 0] without a grid.
        outside: int64 [K, 5]: values under the first bin, beyond the last one, NaN, +Inf, −Inf.
        moments: Of the finite values, those outside the bins included; None where they were not asked for.
        backend: What ran: "extension" or "torch".
        reason: Why that one.
    """

    counts: Tensor
    outside: Tensor
    moments: Moments | None
    backend: str
    reason: str


def histogram_backend(device: torch.device | str, dtype: torch.dtype, backend: str = "auto") -> tuple[str, str]:
    """Choose what counts, without counting.

    Args:
        device: Of the values.
        dtype: Of the values.
        backend: "auto", "extension" or "torch".

    Returns:
        "extension" or "torch", and the reason for it.

    Raises:
        ValueError: There is no such backend.
        BackendUnavailableError: "extension" was requested by name and has no code for `device` and `dtype`.
        ExtensionUnavailableError: "extension" was requested by name and cannot be loaded.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return "torch", 'backend="torch" was asked for'
    if backend == "extension":
        _extension.load()
    obstacle = _extension_obstacle(torch.device(device), dtype)
    if obstacle is None:
        kind = torch.device(device).type
        detail = f"CUDA: {_extension.build_info()['cuda']}" if kind == "cuda" else _extension.cpu_capability()
        return "extension", f"the extension has code for {kind} ({detail})"
    if backend == "extension":
        raise BackendUnavailableError(f'backend="extension" cannot run here: {obstacle}')
    return "torch", obstacle


def _extension_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in FLOATING:
        return f"the extension has no code for {dtype}"
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip):
        return f"the extension has no code for {'ROCm' if device.type == 'cuda' else device.type}"
    reason = _extension.why_unavailable()
    if reason or device.type == "cpu":
        return reason
    info = _extension.build_info()
    if info["cuda"] == "none":
        return "the extension was built without CUDA code; rebuild it with a CUDA toolkit and LAMBDA_KERNELS_CUDA=1"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if not _architectures_cover(info["architectures"], capability):
            major, minor = capability
            return (
                f"the extension was built for architectures {info['architectures']}, not for {major}.{minor}; rebuild it "
                f'with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
            )
    return None


def _architectures_cover(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures`, as in TORCH_CUDA_ARCH_LIST, runs on a device of `capability`."""
    for architecture in filter(None, architectures.split(";")):
        number, _, ptx = architecture.partition("+")
        major, _, minor = number.partition(".")
        if not (major.isdecimal() and minor.isdecimal()):
            # "9.0a" runs on nothing else, and a family's name ("Hopper") is not resolved here: the launch will tell.
            if number.rstrip("af") == f"{capability[0]}.{capability[1]}" or number.isalpha():
                return True
            continue
        built = (int(major), int(minor))
        if built <= capability and (built[0] == capability[0] or ptx):
            return True
    return False


def histogram(
    x: Tensor | Sequence[Tensor],
    grid: Grid | CodeGrid | None,
    *,
    per: str = "channel",
    statistics: bool = False,
    row_mask: Tensor | None = None,
    backend: str = "auto",
) -> Histogram:
    """Histograms of the channels, layers or samples of `x`, and their moments, in one read.

    Deterministic; the counts do not depend on the backend or the device. `x` is read where it lies if its dimensions, in
    whatever order, fold into as few strides as the operator takes: all of it into three for "layer", what is beside the
    channels or the samples into two. That holds for slices, transposed and permuted tensors; anything else is copied once.

    Args:
        x: A tensor, or a list of tensors of one dtype and device, measured in one call: float32, bfloat16, float16 or
            float64. `[..., C]` for "channel", any shape of at least one dimension for "layer", `[B, ...]` for "sample".
            Tensors may hold no values.
        grid: The bins of the K rows, on the device of `x` (for "mps", which has no float64: on the CPU); a `CodeGrid` for
            bfloat16; None: no counts.
        per: What has a row in the results: each "channel", each "layer" (tensor) or each "sample"; those of the tensors
            of a list one after the other.
        statistics: Take the moments, too.
        row_mask: bool [K], on the device of `grid`: the rows to measure; the others come back as if they had no values.
        backend: "extension" (C++ or CUDA), "torch", or "auto": the extension where it can run, else PyTorch with one
            notice per process.

    Returns:
        Counts and moments, on the device of `grid`, else on that of `x` (for "mps": on the CPU).

    Raises:
        TypeError: An argument has the wrong type or dtype, or the dtypes in a list differ.
        ValueError: The shapes or devices do not fit, or nothing is asked for.
        BackendUnavailableError: The backend requested by name has no code for `x`.
        ExtensionUnavailableError: The extension was requested by name and cannot be loaded.
    """
    tensors = _check_input(x, per)
    rows = _check_grid(tensors, grid, per, statistics)
    device = torch.device("cpu") if tensors[0].device.type == "mps" else tensors[0].device
    _check_row_mask(row_mask, rows, device)
    name, reason = histogram_backend(tensors[0].device, tensors[0].dtype, backend)
    sources = [_source(tensor, per) for tensor in tensors]
    packed = grid.packed() if isinstance(grid, Grid) else None
    row_mask = None if row_mask is None else row_mask.contiguous()
    arguments = (sources, packed, 0 if grid is None else grid.bins, PER.index(per), statistics, row_mask)
    if name == "extension":
        counts, outside, packed_moments = torch.ops.lambda_kernels.histogram(*arguments)
    else:
        if backend == "auto":
            _notice(reason)
        counts, outside, packed_moments = reference.histogram(*arguments)
    return Histogram(counts, outside, Moments.unpack(packed_moments) if statistics else None, name, reason)


def moments(x: Tensor | Sequence[Tensor], *, per: str = "channel", backend: str = "auto") -> Moments:
    """Count, mean, spread and extrema of the finite values; arguments and errors as for `histogram`."""
    return histogram(x, None, per=per, statistics=True, backend=backend).moments


def extrema(x: Tensor | Sequence[Tensor], *, per: str = "channel", backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The smallest and the largest finite value of each row; arguments and errors as for `histogram`.

    Returns:
        Two float64 tensors [K]; NaN for a row that has no finite value. Combine those of several batches with
        `torch.fmin` and `torch.fmax`, which pass over NaN.
    """
    found = moments(x, per=per, backend=backend)
    return found.minimum, found.maximum


_noticed = False


def _notice(reason: str) -> None:
    global _noticed
    if not _noticed:
        _noticed = True
        warnings.warn(f"histograms are counted by plain PyTorch: {reason}", HistogramFallbackWarning, stacklevel=3)


def _check_input(x: Tensor | Sequence[Tensor], per: str) -> list[Tensor]:
    check_choice("per", per, PER)
    several = isinstance(x, (list, tuple))
    named: dict[str, Any] = {f"x[{i}]": tensor for i, tensor in enumerate(x)} if several else {"x": x}
    if not named:
        raise ValueError("x must hold at least one tensor; got an empty list")
    for name, tensor in named.items():
        check_tensor(name, tensor)
        if tensor.dim() == 0:
            raise ValueError(f"{name} must have at least one dimension; got a single number, use {name}.reshape(1)")
    check_same_device(named)
    if len({tensor.dtype for tensor in named.values()}) > 1:
        listed = ", ".join(f"{name} {dtype_name(t.dtype)}" for name, t in named.items())
        raise TypeError(f"all tensors must have one dtype; got {listed}. Cast them, or measure each on its own")
    return list(named.values())


def rows_of(x: Tensor, per: str) -> int:
    """How many rows `x` has in the results."""
    return {"channel": x.shape[-1], "layer": 1, "sample": x.shape[0]}[per]


def _check_grid(x: list[Tensor], grid: object, per: str, statistics: bool) -> int:
    rows = sum(rows_of(tensor, per) for tensor in x)
    if grid is None:
        if not statistics:
            raise ValueError("grid is None and statistics is False: nothing is asked for; pass either")
    elif isinstance(grid, CodeGrid):
        if x[0].dtype != torch.bfloat16:
            raise TypeError(f"a CodeGrid counts bfloat16; got x of {x[0].dtype}, use uniform_grid or dyadic_grid")
    elif isinstance(grid, Grid):
        if grid.channels != rows:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in x)
            raise ValueError(f"grid has {grid.channels} rows, x of shape {shapes} has {rows} for per={per!r}")
        if not (x[0].device.type == "mps" and grid.device.type == "cpu"):
            check_same_device({"x": x[0], "grid": grid.anchor})
    else:
        raise TypeError(f"grid must be a Grid, a CodeGrid or None; got {type(grid).__name__}")
    return rows


def _check_row_mask(row_mask: object, rows: int, device: torch.device) -> None:
    if row_mask is None:
        return
    if not isinstance(row_mask, Tensor) or row_mask.dtype != torch.bool:
        got = row_mask.dtype if isinstance(row_mask, Tensor) else type(row_mask).__name__
        raise TypeError(f"row_mask must be a bool tensor; got {got}")
    if row_mask.shape != (rows,):
        raise ValueError(f"row_mask must have shape [K = {rows}]; got {list(row_mask.shape)}")
    if row_mask.device != device:
        raise ValueError(f"row_mask must be on {device}; got {row_mask.device}. Move it with .to(device) first")


def _source(x: Tensor, per: str) -> Tensor:
    """`x` as the operator takes it: [outer, rows, columns], in place where its strides allow it."""
    x = x.detach()
    if x.numel() == 0:
        return x.new_empty({"channel": (0, 0, x.shape[-1]), "layer": (0, 0, 0), "sample": (x.shape[0], 0, 0)}[per])
    dims = list(zip(x.shape, x.stride(), strict=True))
    before, free, after = {
        "channel": ([], dims[:-1], dims[-1:]),
        "layer": ([], dims, []),
        "sample": (dims[:1], dims[1:], []),
    }[per]
    free = _folded(free)
    most = 3 - len(before) - len(after)
    if len(free) > most:
        return _source(x.contiguous(), per)
    shape, strides = zip(*before, *[(1, 0)] * (most - len(free)), *free, *after, strict=True)
    return x.as_strided(shape, strides)


def _folded(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The fewest (size, stride) that reach the same elements, the widest stride first."""
    folded: list[tuple[int, int]] = []
    for size, stride in sorted((dim for dim in dims if dim[0] != 1), key=lambda dim: -dim[1]):
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    return folded
