"""What tests of checkpoints share: a state with all that a training run may hold, bitwise comparison, and children that die."""

from __future__ import annotations

import collections
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lambda_vit.training.storage.checkpoints import Checkpoints


def sample(seed: int, size: int = 40) -> dict:
    """A state of about 4·size² bytes and as much again, different for each seed."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, seed])
    return {
        "step": seed,
        "model": collections.OrderedDict(
            weight=nn.Parameter(weight),
            view=weight[3:9, ::2],
            transposed=weight.t(),
            bf16=weight.bfloat16(),
            half=weight.half(),
            float64=weight[0].double() / 3,
            int64=torch.tensor([seed, 2**62, -1]),
            uint8=torch.arange(256, dtype=torch.uint8),
            mask=weight[0] > 0,
            empty=torch.empty(0, 7),
            special=special,
            bits=special.view(torch.int32) + 1,
        ),
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(seed)), "exp_avg": weight * 0.1}, 1: {}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "maximize": False}],
        },
        "history": [{"loss": 0.1 * seed, "top1": float("inf"), "epoch": 0}, [], ()],
        "large": 2**70 + seed,
        "name": f"λ = {seed} ⟨\0⟩",
        "nothing": None,
    }


def assert_same(found: object, expected: object, where: str = "state") -> None:
    """The same types, and in tensors the same bits; parameters come back as tensors."""
    if isinstance(expected, Tensor):
        assert type(found) is Tensor, where
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert found.stride() == expected.stride(), where
        assert not found.requires_grad, where
        bits = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (found, expected)]
        assert torch.equal(*bits), where
        return
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, item in enumerate(expected):
            assert_same(found[index], item, f"{where}[{index}]")
    else:
        assert found == expected, where


def in_a_child(work: Callable[[], int | None]) -> int:
    """What `os.waitpid` says of a process that does `work`: it exits with what that returns, or 3 after an exception."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1]


def dead_process() -> int:
    """The number of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def listing(folder: Path) -> dict[str, bytes]:
    """Names and contents of all files, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def names(*steps: int) -> list[str]:
    """What a folder with checkpoints of these steps holds, sorted."""
    return sorted(f"step-{step:09d}.{kind}" for step in steps for kind in ("json", "pt"))


def filled(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    """With `sample(step)` for each step."""
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, sample(step))
    return checkpoints
