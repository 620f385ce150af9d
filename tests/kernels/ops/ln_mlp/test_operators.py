"""The registered operators: shapes without data, autograd, compile, export, autocast, FLOP counts."""

from __future__ import annotations

import contextlib
import shutil
import warnings

import pytest
import torch
from mlp_cases import DEVICE, NAMES, assert_close, errors, in_float64, problem, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from lambda_kernels import BackendUnavailableError, ln_mlp
from lambda_kernels.ops.ln_mlp import dispatch, reference, tracing
from lambda_kernels.ops.ln_mlp.arguments import SAVE_NOTHING
from lambda_kernels.ops.ln_mlp.fused import tuning

pytestmark = pytest.mark.usefixtures("poisoned_empty")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def forward_arguments(save: str, dtype: torch.dtype = F32, *, branch_scale: bool = True, **options: object) -> tuple:
    factor = torch.linspace(0, 2, 20, device=DEVICE) if branch_scale else None
    return (*problem(20, 48, 80, dtype, **options).values(), factor, 1e-5, 2.0, "none", save)


@pytest.mark.parametrize("save", ["all", "act", "none"])
@pytest.mark.parametrize("layer_scale", [False, True])
def test_opcheck_forward(save, layer_scale):
    torch.library.opcheck(
        torch.ops.lambda_kernels.ln_mlp.default,
        forward_arguments(save, layer_scale=layer_scale, branch_scale=layer_scale),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("save", ["all", "act", "none"])
def test_opcheck_backward(save):
    args = [None if t is None else t.detach() if isinstance(t, torch.Tensor) else t for t in forward_arguments(save)]
    out, mean, rstd, pre, act = torch.ops.lambda_kernels.ln_mlp(*args)
    needs = [True, False, True, True, False, True, True, False]
    saved = (mean, rstd, pre if pre.numel() else None, act if act.numel() else None)
    torch.library.opcheck(
        torch.ops.lambda_kernels.ln_mlp_backward.default, (torch.randn_like(out), *args[:-1], *saved, needs)
    )


@pytest.mark.parametrize("save", [SAVE_NOTHING, "all", "act", "none"])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F16, F16, F16), (F32, F16, F32), (F16, F16, F32)])
def test_shapes_without_data_are_those_with_data(save, dtypes):
    tokens, weights, gamma = dtypes
    args = list(forward_arguments(save, weights))
    args[0] = args[0].detach().to(tokens)
    args[7] = args[7].detach().to(gamma)
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    real = torch.ops.lambda_kernels.ln_mlp(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.lambda_kernels.ln_mlp(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        )
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("save", ["all", "none"])
def test_the_registered_operators_take_any_strides(save):
    """The public function hands over what kernels can read; others may call the operators as well."""
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in forward_arguments(save)]
    strided = [t.T.contiguous().T if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in args]
    assert not strided[0].is_contiguous()
    expected, got = (torch.ops.lambda_kernels.ln_mlp(*given) for given in (args, strided))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    _, mean, rstd, pre, act = expected
    saved = (mean, rstd, pre if pre.numel() else None, act if act.numel() else None)
    grad = torch.randn(20, 48, device=DEVICE)
    results = [
        torch.ops.lambda_kernels.ln_mlp_backward(g, *given[:-1], *saved, [True] * 7 + [False])
        for g, given in ((grad, args), (grad.T.contiguous().T, strided))
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", ["all", "act"])
def test_compiled_as_one_graph(backend, recompute):
    if backend == "inductor" and DEVICE == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    args = problem((2, 10), 48, 80)

    def function(**kwargs: torch.Tensor) -> torch.Tensor:
        return ln_mlp(**kwargs, eps=1e-5, residual_scale=2.0, recompute=recompute, backend="triton")

    def gradients(call) -> list[torch.Tensor]:
        out = call(**args)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(args.values()))]

    expected = gradients(function)
    with tracing.recorded() as ran:
        got = gradients(torch.compile(function, fullgraph=True, backend=backend))
    assert any(entry.startswith("hidden_gradient") for entry in ran)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b.double()) < 1e-6


@pytest.mark.parametrize(
    "way", [contextlib.nullcontext, lambda: FlopCounterMode(display=False)], ids=["plan", "operator"]
)
def test_tangents_of_an_incoming_gradient_are_refused(way):
    """The kernels have no formula for them: without a word, they would be zero."""
    args = problem(20, 48, 80)
    with way():
        out = ln_mlp(**args, eps=1e-5, backend="triton")
    grad = torch.ones_like(out)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grad, torch.randn_like(grad))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative of their gradients"):
            torch.autograd.grad(out, args["x"], dual)


