"""Models that were converted with `backend="onednn"`: logits, training, loading, copies, compilers, refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mlp_cases import relative_error
from small_models import images, small_vit
from torch import nn

from lambda_kernels import BackendUnavailableError, convert_vit, from_pretrained, save_pretrained
from lambda_kernels.convert.conversion import describe_blocks
from lambda_kernels.ops.ln_mlp import onednn, tracing

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(bool(onednn.missing_operators()), reason="; ".join(onednn.missing_operators())),
]

CPU = torch.device("cpu")


def converted(name: str = "vit_tiny_patch16_224", remove: tuple = (1, 2), scale: float = 1.0, **options) -> tuple:
    """A small model by oneDNN, and by PyTorch's operators."""
    model = small_vit(name, **options)
    return tuple(convert_vit(model, remove, residual_scale=scale, backend=by) for by in ("onednn", "torch"))


def logits(model: nn.Module, ran: list[str] | None = None) -> torch.Tensor:
    with torch.inference_mode(), tracing.recorded() as here:
        out = model(images())
    if ran is not None:
        ran += [entry for entry in here if entry == "onednn"]
    return out


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_models(name, scale):
    ours, plain = converted(name, scale=scale)
    ran: list[str] = []
    got = logits(ours, ran)
    assert len(ran) == 4
    with torch.inference_mode():
        expected = plain.double()(images().double())
    assert relative_error(got, expected) < 1e-5  # a few roundings of float32 in each of four blocks
    assert {row.mlp for row in ours.lambda_kernels_info.blocks} == {"onednn"}
    assert all("autograd records" in row.reason for row in ours.lambda_kernels_info.blocks)
    assert {row.recompute for row in ours.lambda_kernels_info.blocks} == {"none"}


def test_what_a_block_says_of_itself():
    ours, _ = converted()
    block = ours.blocks[0]
    assert block.path(CPU, torch.float32, training=False).backend == "onednn"
    for training in (True, None):  # parameters want gradients
        choice = block.path(CPU, torch.float32, training=training)
        assert choice.backend == "torch"
        assert "backend='onednn' is for inference" in choice.reason
    with torch.no_grad():
        assert block.path(CPU, torch.float32).backend == "onednn"
    block.requires_grad_(False)
    assert block.path(CPU, torch.float32).backend == "onednn"
    block.recompute = "all"
    again = block.recomputed(CPU, torch.float32)
    assert (again.level, "PyTorch's operators" in again.reason) == ("all", True)


def test_train_then_evaluate():
    """The steps are those of the PyTorch path to the last bit, and what is evaluated is what was trained."""
    ours, plain = converted("deit3_small_patch16_224")
    logits(ours)
    for model in (ours, plain):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with tracing.recorded() as ran:
                nn.functional.cross_entropy(model(images()), torch.arange(4)).backward()
            assert not ran
            optimizer.step()
        model.eval()
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert relative_error(logits(ours), logits(plain).double()) < 1e-5


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign):
    ours, plain = converted()
    before = logits(ours)
    state = {name: value + 0.05 for name, value in plain.state_dict().items()}
    ours.load_state_dict(state, assign=assign)
    plain.load_state_dict(state)
    assert float((logits(ours) - before).abs().max()) > 1e-2
    assert relative_error(logits(ours), logits(plain).double()) < 1e-5


@pytest.mark.skipif(not onednn.supports_bfloat16(), reason="no bfloat16 here")
def test_other_dtypes():
    ours, plain = converted()
    logits(ours)
    for model in (ours, plain):
        model.to(torch.bfloat16).to(torch.float32)
    assert relative_error(logits(ours), logits(plain).double()) < 1e-5
    with torch.inference_mode():
        assert ours.to(torch.bfloat16)(images().bfloat16()).dtype == torch.bfloat16
        assert {row.mlp for row in describe_blocks(ours)} == {"onednn"}
        with pytest.raises(BackendUnavailableError, match="float64"):
            ours.double()(images().double())


def test_copies_hold_nothing_packed():
    ours, _ = converted()
    keys = list(ours.state_dict())
    expected = logits(ours)
    size = len(pickle.dumps(ours))
    fresh, _ = converted()
    assert size == len(pickle.dumps(fresh))
    assert list(ours.state_dict()) == keys
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(logits(twin), expected)
        with torch.no_grad():
            twin.blocks[1].mlp.fc1.weight.zero_()
        assert not torch.equal(logits(twin), expected)
        assert torch.equal(logits(ours), expected)


def test_saved_and_opened(tmp_path):
    ours, _ = converted()
    save_pretrained(ours, tmp_path / "model")
    opened = from_pretrained(tmp_path / "model", backend="onednn")
    ran: list[str] = []
    assert torch.equal(logits(opened, ran), logits(ours))
    assert len(ran) == 4
    assert {row.mlp for row in from_pretrained(tmp_path / "model").lambda_kernels_info.blocks} == {"torch"}


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_exported():
    ours, plain = (
        model.requires_grad_(False) for model in converted(depth=2, remove=(1,))
    )  # nothing else stands against it
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), tracing.recorded() as ran:
        assert torch.equal(compiled(images()), plain(images()))
    program = torch.export.export(ours, (images(),))
    traced = torch.jit.trace(ours, images())
    assert not ran
    assert not [node.target for node in program.graph.nodes if "mkldnn" in str(node.target)]
    assert "mkldnn" not in str(traced.inlined_graph)


def test_models_that_it_cannot_serve():
    model = small_vit()
    with pytest.raises(BackendUnavailableError, match="float64"):
        convert_vit(model.double(), (1,), backend="onednn")
    assert not hasattr(model, "lambda_kernels_info")
    gated = small_vit("eva02_tiny_patch14_224", img_size=28)
    with pytest.raises(BackendUnavailableError) as caught:
        convert_vit(gated, (1,), backend="onednn", inplace=True)
    for word in ("backend='onednn' cannot run the MLP halves of all blocks", "not Mlp", "backend='auto'"):
        assert word in str(caught.value)
    assert not hasattr(gated, "lambda_kernels_info")
