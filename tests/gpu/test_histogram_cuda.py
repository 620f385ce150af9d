"""The CUDA half of the histogram counts exactly as the CPU half does, and its moments agree to rounding."""

from __future__ import annotations

import math

import pytest
import torch
from extension_support import require_extension
from torch import Tensor

from lambda_kernels.ops import histogram as ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PER = ("channel", "layer", "sample")
CODES = 10240


@pytest.fixture(autouse=True)
def _extension() -> None:
    require_extension()


def count(x: Tensor | list[Tensor], packed: Tensor | None, bins: int, per: str, *, statistics: bool, only=None):
    """The operator itself, for tensors [outer, rows, columns]."""
    tensors = [x] if isinstance(x, Tensor) else x
    return torch.ops.lambda_kernels.histogram(tensors, packed, bins, PER.index(per), statistics, only)


def uniform(rows: int, bins: int, low: float = -2.0, high: float = 2.0) -> Tensor:
    return torch.tensor([low, bins / (high - low), 0.0, high], dtype=torch.float64).repeat(rows, 1)


def dyadic(rows: int, bins: int) -> Tensor:
    scale = 2.0 ** (math.floor(math.log2(bins)) - 2)
    return torch.tensor([0.0, scale, -math.floor(bins / 2), math.nan], dtype=torch.float64).repeat(rows, 1)


def rows_of(x: list[Tensor], per: str) -> int:
    return sum({"channel": t.shape[2], "layer": 1, "sample": t.shape[0]}[per] for t in x)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """On the CPU, with every kind of special value in it if there is room."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if x.numel() > 20:
        special = [math.nan, math.inf, -math.inf, 2.0, -2.0, 0.0, -0.0, 1e-40, 3e4, -3e4]
        x.view(-1)[:10] = torch.tensor(special).to(dtype)
    return x


def assert_moments(got: Tensor, expected: Tensor) -> None:
    """Both [K, 7]: count, mean, M2, their low parts, minimum, maximum."""
    got = got.cpu()
    assert torch.equal(got[:, 0], expected[:, 0])
    torch.testing.assert_close(got[:, 5:], expected[:, 5:], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[:, 2], expected[:, 2], rtol=1e-11, atol=1e-300)
    largest = expected[:, 5:].abs().amax(1).nan_to_num(0)
    assert ((got[:, 1] - expected[:, 1]).abs() <= 1e-13 * largest).all()


def assert_as_on_cpu(
    x: Tensor | list[Tensor],
    packed: Tensor | None,
    bins: int,
    per: str = "channel",
    *,
    statistics: bool = True,
    only: Tensor | None = None,
) -> None:
    """Tensors are on the GPU, the others on the CPU."""
    tensors = [x] if isinstance(x, Tensor) else x
    expected = count([t.cpu() for t in tensors], packed, bins, per, statistics=statistics, only=only)
    there = [None if t is None else t.cuda() for t in (packed, only)]
    got = count(tensors, there[0], bins, per, statistics=statistics, only=there[1])
    assert all(t.is_cuda for t in got)
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0)
    assert got[2].shape == expected[2].shape
    if statistics:
        assert_moments(got[2], expected[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (1, 7, 3),
        (2, 197, 192),
        (3, 1700, 33),
        (2, 9001, 104),  # many turns of the stages, the last tile of channels and the last batches not full
        (1, 1, 300),
        (1, 200_000, 1),
        (1, 0, 5),
        (2, 5, 0),
    ],
)
@pytest.mark.parametrize("bins", [0, 1, 256, 3000, 65536])  # tables from 32 columns to none
@pytest.mark.parametrize("per", PER)
def test_as_on_cpu(dtype: torch.dtype, shape: tuple[int, int, int], bins: int, per: str) -> None:
    x = normal(*shape, dtype=dtype)
    rows = rows_of([x], per)
    assert_as_on_cpu(x.cuda(), uniform(rows, bins) if bins else None, bins, per)
    if bins > 1:
        assert_as_on_cpu(x.cuda(), dyadic(rows, bins), bins, per, statistics=False)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "view", ["transposed", "swapped", "rows", "columns", "inside", "every third", "misaligned", "expanded"]
)
def test_strides(view: str, dtype: torch.dtype, per: str) -> None:
    base = normal(6, 400, 96, dtype=dtype).cuda()
    x = {
        "transposed": lambda: base.transpose(1, 2),
        "swapped": lambda: base.transpose(0, 1),
        "rows": lambda: base[:, 1:],
        "columns": lambda: base[:, :, 8:72],
        "inside": lambda: base[1:, 3:, 5:70],
        "every third": lambda: base[:, ::2, ::3],
        "misaligned": lambda: base.view(-1)[1 : 1 + 6 * 400 * 90].view(6, 400, 90),
        "expanded": lambda: base[:1].expand(6, 400, 96),
    }[view]()
    assert_as_on_cpu(x, uniform(rows_of([x], per), 100), 100, per)


@pytest.mark.parametrize("per", PER)
def test_lists_of_mixed_sizes(per: str) -> None:
    """More of them than one launch takes, some empty, some with neighbours along the rows."""
    tensors = [normal(1 + n % 3, 1 + 211 * n % 900, 1 + 37 * n % 200, seed=n).cuda() for n in range(60)]
    tensors[7] = tensors[7].transpose(1, 2)
    tensors[20] = torch.empty(3, 0, 17).cuda()
    assert_as_on_cpu(tensors, uniform(rows_of(tensors, per), 64), 64, per)


@pytest.mark.parametrize("per", PER)
def test_masked_rows_stay_zero(per: str) -> None:
    x = [normal(4, 500, 100, seed=n).cuda() for n in range(3)]
    rows = rows_of(x, per)
    only = torch.rand(rows, generator=torch.Generator().manual_seed(0)) < 0.5
    assert_as_on_cpu(x, uniform(rows, 256), 256, per, only=only)
    assert_as_on_cpu(x, uniform(rows, 256), 256, per, only=torch.zeros(rows, dtype=torch.bool))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("statistics", [True, False])
def test_codes(per: str, statistics: bool) -> None:
    """Every bfloat16 there is, and many of some."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(4, 256, 64)
    more = normal(4, 3000, 64, dtype=torch.bfloat16)
    assert_as_on_cpu([x.cuda(), more.cuda()], None, CODES, per, statistics=statistics)


