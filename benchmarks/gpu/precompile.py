"""Compile what the benchmarks measure, in several processes at once: a process compiles one kernel at a time.

    python benchmarks/gpu/precompile.py [--workers 12] [--stamps DIR]

Fills Triton's cache on disk; results are thrown away. Run before a benchmark on a machine whose time is short. Each kernel
leaves a stamp in DIR once it was tried, with what went wrong in it, and is not tried again; after the last, so does "complete".
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

WIDTHS = (192, 384, 768)
TOKENS = 64
LIBRARY = {"forward": "staged", **dict.fromkeys(("fc1", "fc2", "hidden_gradient", "saved_gradient"), "library")}

# (channels, what is forced, whether with gradients)
Job = tuple[int, dict[str, object], bool]


def jobs(arch: int) -> list[Job]:
    """One for every kernel that tuning compares at these widths; all but one stage are the library's, which is compiled."""
    import torch

    from lambda_kernels.ops.ln_mlp.function import resolve_recompute
    from lambda_kernels.ops.ln_mlp.fused.kernels import configs
    from lambda_kernels.ops.ln_mlp.fused.tuning import Candidate

    tma = configs.uses_descriptors(arch)
    found = []
    for channels in WIDTHS:
        recomputed = resolve_recompute("auto", channels) == "all"
        gradient = "hidden_gradient" if recomputed else "saved_gradient"
        # (kernel, stage, methods, with gradients or not: where both are listed, they are compiled differently)
        stages = [
            ("one_pass", "forward", ["one_pass"], (False, True) if recomputed else (False,)),
            ("fc1", "fc1", ["corrected", "normalized"], (False,) if recomputed else (False, True)),
            ("fc2", "fc2", ["fused"], (False,)),
            (gradient, gradient, ["fused"], (True,)),
        ]
        for kernel, stage, methods, modes in stages:
            for tile in configs.shipped(kernel, arch, torch.bfloat16, channels, tma):
                for method in methods:
                    forced = {**LIBRARY, stage: Candidate(method, tile)}
                    found += [(channels, forced, gradients) for gradients in modes]
    return found


def stamp_of(job: Job, stamps: Path) -> Path:
    """The file that says that a kernel was tried."""
    return stamps / hashlib.sha256(repr(job).encode()).hexdigest()[:16]


def tried(job: Job, stamps: Path) -> None:
    """Compile a kernel and leave its stamp."""
    stamp_of(job, stamps).write_text(compiled(job), encoding="utf-8")


def compiled(job: Job) -> str:
    """Run it once; returns what went wrong."""
    import torch

    from lambda_kernels import ln_mlp
    from lambda_kernels.ops.ln_mlp.fused import tuning

    channels, forced, gradients = job
    shapes = [(TOKENS, channels), (channels,), (channels,), (4 * channels, channels), (4 * channels,)]
    shapes += [(channels, 4 * channels), (channels,)]
    tensors = [torch.randn(s, dtype=torch.bfloat16, device="cuda", requires_grad=gradients) for s in shapes]
    try:
        with tuning.forced(**forced):
            out = ln_mlp(*tensors, eps=1e-6, backend="triton")
            if gradients:
                out.float().sum().backward()
        torch.cuda.synchronize()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{channels} channels, {', '.join(f'{k} {v}' for k, v in forced.items() if v != 'library')}: {reason}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 if anything did not compile or run."""
    parser = argparse.ArgumentParser(prog="precompile.py", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--stamps", type=Path, help="folder for the stamps; without it all kernels are tried")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("precompile.py: no CUDA device", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    os.environ["LAMBDA_KERNELS_TUNING"] = "off"
    with tempfile.TemporaryDirectory() as scratch:
        return precompile(jobs(10 * major + minor), options.stamps or Path(scratch), options.workers)


def precompile(wanted: list[Job], stamps: Path, workers: int) -> int:
    """Try all that have no stamp yet; returns 1 if anything did not compile or run, or was not tried."""
    started = time.monotonic()
    stamps.mkdir(parents=True, exist_ok=True)
    todo = [job for job in wanted if not stamp_of(job, stamps).exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(functools.partial(tried, stamps=stamps), todo))
    failures = [text for job in wanted if (text := stamp_of(job, stamps).read_text(encoding="utf-8"))]
    (stamps / "complete").touch()
    for failure in failures:
        print(failure)
    taken = time.monotonic() - started
    print(f"{len(todo)} of {len(wanted)} kernels in {taken:.0f} s, the others before; {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
