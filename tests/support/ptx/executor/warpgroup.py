"""Products of a warpgroup, of operands in shared memory, which run while its threads go on.

Sections: "Asynchronous Warpgroup Level Matrix Instructions": "wgmma.mma_async", "Matrix fragments", "Shared memory matrix
layout", "Matrix-descriptor".

A product runs from its issue to the `wait_group` after its group's commit. Early, it is computed at the issue; late, at that
wait, from what shared memory holds then. A program that reads accumulators or overwrites operands between is found out by
one of the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from .copies import swizzled
from .faults import ProgramError, UnsupportedInstructionError
from .matrices import operand_values
from .memory import Flags, Indices
from .state import GROUP, Action, Array, Mask, State, instruction
from .syntax import Instruction

# Swizzle bits by the descriptor's layout field, bits 62–63.
_SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}


@dataclass(eq=False)
class _Product:
    """One instruction of the warpgroups that issued it."""

    number: int  # in the order of issue
    groups: Indices  # numbers of warpgroups among all blocks
    columns: int
    kind: str
    d: Indices  # rows of the accumulators in the bank of 32-bit registers
    a: Array | Indices  # descriptors of the groups, or rows of registers
    b: Array
    accumulates: Flags
    transposed: tuple[bool, bool]
    signs: tuple[float, float]


@dataclass(eq=False)
class _Issued:
    """What one warpgroup has issued: products of no group yet, and groups, with the race detector's time."""

    open: list[tuple[_Product, int]] = field(default_factory=list)  # and which of its groups this one is
    groups: list[tuple[list[tuple[_Product, int]], int]] = field(default_factory=list)


