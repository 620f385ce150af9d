"""mov, cvt, cvta and prmt, and the bits of bfloat16, which NumPy does not know.

Section: "Data Movement and Conversion Instructions".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .faults import UnsupportedInstructionError
from .memory import WINDOWS
from .state import DTYPES, Action, Array, Mask, State, instruction, write
from .syntax import SIZES, Instruction


def from_bfloat16(bits: Array) -> Array:
    """float32 of a bfloat16's bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """Bits of the nearest bfloat16, ties to even; a NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_tensor_float(values: Array) -> Array:
    """The nearest value with ten fractional bits, ties away from zero: `cvt.rna.tf32`."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@instruction("mov")
def _mov(state: State, i: Instruction) -> Action:
    """A copy; `{a, b}` on one side packs or unpacks the bits of the other."""
    kind = i.type
    to, of = i.operands
    if to.startswith("{") or of.startswith("{"):
        packing = of.startswith("{")
        parts = state.vector(of if packing else to)
        whole = f"b{8 * SIZES[kind]}"
        part = f"b{8 * SIZES[kind] // len(parts)}"
        if packing:
            target, sources = state.target(to, whole), [state.source(name, part) for name in parts]
            halves = target.view(DTYPES[part]).reshape(-1, len(parts))

            def pack(mask: Mask) -> None:
                for column, source in enumerate(sources):
                    write(halves[:, column], source, mask)

            return pack
        source = state.source(of, whole)
        pieces = np.atleast_1d(source).view(DTYPES[part]).reshape(-1, len(parts))
        targets = [(state.target(name, part), pieces[:, n]) for n, name in enumerate(parts) if name != "_"]

        def unpack(mask: Mask) -> None:
            for target, piece in targets:
                write(target, piece, mask)

        return unpack
    target, source = state.target(to, kind), state.source(of, kind)

    def run(mask: Mask) -> None:
        write(target, source, mask)

    return run


@instruction("cvta")
def _cvta(state: State, i: Instruction) -> Action:
    """Between an address of a space and a generic one."""
    kind = i.type
    space = next(part for part in i.parts if part.partition("::")[0] in WINDOWS).partition("::")[0]
    base = WINDOWS[space][1]
    target, source = state.target(i.operands[0], kind), state.source(i.operands[1], kind)
    step = target.dtype.type(base)
    down = "to" in i.parts

    def run(mask: Mask) -> None:
        write(target, source - step if down else source + step, mask)

    return run


_ROUND: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("rni", "rn"), np.rint),
    **dict.fromkeys(("rmi", "rm"), np.floor),
    **dict.fromkeys(("rpi", "rp"), np.ceil),
    **dict.fromkeys(("rzi", "rz"), np.trunc),
}


def _to_integer(values: Array, kind: str) -> Array:
    """Clamped to the type's range; NaN becomes zero."""
    limits = np.iinfo(DTYPES[kind])
    wide = np.where(np.isnan(values), 0.0, values.astype(np.float64))
    # The largest 64-bit integers are no doubles: compared, not clipped.
    inside = np.clip(wide, float(limits.min), np.nextafter(float(limits.max) + 1.0, 0.0))
    return np.where(wide >= float(limits.max), limits.max, inside.astype(DTYPES[kind]))


@instruction("cvt")
def _cvt(state: State, i: Instruction) -> Action:
    to, of = i.parts[-2:]
    if any(part in ("sat", "relu", "satfinite", "rs") for part in i.parts):
        raise UnsupportedInstructionError("modifier")
    rounding = next((part for part in i.parts[1:-2] if part in (*_ROUND, "rna")), "")
    if to in ("f16x2", "bf16x2"):
        return _packed(state, i, to)
    source = state.source(i.operands[1], of)
    name = i.operands[0]
    # An integer narrower than the register is extended into it.
    width = state.place[name][0]
    if to[0] in "us" and SIZES[to] < width:
        target = state.target(name, f"{to[0]}{8 * width}")
    else:
        target = state.target(name, "f32" if to == "tf32" else to)
    convert = _conversion(to, of, rounding)

    def run(mask: Mask) -> None:
        write(target, convert(source), mask)

    return run


def _conversion(to: str, of: str, rounding: str) -> Callable[[Array], Array]:
    """From values of one type to those of another."""
    floats = ("f16", "bf16", "f32", "f64", "tf32")
    read: Callable[[Array], Array] = from_bfloat16 if of == "bf16" else np.asarray
    if to == "tf32":
        if rounding != "rna":
            raise UnsupportedInstructionError("rounding")
        return to_tensor_float
    if of in floats and to in floats:
        if to == of and rounding.endswith("i"):
            return _ROUND[rounding]
        narrower = SIZES[to] < SIZES[of] or {to, of} == {"f16", "bf16"}
        if narrower and rounding != "rn":
            raise UnsupportedInstructionError("rounding")
        if to == "bf16":
            return lambda values: to_bfloat16(read(values).astype(np.float32))
        return lambda values: read(values).astype(DTYPES[to])
    if of in floats:
        whole = _ROUND[rounding]
        return lambda values: _to_integer(whole(read(values)), to)
    if to in floats:
        if rounding not in ("rn", "") or to == "bf16":
            raise UnsupportedInstructionError("rounding or type")
        return lambda values: values.astype(DTYPES[to])
    return lambda values: values.astype(DTYPES[to])


def _packed(state: State, i: Instruction, to: str) -> Action:
    """Two float32 values as a pair of 16-bit ones: the first operand is the upper half."""
    if i.type != "f32" or "rn" not in i.parts:
        raise UnsupportedInstructionError("type or rounding")
    halves = state.target(i.operands[0], "b32").view(np.uint16).reshape(-1, 2)
    upper, lower = (state.source(operand, "f32") for operand in i.operands[1:3])

    def bits(values: Array) -> Array:
        return to_bfloat16(values) if to == "bf16x2" else np.atleast_1d(values.astype(np.float16)).view(np.uint16)

    def run(mask: Mask) -> None:
        low, high = bits(lower), bits(upper)
        write(halves[:, 0], low, mask)
        write(halves[:, 1], high, mask)

    return run


@instruction("prmt")
def _prmt(state: State, i: Instruction) -> Action:
    """Any four of eight bytes, or their signs; of the default mode alone."""
    if i.type != "b32":
        raise UnsupportedInstructionError("mode")
    target = state.target(i.operands[0], "b32")
    a, b, selector = (state.source(operand, "b32") for operand in i.operands[1:])

    def run(mask: Mask) -> None:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        found = np.zeros(state.threads, np.uint32)
        for place in range(4):
            choice = (selector >> np.uint32(4 * place)) & np.uint32(15)
            byte = (both >> ((choice & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(choice & np.uint32(8), sign, byte)
            found |= byte.astype(np.uint32) << np.uint32(8 * place)
        write(target, found, mask)

    return run
