"""The environment of a run: versions, devices, the extension, and the backend of each operator."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys

import torch

from lambda_kernels._version import __version__
from lambda_kernels.ops.checks import dtype_name
from lambda_kernels.ops.histogram import _extension
from lambda_kernels.ops.histogram.function import histogram_backend
from lambda_kernels.ops.ln_mlp.dispatch import choose, onednn_obstacles


def versions() -> dict[str, str]:
    """Versions of everything that a result can depend on, for a report."""
    return {
        "lambda-kernels": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "timm", "torchvision")},
        "device": "; ".join(devices()),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "extension": extension(),
    }


def devices() -> list[str]:
    """Every device of PyTorch, with its name and memory."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.backends.mps.is_available():
        found.append("mps")
    found.append(f"cpu ({torch.backends.cpu.get_cpu_capability()})")
    return found


def extension() -> str:
    """How the compiled extension was built, or why it is not available."""
    reason = _extension.why_unavailable()
    if reason is not None:
        return f"not available: {reason}"
    return ", ".join(f"{key} {value}" for key, value in _extension.build_info().items())


def backends() -> list[dict[str, str]]:
    """The backend of every operator on each device for each dtype, and why; then backends that run only on request."""
    kinds = [torch.device("cuda")] if torch.cuda.is_available() else []
    kinds.append(torch.device("cpu"))
    rows = []
    for device in kinds:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            choice = choose(device, dtype)
            name, reason = histogram_backend(device, dtype, "auto")
            chosen = [("ln_mlp", choice.backend, choice.reason), ("histogram", name, reason)]
            if device.type == "cpu":
                obstacles = onednn_obstacles(device, dtype)
                by_name = f"not available: {'; '.join(obstacles)}" if obstacles else "available, for inference"
                chosen.append(("ln_mlp", "onednn", f"only where backend='onednn' asks for it: {by_name}"))
            where = {"device": device.type, "dtype": dtype_name(dtype)}
            for operator, backend, why in chosen:
                rows.append({"operator": operator, **where, "backend": backend, "reason": why})
    # Stable: the dtypes of one operator and device stay in their order.
    return sorted(
        rows, key=lambda row: (row["operator"] != "ln_mlp", row["device"] != "cuda", row["backend"] == "onednn")
    )


def not_exercised(device: torch.device) -> list[str]:
    """What a run on `device` cannot test, for the end of a report."""
    found = []
    choice = choose(device, torch.float32)
    if choice.backend != "triton":
        found.append(f"fused Triton kernels: ln_mlp ran as {choice.backend} ({choice.reason})")
    if device.type != "cuda":
        found.append("anything on a GPU: its speed, memory and rounding")
        reason = _extension.why_unavailable()
        if reason is not None:
            found.append(f"the compiled extension: {reason}")
        elif "none" in _extension.build_info().get("cuda", "none"):
            found.append("the CUDA half of the extension: it was not built")
        else:
            found.append("the CUDA half of the extension: it was built, but there is no device to run it on")
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def command_line() -> str:
    """The command line of this process, quoted for a shell, for a report."""
    folder, name = os.path.split(sys.argv[0])
    # With `python -m package`, this is the path of the package's __main__.py.
    program = ["python", "-m", os.path.basename(folder)] if name == "__main__.py" else [name]
    return shlex.join([*program, *sys.argv[1:]])
