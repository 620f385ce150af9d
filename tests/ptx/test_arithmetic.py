"""Instructions that work on registers alone, each against NumPy or Python's integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from small_programs import apply

I32, U32, I64, U64, F32, F64 = np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64
N = 256


def integers(kind: type, seed: int, small: bool = False) -> np.ndarray:
    """All sizes of numbers, with the ends of the range among them."""
    random = np.random.default_rng(seed)
    info = np.iinfo(kind)
    drawn = random.integers(info.min, info.max, N, dtype=kind, endpoint=True)
    drawn >>= random.integers(0, info.bits - 1, N).astype(kind)
    drawn[:4] = info.min, info.max, 0, 1
    return (drawn % kind(40) if small else drawn).astype(kind)


def floats(kind: type, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    drawn = (random.standard_normal(N) * 10.0 ** random.integers(-6, 6, N)).astype(kind)
    drawn[:6] = 0.0, -0.0, np.inf, -np.inf, np.nan, 1.0
    return drawn


def wrapped(number: int, kind: type) -> int:
    bits = np.iinfo(kind).bits
    number &= (1 << bits) - 1
    return number - (1 << bits) if np.iinfo(kind).min < 0 and number >> (bits - 1) else number


def by_python(call, *arrays: np.ndarray, result: type) -> np.ndarray:
    """A function of Python's exact numbers for every element."""
    return np.array([wrapped(call(*map(int, row)), result) for row in zip(*arrays, strict=True)], result)


def toward_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {
    "add.{t} $0, $1, $2": lambda a, b: a + b,
    "sub.{t} $0, $1, $2": lambda a, b: a - b,
    "mul.lo.{t} $0, $1, $2": lambda a, b: a * b,
    "min.{t} $0, $1, $2": min,
    "max.{t} $0, $1, $2": max,
}


@pytest.mark.parametrize("kind", [I32, U32, I64, U64])
@pytest.mark.parametrize("text", INTEGER)
def test_integers_wrap_around(text, kind):
    name = f"{'s' if np.iinfo(kind).min < 0 else 'u'}{np.iinfo(kind).bits}"
    a, b = integers(kind, 1), integers(kind, 2)
    got = apply(text.format(t=name), a, b, result=kind)
    np.testing.assert_array_equal(got, by_python(INTEGER[text], a, b, result=kind))


@pytest.mark.parametrize("kind", [I32, U32, I64, U64])
def test_integer_division_is_towards_zero(kind):
    name = f"{'s' if np.iinfo(kind).min < 0 else 'u'}{np.iinfo(kind).bits}"
    a, b = integers(kind, 1), integers(kind, 2)
    b[b == 0] = 3
    quotients = by_python(toward_zero, a, b, result=kind)
    np.testing.assert_array_equal(apply(f"div.{name} $0, $1, $2", a, b, result=kind), quotients)
    rests = by_python(lambda x, y: x - toward_zero(x, y) * y, a, b, result=kind)
    np.testing.assert_array_equal(apply(f"rem.{name} $0, $1, $2", a, b, result=kind), rests)


@pytest.mark.parametrize(
    ("text", "kind", "result", "call"),
    [
        ("mul.hi.u32 $0, $1, $2", U32, U32, lambda a, b: a * b >> 32),
        ("mul.hi.s32 $0, $1, $2", I32, I32, lambda a, b: a * b >> 32),
        ("mul.hi.u64 $0, $1, $2", U64, U64, lambda a, b: a * b >> 64),
        ("mul.hi.s64 $0, $1, $2", I64, I64, lambda a, b: a * b >> 64),
        ("mul.wide.u32 $0, $1, $2", U32, U64, lambda a, b: a * b),
        ("mul.wide.s32 $0, $1, $2", I32, I64, lambda a, b: a * b),
        ("mad.lo.s32 $0, $1, $2, $1", I32, I32, lambda a, b: a * b + a),
        ("mad.lo.s64 $0, $1, $2, $1", I64, I64, lambda a, b: a * b + a),
        ("mad.wide.s32 $0, $1, $2, -7", I32, I64, lambda a, b: a * b - 7),
        ("mad.wide.u32 $0, $1, $2, 7", U32, U64, lambda a, b: a * b + 7),
        ("and.b32 $0, $1, $2", U32, U32, lambda a, b: a & b),
        ("or.b64 $0, $1, $2", U64, U64, lambda a, b: a | b),
        ("xor.b32 $0, $1, $2", U32, U32, lambda a, b: a ^ b),
        ("lop3.b32 $0, $1, $2, 12, 0x6a", U32, U32, lambda a, b: (a & b) ^ 12),
    ],
)
def test_products_and_bits(text, kind, result, call):
    a, b = integers(kind, 3), integers(kind, 4)
    np.testing.assert_array_equal(apply(text, a, b, result=result), by_python(call, a, b, result=result))


