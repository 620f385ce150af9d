"""`ln_mlp` by PyTorch with little saved for the backward: x alone ("all"), or x and p, what GELU is applied to ("act").

x [M, C], p and GELU(p) [M, H]. The backward computes again what is not saved: LayerNorm, and with "all" the first product.
Both directions process some rows at a time, so that only those rows of it exist at once. The gradients of weights are summed
over the parts in float32 or wider, always in the same order.

`torch.utils.checkpoint` saves as little, but computes all rows again at once: with 6304 float32 tokens of width 192, on one
core of an AMD EPYC with PyTorch 2.14, a step took 1.2 ("all") to 1.4 times ("act") as long, and the peak of its backward was
3.4 and 2.6 times as high.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import checks
from . import dispatch, reference
from .arguments import Needs, Options, Parameters

# Rows at a time. A CPU is as fast with rows whose hidden values its caches hold; a GPU wants enough of them to fill it.
ROWS = {"cpu": 1024}
ROWS_ELSEWHERE = 16384


class _Dtypes(NamedTuple):
    compute: torch.dtype  # of both products
    norm: torch.dtype  # of LayerNorm
    autocast: torch.dtype | None  # that was in force, None where it was off


def ln_mlp(x: Tensor, p: Parameters, o: Options, *, recompute: str, compute: torch.dtype) -> Tensor:
    """What `reference.ln_mlp` computes, up to rounding, for tokens [..., C] of a call whose gradient will be requested.

    `recompute` is "act" or "all", `compute` the dtype of both products.
    """
    if torch.compiler.is_compiling():
        # Compilers that see the formulas decide by themselves what to save, unless told where to compute again.
        return _in_a_graph(x, p, o, recompute)
    autocast = torch.get_autocast_dtype(x.device.type) if checks.autocast_enabled(x.device.type) else None
    widest = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtypes = _Dtypes(compute, x.dtype if autocast is None else widest, autocast)  # as autocast has it
    return _LnMlp.apply(o, dtypes, recompute == "act", x, *p)


def obstacles() -> list[str]:
    """Why nothing can be recomputed in the present call, even on request."""
    if torch.compiler.is_compiling():
        return ["the model is being exported"] if dispatch.is_exporting() else []
    return dispatch.active_transforms()


def checkpoint_around(
    norm: Callable[[Tensor], Tensor],
    product: Callable[[Tensor], Tensor],
    after: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    **options: Any,
) -> Tensor:
    """`after(x, product(norm(x)))` that saves x and the product's result, and computes norm and `after` again.

    `options` are those of `torch.utils.checkpoint.checkpoint`.
    """
    # PyTorch stops a second run as soon as it has what was requested: before the product, whose result is saved, and in `after`
    # before a last product whose result nothing uses. Compilers do not save the last result of what they compute again, so
    # for them the product stays outside.
    if torch.compiler.is_compiling():
        pre = product(checkpoint(norm, x, use_reentrant=False, **options))
    else:
        pre = checkpoint(lambda x: product(norm(x)), x, use_reentrant=False, **options)
    return checkpoint(after, x, pre, use_reentrant=False, **options)


def _in_a_graph(x: Tensor, p: Parameters, o: Options, recompute: str) -> Tensor:
    def norm(x: Tensor) -> Tensor:
        return reference.normalize(reference.scale_residual(x, o.residual_scale), p.ln_weight, p.ln_bias, o.eps)

    def product(normed: Tensor) -> Tensor:
        return F.linear(normed, p.w1, p.b1)

    def after(x: Tensor, pre: Tensor) -> Tensor:
        y = reference.scale_residual(x, o.residual_scale)
        act = F.gelu(pre, approximate=o.approximate)
        return reference.add_branch(y, act, p.w2, p.b2, p.layer_scale, p.branch_scale)

    # Nothing here is random, so no generator's state has to be saved.
    if recompute == "all":
        return checkpoint(lambda x: after(x, product(norm(x))), x, use_reentrant=False, preserve_rng_state=False)
    return checkpoint_around(norm, product, after, x, preserve_rng_state=False)


class _LnMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Options, dtypes: _Dtypes, save_pre: bool, x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.call = o, dtypes
        ctx.set_materialize_grads(False)
        out, pre = _forward(x, Parameters(*parameters), o, dtypes, save_pre)
        ctx.save_for_backward(x, *parameters, pre)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        needs = Needs(*ctx.needs_input_grad[3:11])
        if grad is None or not any(needs):
            return (None,) * 12
        x, *parameters, pre = ctx.saved_tensors
        p, (o, dtypes) = Parameters(*parameters), ctx.call
        if torch.is_grad_enabled():  # a gradient of the gradient will be requested
            gradients = _differentiable(grad, x, p, o, dtypes, needs)
        else:
            with _autocast(grad.device, None):
                gradients = _backward(grad, x, p, o, dtypes, pre, needs)
        return None, None, None, *gradients, None


def _forward(x: Tensor, p: Parameters, o: Options, dtypes: _Dtypes, save_pre: bool) -> tuple[Tensor, Tensor | None]:
    """The output, and p [M, H] where it is to be saved."""
    tokens, factor = x.reshape(-1, x.shape[-1]), _per_token(p.branch_scale, x)
    # Cast here and once: autocast would remember a weight that it casts where no gradient is recorded, and omit the
    # gradient of the next call that uses this weight.
    w1, b1, w2, b2 = (None if t is None else t.to(dtypes.compute) for t in (p.w1, p.b1, p.w2, p.b2))
    pre = out = None
    if save_pre:
        pre = F.linear(_normalize(tokens, p, o, dtypes)[0].to(dtypes.compute), w1, b1)
    for rows in _parts(tokens):
        y = reference.scale_residual(tokens[rows], o.residual_scale)
        if pre is None:
            hidden = F.linear(_normalize(tokens[rows], p, o, dtypes)[0].to(dtypes.compute), w1, b1)
            act = torch.ops.aten.gelu_(hidden, approximate=o.approximate)
        else:
            act = F.gelu(pre[rows], approximate=o.approximate)
        result = reference.add_branch(y, act, w2, b2, p.layer_scale, None if factor is None else factor[rows])
        if out is None:
            out = torch.empty(tokens.shape, dtype=result.dtype, device=x.device)
        out[rows] = result
    return out.view(x.shape), pre


def _backward(
    grad: Tensor, x: Tensor, p: Parameters, o: Options, dtypes: _Dtypes, pre: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    """Gradients in the order of `Needs`, None where not wanted. Nothing is computed that none of them needs."""
    channels = x.shape[-1]
    tokens, grad, factor = x.reshape(-1, channels), grad.reshape(-1, channels), _per_token(p.branch_scale, x)
    w1, b1, w2 = (None if t is None else t.to(dtypes.compute) for t in (p.w1, p.b1, p.w2))
    ln_weight, ln_bias = (None if t is None else t.to(dtypes.norm) for t in (p.ln_weight, p.ln_bias))
    grad_x = torch.empty(tokens.shape, dtype=x.dtype, device=x.device) if needs.x else None
    need_hidden = needs.through_gelu or needs.act
    sums = _Sums()

    def part(rows: slice) -> None:
        y = reference.scale_residual(tokens[rows], o.residual_scale).to(dtypes.norm)
        if needs.through_norm or needs.w1 or (need_hidden and pre is None):
            normed, mean, rstd = _normalize(tokens[rows], p, o, dtypes)
            normed = normed.to(dtypes.compute)
        if need_hidden:
            hidden = pre[rows] if pre is not None else F.linear(normed, w1, b1)
        branch = grad[rows]  # of the branch before the residual is added; then of what LayerScale multiplies
        if factor is not None:
            branch = branch * factor[rows][:, None].to(branch.dtype)
        if needs.act:
            act = F.gelu(hidden, approximate=o.approximate)
        if needs.layer_scale:
            # Before LayerScale: dBᵀ·GELU(p) [C, H] gives dW2, and summed against W2 the gradient of the scale. In float16
            # it may be too large, since LayerScale's small factors are not yet in it.
            wide = torch.float32 if dtypes.compute == torch.float16 else dtypes.compute
            sums.add_product("unscaled", branch.to(wide), act.to(wide))
            sums.add("unscaled bias", branch, summed=True)
        if p.layer_scale is not None:
            branch = branch * p.layer_scale
        branch = branch.to(dtypes.compute)
        if needs.w2 and not needs.layer_scale:
            sums.add_product("w2", branch, act)
        if needs.b2:
            sums.add("b2", branch, summed=True)
        if not needs.through_gelu:
            return
        grad_hidden = torch.ops.aten.gelu_backward(branch @ w2, hidden, approximate=o.approximate)
        if needs.w1:
            sums.add_product("w1", grad_hidden, normed)
        if needs.b1:
            sums.add("b1", grad_hidden, summed=True)
        if not needs.through_norm:
            return
        grad_normed, wanted = (grad_hidden @ w1).to(dtypes.norm), [needs.x, needs.ln_weight, needs.ln_bias]
        grad_y, grad_ln_weight, grad_ln_bias = torch.ops.aten.native_layer_norm_backward(
            grad_normed, y, [channels], mean, rstd, ln_weight, ln_bias, wanted
        )
        if needs.ln_weight:
            sums.add("ln_weight", grad_ln_weight)
        if needs.ln_bias:
            sums.add("ln_bias", grad_ln_bias)
        if needs.x:
            grad_x[rows] = reference.scale_residual(grad[rows] + grad_y, o.residual_scale)

    for rows in _parts(tokens):
        part(rows)  # in a function, so that what it computed is gone when the next begins

    gradients = {name: sums.totals[name].to(t.dtype) for name, t in p._asdict().items() if name in sums.totals}
    if needs.x:
        gradients["x"] = grad_x.view(x.shape)
    if needs.layer_scale:
        unscaled = sums.totals["unscaled"]
        grad_layer_scale = (unscaled * p.w2).sum(1)
        if p.b2 is not None:
            grad_layer_scale = grad_layer_scale + sums.totals["unscaled bias"] * p.b2
        gradients["layer_scale"] = grad_layer_scale.to(p.layer_scale.dtype)
        if needs.w2:
            gradients["w2"] = (unscaled * p.layer_scale[:, None]).to(p.w2.dtype)
    return [gradients.get(name) for name in Needs._fields]


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


def _differentiable(
    grad: Tensor, x: Tensor, p: Parameters, o: Options, dtypes: _Dtypes, needs: Needs
) -> list[Tensor | None]:
    """The gradients as functions of what they depend on: by the reference, which saves everything."""
    # Views, so that one tensor given twice is two inputs.
    x, *parameters = (None if t is None else t.view_as(t) for t in (x, *p))
    p = Parameters(*parameters)
    with _autocast(grad.device, dtypes.autocast):
        out = reference.ln_mlp(x, **p._asdict(), **o._asdict())
    wanted = [t for t, needed in zip((x, *p[:7]), needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(gradients) if needed else None for needed in needs]


def _normalize(tokens: Tensor, p: Parameters, o: Options, dtypes: _Dtypes) -> tuple[Tensor, Tensor, Tensor]:
    """LN(s·x), and each row's mean and 1/σ."""
    y = reference.scale_residual(tokens, o.residual_scale).to(dtypes.norm)
    weight, bias = (None if t is None else t.to(dtypes.norm) for t in (p.ln_weight, p.ln_bias))
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
