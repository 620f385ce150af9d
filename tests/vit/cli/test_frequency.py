"""`lambda-vit frequency`: its table, record and figure, on made-up numbers and on a small model's images."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import IMAGES, WEIGHTS
from rich.console import Console
from small_models import small_vit
from typer.testing import CliRunner, Result

from lambda_kernels import UnsupportedModelError, convert_vit, save_pretrained
from lambda_vit import Selection
from lambda_vit.cli import main as cli
from lambda_vit.measure.radial import radial_bins
from lambda_vit.report.figures import frequency
from lambda_vit.report.figures.style import new_figure, shortened
from lambda_vit.report.records.readings import direction, verdict
from lambda_vit.report.tables import frequency_notes, frequency_table


def made_up(depth: int = 12, side: int = 14, removed: tuple[int, ...] = (1, 4), scale: float = 1.0) -> dict:
    """A comparison whose numbers are invented: the high frequencies of odd blocks grow, those of block 2 fall."""
    bins = radial_bins(side, side)
    fractions = np.array(bins.frequencies)

    def part(shift: list[float], gone: tuple[int, ...]) -> dict:
        blocks = []
        for block in range(depth):
            relative = -(2 + 0.05 * block) * np.sqrt(fractions) + shift[block] * fractions
            logs = relative - 1 + shift[block]
            blocks.append(
                {
                    "block": block,
                    "attention": block not in gone,
                    "log_amplitude": logs.tolist(),
                    "amplitude": np.exp(logs).tolist(),
                    "power": np.exp(2 * logs).tolist(),
                    "relative": relative.tolist(),
                    "relative_error": [0.02] * len(fractions),
                    "mean": float(relative[1 : bins.highest + 1].mean()),
                    "mean_error": 0.015,
                    "floored": 3 if block in gone else 0,
                }
            )
        return {"samples": 64, "grid": [side, side], "prefix_tokens": 1, "channels": 192, "dtype": "float32",
                "removed": list(gone), "residual_scale": scale if gone else None, "frequencies": list(bins.frequencies),
                "coefficients": list(bins.coefficients), "highest": bins.highest, "blocks": blocks}  # fmt: skip

    shift = [0.0 if b == 0 else 0.3 if b % 2 else -0.2 if b == 2 else 0.01 for b in range(depth)]
    before, after = part([0.0] * depth, ()), part(shift, removed)
    changes = [
        {
            "block": one["block"],
            "relative": np.subtract(two["relative"], one["relative"]).tolist(),
            "relative_error": [0.0 if one["block"] == 0 else 0.01] * len(fractions),
            "mean": two["mean"] - one["mean"],
            "mean_error": 0.01,
        }
        for one, two in zip(before["blocks"], after["blocks"], strict=True)
    ]
    return {"model": "deit_tiny", "compared": None, "before": before, "after": after, "changes": changes}


def printed(record: dict) -> list[list[str]]:
    """Words of each line of the table, on a terminal of 80 characters."""
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(frequency_table(record))
    assert "…" not in capture.get()
    return [line.split() for line in capture.get().splitlines() if line.strip() and "─" not in line]


def test_table_shows_both_and_what_changed():
    lines = printed(made_up())
    assert lines[0] == ["at", "π", "mean", "factor"]
    assert lines[1] == ["block", "before", "after", "change", "before", "after", "change", "at", "0", "at", "π"]
    assert lines[2] == ["0", "−2.00", "−2.00", "0", "−1.46", "−1.46", "0", "1.000", "1.000"]
    assert lines[3][:5] == ["removed", "1", "−2.05", "−1.75", "+0.300↑"]
    assert lines[3][-2:] == [f"{math.exp(0.3):.3f}", f"{math.exp(0.6):.3f}"]
    assert lines[4][:4] == ["2", "−2.10", "−2.30", "−0.200↓"]
    assert lines[5][0] == "3"
    assert lines[6][:5] == ["removed", "4", "−2.20", "−2.19", "+0.010"]
    assert len(printed(made_up(24, 37, tuple(range(10, 20))))) == 26
    alone = printed({"model": "m", "before": made_up()["before"]})
    assert alone[0] == ["block", "Δ", "at", "π", "mean", "Δ", "amplitude", "at", "0", "at", "π"]
    assert alone[2] == ["1", "−2.050", "−1.492", f"{math.exp(-1):.3f}", f"{math.exp(-3.05):.3g}"]


def test_notes_say_what_happened():
    record = made_up()
    text = " ".join(frequency_notes(record))
    for words in ("7 bins above 0 up to π", "14 × 14 tokens of 192 channels per image, prefix tokens (1) left out",
                  "2 standard errors over the 64 images", "standard error is 1.0e−02",
                  "after: 6 amplitudes, of 2,408,448 in each block, below 2^-24 counted as that", "(blocks 1, 4)"):  # fmt: skip
        assert words in text
    assert verdict(record) == (
        "At π, against frequency 0, amplitudes grow in blocks: 1, 3, 5, 7, 9, 11; fall in: 2; no clear change in: "
        "0, 4, 6, 8, 10."
    )
    assert "factor cancels" not in text
    assert any("multiplies its input by 2:" in note for note in frequency_notes(made_up(scale=2.0)))
    assert "0.97 π" in verdict(made_up(side=37))
    alone = " ".join(frequency_notes({"model": "m", "before": record["before"]}))
    assert "standard errors" not in alone
    assert "below" not in alone


def test_a_change_is_called_one_beyond_two_standard_errors():
    assert [direction(change, 0.1) for change in (-0.21, -0.19, 0.0, 0.19, 0.21)] == ["↓", "", "", "", "↑"]
    assert direction(0.0, 0.0) == ""


def test_long_names_keep_both_ends():
    assert shortened("a" * 40, 40) == "a" * 40
    text = shortened("".join(map(chr, range(65, 65 + 50))), 40)
    assert (len(text), text[:2], text[-2:]) == (40, "AB", "qr")


def test_spectra_are_drawn_on_one_scale():
    record = made_up()
    with new_figure(3.0) as figure:
        frequency.draw_spectra(figure, record)
        before, after, bar = figure.axes
    assert before.get_ylim() == after.get_ylim()
    for axes, part in ((before, record["before"]), (after, record["after"])):
        assert len(axes.lines) == 12
        for line, row in zip(axes.lines, part["blocks"], strict=True):
            assert list(line.get_xdata()) == part["frequencies"][:8]
            assert list(line.get_ydata()) == row["relative"][:8]
            assert (line.get_linestyle() == "--") == (not row["attention"])
        assert "rad per token" in axes.get_xlabel()
    assert len({line.get_color() for line in before.lines}) == 12
    assert [line.get_color() for line in before.lines] == [line.get_color() for line in after.lines]
    assert bar.get_ylabel() == "block"
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in (line.get_color() for line in before.lines)]
    assert lightness == sorted(lightness, reverse=True)  # the order is seen without colour


def test_changes_are_drawn_by_frequency_and_by_block():
    record = made_up()
    with new_figure(3.0) as figure:
        frequency.draw_changes(figure, record)
        left, right = figure.axes
    for line, row in zip(left.lines, record["changes"], strict=False):
        assert list(line.get_ydata()) == row["relative"][:8]
    at_highest, means = (container.lines[0].get_ydata() for container in right.containers)
    assert list(at_highest) == [row["relative"][7] for row in record["changes"]]
    assert list(means) == [row["mean"] for row in record["changes"]]
    bars = right.containers[1].lines[2][0].get_segments()
    assert np.ptp(bars[3][:, 1]) == pytest.approx(4 * 0.01)  # two standard errors, either way
    assert len(right.patches) == 2
    assert {text.get_text() for text in right.get_legend().get_texts()} == {
        "at π",
        "mean over (0, π]",
        "attention removed",
    }


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("compared", ".png"), ("deep", ".png"), ("alone", ".png"), ("one block", ".svg"), ("compared", ".pdf")],
)
def test_plots_of_all_kinds_are_written(kind, suffix, tmp_path):
    record = {
        "compared": made_up(),
        "deep": {**made_up(24, 37, tuple(range(0, 24, 3))), "model": "a/[b] $x$/" * 20, "compared": "a/[b] $x$/" * 20},
        "alone": {"model": "m", "before": made_up()["before"]},
        "one block": made_up(1, 2, (0,)),
    }[kind]
    path = tmp_path / "new" / f"plot{suffix}"
    frequency.save_plot(path, record)
    content = path.read_bytes()
    assert content.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    if suffix == ".png":
        assert_drawn(content)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def assert_drawn(content: bytes) -> None:
    """A page of 7.6 inches at 200 dpi with ink in each quarter, and none that runs over its right edge."""
    picture = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    assert picture.shape[1] == 1520
    for part in np.array_split(picture, 4):
        assert (part < 128).mean() > 0.001
    assert (picture[:, -6:] > 250).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four classes of noise as val/<class>/*."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(4):
        place = root / "val" / f"class{label}"
        place.mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 60, (72, 72, 3)) + 45 * label
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_pretrained(small_vit(img_size=64), tmp_path_factory.mktemp("model") / "full")


@pytest.fixture(scope="module")
def command(folder, saved):
    """Runs `lambda-vit frequency` on a small model and those images."""

    def call(*options: object) -> Result:
        arguments = ("frequency", "--model", saved, "--data", folder, "--device", "cpu", *options)
        return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "80"})

    return call


def test_command_prints_and_writes_everything(command, saved, tmp_path):
    out, plot = tmp_path / "deep" / "f.json", tmp_path / "f.png"
    done = command("--remove", "1,2", "--samples", 12, "--batch-size", 5, "--out", out, "--plot", plot)
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text(encoding="utf-8"))
    assert (record["model"], record["compared"], record["unit"]) == (str(saved), None, "natural logarithm")
    assert "torch" in record["environment"]
    for part, removed in ((record["before"], []), (record["after"], [1, 2])):
        assert (part["samples"], part["grid"], part["removed"]) == (12, [4, 4], removed)
        assert len(part["blocks"]) == 4
    assert f"{saved} → without the attention of blocks 1, 2" in done.output
    for row, other, change in zip(*(record[k]["blocks"] for k in ("before", "after")), record["changes"], strict=True):
        for text in (
            f"{row['relative'][2]:.2f}",
            f"{other['mean']:.2f}",
            f"{change['mean']:+.3f}" if row["block"] else " 0 ",
        ):
            assert text.replace("-", "−") in done.output
    assert verdict(record) in done.output
    assert f"Written: {out}" in done.output
    assert_drawn(plot.read_bytes())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "f.json", "f.png"]


def test_command_compares_with_a_selection_and_with_a_saved_model(command, saved, tmp_path):
    """Skipping layers and the model that convert saves without them are the same network."""
    Selection((2, 1), depth=4).to_json(tmp_path / "selection.json")
    small = save_pretrained(convert_vit(small_vit(img_size=64), (1, 2), fuse="removed"), tmp_path / "small")
    records = []
    for options in (["--remove", "1,2"], ["--selection", tmp_path], ["--compare", small]):
        done = command(*options, "--out", tmp_path / "f.json")
        assert done.exit_code == 0, done.output
        records.append(json.loads((tmp_path / "f.json").read_text()))
    assert records[2]["compared"] == str(small)
    for record in records[1:]:
        assert record["after"]["removed"] == [1, 2]
        for one, two in zip(record["changes"], records[0]["changes"], strict=True):
            assert one["relative"] == pytest.approx(two["relative"], abs=1e-5)
    assert f"{saved} → {small}" in done.output


def test_command_on_one_model(command, tmp_path):
    done = command("--out", tmp_path / "f.json", "--plot", tmp_path / "f.svg")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "f.json").read_text())
    assert record["before"]["samples"] == 16
    assert "after" not in record
    assert "change" not in done.output


def bad_options(tmp_path: Path) -> dict[str, tuple[list, type, list[str]]]:
    return {
        "two ways": (["--remove", "1", "--compare", tmp_path], ValueError, ["one of --remove", "--compare FOLDER"]),
        "no folder": (["--compare", tmp_path / "absent"], ValueError, ["--compare", "absent", "is not a folder"]),
        "no model": (["--compare", tmp_path], ValueError, ["config.json"]),
        "no number": (["--remove", "1,x"], ValueError, ["--remove", "'1,x'"]),
        "out of range": (["--remove", "1,4"], ValueError, ["4", "0 to 3"]),
        "another depth": (["--selection", tmp_path / "deep.json"], ValueError, ["12 blocks", "has 4"]),
        "other images": (["--compare", tmp_path / "other"], ValueError, ["mean", "Measure each alone"]),
        "too few": (["--samples", 1], ValueError, ["one image", "two or more"]),
        "a picture for JSON": (["--out", "x.svg"], ValueError, ["--out writes JSON", "--plot"]),
        "no picture": (["--plot", "x.jpg"], ValueError, [".png, .svg, .pdf", "x.jpg"]),
        "unwritable": (["--plot", "/proc/nowhere/x.png"], OSError, ["cannot write to /proc"]),
        "no split": (["--split", "test"], ValueError, ["split='test'"]),
    }


@pytest.mark.parametrize("case", bad_options(Path("p")))
def test_bad_options_are_named(command, case, tmp_path):
    Selection((0,), depth=12).to_json(tmp_path / "deep.json")
    other = small_vit(img_size=64)
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": [0.1, 0.2, 0.3]}
    save_pretrained(other, tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    options, kind, words = bad_options(tmp_path)[case]
    done = command(*options)
    assert isinstance(done.exception, kind)
    assert [word for word in words if word not in str(done.exception)] == []
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_outputs_are_refused_before_the_work(command, monkeypatch):

    monkeypatch.setattr("lambda_vit.cli.models.open_model", lambda *a, **k: pytest.fail("work began"))
    for options in (["--plot", "x.jpg"], ["--out", "/proc/nowhere/x.json"], ["--remove", "x"], ["--compare", "absent"]):
        assert isinstance(command(*options).exception, (ValueError, OSError))


def test_models_without_a_token_map_are_named(command, monkeypatch):

    model = small_vit(img_size=64)
    model.num_prefix_tokens = None
    monkeypatch.setattr("lambda_vit.cli.models.open_model", lambda *a, **k: model)
    assert isinstance(command().exception, UnsupportedModelError)


def test_real_weights_and_images(real_data, tmp_path):
    """16 real images: spectra fall with frequency in every block, and skipping attention changes what follows it alone."""
    out = tmp_path / "f.json"
    model = ["--model", "deit_tiny_patch16_224", "--weights", real_data / WEIGHTS, "--data", real_data / IMAGES]
    arguments = ["frequency", *model, "--remove", "1,4,5,11", "--samples", 16, "--out", out, "--device", "cpu"]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["before"]["grid"] == [14, 14]
    for row in record["before"]["blocks"]:
        spectrum = row["relative"][:8]
        assert spectrum == sorted(spectrum, reverse=True)
        assert -2.6 < spectrum[7] < -1.4
    assert set(record["changes"][0]["relative"]) == {0.0}
    # without attention, block 1 has less of the high frequencies, not more
    assert record["changes"][1]["relative"][7] < -0.15
    assert abs(record["changes"][8]["relative"][7]) < 0.1
