"""Tensors, launch and float64 results of a case. Needs Triton without its interpreter, as `ptx_launches`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from ptx_cases import TYPES, Case
from torch import Tensor

from lambda_kernels.ops.ln_mlp import reference
from lambda_kernels.ops.ln_mlp.arguments import Options, Parameters, Saved
from lambda_kernels.ops.ln_mlp.fused import launch

# Relative error in the 2-norm of a result that is stored in a dtype: twice what rounding once to nearest gives (a relative
# error is spread evenly up to half a unit, 2^-9 for bfloat16), since GELU's approximation and rounded operands add to it.
ROUNDED = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4, torch.float32: 2e-6}
# … of a float32 result of 16-bit operands or of TF32 products, and of what was rounded within the kernel.
WITHIN = {"bf16": 1.2e-2, "fp16": 1.5e-3, "fp32": 2e-6, "tf32": 2e-3}


@dataclass
class Problem:
    """A launch, what it writes, and what that is compared with."""

    launch: launch.Launch
    outputs: list[Tensor] = field(default_factory=list)
    compared: list[tuple[str, Tensor, Tensor, float]] = field(default_factory=list)  # name, got, float64, tolerance
    partial: list[tuple[str, Tensor, Tensor, float]] = field(
        default_factory=list
    )  # likewise of sums over the first axis

    def poison(self) -> None:
        """So that what is not written shows."""
        for t in self.outputs:
            t.fill_(math.nan)

    def errors(self) -> dict[str, float]:
        """Relative errors over their tolerances: above 1, or NaN, is wrong."""
        got = [(name, g.double(), true, most) for name, g, true, most in self.compared]
        got += [(name, g.double().sum(0), true, most) for name, g, true, most in self.partial]
        return {name: float((g - true).norm() / true.norm().clamp(min=1e-30)) / most for name, g, true, most in got}


@dataclass
class _Given:
    """The tensors of a case, with values that none can be left out of unseen."""

    case: Case

    def __post_init__(self) -> None:
        case = self.case
        self.dtype = TYPES[case.dtype]
        self.wide = torch.float32 if case.variant == "mixed" else self.dtype
        self.generator = torch.Generator().manual_seed(1)
        self.bare = case.variant == "bare"
        M, C, H = case.tokens, case.channels, case.hidden
        optional = None if self.bare else self.dtype
        self.x = self._tokens(M, C)
        self.p = Parameters(
            self._draw(C, scale=0.3, offset=1.0, dtype=optional),
            self._draw(C, scale=0.3, dtype=optional),
            self._draw(H, C, scale=C**-0.5),
            self._draw(H, scale=0.5, dtype=optional),
            self._draw(C, H, scale=H**-0.5),
            self._draw(C, scale=0.5, dtype=optional),
            self._draw(C, scale=0.3, offset=0.8, dtype=optional),
            self._draw(M, scale=0.3, offset=1.0, dtype=None if self.bare else torch.float32),
        )
        self.o = Options(1e-5, 1.0 if self.bare else 2.0, "tanh" if case.variant == "tanh" else "none")
        self.within = WITHIN["tf32" if case.variant == "tf32" else case.dtype]

    def _draw(
        self, *size: int, scale: float = 1.0, offset: float = 0.0, dtype: torch.dtype | str | None = ""
    ) -> Tensor:
        value = offset + scale * torch.randn(*size, generator=self.generator, dtype=torch.float64)
        return None if dtype is None else value.to(self.dtype if dtype == "" else dtype)

    def _tokens(self, M: int, C: int) -> Tensor:
        """Rows of a wider matrix where pointers are used with everything: what lies between rows must not be touched."""
        if self.case.tma or self.case.variant:
            return self._draw(M, C, offset=0.5, dtype=self.wide)
        return self._draw(M, C + (16 if C % 8 == 0 else 3), offset=0.5, dtype=self.wide)[:, :C]

    def draw(self, *size: int) -> Tensor:
        return self._draw(*size)

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(size, math.nan, dtype=dtype or self.dtype)

    @property
    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and 1/σ of the scaled tokens, and LN without weight and bias, float64."""
        y = self.o.residual_scale * self.x.double()
        mean = y.mean(1)
        rstd = (y.var(1, unbiased=False) + self.o.eps).rsqrt()
        return mean, rstd, (y - mean[:, None]) * rstd[:, None]

    def gelu(self, p: Tensor) -> Tensor:
        return F.gelu(p, approximate=self.o.approximate)

    def slope(self, p: Tensor) -> Tensor:
        p = p.detach().requires_grad_()
        (found,) = torch.autograd.grad(self.gelu(p).sum(), p)
        return found

    def rounded(self, dtype: torch.dtype | None = None) -> float:
        """The tolerance of what is stored in a dtype, by default the compute dtype."""
        stored = ROUNDED[dtype or self.dtype]
        return max(stored, self.within) if self.case.variant == "tf32" else stored


