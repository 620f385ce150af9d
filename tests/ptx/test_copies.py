"""Asynchronous copies: groups of cp.async, phases of mbarriers, boxes and swizzles of tensor copies."""

from __future__ import annotations

import executor
import numpy as np
import pytest
from small_programs import kernel, run

U32 = np.uint32
BOTH = (executor.EARLY, executor.LATE)


def groups_of_copies(wait: str, order: executor.Order) -> np.ndarray:
    """Each thread copies its element of three arrays in a group each, and reads all three after `wait`."""
    body = f"""
    mov.u32 %r2, s; mad.lo.s32 %r3, %r0, 4, %r2; mad.wide.u32 %d10, %r0, 4, %d0;
    mov.b32 %r9, -1; st.shared.u32 [%r3], %r9; st.shared.u32 [%r3+128], %r9; st.shared.u32 [%r3+256], %r9;
    cp.async.ca.shared.global [ %r3 + 0 ], [ %d10 + 0 ], 0x4; cp.async.commit_group;
    cp.async.ca.shared.global [%r3+128], [%d10+128], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r3+256], [%d10+256], 4;
    {wait}
    mad.wide.u32 %d11, %r0, 4, %d1;
    ld.shared.u32 %r4, [%r3]; st.global.u32 [%d11], %r4;
    ld.shared.u32 %r4, [%r3+128]; st.global.u32 [%d11+128], %r4;
    ld.shared.u32 %r4, [%r3+256]; st.global.u32 [%d11+256], %r4;
    """
    arrays = [np.arange(96, dtype=U32), np.zeros((3, 32), U32)]
    return run(kernel(body, 2, shared=384), arrays, order=order, watch=False)[1]


@pytest.mark.parametrize(
    ("wait", "there"),
    [
        ("cp.async.wait_group 1;", 1),
        ("cp.async.wait_group 0;", 2),
        ("cp.async.wait_all;", 3),
        ("", 0),
        ("cp.async.commit_group; cp.async.wait_group 0;", 3),
        ("cp.async.commit_group; cp.async.wait_group 1;", 2),
    ],
)
def test_groups(wait, there):
    """In the late order exactly the groups that were waited for have come."""
    data = np.arange(96, dtype=U32).reshape(3, 32)
    np.testing.assert_array_equal(groups_of_copies(wait, executor.EARLY), data)
    late = groups_of_copies(wait, executor.LATE)
    np.testing.assert_array_equal(late[:there], data[:there])
    assert (late[there:] == 0xFFFFFFFF).all()


@pytest.mark.parametrize("order", BOTH)
def test_what_is_not_read_becomes_zero(order):
    """A source size below the copy's: 0, 4, 8, 12 or 16 bytes, and none of the rest is looked at."""
    body = """
    mov.u32 %r2, s; mad.lo.s32 %r3, %r0, 16, %r2; mad.wide.u32 %d10, %r0, 16, %d0;
    rem.u32 %r4, %r0, 5; shl.b32 %r4, %r4, 2;
    cp.async.cg.shared.global [%r3], [%d10], 16, %r4;
    cp.async.wait_all;
    ld.shared.v4.b32 {%r11, %r12, %r13, %r14}, [%r3];
    mad.wide.u32 %d11, %r0, 16, %d1; st.global.v4.b32 [%d11], {%r11, %r12, %r13, %r14};
    """
    data = np.arange(1, 129, dtype=U32).reshape(32, 4)
    _, got = run(kernel(body, 2, shared=512), [data, np.zeros((32, 4), U32)], order=order)
    sizes = np.arange(32) % 5
    np.testing.assert_array_equal(got, np.where(np.arange(4) < sizes[:, None], data, 0))


def test_a_copy_beyond_a_tensor():
    body = "mov.u32 %r2, s; mad.wide.u32 %d10, %r0, 16, %d0; cp.async.cg.shared.global [%r2], [%d10+16], 16; cp.async.wait_all;"
    for order in BOTH:
        with pytest.raises(executor.ProgramError, match="outside of every tensor"):
            run(kernel(body, 1, shared=512), [np.zeros(128, U32)], order=order, watch=False)


# Tensor copies


def tensor(rows: int, columns: int, dtype: type = np.uint16) -> np.ndarray:
    return np.arange(1, rows * columns + 1).astype(dtype).reshape(rows, columns)


LOAD = """
    mov.u32 %r2, s;
    setp.eq.s32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r2+16384], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2+16384], BYTES;
    mov.b64 %d20, map; cvta.param.u64 %d20, %d20;
    mov.b32 %r5, COLUMN; mov.b32 %r6, ROW; add.s32 %r7, %r2, 16384; mov.b32 %r8, 0;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%d20, {%r5, %r6}], [%r7];
    {
    .reg .pred done;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 done, [%r7], %r8;
    @!done bra.uni waitLoop;
    }
    """
