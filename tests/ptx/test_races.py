"""Missing barriers, waits and proxy fences are found although the order that was run gives the right numbers."""

from __future__ import annotations

import executor
import numpy as np
import pytest
from small_programs import kernel, run

U32 = np.uint32

EXCHANGE = """
    mov.u32 %r2, s; mad.lo.s32 %r3, %r0, 4, %r2; xor.b32 %r4, %r0, 32; mad.lo.s32 %r5, %r4, 4, %r2;
    st.shared.u32 [%r3], %r0;
    bar.sync 0; // first
    ld.shared.u32 %r1, [%r5];
    bar.sync 0; // second
    st.shared.u32 [%r3], %r1;
    """


def execute(body: str, shared: int = 1024, threads: int = 64, **options: object) -> None:
    run(kernel(body, 0, shared=shared), threads=threads, **options)


def test_reads_and_writes_of_other_warps():
    execute(EXCHANGE)
    with pytest.raises(
        executor.ProgramError, match=r"race in shared memory: warp 0: read of what warp 1 wrote.*line \d+: ld.shared"
    ):
        execute(EXCHANGE.replace("bar.sync 0; // first", ""))
    with pytest.raises(
        executor.ProgramError, match=r"race in shared memory: warp 0: write of what warp 1 read.*st.shared"
    ):
        execute(EXCHANGE.replace("bar.sync 0; // second", ""))
    with pytest.raises(executor.ProgramError, match="write of what warp 0 wrote"):
        execute(
            "mov.u32 %r2, s; and.b32 %r4, %r0, 31; mad.lo.s32 %r3, %r4, 4, %r2; setp.lt.u32 %p1, %r0, 32;"
            "@%p1 st.shared.u32 [%r3], %r0; @!%p1 st.shared.u32 [%r3], %r0;"
        )


def test_a_warp_needs_no_barrier_of_the_block_for_itself():
    execute(EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;").replace("%r0, 32", "%r0, 16"))


def test_a_barrier_of_other_warps_is_none():
    """Warps 0 and 1 meet; what warp 2 wrote is still unknown to them."""
    body = """
    mov.u32 %r2, s; mad.lo.s32 %r3, %r0, 4, %r2;
    st.shared.u32 [%r3], %r0;
    setp.ge.u32 %p1, %r0, 64; @%p1 bra END;
    bar.sync 1, 64;
    ld.shared.u32 %r1, [%r2+PLACE];
    END: bar.sync 0;
    """
    execute(body.replace("PLACE", "128"), threads=96)
    with pytest.raises(executor.ProgramError, match="read of what warp 2 wrote"):
        execute(body.replace("PLACE", "256"), threads=96)


def test_bytes_of_one_word_are_not_each_other():
    body = "mov.u32 %r2, s; mad.lo.s32 %r3, %r0, {n}, %r2; cvt.u16.u32 %h1, %r0; {store}; ld.shared.{t} %h2, [%r3];"
    execute(body.format(n=2, t="u16", store="st.shared.u16 [%r3], %h1"))
    execute(body.format(n=1, t="u8", store="st.shared.u8 [%r3], %h1"))


def test_atomic_additions_race_with_plain_accesses_alone():
    body = """
    mov.u32 %r2, s; setp.eq.s32 %p1, %r0, 0;
    @%p1 st.shared.u32 [%r2], 0;
    bar.sync 0; // first
    red.shared.add.u32 [%r2], 1;
    bar.sync 0; // second
    ld.shared.u32 %r1, [%r2];
    """
    execute(body)
    with pytest.raises(executor.ProgramError, match="atomic of what warp 0 wrote"):
        execute(body.replace("bar.sync 0; // first", ""))
    with pytest.raises(executor.ProgramError, match="read of what warp 1 added to"):
        execute(body.replace("bar.sync 0; // second", ""))


COPY = """
    mov.u32 %r2, s; mad.lo.s32 %r3, %r0, 16, %r2; mad.wide.u32 %d10, %r0, 16, %d0;
    cp.async.cg.shared.global [%r3], [%d10], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r4, %r0, 32; mad.lo.s32 %r5, %r4, 16, %r2;
    ld.shared.u32 %r1, [%r5];
    bar.sync 0; // second
    cp.async.cg.shared.global [%r3], [%d10], 16;
    cp.async.wait_all;
    """


def copy(body: str) -> None:
    """In the early order, where the numbers are right whatever is missing."""
    run(kernel(body, 1, shared=1024), [np.zeros(256, U32)], threads=64)


def test_cp_async():
    copy(COPY)
    with pytest.raises(executor.ProgramError, match=r"read of what cp\.async of warp 1 wrote"):
        copy(COPY.replace("cp.async.wait_group 0;", ""))
    with pytest.raises(executor.ProgramError, match=r"read of what cp\.async of warp 1 wrote"):
        copy(COPY.replace("cp.async.wait_group 0;\n    bar.sync 0;", "bar.sync 0; cp.async.wait_group 0;"))
    with pytest.raises(executor.ProgramError, match=r"cp\.async of what warp 1 read"):
        copy(COPY.replace("bar.sync 0; // second", ""))


PRODUCT = """
    mov.u32 %r2, s; mad.lo.s32 %r3, %r0, 16, %r2; mov.b32 %r1, 0;
    st.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %d20, 0x4000004000010000; mov.b64 %d21, %d20;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %d20, %d21, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    bar.sync 0; // second
    st.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1};
    """


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("fence.proxy.async.shared::cta;", "through the asynchronous proxy"),
        ("bar.sync 0;\n    mov.b64", "read through the asynchronous proxy of what warp"),
        ("wgmma.wait_group.sync.aligned 0;", "write of what wgmma of warpgroup 0 read"),
    ],
)
def test_wgmma(removed, said):
    execute(PRODUCT, 16384, 128)
    assert removed in PRODUCT
    kept = "mov.b64" if removed.endswith("mov.b64") else ""
    with pytest.raises(executor.ProgramError, match=said):
        execute(PRODUCT.replace(removed, kept, 1), 16384, 128)


