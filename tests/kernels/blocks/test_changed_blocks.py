"""Blocks that have run before notice every change of what their result depends on: nothing from earlier calls is stale."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from mlp_cases import relative_error
from small_models import small_vit
from timm.models.vision_transformer import Block
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lambda_kernels import AttentionFreeBlock, BackendUnavailableError, FusedMlp, convert_vit, ln_mlp
from lambda_kernels.blocks import mlp_block
from lambda_kernels.ops.ln_mlp import onednn, plans, tracing
from lambda_kernels.ops.ln_mlp import recompute as recomputed
from lambda_kernels.ops.ln_mlp.fused import tuning

pytestmark = pytest.mark.models

C, H = 16, 64
X = torch.randn(4, 5, C, generator=torch.Generator().manual_seed(1))
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="for the CPU"))]


def build(backend: str = "torch") -> AttentionFreeBlock:
    """A block that has run often enough to have a plan for everything, with gradients and without."""
    torch.manual_seed(0)
    half = Block(C, 1, init_values=0.7, drop_path=0.5).eval()
    with torch.no_grad():
        for parameter in half.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    block = AttentionFreeBlock.from_block(half, backend=backend, residual_scale=1.5)
    run_often(block)
    return block


def run_often(block: nn.Module, x: torch.Tensor = X) -> None:
    for _ in range(2):
        with torch.no_grad():
            block(x)
        block(x).sum().backward()
    block.zero_grad()


def modules(block: AttentionFreeBlock, x: torch.Tensor) -> torch.Tensor:
    """The oracle: the modules as they are now, one by one."""
    torch.manual_seed(3)
    return block._run_modules(x)


def seeded(block: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    torch.manual_seed(3)
    return block(x)


class Quiet(nn.Module):
    def forward(self, x):
        return 0.1 * x


def swap(module: nn.Module, name: str = "weight") -> None:
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 2))


def swap_data(module: nn.Module, name: str = "weight") -> None:
    getattr(module, name).data = getattr(module, name).data * 2


def load(block: nn.Module) -> None:
    state = {name: 1.5 * value for name, value in block.state_dict().items()}
    block.load_state_dict(state, assign=True)


def transposed(block: nn.Module) -> None:
    weight = block.mlp.fc1.weight
    block.mlp.fc1.weight = nn.Parameter((2 * weight.detach()).T.contiguous().T)


def misaligned(block: nn.Module) -> None:
    bias = block.mlp.fc2.bias
    held = torch.zeros(len(bias) + 1)
    held[1:] = 2 * bias.detach()
    block.mlp.fc2.bias = nn.Parameter(held[1:])


def replaced_forward(block: nn.Module) -> None:
    forward = block.mlp.fc1.forward
    block.mlp.fc1.forward = lambda x: 2 * forward(x)


def changed_p(block: nn.Module) -> None:
    block.mlp.drop1.train()
    block.mlp.drop1.p = 0.5


# What changes the result, each with whether the modules run one by one afterwards.
CHANGES: dict[str, tuple[Callable[[nn.Module], object], bool]] = {
    "hook": (lambda b: b.mlp.fc1.register_forward_hook(lambda m, a, out: 2 * out), True),
    "pre-hook": (lambda b: b.norm2.register_forward_pre_hook(lambda m, a: (a[0].flip(-1),)), True),
    "hook on LayerScale": (lambda b: b.ls2.register_forward_hook(lambda m, a, out: 2 * out), True),
    "hook on an identity": (lambda b: b.mlp.norm.register_forward_hook(lambda m, a, out: 2 * out), True),
    "replaced drop path": (lambda b: setattr(b, "drop_path2", Quiet()), True),
    "replaced norm": (lambda b: setattr(b, "norm2", nn.Tanh()), True),
    "replaced MLP": (lambda b: setattr(b, "mlp", nn.Sequential(b.mlp, Quiet())), True),
    "replaced layer": (lambda b: setattr(b.mlp, "fc2", nn.Sequential(b.mlp.fc2, Quiet())), True),
    "replaced activation": (lambda b: setattr(b.mlp, "act", nn.SiLU()), True),
    "replaced norm within": (lambda b: setattr(b.mlp, "norm", nn.LayerNorm(H)), True),
    "replaced dropout": (lambda b: setattr(b.mlp, "drop2", Quiet()), True),
    "replaced LayerScale": (lambda b: setattr(b, "ls2", Quiet()), True),
    "no LayerScale": (lambda b: setattr(b, "ls2", nn.Identity()), False),
    "replaced forward": (replaced_forward, True),
    "fast norm": (lambda b: setattr(b.norm2, "_fast_norm", True) or swap(b.norm2), True),
    "another linear": (lambda b: setattr(b.mlp, "fc1", nn.Linear(C, H)), False),
    "another width": (
        lambda b: (setattr(b.mlp, "fc1", nn.Linear(C, 32)), setattr(b.mlp, "fc2", nn.Linear(32, C))),
        False,
    ),
    "tanh GELU": (lambda b: setattr(b.mlp.act, "approximate", "tanh") or swap(b.mlp.fc1), False),
    "eps": (lambda b: setattr(b.norm2, "eps", 0.5), False),
    "residual scale": (lambda b: setattr(b, "residual_scale", 0.5), False),
    "no residual": (lambda b: setattr(b, "residual_scale", 0.0), False),
    "drop path in training": (lambda b: b.drop_path2.train(), False),
    "another rate": (lambda b: b.drop_path2.train() and setattr(b.drop_path2, "drop_prob", 0.8), False),
    "no scaling": (lambda b: b.drop_path2.train() and setattr(b.drop_path2, "scale_by_keep", False), False),
    "dropout in training": (changed_p, True),
    "weight": (lambda b: swap(b.mlp.fc1), False),
    "weight's data": (lambda b: swap_data(b.mlp.fc2), False),
    "gamma": (lambda b: swap(b.ls2, "gamma"), False),
    "hidden weight": (lambda b: b.mlp.fc1.__dict__.update(weight=torch.randn(H, C) / 4), False),
    "hidden bias of the norm": (lambda b: b.norm2.__dict__.update(bias=torch.randn(C)), False),
    "hidden gamma": (lambda b: b.ls2.__dict__.update(gamma=torch.randn(C)), False),
    "no bias": (lambda b: setattr(b.mlp.fc1, "bias", None), False),
    "no bias of the norm": (lambda b: setattr(b.norm2, "bias", None), False),
    "in place": (lambda b: b.mlp.fc2.weight.data.mul_(2), False),
    "loaded": (load, False),
    "order in memory": (transposed, False),
    "alignment": (misaligned, False),
    "mixed dtypes": (lambda b: (b.bfloat16(), b.norm2.float()), True),
    "other dtype": (lambda b: b.bfloat16(), False),
}


# By the interpreter, which is slow, what the kernels notice; the rest is the block's.
CASES = [
    (backend, change, recorded)
    for change in CHANGES
    for backend, recorded in (("torch", False), ("torch", True), ("triton", True))
    if backend == "torch" or not (CHANGES[change][1] or torch.cuda.is_available())
]


@pytest.mark.parametrize(("backend", "change", "recorded"), CASES)
def test_changes_of_a_block(backend, change, recorded, mlp_calls):
    block = build(backend)
    apply, runs_modules = CHANGES[change]
    with torch.set_grad_enabled(recorded):
        before = seeded(block)
        apply(block)
        x = X.to(block.mlp.fc1.weight.dtype) if hasattr(block.mlp, "fc1") else X
        mlp_calls.clear()
        with tracing.recorded() as ran:
            after = seeded(block, x)
        expected = modules(block, x)
    assert len(mlp_calls) == (0 if runs_modules else 1)
    assert bool(ran) == (backend == "triton" and not runs_modules)
    if ran:
        limit = 1e-2 if x.dtype == torch.bfloat16 else 1e-5
        assert relative_error(after.detach(), expected.detach().double()) < limit
    else:
        assert torch.equal(after, expected)
    assert not torch.allclose(before, after.to(before.dtype), rtol=1e-4, atol=1e-6)
    assert after.requires_grad == recorded
    if recorded:
        parameters = [p for p in block.parameters() if p.requires_grad]
        got = torch.autograd.grad(after.square().sum(), parameters, allow_unused=True)
        true = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
        for a, b in zip(got, true, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= (5e-2 if x.dtype == torch.bfloat16 else 1e-4) * b.norm()


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_global_hooks(kind):
    block, seen = build(), []
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda module, *_: seen.append(type(module)))
    try:
        block(X.clone().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert nn.Linear in seen
    seen.clear()
    block(X)
    assert not seen


def test_hooks_that_were_taken_away_for_a_while():
    """The dictionaries of hooks are replaced, and the old ones come back."""
    from lambda_kernels.blocks.hooks import no_hooks

    block, fired = build(), []
    block.mlp.act.register_forward_hook(lambda *_: fired.append(1))
    with no_hooks(block):
        run_often(block)
    assert not fired
    block(X)
    assert fired == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_asked_for_later(backend):
    block = build(backend)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    assert not block(X).requires_grad
    block.mlp.fc2.bias.requires_grad_()
    block(X).square().sum().backward()
    got = block.mlp.fc2.bias.grad
    (true,) = torch.autograd.grad(modules(block, X).square().sum(), block.mlp.fc2.bias)
    assert relative_error(got, true.double()) < 1e-5
    block.mlp.fc2.bias.requires_grad_(False)
    x = X.clone().requires_grad_()
    (got,) = torch.autograd.grad(block(x).square().sum(), x)
    (true,) = torch.autograd.grad(modules(block, x).square().sum(), x)
    assert relative_error(got, true.double()) < 1e-5
    with torch.no_grad():
        assert not block(x).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_of_autograd(backend):
    block = build(backend)
    with torch.inference_mode():
        out = block(X)
    assert out.is_inference()
    with torch.no_grad():
        assert not block(X).is_inference()
    assert block(X).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recorded", [False, True])
def test_autocast(backend, recorded):
    block = build(backend)
    with torch.set_grad_enabled(recorded):
        for dtype in (torch.bfloat16, torch.float16, None, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                got, expected = block(X), modules(block, X)
            assert got.dtype == expected.dtype
            limit = {None: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
            error = relative_error(got.detach(), expected.detach().double())
            assert error < limit
            if backend == "torch":
                assert error == 0
    plain = block(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(block(X), plain)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(block(X), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_other_kinds(backend):
    block = build(backend)
    views = {
        "shape": X[:2],
        "dimensions": X[0],
        "stride": torch.randn(4, 5, 2 * C)[..., ::2],
        "rows": torch.randn(4, 5, 2 * C)[..., :C],
        "transposed": X.transpose(0, 1),
        "expanded": X[:1].expand(3, -1, -1),
        "alignment": torch.randn(4 * 5 * C + 1)[1:].view(4, 5, C),
        "none": X[:0],
    }
    views["negative"] = torch.imag(torch.complex(X, X).conj())
    assert views["negative"].is_neg()  # its memory holds other values
    for name, x in views.items():
        for _ in range(2):
            got, expected = block(x), modules(block, x)
            assert got.shape == expected.shape, name
            assert not x.numel() or relative_error(got.detach(), expected.detach().double()) < 1e-5, name
    for wrong in (X.double(), X[..., :8], X.to("meta")):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            block(wrong)
    with torch.no_grad():
        assert block.to("meta")(X.to("meta")).device.type == "meta" if backend == "torch" else True


def test_settings_of_a_block(mlp_calls, monkeypatch):
    block = build()
    block.fuse = False
    mlp_calls.clear()
    block(X)
    assert not mlp_calls
    block.fuse = True
    seen, genuine = [], recomputed.ln_mlp
    monkeypatch.setattr(recomputed, "ln_mlp", lambda *a, **k: seen.append(k["recompute"]) or genuine(*a, **k))
    for level in ("all", "act", "none"):
        block.recompute = level
        block(X)
    with torch.no_grad():
        block.recompute = "all"
        block(X)
    assert seen == ["all", "act"]
    block.backend = "triton"
    with tracing.recorded() as ran:
        block(X)
    assert ran
    block.backend = "nothing"
    with pytest.raises(ValueError, match="backend must be one of"):
        block(X)


@pytest.mark.skipif(bool(onednn.missing_operators()), reason="; ".join(onednn.missing_operators()))
def test_onednn_only_where_it_is_inference():
    block = build("onednn")

    def ran(context=torch.inference_mode) -> bool:
        with context(), tracing.recorded() as entries:
            block(X)
        return "onednn" in entries

    assert ran()
    assert ran(torch.no_grad)
    assert not ran(torch.enable_grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ran(torch.no_grad)
    assert ran()
    with torch.backends.mkldnn.flags(enabled=False), pytest.raises(BackendUnavailableError, match="switched off"):
        ran()
    assert ran()
    with torch.no_grad():
        block.mlp.fc1.weight.mul_(2)
        assert relative_error(block(X), modules(block, X).double()) < 1e-5
    load(block)
    with torch.no_grad():
        assert relative_error(block(X), modules(block, X).double()) < 1e-5


def test_choices_of_the_kernels():
    block = build("triton")

    def ran() -> list[str]:
        with torch.no_grad(), tracing.recorded() as entries:
            block(X)
        return [entry.split()[0] for entry in entries]

    for _ in range(2):
        with tuning.forced(forward="one_pass"):
            assert ran() == ["one_pass"]
            with tuning.forced(forward="staged", fc1="normalized", fc2="library"):
                assert ran() == ["layer_norm", "fc1", "library"]
            assert ran() == ["one_pass"]
    with tuning.forced(forward="staged", fc1="library", fc2="fused"):
        assert ran() == ["layer_norm", "library", "fc2"]
    with tuning.forced(forward="nothing"), pytest.raises(ValueError, match="is forced to nothing"):
        ran()


def test_deterministic_algorithms(poisoned_empty):
    """Memory is filled with NaN before use, and none is seen."""
    for backend in ("torch", "triton"):
        block = build(backend)
        run_often(block)
        assert not block(X).isnan().any()


# What only PyTorch's dispatcher can follow


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator():
    block = build("triton")
    with Watch() as watch:
        out = block(X)
    assert "lambda_kernels.ln_mlp.default" in watch.seen
    with Watch() as watch:
        out.sum().backward()
    assert "lambda_kernels.ln_mlp_backward.default" in watch.seen
    # The backward alone, of a forward that nobody watched.
    out = block(X)
    with Watch() as watch:
        out.sum().backward()
    assert "lambda_kernels.ln_mlp_backward.default" in watch.seen


def test_a_function_mode_sees_the_operator():
    block = build("triton")
    with WatchFunctions() as watch:
        got = block(X)
    assert any("ln_mlp" in name for name in watch.seen)
    assert torch.equal(got, block(X))


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    for backend in ("torch", "triton"):
        block = build(backend)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            out = block(mode.from_tensor(X))
        assert type(out).__name__ == "FakeTensor"
        assert out.shape == X.shape
        assert type(block(X)) is torch.Tensor


def test_subclasses():
    for backend in ("torch", "auto"):
        block = build(backend)
        out = block(TwoTensor(X, X + 1))
        assert torch.equal(out.a, block(X))
        assert torch.equal(out.b, block(X + 1))


def test_transforms():
    block = build("auto")
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.allclose(torch.func.grad(lambda x: block(x).sum())(X), expected, atol=1e-5)
    assert torch.allclose(torch.vmap(block)(X), block(X), atol=1e-5)
    parameters = {name: 2 * p.detach() for name, p in block.named_parameters()}
    got = torch.func.functional_call(block, parameters, X)
    assert not torch.allclose(got, block(X))
    load_state = {name: 2 * p for name, p in block.state_dict().items()}
    block.load_state_dict(load_state)
    assert torch.equal(got, block(X))
    named = build("triton")
    with pytest.raises(BackendUnavailableError, match=r"torch\.func"):
        torch.func.grad(lambda x: named(x).sum())(X)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(BackendUnavailableError, match="forward-mode"):
        named(torch.autograd.forward_ad.make_dual(X, X))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compilers_after_eager_calls_and_before(backend):
    block = build(backend)
    block.recompute = "none"
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for x in (X, X[:2]):
        for _ in range(2):
            assert relative_error(compiled(x).detach(), block(x).detach().double()) < 1e-6
    if backend == "torch":
        exported = torch.export.export(block, (X,)).module()
        assert torch.allclose(exported(X), block(X), atol=1e-6)
        with torch.no_grad():
            traced = torch.jit.trace(block, (X,), check_trace=False)
        assert torch.equal(traced(2 * X), block(2 * X))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripting_after_eager_calls():
    block = build()
    block.fuse = False
    scripted = torch.jit.script(block)
    assert torch.allclose(scripted(X), block(X))


# Of the kernels' own function of autograd


def test_outputs_can_be_changed_in_place():
    block = build("triton")
    out = block(X)
    out += 1
    out.sum().backward()
    assert block.mlp.fc1.weight.grad is not None


def test_tokens_that_change_before_the_backward_are_noticed():
    block = build("triton")
    x = X.clone()
    out = block(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensors_that_come_back_from_elsewhere():
    """With other strides and at other addresses, as hooks for offloading give them."""
    block = build("triton")

    def moved(t: torch.Tensor) -> torch.Tensor:
        held = torch.empty(t.numel() + 1, dtype=t.dtype)
        held[1:] = t.reshape(-1)
        return held[1:].view(t.shape)

    x = torch.randn(4, 5, 2 * C)[..., :C].requires_grad_()
    tensors = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), tensors)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved):
            got = torch.autograd.grad(block(x).square().sum(), tensors)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_saved_tensors_that_come_back_as_negated_views():
    """Their memory holds the opposite of their values."""
    block = build("triton")
    x = X.clone().requires_grad_()
    tensors = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), tensors)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: -t.detach(), torch._neg_view):
            got = torch.autograd.grad(block(x).square().sum(), tensors)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_gradients_in_batches():
    """By PyTorch's older transform, whose tensors have no memory of their own."""
    one, other = (build(backend) for backend in ("torch", "triton"))
    other.load_state_dict(one.state_dict())
    rows = X[0].clone()
    found = [
        torch.autograd.functional.jacobian(lambda t, block=block: block(t[None])[0].sum(0), rows, vectorize=True)
        for block in (one, other)
    ]
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_obstacles_of_a_subclass_are_heard(mlp_calls):
    class Own(AttentionFreeBlock):
        def fusion_obstacles(self, training=None):
            return ["its own"]

    block = build()
    own = Own(block.norm2, block.mlp, block.ls2, block.drop_path2)
    mlp_calls.clear()
    run_often(own)
    assert not mlp_calls
    block.fusion_obstacles = lambda training=None: ["its own"]
    run_often(block)
    assert not mlp_calls
    assert block.path(X.device, X.dtype).backend == "modules"


