"""Branches, barriers and what a program must not do."""

from __future__ import annotations

import contextlib

import executor
import numpy as np
import pytest
from small_programs import kernel, run

U32 = np.uint32
THREADS = np.arange(64, dtype=U32)
STORE = "mad.wide.u32 %d10, %r0, 4, %d0;\nst.global.u32 [%d10], %r1;"


def output(body: str, threads: int = 64, blocks: int = 1, shared: int = 0) -> np.ndarray:
    return run(kernel(body, 1, shared=shared), [np.zeros(threads * blocks, U32)], threads=threads, blocks=blocks)[0]


def test_both_sides_of_a_branch():
    body = f"""
    mov.u32 %r1, 7;
    and.b32 %r2, %r0, 1;
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra EVEN;
    add.s32 %r1, %r1, 100;
    bra.uni END;
    EVEN:
    add.s32 %r1, %r1, 200;
    END:
    add.s32 %r1, %r1, 1;
    {STORE}
    """
    np.testing.assert_array_equal(output(body), np.where(THREADS % 2 == 0, 208, 108))


def test_a_loop_of_a_different_length_in_each_thread():
    body = f"""
    mov.u32 %r1, 0;
    mov.u32 %r2, %r0;
    AGAIN:
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra OUT;
    add.s32 %r1, %r1, %r2;
    sub.s32 %r2, %r2, 1;
    bra AGAIN;
    OUT:
    shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
    add.s32 %r1, %r1, %r3;
    {STORE}
    """
    sums = THREADS * (THREADS + 1) // 2
    np.testing.assert_array_equal(output(body), sums + sums[THREADS ^ 1])


def test_a_side_that_stands_behind_the_end_meets_the_others_at_an_exchange():
    """The block of a condition at the end of the text: the others come to the shuffle first and wait for their lanes."""
    body = f"""
    mov.u32 %r1, %r0;
    and.b32 %r2, %r0, 3;
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra FAR;
    BACK:
    shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
    mov.u32 %r1, %r3;
    {STORE}
    ret;
    FAR:
    add.s32 %r1, %r1, 1000;
    bra BACK;
    """
    values = THREADS + np.where(THREADS % 4 == 0, 1000, 0)
    np.testing.assert_array_equal(output(body), values[THREADS ^ 1])


def test_names_of_inner_scopes_are_their_own():
    body = f"""
    mov.u32 %r1, 1;
    {{ .reg .pred q; .reg .b32 t; mov.u32 t, 5; setp.lt.u32 q, %r0, 32; @!q bra L; add.s32 %r1, %r1, t;
    L:
    }}
    {{ .reg .pred q; .reg .b32 t; mov.u32 t, 7; setp.lt.u32 q, %r0, 48; @!q bra L; add.s32 %r1, %r1, t;
    L:
    }}
    {STORE}
    """
    np.testing.assert_array_equal(output(body), 1 + 5 * (THREADS < 32) + 7 * (THREADS < 48))


