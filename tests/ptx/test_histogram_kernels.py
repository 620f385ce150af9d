"""The PTX that nvcc makes of csrc/histogram_cuda.cu, executed: counts exactly, moments to rounding, copies early and late.

Its launches are planned by its own function. Skipped where there is no CUDA toolkit or no C++ compiler.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import executor
import numpy as np
import pytest
import torch
from places import REPOSITORY

PLANNER = Path(__file__).parents[1] / "support" / "ptx" / "histogram_plan.cpp"
KINDS = {torch.float32: "f", torch.bfloat16: "NS_8BFloat16E", torch.float16: "NS_4HalfE", torch.float64: "d"}
CHANNEL, LAYER, SAMPLE = range(3)
COLUMNS, LANES = range(2)
GRID, CODES_RULE, NOTHING = range(3)
CODES = 10240
GPU = (1, 227 * 1024, 228 * 1024, 1024)  # multiprocessors: one, so that there are few blocks; the rest is an H200's
NARROW = (1, 48 * 1024, 64 * 1024, 1024)


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("no nvcc here: install a CUDA toolkit, or set CUDA_HOME")
    return found


@dataclass
class Compiled:
    """The kernels, read when they are asked for, and the planner."""

    ptx: str
    planner: ctypes.CDLL

    @cached_property
    def kernels(self) -> dict[str, executor.Kernel]:
        return executor.parse(self.ptx)

    def find(self, pattern: str) -> executor.Kernel:
        (name,) = [name for name in self.kernels if re.search(pattern, name)]
        return self.kernels[name]


@pytest.fixture(scope="module", params=[90, pytest.param(80, marks=pytest.mark.every_tile)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ and no clang++ here")
    from torch.utils.cpp_extension import include_paths

    folder = tmp_path_factory.mktemp("histogram")
    setup = (REPOSITORY / "setup.py").read_text()
    (abi,) = re.findall(r'^STABLE_TORCH_ABI = "?(\w+)"?', setup, re.MULTILINE)
    includes = [f"-I{path}" for path in (REPOSITORY / "csrc", *include_paths())]
    flags = [
        "-std=c++17",
        "-O3",
        "-fmad=false",
        f"-DTORCH_TARGET_VERSION={abi}",
        "-DUSE_CUDA",
        f"-arch=sm_{request.param}",
    ]
    source = REPOSITORY / "csrc" / "histogram_cuda.cu"
    command = [nvcc(), *flags, "--ptx", *includes, source, "-o", folder / "histogram.ptx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{REPOSITORY / 'csrc'}"]
    subprocess.run([compiler, *flags, PLANNER, "-o", folder / "plan.so"], check=True, capture_output=True)
    return Compiled((folder / "histogram.ptx").read_text(), ctypes.CDLL(str(folder / "plan.so")))


@dataclass
class Call:
    """A histogram of one tensor [outer, rows, columns], as the operator would launch it."""

    compiled: Compiled
    x: torch.Tensor
    grid: np.ndarray | None
    bins: int
    per: int
    statistics: bool
    gpu: tuple[int, ...] = GPU

    @property
    def targets(self) -> int:
        return (self.x.shape[2], 1, self.x.shape[0])[self.per]

    def plan(self, address: int, results: list[int]) -> tuple[list[bytes], np.ndarray, int]:
        """Parameters and facts of each launch, and the rows of partial moments."""
        tensors = np.array([address, *self.x.shape, *self.x.stride(), 0], np.int64)
        given = np.array(results, np.int64)
        gpu, partials = np.array(self.gpu, np.int64), np.zeros(1, np.int64)
        size = self.compiled.planner.launch_bytes()
        launches, facts = np.zeros(4 * size, np.uint8), np.zeros((4, 5), np.int64)

        def at(array: np.ndarray) -> ctypes.c_void_p:
            return ctypes.c_void_p(array.ctypes.data)

        count = self.compiled.planner.plan_launches(
            *(ctypes.c_int64(n) for n in (self.x.element_size(), 1)),
            at(tensors),
            *(ctypes.c_int64(n) for n in (self.per, self.bins)),
            *map(at, (given, gpu, launches, facts, partials)),
        )
        return [launches[size * n :][:size].tobytes() for n in range(count)], facts[:count], int(partials[0])

    def run(self, order: executor.Order) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """counts, outside, moments, and the layout of the launch."""
        storage = torch.empty(0, dtype=torch.uint8).set_(self.x.untyped_storage()).numpy()
        offset = self.x.storage_offset() * self.x.element_size()
        counts = np.zeros((self.targets, self.bins), np.int64)
        outside, moments = np.zeros((self.targets, 5), np.int64), np.full((self.targets, 7), math.nan)
        _, _, rows = self.plan(0, [0, 0, 0, 0, int(self.statistics)])
        partials = np.full((max(rows, 1), 7), math.nan)
        held = [storage, np.zeros(1) if self.grid is None else self.grid, counts, outside, partials, moments]
        memory = executor.GlobalMemory(executor.GlobalMemory.needed(*(a.nbytes for a in held)))
        places = [
            memory.add(np.ascontiguousarray(a).reshape(-1).view(np.uint8), writable=n > 1) if a.nbytes else 0
            for n, a in enumerate(held)
        ]
        results = [0 if self.grid is None else places[1], 0, places[2], places[3], places[4] if self.statistics else 0]
        launches, facts, _ = self.plan(places[0] + offset, results)
        rule = NOTHING if self.bins == 0 else CODES_RULE if self.grid is None else GRID
        with_moments = int(rule != GRID or self.statistics or self.x.dtype == torch.float64)
        for parameters, (blocks, threads, shared, layout, targets) in zip(launches, facts.tolist(), strict=True):
            pattern = f"HistogramI{KINDS[self.x.dtype]}LNS_6LayoutE{layout}ELNS_4RuleE{rule}ELb{with_moments}E"
            executor.launch(
                self.compiled.find(pattern),
                memory,
                [parameters],
                grid=(blocks, 1, 1),
                threads=threads,
                shared=shared,
                order=order,
                strict=False,
            )
            if self.statistics:
                executor.launch(
                    self.compiled.find("merge_kernel"),
                    memory,
                    [parameters, places[5].to_bytes(8, "little")],
                    grid=(-(-targets // 8), 1, 1),
                    threads=256,
                    order=order,
                    strict=False,
                )
        got = [
            memory.read(place, a.nbytes).view(a.dtype).reshape(a.shape) if a.nbytes else a
            for place, a in zip(places, held, strict=True)
        ]
        return got[2], got[3], got[5], int(facts[0, 3])


def values(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal values, some on the edges of bins, some that no bin holds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
    x = torch.where(torch.rand(shape, generator=generator) < 0.2, (x * 16).round() / 16, x)
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3e38, 0.0, 65504.0], dtype=torch.float64)
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.05, chosen, x).to(dtype)


def expected(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The rule in words: bin = floor((value − anchor)·inv_width) − first, in float64; codes are in the order of values."""
    order = ((2, 0, 1), (0, 1, 2), (0, 1, 2))[call.per]
    rows = call.x.double().numpy().transpose(order).reshape(call.targets, -1)
    counts, outside = np.zeros((call.targets, call.bins), np.int64), np.zeros((call.targets, 5), np.int64)
    for target, row in enumerate(rows):
        outside[target, 2:] = np.isnan(row).sum(), (row == math.inf).sum(), (row == -math.inf).sum()
        row = row[np.isfinite(row)]
        if call.bins == 0:
            continue
        if call.grid is None:
            bits = torch.from_numpy(np.abs(row)).bfloat16().view(torch.int16).numpy().astype(np.int64)
            code = (bits - 103 * 128).clip(0)
            under, over = (code >= CODES // 2) & (row < 0), (code >= CODES // 2) & (row > 0)
            index = code + (row < 0) * (CODES // 2)
        else:
            anchor, inv_width, first, _ = call.grid[target]
            index = np.floor((row - anchor) * inv_width) - first
            under, over = index < 0, index >= call.bins
        outside[target, :2] = under.sum(), over.sum()
        np.add.at(counts[target], index[~(under | over)].astype(np.int64), 1)
    return counts, outside


def check(call: Call, layout: int) -> None:
    for order in (executor.EARLY, executor.LATE):
        counts, outside, moments, used = call.run(order)
        assert used == layout
        true_counts, true_outside = expected(call)
        np.testing.assert_array_equal(outside, true_outside)
        np.testing.assert_array_equal(counts, true_counts)
        if not call.statistics:
            continue
        order_of_axes = ((2, 0, 1), (0, 1, 2), (0, 1, 2))[call.per]
        for got, row in zip(
            moments, call.x.double().numpy().transpose(order_of_axes).reshape(call.targets, -1), strict=True
        ):
            row = row[np.isfinite(row)]
            assert (got[0], got[5], got[6]) == (len(row), row.min(), row.max())
            if np.abs(row).max() < 1e30:
                np.testing.assert_allclose(got[1], row.mean(), rtol=1e-9, atol=1e-9)
                np.testing.assert_allclose(got[2], row.var() * len(row), rtol=1e-9)


def grid_of(targets: int, dyadic: bool) -> np.ndarray:
    """64 bins from −2 on, of the width 1/16, or of one that is no power of two."""
    width = 0.0625 if dyadic else 0.0637
    return np.array([[0.0 if dyadic else 0.01, 1 / width, -32.0, math.nan]] * targets)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("per", "shape", "layout"), [(CHANNEL, (2, 37, 48), COLUMNS), (SAMPLE, (3, 40, 33), LANES)])
def test_grids(compiled: Compiled, dtype: torch.dtype, per: int, shape: tuple[int, int, int], layout: int):
    x = values(shape, dtype)
    for statistics, dyadic in ((True, False), (False, True)):
        call = Call(compiled, x, None, 64, per, statistics)
        call.grid = grid_of(call.targets, dyadic)
        check(call, layout)


@pytest.mark.parametrize("per", [CHANNEL, LAYER])
def test_codes_and_moments_alone(compiled: Compiled, per: int):
    x = values((2, 33, 24), torch.bfloat16, 1)
    layout = COLUMNS if per == CHANNEL else LANES
    check(Call(compiled, x, None, 0, per, True), layout)
    check(
        Call(compiled, x, None, CODES, per, True, NARROW), layout
    )  # no room in shared memory: counted in device memory
    check(Call(compiled, x.float(), None, 0, per, True), layout)


def test_rows_that_are_not_aligned(compiled: Compiled):
    wide = values((2, 37, 53), torch.bfloat16, 2)
    for x in (wide[:, :, 5:], wide.transpose(1, 2)):
        call = Call(compiled, x, None, 64, CHANNEL, True)
        call.grid = grid_of(call.targets, True)
        check(call, COLUMNS if x.stride(2) == 1 else LANES)
