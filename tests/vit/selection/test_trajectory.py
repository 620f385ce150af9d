"""What every pick costs, measured on views of one model; and the step that is recommended, with its reason."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_vit

from lambda_kernels import convert_vit
from lambda_kernels.errors import UnsupportedModelError
from lambda_vit.measure.cost import cost
from lambda_vit.measure.intervals import paired_interval
from lambda_vit.report.records.recommendation import recommend
from lambda_vit.selection.trajectory import measure_costs


def made(top1: list[float | None], agreement: list[float] | None = None) -> list[dict]:
    """Steps that pick the blocks 5, 6, 7 …"""
    agreement = agreement or [100 - 2.0 * n for n in range(len(top1))]
    return [
        {"removed": list(range(5, 5 + n)), "picked": 4 + n if n else None, "top1": value, "agreement": agreement[n]}
        for n, value in enumerate(top1)
    ]


def test_costs_are_those_of_converted_copies():
    model = small_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = list(model.blocks)
    found = measure_costs(model, [2, 0], batch_size=6, seconds=0.0)
    assert [b is c for b, c in zip(blocks, model.blocks, strict=True)] == [True] * 4
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    for step, removed in zip(found, [(), (2,), (2, 0)], strict=True):
        converted = convert_vit(model, removed, fuse="removed")
        expected = cost(converted, batch_size=6)
        assert step["parameters"] == expected.parameters == sum(p.numel() for p in converted.parameters())
        assert step["flops"] == expected.flops
        assert step["weight_bytes"] == expected.weight_bytes
        assert step["peak_memory_bytes"] == expected.peak_memory_bytes
    attention = sum(p.numel() for p in model.blocks[2].attn.parameters()) + 2 * 48  # norm1 goes too
    assert found[0]["parameters"] - found[1]["parameters"] == attention
    assert found[0]["speedup"] == 1.0


def test_throughput_follows_from_the_times(monkeypatch):
    from lambda_vit.selection import trajectory

    seen = {}

    def times(models, batch_sizes, **options):
        seen.update(options, batches=batch_sizes, models=models)
        values = [20.0, 20.0, 20.0, 40.0, 20.0, 10.0], [10.0, 10.0, 16.0, 20.0, 10.0, 4.0]
        return {name: {8: list(value)} for name, value in zip(models, values, strict=True)}

    monkeypatch.setattr(trajectory, "time_forwards", times)
    model = small_vit()
    full, without = measure_costs(model, [3], batch_size=8, seconds=7.0, rounds=9)
    assert (seen["batches"], seen["seconds"], seen["rounds"]) == ((8,), 7.0, 9)
    assert full["images_per_second"] == 400.0
    assert full["images_per_second_interval"] == [400.0, 400.0]
    assert without["images_per_second_interval"] == pytest.approx([8000 / 14.5, 800.0])
    assert (full["speedup"], full["speedup_interval"]) == (1.0, None)
    assert (without["speedup"], without["speedup_interval"]) == (
        2.0,
        [1.25, 2.5],
    )  # of six ratios, the smallest and largest
    first, second = seen["models"].values()
    assert first is model
    assert not hasattr(second.blocks[3], "attn")
    shared = {id(p) for p in model.parameters()}
    assert all(id(p) in shared for p in second.parameters())


def test_costs_without_a_pick_are_the_model_alone():
    (only,) = measure_costs(small_vit(), [], batch_size=1, seconds=0.0)
    assert only["speedup"] == 1.0


@pytest.mark.parametrize(("layers", "match"), [([4], "from 0 to 3"), ([1, 1], "twice"), ([-1], "from 0 to 3")])
def test_costs_refuse_wrong_blocks(layers, match):
    with pytest.raises(ValueError, match=match):
        measure_costs(small_vit(), layers)


def test_costs_refuse_models_without_such_blocks():
    import timm

    with pytest.raises(UnsupportedModelError):
        measure_costs(timm.create_model("resnet10t", pretrained=False), [0])


def exact_interval(lost: int, gained: int, images: int) -> tuple[float, float]:
    """Agresti and Min's interval from the counts themselves."""
    total = images + 2
    difference = (gained - lost) / total
    half = 1.959964 * math.sqrt(lost + gained + 1 - (gained - lost) ** 2 / total) / total
    return 100 * (difference - half), 100 * (difference + half)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(80, 3000))
def test_paired_interval_is_never_narrower_than_the_counts_allow(lost, gained, neither, images):
    images += lost + gained + neither
    right = images // 2 + 40
    full = {"top1": 100 * right / images}
    step = {"top1": 100 * (right + gained - lost) / images, "agreement": 100 - 100 * (lost + gained + neither) / images}
    low, high = paired_interval(full, step, images)
    narrow_low, narrow_high = exact_interval(lost, gained, images)
    assert low <= narrow_low + 1e-9
    assert high >= narrow_high - 1e-9
    if not neither:
        assert (low, high) == pytest.approx((narrow_low, narrow_high))


def test_paired_interval_keeps_a_width_where_no_answer_changed():
    same = {"top1": 80.0, "agreement": 100.0}
    low, high = paired_interval(same, same, 50)
    assert -5 < low < 0 < high < 5


@pytest.mark.parametrize("gap", [{"top1": None}, {"agreement": None}])
def test_paired_interval_needs_its_figures(gap):
    step = {"top1": 80.0, "agreement": 90.0}
    assert paired_interval(step, step | gap, 100) is None
    assert paired_interval(step, step, 0) is None