def test_blocks_and_special_registers():
    body = """
    mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %ntid.x; mov.u32 %r5, %laneid;
    mad.lo.s32 %r6, %r2, %r4, %r0;
    mad.lo.s32 %r1, %r2, 100, %r5;
    mad.lo.s32 %r1, %r3, 1000, %r1;
    mad.wide.u32 %d10, %r6, 4, %d0; st.global.u32 [%d10], %r1;
    """
    got = output(body, blocks=200)  # more than run together
    places = np.arange(200 * 64)
    np.testing.assert_array_equal(got, 200_000 + places // 64 * 100 + places % 32)


BARRIER = f"""
    mov.u32 %r2, s;
    mad.lo.s32 %r3, %r0, 4, %r2;
    st.shared.u32 [%r3], %r0;
    WAIT
    xor.b32 %r4, %r0, 32;
    mad.lo.s32 %r5, %r4, 4, %r2;
    ld.shared.u32 %r1, [%r5];
    {STORE}
    """


def test_a_barrier_orders_warps():
    np.testing.assert_array_equal(output(BARRIER.replace("WAIT", "bar.sync 0;"), shared=256), THREADS ^ 32)


def test_a_barrier_that_warps_come_to_by_different_ways():
    wait = """
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra ONE;
    bar.sync 0;
    bra BOTH;
    ONE:
    bar.sync 0;
    BOTH:
    """
    np.testing.assert_array_equal(output(BARRIER.replace("WAIT", wait), shared=256), THREADS ^ 32)


def test_a_barrier_of_some_warps():
    """The other two never come to it."""
    body = BARRIER.replace("WAIT", "setp.lt.u32 %p1, %r0, 64; @!%p1 bra END; bar.sync 1, 64;") + "END:"
    np.testing.assert_array_equal(output(body, threads=128, shared=512)[:64], THREADS ^ 32)


def test_a_barrier_does_not_wait_for_threads_that_have_exited():
    body = "setp.ge.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0; mov.u32 %r1, 3;" + STORE
    np.testing.assert_array_equal(output(body), np.where(THREADS < 32, 3, 0))


def fault(
    body: str, *, kind: type = executor.ProgramError, threads: int = 64, shared: int = 256, **options: object
) -> str:
    with pytest.raises(kind) as found:
        run(kernel(body, 1, shared=shared), [np.zeros(64, U32)], threads=threads, **options)
    return str(found.value)


def test_deadlocks():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra END; bar.sync 1, 64; END: bar.sync 0;"
    assert "deadlock: 64 threads wait" in fault(body)
    text = fault("setp.eq.s32 %p1, %r0, 5; @%p1 bra FAR; bar.warp.sync -1; ret; FAR: bar.sync 0;")
    assert "deadlock" in text


def test_registers_that_were_never_written():
    assert "register %r7 is read before it was written (64 threads); at line" in fault("add.s32 %r1, %r7, 1;")
    some = "setp.lt.u32 %p1, %r0, 10; @%p1 mov.u32 %r7, 1; add.s32 %r1, %r7, 1;"
    assert "(54 threads)" in fault(some)
    assert "register %p9" in fault("@%p9 bra END; END:")
    fine = "setp.lt.u32 %p1, %r0, 10; @%p1 mov.u32 %r7, 1; @%p1 add.s32 %r1, %r7, 1;"
    run(kernel(fine, 0), threads=64)


def test_unset_registers_may_be_copied_where_that_is_allowed():
    memory = executor.GlobalMemory(4096)
    place = memory.add(np.zeros(256, np.uint8), writable=True).to_bytes(8, "little")
    copied = "setp.lt.u32 %p1, %r0, 10; @%p1 mov.u32 %r7, 1; add.s32 %r1, %r7, 1; "
    for use, wrong in (("", False), ("@%p1 st.global.u32 [%d0], %r1;", False), (STORE, True)):
        program = kernel(copied + use, 1)
        if wrong:
            with pytest.raises(
                executor.ProgramError, match=r"register %r1 is read before it was written \(54 threads\)"
            ):
                executor.launch(program, memory, [place], grid=(1, 1, 1), threads=64, strict=False)
        else:
            executor.launch(program, memory, [place], grid=(1, 1, 1), threads=64, strict=False)


@pytest.mark.parametrize(("thread", "wrong"), [(0, True), (1, False), (8, True), (33, False)])
def test_a_shuffle_passes_on_what_the_other_lane_never_wrote(thread, wrong):
    """Even lanes set a register, and every lane gets its neighbour's, which odd ones alone may store."""
    memory = executor.GlobalMemory(4096)
    place = memory.add(np.zeros(256, np.uint8), writable=True).to_bytes(8, "little")
    program = kernel(
        "and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 0; @%p1 mov.u32 %r7, 1; "
        "shfl.sync.bfly.b32 %r1, %r7, 1, 31, -1; add.s32 %r1, %r1, 1; "
        f"setp.eq.u32 %p2, %r0, {thread}; mad.wide.u32 %d10, %r0, 4, %d0; @%p2 st.global.u32 [%d10], %r1;",
        1,
    )
    refused = pytest.raises(executor.ProgramError, match="%r1 is read before it was written")
    with refused if wrong else contextlib.nullcontext():
        executor.launch(program, memory, [place], grid=(1, 1, 1), threads=64, strict=False)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "mad.wide.u32 %d10, %r0, 4, %d0; ld.global.u32 %r1, [%d10+4];",
            "global load of 4 bytes outside of every tensor",
        ),
        ("ld.global.u32 %r1, [%d0+-4];", "byte -4 of the nearest one, of 256"),
        ("mad.wide.u32 %d10, %r0, 4, %d0; st.global.u32 [%d10+1000000], %r0;", "global store"),
        ("ld.global.u32 %r1, [%d0+2];", "misaligned access of 4 bytes to global memory"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+8];", "misaligned access of 16 bytes to global memory"),
        ("mov.u32 %r2, s; ld.shared.u32 %r1, [%r2+256];", "access of 4 bytes at shared address 256, of 256 bytes"),
        ("mov.u32 %r2, s; ld.shared.u32 %r1, [%r2+2];", "misaligned access of 4 bytes to shared memory"),
        ("mov.u32 %r2, s; ld.shared.u32 %r1, [%r2+-4];", "shared address -4"),
        ("mov.u64 %d9, 64; ld.u32 %r1, [%d9];", "generic addresses of several spaces, or of none"),
    ],
)
def test_bounds_and_alignment(body, said):
    assert said in fault(body)


