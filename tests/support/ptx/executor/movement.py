"""Loads, stores and atomic additions of threads, and exchanges between the lanes of a warp.

Sections: "ld", "st", "atom", "red", "shfl.sync", "vote.sync", "elect.sync".
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .faults import UnsupportedInstructionError
from .memory import Indices, Space
from .state import DTYPES, WARP, Action, Array, Mask, State, instruction, write
from .syntax import SIZES, Instruction


def _locator(
    state: State, i: Instruction, operand: str, size: int, what: str
) -> Callable[[Mask], tuple[Indices, Indices, Space]]:
    """A function that gives threads, checked offsets and the space of an access of `size` bytes.

    `what` is the access: "read", "write" or "add".
    """
    address = state.address(operand)
    name = state.space(i.parts)

    def locate(mask: Mask) -> tuple[Indices, Indices, Space]:
        threads = state.select(mask)
        addresses = address()
        if mask is not None:
            addresses = addresses[threads]
        space, base = (name, 0) if name != "generic" else state.resolve(addresses)
        offsets = state.spaces[space].locate(addresses - base if base else addresses, size, threads, what != "read")
        if space == "shared" and state.clocks is not None:
            getattr(state.clocks, what)(offsets, size, state.block[threads], state.warp[threads])
        return threads, offsets, state.spaces[space]

    return locate


def _shape(i: Instruction) -> tuple[int, int]:
    """Bytes of an element, and elements."""
    count = next((int(part[1:]) for part in i.parts if re.fullmatch(r"v\d", part)), 1)
    return SIZES[i.type], count


@instruction("ld", "ldu")
def _ld(state: State, i: Instruction) -> Action:
    """A load; narrow values are extended into wider registers."""
    size, count = _shape(i)
    locate = _locator(state, i, i.operands[1], size * count, "read")
    names = state.vector(i.operands[0])
    if len(names) != count:
        raise UnsupportedInstructionError("elements")
    kind = i.type
    targets: list[tuple[Array, bool]] = []
    for name in names:
        width = size if name == "_" else state.place[name][0]
        wider = width > size
        targets.append((state.target(name, f"{'s' if kind[0] == 's' else 'u'}{8 * width}"), wider))
    plain = DTYPES[f"{'s' if kind[0] == 's' else 'u'}{8 * size}"]

    def run(mask: Mask) -> None:
        threads, offsets, space = locate(mask)
        view, places = space.views[size], offsets // size
        for n, (target, _) in enumerate(targets):
            values = view[places + n if n else places].view(plain)
            if mask is None:
                target[...] = values
            else:
                target[threads] = values

    return run


@instruction("st")
def _st(state: State, i: Instruction) -> Action:
    """A store. Which of several threads that store to one place at once has the last word is not defined.

    In a late order it is the first of them, in an early one the last. Compilers let threads store one sum that each of them
    rounded in another order.
    """
    size, count = _shape(i)
    locate = _locator(state, i, i.operands[0], size * count, "write")
    sources = [state.source(name, f"b{8 * size}") for name in state.vector(i.operands[1])]
    if len(sources) != count:
        raise UnsupportedInstructionError("elements")
    turn = slice(None, None, 1 if state.order.stores else -1)

    def run(mask: Mask) -> None:
        threads, offsets, space = locate(mask)
        view, places = space.views[size], (offsets // size)[turn]
        for n, source in enumerate(sources):
            values = source if mask is None or source.ndim == 0 else source[threads]
            view[places + n if n else places] = values if source.ndim == 0 else values[turn]

    return run


@instruction("red", "atom")
def _atomic(state: State, i: Instruction) -> Action:
    """Atomic operations on integers, and additions of floats (in the order of threads; a GPU's order is not defined)."""
    size, kind = SIZES[i.type], i.type
    returns = i.parts[0] == "atom"
    operands = i.operands[1:] if returns else i.operands
    operation = next((part for part in i.parts[1:-1] if part in ("add", "min", "max", "and", "or", "xor", "inc")), "")
    calls: dict[str, np.ufunc] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    if operation not in calls or "noftz" in i.parts:
        raise UnsupportedInstructionError("operation")
    call = calls[operation]
    locate = _locator(state, i, operands[0], size, "add")
    source = state.source(operands[1], kind)
    target = state.target(i.operands[0], kind) if returns else None

    def run(mask: Mask) -> None:
        threads, offsets, space = locate(mask)
        view, places = space.views[size].view(DTYPES[kind]), offsets // size
        values = np.broadcast_to(source, state.threads)[threads]
        if target is None:
            call.at(view, places, values)
            return
        for thread, place, value in zip(threads, places, values, strict=True):  # each sees what those before it left
            target[thread], view[place] = view[place], call(view[place], value)

    return run


def _members(state: State, operand: str) -> None:
    """All lanes take part: what compilers emit, and what `machine` waits for."""
    if state.is_register(operand):
        return
    if state.integer(operand) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise UnsupportedInstructionError("member mask other than all lanes")


@instruction("shfl", warp_wide=True)
def _shfl(state: State, i: Instruction) -> Action:
    """Values of other lanes of a segment; out of its range a lane gets its own value and the predicate false."""
    names = i.operands[0].split("|")
    target = state.target(names[0], "b32")
    inside = state.target(names[1], "pred") if len(names) > 1 else None
    value, b, c = (
        state.source(operand, kind) for operand, kind in zip(i.operands[1:4], ("b32", "u32", "u32"), strict=True)
    )
    _members(state, i.operands[4])
    mode = i.parts[2]
    lane = state.lane

    def run(mask: Mask) -> None:
        by = b.astype(np.int64) & 31
        clamp, segment = c.astype(np.int64) & 31, c.astype(np.int64) >> 8 & 31
        most = (lane & segment) | (clamp & ~segment)
        least = lane & segment
        if mode == "bfly":
            source = lane ^ by
            valid = source <= most
        elif mode == "idx":
            source = least | (by & ~segment)
            valid = source <= most
        elif mode == "up":
            source = lane - by
            valid = source >= most
        else:
            source = lane + by
            valid = source <= most
        source = np.where(valid, source, lane)
        first = state.every - lane
        if state.is_register(i.operands[1]):
            state.pass_on(i.operands[1], names[0], first + source, mask)
        write(target, value[first + source] if value.ndim else value, mask)
        if inside is not None:
            write(inside, valid, mask)

    return run


@instruction("vote", warp_wide=True)
def _vote(state: State, i: Instruction) -> Action:
    """all, any, uni and ballot of a predicate over the warp."""
    mode = next(part for part in i.parts if part in ("all", "any", "uni", "ballot"))
    negated = i.operands[1].startswith("!")
    source = state.source(i.operands[1].lstrip("!"), "pred")
    _members(state, i.operands[2])
    target = state.target(i.operands[0], "b32" if mode == "ballot" else "pred")

    def run(mask: Mask) -> None:
        given = np.broadcast_to(source ^ negated, state.threads).reshape(-1, WARP)
        if mode == "ballot":
            found = (given.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
        else:
            alike = given.all(1) | ~given.any(1)
            found = {"all": given.all(1), "any": given.any(1), "uni": alike}[mode]
        write(target, found.repeat(WARP), mask)

    return run


@instruction("elect", warp_wide=True)
def _elect(state: State, i: Instruction) -> Action:
    """One lane of the warp, always the same: here the first, though a GPU may choose another."""
    lane, elected = (name.strip() for name in i.operands[0].split("|"))
    number, chosen = state.target(lane, "b32"), state.target(elected, "pred")
    _members(state, i.operands[1])

    def run(mask: Mask) -> None:
        write(number, np.zeros(1, np.uint32), mask)
        write(chosen, state.lane == 0, mask)

    return run
