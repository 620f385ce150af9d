"""Faults planted into the PTX of a kernel, or into what its launcher says: they have to be found.

Each is a plausible slip of a compiler or a kernel's author. Runs where `ptx_launches` does.
"""

from __future__ import annotations

import copy
import re

import executor
import ptx_launches
from ptx_cases import Case
from ptx_problems import problem

# What is taken out of the text, one occurrence at a time.
REMOVED = {
    "wgmma wait": r"wgmma\.wait_group\.sync\.aligned \d+;",
    "mbarrier wait": r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete[^;]*;\s*(?:\.loc[^\n]*\s*)?@!complete[^;]*;",
    "barrier": r"bar\.sync\s+0;",
    "proxy fence": r"fence\.proxy\.async\.shared::cta;",
    "cp.async wait": r"cp\.async\.wait_group\s+\d+;",
    "store wait": r"cp\.async\.bulk\.wait_group\s+\d+;",
    "expected bytes": r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;",
}
# What is replaced, everywhere.
REPLACED = {
    "one row further": (r"(ld\.shared\.v4\.b32[^\[]*\[%r\d+)(\])", r"\1+16\2"),
    "transposed": (r"m8n8\.x4\.shared", r"m8n8.x4.trans.shared"),
    "copies of fewer bytes": (r"(cp\.async\.c[ag][^\[]*\[[^\]]*\], \[[^\]]*\], 0x)(?:10|8), %r\d+;", r"\g<1>4;"),
    "global offset": (r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )0", r"\g<1>16"),
    "sum over fewer lanes": (r"shfl\.sync\.bfly\.b32\s+(%r\d+), (%r\d+), 1, 31, -1;", r"mov.b32 \1, 0;"),
}
# What the launcher says of a descriptor.
LAUNCHED = ("box", "swizzle")


def count(case: Case, kind: str) -> int:
    """How many places a fault of this kind can be planted in."""
    if kind not in REMOVED:
        return 1
    return len(re.findall(REMOVED[kind], ptx_launches.compiled(problem(case).launch, case.arch).ptx))


def plant(case: Case, kind: str, place: int = 0) -> ptx_launches.Compiled:
    """The kernel of a case with a fault."""
    program = copy.copy(ptx_launches.compiled(problem(case).launch, case.arch))
    before = program.ptx
    if kind in REMOVED:
        found = list(re.finditer(REMOVED[kind], before))[place]
        program.ptx = before[: found.start()] + before[found.end() :]
    elif kind in REPLACED:
        program.ptx = re.sub(*REPLACED[kind], before)
    else:
        program.boxes = copy.deepcopy(program.boxes)
        box = program.boxes[place]
        if kind == "box":
            box["block_size"] = [box["block_size"][0] // 2, box["block_size"][1]]
        else:
            box["swizzle"] = 0
    if kind not in LAUNCHED:
        assert program.ptx != before, f"{kind}: there is nothing like it in {case}"
        program.parse()
    return program


def outcomes(case: Case, kind: str, place: int = 0) -> list[str]:
    """Of every order: "right", "wrong", or the fault that was reported."""
    made, program = problem(case), plant(case, kind, place)
    found = []
    for order in executor.ORDERS:
        made.poison()
        try:
            ptx_launches.execute(
                made.launch, case.arch, order, made.outputs, watch=order == executor.ORDERS[0], program=program
            )
        except executor.ProgramError as error:
            found.append(str(error))
        else:
            found.append("right" if all(error <= 1 for error in made.errors().values()) else "wrong")
    return found