def test_what_lies_between_rows_is_no_part_of_a_tensor():
    memory = executor.GlobalMemory(4096)
    valid = np.ones(256, np.bool_)
    valid[100:104] = False
    place = memory.add(np.zeros(256, np.uint8), valid=valid)
    program = kernel("mad.wide.u32 %d10, %r0, 4, %d0; ld.global.u32 %r1, [%d10];", 1)
    with pytest.raises(executor.ProgramError, match="byte 100 of the nearest one"):
        executor.launch(program, memory, [place.to_bytes(8, "little")], grid=(1, 1, 1), threads=64)


def test_tensors_that_are_only_read():
    program = kernel("st.global.u32 [%d0], %r0;", 1)
    with pytest.raises(executor.ProgramError, match="outside of a tensor that was passed to be written"):
        run(program, [np.zeros(64, U32)], written=[])


def test_what_is_not_known_is_said():
    with pytest.raises(executor.UnsupportedInstructionError, match=r"line \d+: tex.2d"):
        run(kernel("tex.2d.v4.f32.f32 {%f1}, [s];"))
    with pytest.raises(executor.UnsupportedInstructionError, match=r"shf\.l\.wrap"):
        run(kernel("shf.l.wrap.b32 %r1, %r0, %r0, 3;"))


def test_a_loop_without_end(monkeypatch):
    from executor import machine

    monkeypatch.setattr(machine, "_MOST_STEPS", 1000)
    assert "more than 1000 instructions" in fault("L: bra L;")


def test_arguments_that_do_not_fit():
    program = kernel("", 1)
    with pytest.raises(ValueError, match="has 1 parameters; got 0 arguments"):
        executor.launch(program, executor.GlobalMemory(64), [], grid=(1, 1, 1), threads=32)
    with pytest.raises(ValueError, match="has 8 bytes; got 4"):
        executor.launch(program, executor.GlobalMemory(64), [bytes(4)], grid=(1, 1, 1), threads=32)
    with pytest.raises(ValueError, match="multiple of 32; got 33"):
        executor.launch(program, executor.GlobalMemory(64), [bytes(8)], grid=(1, 1, 1), threads=33)
