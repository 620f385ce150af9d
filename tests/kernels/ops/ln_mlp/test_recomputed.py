"""`ln_mlp` by PyTorch where it keeps little for the backward: the same function, the same gradients, fewer bytes."""

from __future__ import annotations

import shutil

import pytest
import torch
from memory_support import Peak, saved_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lambda_kernels import ln_mlp
from lambda_kernels.ops.ln_mlp import recompute as recomputed
from lambda_kernels.ops.ln_mlp import reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NAMES = ("x", "ln_weight", "ln_bias", "w1", "b1", "w2", "b2", "layer_scale")

# Against the twin with everything saved, which rounds at other places: a few roundings of the dtype.
TOLERANCES = {F64: 1e-13, F32: 2e-6, F16: 4e-3, BF16: 3e-2}

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch) -> None:
    """Every problem here takes several parts, the last of them a shorter one."""
    monkeypatch.setitem(recomputed.ROWS, "cpu", 4)


@pytest.fixture
def as_usual(monkeypatch, few_rows) -> None:
    """As many rows at a time as users have."""
    monkeypatch.setitem(recomputed.ROWS, "cpu", 1024)


def problem(
    *leading: int, channels: int = 6, hidden: int = 10, dtype: torch.dtype = F64, absent: tuple[str, ...] = ()
) -> dict[str, torch.Tensor | None]:
    """Arguments of `ln_mlp`, all of them leaves that want a gradient, with values that none can be left out of unseen."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        value = offset + scale * torch.randn(*size, generator=generator, dtype=F64)
        return value.to(dtype).requires_grad_()

    args = {
        "x": draw(*leading, channels, offset=0.5),
        "ln_weight": draw(channels, scale=0.3, offset=1.0),
        "ln_bias": draw(channels, scale=0.3),
        "w1": draw(hidden, channels, scale=channels**-0.5),
        "b1": draw(hidden, scale=0.5),
        "w2": draw(channels, hidden, scale=hidden**-0.5),
        "b2": draw(channels, scale=0.5),
        "layer_scale": draw(channels, scale=0.3, offset=0.8),
    }
    return args | dict.fromkeys(absent)


def given(args: dict) -> list[torch.Tensor]:
    return [t for t in args.values() if t is not None]


def wanted(args: dict) -> list[torch.Tensor]:
    return [t for t in given(args) if t.requires_grad]


def results(args: dict, recompute: str, **options: object) -> list[torch.Tensor]:
    """The output and every gradient that is wanted."""
    out = ln_mlp(**args, **{"eps": 1e-5, "residual_scale": 2.0, "recompute": recompute, **options})
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=F64).to(out)
    return [out.detach(), *torch.autograd.grad(out, wanted(args), grad)]


def assert_alike(got: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype, number
        assert a.shape == b.shape, number
        a, b = a.detach().double(), b.detach().double()
        assert float((a - b).norm() / b.norm()) <= TOLERANCES[dtype], number


@pytest.fixture
def whole(monkeypatch) -> list[str]:
    """What was asked of the path under test, call by call."""
    seen = []
    genuine = recomputed.ln_mlp
    monkeypatch.setattr(recomputed, "ln_mlp", lambda *a, **k: seen.append(k["recompute"]) or genuine(*a, **k))
    return seen


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("absent", [(), ("layer_scale",), ("ln_weight", "ln_bias", "b1", "b2")])
def test_first_and_second_derivatives(recompute, form, absent, whole):
    args = problem(2, 5, absent=absent)
    names = [name for name, t in args.items() if t is not None]
    factor = torch.tensor([[0.5], [2.0]], dtype=F64)

    def function(*values: torch.Tensor) -> torch.Tensor:
        own = args | dict(zip(names, values, strict=True))
        options = {"residual_scale": 2.0, "branch_scale": factor, "approximate": form}
        return ln_mlp(**own, eps=1e-5, recompute=recompute, **options)

    assert torch.autograd.gradcheck(function, given(args))
    assert torch.autograd.gradgradcheck(function, given(args))
    assert set(whole) == {recompute}


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("absent", [(), ("layer_scale",)])
def test_like_the_twin(recompute, dtype, scale, absent, whole):
    args = problem(3, 11, channels=40, hidden=72, dtype=dtype, absent=absent)
    expected = results(args, "none", residual_scale=scale)
    assert not whole
    assert_alike(results(args, recompute, residual_scale=scale), expected, dtype)
    assert whole == [recompute]


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (1, 7), (7,), ()])
def test_factors_of_tokens(recompute, shape, whole):
    args = problem(3, 7, channels=16)
    factor = torch.linspace(2.0, 0.0, torch.Size(shape).numel(), dtype=F64).reshape(shape)
    expected = results(args, "none", branch_scale=factor)
    assert_alike(results(args, recompute, branch_scale=factor), expected, F64)
    assert whole == [recompute]


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("tokens", [F32, None])
@pytest.mark.parametrize("absent", [(), ("layer_scale",)])
def test_autocast(recompute, dtype, tokens, absent):
    args = problem(3, 11, channels=40, hidden=72, dtype=F32, absent=absent)
    args["x"] = args["x"].detach().to(tokens or dtype).requires_grad_()
    found = {}
    for level in ("none", recompute):
        with torch.autocast("cpu", dtype):
            out = ln_mlp(**args, eps=1e-5, recompute=level)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        found[level] = [out, *torch.autograd.grad(out, wanted(args), grad)]
        with torch.autocast("cpu", dtype):  # a backward inside the region is as narrow as the forward, and no narrower
            out = ln_mlp(**args, eps=1e-5, recompute=level)
            found[level] += torch.autograd.grad(out, wanted(args), grad)
    assert_alike(found[recompute], found["none"], dtype)
    # Rounded where autocast rounds, and LayerNorm nowhere: outputs differ by the order of sums alone.
    ours, theirs = (found[level][0].detach() for level in (recompute, "none"))
    assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCES[dtype] / 30


def test_a_backward_inside_autocast_is_as_wide_as_the_forward():
    args = problem(3, 11, channels=40, hidden=72, dtype=F32)
    expected = torch.autograd.grad(ln_mlp(**args, eps=1e-5).sum(), wanted(args))
    for recompute in ("act", "all"):
        out = ln_mlp(**args, eps=1e-5, recompute=recompute)
        with torch.autocast("cpu", BF16):
            found = torch.autograd.grad(out.sum(), wanted(args))
        assert_alike(list(found), list(expected), F32)


def test_second_derivatives_of_a_narrow_forward():
    """A penalty on the gradient, taken outside the region that the forward ran in."""
    args = problem(3, 11, channels=40, hidden=72, dtype=F32)
    found = []
    for level in ("none", "all"):
        args["x"] = args["x"].detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", BF16):
            out = ln_mlp(**args, eps=1e-5, recompute=level)
        first = torch.autograd.grad(out.square().sum(), wanted(args), create_graph=True)
        found.append([*first, *torch.autograd.grad(first[0].float().square().sum(), wanted(args), allow_unused=True)])
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:
            assert_alike([ours], [theirs], BF16)


def test_a_weight_used_twice_under_autocast():
    """Autocast remembers casts: one made where no gradient is recorded must not serve the call that comes next."""
    args = problem(9, channels=16, dtype=F32)
    found = []
    for first in ("all", "none"):
        with torch.autocast("cpu", BF16):
            out = ln_mlp(**args, eps=1e-5, recompute=first)
            out = ln_mlp(**args | {"x": out}, eps=1e-5, recompute="none")
        found.append(torch.autograd.grad(out.square().sum(), wanted(args)))
    assert_alike(*found, BF16)


@pytest.mark.parametrize("recompute", ["act", "all"])
def test_one_tensor_for_two_arguments(recompute):
    found = []
    for level in ("none", recompute):
        args = problem(9)
        args["b2"] = args["ln_bias"]
        args["w2"] = args["w1"].T
        leaves = [args[name] for name in NAMES if name not in ("b2", "w2")]
        out = ln_mlp(**args, eps=1e-5, recompute=level)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        out = ln_mlp(**args, eps=1e-5, recompute=level)
        found.append([*first, *second, *torch.autograd.grad(out.square().sum(), leaves)])
    assert_alike(found[1], found[0], torch.float64)


@pytest.mark.parametrize(
    ("recompute", "kept", "hidden"), [("auto", 2, 2), ("none", 2, 2), ("act", 1, 1), ("all", 1, 0)]
)
def test_saved_bytes(recompute, kept, hidden):
    """Values of each token that are kept, [C] and [H]; autograd alone adds LayerNorm's two statistics."""
    args = problem(2, 13, channels=24, hidden=96, dtype=F32, absent=("layer_scale",))
    x = args["x"] = args["x"].detach().requires_grad_()

    def call() -> torch.Tensor:
        return ln_mlp(**args, eps=1e-5, residual_scale=2.0, recompute=recompute)

    weights = [t for t in given(args) if t is not x]
    statistics = 2 if recompute in ("auto", "none") else 0
    assert saved_bytes(call, weights) == 4 * 26 * (24 * kept + 96 * hidden + statistics)


