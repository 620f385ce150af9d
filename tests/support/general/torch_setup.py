"""PyTorch and Triton as every process of the tests needs them: importing this sets them up."""

from __future__ import annotations

import contextlib
import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this variable while it is imported; afterwards
# its own switch takes over, and processes that tests start know nothing of it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # there is no Triton for macOS and Windows
        import triton

        triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]

# The models are tiny: a second thread gains nothing, and waiting for it costs a factor of ten where a core is busy.
torch.set_num_threads(1)

# Autograd starts a thread for every GPU at the first backward of a process, whose forked children cannot train any more. Once
# torch.compile or torch.export has traced anything it finds GPUs where there are none (FakeTensorMode makes them up). What
# the first backward finds is final, so it comes before them.
torch.ones((), requires_grad=True).backward()


def interpreter_obstacle(triton_version: str, numpy_version: str) -> str:
    """Why Triton's interpreter cannot run the kernels with this NumPy; empty where it can."""
    old = tuple(map(int, triton_version.split(".")[:2])) < (3, 7)
    if not old or tuple(map(int, numpy_version.split(".")[:2])) < (2, 4):
        return ""
    return (
        f"Triton {triton_version}'s interpreter does not work with NumPy {numpy_version}, and there is no GPU to run the "
        "kernels on: pip install 'numpy<2.4', or Triton 3.7 or later"
    )
