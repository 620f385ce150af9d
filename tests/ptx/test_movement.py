"""Loads, stores, atomic operations and exchanges between lanes."""

from __future__ import annotations

import executor
import numpy as np
import pytest
from small_programs import apply, kernel, run

U32 = np.uint32
LANES = np.arange(64, dtype=U32)


@pytest.mark.parametrize(("count", "size"), [(2, 4), (4, 4), (2, 8), (4, 2), (2, 2)])
def test_vectors(count, size):
    bank = {2: "h", 4: "r", 8: "d"}[size]
    base = 20 if bank == "d" else 1
    names = ", ".join(f"%{bank}{base + n}" for n in range(count))
    kind = f"v{count}.b{8 * size}"
    body = f"""
    mad.wide.u32 %d10, %r0, {count * size}, %d0;
    mad.wide.u32 %d11, %r0, {count * size}, %d1;
    ld.global.{kind} {{{names}}}, [%d10];
    st.global.{kind} [ %d11 + 0 ], {{ {names} }};
    """
    given = np.random.default_rng(0).integers(0, 255, 32 * count * size).astype(np.uint8)
    _, got = run(kernel(body, 2), [given, np.zeros_like(given)])
    np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize(
    ("kind", "dtype", "register", "result"),
    [
        ("u8", np.uint8, "%h1", np.uint16),
        ("s8", np.int8, "%r1", np.int32),
        ("s16", np.int16, "%r1", np.int32),
        ("u16", np.uint16, "%r1", np.uint32),
        ("s32", np.int32, "%d20", np.int64),
    ],
)
def test_narrow_loads_are_extended(kind, dtype, register, result):
    given = np.random.default_rng(1).integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 32, dtype=dtype)
    size = np.dtype(result).itemsize
    body = f"""
    mad.wide.u32 %d10, %r0, {given.itemsize}, %d0;
    mad.wide.u32 %d11, %r0, {size}, %d1;
    ld.global.{kind} {register}, [%d10];
    st.global.b{8 * size} [%d11], {register};
    """
    _, got = run(kernel(body, 2), [given, np.zeros(32, result)])
    np.testing.assert_array_equal(got, given.astype(result))


def test_spaces_and_generic_addresses():
    """A value goes through shared, local and generic addresses, and comes from a parameter at an offset."""
    body = """
    .local .align 8 .b8 mine[16];
    mov.u32 %r1, s;
    mad.lo.s32 %r2, %r0, 4, %r1;
    st.shared.u32 [%r2+8], %r0;
    cvt.u64.u32 %d10, %r2;
    cvta.shared.u64 %d11, %d10;
    ld.u32 %r3, [%d11+8];
    mov.u64 %d12, mine;
    st.local.u32 [%d12+4], %r3;
    cvta.local.u64 %d13, %d12;
    ld.u32 %r4, [%d13+4];
    ld.param.u32 %r5, [more+4];
    mov.u64 %d14, more;
    ld.param.u32 %r6, [%d14+8];
    cvta.param.u64 %d15, %d14;
    ld.u32 %r9, [%d15];
    add.s32 %r4, %r4, %r5;
    add.s32 %r4, %r4, %r6;
    add.s32 %r4, %r4, %r9;
    mad.wide.u32 %d16, %r0, 4, %d0;
    st.u32 [%d16], %r4;
    """
    program = kernel(body, 1, ", .param .align 8 .b8 more[16]", shared=512)
    (got,) = run(program, [np.zeros(64, U32)], threads=64, arguments=[np.array([1000, 100, 10, 0], U32).tobytes()])
    np.testing.assert_array_equal(got, LANES + 1110)


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomic_additions_count(space):
    """Many threads at few places; what `atom` returns is a counter's every value once."""
    body = """
    and.b32 %r1, %r0, 3;
    mad.wide.u32 %d10, %r1, 4, %d0;
    mov.u32 %r2, s;
    mad.lo.s32 %r3, %r1, 4, %r2;
    setp.lt.u32 %p1, %r0, 4;
    @%p1 st.shared.u32 [%r3], 0;
    bar.sync 0;
    WHERE
    mad.wide.u32 %d11, %r0, 4, %d1;
    st.global.u32 [%d11], %r4;
    bar.sync 0;
    ld.shared.u32 %r5, [%r3];
    setp.eq.s32 %p2, 1, SHARED;
    @%p2 st.global.u32 [%d10], %r5;
    """
    where = {
        "global": "atom.global.add.u32 %r4, [%d10], 1; red.global.add.u32 [%d10], 0;",
        "shared": "atom.shared.add.u32 %r4, [%r3], 1; red.shared.add.u32 [%r3], 0;",
    }[space]
    text = body.replace("WHERE", where).replace("SHARED", "1" if space == "shared" else "0")
    counts, seen = run(kernel(text, 2, shared=64), [np.zeros(4, U32), np.zeros(128, U32)], threads=128)
    np.testing.assert_array_equal(counts, [32] * 4)
    for place in range(4):
        assert sorted(seen[place::4]) == list(range(32))


