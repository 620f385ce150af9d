"""Blocks that compute things again in the backward: what that saves, that nothing else changes, and what they say of it."""

from __future__ import annotations

import pytest
import timm
import torch
from memory_support import Peak, saved_bytes
from mlp_cases import DEVICE
from small_models import images, small_vit
from timm.models.vision_transformer import Block
from torch import nn
from torch._subclasses import FakeTensorMode

from lambda_kernels import AttentionFreeBlock, FusedMlp, convert_vit
from lambda_kernels.ops.ln_mlp import recompute as recomputed

CPU = torch.device("cpu")
F32 = torch.float32


class Half(nn.Module):
    """What timm's `Block` does after its attention."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def stack(width: int, depth: int = 12, **options: object) -> tuple[nn.Sequential, nn.Sequential]:
    """timm's halves of `depth` blocks, and ours with `options` on the same parameters."""
    torch.manual_seed(0)
    blocks = [Block(width, 3) for _ in range(depth)]
    ours = (AttentionFreeBlock.from_block(block, **options) for block in blocks)
    return nn.Sequential(*map(Half, blocks)), nn.Sequential(*ours)


def gradients(network: nn.Module, x: torch.Tensor, seed: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    out = network(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *network.parameters()])]


def assert_alike(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        a, b = a.detach(), b.detach()
        assert float((a - b).norm()) <= tolerance * float(b.norm())


# What it saves


@pytest.mark.parametrize(("recompute", "values"), [("auto", 10), ("none", 10), ("act", 5), ("all", 1)])
def test_saved_bytes_of_twelve_blocks(recompute, values):
    """In units of the tokens; autograd alone adds LayerNorm's two statistics."""
    timm_half, ours = stack(48, recompute=recompute)
    x = torch.randn(2, 9, 48, requires_grad=True)
    unit, statistics = x.nbytes, 2 * 18 * 4
    usual = saved_bytes(lambda: timm_half(x), timm_half.parameters())
    assert usual == 12 * (10 * unit + statistics)
    assert saved_bytes(lambda: ours(x), ours.parameters()) == 12 * (values * unit + (statistics if values == 10 else 0))


@pytest.mark.parametrize(("recompute", "ratio"), [("act", 1.8), ("all", 6.0)])
def test_the_worst_moment_of_a_step(recompute, ratio):
    """Everything that is alive at once in forward and backward, gradients of weights on their way included."""
    timm_half, ours = stack(24, recompute=recompute)
    x = torch.randn(64, 65, 24, requires_grad=True)
    grad = torch.ones_like(x)
    peaks = []
    for network in (timm_half, ours):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Peak() as peak:
            network(x).backward(grad)
        peaks.append(peak.bytes)
    assert peaks[0] / peaks[1] >= ratio


@pytest.mark.parametrize("width", [192, 768])
@pytest.mark.parametrize(("recompute", "ratio"), [("none", 1.1), ("act", 1.9), ("all", 9.0)])
def test_the_kernels_at_deits_sizes(width, recompute, ratio):
    """Batch 256 in bfloat16, counted on tensors without data: statistics are the kernels', and float32."""
    with FakeTensorMode(), torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        try:
            timm_half, ours = stack(width, recompute=recompute, backend="triton")
        finally:
            torch.set_default_dtype(F32)
        x = torch.randn(256, 197, width, dtype=torch.bfloat16, requires_grad=True)
        usual = saved_bytes(lambda: timm_half(x), timm_half.parameters())
        kept = saved_bytes(lambda: ours(x), ours.parameters())
    tokens = 256 * 197
    values = {"none": 9, "act": 5, "all": 1}[recompute]
    assert kept == 12 * tokens * (2 * values * width + 2 * 4)
    assert usual / kept >= ratio


def test_blocks_that_keep_their_attention():
    """Of them only the MLP half is computed again: its ten units become one, those of the attention stay."""
    models = {"timm": small_vit(), **{level: convert_vit(small_vit(), (), recompute=level) for level in ("act", "all")}}
    x = images(2)
    unit = 2 * 5 * 48 * 4
    kept = {name: saved_bytes(lambda m=m: m(x), m.parameters()) for name, m in models.items()}
    statistics = 2 * 2 * 5 * 4
    assert kept["timm"] - kept["all"] == 4 * (9 * unit + statistics)
    assert kept["timm"] - kept["act"] == 4 * (5 * unit + statistics)


# What it computes


OPTIONS = {
    "plain": {},
    "drop path": {"drop_path": 0.5},
    "dropout": {"proj_drop": 0.3, "drop_path": 0.3},
    "layer scale": {"init_values": 0.7, "drop_path": 0.3},
    "dropout and layer scale": {"init_values": 0.7, "proj_drop": 0.3},
}


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_training_is_the_same(recompute, name, scale, monkeypatch):
    """with the same samples and values dropped."""
    monkeypatch.setitem(recomputed.ROWS, "cpu", 8)
    torch.manual_seed(0)
    block = Block(48, 3, **OPTIONS[name])
    plain, ours = (
        AttentionFreeBlock.from_block(block, residual_scale=scale, recompute=level) for level in ("none", recompute)
    )
    x = torch.randn(5, 7, 48, requires_grad=True)
    assert_alike(gradients(ours, x), gradients(plain, x))
    for _ in range(2):  # the generator goes on as it would
        torch.manual_seed(1)
        first = [plain(x).detach(), torch.rand(3)]
        torch.manual_seed(1)
        out = ours(x)
        second = [out.detach(), torch.rand(3)]
        out.sum().backward()
        assert torch.allclose(first[0], second[0], atol=1e-5)
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize("fuse", [True, False])
def test_autocast(recompute, fuse):
    torch.manual_seed(0)
    block = Block(48, 3, proj_drop=0.0 if fuse else 0.3)
    x = torch.randn(4, 7, 48, requires_grad=True)
    found = []
    for level in ("none", recompute):
        ours = AttentionFreeBlock.from_block(block, fuse=fuse, recompute=level)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(2)
            out = ours(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])])
    assert_alike(found[1], found[0], 3e-2)


