"""The MLP half of a pre-norm transformer block as one operator: LayerNorm, both linears, GELU, residual."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from . import dispatch, onednn, plans, reference, registration
from . import recompute as recomputed
from .arguments import SAVE_NOTHING, Options, Parameters, flatten_tokens, make_contiguous

# At this width and below, products are cheaper than the memory traffic of saved activations.
RECOMPUTE_ALL_BELOW = 256

APPROXIMATIONS = ("auto", "none", "tanh")
RECOMPUTE = ("auto", "none", "act", "all")
_PLAIN = (Tensor, torch.nn.Parameter)


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
    residual_scale: float = 1.0,
    layer_scale: Tensor | None = None,
    branch_scale: Tensor | None = None,
    approximate: str = "auto",
    recompute: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Compute `s·x + k·ls·(GELU(LN(s·x) @ w1.T + b1) @ w2.T + b2)`: s = residual_scale, ls = layer_scale, k = branch_scale.

    This is the whole of an attention-free block: with s = 1 the attention was skipped, with s = 2 it was diluted away,
    x ← (2 − λ)·x + λ·attn at λ = 0 (arXiv 2404.05657, eq. 6).

    Args:
        x: Tokens `[..., C]`, any number of leading dimensions, contiguous or not; empty is allowed.
        ln_weight: LayerNorm scale `[C]`, or None.
        ln_bias: LayerNorm shift `[C]`, or None.
        w1: First linear `[H, C]`, as `nn.Linear(C, H).weight`.
        b1: Its bias `[H]`, or None.
        w2: Second linear `[C, H]`, as `nn.Linear(H, C).weight`.
        b2: Its bias `[C]`, or None.
        eps: LayerNorm's epsilon, added to the variance of s·x.
        residual_scale: s, finite. Also multiplies what LayerNorm sees.
        layer_scale: LayerScale's gamma `[C]`, or None for 1.
        branch_scale: k, a factor of each token's branch, broadcastable to `x.shape[:-1]`, or None for 1: `[B, 1]` for the
            stochastic depth of samples. It gets no gradient.
        approximate: "none" or "auto" for the exact erf GELU, "tanh" for the tanh form. The fused kernels compute the exact
            one in float32, and in bfloat16 and float16 a form that differs from it by at most 3.2e-5 before rounding.
        recompute: What the backward computes again instead of saving it: "act" (LayerNorm and GELU), "all" (the first product
            too), or "none". "auto" decides by width in the kernels, and is "none" on the PyTorch path, whose results are then
            timm's to the last bit. A `torch.func` transform or forward-mode differentiation makes it "none" as well.
        backend: "auto", "triton", "onednn" or "torch". "auto" uses the kernels on a CUDA device, but leaves tokens of over 256
            values to the compiler inside a model that is being compiled. "triton" and "onednn" raise where they cannot run.
            "onednn" (CPU, float32 and bfloat16) is for inference: where autograd records the call, under autocast, while
            compiling or exporting, PyTorch's operators run; `dispatch.choose` gives the reason. "auto" never uses it, since it
            rounds differently from timm. It holds a second copy of weights that are parameters, in its own order, while they
            live. It notices changes of a weight, except of single elements written past PyTorch, through `.data` or NumPy.

    Returns:
        A tensor shaped like `x`; dtype as PyTorch's own type promotion and autocast give.

    Raises:
        TypeError: An argument is not a tensor, has an unsupported dtype, or dtypes differ outside autocast.
        ValueError: A shape, device, option or number does not fit; the message names it.
        BackendUnavailableError: `backend="triton"` or `"onednn"` cannot run here.
    """
    p = Parameters(ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, branch_scale)
    # What is being compiled is traced through the way without plans.
    key = plan = None
    if not torch.compiler.is_compiling():
        key = plans.make_key(x, p, eps, residual_scale, approximate, recompute, backend)
        plan = None if key is None else plans.find(key)
    if plan is None:
        plan = _settle(x, p, eps, residual_scale, approximate, recompute, backend)
        if key is not None:
            plans.remember(key, plan)
    if plan.backend == "torch":
        if plan.level != "none":
            return recomputed.ln_mlp(x, p, plan.options, recompute=plan.level, compute=plan.compute)
        return reference.ln_mlp(x, *p[:6], **plan.options._asdict(), layer_scale=layer_scale, branch_scale=branch_scale)
    if plan.backend == "onednn":
        return onednn.ln_mlp(x, p, plan.options)
    if key is None:
        return _by_operator(x, p, plan)
    return _kernels()(x, p, plan)


@functools.lru_cache
def _kernels() -> Callable[[Tensor, Parameters, plans.Plan], Tensor]:
    from .fused import autograd  # triton is imported with the first call of a kernel

    return autograd.ln_mlp


