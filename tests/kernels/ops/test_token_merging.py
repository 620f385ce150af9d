"""Matching, merging and proportional attention against a float64 twin that takes one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_oracle import merge_one, softmax_over_copies

from lambda_kernels.ops.token_merging import (
    compose_places,
    count_mergeable,
    match_tokens,
    merge_tokens,
    proportional_attention,
    unmerge_tokens,
)

# Of float64: sums in another order. Of the short types: an average is rounded once, its weights are too.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(batch: int = 2, tokens: int = 11, channels: int = 6, dtype=torch.float64, seed: int = 0) -> tuple:
    """Random keys [B, N, 5], tokens [B, N, C] and sizes [B, N] of 1 to 5."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, tokens, 5, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64).to(dtype)
    sizes = torch.randint(1, 6, (batch, tokens), generator=generator).to(torch.promote_types(dtype, torch.float32))
    return keys, x, sizes


def check_against_oracle(keys, x, sizes, r: int, protected: int, tolerance: float) -> None:
    merge = match_tokens(keys, r, protected=protected)
    merged, total = merge_tokens(x, sizes, merge)
    assert merged.dtype == x.dtype
    for b in range(len(keys)):
        given = (value[b].double().numpy() for value in (keys, x, sizes))
        expected, expected_sizes, place = merge_one(*given, r, protected)
        np.testing.assert_allclose(merged[b].double().numpy(), expected, atol=tolerance, rtol=tolerance)
        np.testing.assert_array_equal(total[b].numpy(), expected_sizes)
        np.testing.assert_array_equal(merge.place[b].numpy(), place)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("r", "protected"), [(1, 0), (3, 1), (4, 2), (100, 1), (0, 1)])
def test_against_the_oracle(dtype, r, protected):
    check_against_oracle(*tensors(dtype=dtype), r, protected, TOLERANCES[dtype])


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3), tokens=st.integers(0, 17), protected=st.integers(0, 4), r=st.integers(0, 12),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(batch, tokens, protected, r, seed):
    protected = min(protected, tokens)
    keys, x, sizes = tensors(batch, tokens, seed=seed)
    check_against_oracle(keys, x, sizes, r, protected, 1e-12)
    merge = match_tokens(keys, r, protected=protected)
    merged, total = merge_tokens(x, sizes, merge)
    left = tokens - count_mergeable(tokens, r, protected)
    assert merged.shape == (batch, left, 6)
    # Weighted by sizes, nothing is lost; what is protected is the same, bit for bit; and each token finds its average.
    torch.testing.assert_close((total[..., None] * merged).sum(1), (sizes[..., None] * x).sum(1))
    assert torch.equal(total.sum(1), sizes.sum(1))
    assert torch.equal(merged[:, :protected], x[:, :protected])
    assert torch.equal(total[:, :protected], sizes[:, :protected])
    spread = unmerge_tokens(merged, merge.place)
    assert torch.equal(spread.gather(1, merge.kept[..., None].expand(-1, -1, 6)), merged)


def test_two_merges_are_followed():
    keys, x, _ = tensors(tokens=20)
    sizes = torch.ones(2, 20, dtype=torch.float64)
    first = match_tokens(keys, 6, protected=1)
    once, sizes_once = merge_tokens(x, sizes, first)
    second = match_tokens(once, 5, protected=1)
    twice, sizes_twice = merge_tokens(once, sizes_once, second)
    place = compose_places(first.place, second.place)
    # Every token behind is the plain mean of all tokens of the beginning that went there.
    for b in range(2):
        for behind in range(twice.shape[1]):
            members = x[b, place[b] == behind]
            assert len(members) == sizes_twice[b, behind]
            torch.testing.assert_close(twice[b, behind], members.mean(0))
    # So that a plain mean over what is spread out is a mean over the beginning.
    torch.testing.assert_close(unmerge_tokens(twice, place).mean(1), x.mean(1))


