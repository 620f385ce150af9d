"""The audit: what ships by default compiles without spills for every architecture, and its eyes see what they must see."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from places import REPOSITORY

pytest.importorskip("triton")

from lambda_kernels import audit
from lambda_kernels.ops.ln_mlp.fused.kernels import configs


def run(*arguments: object, module: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own: the tests' has Triton's interpreter on."""
    command = ("-m", "lambda_kernels.audit") if module else ()
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, **environment},
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", audit.ARCHITECTURES)
def test_default_configurations(arch, tmp_path):
    done = run("--defaults", "--arch", arch, "--json", tmp_path / "findings.json", "--workers", os.cpu_count() or 1)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads((tmp_path / "findings.json").read_text())["findings"]
    assert {f["kernel"] for f in findings} == {*configs.KERNELS, *audit.ROW_KERNELS}
    assert not [f for f in findings if f["faults"] or f["stack"] or f["spills"]]
    # The 16-bit products are on the tensor cores, and nothing else is; nothing was found because nothing was looked for.
    products = [f for f in findings if f["kernel"] in configs.KERNELS]
    assert all((f["matrix_instructions"] > 0) == ("bf16" in f["shape"]) for f in products)
    assert all(32 <= f["registers"] <= 255 for f in products)


@pytest.mark.slow
def test_a_configuration_that_spills_fails(tmp_path):
    """Twice the rows of what ships: the same kernel does not fit the registers."""
    script = """
from dataclasses import replace
import torch
from lambda_kernels import audit
from lambda_kernels.ops.ln_mlp.fused.kernels.configs import Config
case = audit.product_case("one_pass", 384, torch.bfloat16, Config(128, 128, 0, 8, 1), True, 90)
finding = audit.compile_case(case)
print(finding)
assert any("spill instructions inside a loop" in fault for fault in finding.faults)
assert finding.stack > 0 and finding.spills >= finding.spills_in_loop > 0
case = audit.product_case("hidden_gradient", 768, torch.bfloat16, Config(128, 128, 64, 8, 4), True, 90)
assert any("bytes of shared memory, the limit is 232448" in fault for fault in audit.compile_case(case).faults)
case = audit.product_case("one_pass", 192, torch.bfloat16, Config(64, 64, 0, 4, 1), True, 90)
assert audit.compile_case(case).faults == ("6 exposed loads inside a loop",)
case = audit.product_case("fc1", 768, torch.float32, Config(64, 64, 32, 8, 2), False, 90)
finding = audit.compile_case(replace(case, tensor_cores=True))
assert any("no HGMMA; products run as FFMA" in fault for fault in finding.faults), finding
"""
    done = run("-c", script, module=False)
    assert done.returncode == 0, done.stdout + done.stderr


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, {a}, gdesc[UR8], R24 ;
        /*0030*/                   {inside}
        /*0040*/              @!P0 BRA {target} ;
        /*0050*/                   LDL R2, [R1] ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
