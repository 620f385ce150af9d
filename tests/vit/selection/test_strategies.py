"""Strategies against plain loops, beams against brute force, budgets against converted models, and what is refused."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from places import REPOSITORY
from selection_support import labelled, plain_result
from small_models import small_vit

from lambda_kernels import NonFiniteActivationError, convert_vit
from lambda_vit import Selection, select_layers
from lambda_vit.measure.cost import count_flops
from lambda_vit.selection import budget
from lambda_vit.selection.measurement import Measurement
from lambda_vit.selection.result import SelectionWarning
from lambda_vit.selection.strategies import SEARCHES, STRATEGIES

DEPTH = 5

pytestmark = pytest.mark.filterwarnings("ignore::lambda_vit.selection.result.SelectionWarning")


def with_strong_attention(seed: int) -> torch.nn.Module:
    """Attention that matters: transfer entropies have both signs."""
    model = small_vit(depth=DEPTH).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.add_(0.3 * torch.randn(48, 48, generator=generator))
    return model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """In float64, so that plain loops and the engine agree on every tie; strategies differ on it."""
    return with_strong_attention(4)


DATA = labelled(60, 16)


@pytest.fixture(scope="module")
def plain(model):
    """What a plain loop finds for any set of skipped layers, computed once."""
    known = {}

    def result(*skip: int) -> dict[str, float]:
        key = frozenset(skip)
        if key not in known:
            known[key] = plain_result(model, DATA, sorted(key))
        return known[key]

    return result


def score_of(strategy: str, result: dict, full: dict) -> tuple[float, float]:
    """What the documentation says that a path is judged by."""
    te = full["entropy"] - result["entropy"]
    return {
        "nose": (abs(te), 0.0),
        "one-shot": (abs(te), 0.0),
        "nose-signed": (te, 0.0),
        "kl": (result["kl"], 0.0),
        "accuracy": (full["top1"] - result["top1"], result["loss"]),
    }[strategy]


@pytest.mark.parametrize("strategy", ["nose", "nose-signed", "kl", "accuracy"])
@pytest.mark.parametrize("exclude", [(), (0, 3)])
def test_greedy_strategies(strategy, exclude, model, plain):
    selection = select_layers(model, DATA, 3, strategy=strategy, exclude=exclude)
    picked = []
    for number, step in enumerate(selection.rounds):
        left = [i for i in range(DEPTH) if i not in (*picked, *exclude)]
        scores = {i: score_of(strategy, plain(*picked, i), plain()) for i in left}
        assert step.scores == pytest.approx({i: score for i, (score, _) in scores.items()}, rel=1e-9, abs=1e-12)
        assert step.skipped == tuple(picked)
        picked.append(min(left, key=scores.get))
        assert step.picked == picked[-1]
        assert step.entropy == pytest.approx(plain(*picked)["entropy"], rel=1e-9)
        assert number < 3
    assert selection.layers == tuple(picked)
    assert selection.strategy == strategy
    assert (selection.criterion, selection.unit) == {
        "nose": ("|TE|", "bits"), "nose-signed": ("TE", "bits"), "kl": ("KL", "bits"), "accuracy": ("top-1 lost", "points"),
    }[strategy]  # fmt: skip


def test_strategies_differ(model):
    """Or the other tests could not tell one from another."""
    picks = {s: select_layers(model, DATA, 3, strategy=s).layers for s in ("nose", "nose-signed", "one-shot")}
    assert len(set(picks.values())) == 3, picks


def test_equal_accuracies_are_told_apart_by_the_loss():
    """One class only: every path is right on all images or on none, and the loss alone can order them."""
    model = small_vit(depth=DEPTH).double()
    with torch.no_grad():
        model.head.bias[3] += 1000
        model.head.weight[3] *= 30
    data = [(x, torch.full((len(x),), 3)) for x, _ in DATA]
    with torch.no_grad():
        model.head.bias[3] -= 960
    results = {i: plain_result(model, data, (i,)) for i in range(DEPTH)}
    assert {r["top1"] for r in results.values()} == {100.0}
    wanted = min(results, key=lambda i: results[i]["loss"])
    assert wanted != 0, "the tie would be broken by the index as well"
    assert select_layers(model, data, 1, strategy="accuracy").layers == (wanted,)


def test_one_shot_ranks_each_layer_alone(model, plain):
    selection = select_layers(model, DATA, 4, strategy="one-shot", exclude=(2,))
    scores = {i: abs(plain()["entropy"] - plain(i)["entropy"]) for i in (0, 1, 3, 4)}
    assert selection.layers == tuple(sorted(scores, key=scores.get))
    assert len(selection.rounds) == 1
    assert selection.rounds[0].scores == pytest.approx(scores, rel=1e-9)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_cosine_is_that_of_the_attention_branch(name, fused):
    """1 − cos(x, x + attention(x)), with hooks on timm's own parts."""
    model = small_vit(name, depth=DEPTH)
    given, added = {i: [] for i in range(DEPTH)}, {i: [] for i in range(DEPTH)}
    for i, block in enumerate(model.blocks):
        block.norm1.register_forward_pre_hook(lambda module, args, i=i: given[i].append(args[0]))
        block.ls1.register_forward_hook(lambda module, args, output, i=i: added[i].append(output))
    with torch.no_grad():
        for x, _ in DATA:
            model(x)
    wanted = {}
    for i in range(DEPTH):
        x, branch = torch.cat(given[i]).double(), torch.cat(added[i]).double()
        y = x + branch
        wanted[i] = float(1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())
    model = small_vit(name, depth=DEPTH)
    model = convert_vit(model, remove=()) if fused else model
    selection = select_layers(model, DATA, 4, strategy="cosine")
    assert selection.rounds[0].scores == pytest.approx(wanted, rel=1e-4)
    assert selection.layers == tuple(sorted(wanted, key=wanted.get)[:4])
    assert (selection.samples, selection.entropy_full, selection.estimator) == (60, None, None)