@pytest.mark.parametrize(
    ("text", "kind", "call"),
    [
        ("neg.s32 $0, $1", I32, lambda a: -a),
        ("abs.s64 $0, $1", I64, abs),
        ("not.b32 $0, $1", U32, lambda a: ~a),
        ("popc.b32 $0, $1", U32, lambda a: a.bit_count()),
        ("clz.b32 $0, $1", U32, lambda a: 32 - a.bit_length()),
        ("brev.b32 $0, $1", U32, lambda a: int(f"{a:032b}"[::-1], 2)),
        ("bfind.u32 $0, $1", U32, lambda a: a.bit_length() - 1),
        ("bfind.shiftamt.u32 $0, $1", U32, lambda a: 32 - a.bit_length() if a else -1),
        ("mov.b32 $0, $1", U32, lambda a: a),
        ("shl.b32 $0, $1, 5", U32, lambda a: a << 5),
        ("shr.u32 $0, $1, 5", U32, lambda a: a >> 5),
        ("shr.s32 $0, $1, 5", I32, lambda a: a >> 5),
        ("shr.s64 $0, $1, 99", I64, lambda a: a >> 63),
        ("shl.b64 $0, $1, 99", U64, lambda a: 0),
        ("bfe.u32 $0, $1, 4, 7", U32, lambda a: a >> 4 & 127),
        ("bfe.s32 $0, $1, 4, 7", I32, lambda a: (a >> 4 & 127) - (128 if a >> 10 & 1 else 0)),
        ("bfe.s32 $0, $1, 28, 7", I32, lambda a: a >> 28),
        ("bfe.s32 $0, $1, 3, 1", I32, lambda a: -(a >> 3 & 1)),
        ("bfi.b32 $0, $1, 0xffffffff, 4, 8", U32, lambda a: (0xFFFFFFFF & ~0xFF0) | (a << 4 & 0xFF0)),
        ("prmt.b32 $0, $1, 0x11223344, 0x7610", U32, lambda a: 0x11220000 | (a & 0xFFFF)),
        ("prmt.b32 $0, $1, 0, 0x888b", U32, lambda a: (0xFFFFFF00 if a & 128 else 0) | (255 if a >> 31 else 0)),
    ],
)
def test_one_operand(text, kind, call):
    a = integers(kind, 5)
    result = U32 if text.startswith(("popc", "clz", "bfind")) else kind
    np.testing.assert_array_equal(apply(text, a, result=result), by_python(call, a, result=result))


def test_shifts_by_registers():
    a, amount = integers(U32, 6), integers(U32, 7, small=True)
    for text, call in (("shl.b32", lambda x, n: x << n), ("shr.u32", lambda x, n: x >> n)):
        got = apply(f"{text} $0, $1, $2", a, amount, result=U32)
        np.testing.assert_array_equal(got, by_python(call, a, amount, result=U32))
    signed = a.view(I32)
    got = apply("shr.s32 $0, $1, $2", signed, amount, result=I32)
    np.testing.assert_array_equal(got, by_python(lambda x, n: x >> n, signed, amount, result=I32))


