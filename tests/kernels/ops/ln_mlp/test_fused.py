"""The fused MLP: forward and every gradient against the float64 twin, over widths, dtypes, paths and what is saved.

Runs on a GPU where there is one, else in Triton's interpreter. `errors` asserts that kernels ran and not the twin; tests of
one path assert that it was that path.
"""

from __future__ import annotations

import pytest
import torch
from mlp_cases import DEVICE, NAMES, assert_close, errors, in_float64, problem, relative_error

from lambda_kernels import ln_mlp
from lambda_kernels.ops.ln_mlp import reference, tracing
from lambda_kernels.ops.ln_mlp.fused import launch, tuning

pytestmark = pytest.mark.usefixtures("poisoned_empty")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def kernels(ran: list[str]) -> list[str]:
    """Names of what ran, without tiles."""
    return [" ".join(entry.split()[:2]) if entry.startswith("library") else entry.split()[0] for entry in ran]


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("channels", [64, 192, 256])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_one_pass(dtype, channels, scale):
    args = problem(70, channels, 2 * channels, dtype, layer_scale=scale == 2.0)
    with tuning.forced(forward="one_pass"), tracing.recorded() as ran:
        found = errors(args, residual_scale=scale, recompute="all")
    assert kernels(ran)[:3] == ["one_pass", "layer_norm", "hidden_gradient"]
    assert "library fc1" not in ran
    assert_close(found, dtype)


@pytest.mark.parametrize("channels", [16, 48, 100, 176, 256])
def test_one_pass_chunks(channels):
    """One, two and three column chunks, with and without columns beyond the width, and a ragged hidden width."""
    with tuning.forced(forward="one_pass"), tracing.recorded() as ran:
        found = errors(problem(33, channels, 88, F16), residual_scale=2.0, recompute="all")
    assert kernels(ran)[0] == "one_pass"
    assert_close(found, F16)


@pytest.mark.parametrize("recompute", ["none", "act", "all"])
@pytest.mark.parametrize(
    ("dtype", "method"), [(F32, "normalized"), (F16, "normalized"), (BF16, "corrected"), (BF16, "normalized")]
)
def test_staged(dtype, method, recompute):
    args = problem((2, 35), 192, 200, dtype)
    with tuning.forced(forward="staged", fc1=method, fc2="fused"), tracing.recorded() as ran:
        found = errors(args, residual_scale=2.0, recompute=recompute)
    first = "row_statistics" if method == "corrected" else "layer_norm"
    assert kernels(ran)[:3] == [first, "fc1", "fc2"]
    assert kernels(ran)[3:5] == ["layer_norm", "hidden_gradient"]
    assert_close(found, dtype)


@pytest.mark.parametrize(
    ("channels", "hidden", "tokens"), [(64, 4304, 5), (384, 96, 197), (768, 192, 70), (1152, 144, 33), (1408, 64, 1)]
)
@pytest.mark.parametrize("recompute", ["act", "all"])
def test_widths(channels, hidden, tokens, recompute):
    with tuning.forced(forward="staged"), tracing.recorded() as ran:
        found = errors(problem(tokens, channels, hidden, F16), recompute=recompute)
    assert {"fc1", "fc2", "hidden_gradient", "layer_norm_input"} <= set(kernels(ran))
    assert_close(found, F16)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 129])
@pytest.mark.parametrize("forward", ["one_pass", "staged"])
def test_ragged_token_counts(tokens, forward):
    with tuning.forced(forward=forward):
        assert_close(errors(problem(tokens, 48, 80), residual_scale=2.0, recompute="all"), F32)


@pytest.mark.parametrize(("channels", "hidden"), [(17, 31), (50, 70), (100, 64), (64, 100)])
@pytest.mark.parametrize(("forward", "recompute"), [("one_pass", "all"), ("staged", "all"), ("staged", "act")])
def test_rows_that_descriptors_cannot_address(channels, hidden, forward, recompute):
    """Rows that are no multiple of 16 bytes go through pointers, in each kernel of the call."""
    made = []
    genuine = launch.Launch.run
    with pytest.MonkeyPatch.context() as patch, tuning.forced(**({"forward": forward} if recompute == "all" else {})):
        patch.setattr(launch.Launch, "run", lambda self: made.append(self) or genuine(self))
        found = errors(problem(19, channels, hidden, F16), recompute=recompute)
    assert [m.constants["TMA"] for m in made if "TMA" in m.constants] == [False] * (2 if forward == "one_pass" else 3)
    assert_close(found, F16)


