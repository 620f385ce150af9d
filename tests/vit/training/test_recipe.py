"""lambda_vit.training.recipe: what is accepted, what wins, and what ships."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml
from places import REPOSITORY

from lambda_vit.training.dilution import LambdaSchedule
from lambda_vit.training.recipe import FOLDER, Recipe, list_recipes, load_recipe

FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}

# For every field values that are refused, and a piece of what is expected instead.
REFUSED = {
    "epochs": ([0, 2.5, "30", True, None], "whole number in [1, ∞)"),
    "dilution_epochs": ([-1, "long", float("inf"), 31.0], "[0, ∞), or none|at most epochs=30"),
    "removal": (["delete", "none"], "one of drop, fade, dilute, progressive"),
    "dilution": (["quadratic"], "one of linear, cosine, step, none"),
    "local_epochs": ([-1, None, 30.0], "[0, ∞)|less than epochs=30"),
    "dilution_per": (["image"], "one of step, epoch"),
    "batch_size": ([0, 1.5], "whole number in [1, ∞)"),
    "micro_batch": ([0, -2, 3, 100, 1024], "whole number in [1, ∞), or none|a divisor of batch_size=512"),
    "opt": (["adamx", "", 3], "an optimizer of timm, such as|a name"),
    "lr": ([0, -1e-3, "fast", float("nan")], "a number in (0, ∞), or none"),
    "base_lr": ([0, None], "a number in (0, ∞)"),
    "min_lr": ([-1e-9, 1e-3], "[0, ∞)|at most the peak learning rate, base_lr·batch_size/512=0.0005"),
    "weight_decay": ([-0.1], "[0, ∞)"),
    "betas": ([0.9, [0.9], [0.9, 1.0], [0.9, 0.99, 0.999], ["a", 0.9]], "two numbers in [0, 1), or none"),
    "eps": ([0], "(0, ∞), or none"),
    "layer_decay": ([0, 1.1], "(0, 1], or none"),
    "sched": (["step", "Cosine"], "one of cosine, tanh, poly"),
    "warmup_epochs": ([-1, 31.0], "[0, ∞), or none|at most epochs=30"),
    "warmup_lr": ([-1, 1e-3], "[0, ∞)|at most the peak"),
    "clip_grad": ([0, -1], "(0, ∞), or none"),
    "label_smoothing": ([-0.1, 1], "[0, 1)"),
    "mixup": ([-1, False], "[0, ∞)"),
    "cutmix": ([-1], "[0, ∞)"),
    "mixup_prob": ([1.1], "[0, 1]"),
    "mixup_switch_prob": ([-0.1], "[0, 1]"),
    "mixup_mode": (["half"], "one of batch, pair, elem"),
    "mixup_off_epoch": ([-1, 0.5], "whole number in [0, ∞)"),
    "aa": (["foo", "rand-q9x", "augmix-z3", 3], "a policy of timm|a name, or none"),
    "color_jitter": ([-0.1, [0.1, 0.2, 0.3]], "[0, ∞), or none"),
    "reprob": ([1.5], "[0, 1]"),
    "remode": (["black"], "one of const, rand, pixel"),
    "recount": ([0], "[1, ∞)"),
    "repeated_aug": ([-1, 1, 2.5], "whole number in [0, ∞)|0 for one view of every image, or at least 2"),
    "train_interpolation": (["cubic"], "one of bicubic, bilinear"),
    "scale": ([0.5, [0, 1], [0.5, 0.1], [0.5, 1.5]], "two numbers in (0, 1], the lower first"),
    "ratio": ([[0, 1], [2, 1], None], "two numbers in (0, ∞), the lower first"),
    "hflip": ([-0.5], "[0, 1]"),
    "crop_pct": ([0, 1.2], "(0, 1], or none"),
    "img_size": ([0, 224.0, [224, 224]], "whole number in [1, ∞), or none"),
    "drop_path": ([1], "[0, 1), or none"),
    "drop": ([-0.1], "[0, 1), or none"),
    "ema": ([0, 1], "(0, 1), or none"),
    "ema_warmup": (["yes", 1], "true or false"),
    "amp": (["fp32", True], "one of none, bf16, fp16"),
    "compile": (["true"], "true or false"),
    "recompute": (["some"], "one of auto, none, act, all"),
    "distillation": (["token"], "one of none, soft, hard"),
    "distillation_alpha": ([1.5], "[0, 1]"),
    "distillation_tau": ([0], "(0, ∞)"),
    "feature_loss": ([-1], "[0, ∞)"),
    "hidden_loss": ([-0.5], "[0, ∞)"),
    "freeze": (["head", [-1], [True], [0, 0], [1.0]], "'embed' and block indices, each once"),
    "val_every": ([0], "[1, ∞)"),
    "checkpoint_every": ([0], "[1, ∞), or none"),
    "seed": ([-1, 0.5], "[0, ∞)"),
}


def test_every_field_is_checked():
    assert set(REFUSED) == set(FIELDS)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (values, _) in REFUSED.items() for value in values]
)
def test_a_wrong_value_is_refused_with_its_name_and_what_is_expected(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=") as caught:
        Recipe(**{name: value})
    assert f"{name}={value!r}: expected " in str(caught.value)
    assert any(piece in str(caught.value) for piece in REFUSED[name][1].split("|"))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"dilution": "none", "dilution_epochs": 3},
            "dilution_epochs=3.0: expected None or 0 where attention is removed",
        ),
        (
            {"removal": "drop", "dilution_epochs": 3},
            "dilution_epochs=3.0: expected None or 0 where attention is removed",
        ),
        ({"removal": "drop", "dilution": "step"}, "dilution='step': expected none with removal='drop'"),
        (
            {"removal": "progressive", "dilution": "linear"},
            "dilution='linear': expected none with removal='progressive'",
        ),
        ({"removal": "progressive", "dilution_epochs": 0}, "dilution_epochs=0.0: expected more than 0"),
        (
            {"removal": "fade", "dilution": "none"},
            "dilution='none': expected linear, cosine or step with removal='fade'",
        ),
        ({"removal": "fade", "local_epochs": 1}, "local_epochs=1.0: expected 0 with removal='fade'"),
        ({"dilution": "linear", "local_epochs": 1}, "local_epochs=1.0: expected 0 with removal='dilute'"),
        ({"epochs": 5, "local_epochs": 5}, "local_epochs=5.0: expected less than epochs=5"),
        ({"epochs": 5, "dilution_epochs": 6}, "dilution_epochs=6.0: expected at most epochs=5"),
        ({"lr": 1e-6, "warmup_epochs": 0}, "min_lr=1e-05: .*, lr=1e-06"),
        ({"batch_size": 8, "min_lr": 0, "warmup_lr": 1e-5}, "warmup_lr=1e-05: .*, base_lr·batch_size/512=7.8125e-06"),
        ({"batch_size": 15, "micro_batch": 5, "lr": 1e-3}, "micro_batch=5: expected an even number, since mixup"),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**knobs)


@pytest.mark.parametrize("name", [None, *list_recipes()])
def test_a_smaller_batch_lowers_all_rates_alike(name):
    own = load_recipe(name)
    assert load_recipe(name, {"batch_size": own.batch_size}) == own
    small = load_recipe(name, {"batch_size": 4})
    factor = 1 if own.lr is not None else 4 / own.batch_size
    for rate in ("peak_lr", "min_lr", "warmup_lr"):
        assert getattr(small, rate) == pytest.approx(factor * getattr(own, rate), rel=1e-12)
    kept = load_recipe(name, {"batch_size": 4, "min_lr": 1e-9, "warmup_lr": 2e-9})
    assert (kept.min_lr, kept.warmup_lr) == (1e-9, 2e-9)
    own_rate = load_recipe(name, {"batch_size": 4, "lr": 1e-3})
    assert (own_rate.min_lr, own_rate.warmup_lr) == (own.min_lr, own.warmup_lr)
    assert small.micro_batch is None


def test_a_batch_size_keeps_a_micro_batch_that_fits_and_is_checked_itself():
    assert load_recipe("deit-base", {"batch_size": 512}).micro_batch == 256
    with pytest.raises(ValueError, match="micro_batch=256: expected a divisor of batch_size=300"):
        load_recipe("deit-base", {"batch_size": 300})
    with pytest.raises(ValueError, match="batch_size=0: expected a whole number"):
        load_recipe("deit-base", {"batch_size": 0})


def test_what_only_matters_together_is_let_be():
    assert Recipe(dilution="none").dilution_length == 0
    assert Recipe(dilution="none", dilution_epochs=0).dilution_length == 0
    assert Recipe(batch_size=15, micro_batch=5, lr=1e-3, mixup=0, cutmix=0).check_micro_batch(5) == 3
    assert not Recipe(mixup_prob=0).mixes
    Recipe(lr=1e-6, min_lr=0, warmup_lr=1e-3, warmup_epochs=0)


def test_what_is_left_open_follows_from_the_rest():
    lengths = [
        Recipe(epochs=n, removal=way).dilution_length for n in (30, 8) for way in ("fade", "progressive", "drop")
    ]
    assert lengths == [22.5, 22.5, 0, 6, 6, 0]
    assert [Recipe(epochs=n).warmup_length for n in (3, 30, 300)] == [0.5, 5, 5]
    assert Recipe(warmup_epochs=0).warmup_length == 0
    assert Recipe(batch_size=2048).peak_lr == 2e-3
    assert Recipe(lr=0.1, batch_size=2048).peak_lr == 0.1


@pytest.mark.parametrize("name", ["sgd", "lamb", "lookahead_adamw", "AdamW"])
def test_timms_optimizers_are_known(name):
    assert Recipe(opt=name).opt == name


@pytest.mark.parametrize("policy", ["rand-m7-n3", "augmix-m3-w2", "original-mstd0.5", "3a", None, "none"])
def test_timms_policies_are_known(policy):
    assert Recipe(aa=policy).aa == (None if policy == "none" else policy)


def test_a_word_on_the_command_line_empties_a_field():
    recipe = load_recipe("deit-tiny", {"ema": "none", "drop_path": "none"})
    assert recipe.ema is None
    assert recipe.drop_path is None


def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 12\nmixup: 0.5\nweight-decay: 5e-2\nfreeze: [embed, 0]\n")
    recipe = load_recipe(path, {"mixup": 0.1})
    assert (recipe.epochs, recipe.mixup, recipe.cutmix, recipe.freeze) == (12, 0.1, Recipe().cutmix, ("embed", 0))
    assert recipe.weight_decay == 0.05  # which YAML takes for text
    assert load_recipe(None, {"epochs": 3}) == Recipe(epochs=3)
    assert load_recipe() == Recipe()


def test_a_base_rate_given_as_an_option_wins_over_a_rate_of_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 0.1\n")
    assert load_recipe(path).peak_lr == 0.1
    assert load_recipe(path, {"base_lr": 1e-3}).peak_lr == 1e-3
    assert load_recipe(path, {"base_lr": 1e-3, "lr": 0.2}).peak_lr == 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_decy: 0.1", r"unknown field 'weight_decy' \(in .*mine.yaml\). Did you mean weight_decay\?"),
        ("xyzzy: 1", r"unknown field 'xyzzy' .* Available: epochs, removal"),
        ("mixup: 1\nmixup: 2", "cannot read the recipe .*mine.yaml: 'mixup' is given twice"),
        ("mixup: [", "cannot read the recipe .*mine.yaml"),
        ("just words", "expected 'field: value' lines, got str"),
        ("mixup: off", r"recipe .*mine.yaml: mixup=False: expected a number in \[0, ∞\)"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_unknown_options_and_recipes_are_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match=r"unknown field 'lable_smoothing' \(an option\). Did you mean label_smoothing"
    ):
        load_recipe("short", {"lable_smoothing": 0.1})
    with pytest.raises(ValueError, match=r"'deit-tny' is neither a file nor .* Did you mean deit-tiny\?"):
        load_recipe("deit-tny")
    with pytest.raises(
        ValueError, match="Available: deit-base, deit-small, deit-tiny, digits, recover, short, transfer"
    ):
        load_recipe("xyzzy")
    with pytest.raises(ValueError, match=r"recipe deit-tiny, with epochs=10: dilution_epochs=299\.0"):
        load_recipe("deit-tiny", {"epochs": 10})


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("# nothing\n")
    assert load_recipe(tmp_path / "mine.yaml") == Recipe()


@pytest.mark.parametrize("name", [None, "deit-tiny", "digits"])
def test_what_is_written_is_read_back(tmp_path, name):
    recipe = load_recipe(name, {"freeze": ["embed", 3], "betas": [0.9, 0.95], "seed": 2**40})
    recipe.write(tmp_path / "deep" / "config.yaml")
    assert load_recipe(tmp_path / "deep" / "config.yaml") == recipe
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["config.yaml"]
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_equal_numbers_are_kept_alike():
    assert Recipe(mixup=1).to_dict() == Recipe(mixup=1.0).to_dict()
    assert json.dumps(Recipe(mixup=1).to_dict()) == json.dumps(Recipe(mixup=1.0).to_dict())


def test_the_shipped_recipes_load_and_are_listed():
    assert set(list_recipes()) == {"deit-tiny", "deit-small", "deit-base", "recover", "short", "transfer", "digits"}
    for name, description in list_recipes().items():
        assert len(description) > 20
        assert load_recipe(name) == load_recipe(FOLDER / f"{name}.yaml")
        comments = [line for line in (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines() if line.startswith("#")]
        assert comments, f"{name} does not say where its figures come from"


def test_the_recipes_are_packed():
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    assert '"recipes/*.yaml"' in project


@pytest.mark.parametrize("name", ["deit-tiny", "deit-small", "deit-base"])
def test_the_papers_recipes_hold_its_figures(name):
    recipe = load_recipe(name)
    expected = {
        "epochs": 400, "batch_size": 2048, "micro_batch": 256, "opt": "adamw", "base_lr": 5e-4, "min_lr": 1e-5,
        "warmup_lr": 1e-6, "warmup_epochs": 5, "weight_decay": 0.05, "sched": "cosine", "aa": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.3, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "reprob": 0.25, "remode": "pixel",
        "ema": 0.99996, "drop_path": 0.1, "repeated_aug": 3, "train_interpolation": "bicubic", "clip_grad": None,
        "dilution": "linear", "dilution_per": "epoch",
    }  # fmt: skip
    assert {key: recipe.to_dict()[key] for key in expected} == expected
    assert recipe.peak_lr == 2e-3
    given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    assert set(expected) - {"clip_grad"} <= set(given)  # spelt out, whatever becomes of the defaults
    lam = LambdaSchedule(recipe.dilution_length, recipe.dilution)
    assert [lam(epoch) for epoch in range(recipe.epochs)] == [max(0.0, 1 - epoch / 299) for epoch in range(400)]


def test_dropping_at_once_forgets_how_long_a_recipe_fades():
    assert load_recipe("deit-tiny", {"dilution": "none"}).dilution_length == 0
    assert load_recipe("deit-tiny", {"removal": "drop"}).dilution_length == 0
    with pytest.raises(
        ValueError, match=r"dilution_epochs=3\.0: expected None or 0 where attention is removed at once"
    ):
        load_recipe("deit-tiny", {"dilution": "none", "dilution_epochs": 3})


@pytest.mark.parametrize(
    ("given", "removal", "dilution", "scale"),
    [
        ({}, "drop", "none", 1.0),
        ({"dilution": "none"}, "drop", "none", 1.0),
        ({"dilution": "cosine"}, "dilute", "cosine", 2.0),
        ({"dilution_epochs": 3}, "dilute", "linear", 2.0),
        ({"dilution_epochs": 0}, "dilute", "linear", 2.0),
        ({"removal": "drop", "dilution_epochs": 0}, "drop", "none", 1.0),
        ({"removal": "dilute"}, "dilute", "linear", 2.0),
        ({"removal": "fade", "dilution": "step"}, "fade", "step", 1.0),
        ({"removal": "progressive", "dilution_epochs": 3}, "progressive", "none", 1.0),
    ],
)
def test_the_way_to_remove_and_the_shape_of_lambda_follow_from_each_other(given, removal, dilution, scale):
    """A recipe from before there was `removal` means what it meant."""
    found = Recipe(**given)
    assert (found.removal, found.dilution, found.residual_scale) == (removal, dilution, scale)
    assert dataclasses.replace(found, seed=1) == Recipe(**given, seed=1)
    assert Recipe(**json.loads(json.dumps(found.to_dict()))) == found


def test_one_way_to_remove_replaces_that_of_a_recipe(tmp_path):
    assert load_recipe("deit-tiny").removal == "dilute"
    assert load_recipe("deit-tiny", {"removal": "fade"}).dilution_length == 299
    assert load_recipe("deit-tiny", {"dilution": "cosine"}).removal == "dilute"
    (tmp_path / "fade.yaml").write_text("removal: fade\ndilution: cosine\n")
    kept = {
        ("removal", "fade"): ("fade", "cosine"),
        ("removal", "dilute"): ("dilute", "cosine"),
        ("removal", "progressive"): ("progressive", "none"),
        ("removal", "drop"): ("drop", "none"),
        ("dilution", "step"): ("fade", "step"),
        ("dilution", "none"): ("drop", "none"),
    }
    for (name, value), wanted in kept.items():
        found = load_recipe(tmp_path / "fade.yaml", {name: value})
        assert (found.removal, found.dilution) == wanted
    assert load_recipe("recover", {"dilution": "step"}).removal == "dilute"
    faded = load_recipe("deit-tiny", {"removal": "progressive"})
    assert (faded.removal, faded.dilution, faded.dilution_length) == ("progressive", "none", 299)