def test_controls(model):
    first = select_layers(model, None, 2, strategy="first", exclude=(0, 2))
    assert first.layers == (1, 3)
    drawn = {select_layers(model, None, 3, strategy="random", seed=seed).layers for seed in range(12)}
    assert len(drawn) > 6
    assert {i for layers in drawn for i in layers} == set(range(DEPTH))
    assert select_layers(model, None, 3, strategy="random", seed=1).seed == 1
    explicit = select_layers(model, None, strategy="explicit", layers=(3, 0, 1))
    assert (explicit.layers, explicit.stop) == ((3, 0, 1), "3 layers")
    numbers = select_layers(model, None, strategy="explicit", layers=torch.tensor([3, 0]).numpy())
    assert Selection.from_dict(numbers.to_dict()).layers == (3, 0)
    assert [type(i) for i in numbers.layers] == [int, int]
    assert select_layers(model, None, 2, strategy="explicit", layers=explicit).layers == (3, 0)


@pytest.mark.parametrize("strategy", ["nose", "kl"])
def test_a_wide_beam_finds_what_brute_force_finds(strategy, model, plain):
    count = 3
    best = min(itertools.combinations(range(DEPTH), count), key=lambda s: (score_of(strategy, plain(*s), plain()), s))
    wide = select_layers(model, DATA, count, strategy=strategy, beam=100)
    assert sorted(wide.layers) == list(best)
    assert wide.beam == 100
    greedy = select_layers(model, DATA, count, strategy=strategy)
    narrow = select_layers(model, DATA, count, strategy=strategy, beam=3)

    def final(selection):
        return score_of(strategy, plain(*selection.layers), plain())[0]

    assert final(wide) <= final(narrow) + 1e-12
    assert final(narrow) <= final(greedy) + 1e-12
    for selection in (wide, narrow):
        before = []
        for step in selection.rounds:  # of the branch that won, whatever others did meanwhile
            left = [i for i in range(DEPTH) if i not in before]
            scores = {i: score_of(strategy, plain(*before, i), plain())[0] for i in left}
            assert step.scores == pytest.approx(scores, rel=1e-9, abs=1e-12)
            assert step.skipped == tuple(before)
            before.append(step.picked)
        assert selection.layers == tuple(before)