@pytest.mark.parametrize("fuse", [True, False])
def test_one_block_called_twice(fuse):
    torch.manual_seed(0)
    block = Block(48, 3)
    x = torch.randn(2, 5, 48, requires_grad=True)
    found = [
        gradients(nn.Sequential(*[AttentionFreeBlock.from_block(block, fuse=fuse, recompute=level)] * 2), x)
        for level in ("none", "act", "all")
    ]
    assert_alike(found[1], found[0])
    assert_alike(found[2], found[0])


@pytest.mark.parametrize("kind", ["dropout", "plain"])
@pytest.mark.parametrize("recompute", ["act", "all"])
def test_compiled_training_steps(kind, recompute):
    torch.manual_seed(0)
    blocks = [Block(48, 3, proj_drop=0.2 if kind == "dropout" else 0.0, drop_path=0.2) for _ in range(2)]
    network = nn.Sequential(*(AttentionFreeBlock.from_block(block, recompute=recompute) for block in blocks))
    usual = nn.Sequential(*(AttentionFreeBlock.from_block(block, recompute="none") for block in blocks))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 7, 48, requires_grad=True)
    assert_alike(gradients(compiled, x), gradients(usual, x))
    kept, whole = (saved_bytes(lambda n=n: n(x), n.parameters()) for n in (compiled, usual))
    # the compiler keeps masks of the dropouts, one byte per value, where modules would draw them again
    assert kept < whole / (3.5 if recompute == "all" else 1.8)


