"""Blocks that run together: their threads, registers and operands.

A register is a NumPy row with an element for each thread of all these blocks, so that one NumPy call executes an instruction
for all of them. Registers of one size share a two-dimensional array ("Register State Space": a register has a size; the
instruction says the type).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import ProgramError, UnsupportedInstructionError
from .memory import (
    UNSIGNED,
    WINDOW_BYTES,
    WINDOWS,
    Flags,
    GlobalMemory,
    Indices,
    LocalMemory,
    ParameterMemory,
    SharedMemory,
    Space,
    aligned,
)
from .races import Clocks
from .syntax import SIZES, Instruction, Kernel

Array = NDArray[Any]
# Which threads execute; None: all of them, so that results go straight into the registers.
Mask = Flags | None
# An instruction, decoded. It returns the threads that have to wait and try again, if any.
Action = Callable[[Mask], Flags | None]

WARP = 32
GROUP = 128  # threads of a warpgroup

DTYPES: dict[str, Any] = {  # NumPy's types by those of PTX
    "pred": np.bool_,
    **{f"{kind}{8 * size}": UNSIGNED[size] for size in UNSIGNED for kind in "bu"},
    **{f"s{8 * size}": kind for size, kind in {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}.items()},
    "f16": np.float16,
    "bf16": np.uint16,  # NumPy has none: see conversions
    "f32": np.float32,
    "f64": np.float64,
    **dict.fromkeys(("f16x2", "bf16x2", "tf32"), np.uint32),
}


@dataclass(frozen=True)
class Order:
    """When each kind of asynchronous work is done: at its issue, or at the wait for it. A right program cannot tell."""

    loads: bool  # early: cp.async and tensor loads at their issue
    products: bool  # early: wgmma at its issue
    stores: (
        bool  # early: tensor stores at their issue; and the last of several threads has the last word, not the first
    )

    def __str__(self) -> str:
        return " ".join(f"{name} {'early' if early else 'late'}" for name, early in vars(self).items())


EARLY, LATE = Order(True, True, True), Order(False, False, False)
ORDERS = (EARLY, Order(True, False, False), Order(False, True, True), LATE)


class State:
    """All that instructions act on."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        parameters: bytes,
        maps: dict[int, Any],
        grid: tuple[int, int, int],
        blocks: list[tuple[int, int, int]],
        threads: int,
        dynamic_shared: int,
        order: Order,
        watch: bool,
    ) -> None:
        """`maps` are tensor maps by the offset of their parameter; `watch` says whether races are looked for."""
        if threads % WARP:
            raise ValueError(f"threads of a block must be a multiple of {WARP}; got {threads}")
        self.kernel, self.grid, self.blocks, self.width, self.order, self.maps = (
            kernel,
            grid,
            blocks,
            threads,
            order,
            maps,
        )
        self.threads = len(blocks) * threads
        self.every: Indices = np.arange(self.threads)
        self.block = self.every // threads
        self.thread = self.every % threads
        self.lane = self.thread % WARP
        self.warp = self.thread // WARP
        self.warps = threads // WARP
        self.exited: Flags = np.zeros(self.threads, np.bool_)
        self._make_registers()
        self.symbols: dict[str, int] = {}
        shared = self._place(sorted(kernel.shared, key=lambda variable: variable.size == 0))  # dynamic memory follows
        local = self._place(kernel.local)
        self._place(kernel.parameters)
        self.shared = SharedMemory(shared + dynamic_shared, len(blocks), self.block)
        self.spaces: dict[str, Space] = {
            "global": memory,
            "shared": self.shared,
            "local": LocalMemory(local, self.threads),
            "param": ParameterMemory(np.frombuffer(parameters, np.uint8)),
        }
        size = aligned(self.shared.size, 1024) + 1024
        self.clocks = Clocks(len(blocks), self.warps, size, _granule(kernel)) if watch else None
        self.parts: dict[type, Any] = {}  # what families of instructions remember: see `part`

    def part(self, kind: type[Any]) -> Any:
        """The one object of this class that belongs to these blocks, made at its first use."""
        if kind not in self.parts:
            self.parts[kind] = kind(self)
        return self.parts[kind]

    def _place(self, variables: list[Any]) -> int:
        """Addresses of variables that follow each other; returns where they end. One of no size has the rest."""
        end = 0
        for variable in variables:
            end = aligned(end, variable.alignment)
            self.symbols[variable.name] = end
            end += variable.size
        return end

    # Registers

    def _make_registers(self) -> None:
        self.place: dict[str, tuple[int, int]] = {}  # of each register: (bytes, row)
        counts = dict.fromkeys((0, 2, 4, 8), 0)
        for name, kind in self.kernel.registers.items():
            size = SIZES[kind]
            if size not in counts:
                raise UnsupportedInstructionError(f"register {name} of type {kind}")
            self.place[name] = (size, counts[size])
            counts[size] += 1
        self.banks: dict[int, Array] = {
            size: np.zeros((count, self.threads), UNSIGNED[size] if size else np.bool_)
            for size, count in counts.items()
        }
        # Whether each thread has written each register, and whether all of them have.
        self.defined: dict[int, Flags] = {s: np.zeros((n, self.threads), np.bool_) for s, n in counts.items()}
        self.settled: dict[int, Flags] = {s: np.zeros(n, np.bool_) for s, n in counts.items()}

    def is_register(self, operand: str) -> bool:
        return operand in self.place

    def row(self, name: str) -> Array:
        """A register as it is stored: unsigned, or bool."""
        size, row = self.place[name]
        bank: Array = self.banks[size][row]
        return bank

    def rows(self, names: list[str]) -> Indices:
        """Rows of 32-bit registers in their bank, where many are read and written at once."""
        for name in names:
            if self.place[name][0] != 4:
                raise UnsupportedInstructionError(f"{name} is not a 32-bit register")
        return np.array([self.place[name][1] for name in names])

    def pass_on(self, source: str, target: str, threads: Indices, mask: Mask) -> None:
        """Note that `target` holds what each of `threads` has in `source`, which it may never have written."""
        size, row = self.place[source]
        if self.settled[size][row]:
            return
        known = self.defined[size][row][threads]
        size, row = self.place[target]
        self.defined[size][row] = known if mask is None else np.where(mask, known, self.defined[size][row])
        self.settled[size][row] = self.defined[size][row].all()

    def check(
        self, reads: list[tuple[int, int]], writes: list[tuple[int, int]], mask: Mask, passes_on: bool = False
    ) -> bool:
        """Raise where an executing thread reads what it never wrote; note what is written.

        With `passes_on` nothing is raised: what is made of a register that was never written counts as never written.

        Returns whether nothing of this needs to be looked at again, however often the instruction executes.
        """
        done = True
        unknown = None
        for size, row in reads:
            if self.settled[size][row]:
                continue
            defined = self.defined[size][row]
            missing = ~defined if mask is None else mask & ~defined
            if missing.any():
                if passes_on:
                    unknown = missing if unknown is None else unknown | missing
                    done = False
                    continue
                raise ProgramError(
                    f"register {self._name(size, row)} is read before it was written ({missing.sum()} threads)"
                )
            done = False
        if unknown is not None:
            for size, row in writes:
                if self.settled[size][row]:
                    self.settled[size][row], self.defined[size][row] = False, True
                self.defined[size][row] = (self.defined[size][row] | (True if mask is None else mask)) & ~unknown
            return False
        for size, row in writes:
            if self.settled[size][row]:
                continue
            if mask is None:
                self.settled[size][row] = True
                continue
            self.defined[size][row] |= mask
            self.settled[size][row] = self.defined[size][row].all()
            done = done and bool(self.settled[size][row])
        return done

    def _name(self, size: int, row: int) -> str:
        return next(name for name, place in self.place.items() if place == (size, row))

    # Operands

    def source(self, operand: str, kind: str) -> Array:
        """An operand's values: a view of a register, which follows its changes, or a constant of no dimension."""
        dtype = DTYPES[kind]
        if operand in self.place:
            row = self.row(operand)
            if row.dtype.itemsize < np.dtype(dtype).itemsize or (row.dtype == np.bool_) != (kind == "pred"):
                raise UnsupportedInstructionError(f"{operand} is too narrow for .{kind}")
            if kind == "pred":
                return row
            viewed = row.view(dtype)
            return viewed[:: row.dtype.itemsize // viewed.dtype.itemsize]  # a wider register: its lower bits
        if operand.startswith("%"):
            return self._special(operand).astype(dtype)
        return np.asarray(self.constant(operand, kind))

    def target(self, operand: str, kind: str) -> Array:
        """The register to write, as this type."""
        if operand == "_":
            return np.zeros(self.threads, DTYPES[kind])
        row = self.row(operand)
        if row.dtype == np.bool_ or row.dtype.itemsize != np.dtype(DTYPES[kind]).itemsize:
            if kind == "pred" and row.dtype == np.bool_:
                return row
            raise UnsupportedInstructionError(f"{operand} does not have the size of .{kind}")
        return row.view(DTYPES[kind])

    def constant(self, text: str, kind: str) -> Any:
        """A literal of this type ("Constants"), or the address of a variable."""
        dtype = DTYPES[kind]
        if kind == "pred":
            return np.bool_(int(text, 0) != 0)
        size = np.dtype(dtype).itemsize
        if text[:2] in ("0f", "0F"):
            bits = np.uint32(int(text[2:], 16))
            value = bits.view(np.float32) if dtype != np.float64 else np.float64(bits.view(np.float32))
            return value if dtype in (np.float32, np.float64) else UNSIGNED[size](int(bits)).view(dtype)
        if text[:2] in ("0d", "0D"):
            double = np.uint64(int(text[2:], 16))
            return double.view(dtype) if size == 8 else np.float32(double.view(np.float64))
        if text in self.symbols:
            number = self.symbols[text]
        elif re.fullmatch(r"-?(0[xX][\da-fA-F]+|\d+)U?", text):
            number = int(text.rstrip("U"), 0)
        elif re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", text):
            return dtype(float(text))
        else:
            raise UnsupportedInstructionError(f"operand {text}")
        if dtype in (np.float32, np.float64, np.float16):
            return dtype(number)
        return UNSIGNED[size](number & ((1 << (8 * size)) - 1)).view(dtype)

    def integer(self, text: str) -> int:
        """An operand that has to be a literal."""
        return int(self.constant(text, "s64"))

    def _special(self, name: str) -> Indices:
        """Special registers ("Special Registers")."""
        base, _, axis = name.partition(".")
        if base == "%tid":
            return self.thread if axis == "x" else np.zeros_like(self.thread)
        if base == "%ntid":
            return np.full(self.threads, self.width if axis == "x" else 1)
        if base == "%ctaid":
            return np.array(self.blocks)[:, "xyz".index(axis)][self.block]
        if base == "%nctaid":
            return np.full(self.threads, self.grid["xyz".index(axis)])
        if base == "%laneid":
            return self.lane
        raise UnsupportedInstructionError(f"special register {name}")

    def vector(self, operand: str) -> list[str]:
        """The elements of `{a, b}`, or the one operand."""
        if not operand.startswith("{"):
            return [operand]
        return [part.strip() for part in operand[1:-1].split(",")]

    def address(self, operand: str) -> Callable[[], Indices]:
        """`[base + offset]` as a function that returns every thread's address."""
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if found is None:
            raise UnsupportedInstructionError(f"address {operand}")
        offset = int(found[2] or "0", 0)
        if found[1] not in self.place:
            fixed = np.full(self.threads, self.integer(found[1]) + offset)
            return lambda: fixed
        row = self.row(found[1])
        base = row.view(np.int64) if row.dtype.itemsize == 8 else row
        return lambda: np.add(base, offset, dtype=np.int64, casting="unsafe")

    # Threads

    def select(self, mask: Mask) -> Indices:
        """Numbers of the executing threads."""
        return self.every if mask is None else np.flatnonzero(mask)

    def present(self, mask: Mask) -> Flags:
        """[blocks, warps]: where any thread executes."""
        if mask is None:
            return np.ones((len(self.blocks), self.warps), np.bool_)
        return np.asarray(mask.reshape(len(self.blocks), self.warps, WARP).any(2))

    def space(self, parts: tuple[str, ...]) -> str:
        """The state space that an opcode names; generic where it names none."""
        for part in parts:
            name = part.partition("::")[0]
            if name in self.spaces:
                return name
        return "generic"

    def resolve(self, addresses: Indices) -> tuple[str, int]:
        """The space that generic addresses lie in, and what is to be subtracted from them to get its own."""
        for name, (start, base) in WINDOWS.items():
            if addresses.size and (addresses >= start).all() and (addresses < start + WINDOW_BYTES).all():
                return name, base
        raise ProgramError("generic addresses of several spaces, or of none")


def write(target: Array, value: Array, mask: Mask) -> None:
    """Put values of the same type, or of one that is cast, into a register."""
    if mask is None:
        target[...] = value
    else:
        np.copyto(target, value, where=mask, casting="unsafe")


def _granule(kernel: Kernel) -> int:
    """Bytes that no access of shared memory is smaller than: 4 at the most."""
    least = 4
    for instruction in kernel.instructions:
        if instruction.parts[0] in ("ld", "st", "atom", "red") and any("shared" in p for p in instruction.parts):
            count = next((int(p[1]) for p in instruction.parts if re.fullmatch(r"v\d", p)), 1)
            least = min(least, SIZES[instruction.type] * count)
    return least


Decoder = Callable[[State, Instruction], Action]
DECODERS: dict[str, Decoder] = {}
# Opcodes that a warp executes together: lanes that are elsewhere are waited for.
WARP_WIDE: set[str] = set()


def instruction(*names: str, warp_wide: bool = False) -> Callable[[Decoder], Decoder]:
    """Register the decoder of instructions by the first part of their opcodes."""

    def register(decoder: Decoder) -> Decoder:
        for name in names:
            DECODERS[name] = decoder
            if warp_wide:
                WARP_WIDE.add(name)
        return decoder

    return register
