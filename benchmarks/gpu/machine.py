"""What a run on a GPU depends on: the device, the compiled extension, the versions, the sources, the environment of commands.

python benchmarks/gpu/machine.py        what only a process that loads PyTorch can tell, as JSON
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.gpu.execution import execute
from benchmarks.support.toolkit import cuda_tool
from benchmarks.tools import records
from benchmarks.tools.records import REPOSITORY

# What a run imports beside `records.PACKAGES`.
OTHERS = ("torchvision", "safetensors", "filelock", "platformdirs", "pytest", "pytest-benchmark", "pytest-xdist")


def facts() -> dict[str, object]:
    """About this process's device and extension; imports all that parts of a run need, so that what is missing shows."""
    import torch

    if not torch.cuda.is_available():
        return {"cuda": False}
    import pytest
    import pytest_benchmark
    import timm
    from triton.backends.nvidia.compiler import get_ptxas

    from lambda_kernels.ops.histogram import _extension, histogram_backend
    from lambda_kernels.ops.ln_mlp.fused import tuning

    del pytest, pytest_benchmark, timm, tuning
    major, minor = torch.cuda.get_device_capability()
    try:
        ptxas = get_ptxas(10 * major + minor).path
    except Exception:  # which of them Triton takes is told by other means in other releases
        ptxas = ""
    used, reason = histogram_backend("cuda", torch.float32)
    return {
        "cuda": True,
        "capability": f"{major}.{minor}",
        "ptxas": ptxas if Path(ptxas).is_file() else "",
        "obstacle": None if used == "extension" else reason,
        "extension": _extension.build_info() if _extension.available() else None,
    }


def asked(environment: dict[str, str]) -> dict[str, object]:
    """`facts`, from another process: this one takes no part of the device's memory, and sees a new build.

    Raises:
        RuntimeError: Something that is needed cannot be imported; with what that process said.
    """
    step = execute([sys.executable, str(Path(__file__).resolve())], 90, environment)
    if not step.ok:
        raise RuntimeError((step.output.strip().splitlines() or ["PyTorch does not load within 90 s"])[-1])
    return json.loads(step.output.strip().splitlines()[-1])


def extension_obstacle(found: dict[str, object]) -> str | None:
    """Why the extension that `facts` describe does not do: it has no code for the device, or is of other sources."""
    if found["obstacle"]:
        return str(found["obstacle"])
    spec = importlib.util.spec_from_file_location("lambda_kernels_setup", REPOSITORY / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    built, wanted = found["extension"]["sources"], setup.sources_digest(REPOSITORY)
    return (
        None if built == wanted else f"the extension was built of other sources: their digest is {built}, not {wanted}"
    )


def source_digest() -> str:
    """Of everything that is compiled or timed, since a copied tree may have no history to name it by."""
    digest = hashlib.sha256()
    for folder, pattern in (("lambda_kernels", "*.py"), ("csrc", "*"), ("benchmarks", "*.py"), ("benchmarks", "*.cu")):
        for path in sorted((REPOSITORY / folder).rglob(pattern)):
            if path.is_file():
                digest.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _said(*command: str) -> str:
    return execute(list(command), 20, dict(os.environ)).output.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe(commit: str | None, ptxas: str) -> dict[str, object]:
    """The machine, the versions and the state of the sources; `ptxas` is the assembler of the kernels."""
    release = re.search(r"release [\d.]+, V[\d.]+", _said(cuda_tool("nvcc") or "nvcc", "--version"))
    assembler = re.search(r"V[\d.]+", _said(ptxas, "--version")) if ptxas else None
    return {
        **records.describe(commit),
        "packages": ", ".join(f"{name} {_version(name)}" for name in OTHERS),
        "nvcc": release[0] if release else "none",
        "ptxas": f"{ptxas} {assembler[0]}" if assembler else ptxas or "unknown",
        "sources": source_digest(),
    }


def child_environment() -> dict[str, str]:
    """For every command: the sources importable, a cache for temporary files unless one was named."""
    environment = dict(os.environ)
    paths = [str(REPOSITORY), str(REPOSITORY / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment.setdefault("LAMBDA_KERNELS_CACHE", str(Path(tempfile.gettempdir()) / "lambda_kernels_gpu"))
    return {**environment, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def tuned(environment: dict[str, str]) -> object:
    """What was measured about the kernels, as their cache holds it."""
    path = Path(environment["LAMBDA_KERNELS_CACHE"]) / "tuning.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    print(json.dumps(facts()))
