"""`ln_mlp` forward and backward as sequences of kernels and library products, on flat tokens [M, C].

Each stage has several ways to be computed, of which the library's is always one; `tuning.choose` picks. What ran is
recorded by `tracing`. With the `Steps` of an earlier call of the same kind, nothing is chosen or made anew. Needs triton.
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
from . import launch
from .kernels import configs
from .steps import Steps
from .tuning import Candidate, Problem, bucket

LIBRARY = Candidate("library")
STAGED = Candidate("staged")


@functools.lru_cache
def _device_facts(device: torch.device) -> tuple[int, int]:
    """(compute capability as 80, 90 …, number of multiprocessors); for the interpreter, one that shows every feature."""
    if device.type != "cuda":
        return 90, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def _at_once(device: torch.device) -> int:
    """How many programs occupy a device; one in the interpreter, where they follow one another."""
    return _device_facts(device)[1] if device.type == "cuda" else 1


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


@functools.lru_cache(maxsize=4096)
def _shipped(
    kernel: str,
    methods: tuple[str, ...],
    arch: int,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    at_once: int,
    tma: bool,
) -> tuple[Candidate, ...]:
    rows, channels, columns = sizes
    tiles = configs.fullest_first(configs.shipped(kernel, arch, dtype, channels, tma), rows, columns, at_once)
    return tuple(Candidate(method, config) for method in methods for config in tiles)


def _tiles(kernel: str, *methods: str, x: Tensor, p: Parameters, tma: bool) -> tuple[Candidate, ...]:
    """Every tile that ships for this case, by each method; the default first."""
    (tokens, channels), hidden = x.shape, p.w1.shape[0]
    # Each program of one pass computes all columns.
    columns = {"one_pass": 1, "fc2": channels}.get(kernel, hidden)
    sizes, arch = (bucket(tokens), channels, columns), _device_facts(x.device)[0]
    return _shipped(kernel, methods, arch, p.w1.dtype, sizes, _at_once(x.device), tma)


# Forward


@_in_settled_context
def forward(x: Tensor, p: Parameters, o: Options, save: str, steps: Steps | None = None) -> tuple[Tensor, Saved]:
    """out [M, C] and what `save` names; matrices are of the compute dtype."""
    steps = Steps() if steps is None else steps
    if steps.tma is None:
        steps.tma = _tma(p, x)
    kept, tma = SAVE[save], steps.tma
    if "pre" in kept:
        return _staged(x, p, o, kept, tma, steps)

    def run(candidate: Candidate, steps: Steps) -> tuple[Tensor, Saved]:
        if candidate is STAGED:
            return _staged(x, p, o, kept, tma, steps)
        return _one_pass(x, p, o, kept, candidate, tma, steps)

    candidate = steps.chosen("forward")
    if candidate is None:
        tiles = _tiles("one_pass", "one_pass", x=x, p=p, tma=tma)
        offered = _order_forward(tiles, x.shape[0], x.shape[1], _at_once(x.device), tma)
        candidate = steps.choose(_problem("forward", x, p, o, tma, f"save={save}"), offered, run, x.device)
    return run(candidate, steps)


def _output_dtype(x: Tensor, p: Parameters, steps: Steps) -> torch.dtype:
    """That of `x + layer_scale·branch`, as PyTorch promotes."""
    if steps.dtype is None:
        branch = p.w1.dtype if p.layer_scale is None else torch.promote_types(p.w1.dtype, p.layer_scale.dtype)
        steps.dtype = torch.promote_types(x.dtype, branch)
    return steps.dtype


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


def _order_forward(
    tiles: tuple[Candidate, ...], tokens: int, channels: int, at_once: int, tma: bool
) -> tuple[Candidate, ...]:
    """The candidates of a forward, the default first; `at_once` is how many programs it takes to occupy the device."""
    # In device-memory terms one pass has an edge below a width of about 256, if its programs are enough for the device: each of
    # them computes whole rows of tokens. Products fed by descriptors are so fast that reading all weights for each tile costs
    # more than that edge.
    fills = tiles and launch.ceil_div(bucket(tokens), tiles[0].config.bm) >= at_once
    return (*tiles, STAGED) if channels <= 256 and fills and not tma else (STAGED, *tiles)


_ONE_PASS = ("x", *Parameters._fields, "out", "mean", "rstd")


def _one_pass(x, p, o, kept, candidate, tma, steps) -> tuple[Tensor, Saved]:
    out = torch.empty(x.shape, dtype=_output_dtype(x, p, steps), device=x.device)
    mean, rstd = _statistics(x) if kept else (None, None)
    config = candidate.config

    def make() -> launch.Launch:
        return launch.one_pass(x, p, o, out, mean, rstd, config=config, tma=tma)

    steps.launch("one_pass", config, make, _ONE_PASS, (x, *p, out, mean, rstd))
    return out, Saved(mean, rstd)


def _staged(x, p, o, kept, tma, steps) -> tuple[Tensor, Saved]:
    keep_pre = "pre" in kept
    candidate = steps.chosen("fc1")
    if candidate is None:
        candidate = _choose_fc1(x, p, o, keep_pre, tma, steps)
    act, pre, mean, rstd = _hidden(x, p, o, candidate, keep_pre, tma, steps)
    candidate = steps.chosen("fc2")
    if candidate is None:
        offered = (*_tiles("fc2", "fused", x=x, p=p, tma=tma), LIBRARY)

        def second(candidate: Candidate, steps: Steps) -> Tensor:
            return _output(act, x, p, o, candidate, tma, steps)

        candidate = steps.choose(_problem("fc2", x, p, o, tma), offered, second, x.device)
    out = _output(act, x, p, o, candidate, tma, steps)
    return out, Saved(mean, rstd, pre, act if "act" in kept else None) if kept else Saved()


def _choose_fc1(x, p, o, keep_pre, tma, steps) -> Candidate:
    def first(candidate: Candidate, steps: Steps) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return _hidden(x, p, o, candidate, keep_pre, tma, steps)

    # On raw tokens LayerNorm is a correction of the product: the mean cancels there, at float32's accuracy, so that p is off
    # by about 2^-24·√C·|mean|/σ. That stays below the dtype's own rounding up to |mean|/σ of some hundreds. Tokens wider
    # than the compute dtype would lose digits of what is left of their mean when they are rounded. float16 has no room for
    # W1 times the small γ that trained networks have.
    raw = x.dtype == p.w1.dtype == torch.bfloat16
    methods = ("normalized", "corrected") if raw else ("normalized",)
    offered = (*_tiles("fc1", *methods, x=x, p=p, tma=tma), LIBRARY)
    flags = ["pre"] if keep_pre else []
    return steps.choose(_problem("fc1", x, p, o, tma, *flags), offered, first, x.device)


_LAYER_NORM = ("x", "ln_weight", "ln_bias", "out", "mean", "rstd")


def _normalize(x, p, o, mean, rstd, steps, *, given: bool) -> Tensor:
    normed = torch.empty(x.shape, dtype=p.w1.dtype, device=x.device)

    def make() -> launch.Launch:
        return launch.layer_norm(x, p, o, normed, mean, rstd, given=given)

    steps.launch("layer_norm", None, make, _LAYER_NORM, (x, p.ln_weight, p.ln_bias, normed, mean, rstd))
    return normed


_FOLDING = ("x", "mean", "rstd", "ln_weight", "ln_bias", "w1", "b1", "w1_folded", "w1_sum", "b1_folded")
_FC1 = ("x", "w1", "b1", "mean", "rstd", "w1_sum", "act", "pre")


def _hidden(x, p, o, candidate, keep_pre, tma, steps) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """act, pre [M, H] and the row statistics."""
    (tokens, _), hidden = x.shape, p.w1.shape[0]
    mean, rstd = _statistics(x)
    if candidate.method == "corrected":
        w1_sum, b1 = (x.new_empty(hidden, dtype=torch.float32) for _ in range(2))
        source, w1, statistics = x, torch.empty_like(p.w1), (mean, rstd, w1_sum)

        def fold() -> launch.Launch:
            return launch.row_statistics(x, p, o, mean, rstd, p._replace(w1=w1, b1=b1), w1_sum)

        tensors = (x, mean, rstd, p.ln_weight, p.ln_bias, p.w1, p.b1, w1, w1_sum, b1)
        steps.launch("row_statistics", None, fold, _FOLDING, tensors)
    else:
        source, w1, b1, statistics = _normalize(x, p, o, mean, rstd, steps, given=False), p.w1, p.b1, None
        if candidate is LIBRARY:
            pre = _linear(source, p.w1, p.b1)
            _library("fc1")
            return F.gelu(pre, approximate=o.approximate), pre if keep_pre else None, mean, rstd
    act = torch.empty(tokens, hidden, dtype=p.w1.dtype, device=x.device)
    pre = torch.empty_like(act) if keep_pre else None
    config = candidate.config

    def make() -> launch.Launch:
        return launch.fc1(source, p._replace(w1=w1, b1=b1), o, act, pre, statistics, config=config, tma=tma)

    tensors = (source, w1, b1, *(statistics or (None, None, None)), act, pre)
    steps.launch(f"fc1 {candidate.method}", config, make, _FC1, tensors)
    return act, pre, mean, rstd


_FC2 = ("act", "w2", "b2", "layer_scale", "branch_scale", "x", "out")


def _output(act, x, p, o, candidate, tma, steps) -> Tensor:
    """out [M, C]."""
    dtype = _output_dtype(x, p, steps)
    if candidate is LIBRARY:
        branch = _linear(act, p.w2, p.b2)
        _library("fc2")
        if p.layer_scale is not None:
            branch = branch * p.layer_scale
        if p.branch_scale is not None:
            branch = branch * p.branch_scale[:, None].to(branch.dtype)
        return torch.add(branch, x, alpha=o.residual_scale).to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    config = candidate.config

    def make() -> launch.Launch:
        return launch.fc2(act, x, p, o, out, config=config, tma=tma)

    steps.launch("fc2", config, make, _FC2, (act, p.w2, p.b2, p.layer_scale, p.branch_scale, x, out))
    return out


@_in_settled_context
def backward(
    grad: Tensor, x: Tensor, p: Parameters, o: Options, saved: Saved, needs: Needs, steps: Steps | None = None
) -> list[Tensor | None]:
    """Gradients in the order of `Needs`, None where not wanted. Nothing is computed that none of them needs."""
    steps, dtype = Steps() if steps is None else steps, p.w1.dtype
    level = _level(p)
    narrow = _branch_gradient(grad, p, level)
    normed = None
    if needs.w1 or (saved.pre is None and (needs.through_gelu or (needs.act and saved.act is None))):
        normed = _normalize(x, p, o, saved.mean, saved.rstd, steps, given=True)

    act, grad_pre, grad_b1 = saved.act, None, None
    if needs.through_gelu:
        grad_pre, computed, grad_b1 = _hidden_gradient(
            narrow, x, p, o, saved, normed, level, needs.act and act is None, needs.b1, steps
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
            grad_ln, grad, x, p, o, saved, needs, column_sums, steps
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


_ELEMENTWISE = ("pre", "grad_act", "grad_pre", "act", "sums")
_HIDDEN_GRADIENT = ("normed", "w1", "b1", "pre", "grad", "w2", "grad_pre", "act", "sums")


def _hidden_gradient(
    grad, x, p, o, saved, normed, level, want_act, want_b1, steps
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dP, GELU(p) if wanted [M, H], and b1's gradient."""
    tokens, hidden = grad.shape[0], p.w1.shape[0]
    pre = saved.pre
    scaled = p if p.layer_scale is None else p._replace(w2=(p.w2 * _scale_within(p, level)[:, None]).to(p.w2.dtype))

    kernel = "hidden_gradient" if pre is None else "saved_gradient"
    if steps.tma is None:
        steps.tma = _tma(p, grad, pre)
    tma = steps.tma

    def run(candidate: Candidate, steps: Steps) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config = candidate.config or configs.ELEMENTWISE
        act = torch.empty(tokens, hidden, dtype=p.w1.dtype, device=grad.device) if want_act else None
        sums = grad.new_empty(launch.ceil_div(tokens, config.bm), hidden, dtype=torch.float32) if want_b1 else None
        if candidate is LIBRARY:
            before = pre if pre is not None else _linear(normed, p.w1, p.b1)
            grad_pre = torch.mm(grad, scaled.w2)
            _library("hidden_gradient")

            def make() -> launch.Launch:
                return launch.elementwise(before, o, grad_pre, grad_pre, act, sums, config=config)

            steps.launch("elementwise", config, make, _ELEMENTWISE, (before, grad_pre, grad_pre, act, sums))
        else:
            grad_pre = torch.empty(tokens, hidden, dtype=p.w1.dtype, device=grad.device)

            def make() -> launch.Launch:
                return launch.hidden_gradient(normed, scaled, o, pre, grad, grad_pre, act, sums, config=config, tma=tma)

            before = (normed, p.w1, p.b1, None) if pre is None else (None, None, None, pre)
            steps.launch(kernel, config, make, _HIDDEN_GRADIENT, (*before, grad, scaled.w2, grad_pre, act, sums))
        return grad_pre, act, sums.sum(0).to(p.b1.dtype) if want_b1 else None

    candidate = steps.chosen(kernel)
    if candidate is None:
        offered = (*_tiles(kernel, "fused", x=x, p=p, tma=tma), LIBRARY)
        flags = [name for name, on in (("act", want_act), ("b1", want_b1)) if on]
        candidate = steps.choose(_problem(kernel, x, p, o, tma, *flags), offered, run, x.device)
    return run(candidate, steps)