def test_beams_can_differ_from_greedy():
    """Over a few models, so that a beam that is ignored shows."""
    found = []
    for seed in range(4):
        model = with_strong_attention(seed)
        layers = [set(select_layers(model, DATA[:2], 3, beam=beam).layers) for beam in (1, 50)]
        found.append(layers[0] != layers[1])
    assert any(found)


def is_spaced(layers, gap: int) -> bool:
    return all(abs(one - other) >= gap for one, other in itertools.combinations(layers, 2))


def spaced_sets(gap: int, count: int, exclude: tuple[int, ...] = ()) -> list[set[int]]:
    """All sets of `count` blocks with this gap, by trying each."""
    left = [i for i in range(DEPTH) if i not in exclude]
    return [set(found) for found in itertools.combinations(left, count) if is_spaced(found, gap)]


@pytest.mark.parametrize("strategy", ["nose", "kl", "accuracy"])
@pytest.mark.parametrize(("gap", "count", "exclude"), [(2, 2, ()), (2, 3, ()), (3, 2, ()), (4, 2, ()), (2, 2, (0, 2))])
def test_min_gap_picks_the_best_that_is_far_enough_and_leads_to_the_count(strategy, gap, count, exclude, model, plain):
    selection = select_layers(model, DATA, count, strategy=strategy, min_gap=gap, exclude=exclude)
    allowed, picked = spaced_sets(gap, count, exclude), []
    for step in selection.rounds:
        left = [i for i in range(DEPTH) if i not in picked and any({*picked, i} <= complete for complete in allowed)]
        scores = {i: score_of(strategy, plain(*picked, i), plain()) for i in left}
        assert step.scores == pytest.approx({i: score for i, (score, _) in scores.items()}, rel=1e-9, abs=1e-12)
        picked.append(min(left, key=scores.get))
        assert step.picked == picked[-1]
    assert selection.layers == tuple(picked)
    assert set(picked) in allowed
    assert selection.min_gap == gap


def test_min_gap_changes_picks(model):
    """Or the other tests could not tell that it is used."""
    assert not is_spaced(select_layers(model, DATA, 3, strategy="kl").layers, 2)
    assert set(select_layers(model, DATA, 2, strategy="kl").layers) != {0, 4}
    assert set(select_layers(model, DATA, 2, strategy="kl", min_gap=4).layers) == {0, 4}


@pytest.mark.parametrize("gap", [2, 3])
def test_a_wide_beam_with_a_gap_finds_what_brute_force_finds(gap, model, plain):
    sets = spaced_sets(gap, 2)
    best = min(sets, key=lambda s: (score_of("kl", plain(*sorted(s)), plain()), sorted(s)))
    assert set(select_layers(model, DATA, 2, strategy="kl", min_gap=gap, beam=100).layers) == best
    assert select_layers(model, DATA, 2, strategy="kl", min_gap=gap, beam=2).min_gap == gap


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("kind", ["params", "flops"])
def test_a_share_with_a_gap_is_reached_whatever_is_picked_first(kind, beam):
    """Only blocks 0, 2 and 4 reach the share of three, and the best first pick alone would often be another."""
    for seed in range(3):
        model = with_strong_attention(seed).float()
        share = left_of(model, (0, 2, 4), kind)
        found = select_layers(model, DATA[:2], strategy="kl", min_gap=2, beam=beam, **{kind: share})
        assert sorted(found.layers) == [0, 2, 4]
        with pytest.raises(
            ValueError, match=rf"{kind}=.* cannot be reached: .* all 3 blocks .* with min_gap=2, 0\.[0-9]+ of"
        ):
            select_layers(model, DATA[:2], strategy="kl", min_gap=2, beam=beam, **{kind: share - 1e-6})


def test_a_throughput_with_a_gap_stops_where_no_block_is_left(model, monkeypatch):
    monkeypatch.setattr(budget.Stop, "speedup", lambda self, layers: 1 + 0.1 * len(layers))
    for beam in (1, 4):
        found = select_layers(model, DATA, throughput=3.0, strategy="kl", min_gap=3, beam=beam)
        assert is_spaced(found.layers, 3)
        words = f"throughput=3 was not reached: without the attention of {len(found.layers)} blocks"
        assert any(note.startswith(words) for note in found.warnings)
        left = set(range(DEPTH)) - set(found.layers)
        assert not any(is_spaced((*found.layers, i), 3) for i in left)
    assert len(select_layers(model, DATA, throughput=1.15, strategy="kl", min_gap=2).layers) == 2


