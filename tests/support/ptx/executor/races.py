"""Who knows of whose accesses to shared memory: finds missing barriers, waits and proxy fences, whatever order was run.

Sections: "Memory Consistency Model" (causality order) and "Async proxy".

Agents of a block are its warps, each warp's `cp.async` copies, each warpgroup's products, the tensor loads that complete on
each mbarrier, and the block's tensor stores. An access is recorded with its agent and the agent's time. A later access of
the same bytes, one of the two being a write, is right only if the warp that makes it knows of that time: through a barrier,
a wait, or because it was its own. What a warp knows is a vector clock.

Ordinary (generic) writes are visible to the asynchronous proxy (wgmma, tensor copies) only after a `fence.proxy.async`:
`fenced` is what a warp knew at its last fence, and what other warps had fenced when it met them at a barrier.

Lanes of one warp are not told apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .faults import ProgramError
from .memory import Flags, Indices

Times = NDArray[np.int32]

_MOST_BARRIERS = 24  # mbarriers of a block that tensor copies complete on


class Clocks:
    """The knowledge of all warps of the blocks that run together, and the last accesses of each granule of their memory."""

    def __init__(self, blocks: int, warps: int, size: int, granule: int) -> None:
        """`size` bytes of shared memory a block; no access is smaller than `granule` bytes."""
        self.warps, self.granule = warps, granule
        self.groups = -(-warps // 4)
        self.copies = warps  # the first agent of each kind
        self.products = 2 * warps
        self.loads = self.products + self.groups
        self.stores = self.loads + _MOST_BARRIERS
        agents = self.stores + 1
        self.known: Times = np.zeros((blocks, warps, agents), np.int32)
        self.fenced: Times = np.zeros((blocks, warps, agents), np.int32)
        self.now: Times = np.ones((blocks, agents), np.int32)
        own = np.arange(warps)
        self.known[:, own, own] = 1
        count = blocks * (size // granule)
        self.writer: NDArray[np.int16] = np.zeros(count, np.int16)
        self.written: Times = np.zeros(count, np.int32)
        self.read_at: Times = np.zeros((count, agents), np.int32)
        # Atomic additions race with other accesses, but not with each other. Only made where there are any.
        self.added_at: Times | None = None
        self.barrier_slots: dict[int, int] = {}
        self.released: dict[tuple[int, int], tuple[Times, Times]] = {}  # by mbarrier: what arriving threads knew

    def _granules(self, offsets: Indices, size: int) -> Indices:
        return (offsets // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    # Ordinary accesses of threads

    def read(self, offsets: Indices, size: int, block: Indices, warp: Indices) -> None:
        """Threads of these blocks and warps read `size` bytes each."""
        granules = self._granules(offsets, size)
        self._check_written(granules, self.known[block, warp], "read", warp)
        if self.added_at is not None:
            self._check_others(self.added_at[granules], self.known[block, warp], "read", "added to", warp)
        self.read_at[granules, warp[:, None]] = self.now[block, warp][:, None]

    def write(self, offsets: Indices, size: int, block: Indices, warp: Indices) -> None:
        """Threads write."""
        granules = self._granules(offsets, size)
        self._check_written(granules, self.known[block, warp], "write", warp)
        self._check_others(self.read_at[granules], self.known[block, warp], "write", "read", warp)
        if self.added_at is not None:
            self._check_others(self.added_at[granules], self.known[block, warp], "write", "added to", warp)
        self.writer[granules] = warp[:, None]
        self.written[granules] = self.now[block, warp][:, None]

    def add(self, offsets: Indices, size: int, block: Indices, warp: Indices) -> None:
        """Threads add atomically."""
        if self.added_at is None:
            self.added_at = np.zeros_like(self.read_at)
        granules = self._granules(offsets, size)
        self._check_written(granules, self.known[block, warp], "atomic", warp)
        self._check_others(self.read_at[granules], self.known[block, warp], "atomic", "read", warp)
        self.added_at[granules, warp[:, None]] = self.now[block, warp][:, None]

    def _check_written(self, granules: Indices, known: Times, what: str, warp: Indices | int, proxy: str = "") -> None:
        """`known` [n, agents] of the n accesses."""
        writer = self.writer[granules]
        late = self.written[granules] > np.take_along_axis(known, writer.astype(np.int64), 1)
        if late.any():
            self._fault(late, granules, f"{what}{proxy} of what {self._name(int(writer[late][0]))} wrote", warp)

    def _check_others(self, times: Times, known: Times, what: str, before: str, warp: Indices | int) -> None:
        """`times` [n, granules, agents] of accesses that have to be known."""
        late = times > known[:, None, :]
        if late.any():
            agent = int(np.nonzero(late)[2][0])
            self._fault(np.asarray(late.any(2)), None, f"{what} of what {self._name(agent)} {before}", warp)

    def _fault(self, late: Flags, granules: Indices | None, what: str, warp: Indices | int) -> None:
        row = int(np.nonzero(late)[0][0])
        who = int(warp[row]) if isinstance(warp, np.ndarray) else warp
        raise ProgramError(
            f"race in shared memory: warp {who}: {what}, with no barrier, wait or fence between ({late.sum()} places)"
        )

    def _name(self, agent: int) -> str:
        if agent < self.copies:
            return f"warp {agent}"
        if agent < self.products:
            return f"cp.async of warp {agent - self.copies}"
        if agent < self.loads:
            return f"wgmma of warpgroup {agent - self.products}"
        return "a tensor store" if agent == self.stores else "a tensor load"

    # Asynchronous accesses, of one block

    def start(self, agent: int, block: int) -> int:
        """A new operation of an agent: its time."""
        self.now[block, agent] += 1
        return int(self.now[block, agent])

    def copy(self, offsets: Indices, size: int, block: Indices, warp: Indices) -> Times:
        """Each thread's `cp.async` writes; returns its time."""
        granules = self._granules(offsets, size)
        known = self.known[block, warp]
        self._check_written(granules, known, "cp.async", warp)
        self._check_others(self.read_at[granules], known, "cp.async", "read", warp)
        agent = self.copies + warp
        pairs = np.unique(np.stack([block, agent]), axis=1)
        self.now[pairs[0], pairs[1]] += 1
        time = self.now[block, agent]
        self.writer[granules] = agent[:, None]
        self.written[granules] = time[:, None]
        return time

    def wait_copies(self, block: Indices, warp: Indices, time: Times) -> None:
        """Threads have waited for their copies up to these times."""
        np.maximum.at(self.known, (block, warp, self.copies + warp), time)

    def read_by(self, agent: int, time: int, offsets: Indices, size: int, block: int, warps: slice) -> None:
        """A product or a tensor store, issued by `warps`, reads through the asynchronous proxy.

        None of them may be ahead of what another one does: a warpgroup's warps come to a product by themselves.
        """
        granules = self._granules(offsets, size)
        known = self.fenced[block, warps].min(0)[None].repeat(len(granules), 0)
        self._check_written(granules, known, "read", warps.start, " through the asynchronous proxy")
        self.read_at[granules, agent] = time

    def write_by(self, barrier: int, offsets: Indices, size: int, block: int, warp: int) -> tuple[int, int]:
        """A tensor load that completes on the mbarrier writes; returns its agent and time."""
        slot = self.barrier_slots.setdefault(barrier, len(self.barrier_slots))
        if slot >= _MOST_BARRIERS:
            raise NotImplementedError(f"tensor loads on more than {_MOST_BARRIERS} mbarriers")
        agent = self.loads + slot
        time = self.start(agent, block)
        granules = self._granules(offsets, size)
        known = self.known[block, warp][None].repeat(len(granules), 0)
        self._check_written(granules, known, "tensor load", warp)
        self._check_others(self.read_at[granules], known, "tensor load", "read", warp)
        self.writer[granules] = agent
        self.written[granules] = time
        return agent, time

    def learn(self, agent: int, time: int, block: int, warps: slice) -> None:
        """These warps have waited for an asynchronous operation."""
        for table in (self.known, self.fenced):
            table[block, warps, agent] = np.maximum(table[block, warps, agent], time)

    # Synchronization

    def fence(self, present: Flags) -> None:
        """Warps [blocks, warps] make what they know visible to the asynchronous proxy."""
        self.fenced[present] = self.known[present]

    def meet(self, present: Flags) -> None:
        """Warps [blocks, warps] meet at a barrier of their block."""
        for table in (self.known, self.fenced):
            together = np.where(present[:, :, None], table, 0).max(1, keepdims=True)
            np.copyto(table, together, where=present[:, :, None])
        self._advance(*np.nonzero(present))

    def arrive(self, barrier: int, block: int, warp: int) -> None:
        """A warp releases what it knows to those who wait for the mbarrier."""
        known, fenced = self.known[block, warp].copy(), self.fenced[block, warp].copy()
        if before := self.released.get((block, barrier)):
            known, fenced = np.maximum(known, before[0]), np.maximum(fenced, before[1])
        self.released[block, barrier] = known, fenced
        self._advance(np.array([block]), np.array([warp]))

    def complete(self, barrier: int, agent: int, time: int, block: int) -> None:
        """A tensor load has completed on the mbarrier."""
        nothing = np.zeros_like(self.known[block, 0])
        known, fenced = self.released.get((block, barrier), (nothing, nothing))
        known, fenced = known.copy(), fenced.copy()
        known[agent] = fenced[agent] = time
        self.released[block, barrier] = known, fenced

    def acquire(self, barrier: int, block: int, warps: Indices) -> None:
        """Warps that have waited for the mbarrier know what was released to it."""
        if before := self.released.get((block, barrier)):
            for table, times in zip((self.known, self.fenced), before, strict=True):
                table[block, warps] = np.maximum(table[block, warps], times)

    def _advance(self, block: Indices, warp: Indices) -> None:
        self.now[block, warp] += 1
        self.known[block, warp, warp] = self.now[block, warp]
