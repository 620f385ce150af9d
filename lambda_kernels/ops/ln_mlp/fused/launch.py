"""From tensors to kernel launches: arguments, tiles and grids of each kernel. No choice is made and nothing is run here.

A `Launch` is built the same way for real tensors and for meta tensors, so that what is compiled and read offline is what
runs. This module needs triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..arguments import Options, Parameters, Saved
from ..dispatch import in_interpreter
from .kernels import backward, forward
from .kernels.configs import Config

# Set when the kernels were imported: they run in Triton's interpreter, on the CPU.
INTERPRETED = in_interpreter()

# Neighbouring row tiles that run together, for the L2 cache.
_GROUP = 8

# Elements per thread of the kernels that take whole rows: enough loads in flight, few enough registers. The backward keeps
# six values for each.
_ROW_ELEMENTS = 16
_GRADIENT_ROW_ELEMENTS = 8


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what runs over which grid with which arguments."""

    kernel: Any  # of Triton, compiled or interpreted
    grid: tuple[int, ...]
    args: dict[str, Any]  # run-time arguments by name; None where an optional tensor is absent
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        if INTERPRETED:
            self._run_anew()
            return
        key = self._specialization()
        compiled = _compiled.get(key)
        if compiled is None:
            if len(_compiled) >= _MOST_COMPILED:
                _compiled.clear()  # Triton remembers them too
            _compiled[key] = self._run_anew()
        else:
            compiled[self.grid](*self.args.values(), *self.constants.values())

    def _run_anew(self) -> object:
        """By Triton's own way to a kernel, which binds, looks up and, where needed, compiles."""
        assert [*self.args, *self.constants] == self.kernel.arg_names, "arguments are passed on by their position"
        return self.kernel[self.grid](
            **self.args, **self.constants, num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True
        )

    def compiled(self) -> Any | None:
        """What Triton compiled for such arguments; None before one like it ran, and in the interpreter."""
        return None if INTERPRETED else _compiled.get(self._specialization())

    def _specialization(self) -> tuple[object, ...]:
        """All that Triton compiles a kernel anew for: constants, and dtype, alignment, absence of arguments."""
        general = self.kernel.do_not_specialize
        kinds: list[object] = []
        for name, value in self.args.items():
            if value is None:
                kinds.append(None)
            elif isinstance(value, Tensor):
                kinds.append((value.dtype, value.data_ptr() % 16 == 0))
            elif isinstance(value, TensorDescriptor):
                kinds.append(value.base.dtype)  # its tile is among the constants
            elif isinstance(value, int):
                wide = value > _LARGEST_INT32
                kinds.append(wide if name in general else (wide, value % 16 == 0, value == 1))
            else:
                kinds.append(float)
        device = triton.runtime.driver.active.get_current_device()
        return (self.kernel, device, self.warps, self.stages, *self.constants.values(), *kinds)


# Compiled kernels by specialization: Triton's own way to one costs more host time than all else here together.
_compiled: dict[tuple[object, ...], Any] = {}
_MOST_COMPILED = 4096


