"""Processes that run beside each other, as the tests of several processes start them."""

from __future__ import annotations

import os
import subprocess
import sys

from places import REPOSITORY, SUPPORT

ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "python", *SUPPORT))),
}  # fmt: skip


def launch(commands: list[list[object]], *environments: dict[str, str]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of processes that run beside each other."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, *map(str, command)], **pipes, env=ENVIRONMENT | own)
        for command, own in zip(commands, environments or [{}] * len(commands), strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
