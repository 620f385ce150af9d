"""The states of entropy meters over the processes of a group.

Tensors of fixed shapes alone are exchanged: what every rank measures and how many rows it has, then the moments, from
which all ranks find the same grid, then the counts on that grid.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import NonFiniteActivationError
from ..ops.histogram import reference
from ..ops.histogram.grids import dyadic_grid, regrid_unchecked
from .state import MeterSpec, State, extremes

if TYPE_CHECKING:
    Group = dist.ProcessGroup | None  # None: all processes

_HEADER_BYTES = 4096


def all_reduce(
    spec: MeterSpec, state: State | None, options: dict[str, Any], updates: int, error: ValueError | None, group: Group
) -> tuple[State | None, int]:
    """Merge the states of all ranks, which is None for a rank that has seen nothing, and their numbers of updates.

    Counts are merged exactly, moments in the order of the ranks; the result is the same on every rank. `options` must be the
    same too. `error` says why this rank has no state to give; every rank raises it, as one of its class.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("all_reduce needs a process group; call torch.distributed.init_process_group first")
    device = _exchange_device(group)
    rows = 0 if state is None else state.rows
    # JSON makes up to twelve bytes of a character.
    text = None if error is None else str(error)[: _HEADER_BYTES // 16]
    not_finite = isinstance(error, NonFiniteActivationError)
    header = {"options": options, "rows": rows, "updates": updates, "error": text, "not_finite": not_finite}
    headers = _all_headers(header, device, group)
    _check_headers(headers, spec)
    updates = sum(header["updates"] for header in headers)
    all_rows = [header["rows"] for header in headers]
    if not any(all_rows):
        return None, updates
    home = device if state is None else state.device
    state = None if state is None else state.to(device)
    everything = _concatenated if spec.per == "sample" else _merged
    return everything(spec, state, all_rows, device, group).to(home), updates


def _exchange_device(group: Group) -> torch.device:
    """A device that the group's backend takes, chosen alike on ranks that have seen nothing."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _all_headers(header: dict[str, Any], device: torch.device, group: Group) -> list[dict[str, Any]]:
    text = json.dumps(header).encode()
    padded = torch.zeros(_HEADER_BYTES, dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    gathered = _all_gather(padded.to(device), group)
    return [json.loads(bytes(one.tolist()).rstrip(b"\0")) for one in gathered]


def _check_headers(headers: list[dict[str, Any]], spec: MeterSpec) -> None:
    first = headers[0]["options"]
    for rank, header in enumerate(headers):
        if header["options"] != first:
            raise ValueError(f"meters differ: rank 0 has {first}, rank {rank} has {header['options']}")
    for rank, header in enumerate(headers):
        if header["error"] is not None:
            kind = NonFiniteActivationError if header["not_finite"] else ValueError
            raise kind(f"rank {rank}: {header['error']}")
    rows = {rank: header["rows"] for rank, header in enumerate(headers) if header["rows"]}
    if spec.per != "sample" and len(set(rows.values())) > 1:
        listed = ", ".join(f"{number} on rank {rank}" for rank, number in rows.items())
        raise ValueError(f"meters have different numbers of channels: {listed}")


def _all_gather(tensor: Tensor, group: Group) -> list[Tensor]:
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor, group=group)
    return gathered


def _merged(spec: MeterSpec, state: State | None, all_rows: list[int], device: torch.device, group: Group) -> State:
    rows = max(all_rows)
    moments = reference.no_moments(rows, device)
    for part in _all_gather(moments if state is None else state.moments, group):
        moments = reference.merge_moments(moments, part)
    if spec.kind == "gaussian":
        return State(moments)
    grid = dyadic_grid(*extremes(moments), spec.bins) if spec.grows else None
    if state is None:
        counts = torch.zeros(rows, spec.bins, dtype=torch.int64, device=device)
        outside = torch.zeros(rows, 2, dtype=torch.int64, device=device)
    else:
        own = state.table if grid is None else regrid_unchecked(state.table, state.dyadic(spec.bins), grid)
        # The sums are written in place: into copies, since the state may yet be needed.
        counts, outside = (torch.empty_like(t).copy_(t) for t in (own, state.beyond))
    dist.all_reduce(counts, group=group)
    dist.all_reduce(outside, group=group)
    return State(moments, counts, outside, None if grid is None else grid.packed())


def _concatenated(
    spec: MeterSpec, state: State | None, all_rows: list[int], device: torch.device, group: Group
) -> State:
    shapes = {"moments": (reference.MOMENTS, torch.float64)}
    if spec.kind == "histogram":
        shapes |= {"counts": (spec.bins, torch.int64), "outside": (2, torch.int64)}
    if spec.grows:
        shapes["grid"] = (4, torch.float64)
    fields = {}
    for name, (columns, dtype) in shapes.items():
        padded = torch.zeros(max(all_rows), columns, dtype=dtype, device=device)
        if state is not None:
            padded[: state.rows] = getattr(state, name)
        gathered = _all_gather(padded, group)
        fields[name] = torch.cat([part[:rows] for part, rows in zip(gathered, all_rows, strict=True)])
    return State(**fields)
