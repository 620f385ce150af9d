"""Compile every shipped kernel configuration without a GPU and read what the compiler made of it.

    python -m lambda_kernels.audit [--arch 80 90 100] [--kernel one_pass fc1 …] [--defaults] [--json FILE]

For each configuration: registers, stack, shared memory, and from the disassembly the matrix instructions and the loads and
stores of local memory. It fails on
- local memory traffic inside a loop (a spill),
- shared memory above the architecture's limit,
- on sm_90, a warp-group product that was serialized or takes its A operand from registers, or that became the older HMMA,
- on sm_100, a product that is no tcgen05 one,
- a bulk load inside a loop whose latency is exposed: no product runs between the load and its wait.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .files import write_json
from .ops.ln_mlp.arguments import Options, Parameters, Saved
from .ops.ln_mlp.dispatch import in_interpreter
from .ops.ln_mlp.fused.kernels import configs

if TYPE_CHECKING:
    from .ops.ln_mlp.fused.launch import Launch

# Shared memory a program may use, bytes: CUDA C++ programming guide, table of technical specifications.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ARCHITECTURES = (80, 90, 100)

# The matrix instruction that products of 16-bit operands must become.
_MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


@dataclass(frozen=True)
class Case:
    """One compilation: a launch on tensors without memory, for one architecture."""

    kernel: str
    shape: str
    config: str
    arch: int
    launch: Launch
    tensor_cores: bool  # whether products must run on the tensor cores

    def finding(self, **found: Any) -> Finding:
        return Finding(self.kernel, self.shape, self.config, self.arch, **found)


@dataclass(frozen=True)
class Finding:
    """What the compiler made of a case; `faults` is empty where it passes."""

    kernel: str
    shape: str
    config: str
    arch: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    matrix_instructions: int = 0
    spills: int = 0
    spills_in_loop: int = 0
    faults: tuple[str, ...] = ()


def source(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes of a launch, as its kernel would be specialized for these arguments."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    constants = dict(launch.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    general = launch.kernel.do_not_specialize or ()
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.args.get(name)
        aligned = False
        if name in constants or value is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            aligned = True
        elif isinstance(value, int):
            signature[name] = "i32"
            aligned = value % 16 == 0 and name not in general
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_case(case: Case) -> Finding:
    """Compile `case` for its architecture, with no device present, and read registers, memory and instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch, arch = case.launch, case.arch
    signature, constants, attributes = source(launch)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(
            ASTSource(launch.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", arch, 32),
            options=options,
        )
    except Exception as error:  # the compiler's passes raise errors of many kinds
        reason = str(error).strip().splitlines()
        return case.finding(faults=(f"does not compile: {type(error).__name__}: {reason[-1] if reason else ''}",))
    return read(case, compiled)


def read(case: Case, compiled: Any) -> Finding:
    """What the compiler made of `case`: registers, memory and instructions, of a kernel that Triton compiled for it."""
    usage, sass, warnings = _disassemble(compiled, case.arch)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return case.finding(
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        matrix_instructions=_count(_MATRIX_INSTRUCTION[case.arch], sass),
        spills=_count("LDL", sass) + _count("STL", sass),
        spills_in_loop=local_memory_in_loops(sass),
        faults=(
            *find_faults(case, compiled.metadata.shared, sass, warnings),
            *([f"{n} exposed loads inside a loop"] if (n := exposed_loads(compiled.asm["ptx"])) else []),
        ),
    )


def _disassemble(compiled: Any, arch: int) -> tuple[str, str, str]:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # The assembler that Triton itself uses for this architecture: releases differ in which one that is.
    ptxas = get_ptxas(arch).path

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(part) for part in command], capture_output=True, text=True)

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = run(binaries / "cuobjdump", "-res-usage", cubin)
        sass = run(binaries / "cuobjdump", "-sass", cubin)
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        again = run(ptxas, f"-arch={name}", "-v", ptx, "-o", Path(folder, "again.cubin"))
        for done in (usage, sass, again):
            if done.returncode:
                raise RuntimeError(f"{' '.join(done.args)} failed: {done.stderr.strip()}")
        return usage.stdout, sass.stdout, again.stderr


def _count(opcode: str, sass: str) -> int:
    return len(re.findall(rf"\b{opcode}\b", sass))


