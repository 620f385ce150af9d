"""A GPU that computes nothing: Triton compiles and launches for an sm_90, and the launch returns at once.

What remains is host time: everything between a call in Python and the driver, Triton's own launcher and its tensor maps
included. Tensors are on the CPU, where what `torch.empty` returns serves as the kernels' results: no value means anything, so
that nothing can be verified with it, and library products between kernels compute on the processor. Sizes have to be tiny.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from lambda_kernels.ops.ln_mlp import dispatch, plans
from lambda_kernels.ops.ln_mlp.fused import launch
from lambda_kernels.ops.ln_mlp.fused.kernels import backward, forward


def _launch_nothing(*arguments: object) -> None:
    pass


class _Launcher:
    """Triton's handling of arguments around a launch that does nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        signature = dict(enumerate(source.signature.values()))
        described = getattr(metadata, "tensordesc_meta", None)
        self.launch = nvidia.wrap_handle_tensordesc(_launch_nothing, signature, described)
        self.launch_cooperative_grid = False
        # Before Triton 3.7, kernel arguments are the last ones of the launch; since then they are one tuple.
        self.is_flat = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)

    def __call__(self, *arguments: Any) -> None:
        grid, (stream, function, packed, launched, enter, leave) = arguments[:3], arguments[3:9]
        if self.is_flat:
            self.launch(
                *grid, stream, function, False, False, packed, launched, enter, leave, None, None, *arguments[9:]
            )
        else:
            self.launch(
                *grid, stream, function, False, False, packed, launched, enter, leave, None, None, None, None,
                arguments[9:],
            )  # fmt: skip


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, *arguments: object) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def fill_tma_descriptor(self, *arguments: object) -> int:
        return 0

    def fill_tma_descriptor_tiled(self, *arguments: object) -> int:
        return 0


class Driver:
    """Triton's driver of an sm_90 that does not exist."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def silent_gpu() -> Iterator[None]:
    """Inside, kernels requested by name run on CPU tensors, which is to say that they are launched and compute nothing."""
    genuine = dispatch.triton_obstacles
    _forget_kernels()
    triton.runtime.driver.set_active(Driver())
    dispatch.triton_obstacles = lambda device, dtype: []  # the CPU is the device
    try:
        yield
    finally:
        _forget_kernels()  # while there is a driver that unloads them
        dispatch.triton_obstacles = genuine
        triton.runtime.driver._active = None


def _forget_kernels() -> None:
    """So that neither these launches find kernels of a real device, nor later ones those that compute nothing."""
    plans.clear()
    launch._compiled.clear()
    for module in (forward, backward):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()
