"""oneDNN's products as a backend of `ln_mlp`: results, changed weights, threads, what runs where."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from mlp_cases import TOLERANCES, in_float64, problem, relative_error
from torch import nn

from lambda_kernels import BackendUnavailableError, ln_mlp
from lambda_kernels.ops.ln_mlp import dispatch, onednn, reference, tracing

pytestmark = pytest.mark.skipif(bool(onednn.missing_operators()), reason="; ".join(onednn.missing_operators()))

CPU = torch.device("cpu")
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not onednn.supports_bfloat16(), reason="no bfloat16 here")),
]


def given(*shape: int, hidden: int = 160, dtype: torch.dtype = torch.float32, layer_scale: bool = False) -> dict:
    """Arguments of `ln_mlp` for tokens of `shape` on a CPU, with parameters as weights, none of which wants a gradient."""
    args = problem(shape[:-1], shape[-1], hidden, dtype, layer_scale=layer_scale, device="cpu")
    args = {name: None if t is None else t.detach() for name, t in args.items()}
    return args | {name: nn.Parameter(args[name], requires_grad=False) for name in ("w1", "w2")}


def computed(args: dict, ran: list[str] | None = None, **options: object) -> torch.Tensor:
    """By oneDNN, which is asserted."""
    with torch.no_grad(), tracing.recorded() as here:
        out = ln_mlp(**args, eps=1e-5, backend="onednn", **options)
    assert here[0] == "onednn"
    if ran is not None:
        ran += here
    return out


def error(args: dict, out: torch.Tensor, **options: object) -> float:
    """Of `out` against the twin in float64."""
    return relative_error(out, reference.ln_mlp(**in_float64(args), eps=1e-5, **options))


def packs(ran: list[str]) -> int:
    return sum("packs" in entry for entry in ran)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [192, 384, 768])
@pytest.mark.parametrize("tokens", [1, 197])
def test_against_float64(dtype, channels, tokens):
    args = given(tokens, channels, hidden=4 * channels, dtype=dtype)
    out = computed(args)
    assert (out.dtype, out.shape) == (dtype, (tokens, channels))
    assert error(args, out) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("residual_scale", [1.0, 2.0])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bare", [False, True])
def test_every_option(dtype, layer_scale, residual_scale, approximate, bare):
    args = given(2, 13, 40, hidden=104, dtype=dtype, layer_scale=layer_scale)
    if bare:
        args |= dict.fromkeys(("ln_weight", "ln_bias", "b1", "b2"))
    options = {"residual_scale": residual_scale, "approximate": approximate}
    assert error(args, computed(args, **options), **options) < TOLERANCES[dtype]


def test_the_forms_of_gelu_are_told_apart():
    args = given(64, 40)
    exact, tanh = (computed(args, approximate=form) for form in ("none", "tanh"))
    assert float((exact - tanh).abs().max()) > 1e-5


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("factor", [(3, 1), (5,)])
def test_branch_scale(layer_scale, factor):
    args = given(3, 5, 40, layer_scale=layer_scale)
    scale = torch.linspace(0.0, 2.0, max(factor)).view(factor)
    out = computed(args, branch_scale=scale)
    assert error(args, out, branch_scale=scale.double()) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("shape", [(40,), (7, 40), (2, 3, 40), (2, 3, 5, 40)])
def test_any_leading_shape(shape):
    args = given(*shape)
    out = computed(args)
    assert out.shape == shape
    assert error(args, out) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded"])
def test_not_contiguous(kind):
    args = given(6, 40)
    wide = torch.randn(6, 80)
    args["x"] = {"transposed": torch.randn(40, 6).T, "strided": wide[:, ::2], "expanded": wide[:1, :40].expand(6, 40)}[
        kind
    ]
    args["w1"] = nn.Parameter(args["w1"].data.T.contiguous().T, requires_grad=False)
    args["b1"], args["b2"] = torch.randn(320)[::2], torch.randn(40, 2)[:, 1]
    before = args["x"].clone()
    assert error(args, computed(args)) < TOLERANCES[torch.float32]
    assert torch.equal(args["x"], before)


def test_the_tokens_stay_what_they_are():
    args = given(9, 40)
    before = args["x"].clone()
    out = computed(args)
    assert out.data_ptr() != args["x"].data_ptr()
    assert torch.equal(args["x"], before)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_nothing_to_compute(shape):
    args = given(*shape)
    assert ln_mlp(**args, eps=1e-5, backend="onednn").shape == shape


# Weights


def test_a_parameter_is_packed_once_and_nothing_else_is():
    args, ran = given(9, 40), []
    first = computed(args, ran)
    assert packs(ran) == 2
    second = computed(args, ran)
    assert packs(ran) == 2
    assert torch.equal(first, second)
    plain = args | {name: args[name].detach() for name in ("w1", "w2")}
    assert relative_error(computed(plain, ran), first.double()) < TOLERANCES[torch.float32]
    assert packs(ran) == 2


def change(args: dict, how: str) -> None:
    w1 = args["w1"]
    with torch.no_grad():
        if how == "in place":
            w1[3, 5] += 4.0
        elif how == "in inference mode":
            with torch.inference_mode():
                w1[3, 5] += 4.0
        elif how == "behind .data":
            w1.data.mul_(1.5)
        elif how == "a row behind .data":
            w1.data[159] = 0.0
        elif how == "a column behind .data":
            w1.data[:, 39] = 0.0
        elif how == "through NumPy":
            w1.detach().numpy()[:] += 0.25
        elif how == "storage":
            w1.data = torch.randn(160, 40)
        else:
            args["w1"] = nn.Parameter(torch.randn(160, 40), requires_grad=False)


@pytest.mark.parametrize(
    "how",
    [
        "in place",
        "in inference mode",
        "behind .data",
        "a row behind .data",
        "a column behind .data",
        "through NumPy",
        "storage",
        "replaced",
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_changed_weight_is_packed_anew(how, inference):
    args, ran = given(9, 40), []
    with torch.inference_mode(inference):
        before = computed(args)
    change(args, how)
    with torch.inference_mode(inference):
        after = computed(args, ran)
    assert packs(ran) == 1
    assert error(args, after) < TOLERANCES[torch.float32]
    assert error(args, before) > 1e-3


def test_rows_and_columns_of_a_wide_weight_are_watched():
    for where in ((39, slice(None)), (slice(None), 159), (slice(None), 0), (0, slice(None))):
        args, ran = given(9, 40), []
        computed(args)
        args["w2"].data[where] += 1.0
        assert error(args, computed(args, ran)) < TOLERANCES[torch.float32]
        assert packs(ran) == 1


def test_weights_that_do_not_count_their_changes_are_never_packed():
    with torch.inference_mode():
        args = given(9, 40)
        assert args["w1"].is_inference()
        ran: list[str] = []
        computed(args, ran)
        args["w1"].data[3, 5] += 4.0
        assert error(args, computed(args, ran)) < TOLERANCES[torch.float32]
    assert packs(ran) == 0


def test_nan_in_a_weight_reaches_the_result():
    args = given(9, 40)
    args["w1"].data[0, 0] = float("nan")
    for _ in range(2):
        assert bool(computed(args).isnan().all())


def test_a_freed_weight_frees_what_was_packed_of_it():
    args = given(9, 40)
    computed(args)
    packed = weakref.ref(onednn._packed[args["w1"]].weight)
    assert packed() is not None
    del args
    gc.collect()
    assert packed() is None


def test_threads():
    """All of them at once on weights that none has packed yet, while one of these changes."""
    args = given(33, 40)
    expected = computed({**args, **{name: args[name].detach().clone() for name in ("w1", "w2")}})
    wrong: list[float] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(20):
            with torch.no_grad():
                out = ln_mlp(**args, eps=1e-5, backend="onednn")
            wrong.append(relative_error(out, expected.double()))
            args["w2"].data.copy_(args["w2"].data.clone())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80
    assert max(wrong) < TOLERANCES[torch.float32]


# What runs where


@pytest.mark.parametrize("wanting", ["x", "w1", "b2"])
def test_a_gradient_takes_pytorchs_operators(wanting):
    args = given(9, 40)
    args[wanting] = args[wanting].detach().requires_grad_()
    with tracing.recorded() as ran:
        out = ln_mlp(**args, eps=1e-5, backend="onednn")
    assert not ran
    assert torch.equal(out, ln_mlp(**args, eps=1e-5, backend="torch"))
    (got,) = torch.autograd.grad(out.sum(), [args[wanting]])
    assert float(got.abs().sum()) > 0
    computed(args)  # with no_grad


def test_with_gradients_on_and_none_wanted():
    args = given(9, 40)
    with tracing.recorded() as ran:
        out = ln_mlp(**args, eps=1e-5, backend="onednn")
    assert ran[0] == "onednn"
    assert not out.requires_grad


def test_what_was_packed_in_inference_mode_serves_outside():
    args, ran = given(9, 40), []
    with torch.inference_mode():
        inside = computed(args, ran)
    with tracing.recorded() as outside_ran:
        outside = ln_mlp(**args, eps=1e-5, backend="onednn")
    assert (packs(ran), packs(outside_ran)) == (2, 0)
    assert torch.equal(inside, outside)


def test_recompute_in_training():
    args = given(9, 40)
    args["w1"] = nn.Parameter(args["w1"].detach())
    out, expected = (ln_mlp(**args, eps=1e-5, recompute="all", backend=name) for name in ("onednn", "torch"))
    assert torch.equal(out, expected)
    assert "LnMlp" in type(out.grad_fn).__name__


def test_autocast_transforms_and_modes_take_pytorchs_operators():
    from torch.utils.flop_counter import FlopCounterMode

    args = given(9, 40)
    with torch.no_grad(), tracing.recorded() as ran:
        with torch.autocast("cpu", torch.bfloat16):
            reason = dispatch.choose(CPU, torch.bfloat16, "onednn").reason
            assert "autocast" in reason
            cast = ln_mlp(**args, eps=1e-5, backend="onednn")
            assert torch.equal(cast, ln_mlp(**args, eps=1e-5, backend="torch"))
        mapped = torch.func.vmap(lambda x: ln_mlp(**args | {"x": x}, eps=1e-5, backend="onednn"))(args["x"])
        with FlopCounterMode(display=False) as counter:
            counted = ln_mlp(**args, eps=1e-5, backend="onednn")
    assert not ran
    assert counter.get_total_flops() == 2 * 2 * 9 * 40 * 160
    assert torch.equal(counted, ln_mlp(**args, eps=1e-5, backend="torch"))
    assert relative_error(mapped, counted.double()) < 1e-5


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_autocast_does_not_ask_what_onednn_computes(monkeypatch, autocast_dtype, has_bfloat16):
    monkeypatch.setattr(onednn, "supports_bfloat16", lambda: has_bfloat16)
    args = given(9, 40)
    with torch.no_grad(), torch.autocast("cpu", autocast_dtype), tracing.recorded() as ran:
        chosen = dispatch.choose(CPU, autocast_dtype, "onednn")
        cast = ln_mlp(**args, eps=1e-5, backend="onednn")
        assert torch.equal(cast, ln_mlp(**args, eps=1e-5, backend="torch"))
        with pytest.raises(BackendUnavailableError, match="float64"):  # which autocast spares
            dispatch.choose(CPU, torch.float64, "onednn")
    assert not ran
    assert chosen.backend == "torch"
    assert "autocast is on" in chosen.reason
    # No advice that would raise on this processor.
    assert ("model.to(torch.bfloat16)" in chosen.reason) == has_bfloat16


def test_training_and_compilation_do_not_need_bfloat16_in_onednn(monkeypatch):
    monkeypatch.setattr(onednn, "supports_bfloat16", lambda: False)
    args = given(9, 40, dtype=torch.bfloat16)
    args["x"] = args["x"].requires_grad_()
    out = ln_mlp(**args, eps=1e-5, backend="onednn")
    assert torch.equal(out, ln_mlp(**args, eps=1e-5, backend="torch"))
    assert torch.autograd.grad(out.sum(), args["x"])[0].dtype == torch.bfloat16
    args["x"] = args["x"].detach()
    with torch.no_grad():
        compiled = torch.compile(ln_mlp, backend="eager", fullgraph=True)
        assert torch.equal(compiled(**args, eps=1e-5, backend="onednn"), out)
        with pytest.raises(BackendUnavailableError, match="bfloat16 on this processor"):
            ln_mlp(**args, eps=1e-5, backend="onednn")


def test_a_subclass_takes_pytorchs_operators():
    class Tokens(torch.Tensor):
        pass

    args = given(9, 40)
    args["x"] = args["x"].as_subclass(Tokens)
    with torch.no_grad(), tracing.recorded() as ran:
        out = ln_mlp(**args, eps=1e-5, backend="onednn")
    assert not ran
    assert type(out) is Tokens


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [
        ("cuda", torch.float32, ["backend='onednn'", "on cuda", "backend='auto'"]),
        ("meta", torch.float32, ["on meta", "not on the CPU"]),
        ("cpu", torch.float64, ["float64", "float32, bfloat16"]),
        ("cpu", torch.float16, ["float16"]),
    ],
)
@pytest.mark.parametrize("recording", [False, True])
def test_where_it_cannot_run_it_raises(device, dtype, words, recording):
    with pytest.raises(BackendUnavailableError) as caught:
        dispatch.choose(torch.device(device), dtype, "onednn", recording=recording)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.filterwarnings("ignore:TF32")  # that PyTorch's own context manager gives
def test_switched_off_or_missing(monkeypatch):
    args = given(9, 40)
    with torch.backends.mkldnn.flags(enabled=False), pytest.raises(BackendUnavailableError, match="switched off"):
        ln_mlp(**args, eps=1e-5, backend="onednn")
    monkeypatch.setattr(onednn, "supports_bfloat16", lambda: False)
    with pytest.raises(BackendUnavailableError, match="bfloat16 on this processor"):
        dispatch.choose(CPU, torch.bfloat16, "onednn")
    onednn.missing_operators.cache_clear()
    try:
        monkeypatch.setitem(onednn._SCHEMAS, "_linear_pointwise.binary", ("binary", ["X", "W"]))
        with pytest.raises(BackendUnavailableError) as caught:
            dispatch.choose(CPU, torch.float32, "onednn")
        assert "torch.ops.mkldnn._linear_pointwise.binary" in str(caught.value)
        assert torch.__version__ in str(caught.value)
        onednn.missing_operators.cache_clear()
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        with pytest.raises(BackendUnavailableError, match="without oneDNN"):
            dispatch.choose(CPU, torch.float32, "onednn")
    finally:
        monkeypatch.undo()
        onednn.missing_operators.cache_clear()


def test_auto_never_takes_it(no_interpreter):
    args = given(9, 40)
    with torch.no_grad(), tracing.recorded() as ran:
        out = ln_mlp(**args, eps=1e-5)
    assert not ran
    assert torch.equal(out, reference.ln_mlp(**args, eps=1e-5))
