"""One small run of one kernel, alone or watched by compute-sanitizer:

    python tests/gpu/one_kernel.py staged
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/one_kernel.py staged

Without that variable PyTorch hands out parts of larger allocations, and an access just beyond a tensor goes unseen. Exits
with 3 if the result is wrong, with 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "support" / "kernels"))

from mlp_cases import NAMES, TOLERANCES, in_float64, problem, relative_error

from benchmarks.support.toolkit import shared_library
from lambda_kernels import ln_mlp
from lambda_kernels.ops.histogram import _extension as _extension
from lambda_kernels.ops.ln_mlp import reference as reference
from lambda_kernels.ops.ln_mlp import tracing as tracing
from lambda_kernels.ops.ln_mlp.fused import tuning as tuning

DTYPE = torch.bfloat16
LIBRARY = dict.fromkeys(("fc1", "fc2", "hidden_gradient", "saved_gradient"), "library")

# name → (what is forced, recompute or None for the forward alone, what has to run)
MLP = {
    "one_pass": ({"forward": "one_pass"}, None, {"one_pass"}),
    "staged": ({"forward": "staged", "fc1": "corrected", "fc2": "fused"}, None, {"row_statistics", "fc1", "fc2"}),
    "normalized": ({"forward": "staged", "fc1": "normalized", "fc2": "fused"}, None, {"layer_norm", "fc1", "fc2"}),
    "backward_all": (
        {**LIBRARY, "forward": "staged", "hidden_gradient": "fused"},
        "all",
        {"layer_norm", "hidden_gradient", "layer_norm_input"},
    ),
    "backward_act": (
        {**LIBRARY, "forward": "staged", "saved_gradient": "fused"},
        "act",
        {"layer_norm", "hidden_gradient", "layer_norm_input"},
    ),
    "elementwise": ({**LIBRARY, "forward": "staged"}, "all", {"elementwise", "layer_norm_input"}),
}
# kernel → name of a problem → (per channel, layer or sample by its number, bins, dtype, tensors); "rows": neighbours in
# memory are those of a column. Tables in less and in more than 48 KiB of shared memory, and in device memory.
HISTOGRAM = {
    "histogram_columns": {
        "a tile and a bit": (0, 256, torch.float32, [(2, 501, 33), (1, 70, 64)]),
        "narrow tables": (0, 3000, torch.bfloat16, [(1, 501, 33)]),
        "device memory": (0, 65536, torch.float16, [(1, 301, 3)]),
        "float64": (0, 64, torch.float64, [(3, 101, 35)]),
    },
    "histogram_lanes": {
        "a layer": (1, 256, torch.bfloat16, [(2, 501, 33), (1, 70, 64)]),
        "samples": (2, 1000, torch.float32, [(3, 401, 32)]),
        "rows": (0, 256, torch.float16, [(1, 5, 3001)]),
    },
    "histogram_codes": {
        "channels": (0, 10240, torch.bfloat16, [(1, 999, 9)]),
        "a layer": (1, 10240, torch.bfloat16, [(1, 999, 9)]),
    },
    "histogram_moments": {
        "channels": (0, 0, torch.float32, [(2, 501, 33), (1, 0, 7)]),
        "samples": (2, 0, torch.float64, [(5, 501, 33)]),
    },
}
PLANTED, PLANTED_RACE = "planted", "planted_race"
KERNELS = (*MLP, *HISTOGRAM, PLANTED, PLANTED_RACE)

# Ragged in every direction; rows that descriptors can address, and rows that go through pointers.
SIZES = ((70, 192, 264), (70, 100, 90))


@triton.jit
def planted(x, N: tl.constexpr):  # x [N / 2]
    """Writes beyond `x`: what compute-sanitizer has to find, or its silence about the others says nothing."""
    tl.store(x + tl.arange(0, N), 1.0)


def run_planted(device: str) -> dict[str, float]:
    """Without compute-sanitizer nothing happens: the memory behind the tensor is nobody's."""
    x = torch.zeros(32, device=device)
    planted[(1,)](x, 64)
    return {"written": float((x != 1).double().mean())}


RACE = """
__global__ void racing(float* out) {
  __shared__ float cells[64];
  cells[threadIdx.x] = 1.0f + threadIdx.x;
  out[threadIdx.x] = cells[63 - threadIdx.x];  // of the other warp, which nobody waited for
}
extern "C" int race(float* out) {
  racing<<<1, 64>>>(out);
  return static_cast<int>(cudaDeviceSynchronize());
}
"""


def build_planted_race(folder: Path, arch: str) -> Path:
    """Compile the kernel whose race racecheck has to find, for an architecture such as "sm_90"."""
    source = folder / "race.cu"
    source.write_text(RACE, encoding="utf-8")
    return shared_library(source, folder, arch)


