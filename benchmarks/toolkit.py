"""Where the programs of the CUDA toolkit are."""

from __future__ import annotations

import os
import shutil


def cuda_tool(name: str) -> str | None:
    """The path of a program such as "nvcc", on the PATH or where toolkits usually are; None if it is not installed."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(folders))