@contextlib.contextmanager
def _precision(case: Case) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.variant == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def problem(case: Case) -> Problem:
    """Build a case."""
    with _precision(case):
        return _BUILDERS[case.kernel](case, _Given(case))


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _one_pass(case: Case, g: _Given) -> Problem:
    p, o = g.p, g.o
    out = g.empty(*g.x.shape, dtype=torch.promote_types(g.wide, g.dtype))
    mean, rstd = (None, None) if g.bare else (g.empty(case.tokens, dtype=torch.float32) for _ in range(2))
    made = launch.one_pass(g.x, p, o, out, mean, rstd, config=case.config, tma=case.tma)
    d = [_double(t) for t in p]
    scales = {"layer_scale": d[6], "branch_scale": d[7]}
    exact = reference.ln_mlp(g.x.double(), *d[:6], **o._asdict(), **scales)
    skip = o.residual_scale * g.x.double()
    # What the kernel adds to the tokens, for itself: the tokens are large and exact.
    share = float((exact - skip).norm() / exact.norm())
    result = Problem(made, [out])
    result.compared.append(("out", out, exact, max(g.rounded(out.dtype), g.within * share)))
    if mean is not None:
        true_mean, true_rstd, _ = g.centred
        result.outputs += [mean, rstd]
        result.compared += [("mean", mean, true_mean, 2e-6), ("rstd", rstd, true_rstd, 2e-6)]
    return result


def _fc1(case: Case, g: _Given) -> Problem:
    M, H = case.tokens, case.hidden
    act, pre = g.empty(M, H), None if g.bare else g.empty(M, H)
    mean, rstd, normed = g.centred
    p = g.p
    if case.variant == "normalized" or case.dtype != "bf16" or g.bare:
        tokens = normed.to(g.dtype)
        made = launch.fc1(tokens, p, g.o, act, pre, config=case.config, tma=case.tma)
        exact = F.linear(tokens.double(), p.w1.double(), _double(p.b1))
    else:  # on raw tokens, by what `row_statistics` makes of the weights
        folded = p.w1.double() * p.ln_weight.double()
        w1 = folded.to(g.dtype)
        b1 = (p.b1.double() + p.w1.double() @ p.ln_bias.double()).float()
        statistics = (mean.float(), rstd.float(), w1.double().sum(1).float())
        weights = p._replace(w1=w1, b1=b1)
        made = launch.fc1(g.x, weights, g.o, act, pre, statistics, config=case.config, tma=case.tma)
        exact = F.linear(normed, w1.double(), b1.double())
    result = Problem(made, [act])
    result.compared.append(("act", act, g.gelu(exact), g.rounded()))
    if pre is not None:
        result.outputs.append(pre)
        result.compared.append(("pre", pre, exact, g.rounded()))
    return result


def _fc2(case: Case, g: _Given) -> Problem:
    p, o = g.p, g.o
    act = g.gelu(torch.randn(case.tokens, case.hidden, generator=g.generator)).to(g.dtype)
    out = g.empty(*g.x.shape, dtype=torch.promote_types(g.wide, g.dtype))
    made = launch.fc2(act, g.x, p, o, out, config=case.config, tma=case.tma)
    d = [_double(t) for t in p]
    exact = reference.add_branch(o.residual_scale * g.x.double(), act.double(), d[4], d[5], d[6], d[7])
    return Problem(made, [out], [("out", out, exact, g.rounded(out.dtype))])


def _gradient(case: Case, g: _Given) -> Problem:
    M, C, H = case.tokens, case.channels, case.hidden
    saved = case.kernel == "saved_gradient"
    grad, grad_pre, act = g.draw(M, C), g.empty(M, H), None if g.bare else g.empty(M, H)
    sums = None if g.bare else g.empty(launch.ceil_div(M, case.config.bm), H, dtype=torch.float32)
    normed = g.draw(M, C)
    exact = F.linear(normed.double(), g.p.w1.double(), _double(g.p.b1))
    pre = exact.to(g.dtype) if saved else None
    if saved:
        exact = pre.double()
    made = launch.hidden_gradient(
        None if saved else normed, g.p, g.o, pre, grad, grad_pre, act, sums, config=case.config, tma=case.tma
    )
    true = (grad.double() @ g.p.w2.double()) * g.slope(exact)
    result = Problem(made, [grad_pre], [("grad_pre", grad_pre, true, g.rounded())])
    return _with_sums(g, result, act, sums, exact, true)


def _with_sums(
    g: _Given, result: Problem, act: Tensor | None, sums: Tensor | None, pre: Tensor, grad_pre: Tensor
) -> Problem:
    if act is not None:
        result.outputs.append(act)
        result.compared.append(("act", act, g.gelu(pre), g.rounded()))
    if sums is not None:
        result.outputs.append(sums)
        result.partial.append(("sums", sums, grad_pre.sum(0), max(g.within / 4, 4e-6)))
    return result