def test_nothing_of_the_hidden_width_is_there_as_a_whole():
    args = problem(64, channels=8, hidden=32, dtype=F32)
    grad = torch.ones(64, 8)
    largest = {}
    for recompute in ("none", "act", "all"):
        with Peak() as forward:
            out = ln_mlp(**args, eps=1e-5, recompute=recompute)
        with Peak() as backward:
            out.backward(grad)
        largest[recompute] = forward.largest, backward.largest
    assert largest == {"none": (64 * 32,) * 2, "act": (64 * 32, 64 * 8), "all": (64 * 8, 64 * 8)}


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize(
    ("names", "products"),
    # of the backward: through GELU, through LayerNorm, for w1, for w2, and with "all" the first one again
    [
        (NAMES, (4, 5)),
        (NAMES[:7], (4, 5)),
        (("x",), (2, 3)),
        (("ln_bias",), (2, 3)),
        (("b1",), (1, 2)),
        (("w1",), (2, 3)),
        (("w2",), (1, 2)),
        (("layer_scale",), (1, 2)),
        (("w2", "layer_scale"), (1, 2)),
        (("b2",), (0, 0)),
    ],
)
def test_what_wants_no_gradient_costs_nothing(recompute, names, products):
    args = {name: t.requires_grad_(name in names) for name, t in problem(12, channels=8, hidden=20, dtype=F32).items()}
    expected = results(args, "none")
    with FlopCounterMode(display=False) as counter:
        got = results(args, recompute)
    assert_alike(got, expected, F32)
    assert counter.get_total_flops() == (2 + products[recompute == "all"]) * 2 * 12 * 8 * 20