MAP = ", .param .align 64 .b8 map[128]"


def box_in_shared(data: np.ndarray, box: tuple[int, int], swizzle: int, row: int, column: int, order) -> np.ndarray:
    """Shared memory after a box was loaded, as 16-byte pieces of elements."""
    size = box[0] * box[1] * data.itemsize
    body = (
        LOAD.replace("BYTES", str(size)).replace("COLUMN", str(column)).replace("ROW", str(row))
        + f"""
    mov.u32 %r9, %r0;
    OUT:
    setp.lt.u32 %p2, %r9, {size // 16};
    mad.lo.s32 %r3, %r9, 16, %r2;
    ld.shared.v4.b32 {{%r11, %r12, %r13, %r14}}, [%r3];
    mad.wide.u32 %d11, %r9, 16, %d0;
    @%p2 st.global.v4.b32 [%d11], {{%r11, %r12, %r13, %r14}};
    add.s32 %r9, %r9, 64;
    setp.lt.u32 %p2, %r9, {size // 16};
    @%p2 bra OUT;
    """
    )
    memory = executor.GlobalMemory(executor.GlobalMemory.needed(data.nbytes, size))
    place = memory.add(data.reshape(-1).view(np.uint8))
    described = executor.TensorMap(place, data.shape, data.shape[1] * data.itemsize, box, data.itemsize, swizzle)
    program = kernel(body, 1, MAP, shared=16392)
    out = np.zeros(size // data.itemsize, data.dtype)
    (got,) = run(program, [out], threads=64, order=order, arguments=[described], memory=memory)
    return got.reshape(-1, 16 // data.itemsize)


@pytest.mark.parametrize("order", BOTH)
@pytest.mark.parametrize(("box", "swizzle"), [((16, 64), 3), ((16, 32), 2), ((16, 16), 1), ((8, 40), 0), ((16, 32), 3)])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (30, 72), (-3, -5), (100, 0)])
def test_boxes_and_swizzles(box, swizzle, row, column, order):
    """Zero outside of the matrix; piece p of line l (of the swizzle's width) stands where p ^ l modulo 8, 4 or 2 would."""
    data = tensor(40, 104)
    got = box_in_shared(data, box, swizzle, row, column, order)
    padded = np.zeros((300, 300), np.uint16)
    padded[100:140, 100:204] = data
    true = padded[100 + row : 100 + row + box[0], 100 + column : 100 + column + box[1]].reshape(-1, 8)
    for piece, values in enumerate(true):
        exchanged = piece ^ (piece // 8 % (1 << swizzle)) if swizzle else piece
        np.testing.assert_array_equal(got[exchanged], values)


@pytest.mark.parametrize("order", BOTH)
def test_a_tensor_store_is_clipped(order):
    """The way back, into a matrix that is smaller than the box; nothing else is written."""
    data, out = tensor(16, 64), np.zeros((12, 56), np.uint16)
    body = (
        LOAD.replace("BYTES", "2048").replace("COLUMN", "0").replace("ROW", "0")
        + """
    fence.proxy.async.shared::cta; bar.sync 0;
    mov.b64 %d21, to; cvta.param.u64 %d21, %d21;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d21, {%r5, %r6}], [%r2];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    bar.sync 0;
    st.shared.u32 [%r2], %r0;
    """
    )
    memory = executor.GlobalMemory(executor.GlobalMemory.needed(data.nbytes, out.nbytes))
    source = memory.add(data.reshape(-1).view(np.uint8))
    target = memory.add(out.reshape(-1).view(np.uint8), writable=True)
    maps = [
        executor.TensorMap(source, data.shape, 128, (16, 64), 2, 3),
        executor.TensorMap(target, out.shape, 112, (16, 64), 2, 3),
    ]
    program = kernel(body, 0, MAP + MAP.replace("map", "to"), shared=16392)
    run(program, threads=64, order=order, arguments=maps, memory=memory)
    got = memory.read(target, out.nbytes).view(np.uint16).reshape(out.shape)
    np.testing.assert_array_equal(got, data[:12, :56])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"address": 8}, "multiples of 16 bytes"),
        ({"stride": 200}, "multiples of 16 bytes"),
        ({"box": (257, 64)}, "outside of 1 to 256"),
        ({"box": (16, 4)}, "lines of a box must be multiples of 16 bytes"),
        ({"box": (16, 72)}, "wider than its swizzle"),
    ],
)
def test_maps_that_a_driver_would_refuse(changes, said):
    fine = {"address": 0, "shape": (40, 104), "stride": 208, "box": (16, 64), "itemsize": 2, "swizzle": 3}
    executor.TensorMap(**fine)
    with pytest.raises(executor.ProgramError, match=said):
        executor.TensorMap(**{**fine, **changes})


