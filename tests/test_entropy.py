"""Entropies against closed forms and numpy, and any split of the data against all of it at once."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lambda_kernels import EntropyMeter, NonFiniteActivationError, gaussian_entropy, histogram_entropy
from lambda_kernels.entropy import STD_FLOOR


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, shape[-1], base=10, dtype=torch.float64)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + 3).to(dtype)


def test_gaussian_is_log_sigma():
    x = sample(500, 7)
    expected = np.log2(x.double().numpy().std(0, ddof=1))
    assert np.allclose(gaussian_entropy(x).numpy(), expected, rtol=1e-12)
    nats = gaussian_entropy(x, base=math.e, constant=True).numpy()
    assert np.allclose(nats, expected * math.log(2) + 0.5 * math.log(2 * math.pi * math.e), rtol=1e-12)
    assert torch.equal(gaussian_entropy(x.T, dim=0), gaussian_entropy(x))
    assert torch.allclose(gaussian_entropy(x.reshape(50, 10, 7)), gaussian_entropy(x), rtol=1e-14)


def test_small_spread_beside_a_large_mean():
    """A sum of squares in float32 gives 0 here."""
    generator = torch.Generator().manual_seed(0)
    x = 1e4 + 0.01 * torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    assert float(gaussian_entropy(x)) == pytest.approx(math.log2(0.01), abs=0.02)
    assert float(gaussian_entropy(x)) == pytest.approx(float(np.log2(x.numpy().std(ddof=1))), rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 300), max_size=6),
    order=st.randoms(use_true_random=False),
    kind=st.sampled_from(["gaussian", "histogram"]),
    per=st.sampled_from(["channel", "layer"]),
)
def test_any_split_and_order_gives_the_same(cuts, order, kind, per):
    x = sample(300, 5)
    bounds = [0, *sorted(cuts), 300]
    parts = [x[a:b] for a, b in itertools.pairwise(bounds)]
    order.shuffle(parts)
    whole = EntropyMeter(kind, per=per, bins=32).update(x)
    streamed = EntropyMeter(kind, per=per, bins=32)
    meters = [EntropyMeter(kind, per=per, bins=32) for _ in range(2)]
    for number, part in enumerate(parts):
        streamed.update(part)
        meters[number % 2].update(part)
    merged = meters[0].merge(meters[1])
    for meter in (streamed, merged):
        assert meter.count == whole.count
        assert torch.allclose(meter.compute(), whole.compute(), rtol=1e-12, atol=1e-13)
        if kind == "histogram":
            assert torch.equal(meter._parts[0].counts, whole._parts[0].counts)


@pytest.mark.parametrize("bins", [1, 10, 256])
def test_histogram_with_fixed_edges_is_numpys(bins):
    x = sample(1000, 3, dtype=torch.float64)
    low, high = float(x.min()), float(x.max())
    for channel, got in enumerate(histogram_entropy(x, bins=bins, range=(low, high)).tolist()):
        counts, _ = np.histogram(x[:, channel].numpy(), bins=bins, range=(low, high))
        p = counts[counts > 0] / counts.sum()
        assert got == pytest.approx(float(-(p * np.log2(p)).sum()), rel=1e-9, abs=1e-12)


def test_known_histograms():
    uniform = torch.arange(256.0).unsqueeze(1)
    assert float(histogram_entropy(uniform, bins=256)) == 8.0
    assert float(histogram_entropy(uniform, bins=256, base=math.e)) == pytest.approx(8 * math.log(2))
    assert float(histogram_entropy(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), bins=2)) == 1.0
    assert float(histogram_entropy(torch.full((9, 1), 3.7))) == 0.0


def test_differential_histogram_estimates_the_gaussian():
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    meter = EntropyMeter("histogram", bins=256).update(x)
    truth = float(gaussian_entropy(x, constant=True))
    assert float(meter.compute(differential=True)) == pytest.approx(truth, abs=0.01)
    # other grids, same quantity: the plain entropy differs by a bit for every halving of the width
    fine = EntropyMeter("histogram", bins=1024).update(x)
    assert float(fine.compute(differential=True)) == pytest.approx(truth, abs=0.02)
    assert float(fine.compute()) > float(meter.compute()) + 1


def test_per_sample_and_per_layer():
    x = sample(6, 20, 5)
    each = EntropyMeter("gaussian", per="sample").update(x[:2]).update(x[2:]).compute()
    expected = np.log2(x.double().reshape(6, -1).numpy().std(1, ddof=1))
    assert np.allclose(each.numpy(), expected)
    layer = EntropyMeter("gaussian", per="layer").update(x).compute()
    assert layer.shape == (1,)
    assert float(layer) == pytest.approx(float(np.log2(x.double().numpy().std(ddof=1))))
    assert EntropyMeter("histogram", per="sample").update(x).compute().shape == (6,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["gaussian", "histogram"])
def test_dtypes_and_strides(dtype, kind):
    x = sample(64, 10).to(dtype)
    strided = torch.empty(10, 128, dtype=dtype).T[::2]
    strided.copy_(x)
    got = EntropyMeter(kind).update(strided).compute()
    assert torch.allclose(got, EntropyMeter(kind).update(x.double()).compute(), rtol=1e-12)


def test_constant_channels_are_floored_counted_and_reported():
    x = sample(100, 4, dtype=torch.float64)
    x[:, 1] = 0.1  # its mean over many rows is not exactly 0.1 when summed naively
    meter = EntropyMeter("gaussian", name="blocks[3].attn").update(x[:50]).update(x[50:])
    with pytest.warns(UserWarning, match=r"blocks\[3\]\.attn: 1 of 4 channels are constant"):
        entropy = meter.compute()
    assert meter.constant_channels == 1
    assert float(entropy[1]) == math.log2(STD_FLOOR)
    assert float(entropy.min()) == math.log2(STD_FLOOR)
    tiny = 1e-12 * sample(100, 1, dtype=torch.float64)
    mixed = EntropyMeter().update(torch.cat([tiny, sample(100, 1, dtype=torch.float64)], 1))
    with pytest.warns(UserWarning, match="1 of 2"):
        assert float(mixed.compute()[0]) == math.log2(STD_FLOOR)
    assert bool(torch.isfinite(entropy).all())
    with pytest.raises(ValueError, match="all 2 channels are constant"):
        gaussian_entropy(torch.ones(10, 2))


def test_too_few_samples():
    with pytest.raises(ValueError, match=r"at least two samples.*got 0"):
        EntropyMeter().compute()
    with pytest.raises(ValueError, match=r"at least two samples.*got 1"):
        gaussian_entropy(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="got 1"):
        histogram_entropy(torch.zeros(1, 4))
    meter = EntropyMeter().update(torch.zeros(0, 4)).update(sample(3, 4))
    assert meter.count == 3


@pytest.mark.parametrize("kind", ["gaussian", "histogram"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_named(kind, bad):
    meter = EntropyMeter(kind, name="blocks[2].mlp").update(sample(8, 3))
    before = meter.compute()
    x = sample(8, 3).half()
    x[3, 1] = bad
    with pytest.raises(NonFiniteActivationError, match=r"blocks\[2\]\.mlp: 1 of 24 .* batch 1 \(float16\).*bfloat16"):
        meter.update(x)
    assert torch.equal(meter.compute(), before)


def test_values_outside_the_range_are_reported():
    meter = EntropyMeter("histogram", range=(0.0, 1.0), bins=4).update(torch.tensor([[0.1], [0.9], [5.0]]))
    with pytest.warns(UserWarning, match="1 values fell outside"):
        assert float(meter.compute()) == 1.0
    with pytest.raises(ValueError, match="no value of 1 of 1 channels"):
        histogram_entropy(torch.full((3, 1), 9.0), range=(0.0, 1.0))


@pytest.mark.parametrize("kind", ["gaussian", "histogram"])
def test_state_round_trip(kind, tmp_path):
    meter = EntropyMeter(kind, bins=16).update(sample(10, 3))
    torch.save(meter.state_dict(), tmp_path / "state.pt")
    other = EntropyMeter(kind, bins=16)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other.update(sample(9, 3, seed=1)).compute(), meter.update(sample(9, 3, seed=1)).compute())
    with pytest.raises(ValueError, match="belongs to"):
        EntropyMeter(kind, bins=17).load_state_dict(meter.state_dict())
    with pytest.raises(ValueError, match="meters differ"):
        EntropyMeter(kind, bins=17).merge(meter)
    with pytest.raises(ValueError, match="4 channels after 3"):
        meter.update(sample(9, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "normal"}, "kind.*'normal'"),
        ({"per": "token"}, "per.*'token'"),
        ({"bins": 0}, "bins.*0"),
        ({"bins": 1, "kind": "histogram"}, "from 2"),
        ({"bins": 10**6}, "65536"),
        ({"kind": "gaussian", "range": (0.0, 1.0)}, "kind='histogram'"),
        ({"base": math.inf}, "base.*inf"),
        ({"bins": True}, "bins.*True"),
        ({"range": (1.0, 1.0)}, "range"),
        ({"range": (0.0, math.inf)}, "range"),
        ({"base": 1}, "base.*1"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        EntropyMeter(**options)


def test_wrong_input():
    with pytest.raises(TypeError, match="int64"):
        gaussian_entropy(torch.arange(5))
    with pytest.raises(TypeError, match="list"):
        EntropyMeter().update([1.0])
    with pytest.raises(ValueError, match="at least one channel"):
        EntropyMeter().update(torch.zeros(4, 0))
    with pytest.raises(ValueError, match="at least one channel"):
        EntropyMeter().update(torch.tensor(1.0))
    for kind in ("gaussian", "histogram"):
        with pytest.raises(ValueError, match=r"1e\+200 are too large"):
            EntropyMeter(kind).update(torch.tensor([[1e200], [-1e200]], dtype=torch.float64))
    with pytest.raises(ValueError, match="dim=2"):
        gaussian_entropy(torch.zeros(3, 3), dim=2)


def test_all_reduce_over_two_processes(tmp_path):
    code = """
import sys, torch, torch.distributed as dist
from lambda_kernels import EntropyMeter
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
x = torch.randn(101, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
for kind in ("gaussian", "histogram"):
    whole = EntropyMeter(kind).update(x).compute()
    meter = EntropyMeter(kind).update(x[:30] if rank == 0 else x[30:]).all_reduce()
    assert meter.count == 101
    assert torch.allclose(meter.compute(), whole, rtol=1e-12, atol=0), (kind, meter.compute() - whole)
dist.destroy_process_group()
"""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "rendezvous")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
