"""Products of warps and warpgroups, and the ways of their operands: element by element, as the ISA's figures say."""

from __future__ import annotations

import executor
import numpy as np
import pytest
from executor.warpgroup import tile_offsets
from small_programs import kernel, run

U32, U16, F32 = np.uint32, np.uint16, np.float32
BOTH = (executor.EARLY, executor.LATE)


def halves(*shape: int, seed: int = 0) -> np.ndarray:
    """Small integers, which float16 and bfloat16 hold exactly, as float32."""
    return np.random.default_rng(seed).integers(-8, 8, shape).astype(F32)


def bits(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return values.astype(np.float16).view(U16)
    return (np.ascontiguousarray(values, F32).view(U32) >> 16).astype(U16)


def pairs(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(U32) | high.astype(U32) << 16


FILL = """
    mov.u32 %r2, s;
    mad.wide.u32 %d10, %r0, 16, %d0;
    ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%d10];
    mad.lo.s32 %r3, %r0, 16, %r2;
    st.shared.v4.b32 [%r3], {%r11, %r12, %r13, %r14};
    bar.sync 0;
    """


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Lane l gets elements 2·(l%4) and the next of row l//4 of each matrix, or of column l//4 of the transposed ones."""
    names = ", ".join(f"%r{20 + n}" for n in range(count))
    stores = "".join(f"st.global.b32 [%d11+{128 * n}], %r{20 + n};" for n in range(count))
    body = f"""{FILL}
    and.b32 %r4, %r0, {8 * count - 1};
    mad.lo.s32 %r5, %r4, 16, %r2;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{names}}}, [%r5];
    mad.wide.u32 %d11, %r0, 4, %d1;
    {stores}
    """
    given = np.arange(256, dtype=U16)
    _, got = run(kernel(body, 2, shared=512), [given, np.zeros(32 * count, U32)])
    for n in range(count):
        matrix = given[64 * n : 64 * n + 64].reshape(8, 8)
        matrix = matrix.T if transposed else matrix
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            assert got[32 * n + lane] == pairs(matrix[row, column], matrix[row, column + 1])


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_the_way_back(transposed):
    trans = ".trans" if transposed else ""
    body = f"""{FILL}
    mad.lo.s32 %r5, %r0, 16, %r2;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r5];
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5+512], {{%r20, %r21, %r22, %r23}};
    bar.sync 0;
    ld.shared.v4.b32 {{%r11, %r12, %r13, %r14}}, [%r3+512];
    mad.wide.u32 %d11, %r0, 16, %d1;
    st.global.v4.b32 [%d11], {{%r11, %r12, %r13, %r14}};
    """
    given = np.arange(256, dtype=U16)
    _, got = run(kernel(body, 2, shared=1024), [given, np.zeros(256, U16)])
    np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize(("kind", "depth"), [("bf16", 16), ("f16", 16), ("bf16", 8), ("tf32", 8), ("tf32", 4)])
def test_mma(kind, depth):
    """Fragments as in "Matrix Fragments for mma.m16n8k…": a0 is row g, a1 row g+8, a2 and a3 the second half of k."""
    A, B, C = halves(16, depth, seed=1), halves(depth, 8, seed=2), halves(16, 8, seed=3)
    lane = np.arange(32)
    g, t = lane // 4, lane % 4

    def word(matrix: np.ndarray, at) -> np.ndarray:
        if kind == "tf32":
            return matrix[at(0)].view(U32) | U32(0x1ABC)  # the lower bits are not used
        return pairs(bits(matrix[at(0)], kind), bits(matrix[at(1)], kind))

    each = 1 if kind == "tf32" else 2
    steps = depth // (4 * each)
    a = [word(A, lambda j, h=h, v=v: (g + 8 * v, 4 * each * h + each * t + j)) for h in range(steps) for v in range(2)]
    b = [word(B, lambda j, h=h: (4 * each * h + each * t + j, g)) for h in range(steps)]
    c = [C[g + 8 * v, 2 * t + j].view(U32) for v in range(2) for j in range(2)]
    inputs = [*a, *b, *c]
    loads = "".join(f"ld.global.b32 %r{20 + n}, [%d10+{128 * n}];" for n in range(len(inputs)))
    stores = "".join(f"st.global.b32 [%d11+{128 * n}], %r{60 + n};" for n in range(4))

    def names(first: int, count: int) -> str:
        return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"

    operands = (names(60, 4), names(20, len(a)), names(20 + len(a), len(b)), names(20 + len(a) + len(b), 4))
    body = f"""
    mad.wide.u32 %d10, %r0, 4, %d0; mad.wide.u32 %d11, %r0, 4, %d1;
    {loads}
    mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {", ".join(operands)};
    {stores}
    """
    _, got = run(kernel(body, 2), [np.concatenate(inputs), np.zeros((4, 32), F32)])
    D = A @ B + C
    for v in range(2):
        for j in range(2):
            np.testing.assert_array_equal(got[2 * v + j], D[g + 8 * v, 2 * t + j])


def laid_out(matrix: np.ndarray, kind: str, line: int, transposed: bool) -> np.ndarray:
    """Shared memory for an operand [rows, 16], by the figures of "Shared Memory Matrix Layout": lines in atoms of eight.

    Not transposed, a line holds k of one row, and atoms of eight rows follow each other. Transposed, a line holds rows of one
    k: atoms of eight k follow each other, and behind both of them comes the next piece of rows. The 16-byte pieces of a line
    are exchanged by the line's number within 1024, 512 or 256 bytes.
    """
    rows = matrix.shape[0]
    memory = np.zeros(16384, np.uint8)
    values = bits(matrix, kind)
    per_line = line // 2
    for r in range(rows):
        for k in range(16):
            if transposed:
                number = r // per_line * 16 + k  # lines before this one
                place = 2 * (r % per_line)
            else:
                number, place = r, 2 * k
            offset = number * line + place
            piece = offset // 16
            group = {128: 8, 64: 4, 32: 2}[line]  # pieces that are exchanged, by the bits above them
            exchanged = piece ^ (offset // 128 % group)
            at = exchanged * 16 + offset % 16
            memory[at : at + 2] = values[r, k : k + 1].view(np.uint8)
    return memory


MODES = {128: 1, 64: 2, 32: 3}


def descriptor(start: int, line: int, transposed: bool) -> int:
    leading, stride = (16 * line, 8 * line) if transposed else (16, 8 * line)
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[line] << 62


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("line", [128, 64, 32])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_wgmma(kind, line, transposed):
    """Two products into one accumulator, early and late, of two warpgroups."""
    N = 32
    A, B = halves(64, 16, seed=4), halves(N, 16, seed=5)
    memory = np.concatenate([laid_out(A, kind, line, transposed[0]), laid_out(B, kind, line, transposed[1])])
    a, b = descriptor(0, line, transposed[0]), descriptor(16384, line, transposed[1])
    registers = ", ".join(f"%f{20 + n}" for n in range(N // 2))
    flags = f"{int(transposed[0])}, {int(transposed[1])}"
    product = f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.{kind}.{kind} {{{registers}}}, %d20, %d21"
    body = f"""
    mov.u32 %r2, s;
    mov.u32 %r3, 0;
    COPY:
    mad.lo.s32 %r4, %r3, 256, %r0;
    mad.wide.u32 %d10, %r4, 16, %d0;
    ld.global.v4.b32 {{%r11, %r12, %r13, %r14}}, [%d10];
    mad.lo.s32 %r5, %r4, 16, %r2;
    st.shared.v4.b32 [%r5], {{%r11, %r12, %r13, %r14}};
    add.s32 %r3, %r3, 1;
    setp.lt.s32 %p1, %r3, 8;
    @%p1 bra COPY;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %d20, {a}; mov.b64 %d21, {b};
    wgmma.fence.sync.aligned;
    setp.ne.b32 %p2, 0, 0;
    {product}, %p2, 1, 1, {flags};
    {product}, 1, 1, -1, {flags};
    {product}, 1, 1, 1, {flags};
    {product}, 1, 1, 1, {flags};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %d11, %r0, 4, %d1;
    {"".join(f"st.global.f32 [%d11+{1024 * n}], %f{20 + n};" for n in range(N // 2))}
    """
    D = 2 * A @ B.T
    lane = np.arange(256) % 32
    warp = np.arange(256) // 32 % 4
    for order in BOTH:
        _, got = run(kernel(body, 2, shared=32768), [memory, np.zeros((N // 2, 256), F32)], threads=256, order=order)
        for n in range(N // 2):
            row, column = 16 * warp + lane // 4 + 8 * (n // 2 % 2), 8 * (n // 4) + 2 * (lane % 4) + n % 2
            np.testing.assert_array_equal(got[n], D[row, column])


def test_wgmma_with_the_first_operand_in_registers():
    """The fragment of mma.m16n8k16, for each of the four warps."""
    A, B = halves(64, 16, seed=6), halves(8, 16, seed=7)
    thread = np.arange(128)
    warp, g, t = thread // 32, thread % 32 // 4, thread % 4
    words = [
        pairs(*(bits(A[16 * warp + g + 8 * v, 8 * h + 2 * t + j], "bf16") for j in range(2)))
        for h in range(2)
        for v in range(2)
    ]
    memory = laid_out(B, "bf16", 128, False)[:2048]
    body = f"""{FILL.replace("%d0", "%d1")}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mad.wide.u32 %d10, %r0, 4, %d0;
    {"".join(f"ld.global.b32 %r{20 + n}, [%d10+{512 * n}];" for n in range(4))}
    mov.b64 %d21, {descriptor(0, 128, False)};
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f1, %f2, %f3, %f4}}, {{%r20, %r21, %r22, %r23}}, %d21, 0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %d11, %r0, 4, %d2;
    {"".join(f"st.global.f32 [%d11+{512 * n}], %f{1 + n};" for n in range(4))}
    """
    for order in BOTH:
        arrays = [np.concatenate(words), memory, np.zeros((4, 128), F32)]
        got = run(kernel(body, 3, shared=2048), arrays, threads=128, order=order)[2]
        for n in range(4):
            np.testing.assert_array_equal(got[n], (A @ B.T)[16 * warp + g + 8 * (n // 2), 2 * t + n % 2])


def test_advancing_along_k_moves_within_a_line():
    """The next 16 of k are 32 bytes further, and the swizzle is one of addresses, not of offsets."""
    first = tile_offsets(descriptor(1024, 128, False), 16, False)
    second = tile_offsets(descriptor(1024 + 32, 128, False), 16, False)
    assert (first[:, ::8] // 128 == second[:, ::8] // 128).all()
    assert len(np.unique(np.concatenate([first, second]))) == 512
    assert first[1, 0] == 1024 + 128 + 16
    assert second[1, 0] == 1024 + 128 + (2 ^ 1) * 16


WGMMA = (
    """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f1, %f2, %f3, %f4}}, %d20, %d21, {scale}, 1, 1, 0, 0;"""
)
DESCRIBE = f"mov.b64 %d20, {descriptor(0, 128, False)}; mov.b64 %d21, {descriptor(0, 128, False)};"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (DESCRIBE + WGMMA.format(scale=1), "accumulators are read before they were written"),
        (DESCRIBE + WGMMA.format(scale=0), "never waited for"),
        (
            "cvt.u64.u32 %d20, %r0; mov.b64 %d21, %d20;" + WGMMA.format(scale=0),
            "descriptor differs between the threads",
        ),
        (DESCRIBE + "setp.lt.u32 %p1, %r0, 64; @!%p1 bra E; " + WGMMA.format(scale=0) + "E:", "part of a warpgroup"),
    ],
)
def test_faults_of_wgmma(body, said):
    with pytest.raises(executor.ProgramError, match=said):
        run(kernel(body, shared=8192), threads=128, order=executor.LATE, watch=False)


def test_accumulators_that_are_read_too_early_show_in_the_late_order():
    body = f"""
    mov.u32 %r2, s; mad.lo.s32 %r3, %r0, 16, %r2; mov.b32 %r1, 0x3f803f80;
    {"".join(f"st.shared.v4.b32 [%r3+{2048 * n}], {{%r1, %r1, %r1, %r1}};" for n in range(4))}
    fence.proxy.async.shared::cta; bar.sync 0;
    mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
    {DESCRIBE} {WGMMA.format(scale=1)}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned PENDING;
    mad.wide.u32 %d10, %r0, 4, %d0;
    st.global.f32 [%d10], %f1;
    wgmma.wait_group.sync.aligned 0;
    """
    for pending, late in ((0, 16), (1, 0)):
        program = kernel(body.replace("PENDING", str(pending)), 1, shared=8192)
        for order, true in ((executor.EARLY, 16), (executor.LATE, late)):
            (got,) = run(program, [np.zeros(128, F32)], threads=128, order=order)
            assert (got == true).all()