COMPARED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons(name):
    for kind, text in ((I32, "s32"), (U32, "u32"), (I64, "s64")):
        a, b = integers(kind, 8), integers(kind, 9)
        b[::3] = a[::3]
        got = apply(f"setp.{name}.{text} $0, $1, $2", a, b, result=np.bool_)
        np.testing.assert_array_equal(got, COMPARED[name](a, b))
    a, b = floats(F32, 8), floats(F32, 9)
    b[::3] = a[::3]
    nan = np.isnan(a) | np.isnan(b)
    ordered = apply(f"setp.{name}.f32 $0, $1, $2", a, b, result=np.bool_)
    np.testing.assert_array_equal(ordered, COMPARED[name](a, b) & ~nan)
    unordered = apply(f"setp.{name}u.f32 $0, $1, $2", a, b, result=np.bool_)
    np.testing.assert_array_equal(unordered, COMPARED[name](a, b) | nan)


def test_comparisons_of_special_kinds():
    a, b = floats(F64, 10), floats(F64, 11)
    np.testing.assert_array_equal(apply("setp.nan.f64 $0, $1, $2", a, b, result=np.bool_), np.isnan(a) | np.isnan(b))
    np.testing.assert_array_equal(apply("setp.num.f64 $0, $1, $2", a, b, result=np.bool_), ~(np.isnan(a) | np.isnan(b)))
    x, y = integers(I32, 12), integers(I32, 13)
    p = x % 2 == 0
    for name, call in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        got = apply(f"setp.lt.{name}.s32 $0, $1, $2, $3", x, y, p, result=np.bool_)
        np.testing.assert_array_equal(got, call(x < y, p))
        got = apply(f"{name}.pred $0, $1, $2", p, x < y, result=np.bool_)
        np.testing.assert_array_equal(got, call(p, x < y))
    np.testing.assert_array_equal(apply("selp.b32 $0, $1, $2, $3", x, y, p, result=I32), np.where(p, x, y))
    np.testing.assert_array_equal(apply("not.pred $0, $1", p, result=np.bool_), ~p)


@pytest.mark.parametrize("kind", [F32, F64])
def test_floats(kind):
    name = f"f{8 * np.dtype(kind).itemsize}"
    a, b = floats(kind, 14), floats(kind, 15)[::-1].copy()
    with np.errstate(all="ignore"):
        for text, call in (
            ("add.rn", np.add),
            ("sub", np.subtract),
            ("mul", np.multiply),
            ("div.rn", np.divide),
            ("min", np.fmin),
            ("max", np.fmax),
        ):
            got = apply(f"{text}.{name} $0, $1, $2", a, b, result=kind)
            np.testing.assert_array_equal(got, call(a, b), err_msg=text)
        for text, call in (("neg", np.negative), ("abs", np.abs), ("sqrt.rn", np.sqrt), ("rcp.rn", np.reciprocal)):
            np.testing.assert_array_equal(apply(f"{text}.{name} $0, $1", a, result=kind), call(a), err_msg=text)


def test_fused_products():
    a, b, c = floats(F32, 16), floats(F32, 17), floats(F32, 18)[::-1].copy()
    c[10:40] = -(a * b)[10:40]  # what is left is the rounding of the product
    with np.errstate(all="ignore"):
        exact = a.astype(np.longdouble) * b + c
        got = apply("fma.rn.f32 $0, $1, $2, $3", a, b, c, result=F32)
        np.testing.assert_array_equal(got, exact.astype(F32))
        assert (got[10:40] != 0).any()
        down = apply("fma.rm.f32 $0, $1, $2, $3", a, b, c, result=F32)
    finite = np.isfinite(exact.astype(F32))
    assert (down[finite] <= exact[finite]).all()
    assert (np.nextafter(down[finite], F32(np.inf)) > exact[finite]).all()
    x, y = floats(F64, 19), floats(F64, 20)
    with np.errstate(all="ignore"):
        z = -(x * y)
        errors = apply("fma.rn.f64 $0, $1, $2, $3", x, y, z, result=F64)
    from fractions import Fraction

    for u, v, w, e in zip(x[6:], y[6:], z[6:], errors[6:], strict=True):
        assert Fraction(float(u)) * Fraction(float(v)) + Fraction(float(w)) == Fraction(float(e))


