"""Checks of real launches without a GPU: Triton's own path from arguments to a compiled kernel, and a driver that only notes.

A program of its own, because it needs Triton without the interpreter: `python tests/kernels/ops/ln_mlp/launch_checks.py`
prints, as JSON, what each check raised, or null.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import triton

sys.path.append(str(Path(__file__).resolve().parents[4]))  # this file is run by its path

from benchmarks.support import silent_gpu
from lambda_kernels import audit, ln_mlp
from lambda_kernels.ops.ln_mlp import arguments as fused_arguments
from lambda_kernels.ops.ln_mlp import dispatch, plans
from lambda_kernels.ops.ln_mlp.fused import launch, stages, tuning

noted: list[tuple[object, tuple]] = []  # (what was compiled, the arguments handed to the launcher)


class Launcher:
    """Stands where Triton's C launcher does."""

    def __init__(self, source: object, metadata: object) -> None:
        self.source = source
        self.launch_cooperative_grid = False

    def __call__(self, *arguments: object, **options: object) -> None:
        noted.append((self.source, arguments))


class Driver(silent_gpu.Driver):
    launcher_cls = Launcher


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


class Address(int):
    """Of a tensor: a number that no size equals by chance, since it is asked for by its type."""


def plain(arguments: tuple) -> list[object]:
    """Launcher arguments that can be compared: numbers, tensors by address, descriptors by their fields."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    found: list[object] = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            found.append(Address(value.data_ptr()))
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


class Call:
    """A call of the public function with its backward, and what is handed to the launcher."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, tokens: int = 70, recompute: str = "all") -> None:
        vector = torch.randn(64, dtype=dtype)
        draw = torch.randn
        self.tensors: dict[str, torch.Tensor] = {
            "x": draw(tokens, 64, dtype=dtype), "ln_weight": vector, "ln_bias": vector, "w1": draw(64, 64, dtype=dtype),
            "b1": vector, "w2": draw(64, 64, dtype=dtype), "b2": vector,
        }  # fmt: skip
        self.grad = draw(tokens, 64, dtype=dtype)
        self.options: dict[str, object] = {"eps": 1e-6, "recompute": recompute}
        self.autocast = self.saved_elsewhere = False
        self.frozen: tuple[str, ...] = ()
        self.absent: tuple[str, ...] = ()

    def handed(self) -> list[object]:
        """What was compiled and which arguments it got: tensors that were given by name, others as "fresh"."""
        leaves = {
            n: None if n in self.absent else t.detach().requires_grad_(n not in self.frozen)
            for n, t in self.tensors.items()
        }
        noted.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: t, elsewhere if self.saved_elsewhere else lambda t: t
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast), hooks:
            out = ln_mlp(**leaves, **self.options, backend="triton")
        torch.autograd.grad(
            out, [t for t in leaves.values() if t is not None and t.requires_grad], self.grad.to(out.dtype)
        )
        # By the first name of tensors that are given twice.
        names = {t.data_ptr(): n for n, t in reversed([*self.tensors.items(), ("grad", self.grad)])}
        return [(source, [self.named(v, names) for v in plain(arguments)]) for source, arguments in noted]

    def named(self, value: object, names: dict[int, str]) -> object:
        if isinstance(value, dict):
            return value | {"base": names.get(value["base"], "fresh")}
        return names.get(value, "fresh") if isinstance(value, Address) else value


def elsewhere(t: torch.Tensor) -> torch.Tensor:
    """The same values from an address that is no multiple of 16."""
    held = torch.empty(t.numel() + 1, dtype=t.dtype)
    held[1:] = t.reshape(-1)
    return held[1:].view(t.shape)


def change(**tensors: Callable[[torch.Tensor | None], torch.Tensor]) -> Callable[[Call], None]:
    def apply(call: Call) -> None:
        for name, made in tensors.items():
            call.tensors[name] = made(call.tensors.get(name))

    return apply


