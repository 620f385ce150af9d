"""Entropies against closed forms and numpy, and any split of the data against all of it at once."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from entropy_support import MODES, assert_same, sample
from histogram_support import both_backends, counting_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lambda_kernels import EntropyMeter, NonFiniteActivationError, gaussian_entropy, histogram_entropy
from lambda_kernels.entropy import state
from lambda_kernels.entropy.meter import PER, update_together
from lambda_kernels.entropy.state import STD_FLOOR
from lambda_kernels.ops import histogram as ops


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


@both_backends
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=15)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=6),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    bins=st.integers(2, 300),
)
def test_any_split_and_order_gives_the_same(backend, mode, per, cuts, order, dtype, bins):
    options = {**MODES[mode], "per": per, "bins": bins}
    x = sample(60, 2, 5, dtype=torch.bfloat16 if mode == "codes" else dtype)
    parts = [x[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 60], strict=True)]
    if per != "sample":  # which keeps their order
        order.shuffle(parts)
    with counting_with(backend):
        whole = EntropyMeter(**options).update(x)
        streamed, first, second = (EntropyMeter(**options) for _ in range(3))
        together = [EntropyMeter(**options) for _ in range(2)]
        for number, part in enumerate(parts):
            streamed.update(part)
            (first if 2 * number < len(parts) else second).update(part)
            update_together(together, [part, part.flip(-1)])
        for meter in (streamed, first.merge(second), together[0]):
            assert_same(meter, whole)
        assert_same(together[1], EntropyMeter(**options).update(x.flip(-1)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.floats(width=32), min_size=1, max_size=6), min_size=2, max_size=6), st.integers(2, 40))
def test_ranges_that_grow_by_any_factor(batches, bins):
    """From 1e-45 to 3e38 in one meter, both signs, and the counts are those of all values at once."""
    batches = [torch.tensor(batch).nan_to_num(0.0, 0.0, 0.0).reshape(-1, 1) for batch in batches]
    x = torch.cat(batches)
    meter = EntropyMeter("histogram", bins=bins)
    for batch in batches:
        meter.update(batch)
    counts, grid = meter.counts()
    final = ops.dyadic_grid(*ops.extrema(x), bins)
    assert torch.equal(grid.packed()[:, :3], final.packed()[:, :3])
    assert torch.equal(counts, ops.histogram(x, final).counts)
    assert counts.sum() == len(x)


@pytest.mark.parametrize("bins", [2, 10, 256])
def test_histogram_with_fixed_edges_is_numpys(bins):
    x = sample(1000, 3, dtype=torch.float64)
    low, high = float(x.min()), float(x.max())
    for channel, got in enumerate(histogram_entropy(x, bins=bins, range=(low, high)).tolist()):
        counts, _ = np.histogram(x[:, channel].numpy(), bins=bins, range=(low, high))
        p = counts[counts > 0] / counts.sum()
        assert got == pytest.approx(float(-(p * np.log2(p)).sum()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bins", [2, 7, 256])
def test_minmax_is_numpys_default_range(bins):
    x = sample(1000, 3, dtype=torch.float64)
    x[:, 2] = torch.randint(0, 9, (1000,), generator=torch.Generator().manual_seed(0))
    for channel, got in enumerate(histogram_entropy(x, bins=bins, range="minmax").tolist()):
        counts, _ = np.histogram(x[:, channel].numpy(), bins=bins)
        p = counts[counts > 0] / counts.sum()
        assert got == pytest.approx(float(-(p * np.log2(p)).sum()), rel=1e-9, abs=1e-12)
    assert float(histogram_entropy(torch.full((9, 1), 1e30), range="minmax")) == 0.0
    with pytest.raises(NonFiniteActivationError, match="1 of 3 values"):
        histogram_entropy(torch.tensor([[1.0], [math.nan], [2.0]]), range="minmax")
    with pytest.raises(ValueError, match="got 1"):
        histogram_entropy(torch.zeros(1, 4), range="minmax")
    with pytest.raises(ValueError, match=r"bins.*0"):
        histogram_entropy(x, bins=0, range="minmax")


def test_codes_count_every_value():
    x = sample(3000, 4, dtype=torch.bfloat16)
    for channel, got in enumerate(histogram_entropy(x, range="bfloat16").tolist()):
        counts = np.unique(x[:, channel].double().numpy(), return_counts=True)[1]
        p = counts / counts.sum()
        assert got == pytest.approx(float(-(p * np.log2(p)).sum()), rel=1e-12)
    meter = EntropyMeter("histogram", bins=7, range="bfloat16").update(x)
    assert meter.bins == 10240
    counts, grid = meter.counts()
    assert isinstance(grid, ops.CodeGrid)
    later = ops.dyadic_grid(*ops.extrema(x), 100)
    assert torch.equal(ops.regrid_codes(counts, later)[0], EntropyMeter("histogram", bins=100).update(x).counts()[0])


@both_backends
def test_miller_madow(backend):
    x = torch.tensor([0.0] * 5 + [1.0] * 2 + [3.0]).unsqueeze(1)
    p = np.array([5, 2, 1]) / 8
    nats = -(p * np.log(p)).sum() + (3 - 1) / (2 * 8)
    with counting_with(backend):
        assert float(histogram_entropy(x, bins=4, base=math.e, miller_madow=True)) == pytest.approx(nats, rel=1e-14)
        bits = histogram_entropy(x, bins=4, miller_madow=True)
        assert float(bits) == pytest.approx(nats / math.log(2), rel=1e-14)
        meter = EntropyMeter("histogram", range=(0.5, 4.0), bins=10).update(x)
        with pytest.warns(UserWarning, match="5 values fell outside"):
            inside = meter.compute(miller_madow=True)
    p = np.array([2, 1]) / 3
    assert float(inside) == pytest.approx(-(p * np.log2(p)).sum() + (2 - 1) / (2 * 3) / math.log(2), rel=1e-14)


def test_both_estimates_from_one_meter():
    x = sample(500, 3)
    meter = EntropyMeter("histogram", base=math.e).update(x[:200]).update(x[200:])
    sigma = x.double().numpy().std(0, ddof=1)
    formula = 0.5 * np.log(2 * np.pi * np.e) + np.log(sigma)
    assert np.allclose(meter.compute("gaussian", constant=True).numpy(), formula, rtol=1e-12)
    assert torch.equal(meter.compute("histogram"), meter.compute())
    assert np.allclose(meter.moments().std.numpy(), sigma, rtol=1e-12)
    assert meter.moments().count.tolist() == [500] * 3
    with pytest.raises(ValueError, match="x: a Gaussian meter keeps no counts"):
        EntropyMeter().update(x).compute("histogram")
    with pytest.raises(ValueError, match="a Gaussian meter keeps no counts"):
        EntropyMeter().update(x).counts()
    with pytest.raises(ValueError, match="kind must be one of"):
        meter.compute("normal")
    for ask in (EntropyMeter("histogram").counts, EntropyMeter().moments):
        with pytest.raises(ValueError, match="nothing was measured yet"):
            ask()


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
    codes = EntropyMeter("histogram", range="bfloat16").update(x.bfloat16())
    assert float(codes.compute(differential=True)) == pytest.approx(truth, abs=0.02)
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
    histogram = EntropyMeter("histogram").update(x)
    assert histogram.constant_channels == 1
    with pytest.warns(UserWarning, match="1 of 4 channels are constant"):
        assert torch.allclose(histogram.compute("gaussian"), entropy, rtol=1e-12)


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
    other = EntropyMeter(kind, name="blocks[3].mlp")
    before = meter.compute()
    x = sample(8, 3).half()
    x[3, 1] = bad
    words = r"blocks\[2\]\.mlp: 1 of 24 .* batch 1 \(float16\).*bfloat16"
    with pytest.raises(NonFiniteActivationError, match=words):
        meter.update(x)
    with pytest.raises(NonFiniteActivationError, match=words):
        update_together([other, meter], [sample(8, 3).half(), x])
    assert torch.equal(meter.compute(), before)
    assert (meter.updates, other.updates, other.count) == (1, 0, 0)
    with pytest.raises(
        NonFiniteActivationError, match=r"blocks\[3\]\.mlp: 6 of 6 values .* batch 0 \(float32\). Check"
    ):
        other.update(torch.full((2, 3), bad))
    assert other.update(sample(8, 3)).count == 8


def test_values_outside_the_range_are_reported():
    meter = EntropyMeter("histogram", range=(0.0, 1.0), bins=4).update(torch.tensor([[0.1], [0.9], [5.0]]))
    with pytest.warns(UserWarning, match="1 values fell outside"):
        assert float(meter.compute()) == 1.0
    with pytest.raises(ValueError, match="no value of 1 of 1 channels"):
        histogram_entropy(torch.full((3, 1), 9.0), range=(0.0, 1.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "normal"}, "kind.*'normal'"),
        ({"per": "token"}, "per.*'token'"),
        ({"bins": 0}, "bins.*0"),
        ({"bins": 1, "kind": "histogram"}, "from 2"),
        ({"bins": 1, "kind": "histogram", "range": (0.0, 1.0)}, "from 2"),
        ({"bins": 10**6}, "65536"),
        ({"kind": "gaussian", "range": (0.0, 1.0)}, "kind='histogram'"),
        ({"base": math.inf}, "base.*inf"),
        ({"base": "2"}, "base.*'2'"),
        ({"bins": True}, "bins.*True"),
        ({"range": (1.0, 1.0)}, "range"),
        ({"range": (0.0, math.inf)}, "range"),
        ({"base": 1}, "base.*1"),
        ({"kind": "histogram", "range": (0.0, 1e-320)}, "far enough apart for 256 bins"),
        ({"kind": "histogram", "range": "minmax"}, "use histogram_entropy"),
        ({"kind": "histogram", "range": "float16"}, "'float16'"),
        ({"kind": "histogram", "range": "12"}, "got '12'"),
        ({"kind": "histogram", "range": np.ones(3)}, "got array"),
        ({"kind": "histogram", "range": 3.0}, r"None, \(low, high\) or \"bfloat16\"; got 3.0"),
        ({"kind": "histogram", "range": (0.0, 1.0, 2.0)}, r"got \(0.0, 1.0, 2.0\)"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        EntropyMeter(**options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_wrong_input():
    with pytest.raises(TypeError, match="int64"):
        gaussian_entropy(torch.arange(5))
    with pytest.raises(TypeError, match=r"mlp: x must be a torch\.Tensor; got list"):
        EntropyMeter(name="mlp").update([1.0])
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
        with pytest.raises(TypeError, match=r"mlp: x must be a dense tensor; got a nested one.*x\.unbind\(\)"):
            EntropyMeter(name="mlp").update(nested)
    for call in (EntropyMeter(name="x").update, gaussian_entropy, histogram_entropy):
        with pytest.raises(TypeError, match=r"x: x is on the meta device .* \[4, 3\]\. Materialize the model"):
            call(torch.empty(4, 3, device="meta"))
    for dim in ("a", None, 1.0):
        with pytest.raises(TypeError, match=f"dim must be an integer, .* such as -1; got {dim!r}"):
            gaussian_entropy(torch.zeros(3, 3), dim=dim)
    assert torch.equal(gaussian_entropy(sample(9, 3), dim=np.int64(1)), gaussian_entropy(sample(9, 3)))
    for other in (None, "meter.pt"):
        with pytest.raises(TypeError, match=f"mlp: other must be an EntropyMeter, .*load.*; got {other!r}"):
            EntropyMeter(name="mlp").merge(other)
    with pytest.raises(ValueError, match="at least one channel"):
        EntropyMeter().update(torch.zeros(4, 0))
    with pytest.raises(ValueError, match="at least one channel"):
        EntropyMeter().update(torch.tensor(1.0))
    each = EntropyMeter(per="sample").update(torch.zeros(0, 3, 5))
    for shape in ((4, 0, 5), (4, 0)):  # left out, they would shift the samples after them
        with pytest.raises(ValueError, match=r"the 4 samples of x hold no values; got shape \[4, 0"):
            each.update(torch.zeros(shape))
        assert EntropyMeter(per="layer").update(torch.zeros(shape)).count == 0
    for kind in ("gaussian", "histogram"):
        with pytest.raises(ValueError, match=r"1e\+200 are too large"):
            EntropyMeter(kind).update(torch.tensor([[1e200], [-1e200]], dtype=torch.float64))
    with pytest.raises(ValueError, match="dim=2"):
        gaussian_entropy(torch.zeros(3, 3), dim=2)
    with pytest.raises(TypeError, match=r'range="bfloat16" counts values of that dtype; got torch.float32'):
        EntropyMeter("histogram", range="bfloat16").update(torch.ones(3, 2))
    meter = EntropyMeter().update(sample(9, 3))
    with pytest.raises(ValueError, match="4 channels after 3"):
        meter.update(sample(9, 4))
    with pytest.raises(ValueError, match="4 channels after 3"):
        meter.merge(EntropyMeter().update(sample(9, 4)))
    with pytest.raises(ValueError, match="meters differ"):
        meter.merge(EntropyMeter(bins=17))
    with pytest.raises(ValueError, match="2 meters and 1 tensors"):
        update_together([meter, EntropyMeter()], [sample(9, 3)])
    with pytest.raises(ValueError, match="comes twice"):
        update_together([meter, meter], [sample(9, 3)] * 2)
    assert (meter.updates, meter.count) == (1, 9)


def test_many_meters_of_all_kinds_in_few_calls(monkeypatch):
    """What can share a call does, and every meter gets what it would have got alone."""
    calls = []
    monkeypatch.setattr(state, "histogram", lambda x, *a, **k: calls.append(len(x)) or ops.histogram(x, *a, **k))
    shapes = [(8, 5, 3), (4, 3), (20, 6)]
    options = [{**MODES[mode], "per": per, "bins": 16} for mode in ("gaussian", "dyadic", "fixed") for per in PER]
    together, alone, batches = [], [], []
    for option in options:
        for shape in shapes:
            together.append(EntropyMeter(**option))
            alone.append(EntropyMeter(**option))
            batches.append([sample(*shape, seed=seed) * 4**seed for seed in range(3)])
    for number in range(3):
        calls.clear()
        update_together(together, [batch[number] for batch in batches])
        # A call for each of nine options; first batches of dyadic meters, and ranges that grew, are read again.
        assert calls == [3] * len(calls)
        assert 9 <= len(calls) <= 12
    for meter, other, batch in zip(together, alone, batches, strict=True):
        for x in batch:
            other.update(x)
        assert_same(meter, other)
        assert meter.updates == 3


class Arrival:
    """Stands for the event after which a copy from the device has arrived."""

    def __init__(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True


@pytest.fixture
def arrivals(monkeypatch) -> list[Arrival]:
    """The host may not look at values, as on a CUDA device; it learns of them when an arrival happens."""
    sent = []
    monkeypatch.setattr(state, "host_may_look", lambda device: False)
    monkeypatch.setattr(state, "send_to_host", lambda flags: (flags, sent.append(Arrival()) or sent[-1]))
    return sent


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("mode", MODES)
def test_without_looking_the_result_is_the_same(mode, per, arrivals, monkeypatch):
    options = {**MODES[mode], "per": per, "bins": 24}
    batches = [sample(9, 2, 4, seed=seed, dtype=torch.bfloat16) * 3**seed for seed in range(4)]
    unseen = [EntropyMeter(**options) for _ in range(2)]
    for batch in batches:
        update_together(unseen, [batch, batch])
    assert len(arrivals) == 4
    monkeypatch.setattr(state, "host_may_look", lambda device: True)
    looked = EntropyMeter(**options)
    for batch in batches:
        looked.update(batch)
    for meter in unseen:
        assert_same(meter, looked)


@pytest.mark.parametrize("mode", MODES)
def test_not_finite_is_named_when_it_is_learnt(mode, arrivals):
    good = sample(8, 3, dtype=torch.bfloat16)
    bad = good.clone()
    bad[2, 0], bad[3, 1] = math.nan, math.inf
    fine, meter = EntropyMeter(**MODES[mode]), EntropyMeter(**MODES[mode], name="blocks[1].attn")
    update_together([fine, meter], [good, good])
    update_together([fine, meter], [good, bad])
    meter.update(good)
    arrivals[0].happened = True
    meter.update(good)
    words = r"blocks\[1\]\.attn: 2 of 24 values are NaN or infinite in batch 1 \(bfloat16\)"
    arrivals[1].happened = True
    with pytest.raises(NonFiniteActivationError, match=words):
        meter.update(good)
    # From then on by every call, since the result would lack those values.
    for call in (meter.compute, meter.state_dict, lambda: meter.merge(fine), lambda: fine.merge(meter)):
        with pytest.raises(NonFiniteActivationError, match=words):
            call()
    with pytest.raises(NonFiniteActivationError, match=words):
        update_together([fine, meter], [good, good])
    assert (meter.updates, fine.updates, fine.count) == (4, 2, 16)
    assert meter._parts[0].moments.nan_to_num(math.inf).isfinite().all()
    meter.load_state_dict(fine.state_dict())
    assert_same(meter, fine)


def test_the_result_waits_for_what_was_not_learnt(arrivals):
    meter = EntropyMeter("histogram").update(sample(8, 3))
    meter.update(torch.full((2, 3), math.nan))
    with pytest.raises(NonFiniteActivationError, match=r"6 of 6 values .* batch 1"):
        meter.compute()
    large = EntropyMeter().update(torch.full((2, 1), -1e200, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"1e\+200 are too large"):
        large.compute()


@pytest.mark.parametrize("per", PER)
def test_copies_share_nothing(per, arrivals):
    meter, other = EntropyMeter("histogram", per=per, bins=16), EntropyMeter("histogram", per=per, bins=16)
    update_together([meter, other], [sample(4, 3), torch.full((4, 3), math.nan)])
    for duplicate in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        before = meter.state_dict()
        again = duplicate(meter)
        assert again._parts[0].counts.untyped_storage().nbytes() == before["counts"].nbytes
        again.update(sample(4, 3))
        assert torch.equal(meter.state_dict()["counts"], before["counts"])
        assert again.updates == meter.updates + 1
        # An event cannot be copied: what has not arrived is waited for.
        flagged = EntropyMeter(name="late").update(torch.full((4, 3), math.nan))
        again = duplicate(flagged)
        assert arrivals[-1].happened
        with pytest.raises(NonFiniteActivationError, match="late: 12 of 12 values"):
            again.compute()


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("mode", MODES)
def test_updates_on_a_gpu_read_no_value(mode, per, monkeypatch):
    """Fake tensors have no values: whoever asks for one, and so would wait for the device, gets an error."""
    monkeypatch.setattr(state, "send_to_host", lambda flags: (flags, Arrival()))
    meters = [EntropyMeter(**MODES[mode], per=per) for _ in range(2)]
    with counting_with("torch"), FakeTensorMode():
        for _ in range(3):
            update_together(meters, [torch.empty(4, 5, 3, dtype=torch.bfloat16, device="cuda") for _ in meters])
        assert meters[0]._parts[0].device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            meters[0].moments().count.tolist()


def test_bins_of_another_type_are_refused():
    """What `save` writes must be what `load` and other ranks can read."""
    for bins in (np.int64(64), torch.tensor(64), True, 64.0):
        with pytest.raises(ValueError, match="bins must be an integer"):
            EntropyMeter("histogram", bins=bins)


def test_documented_modules_hand_on_functions():
    from lambda_kernels.ops import histogram, ln_mlp

    assert callable(histogram.histogram)
    assert callable(histogram.moments)
    assert callable(ln_mlp.ln_mlp)
    for module in (histogram, ln_mlp):
        assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_that_the_narrowest_bins_cannot_separate_are_a_warning(dtype):
    x = sample(1000, 2).to(dtype)
    x[:, 1] = 0.0  # zeros are one value, whatever the bins
    with pytest.warns(UserWarning, match="values of 1 of 2 channels lie within a few bins of 2\\^-126"):
        histogram_entropy(x * 2.0**-130)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = histogram_entropy(x * 2.0**-100)
        histogram_entropy(x * 2.0**-130, range="minmax" if dtype == torch.float64 else (-1.0, 1.0))
    assert torch.equal(scaled, histogram_entropy(x))
