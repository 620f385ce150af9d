"""Faults planted into compiled kernels are found: by a wrong result, a race, a deadlock, or an access out of bounds."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from ptx_cases import Case, default_cases, every_case
from ptx_worker import Worker


def first(kernel: str, arch: int, stages: int | None = None, *, tma: bool = False, channels: int | None = None) -> Case:
    """The first case of a kernel, for bfloat16 and widths of whole vectors."""
    return next(
        case
        for case in (default_cases() if stages is None else every_case())
        if (case.kernel, case.arch, case.dtype, case.tma) == (kernel, arch, "bf16", tma)
        and stages in (None, case.config.stages)
        and channels in (None, case.channels)
        and case.channels % 8 == 0
    )


ONE_PASS = first("one_pass", 90, 2, tma=True)  # whose loads are under way through its loop
HOPPER, AMPERE, ROWS = first("fc2", 90, tma=True), first("fc1", 80), first("layer_norm", 80, channels=192)


@pytest.mark.parametrize(
    ("case", "kind", "place", "said"),
    [
        (ONE_PASS, "wgmma wait", 2, "wrong"),
        (ONE_PASS, "wgmma wait", 5, "never waited for"),
        (ONE_PASS, "mbarrier wait", 0, "read of what a tensor load wrote"),
        (ONE_PASS, "mbarrier wait", 4, "more arrivals at an mbarrier"),
        (ONE_PASS, "proxy fence", 4, "through the asynchronous proxy"),
        (ONE_PASS, "box", 0, "deadlock"),
        (HOPPER, "wgmma wait", 0, "tensor load of what wgmma of warpgroup"),
        (HOPPER, "expected bytes", 1, "deadlock"),
        (HOPPER, "store wait", 0, "never waited for"),
        (HOPPER, "swizzle", 0, "wrong"),
        (AMPERE, "cp.async wait", 0, "wrong"),
        (AMPERE, "cp.async wait", 1, "wrote"),
        (AMPERE, "transposed", 0, "wrong"),
        (AMPERE, "copies of fewer bytes", 0, "wrong|outside of every tensor"),
        (AMPERE, "global offset", 0, "outside of a tensor"),
        (ROWS, "sum over fewer lanes", 0, "wrong"),
    ],
    ids=str,
)
def test_a_planted_fault_is_found(case: Case, kind: str, place: int, said: str, worker: Worker):
    """At the place given or, in what another Triton compiles, at another one: not everything that is removed was needed."""
    number = worker.ask(do="places", case=str(case), kind=kind)
    seen = []
    for at in sorted(range(number), key=lambda n: (n - place) % number):
        seen.append(worker.ask(do="plant", case=str(case), kind=kind, place=at))
        if any(word in outcome for word in said.split("|") for outcome in seen[-1]):
            return
    raise AssertionError(seen)


def test_a_wait_that_only_one_order_needs(worker: Worker):
    """Why there are several: with products done at their issue, this one is right."""
    number = worker.ask(do="places", case=str(ONE_PASS), kind="wgmma wait")
    found = [worker.ask(do="plant", case=str(ONE_PASS), kind="wgmma wait", place=at) for at in range(2, number)]
    assert any({"right", "wrong"} <= set(outcomes) for outcomes in found), found


@pytest.mark.parametrize("case", [AMPERE, ROWS], ids=str)
def test_barriers_that_are_missing_are_races(case: Case, worker: Worker):
    """Each one but for the first, which in a pipelined loop has nothing before it to wait for."""
    number = worker.ask(do="places", case=str(case), kind="barrier")
    assert number >= 5
    outcomes = [worker.ask(do="plant", case=str(case), kind="barrier", place=place)[0] for place in range(number)]
    assert sum("race in shared memory" in outcome for outcome in outcomes) >= number - 1, outcomes