@pytest.mark.parametrize(
    ("top1", "tolerance", "step"),
    [
        ([80.0, 81.0, 76.0, 74.9, 70.0], 5.0, 2),
        ([80.0, 75.0], 5.0, 1),  # on the edge is within
        ([80.0, 74.9, 80.0], 5.0, 0),  # what comes back later does not count
        ([80.0, 79.0, 78.0], 5.0, 2),
        ([80.0], 5.0, 0),
        ([80.0, 80.0, 79.9], 0.0, 1),
        ([3.0, 0.0], 5.0, 1),
        ([80.3, 80.3 - 0.1 - 0.2], 0.3, 1),  # rounding must not decide
    ],
)
def test_recommended_step(top1, tolerance, step):
    found = recommend(made(top1), tolerance=tolerance)
    assert found["step"] == step
    assert (found["tolerance"], found["measure"]) == (tolerance, "top1")


def test_reason_names_blocks_figures_next_pick_and_noise():
    steps = made([79.5, 81.0, 76.0, 70.5], [100.0, 97.0, 90.0, 80.0])
    reason = recommend(steps, wanted="3 layers", images=200, held_out=True)["reason"]
    low, high = paired_interval(steps[0], steps[2], 200)
    interval = f"{low:+.1f} to {high:+.1f} points".replace("-", "−")
    for words in (
        "Remove the attention of blocks 5 and 6: the first 2 of 3 picks.",
        "Without training, top-1 is 76.0 %, compared with 79.5 % for the full model: 3.5 points less, within the tolerance of "
        "5 points, as after every earlier pick.",
        "The next pick, block 7, changes top-1 to 70.5 %: 9.0 points less, more than the tolerance of 5 points",
        f"On the same 200 images, the 95 % interval of the difference is {interval}: it includes 0",
        "One percent corresponds to 2 images.",
        "The images were held out: none of them was used for the selection.",
        "Training after the removal usually recovers accuracy; these figures cannot predict how much.",
        "This does not meet the budget (3 layers), which requires all 3 picks, block 7 too",
    ):
        assert words in reason
    assert len(reason.splitlines()) == 3


def test_reason_says_when_the_loss_is_more_than_chance_and_when_the_choice_could_move():
    steps = made([80.0, 76.0, 74.0], [100.0, 95.0, 92.0])
    reason = recommend(steps, images=20_000)["reason"]
    assert "the loss is more than chance" in reason
    assert "One percent corresponds to" not in reason
    assert "80.00 %" in reason
    assert "more images may change the decision" not in reason
    assert "more images may change the decision" in recommend(steps, images=300)["reason"]


def test_all_picks_within_the_tolerance():
    reason = recommend(made([80.0, 79.0, 81.0]), wanted="85 % of the parameters", held_out=False)["reason"]
    assert "all 2 picks" in reason
    assert "no loss, and every earlier pick stays within the tolerance of 5 points" in reason
    assert "All picks stay within the tolerance: removing more layers may be possible" in reason
    assert "This meets the budget: 85 % of the parameters." in reason
    assert "were not held out" in reason
    assert "next pick" not in reason


def test_the_only_pick():
    reason = recommend(made([80.0, 79.0]))["reason"]
    assert "Remove the attention of block 5: the only pick." in reason
    assert "earlier" not in reason


def test_nothing_is_recommended_where_the_first_pick_is_too_much():
    reason = recommend(made([80.0, 60.0, 78.0]), images=100, wanted="2 layers")["reason"]
    assert reason.startswith(
        "Remove no layer unless you train afterwards. The first pick, block 5, changes top-1 to 60.0 %"
    )
    assert "Top-1 returns within the tolerance after 2 picks" in reason
    assert "does not meet the budget (2 layers), which requires all 2 picks, and training" in reason
    assert "interval of the difference" not in reason.splitlines()[1]
    only = recommend(made([80.0, 60.0]), wanted="1 layer")["reason"]
    assert "does not meet the budget (1 layer), which requires the only pick, and training" in only


def test_without_labels_agreement_decides():
    steps = made([None] * 4, [100.0, 97.0, 95.0, 90.0])
    found = recommend(steps, images=100, held_out=False)
    assert (found["step"], found["measure"]) == (2, "agreement")
    assert "Without labels" in found["reason"]
    assert "agreement with the full model's answers is 95.0 %: 5.0 points short of 100 %" in found["reason"]
    assert "The 95 % interval of the agreement, on 100 images, is 88.8 to 97.8 %." in found["reason"]
    assert "top-1" not in found["reason"]


def test_one_step_without_top1_turns_to_agreement():
    steps = made([80.0, None, 70.0], [100.0, 99.0, 98.0])
    assert recommend(steps)["measure"] == "agreement"
    assert recommend(steps)["step"] == 2


def test_single_step_says_so():
    found = recommend(made([None], [100.0]))
    assert found["step"] == 0
    assert "No layer was picked" in found["reason"]


@pytest.mark.parametrize(
    ("steps", "options", "match"),
    [
        ([], {}, "steps is empty"),
        (made([80.0, 79.0]), {"tolerance": -1.0}, "tolerance=-1.0"),
        (made([80.0, 79.0]), {"tolerance": math.nan}, "tolerance=nan"),
        (made([80.0, 79.0]), {"tolerance": math.inf}, "tolerance=inf"),
        ([{"removed": []}, {"removed": [1], "picked": 1}], {}, r"steps\[1\] has neither"),
    ],
)
def test_recommend_refuses(steps, options, match):
    with pytest.raises(ValueError, match=match):
        recommend(steps, **options)


def test_a_budget_that_all_picks_miss():
    words = "All 2 picks do not meet the budget (3 × the throughput) either."
    for top1 in ([80.0, 79.0, 78.0], [80.0, 79.0, 60.0]):
        reason = recommend(made(top1), wanted="3 × the throughput", reached=False)["reason"]
        assert words in reason
        assert "This " not in reason