@pytest.mark.parametrize(
    ("channels", "backend", "uses_kernels"),
    [(192, "auto", True), (256, "auto", True), (384, "auto", False), (384, "triton", True), (192, "torch", False)],
)
def test_wide_tokens_are_left_to_the_compiler(channels, backend, uses_kernels):
    """On a CUDA device, of which fake tensors need none."""
    called = []

    def note(graph: torch.fx.GraphModule, inputs: list) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True):
        x, w1, w2 = (torch.empty(*shape, device="cuda") for shape in ((4, channels), (32, channels), (channels, 32)))
        compiled = torch.compile(
            lambda: ln_mlp(x, None, None, w1, None, w2, None, eps=1e-6, backend=backend), backend=note
        )
        assert compiled().shape == x.shape
    assert any("lambda_kernels.ln_mlp" in name for name in called) == uses_kernels
    assert sum("linear" in name for name in called) == (0 if uses_kernels else 2)
    if backend == "auto":
        assert dispatch.choose(x.device, x.dtype, channels=channels).backend == "triton", "nothing is compiled now"


def test_compiled_for_any_number_of_tokens():
    args = {k: v.detach() for k, v in problem(20, 48, 80).items()}
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: ln_mlp(**args | {"x": x}, eps=1e-5, backend="triton"), fullgraph=True, dynamic=True, backend=count
    )
    for tokens in (20, 33, 7):
        x = problem(tokens, 48, 80, seed=tokens)["x"].detach()
        assert relative_error(compiled(x), ln_mlp(**args | {"x": x}, eps=1e-5, backend="triton").double()) < 1e-6
    assert len(graphs) == 1
    assert any("ln_mlp" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    """The operator is in no exported graph: by name it is refused, and "auto" takes PyTorch's operators for a GPU too."""

    class Model(torch.nn.Module):
        def __init__(self, device: str, backend: str) -> None:
            super().__init__()
            self.backend = backend
            shapes = {"ln_weight": (48,), "ln_bias": (48,), "w1": (80, 48), "b1": (80,), "w2": (48, 80), "b2": (48,)}
            for name, shape in shapes.items():
                self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, device=device)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ln_mlp(x, **dict(self.named_parameters()), eps=1e-5, backend=self.backend)

    # A GPU need not be there: nothing is computed.
    with torch._subclasses.FakeTensorMode():
        model, x = Model("cuda", "auto"), torch.empty(20, 48, device="cuda")
    assert dispatch.choose(x.device, x.dtype).backend == "triton"
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},), strict=strict)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.gelu.default" in calls
    assert all(target.startswith("aten.") for target in calls)
    with pytest.raises(Exception, match="the model is being exported") as refused:
        torch.export.export(Model("cpu", "triton"), (torch.zeros(20, 48),), strict=strict)
    assert strict or refused.type is BackendUnavailableError
    assert not dispatch.is_exporting()


def test_traced_for_torchscript():
    args = {k: v.detach() for k, v in problem(20, 48, 80).items()}
    chosen = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        chosen.append(dispatch.choose(torch.device("cuda"), x.dtype))
        return ln_mlp(**args | {"x": x}, eps=1e-5)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(watched, (args["x"],), check_trace=False)
    assert [choice.backend for choice in chosen] == ["torch"]
    assert "being exported" in chosen[0].reason


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("recompute", ["all", "act"])
@pytest.mark.parametrize("tokens_dtype", [F32, None])
def test_autocast(dtype, recompute, tokens_dtype):
    """Only the products are narrow: tokens, residual and parameters keep their dtype, as in timm under autocast."""
    args = problem(40, 64, 96)
    if tokens_dtype is None:
        args["x"] = args["x"].detach().to(dtype).requires_grad_()
    with torch.autocast(DEVICE, dtype), tracing.recorded() as ran:
        found = errors(args, residual_scale=2.0, recompute=recompute)
        out = ln_mlp(**args, eps=1e-5, residual_scale=2.0, backend="triton")
        twin = reference.ln_mlp(**{k: v.detach() for k, v in args.items()}, eps=1e-5, residual_scale=2.0)
    assert out.dtype == twin.dtype == F32
    if tokens_dtype == F32:
        assert not any("row_statistics" in entry for entry in ran)  # LayerNorm sees the tokens as they are
    assert_close(found, dtype)