def test_a_fence_before_the_barrier_or_after_it():
    after = PRODUCT.replace(
        "fence.proxy.async.shared::cta;\n    bar.sync 0;", "bar.sync 0; fence.proxy.async.shared::cta;"
    )
    execute(after, 16384, 128)


TENSOR = """
    mov.u32 %r2, s; add.s32 %r7, %r2, 8192; mov.b32 %r5, 0; mov.b32 %r8, 0;
    setp.eq.s32 %p1, %r0, 0; mad.lo.s32 %r3, %r0, 16, %r2;
    mov.b64 %d20, map; cvta.param.u64 %d20, %d20;
    @%p1 mbarrier.init.shared::cta.b64 [%r7], 1;
    ld.shared.u32 %r9, [%r3];
    bar.sync 0; // first
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r7], 1024;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%d20, {%r5, %r5}], [%r7];
    L: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r7], %r8;
    @!%p2 bra L;
    ld.shared.u32 %r9, [%r3];
    st.shared.u32 [%r3], %r9;
    fence.proxy.async.shared::cta;
    bar.sync 0; // second
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d20, {%r5, %r5}], [%r2];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    bar.sync 0; // third
    st.shared.u32 [%r3], %r9;
    """


def tensor_copy(body: str) -> None:
    memory = executor.GlobalMemory(8192)
    place = memory.add(np.zeros(1024, np.uint8), writable=True)
    described = executor.TensorMap(place, (8, 64), 128, (8, 64), 2, 3)
    program = kernel(body, 0, ", .param .align 64 .b8 map[128]", shared=8200)
    run(program, threads=64, arguments=[described], memory=memory)


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("bar.sync 0; // first", "tensor load of what warp 1 read|mbarrier"),
        ("@!%p2 bra L;", ""),  # the early order has it there at once: the wait was made
        (
            "L: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r7], %r8;\n    @!%p2 bra L;",
            "read of what a tensor load wrote",
        ),
        ("fence.proxy.async.shared::cta;", "read through the asynchronous proxy"),
        ("bar.sync 0; // second", "read through the asynchronous proxy of what warp 1 wrote"),
        ("cp.async.bulk.wait_group.read 0;", "write of what a tensor store read"),
        ("bar.sync 0; // third", "write of what a tensor store read"),
    ],
)
def test_tensor_copies(removed, said):
    tensor_copy(TENSOR)
    assert removed in TENSOR
    if said:
        with pytest.raises(executor.ProgramError, match=said):
            tensor_copy(TENSOR.replace(removed, ""))
    else:
        tensor_copy(TENSOR.replace(removed, ""))