@pytest.mark.parametrize(
    ("text", "call", "most"),
    [
        ("ex2.approx.f32", lambda v: 2.0**v, 2**-22),
        ("lg2.approx.f32", math.log2, 2**-22),
        ("rcp.approx.f32", lambda v: 1 / v, 2**-23),
        ("rsqrt.approx.f32", lambda v: v**-0.5, 2**-22),
        ("sqrt.approx.f32", math.sqrt, 2**-22),
        ("tanh.approx.f32", math.tanh, 2**-11),
    ],
)
def test_approximations_are_within_what_is_promised(text, call, most):
    values = np.linspace(0.05, 12, N).astype(F32)
    got = apply(f"{text} $0, $1", values, result=F32).astype(F64)
    true = np.array([call(float(v)) for v in values])
    errors = np.abs(got / true - 1)
    assert errors.max() <= most * 1.01 + 1e-12
    if text.startswith("tanh"):  # … and no better, so that nothing relies on more
        assert errors[:64].min() > most / 2


def test_ftz_takes_subnormal_numbers_for_zero():
    tiny = np.full(N, 1e-40, F32)
    assert (apply("mul.ftz.f32 $0, $1, $2", tiny, np.full(N, 1e10, F32), result=F32) == 0).all()
    assert (apply("mul.f32 $0, $1, $2", tiny, np.full(N, 1e10, F32), result=F32) > 0).all()
    small = np.full(N, 1e-30, F32)
    assert (apply("mul.ftz.f32 $0, $1, $2", small, np.full(N, -1e-10, F32), result=F32) == 0).all()


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, by comparing neighbours."""
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_sixteen_bits():
    a, b = floats(F32, 21)[6:38], floats(F32, 22)[6:38]
    a, b = (np.clip(v, -200, 200) for v in (a, b))
    halves = [v.astype(np.float16) for v in (a, b)]
    for text, call in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        got = apply(f"{text}.f16 $0, $1, $2", *halves, result=np.float16)
        true = call(*(h.astype(F64) for h in halves)).astype(np.float16)
        np.testing.assert_array_equal(got, true)
        packed = [np.stack([h, -h[::-1]], 1).reshape(-1).view(U32) for h in halves]
        got = apply(f"{text}.f16x2 $0, $1, $2", *packed, result=U32).view(np.float16)
        pairs = [p.view(np.float16).astype(F64) for p in packed]
        np.testing.assert_array_equal(got, call(*pairs).astype(np.float16))
    bits = [bfloat16(v) for v in (a, b)]
    wide = [(v.astype(U32) << 16).view(F32).astype(F64) for v in bits]
    got = apply("fma.rn.bf16 $0, $1, $2, $1", *bits, result=np.uint16)
    np.testing.assert_array_equal(got, bfloat16((wide[0] * wide[1] + wide[0]).astype(F32)))
    got = apply("mul.bf16 $0, $1, $2", *bits, result=np.uint16)
    np.testing.assert_array_equal(got, bfloat16((wide[0] * wide[1]).astype(F32)))


def test_conversions_between_floats():
    a = floats(F32, 23)
    got = apply("cvt.rn.bf16.f32 $0, $1", a, result=np.uint16)
    finite = ~np.isnan(a)
    np.testing.assert_array_equal(got[finite], bfloat16(a)[finite])
    assert (got[~finite] == 0x7FFF).all()
    ties = (np.arange(N, dtype=U32) << 15 | 0x3F800000).view(F32)  # halfway between neighbours
    np.testing.assert_array_equal(apply("cvt.rn.bf16.f32 $0, $1", ties, result=np.uint16), bfloat16(ties))
    bits = bfloat16(a)
    np.testing.assert_array_equal(apply("cvt.f32.bf16 $0, $1", bits, result=F32), (bits.astype(U32) << 16).view(F32))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(apply("cvt.rn.f16.f32 $0, $1", a, result=np.float16), a.astype(np.float16))
        h = a.astype(np.float16)
    np.testing.assert_array_equal(apply("cvt.f32.f16 $0, $1", h, result=F32), h.astype(F32))
    np.testing.assert_array_equal(apply("cvt.f64.f32 $0, $1", a, result=F64), a.astype(F64))
    np.testing.assert_array_equal(
        apply("cvt.rn.f32.f64 $0, $1", a.astype(F64) / 3, result=F32), (a.astype(F64) / 3).astype(F32)
    )
    b = floats(F32, 24)[::-1].copy()
    packed = apply("cvt.rn.bf16x2.f32 $0, $1, $2", a[6:230], b[6:230], result=U32)
    np.testing.assert_array_equal(packed & 0xFFFF, bfloat16(b[6:230]))  # the second operand is the lower half
    np.testing.assert_array_equal(packed >> 16, bfloat16(a[6:230]))
    rounded = apply("cvt.rna.tf32.f32 $0, $1", a, result=F32)[6:]
    assert (rounded.view(U32) & 0x1FFF == 0).all()
    assert (np.abs(rounded - a[6:]) <= np.abs(a[6:]) * 2**-11).all()


def test_conversions_of_integers():
    a = integers(I32, 25)
    np.testing.assert_array_equal(apply("cvt.s64.s32 $0, $1", a, result=I64), a.astype(I64))
    np.testing.assert_array_equal(apply("cvt.u64.u32 $0, $1", a.view(U32), result=U64), a.view(U32).astype(U64))
    np.testing.assert_array_equal(
        apply("cvt.u32.u64 $0, $1", integers(U64, 26), result=U32), integers(U64, 26).astype(U32)
    )
    np.testing.assert_array_equal(apply("cvt.u16.u32 $0, $1", a.view(U32), result=np.uint16), a.astype(np.uint16))
    short = integers(np.int16, 27)
    np.testing.assert_array_equal(apply("cvt.s32.s16 $0, $1", short, result=I32), short.astype(I32))
    np.testing.assert_array_equal(apply("cvt.s32.s8 $0, $1", a, result=I32), a.astype(np.int8).astype(I32))
    np.testing.assert_array_equal(apply("cvt.rn.f32.s32 $0, $1", a, result=F32), a.astype(F32))
    np.testing.assert_array_equal(
        apply("cvt.rn.f64.s64 $0, $1", integers(I64, 28), result=F64), integers(I64, 28).astype(F64)
    )
    np.testing.assert_array_equal(apply("cvt.rn.f64.u32 $0, $1", a.view(U32), result=F64), a.view(U32).astype(F64))


def test_conversions_to_integers_clamp():
    a = floats(F64, 29)
    a[20:40] = np.arange(20) - 9.5
    for rounding, call in (("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc)):
        np.testing.assert_array_equal(apply(f"cvt.{rounding}.f64.f64 $0, $1", a, result=F64), call(a))
        for name, kind in (("s32", I32), ("u32", U32), ("s64", I64)):
            info = np.iinfo(kind)
            true = [
                0
                if math.isnan(v)
                else int(min(max(v, info.min), info.max))
                if math.isfinite(v)
                else (info.max if v > 0 else info.min)
                for v in map(float, call(a))
            ]
            got = apply(f"cvt.{rounding}.{name}.f64 $0, $1", a, result=kind)
            np.testing.assert_array_equal(got, np.array(true, dtype=kind))


def test_packing():
    a, b = integers(np.uint16, 30), integers(np.uint16, 31)
    packed = apply("mov.b32 $0, {$1, $2}", a, b, result=U32)
    np.testing.assert_array_equal(packed, a.astype(U32) | b.astype(U32) << 16)
    for text, true in (("{$0, _}", a), ("{_, $0}", b)):
        np.testing.assert_array_equal(apply(f"mov.b32 {text}, $1", packed, result=np.uint16), true)


@pytest.mark.parametrize(
    ("literal", "kind", "true"),
    [
        ("0f3FC00000", F32, 1.5),
        ("0d3FF8000000000000", F64, 1.5),
        ("2.5", F32, 2.5),
        ("-3", I32, -3),
        ("0xffffffff", U32, 2**32 - 1),
        ("0f3FC00000", U32, 0x3FC00000),
    ],
)
def test_constants(literal, kind, true):
    name = {F32: "f32", F64: "f64", I32: "s32", U32: "b32"}[kind]
    assert (apply(f"mov.{name} $0, {literal}", np.zeros(32, U32), result=kind) == true).all()
