"""Control flow: which threads execute which instruction next, and who waits for whom.

Threads at the same instruction execute together, under a mask where they are not all. Of several such parties the one that is
furthest behind goes first, so that the branches of a condition meet again where it ends. Sections: "Control Flow
Instructions", "bar, barrier", "bar.warp.sync".
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from . import arithmetic, conversions, matrices, movement  # noqa: F401  (they register their instructions)
from .copies import Tensors
from .faults import ProgramError, UnsupportedInstructionError
from .memory import Flags, GlobalMemory
from .state import DECODERS, EARLY, WARP, WARP_WIDE, Action, Array, Mask, Order, State
from .syntax import Instruction, Kernel
from .warpgroup import Products

_NAME = re.compile(r"[%$A-Za-z_][\w$@]*")
# Modules of instructions that only make registers of registers.
_PURE = (arithmetic.__name__, conversions.__name__)
_CONTROL = ("bra", "ret", "exit", "bar", "barrier", "trap")
_MOST_STEPS = 5_000_000
# Threads that execute together at the most: more blocks than this go one after the other.
_MOST_THREADS = 4096


@dataclass(eq=False)
class _Step:
    """A decoded instruction."""

    at: int
    instruction: Instruction
    action: Action | None  # None: control flow, which `_Machine` does
    guard: Array | None
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]
    warp_wide: bool
    target: int = -1
    passes_on: bool = False  # what was never written, without an error
    settled: bool = False  # its registers need no more checks
    count: int = 0


@dataclass(eq=False)
class _Party:
    """Threads at one instruction; `waits` says for what."""

    at: int
    mask: Flags
    waits: str = ""  # "", "barrier N", "lanes" or "mbarrier"


@dataclass
class Launched:
    """What was executed."""

    steps: int = 0  # instructions, each for all the threads that executed it together
    executed: Counter[str] = field(default_factory=Counter)  # by opcode


def launch(
    kernel: Kernel,
    memory: GlobalMemory,
    arguments: Sequence[bytes | object],
    *,
    grid: tuple[int, int, int],
    threads: int,
    shared: int = 0,
    order: Order = EARLY,
    watch: bool = True,
    strict: bool = True,
) -> Launched:
    """Execute every block of a grid.

    Args:
        arguments: Of each parameter its bytes, or a TensorMap for one of 128 bytes.
        threads: Of a block, in one dimension.
        shared: Bytes of dynamic shared memory of a block.
        order: When asynchronous work is done.
        watch: Whether races in shared memory are looked for.
        strict: Every use of a register that was never written is an error. Otherwise it may be copied and computed with, as
            nvcc does with unset members of a structure and Triton 3.6 in lanes whose sums nobody reads, but it may not decide a
            branch, be an address, or be stored.

    Raises:
        ProgramError: The program did what a GPU does not define, or waits for what never comes.
        UnsupportedInstructionError: The program has an instruction that is not known here.
    """
    data, maps = bytearray(), {}
    if len(arguments) != len(kernel.parameters):
        raise ValueError(f"{kernel.name} has {len(kernel.parameters)} parameters; got {len(arguments)} arguments")
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        data += bytes(-len(data) % parameter.alignment)
        if isinstance(argument, bytes):
            if len(argument) != parameter.size:
                raise ValueError(f"{parameter.name} has {parameter.size} bytes; got {len(argument)}")
            data += argument
        else:
            maps[len(data)] = argument
            data += bytes(parameter.size)
    blocks = [(x, y, z) for z, y, x in itertools.product(*(range(extent) for extent in reversed(grid)))]
    together = max(1, _MOST_THREADS // threads)
    done = Launched()
    for first in range(0, len(blocks), together):
        some = blocks[first : first + together]
        state = State(kernel, memory, bytes(data), maps, grid, some, threads, shared, order, watch)
        _Machine(state, strict).run(done)
    return done


class _Machine:
    def __init__(self, state: State, strict: bool) -> None:
        self.state, self.strict = state, strict
        self.steps = [self._decode(at, instruction) for at, instruction in enumerate(state.kernel.instructions)]

    # Decoding

    def _decode(self, at: int, i: Instruction) -> _Step:
        try:
            return self._decoded(at, i)
        except (UnsupportedInstructionError, KeyError, ValueError, IndexError) as error:
            raise UnsupportedInstructionError(f"line {i.line}: {i.text}: {error!r}") from error

    def _decoded(self, at: int, i: Instruction) -> _Step:
        state, base = self.state, i.parts[0]
        guard = state.row(i.guard) if i.guard else None
        reads, writes = self._registers(i)
        warp_wide = base in WARP_WIDE or i.parts[:2] == ("bar", "warp")
        action = None
        if base == "fence" or i.parts[:2] == ("bar", "warp") or base in ("membar", "griddepcontrol"):
            action = self._fence(i)
        elif base not in _CONTROL:
            if base not in DECODERS:
                raise UnsupportedInstructionError("no such instruction here")
            action = DECODERS[base](state, i)
        step = _Step(at, i, action, guard, reads, writes, warp_wide)
        pure = base == "shfl" or (base in DECODERS and DECODERS[base].__module__ in _PURE)
        step.passes_on = pure and not self.strict
        if base == "bra":
            step.target = state.kernel.labels[i.operands[0]]
        blocking = base in ("bar", "barrier") and action is None
        if blocking and ("sync" not in i.parts or len(i.operands) > 2 or not i.operands[0].isdigit()):
            raise UnsupportedInstructionError("kind of barrier")
        return step

    def _fence(self, i: Instruction) -> Action:
        """Fences order what is in order here anyhow; the race detector has to know of those between proxies."""
        state = self.state

        def run(mask: Mask) -> None:
            if state.clocks is not None and i.parts[:3] == ("fence", "proxy", "async"):
                state.clocks.fence(state.present(mask))

        return run

    def _registers(self, i: Instruction) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Registers that are read and written, as places in their banks."""
        state = self.state
        names = [_NAME.findall(operand) for operand in i.operands]
        stores = i.parts[0] in ("st", "red", "stmatrix", "bra", "bar", "barrier", "mbarrier", "cp", "fence", "wgmma")
        written = [] if stores or not names else names[0]
        if i.parts[:2] in (("mbarrier", "try_wait"), ("mbarrier", "test_wait")):
            written = names[0]
        read = list(itertools.chain(*names[1:] if written else names))
        if i.parts[:2] == ("wgmma", "mma_async"):
            read = list(itertools.chain(*names[1:]))  # whether accumulators are read too is seen when it executes
        if i.guard:
            read.append(i.guard)
        places = [[state.place[name] for name in group if name in state.place] for group in (read, written)]
        return places[0], places[1]

    # Running

    def run(self, done: Launched) -> None:
        """Until all threads have exited."""
        state = self.state
        self.full = np.ones(state.threads, np.bool_)
        self.parties = [_Party(0, self.full.copy())]
        self.left = _MOST_STEPS
        self.expected: dict[int, int] = {}  # threads that a barrier with a count waits for
        with np.errstate(all="ignore"):
            while self.parties:
                ready = [party for party in self.parties if not party.waits]
                if not ready:
                    self._deadlock()
                self._advance(min(ready, key=lambda party: party.at))
            if Tensors in state.parts:
                state.part(Tensors).check_end()
            if Products in state.parts:
                state.part(Products).check_end()
        for step in self.steps:
            if step.count:
                done.steps += step.count
                done.executed[".".join(step.instruction.parts)] += step.count

    def _deadlock(self) -> None:
        party = self.parties[0]
        step = self.steps[party.at]
        threads = sum(int(p.mask.sum()) for p in self.parties)
        raise ProgramError(
            f"deadlock: {threads} threads wait, the first at line {step.instruction.line} for {party.waits}: "
            f"{step.instruction.text}"
        )

    def _advance(self, party: _Party) -> None:
        """Execute until the party splits, waits, ends, or is not the one furthest behind any more."""
        state, steps = self.state, self.steps
        others = [other for other in self.parties if other is not party]
        behind = min((other.at for other in others if not other.waits), default=len(steps) + 1)
        meetings = {other.at for other in others if other.waits in ("", "lanes")}
        mask: Mask = None if party.mask.all() else party.mask
        at = start = party.at
        while True:
            if others and at != start and (at in meetings or at > behind):
                party.at = at
                self._merge()
                return
            if at >= len(steps):
                self._remove(party, party.mask)
                return
            step = steps[at]
            self.left -= 1
            if self.left < 0:
                raise ProgramError(f"more than {_MOST_STEPS} instructions")
            try:
                active = mask
                if step.guard is not None:
                    if not step.settled:
                        state.check(step.reads[-1:], [], mask)
                    chosen = ~step.guard if step.instruction.negated else step.guard
                    active = chosen if mask is None else chosen & mask
                    number = np.count_nonzero(active)
                    if number == state.threads:
                        active = None
                    elif number == 0:
                        at += 1
                        continue
                if step.action is None:
                    party.at = at
                    if self._control(party, step, active, others):
                        return
                    at, start = party.at, -1
                    continue
                if not step.settled:
                    step.settled = state.check(step.reads, step.writes, active, step.passes_on)
                if step.warp_wide and active is not None and self._lanes_wait(party, at, step, active):
                    if party not in self.parties:
                        self._merge()
                        return
                    active = mask = party.mask
                    others = [other for other in self.parties if other is not party]
                    meetings.add(at)
                step.count += 1
                stalled = step.action(active)
            except ProgramError as fault:
                if "line" in str(fault):
                    raise
                raise ProgramError(f"{fault}; at line {step.instruction.line}: {step.instruction.text[:200]}") from None
            at += 1
            start = -1
            if stalled is not None:
                party.at = at
                self._split(party, stalled, at - 1, "mbarrier")
                self._merge()
                return
            if others and step.instruction.parts[0] in ("mbarrier", "cp"):
                self._wake("mbarrier")
                party.at = at
                self._merge()
                return

    def _control(self, party: _Party, step: _Step, active: Mask, others: list[_Party]) -> bool:
        """Branches, ends and barriers. Returns whether the party's turn is over."""
        step.count += 1
        base = step.instruction.parts[0]
        whole = active is None or bool((active == party.mask).all())
        if base == "bra":
            if whole:
                party.at = step.target
                return False
            assert active is not None
            self._split(party, active, step.target, "")
            party.at += 1
            self._merge()
            return True
        if base == "trap":
            raise ProgramError("trap")
        if base in ("ret", "exit"):
            gone = party.mask if active is None else active
            party.at += 1
            self._remove(party, gone.copy())
            return True
        number = int(step.instruction.operands[0])
        if whole and not others and len(step.instruction.operands) == 1 and not self.state.exited.any():
            self._meet(party.mask)
            party.at += 1
            return False
        mask = party.mask.copy() if active is None else active
        if len(step.instruction.operands) > 1:
            self.expected[number] = int(step.instruction.operands[1])
        if whole:
            party.waits = f"barrier {number}"
        else:  # those without the guard go on
            self._split(party, mask, party.at, f"barrier {number}")
            party.at += 1
        self._release(number)
        return True

    def _release(self, number: int) -> None:
        """Let those go on in whose blocks all that are expected have come."""
        state = self.state
        waiting = [party for party in self.parties if party.waits == f"barrier {number}"]
        if waiting:
            come = np.any([party.mask for party in waiting], axis=0).reshape(-1, state.width)
            expected = self.expected.get(number, (~state.exited).reshape(-1, state.width).sum(1))
            complete = (come.sum(1) >= expected) & come.any(1)
            released = (complete[:, None] & come).reshape(-1)
            if released.any():
                self._meet(released)
                for party in waiting:
                    self._split(party, released & party.mask, party.at + 1, "")
        self._merge()

    def _meet(self, threads: Flags) -> None:
        if self.state.clocks is not None:
            self.state.clocks.meet(self.state.present(None if threads.all() else threads))

    def _lanes_wait(self, party: _Party, at: int, step: _Step, active: Flags) -> bool:
        """Threads of warps that are not here as a whole wait for their other lanes. Returns whether there are any."""
        alive = (~self.state.exited).reshape(-1, WARP)
        warps = active.reshape(-1, WARP)
        partly = (warps != alive).any(1) & warps.any(1)
        if not partly.any():
            return False
        if step.guard is not None and not (active == party.mask).all():
            raise ProgramError("part of a warp executes an instruction of the whole")
        party.at = at
        self._split(party, (partly[:, None] & warps).reshape(-1), at, "lanes")
        return True

    # Parties

    def _split(self, party: _Party, mask: Flags, at: int, waits: str) -> None:
        """Some of a party's threads become a party of their own."""
        if not mask.any():
            return
        self.parties.append(_Party(at, mask.copy(), waits))
        party.mask = party.mask & ~mask
        if not party.mask.any():
            self.parties.remove(party)

    def _remove(self, party: _Party, gone: Flags) -> None:
        """Threads have exited: barriers of their block expect them no more."""
        self.state.exited |= gone
        party.mask = party.mask & ~gone
        if not party.mask.any():
            self.parties.remove(party)
        for number in {party.waits for party in self.parties if party.waits.startswith("barrier")}:
            self._release(int(number.split()[1]))
        self._wake("lanes")
        self._merge()

    def _wake(self, reason: str) -> None:
        for party in self.parties:
            if party.waits == reason:
                party.waits = ""

    def _merge(self) -> None:
        """Parties at one instruction become one; lanes that were waited for may have come."""
        found: dict[tuple[int, str], _Party] = {}
        for party in self.parties:
            if party.waits == "lanes":
                arrivals = [p for p in self.parties if p is not party and p.at == party.at and p.waits in ("", "lanes")]
                if arrivals:
                    party.waits = ""
        for party in self.parties:
            key = (party.at, party.waits)
            if key in found:
                found[key].mask = found[key].mask | party.mask
            else:
                found[key] = party
        self.parties = list(found.values())
