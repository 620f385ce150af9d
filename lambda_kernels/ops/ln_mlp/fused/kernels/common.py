"""What the kernels share: tiles, products and the forms of GELU.

Operand conventions: `t` is a tensor descriptor where `TMA` is set and a pointer otherwise; the other mode's arguments are
then unused. Tiles are zero outside the matrix, so sums and products need no further masks.

`EMULATE` is set only in Triton's interpreter: it has no inline assembly, and its bfloat16 arithmetic is wrong, so operands
are widened to float32 after they were rounded. The numbers are those of the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

# tanh(x·(C0 + C1·t + C2·t²)), t = x², makes 0.5·x·(1 + tanh) the erf GELU to 3.2e-5. The polynomial turns over at
# |x| = 8.4 and changes sign at |x| = 11.1, so t is capped where tanh has long been 1 in float32.
_C0 = tl.constexpr(0.797458348)
_C1 = tl.constexpr(0.0370120553)
_C2 = tl.constexpr(-0.000350699)
_T_MAX = tl.constexpr(50.0)

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.035677408136300125)  # 0.044715·√(2/π)


@triton.jit
def load_tile(
    t,  # [rows, cols]
    row,
    col,
    rows,
    cols,
    stride,
    R: tl.constexpr,
    K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tile [R, K] at (row, col), zero outside the matrix."""
    if TMA:
        tile = t.load([row, col])
    else:
        r = row + tl.arange(0, R)
        c = col + tl.arange(0, K)
        # 64-bit: rows · stride passes 2^31 from two million tokens of width 1024.
        offsets = r.to(tl.int64)[:, None] * stride + c[None, :]
        tile = tl.load(t + offsets, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    t,  # [rows, cols]
    value,  # [R, K]
    row,
    col,
    rows,
    cols,
    stride,
    R: tl.constexpr,
    K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Store a tile, clipped to the matrix, rounded to its dtype."""
    if TMA:
        t.store([row, col], value.to(t.dtype))
    else:
        r = row + tl.arange(0, R)
        c = col + tl.arange(0, K)
        offsets = r.to(tl.int64)[:, None] * stride + c[None, :]
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        tl.store(t + offsets, value.to(t.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(p, start, size, N: tl.constexpr):  # p [size]
    """`N` values from `start` as float32, zero beyond `size`."""
    i = start + tl.arange(0, N)
    return tl.load(p + i, mask=i < size, other=0.0).to(tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, EMULATE: tl.constexpr):  # a [M, K], b [K, N], acc [M, N] float32
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _approximate_tanh(u):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _approximate_reciprocal(u):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _quintic(x):
    t = tl.minimum(x * x, _T_MAX)
    return x * (t * (t * _C2 + _C1) + _C0)


@triton.jit
def _cubic(x):
    return x * (x * x * _CUBIC + _SQRT_2_OVER_PI)


@triton.jit
def _logistic(u, UNIT: tl.constexpr):
    """1/(1 + exp(−2u)) = (1 + tanh u)/2, by the instructions that the dtype of the result deserves.

    "tanh": one, relative error 2^-11 of tanh, below a bfloat16's half unit of 2^-9. "rcp": two, relative error 2^-22 of the
    result, for float16, whose half unit is 2^-12. "plain": the language's own division, for float32 and the interpreter.
    """
    if UNIT == "tanh":
        y = 0.5 + 0.5 * _approximate_tanh(u)
    elif UNIT == "rcp":
        y = _approximate_reciprocal(1.0 + tl.exp(-2.0 * u))
    else:
        y = 1.0 / (1.0 + tl.exp(-2.0 * u))
    return y


@triton.jit
def gelu(x, FORM: tl.constexpr, UNIT: tl.constexpr):
    """GELU of float32 values: "erf" exact, "quintic" erf to 3.2e-5, "tanh" PyTorch's approximate="tanh"."""
    if FORM == "erf":
        y = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif FORM == "quintic":
        y = x * _logistic(_quintic(x), UNIT)
    else:
        y = x * _logistic(_cubic(x), UNIT)
    return y


@triton.jit
def gelu_and_slope(x, FORM: tl.constexpr, UNIT: tl.constexpr):
    """GELU and its derivative, both float32."""
    if FORM == "tanh":
        # Not by "tanh": its error, times the slope of the cubic, would be that of a bfloat16's unit and more.
        cdf = _logistic(_cubic(x), "rcp" if UNIT == "tanh" else UNIT)
        # 1 − tanh² = 4·cdf·(1 − cdf)
        slope = cdf + x * 2.0 * cdf * (1.0 - cdf) * (x * x * (3.0 * _CUBIC) + _SQRT_2_OVER_PI)
    else:
        if FORM == "erf":
            cdf = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        else:
            cdf = _logistic(_quintic(x), UNIT)
        slope = cdf + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
    return x * cdf, slope
