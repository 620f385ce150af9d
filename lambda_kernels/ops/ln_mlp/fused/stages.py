"""`ln_mlp` forward and backward as sequences of kernels and library products, on flat tokens [M, C].

Each stage has several ways to be computed, of which the library's is always one; `tuning.choose` picks. What ran is
recorded by `trace`. Needs triton.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import dtype_name
from .. import tracing
from ..arguments import SAVE, Needs, Options, Parameters, Saved
from . import launch, tuning
from .kernels import configs
from .tuning import Candidate, Problem

LIBRARY = Candidate("library")
STAGED = Candidate("staged")


@functools.lru_cache
def _device_facts(device: torch.device) -> tuple[int, int]:
    """(compute capability as 80, 90 …, number of multiprocessors); for the interpreter, one that shows every feature."""
    if device.type != "cuda":
        return 90, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


_Result = TypeVar("_Result")


def _in_settled_context(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Run `function(tokens, …)` with the tokens' device current and autocast off: the dtypes of products are settled."""

    @functools.wraps(function)
    def call(tokens: Tensor, *args: object) -> _Result:
        device = tokens.device
        elsewhere = device.type == "cuda" and torch.cuda.current_device() != device.index
        if not elsewhere and not torch.is_autocast_enabled(device.type):
            return function(tokens, *args)
        with contextlib.ExitStack() as stack:
            if elsewhere:
                stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.autocast(device.type, enabled=False))
            return function(tokens, *args)

    return call


def _run(made: launch.Launch, config: object = None) -> None:
    tracing.note(made.name, str(config) if config is not None else "")
    made.run()


def _library(name: str) -> None:
    tracing.note("library", name)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The library's, which needs one dtype: under autocast the bias is still wider, and is cast as autocast would."""
    return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


def _tma(p: Parameters, *given: Tensor | None) -> bool:
    """Whether tiles go through descriptors. What is allocated here has rows like W1's or W2's, so it is as describable.

    Not for float32, where descriptors double the registers that a product needs.
    """
    arch, _ = _device_facts(p.w1.device)
    return configs.uses_descriptors(arch) and p.w1.dtype != torch.float32 and launch.is_describable(*given, p.w1, p.w2)


@functools.lru_cache(maxsize=4096)
def _details(tokens: torch.dtype, approximate: str, strided: bool, precision: str, *flags: str) -> str:
    words = [f"x={dtype_name(tokens)}", f"gelu={approximate}", "strided" if strided else "", precision]
    return " ".join(word for word in (*words, *flags) if word)


def _problem(stage: str, x: Tensor, p: Parameters, o: Options, tma: bool, *flags: str) -> Problem:
    hidden, channels = p.w1.shape
    dtype = p.w1.dtype
    precision = launch.float32_precision() if dtype == torch.float32 else ""
    factors = [name for name in ("layer_scale", "branch_scale") if getattr(p, name) is not None]
    moved = "" if tma else "pointers"
    details = _details(x.dtype, o.approximate, x.stride(0) != channels, precision, *factors, moved, *flags)
    return Problem(stage, x.shape[0], channels, hidden, _NAMES[dtype], details)


