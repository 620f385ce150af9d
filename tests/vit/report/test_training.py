"""The report of a fine-tuning: made from its folder at any moment, and saying no more than was measured."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
from report_support import Page, assert_tables_are_whole, printed
from training_records import COMMAND, LAYERS, variants, write_run

import lambda_vit.cli.main as cli
from lambda_vit.measure.intervals import wilson_interval
from lambda_vit.report import page as report
from lambda_vit.report import training
from lambda_vit.report.figures.style import new_figure
from lambda_vit.report.figures.training import course_plot
from lambda_vit.report.page import write_training_report
from lambda_vit.report.records import training as training_record
from lambda_vit.runtime import environment
from lambda_vit.training.recipe import Recipe

SMALL = {"steps_per_epoch": 11, "every": 5, "images": 360, "batch_size": 128, "micro_batch": None}
CASES: dict[str, dict[str, Any]] = {
    "the paper's": {"epochs": 400, "dilution_epochs": 299, "dilution_per": "epoch", "steps_per_epoch": 40,
                    "resumed": (4_000, 13_000)},
    "short": {},
    "small": {**SMALL, "epochs": 20, "ema": None, "mixup": 0, "cutmix": 0},
    "one epoch": {**SMALL, "epochs": 1, "every": 50},
    "no validation": {"validated": False, "measured": False, "steps_per_epoch": 20},
    "nothing compared": {"measured": False, "steps_per_epoch": 20},
    "nothing removed": {"layers": [], "measured": False, "steps_per_epoch": 20},
    "dropped at once": {"dilution": "none", "steps_per_epoch": 20, "ema": None},
    "not begun": {"done": 0, "steps_per_epoch": 20},
    "first epoch": {"done": 0.5, "steps_per_epoch": 100},
    "diluting": {"done": 9.4, "resumed": (300,), "steps_per_epoch": 100},
    "stopped": {"done": 26.5, "status": "stopped", "steps_per_epoch": 100},
    "failed": {"done": 3.2, "status": "failed", "measured": False, "steps_per_epoch": 100},
}  # fmt: skip


def record_of(folder: Path, **options: Any) -> dict[str, Any]:
    return training_record.training_record(write_run(folder, **options))


def changed(folder: Path, **fields: Any) -> dict[str, Any]:
    """The record after run.json was changed."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps({**run, **fields}), encoding="utf-8")
    return training_record.training_record(folder)


