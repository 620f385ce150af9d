"""The PTX of the fused kernels, executed: against float64, in four orders of their asynchronous parts."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from executor import ORDERS
from ptx_cases import Case, default_cases, every_case
from ptx_worker import Worker

from lambda_kernels import audit
from lambda_kernels.ops.ln_mlp.fused.kernels import configs

DEFAULTS = default_cases()
OTHERS = [case for case in every_case() if case not in DEFAULTS]


def check(worker: Worker, case: Case) -> None:
    found = worker.ask(do="execute", case=str(case))
    assert [run["order"] for run in found] == list(map(str, ORDERS))
    for run in found:
        assert len(run["errors"]) >= 1
        wrong = {name: error for name, error in run["errors"].items() if not error <= 1}
        assert not wrong, f"errors over their tolerances with {run['order']}: {wrong}"
    products = sum(
        n for opcode, n in found[0]["executed"].items() if opcode.startswith(("wgmma.mma_async", "mma.sync"))
    )
    on_tensor_cores = case.kernel in configs.KERNELS and (case.dtype != "fp32" or case.variant == "tf32")
    assert (products > 0) == on_tensor_cores
    moved = sum(n for opcode, n in found[0]["executed"].items() if opcode.startswith("cp.async.bulk.tensor"))
    assert (moved > 0) == case.tma


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_defaults(case: Case, worker: Worker):
    check(worker, case)


@pytest.mark.every_tile
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_every_tile(case: Case, worker: Worker):
    check(worker, case)


def test_every_shipped_configuration_has_a_case():
    """That the audit compiles, but for the architecture whose instructions are not known here."""
    seen = {(c.kernel, str(c.config), c.arch, c.tma, c.dtype == "fp32") for c in (*DEFAULTS, *OTHERS)}
    shipped = {
        (c.kernel, c.config, c.arch, "pointers" not in c.shape, "fp32" in c.shape)
        for c in audit.cases((80, 90), configs.KERNELS)
    }
    assert shipped <= seen
    kernels = {c.kernel for c in DEFAULTS}
    assert {*configs.KERNELS, *audit.ROW_KERNELS} <= kernels
    for kernel in configs.KERNELS:
        for arch in (80, 90):
            of_kernel = {(c.dtype, c.tma) for c in DEFAULTS if (c.kernel, c.arch) == (kernel, arch)}
            assert of_kernel == {("bf16", False), ("fp32", False)} | ({("bf16", True)} if arch == 90 else set())
