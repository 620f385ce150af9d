"""The fused MLP on a GPU, beyond what the tests that also run without one cover.

Sizes that ViTs have, every tile that ships for this GPU, choices that are measured, autocast beside timm.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import torch
from mlp_cases import NAMES, TOLERANCES, errors, problem, relative_error
from small_models import images, small_vit

from lambda_kernels import AttentionFreeBlock, convert_vit, ln_mlp
from lambda_kernels.convert.conversion import describe_blocks
from lambda_kernels.ops.ln_mlp import dispatch, tracing
from lambda_kernels.ops.ln_mlp.fused import tuning
from lambda_kernels.ops.ln_mlp.fused.kernels import configs
from lambda_kernels.ops.ln_mlp.fused.tuning import Candidate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = "cuda"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOKENS = (8, 197)

# float32 sums of 5632 terms, one after the other, are off by 1.5e-6; TF32 would be by 3e-4.
WIDE_TOLERANCES = {**TOLERANCES, F32: 5e-6}

LIBRARY = dict.fromkeys(("fc1", "fc2", "hidden_gradient", "saved_gradient"), "library")
KERNELS = dict.fromkeys(("fc2", "hidden_gradient", "saved_gradient"), "fused")
# name → what is forced, and what has to run forward
PATHS = {
    "one_pass": ({"forward": "one_pass", **KERNELS}, ["one_pass"]),
    "corrected": ({"forward": "staged", "fc1": "corrected", **KERNELS}, ["row_statistics", "fc1", "fc2"]),
    "normalized": ({"forward": "staged", "fc1": "normalized", **KERNELS}, ["layer_norm", "fc1", "fc2"]),
    "library": ({"forward": "staged", **LIBRARY}, ["layer_norm", "library fc1", "library fc2"]),
}


@pytest.fixture(autouse=True)
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is measured unless a test asks for it, nothing read that another run measured; the file of this test."""
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", "off")
    monkeypatch.setenv("LAMBDA_KERNELS_CACHE", str(tmp_path))
    tuning.clear()
    yield tmp_path / "tuning.json"
    tuning.clear()


def names(ran: list[str]) -> list[str]:
    """What ran, without tiles."""
    return [entry if entry.startswith("library") else entry.split()[0] for entry in ran]


def assert_within(found: dict[str, float], tolerance: float) -> None:
    """Fail with whatever of `found` is beyond, NaN included."""
    wrong = {name: error for name, error in found.items() if not error <= tolerance}
    assert not wrong, f"beyond {tolerance}: {wrong}"


