"""Forward kernels of `out = s·x + k·ls·(GELU(LN(s·x)·W1ᵀ + b1)·W2ᵀ + b2)`, x [M, C], W1 [H, C], W2 [C, H].

s = residual_scale, ls = layer_scale, k = branch_scale; LN has weight γ and bias β.

    one_pass          all of it; nothing of size [M, H] leaves the chip
    row_statistics    mean and 1/σ of s·x, and W1·diag(γ) with its row sums, for `fc1` on raw tokens
    layer_norm        LN(s·x), for `fc1` on normalized tokens and for the weight gradient
    fc1               [LN +] first product + bias + GELU → [M, H]
    fc2               second product + bias + LayerScale + residual → [M, C]

Products accumulate in float32 and take operands of the compute dtype, that of W1 and W2; x may have another one, and the
residual is added in float32. Saved statistics are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, gelu, load_tile, load_vector, store_tile


@triton.jit(do_not_specialize=["M"])
def one_pass(
    x,  # [M, C]
    ln_weight,  # [C] or None
    ln_bias,  # [C] or None
    w1,  # [H, C]
    b1,  # [H] or None
    w2,  # [C, H]
    b2,  # [C] or None
    layer_scale,  # [C] or None
    branch_scale,  # [M] or None: factor of each token's branch
    out,  # [M, C]
    mean,  # [M] or None
    rstd,  # [M] or None
    M,
    stride_x,
    eps,
    residual_scale,
    C: tl.constexpr,
    H: tl.constexpr,
    NC: tl.constexpr,  # columns per chunk
    CHUNKS: tl.constexpr,  # CHUNKS · NC >= C
    BM: tl.constexpr,
    BH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    EMULATE: tl.constexpr,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Transposed: the weights are the M side of both products, the GELU output the shared-memory B operand of the second.

    With tokens as the M side, that output would be the register A operand of a warp-group product, which the assembler
    serializes. Columns are split into chunks because block shapes are powers of two and C is 3·2^k.
    """
    m = tl.program_id(0) * BM
    inv_c: tl.constexpr = 1.0 / C

    tiles = ()
    total = tl.zeros([BM], tl.float32)
    for i in tl.static_range(CHUNKS):
        tile = load_tile(x, m, i * NC, M, C, stride_x, BM, NC, TMA).to(tl.float32) * residual_scale
        total += tl.sum(tile, 1)
        tiles = tiles + (tile,)
    mu = total * inv_c
    square = tl.zeros([BM], tl.float32)
    centred = ()
    for i in tl.static_range(CHUNKS):
        tile = tiles[i] - mu[:, None]
        if CHUNKS * NC != C:
            tile = tl.where((i * NC + tl.arange(0, NC) < C)[None, :], tile, 0.0)
        square += tl.sum(tile * tile, 1)
        centred = centred + (tile,)
    inv_std = tl.rsqrt(square * inv_c + eps)
    if mean is not None:  # now, so that no register holds them through the loop
        rows = m + tl.arange(0, BM)
        tl.store(mean + rows, mu, mask=rows < M)
        tl.store(rstd + rows, inv_std, mask=rows < M)
    normed = ()
    for i in tl.static_range(CHUNKS):
        tile = centred[i] * inv_std[:, None]
        if ln_weight is not None:
            tile = tile * load_vector(ln_weight, i * NC, C, NC)[None, :]
        if ln_bias is not None:
            tile = tile + load_vector(ln_bias, i * NC, C, NC)[None, :]
        normed = normed + (tl.trans(tile.to(w1.dtype if TMA else w1.dtype.element_ty)),)

    y = ()
    for i in tl.static_range(CHUNKS):
        y = y + (tl.zeros([NC, BM], tl.float32),)
    for h in tl.range(0, H, BH, num_stages=STAGES):
        p = tl.zeros([BH, BM], tl.float32)
        for i in tl.static_range(CHUNKS):
            p = dot(load_tile(w1, h, i * NC, H, C, C, BH, NC, TMA), normed[i], p, PRECISION, EMULATE)
        if b1 is not None:
            p += load_vector(b1, h, H, BH)[:, None]
        a = gelu(p, FORM, UNIT).to(normed[0].dtype)
        grown = ()
        for i in tl.static_range(CHUNKS):
            grown = grown + (dot(load_tile(w2, i * NC, h, C, H, H, NC, BH, TMA), a, y[i], PRECISION, EMULATE),)
        y = grown

    for i in tl.static_range(CHUNKS):
        branch = y[i]
        if b2 is not None:
            branch += load_vector(b2, i * NC, C, NC)[:, None]
        if layer_scale is not None:
            branch *= load_vector(layer_scale, i * NC, C, NC)[:, None]
        if branch_scale is not None:
            branch *= load_vector(branch_scale, m, M, BM)[None, :]
        # Read again rather than kept: the tile's registers are worth more to the loop.
        tile = load_tile(x, m, i * NC, M, C, stride_x, BM, NC, TMA).to(tl.float32) * residual_scale
        store_tile(out, tile + tl.trans(branch), m, i * NC, M, C, C, BM, NC, TMA)


