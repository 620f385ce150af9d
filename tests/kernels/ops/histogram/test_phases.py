"""The CUDA half of the histogram without a GPU: its launches, planned by its own function and run phase by phase.

`cuda_emulation.cpp` is compiled by g++ here. What is expected comes from numpy, from the rule as it stands in words: a
value's bin is floor((value − anchor) · inv_width) − first in float64.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import REPOSITORY

EMULATION = Path(__file__).with_name("cuda_emulation.cpp")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
CHANNEL, LAYER, SAMPLE = range(3)
CODES = 10240
FINDINGS = (
    "out_of_bounds misaligned races unset conflicts take_conflicts launches blocks width shared_bytes threads"
    " vector_loads copies stages in_device_memory fixed rest"
)


@dataclass(frozen=True)
class Gpu:
    """What launches are planned for."""

    multiprocessors: int
    shared_of_block: int
    shared_of_multiprocessor: int
    threads: int = 1024


H200 = Gpu(132, 227 * 1024, 228 * 1024)
ADA = Gpu(6, 99 * 1024, 100 * 1024)
TINY = Gpu(2, 48 * 1024, 64 * 1024)  # tables get narrow, or do not fit at all


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ and no clang++ here")
    path = tmp_path_factory.mktemp("emulation") / "cuda_emulation.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{REPOSITORY / 'csrc'}"]
    subprocess.run([compiler, *flags, EMULATION, "-o", path], check=True, capture_output=True)
    return ctypes.CDLL(str(path))


def targets_of(x: torch.Tensor, per: int) -> int:
    return (x.shape[2], 1, x.shape[0])[per]


def emulate(
    library: ctypes.CDLL,
    tensors: Sequence[torch.Tensor],
    grid: np.ndarray | None,
    bins: int,
    per: int,
    *,
    statistics: bool = True,
    only: np.ndarray | None = None,
    gpu: Gpu = H200,
) -> SimpleNamespace:
    """counts, outside, moments, and what the emulation found out; fails where memory is used as it must not be."""
    total = sum(targets_of(x, per) for x in tensors)
    rows, target = [], 0
    for x in tensors:
        storage = x.untyped_storage()
        if x.numel():
            bounds = (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
            rows.append((x.data_ptr(), *x.shape, *x.stride(), target, *bounds))
        target += targets_of(x, per)
    counts, outside = np.zeros((total, bins), np.int64), np.zeros((total, 5), np.int64)
    moments = np.full((total, 7), math.nan)
    moments[:, :5] = 0
    findings = np.zeros(len(FINDINGS.split()), np.int64)
    device = (gpu.multiprocessors, gpu.shared_of_block, gpu.shared_of_multiprocessor, gpu.threads)
    packed = [np.array(rows, np.int64), np.array(device, np.int64)]

    def address(array: np.ndarray | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if array is None else array.ctypes.data)

    library.emulate(
        *(ctypes.c_int64(n) for n in (DTYPES[tensors[0].dtype], len(rows))),
        address(packed[0]),
        *(ctypes.c_int64(n) for n in (per, bins)),
        *(address(a) for a in (grid, only, counts, outside, moments if statistics else None, packed[1], findings)),
    )
    found = SimpleNamespace(**dict(zip(FINDINGS.split(), findings.tolist(), strict=True)))
    assert (found.out_of_bounds, found.misaligned, found.races, found.unset) == (0, 0, 0, 0)
    return SimpleNamespace(counts=counts, outside=outside, moments=moments, **vars(found))


def values_of_targets(tensors: Sequence[torch.Tensor], per: int) -> list[np.ndarray]:
    """The values of each row of the results, in float64."""
    found = []
    for x in tensors:
        wide = x.to(torch.float64).numpy()
        order = ((2, 0, 1), (0, 1, 2), (0, 1, 2))[per]
        found += list(wide.transpose(order).reshape(targets_of(x, per), -1))
    return found


def counted(values: np.ndarray, row: np.ndarray | None, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The rule in numpy."""
    counts, outside = np.zeros(bins, np.int64), np.zeros(5, np.int64)
    outside[2:] = np.isnan(values).sum(), (values == math.inf).sum(), (values == -math.inf).sum()
    values = values[np.isfinite(values)]
    if row is not None and bins:
        anchor, inv_width, first, closed_hi = row
        with np.errstate(all="ignore"):
            index = np.floor((values - anchor) * inv_width) - first
        closed = (index >= bins) & (values <= closed_hi)
        over, inside = (index >= bins) & ~closed, (index >= 0) & (index < bins)
        np.add.at(counts, index[inside].astype(np.int64), 1)
        counts[bins - 1] += closed.sum()
        outside[:2] = len(values) - inside.sum() - over.sum() - closed.sum(), over.sum()
    elif bins:  # codes of bfloat16
        magnitude = np.abs(values)
        code = (torch.from_numpy(magnitude).bfloat16().view(torch.int16).numpy().astype(np.int64) - 103 * 128).clip(0)
        over = code >= CODES // 2
        np.add.at(counts, (code + (values < 0) * (CODES // 2))[~over], 1)
        outside[:2] = (over & (values < 0)).sum(), (over & (values > 0)).sum()
    return counts, outside


def check_moments(got: np.ndarray, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if not len(values):
        np.testing.assert_array_equal(got, [0, 0, 0, 0, 0, math.nan, math.nan])
        return
    wide = values.astype(np.longdouble)
    mean = wide.mean()
    distance = wide - mean
    m2 = float((distance**2).sum() - distance.sum() ** 2 / len(wide))  # as the mean is rounded
    assert (got[0], got[5], got[6]) == (len(values), values.min(), values.max())
    assert abs(got[1] - float(mean)) <= 1e-12 * abs(float(mean)) + 2.0**-50 * np.abs(values).max()
    assert abs(got[2] - m2) <= 1e-12 * m2
    if values.min() == values.max():
        assert got[2] == 0


def check(
    result: SimpleNamespace,
    tensors: Sequence[torch.Tensor],
    grid: np.ndarray | None,
    bins: int,
    per: int,
    *,
    statistics: bool = True,
    only: np.ndarray | None = None,
) -> None:
    for target, values in enumerate(values_of_targets(tensors, per)):
        if only is not None and not only[target]:
            values = values[:0]
        counts, outside = counted(values, None if grid is None else grid[target], bins)
        np.testing.assert_array_equal(result.outside[target], outside)
        np.testing.assert_array_equal(result.counts[target], counts)
        if statistics:
            check_moments(result.moments[target], values)


SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 3e38, -3e38, 65504.0, 0.5)


def view(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, specials: float) -> torch.Tensor:
    """Normal values of mean 0.3 with some special ones among them, [outer, rows, columns], in memory as `kind` says."""
    generator = torch.Generator().manual_seed(seed)
    outer, rows, columns = shape

    def filled(*sizes: int) -> torch.Tensor:
        x = torch.randn(sizes, generator=generator, dtype=torch.float64) + 0.3
        chosen = torch.randint(len(SPECIAL), sizes, generator=generator)
        x = torch.where(torch.rand(sizes, generator=generator) < specials, torch.tensor(SPECIAL).double()[chosen], x)
        edges = (x * 16).round() / 16  # on the edges of dyadic bins
        return torch.where(torch.rand(sizes, generator=generator) < 0.2, edges, x).to(dtype)

    if kind == "contiguous":
        return filled(outer, rows, columns)
    if kind == "transposed":
        return filled(outer, columns, rows).transpose(1, 2)
    if kind == "swapped":
        return filled(rows, outer, columns).transpose(0, 1)
    if kind == "without first row":
        return filled(outer, rows + 1, columns)[:, 1:]
    if kind == "columns":
        return filled(outer, rows, columns + 12)[:, :, 4 : 4 + columns]
    if kind == "inside":
        return filled(outer, rows + 1, columns + 12)[:, 1:, 4 : 4 + columns]
    if kind == "every third":
        return filled(outer, rows, 3 * columns)[:, :, ::3]
    if kind == "misaligned":
        return filled(outer * rows * columns + 1)[1:].view(shape)
    assert kind == "expanded"
    return filled(outer, 1, columns).expand(shape)


VIEWS = (
    "contiguous",
    "transposed",
    "swapped",
    "without first row",
    "columns",
    "inside",
    "every third",
    "misaligned",
    "expanded",
)


def grids(count: int, bins: int, seed: int) -> np.ndarray:
    """Of all kinds: fixed edges, bins of width 2^k, far from 0, too narrow for float32, malformed."""
    random = np.random.default_rng(seed)
    rows = np.empty((count, 4))
    for row in rows:
        kind = random.integers(10)
        if kind < 5:
            low, high = sorted(random.normal(0, 2, 2))
            row[:] = low, bins / (high - low), 0, high
        elif kind < 8:
            exponent = random.integers(-3, 12)
            row[:] = 0, 2.0**exponent, math.floor(random.normal() * 2.0**exponent), math.nan
        elif kind == 8:
            row[:] = random.choice([0.0, 1e-3, 1e6]), 2.0 ** random.integers(-130, 140), random.integers(-3, 3), 0.25
        else:
            row[:] = random.choice([0.0, math.nan, math.inf, -1.0, 1e-300, 1e300], 4)
    return np.ascontiguousarray(rows)


@st.composite
def problems(draw: st.DrawFn) -> dict:
    dtype = draw(st.sampled_from(list(DTYPES)))
    per = draw(st.sampled_from([CHANNEL, CHANNEL, LAYER, SAMPLE]))
    seed = draw(st.integers(0, 10**6))
    tensors = []
    for number in range(draw(st.sampled_from([1, 1, 2, 3]))):
        shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 90), st.integers(1, 70)))
        kind = draw(st.sampled_from(VIEWS))
        tensors.append(view(kind, shape, dtype, seed + number, draw(st.sampled_from([0, 0.01, 0.3]))))
    bins = draw(st.sampled_from([0, 1, 2, 7, 64, 256, 256, 1000, 3000, 10240, 65536]))
    total = sum(targets_of(x, per) for x in tensors)
    if total * bins > 400_000:
        bins = 256
    codes = bins == CODES and dtype is torch.bfloat16
    only = (
        np.random.default_rng(seed).random(total) < draw(st.sampled_from([0.1, 0.7])) if draw(st.booleans()) else None
    )
    return {
        "tensors": tensors,
        "grid": None if codes or not bins else grids(total, bins, seed),
        "bins": bins,
        "per": per,
        "statistics": draw(st.booleans()),
        "only": only,
    }


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(problem=problems(), gpu=st.sampled_from([H200, ADA, TINY]))
def test_any_problem(library, problem, gpu):
    check(emulate(library, gpu=gpu, **problem), **problem)