class Repeated:
    """A launch that ran, made again with other tensors of the same shapes, strides, dtypes and alignments.

    It holds no tensor. All that `Launch` computes from them is kept, so that only they are put into their places.
    """

    __slots__ = ("_places", "_run", "_values", "detail", "name")

    def __init__(self, made: Launch, detail: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
        """`tensors` are those of `made` in the order in which `run` will get them, `names` their kernel arguments."""
        self.name, self.detail = made.name, detail
        self._run = made.compiled()[made.grid]
        given = dict(zip(names, tensors, strict=True))
        self._values = [*made.args.values(), *made.constants.values()]
        self._places: list[tuple[int, int, dict[str, Any] | None]] = []
        for place, (name, value) in enumerate(made.args.items()):
            is_described = isinstance(value, TensorDescriptor)
            tensor = value.base if is_described else value
            if isinstance(tensor, Tensor):
                assert tensor is given[name], f"{name} of {made.name} is another tensor"
                layout = {k: v for k, v in vars(value).items() if k != "base"} if is_described else None
                self._places.append((place, list(names).index(name), layout))
                self._values[place] = None

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Launch on the current stream of the current device, the one that it ran on before."""
        values = self._values.copy()
        for place, which, layout in self._places:
            if layout is None:
                values[place] = tensors[which]
            else:
                values[place] = described = object.__new__(TensorDescriptor)
                described.__dict__.update(layout, base=tensors[which])
        self._run(*values)


_LARGEST_INT32 = 2**31 - 1


def float32_precision() -> str:
    """How float32 products are to be computed: "tf32", else exactly."""
    # torch.get_float32_matmul_precision() raises where the newer settings were used; this one knows both.
    return torch.backends.cuda.matmul.fp32_precision


@dataclass(frozen=True)
class Arithmetic:
    """The form of GELU and the precision of products, from the compute dtype and what the model uses."""

    form: str  # "erf", "quintic", "tanh"
    unit: str  # the instructions that tanh is made of: "tanh", "rcp", "plain"
    precision: str  # of float32 products

    @classmethod
    def of(cls, dtype: torch.dtype, approximate: str) -> Arithmetic:
        """`approximate` is "none" or "tanh"."""
        form = "tanh" if approximate == "tanh" else ("erf" if dtype == torch.float32 else "quintic")
        tf32 = dtype == torch.float32 and float32_precision() == "tf32"
        unit = "plain" if INTERPRETED else {torch.bfloat16: "tanh", torch.float16: "rcp"}.get(dtype, "plain")
        return cls(form, unit, "tf32" if tf32 else "ieee")

    def constants(self) -> dict[str, Any]:
        """As kernel constants."""
        return {"FORM": self.form, "UNIT": self.unit}


def ceil_div(a: int, b: int) -> int:
    """a/b rounded up; triton.cdiv is made for kernels and slow outside of them."""
    return -(-a // b)


def is_describable(*matrices: Tensor | None) -> bool:
    """Whether the tensor memory accelerator can address all of these matrices: 16-byte aligned rows, unit inner stride."""
    return all(
        t is None
        or (
            t.stride(1) == 1
            and t.stride(0) >= t.shape[1]
            and (t.stride(0) * t.element_size()) % 16 == 0
            and (t.is_meta or t.data_ptr() % 16 == 0)
        )
        for t in matrices
    )


# What a descriptor holds besides its tensor, by layout: validating it anew costs more than the launch.
_layouts: dict[tuple[object, ...], dict[str, Any]] = {}
_MOST_LAYOUTS = 4096


def _tile(t: Tensor | None, rows: int, cols: int, tma: bool) -> object:
    if t is None or not tma:
        return t
    key = (t.shape, t.stride(0), t.dtype, rows, cols)
    layout = _layouts.get(key)
    if layout is None:
        if len(_layouts) >= _MOST_LAYOUTS:
            _layouts.clear()
        layout = dict(vars(TensorDescriptor(t, list(t.shape), [t.stride(0), 1], [rows, cols])))
        del layout["base"]  # or every tensor that was ever described would be kept
        _layouts[key] = layout
    described = object.__new__(TensorDescriptor)
    described.__dict__.update(layout, base=t)
    return described


@functools.lru_cache
def split_columns(channels: int) -> tuple[int, int]:
    """(columns per chunk, number of chunks): a power of two times 1, 2 or 3, wasting the fewest columns."""
    options = []
    for count in (1, 2, 3):
        width = max(16, triton.next_power_of_2(ceil_div(channels, count)))
        options.append((width * count, count, width))
    _, count, width = min(options)
    return width, count


@functools.lru_cache
def rows_per_program(channels: int, warps: int, elements: int = _ROW_ELEMENTS) -> tuple[int, int]:
    """(power of two that holds `channels`, rows per program) of the kernels that take whole rows."""
    block = triton.next_power_of_2(channels)
    return block, max(1, elements * 32 * warps // block)


def gradient_rows(channels: int) -> tuple[int, int, int]:
    """(power of two that holds `channels`, rows per program, warps) of `layer_norm_input`."""
    warps = 4 if channels <= 1024 else 8 if channels <= 2048 else 16
    return *rows_per_program(channels, warps, _GRADIENT_ROW_ELEMENTS), warps


def row_warps(channels: int) -> int:
    """Warps of the kernels that take whole rows."""
    return 4 if channels <= 1024 else 8 if channels <= 4096 else 16


def one_pass(x, p: Parameters, o: Options, out, mean, rstd, *, config: Config, tma: bool) -> Launch:
    """Launch of the whole forward into out [M, C]; mean and rstd [M] are written where they are given."""
    tokens, channels = x.shape
    width, _ = split_columns(channels)
    return Launch(
        forward.one_pass,
        (ceil_div(tokens, config.bm), 1, 1),
        {
            "x": _tile(x, config.bm, width, tma),
            **p._asdict(),
            "w1": _tile(p.w1, config.bn, width, tma),
            "w2": _tile(p.w2, width, config.bn, tma),
            "out": _tile(out, config.bm, width, tma),
            "mean": mean,
            "rstd": rstd,
            "M": tokens,
            "stride_x": x.stride(0),
            "eps": o.eps,
            "residual_scale": o.residual_scale,
        },
        _one_pass_constants(channels, p.w1.shape[0], Arithmetic.of(p.w1.dtype, o.approximate), config, tma),
        config.warps,
        config.stages,
    )


def row_statistics(x, p: Parameters, o: Options, mean, rstd, folded: Parameters, w1_sum) -> Launch:
    """Launch of row statistics and of W1's folding with γ and β: `folded` gets w1 [H, C] and b1 [H], w1_sum [H] the row sums.

    The vectors are float32.
    """
    (tokens, channels), hidden = x.shape, p.w1.shape[0]
    warps = row_warps(channels)
    block, rows = rows_per_program(channels, warps)
    row_programs = ceil_div(tokens, rows)
    return Launch(
        forward.row_statistics,
        (row_programs + ceil_div(hidden, rows), 1, 1),
        {
            "x": x,
            "mean": mean,
            "rstd": rstd,
            "ln_weight": p.ln_weight,
            "ln_bias": p.ln_bias,
            "w1": p.w1,
            "b1": p.b1,
            "w1_folded": folded.w1,
            "w1_sum": w1_sum,
            "b1_folded": folded.b1,
            "M": tokens,
            "H": hidden,
            "stride_x": x.stride(0),
            "eps": o.eps,
            "residual_scale": o.residual_scale,
            "ROW_PROGRAMS": row_programs,
        },
        {"C": channels, "BC": block, "ROWS": rows},
        warps,
        1,
    )


def layer_norm(x, p: Parameters, o: Options, out, mean, rstd, *, given: bool) -> Launch:
    """Launch of LN(s·x) into out [M, C]; mean and rstd [M] are read where `given`, else written."""
    tokens, channels = x.shape
    warps = row_warps(channels)
    block, rows = rows_per_program(channels, warps)
    return Launch(
        forward.layer_norm,
        (ceil_div(tokens, rows), 1, 1),
        {
            "x": x,
            "ln_weight": p.ln_weight,
            "ln_bias": p.ln_bias,
            "out": out,
            "mean": mean,
            "rstd": rstd,
            "M": tokens,
            "stride_x": x.stride(0),
            "eps": o.eps,
            "residual_scale": o.residual_scale,
        },
        {"C": channels, "BC": block, "ROWS": rows, "GIVEN": given},
        warps,
        1,
    )


def fc1(x, p: Parameters, o: Options, act, pre, statistics=None, *, config: Config, tma: bool) -> Launch:
    """Launch of the first product into act, and into pre where it is given, [M, H].

    x are normalized tokens; or, with `statistics`, tokens as they are and `p` as `row_statistics` folds it. `statistics`
    are then mean and rstd [M], and the row sums of W1 [H].
    """
    (tokens, channels), hidden = x.shape, p.w1.shape[0]
    mean, rstd, w1_sum = statistics or (None, None, None)
    return Launch(
        forward.fc1,
        (ceil_div(tokens, config.bm) * ceil_div(hidden, config.bn), 1, 1),
        {
            "x": _tile(x, config.bm, config.bk, tma),
            "w1": _tile(p.w1, config.bn, config.bk, tma),
            "b1": p.b1,
            "mean": mean,
            "rstd": rstd,
            "w1_sum": w1_sum,
            "act": _tile(act, config.bm, config.bn, tma),
            "pre": _tile(pre, config.bm, config.bn, tma),
            "M": tokens,
            "stride_x": x.stride(0),
            "residual_scale": o.residual_scale,
        },
        _gelu_product_constants(channels, hidden, Arithmetic.of(p.w1.dtype, o.approximate), config, tma),
        config.warps,
        config.stages,
    )


def fc2(act, x, p: Parameters, o: Options, out, *, config: Config, tma: bool) -> Launch:
    """Launch of the second product with bias, LayerScale and residual: act [M, H], x and out [M, C]."""
    (tokens, channels), hidden = x.shape, p.w2.shape[1]
    return Launch(
        forward.fc2,
        (ceil_div(tokens, config.bm) * ceil_div(channels, config.bn), 1, 1),
        {
            "act": _tile(act, config.bm, config.bk, tma),
            "w2": _tile(p.w2, config.bn, config.bk, tma),
            "b2": p.b2,
            "layer_scale": p.layer_scale,
            "branch_scale": p.branch_scale,
            "x": _tile(x, config.bm, config.bn, tma),
            "out": _tile(out, config.bm, config.bn, tma),
            "M": tokens,
            "stride_x": x.stride(0),
            "residual_scale": o.residual_scale,
        },
        _product_constants(channels, hidden, Arithmetic.of(p.w2.dtype, o.approximate), config, tma),
        config.warps,
        config.stages,
    )


def hidden_gradient(
    normed, p: Parameters, o: Options, pre, grad, grad_pre, act, sums, *, config: Config, tma: bool
) -> Launch:
    """Launch of dP [M, H] (and GELU(p)) from dB [M, C]; p from `normed`·W1ᵀ + b1, or from `pre` if that is given.

    LayerScale is already in W2.
    """
    (tokens, channels), hidden = grad.shape, p.w2.shape[1]
    recompute = pre is None
    return Launch(
        backward.hidden_gradient,
        (ceil_div(tokens, config.bm) * ceil_div(hidden, config.bn), 1, 1),
        {
            "normed": _tile(normed, config.bm, config.bk, tma) if recompute else None,
            "w1": _tile(p.w1, config.bn, config.bk, tma) if recompute else None,
            "b1": p.b1 if recompute else None,
            "pre": _tile(pre, config.bm, config.bn, tma),
            "grad": _tile(grad, config.bm, config.bk, tma),
            "w2": _tile(p.w2, config.bk, config.bn, tma),
            "grad_pre": _tile(grad_pre, config.bm, config.bn, tma),
            "act": _tile(act, config.bm, config.bn, tma),
            "sums": sums,
            "M": tokens,
        },
        _gelu_product_constants(channels, hidden, Arithmetic.of(p.w2.dtype, o.approximate), config, tma),
        config.warps,
        config.stages,
    )


def elementwise(pre, o: Options, grad_act, grad_pre, act, sums, *, config: Config) -> Launch:
    """Launch of dP = dA·GELU'(p) and GELU(p), all [M, H]."""
    tokens, hidden = pre.shape
    return Launch(
        backward.elementwise,
        (ceil_div(tokens, config.bm), ceil_div(hidden, config.bn), 1),
        {"pre": pre, "grad_act": grad_act, "grad_pre": grad_pre, "act": act, "sums": sums, "M": tokens, "H": hidden},
        {"BM": config.bm, "BN": config.bn} | Arithmetic.of(pre.dtype, o.approximate).constants(),
        config.warps,
        config.stages,
    )


def layer_norm_input(
    grad_ln, x, grad, p: Parameters, o: Options, saved: Saved, grad_x, sums, *, programs: int
) -> Launch:
    """Launch of dx [M, C] and of the `sums` for the gradients of γ, β and b2: partial column sums [programs, C], or None."""
    tokens, channels = x.shape
    block, rows, warps = gradient_rows(channels)
    return Launch(
        backward.layer_norm_input,
        (programs, 1, 1),
        {
            "grad_ln": grad_ln,
            "x": x,
            "grad": grad,
            "ln_weight": p.ln_weight,
            "mean": saved.mean,
            "rstd": saved.rstd,
            "branch_scale": p.branch_scale,
            "grad_x": grad_x,
            **dict(zip(("sum_ln_weight", "sum_ln_bias", "sum_grad"), sums, strict=True)),
            "M": tokens,
            "stride_x": x.stride(0),
            "residual_scale": o.residual_scale,
            "TURNS": ceil_div(ceil_div(tokens, rows), programs),
        },
        {"C": channels, "BC": block, "ROWS": rows},
        warps,
        1,
    )


@functools.lru_cache
def _one_pass_constants(channels: int, hidden: int, math: Arithmetic, config: Config, tma: bool) -> dict[str, Any]:
    width, count = split_columns(channels)
    return {
        "C": channels,
        "H": hidden,
        "NC": width,
        "CHUNKS": count,
        "BM": config.bm,
        "BH": config.bn,
        "STAGES": config.stages,
        "PRECISION": math.precision,
        "TMA": tma,
        "EMULATE": INTERPRETED,
    } | math.constants()


@functools.lru_cache
def _product_constants(channels: int, hidden: int, math: Arithmetic, config: Config, tma: bool) -> dict[str, Any]:
    return {
        "C": channels,
        "H": hidden,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "STAGES": config.stages,
        "GROUP": _GROUP,
        "PRECISION": math.precision,
        "TMA": tma,
        "EMULATE": INTERPRETED,
    }


@functools.lru_cache
def _gelu_product_constants(channels: int, hidden: int, math: Arithmetic, config: Config, tma: bool) -> dict[str, Any]:
    return _product_constants(channels, hidden, math, config, tma) | math.constants()