def _elementwise(case: Case, g: _Given) -> Problem:
    M, H = case.tokens, case.hidden
    pre, grad_act, grad_pre = g.draw(M, H), g.draw(M, H), g.empty(M, H)
    act = None if g.bare else g.empty(M, H)
    sums = None if g.bare else g.empty(launch.ceil_div(M, case.config.bm), H, dtype=torch.float32)
    made = launch.elementwise(pre, g.o, grad_act, grad_pre, act, sums, config=case.config)
    true = grad_act.double() * g.slope(pre.double())
    result = Problem(made, [grad_pre], [("grad_pre", grad_pre, true, g.rounded())])
    return _with_sums(g, result, act, sums, pre.double(), true)


def _layer_norm(case: Case, g: _Given) -> Problem:
    given = case.kernel == "normalized"
    true_mean, true_rstd, exact = g.centred
    out = g.empty(*g.x.shape)
    mean, rstd = (
        (true_mean.float(), true_rstd.float())
        if given
        else (g.empty(case.tokens, dtype=torch.float32), g.empty(case.tokens, dtype=torch.float32))
    )
    made = launch.layer_norm(g.x, g.p, g.o, out, mean, rstd, given=given)
    if not g.bare:
        exact = exact * g.p.ln_weight.double() + g.p.ln_bias.double()
    result = Problem(made, [out], [("out", out, exact, g.rounded())])
    if not given:
        result.outputs += [mean, rstd]
        result.compared += [("mean", mean, true_mean, 2e-6), ("rstd", rstd, true_rstd, 2e-6)]
    return result


def _row_statistics(case: Case, g: _Given) -> Problem:
    H, C = case.hidden, case.channels
    p = g.p
    mean, rstd = (g.empty(case.tokens, dtype=torch.float32) for _ in range(2))
    w1, w1_sum, b1 = g.empty(H, C), g.empty(H, dtype=torch.float32), g.empty(H, dtype=torch.float32)
    made = launch.row_statistics(g.x, p, g.o, mean, rstd, p._replace(w1=w1, b1=b1), w1_sum)
    true_mean, true_rstd, _ = g.centred
    folded, bias = p.w1.double(), torch.zeros(H, dtype=torch.float64)
    if not g.bare:
        folded, bias = folded * p.ln_weight.double(), p.b1.double() + folded @ p.ln_bias.double()
    # The sums have to be those of what was rounded.
    rows = folded.to(g.dtype).double().sum(1)
    return Problem(
        made,
        [mean, rstd, w1, w1_sum, b1],
        [
            ("mean", mean, true_mean, 2e-6),
            ("rstd", rstd, true_rstd, 2e-6),
            ("w1_folded", w1, folded, g.rounded()),
            ("w1_sum", w1_sum, rows, 1e-4),
            ("b1_folded", b1, bias, 2e-6),
        ],
    )


def _layer_norm_input(case: Case, g: _Given) -> Problem:
    M, C = case.tokens, case.channels
    p, s = g.p, g.o.residual_scale
    mean, rstd, normed = g.centred
    grad_ln, grad = g.draw(M, C), g.draw(M, C).to(g.wide)
    grad_x = g.empty(M, C, dtype=g.wide)
    programs = 3
    sums = [None if g.bare else g.empty(programs, C, dtype=torch.float32) for _ in range(3)]
    saved = Saved(mean.float(), rstd.float())
    made = launch.layer_norm_input(grad_ln, g.x, grad, p, g.o, saved, grad_x, sums, programs=programs)
    d, residual = grad_ln.double(), grad.double()
    weighted = d if g.bare else d * p.ln_weight.double()
    along = (weighted * normed).mean(1, keepdim=True)
    true = s * (residual + rstd[:, None] * (weighted - weighted.mean(1, keepdim=True) - normed * along))
    result = Problem(made, [grad_x], [("grad_x", grad_x, true, g.rounded(g.wide))])
    if not g.bare:
        branch = residual * p.branch_scale.double()[:, None]
        result.outputs += sums
        result.partial += [
            (name, t, exact.sum(0), 4e-6)
            for name, t, exact in zip(("γ", "β", "b2"), sums, (d * normed, d, branch), strict=True)
        ]
    return result


_BUILDERS = {
    "one_pass": _one_pass,
    "fc1": _fc1,
    "fc2": _fc2,
    "hidden_gradient": _gradient,
    "saved_gradient": _gradient,
    "elementwise": _elementwise,
    "layer_norm": _layer_norm,
    "normalized": _layer_norm,
    "row_statistics": _row_statistics,
    "layer_norm_input": _layer_norm_input,
}
