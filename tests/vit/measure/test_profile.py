"""The layer profile: against plain hooks and numpy, in one pass, as table, JSON, figure and part of a report."""

from __future__ import annotations

import io
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import IMAGES, WEIGHTS
from report_support import made_up, printed
from rich.console import Console
from small_models import images, small_vit
from typer.testing import CliRunner, Result

from lambda_kernels import NonFiniteActivationError, convert_vit, save_pretrained
from lambda_kernels.ops.histogram import function as histogram_ops
from lambda_vit import profile_layers
from lambda_vit.cli import main as cli
from lambda_vit.measure import layer_profile
from lambda_vit.report.figures import layers
from lambda_vit.report.figures.files import PLOT_SUFFIXES
from lambda_vit.report.figures.style import new_figure
from lambda_vit.report.page import write_report
from lambda_vit.report.records import readings
from lambda_vit.report.tables import profile_notes, profile_table

pytestmark = pytest.mark.models

BINS = 32  # few enough for the few tokens of a test


def loader(count: int = 40, batch: int = 16) -> list:
    return [(x, torch.zeros(len(x))) for x in images(count).split(batch)]


def outputs(model: torch.nn.Module, batches: list) -> dict[tuple[int, str], np.ndarray]:
    """What every attention and MLP gave, float64 [tokens, C], by plain hooks."""
    seen: dict[tuple[int, str], list] = {}
    handles = [
        getattr(block, name).register_forward_hook(
            lambda module, args, output, key=(index, name): seen.setdefault(key, []).append(output.flatten(0, 1))
        )
        for index, block in enumerate(model.blocks)
        for name in ("attn", "mlp")
        if hasattr(block, name)
    ]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(found).double().numpy() for key, found in seen.items()}


def histogram_entropy(values: np.ndarray, bins: int) -> float:
    """Differential entropy of the finest bins of width 2^k that hold `values`, with Miller and Madow's correction."""
    exponent = -60
    while np.floor(values.max() / 2.0**exponent) - np.floor(values.min() / 2.0**exponent) >= bins:
        exponent += 1
    _, counts = np.unique(np.floor(values / 2.0**exponent), return_counts=True)
    p = counts / counts.sum()
    return -(p * np.log2(p)).sum() + exponent + (len(counts) - 1) / (2 * len(values) * math.log(2))


def spread_of(values: np.ndarray) -> list[float]:
    return [values.mean(), *np.quantile(values, (0.25, 0.5, 0.75))]


