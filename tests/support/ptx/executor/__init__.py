"""Executes PTX on a CPU: many blocks at once, a NumPy row for each register, asynchronous parts early or late.

What is executed is the text that the compiler hands to the assembler, so this shows wrong addresses, layouts, waits and
barriers of a kernel without a GPU. It shows nothing of the assembler's own work (registers, schedules, spills), and no
times. Written from NVIDIA's "Parallel Thread Execution ISA"; section names in the modules are those of that document.

    syntax       text → kernels, parameters, instructions
    memory       global, shared, local and parameter space, with bounds
    races        who knows of whose accesses: missing barriers and proxy fences
    state        threads, registers and operands of blocks that run together
    arithmetic   integer, logical and floating-point instructions
    conversions  mov, cvt, prmt and the bits of bfloat16
    movement     ld, st, atom, red; exchanges between the lanes of a warp
    matrices     ldmatrix, stmatrix, mma.sync
    copies       cp.async, mbarrier, tensor maps
    warpgroup    wgmma
    machine      control flow: masks, barriers, deadlocks
"""

from __future__ import annotations

from .copies import TensorMap
from .faults import ProgramError, UnsupportedInstructionError
from .machine import Launched, launch
from .memory import GlobalMemory
from .state import EARLY, LATE, ORDERS, Order
from .syntax import Kernel, parse

__all__ = [
    "EARLY",
    "LATE",
    "ORDERS",
    "GlobalMemory",
    "Kernel",
    "Launched",
    "Order",
    "ProgramError",
    "TensorMap",
    "UnsupportedInstructionError",
    "launch",
    "parse",
]