def test_plans_are_of_one_layout_and_one_type_of_number():
    w1, w2 = torch.randn(H, C), torch.randn(C, H)
    others = {"ln_weight": None, "ln_bias": None, "b1": None, "b2": None, "eps": 1e-5}

    def call(w1, w2, **options):
        return ln_mlp(X, w1=w1, w2=w2, **others, **options)

    call(w1, w2, backend="torch", residual_scale=2.0**70)
    with pytest.raises(OverflowError):
        call(w1, w2, backend="torch", residual_scale=2**70)
    call(w1, w2, backend="torch", residual_scale=2.0**70)
    if torch.backends.mkldnn.is_available():
        call(w1, w2, backend="torch")
        with pytest.raises(TypeError, match="w1 must be a dense tensor"):
            call(w1.to_mkldnn(), w2.to_mkldnn(), backend="torch")


def test_a_second_derivative_is_refused_also_of_the_sum():
    block = build("triton")
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        grad.sum().backward()


# Copies, threads, replicas


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_pickles(backend):
    block = build(backend)
    fresh = set(vars(AttentionFreeBlock.from_block(block, backend=backend)))
    assert set(vars(block)) == fresh  # calls put nothing on a block
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), copy.copy(block)):
        assert torch.equal(twin(X), block(X))
    twin = copy.deepcopy(block)
    swap(twin.mlp.fc1)
    assert not torch.equal(twin(X), block(X))
    assert relative_error(twin(X).detach(), modules(twin, X).detach().double()) < 1e-5


