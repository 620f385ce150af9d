"""ln_mlp on the PyTorch path: against a formula written out in float64, its gradients, its checks, its dispatch."""

from __future__ import annotations

import math

import pytest
import torch

from lambda_kernels import BackendUnavailableError, ln_mlp
from lambda_kernels.ops.ln_mlp import dispatch

# dtype → tolerance relative to the largest output: a few roundings of that dtype over two products of width 100
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def arguments(*shape: int, hidden: int = 100, dtype: torch.dtype = torch.float32, grad: bool = False) -> dict:
    generator = torch.Generator().manual_seed(0)
    channels = shape[-1]

    def draw(*size: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        value = offset + scale * torch.randn(*size, generator=generator, dtype=torch.float64)
        return value.to(dtype).requires_grad_(grad)

    return {
        "x": draw(*shape),
        "ln_weight": draw(channels, scale=0.3, offset=1.0),
        "ln_bias": draw(channels, scale=0.3),
        "w1": draw(hidden, channels, scale=channels**-0.5),
        "b1": draw(hidden, scale=0.3),
        "w2": draw(channels, hidden, scale=hidden**-0.5),
        "b2": draw(channels, scale=0.3),
    }


def by_hand(x, ln_weight, ln_bias, w1, b1, w2, b2, *, eps, residual_scale=1.0, layer_scale=None, tanh=False):
    """The formula in float64, with no call that the implementation makes."""
    x, ln_weight, ln_bias, w1, b1, w2, b2 = (t.double() for t in (x, ln_weight, ln_bias, w1, b1, w2, b2))
    y = residual_scale * x
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * ln_weight + ln_bias
    p = normed @ w1.T + b1
    if tanh:
        gelu = 0.5 * p * (1 + torch.tanh(math.sqrt(2 / math.pi) * (p + 0.044715 * p**3)))
    else:
        gelu = 0.5 * p * (1 + torch.erf(p / math.sqrt(2)))
    branch = gelu @ w2.T + b2
    return y + (branch if layer_scale is None else layer_scale.double() * branch)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("residual_scale", [1.0, 2.0])
@pytest.mark.parametrize("approximate", ["auto", "none", "tanh"])
@pytest.mark.parametrize("scaled", [False, True])
def test_formula(dtype, residual_scale, approximate, scaled):
    args = arguments(2, 17, 40, dtype=dtype)
    gamma = torch.linspace(0.2, 2, 40, dtype=torch.float64).to(dtype) if scaled else None
    got = ln_mlp(**args, eps=1e-5, residual_scale=residual_scale, layer_scale=gamma, approximate=approximate)
    expected = by_hand(**args, eps=1e-5, residual_scale=residual_scale, layer_scale=gamma, tanh=approximate == "tanh")
    assert got.dtype == dtype
    assert float((got.double() - expected).abs().max() / expected.abs().max()) < TOLERANCES[dtype]


def test_the_scale_reaches_layernorm():
    """LN(2x) with eps is LN(x) with eps/4: visible where the variance is as small as eps."""
    args = arguments(8, 40, dtype=torch.float64)
    args["x"] = args["x"] * 1e-3
    got = ln_mlp(**args, eps=1e-5, residual_scale=2.0)
    assert torch.allclose(got, by_hand(**args, eps=1e-5, residual_scale=2.0), rtol=0, atol=1e-12)
    unscaled = by_hand(**args, eps=1e-5) + args["x"]
    assert float((got - unscaled).abs().max()) > 1e-2


@pytest.mark.parametrize("residual_scale", [1.0, 2.0])
def test_gradients(residual_scale):
    args = arguments(3, 6, hidden=8, dtype=torch.float64, grad=True)
    gamma = torch.full((6,), 0.7, dtype=torch.float64, requires_grad=True)
    inputs = (*args.values(), gamma)

    def function(*values):
        return ln_mlp(*values[:7], eps=1e-5, residual_scale=residual_scale, layer_scale=values[7])

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 5, 40)])
def test_any_leading_shape(shape):
    args = arguments(*shape)
    got = ln_mlp(**args, eps=1e-6)
    assert got.shape == shape
    assert torch.allclose(got.double(), by_hand(**args, eps=1e-6), atol=1e-5)


def test_not_contiguous():
    args = arguments(40, 9)
    args = arguments(9, 40) | {"x": arguments(40, 9, 1)["x"].squeeze(-1).T}
    assert not args["x"].is_contiguous()
    assert torch.allclose(ln_mlp(**args, eps=1e-6).double(), by_hand(**args, eps=1e-6), atol=1e-5)


def test_absent_biases():
    args = arguments(9, 40)
    zero = {"ln_bias": 40, "b1": 100, "b2": 40}
    got = ln_mlp(**(args | dict.fromkeys(zero)), eps=1e-6)
    expected = ln_mlp(**(args | {k: torch.zeros(n) for k, n in zero.items()}), eps=1e-6)
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1), (1, 5), (3, 5), (5,), (1,)])
def test_branch_scale(shape):
    args = arguments(3, 5, 40, dtype=torch.float64)
    factor = torch.linspace(0.0, 2.0, math.prod(shape), dtype=torch.float64).view(shape)
    got = ln_mlp(**args, eps=1e-5, residual_scale=2.0, branch_scale=factor)
    branch = by_hand(**args, eps=1e-5, residual_scale=2.0) - 2.0 * args["x"]
    assert torch.allclose(got, 2.0 * args["x"] + branch * factor.expand(3, 5)[..., None], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("factor", "error", "words"),
    [
        (torch.ones(3, 5, 1), ValueError, ["branch_scale", "[3, 5]", "[3, 5, 1]"]),
        (torch.ones(4, 1), ValueError, ["branch_scale", "[3, 5]", "[4, 1]"]),
        (torch.ones(3, 1, requires_grad=True), ValueError, ["branch_scale", "detach"]),
        (torch.ones(3, 1, dtype=torch.int64), TypeError, ["branch_scale", "int64"]),
        (torch.ones(3, 1, device="meta"), ValueError, ["branch_scale on meta"]),
        (0.5, TypeError, ["branch_scale", "float"]),
    ],
)
def test_wrong_branch_scale(factor, error, words):
    with pytest.raises(error) as caught:
        ln_mlp(**arguments(3, 5, 40), eps=1e-6, branch_scale=factor)
    for word in words:
        assert word in str(caught.value)


