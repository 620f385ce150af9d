"""`lambda-vit select` as a user types it: its options, what it writes, and what it says to do next."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from small_models import small_vit

from lambda_kernels import from_pretrained, save_pretrained
from lambda_vit import Selection
from lambda_vit.selection import measurement

REPORT = {"report.html", "report.md", "report.json", "report.png", "progress.json"}
QUICK = ["--no-profile", "--no-latency", "--eval-samples", 0]


@pytest.fixture
def select(run, saved, folder, tmp_path):
    """Run `select` on the small model; gives (code, output, errors). Options given twice are taken from the call."""

    def call(*options: object, data: Path = folder, model: Path = saved, out: Path = tmp_path / "out"):
        return run("select", "--model", model, "--data", data, "--out", out, *options)

    return call


def record_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_everything_goes_into_one_folder(select, tmp_path):
    out = tmp_path / "out"
    code, printed, err = select("--count", 2)
    assert code == 0, err
    assert {path.name for path in out.iterdir()} == {*REPORT, "selection.json"}
    assert f"Written: {out / 'selection.json'}, {out / 'report.html'}" in printed
    picks = Selection.from_json(out / "selection.json")
    record = record_of(out)
    assert record["selection"] == picks.to_dict()
    assert [step["removed"] for step in record["trajectory"]["steps"]] == [list(picks.layers[:n]) for n in range(3)]
    assert (record["trajectory"]["images"], record["trajectory"]["split"]) == (20, "val")
    assert record["trajectory"]["held_out"] is True
    assert record["trajectory"]["labelled"] is True
    assert record["trajectory"]["throughput_batch"] == 32
    assert all(step["images_per_second"] > 0 for step in record["trajectory"]["steps"])
    assert len(record["profile"]["blocks"]) == 4
    assert record["data"]["calibration"] == 30
    assert record["environment"]["processes"] == "1"
    assert record["environment"]["embedded images"].startswith("ram: 30 images take")
    # a name with .json is that of the selection alone
    code, _, err = select("--count", 2, *QUICK, out=tmp_path / "picks.json")
    assert code == 0, err
    assert Selection.from_json(tmp_path / "picks.json") == picks
    assert {path.name for path in (tmp_path / "picks").iterdir()} == REPORT


OPTIONS = {
    "params": (["--params", 0.85], {"stop": "85 % of the parameters"}),
    "flops": (["--flops", 0.9], {"stop": "90 % of the FLOPs"}),
    "nose-signed": (["--count", 1, "--signed"], {"strategy": "nose-signed", "criterion": "TE", "signed": True}),
    "one-shot": (["--count", 2, "--strategy", "one-shot"], {"strategy": "one-shot"}),
    "accuracy": (["--count", 1, "--strategy", "accuracy"], {"criterion": "top-1 lost", "unit": "points"}),
    "recoverability": (
        ["--count", 2, "--strategy", "recoverability", "--seed", 3],
        {"criterion": "KL after repair", "seed": 3},
    ),
    "cosine": (["--count", 1, "--strategy", "cosine"], {"criterion": "1 − cosine", "entropy_full": None}),
    "random": (["--count", 2, "--strategy", "random", "--seed", 7], {"seed": 7, "criterion": None}),
    "explicit": (["--strategy", "explicit", "--layers", "2,0"], {"layers": [2, 0], "stop": "2 layers"}),
    "histogram": (["--count", 1, "--estimator", "histogram", "--bins", 32], {"estimator": "histogram"}),
    "pre_logits": (["--count", 1, "--score", "pre_logits"], {"score": "pre_logits", "channels": 48}),
    "exclude": (["--count", 1, "--exclude", "0,1,3"], {"layers": [2]}),
    "beam": (["--count", 2, "--beam", 3, "--strategy", "kl"], {"beam": 3, "criterion": "KL"}),
    "min_gap": (["--count", 2, "--min-gap", 3, "--strategy", "kl", "--beam", 2], {"min_gap": 3}),
    "samples": (["--count", 1, "--samples", 20, "--batch-size", 7, "--split", "val"], {"samples": 20}),
    "first": (["--count", 3, "--strategy", "first"], {"layers": [0, 1, 2]}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_selection(name, select, tmp_path):
    options, wanted = OPTIONS[name]
    code, _, err = select(*options, *QUICK)
    assert code == 0, err
    found = Selection.from_json(tmp_path / "out" / "selection.json").to_dict()
    assert {key: found[key] for key in wanted} == wanted
    assert (tmp_path / "out" / "report.html").exists()


def test_a_repair_is_reported(select, tmp_path):
    code, _, err = select("--count", 1, "--strategy", "recoverability", *QUICK)
    assert code == 0, err
    record = record_of(tmp_path / "out")
    assert record["environment"]["repaired MLPs"].startswith("4 on 30 images in ")
    assert record["engine"]["repair"]["passes"] == 4
    assert "is without this repair" in (tmp_path / "out" / "report.md").read_text()
    code, _, err = select("--count", 1, "--strategy", "kl", *QUICK, out=tmp_path / "kl")
    assert code == 0, err
    assert "repaired MLPs" not in record_of(tmp_path / "kl")["environment"]


def test_throughput(select, tmp_path, monkeypatch):
    import lambda_vit.selection.budget as stopping

    monkeypatch.setattr(stopping.Stop, "speedup", lambda self, layers: 1 + 0.1 * len(layers))
    code, out, err = select("--throughput", 5, *QUICK)
    assert code == 0, err
    assert "throughput=5 was not reached: without the attention of 3 blocks 1.30 × was measured" in out


ERRORS = {
    "two budgets": (
        ["--count", 2, "--params", 0.9],
        "pass one of count, params, flops and throughput; got count, params",
    ),
    "an impossible share": (["--params", 0.1], "params=0.1 cannot be reached"),
    "no share": (["--flops", 1.5], "flops must be between 0 and 1"),
    "no factor": (["--throughput", 0.5], "throughput must be above 1"),
    "layers without explicit": (["--layers", "1,2"], "'explicit' and layers belong together"),
    "explicit without layers": (["--strategy", "explicit"], "'explicit' and layers belong together"),
    "a beam that is not one": (["--beam", 2, "--strategy", "one-shot", "--count", 1], "'one-shot' does not search"),
    "a gap in a ranking": (["--min-gap", 2, "--strategy", "cosine", "--count", 1], "'cosine' does not search"),
    "a gap too wide": (["--count", 2, "--min-gap", 4], "count must be from 1 to 1 for 4 blocks with min_gap=4; got 2"),
    "signed what": (["--signed", "--strategy", "kl", "--count", 1], "signed=True belongs to strategy 'nose'; got 'kl'"),
    "no size": (["--cache-budget", "x"], "--cache-budget expects a size such as 8G"),
    "a small cache": (["--count", 1, "--cache", "ram", "--cache-budget", "1K"], "does not fit: 30 images take"),
    "all of them": (["--count", 4], "count must be from 1 to 3 for 4 blocks; got 4"),
    "no split": (["--count", 1, "--split", "test"], "split='test'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_combinations(case, select, tmp_path):
    options, words = ERRORS[case]
    code, _, err = select(*options)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "selection.json").exists()


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_caches(cache, select, tmp_path):
    place = tmp_path / "cache"
    options = ["--cache", cache, "--cache-budget", "8G", "--cache-dir", place, "--count", 2, *QUICK]
    code, _, err = select(*options)
    assert code == 0, err
    record = record_of(tmp_path / "out")
    assert record["engine"]["cache"]["kind"] == cache
    assert ("tokens before blocks 1, 2, 3" in record["environment"].get("kept between rounds", "")) == (cache == "ram")
    assert not place.exists() or list(place.iterdir()) == []


def test_asked_to_end(select, tmp_path, monkeypatch):
    """The cache goes with the process, and the rounds that are finished stay."""
    measure = measurement.Measurement.measure

    def watched(self, paths, description="Measure", **options):
        if description.startswith("Round 2"):
            assert len(list(place.glob("lambda-vit-*/*.safetensors"))) == 1
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, paths, description, **options)

    monkeypatch.setattr(measurement.Measurement, "measure", watched)
    place, before = tmp_path / "cache", signal.getsignal(signal.SIGTERM)
    code, _, _ = select("--count", 2, "--cache", "disk", "--cache-dir", place, *QUICK)
    assert code == 128 + signal.SIGTERM
    assert list(place.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["progress.json"]


def test_nothing_but_the_selection(select, tmp_path):
    code, out, err = select("--count", 1, *QUICK)
    assert code == 0, err
    record = record_of(tmp_path / "out")
    assert "trajectory" not in record
    assert "profile" not in record
    assert "validation" not in record["data"]
    assert "lambda-vit convert" in out


def test_no_times_without_latency(select, tmp_path):
    code, _, err = select("--count", 1, "--no-profile", "--no-latency")
    assert code == 0, err
    trajectory = record_of(tmp_path / "out")["trajectory"]
    assert trajectory["throughput_batch"] is None
    for step in trajectory["steps"]:
        timed = ("images_per_second", "images_per_second_interval", "speedup", "speedup_interval")
        assert [step[name] for name in timed] == [None] * 4
        assert step["parameters"] > 0


@pytest.fixture
def own_classes(folder, tmp_path):
    """Two class folders whose names say nothing to a model of ten classes."""
    for name, source in (("cat", "class3"), ("dog", "class7")):
        for split in ("train", "val"):
            shutil.copytree(folder / split / source, tmp_path / "pets" / split / name)
    return tmp_path / "pets"


def commands_in(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("lambda-vit ")]


def test_labels_of_other_classes(select, own_classes, tmp_path, run):
    """There is still the agreement; accuracies need a class map."""
    out = tmp_path / "out"
    code, printed, err = select("--count", 1, "--no-profile", "--no-latency", data=own_classes)
    assert code == 0, err
    trajectory = record_of(out)["trajectory"]
    assert trajectory["labelled"] is False
    assert all(step["top1"] is None and step["agreement"] is not None for step in trajectory["steps"])
    assert any("Accuracy was not measured" in note for note in record_of(out)["warnings"])
    assert not any(words[0] == "validate" for words in commands_in(printed)), "it could not be run"

    code, _, err = select("--count", 1, "--strategy", "accuracy", data=own_classes)
    assert code == 2
    assert "--class-map" in err
    (tmp_path / "map.json").write_text('{"cat": 3, "dog": 7}')
    options = ["--strategy", "accuracy", "--class-map", tmp_path / "map.json", "--no-profile", "--no-latency"]
    code, printed, err = select("--count", 1, *options, "--restart", data=own_classes)
    assert code == 0, err
    assert record_of(out)["trajectory"]["labelled"] is True
    for words in commands_in(printed):
        if words[0] in ("convert", "validate"):
            code, _, err = run(*words)
            assert code == 0, err


def test_without_a_held_out_split(select, folder, tmp_path, run):
    for name, source in (("flat", folder / "train"), ("alone/train", folder / "train")):
        shutil.copytree(source, tmp_path / name)
        data = tmp_path / name.partition("/")[0]
        code, printed, err = select(
            "--count", 1, "--no-profile", "--no-latency", data=data, out=tmp_path / f"o-{data.name}"
        )
        assert code == 0, err
        record = record_of(tmp_path / f"o-{data.name}")
        assert record["trajectory"]["held_out"] is False
        assert record["trajectory"]["images"] == 30
        (validate,) = [words for words in commands_in(printed) if words[0] == "validate"]
        (convert,) = [words for words in commands_in(printed) if words[0] == "convert"]
        for words in (convert, validate):
            code, _, err = run(*words)
            assert code == 0, err
    assert any("tried on the images they were measured on" in note for note in record["warnings"])


def test_next_commands_can_be_run_whatever_the_paths(run, folder, tmp_path):
    place = tmp_path / "a [b] 'c' [/d]"
    data, model = place / "my images", place / "the model"
    shutil.copytree(folder, data)
    save_pretrained(small_vit(), model)
    bad = data / "val" / "class3" / "1.png"
    bad.write_bytes(b"nothing")
    out = place / "out put"
    options = ["--count", 2, "--no-profile", "--no-latency", "--skip-bad", 1, "--tolerance", 100]
    code, printed, err = run("select", "--model", model, "--data", data, "--out", out, *options)
    assert code == 0, err
    assert f"unreadable image omitted: {bad}" in printed
    assert str(out / "report.html") in printed
    words = {words[0]: words for words in commands_in(printed)}
    for name in ("convert", "validate"):
        code, _, err = run(*words[name])
        assert code == 0, err
    picks = Selection.from_json(out / "selection.json").layers
    assert from_pretrained(out / "model").lambda_kernels_info.removed == tuple(sorted(picks))
    assert [entry["command"] for entry in record_of(out)["next_commands"]] == [
        f"lambda-vit {shlex.join(command)}" for command in words.values()
    ]


def test_the_recommended_layers_come_next(run, select, tmp_path, monkeypatch):
    import lambda_vit.report.records.recommendation as recommendation

    monkeypatch.setattr(
        recommendation, "recommend", lambda *a, **k: {"step": 1, "reason": "r", "tolerance": 5.0, "measure": "top1"}
    )
    code, printed, err = select("--count", 2, "--no-profile", "--no-latency")
    assert code == 0, err
    (convert,) = [words for words in commands_in(printed) if words[0] == "convert"]
    first = Selection.from_json(tmp_path / "out" / "selection.json").layers[0]
    assert convert[convert.index("--remove") + 1] == str(first)
    code, _, err = run(*convert)
    assert code == 0, err
    assert from_pretrained(tmp_path / "out" / "model").lambda_kernels_info.removed == (first,)


def test_the_same_command_goes_on(select, tmp_path, monkeypatch):
    """Stopped in its second round, it measures that round and no more; finished, it measures nothing."""
    measured = []
    measure = measurement.Measurement.measure
    stopping = True

    def watched(self, paths, description="Measure", **options):
        if stopping and description.startswith("Round 2"):
            raise OSError("the plug was pulled")
        measured.append(description)
        return measure(self, paths, description, **options)

    monkeypatch.setattr(measurement.Measurement, "measure", watched)
    options = ["--count", 2, *QUICK]
    code, _, err = select(*options)
    assert (code, measured) == (2, ["Round 1 of 2"])
    assert "the plug was pulled" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["progress.json"]
    stopping = False
    for rounds in (["Round 1 of 2", "Round 2 of 2"], ["Round 1 of 2", "Round 2 of 2"]):
        code, _, err = select(*options)
        assert code == 0, err
        assert measured == rounds
    expected = Selection.from_json(tmp_path / "out" / "selection.json")
    code, _, err = select("--count", 1, *QUICK)
    assert code == 2
    assert "count was 2, is 1" in err
    assert "--restart" in err
    assert Selection.from_json(tmp_path / "out" / "selection.json") == expected
    code, _, err = select("--count", 1, *QUICK, "--restart")
    assert code == 0, err
    assert measured[2:] == ["Round 1 of 1"]
    (tmp_path / "out" / "progress.json").write_text("{")
    code, _, err = select("--count", 1, *QUICK)
    assert code == 2
    assert "cannot read the progress" in err
    assert "--restart" in err


def test_warnings_are_said_once(select):
    code, out, err = select("--count", 1, "--exclude", "0,1,2", *QUICK)
    assert code == 0, err
    assert " ".join(out.split()).count("last 1 block(s) would have no attention") == 1
    assert "SelectionWarning" not in err
    assert "last 1 block" not in err


def test_bad_combinations_are_found_before_anything_is_loaded(run, folder, saved, monkeypatch, tmp_path):

    monkeypatch.setattr("lambda_vit.cli.models.open_model", lambda *a, **k: pytest.fail("work began"))
    early = ("two budgets", "no size", "layers without explicit", "explicit without layers", "signed what")
    for case in (*early, "a beam that is not one", "a gap in a ranking"):
        options, words = ERRORS[case]
        code, _, err = run("select", "--model", saved, "--data", folder, "--out", tmp_path / "out", *options)
        assert (code, words in err) == (2, True)


def test_headless_models(run, folder, tmp_path):
    model = save_pretrained(small_vit(num_classes=0), tmp_path / "headless")
    command = ["select", "--model", model, "--data", folder, "--out", tmp_path / "out", "--count", 1, *QUICK]
    code, _, err = run(*command, "--strategy", "kl")
    assert code == 2
    assert "the model has no classifier" in err
    code, _, err = run(*command)
    assert code == 0, err
    assert Selection.from_json(tmp_path / "out" / "selection.json").channels == 48


@pytest.mark.parametrize(("outputs", "words"), [(0, "the model has no classifier"), (1, "the model has one output")])
def test_models_whose_outputs_are_no_classes(select, tmp_path, outputs, words):
    """Their outputs are no answers: nothing is compared, and nothing recommended."""
    model = save_pretrained(small_vit(num_classes=outputs), tmp_path / "bare")
    code, printed, err = select("--count", 1, "--no-profile", model=model)
    assert code == 0, err
    record = record_of(tmp_path / "out")
    assert "trajectory" not in record
    assert any(words in note for note in record["warnings"])
    assert [words[0] for words in commands_in(printed)] == ["plan", "convert"]


def test_a_budget_that_is_out_of_reach_is_not_said_to_be_met(select, tmp_path, monkeypatch):
    import lambda_vit.selection.budget as stopping

    monkeypatch.setattr(stopping.Stop, "speedup", lambda self, layers: 1 + 0.1 * len(layers))
    for factor, words in ((5, "All 3 picks do not meet the budget (5 × the throughput) either."),
                          (1.3, "This meets the budget: 1.3 × the throughput.")):  # fmt: skip
        options = ["--throughput", factor, "--strategy", "first", "--tolerance", 100, "--no-profile", "--no-latency"]
        code, _, err = select(*options)
        assert code == 0, err
        assert words in record_of(tmp_path / "out")["trajectory"]["recommended"]["reason"]


def test_bins_are_those_of_the_selection_in_the_trajectory_too(select, tmp_path):
    options = ["--estimator", "histogram", "--bins", 3, "--no-profile", "--no-latency"]
    code, _, err = select("--count", 1, "--split", "val", *options)
    assert code == 0, err
    record = record_of(tmp_path / "out")
    assert record["trajectory"]["steps"][0]["entropy"] == pytest.approx(record["selection"]["entropy_full"], rel=1e-9)


def test_unreadable_images_of_training_are_left_out_by_plan_too(run, select, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "class3" / "1.png").write_bytes(b"nothing")
    code, printed, err = select("--count", 1, *QUICK, "--skip-bad", 1, data=tmp_path / "data")
    assert code == 0, err
    (plan,) = [words for words in commands_in(printed) if words[0] == "plan"]
    code, _, err = run(*plan, "--seconds", 0.1, "--batch-size", 2)
    assert code == 0, err


def test_a_control_does_not_replace_a_search(select, tmp_path):
    out = tmp_path / "out"
    for strategy in ("random", "nose"):  # what a control left can go: it is drawn again in no time
        code, _, err = select("--count", 2, "--strategy", strategy, *QUICK)
        assert code == 0, err
    found = Selection.from_json(out / "selection.json")
    code, _, err = select("--count", 2, "--strategy", "random", *QUICK)
    assert code == 2
    assert "progress.json holds the progress of a search, and 'random' would replace its selection" in err
    assert Selection.from_json(out / "selection.json") == found
    code, _, err = select("--count", 2, "--strategy", "random", "--restart", *QUICK)
    assert code == 0, err
    assert Selection.from_json(out / "selection.json").strategy == "random"
    assert not (out / "progress.json").exists()