MODELS = {
    "plain": lambda: small_vit(),
    "distilled": lambda: small_vit("deit_tiny_distilled_patch16_224"),
    "layer scale": lambda: small_vit("deit3_small_patch16_224"),
    "registers": lambda: small_vit("vit_small_patch14_reg4_dinov2", patch_size=16),
    "attention pooling": lambda: small_vit("vit_base_patch16_siglip_224"),
    "two removed": lambda: convert_vit(small_vit(), remove=(0, 2)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_is_what_hooks_and_numpy_give(kind):
    model, data = MODELS[kind](), loader()
    expected = outputs(model, data)
    profile = profile_layers(model, data, bins=BINS)
    assert (profile.samples, profile.bins, profile.dtype) == (40, BINS, "float32")
    assert [row.block for row in profile.blocks] == [0, 1, 2, 3]
    measured = {(row.block, name): getattr(row, name) for row in profile.blocks for name in ("attn", "mlp")}
    assert {key for key, layer in measured.items() if layer is not None} == set(expected)
    for key, values in expected.items():
        layer = measured[key]
        assert (layer.tokens, layer.channels, layer.constant_channels) == (*values.shape, 0)
        gaussian = np.log2(values.std(0, ddof=1))
        counted = np.array([histogram_entropy(channel, BINS) for channel in values.T])
        for found, want in ((layer.gaussian, gaussian), (layer.histogram, counted)):
            assert [found.mean, found.low, found.median, found.high] == pytest.approx(spread_of(want), abs=1e-9)


def test_one_estimator_is_the_same_as_in_both():
    model, data = small_vit(), loader()
    both = profile_layers(model, data, bins=BINS)
    gaussian, histogram = (profile_layers(model, data, estimator=e, bins=BINS) for e in ("gaussian", "histogram"))
    assert (gaussian.estimators, gaussian.bins) == (("gaussian",), None)
    assert (histogram.estimators, histogram.bins) == (("histogram",), BINS)
    for row, g, h in zip(both.blocks, gaussian.blocks, histogram.blocks, strict=True):
        for name in ("attn", "mlp"):
            layer = getattr(row, name)
            assert getattr(g, name).gaussian == layer.gaussian
            assert getattr(h, name).histogram == layer.histogram
            assert getattr(g, name).histogram is None
            assert getattr(h, name).gaussian is None
    record = histogram.to_dict()
    assert set(record["blocks"][0]["attn"]) == {"channels", "constant_channels", "tokens", "histogram"}
    with pytest.raises(ValueError, match=r"estimator.*median"):
        profile_layers(model, data, estimator="median")
    with pytest.raises(ValueError, match=r"bins.*1"):
        profile_layers(model, data, bins=1)
    assert not any(m._forward_hooks for m in model.modules())


def test_both_estimators_take_one_pass_and_keep_no_batch():
    """The loader is iterated once, the model runs once per batch, and a batch's outputs are gone when the next is drawn."""
    model = small_vit()
    alive, forwards, drawn = [], [], []
    for block in model.blocks:
        for name in ("attn", "mlp"):
            getattr(block, name).register_forward_hook(lambda m, a, output: alive.append(weakref.ref(output)))
    model.register_forward_hook(lambda m, a, output: forwards.append(len(output)))

    def batches():
        for x, _ in loader():
            assert all(reference() is None for reference in alive)
            drawn.append(len(x))
            yield x

    # room for all layers of several batches
    profile = profile_layers(model, batches(), bins=BINS, together_bytes=1 << 30)
    assert drawn == forwards == [16, 16, 8]
    assert len(alive) == 3 * 8
    assert profile.samples == 40


def test_layers_together_within_the_bytes(monkeypatch):
    calls = []
    update = layer_profile.update_together

    def counting(meters, tensors):
        calls.append([x.numel() * x.element_size() for x in tensors])
        update(meters, tensors)

    monkeypatch.setattr(layer_profile, "update_together", counting)
    model, data = small_vit(), loader(32, 32)
    size = 32 * 5 * 48 * 4
    at_once = profile_layers(model, data, bins=BINS)
    assert calls == [[size]] * 8
    calls.clear()
    assert profile_layers(model, data, bins=BINS, together_bytes=3 * size + 1) == at_once
    assert calls == [[size] * 3, [size] * 3, [size] * 2]
    calls.clear()
    assert profile_layers(model, data, bins=BINS, together_bytes=size // 2) == at_once
    assert calls == [[size]] * 8


def test_what_is_written_over_is_never_kept_waiting():
    model = small_vit("deit3_small_patch16_224")
    assert not layer_profile._changes_in_place(model)
    model.blocks[2].ls1.inplace = True
    assert layer_profile._changes_in_place(model)


def test_what_counted_is_told(monkeypatch):
    from lambda_kernels.ops.histogram import _extension

    model, data = small_vit(), loader()
    counted = []
    twin = histogram_ops.reference.histogram
    monkeypatch.setattr(histogram_ops.reference, "histogram", lambda *a: counted.append(1) or twin(*a))
    first = profile_layers(model, data, bins=BINS)
    if _extension.available():
        assert first.counted_by == f"extension {_extension.cpu_capability()}"
        assert not counted
    monkeypatch.setattr(_extension, "why_unavailable", lambda: "it was not built")
    monkeypatch.setattr(histogram_ops, "_noticed", True)
    plain = profile_layers(model, data, bins=BINS)
    assert plain.counted_by == "torch"
    assert len(counted) >= 3 * 8
    for row, other in zip(first.blocks, plain.blocks, strict=True):
        assert row.attn.gaussian.mean == pytest.approx(other.attn.gaussian.mean, abs=1e-9)
        assert row.attn.histogram == other.attn.histogram


def test_other_dtypes():
    profile = profile_layers(small_vit().bfloat16(), loader(), bins=BINS)
    assert profile.dtype == "bfloat16"
    exact = profile_layers(small_vit(), loader(), bins=BINS)
    assert profile.blocks[1].mlp.gaussian.mean == pytest.approx(exact.blocks[1].mlp.gaussian.mean, abs=0.05)


def test_constant_channels_are_floored_counted_and_refused_when_there_are_no_others():
    model = small_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:5] = 0
        model.blocks[1].mlp.fc2.bias[:2] = 0  # what never leaves zero would have the finest bins of all
    profile = profile_layers(model, loader(), bins=BINS)
    layer = profile.blocks[1].mlp
    assert layer.constant_channels == 5
    values = outputs(model, loader())[1, "mlp"][:, 5:]
    gaussian = (-24.0 * 5 + np.log2(values.std(0, ddof=1)).sum()) / 48
    counted = (-24.0 * 5 + sum(histogram_entropy(channel, BINS) for channel in values.T)) / 48
    assert (layer.gaussian.mean, layer.histogram.mean) == pytest.approx((gaussian, counted), abs=1e-6)
    (note,) = (line for line in profile_notes(profile.to_dict()) if "blocks[1].mlp" in line)
    assert "5 of 48 channels never change" in note
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.zero_()
    for estimator in layer_profile.ESTIMATORS:
        with pytest.raises(ValueError, match=r"blocks\[1\]\.mlp: all 48 channels are constant"):
            profile_layers(model, loader(), estimator=estimator, bins=BINS)


def test_too_little_to_measure():
    model = small_vit()
    with pytest.raises(ValueError, match="no images"):
        profile_layers(model, [])
    with pytest.raises(ValueError, match=r"one image.*two or more"):
        profile_layers(model, [images(1)])
    with pytest.warns(UserWarning, match=r"10 tokens per channel are few for 256 bins.*at most 2 bins"):
        profile_layers(model, [images(2)])


@pytest.mark.parametrize("together", [0, 1 << 30])
def test_what_is_not_finite_is_named(together):
    model = small_vit()
    data = loader()
    model.blocks[2].attn.proj.register_forward_hook(lambda m, a, output: output * (math.nan if len(a[0]) == 8 else 1.0))
    with pytest.raises(NonFiniteActivationError, match=r"blocks\[2\]\.attn.*batch 2 \(float32\)"):
        profile_layers(model, data, together_bytes=together)
    assert not any(m._forward_hooks for block in model.blocks for m in (block.attn, block.mlp))


@pytest.fixture(scope="module")
def record() -> dict:
    """A profile whose numbers are invented: the estimators rank the attention layers differently, one is gone."""

    def spread(mean: float) -> dict:
        return {"mean": mean, "low": mean - 0.3, "median": mean + 0.05, "high": mean + 0.2}

    def layer(mean: float, wave: float) -> dict:
        sizes = {"channels": 192, "constant_channels": 0, "tokens": 12_608}
        return {**sizes, "gaussian": spread(mean), "histogram": spread(mean + 1.9 - 0.5 * wave)}

    wave = [math.sin(1.7 * b) for b in range(12)]
    blocks = [
        {"block": b, "attn": layer(-2.4 + 0.05 * b, wave[b]), "mlp": layer(-1.1 - 0.3 * wave[b], 0)} for b in range(12)
    ]
    blocks[4]["attn"] = None
    return {"model": "deit_tiny", "unit": "bits", "estimators": ["gaussian", "histogram"], "samples": 64, "bins": 256,
            "dtype": "float32", "counted_by": "extension AVX512", "blocks": blocks}  # fmt: skip


def one_number_per_layer(blocks: int = 6) -> dict:
    return made_up(blocks)["profile"]


def test_table_numbers_the_lowest_attention(record):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(profile_table(record))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]
    rows = {line[0]: line[1:] for line in lines}
    assert rows["0"][:2] == ["1st −2.400", "−0.500"]
    assert rows["1"][0] == "2nd −2.350"
    assert rows["4"] == ["removed", "removed", "−1.248", "0.652"]
    assert [cell.split()[0] for row in rows.values() for cell in row[:1] if "d " in cell or "st " in cell] == [
        "1st",
        "2nd",
    ]
    assert sorted(readings.lowest(record, "histogram")) != sorted(readings.lowest(record, "gaussian"))
    assert rows[str(readings.lowest(record, "histogram")[0])][1].startswith("1st ")


def test_by_block_shows_means_and_quartiles_on_one_scale(record):
    with new_figure(3.1) as figure:
        layers.draw_by_block(figure, record, {5: 1, 1: 2})
        gaussian, histogram = figure.axes
    for axes, name in ((gaussian, "gaussian"), (histogram, "histogram")):
        for line, layer in zip(axes.lines, ("attn", "mlp"), strict=True):
            want = [math.nan if row[layer] is None else row[layer][name]["mean"] for row in record["blocks"]]
            assert list(line.get_ydata()) == pytest.approx(want, nan_ok=True)
        assert len(axes.collections) == 2
        edges = axes.collections[1].get_paths()[0].vertices[:, 1]
        rows = [row["mlp"][name] for row in record["blocks"]]
        assert (edges.min(), edges.max()) == pytest.approx((min(r["low"] for r in rows), max(r["high"] for r in rows)))
        assert {"1", "2", "pick"} <= {text.get_text() for text in axes.texts}
    offsets = np.subtract(histogram.get_ylim(), gaussian.get_ylim())
    assert offsets == pytest.approx([0.5 * math.log2(2 * math.pi * math.e)] * 2)


def test_ranking_goes_from_the_lowest_attention_to_the_highest(record):
    with new_figure(3.1) as figure:
        layers.draw_ranking(figure, record)
        panels = figure.axes
    for axes, name in zip(panels, ("gaussian", "histogram"), strict=True):
        order = [int(label.get_text()) for label in axes.get_xticklabels()]
        assert sorted(order) == [b for b in range(12) if b != 4]
        heights = axes.lines[0].get_ydata()
        assert list(heights) == sorted(heights)
        assert list(axes.lines[1].get_ydata()) == [record["blocks"][b]["mlp"][name]["mean"] for b in order]
        assert [label.get_fontweight() for label in axes.get_xticklabels()][:3] == ["bold", "bold", "normal"]
        assert "removed in 4" in axes.get_xlabel()


@pytest.mark.parametrize("blocks", [1, 6, 40])
@pytest.mark.parametrize("suffix", PLOT_SUFFIXES)
def test_plots_of_all_kinds_are_written(record, suffix, blocks, tmp_path):
    rows = [{**record["blocks"][b % 4], "block": b} for b in range(blocks)]
    bare = [{**row, "attn": None} for row in rows]
    for number, one in enumerate(
        ({**record, "blocks": rows}, {**record, "blocks": bare}, one_number_per_layer(max(blocks, 3)))
    ):
        path = tmp_path / "new" / f"{number}{suffix}"
        layers.save_plot(path, one)
        content = path.read_bytes()
        assert content.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
        if suffix == ".png":
            assert_drawn(content)
    assert len(list((tmp_path / "new").iterdir())) == 3


def assert_drawn(content: bytes) -> None:
    """A picture of 7.6 inches with ink in all thirds of its height and both halves of its width."""
    picture = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    assert picture.shape[1] == 1520
    for third in np.array_split(picture, 3):
        for half in np.array_split(third, 2, axis=1):
            assert (half < 128).mean() > 0.001
    assert (picture > 250).mean() > 0.5


def test_reports_show_profiles_with_quartiles_and_without(record, tmp_path):
    report = {**made_up(12), "profile": record}
    paths = write_report(report, tmp_path / "new")
    page, markdown = (paths[kind].read_text(encoding="utf-8") for kind in ("html", "md"))
    values = [row[layer][name]["mean"] for row in record["blocks"] for layer in ("attn", "mlp") if row[layer]
              for name in ("gaussian", "histogram")]  # fmt: skip
    for text in (page, markdown, terminal := printed(report, 80)):
        assert [v for v in values if f"{v:.2f}".replace("-", "−") not in text] == []
    assert "Attention, histogram" in markdown
    assert "by the gaussian estimator is −2.40, in block 0." in markdown
    assert all(len(line) <= 80 for line in terminal.splitlines())
    assert "…" not in terminal
    plain = made_up(12)
    markdown = write_report(plain, tmp_path / "old")["md"].read_text(encoding="utf-8")
    assert "| Block | Attention | MLP | Pick |" in markdown
    assert "The lowest attention entropy is" in markdown


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four classes of noise, distinguishable by brightness, as train/<class>/*."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(4):
        place = root / "train" / f"class{label}"
        place.mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 60, (36, 36, 3)) + 45 * label
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def command(folder, tmp_path_factory):
    """Runs `lambda-vit profile` on a small model and those images."""
    saved = save_pretrained(small_vit(), tmp_path_factory.mktemp("model") / "full")

    def call(*options: object) -> Result:
        return CliRunner().invoke(cli.app, list(map(str, ("profile", "--model", saved, "--data", folder, *options))))

    return call


def test_command_prints_and_writes_everything(command, tmp_path):
    out, plot = tmp_path / "deep" / "p.json", tmp_path / "p.png"
    with pytest.warns(UserWarning, match="120 tokens per channel are few for 32 bins"):
        done = command("--bins", BINS, "--out", out, "--plot", plot)
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {key: record[key] for key in ("unit", "estimators", "samples", "bins", "dtype")} == {
        "unit": "bits", "estimators": ["gaussian", "histogram"], "samples": 24, "bins": BINS, "dtype": "float32",
    }  # fmt: skip
    assert record["model"].endswith("full")
    assert record["counted_by"] in done.output
    assert "24 images" in done.output
    assert "120 tokens of 48 channels" in done.output
    assert [row["block"] for row in record["blocks"]] == [0, 1, 2, 3]
    for row in record["blocks"]:
        for layer in (row["attn"], row["mlp"]):
            assert (layer["channels"], layer["constant_channels"], layer["tokens"]) == (48, 0, 120)
            for name in ("gaussian", "histogram"):
                assert f"{layer[name]['mean']:.3f}".replace("-", "−") in done.output
                assert layer[name]["low"] <= layer[name]["median"] <= layer[name]["high"]
    assert done.output.count("1st −") == 2
    assert_drawn(plot.read_bytes())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "p.json", "p.png"]


def test_command_with_one_estimator(command):
    done = command("--estimator", "gaussian")
    assert done.exit_code == 0
    assert "gaussian" in done.output
    assert "histogram" not in done.output


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (["--plot", "x.jpg"], ValueError, [".png, .svg, .pdf", "x.jpg"]),
        (["--plot", "plot"], ValueError, [".png, .svg, .pdf", "'plot'"]),
        (["--out", "x.svg"], ValueError, ["--out writes JSON", "--plot"]),
        (["--out", "."], ValueError, ["is a folder"]),
        (["--plot", "/proc/nowhere/x.png"], OSError, ["cannot write to /proc"]),
    ],
)
def test_bad_paths_are_refused_before_the_work(command, options, kind, words, monkeypatch, tmp_path):

    monkeypatch.setattr("lambda_vit.cli.models.open_model", lambda *a, **k: pytest.fail("work began"))
    monkeypatch.chdir(tmp_path)
    done = command(*options)
    assert isinstance(done.exception, kind)
    assert [word for word in words if word not in str(done.exception)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_weights_and_images(real_data, tmp_path):
    """100 real images, ten of each class: which attention layers are lowest, and what bounds a histogram's entropy."""
    out = tmp_path / "p.json"
    model = ["--model", "deit_tiny_patch16_224", "--weights", real_data / WEIGHTS, "--data", real_data / IMAGES]
    arguments = ["profile", *model, "--samples", 100, "--out", out, "--plot", tmp_path / "p.png"]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text(encoding="utf-8"))
    for name in ("gaussian", "histogram"):
        low = readings.lowest(record, name)
        assert set(low[:2]) == {5, 11}
        assert low[2] in (3, 4)  # which are closer together than two draws of images
    for row in record["blocks"]:
        for layer in (row["attn"], row["mlp"]):
            assert layer["tokens"] == 100 * 197
            # no distribution of that variance has more entropy than the normal one
            assert layer["histogram"]["mean"] < layer["gaussian"]["mean"] + 2.0471
            assert layer["histogram"]["mean"] > layer["gaussian"]["mean"] + 1.5
    assert_drawn((tmp_path / "p.png").read_bytes())