def exposed_loads(ptx: str) -> int:
    """Bulk loads into shared memory, in innermost loops, between whose issue and whose wait no product is issued.

    In a pipelined loop, products of earlier loads come between. Triton names a barrier by one register from the load to its
    wait; a load of one turn may be waited for in the next one.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"(\$L__BB\w+):", line))}
    jumps = ((at, re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)) for at, line in enumerate(lines))
    loops = [(labels[jump[1]], end) for end, jump in jumps if jump and labels.get(jump[1], end) < end]
    exposed: set[int] = set()
    for start, end in loops:
        if any(start <= other and last <= end and (other, last) != (start, end) for other, last in loops):
            continue
        pending: dict[str, list[int]] = {}  # loads that no product has followed yet, by their barrier
        for at in (*range(start, end), *range(start, end)):  # two turns
            if load := re.search(r"\bcp\.async\.bulk\.tensor\S*\.shared::\w+\.global\S*\s.*\[([^\[\]]+)\];", lines[at]):
                pending.setdefault(load[1], []).append(at)
            elif re.search(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", lines[at]):
                pending.clear()
            elif wait := re.search(r"\bmbarrier\.(?:try|test)_wait\S*\s+\S+\s+\[([^\[\]]+)\]", lines[at]):
                exposed.update(pending.pop(wait[1], ()))
    return len(exposed)


def local_memory_in_loops(sass: str) -> int:
    """Loads and stores of local memory between the target of a backward branch and the branch.

    Targets are addresses, as cuobjdump prints them, or labels, as nvdisasm does.
    """
    code: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for label, address, text in re.findall(r"^\s*(\.L_\w+):|/\*([0-9a-f]{4,})\*/\s+(\S.*?);", sass, re.MULTILINE):
        if label:
            waiting.append(label)
            continue
        labels.update(dict.fromkeys(waiting, int(address, 16)))
        waiting.clear()
        code.append((int(address, 16), text))
    loops = []
    for address, text in code:
        jump = re.search(r"\bBRA(?:\.\w+)*\s.*?(?:(0x[0-9a-f]+)|(\.L_\w+))", text)
        target = address if jump is None else int(jump[1], 16) if jump[1] else labels.get(jump[2], address)
        if target < address:  # a jump to itself is the padding after the end
            loops.append((target, address))
    local = [address for address, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(low <= address <= high for low, high in loops) for address in local)


def find_faults(case: Case, shared: int, sass: str, warnings: str) -> Iterator[str]:
    if spilled := local_memory_in_loops(sass):
        yield f"{spilled} spill instructions inside a loop"
    if shared > SHARED_LIMIT[case.arch]:
        yield f"{shared} bytes of shared memory, the limit is {SHARED_LIMIT[case.arch]}"
    if not case.tensor_cores:
        return
    wanted = _MATRIX_INSTRUCTION[case.arch]
    if not _count(wanted, sass):
        others = [name for name in ("HMMA", "HGMMA", "FFMA") if _count(name, sass)]
        yield f"no {wanted}; products run as {' and '.join(others) or 'nothing known'}"
    elif wanted != "HMMA" and (older := _count("HMMA", sass)):
        yield f"{older} HMMA beside {wanted}: a product fell to the older tensor-core instruction"
    if case.arch == 90:
        if "serialized" in warnings:
            yield "warp-group products are serialized"
        if re.search(r"\bHGMMA\S*\s+R\d+,\s*R\d+", sass):
            yield "a warp-group product takes its A operand from registers"


# Widths that are compiled: those that ViTs have, chunks of every count, and rows that descriptors cannot address.
_WIDTHS: dict[bool, tuple[int, ...]] = {
    True: (64, 128, 192, 256, 384, 768, 1024, 1152, 1408),
    False: (100, 192, 384, 768),
}
# Of one tile, all widths above a few tiles give the same code.
_DEFAULT_WIDTHS: dict[str, dict[bool, tuple[int, ...]]] = {
    "one_pass": {True: (192,), False: (100, 192)},
    "others": {True: (768,), False: (100,)},
}
_VARIANT_WIDTHS = (192, 384, 768)
_VARIANTS = {
    "one_pass": ("mixed", "tanh"),
    "fc1": ("normalized", "tanh"),
    "fc2": ("mixed",),
    "hidden_gradient": ("tanh",),
    "saved_gradient": ("tanh",),
}
_TOKENS = 50_432
_ROW_WIDTHS = (192, 768, 1664, 4096)


def cases(
    architectures: tuple[int, ...] = ARCHITECTURES, kernels: tuple[str, ...] = (), *, defaults: bool = False
) -> Iterator[Case]:
    """Every configuration that ships for these compute capabilities and kernels (none: all), on tensors without memory.

    `defaults` are those that are used unmeasured: the first of each list, in bfloat16 and float32, at fewer widths.
    """
    dtypes = (torch.bfloat16, torch.float32) if defaults else (torch.bfloat16, torch.float16, torch.float32)
    for arch in architectures:
        for kernel in kernels or (*configs.KERNELS, *ROW_KERNELS):
            if kernel in ROW_KERNELS:
                for channels in _ROW_WIDTHS[:2] if defaults else _ROW_WIDTHS:
                    made = _row_launch(kernel, channels)
                    yield Case(kernel, f"C={channels} bf16", f"rows w{made.warps}", arch, made, False)
                continue
            for tma in (True, False) if configs.uses_descriptors(arch) else (False,):
                for dtype in dtypes:
                    if tma and dtype == torch.float32:
                        continue
                    widths = _DEFAULT_WIDTHS["one_pass" if kernel == "one_pass" else "others"] if defaults else _WIDTHS
                    for channels in widths[tma]:
                        shipped = configs.shipped(kernel, arch, dtype, channels, tma)
                        for config in shipped[:1] if defaults else shipped:
                            yield product_case(kernel, channels, dtype, config, tma, arch)
            if not defaults:
                yield from _variants(kernel, arch)


def _variants(kernel: str, arch: int) -> Iterator[Case]:
    """What else the configurations are used for: TF32, autocast's float32 tokens, the tanh form, normalized tokens."""
    for config in configs.shipped(kernel, arch, torch.float32, 192, False):
        with _tf32():
            yield product_case(kernel, 192, torch.float32, config, False, arch, "tf32")
    for tma in (True, False) if configs.uses_descriptors(arch) else (False,):
        for channels in _VARIANT_WIDTHS:
            for config in configs.shipped(kernel, arch, torch.bfloat16, channels, tma):
                for variant in _VARIANTS[kernel]:
                    yield product_case(kernel, channels, torch.bfloat16, config, tma, arch, variant)


