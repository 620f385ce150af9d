"""`torch.ops.lambda_kernels.ln_mlp` and its backward: schemas, shapes without data, autograd, FLOP counts.

Importing this registers them and does not import triton; the kernels are imported at the first call. Inside
`torch.compile` the two operators are opaque; what is exported does without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .arguments import SAVE, SAVE_NOTHING, Needs, Options, Parameters, Saved, flatten_tokens, make_contiguous

# A fragment, since the compiled extension registers operators under the same name.
_library = torch.library.Library("lambda_kernels", "FRAGMENT")

_PARAMETERS = (
    "Tensor? ln_weight, Tensor? ln_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? layer_scale, "
    "Tensor? branch_scale, float eps, float residual_scale, str approximate"
)


# `save` says what the backward gets: nothing, or by `recompute` "all" (row statistics), "act" (and p, what GELU is applied
# to), "none" (and GELU(p)). What is not saved comes back empty.
_library.define(
    f"ln_mlp(Tensor x, {_PARAMETERS}, str save) -> (Tensor out, Tensor mean, Tensor rstd, Tensor pre, Tensor act)"
)

# Gradients of x, ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, empty where `needs` says so.
_library.define(
    f"ln_mlp_backward(Tensor grad, Tensor x, {_PARAMETERS}, Tensor mean, Tensor rstd, Tensor? pre, Tensor? act, "
    "bool[8] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

ln_mlp = torch.ops.lambda_kernels.ln_mlp


def _split(flat: Sequence[Any]) -> tuple[Parameters, Options, Sequence[Any]]:
    """The records that `_PARAMETERS` lists, and the arguments after them."""
    return Parameters(*flat[:8]), Options(*flat[8:11]), flat[11:]


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from .fused import stages

    parameters, options, (save,) = _split(rest)
    out, saved = stages.forward(flatten_tokens(x), make_contiguous(parameters), options, save)
    return out, *(x.new_empty(0) if t is None else t for t in saved)


def _backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from .fused import stages

    parameters, options, (*saved, needs) = _split(rest)
    kept = Saved(*(t if t is None else t.contiguous() for t in saved))
    p = make_contiguous(parameters)
    gradients = stages.backward(grad.contiguous(), flatten_tokens(x), p, options, kept, Needs(*needs))
    return tuple(grad.new_empty(0) if g is None else g for g in gradients)


# On the CPU the kernels run in Triton's interpreter; dispatch lets nothing else through.
for _device in ("CUDA", "CPU"):
    _library.impl("ln_mlp", _forward, _device)
    _library.impl("ln_mlp_backward", _backward, _device)


@torch.library.register_fake("lambda_kernels::ln_mlp", lib=_library)
def _forward_shapes(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    p, _, (save,) = _split(rest)
    tokens, hidden = x.shape[0], p.w1.shape[0]
    dtype = torch.promote_types(x.dtype, p.w1.dtype)
    if p.layer_scale is not None:
        dtype = torch.promote_types(dtype, p.layer_scale.dtype)

    def saved(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device) if name in SAVE[save] else x.new_empty(0)

    return (
        torch.empty(x.shape, dtype=dtype, device=x.device),
        saved("stats", tokens, dtype=torch.float32),
        saved("stats", tokens, dtype=torch.float32),
        saved("pre", tokens, hidden, dtype=p.w1.dtype),
        saved("act", tokens, hidden, dtype=p.w1.dtype),
    )


@torch.library.register_fake("lambda_kernels::ln_mlp_backward", lib=_library)
def _backward_shapes(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else grad.new_empty(0)
        for t, needed in zip((x, *rest[:7]), rest[-1], strict=True)
    )


def refuse_tangents(grad: Tensor) -> None:
    """Raise where a gradient has a forward-mode tangent, which would be lost without a word."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(grad).tangent is not None:
        raise NotImplementedError(
            "the kernels of ln_mlp have no forward-mode derivative of their gradients; use backend='torch' for that"
        )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, eps, residual_scale, approximate, save = inputs
    _, mean, rstd, pre, act = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, pre, act)
    ctx.options = (eps, residual_scale, approximate)
    ctx.save = save
    ctx.save_for_backward(
        *tensors, mean, rstd, *([pre] if "pre" in SAVE[save] else []), *([act] if "act" in SAVE[save] else [])
    )


def _differentiate(ctx: Any, grad: Tensor | None, *unused: None) -> tuple:
    needs = list(ctx.needs_input_grad[:8])
    if grad is None or not any(needs):
        return (None,) * 13
    refuse_tangents(grad)
    if ctx.save == SAVE_NOTHING:
        raise RuntimeError(
            f"ln_mlp was called with save={SAVE_NOTHING!r}, so it has no gradient; lambda_kernels.ln_mlp chooses `save` itself"
        )
    saved = ctx.saved_tensors  # once: under activation checkpointing each access computes them again
    tensors, (mean, rstd, *rest) = saved[:9], saved[9:]
    pre, act = (*rest, None, None)[:2]
    gradients = torch.ops.lambda_kernels.ln_mlp_backward(grad, *tensors, *ctx.options, mean, rstd, pre, act, needs)
    return (*(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 5)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("the fused ln_mlp has no second derivative: use backend='torch' for that")


torch.library.register_autograd("lambda_kernels::ln_mlp", _differentiate, setup_context=_setup_context, lib=_library)

torch.library.register_autograd("lambda_kernels::ln_mlp_backward", _no_second_derivative, lib=_library)


@register_flop_formula(torch.ops.lambda_kernels.ln_mlp)
def _forward_flops(x_shape, ln_weight, ln_bias, w1_shape, *args: Any, **kwargs: Any) -> int:
    """Both products."""
    return 4 * x_shape[0] * w1_shape[0] * w1_shape[1]


@register_flop_formula(torch.ops.lambda_kernels.ln_mlp_backward)
def _backward_flops(grad_shape, x_shape, ln_weight, ln_bias, w1_shape, *args: Any, **kwargs: Any) -> int:
    """The products of the gradients that are wanted, and the one that is computed again where p was not saved."""
    product = 2 * x_shape[0] * w1_shape[0] * w1_shape[1]
    *_, pre, _, wanted = args
    needs = Needs(*wanted)
    again = pre is None and (needs.through_gelu or needs.act)
    return product * (needs.through_gelu + needs.through_norm + needs.w1 + needs.act + again)
