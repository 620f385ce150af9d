"""Memory with bounds: global, shared, local and parameter space. Every access is checked before it happens.

Section: "State Spaces". A vector access is aligned to its whole size ("Alignment" of the ld and st instructions).
Addresses of the spaces lie in windows of the generic address space, far from each other ("Generic Addressing"); shared,
local and parameter addresses of their own begin at 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .faults import ProgramError

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

UNSIGNED: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# Where each space begins among generic addresses, and which of them its own address 0 is.
WINDOW_BYTES = 0x0100_0000_0000
GLOBAL_WINDOW = 0x7F00_0000_0000
WINDOWS = {
    "global": (GLOBAL_WINDOW, 0),
    "shared": (0x0100_0000_0000, 0x0100_0000_0000),
    "local": (0x0200_0000_0000, 0x0200_0000_0000),
    "param": (0x0300_0000_0000, 0x0300_0000_0000),
}

_GUARD = 512  # bytes between two tensors


def aligned(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


class Space:
    """A state space: bytes, seen as words of each size, and the way from an access to its place in them."""

    name = ""

    def __init__(self, size: int) -> None:
        self.bytes: Bytes = np.zeros(aligned(max(size, 16), 16), np.uint8)
        self.views = {width: self.bytes.view(kind) for width, kind in UNSIGNED.items()}

    def locate(self, addresses: Indices, size: int, threads: Indices, writing: bool) -> Indices:
        """Offsets in `bytes` of accesses to `size` bytes at addresses of this space, by these threads."""
        raise NotImplementedError

    def _check(self, offsets: Indices, size: int, end: int) -> None:
        if offsets.size == 0:
            return
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high + size > end:
            raise ProgramError(
                f"access of {size} bytes at {self.name} address {low if low < 0 else high}, of {end} bytes"
            )
        if (offsets & (size - 1)).any():
            raise ProgramError(f"misaligned access of {size} bytes to {self.name} memory")


class GlobalMemory(Space):
    """The tensors of a launch. What lies between them, or between the rows of one, must not be touched."""

    name = "global"

    def __init__(self, size: int) -> None:
        """`size` has to hold the tensors with their guards: see `needed`."""
        super().__init__(size)
        self.used = _GUARD
        self.regions: list[tuple[int, int]] = []  # (offset, bytes)
        self.readable: Flags = np.zeros(self.bytes.size, np.bool_)
        self.writable: Flags = np.zeros(self.bytes.size, np.bool_)
        self._allowed: dict[tuple[int, bool], Flags] = {}

    @staticmethod
    def needed(*sizes: int) -> int:
        """Bytes of a memory that is to hold regions of these sizes."""
        return _GUARD + sum(aligned(size, 256) + _GUARD + 256 for size in sizes)

    def add(self, data: Bytes, *, writable: bool = False, valid: Flags | None = None, misalignment: int = 0) -> int:
        """Copy `data` into a region of its own and return its address, 256-byte aligned plus `misalignment`.

        `valid` says which bytes belong to the tensor; all of them by default.
        """
        start = aligned(self.used, 256) + misalignment
        end = start + data.size
        if end + _GUARD > self.bytes.size:
            raise ValueError(
                f"global memory of {self.bytes.size} bytes is too small for {data.size} more; see needed()"
            )
        self.bytes[start:end] = data
        self.readable[start:end] = True if valid is None else valid
        if writable:
            self.writable[start:end] = self.readable[start:end]
        self.used = end + _GUARD
        self.regions.append((start, data.size))
        self._allowed.clear()
        return GLOBAL_WINDOW + start

    def read(self, address: int, size: int) -> Bytes:
        """The bytes from an address that `add` returned."""
        start = address - GLOBAL_WINDOW
        return self.bytes[start : start + size]

    def locate(self, addresses: Indices, size: int, threads: Indices, writing: bool) -> Indices:
        offsets = addresses - GLOBAL_WINDOW
        inside = (offsets >= 0) & (offsets + size <= self.bytes.size)
        if not inside.all():
            raise ProgramError(self._outside(addresses[~inside], size, writing))
        if (offsets & (size - 1)).any():
            raise ProgramError(f"misaligned access of {size} bytes to global memory")
        fine = self._all(size, writing)[offsets // size]
        if not fine.all():
            raise ProgramError(self._outside(addresses[~fine], size, writing))
        return offsets

    def _all(self, size: int, writing: bool) -> Flags:
        """Of every aligned word of `size` bytes, whether all of it may be read or written."""
        key = (size, writing)
        if key not in self._allowed:
            bytes_ = self.writable if writing else self.readable
            self._allowed[key] = np.asarray(bytes_[: bytes_.size // size * size].reshape(-1, size).all(1))
        return self._allowed[key]

    def _outside(self, addresses: Indices, size: int, writing: bool) -> str:
        offset = int(addresses[0]) - GLOBAL_WINDOW
        nearest = min(self.regions, key=lambda r: max(r[0] - offset, offset - r[0] - r[1]), default=None)
        where = "" if nearest is None else f"; byte {offset - nearest[0]} of the nearest one, of {nearest[1]}"
        what = "store" if writing else "load"
        allowed = "a tensor that was passed to be written" if writing else "every tensor that was passed"
        return f"global {what} of {size} bytes outside of {allowed} ({addresses.size} threads){where}"


class SharedMemory(Space):
    """The shared memory of blocks that run together, one behind the other. It begins as NaN of every floating type."""

    name = "shared"

    def __init__(self, size: int, blocks: int, block_of_thread: Indices) -> None:
        self.size, self.blocks = size, blocks
        # A swizzle of 128 bytes repeats every 1024; past the end, so that patterns can be computed before they are checked.
        self.stride = aligned(size, 1024) + 1024
        super().__init__(self.stride * blocks)
        self.bytes.fill(0xFF)
        self.starts = block_of_thread * self.stride

    def locate(self, addresses: Indices, size: int, threads: Indices, writing: bool) -> Indices:
        self._check(addresses, size, self.size)
        return addresses + self.starts[threads]

    def in_block(self, addresses: Indices, size: int, block: int) -> Indices:
        """Offsets in `bytes` of addresses in one block's memory."""
        self._check(addresses, size, self.size)
        return addresses + block * self.stride


class LocalMemory(Space):
    """Each thread's own memory, where arrays are that registers cannot hold."""

    name = "local"

    def __init__(self, size: int, threads: int) -> None:
        self.size, self.stride = size, aligned(size, 16)
        super().__init__(self.stride * threads)
        self.bytes.fill(0xFF)

    def locate(self, addresses: Indices, size: int, threads: Indices, writing: bool) -> Indices:
        self._check(addresses, size, self.size)
        return addresses + threads * self.stride


class ParameterMemory(Space):
    """The launch's parameters, which all threads share and none writes."""

    name = "param"

    def __init__(self, data: Bytes) -> None:
        super().__init__(data.size)
        self.size = data.size
        self.bytes[: data.size] = data

    def locate(self, addresses: Indices, size: int, threads: Indices, writing: bool) -> Indices:
        if writing:
            raise ProgramError("store to parameter memory")
        self._check(addresses, size, self.size)
        return addresses
