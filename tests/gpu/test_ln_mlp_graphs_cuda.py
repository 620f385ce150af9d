"""The fused MLP under torch.compile, in CUDA graphs, on streams and devices that are not the current ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlp_cases
import pytest
import torch
from mlp_cases import NAMES, in_float64, problem, relative_error
from small_models import images, small_vit

from lambda_kernels import convert_vit, ln_mlp
from lambda_kernels.ops.ln_mlp import reference, tracing
from lambda_kernels.ops.ln_mlp.fused import tuning

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = "cuda"
F32, BF16 = torch.float32, torch.bfloat16
Tensors = list[torch.Tensor]

# float32 sums of some thousand terms, as in mlp_cases otherwise.
TOLERANCES = {**mlp_cases.TOLERANCES, F32: 5e-6}

# (what is forced, channels, recompute): each way forward and backward once
WAYS = [
    ({"forward": "one_pass"}, 192, "all"),
    ({"forward": "staged"}, 192, "all"),
    ({"forward": "staged", "fc1": "normalized"}, 384, "act"),
    ({"forward": "staged", "fc1": "library", "fc2": "library", "hidden_gradient": "library"}, 384, "all"),
]
WAY_NAMES = ["one pass", "staged", "normalized", "library"]


@pytest.fixture(autouse=True)
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured unless a test asks for it, nothing read that another run measured."""
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", "off")
    monkeypatch.setenv("LAMBDA_KERNELS_CACHE", str(tmp_path))
    tuning.clear()
    yield
    tuning.clear()


def call(args: dict, recompute: str = "auto") -> torch.Tensor:
    return ln_mlp(**args, eps=1e-5, residual_scale=2.0, recompute=recompute, backend="triton")


def with_gradients(args: dict, grad: torch.Tensor, recompute: str = "auto") -> Tensors:
    out = call(args, recompute)
    return [out.detach(), *torch.autograd.grad(out, list(args.values()), grad)]


def true(args: dict, grad: torch.Tensor | None = None) -> Tensors:
    """The same in float64."""
    twins = in_float64(args)
    out = reference.ln_mlp(**twins, eps=1e-5, residual_scale=2.0)
    return (
        [out.detach()]
        if grad is None
        else [out.detach(), *torch.autograd.grad(out, list(twins.values()), grad.double())]
    )


def assert_all_close(got: Tensors, expected: Tensors, tolerance: float) -> None:
    for name, a, b in zip(("out", *NAMES), got, expected, strict=False):
        assert relative_error(a, b.double()) <= tolerance, name
    assert len(got) == len(expected)


def draw(like: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + torch.randn(like.shape, generator=generator)).to(like)


# torch.compile


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiled_operator(mode, dtype):
    torch._dynamo.reset()
    args = problem((2, 33), 192, 384, dtype)
    compiled = torch.compile(lambda x: call(args | {"x": x}), fullgraph=True, mode=mode)
    for step in range(6):
        x, grad = draw(args["x"], step).requires_grad_(), draw(args["x"], 100 + step)
        torch.compiler.cudagraph_mark_step_begin()
        with tracing.recorded() as ran:
            out = compiled(x)
            gradients = torch.autograd.grad(out, [x, *list(args.values())[1:]], grad)
        got = [t.clone() for t in (out.detach(), *gradients)]
        assert_all_close(got, true(args | {"x": x}, grad), TOLERANCES[dtype])
    # By now a graph is replayed in which no operator is called any more; without graphs each call is one.
    assert (ran == []) == (mode == "reduce-overhead")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-4), (BF16, 1e-1)])
def test_compiled_model(mode, dtype, tolerance):
    """A step of training beside the same model uncompiled; all gradients as one vector, since some are nearly zero."""
    torch._dynamo.reset()
    model = convert_vit(small_vit().to(DEVICE, dtype), remove=(1,), backend="triton")
    assert [row.mlp for row in model.lambda_kernels_info.blocks] == ["triton"] * 4
    parameters = list(model.parameters())

    def step(run: Callable, x: torch.Tensor) -> Tensors:
        logits = run(x)
        gradients = torch.autograd.grad(logits.float().square().sum(), parameters)
        return [logits.detach().clone(), torch.cat([g.flatten() for g in gradients])]

    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for seed in range(6):
        x = images(4, seed=seed).to(DEVICE, dtype)
        torch.compiler.cudagraph_mark_step_begin()
        with tracing.recorded() as ran:
            got = step(compiled, x)
        for a, b in zip(got, step(model, x), strict=True):
            assert relative_error(a, b.double()) <= tolerance
    assert (ran == []) == (mode == "reduce-overhead")