def test_values_at_the_edges_of_bins() -> None:
    random = torch.Generator().manual_seed(0)
    for bins in (1, 3, 255, 256, 4096):
        low, high = sorted(torch.randn(2, generator=random, dtype=torch.float64).tolist())
        edges = (low + (high - low) / bins * torch.arange(bins + 1, dtype=torch.float64)).float()
        near = [edges, edges.nextafter(torch.tensor(-9e9)), edges.nextafter(torch.tensor(9e9))]
        x = torch.cat(near).repeat(200).view(1, -1, 1).cuda()
        assert_as_on_cpu(x, uniform(1, bins, low, high), bins, "layer")


def test_python_interface_takes_lists() -> None:
    tensors = [torch.randn(2, 197, 192, device="cuda"), torch.randn(5, 64, device="cuda")]
    grid = ops.uniform_grid(-2.0, 2.0, 16, channels=256, device="cuda")
    result = ops.histogram(tensors, grid, statistics=True, backend="extension")
    assert result.backend == "extension"
    assert (result.counts.sum(1) + result.outside.sum(1)).tolist() == [394] * 192 + [5] * 64
    assert ops.histogram(tensors, grid).backend == "extension"


def test_runs_on_the_current_stream() -> None:
    packed = uniform(64, 4, 0.0, 1.0).cuda()
    stream = torch.cuda.Stream()

    def work() -> tuple[torch.Tensor, ...]:
        x = torch.zeros(1, 1 << 16, 64, device="cuda").add_(0.3)
        return count(x, packed, 4, "channel", statistics=True)

    with torch.cuda.stream(stream):
        work()  # loads what there is to load, which may wait for the device
        stream.synchronize()
        torch.cuda._sleep(1_000_000_000)  # long enough for a launch on another stream to come too early
        counts, _, moments = work()
    assert not stream.query()
    stream.synchronize()
    assert (counts[:, 1] == 1 << 16).all()
    assert (moments[:, 2] == 0).all()