def plain(record: dict[str, Any]) -> str:
    """Markdown without its escapes."""
    return report._render("report.md.j2", record).replace("\\", "").replace("&lt;", "<")


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_is_a_whole_report(case, tmp_path):
    folder = write_run(tmp_path, **CASES[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_training_report(folder)
    record = json.loads(paths["json"].read_text(encoding="utf-8"))
    page = Page(paths["html"].read_text(encoding="utf-8"))
    markdown = paths["md"].read_text(encoding="utf-8")
    assert training.headline(record) in page.text
    assert training.headline(record) in plain(record)
    assert_tables_are_whole(markdown)
    assert re.findall(r"^## (.+)$", markdown, flags=re.MULTILINE) == [
        title for title in re.findall(r"<h2[^>]*>([^<]+)</h2>", paths["html"].read_text(encoding="utf-8"))
    ]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"} <= set(ids)
    text = printed(record, 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())


def test_a_finished_run_says_what_was_removed_and_how_good_it_is(tmp_path):
    record = record_of(tmp_path, **CASES["short"])
    text = training.headline(record)
    run = record["finetuning"]
    low, high = run["result"]["top1_interval"]
    for words in (
        "attention of blocks 3, 5–7 (4 of 12) was faded into the identity and removed",
        "λ reached 0 in epoch 23, after step 14,063",
        "Parameters 22.1 M → 19.7 M (−10.7 %), FLOPs per image 9.20 GFLOP → 7.90 GFLOP (−14.1 %)",
        f"Top-1 is {run['result']['top1']:.2f} % ({low:.2f}–{high:.2f}) on 50,000 images",
        "measured on the model loaded from disk",
        "the full model has 79.83 %",
        f"The saved model is the moving average of the weights (EMA, decay 0.9999) of epoch {run['best']['epoch']}",
    ):
        assert words in text
    whole = plain(record)
    assert "the highest top-1 of 16 measurements since the attention was removed" in whole
    assert "changed no logit by more than 3.1e−06 (allowed: 1.3e−03)" in whole
    assert "(95 % interval −1." in whole
    assert "With the attention removed and without training, top-1 is 58.71 %" in whole
    assert [check["ok"] for check in record["checks"]] == [True, True]


def test_the_boundary_between_epochs_is_named_by_its_epoch(tmp_path):
    assert "λ reached 0 after epoch 299 (step 11,960)" in training.headline(record_of(tmp_path, **CASES["the paper's"]))


def test_a_running_run_claims_nothing_final(tmp_path):
    record = record_of(tmp_path, **CASES["diluting"])
    text = training.headline(record)
    assert text.startswith("Not finished: 9 of 30 epochs (940 of 3,000 steps)")
    assert "is still there in part" in text
    assert "measured before the attention was gone" in text
    assert "Key numbers" not in plain(record)
    assert [name for _, name, _ in training.status(record)] == ["not finished", "resumed after 1 stop"]
    assert "not_exercised" not in record


def test_the_log_is_ahead_of_run_json_while_a_run_goes_on(tmp_path):
    record = record_of(tmp_path, done=26.5, steps_per_epoch=100)
    whole = changed(tmp_path, best=None, boundary=None, history=[])
    assert whole["finetuning"]["boundary"]["step"] == 2250
    assert len(whole["finetuning"]["history"]) == 26
    assert whole["finetuning"]["position"] == 2650
    known = record["finetuning"]["best"]
    best = whole["finetuning"]["best"]
    assert {key: best[key] for key in ("epoch", "step", "weights", "top1")} == {
        key: known[key] for key in ("epoch", "step", "weights", "top1")
    }
    low, high = wilson_interval(round(best["top1"] * 500), 50_000)
    assert best["top1_interval"] == pytest.approx([100 * low, 100 * high])


def test_accuracy_with_attention_left_is_drawn_apart(tmp_path):
    record = record_of(tmp_path, **CASES["short"])
    plot = course_plot(record)
    with new_figure(plot.height) as figure:
        plot.draw(figure, record)
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        lines = figure.axes[0].get_lines()
        early = next(line for line in lines if list(line.get_xdata()) == list(range(1, 23)))
        late = next(line for line in lines if list(line.get_xdata()) == list(range(23, 31)))
        assert early.get_linestyle() == "--"
        assert late.get_linestyle() == "-"
        assert early.get_markerfacecolor() != late.get_markerfacecolor()
        marks = [axes.get_lines()[-1].get_xdata()[0] for axes in figure.axes]
    assert marks == [pytest.approx(14_063 / 625)] * 4
    for name in ("top-1 while attention is still there", "top-1, attention gone", "the best: what was kept",
                 "averaged weights, while attention is still there", "averaged weights, attention gone"):  # fmt: skip
        assert name in names


def test_layers_that_go_one_after_another_are_drawn_as_stairs(tmp_path):
    record = record_of(tmp_path, **CASES["short"])
    run = record["finetuning"]
    run["recipe"]["removal"], run["layers"], run["position"] = "progressive", [1, 3, 4], 50 * 625
    run["events"] = [
        {"kind": "boundary", "step": 625 * at, "removed": [layer]} for at, layer in ((0, 1), (2, 3), (4, 4))
    ]
    plot = course_plot(record)
    with new_figure(plot.height) as figure:
        plot.draw(figure, record)
        axes = next(axes for axes in figure.axes if axes.get_ylabel() == "share left")
        (stairs,) = [line for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
        assert list(stairs.get_xdata()) == [0, 0, 2, 4, 50]
        assert stairs.get_ydata() == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])


@pytest.mark.parametrize("case", CASES)
def test_no_text_of_the_figures_is_cut_off(case, tmp_path):
    record = record_of(tmp_path, **CASES[case])
    plot = course_plot(record)
    assert (plot is None) == (case == "not begun")
    with new_figure(plot.height if plot else 1) as figure:
        if plot:
            plot.draw(figure, record)
        figure.canvas.draw()
        legends = [text for legend in figure.legends for text in legend.get_texts()]
        labels = [text for axes in figure.axes for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label)]
        for text in (*legends, *labels):
            if text.get_text():
                box = text.get_window_extent()
                assert text.get_fontsize() >= 7
                assert box.x0 >= -1, text.get_text()
                assert box.x1 <= figure.bbox.x1 + 1, text.get_text()
                assert box.y0 >= -1, text.get_text()
                assert box.y1 <= figure.bbox.y1 + 1, text.get_text()