def _settle(
    x: Tensor, p: Parameters, eps: float, residual_scale: float, approximate: str, recompute: str, backend: str
) -> plans.Plan:
    """Check the arguments of a call, and choose how it is computed."""
    if p.branch_scale is not None:
        _check_branch_scale(p.branch_scale, x)
    if not _fits(x, p):
        _check_tensors(x, p)
    checks.check_choice("approximate", approximate, APPROXIMATIONS)
    checks.check_choice("recompute", recompute, RECOMPUTE)
    for name, number in (("eps", eps), ("residual_scale", residual_scale)):
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number; got {type(number).__name__}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite; got {eps}")
    if not abs(residual_scale) < float("inf"):
        raise ValueError(f"residual_scale must be finite; got {residual_scale}")

    hidden, channels = p.w1.shape
    compute = compute_dtype(x, p.w1)
    o = Options(eps, residual_scale, "tanh" if approximate == "tanh" else "none")
    is_recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *p))
    is_subclass = backend == "onednn" and any(type(t) not in _PLAIN for t in (x, *p) if t is not None)
    chosen = dispatch.choose(
        x.device, compute, backend, channels=channels, recording=is_recorded, subclass=is_subclass
    ).backend
    # Of no tokens nothing is computed: the reference gives shape, dtype and zero gradients.
    if x.numel() == 0 or hidden == 0:
        chosen, recompute = "torch", "none"
    level = resolve_recompute(recompute, channels, chosen)
    if chosen == "torch" and (not is_recorded or recomputed.obstacles()):
        level = "none"
    is_usual = (
        p.branch_scale is None
        and p.w1.dtype == p.w2.dtype == compute
        and all(t is None or t.is_contiguous() for t in (x, *p))
    )
    return plans.Plan(chosen, o, compute, level, level if is_recorded else SAVE_NOTHING, is_usual)


def _by_operator(x: Tensor, p: Parameters, plan: plans.Plan) -> Tensor:
    """By the kernels, as an operator of PyTorch, which compilers and modes see."""
    branch_scale = p.branch_scale
    if branch_scale is not None:
        branch_scale = branch_scale.expand(x.shape[:-1]).reshape(-1).to(torch.float32)
    # As autocast would, only the operands of the products are cast; tokens and residual stay what they are.
    p = p._replace(w1=p.w1.to(plan.compute), w2=p.w2.to(plan.compute), branch_scale=branch_scale)
    out, *_ = registration.ln_mlp(flatten_tokens(x), *make_contiguous(p), *plan.options, plan.save)
    return out.reshape(x.shape)


def compute_dtype(x: Tensor, w1: Tensor) -> torch.dtype:
    """The dtype of both products: autocast's where it is on, else that of the weights; autocast spares float64."""
    device = x.device.type
    if torch.float64 in (x.dtype, w1.dtype):
        return torch.float64
    return torch.get_autocast_dtype(device) if checks.autocast_enabled(device) else w1.dtype


def resolve_recompute(recompute: str, channels: int, backend: str = "triton") -> str:
    """What "auto" means: nothing on the PyTorch path; in the kernels all where the width makes that cheap, "act" above."""
    if recompute != "auto":
        return recompute
    if backend != "triton":
        return "none"
    return "all" if channels <= RECOMPUTE_ALL_BELOW else "act"


def _fits(x: Tensor, p: Parameters) -> bool:
    """Whether the arguments pass a fast check, made at every call; where not, `_check_tensors` decides and explains."""
    ln_weight, ln_bias, w1, b1, w2, b2, layer_scale, _ = p
    try:
        dtype, device, (hidden, channels) = x.dtype, x.device, w1.shape
        if (
            x.layout != torch.strided
            or dtype not in checks.FLOATING
            or x.shape[-1] != channels
            or w2.shape != (channels, hidden)
        ):
            return False
        vectors = ((ln_weight, channels), (ln_bias, channels), (b1, hidden), (b2, channels), (layer_scale, channels))
        given = [w1, w2]
        for vector, size in vectors:
            if vector is not None:
                given.append(vector)
                if vector.shape != (size,):
                    return False
        return all(
            isinstance(t, Tensor) and t.dtype == dtype and t.device == device and t.layout == torch.strided
            for t in given
        )
    except (AttributeError, IndexError, TypeError, ValueError):  # not a tensor, or of too few dimensions
        return False


def _check_branch_scale(branch_scale: Tensor, x: Tensor) -> None:
    checks.check_tensor("branch_scale", branch_scale)
    checks.check_tensor("x", x)
    checks.check_same_device({"x": x, "branch_scale": branch_scale})
    if branch_scale.requires_grad:
        raise ValueError("branch_scale gets no gradient, but requires one; pass branch_scale.detach()")
    own, leading = branch_scale.shape, x.shape[:-1]
    if len(own) > len(leading) or any(a not in (1, b) for a, b in zip(reversed(own), reversed(leading), strict=False)):
        raise ValueError(f"branch_scale must be broadcastable to x.shape[:-1] = {list(leading)}; got shape {list(own)}")


def _check_tensors(x: Tensor, p: Parameters) -> None:
    w1 = p.w1
    tensors = {"x": x, "w1": w1, "w2": p.w2}
    optional = {name: getattr(p, name) for name in ("ln_weight", "ln_bias", "b1", "b2", "layer_scale")}
    tensors.update({name: value for name, value in optional.items() if value is not None})
    for name, value in tensors.items():
        checks.check_tensor(name, value)
    if x.dim() < 1 or w1.dim() != 2:
        raise ValueError(f"x must be [..., C] and w1 [H, C]; got x {list(x.shape)} and w1 {list(w1.shape)}")
    channels, hidden = x.shape[-1], w1.shape[0]
    shapes = {
        "w1": ((hidden, channels), "[H, C]"),
        "w2": ((channels, hidden), "[C, H]"),
        "b1": ((hidden,), "[H]"),
        **{name: ((channels,), "[C]") for name in ("ln_weight", "ln_bias", "b2", "layer_scale")},
    }
    for name, (shape, letters) in shapes.items():
        if name in tensors:
            checks.check_shape(name, tensors[name], shape, letters)
    checks.check_same_device(tensors)
    checks.check_same_dtype(tensors)
