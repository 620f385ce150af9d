"""The report of a selection: recommendation, steps, scores of every strategy; on the page, in Markdown, in a terminal."""

from __future__ import annotations

import re
import warnings

import pytest
from report_support import Page, assert_tables_are_whole, made_up, printed
from selection_records import CRITERIA, selection_record, steps_of

from lambda_vit.report import page as report
from lambda_vit.report import selection
from lambda_vit.report.figures import page as figures
from lambda_vit.report.figures.selection import score_plot, trajectory_plot
from lambda_vit.report.figures.style import new_figure
from lambda_vit.report.page import write_report
from lambda_vit.report.records.scores import blocks_of, diverging, lowest_picked, rankings, score_text
from lambda_vit.runtime import formatting
from lambda_vit.selection import strategies

CASES = {
    "nose": {},
    "beam": {"strategy": "kl", "depth": 32, "picks": 16, "beam": 4, "images": 10_000, "exclude": (0, 31)},
    "no labels": {"strategy": "nose-signed", "labelled": False, "images": 300, "exclude": (0,)},
    "one-shot": {"strategy": "one-shot"},
    "cosine": {"strategy": "cosine", "depth": 32, "picks": 8},
    "accuracy": {"strategy": "accuracy", "picks": 1},
    "recoverability": {"strategy": "recoverability", "picks": 3},
}


def markdown(record: dict) -> str:
    return report._render("report.md.j2", record)


def plain(record: dict) -> str:
    """Markdown without its escapes."""
    return markdown(record).replace("\\", "").replace("&lt;", "<")


