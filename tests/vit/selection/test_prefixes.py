"""Rounds that begin where earlier ones were: the same bits, fewer blocks run, and no more cached than there is memory for."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_support import labelled
from small_models import images, small_vit

from lambda_vit import select_layers
from lambda_vit.models.views import skip_attention
from lambda_vit.selection import prefix_cache
from lambda_vit.selection.measurement import Measurement
from lambda_vit.selection.paths import PathRunner
from lambda_vit.selection.prefix_cache import FULL, Prefix, PrefixCache, choose_blocks, list_prefixes

DEPTH = 5
pytestmark = pytest.mark.filterwarnings("ignore::lambda_vit.selection.result.SelectionWarning")
EACH = 5 * 48 * 4  # bytes of the tokens of a 32×32 image in `small_vit`


def rounds_of(picks: tuple[int, ...], depth: int = DEPTH) -> list[list[frozenset[int]]]:
    """The paths that a greedy search measures, which picks these."""
    found = [
        [frozenset((*picks[:number], i)) for i in range(depth) if i not in picks[:number]]
        for number in range(len(picks))
    ]
    found[0].insert(0, FULL)
    return found


def announce(cache: PrefixCache, paths: list[frozenset[int]], blocks: tuple[int, ...]) -> None:
    """Announce paths whose prefixes are cached before these blocks, whatever the budget."""
    with mock.patch.object(prefix_cache, "choose_blocks", return_value=blocks):
        cache.announce(paths)


def count(cache: PrefixCache, batch: int) -> int:
    """Return the number of cached prefixes of a batch."""
    return sum(number == batch for number, _ in cache._tokens)


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(DEPTH)), st.sampled_from([(), (2,), (1, 4), (2, 4), (1, 2, 3, 4)]))
def test_rounds_give_the_same_bits_and_run_what_is_new(order, chosen):
    """A prefix is run in a round if a path that needs it meets nothing cached after it; counted by the definition."""
    model = small_vit(depth=DEPTH)
    runner, cache = PathRunner(model), PrefixCache(DEPTH)
    runs: list[int] = []
    with torch.inference_mode():
        start = runner.embed(images())
        for index, block in enumerate(model.blocks):
            block.mlp.register_forward_hook(lambda *_, index=index: runs.append(index))
        known: set = {(0, FULL)}
        for paths in rounds_of(tuple(order[:4])):
            announce(cache, paths, chosen)
            wanted = {Prefix.of(path, at) for path in paths for at in chosen}
            known = {(0, FULL)} | (known & wanted)
            run = set()
            for path in paths:
                behind = max(at for at in range(DEPTH + 1) if Prefix.of(path, at) in known)
                run |= {Prefix.of(path, at) for at in range(behind + 1, DEPTH + 1)}
            runs.clear()
            found = dict(runner.outputs(start, paths, cache))
            assert len(runs) == len(run)
            known |= run & wanted
            assert count(cache, 0) == len(known) - 1
            for path in paths:
                assert torch.equal(found[path].logits, skip_attention(model, sorted(path))(images()))


def test_what_no_path_begins_with_is_evicted():
    cache, x = PrefixCache(DEPTH), torch.zeros(1)
    announce(cache, [frozenset({0}), frozenset({3})], (2, 4))
    for prefix in ((2, FULL), (2, frozenset({0})), (4, frozenset({3})), (1, FULL), (2, frozenset({1}))):
        cache.offer(0, Prefix(*prefix), x)
    assert count(cache, 0) == 3
    assert cache.find(0, Prefix(1, FULL)) is None
    announce(cache, [frozenset({0, 1})], (1, 2))
    assert count(cache, 0) == 0
    announce(cache, [frozenset({3, 4})], (2,))
    cache.offer(0, Prefix(2, FULL), x)
    assert cache.find(0, Prefix(2, FULL)) is x
    announce(cache, [frozenset({3, 4})], ())
    assert count(cache, 0) == 0


def test_batches_do_not_share_tokens():
    cache = PrefixCache(DEPTH)
    announce(cache, [frozenset({3})], (2,))
    cache.offer(0, Prefix(2, FULL), torch.zeros(1))
    assert [count(cache, number) for number in (0, 1)] == [1, 0]
    assert cache.find(1, Prefix(2, FULL)) is None
    cache.clear()
    assert count(cache, 0) == 0


def test_the_budget_decides_how_densely():
    paths = rounds_of((5,), depth=12)[0]
    assert len(list_prefixes(paths, range(1, 12))) == 77  # one on the full path and one for each layer skipped before
    dense = tuple(range(1, 12))
    for budget, chosen in ((77, dense), (76, (2, 4, 6, 8, 10)), (34, (3, 6, 9)), (20, (4, 8)), (13, (6,)), (6, ())):
        assert choose_blocks(paths, 12, budget) == chosen
        assert len(list_prefixes(paths, chosen)) <= budget
    for budget, chosen in ((770, dense), (769, (2, 4, 6, 8, 10))):
        cache = PrefixCache(12)
        cache.set_budget(10, budget)
        cache.announce(paths)
        assert (cache.blocks, cache.bytes) == (chosen, 10 * len(list_prefixes(paths, chosen)))


class Watched(Measurement):
    """Notes how much is kept after every pass."""

    def measure(self, *args, **options):
        found = super().measure(*args, **options)
        self.sizes = [
            *getattr(self, "sizes", []),
            [count(self.activations.prefixes, b.number) for b in self.activations],
        ]
        return found


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"cache": "ram", "cache_budget": 1 << 24}, [14, 12, 8]),
        ({"cache": "ram", "cache_budget": 24 * (EACH + 8 + 40) + 24 * EACH * 14}, [14, 12, 8]),
        ({"cache": "ram", "cache_budget": 24 * (EACH + 8 + 40) + 24 * EACH * 14 - 1}, [8, 10, 8]),
        ({"cache": "ram", "cache_budget": 24 * (EACH + 8 + 40)}, [0, 0, 0]),
        ({"cache": "disk"}, [0, 0, 0]),
        ({"cache": "none"}, [0, 0, 0]),
    ],
)
def test_a_search_keeps_what_fits(options, kept, tmp_path):
    """Counts by hand for picks 2, 0, 4: prefixes before blocks 1 to 4, or before 2 and 4 where all are too many. The
    second round would then have 12, but two of them lie before others that are kept, and are not run.
    """
    model, sizes = small_vit(depth=DEPTH), {}
    with Watched(model, labelled(), cache_folder=tmp_path, **options) as measurement:
        found = [measurement.measure(paths, keep=True) for paths in rounds_of((2, 0, 4))]
        sizes = measurement.sizes
        engine = measurement.engine()
    assert [set(counts) for counts in sizes] == [{number} for number in kept]
    if kept[0]:
        assert engine["kept"]["bytes"] == (14 if kept[0] == 14 else 12) * 24 * EACH
    else:
        assert engine["kept"] is None
    with Measurement(model, labelled(), cache="none") as plain:
        assert found == [plain.measure(paths) for paths in rounds_of((2, 0, 4))]


def test_measuring_once_keeps_nothing_and_uses_what_is_there():
    model, blocks = small_vit(depth=DEPTH), []
    with Watched(model, labelled()) as measurement:
        measurement.measure([FULL, frozenset({4})])
        assert measurement.sizes == [[0, 0, 0]]
        measurement.measure(rounds_of((4,))[0], keep=True)
        assert measurement.sizes[-1] == [14, 14, 14]
        handles = [b.mlp.register_forward_hook(lambda *_, i=i: blocks.append(i)) for i, b in enumerate(model.blocks)]
        measurement.measure([frozenset({4}), frozenset({3})])
        assert blocks == [4, 4] * 3
        assert measurement.sizes[-1] == [14, 14, 14]
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    "options", [{"beam": 3}, {"strategy": "kl"}, {"strategy": "accuracy"}, {"strategy": "recoverability"}]
)
def test_searches_run_fewer_blocks_for_the_same_selection(options):
    found, runs = {}, {}
    for cache in ("ram", "disk"):
        model, count = small_vit(depth=DEPTH), []
        for block in model.blocks:
            block.mlp.register_forward_hook(lambda *_, count=count: count.append(1))
        found[cache] = select_layers(model, labelled(), 3, cache=cache, **options)
        runs[cache] = len(count)
    assert found["ram"] == found["disk"]
    assert runs["ram"] < runs["disk"]