def test_atomic_operations_of_wide_integers_and_floats():
    body = "red.global.add.u64 [%d0], 5; cvt.rn.f32.u32 %f1, %r0; red.global.add.f32 [%d1], %f1; red.global.max.s32 [%d2], %r0;"
    wide, total, most = run(
        kernel(body, 3), [np.array([2**40], np.uint64), np.zeros(1, np.float32), np.array([-1], np.int32)]
    )
    assert (wide[0], total[0], most[0]) == (2**40 + 160, 496.0, 31)


@pytest.mark.parametrize(
    ("mode", "b", "c", "source"),
    [
        ("bfly", 4, 31, lambda lane: lane ^ 4),
        ("idx", 7, 31, lambda lane: lane * 0 + 7),
        ("idx", 3, (24 << 8) | 31, lambda lane: (lane & 24) + 3),
        ("up", 2, 0, lambda lane: np.where(lane >= 2, lane - 2, lane)),
        ("down", 2, 31, lambda lane: np.where(lane + 2 <= 31, lane + 2, lane)),
        ("down", 2, (24 << 8) | 31, lambda lane: np.where(lane % 8 < 6, lane + 2, lane)),
    ],
)
def test_shuffles(mode, b, c, source):
    lane = LANES % 32
    values = LANES * 10 + 1
    warp = LANES // 32 * 32
    got = apply(f"shfl.sync.{mode}.b32 $0, $1, {b}, {c}, -1", values, result=U32)
    np.testing.assert_array_equal(got, values[warp + source(lane)])
    inside = apply(f"shfl.sync.{mode}.b32 %r300|$0, $1, {b}, {c}, -1", values, result=np.bool_)
    np.testing.assert_array_equal(inside, (source(lane) != lane) | (mode in ("idx", "bfly")))


def test_votes_and_election():
    p = LANES == 40
    np.testing.assert_array_equal(apply("vote.sync.any.pred $0, $1, -1", p, result=np.bool_), LANES >= 32)
    np.testing.assert_array_equal(apply("vote.sync.all.pred $0, !$1, -1", p, result=np.bool_), LANES < 32)
    np.testing.assert_array_equal(
        apply("vote.sync.ballot.b32 $0, $1, -1", p, result=U32), np.where(LANES < 32, 0, 1 << 8)
    )
    np.testing.assert_array_equal(apply("elect.sync %r300|$0, -1", LANES, result=np.bool_), LANES % 32 == 0)


def test_of_two_stores_to_one_place_either_may_stay():
    program = kernel("st.global.u32 [%d0], %r0;", 1)
    for order, last in ((executor.EARLY, 31), (executor.LATE, 0)):
        assert run(program, [np.zeros(1, U32)], order=order)[0][0] == last
