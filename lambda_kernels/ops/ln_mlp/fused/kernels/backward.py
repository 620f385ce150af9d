"""Backward kernels of `ln_mlp`.

s = residual_scale, ls = layer_scale, k = branch_scale as in `forward`. dO is the gradient of the output, dB = k·dO that of
the branch behind LayerScale, p = LN(s·x)·W1ᵀ + b1, W2' = diag(ls)·W2:

    hidden_gradient    dA = dB·W2', dP = dA·GELU'(p), and GELU(p) again where W2 needs it; column sums of dP per row tile
    elementwise        the same after products that a library computed
    layer_norm_input   dx from dLN = dP·W1, with the column sums for γ, β and b2 per program

The products dP·W1, dPᵀ·LN(s·x) and dBᵀ·GELU(p) have nothing to fuse with and are left to the library. Column sums come as
one partial row per tile or program, added up by one more reduction in a fixed order: results do not change from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, gelu_and_slope, load_tile, load_vector, store_tile
from .forward import place


@triton.jit(do_not_specialize=["M"])
def hidden_gradient(
    normed,  # [M, C] or None: LN(s·x), to compute p again
    w1,  # [H, C] or None
    b1,  # [H] or None
    pre,  # [M, H] or None: p as the forward saved it
    grad,  # [M, C]: dB
    w2,  # [C, H]: W2'
    grad_pre,  # [M, H]: dP
    act,  # [M, H] or None: GELU(p)
    sums,  # [tiles of rows, H] or None: column sums of dP
    M,
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
    tile_m, tile_n = place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(H, BN), GROUP)
    m = tile_m * BM
    n = tile_n * BN
    grad_act = tl.zeros([BM, BN], tl.float32)
    if pre is None:
        p = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, C, BK, num_stages=STAGES):
            a = load_tile(normed, m, k, M, C, C, BM, BK, TMA)
            b = load_tile(w1, n, k, H, C, C, BN, BK, TMA)
            p = dot(a, tl.trans(b), p, PRECISION, EMULATE)
            g = load_tile(grad, m, k, M, C, C, BM, BK, TMA)
            w = load_tile(w2, k, n, C, H, H, BK, BN, TMA)
            grad_act = dot(g, w, grad_act, PRECISION, EMULATE)
        if b1 is not None:
            p += load_vector(b1, n, H, BN)[None, :]
    else:
        for k in tl.range(0, C, BK, num_stages=STAGES):
            g = load_tile(grad, m, k, M, C, C, BM, BK, TMA)
            w = load_tile(w2, k, n, C, H, H, BK, BN, TMA)
            grad_act = dot(g, w, grad_act, PRECISION, EMULATE)
        p = load_tile(pre, m, n, M, H, H, BM, BN, TMA).to(tl.float32)
    a, slope = gelu_and_slope(p, FORM, UNIT)
    if act is not None:
        store_tile(act, a, m, n, M, H, H, BM, BN, TMA)
    # Rows beyond M add nothing to the sums: their dB, hence their dA, is zero.
    grad_p = grad_act * slope
    store_tile(grad_pre, grad_p, m, n, M, H, H, BM, BN, TMA)
    if sums is not None:
        c = n + tl.arange(0, BN)
        tl.store(sums + tile_m.to(tl.int64) * H + c, tl.sum(grad_p, 0), mask=c < H)


@triton.jit(do_not_specialize=["M"])
def elementwise(
    pre,  # [M, H]: p
    grad_act,  # [M, H]: dA
    grad_pre,  # [M, H]: dP; may be dA's memory
    act,  # [M, H] or None: GELU(p)
    sums,  # [tiles of rows, H] or None
    M,
    H,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
):
    m = tl.program_id(0) * BM
    n = tl.program_id(1) * BN
    p = load_tile(pre, m, n, M, H, H, BM, BN, False).to(tl.float32)
    a, slope = gelu_and_slope(p, FORM, UNIT)
    if act is not None:
        store_tile(act, a, m, n, M, H, H, BM, BN, False)
    grad_p = load_tile(grad_act, m, n, M, H, H, BM, BN, False).to(tl.float32) * slope
    store_tile(grad_pre, grad_p, m, n, M, H, H, BM, BN, False)
    if sums is not None:
        c = n + tl.arange(0, BN)
        tl.store(sums + tl.program_id(0).to(tl.int64) * H + c, tl.sum(grad_p, 0), mask=c < H)


@triton.jit(do_not_specialize=["M", "TURNS"])
def layer_norm_input(
    grad_ln,  # [M, C]: dLN
    x,  # [M, C]
    grad,  # [M, C]: dO
    ln_weight,  # [C] or None
    mean,  # [M]
    rstd,  # [M]
    branch_scale,  # [M] or None: factor of each token's branch
    grad_x,  # [M, C] or None
    sum_ln_weight,  # [programs, C] or None
    sum_ln_bias,  # [programs, C] or None
    sum_grad,  # [programs, C] or None: column sums of dB
    M,
    stride_x,
    residual_scale,
    TURNS,  # row tiles per program
    C: tl.constexpr,
    BC: tl.constexpr,  # power of two >= C
    ROWS: tl.constexpr,
):
    """dx = s·(dO + rstd·(g − mean(g) − x̂·mean(g·x̂))), g = γ·dLN, x̂ = (s·x − mean)·rstd.

    A program takes `TURNS` neighbouring row tiles and adds up its column sums in registers, across rows only at the end.
    """
    pid = tl.program_id(0)
    c = tl.arange(0, BC)
    weight = tl.full([BC], 1.0, tl.float32)
    if ln_weight is not None:
        weight = tl.load(ln_weight + c, mask=c < C, other=0.0).to(tl.float32)
    acc_ln_weight = tl.zeros([ROWS, BC], tl.float32)
    acc_ln_bias = tl.zeros([ROWS, BC], tl.float32)
    acc_grad = tl.zeros([ROWS, BC], tl.float32)
    for turn in tl.range(0, TURNS):
        r = (pid * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        mask = (r < M)[:, None] & (c < C)[None, :]
        row = r.to(tl.int64)[:, None]
        d = tl.load(grad_ln + row * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        xhat = tl.load(x + row * stride_x + c[None, :], mask=mask, other=0.0).to(tl.float32) * residual_scale
        mu = tl.load(mean + r, mask=r < M, other=0.0)
        inv_std = tl.load(rstd + r, mask=r < M, other=0.0)
        xhat = (xhat - mu[:, None]) * inv_std[:, None]  # beyond C it meets only zeros
        if sum_ln_weight is not None:
            acc_ln_weight += d * xhat
        if sum_ln_bias is not None:
            acc_ln_bias += d
        if (grad_x is not None) or (sum_grad is not None):
            residual = tl.load(grad + row * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if sum_grad is not None:
                if branch_scale is not None:
                    acc_grad += residual * tl.load(branch_scale + r, mask=r < M, other=0.0)[:, None]
                else:
                    acc_grad += residual
            if grad_x is not None:
                g = d * weight[None, :]
                along = tl.sum(g * xhat, 1) / C
                g = g - (tl.sum(g, 1) / C)[:, None] - xhat * along[:, None]
                result = residual_scale * (residual + g * inv_std[:, None])
                tl.store(grad_x + row * C + c[None, :], result.to(grad_x.dtype.element_ty), mask=mask)
    if sum_ln_weight is not None:
        tl.store(sum_ln_weight + pid.to(tl.int64) * C + c, tl.sum(acc_ln_weight, 0), mask=c < C)
    if sum_ln_bias is not None:
        tl.store(sum_ln_bias + pid.to(tl.int64) * C + c, tl.sum(acc_ln_bias, 0), mask=c < C)
    if sum_grad is not None:
        tl.store(sum_grad + pid.to(tl.int64) * C + c, tl.sum(acc_grad, 0), mask=c < C)