def test_plans_hold_no_tensors():
    from weakref import ref

    block = build("triton")
    x = X.clone()
    block(x).sum().backward()
    alive = [ref(t) for t in (x, *block.parameters())]
    del block, x
    assert [r() for r in alive] == [None] * len(alive)


def test_the_number_of_plans_is_limited(monkeypatch):
    monkeypatch.setattr(plans, "_MOST", 4)
    plans.clear()
    block = build()
    for tokens in range(1, 20):
        block(torch.randn(tokens, C))
        assert len(plans._known) <= 4


def test_threads():
    """They call two blocks of one kind at once, with tokens of several kinds."""
    blocks = [build(), build()]
    swap(blocks[1].mlp.fc1)
    inputs = [X, X[:2], torch.randn(3, C)]
    expected = {(i, j): modules(b, x).detach() for i, b in enumerate(blocks) for j, x in enumerate(inputs)}
    plans.clear()
    done: list[int] = []
    wrong: list[object] = []
    together = threading.Barrier(3)

    def work(number: int) -> None:
        together.wait(60)
        for turn in range(20):
            i, j = (number + turn) % 2, (number * turn) % 3
            out = blocks[i](inputs[j])
            if not relative_error(out.detach(), expected[i, j].double()) < 1e-5:
                wrong.append((number, turn))
            if turn % 5 == 0:
                torch.autograd.grad(out.sum(), blocks[i].mlp.fc2.bias)
        done.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2]
    assert not wrong


