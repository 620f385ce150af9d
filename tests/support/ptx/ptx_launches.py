"""Launches of the fused kernels, compiled as far as PTX and executed on tensors of the CPU.

Needs Triton without its interpreter, so it runs in a process of its own: see `ptx_worker.py`. The arguments, the tiles and
the grid are those of `lambda_kernels.ops.ln_mlp.fused.launch`; only what Triton's launcher does on a GPU is done here.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Any

import executor
import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, compile
from triton.tools.tensor_descriptor import TensorDescriptor

from lambda_kernels import audit
from lambda_kernels.ops.ln_mlp.fused.launch import Launch

# Before, sums over warps also go through lanes that loaded nothing.
_STRICT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)

# The assembler is not needed and takes longest. What is compiled so must not get into the user's cache: see `ptx_worker.py`.
if hasattr(CUDABackend, "make_cubin"):
    CUDABackend.make_cubin = lambda *given, **named: b""

_compiled: dict[str, Compiled] = {}


class Compiled:
    """PTX of a launch for one architecture, and what the launcher has to know of it."""

    def __init__(self, made: Launch, arch: int) -> None:
        signature, constants, attributes = source(made)
        compiled = compile(
            ASTSource(made.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": made.warps, "num_stages": made.stages, "enable_fp_fusion": True},
        )
        self.ptx: str = compiled.asm["ptx"]
        self.shared: int = compiled.metadata.shared
        # A dictionary for each descriptor: the box and the swizzle that the compiler chose.
        self.boxes: list[dict[str, Any]] = list(getattr(compiled.metadata, "tensordesc_meta", None) or [])
        self.parse()

    def parse(self) -> None:
        """Read the PTX, again after it was changed."""
        (self.kernel,) = executor.parse(self.ptx).values()


def source(made: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """As the audit compiles it, but for pointers that are not aligned."""
    signature, constants, attributes = audit.source(made)
    for position, name in enumerate(made.kernel.arg_names):
        value = made.args.get(name)
        if isinstance(value, torch.Tensor) and value.data_ptr() % 16:
            attributes.pop((position,), None)
    return signature, constants, attributes


def compiled(made: Launch, arch: int) -> Compiled:
    """Compile, once for all launches that are alike."""
    key = repr((made.name, arch, made.warps, made.stages, *source(made)))
    if key not in _compiled:
        _compiled[key] = Compiled(made, arch)
    return _compiled[key]


def storage_bytes(t: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    """The bytes from a tensor's first element to its last, and which of them belong to it if not all do."""
    size = t.element_size()
    start = t.storage_offset() * size
    span = (sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1) * size if t.numel() else 0
    data = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())[start : start + span].numpy()
    if t.is_contiguous():
        return data, None
    elements = sum(
        np.arange(n).reshape([-1 if axis == own else 1 for own in range(t.ndim)]) * stride
        for axis, (n, stride) in enumerate(zip(t.shape, t.stride(), strict=True))
    )
    valid = np.zeros(span, np.bool_)
    valid[(np.asarray(elements).reshape(-1, 1) * size + np.arange(size)).reshape(-1)] = True
    return data, valid


def execute(
    made: Launch,
    arch: int,
    order: executor.Order,
    outputs: Collection[torch.Tensor],
    *,
    watch: bool = True,
    program: Compiled | None = None,
) -> executor.Launched:
    """Run a launch; only `outputs` may be written."""
    program = program or compiled(made, arch)
    bases = [value.base if isinstance(value, TensorDescriptor) else value for value in made.args.values()]
    tensors = {t.data_ptr(): t for t in bases if isinstance(t, torch.Tensor)}
    written = {t.data_ptr() for t in outputs}
    held = {pointer: storage_bytes(t) for pointer, t in tensors.items()}
    memory = executor.GlobalMemory(executor.GlobalMemory.needed(*(data.size for data, _ in held.values())))
    address = {
        pointer: memory.add(data, writable=pointer in written, valid=valid, misalignment=pointer % 16)
        for pointer, (data, valid) in held.items()
    }
    done = executor.launch(
        program.kernel,
        memory,
        _arguments(made, program, address),
        grid=(*made.grid, 1, 1)[:3],
        threads=32 * made.warps,
        shared=program.shared,
        order=order,
        watch=watch,
        strict=_STRICT,
    )
    for pointer in written & set(held):
        data, _ = held[pointer]
        data[:] = memory.read(address[pointer], data.size)
    return done


def _arguments(made: Launch, program: Compiled, address: dict[int, int]) -> list[bytes | object]:
    """Of each parameter of the kernel. A descriptor is a tensor map, then shape and strides, which are not read."""
    parameters, boxes = iter(program.kernel.parameters), iter(program.boxes)
    found: list[bytes | object] = []
    for name in made.kernel.arg_names:
        value = made.args.get(name)
        if value is None:  # also every constant
            continue
        parameter = next(parameters)
        if isinstance(value, TensorDescriptor):
            assert parameter.size == 128, f"{parameter} is not a tensor map"
            found.append(_tensor_map(value, next(boxes), address[value.base.data_ptr()]))
            for extent in (*value.shape, *value.strides):
                found.append(int(extent).to_bytes(next(parameters).size, "little"))
        elif isinstance(value, torch.Tensor):
            found.append(struct.pack("<Q", address[value.data_ptr()]))
        elif isinstance(value, int):
            found.append(value.to_bytes(parameter.size, "little", signed=True))
        else:
            found.append(struct.pack("<f", value))
    # The compiler's own scratch memory, which these kernels do not use: an access would be out of bounds.
    found.extend(bytes(parameter.size) for parameter in parameters)
    return found


def _tensor_map(t: TensorDescriptor, box: dict[str, Any], address: int) -> executor.TensorMap:
    rows, columns = box["block_size"]
    size = t.base.element_size()
    assert box["elem_size"] == size
    shape = int(t.shape[0]), int(t.shape[1])
    return executor.TensorMap(address, shape, int(t.strides[0]) * size, (rows, columns), size, box["swizzle"])