def test_the_largest_spaced_sum_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    for gap in (1, 2, 3, 9):
        worth = {i: int(torch.randint(1, 20, (), generator=generator)) for i in range(8) if i != 3}
        every = itertools.chain.from_iterable(itertools.combinations(worth, n) for n in range(9))
        assert budget.spaced_maximum(worth, gap) == max(sum(worth[i] for i in s) for s in every if is_spaced(s, gap))
    assert budget.spaced_maximum({}, 2) == 0


def left_of(model: torch.nn.Module, layers: tuple[int, ...], kind: str) -> float:
    """What a converted model has of what the full one has."""

    def measure(network):
        if kind == "params":
            return sum(p.numel() for p in network.parameters())
        return count_flops(network, torch.zeros(1, 3, 32, 32))

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return measure(convert_vit(model, layers)) / measure(model)


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("strategy", ["nose", "one-shot", "first"])
def test_budgets_are_those_of_converted_models(kind, strategy):
    model = small_vit(depth=DEPTH, global_pool="avg")
    shares = [left_of(model, tuple(range(n)), kind) for n in range(DEPTH + 1)]
    for n in (1, DEPTH - 1, DEPTH):
        exact = select_layers(model, DATA, strategy=strategy, **{kind: shares[n]})
        assert len(exact.layers) == n
        assert left_of(model, exact.layers, kind) <= shares[n]
        if n < DEPTH:
            assert len(select_layers(model, DATA, strategy=strategy, **{kind: shares[n] - 1e-9}).layers) == n + 1
    with pytest.raises(ValueError, match=f"{kind}=.*cannot be reached: without the attention of all 5 blocks"):
        select_layers(model, DATA, strategy=strategy, **{kind: shares[-1] - 1e-6})


def test_shares_are_met_exactly():
    """1 − 7/10 is more than 0.3 in floating point."""
    model = torch.nn.Module()
    model.blocks = range(10)
    stop = budget.Stop.__new__(budget.Stop)
    stop.kind, stop.value, stop._total, stop._parts = "params", 0.3, 10, dict.fromkeys(range(10), 1)
    assert stop.met(range(7))
    assert not stop.met(range(6))


@pytest.mark.parametrize("strategy", ["nose", "one-shot", "random", "explicit"])
def test_throughput(strategy, model, monkeypatch):
    asked = []

    def speedup(self, layers):
        asked.append(tuple(layers))
        return 1 + 0.1 * len(layers)

    monkeypatch.setattr(budget.Stop, "speedup", speedup)
    options = {"strategy": strategy, "layers": (4, 1, 0, 2) if strategy == "explicit" else None}
    reached = select_layers(model, DATA, throughput=1.25, **options)
    assert len(reached.layers) == 3
    assert asked == [reached.layers[:n] for n in (1, 2, 3)]
    assert not any("not reached" in note for note in reached.warnings)
    assert reached.stop == "1.25 × the throughput"
    # the class token keeps one attention
    short = select_layers(model, DATA, throughput=3.0, **options)
    assert len(short.layers) == 4
    words = "throughput=3 was not reached: without the attention of 4 blocks 1.40 × was measured"
    assert [note for note in short.warnings if "reached" in note] == [words]