_NAMES = {dtype: dtype_name(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@functools.lru_cache
def _shipped(
    kernel: str, methods: tuple[str, ...], arch: int, dtype: torch.dtype, channels: int, tma: bool
) -> tuple[Candidate, ...]:
    tiles = configs.shipped(kernel, arch, dtype, channels, tma)
    return tuple(Candidate(method, config) for method in methods for config in tiles)


def _tiles(kernel: str, *methods: str, x: Tensor, p: Parameters, tma: bool) -> tuple[Candidate, ...]:
    """Every tile that ships for this case, by each method."""
    return _shipped(kernel, methods, _device_facts(x.device)[0], p.w1.dtype, x.shape[1], tma)


# Forward


@_in_settled_context
def forward(x: Tensor, p: Parameters, o: Options, save: str) -> tuple[Tensor, Saved]:
    """out [M, C] and what `save` names; matrices are of the compute dtype."""
    kept, tma = SAVE[save], _tma(p, x)
    if "pre" in kept:
        return _staged(x, p, o, kept, tma)

    def run(candidate: Candidate) -> tuple[Tensor, Saved]:
        return _staged(x, p, o, kept, tma) if candidate == STAGED else _one_pass(x, p, o, kept, candidate, tma)

    # In device-memory terms one pass has an edge below a width of about 256.
    tiles = _tiles("one_pass", "one_pass", x=x, p=p, tma=tma)
    offered = (*tiles, STAGED) if x.shape[1] <= 256 else (STAGED, *tiles)
    return run(tuning.choose(_problem("forward", x, p, o, tma, f"save={save}"), offered, run, x.device))


def _output_dtype(x: Tensor, p: Parameters) -> torch.dtype:
    """That of `x + layer_scale·branch`, as PyTorch promotes."""
    branch = p.w1.dtype if p.layer_scale is None else torch.promote_types(p.w1.dtype, p.layer_scale.dtype)
    return torch.promote_types(x.dtype, branch)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


def _one_pass(x, p, o, kept, candidate, tma) -> tuple[Tensor, Saved]:
    out = torch.empty(x.shape, dtype=_output_dtype(x, p), device=x.device)
    mean, rstd = _statistics(x) if kept else (None, None)
    _run(launch.one_pass(x, p, o, out, mean, rstd, config=candidate.config, tma=tma), candidate.config)
    return out, Saved(mean, rstd)


def _staged(x, p, o, kept, tma) -> tuple[Tensor, Saved]:
    keep_pre = "pre" in kept
    flags = ["pre"] if keep_pre else []

    def first(candidate: Candidate) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return _hidden(x, p, o, candidate, keep_pre, tma)

    # On raw tokens LayerNorm is a correction of the product: the mean cancels there, at float32's accuracy, so that p is off
    # by about 2^-24·√C·|mean|/σ. That stays below the dtype's own rounding up to |mean|/σ of some hundreds. Tokens wider
    # than the compute dtype would lose digits of what is left of their mean when they are rounded.
    raw = x.dtype == p.w1.dtype and x.dtype != torch.float32
    methods = ("normalized", "corrected") if raw else ("normalized",)
    offered = (*_tiles("fc1", *methods, x=x, p=p, tma=tma), LIBRARY)
    act, pre, mean, rstd = first(tuning.choose(_problem("fc1", x, p, o, tma, *flags), offered, first, x.device))

    def second(candidate: Candidate) -> Tensor:
        return _output(act, x, p, o, candidate, tma)

    offered = (*_tiles("fc2", "fused", x=x, p=p, tma=tma), LIBRARY)
    out = second(tuning.choose(_problem("fc2", x, p, o, tma), offered, second, x.device))
    return out, Saved(mean, rstd, pre, act if "act" in kept else None) if kept else Saved()


def _normalize(x, p, o, mean, rstd, *, given: bool) -> Tensor:
    normed = torch.empty(x.shape, dtype=p.w1.dtype, device=x.device)
    _run(launch.layer_norm(x, p, o, normed, mean, rstd, given=given))
    return normed


def _hidden(x, p, o, candidate, keep_pre, tma) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """act, pre [M, H] and the row statistics."""
    (tokens, _), hidden = x.shape, p.w1.shape[0]
    mean, rstd = _statistics(x)
    if candidate.method == "corrected":
        w1_sum, b1 = (x.new_empty(hidden, dtype=torch.float32) for _ in range(2))
        source, weights, statistics = x, p._replace(w1=torch.empty_like(p.w1), b1=b1), (mean, rstd, w1_sum)
        _run(launch.row_statistics(x, p, o, mean, rstd, weights, w1_sum))
    else:
        source, weights, statistics = _normalize(x, p, o, mean, rstd, given=False), p, None
        if candidate == LIBRARY:
            pre = _linear(source, p.w1, p.b1)
            _library("fc1")
            return F.gelu(pre, approximate=o.approximate), pre if keep_pre else None, mean, rstd
    act = torch.empty(tokens, hidden, dtype=p.w1.dtype, device=x.device)
    pre = torch.empty_like(act) if keep_pre else None
    made = launch.fc1(source, weights, o, act, pre, statistics, config=candidate.config, tma=tma)
    _run(made, candidate.config)
    return act, pre, mean, rstd


def _output(act, x, p, o, candidate, tma) -> Tensor:
    """out [M, C]."""
    dtype = _output_dtype(x, p)
    if candidate == LIBRARY:
        branch = _linear(act, p.w2, p.b2)
        _library("fc2")
        if p.layer_scale is not None:
            branch = branch * p.layer_scale
        if p.branch_scale is not None:
            branch = branch * p.branch_scale[:, None].to(branch.dtype)
        return torch.add(branch, x, alpha=o.residual_scale).to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _run(launch.fc2(act, x, p, o, out, config=candidate.config, tma=tma), candidate.config)
    return out


@_in_settled_context
def backward(grad: Tensor, x: Tensor, p: Parameters, o: Options, saved: Saved, needs: Needs) -> list[Tensor | None]:
    """Gradients in the order of `Needs`, None where not wanted. Nothing is computed that none of them needs."""
    dtype = p.w1.dtype
    level = _level(p)
    narrow = _branch_gradient(grad, p, level)
    normed = None
    if needs.w1 or (saved.pre is None and (needs.through_gelu or (needs.act and saved.act is None))):
        normed = _normalize(x, p, o, saved.mean, saved.rstd, given=True)

    act, grad_pre, grad_b1 = saved.act, None, None
    if needs.through_gelu:
        grad_pre, computed, grad_b1 = _hidden_gradient(
            narrow, x, p, o, saved, normed, level, needs.act and act is None, needs.b1
        )
        act = act if act is not None else computed
    elif needs.act and act is None:
        act = _activation(normed, p, o, saved)

    grad_w1 = _product(grad_pre.T, normed, "grad_w1").to(dtype) if needs.w1 else None
    column_sums = needs.b2 or (needs.layer_scale and p.b2 is not None)
    grad_x = grad_ln_weight = grad_ln_bias = sum_grad = None
    if needs.through_norm:
        grad_ln = _product(grad_pre, p.w1, "grad_ln")
        grad_x, grad_ln_weight, grad_ln_bias, sum_grad = _layer_norm_input(
            grad_ln, grad, x, p, o, saved, needs, column_sums
        )
    elif column_sums:
        sum_grad = (
            grad.sum(0, dtype=torch.float32) if p.branch_scale is None else (grad * p.branch_scale[:, None]).sum(0)
        )

    grad_w2 = grad_layer_scale = grad_b2 = None
    if needs.act:
        # Before LayerScale: dBᵀ·GELU(p) [C, H] gives dW2 and, summed against W2, the gradient of the scale.
        product = _product(narrow.T, act, "grad_w2")
        if needs.w2:
            grad_w2 = product if p.layer_scale is None else (product * _scale_within(p, level)[:, None]).to(dtype)
        if needs.layer_scale:
            grad_layer_scale = (product.float() * p.w2).sum(1)
            if level is not None:
                grad_layer_scale = grad_layer_scale / level
            if p.b2 is not None:
                grad_layer_scale = grad_layer_scale + sum_grad * p.b2
            grad_layer_scale = grad_layer_scale.to(p.layer_scale.dtype)
    if needs.b2:
        grad_b2 = (sum_grad if p.layer_scale is None else sum_grad * p.layer_scale).to(p.b2.dtype)
    return [grad_x, grad_ln_weight, grad_ln_bias, grad_w1, grad_b1, grad_w2, grad_b2, grad_layer_scale]


def _level(p: Parameters) -> Tensor | None:
    """The power of two next above LayerScale's largest factor, float32 [], in float16; None where no level is needed.

    LayerScale is put on W2 in the backward, so that its own gradient falls off from W2's. Factors of 1e-6, as they are
    initialized, would make float16 weights vanish, and gradients without them overflow: so their common level goes onto the
    gradient, where a loss scale meets it, and only what is left of them onto the weights.
    """
    if p.layer_scale is None or p.w1.dtype != torch.float16:
        return None
    largest = p.layer_scale.abs().amax().float()
    _, exponent = torch.frexp(largest)
    # Where it is all zero, its gradient still needs dO·GELU(p), at a level that float16 can hold.
    exponent = torch.where(largest == 0, -10, exponent)
    return torch.ldexp(torch.ones((), device=p.layer_scale.device), exponent)


def _scale_within(p: Parameters, level: Tensor | None) -> Tensor:
    """LayerScale relative to its level."""
    return p.layer_scale if level is None else p.layer_scale / level


def _branch_gradient(grad: Tensor, p: Parameters, level: Tensor | None) -> Tensor:
    """dB [M, C] of the compute dtype, in one pass where it is not dO itself; times `level` if there is one."""
    factors = [f for f in (None if p.branch_scale is None else p.branch_scale[:, None], level) if f is not None]
    if not factors:
        return grad.to(p.w1.dtype)
    # With a dimension, so that it decides the dtype.
    factor = functools.reduce(torch.mul, factors).expand(grad.shape[0], 1)
    return torch.mul(grad, factor, out=torch.empty(grad.shape, dtype=p.w1.dtype, device=grad.device))


def _product(a: Tensor, b: Tensor, name: str) -> Tensor:
    _library(name)
    return torch.mm(a, b)


def _activation(normed, p, o, saved) -> Tensor:
    """GELU(p) alone, where nothing in front of it needs a gradient."""
    if saved.pre is not None:
        return F.gelu(saved.pre, approximate=o.approximate)
    _library("fc1")
    return F.gelu(_linear(normed, p.w1, p.b1), approximate=o.approximate)


def _hidden_gradient(
    grad, x, p, o, saved, normed, level, want_act, want_b1
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dP, GELU(p) if wanted [M, H], and b1's gradient."""
    tokens, hidden = grad.shape[0], p.w1.shape[0]
    pre = saved.pre
    scaled = p if p.layer_scale is None else p._replace(w2=(p.w2 * _scale_within(p, level)[:, None]).to(p.w2.dtype))

    def run(candidate: Candidate) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config = candidate.config or configs.ELEMENTWISE
        act = torch.empty(tokens, hidden, dtype=p.w1.dtype, device=grad.device) if want_act else None
        sums = grad.new_empty(launch.ceil_div(tokens, config.bm), hidden, dtype=torch.float32) if want_b1 else None
        if candidate == LIBRARY:
            before = pre if pre is not None else _linear(normed, p.w1, p.b1)
            grad_pre = torch.mm(grad, scaled.w2)
            _library("hidden_gradient")
            _run(launch.elementwise(before, o, grad_pre, grad_pre, act, sums, config=config), config)
        else:
            grad_pre = torch.empty(tokens, hidden, dtype=p.w1.dtype, device=grad.device)
            made = launch.hidden_gradient(normed, scaled, o, pre, grad, grad_pre, act, sums, config=config, tma=tma)
            _run(made, config)
        return grad_pre, act, sums.sum(0).to(p.b1.dtype) if want_b1 else None

    kernel = "hidden_gradient" if pre is None else "saved_gradient"
    tma = _tma(p, grad, pre)
    offered = (*_tiles(kernel, "fused", x=x, p=p, tma=tma), LIBRARY)
    flags = [name for name, on in (("act", want_act), ("b1", want_b1)) if on]
    return run(tuning.choose(_problem(kernel, x, p, o, tma, *flags), offered, run, x.device))


def _layer_norm_input(grad_ln, grad, x, p, o, saved, needs, column_sums) -> tuple[Tensor | None, ...]:
    """dx, and the gradients of γ, of β and of a bias added to the output (float32), each where wanted."""
    tokens, channels = x.shape
    _, rows, _ = launch.gradient_rows(channels)
    programs = min(launch.ceil_div(tokens, rows), 4 * _device_facts(x.device)[1])

    def partial(wanted: bool) -> Tensor | None:
        return x.new_empty(programs, channels, dtype=torch.float32) if wanted else None

    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs.x else None
    sums = [partial(needs.ln_weight), partial(needs.ln_bias), partial(column_sums)]
    _run(launch.layer_norm_input(grad_ln, x, grad, p, o, saved, grad_x, sums, programs=programs))
    grad_ln_weight, grad_ln_bias, sum_grad = (None if s is None else s.sum(0) for s in sums)
    return (
        grad_x,
        grad_ln_weight.to(p.ln_weight.dtype) if needs.ln_weight else None,
        grad_ln_bias.to(p.ln_bias.dtype) if needs.ln_bias else None,
        sum_grad,
    )