@pytest.mark.parametrize("stage", ["fc1", "fc2", "hidden_gradient", "saved_gradient"])
@pytest.mark.parametrize("wanted", [NAMES, ("w2", "b2")])
def test_the_library_under_autocast(stage, wanted):
    """Its products take biases of their own dtype only."""
    args = {name: t.requires_grad_(name in wanted) for name, t in problem(40, 64, 96).items()}
    recompute = "act" if stage == "saved_gradient" else "all"
    with torch.autocast(DEVICE, F16), tuning.forced(forward="staged", **{stage: "library"}), tracing.recorded() as ran:
        found = errors(args, residual_scale=2.0, recompute=recompute)
    assert any(entry.startswith("library") for entry in ran)
    assert_close(found, F16)


def test_autocast_switched_off_inside():
    args = problem(40, 64, 96)
    with torch.autocast(DEVICE, BF16), torch.autocast(DEVICE, enabled=False):
        assert_close(errors(args), F32)


def test_backward_outside_autocast_is_as_narrow_as_the_forward():
    """and a backward inside autocast of a forward outside is as wide."""
    args = problem(40, 64, 96)
    out = ln_mlp(**args, eps=1e-5, backend="triton")
    with torch.autocast(DEVICE, BF16):
        got = torch.autograd.grad(out.sum(), list(args.values()))
    twins = in_float64(args)
    expected = torch.autograd.grad(reference.ln_mlp(**twins, eps=1e-5).sum(), list(twins.values()))
    found = {n: relative_error(g, e) for n, g, e in zip(NAMES, got, expected, strict=True)}
    assert_close(found, F32)


def test_second_derivative_is_refused():
    args = problem(8, 48, 80)
    (grad,) = torch.autograd.grad(
        ln_mlp(**args, eps=1e-5, backend="triton").square().sum(), args["x"], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        grad.sum().backward()


def test_transforms_are_refused_by_name_and_left_to_the_twin_otherwise():
    """A custom operator is left out of forward-mode differentiation without a word: its tangent would be zero."""
    args = {k: v.detach() for k, v in problem(8, 48, 80).items()}

    def function(backend: str, x: torch.Tensor) -> torch.Tensor:
        return ln_mlp(**args | {"x": x}, eps=1e-5, backend=backend).sum()

    for transform in (torch.func.grad, torch.vmap):
        with pytest.raises(BackendUnavailableError, match=r"torch\.func"):
            transform(lambda x: function("triton", x))(args["x"])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args["x"], torch.ones_like(args["x"]))
        with pytest.raises(BackendUnavailableError, match="forward-mode"):
            function("triton", dual)
        tangent = torch.autograd.forward_ad.unpack_dual(function("auto", dual)).tangent
    _, expected = torch.func.jvp(lambda x: function("torch", x), (args["x"],), (torch.ones_like(args["x"]),))
    assert float(tangent) == pytest.approx(float(expected), rel=1e-4)


def test_checkpointed():
    args = problem(20, 48, 80)

    def function(x: torch.Tensor) -> torch.Tensor:
        return ln_mlp(**args | {"x": x}, eps=1e-5, backend="triton")

    plain = torch.autograd.grad(function(args["x"]).square().sum(), args["x"])[0]
    again = torch.utils.checkpoint.checkpoint(function, args["x"], use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), args["x"])[0], plain)


def test_nothing_is_saved_without_a_gradient():
    args = {k: v.detach() for k, v in problem(20, 48, 80).items()}
    with tracing.recorded() as ran, tuning.forced(forward="staged"):
        ln_mlp(**args, eps=1e-5, recompute="none", backend="triton")
    assert not any("row_statistics" in entry for entry in ran)
    _, *rest = torch.ops.lambda_kernels.ln_mlp(*args.values(), None, 1e-5, 1.0, "none", SAVE_NOTHING)
    assert [t.numel() for t in rest] == [0, 0, 0, 0]


@pytest.mark.parametrize("recompute", ["none", "act", "all"])
def test_flops(recompute):
    tokens, channels, hidden = 20, 48, 80
    args = problem(tokens, channels, hidden)
    product = 2 * tokens * channels * hidden
    with FlopCounterMode(display=False) as counter:
        out = ln_mlp(**args, eps=1e-5, recompute=recompute, backend="triton")
        assert counter.get_total_flops() == 2 * product
        out.sum().backward()
    assert counter.get_total_flops() == 2 * product + (5 if recompute == "all" else 4) * product


def test_flops_of_frozen_weights():
    args = {k: v.requires_grad_(k == "x") for k, v in problem(20, 48, 80).items()}
    with FlopCounterMode(display=False) as counter:
        ln_mlp(**args, eps=1e-5, recompute="act", backend="triton").sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 20 * 48 * 80
