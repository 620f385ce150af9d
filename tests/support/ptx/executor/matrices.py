"""Matrices of a warp: their way between shared memory and registers, and their products.

Sections: "ldmatrix", "stmatrix", "mma.sync" with "Matrix Fragments for mma.m16n8k8 / m16n8k16".

Of a thread's lane, `g = lane // 4` and `t = lane % 4` say which elements it holds, in pairs of 16 bits in a register. Since
threads are the last axis of every register, a fragment is a permutation of axes.
"""

from __future__ import annotations

import re

import numpy as np

from .conversions import from_bfloat16
from .faults import UnsupportedInstructionError
from .memory import Indices
from .state import WARP, Action, Array, Mask, State, instruction, write
from .syntax import Instruction

_ROW_BYTES = 16  # of an 8×8 matrix of 16-bit elements


def _matrices(state: State, i: Instruction) -> int:
    """How many 8×8 matrices of 16-bit elements are moved."""
    if "m8n8" not in i.parts or i.type != "b16":
        raise UnsupportedInstructionError("shape or type")
    return int(next(part for part in i.parts if re.fullmatch(r"x[124]", part))[1:])


def _rows(state: State, addresses: Indices, matrix: int, mask: Mask, writing: bool) -> tuple[Indices, Indices]:
    """Warps that take part, and where the eight rows of their matrix are: lanes 8·matrix … hold the addresses."""
    warps = np.arange(state.threads // WARP) if mask is None else np.flatnonzero(mask.reshape(-1, WARP).any(1))
    owners = (warps[:, None] * WARP + 8 * matrix + np.arange(8)).reshape(-1)
    offsets = state.shared.locate(addresses[owners], _ROW_BYTES, owners, writing)
    if state.clocks is not None:
        access = state.clocks.write if writing else state.clocks.read
        access(offsets, _ROW_BYTES, state.block[owners], state.warp[owners])
    return warps, offsets.reshape(-1, 8)


@instruction("ldmatrix", warp_wide=True)
def _ldmatrix(state: State, i: Instruction) -> Action:
    """Lane l gets elements 2·(l%4) and the next of row l//4; of columns instead of rows with `.trans`."""
    count = _matrices(state, i)
    targets = [state.target(name, "b32") for name in state.vector(i.operands[0])]
    address = state.address(i.operands[1])
    transposed = "trans" in i.parts

    def run(mask: Mask) -> None:
        addresses = address()
        found = []
        for matrix in range(count):
            warps, rows = _rows(state, addresses, matrix, mask, False)
            if transposed:
                elements = state.shared.views[2][(rows // 2)[:, :, None] + np.arange(8)]
                words = np.ascontiguousarray(elements.transpose(0, 2, 1)).view(np.uint32)
            else:
                words = state.shared.views[4][(rows // 4)[:, :, None] + np.arange(4)]
            found.append((warps, words.reshape(-1, WARP)))
        for target, (warps, words) in zip(targets, found, strict=True):  # after all addresses were read
            target.reshape(-1, WARP)[warps] = words

    return run


@instruction("stmatrix", warp_wide=True)
def _stmatrix(state: State, i: Instruction) -> Action:
    """The way back of ldmatrix."""
    count = _matrices(state, i)
    address = state.address(i.operands[0])
    sources = [state.source(name, "b32") for name in state.vector(i.operands[1])]
    transposed = "trans" in i.parts

    def run(mask: Mask) -> None:
        addresses = address()
        for matrix in range(count):
            warps, rows = _rows(state, addresses, matrix, mask, True)
            words = np.ascontiguousarray(sources[matrix].reshape(-1, WARP)[warps])
            if transposed:
                elements = words.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
                state.shared.views[2][(rows // 2)[:, :, None] + np.arange(8)] = elements
            else:
                state.shared.views[4][(rows // 4)[:, :, None] + np.arange(4)] = words.reshape(-1, 8, 4)

    return run


def operand_values(words: Array, kind: str) -> Array:
    """float32 of packed 16-bit elements, two for each word; of tf32 one, without the bits that are not used."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    halves = words.view(np.uint16)
    return from_bfloat16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


@instruction("mma", warp_wide=True)
def _mma(state: State, i: Instruction) -> Action:
    """D = A·B + C of 16×8 elements in float32, A [16, k], B [k, 8]; k is 16 (or 8) for 16-bit types, 8 or 4 for tf32.

    A: register 2·h + v holds rows g + 8·v and columns k/2·h + elements·t + j, B: register h rows k/2·h + elements·t + j and
    column g, C and D: register 2·v + j rows g + 8·v and columns 2·t + j; j counts the elements of a register.
    """
    shape = re.fullmatch(r"m16n8k(\d+)", i.parts[3])
    kinds = i.parts[-4:]
    if (
        shape is None
        or i.parts[4:6] != ("row", "col")
        or kinds[0] != "f32"
        or kinds[3] != "f32"
        or kinds[1] != kinds[2]
    ):
        raise UnsupportedInstructionError("shape or types")
    depth, kind = int(shape[1]), kinds[1]
    if kind not in ("bf16", "f16", "tf32"):
        raise UnsupportedInstructionError("type")
    elements = 1 if kind == "tf32" else 2
    warps = state.threads // WARP
    names = [state.vector(operand) for operand in i.operands]
    d, a, b, c = (state.rows(group) for group in names)
    halves = depth // (4 * elements)  # registers along k
    if (len(a), len(b), len(c), len(d)) != (2 * halves, halves, 4, 4):
        raise UnsupportedInstructionError("fragments")
    bank = state.banks[4]

    def run(mask: Mask) -> None:
        left = operand_values(bank[a], kind).reshape(halves, 2, warps, 8, 4, elements)  # h v warp g t j
        right = operand_values(bank[b], kind).reshape(halves, warps, 8, 4, elements)  # h warp g t j
        products = np.matmul(
            left.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, depth),
            right.transpose(1, 0, 3, 4, 2).reshape(warps, depth, 8),
        )
        sums = products.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)  # (v j) (warp g t)
        sums = sums + bank[c].view(np.float32)
        if mask is None:
            bank[d] = sums.view(np.uint32)
        else:
            for row, values in zip(d, sums, strict=True):
                write(bank[row].view(np.float32), values, mask)

    return run