def test_on_the_meta_device():
    args = {k: v.to("meta") for k, v in arguments(2, 9, 40).items()}
    out = ln_mlp(**args, eps=1e-6)
    assert (out.shape, out.device.type) == ((2, 9, 40), "meta")
    with pytest.raises(TypeError, match="one dtype"):
        ln_mlp(**args | {"b1": args["b1"].half()}, eps=1e-6)


def test_autocast_as_timm():
    from timm.models.vision_transformer import Block

    block = Block(48, 3).eval()
    x = torch.randn(2, 5, 48)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = x + block.mlp(block.norm2(x))
        got = ln_mlp(
            x,
            block.norm2.weight,
            block.norm2.bias,
            block.mlp.fc1.weight,
            block.mlp.fc1.bias,
            block.mlp.fc2.weight,
            block.mlp.fc2.bias,
            eps=block.norm2.eps,
        )
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"w1": torch.zeros(100, 39)}, ValueError, ["w1", "[H, C]", "[100, 40]", "[100, 39]"]),
        ({"w2": torch.zeros(40, 99)}, ValueError, ["w2", "[40, 99]"]),
        ({"b1": torch.zeros(40)}, ValueError, ["b1", "[40]"]),
        ({"ln_weight": torch.zeros(1)}, ValueError, ["ln_weight", "[1]"]),
        ({"layer_scale": torch.zeros(3)}, ValueError, ["layer_scale", "[3]"]),
        ({"x": torch.zeros(9, 40, dtype=torch.int64)}, TypeError, ["x", "int64"]),
        ({"w1": "w"}, TypeError, ["w1", "str"]),
        ({"b2": torch.zeros(40, dtype=torch.bfloat16)}, TypeError, ["b2 bfloat16", "x float32", "autocast"]),
        ({"w1": torch.zeros(100, 40, device="meta")}, ValueError, ["w1 on meta", "x on cpu", ".to(device)"]),
        ({"eps": 0.0}, ValueError, ["eps", "0.0"]),
        ({"eps": math.inf}, ValueError, ["eps", "inf"]),
        ({"eps": "1e-5"}, TypeError, ["eps", "str"]),
        ({"eps": torch.tensor(1e-5)}, TypeError, ["eps", "Tensor"]),
        ({"residual_scale": None}, TypeError, ["residual_scale", "NoneType"]),
        ({"x": torch.zeros(9, 40).to_sparse()}, TypeError, ["x", "sparse"]),
        ({"residual_scale": math.inf}, ValueError, ["residual_scale", "inf"]),
        ({"approximate": "erf"}, ValueError, ["approximate", "'erf'", "'tanh'"]),
        ({"recompute": "some"}, ValueError, ["recompute", "'some'"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'", "'triton'"]),
    ],
)
def test_wrong_arguments(change, error, words):
    with pytest.raises(error) as caught:
        ln_mlp(**(arguments(9, 40) | {"eps": 1e-6} | change))
    for word in words:
        assert word in str(caught.value)


def test_backend_by_name_never_falls_back(no_interpreter):
    with pytest.raises(BackendUnavailableError, match="not on a CUDA device") as caught:
        ln_mlp(**arguments(9, 40), eps=1e-6, backend="triton")
    assert "backend='auto'" in str(caught.value)


def test_the_predicate_explains_itself(no_interpreter):
    choice = dispatch.choose(torch.device("cpu"), torch.float64)
    assert choice.backend == "torch"
    for word in ("on cpu", "not on a CUDA device", "float64"):
        assert word in choice.reason
    assert dispatch.choose(torch.device("cpu"), torch.float32, "torch").reason == "requested by name"


def test_every_obstacle_is_named(no_interpreter, monkeypatch):
    cuda = torch.device("cuda", 0)
    assert dispatch.choose(cuda, torch.bfloat16).backend == "triton"  # as traced without a device at hand
    monkeypatch.setattr(dispatch, "_capability", lambda index: (7, 5))
    reason = dispatch.choose(cuda, torch.bfloat16).reason
    assert "compute capability 7.5" in reason
    assert "8.0" in reason
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in dispatch.choose(cuda, torch.bfloat16).reason
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    assert "triton is not installed" in dispatch.choose(cuda, torch.bfloat16).reason


def test_a_device_that_appears_later_is_asked(monkeypatch):
    dispatch._known_capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch._capability(0) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert dispatch._capability(0) == (7, 5)
    dispatch._known_capability.cache_clear()


def test_the_interpreter_is_never_taken_unasked():
    """Slow as it is. Tests run with it switched on."""
    choice = dispatch.choose(torch.device("cpu"), torch.float32)
    assert (choice.backend, "interpreter" in choice.reason) == ("torch", True)
    assert dispatch.choose(torch.device("cpu"), torch.float32, "triton").backend == "triton"


def test_full_graph_compiles():
    args = arguments(9, 40)
    compiled = torch.compile(lambda **kwargs: ln_mlp(**kwargs, eps=1e-6), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(**args), ln_mlp(**args, eps=1e-6), atol=1e-6)