def test_under_timms_own_checkpointing():
    model, converted = small_vit(), convert_vit(small_vit(), (1,), recompute="all")
    expected = convert_vit(model, (1,))
    for each in (converted, expected):
        each.set_grad_checkpointing()
        each(images()).square().sum().backward()
    for ours, theirs in zip(converted.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_what_is_saved_of_modules():
    """With dropouts at work: the tokens alone, or also what the activation is applied to."""
    torch.manual_seed(0)
    block = Block(48, 3, proj_drop=0.3)
    x = torch.randn(2, 9, 48, requires_grad=True)
    kept = {
        level: saved_bytes(lambda b=b: b(x), b.parameters())
        for level in ("none", "act", "all")
        for b in (AttentionFreeBlock.from_block(block, recompute=level),)
    }
    assert kept["all"] == x.nbytes
    assert kept["act"] == 5 * x.nbytes
    assert kept["none"] > 10 * x.nbytes


@pytest.mark.parametrize(
    ("recompute", "dropout", "runs"), [("act", 0.0, (1, 1)), ("all", 0.0, (2, 1)), ("all", 0.3, (2, 2))]
)
def test_no_product_of_modules_runs_more_often_than_it_must(recompute, dropout, runs, monkeypatch):
    """The first one where it is not kept; the second one where a dropout after it wants its mask again."""
    block = AttentionFreeBlock.from_block(Block(48, 3, proj_drop=dropout), recompute=recompute, fuse=False)
    counted = {block.mlp.fc1.weight: 0, block.mlp.fc2.weight: 0}
    genuine = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = genuine(x, weight, bias)  # a run that is stopped before the product does not come back from here
        counted[weight] += 1
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    block(torch.randn(2, 5, 48, requires_grad=True)).sum().backward()
    assert tuple(counted.values()) == runs


# What it says


def said(block: nn.Module, training: bool | None = True) -> tuple[str, str]:
    found = block.recomputed(CPU, F32, training)
    return found.level, found.reason


@pytest.mark.parametrize("kind", [AttentionFreeBlock, FusedMlp])
def test_what_a_block_says(kind):
    plain = Block(48, 3)
    assert said(kind.from_block(plain)) == ("none", "'auto' leaves it to autograd where no kernel runs")
    assert said(kind.from_block(plain, recompute="none"))[0] == "none"
    for level in ("act", "all"):
        assert said(kind.from_block(plain, recompute=level)) == (level, "requested by name, by PyTorch's operators")
    dropping = kind.from_block(Block(48, 3, proj_drop=0.1), recompute="all")
    assert said(dropping) == ("all", "requested by name, by running modules twice")
    assert said(dropping.eval(), None) == ("all", "requested by name, by PyTorch's operators")
    assert said(dropping) == ("all", "requested by name, by running modules twice")
    by_kernels = kind.from_block(plain, backend="triton").to(DEVICE)
    for width, level in ((48, "all"), (288, "act")):
        wide = kind.from_block(Block(width, 3), backend="triton").to(DEVICE)
        found = wide.recomputed(torch.device(DEVICE), F32)
        assert (found.level, found.reason) == (level, f"'auto' decides by width, {width} here")
    by_kernels.recompute = "none"
    assert by_kernels.recomputed(torch.device(DEVICE), F32).level == "none"
    with pytest.raises(ValueError, match="recompute must be one of 'auto', 'none', 'act', 'all'; got 'some'"):
        kind.from_block(plain, recompute="some")


def test_auto_saves_what_autograd_saves_outside_the_kernels():
    block = AttentionFreeBlock.from_block(Block(48, 3, proj_drop=0.1))
    assert said(block)[0] == "none"
    x = torch.randn(2, 5, 48, requires_grad=True)
    assert saved_bytes(lambda: block(x), block.parameters()) > 10 * x.nbytes


class Counting(nn.Module):
    """Keeps a running number, as BatchNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return x


def add_hook(block: nn.Module) -> None:
    block.mlp.register_forward_hook(lambda module, args, output: fired.append(1))


def add_counter(block: nn.Module) -> None:
    block.mlp.norm = Counting()


def replace_forward(block: nn.Module) -> None:
    forward = block.mlp.fc1.forward
    block.mlp.fc1.forward = lambda x: fired.append(1) or forward(x)


def other_mlp(block: nn.Module) -> None:
    block.mlp = timm.layers.SwiGLUPacked(48, 96)


fired: list[int] = []


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        (add_hook, "all", "hook or a replaced forward inside the block would run twice"),
        (replace_forward, "act", "hook or a replaced forward inside the block would run twice"),
        (add_counter, "all", "the buffers of a module inside the block would be updated twice"),
        (other_mlp, "act", "mlp is GluMlp, not Mlp"),
    ],
)
def test_what_must_not_run_twice_does_not(change, level, words):
    """and the block says so; the gradients are those of the modules."""
    fired.clear()
    block = AttentionFreeBlock.from_block(Block(48, 3), recompute=level)
    change(block)
    found = said(block)
    assert found[0] == "none"
    assert found[1].startswith(f"{level!r} was requested, but ")
    assert words in found[1]
    x = torch.randn(2, 5, 48, requires_grad=True)
    block(x).sum().backward()
    assert len(fired) == (change in (add_hook, replace_forward))
    assert float(getattr(block.mlp.norm, "seen", 1.0) if hasattr(block.mlp, "norm") else 1.0) == 1.0


def test_another_mlp_can_run_twice_as_a_whole():
    block = AttentionFreeBlock.from_block(Block(48, 3), recompute="all")
    other_mlp(block)
    x = torch.randn(2, 5, 48, requires_grad=True)
    assert said(block)[0] == "all"
    assert saved_bytes(lambda: block(x), block.parameters()) == x.nbytes
    counting = AttentionFreeBlock.from_block(Block(48, 3), recompute="all")
    add_counter(counting)
    assert said(counting.eval()) == ("all", "requested by name, by running modules twice")


def test_global_hooks_and_transforms():
    block = AttentionFreeBlock.from_block(Block(48, 3, proj_drop=0.3), recompute="all")
    x = torch.randn(2, 5, 48)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert said(block)[0] == "none"
    finally:
        handle.remove()
    assert said(block)[0] == "all"
    found = []

    def function(x: torch.Tensor) -> torch.Tensor:
        found.append(said(block, None))
        torch.manual_seed(1)
        return block(x).square().sum()

    got = torch.func.grad(function)(x)
    assert found[0][0] == "none"
    assert "torch.func" in found[0][1]
    leaf = x.clone().requires_grad_()
    assert torch.allclose(got, torch.autograd.grad(function(leaf), leaf)[0], atol=1e-6)