def test_never_waits_for_the_device() -> None:
    x, packed = torch.randn(1, 1000, 64, device="cuda"), uniform(64, 256).cuda()
    event = torch.cuda.Event()
    for asleep in (False, True):  # once before, so that every kernel is loaded: that may wait for the device
        if asleep:
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000_000)
            event.record()
        for per in PER:
            count(x, packed if per == "channel" else packed[:1], 256, per, statistics=True)
    assert not event.query()


def test_same_results_in_every_run() -> None:
    x = torch.randn(2, 50_000, 192, device="cuda")
    packed = uniform(192, 256).cuda()
    first = count(x, packed, 256, "channel", statistics=True)
    for _ in range(5):
        again = count(x, packed, 256, "channel", statistics=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("bins", [256, 1500])  # within 48 KiB of shared memory, and beyond
@pytest.mark.parametrize("per", PER)
def test_captured_in_a_graph(per: str, bins: int) -> None:
    x = [torch.zeros(3, 700, 96, device="cuda") for _ in range(2)]
    packed = uniform(rows_of(x, per), bins).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        count(x, packed, bins, per, statistics=True)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = count(x, packed, bins, per, statistics=True)
    for seed in range(3):
        for n, tensor in enumerate(x):
            tensor.copy_(normal(*tensor.shape, seed=10 * seed + n))
        graph.replay()
        expected = count([t.cpu() for t in x], packed.cpu(), bins, per, statistics=True)
        assert torch.equal(results[0].cpu(), expected[0])
        assert torch.equal(results[1].cpu(), expected[1])
        assert_moments(results[2], expected[2])


@pytest.mark.parametrize("per", ["channel", "layer"])
def test_more_than_2_to_the_31_values(per: str) -> None:
    rows = 2**31 + 77
    x = torch.full((1, 1, 1), 0.6, device="cuda").expand(1, rows, 1)
    counts, outside, moments = count(x, uniform(1, 2, 0.0, 1.0).cuda(), 2, per, statistics=True)
    assert counts.tolist() == [[0, rows]]
    assert outside.sum() == 0
    value = x[0, 0, 0].item()
    assert moments[0].tolist() == [rows, value, 0.0, 0.0, 0.0, value, value]


@pytest.mark.parametrize("per", PER)
def test_offsets_beyond_2_to_the_31(per: str) -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free device memory")
    rows, channels = 2**21 + 3, 1024
    x = torch.zeros(1, rows, channels, device="cuda", dtype=torch.bfloat16)
    x[:, -3:] = 0.75
    targets = rows_of([x], per)
    counts, _, moments = count(x, uniform(targets, 2, 0.0, 1.0).cuda(), 2, per, statistics=True)
    times = channels // targets
    assert (counts == times * torch.tensor([2**21, 3], device="cuda")).all()
    assert (moments[:, 0] == times * rows).all()


def test_mixed_devices_are_listed() -> None:
    with pytest.raises(ValueError, match=r"x on cuda:0, grid on cpu"):
        ops.histogram(torch.zeros(3, 1, device="cuda"), ops.uniform_grid(0.0, 1.0, 4))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_on_a_device_that_is_not_current() -> None:
    x = normal(1, 1000, 8)
    packed = uniform(8, 10)
    got = count(x.to("cuda:1"), packed.to("cuda:1"), 10, "channel", statistics=True)
    assert torch.equal(got[0].cpu(), count(x, packed, 10, "channel", statistics=True)[0])
    assert torch.cuda.current_device() == 0