def test_thinning_keeps_extremes_and_the_boundary():
    rows = [{"kind": "step", "step": n, "loss": 1.0 + (n == 777) * 8, "lr": 0.1, "lambda": 0.5 if n <= 1003 else None,
             "images_per_second": 10.0} for n in range(1, 5001)]  # fmt: skip
    points = training_record.loss_curve(rows, 1003, most=100)
    assert len(points) <= 102
    assert max(point["loss_high"] for point in points) == 9.0
    assert [point["lambda"] for point in points if point["step"] <= 1003] == [0.5] * 21
    assert all(point["lambda"] is None for point in points if point["step"] > 1003)
    assert training_record.loss_curve(rows[:90], None, most=100)[5] == {
        "step": 6, "loss": 1.0, "lr": 0.1, "lambda": 0.5, "images_per_second": 10.0
    }  # fmt: skip


def test_a_long_run_is_a_small_report(tmp_path):
    record = record_of(tmp_path, **CASES["the paper's"])
    assert len(record["finetuning"]["history"]) == 400
    table = plain(record).split("**One epoch in 8")[1].split("\n\n")[1]
    epochs = [int(line.split("|")[1]) for line in table.splitlines()[2:]]
    best = record["finetuning"]["best"]["epoch"]
    assert {1, 8, 298, 299, 400, best} <= set(epochs)
    assert len(epochs) < 60


def test_what_was_not_measured_is_said(tmp_path):
    record = record_of(tmp_path, **CASES["nothing compared"])
    whole = plain(record)
    assert "it was not measured before training" in whole
    assert "how accurate the model was on these images before" in whole
    assert "latency and throughput" in whole
    assert "FLOPs and memory of a forward" in whole
    no_images = record_of(tmp_path / "b", **CASES["no validation"])
    assert "The accuracy of the model was not measured." in training.headline(no_images)
    assert "there were no validation images" in plain(no_images)
    assert "## Accuracy" not in plain(no_images)


def test_a_new_classifier_is_no_rival(tmp_path):
    folder = write_run(tmp_path, steps_per_epoch=20)
    rows = json.loads((folder / "run.json").read_text(encoding="utf-8"))["variants"]
    marked = [
        row if row["name"] == "model" else {**row, "trained": False} for row in rows
    ]  # as `rows_before` marks them
    record = changed(tmp_path, command=f"{COMMAND} --num-classes 100", variants=marked)
    assert "the classifier was new before training" in training.headline(record)
    assert "Top-1 accuracy" not in plain(record)
    assert "Both models answered" not in plain(record)
    assert "--reference" not in record["next_commands"][0]["command"]


def test_next_commands_are_those_of_this_run(tmp_path):
    done = record_of(tmp_path / "a", steps_per_epoch=20)
    model = tmp_path / "a" / "model"
    first, second = (entry["command"] for entry in done["next_commands"])
    assert first == (
        f"lambda-vit validate --model {model} --reference deit_small_patch16_224 --reference-pretrained --data /data/imagenet"
    )
    assert f'from_pretrained("{model}")' in second
    stopped = record_of(tmp_path / "b", **CASES["stopped"])
    assert [entry["command"] for entry in stopped["next_commands"]] == [COMMAND]
    # Going on with what was started over must not start it over.
    again = changed(tmp_path / "b", command=f"{COMMAND} --restart --tensorboard")
    assert [entry["command"] for entry in again["next_commands"]] == [f"{COMMAND} --tensorboard"]
    several = changed(tmp_path / "b", processes=4, command=COMMAND.replace("lambda-vit", "__main__.py"))
    command = COMMAND.replace("lambda-vit", "torchrun --nproc-per-node 4 -m lambda_vit")
    assert [entry["command"] for entry in several["next_commands"]] == [command]
    other = changed(tmp_path / "a", command="train.py", data={"root": "scikit-learn digits"})
    assert [entry["what"] for entry in other["next_commands"]] == ["Load it"]