"""


def faults(sass: str, arch: int = 90, shared: int = 1000, warnings: str = "", tensor_cores: bool = True) -> str:
    case = audit.Case("fc1", "", "", arch, None, tensor_cores)
    return "; ".join(audit.find_faults(case, shared, sass, warnings))


@pytest.mark.parametrize(("inside", "target", "found"), [("STL [R1+0x4], R3 ;", "0x20", 1), ("NOP ;", "0x20", 0)])
def test_only_spills_inside_a_loop_are_faults(inside, target, found):
    text = faults(SASS.format(a="gdesc[UR4]", inside=inside, target=target))
    assert ("1 spill instructions inside a loop" in text) == bool(found)
    assert text.count(";") == 0


def test_a_branch_forward_is_no_loop():
    assert not faults(SASS.format(a="gdesc[UR4]", inside="STL [R1+0x4], R3 ;", target="0x60"))


@pytest.mark.parametrize("jump", ["@!P0 BRA `(.L_x_2)", "@P1 BRA.U `(.L_x_2)"])
def test_loops_between_labels(jump):
    """As nvdisasm writes branches."""
    sass = ".L_x_2:\n        /*0020*/  STL [R1], R2 ;\n        /*0030*/  " + jump + " ;\n"
    assert audit.local_memory_in_loops(sass) == 1


def test_an_operand_from_registers_is_a_fault():
    assert "A operand from registers" in faults(SASS.format(a="R40", inside="NOP ;", target="0x20"))
    assert not faults(SASS.format(a="gdesc[UR4]", inside="NOP ;", target="0x20"))


def test_serialized_products_are_a_fault():
    warning = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to …"
    sass = SASS.format(a="gdesc[UR4]", inside="NOP ;", target="0x20")
    assert "serialized" in faults(sass, warnings=warning)


def test_the_wrong_tensor_core_is_a_fault():
    old = "/*0000*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"
    assert faults(old) == "no HGMMA; products run as HMMA"
    assert "no UTCHMMA" in faults(old, arch=100)
    assert not faults(old, arch=80)
    mixed = old + "\n/*0010*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], gdesc[UR8], R24 ;"
    assert "1 HMMA beside HGMMA" in faults(mixed)
    assert not faults("/*0000*/  FFMA R4, R8, R12, R4 ;", tensor_cores=False)


LOAD = "@%p8 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r46], [%rd5, {%r47, %r338}], [%r45];"
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r45], %r13;"
OTHER = WAIT.replace("%r45", "%r46")
PRODUCT = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;"


@pytest.mark.parametrize(
    ("inside", "found"),
    [
        ([LOAD, WAIT, PRODUCT], 1),
        ([LOAD, WAIT, PRODUCT, LOAD, WAIT, PRODUCT], 2),
        ([WAIT, PRODUCT, LOAD], 1),  # of the next turn
        ([OTHER, PRODUCT, LOAD], 0),
        ([LOAD, PRODUCT, WAIT], 0),
        ([LOAD, PRODUCT.replace("wgmma.mma_async", "tcgen05.mma"), WAIT], 0),
        ([LOAD, OTHER, PRODUCT], 0),
        ([LOAD, LOAD, WAIT, PRODUCT], 2),
        ([LOAD, LOAD.replace("[%r45]", "[%r46]"), WAIT, OTHER, PRODUCT], 2),
        ([LOAD.replace("[%r45]", "[%r45+8]"), WAIT.replace("[%r45]", "[%r45+8]"), PRODUCT], 1),
        ([LOAD.replace("[%r45]", "[%r45+8]"), WAIT, PRODUCT], 0),
    ],
)
def test_a_load_whose_latency_is_exposed(inside, found):
    loop = "\n".join(["$L__BB0_1:", *inside, "@%p29 bra \t$L__BB0_1;"])
    assert audit.exposed_loads(loop) == found
    assert audit.exposed_loads("\n".join([LOAD, WAIT, loop])) == found, "before the loop nothing can be overlapped"
    assert audit.exposed_loads("\n".join(["$L__BB0_9:", loop, "@%p1 bra $L__BB0_9;"])) == found, "counted once"
    assert audit.exposed_loads("\n".join(["@%p1 bra $L__BB0_2;", *inside, "$L__BB0_2:"])) == 0, "no loop"


@pytest.mark.parametrize("arch", sorted(audit.SHARED_LIMIT))
def test_shared_memory_above_the_limit_is_a_fault(arch):
    limit = audit.SHARED_LIMIT[arch]
    assert not faults("", arch, limit, tensor_cores=False)
    assert f"{limit + 1} bytes of shared memory" in faults("", arch, limit + 1, tensor_cores=False)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_something_ships_for_every_case(arch, dtype):
    for kernel in configs.KERNELS:
        for tma in (True, False) if configs.uses_descriptors(arch) else (False,):
            for channels in (1, 64, 192, 384, 1152):
                shipped = configs.shipped(kernel, arch, dtype, channels, tma)
                assert shipped or (kernel == "one_pass" and channels > 192)
                assert len(shipped) <= 6


def test_every_shipped_configuration_is_audited():
    """Each at least at one width, on each architecture."""
    seen = {(c.kernel, c.config, c.arch, "pointers" in c.shape, "fp32" in c.shape) for c in audit.cases()}
    for arch in audit.ARCHITECTURES:
        for kernel in configs.KERNELS:
            for dtype in (torch.float32, torch.bfloat16):
                for tma in (True, False) if configs.uses_descriptors(arch) and dtype != torch.float32 else (False,):
                    for channels in (64, 192, 384, 1024):
                        for config in configs.shipped(kernel, arch, dtype, channels, tma):
                            assert (kernel, str(config), arch, not tma, dtype == torch.float32) in seen


def test_wrong_arguments():
    done = run("--kernel", "fc3")
    assert done.returncode == 2
    assert "fc3" in done.stderr
    assert "hidden_gradient" in done.stderr
    done = run("--kernel", "fc1", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