@pytest.mark.parametrize("case", CASES)
def test_everything_is_told_in_all_forms(case, tmp_path):
    record = selection_record(**CASES[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_report(record, tmp_path)
    page = Page(paths["html"].read_text(encoding="utf-8"))
    trajectory, digits = record["trajectory"], 2 if record["trajectory"]["images"] >= 10_000 else 1
    wanted = [selection.headline(record), *trajectory["recommended"]["reason"].splitlines(), "recommended"]
    wanted += [record["selection"]["stop"], record["selection"]["criterion"], "What every pick does"]
    wanted += [c["what"] for c in record["next_commands"]]
    for step in trajectory["steps"]:
        wanted += [
            formatting.format_count(step["parameters"]),
            formatting.format_flops(step["flops"]),
            formatting.format_size(step["weight_bytes"]),
        ]
        wanted += [
            formatting.format_size(step["peak_memory_bytes"]),
            f"{step['images_per_second']:.0f}",
            f"{step['speedup']:.2f}×",
        ]
        wanted += [
            formatting.format_bits(step["entropy"]),
            f"{step['agreement']:.{digits}f}",
            formatting.format_score(step["kl"]),
        ]
        if step["top1"] is not None:
            wanted += [f"{step['top1']:.{digits}f}", "–".join(f"{end:.{digits}f}" for end in step["top1_interval"])]
    text = score_text(record["selection"])
    wanted += [text(score) for one in record["selection"]["rounds"] for score in one["scores"].values()]
    assert [words for words in wanted if words not in page.text] == []
    assert [words for words in wanted if words not in plain(record)] == []
    assert_tables_are_whole(markdown(record))
    drawn = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(drawn) == 3
    assert all("Top-1" not in label for label in drawn) or trajectory["labelled"]


@pytest.mark.parametrize("case", CASES)
def test_terminal_shows_steps_and_recommendation_in_80_columns(case):
    record = selection_record(**CASES[case])
    text = printed(record, 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    flat = " ".join(text.split())
    assert [line for line in record["trajectory"]["recommended"]["reason"].splitlines() if line not in flat] == []
    recommended = record["trajectory"]["recommended"]["step"]
    for n, step in enumerate(record["trajectory"]["steps"]):
        row = next(line.split() for line in text[text.index("What every pick") :].splitlines()
                   if re.match(rf"\s*(→ )?{n} ", line))  # fmt: skip
        assert (row[0] == "→") == (n == recommended)
        ends = step["speedup_interval"]
        assert row[-1] == ("–".join(f"{end:.2f}" for end in ends) if ends else "1.00×")
        assert formatting.format_bits(step["entropy"]) in row
        assert formatting.format_number(step["parameters"] / 1e6) in row
        assert formatting.format_number(step["flops"] / 1e9) in row


def test_recommendation_and_commands_come_first():
    record = selection_record()
    heads = re.findall(r"^## (.+)$", markdown(record), flags=re.MULTILINE)
    assert heads == ["Key numbers", "Recommendation", "What every pick does", "Entropy by block", "Selection",
                     "Environment", "Warnings", "Files"]  # fmt: skip
    text = markdown(record)
    for command in record["next_commands"]:
        place = text.index(f"```sh\n{command['command']}\n```")
        assert text.index("## Recommendation") < place < text.index("## What every pick does")


def test_key_numbers_are_those_of_the_recommended_step():
    record = selection_record()
    compared = selection.key_numbers(record)
    number = record["trajectory"]["recommended"]["step"]
    full, step = record["trajectory"]["steps"][0], record["trajectory"]["steps"][number]
    rows = {row["name"]: row for row in compared["rows"]}
    assert rows["Top-1 without training"]["after"] == f"{step['top1']:.1f} %"
    assert rows["Top-1 without training"]["note"].startswith("95 % interval of the difference −")
    assert rows["Same answer as the full model"]["after"] == f"{step['agreement']:.1f} %"
    assert rows["Parameters"]["change"] == formatting.format_change(full["parameters"], step["parameters"])
    assert rows["Images per second, batch 64"]["after"] == f"{step['images_per_second']:.0f}"
    assert compared["after"] == f"Attention of {formatting.format_ranges(step['removed'])} removed"


def test_nothing_recommended_has_no_key_numbers():
    record = selection_record()
    record["trajectory"]["recommended"] = {"step": 0, "reason": "Too much is lost at once."}
    assert selection.key_numbers(record) is None
    assert "Recommended without training: retain every attention layer." in markdown(record)
    assert "Too much is lost at once." in printed(record, 80)


def test_own_summary_is_kept():
    record = selection_record() | {"summary": "What I found."}
    assert "What I found." in markdown(record)
    assert selection.headline(record) not in plain(record)


def test_a_speedup_that_may_be_chance_is_shown_as_such():
    record = selection_record(picks=2)
    _, step = selection._chosen(record)
    for ends, is_chance in (([1.05, 1.31], False), ([0.93, 1.6], True)):
        step["speedup_interval"] = ends
        shown = "–".join(f"{end:.2f}" for end in ends)
        assert (
            f"{step['speedup']:.2f} times ({shown}) the images per second" in selection.headline(record)
        ) != is_chance
        (rate,) = (row for row in selection.key_numbers(record)["rows"] if row["name"].startswith("Images per second"))
        assert rate["note"] == f"95 % interval of the speedup {shown}: it {'includes' if is_chance else 'excludes'} 1"
        assert shown in plain(record)
        assert shown in printed(record, 80)
    for step in record["trajectory"]["steps"]:
        del step["speedup_interval"]  # as older versions wrote it
    assert f"{step['speedup']:.2f}×" in printed(record, 80)
    assert "Speedup," not in printed(record, 80)  # which names an interval
    assert f"{step['speedup']:.2f}×" in plain(record)


@pytest.mark.parametrize("field", ["kl", "peak_memory_bytes", "images_per_second", "images_per_second_interval", "speedup",
                                   "speedup_interval", "top1", "top1_interval", "parameters", "flops", "weight_bytes",
                                   "entropy"])  # fmt: skip
def test_any_figure_may_be_missing(field):
    record = selection_record(picks=2)
    for step in record["trajectory"]["steps"]:
        step[field] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(report._render("report.html.j2", record))
    assert "Recommendation" in page.text
    assert_tables_are_whole(markdown(record))
    printed(record, 80)


def test_a_trajectory_alone_is_a_report(tmp_path):
    steps = [{"removed": []}, {"removed": [3]}]
    write_report({"trajectory": {"steps": steps}}, tmp_path)
    assert "What every pick does" in markdown({"trajectory": {"steps": steps}})
    single = {"trajectory": {"steps": steps_of([], 100), "recommended": {"step": 0, "reason": "Nothing picked."}}}
    write_report(single, tmp_path)
    assert trajectory_plot(single) is None
    assert "No attention layer was picked." in markdown(single)
    assert "## What every pick does" not in markdown({"trajectory": {"steps": []}})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"recommended": {"step": 6, "reason": ""}}, r"recommended\.step is 6, but there are steps 0 to 5"),
        ({"recommended": {"step": -1, "reason": ""}}, r"recommended\.step is -1"),
        ({"steps": [], "recommended": {"step": 0, "reason": ""}}, "there are no steps"),
        ({"recommended": {"step": 1}}, r"trajectory\.recommended has no 'reason'"),
        ({"steps": [{"picked": 1}]}, r"trajectory\.steps\[0\] has no 'removed'"),
    ],
)
def test_bad_trajectory_is_named_and_writes_nothing(tmp_path, change, match):
    record = selection_record()
    record["trajectory"] |= change
    with pytest.raises(ValueError, match=match):
        write_report(record, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_ranking_takes_all_picks_from_its_round():
    chosen = selection_record("cosine", picks=4)["selection"]
    (one,) = rankings(chosen)
    assert list(one.picked) == chosen["layers"]
    assert lowest_picked(chosen)
    spread = {**chosen, "rounds": chosen["rounds"] + [{"picked": b, "scores": {}} for b in chosen["layers"][1:]]}
    assert rankings(spread) == [one]
    assert "| Pick | Block | 1 − cosine |" in plain(selection_record("cosine", picks=4))


def test_greedy_rounds_know_what_was_picked_before():
    chosen = selection_record(picks=3)["selection"]
    assert [set(one.gone) for one in rankings(chosen)] == [set(chosen["layers"][:n]) for n in range(3)]
    for one in chosen["rounds"]:
        del one["skipped"]
    assert [set(one.gone) for one in rankings(chosen)] == [set(chosen["layers"][:n]) for n in range(3)]


def test_beam_does_not_claim_the_lowest():
    beam, greedy = selection_record("kl", picks=3, beam=4), selection_record("kl", picks=3)
    assert not lowest_picked(beam["selection"])
    assert lowest_picked(greedy["selection"])
    assert "the 4 best sets of layers" in markdown(beam)
    assert "Each round removes the lowest" in markdown(greedy)
    assert "Each round removes the lowest" not in markdown(beam)
    labels = [text.get_text() for text in drawn_texts(beam)]
    assert "picked" in labels
    assert "picked: the lowest of its round" in [text.get_text() for text in drawn_texts(greedy)]


def test_a_gap_between_picks_is_shown():
    record = selection_record("kl", picks=3)
    assert "Spacing" not in markdown(record)  # nor where an older record has no such entry
    record["selection"]["min_gap"] = 1
    assert "Spacing" not in markdown(record)
    record["selection"]["min_gap"] = 3
    assert "two picked blocks are at least 3 apart" in markdown(record)


def drawn_texts(record: dict) -> list:
    """All texts of the figure of the scores."""
    from matplotlib.text import Text

    plot = score_plot(record)
    with new_figure(plot.height) as figure:
        plot.draw(figure, record)
        return figure.findobj(Text)


def test_excluded_blocks_are_shown_as_such():
    record = selection_record(exclude=(0, 3))
    assert blocks_of(record) == list(range(12))
    assert "not a candidate" in [text.get_text() for text in drawn_texts(record)]
    assert "not a candidate" not in [text.get_text() for text in drawn_texts(selection_record())]
    once = selection_record("one-shot", exclude=(0,))
    assert "not a candidate" in [text.get_text() for text in drawn_texts(once)]


@pytest.mark.parametrize("strategy", CRITERIA)
def test_every_strategy_is_explained_in_its_own_terms(strategy):
    text = plain(selection_record(strategy))
    criterion = CRITERIA[strategy]
    assert f"| Strategy | {strategy}: " in text
    assert f"| Criterion | {criterion}" in text
    assert strategies.CRITERIA[criterion].about in text
    if criterion not in ("TE", "|TE|"):
        assert "output's entropy" not in text


@pytest.mark.parametrize("blocks", [12, 32])
@pytest.mark.parametrize("strategy", ["nose", "one-shot"])
def test_no_text_of_the_figures_is_cut_off_or_tiny(blocks, strategy):
    record = selection_record(strategy, depth=blocks, picks=blocks // 2)
    for plot in figures.plots(record):
        with new_figure(plot.height) as figure:
            plot.draw(figure, record)
            figure.canvas.draw()
            page = figure.bbox
            for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize") and hasattr(artist, "get_text")):
                if not text.get_text() or not text.get_visible():
                    continue
                box = text.get_window_extent()
                assert text.get_fontsize() >= 7
                assert box.x0 >= page.x0 - 1, (plot.name, text.get_text())
                assert box.x1 <= page.x1 + 1, (plot.name, text.get_text())
                assert box.y0 >= page.y0 - 1, (plot.name, text.get_text())


def test_signs_matter_where_scores_fall_below_zero():
    assert diverging(selection_record("nose-signed")["selection"])
    assert diverging(selection_record("accuracy")["selection"])
    assert not diverging(selection_record("kl")["selection"])
    assert "below zero, there are more right answers" in markdown(selection_record("accuracy"))


def test_older_records_say_bits_and_keep_their_words():
    record = made_up()
    text = plain(record)
    assert "strategy nose · gaussian estimator" in text
    wanted = "the distance of the output's entropy from the full model's without this attention as well"
    assert f"|TE| in bits: {wanted}" in text
    assert "How layers were picked" not in text
    assert "## Next commands" in text


def test_hostile_text_stays_text():
    record = selection_record()
    nasty = 'a<script>alert("1")</script> | b'
    record["selection"]["stop"] = record["selection"]["strategy"] = record["selection"]["criterion"] = nasty
    record["trajectory"]["recommended"]["reason"] = nasty
    record["trajectory"]["split"] = nasty
    page = Page(report._render("report.html.j2", record))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count('<script>alert("1")</script> | b') >= 5
    assert_tables_are_whole(markdown(record))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0.05, "0.050"), (0.0031, "0.0031"), (-0.002, "−0.0020"), (0.099, "0.099"), (0.0999, "0.10"),
     (0.00996, "0.010"), (12.34, "12.3")],
)  # fmt: skip
def test_fine_scores(value, text):
    assert formatting.format_score(value) == text