_SUMS = ("sum_ln_weight", "sum_ln_bias", "sum_grad")
_LAYER_NORM_INPUT = ("grad_ln", "x", "grad", "ln_weight", "mean", "rstd", "branch_scale", "grad_x", *_SUMS)


def _layer_norm_input(grad_ln, grad, x, p, o, saved, needs, column_sums, steps) -> tuple[Tensor | None, ...]:
    """dx, and the gradients of γ, of β and of a bias added to the output (float32), each where wanted."""
    tokens, channels = x.shape
    _, rows, _ = launch.gradient_rows(channels)
    programs = min(launch.ceil_div(tokens, rows), 4 * _device_facts(x.device)[1])

    def partial(wanted: bool) -> Tensor | None:
        return x.new_empty(programs, channels, dtype=torch.float32) if wanted else None

    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs.x else None
    sums = [partial(needs.ln_weight), partial(needs.ln_bias), partial(column_sums)]

    def make() -> launch.Launch:
        return launch.layer_norm_input(grad_ln, x, grad, p, o, saved, grad_x, sums, programs=programs)

    tensors = (grad_ln, x, grad, p.ln_weight, saved.mean, saved.rstd, p.branch_scale, grad_x, *sums)
    steps.launch("layer_norm_input", None, make, _LAYER_NORM_INPUT, tensors)
    grad_ln_weight, grad_ln_bias, sum_grad = (None if s is None else s.sum(0) for s in sums)
    return (
        grad_x,
        grad_ln_weight.to(p.ln_weight.dtype) if needs.ln_weight else None,
        grad_ln_bias.to(p.ln_bias.dtype) if needs.ln_bias else None,
        sum_grad,
    )