# What differs from a call that was made before.
DIFFERENCES: dict[str, Callable[[Call], object]] = {
    "nothing": lambda call: None,
    "no tensor twice": change(ln_bias=torch.clone, b1=torch.randn_like, b2=torch.clone),
    "misaligned tokens": change(x=elsewhere),
    "misaligned vector": change(b2=elsewhere),
    "misaligned matrix": change(w1=elsewhere),
    "rows apart": change(x=lambda x: torch.randn(70, 128, dtype=x.dtype)[:, :64]),
    "columns apart": change(x=lambda x: torch.randn(64, 70, dtype=x.dtype).T),
    "three dimensions": lambda call: (
        call.tensors.update(x=torch.randn(2, 35, 64, dtype=call.grad.dtype)),
        setattr(call, "grad", call.grad.view(2, 35, 64)),
    ),
    "matrix the other way": change(w1=lambda w: w.T),
    "fewer tokens": lambda call: (call.tensors.update(x=call.tensors["x"][:33]), setattr(call, "grad", call.grad[:33])),
    "eps": lambda call: call.options.update(eps=1e-3),
    "residual scale": lambda call: call.options.update(residual_scale=2.0),
    "tanh": lambda call: call.options.update(approximate="tanh"),
    "a scale": change(layer_scale=lambda _: torch.ones(64, dtype=torch.bfloat16)),
    "a factor": lambda call: call.options.update(branch_scale=torch.ones(70)),
    "no bias": lambda call: setattr(call, "absent", ("b1",)),
    "misaligned gradient": lambda call: setattr(call, "grad", elsewhere(call.grad)),
    "gradient the other way": lambda call: setattr(call, "grad", torch.randn(64, 70, dtype=call.grad.dtype).T),
    "fewer gradients": lambda call: setattr(call, "frozen", ("w1", "b1")),
    "saved elsewhere": lambda call: setattr(call, "saved_elsewhere", True),
    "autocast": lambda call: setattr(call, "autocast", True),
}


def assert_the_same(first: list, second: list, what: str) -> None:
    assert [source for source, _ in first] == [source for source, _ in second], what
    for (source, one), (_, other) in zip(first, second, strict=True):
        assert one == other, (what, source.fn, one, other)


def check_plans_hand_over_what_calls_without_them_do() -> None:
    dispatch.triton_obstacles = lambda device, dtype: []
    made: list[launch.Launch] = []
    genuine = launch.Launch.run
    launch.Launch.run = lambda self: made.append(self) or genuine(self)
    one, staged = {"forward": "one_pass"}, {"forward": "staged", "fc1": "corrected", "fc2": "fused"}
    try:
        for recompute, forced, dtype in (
            ("all", one, torch.bfloat16), ("act", staged, torch.bfloat16), ("all", one, torch.float32),
        ):  # fmt: skip
            # Of float32 the launches alone are others, and they take no descriptors.
            chosen = ("nothing", "misaligned tokens", "eps") if dtype == torch.float32 else DIFFERENCES
            for what in chosen:
                with tuning.forced(**forced, hidden_gradient="fused", saved_gradient="fused"):
                    plans.clear()
                    for _ in range(2):
                        Call(dtype, recompute=recompute).handed()
                    call = Call(dtype, recompute=recompute)
                    DIFFERENCES[what](call)
                    first = call.handed()
                    made.clear()
                    again = call.handed()
                    assert not made, (what, made)  # nothing is made anew the second time
                    plans.clear()
                    anew = call.handed()
                    assert len(made) == len(anew) >= 4
                assert_the_same(first, anew, what)
                assert_the_same(again, anew, what)
    finally:
        launch.Launch.run = genuine


def check_threads_share_plans_and_no_tensors() -> None:
    dispatch.triton_obstacles = lambda device, dtype: []
    plans.clear()
    noted.clear()
    calls = [{n: t.clone() for n, t in Call().tensors.items()} for _ in range(3)]
    done: list[int] = []
    together = threading.Barrier(3)

    def work(number: int) -> None:
        together.wait(60)
        with torch.no_grad():
            for _ in range(30):
                ln_mlp(**calls[number], eps=1e-6, backend="triton")
        done.append(number)

    with tuning.forced(forward="one_pass"):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(done) == [0, 1, 2]
    assert len(noted) == 90
    owners = {t.data_ptr(): number for number, tensors in enumerate(calls) for t in tensors.values()}
    for _, arguments in noted:
        addresses = [v["base"] if isinstance(v, dict) else v for v in plain(arguments)]
        assert len({owners[a] for a in addresses if a in owners}) == 1


def check_plans_follow_settings_of_the_process() -> None:
    dispatch.triton_obstacles = lambda device, dtype: []
    call = Call(torch.float32)
    with tuning.forced(forward="one_pass"):
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            for _ in range(3):
                (source, _), *_ = call.handed()
                assert source.constants[(source.fn.arg_names.index("PRECISION"),)] == precision


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
