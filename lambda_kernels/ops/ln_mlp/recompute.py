"""`ln_mlp` by PyTorch with little kept for the backward: x alone ("all"), or x and p, what GELU is applied to ("act").

x [M, C], p and GELU(p) [M, H]. What is not kept is computed again in the backward: LayerNorm, and with "all" the first product.
Both directions take some rows at a time, so that of what is not kept only those rows are there at once. Weights' gradients
are summed over the parts in float32 or wider, always in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import checks
from . import dispatch, reference

# Rows at a time. A CPU is as fast with rows whose hidden values its caches hold; a GPU wants enough of them to fill it.
ROWS = {"cpu": 1024}

ROWS_ELSEWHERE = 16384


class _Options(NamedTuple):
    eps: float
    scale: float
    approximate: str
    compute: torch.dtype  # of both products
    normalized: torch.dtype  # that LayerNorm is computed in
    autocast: torch.dtype | None  # that was in force, None where it was off
    keep_pre: bool


def ln_mlp(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    eps: float,
    residual_scale: float,
    layer_scale: Tensor | None,
    branch_scale: Tensor | None,
    approximate: str,
    recompute: str,
    compute: torch.dtype,
) -> Tensor:
    """What `reference.ln_mlp` computes, up to rounding, for a call whose gradient will be asked for.

    Args:
        recompute: "act" or "all".
        compute: The dtype of both products.
    """
    parameters = (ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, branch_scale)
    if torch.compiler.is_compiling():
        # Compilers that see the formulas decide by themselves what to save, unless told where to compute again.
        return _in_a_graph(x, *parameters, eps, residual_scale, approximate, recompute)
    autocast = torch.get_autocast_dtype(x.device.type) if checks.autocast_enabled(x.device.type) else None
    widest = torch.float64 if x.dtype == torch.float64 else torch.float32
    normalized = x.dtype if autocast is None else widest  # as autocast has it
    keep_pre = recompute == "act"
    options = _Options(float(eps), float(residual_scale), approximate, compute, normalized, autocast, keep_pre)
    return _LnMlp.apply(options, x, *parameters)


def obstacles() -> list[str]:
    """Why nothing can be computed again just now, whatever is asked for."""
    if torch.compiler.is_compiling():
        return ["the model is being exported"] if dispatch.exporting() else []
    return dispatch.transforms()


def _in_a_graph(
    x, ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, branch_scale, eps, scale, approximate, recompute
) -> Tensor:
    def normed(x: Tensor) -> Tensor:
        return reference.normalized(reference.scaled(x, scale), ln_weight, ln_bias, eps)

    def after(x: Tensor, pre: Tensor) -> Tensor:
        y = reference.scaled(x, scale)
        return reference.after_gelu(y, F.gelu(pre, approximate=approximate), w2, b2, layer_scale, branch_scale)

    # There is nothing random in it, so that no generator's state needs to be kept.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "all":
        return checkpoint(lambda x: after(x, F.linear(normed(x), w1, b1)), x, **options)
    # The first product stands between what is computed again: of that, inductor keeps no last result.
    return checkpoint(after, x, F.linear(checkpoint(normed, x, **options), w1, b1), **options)


class _LnMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: _Options, x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.options = options
        ctx.set_materialize_grads(False)
        out, pre = _forward(options, x, *parameters)
        ctx.save_for_backward(x, *parameters, pre)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        needs = ctx.needs_input_grad[1:9]
        if grad is None or not any(needs):
            return (None,) * 10
        saved = ctx.saved_tensors  # x, the parameters, p
        if torch.is_grad_enabled():  # a gradient of the gradient will be asked for
            gradients: Sequence[Tensor | None] = _differentiable(ctx.options, grad, saved[:-1], needs)
        else:
            with _autocast(grad.device, None):
                gradients = _backward(ctx.options, grad, *(*saved, needs))
        return None, *gradients, None


def _forward(
    o: _Options, x, ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, branch_scale
) -> tuple[Tensor, Tensor | None]:
    """The output, and p [M, H] where it is to be kept."""
    tokens, factor = x.reshape(-1, x.shape[-1]), _per_token(branch_scale, x)
    # Cast here and once: autocast would remember a weight that it casts where no gradient is recorded, and leave out the
    # gradient of the next call that takes this weight.
    w1, b1, w2, b2 = (None if t is None else t.to(o.compute) for t in (w1, b1, w2, b2))
    pre = out = None
    if o.keep_pre:
        pre = F.linear(_normalize(o, tokens, ln_weight, ln_bias)[0].to(o.compute), w1, b1)
    for rows in _parts(tokens):
        y = reference.scaled(tokens[rows], o.scale)
        if pre is None:
            hidden = F.linear(_normalize(o, tokens[rows], ln_weight, ln_bias)[0].to(o.compute), w1, b1)
            act = torch.ops.aten.gelu_(hidden, approximate=o.approximate)
        else:
            act = F.gelu(pre[rows], approximate=o.approximate)
        keep = None if factor is None else factor[rows]
        result = reference.after_gelu(y, act, w2, b2, layer_scale, keep)
        if out is None:
            out = torch.empty(tokens.shape, dtype=result.dtype, device=x.device)
        out[rows] = result
    return out.view(x.shape), pre


def _backward(
    o: _Options, grad, x, ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, branch_scale, pre, needs
) -> list[Tensor | None]:
    """The gradients of x and of the seven parameters, None where not wanted. Nothing is computed that none of them needs."""
    need_x, need_gamma, need_beta, need_w1, need_b1, need_w2, need_b2, need_scale = needs
    through_norm = need_x or need_gamma or need_beta
    through_gelu = through_norm or need_w1 or need_b1
    need_act = need_w2 or need_scale
    need_hidden = through_gelu or need_act

    channels = x.shape[-1]
    tokens, grad, factor = x.reshape(-1, channels), grad.reshape(-1, channels), _per_token(branch_scale, x)
    narrow1, narrow_bias, narrow2 = (None if t is None else t.to(o.compute) for t in (w1, b1, w2))
    gamma, beta = (None if t is None else t.to(o.normalized) for t in (ln_weight, ln_bias))
    grad_x = torch.empty(tokens.shape, dtype=x.dtype, device=x.device) if need_x else None
    sums = _Sums()

    def part(rows: slice) -> None:
        y = reference.scaled(tokens[rows], o.scale).to(o.normalized)
        if through_norm or need_w1 or (need_hidden and pre is None):
            normed, mean, rstd = _normalize(o, tokens[rows], ln_weight, ln_bias)
            narrow_normed = normed.to(o.compute)
        if need_hidden:
            hidden = pre[rows] if pre is not None else F.linear(narrow_normed, narrow1, narrow_bias)
        branch = grad[rows]  # of the branch before the residual is added; then of what LayerScale multiplies
        if factor is not None:
            branch = branch * factor[rows][:, None].to(branch.dtype)
        if need_act:
            act = F.gelu(hidden, approximate=o.approximate)
        if need_scale:
            # Before LayerScale: dBᵀ·GELU(p) [C, H] gives dW2, and summed against W2 the gradient of the scale. In float16
            # it may be too large, since LayerScale's small factors are not yet in it.
            wide = torch.float32 if o.compute == torch.float16 else o.compute
            sums.add_product("unscaled", branch.to(wide), act.to(wide))
            sums.add("unscaled bias", branch, summed=True)
        if layer_scale is not None:
            branch = branch * layer_scale
        branch = branch.to(o.compute)
        if need_w2 and not need_scale:
            sums.add_product("w2", branch, act)
        if need_b2:
            sums.add("b2", branch, summed=True)
        if not through_gelu:
            return
        grad_hidden = torch.ops.aten.gelu_backward(branch @ narrow2, hidden, approximate=o.approximate)
        if need_w1:
            sums.add_product("w1", grad_hidden, narrow_normed)
        if need_b1:
            sums.add("b1", grad_hidden, summed=True)
        if not through_norm:
            return
        grad_y, grad_gamma, grad_beta = torch.ops.aten.native_layer_norm_backward(
            (grad_hidden @ narrow1).to(o.normalized),
            y,
            [channels],
            mean,
            rstd,
            gamma,
            beta,
            [need_x, need_gamma, need_beta],
        )
        if need_gamma:
            sums.add("ln_weight", grad_gamma)
        if need_beta:
            sums.add("ln_bias", grad_beta)
        if need_x:
            grad_x[rows] = reference.scaled(grad[rows] + grad_y, o.scale)

    for rows in _parts(tokens):
        part(rows)  # in a function, so that what it computed is gone when the next begins

    grad_w2, grad_scale = sums.of("w2", w2) if need_w2 and not need_scale else None, None
    if need_scale:
        unscaled = sums.totals["unscaled"]
        grad_scale = (unscaled * w2).sum(1)
        if b2 is not None:
            grad_scale = grad_scale + sums.totals["unscaled bias"] * b2
        grad_scale = grad_scale.to(layer_scale.dtype)
        grad_w2 = (unscaled * layer_scale[:, None]).to(w2.dtype) if need_w2 else None
    return [
        None if grad_x is None else grad_x.view(x.shape),
        sums.of("ln_weight", ln_weight) if need_gamma else None,
        sums.of("ln_bias", ln_bias) if need_beta else None,
        sums.of("w1", w1) if need_w1 else None,
        sums.of("b1", b1) if need_b1 else None,
        grad_w2,
        sums.of("b2", b2) if need_b2 else None,
        grad_scale,
    ]


class _Sums:
    """Sums over the parts, in float32 or wider."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, name: str, part: Tensor, *, summed: bool = False) -> None:
        """Add `part`, or the sum of its rows."""
        wide = torch.promote_types(part.dtype, torch.float32)
        part = part.sum(0, dtype=wide) if summed else part.to(wide)
        if name in self.totals:
            self.totals[name] += part
        else:
            self.totals[name] = part

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        """Add aᵀ·b."""
        if name in self.totals and a.dtype == self.totals[name].dtype:
            torch.addmm(self.totals[name], a.T, b, out=self.totals[name])
        else:
            self.add(name, torch.mm(a.T, b))

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """The sum as a gradient of `parameter`."""
        return self.totals[name].to(parameter.dtype)


