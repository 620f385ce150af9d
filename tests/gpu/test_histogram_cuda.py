"""The CUDA half of the histogram counts exactly as the CPU half does."""

from __future__ import annotations

import math

import pytest
import torch
from extension_support import require_extension

from lambda_kernels.ops import histogram as ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def _extension() -> None:
    require_extension()


def on(device: str, grid: ops.Grid) -> ops.Grid:
    return ops.Grid(*grid.packed().to(device).unbind(1), bins=grid.bins)


def assert_as_on_cpu(x: torch.Tensor, grid: ops.Grid) -> None:
    """`x` is on the GPU, `grid` on the CPU."""
    expected = ops.histogram(x.cpu(), grid, backend="extension")
    result = ops.histogram(x, on("cuda", grid), backend="extension")
    assert result.backend == "extension"
    assert result.counts.is_cuda
    torch.testing.assert_close(result.counts.cpu(), expected.counts, rtol=0, atol=0)
    torch.testing.assert_close(result.outside.cpu(), expected.outside, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (197, 192), (5000, 33), (1, 1000), (200_000, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize("bins", [1, 256, 3000, 65536])  # in shared memory, and too many for it
def test_as_on_cpu(dtype: torch.dtype, shape: tuple[int, int], bins: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if x.numel() > 10:
        x.view(-1)[:6] = torch.tensor([math.nan, math.inf, -math.inf, 2.0, -2.0, 0.0]).to(dtype)
    assert_as_on_cpu(x.cuda(), ops.uniform_grid(-2.0, 2.0, bins, channels=shape[1]))
    if bins > 1:
        assert_as_on_cpu(x.cuda(), ops.dyadic_grid(*ops.extrema(x), bins))


@pytest.mark.parametrize("view", ["transposed", "columns", "rows", "expanded"])
def test_strides(view: str) -> None:
    base = torch.randn(999, 70, generator=torch.Generator().manual_seed(0)).cuda()
    x = {
        "transposed": base.t(),
        "columns": base[:, 3:60:3],
        "rows": base[5::7],
        "expanded": base[:1].expand(500, 70),
    }[view]
    assert_as_on_cpu(x, ops.uniform_grid(-1.0, 1.0, 100, channels=x.shape[1]))


def test_auto_takes_the_extension_and_says_so() -> None:
    grid = on("cuda", ops.uniform_grid(0.0, 1.0, 4))
    assert ops.histogram(torch.zeros(3, 1, device="cuda"), grid).backend == "extension"


def test_runs_on_the_current_stream() -> None:
    grid = on("cuda", ops.uniform_grid(0.0, 1.0, 4, channels=64))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # long enough for a launch on another stream to come too early
        x = torch.zeros(1 << 16, 64, device="cuda").add_(0.3)
        counts = ops.histogram(x, grid, backend="extension").counts
    stream.synchronize()
    assert (counts[:, 1] == 1 << 16).all()


def test_same_counts_in_every_run() -> None:
    x = torch.randn(100_000, 192, device="cuda")
    grid = on("cuda", ops.uniform_grid(-3.0, 3.0, 256, channels=192))
    first = ops.histogram(x, grid).counts
    assert all(torch.equal(first, ops.histogram(x, grid).counts) for _ in range(5))


def test_more_than_2_to_the_31_rows() -> None:
    rows = 2**31 + 77
    x = torch.full((1, 1), 0.6, device="cuda").expand(rows, 1)
    result = ops.histogram(x, on("cuda", ops.uniform_grid(0.0, 1.0, 2)), backend="extension")
    assert result.counts.tolist() == [[0, rows]]


def test_offsets_beyond_2_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free device memory")
    rows, channels = 2**21 + 3, 1024
    x = torch.zeros(rows, channels, device="cuda", dtype=torch.bfloat16)
    x[-3:] = 0.75
    result = ops.histogram(x, on("cuda", ops.uniform_grid(0.0, 1.0, 2, channels=channels)), backend="extension")
    assert (result.counts == torch.tensor([2**21, 3], device="cuda")).all()


def test_mixed_devices_are_listed() -> None:
    with pytest.raises(ValueError, match=r"x on cuda:0, grid on cpu"):
        ops.histogram(torch.zeros(3, 1, device="cuda"), ops.uniform_grid(0.0, 1.0, 4))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_on_a_device_that_is_not_current() -> None:
    x = torch.randn(1000, 8, device="cuda:1")
    grid = ops.uniform_grid(-1.0, 1.0, 10, channels=8)
    result = ops.histogram(x, on("cuda:1", grid), backend="extension")
    torch.testing.assert_close(result.counts.cpu(), ops.histogram(x.cpu(), grid).counts, rtol=0, atol=0)
    assert torch.cuda.current_device() == 0