def test_the_most_similar_are_merged():
    # Sources 0, 2, 4 and targets 1, 3: only 2 points where a target does, and 4 less so than 2.
    angles = torch.tensor([0.0, 1.2, 2.0, 2.01, 2.4])
    keys = torch.stack((angles.cos(), angles.sin()), 1)[None] * torch.tensor([1.0, 9.0, 0.1, 3.0, 2.0])[:, None]
    assert match_tokens(keys, 1).source.tolist() == [[2]]
    two = match_tokens(keys, 2)
    assert sorted(two.source[0].tolist()) == [2, 4]
    assert two.place.tolist() == [[0, 1, 2, 2, 2]]
    # Length says nothing, a protected token takes no part.
    assert match_tokens(keys * 100, 1).source.tolist() == [[2]]
    assert match_tokens(keys, 2, protected=3).place.tolist() == [[0, 1, 2, 3, 3]]


def test_untouched_tokens_stay_bit_for_bit():
    keys, x, sizes = tensors(dtype=torch.float32)
    merge = match_tokens(keys, 2)
    merged, total = merge_tokens(x, sizes, merge)
    alone = torch.ones_like(total, dtype=torch.bool).scatter(1, merge.into, False)
    before = x.gather(1, merge.kept[..., None].expand(-1, -1, 6))
    assert alone.any()
    assert torch.equal(merged[alone], before[alone])


def test_tokens_without_a_direction_and_ties():
    x = torch.randn(1, 8, 3)
    merge = match_tokens(torch.zeros(1, 8, 5), 4)
    merged, total = merge_tokens(x, torch.ones(1, 8), merge)
    assert merged.isfinite().all()
    assert total.sum() == 8
    assert merged.shape[1] == 4