def _differentiable(
    o: _Options, grad: Tensor, inputs: Sequence[Tensor | None], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients as functions of what they depend on: by the twin, which saves everything."""
    # Views, so that one tensor given twice is two inputs.
    views = [None if t is None else t.view_as(t) for t in inputs]
    *tensors, branch_scale = views
    with _autocast(grad.device, o.autocast):
        out = reference.ln_mlp(
            *tensors[:7],
            eps=o.eps,
            residual_scale=o.scale,
            layer_scale=tensors[7],
            branch_scale=branch_scale,
            approximate=o.approximate,
        )
    wanted = [t for t, needed in zip(tensors, needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(gradients) if needed else None for needed in needs]


def _normalize(o: _Options, tokens: Tensor, ln_weight, ln_bias) -> tuple[Tensor, Tensor, Tensor]:
    """LN(s·x), and each row's mean and 1/σ."""
    y = reference.scaled(tokens, o.scale).to(o.normalized)
    weight, bias = (None if t is None else t.to(o.normalized) for t in (ln_weight, ln_bias))
    return torch.native_layer_norm(y, [y.shape[-1]], weight, bias, o.eps)


def _per_token(branch_scale: Tensor | None, x: Tensor) -> Tensor | None:
    return None if branch_scale is None else branch_scale.expand(x.shape[:-1]).reshape(-1)


def _parts(tokens: Tensor) -> list[slice]:
    rows = ROWS.get(tokens.device.type, ROWS_ELSEWHERE)
    return [slice(first, first + rows) for first in range(0, len(tokens), rows)]


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """With autocast to `dtype`, or with none."""
    if dtype is not None:
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)
    if checks.autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