def test_throughput_is_measured_with_the_attention_gone(model):
    assert budget.Stop(model, "throughput", 1.1, range(5), 4).speedup((0, 1, 2, 3)) > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 2, "params": 0.9}, "pass one of count, params, flops and throughput; got count, params"),
        ({"flops": 0.9, "throughput": 1.2}, "got flops, throughput"),
        ({"params": 1.0}, "between 0 and 1"),
        ({"flops": 0}, "between 0 and 1"),
        ({"throughput": 1.0}, "above 1"),
        ({"params": "85%"}, "must be a number"),
        ({"params": 0.01}, "cannot be reached"),
        ({"count": 5}, "1 to 4 for 5 blocks; got 5"),
        ({"count": 1, "beam": 0}, "beam must be an integer of at least 1"),
        ({"count": 1, "beam": 2, "strategy": "one-shot"}, "'one-shot' does not search"),
        ({"count": 1, "min_gap": 0}, "min_gap must be an integer of at least 1"),
        ({"count": 1, "min_gap": 2, "strategy": "first"}, "min_gap=2 requires a greedy strategy; 'first' does not"),
        ({"count": 1, "min_gap": 2, "strategy": "cosine"}, "min_gap=2 requires a greedy strategy; 'cosine' does not"),
        ({"count": 4, "min_gap": 2, "beam": 3}, "count must be from 1 to 3 for 5 blocks with min_gap=2; got 4"),
        ({"count": 2, "min_gap": 5}, "count must be from 1 to 1 for 5 blocks with min_gap=5; got 2"),
        ({"count": 3, "min_gap": 2, "exclude": (4,)}, "count must be from 1 to 2 for 5 blocks with min_gap=2; got 3"),
        ({"count": 1, "signed": True, "strategy": "kl"}, "belongs to strategy 'nose'; got 'kl'"),
        ({"layers": (1,)}, "'explicit' and layers belong together"),
        ({"strategy": "explicit"}, "'explicit' and layers belong together"),
        ({"strategy": "explicit", "layers": (1, 1)}, "1 twice"),
        ({"strategy": "explicit", "layers": (1, 2), "exclude": (2,)}, r"\[2\], which exclude lists"),
        ({"strategy": "explicit", "layers": (1, 2), "count": 3}, "count must be from 1 to 2"),
        ({"strategy": "explicit", "layers": ()}, "1 to 4 of 5 blocks; got 0"),
        ({"throughput": 1.2, "exclude": range(5)}, "leaves no attention"),
    ],
)
def test_wrong_budgets_and_options(options, words, model):
    with pytest.raises(ValueError, match=words):
        select_layers(model, DATA, **options)


def test_five_layers_where_no_budget_is_given():
    selection = select_layers(small_vit(depth=7), DATA)
    assert len(selection.layers) == 5
    assert selection.stop == "5 layers"


ALL = [
    {"strategy": "explicit", "layers": range(DEPTH)},
    {"strategy": "first", "count": DEPTH},
    {"strategy": "random", "count": DEPTH},
    {"strategy": "one-shot", "count": DEPTH},
    {"strategy": "nose", "count": DEPTH},
    {"strategy": "nose", "count": DEPTH, "beam": 3},
    {"strategy": "nose", "params": 0.74},
    {"strategy": "cosine", "flops": 0.72},
]


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_class_token_keeps_one_attention(options, model):
    with pytest.raises(ValueError, match=r"1 to 4|cannot be reached"):
        select_layers(model, DATA, **options)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_averaged_tokens_can_lose_all(options):
    model = small_vit(depth=DEPTH, global_pool="avg")
    assert sorted(select_layers(model, DATA, **options).layers) == list(range(DEPTH))


def test_what_deserves_a_second_look_is_warned_about_and_kept(model):
    with pytest.warns(SelectionWarning) as caught:
        selection = select_layers(model, labelled(8, 8), 1, exclude=(0, 1, 2, 3))
    assert [str(w.message) for w in caught] == list(selection.warnings)
    assert "last 1 block(s) would have no attention" in selection.warnings[0]
    assert "8 images for 10 output channels" in selection.warnings[1]


@pytest.mark.parametrize("strategy", ["nose", "kl", "cosine", "one-shot", "recoverability"])
def test_not_a_number_is_traced(strategy):
    data = labelled()
    model = small_vit().bfloat16()
    with torch.no_grad():
        model.blocks[2].attn.proj.bias[0] = float("nan")
    with pytest.raises(NonFiniteActivationError, match=r"block 2 gave NaN or infinity in batch 0 \(bfloat16\)"):
        select_layers(model, data, 1, strategy=strategy)
    model = small_vit().train()
    with torch.no_grad():
        model.cls_token[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteActivationError, match="patch embedding gave NaN or infinity in batch 0"):
        select_layers(model, data, 1, strategy=strategy)
    assert model.blocks[0].training
    data[1][0][3, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteActivationError, match="batch 1 of the input holds NaN"):
        select_layers(small_vit(), data, 1, strategy=strategy)