def run_planted_race(device: str) -> dict[str, float]:
    """What comes out is chance, and nobody looks at it."""
    out = torch.zeros(64, device=device)
    with tempfile.TemporaryDirectory() as folder:
        major, minor = torch.cuda.get_device_capability()
        race = ctypes.CDLL(str(build_planted_race(Path(folder), f"sm_{major}{minor}"))).race
        race.argtypes = [ctypes.c_void_p]
        return {"error": float(race(out.data_ptr()))}


def run_mlp(kernel: str, device: str) -> dict[str, float]:
    """Relative errors against float64, which is computed on the CPU so that nothing else runs on the device."""
    forced, recompute, kernels = MLP[kernel]
    found = {}
    for tokens, channels, hidden in SIZES:
        args = problem(tokens, channels, hidden, DTYPE, device=device)
        keep = torch.linspace(0.5, 2.0, tokens)
        grad = problem(tokens, channels, 1, DTYPE, device=device, seed=1)["x"].detach()
        if recompute is None:
            args = {name: t.detach() for name, t in args.items()}
        with tuning.forced(**forced), tracing.recorded() as ran:
            out = ln_mlp(
                **args,
                eps=1e-5,
                residual_scale=2.0,
                branch_scale=keep.to(device),
                recompute=recompute or "auto",
                backend="triton",
            )
            got = [out.detach()]
            if recompute is not None:
                got += torch.autograd.grad(out, list(args.values()), grad)
        missing = kernels - {entry.split()[0] for entry in ran}
        if missing:
            raise RuntimeError(f"{', '.join(sorted(missing))} did not run, but {', '.join(ran)}")
        twins = {name: t.cpu() for name, t in in_float64(args).items()}
        twins = {name: t.detach().requires_grad_(recompute is not None) for name, t in twins.items()}
        true = reference.ln_mlp(**twins, eps=1e-5, residual_scale=2.0, branch_scale=keep.double())
        expected = [true.detach()]
        if recompute is not None:
            expected += torch.autograd.grad(true, list(twins.values()), grad.cpu().double())
        for name, a, b in zip(("out", *NAMES), got, expected, strict=False):
            found[f"{name} of {channels} channels"] = relative_error(a.cpu(), b)
    return found


def run_histogram(kernel: str, device: str) -> dict[str, float]:
    """How many counts and moments are wrong, against the same operator on the CPU."""
    _extension.load()
    found = {}
    for name, (per, bins, dtype, tensors) in HISTOGRAM[kernel].items():
        x = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) for shape in tensors]
        x = [t.transpose(1, 2) if name == "rows" else t for t in x]
        rows = sum((t.shape[2], 1, t.shape[0])[per] for t in x)
        grid = torch.tensor([-2.0, bins / 4.0, 0.0, math.nan], dtype=torch.float64).repeat(rows, 1)
        grid = grid if bins and kernel != "histogram_codes" else None
        only = torch.arange(rows) % 3 != 1

        got, expected = (
            torch.ops.lambda_kernels.histogram(
                [t.to(place) for t in x], None if grid is None else grid.to(place), bins, per, True, only.to(place)
            )
            for place in (device, "cpu")
        )
        found[f"counts of {name}"] = float((got[0].cpu() != expected[0]).double().sum())
        found[f"outside of {name}"] = float((got[1].cpu() != expected[1]).double().sum())
        columns = [0, 1, 2, 5, 6]  # not the low parts, which are what other sums round off
        close = torch.isclose(got[2].cpu()[:, columns], expected[2][:, columns], rtol=1e-10, atol=1e-12, equal_nan=True)
        found[f"moments of {name}"] = float((~close).double().sum())
    return found


def main(arguments: list[str] | None = None, device: str = "cuda") -> int:
    """The command; `device` is for trying it where there is none."""
    parser = argparse.ArgumentParser(prog="one_kernel.py", description=__doc__.split("\n")[0])
    parser.add_argument("kernel", choices=KERNELS)
    kernel = parser.parse_args(arguments).kernel
    if device == "cuda" and not torch.cuda.is_available():
        print("one_kernel.py: no CUDA device", file=sys.stderr)
        return 2
    os.environ["LAMBDA_KERNELS_TUNING"] = "off"
    if kernel in MLP:
        found = run_mlp(kernel, device)
    elif kernel in HISTOGRAM:
        found = run_histogram(kernel, device)
    else:
        found = run_planted(device) if kernel == PLANTED else run_planted_race(device)
    limit = TOLERANCES[DTYPE] if kernel in MLP else 0.0
    wrong = {name: error for name, error in found.items() if not error <= limit}
    print(f"{kernel}: {len(found)} results, {f'wrong: {wrong}' if wrong else 'all right'}")
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