def test_resumes_notices_and_skipped_images_are_told(tmp_path):
    folder = write_run(tmp_path, **CASES["the paper's"])
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"kind": "notice", "text": "checkpoint 7 is <damaged>", "time": "2025-03-04T10:12:44.001+00:00"}\n')
        log.write('{"kind": "unheard", "step": 3, "what": "of"}\nnot json\n{"kind": "step", "step": 99999')
    record = changed(folder, unreadable=["a/1.png", "a/2.png"])
    whole = plain(record)
    for words in ("| 4,000 | resumed | 4 processes |", "| 13,000 | resumed", "checkpoint 7 is <damaged", "| what of |",
                  "2 unreadable images left out: a/1.png; a/2.png", "1 line of log.jsonl could not be read",
                  "attention removed | of blocks 3, 5–7; largest difference of a logit 3.1e−06",
                  "2025-03-04 10:12:44.001"):  # fmt: skip
        assert words in whole
    assert record["finetuning"]["position"] == 16_000
    assert "resumed after 2 stops" in whole


def test_the_recipe_is_whole_and_shows_what_is_not_the_default(tmp_path):
    whole = plain(record_of(tmp_path, steps_per_epoch=20, lr=3e-4, freeze=("embed", 2)))
    changed = (
        "removal dilute, dilution linear, batch_size 2048, micro_batch 256, lr 0.0003, ema 0.9999, freeze embed, 2."
    )
    assert f"Changed from the defaults: {changed}" in whole
    for name in Recipe().to_dict():
        assert f"| {name} |" in whole


def test_failed_checks_are_loud(tmp_path):
    write_run(tmp_path, steps_per_epoch=20)
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    record = changed(tmp_path, result={**run["result"], "same": False})
    assert "1 of 2 checks failed" in plain(record)
    failed = changed(tmp_path, status="failed", error="ValueError: the loss became nan", result=None)
    assert "Failed after 30 of 30 epochs" in plain(failed)
    assert plain(failed).count("the loss became nan") >= 2


def test_a_missing_log_leaves_the_epochs(tmp_path):
    write_run(tmp_path, steps_per_epoch=20)
    (tmp_path / "log.jsonl").unlink()
    record = training_record.training_record(tmp_path)
    assert len(record["finetuning"]["history"]) == 30
    assert "log.jsonl is missing" in plain(record)
    write_training_report(tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (None, FileNotFoundError, r"run\.json is missing"),
        ("{", ValueError, "is not JSON"),
        ("[]", ValueError, "is not the record of a fine-tuning"),
        ('{"recipe": {}, "format": 2}', ValueError, "has format 2"),
    ],
)
def test_another_folder_is_refused(tmp_path, content, error, match):
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(error, match=match):
        write_training_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_variants_of_run_json_are_the_table(tmp_path):
    record = record_of(tmp_path, steps_per_epoch=20)
    assert [row["label"] for row in record["variants"]] == [row["label"] for row in variants()]
    assert record["variants"][2]["top1"] == record["finetuning"]["result"]["top1"]
    assert record["variants"][2]["removed"] == LAYERS
    rows = [line for line in plain(record).splitlines() if line.startswith("| Fine-tuned |")]
    assert "88.20" in rows[0]
    assert "35.4 ms" in rows[1]


def test_command_writes_the_report_again(tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path, **CASES["stopped"])
    monkeypatch.setattr("sys.argv", ["lambda-vit", "report", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "Stopped by a signal after 26 of 30 epochs" in " ".join(capsys.readouterr().out.split())
    assert (folder / "report.html").exists()


def test_paths_with_spaces_can_be_typed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/lambda-vit", "finetune", "--model", "m", "--data", "/my images"])
    command = environment.command_line()
    assert command == "lambda-vit finetune --model m --data '/my images'"
    monkeypatch.setattr("sys.argv", ["/lib/lambda_vit/__main__.py", "select", "--model", "m"])
    assert environment.command_line() == "python -m lambda_vit select --model m"
    record_of(tmp_path / "a")
    (compare, _) = changed(tmp_path / "a", command=command)["next_commands"]
    assert shlex.split(compare["command"])[-2:] == ["--data", "/my images"]
    (again,) = changed(tmp_path / "a", command=command, status="stopped")["next_commands"]
    assert again["command"] == command