def test_replicas():
    """As `nn.DataParallel` makes them: their parameters are attributes, and no leaves."""
    block = build("auto")
    replica = copy_as_data_parallel(block)
    assert mlp_block.find_plain_half(replica) is None
    for _ in range(2):
        out = replica(X)
        assert torch.equal(out, 0 * block(X) + modules(double_weights(block), X))
    out.sum().backward()
    assert block.mlp.fc1.weight.grad is not None


def copy_as_data_parallel(block: nn.Module) -> nn.Module:
    made = {}
    for module in block.modules():
        made[module] = module._replicate_for_data_parallel()
    for module, replica in made.items():
        for name, child in module._modules.items():
            replica._modules[name] = made[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, 2 * parameter)
    return made[block]


def double_weights(block: nn.Module) -> nn.Module:
    twin = copy.deepcopy(block)
    for parameter in twin.parameters():
        parameter.data.mul_(2)
    return twin


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_as_a_whole(fused):
    """Blocks that keep their attention and blocks that do not, of one kind each: they share plans, not weights."""
    model = small_vit()
    converted = convert_vit(model, (1, 2), fuse="all" if fused else "removed")
    assert (FusedMlp in map(type, converted.blocks)) == fused
    plain = convert_vit(model, (1, 2), fuse="none")
    x = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(converted(x), plain(x))