def test_the_skipped_set_is_named():
    """Block 2 fails only where the attention of block 1 has not run before it."""
    model, ran = small_vit(), []
    model.blocks[1].attn.register_forward_hook(lambda *_: ran.append(1))
    model.blocks[2].mlp.register_forward_hook(lambda module, args, output: output if ran else output / 0)
    model.blocks[2].register_forward_hook(lambda *_: ran.clear())
    words = r"^block 2 gave NaN or infinity with the attention of \[1\] skipped in batch 0 \(float32\): logits with \["
    with pytest.raises(NonFiniteActivationError, match=words), Measurement(model, labelled()) as measurement:
        measurement.measure([frozenset(), frozenset((3,)), frozenset((1,)), frozenset((1, 3))])


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range(label):
    data = labelled()
    data[1][1][2] = label
    with pytest.raises(ValueError, match=r"labels from .* do not fit the classifier's 10 outputs"):
        select_layers(small_vit(), data, 1, strategy="accuracy")


def test_labels_are_needed_where_answers_are_right_or_wrong():
    for data in ([x for x, _ in DATA], [(x, torch.rand(len(x), 10)) for x, _ in DATA]):
        with pytest.raises(ValueError, match="yields no labels, one per image"):
            select_layers(small_vit(), data, 1, strategy="accuracy")


@pytest.mark.parametrize(("outputs", "what"), [(0, "no classifier"), (1, "one output")])
def test_models_whose_outputs_are_no_classes(outputs, what):
    model = small_vit(num_classes=outputs)
    words = f"compares predicted classes, and the model has {what} .*: nose, nose-signed, one-shot, cosine$"
    for strategy in ("kl", "accuracy", "recoverability"):
        with pytest.raises(ValueError, match=f"'{strategy}' {words}"):
            select_layers(model, DATA, 1, strategy=strategy)
    for strategy in ("nose", "nose-signed", "one-shot", "cosine"):
        select_layers(model, DATA, 1, strategy=strategy)
    assert select_layers(model, DATA, 1).channels == (outputs or 48)


def test_one_logit_is_refused_whatever_the_model_says_of_itself():
    model = small_vit()
    model.head = torch.nn.Linear(48, 1)
    data = [(x, torch.zeros(len(x))) for x, _ in DATA]
    for strategy in ("kl", "accuracy"):
        with pytest.raises(ValueError, match=r"two or more classes; the model returns \[[0-9]+, 1\]"):
            select_layers(model, data, 1, strategy=strategy)


def test_labels_are_not_rounded_to_classes():
    exact = [(x, y.float()) for x, y in DATA]
    options = {"strategy": "accuracy"}
    assert select_layers(small_vit(), exact, 1, **options) == select_layers(small_vit(), DATA, 1, **options)
    with pytest.raises(ValueError, match="yields no labels, one per image"):
        select_layers(small_vit(), [(x, y + 0.5) for x, y in exact], 1, **options)


def test_answers_of_tokens_are_refused():
    """Without pooling there are logits of every token: over which axis they are compared would be a guess."""
    model = small_vit(global_pool="")
    for strategy in ("kl", "accuracy"):
        words = (
            r"predictions requires logits \[N, classes\] of two or more classes; the model returns \[[0-9]+, 5, 10\]"
        )
        with pytest.raises(ValueError, match=words):
            select_layers(model, DATA, 1, strategy=strategy)
    assert len(select_layers(model, DATA, 1).layers) == 1


def test_the_documented_table_lists_the_registered_strategies():
    page = (REPOSITORY / "docs" / "selection.md").read_text(encoding="utf-8")
    for name, strategy in STRATEGIES.items():
        criterion = strategy.criterion.name if strategy.criterion else "–"
        row = f"| `{name}` | {SEARCHES[strategy.how]} | {criterion} | {strategy.about} |".replace("|TE|", r"\|TE\|")
        assert row in page, f"docs/selection.md lacks the row {row}"
    assert page.count("\n| `") >= len(STRATEGIES)


def test_the_command_line_offers_the_registered_strategies():
    from lambda_vit.cli.selection import Strategy

    assert [member.value for member in Strategy] == list(STRATEGIES)