def test_large_tokens_of_short_types_do_not_overflow():
    x = torch.full((1, 4, 2), 60000.0, dtype=torch.float16)
    merged, _ = merge_tokens(x, torch.full((1, 4), 50.0), match_tokens(torch.randn(1, 4, 3), 2))
    torch.testing.assert_close(merged, torch.full((1, 2, 2), 60000.0, dtype=torch.float16), rtol=1e-3, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_token_of_size_s_counts_as_s_copies(fused):
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 3, 7, 4, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (2, 7), generator=generator)
    found = proportional_attention(q, k, v, sizes.double(), fused=fused)
    for b in range(2):
        for head in range(3):
            expected = softmax_over_copies(*(value[b, head].numpy() for value in (q, k, v)), sizes[b].numpy())
            np.testing.assert_allclose(found[b, head].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_sizes_of_one_change_nothing(fused):
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
    plain = proportional_attention(q, k, v, None, fused=fused)
    torch.testing.assert_close(
        proportional_attention(q, k, v, torch.ones(1, 6, dtype=torch.float64), fused=fused), plain
    )
    assert torch.equal(proportional_attention(q, k, v, None, fused=fused, scale=0.5), plain)  # 1/√4
    assert not torch.allclose(proportional_attention(q, k, v, None, fused=fused, scale=0.1), plain)


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_of_the_weights(fused):
    q, k = torch.randn(2, 1, 1, 400, 4)
    found = proportional_attention(q, k, torch.ones(1, 1, 400, 1), torch.ones(1, 400), dropout=0.5, fused=fused)
    assert found.std() > 0.01
    assert abs(found.mean() - 1) < 0.05


def test_gradients():
    keys, x, sizes = tensors(tokens=7, channels=3)
    merge = match_tokens(keys, 2, protected=1)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, sizes, merge)[0], x.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: unmerge_tokens(x[:, :5], merge.place), x.requires_grad_())
    q, k, v = torch.randn(3, 1, 2, 4, 3, dtype=torch.float64, requires_grad=True).unbind(0)
    wide = torch.tensor([[1.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    for fused in (True, False):
        assert torch.autograd.gradcheck(lambda *a, f=fused: proportional_attention(*a, wide, fused=f), (q, k, v))


def test_no_gradient_flows_through_the_choice():
    keys, x, sizes = tensors()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        merge = match_tokens(keys.requires_grad_(), 3)
    assert not saved
    merged, total = merge_tokens(x, sizes, merge)
    assert not merged.requires_grad
    assert not total.requires_grad


def test_autocast_does_not_round_similarities_and_averages():
    keys, x, sizes = tensors(tokens=40, dtype=torch.float32)
    plain = match_tokens(keys, 12)
    expected, _ = merge_tokens(x, sizes, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge = match_tokens(keys, 12)
        found, _ = merge_tokens(x, sizes, merge)
    assert torch.equal(merge.place, plain.place)
    assert torch.equal(found, expected)


def test_any_layout():
    keys, x, sizes = tensors(3, 12, 8)
    expected, _ = merge_tokens(x, sizes, match_tokens(keys, 4))
    strided = match_tokens(keys.transpose(0, 1).contiguous().transpose(0, 1), 4)
    found, _ = merge_tokens(x.transpose(1, 2).contiguous().transpose(1, 2), sizes.t().contiguous().t(), strided)
    assert torch.equal(found, expected)


def test_shapes_are_known_without_values():
    merge = match_tokens(torch.empty(2, 9, 4, device="meta"), 3, protected=1)
    merged, total = merge_tokens(torch.empty(2, 9, 5, device="meta"), torch.empty(2, 9, device="meta"), merge)
    assert merged.shape == (2, 6, 5)
    assert total.shape == (2, 6)
    assert unmerge_tokens(merged, merge.place).shape == (2, 9, 5)


def test_one_graph():
    def step(keys, x, sizes):
        merge = match_tokens(keys, 3, protected=1)
        merged, total = merge_tokens(x, sizes, merge)
        return unmerge_tokens(merged, merge.place), total

    given = tensors(dtype=torch.float32)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*given)
    for found, expected in zip(compiled, step(*given), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: match_tokens(torch.zeros(2, 3, 4), -1), ValueError, "r must be an integer of at least 0; got -1"),
        (lambda: match_tokens(torch.zeros(2, 3, 4), 1.5), TypeError, "r must be an integer of at least 0; got 1.5"),
        (lambda: match_tokens(torch.zeros(2, 3, 4), True), TypeError, "r must be an integer of at least 0; got True"),
        (lambda: match_tokens(torch.zeros(3, 4), 1), ValueError, r"keys must have shape \[B, N, D\]; got \[3, 4\]"),
        (lambda: match_tokens([1], 1), TypeError, "keys must be a torch.Tensor; got list"),
        (
            lambda: match_tokens(torch.zeros(2, 3, 4), 1, protected=4),
            ValueError,
            "protected must be at most the 3 tokens",
        ),
        (
            lambda: match_tokens(torch.zeros(2, 3, 4), 1, protected=-1),
            ValueError,
            "protected must be an integer of at least 0; got -1",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_does_not_belong_together():
    keys, x, sizes = tensors()
    merge = match_tokens(keys, 2)
    with pytest.raises(ValueError, match=r"x must have shape \[B, N, C\]; got \[11, 6\]"):
        merge_tokens(x[0], sizes, merge)
    with pytest.raises(ValueError, match=r"sizes must have shape \[B, N\] = \[2, 11\]; got \[2, 10\]"):
        merge_tokens(x, sizes[:, 1:], merge)
    with pytest.raises(ValueError, match=r"merge.place must have shape \[B, N\] = \[2, 10\]; got \[2, 11\]"):
        merge_tokens(x[:, 1:], sizes[:, 1:], merge)
    with pytest.raises(TypeError, match="sizes must have one of the dtypes"):
        merge_tokens(x, sizes.long(), merge)
    with pytest.raises(ValueError, match=r"got \[2, 11, 6\] and \[1, 11\]"):
        unmerge_tokens(x, merge.place[:1])
    with pytest.raises(ValueError, match="all tensors must be on one device; got x on meta"):
        merge_tokens(x.to("meta"), sizes, merge)
