"""Checks of real launches without a GPU: Triton's own path from arguments to a compiled kernel, and a driver that only notes.

A program of its own, because it needs Triton without the interpreter: `python tests/kernels/ops/ln_mlp/launch_checks.py`
prints, as JSON, what each check raised, or null.
"""

from __future__ import annotations

import json
import sys
import traceback

import torch
import triton
from triton.backends.compiler import GPUTarget

from lambda_kernels import audit
from lambda_kernels.ops.ln_mlp import arguments as fused_arguments
from lambda_kernels.ops.ln_mlp.fused import launch, stages, tuning

noted: list[tuple[object, tuple]] = []  # (what was compiled, the arguments handed to the launcher)


class Launcher:
    """Stands where Triton's C launcher does."""

    def __init__(self, source: object, metadata: object) -> None:
        self.source = source
        self.launch_cooperative_grid = False

    def __call__(self, *arguments: object, **options: object) -> None:
        noted.append((self.source, arguments))


class Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, *arguments: object) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024


class Driver:
    """An sm_90 that launches nothing. Tensors on the CPU serve as those of the device."""

    launcher_cls = Launcher
    utils = Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def problem(
    tokens: int = 70, channels: int = 64, hidden: int = 64, dtype: torch.dtype = torch.bfloat16, **changes: object
) -> tuple[torch.Tensor, fused_arguments.Parameters, fused_arguments.Options]:
    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype)

    c, h = draw(channels), draw(hidden)
    parameters = fused_arguments.Parameters(c, c, draw(hidden, channels), h, draw(channels, hidden), c, None, None)
    parameters = parameters._replace(**changes)
    return draw(tokens, channels), parameters, fused_arguments.Options(1e-6, 2.0, "none")


def forward_and_backward(
    save: str, x: torch.Tensor, p: fused_arguments.Parameters, o: fused_arguments.Options
) -> list[launch.Launch]:
    """The launches, as they were made."""
    made: list[launch.Launch] = []
    genuine = launch.Launch.run

    def run(self: launch.Launch) -> None:
        made.append(self)
        genuine(self)

    launch.Launch.run = run
    try:
        _, saved = stages.forward(x, p, o, save)
        needs = fused_arguments.Needs(*(t is not None for t in (x, *p[:7])))
        stages.backward(torch.randn_like(x), x, p, o, saved, needs)
    finally:
        launch.Launch.run = genuine
    return made


def check_what_runs_is_what_the_audit_compiles() -> None:
    for save, forced, dtype in (
        ("all", {"forward": "one_pass"}, torch.bfloat16),
        ("act", {}, torch.bfloat16),
        ("all", {"forward": "staged", "fc1": "normalized", "hidden_gradient": "library"}, torch.float32),
    ):
        noted.clear()
        with tuning.forced(**forced):
            made = forward_and_backward(
                save, *problem(dtype=dtype, layer_scale=torch.ones(64, dtype=dtype), branch_scale=torch.ones(70))
            )
        assert len(made) == len(noted) >= 4
        for launched, (source, _) in zip(made, noted, strict=True):
            signature, constants, attributes = audit.source(launched)
            assert source.fn is launched.kernel
            assert {k: v.replace(" ", "") for k, v in source.signature.items()} == signature, (
                source.signature,
                signature,
            )
            names = launched.kernel.arg_names
            assert {names[k[0]]: v for k, v in source.constants.items()} == constants, (source.constants, constants)
            assert {k: v for k, v in source.attrs.items() if v} == attributes, (launched.name, source.attrs, attributes)


def plain(arguments: tuple) -> list[object]:
    """Launcher arguments that can be compared: numbers, tensors by address, descriptors by their fields."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    found: list[object] = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            found.append(value.data_ptr())
        elif isinstance(value, TensorDescriptor):
            found.append({k: v.data_ptr() if k == "base" else v for k, v in vars(value).items()})
        elif isinstance(value, (int, float, str, type(None))):
            found.append(value)
    return found


def check_the_short_way_hands_over_the_same() -> None:
    x, p, o = problem(branch_scale=torch.ones(70))
    with tuning.forced(forward="one_pass"):
        launch._compiled.clear()
        noted.clear()
        out, mean, rstd = torch.empty_like(x), torch.empty(70), torch.empty(70)
        config = stages._tiles("one_pass", "one_pass", x=x, p=p, tma=True)[0].config
        for _ in range(2):
            launch.one_pass(x, p, o, out, mean, rstd, config=config, tma=True).run()
    assert len(launch._compiled) == 1
    (first, anew), (second, again) = noted
    assert first is second
    assert plain(anew) == plain(again)
    assert sum(isinstance(value, dict) for value in plain(again)) == 4


def check_what_makes_another_kernel_and_what_does_not() -> None:
    def count(x: torch.Tensor, p: fused_arguments.Parameters, o: fused_arguments.Options) -> int:
        with tuning.forced(forward="one_pass"):
            stages.forward(x, p, o, "nothing")
        return len(launch._compiled)

    launch._compiled.clear()
    shape = {"channels": 16, "hidden": 32}
    assert count(*problem(**shape)) == 1
    for tokens in (1, 16, 64, 71, 5000):
        assert count(*problem(tokens, **shape)) == 1
    x, p, o = problem(**shape)
    assert count(x, p, fused_arguments.Options(1e-5, 1.0, "none")) == 1
    assert count(x, p, fused_arguments.Options(1e-5, 1.0, "tanh")) == 2
    assert count(*problem(**shape, b2=None)) == 3
    assert count(*problem(**shape, b2=torch.ones(17, dtype=torch.bfloat16)[1:])) == 4  # not 16-byte aligned
    assert count(*problem(**shape, b2=torch.ones(16))) == 5  # another dtype
    assert (
        count(torch.randn(70, 24, dtype=torch.bfloat16)[:, :16], p, o) == 6
    )  # rows of 48 bytes: no multiple of 16 values
    assert count(torch.randn(70, 32, dtype=torch.bfloat16)[:, :16], p, o) == 6  # of 64, as those of 32


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    torch.set_num_threads(1)
    results = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
