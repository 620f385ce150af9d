"""Kernels that ship nowhere: each is there to answer one question of `questions.py` about a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from lambda_kernels.ops.ln_mlp.fused.kernels.common import dot, gelu, load_tile


@triton.jit(do_not_specialize=["passes"])
def read_repeatedly(
    source,  # [ROWS, COLUMNS] int32, or a descriptor of it with tiles of [TILE, COLUMNS]
    out,  # [programs, COLUMNS] int32: exclusive or of all rows, as often as they were read
    passes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    ROTATED: tl.constexpr,  # programs begin at different tiles rather than all at the first
    TMA: tl.constexpr,
):
    """Every program reads the whole matrix `passes` times, as a fused MLP reads its weights for each tile of tokens.

    Exclusive or takes one instruction per four bytes, so that reading is what limits.
    """
    program = tl.program_id(0)
    tiles: tl.constexpr = ROWS // TILE
    first = 0
    if ROTATED:
        first = program * tiles // tl.num_programs(0)
    rows = tl.arange(0, TILE)
    columns = tl.arange(0, COLUMNS)
    found = tl.zeros([TILE, COLUMNS], tl.int32)
    for number in tl.range(0, passes * tiles, num_stages=STAGES):
        row = ((number + first) % tiles) * TILE
        if TMA:
            tile = source.load([row, 0])
        else:
            # Past the first cache, which would hold a part of the smallest matrix.
            tile = tl.load(source + (row + rows)[:, None] * COLUMNS + columns[None, :], cache_modifier=".cg")
        found = found ^ tile
    tl.store(out + program * COLUMNS + columns, tl.xor_sum(found, 0))


@triton.jit(do_not_specialize=["M"])
def chained_products(
    x,  # [M, K]
    w1,  # [H, K]
    w2,  # [CHUNKS · N, H]
    out,  # [M, CHUNKS · N] float32
    M,
    H: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "gelu", or "relu": of whole numbers it makes whole numbers
    UNIT: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """`act(x·W1ᵀ)·W2ᵀ` with the hidden values kept on the chip, M divided by BM and H by BH.

    Plain: tokens are the M side, and the hidden values go from the first product's result into the register operand of the
    second, which with more than one chunk keeps them for several products. Transposed: weights are the M side, and the
    hidden values go through shared memory, as in the kernels that ship.
    """
    m = tl.program_id(0) * BM
    tokens = load_tile(x, m, 0, M, K, K, BM, K, True)
    y = ()
    for i in tl.static_range(CHUNKS):
        y = y + (tl.zeros([N, BM] if TRANSPOSED else [BM, N], tl.float32),)
    for h in tl.range(0, H, BH, num_stages=STAGES):
        first = load_tile(w1, h, 0, H, K, K, BH, K, True)
        if TRANSPOSED:
            p = dot(first, tl.trans(tokens), tl.zeros([BH, BM], tl.float32), "ieee", EMULATE)
        else:
            p = dot(tokens, tl.trans(first), tl.zeros([BM, BH], tl.float32), "ieee", EMULATE)
        if ACTIVATION == "gelu":
            p = gelu(p, "quintic", UNIT)
        else:
            p = tl.maximum(p, 0.0)
        hidden = p.to(tokens.dtype)
        grown = ()
        for i in tl.static_range(CHUNKS):
            second = load_tile(w2, i * N, h, CHUNKS * N, H, H, N, BH, True)
            if TRANSPOSED:
                grown = grown + (dot(second, hidden, y[i], "ieee", EMULATE),)
            else:
                grown = grown + (dot(hidden, tl.trans(second), y[i], "ieee", EMULATE),)
        y = grown
    rows = m + tl.arange(0, BM)
    for i in tl.static_range(CHUNKS):
        columns = i * N + tl.arange(0, N)
        value = tl.trans(y[i]) if TRANSPOSED else y[i]
        tl.store(out + rows[:, None] * (CHUNKS * N) + columns[None, :], value, mask=(rows < M)[:, None])
