"""`ln_mlp` by the kernels, called and differentiated without PyTorch's dispatcher, by the stages of the registered operator.

An operator of `torch.library` costs more host time than the launches of these kernels. It is used where PyTorch has to see an
operator: under compilers and modes, and for gradients of gradients, which it refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import SAVE_NOTHING, Needs, Parameters, Saved, flatten_tokens, make_contiguous
from ..plans import Plan
from ..registration import refuse_tangents
from . import launch, stages
from .steps import Steps

# Of calls with one plan: which gradients are wanted, where in memory tensors begin.
_MOST_KINDS = 64
_PLAIN = (Tensor, torch.nn.Parameter)


def ln_mlp(x: Tensor, p: Parameters, plan: Plan) -> Tensor:
    """The kernels' result for a call whose arguments fit `plan`: x [..., C], parameters as the public function gets them."""
    if plan.save == SAVE_NOTHING:
        tokens, settled = _tokens(x, plan), _settled(x, p, plan)
        out, _ = stages.forward(tokens, settled, plan.options, SAVE_NOTHING, _steps(plan, settled, "forward"))
        return _shaped(out, x)
    return _LnMlp.apply(plan, x, *p)


class _LnMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, *parameters: Tensor | None) -> Tensor:
        p = Parameters(*parameters)
        tokens, settled = _tokens(x, plan), _settled(x, p, plan)
        out, saved = stages.forward(tokens, settled, plan.options, plan.save, _steps(plan, settled, "forward"))
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        # The inputs as they are, which costs nothing, and what was made of them.
        made = () if settled is p else (None if a is b else a for a, b in zip(settled, p, strict=True))
        ctx.save_for_backward(x, *p, *saved, *made)
        return _shaped(out, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = Needs(*ctx.needs_input_grad[1:9])
        if grad is None or not any(needs):
            return (None,) * 10
        refuse_tangents(grad)
        x, *tensors = ctx.saved_tensors  # once: under activation checkpointing each access computes them again
        p, saved, made = Parameters(*tensors[:8]), Saved(*tensors[8:12]), tensors[12:]
        settled = Parameters(*(a if b is None else b for a, b in zip(p, made, strict=True))) if made else p
        if _needs_dispatcher(grad, *tensors, x):
            gradients = _by_operator(grad, x, p, settled, ctx.plan, saved, needs)
        else:
            gradients = _by_stages(grad, x, settled, ctx.plan, saved, needs)
            gradients[0] = None if gradients[0] is None else gradients[0].view(x.shape)
        for which, weight in ((3, p.w1), (5, p.w2)):  # wider than their products under autocast
            if gradients[which] is not None and weight.dtype != ctx.plan.compute:
                gradients[which] = gradients[which].to(weight.dtype)
        return None, *gradients, None


def _tokens(x: Tensor, plan: Plan) -> Tensor:
    return x.view(-1, x.shape[-1]) if plan.is_usual else flatten_tokens(x)


def _shaped(out: Tensor, x: Tensor) -> Tensor:
    """out [M, C] in the shape of x, and no view: what a function of autograd returns as a view cannot be changed in place."""
    return out if x.dim() == 2 else out.contiguous().resize_(x.shape)


def _settled(x: Tensor, p: Parameters, plan: Plan) -> Parameters:
    """The parameters as the stages get them: contiguous, matrices of the compute dtype, a factor for each token."""
    if plan.is_usual:
        return p
    branch_scale = p.branch_scale
    if branch_scale is not None:
        branch_scale = branch_scale.expand(x.shape[:-1]).reshape(-1).to(torch.float32)
    # As autocast would, only the operands of the products are cast; tokens and residual stay what they are.
    w1, w2 = p.w1.to(plan.compute), p.w2.to(plan.compute)
    return make_contiguous(p._replace(w1=w1, w2=w2, branch_scale=branch_scale))


def _steps(plan: Plan, p: Parameters, *kind: object) -> Steps:
    """The steps of calls of this kind, as far as they were taken before under the same settings."""
    # What the key of the plan cannot know: of the settings, TF32's says how float32 products are computed.
    key = (*kind, launch.float32_precision()) if p.w1.dtype == torch.float32 else kind
    steps = plan.steps.get(key)
    if steps is None or not steps.is_current():
        if len(plan.steps) >= _MOST_KINDS:
            plan.steps.clear()
        plan.steps[key] = steps = Steps()
    return steps


def _needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether the backward is being recorded, compiled or watched, or not all of `tensors` are plain ones in memory.

    Hooks may return anything for what was saved.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    try:
        return any(type(t) not in _PLAIN or t.is_neg() or t.data_ptr() == 0 for t in tensors if t is not None)
    except RuntimeError:  # a batch of gradients has no memory of its own
        return True


def _by_stages(grad: Tensor, x: Tensor, p: Parameters, plan: Plan, saved: Saved, needs: Needs) -> list[Tensor | None]:
    grad = grad.reshape(-1, grad.shape[-1]).contiguous()
    # What hooks make of saved tensors may be anywhere in memory, and in any order of it.
    x, p, saved = flatten_tokens(x), make_contiguous(p), Saved(*(t if t is None else t.contiguous() for t in saved))
    tensors = (grad, x, *p, *saved)
    kinds = (None if t is None else (t.dtype, t.data_ptr() & 15) for t in tensors)
    steps = _steps(plan, p, needs, x.stride(), *kinds)
    return stages.backward(grad, x, p, plan.options, saved, needs, steps)


def _by_operator(
    grad: Tensor, x: Tensor, p: Parameters, settled: Parameters, plan: Plan, saved: Saved, needs: Needs
) -> list[Tensor | None]:
    """The gradients by the registered operator, as functions of x and of the parameters, so that it can refuse theirs."""
    w1, w2 = p.w1.to(plan.compute), p.w2.to(plan.compute)
    inputs = (
        None if t is None else t.contiguous() for t in p._replace(w1=w1, w2=w2, branch_scale=settled.branch_scale)
    )
    gradients = torch.ops.lambda_kernels.ln_mlp_backward(
        grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), *inputs, *plan.options, *saved, list(needs)
    )
    found = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    found[0] = None if found[0] is None else found[0].reshape(x.shape)
    return found