def tile_offsets(descriptor: int, rows: int, transposed: bool) -> Indices:
    """Shared addresses of the elements [rows, 16] of an operand of 16-bit elements; k is the second axis.

    With lines of a swizzle's width, 32, 64 or 128 bytes, eight of them make an atom. Not transposed, an element's k runs along
    a line and atoms of eight rows are `stride` bytes apart. Transposed, rows run along a line, in pieces of its width which are
    `leading` bytes apart, and atoms of eight k are `stride` bytes apart. The swizzle is one of addresses: see TensorMap.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    bits = _SWIZZLE[descriptor >> 62 & 3]
    if descriptor >> 49 & 7 or not bits:
        raise UnsupportedInstructionError("matrix descriptor with a base offset or without a swizzle")
    line = 16 << bits
    r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        width = line // 2
        plain = r // width * leading + r % width * 2 + k // 8 * stride + k % 8 * line
    else:
        plain = r // 8 * stride + r % 8 * line + k * 2
    return swizzled(start + plain, bits)


class Products:
    """What all warpgroups have under way."""

    def __init__(self, state: State) -> None:
        if state.width % GROUP:
            raise ProgramError(f"wgmma in a block of {state.width} threads, no multiple of {GROUP}")
        self.state = state
        self.count = 0
        self.issued: dict[int, _Issued] = {}
        self._tiles: dict[tuple[int, int, bool], Indices] = {}

    def _operand(self, product: _Product, which: int, groups: Indices, descriptors: Array) -> Array:
        """[groups, rows, 16] float32."""
        rows = product.columns if which else 64
        tiles = []
        for group, descriptor in zip(groups, descriptors, strict=True):
            key = (int(descriptor), rows, product.transposed[which])
            if key not in self._tiles:
                self._tiles[key] = tile_offsets(*key)
            tiles.append(self.state.shared.in_block(self._tiles[key], 2, int(group) * GROUP // self.state.width))
        words = self.state.shared.views[2][np.stack(tiles) // 2]
        return operand_values(words, product.kind)

    def note(self, product: _Product) -> None:
        """Tell the race detector what is read."""
        clocks = self.state.clocks
        if clocks is None:
            return
        for which, descriptors in ((0, product.a), (1, product.b)):
            if which == 0 and product.a.ndim == 2:
                continue
            for group, descriptor in zip(product.groups, descriptors, strict=True):
                block, own = divmod(int(group), self.state.width // GROUP)
                key = (int(descriptor), product.columns if which else 64, product.transposed[which])
                if key not in self._tiles:
                    self._tiles[key] = tile_offsets(*key)
                pieces = np.unique(self.state.shared.in_block(self._tiles[key], 2, block) // 16 * 16)
                agent = clocks.products + own
                time = int(clocks.now[block, agent])
                clocks.read_by(agent, time, pieces, 16, block, slice(4 * own, 4 * own + 4))

    def perform(self, product: _Product, numbers: list[int] | None = None) -> None:
        """D = A·B + D, for these of its groups or all.

        Register 4·j + 2·v + i of lane (g, t) of warp w: row 16·w + 8·v + g, column 8·j + 2·t + i."""
        chosen = slice(None) if numbers is None else np.array(numbers)
        groups, bank = product.groups[chosen], self.state.banks[4]
        count = len(groups)
        if product.a.ndim == 2:  # the fragment of mma.m16n8k16, for each warp
            words = np.ascontiguousarray(bank[product.a[0]].reshape(4, -1, GROUP)[:, groups])
            values = operand_values(words, product.kind).reshape(2, 2, count, 4, 8, 4, 2)  # h v group w g t j
            left = values.transpose(2, 3, 1, 4, 0, 5, 6).reshape(count, 64, 16)
        else:
            left = self._operand(product, 0, groups, product.a[chosen])
        right = self._operand(product, 1, groups, product.b[chosen])
        found = np.matmul(left, right.transpose(0, 2, 1)) * np.float32(product.signs[0] * product.signs[1])
        found = found.reshape(count, 4, 2, 8, product.columns // 8, 4, 2)  # group w v g j t i
        found = found.transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(product.d), count, GROUP)
        accumulators = bank.reshape(len(bank), -1, GROUP)
        where = np.ix_(product.d, groups)
        before = np.where(product.accumulates[chosen][:, None], accumulators[where].view(np.float32), np.float32(0))
        accumulators[where] = (found + before).view(np.uint32)

    def finish(self, groups: Indices, pending: int) -> None:
        """All but the `pending` latest groups of products of these warpgroups are done."""
        due: dict[int, tuple[_Product, list[int]]] = {}
        for group in map(int, groups):
            issued = self.issued.get(group, _Issued())
            block, own = divmod(group, self.state.width // GROUP)
            while len(issued.groups) > pending:
                products, time = issued.groups.pop(0)
                for product, number in products:
                    due.setdefault(product.number, (product, []))[1].append(number)
                if self.state.clocks is not None:
                    agent = self.state.clocks.products + own
                    self.state.clocks.learn(agent, time, block, slice(4 * own, 4 * own + 4))
        for _, (product, numbers) in sorted(due.items()):
            self.perform(product, numbers)

    def check_end(self) -> None:
        """Raise where products were never waited for."""
        if any(issued.open or issued.groups for issued in self.issued.values()):
            raise ProgramError("wgmma products were never waited for")


def _groups(state: State, mask: Mask) -> Indices:
    """Warpgroups that execute, each as a whole."""
    if mask is None:
        return np.arange(state.threads // GROUP)
    present = mask.reshape(-1, GROUP)
    if (present.any(1) != present.all(1)).any():
        raise ProgramError("part of a warpgroup executes an instruction of the whole")
    return np.flatnonzero(present.all(1))


def _of_groups(state: State, values: Array, groups: Indices, what: str) -> Array:
    """What all threads of each warpgroup agree on."""
    table = np.broadcast_to(values, state.threads).reshape(-1, GROUP)[groups]
    if (table != table[:, :1]).any():
        raise ProgramError(f"{what} differs between the threads of a warpgroup")
    return np.asarray(table[:, 0])


@instruction("wgmma", warp_wide=True)
def _wgmma(state: State, i: Instruction) -> Action:
    part: Products = state.part(Products)
    what = i.parts[1]
    if what == "fence":
        return lambda mask: None
    if what == "commit_group":

        def commit(mask: Mask) -> None:
            for group in _groups(state, mask):
                issued = part.issued.setdefault(int(group), _Issued())
                time = 0
                if state.clocks is not None:
                    block, own = divmod(int(group), state.width // GROUP)
                    time = int(state.clocks.now[block, state.clocks.products + own])
                    state.clocks.start(state.clocks.products + own, block)
                issued.groups.append((issued.open, time))
                issued.open = []

        return commit
    if what == "wait_group":
        pending = state.integer(i.operands[0])

        def wait(mask: Mask) -> None:
            part.finish(_groups(state, mask), pending)

        return wait
    return _issue(state, i, part)


def _issue(state: State, i: Instruction, part: Products) -> Action:
    shape = re.fullmatch(r"m64n(\d+)k16", i.parts[4])
    if shape is None or i.parts[5] != "f32" or i.parts[6] not in ("bf16", "f16"):
        raise UnsupportedInstructionError("shape or types")
    columns, kind = int(shape[1]), i.parts[6]
    names = state.vector(i.operands[0])
    d = state.rows(names)
    if len(d) != columns // 2:
        raise UnsupportedInstructionError("accumulators")
    from_registers = i.operands[1].startswith("{")
    a = state.rows(state.vector(i.operands[1])) if from_registers else state.source(i.operands[1], "u64")
    b, scale = state.source(i.operands[2], "u64"), state.source(i.operands[3], "pred")
    signs = (float(state.integer(i.operands[4])), float(state.integer(i.operands[5])))
    flags = [state.integer(operand) != 0 for operand in i.operands[6:]]
    transposed = (False, flags[0]) if from_registers else (flags[0], flags[1])
    defined, settled = state.defined[4], state.settled[4]

    def run(mask: Mask) -> None:
        groups = _groups(state, mask)
        accumulates = _of_groups(state, scale, groups, "scale-d").astype(np.bool_)
        for group in groups[accumulates]:  # which accumulators are read is known only now
            threads = slice(int(group) * GROUP, int(group) * GROUP + GROUP)
            if not (settled[d] | defined[d, threads].all(1)).all():
                raise ProgramError("accumulators are read before they were written")
        state.check([], [(4, int(row)) for row in d], mask)
        part.count += 1
        product = _Product(
            part.count,
            groups,
            columns,
            kind,
            d,
            a[None] if from_registers else _of_groups(state, a, groups, "descriptor"),
            _of_groups(state, b, groups, "descriptor"),
            accumulates,
            transposed,
            signs,
        )
        part.note(product)
        if state.order.products:
            part.perform(product)
        else:
            for number, group in enumerate(groups):
                part.issued.setdefault(int(group), _Issued()).open.append((product, number))

    return run
