"""Integer, logical, comparing and floating-point instructions.

Sections: "Integer Arithmetic Instructions", "Floating-Point Instructions", "Half Precision Floating-Point Instructions",
"Comparison and Selection Instructions", "Logic and Shift Instructions".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .conversions import from_bfloat16, to_bfloat16
from .faults import UnsupportedInstructionError
from .memory import UNSIGNED
from .state import Action, Array, Mask, State, instruction, write
from .syntax import SIZES, Instruction

_Operation = Callable[..., Array]

_FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")


def _ufunc(call: np.ufunc, target: Array, sources: list[Array]) -> Action:
    """A NumPy function that writes straight into the register."""

    def run(mask: Mask) -> None:
        if mask is None:
            call(*sources, out=target, casting="unsafe")
        else:
            call(*sources, out=target, where=mask, casting="unsafe")

    return run


def _computed(operation: _Operation, target: Array, sources: list[Array]) -> Action:
    def run(mask: Mask) -> None:
        write(target, operation(*sources), mask)

    return run


def _operands(state: State, i: Instruction, kind: str) -> tuple[Array, list[Array]]:
    return state.target(i.operands[0], kind), [state.source(operand, kind) for operand in i.operands[1:]]


# Floating point


def flushed(x: Array) -> Array:
    """Subnormal float32 values become zero of their sign, as with `.ftz`."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in float32. The product is exact in float64; of the two roundings left, the first is 2^29 times finer."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b as the rounded sum and what the rounding left (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _fused_down(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in float32, rounded towards −∞ (`.rm`)."""
    s, rest = _two_sum(np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64))
    nearest = s.astype(np.float32)
    above = (nearest > s) | ((nearest == s) & (rest < 0))
    return np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _fused_double(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in float64 by pairs of numbers (Dekker's product): the last bit may differ from the one rounding of a GPU."""

    def halves(x: Array) -> tuple[Array, Array]:
        scaled = x * 134217729.0  # 2^27 + 1
        high = scaled - (scaled - x)
        return high, x - high

    product = a * b
    (a1, a2), (b1, b2) = halves(a), halves(b)
    error = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2
    s, rest = _two_sum(product, c)
    found: Array = s + (rest + error)
    return np.where(np.isfinite(found), found, product + c)


# min and max return a number rather than a NaN; of two zeros either may come back, where PTX says −0 < +0.
_FLOAT: dict[str, np.ufunc | _Operation] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.absolute,
    "div": np.divide,
    "sqrt": np.sqrt,
    "copysign": lambda a, b: np.copysign(b, a),
}


def _half(state: State, i: Instruction, kind: str, operation: _Operation) -> Action:
    """16-bit values, computed in float64 and rounded once; `x2` types are two of them in a register."""
    bfloat = kind.startswith("bf16")
    packed = kind.endswith("x2")
    wide = "b32" if packed else "b16"
    target, sources = _operands(state, i, wide)

    def widened(bits: Array) -> Array:
        half = np.atleast_1d(bits).view(np.uint16)  # of a packed register: lower and upper element in turn
        return (from_bfloat16(half) if bfloat else half.view(np.float16)).astype(np.float64)

    def run(mask: Mask) -> None:
        found = operation(*map(widened, sources)).astype(np.float32)
        halves = to_bfloat16(found) if bfloat else found.astype(np.float16).view(np.uint16)
        halves = np.broadcast_to(halves, state.threads * (2 if packed else 1))
        write(target, np.ascontiguousarray(halves).view(np.uint32 if packed else np.uint16), mask)

    return run


def _float(state: State, i: Instruction, kind: str) -> Action:
    base = i.parts[0]
    rounding = next((part for part in i.parts[1:] if part in ("rm", "rp", "rz", "rn")), "rn")
    operation: np.ufunc | _Operation
    if base in ("fma", "mad"):
        if rounding not in ("rn", "rm") or (kind == "f64" and rounding == "rm"):
            raise UnsupportedInstructionError("rounding")
        operation = _fused_double if kind == "f64" else fused if rounding == "rn" else _fused_down
    else:
        if rounding != "rn":
            raise UnsupportedInstructionError("rounding")
        operation = _FLOAT[base]
    if kind not in ("f32", "f64"):
        return _half(state, i, kind, (lambda a, b, c: a * b + c) if base == "fma" else operation)
    target, sources = _operands(state, i, kind)
    if "ftz" in i.parts and kind == "f32":
        plain = operation
        return _computed(lambda *given: flushed(plain(*map(flushed, given))), target, sources)
    if isinstance(operation, np.ufunc):
        return _ufunc(operation, target, sources)
    return _computed(operation, target, sources)


def _approximate(state: State, relative: float) -> Array:
    """Factors at the edge of an allowed relative error, alternating between lanes: what relies on more shows."""
    return 1.0 + np.where(state.lane % 2, relative, -relative)


@instruction("rcp", "rsqrt", "ex2", "lg2", "tanh", "sin", "cos")
def _function(state: State, i: Instruction) -> Action:
    """Functions; `.approx` ones are off by what the instruction's description allows where that is much: tanh."""
    kind = i.type
    if kind not in ("f32", "f64"):
        raise UnsupportedInstructionError("type")
    target, (x,) = _operands(state, i, kind)
    functions: dict[str, _Operation] = {
        "rcp": lambda v: 1.0 / v,
        "rsqrt": lambda v: 1.0 / np.sqrt(v),
        "ex2": np.exp2,
        "lg2": np.log2,
        "tanh": np.tanh,
        "sin": np.sin,
        "cos": np.cos,
    }
    function = functions[i.parts[0]]
    # "tanh.approx.f32 implements a fast approximation … maximum relative error 2^-11"
    factor = _approximate(state, 2.0**-11.01) if i.parts[0] == "tanh" else None
    ftz = "ftz" in i.parts

    def run(mask: Mask) -> None:
        given = flushed(x) if ftz else x
        found = function(np.asarray(given, np.float64))
        if factor is not None:
            found = np.clip(found * factor, -1.0, 1.0)
        found = found.astype(target.dtype)
        write(target, flushed(found) if ftz else found, mask)

    return run


# Integers


def _high(a: Array, b: Array, kind: str) -> Array:
    """The upper half of the product."""
    size = SIZES[kind]
    if size == 8:
        wide = a.astype(object) * b.astype(object) >> 64
        return np.asarray(np.vectorize(lambda v: v & (2**64 - 1), otypes=[np.uint64])(wide))
    wide_type = np.int64 if kind[0] == "s" else np.uint64
    return np.asarray(a, wide_type) * np.asarray(b, wide_type) >> wide_type(8 * size)


def _multiply(state: State, i: Instruction, kind: str) -> Action:
    """mul and mad, of which the lower or upper half is kept, or all (`.wide`)."""
    adds = i.parts[0] == "mad"
    size = SIZES[kind]
    wide = "wide" in i.parts
    outer = f"{kind[0]}{16 * size}" if wide else kind
    target = state.target(i.operands[0], outer)
    a, b = (state.source(operand, kind) for operand in i.operands[1:3])
    c = state.source(i.operands[3], outer) if adds else None
    high = "hi" in i.parts

    def run(mask: Mask) -> None:
        found = _high(a, b, kind) if high else np.multiply(a, b, dtype=target.dtype)
        if c is not None:
            found = found.astype(target.dtype) + c
        write(target, found, mask)

    return run


def _divide(a: Array, b: Array) -> Array:
    """Towards zero. Of a division by zero the result is not defined: all bits set, as GPUs do."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0), quotient)


def _remainder(a: Array, b: Array) -> Array:
    return a - _divide(a, b) * b


_INTEGER: dict[str, np.ufunc | _Operation] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.absolute,
    "div": _divide,
    "rem": _remainder,
}


@instruction("add", "sub", "mul", "mad", "fma", "min", "max", "neg", "abs", "div", "rem", "sqrt", "copysign")
def _arithmetic(state: State, i: Instruction) -> Action:
    kind = i.type
    if any(part in ("sat", "cc", "NaN", "xorsign", "relu") for part in i.parts):
        raise UnsupportedInstructionError("modifier")
    if kind in _FLOATS:
        return _float(state, i, kind)
    if i.parts[0] in ("mul", "mad"):
        return _multiply(state, i, kind)
    operation = _INTEGER[i.parts[0]]
    target, sources = _operands(state, i, kind)
    return (
        _ufunc(operation, target, sources)
        if isinstance(operation, np.ufunc)
        else _computed(operation, target, [np.atleast_1d(source) for source in sources])
    )


@instruction("and", "or", "xor", "not", "cnot")
def _logic(state: State, i: Instruction) -> Action:
    target, sources = _operands(state, i, i.type)
    if i.parts[0] == "cnot":
        return _computed(lambda a: a == 0, target, sources)
    calls = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    return _ufunc(calls[i.parts[0]], target, sources)


@instruction("lop3")
def _lop3(state: State, i: Instruction) -> Action:
    """Any function of three bits, as a table of eight."""
    target = state.target(i.operands[0], "b32")
    a, b, c = (state.source(operand, "b32") for operand in i.operands[1:4])
    table = state.integer(i.operands[4])

    def run(mask: Mask) -> None:
        found = np.zeros(state.threads, np.uint32)
        for row in range(8):
            if table >> row & 1:
                found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        write(target, found, mask)

    return run


@instruction("shl", "shr")
def _shift(state: State, i: Instruction) -> Action:
    """Amounts beyond the width act as the width: zero, or the sign."""
    kind = i.type
    bits = 8 * SIZES[kind]
    target = state.target(i.operands[0], kind)
    a, amount = state.source(i.operands[1], kind), state.source(i.operands[2], "u32")
    left, signed = i.parts[0] == "shl", kind[0] == "s"
    call = np.left_shift if left else np.right_shift
    if amount.ndim == 0 and int(amount) < bits:
        return _ufunc(call, target, [a, np.asarray(amount, target.dtype)])

    def run(mask: Mask) -> None:
        held = np.minimum(amount, bits - 1).astype(target.dtype)
        found = call(a, held)
        if not signed or left:
            found = np.where(amount >= bits, target.dtype.type(0), found)
        write(target, found, mask)

    return run


@instruction("bfe", "bfi")
def _bit_field(state: State, i: Instruction) -> Action:
    """Extract or insert `length` bits at `position`, both modulo 256."""
    kind = i.type
    bits = 8 * SIZES[kind]
    unsigned = f"u{bits}"
    target = state.target(i.operands[0], unsigned)
    sources = [state.source(operand, unsigned) for operand in i.operands[1:-2]]
    position, length = (state.source(operand, "u32") for operand in i.operands[-2:])
    one = target.dtype.type(1)

    def ones(count: Array) -> Array:
        """Numbers with so many lower bits."""
        held = np.minimum(count, bits - 1).astype(target.dtype)
        return np.where(count >= bits, ~target.dtype.type(0), np.left_shift(one, held) - one)

    def shifted(call: np.ufunc, value: Array, by: Array) -> Array:
        return np.where(by >= bits, target.dtype.type(0), call(value, np.minimum(by, bits - 1).astype(target.dtype)))

    def run(mask: Mask) -> None:
        at, count = position & 255, length & 255
        if i.parts[0] == "bfi":
            field = shifted(np.left_shift, ones(count), at)
            write(target, (shifted(np.left_shift, sources[0], at) & field) | (sources[1] & ~field), mask)
            return
        found = shifted(np.right_shift, sources[0], at) & ones(count)
        if kind[0] == "s":
            top = np.minimum(at + count - np.uint32(1), bits - 1).astype(target.dtype)
            negative = (np.right_shift(sources[0], top) & one).astype(np.bool_) & (count > 0)
            there = np.minimum(count, bits - np.minimum(at, bits))  # bits beyond the upper end are the sign's too
            found = np.where(negative, found | ~ones(there), found)
        write(target, found, mask)

    return run


@instruction("popc", "clz", "brev", "bfind")
def _bits(state: State, i: Instruction) -> Action:
    """Numbers of bits; `bfind` is the highest set one (of a negative number, cleared one), all ones where there is none."""
    kind = i.type
    width = 8 * SIZES[kind]
    source = state.source(i.operands[1], f"u{width}")
    base, amount = i.parts[0], "shiftamt" in i.parts
    target = state.target(i.operands[0], f"u{width}" if base == "brev" else "u32")

    def run(mask: Mask) -> None:
        bytes_ = np.ascontiguousarray(np.broadcast_to(source, state.threads)).view(np.uint8).reshape(state.threads, -1)
        digits = np.unpackbits(bytes_, axis=1, bitorder="little")
        if base == "popc":
            found = digits.sum(1)
        elif base == "brev":
            found = np.packbits(digits[:, ::-1], axis=1, bitorder="little").view(UNSIGNED[width // 8])[:, 0]
        else:
            if base == "bfind" and kind[0] == "s":
                digits = np.where(digits[:, -1:] == 1, 1 - digits, digits)
            leading = np.where(digits.any(1), digits[:, ::-1].argmax(1), width)
            found = leading if base == "clz" or amount else width - 1 - leading
            if base == "bfind":
                found = np.where(leading == width, 0xFFFFFFFF, found)
        write(target, found, mask)

    return run


# Comparison and selection

_COMPARISONS: dict[str, np.ufunc] = {
    "eq": np.equal,
    "ne": np.not_equal,
    **dict.fromkeys(("lt", "lo"), np.less),
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
}


@instruction("setp")
def _setp(state: State, i: Instruction) -> Action:
    """A comparison, and its result joined with a predicate where one is given.

    Of floats, "…u" comparisons are true of a NaN, the others false; `num` and `nan` ask for it.
    """
    kind = i.type
    names = i.operands[0].split("|")
    targets = [state.target(name, "pred") for name in names]
    a, b = (state.source(operand, kind) for operand in i.operands[1:3])
    floating = kind in ("f16", "f32", "f64")
    if kind in ("bf16", "f16x2", "bf16x2"):
        raise UnsupportedInstructionError("type")
    name = i.parts[1]
    joined = next((part for part in i.parts[2:-1] if part in ("and", "or", "xor")), None)
    unordered = floating and name in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    comparison = _COMPARISONS.get(name[:2] if unordered else name)
    if (
        joined is None
        and len(targets) == 1
        and comparison is not None
        and not unordered
        and not (floating and name == "ne")
    ):
        return _ufunc(comparison, targets[0], [a, b])
    other = state.source(i.operands[3].lstrip("!"), "pred") if joined else None
    invert = joined is not None and i.operands[3].startswith("!")

    def run(mask: Mask) -> None:
        if floating:
            nan = np.isnan(a) | np.isnan(b)
            if comparison is None:
                found = nan if name == "nan" else ~nan
            else:
                found = comparison(a, b) | nan if unordered else comparison(a, b) & ~nan
        else:
            assert comparison is not None
            found = comparison(a, b)
        results = [found, ~found]
        if other is not None:
            given = ~other if invert else other.copy()
            call = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[joined or ""]
            results = [call(result, given) for result in results]
        for target, result in zip(targets, results, strict=False):
            write(target, result, mask)

    return run


@instruction("selp")
def _selp(state: State, i: Instruction) -> Action:
    target = state.target(i.operands[0], i.type)
    a, b = (state.source(operand, i.type) for operand in i.operands[1:3])
    chosen = state.source(i.operands[3], "pred")

    def run(mask: Mask) -> None:
        write(target, np.where(chosen, a, b), mask)

    return run