# mbarriers


def barrier_fault(change: tuple[str, str], order: executor.Order = executor.LATE) -> str:
    assert change[0] in LOAD
    body = LOAD.replace(*change).replace("BYTES", "2048").replace("COLUMN", "0").replace("ROW", "0")
    memory = executor.GlobalMemory(65536)
    place = memory.add(tensor(40, 104).reshape(-1).view(np.uint8))
    described = executor.TensorMap(place, (40, 104), 208, (16, 64), 2, 3)
    with pytest.raises(executor.ProgramError) as found:
        run(kernel(body, 0, MAP, shared=16392), threads=64, order=order, arguments=[described], memory=memory)
    return str(found.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("BYTES", "2064"), "deadlock"),  # more bytes are expected than come
        (("[%r2+16384], 1;", "[%r2+16384], 2;"), "deadlock"),  # a second arrival that never comes
        (("@%p1 mbarrier.init.shared::cta.b64 [%r2+16384], 1;", ""), "not initialized"),
        (("@%p1 mbarrier.arrive.expect_tx", "mbarrier.arrive.expect_tx"), "more arrivals"),
        (("[%r2], [%d20", "[%r7], [%d20"), "shared"),  # over the end of shared memory
        (
            (
                "@!done bra.uni waitLoop;",
                "@!done bra.uni waitLoop; @%p1 mbarrier.inval.shared::cta.b64 [%r7]; bar.sync 0;"
                " mbarrier.try_wait.parity.shared::cta.b64 done, [%r7], %r8;",
            ),
            "not initialized",
        ),
        (("@%p1 cp.async", "cp.async"), "deadlock|more|race"),
    ],
)
def test_faults_of_mbarriers(change, said):
    for order in BOTH:
        text = barrier_fault(change, order)
        assert any(word in text for word in said.split("|")), text


def test_a_load_that_is_never_waited_for():
    body = (
        LOAD[: LOAD.index("{\n    .reg .pred done")].replace("BYTES", "2048").replace("COLUMN", "0").replace("ROW", "0")
    )
    memory = executor.GlobalMemory(65536)
    place = memory.add(tensor(40, 104).reshape(-1).view(np.uint8))
    described = executor.TensorMap(place, (40, 104), 208, (16, 64), 2, 3)
    with pytest.raises(executor.ProgramError, match="1 tensor loads were never waited for"):
        run(kernel(body, 0, MAP, shared=16392), threads=64, order=executor.LATE, arguments=[described], memory=memory)


def test_phases_follow_each_other():
    """Two warps hand a value to and fro through two mbarriers, each phase of which is waited for by its parity."""
    wait = """
    {{ .reg .pred d;
    L: mbarrier.try_wait.parity.shared::cta.b64 d, [%r2+{at}], {parity};
    @!d bra L;
    }}"""
    body = (
        """
    mov.u32 %r2, s; mov.b32 %r5, 0; mov.b32 %r3, 0; mov.b32 %r4, 1;
    setp.eq.s32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r2+64], 32;
    @%p1 mbarrier.init.shared::cta.b64 [%r2+72], 32;
    @%p1 st.shared.u32 [%r2], %r5;
    bar.sync 0;
    setp.lt.u32 %p2, %r0, 32;
    @%p2 bra FIRST;
    SECOND:
    """
        + wait.format(at=64, parity="%r3")
        + """
    ld.shared.u32 %r6, [%r2]; add.s32 %r6, %r6, 10; bar.warp.sync -1; st.shared.u32 [%r2], %r6;
    mbarrier.arrive.shared::cta.b64 _, [%r2+72];
    xor.b32 %r3, %r3, 1; add.s32 %r5, %r5, 1; setp.lt.s32 %p3, %r5, 3; @%p3 bra SECOND;
    bra END;
    FIRST:
    """
        + wait.format(at=72, parity="%r4")
        + """
    ld.shared.u32 %r6, [%r2]; add.s32 %r6, %r6, 1; bar.warp.sync -1; st.shared.u32 [%r2], %r6;
    mbarrier.arrive.shared::cta.b64 _, [%r2+64];
    xor.b32 %r4, %r4, 1; add.s32 %r5, %r5, 1; setp.lt.s32 %p3, %r5, 3; @%p3 bra FIRST;
    END:
    bar.sync 0;
    ld.shared.u32 %r6, [%r2]; st.global.u32 [%d0], %r6;
    """
    )
    assert run(kernel(body, 1, shared=128), [np.zeros(1, U32)], threads=64)[0][0] == 33
