"""Programs of a few instructions for the tests of the executor: written around a body, run on NumPy arrays."""

from __future__ import annotations

import re
from collections.abc import Sequence

import executor
import numpy as np

_REGISTERS = """
.reg .pred %p<40>; .reg .b16 %h<40>; .reg .b32 %r<400>; .reg .f32 %f<400>; .reg .b64 %d<40>; .reg .f64 %g<40>;
"""


def kernel(body: str, arrays: int = 0, extra: str = "", shared: int = 0) -> executor.Kernel:
    """A kernel with the parameters a0, a1 … (64-bit addresses), whose address in global memory is in %d0, %d1 …

    %r0 is the thread's number. `shared` bytes are at the symbol `s`.
    """
    parameters = ", ".join(f".param .u64 a{n}" for n in range(arrays)) + extra
    loads = "".join(f"ld.param.u64 %d{n}, [a{n}]; cvta.to.global.u64 %d{n}, %d{n};\n" for n in range(arrays))
    memory = f".shared .align 1024 .b8 s[{shared}];" if shared else ""
    text = f"""
.version 8.0
.target sm_90a
.visible .entry k({parameters})
{{
{_REGISTERS} {memory}
mov.u32 %r0, %tid.x;
{loads}
{body}
ret;
}}
"""
    return executor.parse(text)["k"]


def run(
    program: executor.Kernel,
    arrays: Sequence[np.ndarray] = (),
    *,
    threads: int = 32,
    blocks: int = 1,
    order: executor.Order = executor.EARLY,
    arguments: Sequence[bytes | object] = (),
    watch: bool = True,
    written: Sequence[int] | None = None,
    memory: executor.GlobalMemory | None = None,
) -> list[np.ndarray]:
    """The arrays after the program ran; those of the numbers `written`, or all, may be written."""
    memory = memory or executor.GlobalMemory(executor.GlobalMemory.needed(*(a.nbytes for a in arrays)))
    places = [
        memory.add(np.ascontiguousarray(a).reshape(-1).view(np.uint8), writable=written is None or n in written)
        for n, a in enumerate(arrays)
    ]
    given = [place.to_bytes(8, "little") for place in places]
    executor.launch(
        program, memory, [*given, *arguments], grid=(blocks, 1, 1), threads=threads, order=order, watch=watch
    )
    return [
        memory.read(place, a.nbytes).copy().view(a.dtype).reshape(a.shape)
        for place, a in zip(places, arrays, strict=True)
    ]


_BANKS = {1: ("h", "u8"), 2: ("h", "b16"), 4: ("r", "b32"), 8: ("d", "b64")}


def apply(instruction: str, *inputs: np.ndarray, result: type | np.dtype, before: str = "") -> np.ndarray:
    """What an instruction makes of arrays with an element for each thread: $0 is its result, $1 … the inputs.

    Boolean inputs and results are predicates.
    """
    threads = inputs[0].size
    assert threads % 32 == 0
    lines, names = [], []
    arrays = [a.astype(np.uint8) if a.dtype == np.bool_ else a for a in inputs]
    for n, a in enumerate(arrays):
        bank, kind = _BANKS[a.itemsize]
        name = f"%{bank}{20 + n}"
        lines.append(f"mad.wide.u32 %d30, %r0, {a.itemsize}, %d{n + 1};\nld.global.{kind} {name}, [%d30];")
        if inputs[n].dtype == np.bool_:
            lines.append(f"setp.ne.s16 %p{20 + n}, {name}, 0;")
            name = f"%p{20 + n}"
        names.append(name)
    out = np.zeros(threads, np.uint8 if np.dtype(result) == np.bool_ else result)
    bank, kind = _BANKS[out.itemsize]
    target = "%p19" if np.dtype(result) == np.bool_ else f"%{bank}19"
    text = re.sub(r"\$(\d+)", lambda found: [target, *names][int(found[1])], instruction)
    lines += [before, f"{text};"]
    if np.dtype(result) == np.bool_:
        lines.append("selp.b16 %h19, 1, 0, %p19;")
    lines.append(f"mad.wide.u32 %d30, %r0, {out.itemsize}, %d0;\nst.global.{kind} [%d30], %{bank}19;")
    program = kernel("\n".join(lines), 1 + len(arrays))
    found = run(program, [out, *arrays], threads=threads, written=[0])[0]
    return found.astype(np.bool_) if np.dtype(result) == np.bool_ else found