@triton.jit(do_not_specialize=["M", "ROW_PROGRAMS"])
def row_statistics(
    x,  # [M, C]
    mean,  # [M]
    rstd,  # [M]
    ln_weight,  # [C] or None
    ln_bias,  # [C] or None
    w1,  # [H, C]
    b1,  # [H] or None
    w1_folded,  # [H, C] or None
    w1_sum,  # [H] or None
    b1_folded,  # [H] or None
    M,
    H,
    stride_x,
    eps,
    residual_scale,
    ROW_PROGRAMS,
    C: tl.constexpr,
    BC: tl.constexpr,  # power of two >= C
    ROWS: tl.constexpr,
):
    """The first `ROW_PROGRAMS` programs: mean and 1/σ of s·x. The others: W1·diag(γ) rounded, its row sums, b1 + W1·β.

    The row sums are those of the *rounded* matrix, so that the mean cancels exactly in `fc1`.
    """
    pid = tl.program_id(0)
    c = tl.arange(0, BC)
    if pid < ROW_PROGRAMS:
        r = pid * ROWS + tl.arange(0, ROWS)
        mask = (r < M)[:, None] & (c < C)[None, :]
        tile = (
            tl.load(x + r.to(tl.int64)[:, None] * stride_x + c[None, :], mask=mask, other=0.0).to(tl.float32)
            * residual_scale
        )
        mu = tl.sum(tile, 1) / C
        tile = tl.where(mask, tile - mu[:, None], 0.0)
        tl.store(mean + r, mu, mask=r < M)
        tl.store(rstd + r, tl.rsqrt(tl.sum(tile * tile, 1) / C + eps), mask=r < M)
    else:
        h = (pid - ROW_PROGRAMS) * ROWS + tl.arange(0, ROWS)
        mask = (h < H)[:, None] & (c < C)[None, :]
        offsets = h.to(tl.int64)[:, None] * C + c[None, :]
        w = tl.load(w1 + offsets, mask=mask, other=0.0).to(tl.float32)
        bias = tl.zeros([ROWS], tl.float32)
        if b1 is not None:
            bias += tl.load(b1 + h, mask=h < H, other=0.0).to(tl.float32)
        if ln_bias is not None:
            bias += tl.sum(w * tl.load(ln_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :], 1)
        if ln_weight is not None:
            w *= tl.load(ln_weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        rounded = w.to(w1_folded.dtype.element_ty)
        tl.store(w1_folded + offsets, rounded, mask=mask)
        tl.store(w1_sum + h, tl.sum(rounded.to(tl.float32), 1), mask=h < H)
        tl.store(b1_folded + h, bias, mask=h < H)


@triton.jit(do_not_specialize=["M"])
def layer_norm(
    x,  # [M, C]
    ln_weight,  # [C] or None
    ln_bias,  # [C] or None
    out,  # [M, C]
    mean,  # [M]
    rstd,  # [M]
    M,
    stride_x,
    eps,
    residual_scale,
    C: tl.constexpr,
    BC: tl.constexpr,  # power of two >= C
    ROWS: tl.constexpr,
    GIVEN: tl.constexpr,  # mean and rstd are read instead of computed and stored
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BC)
    mask = (r < M)[:, None] & (c < C)[None, :]
    tile = (
        tl.load(x + r.to(tl.int64)[:, None] * stride_x + c[None, :], mask=mask, other=0.0).to(tl.float32)
        * residual_scale
    )
    if GIVEN:
        mu = tl.load(mean + r, mask=r < M, other=0.0)
        inv_std = tl.load(rstd + r, mask=r < M, other=0.0)
        tile = tile - mu[:, None]
    else:
        mu = tl.sum(tile, 1) / C
        tile = tl.where(mask, tile - mu[:, None], 0.0)
        inv_std = tl.rsqrt(tl.sum(tile * tile, 1) / C + eps)
        tl.store(mean + r, mu, mask=r < M)
        tl.store(rstd + r, inv_std, mask=r < M)
    tile = tile * inv_std[:, None]
    if ln_weight is not None:
        tile *= tl.load(ln_weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if ln_bias is not None:
        tile += tl.load(ln_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out + r.to(tl.int64)[:, None] * C + c[None, :], tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def place(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (m, n) of a program: `GROUP` rows of tiles at a time, so that neighbours share operands in the L2 cache."""
    width = GROUP * tiles_n
    first = (pid // width) * GROUP
    height = min(tiles_m - first, GROUP)
    return first + (pid % width) % height, (pid % width) // height


@triton.jit(do_not_specialize=["M"])
def fc1(
    x,  # [M, C]: tokens if mean is given, LN(s·x) if it is None
    w1,  # [H, C]: W1·diag(γ) if mean is given
    b1,  # [H] or None
    mean,  # [M] or None
    rstd,  # [M] or None
    w1_sum,  # [H] or None
    act,  # [M, H]
    pre,  # [M, H] or None: what GELU was applied to, for the backward
    M,
    stride_x,
    residual_scale,
    C: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    EMULATE: tl.constexpr,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """`GELU(LN(s·x)·W1ᵀ + b1)`. On raw tokens LayerNorm is a correction after the product:

    LN(s·x)·W1ᵀ + b1 = rstd·(s·x·(W1·diag γ)ᵀ − mean·rowsum) + (b1 + W1·β)
    """
    tile_m, tile_n = place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(H, BN), GROUP)
    m = tile_m * BM
    n = tile_n * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, C, BK, num_stages=STAGES):
        a = load_tile(x, m, k, M, C, stride_x, BM, BK, TMA)
        b = load_tile(w1, n, k, H, C, C, BN, BK, TMA)
        acc = dot(a, tl.trans(b), acc, PRECISION, EMULATE)
    if mean is not None:
        r = m + tl.arange(0, BM)
        mu = tl.load(mean + r, mask=r < M, other=0.0)
        inv_std = tl.load(rstd + r, mask=r < M, other=0.0)
        acc = (
            acc * (inv_std * residual_scale)[:, None] - (mu * inv_std)[:, None] * load_vector(w1_sum, n, H, BN)[None, :]
        )
    if b1 is not None:
        acc += load_vector(b1, n, H, BN)[None, :]
    if pre is not None:
        store_tile(pre, acc, m, n, M, H, H, BM, BN, TMA)
    store_tile(act, gelu(acc, FORM, UNIT), m, n, M, H, H, BM, BN, TMA)


@triton.jit(do_not_specialize=["M"])
def fc2(
    act,  # [M, H]
    w2,  # [C, H]
    b2,  # [C] or None
    layer_scale,  # [C] or None
    branch_scale,  # [M] or None: factor of each token's branch
    x,  # [M, C]
    out,  # [M, C]
    M,
    stride_x,
    residual_scale,
    C: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """`s·x + k·ls·(act·W2ᵀ + b2)`."""
    tile_m, tile_n = place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(C, BN), GROUP)
    m = tile_m * BM
    n = tile_n * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, H, BK, num_stages=STAGES):
        a = load_tile(act, m, k, M, H, H, BM, BK, TMA)
        b = load_tile(w2, n, k, C, H, H, BN, BK, TMA)
        acc = dot(a, tl.trans(b), acc, PRECISION, EMULATE)
    if b2 is not None:
        acc += load_vector(b2, n, C, BN)[None, :]
    if layer_scale is not None:
        acc *= load_vector(layer_scale, n, C, BN)[None, :]
    if branch_scale is not None:
        acc *= load_vector(branch_scale, m, M, BM)[:, None]
    tile = load_tile(x, m, n, M, C, stride_x, BM, BN, TMA).to(tl.float32) * residual_scale
    store_tile(out, tile + acc, m, n, M, C, C, BM, BN, TMA)
