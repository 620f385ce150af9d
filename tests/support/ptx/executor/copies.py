"""Asynchronous copies: cp.async groups, mbarriers, and tensor copies by descriptors.

Sections: "cp.async" with its groups, "Parallel Synchronization and Communication Instructions: mbarrier", "Tensors",
"cp.async.bulk.tensor". What is early and late is `State.order`; both are right for a program that waits as it must.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import numpy as np

from .faults import ProgramError, UnsupportedInstructionError
from .memory import Bytes, Flags, GlobalMemory, Indices
from .races import Times
from .state import Action, Mask, State, instruction, write
from .syntax import Instruction


@dataclass(frozen=True)
class TensorMap:
    """A matrix in global memory and the box that one copy moves ("Tensors": boxes, out-of-bound access, swizzling modes).

    `swizzle` is 0 … 3: no, or lines of 32, 64, 128 bytes. With b = `swizzle` bits, address bits 4 … 4+b−1 of shared memory
    are joined by exclusive or with bits 7 … 7+b−1: 16-byte pieces of neighbouring lines change places.
    """

    address: int
    shape: tuple[int, int]  # rows, columns
    stride: int  # bytes from row to row
    box: tuple[int, int]
    itemsize: int
    swizzle: int

    def __post_init__(self) -> None:
        line = self.box[1] * self.itemsize
        if self.address % 16 or self.stride % 16:
            raise ProgramError(
                f"tensor map: address {self.address:#x} and row stride {self.stride} must be multiples of 16 bytes"
            )
        if not all(0 < extent <= 256 for extent in self.box):
            raise ProgramError(f"tensor map: a box of {self.box} has an extent outside of 1 to 256")
        if line % 16:
            raise ProgramError(f"tensor map: lines of a box must be multiples of 16 bytes; got {line}")
        if self.swizzle and line > 16 << self.swizzle:
            raise ProgramError(
                f"tensor map: a box line of {line} bytes is wider than its swizzle of {16 << self.swizzle}"
            )

    @property
    def bytes(self) -> int:
        """Of a box, whatever part of it lies in the matrix."""
        return self.box[0] * self.box[1] * self.itemsize

    def pieces(self, start: int) -> Indices:
        """Addresses in shared memory of the box's 16-byte pieces, in the order of its rows."""
        plain = start + 16 * np.arange(self.bytes // 16)
        return swizzled(plain, self.swizzle)

    def _part(self, row: int, column: int) -> tuple[slice, slice, Indices]:
        """Rows and bytes of the box that lie in the matrix, and the global address of each of these rows."""
        rows = slice(max(0, -row), max(0, min(self.box[0], self.shape[0] - row)))
        columns = slice(
            self.itemsize * max(0, -column), self.itemsize * max(0, min(self.box[1], self.shape[1] - column))
        )
        first = (
            self.address + (row + np.arange(self.box[0])[rows]) * self.stride + column * self.itemsize + columns.start
        )
        return rows, columns, first

    def load(self, memory: GlobalMemory, row: int, column: int) -> Bytes:
        """[pieces, 16]: the box at (row, column), zero outside of the matrix."""
        box = np.zeros((self.box[0], self.box[1] * self.itemsize), np.uint8)
        rows, columns, first = self._part(row, column)
        width = columns.stop - columns.start
        if first.size and width > 0:
            places = first[:, None] + self.itemsize * np.arange(width // self.itemsize)
            offsets = memory.locate(places.reshape(-1), self.itemsize, places, False)
            values = memory.views[self.itemsize][offsets // self.itemsize]
            box[rows, columns] = values.view(np.uint8).reshape(first.size, width)
        return box.reshape(-1, 16)

    def store(self, memory: GlobalMemory, row: int, column: int, data: Bytes) -> None:
        """Write what of the box [pieces, 16] lies in the matrix."""
        rows, columns, first = self._part(row, column)
        width = columns.stop - columns.start
        if first.size and width > 0:
            places = first[:, None] + self.itemsize * np.arange(width // self.itemsize)
            offsets = memory.locate(places.reshape(-1), self.itemsize, places, True)
            part = np.ascontiguousarray(data.reshape(self.box[0], -1)[rows, columns])
            view = memory.views[self.itemsize]
            view[offsets // self.itemsize] = part.view(view.dtype).reshape(-1)


def swizzled(addresses: Indices, bits: int) -> Indices:
    """Shared addresses as a swizzle of 0 … 3 bits maps them."""
    if not bits:
        return addresses
    return addresses ^ ((addresses >> 7 & ((1 << bits) - 1)) << 4)


# cp.async


@dataclass(eq=False)
class _Copy:
    """Copies of one instruction that are under way, with the number of the group that each thread puts them in."""

    threads: Indices
    to: Indices  # offsets in shared memory
    source: Indices  # global addresses
    given: Indices  # bytes that are read; the others become zero
    size: int
    group: Indices
    time: Times | None
    done: Flags


class Copies:
    """`cp.async` of all threads. A thread's group is what it copied since its last commit."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.commits: Indices = np.zeros(state.threads, np.int64)
        self.under_way: list[_Copy] = []

    def perform(self, copy: _Copy, chosen: Flags) -> None:
        """Read and write now, for these of its threads."""
        memory = self.state.spaces["global"]
        now = chosen & ~copy.done
        for given in np.unique(copy.given[now]):
            those = now & (copy.given == given)
            data = np.zeros((int(those.sum()), copy.size), np.uint8)
            if given:
                # Each element is checked for itself: `given` need not be a power of two.
                step = min(8, int(given & -given))
                places = copy.source[those][:, None] + np.arange(0, given, step)
                if (copy.source[those] % copy.size).any():
                    raise ProgramError(f"misaligned cp.async of {copy.size} bytes")
                offsets = memory.locate(places.reshape(-1), step, copy.threads[those], False)
                data[:, :given] = memory.views[step][offsets // step].view(np.uint8).reshape(-1, given)
            self.state.shared.bytes[copy.to[those][:, None] + np.arange(copy.size)] = data
        copy.done |= now

    def wait(self, threads: Indices, pending: int | None) -> None:
        """All but the `pending` latest groups of these threads are done; of None, what is in no group yet too."""
        limit = np.full(self.state.threads, -1)
        limit[threads] = self.commits[threads] if pending is None else self.commits[threads] - pending - 1
        left = []
        for copy in self.under_way:
            chosen = copy.group <= limit[copy.threads]
            self.perform(copy, chosen)
            if copy.time is not None and self.state.clocks is not None and chosen.any():
                those = copy.threads[chosen]
                self.state.clocks.wait_copies(self.state.block[those], self.state.warp[those], copy.time[chosen])
            kept = ~chosen
            if kept.any():
                rest = {
                    name: getattr(copy, name)[kept] for name in ("threads", "to", "source", "given", "group", "done")
                }
                time = None if copy.time is None else copy.time[kept]
                left.append(replace(copy, **rest, time=time))
        self.under_way = left


def _cp_async(state: State, i: Instruction) -> Action:
    """16, 8 or 4 bytes of each thread to shared memory; fewer are read where a source size is given, the rest is zero."""
    size = state.integer(i.operands[2])
    to, source = state.address(i.operands[0]), state.address(i.operands[1])
    given = state.source(i.operands[3], "u32") if len(i.operands) > 3 else np.asarray(np.uint32(size))
    part: Copies = state.part(Copies)

    def run(mask: Mask) -> None:
        threads = state.select(mask)
        bytes_ = np.minimum(np.broadcast_to(given, state.threads)[threads].astype(np.int64), size)
        offsets = state.shared.locate(to()[threads], size, threads, True)
        time = None
        if state.clocks is not None:
            time = state.clocks.copy(offsets, size, state.block[threads], state.warp[threads])
        done = np.zeros(threads.size, np.bool_)
        copy = _Copy(threads, offsets, source()[threads], bytes_, size, part.commits[threads], time, done)
        if state.order.loads:
            part.perform(copy, ~done)
        part.under_way.append(copy)

    return run


# mbarriers


@dataclass(eq=False)
class _Barrier:
    """An mbarrier: the phase completes when neither arrivals nor bytes are pending; then it is the next one's turn."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0  # completed phases
    completed: list[tuple[int, int]] = field(default_factory=list)  # agents and times of loads

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass(eq=False)
class _Box:
    """A tensor copy: a load that completes on an mbarrier, or a store of a bulk group."""

    map: TensorMap
    row: int
    column: int
    start: int  # in shared memory
    block: int
    barrier: int = -1
    agent: int = 0
    time: int = 0
    data: Bytes | None = None


class Tensors:
    """mbarriers and tensor copies of all blocks."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.barriers: dict[tuple[int, int], _Barrier] = {}
        self.loads: list[_Box] = []
        self.stores: dict[int, list[_Box]] = {}  # of each thread: not in a group yet …
        self.groups: dict[int, list[list[_Box]]] = {}  # … and in groups

    def barrier(self, block: int, address: int) -> _Barrier:
        if (block, address) not in self.barriers:
            raise ProgramError(f"mbarrier at {address} is not initialized")
        return self.barriers[block, address]

    def _offsets(self, box: _Box) -> Indices:
        if box.start % 128:
            raise ProgramError(f"tensor copy: address {box.start} in shared memory is not a multiple of 128 bytes")
        return self.state.shared.in_block(box.map.pieces(box.start), 16, box.block)

    def start_load(self, box: _Box, warp: int) -> None:
        self.barrier(box.block, box.barrier)
        if self.state.clocks is not None:
            offsets = self._offsets(box)
            box.agent, box.time = self.state.clocks.write_by(box.barrier, offsets, 16, box.block, warp)
        if self.state.order.loads:
            self._load(box)
        else:
            self.loads.append(box)

    def _load(self, box: _Box) -> None:
        memory = self.state.spaces["global"]
        assert isinstance(memory, GlobalMemory)
        data = box.map.load(memory, box.row, box.column)
        self.state.shared.bytes.reshape(-1, 16)[self._offsets(box) // 16] = data
        barrier = self.barrier(box.block, box.barrier)
        barrier.bytes -= box.map.bytes
        if self.state.clocks is not None:
            self.state.clocks.complete(box.barrier, box.agent, box.time, box.block)
        barrier.settle()

    def is_complete(self, block: int, address: int, parity: int) -> bool:
        """Whether the phase of this parity is over; what is under way for it comes now at the latest."""
        barrier = self.barrier(block, address)
        for box in [b for b in self.loads if (b.block, b.barrier) == (block, address)]:
            if barrier.phase % 2 != parity:
                break
            self.loads.remove(box)
            self._load(box)
        return barrier.phase % 2 != parity

    def start_store(self, box: _Box, thread: int, warp: int) -> None:
        clocks = self.state.clocks
        if clocks is not None:
            box.agent, box.time = clocks.stores, clocks.start(clocks.stores, box.block)
            clocks.read_by(box.agent, box.time, self._offsets(box), 16, box.block, slice(warp, warp + 1))
        if self.state.order.stores:
            self._read(box)
        self.stores.setdefault(thread, []).append(box)

    def _read(self, box: _Box) -> None:
        if box.data is None:
            box.data = self.state.shared.bytes.reshape(-1, 16)[self._offsets(box) // 16]

    def wait_stores(self, thread: int, pending: int) -> None:
        """All but the latest groups of a thread have read shared memory. When they write is not theirs to know."""
        groups = self.groups.get(thread, [])
        memory = self.state.spaces["global"]
        assert isinstance(memory, GlobalMemory)
        while len(groups) > pending:
            for box in groups.pop(0):
                self._read(box)
                assert box.data is not None
                box.map.store(memory, box.row, box.column, box.data)
                if self.state.clocks is not None:
                    warp = int(self.state.warp[thread])
                    self.state.clocks.learn(box.agent, box.time, box.block, slice(warp, warp + 1))

    def check_end(self) -> None:
        """Raise where something is under way although its threads have exited."""
        if self.loads:
            raise ProgramError(f"{len(self.loads)} tensor loads were never waited for")
        left = sum(map(len, self.stores.values())) + sum(map(len, self.groups.values()))
        if left:
            raise ProgramError(f"{left} tensor stores or groups of them were never waited for")


@instruction("mbarrier")
def _mbarrier(state: State, i: Instruction) -> Action:
    """init, inval, arrive with or without `expect_tx`, try_wait and test_wait by parity."""
    part: Tensors = state.part(Tensors)
    what = i.parts[1]
    if what in ("try_wait", "test_wait"):
        return _wait(state, i, part)
    held = what == "arrive" and len(i.operands) > 1 and not i.operands[0].startswith("[")
    operands = i.operands[1:] if held else i.operands
    if held and i.operands[0] != "_":
        raise UnsupportedInstructionError("state of a phase in a register")
    address = state.address(operands[0])
    given = state.source(operands[1], "u32") if len(operands) > 1 else None
    if what not in ("init", "inval", "arrive", "expect_tx"):
        raise UnsupportedInstructionError("operation")
    expects = "expect_tx" in i.parts

    def run(mask: Mask) -> None:
        places = address()
        for thread in state.select(mask):
            block, at = int(state.block[thread]), int(places[thread])
            number = 1 if given is None else int(np.broadcast_to(given, state.threads)[thread])
            state.shared.in_block(np.array([at]), 8, block)
            if what == "init":
                part.barriers[block, at] = _Barrier(number, number)
                continue
            barrier = part.barrier(block, at)
            if what == "inval":
                if any((box.block, box.barrier) == (block, at) for box in part.loads):
                    raise ProgramError("mbarrier invalidated while tensor loads are under way")
                del part.barriers[block, at]
                continue
            if expects:
                barrier.bytes += number
            if what == "arrive":
                barrier.pending -= 1 if expects else number
                if barrier.pending < 0:
                    raise ProgramError("more arrivals at an mbarrier than its phase expects")
                if state.clocks is not None:
                    state.clocks.arrive(at, block, int(state.warp[thread]))
            barrier.settle()

    return run


def _wait(state: State, i: Instruction, part: Tensors) -> Action:
    """Whether the phase with the given parity has completed: that of the current phase is `completed phases mod 2`."""
    if "parity" not in i.parts:
        raise UnsupportedInstructionError("state of a phase in a register")
    target = state.target(i.operands[0], "pred")
    address, parity = state.address(i.operands[1]), state.source(i.operands[2], "u32")
    waits = i.parts[1] == "try_wait"

    def run(mask: Mask) -> Flags | None:
        threads = state.select(mask)
        keys = np.stack([state.block[threads], address()[threads], np.broadcast_to(parity, state.threads)[threads]], 1)
        over = np.zeros(state.threads, np.bool_)
        for block, at, phase in np.unique(keys, axis=0):
            if part.is_complete(int(block), int(at), int(phase)):
                those = threads[(keys == (block, at, phase)).all(1)]
                over[those] = True
                if state.clocks is not None:
                    state.clocks.acquire(int(at), int(block), np.unique(state.warp[those]))
        write(target, over, mask)
        if not waits or over[threads].all():
            return None
        stalled = np.zeros(state.threads, np.bool_)
        stalled[threads] = ~over[threads]
        return stalled

    return run


@instruction("cp")
def _cp(state: State, i: Instruction) -> Action:
    """The family of asynchronous copies."""
    if i.parts[:3] == ("cp", "async", "bulk"):
        return _bulk(state, i)
    if i.parts[2] in ("ca", "cg"):
        return _cp_async(state, i)
    part: Copies = state.part(Copies)
    if i.parts[2] == "commit_group":

        def commit(mask: Mask) -> None:
            part.commits[state.select(mask)] += 1

        return commit
    if i.parts[2] not in ("wait_group", "wait_all"):
        raise UnsupportedInstructionError("operation")
    pending = state.integer(i.operands[0]) if i.operands else None

    def wait(mask: Mask) -> None:
        part.wait(state.select(mask), pending)

    return wait


def _bulk(state: State, i: Instruction) -> Action:
    """Tensor loads and stores of two dimensions, and the groups of stores."""
    part: Tensors = state.part(Tensors)
    if i.parts[3] == "commit_group":

        def commit(mask: Mask) -> None:
            for thread in state.select(mask):
                if boxes := part.stores.pop(int(thread), None):
                    part.groups.setdefault(int(thread), []).append(boxes)

        return commit
    if i.parts[3] == "wait_group":
        pending = state.integer(i.operands[0])

        def wait(mask: Mask) -> None:
            for thread in [t for t in part.groups if mask is None or mask[t]]:
                part.wait_stores(thread, pending)

        return wait
    if i.parts[3:5] != ("tensor", "2d") or "multicast::cluster" in i.parts or "im2col" in i.parts:
        raise UnsupportedInstructionError("kind of bulk copy")
    loads = i.parts[5].startswith("shared")
    to, of = (1, 0) if loads else (0, 1)
    found = re.fullmatch(r"\[\s*(\S+?)\s*,\s*\{([^}]*)\}\s*\]", i.operands[to])
    if found is None:
        raise UnsupportedInstructionError(f"operand {i.operands[to]}")
    described = state.source(found[1], "s64")
    columns, rows = (state.source(name.strip(), "s32") for name in found[2].split(","))
    starts = state.address(i.operands[of])
    barriers = state.address(i.operands[2]) if loads else None

    def run(mask: Mask) -> None:
        addresses, waited = starts(), barriers() if barriers is not None else None
        for thread in state.select(mask):

            def of_thread(values: np.ndarray, thread: int = thread) -> int:
                return int(np.broadcast_to(values, state.threads)[thread])

            place = of_thread(described)
            space, base = state.resolve(np.array([place]))
            if space != "param" or place - base not in state.maps:
                raise ProgramError("tensor copy: the descriptor's address is not that of a tensor map")
            box = _Box(
                state.maps[place - base],
                of_thread(rows),
                of_thread(columns),
                int(addresses[thread]),
                int(state.block[thread]),
            )
            warp = int(state.warp[thread])
            if waited is None:
                part.start_store(box, int(thread), warp)
            else:
                box.barrier = int(waited[thread])
                part.start_load(box, warp)

    return run