@pytest.mark.parametrize("names", [("b2",), ("w2",)])
def test_layer_norm_is_left_out_where_nothing_needs_it(names):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(function.__name__)
            return function(*args, **(kwargs or {}))

    args = {name: t.requires_grad_(name in names) for name, t in problem(12, dtype=F32).items()}
    out = ln_mlp(**args, eps=1e-5, recompute="act")
    ran: list[str] = []
    with Names():
        out.sum().backward()
    assert not [name for name in ran if "norm" in name]
    assert args[names[0]].grad is not None


def test_small_layer_scale_in_float16():
    """Gradients before LayerScale are 1e4 times larger than after it: the sum of their products does not fit float16."""
    args = {name: t.detach() for name, t in problem(64, channels=16, hidden=32, dtype=F16).items()}
    args["layer_scale"] = torch.full((16,), 1e-4, dtype=F32)
    args["w1"], args["w2"] = (args[name].requires_grad_() for name in ("w1", "w2"))
    args["layer_scale"].requires_grad_()
    with torch.autocast("cpu", F16):
        out = ln_mlp(**args, eps=1e-5, recompute="all")
    grad = torch.full(out.shape, 2e4, dtype=out.dtype)
    found = torch.autograd.grad(out, [args["w2"], args["layer_scale"]], grad)
    twins = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in args.items()}
    expected = torch.autograd.grad(
        reference.ln_mlp(**twins, eps=1e-5), [twins["w2"], twins["layer_scale"]], grad.double()
    )
    for got, true in zip(found, expected, strict=True):
        assert float((got.double() - true).norm() / true.norm()) < TOLERANCES[F16]


def test_without_a_gradient_it_is_the_twin(whole):
    args = problem(9)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            ln_mlp(**args, eps=1e-5, recompute="all")
    ln_mlp(**{name: t.detach() for name, t in args.items()}, eps=1e-5, recompute="all")
    assert not whole


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_no_tokens(shape, whole):
    args = problem(9) | {"x": torch.zeros(shape, dtype=F64, requires_grad=True)}
    ln_mlp(**args, eps=1e-5, recompute="all").sum().backward()
    assert not whole
    assert all(float(t.grad.abs().sum()) == 0 for t in given(args))


@pytest.mark.parametrize("form", ["transposed", "expanded", "sliced"])
def test_any_strides(form):
    args = problem(9, channels=6)
    shape, view = {
        "transposed": ((6, 9), torch.t),
        "expanded": ((1, 6), lambda leaf: leaf.expand(9, 6)),
        "sliced": ((18, 6), lambda leaf: leaf[::2]),
    }[form]
    leaf = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=F64).requires_grad_()
    args["x"] = view(leaf)
    found = [results(args, level) for level in ("none", "act", "all")]
    for other in found[1:]:
        assert_alike(other, found[0], F64)
    expanded = torch.ones((), dtype=F64).expand(9, 6)  # a gradient without strides of its own
    grads = [
        torch.autograd.grad(ln_mlp(**args, eps=1e-5, recompute=level), leaf, expanded)[0] for level in ("none", "all")
    ]
    assert_alike([grads[1]], [grads[0]], F64)