def architecture() -> int:
    """Of the first device; without one, what lets the cases be listed."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


# Sizes that ViTs have


def real_cases() -> list:
    """(channels, hidden, dtype, path) where the path serves the case."""
    sizes = [(192, 768), (384, 1536), (768, 3072), (1152, 4304), (1152, 4608), (1408, 5632)]
    found = []
    for channels, hidden in sizes:
        for dtype in (F32, F16, BF16):
            for path in PATHS:
                if path == "corrected" and dtype != BF16:
                    continue
                tma = configs.uses_descriptors(architecture()) and dtype != F32
                if path == "one_pass" and not configs.shipped("one_pass", architecture(), dtype, channels, tma):
                    continue
                found.append(pytest.param(channels, hidden, dtype, path, id=f"{channels}x{hidden}-{dtype}-{path}"))
    return found


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("channels", "hidden", "dtype", "path"), real_cases())
def test_real_sizes(channels, hidden, dtype, path):
    args = problem(TOKENS, channels, hidden, dtype)
    stages, forward = PATHS[path]
    for recompute in ("all",) if path == "one_pass" else ("none", "act", "all"):
        with tuning.forced(**stages), tracing.recorded() as ran:
            found = errors(args, residual_scale=2.0, recompute=recompute)
        assert names(ran)[: len(forward)] == forward
        backward = names(ran)[len(forward) :]
        assert ("library hidden_gradient" in backward) == (path == "library")
        assert ("hidden_gradient" in backward) == (path != "library")
        assert set(found) == {"out", *NAMES}
        assert_within(found, WIDE_TOLERANCES[dtype])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("path", PATHS)
def test_real_size_with_stochastic_depth(path):
    keep = (torch.rand(8, 1, generator=torch.Generator().manual_seed(0)) < 0.7).to(DEVICE, BF16) / 0.7
    with tuning.forced(**PATHS[path][0]):
        found = errors(problem(TOKENS, 192, 768, BF16), branch_scale=keep, recompute="all")
    assert_within(found, TOLERANCES[BF16])


# Every tile that ships for this GPU


def shipped_cases() -> list:
    """(kernel, method, tile, dtype, whether rows are 16-byte aligned, channels) of every shipped configuration."""
    arch = architecture()
    methods = {"one_pass": ["one_pass"], "fc1": ["corrected", "normalized"]}
    found = []
    for kernel in configs.KERNELS:
        for dtype in (F32, F16, BF16):
            for aligned in (True, False):
                tma = aligned and configs.uses_descriptors(arch) and dtype != F32
                if not aligned and (dtype == F32 or not configs.uses_descriptors(arch)):
                    continue  # the same tiles as for aligned rows
                narrow = 192 if aligned else 100
                tiles = [(narrow, tile) for tile in configs.shipped(kernel, arch, dtype, narrow, tma)]
                if kernel == "one_pass" and aligned:
                    for wide in (256, 384):
                        tiles += [(wide, tile) for tile in configs.shipped(kernel, arch, dtype, wide, tma)]
                for channels, tile in tiles:
                    for method in methods.get(kernel, ["fused"]):
                        if method == "corrected" and dtype != BF16:
                            continue
                        name = f"{kernel}-{method}-{tile}-{dtype}-{channels}".replace(" ", "-")
                        found.append(pytest.param(kernel, Candidate(method, tile), dtype, aligned, channels, id=name))
    return found


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("kernel", "candidate", "dtype", "aligned", "channels"), shipped_cases())
def test_every_shipped_tile(kernel, candidate, dtype, aligned, channels):
    """Over several tiles each way and more than one group of row tiles, the last ones ragged."""
    hidden = 520 if aligned else 470
    args = problem(1100, channels, hidden, dtype)
    stage = "forward" if kernel == "one_pass" else kernel
    forced = {**LIBRARY, "forward": "staged", stage: candidate}
    ran_as = "hidden_gradient" if kernel == "saved_gradient" else kernel
    # fc1 and the gradient are compiled differently where p is stored or given.
    for recompute in {"fc1": ("act", "all"), "saved_gradient": ("act",)}.get(kernel, ("all",)):
        with tuning.forced(**forced), tracing.recorded() as ran:
            found = errors(args, residual_scale=2.0, recompute=recompute)
        assert f"{ran_as} {candidate.config}" in ran
        assert_within(found, TOLERANCES[dtype])
    if kernel == "one_pass":  # and differently again where no statistics are saved
        with tuning.forced(**forced), tracing.recorded() as ran:
            found = errors({name: t.detach() for name, t in args.items()}, residual_scale=2.0)
        assert ran == [f"one_pass {candidate.config}"]
        assert_within(found, TOLERANCES[dtype])


# What is chosen, and what it is worth


def test_auto_takes_the_kernels():
    assert dispatch.choose(torch.device(DEVICE, 0), BF16).backend == "triton"
    with tracing.recorded() as ran:
        found = errors(problem(50, 192, 384, BF16), backend="auto")
    assert {"hidden_gradient", "layer_norm_input"} < set(names(ran))
    assert_within(found, TOLERANCES[BF16])


def test_a_converted_model_says_and_does_so():
    model = convert_vit(small_vit(), remove=(1,))
    assert {row.mlp for row in describe_blocks(model)} == {"torch"}
    model = model.to(DEVICE)
    assert {row.mlp for row in describe_blocks(model)} == {"triton"}
    with tracing.recorded() as ran, torch.no_grad():
        model(images().to(DEVICE))
    assert len([name for name in names(ran) if name in ("one_pass", "fc2")]) == 4


def forbidden(run: object) -> float:
    raise AssertionError("nothing is to be measured here")


def test_choices_are_measured_and_kept(unmeasured, monkeypatch):
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", "on")
    args = problem((4, 197), 192, 768, BF16)

    def step() -> dict[str, tuning.Decision]:
        found = errors(args, recompute="all")
        assert_within(found, TOLERANCES[BF16])
        return {decision.problem.stage: decision for decision in tuning.decisions()}

    measured = step()
    assert set(measured) == {"forward", "fc1", "fc2", "hidden_gradient"}
    for decision in measured.values():
        times = decision.times_us
        assert decision.source == "measured"
        assert len(times) > 2
        # Times are kept to 0.01 µs.
        assert times[str(decision.candidate)] <= 1.02 * min(times.values()) + 0.02
        assert ("library" in times) == (decision.problem.stage != "forward")

    entries = json.loads(unmeasured.read_text(encoding="utf-8"))["entries"]
    assert len(entries) == 4
    for stage, decision in measured.items():
        (entry,) = [value for key, value in entries.items() if f"| {stage}, 1024 tokens, channels 192" in key]
        assert entry == {"candidate": str(decision.candidate), "times_us": decision.times_us}

    tuning.clear()  # as a new process would begin
    monkeypatch.setattr(tuning, "_measure", forbidden)
    again = step()
    assert {"forward", "hidden_gradient"} <= set(again)
    for stage, decision in again.items():
        assert (decision.source, decision.candidate) == ("cache file", measured[stage].candidate)


def test_what_is_measured_is_the_device():
    x = torch.randn(1024, 1024, device="cuda")

    def run() -> None:
        time.sleep(2e-3)  # in the host
        torch.mm(x, x)

    assert 1 < tuning._measure(run) < 1000


@pytest.mark.parametrize(("channels", "recompute"), [(192, "all"), (768, "act"), (768, "none")])
def test_gradients_do_not_change_from_run_to_run(channels, recompute):
    args = problem(50_432, channels, 4 * channels, BF16)
    grad = torch.randn_like(args["x"])

    def gradients() -> tuple[torch.Tensor, ...]:
        out = ln_mlp(**args, eps=1e-6, recompute=recompute, backend="triton")
        return out.detach(), *torch.autograd.grad(out, list(args.values()), grad)

    first = gradients()
    assert all(t.isfinite().all() and t.any() for t in first)
    for _ in range(2):
        for name, a, b in zip(("out", *NAMES), first, gradients(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("channels", [192, 768])
@pytest.mark.parametrize("forced", [{}, PATHS["library"][0]], ids=["kernels", "library"])
def test_autocast_is_as_exact_as_timm(channels, forced):
    """The branch and every gradient, each against float64, for both; only the residual is added more exactly here."""
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    block = Block(channels, 3).to(DEVICE)
    exact = copy.deepcopy(block).double()
    ours = AttentionFreeBlock.from_block(copy.deepcopy(block), backend="triton")
    x = torch.randn(8, 197, channels, device=DEVICE, requires_grad=True)
    grad = torch.randn_like(x)

    def half(of: Block, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + of.mlp(of.norm2(tokens))

    def results(out: torch.Tensor, tokens: torch.Tensor, of: torch.nn.Module) -> list[torch.Tensor]:
        inputs = [tokens, *of.norm2.parameters(), *of.mlp.parameters()]
        return [(out - tokens).detach(), *torch.autograd.grad(out, inputs, grad.to(out))]

    with torch.autocast(DEVICE, BF16), tuning.forced(**forced), tracing.recorded() as ran:
        mine = results(ours(x), x, ours)
        theirs = results(half(block, x), x, block)
    assert ("library hidden_gradient" if forced else "hidden_gradient") in names(ran)
    wide = x.detach().double().requires_grad_()
    true = results(half(exact, wide), wide, exact)
    for a, b, expected in zip(mine, theirs, true, strict=True):
        assert a.dtype == b.dtype == F32
        error, usual = relative_error(a, expected), relative_error(b, expected)
        assert usual < TOLERANCES[BF16]
        assert error < 1.5 * usual