@pytest.mark.parametrize(("channels", "hidden"), [(1, 1), (3, 5)])
@pytest.mark.parametrize("forward", ["one_pass", "staged"])
def test_a_few_channels(channels, hidden, forward):
    args = problem(19, channels, hidden)
    if channels == 1:  # LN of one channel is its bias: x and γ have gradients that only rounding keeps from 0
        args["ln_weight"] = args["ln_weight"].detach()
    with tuning.forced(forward=forward):
        found = errors(args, recompute="all")
    assert_close(found, F32)


@pytest.mark.parametrize("size", [1e-3, 1e-6, "spread", 0.0])
@pytest.mark.parametrize("recompute", ["all", "act"])
def test_small_layer_scale_in_float16(size, recompute):
    """LayerScale starts at 1e-5 or 1e-6: on float16 weights it would vanish, and gradients without it overflow."""
    args = problem(60, 48, 80)
    gamma = torch.logspace(-6, 0, 48) if size == "spread" else torch.full((48,), size)
    args["layer_scale"] = gamma.to(DEVICE).requires_grad_()
    twins = in_float64(args)
    # as under a loss scale: sums over tokens of dO·GELU(p) alone would pass float16's 65504
    grad = 3e4 * (1 + 0.1 * torch.randn(60, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    grad = (grad / 1e3 if size == "spread" else grad).to(DEVICE)
    with torch.autocast(DEVICE, F16):
        out = ln_mlp(**args, eps=1e-5, recompute=recompute, backend="triton")
    got = torch.autograd.grad(out, list(args.values()), grad.to(out))
    true = torch.autograd.grad(reference.ln_mlp(**twins, eps=1e-5), list(twins.values()), grad)
    for name, g, t in zip(NAMES, got, true, strict=True):
        if float(t.norm()) == 0.0:
            assert not g.any(), name
        else:
            assert relative_error(g, t) < 3e-3, name


def test_the_newer_setting_of_tf32():
    """With which PyTorch refuses to be asked by the older one."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        assert launch.Arithmetic.of(F32, "none").precision == "tf32"
        assert launch.Arithmetic.of(BF16, "none").precision == "ieee"
        assert max(errors(problem(20, 48, 80)).values()) < 2e-3
        settings.fp32_precision = "ieee"
        assert launch.Arithmetic.of(F32, "none").precision == "ieee"
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize("stage", ["fc1", "fc2", "hidden_gradient", "saved_gradient"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_library_stages(stage, dtype):
    recompute = "act" if stage == "saved_gradient" else "all"
    with tuning.forced(forward="staged", **{stage: "library"}), tracing.recorded() as ran:
        found = errors(problem(40, 96, 120, dtype), residual_scale=2.0, recompute=recompute)
    name = "hidden_gradient" if stage == "saved_gradient" else stage
    assert f"library {name}" in ran
    assert_close(found, dtype)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("forward", ["one_pass", "staged"])
def test_forms_of_gelu(approximate, dtype, forward):
    args = problem(40, 64, 96, dtype)
    args["b1"] = (4 * args["b1"]).detach().requires_grad_()  # into GELU's tails
    with tuning.forced(forward=forward):
        assert_close(errors(args, approximate=approximate, recompute="all"), dtype)


@pytest.mark.parametrize(
    "absent", [("ln_weight", "ln_bias"), ("b1",), ("b2",), ("ln_bias", "b1", "b2"), ("ln_weight",)]
)
@pytest.mark.parametrize(("forward", "recompute"), [("one_pass", "all"), ("staged", "all"), ("staged", "act")])
def test_absent_parameters(absent, forward, recompute):
    args = problem(20, 48, 80, BF16) | dict.fromkeys(absent)
    context = tuning.forced(forward=forward) if recompute == "all" else tuning.forced(fc1="corrected")
    with context:
        found = errors(args, recompute=recompute)
    assert not set(absent) & set(found)
    assert_close(found, BF16)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("forward", "recompute"), [("one_pass", "all"), ("staged", "all"), ("staged", "act"), ("staged", "none")]
)
@pytest.mark.parametrize("second", ["fused", "library"])
def test_branch_scale(dtype, forward, recompute, second):
    """Stochastic depth: samples whose branch is dropped, the others scaled up."""
    factor = torch.tensor([[0.0], [1.25], [1.25], [0.0], [1.25]], dtype=dtype, device=DEVICE)
    with tuning.forced(**{"forward": forward, "fc2": second} if recompute == "all" else {"fc2": second}):
        found = errors(problem((5, 9), 48, 80, dtype), residual_scale=2.0, recompute=recompute, branch_scale=factor)
    assert_close(found, dtype)


@pytest.mark.parametrize("wanted", [("b2",), ("layer_scale",), ("w2",), ("x",)])
def test_branch_scale_with_frozen_parameters(wanted):
    args = {name: t.requires_grad_(name in wanted) for name, t in problem((5, 9), 48, 80).items()}
    factor = torch.linspace(0, 2, 45, device=DEVICE).view(5, 9)
    assert_close(errors(args, recompute="all", branch_scale=factor), F32)


# What must run, and what must not, when only these want a gradient.
FROZEN = [
    (("x",), {"hidden_gradient", "layer_norm_input", "library grad_ln"}, {"library grad_w1", "library grad_w2"}),
    (("w1", "b1"), {"hidden_gradient", "library grad_w1"}, {"layer_norm_input", "library grad_ln", "library grad_w2"}),
    (("ln_weight", "ln_bias"), {"layer_norm_input"}, {"library grad_w1", "library grad_w2"}),
    (("w2", "b2"), {"library grad_w2"}, {"hidden_gradient", "layer_norm_input", "library grad_w1", "library grad_ln"}),
    (("layer_scale",), {"library grad_w2"}, {"hidden_gradient", "layer_norm_input", "library grad_w1"}),
    (("b2",), set(), {"hidden_gradient", "layer_norm", "library grad_w1", "library grad_w2", "layer_norm_input"}),
    (NAMES[1:], {"hidden_gradient", "layer_norm_input", "library grad_w1", "library grad_w2"}, set()),
]


@pytest.mark.parametrize(("wanted", "runs", "spared"), FROZEN, ids=["+".join(w) for w, _, _ in FROZEN])
@pytest.mark.parametrize("recompute", ["none", "act", "all"])
def test_frozen_parameters_cost_nothing(wanted, runs, spared, recompute):
    args = {name: t.requires_grad_(name in wanted) for name, t in problem(40, 64, 96).items()}
    with tracing.recorded() as forward_ran, torch.no_grad():
        ln_mlp(**args, eps=1e-5, recompute=recompute, backend="triton")
    with tracing.recorded() as ran:
        found = errors(args, residual_scale=2.0, recompute=recompute)
    assert set(found) == {"out", *wanted}
    assert_close(found, F32)
    backward = set(kernels(ran)[2:]) if recompute != "all" else set(kernels(ran)[1:])
    assert forward_ran
    assert runs <= backward
    assert not spared & (backward - {"layer_norm"} if recompute != "all" else backward)


@pytest.mark.parametrize("recompute", ["none", "act", "all"])
def test_saved_memory(recompute):
    """In units of [M, C] of the compute dtype, with H = 4C: x; and p; and GELU(p). Row statistics beside them."""
    tokens, channels = 64, 64
    args = problem(tokens, channels, 4 * channels, F16)
    parameters = {t.data_ptr() for name, t in args.items() if name != "x"}
    saved = 0

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += t.numel() * t.element_size() if t.data_ptr() not in parameters else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ln_mlp(**args, eps=1e-5, recompute=recompute, backend="triton")
    unit, statistics = tokens * channels * 2, 2 * tokens * 4
    assert saved == {"all": 1, "act": 5, "none": 9}[recompute] * unit + statistics


@pytest.mark.parametrize(("channels", "pre_is_saved"), [(256, False), (272, True)])
def test_auto_recompute_follows_the_width(channels, pre_is_saved):
    tokens, hidden, saved = 20, 32, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ln_mlp(**problem(tokens, channels, hidden, F16), eps=1e-5, recompute="auto", backend="triton")
    assert saved.count((tokens, hidden)) == pre_is_saved


@pytest.mark.parametrize("layout", ["transposed", "sliced columns", "sliced rows", "expanded", "misaligned"])
@pytest.mark.parametrize("forward", ["one_pass", "staged"])
def test_layouts_of_x(layout, forward):
    args = problem(24, 48, 80, F16)
    wide = problem(48, 96, 8, F16)["x"].detach()
    x = {
        "transposed": wide[:, :24].T,
        "sliced columns": wide[:24, 8:56],
        "sliced rows": wide.view(96, 48)[::2],
        "expanded": wide[:1, :48].expand(24, 48),
        "misaligned": wide.flatten()[1 : 1 + 24 * 48].view(24, 48),
    }[layout]
    with tuning.forced(forward=forward):
        found = errors(args | {"x": x.requires_grad_()}, recompute="all")
    assert_close(found, F16)


def test_weights_that_are_views():
    args = problem(24, 48, 80, F16)
    args["w1"] = problem(24, 80, 48, F16)["w1"].detach().T.requires_grad_()
    args["b1"] = problem(24, 48, 160, F16)["b1"].detach()[::2].requires_grad_()
    assert_close(errors(args), F16)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)])
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_no_tokens(shape, recompute):
    args = problem(shape, 48, 80)
    out = ln_mlp(**args, eps=1e-5, recompute=recompute, backend="triton")
    assert out.shape == (*shape, 48)
    out.sum().backward()
    assert args["x"].grad.shape == args["x"].shape
    assert not args["w1"].grad.any()


@pytest.mark.parametrize("forward", ["one_pass", "staged"])
def test_gradients_do_not_change_from_run_to_run(forward):
    gradients = []
    for _ in range(3):
        args = problem(150, 48, 80, F16)
        with tuning.forced(forward=forward):
            ln_mlp(**args, eps=1e-5, backend="triton").float().square().sum().backward()
        gradients.append([args[name].grad for name in NAMES])
    for again in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))


@pytest.mark.parametrize(("dtype", "method"), [(BF16, "corrected"), (BF16, "normalized"), (F16, "normalized")])
def test_large_mean(dtype, method):
    """Tokens far from zero: the mean cancels in the corrected product as it does in LayerNorm.

    Only if its coefficient is the sum of the *rounded* weights. The output hides that behind the large residual; GELU's saved
    output does not, and the gradient of W2 shows it.
    """
    args = problem(40, 192, 96, dtype)
    args["x"] = (args["x"].detach() + 30.0).requires_grad_()
    with tuning.forced(fc1=method), tracing.recorded() as ran:
        found = errors(args, recompute="none")
    assert kernels(ran)[0] == {"corrected": "row_statistics", "normalized": "layer_norm"}[method]
    assert_close(found, dtype)


def test_small_factors_of_layernorm_in_float16():
    """W1 times them would be subnormal: no way rounds that."""
    args = problem(40, 192, 96, F16)
    args["ln_weight"] = (args["ln_weight"].detach() * 1e-4).requires_grad_()
    args["x"] = (args["x"].detach() * 3).requires_grad_()
    assert_close(errors(args, recompute="none"), F16)
    with (
        tuning.forced(fc1="corrected"),
        pytest.raises(ValueError, match="fc1 is forced to corrected; available here: normalized"),
    ):
        errors(args, recompute="none")


def test_the_scale_reaches_layernorm():
    """LN(2x) with eps is LN(x) with eps/4: visible where the variance is as small as eps."""
    args = problem(40, 48, 80)
    args["x"] = (args["x"].detach() * 3e-3).requires_grad_()
    for forward in ("one_pass", "staged"):
        with tuning.forced(forward=forward):
            assert_close(errors(args, residual_scale=2.0), F32)


def test_nan_and_inf_stay_in_their_rows():
    args = {k: v.detach() for k, v in problem(40, 48, 80).items()}
    clean = ln_mlp(**args, eps=1e-5, backend="triton")
    args["x"] = args["x"].clone()
    args["x"][3, 5] = float("nan")
    args["x"][30, 7] = float("inf")
    for forward in ("one_pass", "staged"):
        with tuning.forced(forward=forward):
            out = ln_mlp(**args, eps=1e-5, backend="triton")
        assert out[3].isnan().all()
        assert out[30].isnan().any()
        others = [i for i in range(40) if i not in (3, 30)]
        assert torch.allclose(out[others], clean[others], atol=1e-5)


@pytest.mark.parametrize("value", [-1e4, -30.0, -11.5, 11.5, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_gelu_far_out(value, dtype):
    """The polynomial in tanh's argument changes sign beyond |p| = 11: without a cap GELU(12) would be 0."""
    args = problem(8, 16, 16, dtype, layer_scale=False)
    args = {k: None if v is None else v.detach() for k, v in args.items()}
    args["w1"] = torch.zeros_like(args["w1"])
    args["b1"] = torch.full_like(args["b1"], value)
    args["w2"] = torch.eye(16, dtype=dtype, device=DEVICE)
    for forward in ("one_pass", "staged"):
        with tuning.forced(forward=forward):
            out = ln_mlp(**args, eps=1e-5, backend="triton")
        expected = args["x"].double() + max(value, 0.0) + args["b2"].double()
        assert relative_error(out, expected) < TOLERANCE_OF_A_SUM[dtype]


TOLERANCE_OF_A_SUM = {F16: 1e-3, BF16: 8e-3}
