"""The programs of the CUDA toolkit: where they are, and CUDA sources that are compiled to be loaded by themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def cuda_tool(name: str) -> str | None:
    """The path of a program such as "nvcc", on the PATH or where toolkits usually are; None if it is not installed."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(folders))


def shared_library(source: Path, folder: Path, arch: str) -> Path:
    """Compile a CUDA source that needs nothing but the toolkit, for an architecture such as "sm_90".

    Raises:
        RuntimeError: There is no nvcc, or it failed; with what it said.
    """
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not installed")
    library = folder / f"{source.stem}.so"
    command = [nvcc, "-O3", "-std=c++17", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-o", library, source]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return library