# CUDA graphs


def capture(function: Callable[[], Tensors]) -> tuple[torch.cuda.CUDAGraph, Tensors]:
    """A graph of one call and what replaying it writes, after calls that compile and load what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("forced", "channels", "recompute"), WAYS, ids=WAY_NAMES)
def test_captured_forward(dtype, forced, channels, recompute):
    args = {name: t.detach() for name, t in problem((2, 197), channels, 4 * channels, dtype).items()}
    with tuning.forced(**forced):
        graph, (out,) = capture(lambda: [call(args)])
        for seed in (1, 2):
            args["x"].copy_(draw(args["x"], seed))
            with tracing.recorded() as ran:
                graph.replay()
            assert ran == []
            assert relative_error(out, true(args)[0]) <= TOLERANCES[dtype]
            if forced.get("fc1") != "library":  # a library may choose another algorithm inside a graph
                assert torch.equal(out, call(args))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("forced", "channels", "recompute"), WAYS, ids=WAY_NAMES)
def test_captured_forward_and_backward(dtype, forced, channels, recompute):
    args = problem((2, 197), channels, 4 * channels, dtype)
    grad = torch.zeros_like(args["x"])
    with tuning.forced(**forced):
        graph, results = capture(lambda: with_gradients(args, grad, recompute))
    for seed in (1, 2):
        with torch.no_grad():
            args["x"].copy_(draw(args["x"], seed))
            args["w1"].mul_(1.1)  # weights are read at replay, as an optimizer's step needs it
        grad.copy_(draw(grad, 100 + seed))
        graph.replay()
        assert_all_close(results, true(args, grad), TOLERANCES[dtype])


def forbidden(run: object) -> float:
    raise AssertionError("nothing is to be measured while a stream is being captured")


def test_capturing_an_unseen_problem_measures_nothing(monkeypatch):
    """Also with tuning on: measuring waits for the device, which a capture forbids."""
    args = {name: t.detach() for name, t in problem(100, 192, 384, BF16).items()}
    call(args)  # compiled and loaded, but not measured
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", "on")
    monkeypatch.setattr(tuning, "_measure", forbidden)
    tuning.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with tracing.recorded() as ran, torch.cuda.graph(graph):
        out = call(args)
    assert [entry.split()[0] for entry in ran][-2:] == ["fc1", "fc2"]
    found = tuning.decisions()
    assert {(d.problem.stage, d.problem.tokens) for d in found} == {("forward", 128), ("fc1", 128), ("fc2", 128)}
    assert all(d.source == "default" and "captur" in d.reason and d.times_us == {} for d in found)
    args["x"].copy_(draw(args["x"], 1))
    graph.replay()
    assert relative_error(out, true(args)[0]) <= TOLERANCES[BF16]


# Streams and devices


@pytest.mark.parametrize(("forced", "channels", "recompute"), WAYS, ids=WAY_NAMES)
def test_runs_on_the_current_stream(forced, channels, recompute):
    """The inputs arrive late on a side stream; a launch on any other stream would read what was there before, NaN."""
    args = problem((2, 197), channels, 4 * channels, BF16)
    late_x, late_grad = draw(args["x"], 1), draw(args["x"], 2)
    grad = draw(args["x"], 3)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with tuning.forced(**forced), torch.cuda.stream(stream):
        # Once before, so that below nothing waits for a compilation or for memory.
        with_gradients(args, grad, recompute)
        with torch.no_grad():
            args["x"].fill_(float("nan"))
            grad.fill_(float("nan"))
        stream.synchronize()
        torch.cuda._sleep(1_000_000_000)  # about half a second
        with torch.no_grad():
            args["x"].copy_(late_x)
            grad.copy_(late_grad)
        results = with_gradients(args, grad, recompute)
    assert not stream.query(), "the device was not kept busy long enough for the test to say anything"
    stream.synchronize()
    assert_all_close(results, true(args, grad), TOLERANCES[BF16])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_on_a_device_that_is_not_current():
    args = problem((2, 33), 192, 384, BF16, device="cuda:1")
    grad = torch.randn_like(args["x"])
    results = with_gradients(args, grad)
    assert torch.cuda.current_device() == 0
    assert {t.device for t in results} == {torch.device("cuda", 1)}
    assert_all_close(results, true(args, grad), TOLERANCES[BF16])