ROW_KERNELS = ("row_statistics", "layer_norm", "layer_norm_input", "elementwise")


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def product_case(
    kernel: str, channels: int, dtype: torch.dtype, config: Any, tma: bool, arch: int, variant: str = ""
) -> Case:
    """The largest variant of a kernel: biases, LayerScale, branch factors, statistics, what the backward needs."""
    from .ops.ln_mlp.fused import launch

    rows, hidden = _TOKENS, 4 * channels
    o = Options(1e-6, 2.0, "tanh" if variant == "tanh" else "none")
    wider = torch.float32 if variant == "mixed" else dtype
    x, out = _empty(rows, channels, dtype=wider), _empty(rows, channels, dtype=wider)
    c, h = _empty(channels, dtype=dtype), _empty(hidden, dtype=dtype)
    wide, act = _empty(rows, hidden, dtype=dtype), _empty(rows, hidden, dtype=dtype)
    statistics, sums = _empty(rows), _empty(-(-rows // config.bm), hidden)
    w1, w2 = _empty(hidden, channels, dtype=dtype), _empty(channels, hidden, dtype=dtype)
    p = Parameters(c, c, w1, h, w2, c, c, statistics)
    how: dict[str, Any] = {"config": config, "tma": tma}
    if kernel == "one_pass":
        made = launch.one_pass(x, p, o, out, statistics, statistics, **how)
    elif kernel == "fc1" and dtype == torch.bfloat16 and variant != "normalized":
        folded = p._replace(b1=_empty(hidden))
        made = launch.fc1(x, folded, o, act, wide, (statistics, statistics, _empty(hidden)), **how)
    elif kernel == "fc1":
        made = launch.fc1(x, p, o, act, wide, **how)
    elif kernel == "fc2":
        made = launch.fc2(act, x, p, o, out, **how)
    elif kernel in ("hidden_gradient", "saved_gradient"):
        normed, pre = (x, None) if kernel == "hidden_gradient" else (None, act)
        made = launch.hidden_gradient(normed, p, o, pre, out, wide, act, sums, **how)
    else:
        raise ValueError(f"kernel must be one of {', '.join(configs.KERNELS)}; got {kernel!r}")
    how_moved = "descriptors" if tma else "pointers"
    shape = " ".join(filter(None, (f"C={channels}", _TYPES[dtype], variant, how_moved)))
    # Without TF32, float32 products are no tensor-core ones.
    return Case(kernel, shape, str(config), arch, made, dtype != torch.float32)


def _row_launch(kernel: str, channels: int) -> Launch:
    from .ops.ln_mlp.fused import launch

    dtype, rows, hidden, programs = torch.bfloat16, _TOKENS, 4 * channels, 528
    x, c, statistics = _empty(rows, channels, dtype=dtype), _empty(channels, dtype=dtype), _empty(rows)
    w1, h = _empty(hidden, channels, dtype=dtype), _empty(hidden)
    p, o = Parameters(c, c, w1, h, w1.T, c, c, statistics), Options(1e-6, 2.0, "none")
    if kernel == "layer_norm":
        return launch.layer_norm(x, p, o, x, statistics, statistics, given=False)
    if kernel == "layer_norm_input":
        partial = [_empty(programs, channels)] * 3
        return launch.layer_norm_input(x, x, x, p, o, Saved(statistics, statistics), x, partial, programs=programs)
    if kernel == "row_statistics":
        return launch.row_statistics(x, p, o, statistics, statistics, p, h)
    wide = _empty(rows, hidden, dtype=dtype)
    sums = _empty(-(-rows // configs.ELEMENTWISE.bm), hidden)
    return launch.elementwise(wide, o, wide, wide, wide, sums, config=configs.ELEMENTWISE)


def audit(chosen: Iterable[Case], workers: int = 1) -> Iterator[Finding]:
    """Compile and read the cases, `workers` at a time, in their order."""
    if workers == 1:
        yield from map(compile_case, chosen)
        return
    # Threads suffice: most of the time is spent in the assembler and the disassembler, other processes.
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(compile_case, chosen)


_COLUMNS = ("kernel", "shape", "config", "sm", "regs", "stack", "shared", "matrix", "spills", "in loop", "verdict")
_WIDTH = (16, 36, 18, 4, 5, 6, 7, 7, 7, 8, 0)


def _line(values: Iterable[object]) -> str:
    return " ".join(f"{value!s:<{width}}" for value, width in zip(values, _WIDTH, strict=True)).rstrip()


def _row(f: Finding) -> str:
    verdict = "; ".join(f.faults) or "ok"
    numbers = (f.registers, f.stack, f.shared, f.matrix_instructions, f.spills, f.spills_in_loop)
    return _line((f.kernel, f.shape, f.config, f.arch, *numbers, verdict))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0 if every case passes, 1 otherwise, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m lambda_kernels.audit", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities", choices=sorted(SHARED_LIMIT)
    )
    parser.add_argument("--kernel", nargs="+", default=(), help="kernels to compile (default: all)")
    parser.add_argument("--defaults", action="store_true", help="only the default configuration of each kernel")
    parser.add_argument("--workers", type=int, default=1, help="number of parallel compilations")
    parser.add_argument("--json", type=Path, help="write the findings to this JSON file")
    options = parser.parse_args(arguments)
    try:
        import triton
    except ImportError:
        print("triton is not installed; install it to compile the kernels", file=sys.stderr)
        return 2
    if in_interpreter():
        print("TRITON_INTERPRET is set; unset it, because the interpreter compiles nothing", file=sys.stderr)
        return 2
    known = (*configs.KERNELS, *ROW_KERNELS)
    if unknown := set(options.kernel) - set(known):
        parser.error(f"argument --kernel: unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    print(f"triton {triton.__version__}")
    print(_line(_COLUMNS))
    findings = []
    chosen = cases(tuple(options.arch), tuple(options.kernel), defaults=options.defaults)
    for finding in audit(chosen, options.workers):
        findings.append(finding)
        print(_row(finding), flush=True)
    failed = sum(bool(finding.faults) for finding in findings)
    print(f"{len(findings)} configurations, {failed} failed")
    if options.json:
        write_json(options.json, {"triton": triton.__version__, "findings": [asdict(f) for f in findings]})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