def uniform(total: int, bins: int, low: float = -4.0, high: float = 4.0) -> np.ndarray:
    """Fixed edges; the anchor is no power of two's multiple, so that the short cut for those is not taken."""
    return np.tile([low - 1 / 3, bins / (high - low), 0.0, math.nan], (total, 1))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("per", "shape", "kind"),
    [
        (CHANNEL, (2, 197, 192), "contiguous"),
        (CHANNEL, (4, 196, 64), "without first row"),
        (CHANNEL, (1, 9000, 3), "transposed"),
        (LAYER, (2, 97, 192), "contiguous"),
        (LAYER, (2, 96, 64), "without first row"),
        (SAMPLE, (3, 97, 192), "contiguous"),
    ],
)
def test_main_layouts(library, per, shape, kind, dtype, statistics):
    """What models give: 256 bins, no two lanes of a warp in one bank, values read as vectors, few by the definition."""
    x = view(kind, shape, dtype, 0, 0.0)
    grid = uniform(targets_of(x, per), 256)
    problem = {"tensors": [x], "grid": grid, "bins": 256, "per": per, "statistics": statistics}
    result = emulate(library, **problem)
    check(result, **problem)
    assert result.conflicts == 1
    assert result.width == 32
    assert result.in_device_memory == 0
    assert result.fixed + result.rest == x.numel()
    assert result.rest <= 0.003 * x.numel()
    assert result.vector_loads >= x.numel() / (16 // dtype.itemsize) * 0.95
    if per == CHANNEL and kind != "transposed":
        assert result.copies * 16 == x.numel() * dtype.itemsize  # each value once
        assert result.take_conflicts == max(1, dtype.itemsize // 4)  # 8 bytes take two turns of the banks
        assert result.stages == 3


def test_dyadic_bins_need_no_definition(library):
    x = view("contiguous", (1, 300, 64), torch.float32, 0, 0.0)
    grid = np.tile([0.0, 32.0, -128.0, math.nan], (64, 1))
    problem = {"tensors": [x.clamp(-4, 3.99)], "grid": grid, "bins": 256, "per": CHANNEL}
    result = emulate(library, **problem)
    check(result, **problem)
    assert result.rest == 0


@pytest.mark.parametrize("gpu", [H200, ADA, TINY], ids=["H200", "Ada", "tiny"])
@pytest.mark.parametrize("bins", [256, 1000, 3000, 9000, 20_000, 65_536])
@pytest.mark.parametrize("per", [CHANNEL, LAYER])
def test_tables_of_every_width(library, per, bins, gpu):
    x = view("contiguous", (1, 500, 3), torch.float32, 0, 0.02)
    problem = {"tensors": [x], "grid": uniform(targets_of(x, per), bins), "bins": bins, "per": per}
    result = emulate(library, gpu=gpu, **problem)
    check(result, **problem)
    assert result.shared_bytes <= gpu.shared_of_block
    assert bool(result.in_device_memory) == (4 * (bins + 5) > gpu.shared_of_block)


# GPUs on which 256 bins leave room for as many stages.
STAGES = {0: Gpu(2, 48 * 1024, 64 * 1024), 1: Gpu(2, 67 * 1024, 68 * 1024), 2: ADA, 3: H200}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("rows", [2, 4, 31, 33, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stages(library, dtype, rows, stages):
    """Blocks with fewer rows than a warp copies at once, and with many turns of the stages; a tile that is not full."""
    for kind in ("contiguous", "without first row", "inside", "swapped", "misaligned"):
        x = view(kind, (2, rows, 40), dtype, rows, 0.02)
        aligned = x.data_ptr() % 16 == 0 and all(n * dtype.itemsize % 16 == 0 for n in x.stride()[:2])
        problem = {"tensors": [x], "grid": uniform(40, 256), "bins": 256, "per": CHANNEL, "statistics": rows != 31}
        result = emulate(library, **problem, gpu=STAGES[stages])
        check(result, **problem)
        assert aligned == (kind != "misaligned" and (kind != "inside" or dtype.itemsize >= 4))
        assert result.stages == (stages if aligned else 0)
        assert result.copies == (x.numel() * dtype.itemsize // 16 if result.stages else 0)


@pytest.mark.parametrize("channels", [2, 4, 8, 12, 20, 33, 36, 60, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_no_multiple_of_16_bytes_are_read_value_by_value(library, dtype, channels):
    x = view("contiguous", (1, 300, channels), dtype, channels, 0.01)
    problem = {"tensors": [x], "grid": uniform(channels, 101), "bins": 101, "per": CHANNEL}
    result = emulate(library, **problem)
    check(result, **problem)
    row_bytes = channels * dtype.itemsize
    assert result.copies == (0 if row_bytes % 16 else 300 * row_bytes // 16)
    assert result.vector_loads == result.copies


def test_one_launch_holds_tensors_with_and_without_stages(library):
    """Among them one channel, channels without alignment, and neighbours along the rows."""
    shapes = [(1, 90, 64), (2, 90, 33), (1, 7, 128), (3, 50, 1)]
    tensors = [view("contiguous", shape, torch.float16, n, 0.01) for n, shape in enumerate(shapes)]
    tensors += [view("transposed", (1, 64, 40), torch.float16, 9, 0.01)]
    problem = {"tensors": tensors, "grid": uniform(sum(x.shape[2] for x in tensors), 64), "bins": 64, "per": CHANNEL}
    result = emulate(library, **problem)
    check(result, **problem)
    assert result.launches == 2
    assert result.copies == (90 * 64 + 7 * 128) // 8


ONE = Gpu(1, 227 * 1024, 228 * 1024)


@pytest.mark.parametrize("per", [CHANNEL, LAYER])
@pytest.mark.parametrize("outliers", [[0], [1], [2], [0, 1], [0, 1, 2, 3, 4], [10_000], [5000, 15_000]], ids=str)
def test_outliers_are_no_shift(library, per, outliers):
    """Around a value 10^5 σ away, the sums of a block of many others would lose as many digits as their number has."""
    x = torch.randn(1, 20_000, 4 if per == CHANNEL else 1, generator=torch.Generator().manual_seed(0))
    x[0, outliers] = 1e5
    problem = {"tensors": [x], "grid": None, "bins": 0, "per": per}
    result = emulate(library, **problem, gpu=ONE)
    check(result, **problem)
    m2 = x.double().sub(x.double().mean(1)).square().sum(1)[0].numpy()
    np.testing.assert_allclose(result.moments[:, 2], m2, rtol=2e-14)


@pytest.mark.parametrize("per", [CHANNEL, LAYER])
def test_a_shift_is_looked_for_behind_nan(library, per):
    """At the beginning, at every even place, and at the places that are looked at first."""
    for places in (slice(0, 700), slice(0, None, 2), slice(0, None, 250)):
        x = 1e6 + view("contiguous", (1, 1000, 4 if per == CHANNEL else 1), torch.float64, 0, 0.0)
        x[0, places] = math.nan
        problem = {"tensors": [x], "grid": None, "bins": 0, "per": per}
        check(emulate(library, **problem, gpu=ONE), **problem)


@pytest.mark.parametrize("per", [CHANNEL, LAYER, SAMPLE])
@pytest.mark.parametrize("rows", range(1, 10))
def test_a_shift_is_looked_for_in_no_other_memory(library, rows, per):
    x = torch.full((1, rows, 4), math.nan, dtype=torch.float64)
    problem = {"tensors": [x], "grid": None, "bins": 0, "per": per}
    check(emulate(library, **problem, gpu=ONE), **problem)


@pytest.mark.parametrize("per", [CHANNEL, LAYER, SAMPLE])
@pytest.mark.parametrize("kind", ["inside", "without first row", "swapped", "every third"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_walk_over_many_lines(library, dtype, kind, per):
    """Lines and outer indices that a thread passes more than once, in tensors that have no single stride."""
    x = view(kind, (40, 33, 52), dtype, 0, 0.01)
    problem = {"tensors": [x], "grid": uniform(targets_of(x, per), 16), "bins": 16, "per": per}
    check(emulate(library, gpu=ADA, **problem), **problem)


def test_a_target_of_many_blocks(library):
    """More of them than a warp has lanes."""
    x = view("contiguous", (1, 4096, 256), torch.float32, 0, 0.0)
    problem = {"tensors": [x], "grid": uniform(1, 4), "bins": 4, "per": LAYER}
    result = emulate(library, **problem)
    check(result, **problem)
    assert result.blocks > 2 * 32


def test_many_tensors_of_mixed_sizes_take_two_launches(library):
    shapes = [(1, 5 + 37 * n % 100, 1 + 11 * n % 70) for n in range(30)]
    tensors = [view("contiguous", shape, torch.bfloat16, n, 0.01) for n, shape in enumerate(shapes)]
    tensors.insert(3, torch.empty(2, 0, 7, dtype=torch.bfloat16))
    problem = {"tensors": tensors, "grid": uniform(sum(x.shape[2] for x in tensors), 64), "bins": 64, "per": CHANNEL}
    result = emulate(library, **problem)
    check(result, **problem)
    assert result.launches <= 3


def test_masked_targets_are_not_read(library):
    """A block whose targets are all masked returns at once: nothing is loaded."""
    x = view("contiguous", (1, 100, 64), torch.float32, 0, 0.0)
    only = np.arange(64) >= 32
    problem = {"tensors": [x], "grid": uniform(64, 256), "bins": 256, "per": CHANNEL}
    both, half = emulate(library, **problem), emulate(library, **problem, only=only)
    check(half, **problem, only=only)
    assert half.vector_loads < 0.6 * both.vector_loads
    assert emulate(library, **problem, only=np.zeros(64, bool)).vector_loads == 0


def test_codes(library):
    """Every bfloat16 there is."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for per, shape in ((LAYER, (1, 256, 256)), (CHANNEL, (1, 4096, 16)), (SAMPLE, (4, 64, 256))):
        problem = {"tensors": [x.view(shape)], "grid": None, "bins": CODES, "per": per, "statistics": False}
        result = emulate(library, **problem)
        check(result, **problem)


@pytest.mark.parametrize("bins", [1, 3, 255, 256, 4096, 65_536])
@pytest.mark.parametrize("seed", range(4))
def test_edges(library, bins, seed):
    """Values at the edges of bins and next to them, where float32 alone would err."""
    random = np.random.default_rng(seed)
    low, high = sorted(random.normal(0, 10.0 ** random.integers(-3, 4), 2))
    edges = np.float32(low + (high - low) / bins * np.arange(bins + 1))
    chosen = edges[random.integers(0, bins + 1, 4000)]
    near = np.concatenate([chosen, np.nextafter(chosen, np.float32(-9e9)), np.nextafter(chosen, np.float32(9e9))])
    x = torch.from_numpy(near).view(1, -1, 1)
    grid = np.array([[low, bins / (high - low), 0.0, high]])
    problem = {"tensors": [x], "grid": grid, "bins": bins, "per": LAYER}
    check(emulate(library, **problem), **problem)


def test_moments_keep_their_digits(library):
    """A mean a million times the deviation; the first values of a channel NaN."""
    generator = torch.Generator().manual_seed(0)
    x = 1e6 + torch.randn(1, 5000, 64, generator=generator, dtype=torch.float64)
    x[0, :5, 3] = math.nan
    x[0, :, 7] = math.nan
    problem = {"tensors": [x], "grid": None, "bins": 0, "per": CHANNEL}
    check(emulate(library, **problem), **problem)


def test_the_plan_fills_the_gpu_once(library):
    """One layer and twelve of them: nearly all multiprocessors busy until the end, never one block too many."""
    for count, rows in ((1, 3000), (12, 700)):
        x = torch.zeros(1, rows, 1).expand(1, rows, 768)
        problem = {"tensors": [x] * count, "grid": uniform(768 * count, 256), "bins": 256, "per": CHANNEL}
        result = emulate(library, **problem, statistics=False, gpu=Gpu(8, 227 * 1024, 228 * 1024))
        waves = result.blocks / (8 * 2)
        assert waves / math.ceil(waves) >= 0.9
        assert (result.counts.sum(1) == rows).all()