def test_transforms_are_followed(whole):
    """By the twin, since a graph that computes things again cannot be transformed; the derivative is the same."""
    args = {name: t.detach() for name, t in problem(9).items()}

    def total(x: torch.Tensor, recompute: str = "all") -> torch.Tensor:
        return ln_mlp(**args | {"x": x}, eps=1e-5, recompute=recompute).square().sum()

    x = args["x"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(x), x)
    assert whole == ["all"]
    assert_alike([torch.func.grad(total)(args["x"])], [expected], F64)
    batched = torch.vmap(total)(args["x"][:, None])
    assert batched.shape == (9,)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(total(dual)).tangent
    assert float(tangent) == pytest.approx(float(expected.sum()))
    assert whole == ["all"]


def test_twice_and_inside_a_checkpoint():
    args = problem(9)
    expected = results(args, "none")
    out = ln_mlp(**args, eps=1e-5, residual_scale=2.0, recompute="all")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=F64)
    for _ in range(2):
        assert_alike(list(torch.autograd.grad(out, wanted(args), grad, retain_graph=True)), expected[1:], F64)
    again = torch.utils.checkpoint.checkpoint(
        lambda x: ln_mlp(**args | {"x": x}, eps=1e-5, residual_scale=2.0, recompute="all"),
        args["x"],
        use_reentrant=False,
    )
    assert_alike(list(torch.autograd.grad(again, wanted(args), grad)), expected[1:], F64)


def test_tokens_changed_in_place_are_noticed():
    args = problem(9)
    args["x"] = args["x"] * 1
    out = ln_mlp(**args, eps=1e-5, recompute="all")
    args["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_as_one_graph(recompute, dynamic):
    args = problem(2, 13, channels=24, hidden=96, dtype=F32, absent=("layer_scale",))
    factor = torch.tensor([[0.5], [2.0]])

    def function(**kwargs: torch.Tensor) -> torch.Tensor:
        return ln_mlp(**kwargs, eps=1e-5, residual_scale=2.0, branch_scale=factor, recompute=recompute)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    grad = torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(7))
    found = []
    for call in (function, compiled):
        out = call(**args)
        found.append([out.detach(), *torch.autograd.grad(out, wanted(args), grad)])
    assert_alike(found[1], found[0], F32)
    if not dynamic:
        kept = saved_bytes(lambda: compiled(**args), [t for t in given(args) if t is not args["x"]])
        assert kept == 4 * 26 * (24 + 96 * (recompute == "act")) + factor.nbytes


@pytest.mark.slow
def test_compiled_by_inductor_it_saves_as_little():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    args = problem(2, 13, channels=24, hidden=96, dtype=F32, absent=("layer_scale",))
    for recompute, values in (("act", 24 + 96), ("all", 24)):
        compiled = torch.compile(lambda r=recompute, **k: ln_mlp(**k, eps=1e-5, recompute=r), fullgraph=True)
        expected = results(args, "none", residual_scale=1.0)[1:]
        out = compiled(**args)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=F64).to(out)
        assert_alike(list(torch.autograd.grad(out, wanted(args), grad)), expected, F32)
        kept = saved_bytes(lambda c=compiled: c(**args), [t for t in given(args) if t is not args["x"]])
        # beside a mean and a factor of each token, where the compiler finds them worth keeping
        assert 4 * 26 * values <= kept <= 4 * 26 * (values + 2)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_in_training(strict):
    args = problem(2, 13, channels=24, hidden=96, dtype=F32)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ln_mlp(**parameters | {"x": x}, eps=1e-5, recompute="all")

    parameters = {name: t.detach() for name, t in args.items()}
    program = torch.export.export(Model(), (args["x"],), strict=strict)
    assert torch.allclose(program.module()(args["x"]), Model()(args["x"]), atol=1e-5)
    assert not any("checkpoint" in str(node.target) for node in program.graph.nodes)


def test_the_usual_rows(as_usual):
    """More than one part, at the size that users have."""
    args = problem(1500, channels=8, hidden=16, dtype=F32)
    expected = results(args, "none")
    for recompute in ("act", "all"):
        assert_alike(results(args, recompute), expected, F32)
